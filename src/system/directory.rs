//! A directory that is held open, and what lies below it. Nothing that is exchanged on the way to it,
//! or put there as a link, leads elsewhere: names are resolved from the open directory, and no link
//! is followed.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use rustix::fs::{AtFlags, Dir, FileType as RawType, Mode, OFlags, ResolveFlags, openat, openat2, statat};

use super::{Attributes, Error, FileType, Result, Status};

/// An open directory, with the path it was opened by for messages.
#[derive(Clone, Debug)]
pub struct DirHandle {
    file: Arc<fs::File>,
    path: PathBuf,
}

impl DirHandle {
    /// Follows links: this is for paths that an administrator chose.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| error("open", path, e))?;
        Ok(Self { file: Arc::new(fd.into()), path: path.to_owned() })
    }

    /// The directory `below` this one. ELOOP or ENOTDIR: something on the way is a link or a file.
    pub(super) fn open_below(&self, below: &Path) -> Result<Self> {
        let path = self.path.join(below);
        let fd = open_beneath(self.as_fd(), below, OFlags::PATH).map_err(|e| error("open", &path, e))?;
        Ok(Self { file: Arc::new(fd.into()), path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path of the entry `name` of this directory, for calls that take paths only. Only `name` itself
    /// can be a link.
    pub fn entry(&self, name: &OsStr) -> PathBuf {
        self.proc_path().join(name)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A name of the open directory itself, for calls that take paths only.
    pub(super) fn proc_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    pub(super) fn status(&self) -> Result<Status> {
        self.file.metadata().map(|m| Status::from(&m)).map_err(|e| Error::io("stat", &self.path, &e))
    }

    /// Everything about this directory that shows through an overlay, without the attributes in
    /// `ignored`.
    pub(super) fn attributes(&self, ignored: &[OsString]) -> Result<Attributes> {
        let status = self.status()?;
        let at = self.proc_path();
        let xattrs = match xattr::list_deref(&at) {
            Ok(names) => names
                .filter(|name| !is_overlayfs_own(name) && !ignored.contains(name))
                .filter_map(|name| match xattr::get_deref(&at, &name) {
                    Ok(value) => value.map(|value| Ok((name, value))),
                    Err(e) => Some(Err(Error::io("read the attributes of", &self.path, &e))),
                })
                .collect::<Result<_>>()?,
            // A file system without extended attributes has none to show.
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Vec::new(),
            Err(e) => return Err(Error::io("list the attributes of", &self.path, &e)),
        };
        Ok(Attributes { mode: status.mode, uid: status.uid, gid: status.gid, mtime: status.mtime, xattrs })
    }

    /// Gives names and types of the entries of the directory `below` this one to `each`, in no order and
    /// without `.` and `..`, until that breaks it off. The result is the status of that directory.
    pub(super) fn for_each_entry(
        &self,
        below: &Path,
        each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> Result<Status> {
        let path = self.path.join(below);
        let failed = |e| error("read directory", &path, e);
        let fd = open_beneath(self.as_fd(), below, OFlags::RDONLY).map_err(failed)?;
        let file = fs::File::from(fd);
        let status = file.metadata().map(|m| Status::from(&m)).map_err(|e| Error::io("stat", &path, &e))?;
        for entry in Dir::read_from(&file).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let raw = match entry.file_type() {
                // Not every file system says so.
                RawType::Unknown => {
                    let status = statat(&file, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
                    RawType::from_raw_mode(status.st_mode)
                }
                known => known,
            };
            let file_type = match raw {
                RawType::Directory => FileType::Directory,
                RawType::Symlink => FileType::Symlink,
                _ => FileType::Other,
            };
            if each(name, file_type).is_break() {
                break;
            }
        }
        Ok(status)
    }
}

fn error(call: &'static str, path: &Path, e: rustix::io::Errno) -> Error {
    Error::new(call, path, Errno::from_raw(e.raw_os_error()))
}

/// `trusted.overlay.*` says what an entry means to overlayfs, and is no attribute of an image.
fn is_overlayfs_own(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"trusted.overlay.")
}

/// Opens the directory `below` the open directory `dir` without following a link.
fn open_beneath(dir: BorrowedFd<'_>, below: &Path, access: OFlags) -> rustix::io::Result<OwnedFd> {
    use rustix::io::Errno as E;
    let flags = access | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let whole = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match openat2(dir, whole, flags, Mode::empty(), resolve) {
        // Before Linux 5.6, or where a filter of system calls does not know it.
        Err(E::NOSYS | E::PERM) => open_each(dir, whole, flags),
        result => result,
    }
}

/// As `open_beneath`, one name after the other.
fn open_each(dir: BorrowedFd<'_>, below: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let on_the_way = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut names = below.iter().peekable();
    let mut current: Option<OwnedFd> = None;
    while let Some(name) = names.next() {
        if name == ".." || name == "/" {
            return Err(rustix::io::Errno::XDEV);
        }
        let flags = if names.peek().is_some() { on_the_way } else { flags };
        let at = current.as_ref().map_or(dir, |fd| fd.as_fd());
        current = Some(openat(at, name, flags, Mode::empty())?);
    }
    current.ok_or(rustix::io::Errno::NOENT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_directory_is_opened_below_another_one_without_following_links() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::create_dir_all(outside.join("b")).unwrap();
        fs::write(top.join("file"), "").unwrap();
        symlink(&outside, top.join("link")).unwrap();
        symlink("a", top.join("inner")).unwrap();
        let handle = DirHandle::open(&top).unwrap();
        let ways: [fn(BorrowedFd<'_>, &Path) -> rustix::io::Result<OwnedFd>; 2] = [
            |dir, below| open_beneath(dir, below, OFlags::PATH),
            |dir, below| open_each(dir, below, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW),
        ];
        for open in ways {
            let open = |below: &str| open(handle.as_fd(), Path::new(below)).map(drop);
            for good in ["a", "a/b", "."] {
                assert_eq!(open(good), Ok(()), "{good}");
            }
            for bad in ["link", "link/b", "inner", "inner/b", "file", "..", "/", "/etc", "absent"] {
                assert!(open(bad).is_err(), "{bad}");
            }
        }
        // What was opened stays what it is, whatever stands in its place.
        let opened = handle.open_below(Path::new("a")).unwrap();
        fs::rename(top.join("a"), top.join("was")).unwrap();
        symlink(&outside, top.join("a")).unwrap();
        fs::write(top.join("was/b/inside"), "").unwrap();
        let mut names = Vec::new();
        let mut note = |name: &OsStr, _| {
            names.push(name.to_owned());
            ControlFlow::Continue(())
        };
        let status = opened.for_each_entry(Path::new("b"), &mut note).unwrap();
        assert_eq!((names, status.file_type), (vec![OsString::from("inside")], FileType::Directory));
    }
}
