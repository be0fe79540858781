//! The mount table: what is mounted where, without a question to any file system that may hang.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::makedev;

use super::{Error, Result};

/// As many links on one path as the kernel follows.
const MAX_LINKS: usize = 40;

/// Of this thread: `/proc/self` would be the first thread's, and tests have namespaces of their own.
fn mount_table() -> Result<Vec<u8>> {
    let [thread, process] = ["/proc/thread-self/mountinfo", "/proc/self/mountinfo"].map(Path::new);
    match fs::read(thread) {
        // Before Linux 3.17. All threads of the daemon have the same.
        Err(e) if e.kind() == io::ErrorKind::NotFound => fs::read(process).map_err(|e| Error::io("read", process, &e)),
        table => table.map_err(|e| Error::io("read", thread, &e)),
    }
}

/// The device of whatever is mounted on exactly this path.
pub fn device_mounted_on(path: &Path) -> Result<Option<u64>> {
    let table = mount_table()?;
    // The last one is the uppermost.
    Ok(mounts(&table).filter(|mount| mount.point == path).last().map(|mount| mount.device))
}

/// The mount points strictly below `path`.
pub fn points_below(path: &Path) -> Result<Vec<PathBuf>> {
    let table = mount_table()?;
    let points = mounts(&table).map(|mount| mount.point);
    Ok(points.filter(|point| point != path && point.starts_with(path)).collect())
}

/// The device of the FUSE file system that the absolute `path` is on.
pub fn fuse_around(path: &Path) -> Result<Option<u64>> {
    let table = mount_table()?;
    let mounts: Vec<MountInfo> = mounts(&table).collect();
    let path = resolve(path, &mounts, &|link| fs::read_link(link))?;
    Ok(mount_around(&path, &mounts).filter(|mount| mount.is_fuse).map(|mount| mount.device))
}

/// The mount that a path without links is on.
fn mount_around<'m>(path: &Path, mounts: &'m [MountInfo]) -> Option<&'m MountInfo> {
    // Of several on one path the last one is the uppermost, and it is the one that `max_by_key` returns.
    let around = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    around.max_by_key(|mount| mount.point.components().count())
}

/// Where `path` leads as far as that can be told without a question to a FUSE file system: a link is
/// read only if the mount table says that it is on another one.
fn resolve(path: &Path, mounts: &[MountInfo], read_link: &dyn Fn(&Path) -> io::Result<PathBuf>) -> Result<PathBuf> {
    let mut rest: VecDeque<OsString> = path.iter().map(OsStr::to_owned).collect();
    let mut resolved = PathBuf::from("/");
    let mut links = 0;
    // Once a FUSE file system is on the way, what lies behind it cannot be reached without it.
    let mut may_hang = false;
    while let Some(name) = rest.pop_front() {
        if name == OsStr::new("..") {
            resolved.pop();
            continue;
        }
        let place = resolved.join(name);
        // What something is mounted on, or below, is no link. Where it is not mounted, autofs would
        // ask the automounter.
        let is_mounted_below = mounts.iter().any(|mount| mount.point.starts_with(&place));
        may_hang |= mount_around(&resolved, mounts).is_some_and(|mount| mount.is_fuse || mount.is_autofs);
        if is_mounted_below || may_hang {
            resolved = place;
            continue;
        }
        match read_link(&place) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Error::new("resolve", path, Errno::ELOOP));
                }
                // The root's name, with which an absolute target begins, replaces what it is joined to.
                for name in target.iter().rev() {
                    rest.push_front(name.to_owned());
                }
            }
            // It is no link, or is not there.
            Err(_) => resolved = place,
        }
    }
    Ok(resolved)
}

/// Where the file system of an absolute path without links is mounted, for messages.
pub fn mount_point_of(path: &Path) -> Option<PathBuf> {
    let table = mount_table().ok()?;
    let around = mounts(&table).map(|mount| mount.point).filter(|point| path.starts_with(point));
    around.max_by_key(|point| point.components().count())
}

/// One line of a mountinfo table.
#[derive(Debug, PartialEq, Eq)]
struct MountInfo {
    point: PathBuf,
    device: u64,
    is_fuse: bool,
    is_autofs: bool,
}

/// The lines of a mountinfo table. Field 3 is the device, field 5 the mount point, with space,
/// tab, newline and backslash written in octal, and after a dash comes the type.
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
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_their_escapes() {
        let table = b"22 1 254:0 / / rw - ext4 /dev/vda rw\n\
            30 22 0:5 / /mnt/two\\040words\\134 rw shared:1 - tmpfs tmpfs rw\n\
            31 22 0:300 /sub /cvmfs/a ro,nosuid - fuse cvmfs2 ro\nbroken\n";
        let expected = [("/", 254, 0, false), ("/mnt/two words\\", 0, 5, false), ("/cvmfs/a", 0, 300, true)];
        let expected = expected.map(|(point, major, minor, is_fuse)| MountInfo {
            point: point.into(),
            device: makedev(major, minor),
            is_fuse,
            is_autofs: false,
        });
        assert_eq!(mounts(table).collect::<Vec<_>>(), expected);
    }

    /// A repository at a path below a mount, or behind a link, was taken for one that is mounted nowhere.
    #[test]
    fn a_path_is_on_the_mount_that_it_leads_to_and_no_link_is_read_on_fuse() {
        let mount = |point: &str, device, kind: &str| MountInfo {
            point: point.into(),
            device,
            is_fuse: kind == "fuse",
            is_autofs: kind == "autofs",
        };
        let mounts = [
            mount("/", 1, "ext4"),
            mount("/mnt/m", 2, "fuse"),
            mount("/cvmfs", 3, "autofs"),
            mount("/cvmfs/a", 4, "fuse"),
            mount("/mnt/m", 5, "fuse"),
            mount("/mnt/m/own", 6, "ext4"),
        ];
        let links = [("/link", "/mnt/m/compat"), ("/home/up", "../link/x"), ("/loop", "loop"), ("/file", "/etc")];
        let read_link = |link: &Path| {
            assert!(["/mnt/m", "/cvmfs"].iter().all(|mount| !link.starts_with(mount)), "{} is read", link.display());
            let target = links.iter().find(|(name, _)| Path::new(name) == link).map(|(_, target)| target.into());
            target.ok_or_else(|| io::Error::from_raw_os_error(Errno::EINVAL as i32))
        };
        for (path, device) in [
            ("/mnt/m", Some(5)),
            ("/mnt/m/compat", Some(5)),
            ("/mnt/m/compat/../x", Some(5)),
            ("/mnt/m/own/x", None),
            ("/mnt", None),
            ("/link", Some(5)),
            ("/link/deeper", Some(5)),
            ("/home/up", Some(5)),
            ("/cvmfs/a", Some(4)),
            ("/cvmfs/not-mounted", None),
            ("/file/x", None),
        ] {
            let resolved = resolve(Path::new(path), &mounts, &read_link).unwrap();
            let found = mount_around(&resolved, &mounts).filter(|mount| mount.is_fuse).map(|mount| mount.device);
            assert_eq!(found, device, "{path} leads to {}", resolved.display());
        }
        assert_eq!(resolve(Path::new("/loop"), &mounts, &read_link).unwrap_err().errno, Errno::ELOOP);
    }
}
