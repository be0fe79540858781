//! Every effect on the machine outside the store, behind the trait `Sys`.
//!
//! `Host` is the real machine. The double `testing::FaultySys` passes calls on to it and can fail any of them, so that
//! tests can stop an operation between any two steps. Calls block, nothing is retried, and the caller decides what an
//! error means. Unmounting never uses MNT_FORCE: on a bind mount it would abort the connection of the whole FUSE file
//! system, for all its users on the node.
#![deny(unsafe_code)]

mod counted;
#[cfg(feature = "server")]
mod descriptors;
mod directory;
pub mod file;
mod host;
mod memory;
mod mountinfo;
mod sqlite;
#[cfg(test)]
pub mod testing;
mod tree;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, Statfs};
use nix::sys::statvfs::FsFlags;

pub use self::counted::CountedMemory;
#[cfg(feature = "server")]
pub use self::descriptors::{inherited_sockets, into_grpc_fd};
pub use self::directory::{DirHandle, is_entry_name};
pub use self::host::Host;
pub use self::memory::{configure_allocator, give_back_free_memory};
pub use self::mountinfo::mount_point_of;
pub use self::sqlite::sqlite_errno;
pub use self::tree::{DiskUsage, supports_d_type};
use crate::model::{Quoted, SnapshotId};

/// A failed system call, with what it was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub call: &'static str,
    pub path: PathBuf,
    pub errno: Errno,
}

impl Error {
    fn new(call: &'static str, path: &Path, errno: Errno) -> Self {
        Self { call, path: path.to_owned(), errno }
    }

    fn io(call: &'static str, path: &Path, error: &io::Error) -> Self {
        // std reports a few refusals of its own (a NUL in a path) without an errno.
        Self::new(call, path, error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw))
    }

    /// The server of a FUSE file system has died, or the file system is gone.
    pub fn is_dead(&self) -> bool {
        matches!(self.errno, Errno::ENOTCONN | Errno::ESTALE)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The path may hold names that a container chose.
        let path = self.path.to_string_lossy();
        write!(f, "cannot {} {}: ", self.call, Quoted(&path))?;
        match self.errno {
            NOT_REGULAR => f.write_str("not a regular file"),
            errno => write!(f, "{} ({errno:?})", errno.desc()),
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// The error of reading something that is not a regular file. Linux has no number for it, and no call of `Sys` returns
/// this one otherwise.
pub const NOT_REGULAR: Errno = Errno::EMEDIUMTYPE;

/// The part of the result of `stat` that this program uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub file_type: FileType,
    pub device: u64,
    pub inode: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Number of hard links.
    pub links: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    Directory,
    Symlink,
    Other,
}

impl From<fs::FileType> for FileType {
    fn from(file_type: fs::FileType) -> Self {
        if file_type.is_dir() {
            Self::Directory
        } else if file_type.is_symlink() {
            Self::Symlink
        } else {
            Self::Other
        }
    }
}

impl From<&fs::Metadata> for Status {
    fn from(metadata: &fs::Metadata) -> Self {
        Self {
            file_type: metadata.file_type().into(),
            device: metadata.dev(),
            inode: metadata.ino(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            size: metadata.size(),
            links: metadata.nlink(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// What an overlay shows of a directory, besides its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Extended attributes, without those of overlayfs.
    pub xattrs: Vec<(OsString, Vec<u8>)>,
}

/// The part of the result of `statfs` that this program uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    pub read_only: bool,
    /// Inode numbers of a FUSE file system may change while it is mounted, as those of CernVM-FS do.
    pub fuse: bool,
    /// Bytes that an unprivileged user can still write.
    pub free: u64,
}

impl From<Statfs> for FileSystem {
    fn from(statfs: Statfs) -> Self {
        Self {
            read_only: statfs.flags().contains(FsFlags::ST_RDONLY),
            fuse: statfs.filesystem_type() == FUSE_SUPER_MAGIC,
            free: statfs.blocks_available().saturating_mul(u64::try_from(statfs.block_size()).unwrap_or(0)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Fails with EBUSY while a file below is in use.
    Plain,
    /// MNT_DETACH: leaves the tree at once, and is released with its last user.
    Detach,
}

/// System calls as this program needs them.
pub trait Sys: Send + Sync {
    fn create_dir(&self, path: &Path, mode: u32) -> Result<()>;
    fn chown(&self, path: &Path, uid: u32, gid: u32) -> Result<()>;
    fn set_attributes(&self, path: &Path, attributes: &Attributes) -> Result<()>;
    /// Creates a 0:0 character device, which hides the entry of that name in the layers below.
    fn create_whiteout(&self, path: &Path) -> Result<()>;
    fn write_file(&self, path: &Path, content: &[u8]) -> Result<()>;
    fn make_opaque(&self, path: &Path) -> Result<()>;
    fn symlink(&self, target: &Path, link: &Path) -> Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
    fn remove_file(&self, path: &Path) -> Result<()>;
    fn remove_dir(&self, path: &Path) -> Result<()>;
    /// Removes a tree, without following links or entering mounts. A tree that does not exist is no error. `cancelled`
    /// is called before each entry, so it also shows the progress; if it returns true, the error is ECANCELED.
    fn remove_tree(&self, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<()>;
    fn bind_read_only(&self, source: &DirHandle, target: &Path) -> Result<()>;
    fn unmount(&self, target: &Path, mode: Unmount) -> Result<()>;

    fn stat(&self, path: &Path) -> Result<Status>;
    fn lstat(&self, path: &Path) -> Result<Status>;
    fn read_link(&self, path: &Path) -> Result<PathBuf>;
    /// Calls `visitor` with the name and the type of each entry of a directory, in no order and without `.` and `..`,
    /// until it breaks.
    fn for_each_entry(&self, path: &Path, visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) -> Result<()>;
    /// The names of at most `limit` entries, in no order and without `.` and `..`.
    fn first_entries(&self, path: &Path, limit: usize) -> Result<Vec<OsString>> {
        let mut names = Vec::new();
        self.for_each_entry(path, &mut |name, _| {
            names.push(name.to_owned());
            if names.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(names)
    }
    /// Opens a directory. Links are followed: this is for paths that an administrator chose.
    fn open_dir(&self, path: &Path) -> Result<DirHandle>;
    /// Opens a directory `below` an open one. No link is followed, here and in the other calls with a `DirHandle`: the
    /// error is ELOOP or ENOTDIR if there is one.
    fn open_below(&self, dir: &DirHandle, below: &Path) -> Result<DirHandle>;
    fn dir_status(&self, dir: &DirHandle) -> Result<Status>;
    /// Does the same as `statfs` for an open directory.
    fn dir_statfs(&self, dir: &DirHandle) -> Result<FileSystem>;
    /// Does the same as `attribute_names` for an open directory.
    fn dir_attribute_names(&self, dir: &DirHandle) -> Result<Vec<OsString>>;
    /// What an overlay shows of a directory, without the extended attributes named in `ignored`.
    fn attributes_below(&self, dir: &DirHandle, below: &Path, ignored: &[OsString]) -> Result<Attributes>;
    /// Does the same as `for_each_entry` below an open directory, and returns the status of the directory that it read.
    fn for_each_entry_below(
        &self,
        dir: &DirHandle,
        below: &Path,
        visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> Result<Status>;
    /// The names of the extended attributes of a file or directory.
    fn attribute_names(&self, path: &Path) -> Result<Vec<OsString>>;
    /// The value of an extended attribute. None: there is no such attribute.
    fn attribute(&self, path: &Path, name: &str) -> Result<Option<Vec<u8>>>;
    /// The content of a regular file. The error is `NOT_REGULAR` for anything else, a link included, and EFBIG for a
    /// file of more than `limit` bytes.
    fn read_file(&self, path: &Path, limit: u64) -> Result<Vec<u8>>;
    /// Queries the file system itself. Unlike `stat`, this fails when a FUSE server has died.
    fn statfs(&self, path: &Path) -> Result<FileSystem>;
    /// What a tree takes on disk. `cancelled` is called now and then; if it returns true, the error is ECANCELED.
    fn disk_usage(&self, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<DiskUsage>;
    /// The device of the FUSE file system that this path is on. None: it is on another one. The answer comes from the
    /// mount table, so a FUSE server that hangs cannot delay it.
    fn mounted_fuse(&self, path: &Path) -> Result<Option<u64>>;
    /// The device that is mounted on exactly this path. No FUSE server is queried, and on Linux 5.8 or newer the mount
    /// table, which may be long, is not read.
    fn mounted(&self, path: &Path) -> Result<Option<u64>>;
    /// The mount points strictly below `path`, in this mount namespace.
    fn mounts_below(&self, path: &Path) -> Result<Vec<PathBuf>>;
}

/// The snapshot ids that entries of directory `path` are named after.
pub fn snapshot_ids(sys: &dyn Sys, path: &Path) -> Result<Vec<SnapshotId>> {
    let mut ids = Vec::new();
    sys.for_each_entry(path, &mut |name, _| {
        ids.extend(name.to_str().and_then(SnapshotId::from_directory_name));
        ControlFlow::Continue(())
    })?;
    Ok(ids)
}
