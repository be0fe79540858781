//! What is mounted where, from the mount table and the kernel's memory. No FUSE server is queried, because it may hang.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::errno::Errno;
use nix::sys::stat::makedev;
use rustix::fs::{AtFlags, CWD, Statx, StatxAttributes, StatxFlags, statx};

use super::{Error, Result};

/// Maximum number of links on one path that the kernel follows.
const MAX_LINKS: usize = 40;

/// Reads the mount table of this thread. That in `/proc/self` is the first thread's, and tests have mount namespaces of
/// their own.
fn mount_table() -> Result<Vec<u8>> {
    let [thread, process] = ["/proc/thread-self/mountinfo", "/proc/self/mountinfo"].map(Path::new);
    match fs::read(thread) {
        // Linux has it since 3.17. All threads of the daemon have the same table.
        Err(e) if e.kind() == io::ErrorKind::NotFound => fs::read(process).map_err(|e| Error::io("read", process, &e)),
        table => table.map_err(|e| Error::io("read", thread, &e)),
    }
}

/// The device that is mounted on exactly this path.
pub fn device_mounted_on(path: &Path) -> Result<Option<u64>> {
    if statx_reports_mount_roots() {
        return match cached_statx(path) {
            Ok(status) => {
                let is_mounted = status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
                Ok(is_mounted.then(|| makedev(status.stx_dev_major.into(), status.stx_dev_minor.into())))
            }
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(e) => Err(Error::new("statx", path, Errno::from_raw(e.raw_os_error()))),
        };
    }
    let table = mount_table()?;
    // The last mount on a path is the uppermost.
    Ok(mounts(&table).filter(|mount| mount.point == path).last().map(|mount| mount.device))
}

/// `statx` with what the kernel has in memory, so that no server of a file system is queried.
fn cached_statx(path: &Path) -> rustix::io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    statx(CWD, path, flags, StatxFlags::empty())
}

/// True since Linux 5.8. Before 4.20, `statx` would even query the server of a FUSE mount.
fn statx_reports_mount_roots() -> bool {
    static IS_SUPPORTED: LazyLock<bool> = LazyLock::new(|| {
        cached_statx(Path::new("/")).is_ok_and(|root| root.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT))
    });
    *IS_SUPPORTED
}

/// The mount points strictly below `path`.
pub fn mount_points_below(path: &Path) -> Result<Vec<PathBuf>> {
    let table = mount_table()?;
    let points = mounts(&table).map(|mount| mount.point);
    Ok(points.filter(|point| point != path && point.starts_with(path)).collect())
}

/// The device of the FUSE file system that the absolute `path` is on.
pub fn fuse_device_of(path: &Path) -> Result<Option<u64>> {
    let table = mount_table()?;
    let mounts: Vec<MountInfo> = mounts(&table).collect();
    let path = resolve(path, &mounts, &|link| fs::read_link(link))?;
    Ok(containing_mount(&path, &mounts).filter(|mount| mount.is_fuse).map(|mount| mount.device))
}

/// The mount that contains a path without links.
fn containing_mount<'m>(path: &Path, mounts: &'m [MountInfo]) -> Option<&'m MountInfo> {
    // If several file systems are mounted on one path, the last one is uppermost. `max_by_key` returns the last maximum.
    let containing = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    containing.max_by_key(|mount| mount.point.components().count())
}

/// Resolves the links of `path` without a query to a FUSE file system. A link is read only if the mount table says that
/// it is on another file system.
fn resolve(path: &Path, mounts: &[MountInfo], read_link: &dyn Fn(&Path) -> io::Result<PathBuf>) -> Result<PathBuf> {
    let mut rest: VecDeque<OsString> = path.iter().map(OsStr::to_owned).collect();
    let mut resolved = PathBuf::from("/");
    let mut links = 0;
    // Behind a FUSE file system, every name is looked up through it.
    let mut may_hang = false;
    while let Some(name) = rest.pop_front() {
        if name == OsStr::new("..") {
            resolved.pop();
            continue;
        }
        let next = resolved.join(name);
        // A mount point and the directories above it are no links. In an autofs, reading a name that is not mounted
        // would start the automounter.
        let is_mounted_below = mounts.iter().any(|mount| mount.point.starts_with(&next));
        may_hang |= containing_mount(&resolved, mounts).is_some_and(|mount| mount.is_fuse || mount.is_autofs);
        if is_mounted_below || may_hang {
            resolved = next;
            continue;
        }
        match read_link(&next) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Error::new("resolve", path, Errno::ELOOP));
                }
                // An absolute target begins with "/", and joining that replaces the path.
                for name in target.iter().rev() {
                    rest.push_front(name.to_owned());
                }
            }
            // It is no link, or it does not exist.
            Err(_) => resolved = next,
        }
    }
    Ok(resolved)
}

/// Where the file system of an absolute path without links is mounted, for messages.
pub fn mount_point_of(path: &Path) -> Option<PathBuf> {
    let table = mount_table().ok()?;
    let mounts: Vec<MountInfo> = mounts(&table).collect();
    containing_mount(path, &mounts).map(|mount| mount.point.clone())
}

/// One line of a mountinfo table.
#[derive(Debug, PartialEq, Eq)]
struct MountInfo {
    point: PathBuf,
    device: u64,
    is_fuse: bool,
    is_autofs: bool,
}

/// Parses the lines of a mountinfo table. Field 3 is the device, field 5 is the mount point, in which space, tab, newline
/// and backslash are written in octal, and the type follows a dash.
fn mounts(table: &[u8]) -> impl Iterator<Item = MountInfo> + '_ {
    table.split(|b| *b == b'\n').filter_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
        let device = makedev(major.parse().ok()?, minor.parse().ok()?);
        let field = fields.nth(1)?;
        let file_system = fields.skip_while(|field| *field != b"-").nth(1)?;
        let is_fuse = file_system == b"fuse" || file_system.starts_with(b"fuse.");
        let mut point = Vec::with_capacity(field.len());
        let mut rest = field;
        while let [first, tail @ ..] = rest {
            let octal = tail
                .get(..3)
                .filter(|_| *first == b'\\')
                .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
            point.push(octal.unwrap_or(*first));
            rest = if octal.is_some() { &tail[3..] } else { tail };
        }
        Some(MountInfo {
            point: PathBuf::from(OsString::from_vec(point)),
            device,
            is_fuse,
            is_autofs: file_system == b"autofs",
        })
    })
}

#[cfg(test)]
mod tests;
