//! The domain types: what must not be mixed up has a type of its own.
//!
//! Nothing here knows the wire, the store or the file system. Whatever a client sends becomes one of these types, and is
//! checked by that, before anything is done with it.
#![forbid(unsafe_code)]

mod digest;
mod key;
mod labels;
mod mount;
mod snapshot;
#[cfg(test)]
pub mod testing;
mod text;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

pub use self::digest::{Digest, InvalidDigest};
pub use self::key::{InvalidKey, Key};
pub use self::labels::{
    LABEL_GID_MAPPING, LABEL_IMAGE_REF, LABEL_LAYER_DIGEST, LABEL_REMOTE, LABEL_SNAPSHOT_REF, LABEL_UID_MAPPING,
    Labels, MAX_LABELS, MAX_LABELS_BYTES, labels_size,
};
pub use self::mount::{Mount, MountKind};
pub use self::snapshot::{Kind, Layer, Snapshot, SnapshotId, Timestamp, Usage};
pub use self::text::{Quoted, escaped, printable, shell_quote, shell_quote_all};

/// Maximum number of snapshots in a chain, the uppermost included. overlayfs itself takes 500 lower directories.
pub const MAX_CHAIN: usize = 512;

/// Maximum length of the path of a unix socket, in bytes. The kernel's `sun_path` has room for one more.
pub const MAX_SOCKET_PATH: usize = 107;

/// The user and the group that own a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// How a published layer is attached: where its link `snapshots/<id>/fs` leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// The link leads to a read-only bind mount of the layer.
    Bind,
    /// The link leads to the layer itself, so there is no mount.
    Symlink,
}

impl AttachMode {
    /// The name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Symlink => "symlink",
        }
    }
}

/// The address at which metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}
