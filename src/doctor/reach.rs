//! Paths that may lead into a file system that hangs, or to what never ends: a process of our own goes
//! there first, because one that hangs may not even be killed.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

use super::child;
use crate::config::file;

/// More than a disk that answers ever takes.
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    /// A pipe, a device, a socket: not opened.
    Special,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Directory, Self::File, Self::Special];

    fn as_str(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::File => "file",
            Self::Special => "special",
        }
    }
}

/// What is at `path`; fails after a while if nobody says it.
pub fn touch(path: &Path) -> io::Result<Kind> {
    let silent = || io::Error::new(io::ErrorKind::TimedOut, format!("it did not answer within {} s", LIMIT.as_secs()));
    // The program of the tests has no such task.
    let said =
        if cfg!(test) { probe(path) } else { child::ourselves("probe-path", path, LIMIT)?.ok_or_else(silent)?.stdout };
    if let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.as_str() == said.trim_end()) {
        return Ok(kind);
    }
    let number = said.trim_end().strip_prefix("error ").and_then(|number| number.parse().ok());
    Err(number.map_or_else(|| io::Error::other("the process that looked at it failed"), io::Error::from_raw_os_error))
}

/// What the other process says.
pub fn probe(path: &Path) -> String {
    match look(path) {
        Ok(kind) => format!("{}\n", kind.as_str()),
        Err(e) => format!("error {}\n", e.raw_os_error().unwrap_or(Errno::EIO as i32)),
    }
}

/// Whatever is done to it afterwards has been done here once.
fn look(path: &Path) -> io::Result<Kind> {
    let status = fs::metadata(path)?;
    if status.is_dir() {
        fs::read_dir(path)?.next().transpose()?;
        statvfs(path)?;
        return Ok(Kind::Directory);
    }
    if !status.is_file() {
        return Ok(Kind::Special);
    }
    read(path)?;
    Ok(Kind::File)
}

fn read(path: &Path) -> io::Result<String> {
    let bytes = file::read(path).map_err(|e| match e {
        file::Error::Unreadable(cause) => cause,
        file::Error::TooLong => Errno::EFBIG.into(),
        file::Error::NotAFile { .. } | file::Error::NotUtf8 => Errno::EINVAL.into(),
    })?;
    // A comment may be in any encoding; whoever has to read it says if it is wrong.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// When a file that was reached before was last written, or came to its place: a copy may keep the
/// time of what it was copied from.
pub fn changed(path: &Path) -> Option<SystemTime> {
    let status = fs::metadata(path).ok()?;
    let placed =
        UNIX_EPOCH + Duration::new(u64::try_from(status.ctime()).ok()?, u32::try_from(status.ctime_nsec()).ok()?);
    Some(status.modified().ok()?.max(placed))
}

/// A configuration file.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    match touch(path)? {
        Kind::File => read(path),
        Kind::Directory => Err(Errno::EISDIR.into()),
        // It is what some write for: no file.
        Kind::Special if path == Path::new("/dev/null") => Ok(String::new()),
        Kind::Special => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a pipe, a device or a socket, not a file"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn each_kind_is_told_and_none_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "a = 1").unwrap();
        fs::write(at("binary"), [0xff]).unwrap();
        File::create(at("huge")).unwrap().set_len(file::MAX_BYTES + 1).unwrap();
        mkfifo(&at("pipe"), Mode::S_IRWXU).unwrap();
        for (name, expected) in [
            ("", "directory\n".to_owned()),
            ("file", "file\n".to_owned()),
            ("pipe", "special\n".to_owned()),
            ("none", format!("error {}\n", Errno::ENOENT as i32)),
            ("huge", format!("error {}\n", Errno::EFBIG as i32)),
            ("binary", "file\n".to_owned()),
        ] {
            assert_eq!(probe(&at(name)), expected, "{name}");
        }
        assert_eq!(probe(Path::new("/dev/zero")), "special\n");
    }
}
