//! The real machine behind the trait `Sys`.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::statfs::{fstatfs, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::sys::time::TimeSpec;

use super::file::{self, LinkPolicy};
use super::{
    Attributes, DirHandle, DiskUsage, Error, FileSystem, FileType, NOT_REGULAR, Result, Status, Sys, Unmount,
    mountinfo, tree,
};

/// The name of the overlayfs attribute that makes a directory opaque.
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// The machine that this process runs on.
#[derive(Clone, Copy, Debug)]
pub struct Host;

impl Sys for Host {
    fn create_dir(&self, path: &Path, mode: u32) -> Result<()> {
        const CALL: &str = "create directory";
        fs::DirBuilder::new().mode(mode).create(path).map_err(|e| Error::io(CALL, path, &e))?;
        // The umask may have removed bits from the mode.
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| Error::io(CALL, path, &e))
    }

    fn chown(&self, path: &Path, uid: u32, gid: u32) -> Result<()> {
        std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(|e| Error::io("change the owner of", path, &e))
    }

    fn set_attributes(&self, path: &Path, attributes: &Attributes) -> Result<()> {
        const CALL: &str = "set the attributes of";
        self.chown(path, attributes.uid, attributes.gid)?;
        fs::set_permissions(path, fs::Permissions::from_mode(attributes.mode))
            .map_err(|e| Error::io(CALL, path, &e))?;
        for (name, value) in &attributes.xattrs {
            xattr::set(path, name, value).map_err(|e| Error::io(CALL, path, &e))?;
        }
        let (seconds, nanoseconds) = attributes.mtime;
        let time = TimeSpec::new(seconds, nanoseconds);
        utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).map_err(|e| Error::new(CALL, path, e))
    }

    fn create_whiteout(&self, path: &Path) -> Result<()> {
        mknod(path, SFlag::S_IFCHR, Mode::empty(), 0).map_err(|e| Error::new("create whiteout", path, e))
    }

    fn write_file(&self, path: &Path, content: &[u8]) -> Result<()> {
        fs::write(path, content).map_err(|e| Error::io("write", path, &e))
    }

    fn make_opaque(&self, path: &Path) -> Result<()> {
        xattr::set(path, OPAQUE_XATTR, b"y").map_err(|e| Error::io("make opaque", path, &e))
    }

    fn symlink(&self, target: &Path, link: &Path) -> Result<()> {
        std::os::unix::fs::symlink(target, link).map_err(|e| Error::io("create link", link, &e))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to).map_err(|e| Error::io("rename to", to, &e))
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).map_err(|e| Error::io("remove", path, &e))
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        fs::remove_dir(path).map_err(|e| Error::io("remove directory", path, &e))
    }

    fn remove_tree(&self, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<()> {
        tree::remove(path, cancelled).map_err(|e| Error::new("remove tree", path, e))
    }

    fn bind_read_only(&self, source: &DirHandle, target: &Path) -> Result<()> {
        const CALL: &str = "bind mount on";
        const NONE: Option<&str> = None;
        mount(Some(&source.proc_path()), target, NONE, MsFlags::MS_BIND, NONE)
            .map_err(|e| Error::new(CALL, target, e))?;
        // A remount replaces all flags of a mount, so it has to repeat those that are set.
        let flags = statvfs(target).map_err(|e| Error::new(CALL, target, e))?.flags();
        let mut remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        for (current, repeated) in [
            (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
            (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
            (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
            (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
            (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
            (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
        ] {
            if flags.contains(current) {
                remount |= repeated;
            }
        }
        mount(NONE, target, NONE, remount, NONE).map_err(|e| Error::new("make read-only", target, e))
    }

    fn unmount(&self, target: &Path, mode: Unmount) -> Result<()> {
        let flags = match mode {
            Unmount::Plain => MntFlags::UMOUNT_NOFOLLOW,
            Unmount::Detach => MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH,
        };
        umount2(target, flags).map_err(|e| Error::new("unmount", target, e))
    }

    fn stat(&self, path: &Path) -> Result<Status> {
        fs::metadata(path).map(|m| Status::from(&m)).map_err(|e| Error::io("stat", path, &e))
    }

    fn lstat(&self, path: &Path) -> Result<Status> {
        fs::symlink_metadata(path).map(|m| Status::from(&m)).map_err(|e| Error::io("lstat", path, &e))
    }

    fn open_dir(&self, path: &Path) -> Result<DirHandle> {
        DirHandle::open(path)
    }

    fn open_below(&self, dir: &DirHandle, below: &Path) -> Result<DirHandle> {
        dir.open_below(below)
    }

    fn dir_status(&self, dir: &DirHandle) -> Result<Status> {
        dir.status()
    }

    fn dir_statfs(&self, dir: &DirHandle) -> Result<FileSystem> {
        fstatfs(dir.as_fd()).map(FileSystem::from).map_err(|e| Error::new("statfs", dir.path(), e))
    }

    fn dir_attribute_names(&self, dir: &DirHandle) -> Result<Vec<OsString>> {
        self.attribute_names(&dir.proc_path()).map_err(|e| Error { path: dir.path().to_owned(), ..e })
    }

    fn attributes_below(&self, dir: &DirHandle, below: &Path, ignored: &[OsString]) -> Result<Attributes> {
        dir.open_below(below)?.attributes(ignored)
    }

    fn for_each_entry_below(
        &self,
        dir: &DirHandle,
        below: &Path,
        visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> Result<Status> {
        dir.for_each_entry(below, visitor)
    }

    fn attribute_names(&self, path: &Path) -> Result<Vec<OsString>> {
        match xattr::list_deref(path) {
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Ok(Vec::new()),
            names => names.map(Iterator::collect).map_err(|e| Error::io("list the attributes of", path, &e)),
        }
    }

    fn read_link(&self, path: &Path) -> Result<PathBuf> {
        fs::read_link(path).map_err(|e| Error::io("read link", path, &e))
    }

    fn for_each_entry(&self, path: &Path, visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) -> Result<()> {
        let mut read = || -> io::Result<()> {
            for entry in fs::read_dir(path)? {
                let entry = entry?;
                if visitor(&entry.file_name(), entry.file_type()?.into()).is_break() {
                    break;
                }
            }
            Ok(())
        };
        read().map_err(|e| Error::io("read directory", path, &e))
    }

    fn read_file(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
        const CALL: &str = "read";
        file::read(path, LinkPolicy::Refused, limit).map_err(|e| match e {
            file::Error::Unreadable(cause) => Error::io(CALL, path, &cause),
            file::Error::NotRegular { .. } => Error::new(CALL, path, NOT_REGULAR),
            file::Error::TooLong { .. } => Error::new(CALL, path, Errno::EFBIG),
        })
    }

    fn attribute(&self, path: &Path, name: &str) -> Result<Option<Vec<u8>>> {
        match xattr::get(path, name) {
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Ok(None),
            result => result.map_err(|e| Error::io("read the attributes of", path, &e)),
        }
    }

    fn statfs(&self, path: &Path) -> Result<FileSystem> {
        statfs(path).map(FileSystem::from).map_err(|e| Error::new("statfs", path, e))
    }

    fn disk_usage(&self, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<DiskUsage> {
        tree::disk_usage(path, cancelled).map_err(|e| Error::new("measure", path, e))
    }

    fn mounted_fuse(&self, path: &Path) -> Result<Option<u64>> {
        mountinfo::fuse_device_of(path)
    }

    fn mounted(&self, path: &Path) -> Result<Option<u64>> {
        mountinfo::device_mounted_on(path)
    }

    fn mounts_below(&self, path: &Path) -> Result<Vec<PathBuf>> {
        mountinfo::mount_points_below(path)
    }
}
