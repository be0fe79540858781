//! Everything that can go wrong in a call. The variants carry data, and `Display` makes sentences of it.
#![forbid(unsafe_code)]

use std::fmt;

use crate::attach::RefusedAttributes;
use crate::model::{Digest, InvalidKey, Key, Kind, MAX_CHAIN, MAX_LABELS, MAX_LABELS_BYTES, Quoted, SnapshotId};
use crate::repository::Unavailable;
use crate::{store, system};

#[derive(Debug)]
pub enum Error {
    InvalidKey(InvalidKey),
    NotFound(Key),
    ParentNotFound(Key),
    /// The parent of a Prepare or a View is not committed.
    ParentNotCommitted {
        parent: Key,
        kind: Kind,
    },
    AlreadyExists(Key),
    /// This is not a failure: containerd need not download the layer.
    RemoteCommitted {
        reference: String,
    },
    /// The call is impossible for snapshots of this kind.
    WrongKind {
        key: Key,
        kind: Kind,
        needs: &'static str,
    },
    HasChildren(Key),
    /// A Commit named a parent, but the snapshot was prepared on another one.
    OtherParent {
        key: Key,
        parent: Key,
        named: Key,
    },
    /// A Commit named a parent that is not committed.
    NewParentNotCommitted {
        parent: Key,
        kind: Kind,
    },
    /// The chain of `parent` has the maximum length already.
    ChainTooLong {
        parent: Key,
    },
    ImmutableField(String),
    InvalidFilter {
        filter: String,
        why: String,
    },
    LabelsTooLong {
        bytes: usize,
    },
    TooManyLabels {
        count: usize,
    },
    /// Another call works on the directory of the layer, and takes long.
    LayerBusy {
        digest: Digest,
    },
    InvalidMapping {
        label: &'static str,
        value: String,
    },
    LayerUnavailable {
        digest: Digest,
        repository: String,
        why: Unavailable,
    },
    /// The file system of the state root does not take the attributes of a directory of the layer.
    AttributesRefused {
        digest: Digest,
        refused: RefusedAttributes,
    },
    /// The files of a local snapshot are missing.
    FilesMissing {
        key: Key,
        id: SnapshotId,
    },
    /// The deadline of the call has passed, and the caller does not wait any more.
    DeadlineExceeded,
    System(system::Error),
    /// A step failed, and undoing the steps before it failed too.
    RollbackFailed {
        failed: Box<Error>,
        rollback: system::Error,
    },
    Store(store::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidKey(why) => why.fmt(f),
            Self::NotFound(key) => write!(f, "snapshot {key} does not exist"),
            Self::ParentNotFound(parent) => write!(f, "parent snapshot {parent} does not exist"),
            Self::ParentNotCommitted { parent, kind } | Self::NewParentNotCommitted { parent, kind } => {
                write!(f, "parent snapshot {parent} is {}, it must be committed", kind.as_str())
            }
            Self::AlreadyExists(key) => write!(f, "snapshot {key} already exists"),
            Self::RemoteCommitted { reference } => {
                write!(
                    f,
                    "remote snapshot {} already exists: its layer is published and need not be fetched",
                    Quoted(reference)
                )
            }
            Self::WrongKind { key, kind, needs } => write!(f, "snapshot {key} is {}, {needs}", kind.as_str()),
            Self::HasChildren(key) => write!(f, "cannot remove snapshot {key}: it has children, remove them first"),
            Self::OtherParent { key, parent, named } => {
                write!(f, "cannot commit snapshot {key} on parent {named}: it was prepared on {parent}")
            }
            Self::ChainTooLong { parent } => write!(
                f,
                "cannot create a snapshot on {parent}: a chain has at most {MAX_CHAIN} snapshots; build the image \
                 with fewer layers"
            ),
            Self::ImmutableField(path) => {
                write!(f, "cannot update field {}: only \"labels\" and \"labels.<key>\" can change", Quoted(path))
            }
            Self::InvalidFilter { filter, why } => write!(f, "invalid filter {}: {why}", Quoted(filter)),
            Self::LabelsTooLong { bytes } => {
                write!(f, "labels of {bytes} bytes are too long for a snapshot, the limit is {MAX_LABELS_BYTES}")
            }
            Self::TooManyLabels { count } => {
                write!(f, "{count} labels are too many for a snapshot, the limit is {MAX_LABELS}")
            }
            Self::InvalidMapping { label, value } => write!(
                f,
                "invalid label {label}={}: expected ranges container:host:length separated by commas, with numbers below \
                 2^32 and one range that contains container id 0",
                Quoted(value)
            ),
            Self::LayerUnavailable { digest, repository, why } => {
                write!(f, "layer {digest} of repository {repository} is not available: {why}; {}", why.remedy())
            }
            Self::LayerBusy { digest } => write!(
                f,
                "layer {digest} is being attached or removed by another call, and the local disk is slow; try again later"
            ),
            Self::AttributesRefused { digest, refused: RefusedAttributes { directory, bytes, largest, errno } } => {
                let (directory, name, size) = (directory.to_string_lossy(), largest.0.to_string_lossy(), largest.1);
                write!(
                    f,
                    "cannot attach layer {digest}: the file system of the state root does not take the extended attributes \
                     of its directory {} ({bytes} bytes, {size} of them in {}, {errno:?}); use another file system for the \
                     state root (ext4 without ea_inode takes 4 KiB), or have the publisher drop the attribute",
                    Quoted(&directory),
                    Quoted(&name)
                )
            }
            Self::FilesMissing { key, id } => write!(
                f,
                "the files of snapshot {key} (number {id}) are missing from disk: remove all containers and images that \
                 use it, then pull these again; \"cvmfs-snapshotter doctor\" lists them"
            ),
            Self::DeadlineExceeded => f.write_str("the deadline of the call passed before the work was done"),
            Self::System(cause) => cause.fmt(f),
            Self::RollbackFailed { failed, rollback } => {
                write!(f, "{failed}; undoing the steps before it failed too: {rollback}")
            }
            Self::Store(cause) => cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<store::Error> for Error {
    fn from(cause: store::Error) -> Self {
        Self::Store(cause)
    }
}

impl From<system::Error> for Error {
    fn from(cause: system::Error) -> Self {
        Self::System(cause)
    }
}

impl From<InvalidKey> for Error {
    fn from(why: InvalidKey) -> Self {
        Self::InvalidKey(why)
    }
}

pub type Result<T> = std::result::Result<T, Error>;
