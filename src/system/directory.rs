//! Directories that are held open. Names below one are resolved from the open directory and no link is followed, so
//! nobody can lead the daemon elsewhere by exchanging a part of the path.
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

/// An open directory, with its path for messages.
#[derive(Clone, Debug)]
pub struct DirHandle {
    file: Arc<fs::File>,
    path: PathBuf,
}

impl DirHandle {
    /// Opens a directory. Links are followed: this is for paths that an administrator chose.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| error("open", path, e))?;
        Ok(Self { file: Arc::new(fd.into()), path: path.to_owned() })
    }

    /// Opens the directory `below` this one. The error is ELOOP or ENOTDIR if a part of the path is a link or a file.
    pub(super) fn open_below(&self, below: &Path) -> Result<Self> {
        let path = self.path.join(below);
        let fd = open_beneath(self.as_fd(), below, OFlags::PATH).map_err(|e| error("open", &path, e))?;
        Ok(Self { file: Arc::new(fd.into()), path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path of the entry `name` of this directory, for calls that take only paths. No part of it but `name` can be a
    /// link.
    pub fn entry(&self, name: &OsStr) -> PathBuf {
        self.proc_path().join(name)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A path of the open directory itself, for calls that take only paths.
    pub(super) fn proc_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    pub(super) fn status(&self) -> Result<Status> {
        self.file.metadata().map(|m| Status::from(&m)).map_err(|e| Error::io("stat", &self.path, &e))
    }

    /// What an overlay shows of this directory, without the extended attributes in `ignored`.
    pub(super) fn attributes(&self, ignored: &[OsString]) -> Result<Attributes> {
        let status = self.status()?;
        let path = self.proc_path();
        let xattrs = match xattr::list_deref(&path) {
            Ok(names) => names
                .filter(|name| !is_overlay_xattr(name) && !ignored.contains(name))
                .filter_map(|name| match xattr::get_deref(&path, &name) {
                    Ok(value) => value.map(|value| Ok((name, value))),
                    Err(e) => Some(Err(Error::io("read the attributes of", &self.path, &e))),
                })
                .collect::<Result<_>>()?,
            // The file system does not support extended attributes.
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Vec::new(),
            Err(e) => return Err(Error::io("list the attributes of", &self.path, &e)),
        };
        Ok(Attributes { mode: status.mode, uid: status.uid, gid: status.gid, mtime: status.mtime, xattrs })
    }

    /// Calls `visitor` with the name and the type of each entry of the directory `below` this one, in no order and
    /// without `.` and `..`, until it breaks. Returns the status of that directory.
    pub(super) fn for_each_entry(
        &self,
        below: &Path,
        visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
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
                // Not every file system stores the types of entries.
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
            if visitor(name, file_type).is_break() {
                break;
            }
        }
        Ok(status)
    }
}

fn error(call: &'static str, path: &Path, e: rustix::io::Errno) -> Error {
    Error::new(call, path, Errno::from_raw(e.raw_os_error()))
}

/// Whether it is the name of an entry, which leads nowhere else. A hostile file system may return others.
pub fn is_entry_name(name: &OsStr) -> bool {
    !matches!(name.as_bytes(), b"" | b"." | b"..") && !name.as_bytes().contains(&b'/')
}

/// Whether the attribute is one with which overlayfs marks entries. Those are not part of an image.
fn is_overlay_xattr(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"trusted.overlay.")
}

/// Opens the directory `below` the open directory `dir` without following a link.
fn open_beneath(dir: BorrowedFd<'_>, below: &Path, access: OFlags) -> rustix::io::Result<OwnedFd> {
    use rustix::io::Errno as E;
    let flags = access | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let path = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match openat2(dir, path, flags, Mode::empty(), resolve) {
        // The kernel is older than Linux 5.6, or a seccomp filter does not know the call.
        Err(E::NOSYS | E::PERM) => open_stepwise(dir, path, flags),
        result => result,
    }
}

/// Does the same as `open_beneath`, one component of the path after the other.
fn open_stepwise(dir: BorrowedFd<'_>, below: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let intermediate = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut names = below.iter().peekable();
    let mut current: Option<OwnedFd> = None;
    while let Some(name) = names.next() {
        if name == ".." || name == "/" {
            return Err(rustix::io::Errno::XDEV);
        }
        let flags = if names.peek().is_some() { intermediate } else { flags };
        let parent = current.as_ref().map_or(dir, |fd| fd.as_fd());
        current = Some(openat(parent, name, flags, Mode::empty())?);
    }
    current.ok_or(rustix::io::Errno::NOENT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn directory_is_opened_below_another_without_following_links() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::create_dir_all(outside.join("b")).unwrap();
        fs::write(top.join("file"), "").unwrap();
        symlink(&outside, top.join("link")).unwrap();
        symlink("a", top.join("inner")).unwrap();
        let handle = DirHandle::open(&top).unwrap();
        let methods: [fn(BorrowedFd<'_>, &Path) -> rustix::io::Result<OwnedFd>; 2] = [
            |dir, below| open_beneath(dir, below, OFlags::PATH),
            |dir, below| {
                open_stepwise(dir, below, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW)
            },
        ];
        for open in methods {
            let open = |below: &str| open(handle.as_fd(), Path::new(below)).map(drop);
            for good in ["a", "a/b", "."] {
                assert_eq!(open(good), Ok(()), "{good}");
            }
            for bad in ["link", "link/b", "inner", "inner/b", "file", "..", "/", "/etc", "absent"] {
                assert!(open(bad).is_err(), "{bad}");
            }
        }
        // An open directory stays the same when another one takes its place.
        let opened = handle.open_below(Path::new("a")).unwrap();
        fs::rename(top.join("a"), top.join("was")).unwrap();
        symlink(&outside, top.join("a")).unwrap();
        fs::write(top.join("was/b/inside"), "").unwrap();
        let mut names = Vec::new();
        let mut push = |name: &OsStr, _| {
            names.push(name.to_owned());
            ControlFlow::Continue(())
        };
        let status = opened.for_each_entry(Path::new("b"), &mut push).unwrap();
        assert_eq!((names, status.file_type), (vec![OsString::from("inside")], FileType::Directory));
    }
}
