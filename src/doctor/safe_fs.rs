//! Access to paths that may lead into a file system that hangs, or to a file without an end. A process of our own inspects
//! each path first, because a thread that hangs in a file system cannot be ended.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use super::subprocess;
use crate::config::file;

/// More than a disk that answers ever takes.
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    Directory,
    File,
    /// A pipe, a device or a socket, which is never opened.
    Special,
}

/// The kind of the file at `path`. Fails with `TimedOut` if the file system does not answer.
pub fn inspect(path: &Path) -> io::Result<FileKind> {
    // The test binary has no such command.
    let answer = if cfg!(test) { probe(path) } else { subprocess::run_self("probe-path", path, LIMIT)? };
    let answer: Result<FileKind, i32> =
        serde_json::from_str(&answer).map_err(|_| io::Error::other("the process that inspected it failed"))?;
    answer.map_err(io::Error::from_raw_os_error)
}

/// What the other process prints: the kind, or an errno.
pub fn probe(path: &Path) -> String {
    let answer = inspect_here(path).map_err(|e| e.raw_os_error().unwrap_or(Errno::EIO as i32));
    serde_json::to_string(&answer).unwrap_or_default()
}

/// Does everything to the path that callers may do afterwards.
fn inspect_here(path: &Path) -> io::Result<FileKind> {
    let status = fs::metadata(path)?;
    if status.is_dir() {
        fs::read_dir(path)?.next().transpose()?;
        statvfs(path)?;
        return Ok(FileKind::Directory);
    }
    if !status.is_file() {
        return Ok(FileKind::Special);
    }
    read(path)?;
    Ok(FileKind::File)
}

fn read(path: &Path) -> io::Result<String> {
    let bytes = file::read(path).map_err(|e| match e {
        file::Error::Unreadable(cause) => cause,
        file::Error::TooLong => Errno::EFBIG.into(),
        file::Error::NotAFile { .. } | file::Error::NotUtf8 => Errno::EINVAL.into(),
    })?;
    // A comment may be in any encoding; whoever has to parse the file complains about the rest.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// When a file was last written or put in place; a copy may keep the modification time of its source.
pub fn change_time(path: &Path) -> Option<SystemTime> {
    inspect(path).ok()?;
    let status = fs::metadata(path).ok()?;
    let (seconds, nanos) = (u64::try_from(status.ctime()).ok()?, u32::try_from(status.ctime_nsec()).ok()?);
    Some(status.modified().ok()?.max(UNIX_EPOCH + Duration::new(seconds, nanos)))
}

/// The text of a configuration file.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    match inspect(path)? {
        FileKind::File => read(path),
        FileKind::Directory => Err(Errno::EISDIR.into()),
        // Some people write it for "no file".
        FileKind::Special if path == Path::new("/dev/null") => Ok(String::new()),
        FileKind::Special => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a pipe, a device or a socket, not a file"))
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn file_kinds_are_detected_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "a = 1").unwrap();
        fs::write(path("binary"), [0xff]).unwrap();
        fs::File::create(path("huge")).unwrap().set_len(file::MAX_BYTES + 1).unwrap();
        mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        for (name, expected) in [
            ("", Ok(FileKind::Directory)),
            ("file", Ok(FileKind::File)),
            ("binary", Ok(FileKind::File)),
            ("pipe", Ok(FileKind::Special)),
            ("/dev/zero", Ok(FileKind::Special)),
            ("none", Err(Some(Errno::ENOENT as i32))),
            ("huge", Err(Some(Errno::EFBIG as i32))),
        ] {
            assert_eq!(inspect(&path(name)).map_err(|e| e.raw_os_error()), expected, "{name}");
        }
    }
}
