//! An entry as the kernel wants it.

#![forbid(unsafe_code)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use nix::sys::stat::{major, minor};

use crate::backend::Entry;

pub fn of(inode: u64, entry: &Entry) -> FileAttr {
    let time = time(entry.mtime, entry.mtime_ns);
    FileAttr {
        ino: INodeNo(inode),
        size: entry.size,
        blocks: entry.size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: kind(entry),
        perm: u16::try_from(entry.mode & 0o7777).expect("twelve bits fit sixteen"),
        nlink: entry.links,
        uid: entry.uid,
        gid: entry.gid,
        rdev: device(entry.device),
        blksize: 4096,
        flags: 0,
    }
}

/// Inode 0 stands for a name that does not exist.
pub fn of_nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

pub fn kind(entry: &Entry) -> FileType {
    match entry.kind() {
        0o010_000 => FileType::NamedPipe,
        0o020_000 => FileType::CharDevice,
        0o040_000 => FileType::Directory,
        0o060_000 => FileType::BlockDevice,
        0o120_000 => FileType::Symlink,
        0o140_000 => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

/// The kernel's own packing of device numbers, which is not that of `stat`: 12 bits of the major
/// number between the low 8 and the high 12 bits of the minor one.
fn device(number: u64) -> u32 {
    let (major, minor) = (major(number), minor(number));
    let packed = minor & 0xff | major << 8 | (minor & !0xff) << 12;
    u32::try_from(packed & 0xffff_ffff).expect("what is cut to 32 bits fits them")
}

fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH - whole } else { UNIX_EPOCH + whole };
    base + Duration::from_nanos(nanoseconds.into())
}
