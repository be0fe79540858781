//! Reads files that somebody else made or named. Only regular files are read, so that no FIFO or device can make the
//! daemon wait.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{File, FileType};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;

/// What to do if the last component of a path is a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkPolicy {
    Followed,
    Refused,
}

#[derive(Debug)]
pub enum Error {
    Unreadable(io::Error),
    NotRegular { is: &'static str },
    TooLong { limit: u64 },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(cause) => cause.fmt(f),
            Self::NotRegular { is } => write!(f, "it is {is}, not a regular file"),
            Self::TooLong { limit } => write!(f, "it has more than {limit} bytes"),
        }
    }
}

impl std::error::Error for Error {}

/// Opens a regular file for reading. Opening a FIFO would wait for a writer, a terminal could become the controlling one,
/// and other devices never end.
pub fn open(path: &Path, links: LinkPolicy) -> Result<File, Error> {
    let mut flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    if links == LinkPolicy::Refused {
        flags |= OFlag::O_NOFOLLOW;
    }
    let opened = File::options().read(true).custom_flags(flags.bits()).open(path);
    let file = opened.map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP) if links == LinkPolicy::Refused => Error::NotRegular { is: "a link" },
        Some(Errno::ENXIO) => Error::NotRegular { is: "a socket or a device" },
        _ => Error::Unreadable(e),
    })?;
    let file_type = file.metadata().map_err(Error::Unreadable)?.file_type();
    if file_type.is_file() { Ok(file) } else { Err(Error::NotRegular { is: describe(file_type) }) }
}

/// The content of a regular file that has no more than `limit` bytes.
pub fn read(path: &Path, links: LinkPolicy, limit: u64) -> Result<Vec<u8>, Error> {
    read_open(&open(path, links)?, limit)
}

/// The content of an open file that has no more than `limit` bytes.
pub fn read_open(file: &File, limit: u64) -> Result<Vec<u8>, Error> {
    if file.metadata().map_err(Error::Unreadable)?.len() > limit {
        return Err(Error::TooLong { limit });
    }
    let mut bytes = Vec::new();
    // The size in its status says only what is too long: files in /proc show 0, and another process may be writing.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::Unreadable)?;
    if bytes.len() as u64 > limit { Err(Error::TooLong { limit }) } else { Ok(bytes) }
}

fn describe(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else {
        "a device"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    #[test]
    fn only_regular_files_are_read_and_nothing_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "12345").unwrap();
        symlink(at("file"), at("link")).unwrap();
        symlink(at("nothing"), at("dangling")).unwrap();
        fs::create_dir(at("directory")).unwrap();
        mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        let read = |path: &Path, links, limit| match read(path, links, limit) {
            Ok(bytes) => String::from_utf8(bytes).unwrap(),
            Err(e) => e.to_string(),
        };
        for links in [LinkPolicy::Followed, LinkPolicy::Refused] {
            assert_eq!(read(&at("file"), links, 5), "12345");
            assert_eq!(read(&at("file"), links, 4), "it has more than 4 bytes");
            for (path, is) in [
                (at("directory"), "a directory"),
                (at("fifo"), "a FIFO"),
                (at("socket"), "a socket or a device"),
                ("/dev/zero".into(), "a device"),
            ] {
                assert_eq!(read(&path, links, 4), format!("it is {is}, not a regular file"));
            }
        }
        assert_eq!(read(&at("link"), LinkPolicy::Followed, 5), "12345");
        for link in ["link", "dangling"] {
            assert_eq!(read(&at(link), LinkPolicy::Refused, 5), "it is a link, not a regular file");
        }
        assert!(read(&at("dangling"), LinkPolicy::Followed, 5).starts_with("No such file"));
    }
}
