//! Reads a bbolt file of another program as a whole, and keeps it locked so that nobody writes it meanwhile.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::system::file::{self, LinkPolicy};

/// Maximum size of a file. The metadata of a node is far smaller.
const MAX_BYTES: u64 = 1 << 30;

#[derive(Debug)]
pub enum Error {
    /// A running program has the file open. bbolt locks it as long.
    Locked,
    Unreadable(io::Error),
    NotRegular,
    TooLarge,
    Damaged(super::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked => f.write_str("it is locked"),
            Self::Unreadable(cause) => cause.fmt(f),
            Self::NotRegular => f.write_str("it is not a regular file"),
            Self::TooLarge => write!(f, "it has more than {MAX_BYTES} bytes"),
            Self::Damaged(cause) => cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<super::Error> for Error {
    fn from(cause: super::Error) -> Self {
        Self::Damaged(cause)
    }
}

impl From<file::Error> for Error {
    fn from(cause: file::Error) -> Self {
        match cause {
            file::Error::Unreadable(cause) => Self::Unreadable(cause),
            file::Error::NotRegular { .. } => Self::NotRegular,
            file::Error::TooLong { .. } => Self::TooLarge,
        }
    }
}

/// The content of a file that is locked as long as this exists.
pub struct LockedFile {
    pub bytes: Vec<u8>,
    _lock: Flock<File>,
}

/// Reads and locks a file. None: there is no such file.
pub fn read(path: &Path) -> Result<Option<LockedFile>, Error> {
    let file = match file::open(path, LinkPolicy::Followed) {
        Ok(file) => file,
        // A link to a missing file is not a missing file.
        Err(file::Error::Unreadable(e)) if e.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {
            return Ok(None);
        }
        Err(cause) => return Err(cause.into()),
    };
    let lock = Flock::lock(file, FlockArg::LockSharedNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => Error::Locked,
        errno => Error::Unreadable(errno.into()),
    })?;
    let bytes = file::read_open(&lock, MAX_BYTES)?;
    Ok(Some(LockedFile { bytes, _lock: lock }))
}
