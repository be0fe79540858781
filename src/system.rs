//! Every effect on the machine outside the store, behind one trait.
//!
//! `Host` is the real machine. The double in `system/testing.rs` does the same but can fail
//! any call on demand, so that tests can stop an operation between any two steps.
//! Blocking calls, no retries, no policy: what an error means is the caller's business.
//! Unmounting never uses MNT_FORCE: on a bind mount it would abort the connection of the
//! whole FUSE file system, for everybody on the node.
#![deny(unsafe_code)]

mod counted;
#[cfg(feature = "server")]
mod descriptors;
mod directory;
pub mod file;
mod memory;
mod mounts;
mod sqlite;
#[cfg(test)]
pub mod testing;
mod tree;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, Statfs, fstatfs, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::sys::time::TimeSpec;
use rustix::fs::{AtFlags, CWD, Statx, StatxAttributes, StatxFlags, statx};

pub use self::counted::CountedMemory;
#[cfg(feature = "server")]
pub use self::descriptors::{inherited_sockets, into_grpc_fd};
pub use self::directory::DirHandle;
use self::file::LinkPolicy;
pub use self::memory::{configure_allocator, give_back_free_memory};
pub use self::mounts::mount_point_of;
pub use self::sqlite::sqlite_errno;
pub use self::tree::DiskUsage;
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
}

impl Error {
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

/// Why something that is no regular file cannot be read. Linux has no number for it, and none of our calls
/// gives this one.
pub const NOT_REGULAR: Errno = Errno::EMEDIUMTYPE;

/// What `stat` says, as far as we ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub file_type: FileType,
    pub device: u64,
    pub inode: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Names of the file.
    pub links: u64,
    pub mtime: (i64, i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    Directory,
    Symlink,
    Other,
}

impl From<fs::FileType> for FileType {
    fn from(t: fs::FileType) -> Self {
        if t.is_dir() {
            Self::Directory
        } else if t.is_symlink() {
            Self::Symlink
        } else {
            Self::Other
        }
    }
}

impl From<&fs::Metadata> for Status {
    fn from(m: &fs::Metadata) -> Self {
        Self {
            file_type: m.file_type().into(),
            device: m.dev(),
            inode: m.ino(),
            mode: m.mode() & 0o7777,
            uid: m.uid(),
            gid: m.gid(),
            size: m.size(),
            links: m.nlink(),
            mtime: (m.mtime(), m.mtime_nsec()),
        }
    }
}

/// Everything about a directory that shows through an overlay, besides its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Without those that overlayfs keeps for itself.
    pub xattrs: Vec<(OsString, Vec<u8>)>,
}

/// What `statfs` says about the mount and the file system that a path is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    pub read_only: bool,
    /// Its inode numbers may change under us, as those of CernVM-FS do.
    pub fuse: bool,
    /// Bytes that can still be written.
    pub free: u64,
}

impl From<Statfs> for FileSystem {
    fn from(found: Statfs) -> Self {
        Self {
            read_only: found.flags().contains(FsFlags::ST_RDONLY),
            fuse: found.filesystem_type() == FUSE_SUPER_MAGIC,
            free: found.blocks_available().saturating_mul(u64::try_from(found.block_size()).unwrap_or(0)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Fails with EBUSY while a file below is in use.
    Plain,
    /// MNT_DETACH: gone from the tree at once, released when its last user is.
    Detach,
}

/// The name of the overlayfs attribute that makes a directory opaque.
const OPAQUE: &str = "trusted.overlay.opaque";

pub trait Sys: Send + Sync {
    fn create_dir(&self, path: &Path, mode: u32) -> Result<()>;
    fn chown(&self, path: &Path, uid: u32, gid: u32) -> Result<()>;
    fn set_attributes(&self, path: &Path, attributes: &Attributes) -> Result<()>;
    /// A 0:0 character device: overlayfs shows nothing of that name from below.
    fn create_whiteout(&self, path: &Path) -> Result<()>;
    fn write_file(&self, path: &Path, content: &[u8]) -> Result<()>;
    fn make_opaque(&self, path: &Path) -> Result<()>;
    fn symlink(&self, target: &Path, link: &Path) -> Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
    fn remove_file(&self, path: &Path) -> Result<()>;
    fn remove_dir(&self, path: &Path) -> Result<()>;
    /// Removes a tree, without following links or entering mounts. Absent is fine. ECANCELED if
    /// `cancelled` says so; it is asked before each entry, and so shows its caller the progress.
    fn remove_tree(&self, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<()>;
    fn bind_read_only(&self, source: &DirHandle, target: &Path) -> Result<()>;
    fn unmount(&self, target: &Path, how: Unmount) -> Result<()>;

    fn stat(&self, path: &Path) -> Result<Status>;
    fn lstat(&self, path: &Path) -> Result<Status>;
    fn read_link(&self, path: &Path) -> Result<PathBuf>;
    /// Gives names and types to `each`, in no order and without `.` and `..`, until that breaks it off.
    fn for_each_entry(&self, path: &Path, each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) -> Result<()>;
    /// The names of the first entries, `limit` at most, in no order and without `.` and `..`.
    fn first_entries(&self, path: &Path, limit: usize) -> Result<Vec<OsString>> {
        let mut names = Vec::new();
        self.for_each_entry(path, &mut |name, _| {
            names.push(name.to_owned());
            if names.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(names)
    }
    /// Holds a directory open. Follows links: this is for paths that an administrator chose.
    fn open_dir(&self, path: &Path) -> Result<DirHandle>;
    /// Holds a directory open that is `below` another one. No link is followed, here and in the calls
    /// that follow: ELOOP or ENOTDIR if there is one.
    fn open_below(&self, dir: &DirHandle, below: &Path) -> Result<DirHandle>;
    fn dir_status(&self, dir: &DirHandle) -> Result<Status>;
    /// As `statfs`.
    fn dir_statfs(&self, dir: &DirHandle) -> Result<FileSystem>;
    /// As `attribute_names`.
    fn dir_attribute_names(&self, dir: &DirHandle) -> Result<Vec<OsString>>;
    /// Everything about a directory that shows through an overlay, without the extended attributes
    /// named in `ignored`.
    fn attributes_below(&self, dir: &DirHandle, below: &Path, ignored: &[OsString]) -> Result<Attributes>;
    /// As `for_each_entry`. The result is the status of the directory.
    fn for_each_entry_below(
        &self,
        dir: &DirHandle,
        below: &Path,
        each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> Result<Status>;
    /// The names of the extended attributes of a file or directory.
    fn attribute_names(&self, path: &Path) -> Result<Vec<OsString>>;
    /// The content of a regular file; `NOT_REGULAR` if it is something else, a link for one, EFBIG if it
    /// has more than `limit` bytes.
    fn read_file(&self, path: &Path, limit: u64) -> Result<Vec<u8>>;
    /// The value of one extended attribute; none where there is no such attribute.
    fn attribute(&self, path: &Path, name: &str) -> Result<Option<Vec<u8>>>;
    /// Asks the file system itself; unlike `stat` this fails when a FUSE server has died.
    fn statfs(&self, path: &Path) -> Result<FileSystem>;
    /// What a tree takes. ECANCELED if `cancelled` says so, which is asked now and then.
    fn disk_usage(&self, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<DiskUsage>;
    /// The device of the FUSE file system that this path is on, if it is on one. Asks the mount table
    /// and no FUSE file system: a server that hangs cannot keep anybody waiting here.
    fn mounted_fuse(&self, path: &Path) -> Result<Option<u64>>;
    /// The device of whatever is mounted on exactly this path, if anything is. Asks no file system,
    /// as `mounted_fuse`, and does not read the mount table, which may be long, unless it must.
    fn mounted(&self, path: &Path) -> Result<Option<u64>>;
    /// The mount points strictly below `path`, in this mount namespace.
    fn mounts_below(&self, path: &Path) -> Result<Vec<PathBuf>>;
}

/// This machine.
#[derive(Clone, Copy, Debug)]
pub struct Host;

impl Sys for Host {
    fn create_dir(&self, path: &Path, mode: u32) -> Result<()> {
        const CALL: &str = "create directory";
        fs::DirBuilder::new().mode(mode).create(path).map_err(|e| Error::io(CALL, path, &e))?;
        // The umask has taken its share; what was asked for is what shall be.
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
        xattr::set(path, OPAQUE, b"y").map_err(|e| Error::io("make opaque", path, &e))
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
        const NOTHING: Option<&str> = None;
        mount(Some(&source.proc_path()), target, NOTHING, MsFlags::MS_BIND, NOTHING)
            .map_err(|e| Error::new(CALL, target, e))?;
        // A remount sets all flags of the mount anew, so those it has are said again.
        let flags = statvfs(target).map_err(|e| Error::new(CALL, target, e))?.flags();
        let mut remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        for (has, keep) in [
            (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
            (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
            (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
            (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
            (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
            (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
        ] {
            if flags.contains(has) {
                remount |= keep;
            }
        }
        mount(NOTHING, target, NOTHING, remount, NOTHING).map_err(|e| Error::new("make read-only", target, e))
    }

    fn unmount(&self, target: &Path, how: Unmount) -> Result<()> {
        let flags = match how {
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
        each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> Result<Status> {
        dir.for_each_entry(below, each)
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

    fn for_each_entry(&self, path: &Path, each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) -> Result<()> {
        let mut read = || -> io::Result<()> {
            for entry in fs::read_dir(path)? {
                let entry = entry?;
                if each(&entry.file_name(), entry.file_type()?.into()).is_break() {
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
        mounts::fuse_around(path)
    }

    fn mounted(&self, path: &Path) -> Result<Option<u64>> {
        if statx_has_mount_ids() {
            return match cached_status(path) {
                Ok(status) => {
                    let is_mounted = status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
                    Ok(is_mounted.then(|| makedev(status.stx_dev_major.into(), status.stx_dev_minor.into())))
                }
                Err(rustix::io::Errno::NOENT) => Ok(None),
                Err(e) => Err(Error::new("statx", path, Errno::from_raw(e.raw_os_error()))),
            };
        }
        mounts::device_mounted_on(path)
    }

    fn mounts_below(&self, path: &Path) -> Result<Vec<PathBuf>> {
        mounts::points_below(path)
    }
}

/// The ids in the names of the entries of directory `path`.
pub fn snapshot_ids(sys: &dyn Sys, path: &Path) -> Result<Vec<SnapshotId>> {
    let mut ids = Vec::new();
    sys.for_each_entry(path, &mut |name, _| {
        ids.extend(name.to_str().and_then(SnapshotId::from_directory_name));
        ControlFlow::Continue(())
    })?;
    Ok(ids)
}

/// Whether the file system of directory `path`, which has entries, can hold upper directories of
/// overlays: ext4 made without `filetype` and XFS made with `ftype=0` cannot.
pub fn supports_d_type(path: &Path) -> Result<bool> {
    tree::supports_d_type(path).map_err(|e| Error::new("read directory", path, e))
}

/// What the kernel knows already: no server of a file system is asked.
fn cached_status(path: &Path) -> rustix::io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    statx(CWD, path, flags, StatxFlags::empty())
}

/// Since Linux 5.8. Before 4.20 it would even ask the server of a FUSE mount.
fn statx_has_mount_ids() -> bool {
    static TELLS: LazyLock<bool> = LazyLock::new(|| {
        cached_status(Path::new("/")).is_ok_and(|root| root.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT))
    });
    *TELLS
}
