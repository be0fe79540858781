//! A bbolt file of somebody else: read as a whole, and locked meanwhile against who writes it.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::system::file::{self, LinkPolicy};

/// More than this is no node's metadata.
const MAX_BYTES: u64 = 1 << 30;

#[derive(Debug)]
pub enum Error {
    /// bbolt locks its file as long as it is open.
    Locked,
    Unreadable(io::Error),
    NotRegular,
    TooLarge {
        bytes: u64,
    },
    Damaged(super::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked => f.write_str("it is locked"),
            Self::Unreadable(cause) => cause.fmt(f),
            Self::NotRegular => f.write_str("it is not a regular file"),
            Self::TooLarge { bytes } => write!(f, "it has {bytes} bytes, the limit is {MAX_BYTES}"),
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

/// The content of a file that nobody writes while this lives.
pub struct LockedFile {
    pub bytes: Vec<u8>,
    _lock: Flock<File>,
}

/// None: there is no such file.
pub fn read(path: &Path) -> Result<Option<LockedFile>, Error> {
    let file = match file::open(path, LinkPolicy::Followed) {
        Ok(file) => file,
        // A link to nothing is not nothing.
        Err(file::Error::Unreadable(e)) if e.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {
            return Ok(None);
        }
        Err(file::Error::Unreadable(e)) => return Err(Error::Unreadable(e)),
        Err(_) => return Err(Error::NotRegular),
    };
    let bytes = file.metadata().map_err(Error::Unreadable)?.len();
    if bytes > MAX_BYTES {
        return Err(Error::TooLarge { bytes });
    }
    let lock = Flock::lock(file, FlockArg::LockSharedNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => Error::Locked,
        errno => Error::Unreadable(errno.into()),
    })?;
    let mut bytes = Vec::new();
    (&*lock).take(MAX_BYTES).read_to_end(&mut bytes).map_err(Error::Unreadable)?;
    Ok(Some(LockedFile { bytes, _lock: lock }))
}
