//! Reads a file that an administrator wrote. Only regular files of bounded size are read, so that reading always ends.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::makedev;

use crate::system::file::{self, LinkPolicy};

/// Maximum size of a file, about a thousand times what a configuration needs.
pub const MAX_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub enum Error {
    Unreadable(io::Error),
    NotAFile { is: &'static str },
    TooLong,
    NotUtf8,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(cause) => cause.fmt(f),
            Self::NotAFile { is } => {
                write!(f, "it is {is} and no regular file; put a file there, or name another with --config")
            }
            Self::TooLong => {
                write!(f, "it has more than {MAX_BYTES} bytes; shorten it, or name another file with --config")
            }
            Self::NotUtf8 => f.write_str("it is not UTF-8"),
        }
    }
}

impl std::error::Error for Error {}

pub fn read_to_string(path: &Path) -> Result<String, Error> {
    String::from_utf8(read(path)?).map_err(|_| Error::NotUtf8)
}

/// Reads a file and follows links to it. `/dev/null` is read as an empty file, because it is the usual way to configure
/// nothing.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    match file::read(path, LinkPolicy::Followed, MAX_BYTES) {
        Ok(bytes) => Ok(bytes),
        Err(file::Error::NotRegular { .. }) if is_null(path) => Ok(Vec::new()),
        Err(file::Error::NotRegular { is }) => Err(Error::NotAFile { is }),
        Err(file::Error::TooLong { .. }) => Err(Error::TooLong),
        Err(file::Error::Unreadable(cause)) => Err(Error::Unreadable(cause)),
    }
}

fn is_null(path: &Path) -> bool {
    let is_null = |status: std::fs::Metadata| status.file_type().is_char_device() && status.rdev() == makedev(1, 3);
    path.metadata().is_ok_and(is_null)
}
