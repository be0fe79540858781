//! Prepare and View of ordinary snapshots: the layers below are attached, the directories are made, then the row.
#![forbid(unsafe_code)]

use super::mounts::ChainCaching;
use super::pull::PullError;
use super::{CreateRequest, Error, Result, Snapshotter, mapped_root};
use crate::metrics::METRICS;
use crate::model::{
    Kind, LABEL_SNAPSHOT_REF, Labels, MAX_CHAIN, MAX_LABELS, MAX_LABELS_BYTES, Mount, Owner, Snapshot, SnapshotId,
    Timestamp, labels_size,
};
use crate::overlay::LowerDirectories;
use crate::sidecar::Sidecar;
use crate::store::ReadTxn;

impl Snapshotter {
    /// Makes a writable snapshot. With a `snapshot.ref` label containerd pulls a layer: if the layer is published, the
    /// answer is `Error::RemoteCommitted`, and containerd does not download it.
    pub fn prepare(&self, mut request: CreateRequest) -> Result<Vec<Mount>> {
        check_labels(&mut request.labels)?;
        if let Some(reference) = request.labels.get(LABEL_SNAPSHOT_REF).cloned() {
            match self.commit_remote(&request, &reference) {
                Ok(()) => return Err(Error::RemoteCommitted { reference }),
                Err(PullError::Failed(e)) => return Err(e),
                Err(PullError::Download(reason)) => {
                    METRICS.record_downloaded_layer(reason.cause());
                    reason.log(&request.key, &reference);
                }
            }
        }
        self.create(Kind::Active, &request)
    }

    /// Makes a read-only snapshot.
    pub fn view(&self, mut request: CreateRequest) -> Result<Vec<Mount>> {
        check_labels(&mut request.labels)?;
        self.create(Kind::View, &request)
    }

    fn create(&self, kind: Kind, request: &CreateRequest) -> Result<Vec<Mount>> {
        let mapped_root = mapped_root(&request.labels)?;
        let parent = self.validate(request)?;
        // A pull prepares a snapshot on each layer, but containers stand on the last one only. The chains below the other
        // layers are not worth caching.
        let caching =
            if request.labels.contains_key(LABEL_SNAPSHOT_REF) { ChainCaching::Skip } else { ChainCaching::Cache };
        let chain = self.attach_parent_chain(parent.as_ref(), caching)?;
        let result = self.create_on(kind, request, parent.as_ref(), &chain.lower, mapped_root);
        if result.is_err() {
            self.detach_chain_if_unused(chain);
        }
        result
    }

    /// Checks a request before anything is done for it, and returns the parent.
    pub(super) fn validate(&self, request: &CreateRequest) -> Result<Option<Snapshot>> {
        self.store.read(|tx| {
            let parent = validate_create(tx, request)?;
            check_depth(tx, parent.as_ref())?;
            Ok(parent)
        })
    }

    /// Makes the snapshot on a parent whose chain is attached.
    fn create_on(
        &self,
        kind: Kind,
        request: &CreateRequest,
        parent: Option<&Snapshot>,
        lower: &LowerDirectories,
        mapped_root: Option<Owner>,
    ) -> Result<Vec<Mount>> {
        let id = self.store.reserve_id()?;
        let owner = match (mapped_root, parent) {
            (Some(root), _) => Some(root),
            // containerd ignores what a layer says about its own top, so the directory belongs to root.
            (None, Some(parent)) if parent.layer.is_some() => None,
            (None, Some(parent)) => {
                let top = self.sys.stat(&self.paths.fs(parent.id))?;
                Some(Owner { uid: top.uid, gid: top.gid })
            }
            (None, None) => None,
        };
        let now = Timestamp::now();
        let snapshot = Snapshot {
            id,
            key: request.key.clone(),
            parent: request.parent.clone(),
            kind,
            created: now,
            updated: now,
            labels: request.labels.clone(),
            layer: None,
            usage: None,
        };
        let result = self
            .make_directories(&snapshot, owner)
            .and_then(|()| self.insert(&snapshot, request, parent.map(|parent| parent.id)));
        let Err(failed) = result else { return Ok(self.mounts_for(kind, id, lower)) };
        // A write that failed may have reached the disk all the same. The directory then belongs to the snapshot.
        match self.store.read_durable(|tx| tx.exists(id)) {
            Ok(true) => Ok(self.mounts_for(kind, id, lower)),
            Ok(false) => match self.sys.remove_tree(&self.paths.snapshot_dir(id), &|| false) {
                Ok(()) => Err(failed),
                Err(rollback) => Err(Error::RollbackFailed { failed: Box::new(failed), rollback }),
            },
            // The store cannot be read, so the next start decides about the directory.
            Err(_) => Err(failed),
        }
    }

    /// Stores the row of a snapshot whose parent had the id `parent` when the chain was attached.
    fn insert(&self, snapshot: &Snapshot, request: &CreateRequest, parent: Option<SnapshotId>) -> Result<()> {
        self.store.write(|tx| {
            validate_create_on(tx, request, parent)?;
            tx.insert(snapshot).map_err(Error::from)
        })
    }

    pub(super) fn make_directories(&self, snapshot: &Snapshot, owner: Option<Owner>) -> Result<()> {
        let id = snapshot.id;
        self.sys.create_dir(&self.paths.snapshot_dir(id), 0o700)?;
        let fs = self.paths.fs(id);
        self.sys.create_dir(&fs, 0o755)?;
        if let Some(Owner { uid, gid }) = owner {
            self.sys.chown(&fs, uid, gid)?;
        }
        if snapshot.kind == Kind::Active {
            self.sys.create_dir(&self.paths.work(id), 0o711)?;
        }
        let sidecar = Sidecar { prepared: snapshot.clone(), committed: None };
        self.sys.write_file(&self.paths.sidecar(id), &sidecar.encode())?;
        Ok(())
    }
}

/// Checks a request in the order in which containerd expects the errors, and returns the parent.
fn validate_create(tx: &ReadTxn, request: &CreateRequest) -> Result<Option<Snapshot>> {
    let parent = match &request.parent {
        None => None,
        Some(key) => match tx.get(key.as_str())? {
            None => return Err(Error::ParentNotFound(key.clone())),
            Some(parent) if parent.kind != Kind::Committed => {
                return Err(Error::ParentNotCommitted { parent: key.clone(), kind: parent.kind });
            }
            parent => parent,
        },
    };
    match tx.get(request.key.as_str())? {
        Some(_) => Err(Error::AlreadyExists(request.key.clone())),
        None => Ok(parent),
    }
}

/// Checks a request again in the write transaction. `id` is that of the parent at the first check.
pub(super) fn validate_create_on(
    tx: &ReadTxn,
    request: &CreateRequest,
    id: Option<SnapshotId>,
) -> Result<Option<Snapshot>> {
    let parent = validate_create(tx, request)?;
    match &parent {
        // The parent was removed meanwhile, and another one was made under the same name.
        Some(other) if Some(other.id) != id => Err(Error::ParentNotFound(other.key.clone())),
        _ => Ok(parent),
    }
}

/// Fails if a chain that ends with `parent` has the maximum length already.
pub(super) fn check_depth(tx: &ReadTxn, parent: Option<&Snapshot>) -> Result<()> {
    let Some(parent) = parent else { return Ok(()) };
    let is_full = tx.depth(parent.id)?.is_some_and(|depth| depth >= MAX_CHAIN);
    if is_full { Err(Error::ChainTooLong { parent: parent.key.clone() }) } else { Ok(()) }
}

/// Drops labels without a value, which mean nothing, and refuses too many or too large ones.
pub(crate) fn check_labels(labels: &mut Labels) -> Result<()> {
    labels.retain(|_, value| !value.is_empty());
    if labels.len() > MAX_LABELS {
        return Err(Error::TooManyLabels { count: labels.len() });
    }
    match labels_size(labels) {
        ..=MAX_LABELS_BYTES => Ok(()),
        bytes => Err(Error::LabelsTooLong { bytes }),
    }
}
