//! Walks over trees that a container made. They can have any width and depth, and change during the walk. The memory and
//! the open descriptors of a walk have bounds that do not depend on the tree. A walk follows no link, names entries
//! relative to an open directory, and does not enter other file systems.
#![forbid(unsafe_code)]

mod removal;
mod usage;

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fstat};
use rustix::fs::{Dir, DirEntry, FileType};

pub use self::removal::remove;
pub use self::usage::{DiskUsage, disk_usage};

const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// An open directory. At most 48 KiB of its entries are in memory.
struct Directory(Dir);

impl Directory {
    fn open(path: &Path) -> Result<Self, Errno> {
        Self::from_fd(open(path, DIRECTORY, Mode::empty())?)
    }

    /// Opens the directory `name` in this one.
    fn open_entry(&self, name: &CStr) -> Result<Self, Errno> {
        Self::from_fd(openat(self.fd()?, name, DIRECTORY, Mode::empty())?)
    }

    fn from_fd(fd: OwnedFd) -> Result<Self, Errno> {
        Dir::new(fd).map(Self).map_err(errno)
    }

    fn fd(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.0.fd().map_err(errno)
    }

    fn status(&self) -> Result<FileStat, Errno> {
        fstat(self.fd()?)
    }

    /// Reads the next entry that is neither `.` nor `..`. None: there are no more.
    fn next_entry(&mut self) -> Result<Option<DirEntry>, Errno> {
        loop {
            match self.0.read().transpose().map_err(errno)? {
                Some(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => {}
                entry => return Ok(entry),
            }
        }
    }

    fn rewind(&mut self) {
        self.0.rewind();
    }

    /// Continues after the entry that has this offset.
    fn seek(&mut self, offset: i64) -> Result<(), Errno> {
        self.0.seek(offset).map_err(errno)
    }
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// Whether the file system of directory `path` stores the types of entries, which overlayfs needs of its upper directories
/// to hide its whiteouts. ext4 made without `filetype` and XFS made with `ftype=0` do not. The directory must not be empty.
pub fn supports_d_type(path: &Path) -> super::Result<bool> {
    let entry = Directory::open(path).and_then(|mut directory| directory.next_entry());
    let entry = entry.map_err(|e| super::Error::new("read directory", path, e))?;
    Ok(entry.is_none_or(|entry| entry.file_type() != FileType::Unknown))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Makes a chain of directories, deeper than any path can name if `levels` are many.
    pub fn make_chain(top: &Path, levels: usize) {
        let mut current = open(top, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..levels {
            nix::sys::stat::mkdirat(&current, c"d", Mode::from_bits_truncate(0o755)).unwrap();
            current = openat(&current, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn d_type_is_supported_here() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(supports_d_type(dir.path()), Ok(true), "without an entry");
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(supports_d_type(dir.path()), Ok(true));
    }
}
