//! A file that an admin wrote: what is none is refused, and reading never lasts for ever.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::makedev;

/// A thousand times what a configuration needs.
pub const MOST_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub enum Error {
    Unreadable(io::Error),
    NotAFile {
        is: &'static str,
    },
    TooLong,
    /// Comments included.
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
                write!(f, "it has more than {MOST_BYTES} bytes; shorten it, or name another file with --config")
            }
            Self::NotUtf8 => f.write_str("it is not UTF-8"),
        }
    }
}

impl std::error::Error for Error {}

pub fn read_to_string(path: &Path) -> Result<String, Error> {
    String::from_utf8(read(path)?).map_err(|_| Error::NotUtf8)
}

/// Waits for nobody: a FIFO lets whoever opens it wait for its writer, and other devices never end.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags.bits()).open(path).map_err(Error::Unreadable)?;
    let status = file.metadata().map_err(Error::Unreadable)?;
    if let Some(is) = what_is_no_file(&status) {
        return Err(Error::NotAFile { is });
    }
    let mut bytes = Vec::new();
    // Not its size: a file in /proc has none, and one that is written to has another one now.
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(Error::Unreadable)?;
    if bytes.len() as u64 > MOST_BYTES { Err(Error::TooLong) } else { Ok(bytes) }
}

/// None: a file, or `/dev/null`, which stands for an empty one.
fn what_is_no_file(status: &Metadata) -> Option<&'static str> {
    let kind = status.file_type();
    let is_null = kind.is_char_device() && status.rdev() == makedev(1, 3);
    if kind.is_file() || is_null {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else {
        Some("a device")
    }
}
