//! A pull: Prepare with a `snapshot.ref` label. Here is decided whether a published layer takes the place of a download.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use super::create::validate_create_on;
use super::layer_provider::Refusal;
use super::{CreateRequest, Error, Snapshotter};
use crate::metrics::{DownloadCause, METRICS};
use crate::model::{
    Digest, InvalidDigest, Key, Kind, LABEL_LAYER_DIGEST, LABEL_REMOTE, LABEL_SNAPSHOT_REF, Layer, Quoted, Snapshot,
    SnapshotId, Timestamp,
};
use crate::repository::scan::ScanKey;
use crate::repository::{Repository, Unavailable};
use crate::store::{self, ReadTxn, WriteTxn};

/// Maximum number of snapshots with one `snapshot.ref` on one parent that are read before a pull is answered. Other
/// writes wait meanwhile. Usually there is one, and one more for each attempt that is under way.
pub(super) const MAX_SAME_REFERENCE: usize = 1000;

/// Why a pull has no published layer.
pub(super) enum PullError {
    /// containerd has to download the layer into an ordinary snapshot.
    Download(DownloadReason),
    Failed(Error),
}

impl From<DownloadReason> for PullError {
    fn from(reason: DownloadReason) -> Self {
        Self::Download(reason)
    }
}

impl From<Error> for PullError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<store::Error> for PullError {
    fn from(error: store::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// Why the layer of a pull is downloaded.
#[derive(Debug)]
pub(super) enum DownloadReason {
    NoDigest,
    BadDigest {
        digest: String,
        why: InvalidDigest,
    },
    Unavailable {
        digest: Digest,
        refusals: Vec<Refusal>,
    },
    NameTooLong,
    /// Another snapshot has the name that the layer would get.
    NameTaken {
        name: Key,
    },
    /// A snapshot that is not this layer has its `snapshot.ref`.
    ReferenceTaken {
        name: Key,
    },
    /// At least this many snapshots have the layer's `snapshot.ref`.
    ReferenceCrowded {
        limit: usize,
    },
}

impl DownloadReason {
    pub fn cause(&self) -> DownloadCause {
        match self {
            Self::NoDigest => DownloadCause::NoDigest,
            Self::BadDigest { .. } => DownloadCause::BadDigest,
            Self::NameTooLong
            | Self::NameTaken { .. }
            | Self::ReferenceTaken { .. }
            | Self::ReferenceCrowded { .. } => DownloadCause::Name,
            // Any other reason says more than that a repository does not publish the layer.
            Self::Unavailable { refusals, .. } => refusals
                .iter()
                .map(|refusal| refusal.reason.download_cause())
                .find(|cause| *cause != DownloadCause::NotPublished)
                .unwrap_or(DownloadCause::NotPublished),
        }
    }

    /// Logs one line for the layer.
    pub fn log(&self, key: &Key, reference: &str) {
        if let Self::Unavailable { digest, refusals } = self {
            let names: Vec<&str> = refusals.iter().map(|refusal| refusal.repository.as_str()).collect();
            let is_usual = refusals.iter().all(|refusal| refusal.reason == Unavailable::NotPublished);
            let level = if is_usual { log::Level::Info } else { log::Level::Warn };
            log::log!(level, event = "layer_download", digest = digest.as_str(), repository = names.join(" ").as_str();
                "layer {digest} will be downloaded: {self}");
        } else {
            log::warn!(event = "layer_download", key = key.to_string().as_str();
                "the layer with {LABEL_SNAPSHOT_REF}={} will be downloaded: {self}", Quoted(reference));
        }
    }
}

impl fmt::Display for DownloadReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDigest => write!(
                f,
                "the request has no label {LABEL_LAYER_DIGEST}; configure containerd to pass image annotations to \
                 snapshotters, see the README"
            ),
            Self::BadDigest { digest, why } => {
                write!(f, "invalid label {LABEL_LAYER_DIGEST}={}: {why}", Quoted(digest))
            }
            Self::Unavailable { refusals, .. } => {
                for (n, refusal) in refusals.iter().enumerate() {
                    let separator = if n == 0 { "" } else { "; " };
                    write!(f, "{separator}{refusal}")?;
                }
                Ok(())
            }
            Self::NameTooLong => f.write_str("the label is too long to be part of a snapshot's name"),
            Self::NameTaken { name } => write!(f, "another snapshot has the name {name}"),
            Self::ReferenceTaken { name } => {
                write!(f, "snapshot {name} has this label too, and containerd would take it for the layer")
            }
            Self::ReferenceCrowded { limit } => write!(f, "{limit} snapshots or more have this label"),
        }
    }
}

/// A published layer that is about to be committed.
struct PublishedLayer {
    scan_key: ScanKey,
    repository: Arc<Repository>,
}

impl Snapshotter {
    /// Stores a committed snapshot of the published layer, unless there is one already. Nothing is made on disk.
    pub(super) fn commit_remote(&self, request: &CreateRequest, reference: &str) -> Result<(), PullError> {
        let parent_id = self.validate(request)?.map(|parent| parent.id);
        let layer = self.find_published_layer(request)?;
        let id = self.store.reserve_id()?;
        self.store.write(|tx| insert_remote(tx, request, reference, parent_id, id, &layer.scan_key))?;
        METRICS.record_published_layer(layer.repository.name());
        self.layer_provider.prefetch_scan(&layer.scan_key, &layer.repository);
        Ok(())
    }

    /// The layer that the labels name, in the first repository that can provide it.
    fn find_published_layer(&self, request: &CreateRequest) -> Result<PublishedLayer, PullError> {
        let label = request.labels.get(LABEL_LAYER_DIGEST).ok_or(DownloadReason::NoDigest)?;
        let digest = Digest::parse(label).map_err(|why| DownloadReason::BadDigest { digest: label.clone(), why })?;
        let repository = match self.layer_provider.locate_layer(&digest) {
            Ok(repository) => repository,
            Err(refusals) => return Err(DownloadReason::Unavailable { digest, refusals }.into()),
        };
        let scan_key = ScanKey { digest, repository: repository.name().to_owned() };
        match self.layer_provider.scans.refusal(&scan_key)? {
            None => Ok(PublishedLayer { scan_key, repository }),
            Some(reason) => {
                let refusals = vec![Refusal { repository: scan_key.repository, reason }];
                Err(DownloadReason::Unavailable { digest: scan_key.digest, refusals }.into())
            }
        }
    }
}

/// Inserts the committed snapshot of a published layer, unless there is one already.
fn insert_remote(
    tx: &WriteTxn,
    request: &CreateRequest,
    reference: &str,
    parent_id: Option<SnapshotId>,
    id: SnapshotId,
    scan_key: &ScanKey,
) -> Result<(), PullError> {
    let parent = validate_create_on(tx, request, parent_id)?;
    let name = remote_name(parent.as_ref(), reference).ok_or(DownloadReason::NameTooLong)?;
    if has_remote(tx, reference, request.parent.as_ref(), &scan_key.digest)? {
        return Ok(());
    }
    if tx.get(name.as_str())?.is_some() {
        return Err(DownloadReason::NameTaken { name }.into());
    }
    let now = Timestamp::now();
    let mut labels = request.labels.clone();
    labels.insert(LABEL_REMOTE.0.to_owned(), LABEL_REMOTE.1.to_owned());
    tx.insert(&Snapshot {
        id,
        key: name,
        parent: request.parent.clone(),
        kind: Kind::Committed,
        created: now,
        updated: now,
        labels,
        layer: Some(Layer { digest: scan_key.digest.clone(), repository: scan_key.repository.clone() }),
        usage: None,
    })?;
    Ok(())
}

/// The name of a remote snapshot, or None if it would be too long. It is a function of reference and parent: over one
/// parent the same layer makes one snapshot, and over two parents, which may be those of two namespaces, it makes two.
fn remote_name(parent: Option<&Snapshot>, reference: &str) -> Option<Key> {
    Key::parse(&format!("cvmfs/{}/{reference}", parent.map_or(0, |parent| parent.id.0))).ok()
}

/// Whether the store has a committed snapshot of the published layer `reference` on `parent`, under our name or one that
/// a Go snapshotter gave it. containerd takes the first snapshot that has the label `reference`, and a label can be
/// changed, so it is an error if any committed snapshot with the label is not this layer.
fn has_remote(tx: &ReadTxn, reference: &str, parent: Option<&Key>, digest: &Digest) -> Result<bool, PullError> {
    let mut exists = false;
    let mut other = None;
    let mut remaining = MAX_SAME_REFERENCE;
    let is_complete = tx.visit_by_ref(reference, parent.map_or("", Key::as_str), |snapshot| {
        remaining -= 1;
        if snapshot.kind == Kind::Committed {
            if names_same_layer(&snapshot, reference, digest) {
                exists |= snapshot.layer.is_some();
            } else {
                other = Some(snapshot.key);
            }
        }
        other.is_none() && remaining > 0
    })?;
    match other {
        Some(name) => Err(DownloadReason::ReferenceTaken { name }.into()),
        None if !is_complete => Err(DownloadReason::ReferenceCrowded { limit: MAX_SAME_REFERENCE }.into()),
        None => Ok(exists),
    }
}

/// Whether a snapshot with the label `reference` was made for it. Keys cannot be changed, and containerd, Go
/// snapshotters and `remote_name` all end the key with the reference.
fn names_same_layer(snapshot: &Snapshot, reference: &str, digest: &Digest) -> bool {
    let prefix = snapshot.key.as_str().strip_suffix(reference);
    let has_name = prefix.is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('/'));
    has_name || snapshot.layer.as_ref().is_some_and(|layer| layer.digest == *digest)
}
