//! Why a rebuild ended without a result.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::migration::bolt::file;
use crate::store;
use crate::system;

#[derive(Debug)]
pub enum Error {
    /// The metadata is not damaged.
    Sound {
        path: PathBuf,
    },
    Metadata(store::Error),
    Containerd {
        path: PathBuf,
        cause: file::Error,
    },
    NoContainerd {
        path: PathBuf,
    },
    System(system::Error),
    /// The old file could not get its second name.
    Backup {
        path: PathBuf,
        cause: io::Error,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WITHOUT: &str = "or continue without it with --containerd-metadata none (this restores only what was \
                               downloaded or written on this node; published images must be removed and pulled again)";
        match self {
            Self::Sound { path } => write!(
                f,
                "the metadata {} is sound, nothing was changed; move it away to rebuild it nevertheless",
                path.display()
            ),
            Self::Metadata(cause) => write!(f, "{cause}; nothing was changed"),
            Self::Containerd { path, cause: cause @ file::Error::Locked } => write!(
                f,
                "cannot read containerd's metadata {}: {cause}, containerd runs; nothing was changed: stop containerd \
                 (containers keep running) and try again, {WITHOUT}",
                path.display()
            ),
            Self::Containerd { path, cause } => write!(
                f,
                "cannot read containerd's metadata {}: {cause}; nothing was changed: give the right path with \
                 --containerd-metadata, {WITHOUT}",
                path.display()
            ),
            Self::NoContainerd { path } => write!(
                f,
                "there is no metadata of containerd at {}; nothing was changed: give the right path with \
                 --containerd-metadata (it is io.containerd.metadata.v1.bolt/meta.db in containerd's root), {WITHOUT}",
                path.display()
            ),
            Self::System(cause) => write!(f, "{cause}; nothing was changed"),
            Self::Backup { path, cause } => {
                write!(
                    f,
                    "cannot give the old metadata the second name {}: {cause}; nothing was changed",
                    path.display()
                )
            }
        }
    }
}

impl std::error::Error for Error {}

impl From<system::Error> for Error {
    fn from(cause: system::Error) -> Self {
        Self::System(cause)
    }
}
