//! Writing an entry of a tar to disk.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use tar::{Entry, EntryType};

/// Writes an entry that is neither a directory nor a hard link to `path`, without its owner, mode and time.
pub fn write(entry: &mut Entry<impl Read>, path: &Path) -> io::Result<()> {
    let header = entry.header();
    let device = |kind| -> io::Result<()> {
        let number = |part: Option<u32>| part.unwrap_or(0).into();
        let device = makedev(number(header.device_major()?), number(header.device_minor()?));
        Ok(mknod(path, kind, Mode::empty(), device)?)
    };
    match header.entry_type() {
        EntryType::Symlink => {
            let target = entry.link_name_bytes().ok_or(io::ErrorKind::InvalidData)?;
            symlink(OsStr::from_bytes(&target), path)
        }
        EntryType::Char => device(SFlag::S_IFCHR),
        EntryType::Block => device(SFlag::S_IFBLK),
        EntryType::Fifo => Ok(mknod(path, SFlag::S_IFIFO, Mode::empty(), 0)?),
        _ => io::copy(entry, &mut File::create(path)?).map(drop),
    }
}

/// Sets the time of the last change of what is at `path`, a link included, in time since 1970.
pub fn set_mtime(path: &Path, time: Duration) -> io::Result<()> {
    let time = TimeSpec::from_duration(time);
    Ok(utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}
