//! containerd's rules for snapshots: what each of the ten calls means.
//!
//! Knows the store, the repository and the disk, and nothing of the wire. Blocking; called
//! from many threads at once. Order of writes: a directory first, under an id that is never
//! used again, then the record, then the answer; on the way back the record first. So what
//! was acknowledged is there, and what a crash leaves behind is a directory without a
//! record, which the next start takes away.
#![forbid(unsafe_code)]

mod attached;
mod cleanup;
mod error;
pub mod inspect;
mod layer_provider;
mod list;
mod metadata;
mod recovery;
mod scans;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;

use self::attached::{AttachedChain, AttachedChains};
pub use self::cleanup::CleanupBatch;
pub use self::error::{Error, Result};
use self::layer_provider::LayerProvider;
pub use self::list::{Cursor, MAX_PAGE_BYTES, Page};
pub use self::metadata::LabelChange;
pub use self::recovery::RecoveryReport;
use self::scans::ScanScheduler;
use crate::attach::{AttachMode, Attacher};
use crate::metrics::METRICS;
use crate::model::{
    Digest, Key, Kind, LABEL_GID_MAPPING, LABEL_LAYER_DIGEST, LABEL_REMOTE, LABEL_SNAPSHOT_REF, LABEL_UID_MAPPING,
    Labels, Layer, MAX_CHAIN, MAX_LABELS, MAX_LABELS_BYTES, Mount, Snapshot, SnapshotId, Timestamp,
};
use crate::overlay::{self, LowerDirectories, SnapshotPaths};
use crate::repository::Repository;
use crate::repository::scan::ScanKey;
use crate::sidecar::Sidecar;
use crate::store::{ReadTxn, Store};
use crate::system::{self, Sys};

/// Snapshots with one `snapshot.ref` on one parent that are read, one after the other, before a pull is answered that
/// its layer is there: others wait meanwhile to write. There is one, and one for each attempt that is under way.
const SAME_REFERENCE: usize = 1000;

pub struct Snapshotter {
    store: Arc<Store>,
    sources: Arc<LayerProvider>,
    paths: SnapshotPaths,
    sys: Arc<dyn Sys>,
    /// For every overlay, such as `index=off`.
    overlay_options: Vec<String>,
    commits: metadata::CommitLocks,
    /// Held by the one cleanup that runs.
    cleaning: parking_lot::Mutex<()>,
    /// Another one waits for it to end.
    cleanup_waits: AtomicBool,
    /// What the start found.
    found: OnceLock<RecoveryReport>,
}

/// A snapshot that a client wants made.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    pub key: Key,
    pub parent: Option<Key>,
    pub labels: Labels,
}

/// Whom a call asks, and may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepositoryDependency {
    /// The repositories one after the other, as a pull does.
    All,
    /// Above all the repository of this number, in their order.
    One(usize),
}

/// What becomes of a chain when its layers are in place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ChainRetention {
    /// It is known to the next call that needs it.
    Known,
    Nothing,
}

/// How published files come under a container.
#[derive(Clone, Debug)]
pub struct SnapshotterOptions {
    pub attach: AttachMode,
    /// For every overlay, such as `index=off`.
    pub overlay_options: Vec<String>,
}

impl Snapshotter {
    /// `snapshots` is a directory that exists and that nobody else uses. `repositories` are
    /// asked in their order; there is at least one.
    pub fn new(
        store: Store,
        repositories: Vec<Repository>,
        sys: Arc<dyn Sys>,
        snapshots: &Path,
        ways: SnapshotterOptions,
    ) -> Self {
        let paths = SnapshotPaths::new(snapshots.to_owned());
        let store = Arc::new(store);
        let sources = Arc::new(LayerProvider {
            store: Arc::clone(&store),
            attacher: Arc::new(Attacher::new(paths.clone(), ways.attach, Arc::clone(&sys))),
            scans: ScanScheduler::new(Arc::clone(&store), Arc::clone(&sys)),
            paths: paths.clone(),
            chains: AttachedChains::default(),
            repositories: repositories.into_iter().map(Arc::new).collect(),
        });
        Self {
            store,
            sources,
            paths,
            sys,
            overlay_options: ways.overlay_options,
            commits: metadata::CommitLocks::default(),
            cleaning: parking_lot::Mutex::default(),
            cleanup_waits: AtomicBool::default(),
            found: OnceLock::new(),
        }
    }

    /// Asks each repository whether it is there, without waiting, and says so where it is not.
    pub fn log_repository_availability(&self) {
        let state = self.device();
        self.sources.repositories.iter().for_each(|repository| repository.log_availability(state));
    }

    /// That of the state root.
    fn device(&self) -> Option<u64> {
        self.sys.stat(self.paths.snapshots_dir()).ok().map(|status| status.device)
    }

    /// Gives up memory that many calls at once needed, when no more such come.
    pub fn release_memory(&self) {
        self.store.release_memory();
        system::give_back_free_memory();
    }

    /// Lets go of the metadata: a thread that hangs in a repository must not keep it locked
    /// after the end of everything else.
    pub fn close(&self) {
        self.store.close_for_good();
    }

    /// What a call on `key` may have to wait for: the repository of the first layer in or below it.
    pub fn repository_dependency(&self, key: &str) -> Result<Option<RepositoryDependency>> {
        let Some(key) = Key::parse_optional(key)? else { return Ok(None) };
        // Every start comes by here: no more is read than it takes, and nothing if the chain is known.
        let name = self.store.read(|tx| {
            let Some((snapshot, parent)) = tx.with_parent(&key)? else { return Ok(None) };
            let top = if snapshot.kind == Kind::Committed { Some(snapshot) } else { parent };
            let Some(top) = top else { return Ok(None) };
            if let Some(known) = self.sources.chains.get(top.id) {
                return Ok(known.repositories.first().map(|one| one.repository.name().to_owned()));
            }
            let chain = tx.chain(&top.key, |snapshot| snapshot.layer.is_some())?;
            let nearest = chain.into_iter().next_back().and_then(|snapshot| snapshot.layer);
            Ok::<_, Error>(nearest.map(|layer| layer.repository))
        })?;
        let number = |name| self.sources.repositories.iter().position(|one| one.name() == name);
        Ok(name.map(|name| number(name).map_or(RepositoryDependency::All, RepositoryDependency::One)))
    }

    /// As `repository_dependency`, for a Prepare with these labels.
    pub fn repository_dependency_of_prepare(
        &self,
        parent: &str,
        labels: &HashMap<String, String>,
    ) -> Result<Option<RepositoryDependency>> {
        if labels.contains_key(LABEL_SNAPSHOT_REF) {
            Ok(Some(RepositoryDependency::All))
        } else {
            self.repository_dependency(parent)
        }
    }

    /// A writable snapshot on `parent`. With a `snapshot.ref` label it is a pull that asks:
    /// if the layer is published, the answer is `RemoteCommitted`.
    pub fn prepare(&self, mut wanted: CreateRequest) -> Result<Vec<Mount>> {
        check_labels(&mut wanted.labels)?;
        if let Some(reference) = wanted.labels.get(LABEL_SNAPSHOT_REF) {
            let reference = reference.clone();
            match self.try_commit_remote(&wanted, &reference)? {
                Ok(()) => return Err(Error::RemoteCommitted { reference }),
                Err(why) => {
                    METRICS.record_downloaded_layer(why.reason());
                    why.log(&wanted.key, &reference);
                }
            }
        }
        self.create(Kind::Active, &wanted)
    }

    /// A read-only snapshot of `parent`.
    pub fn view(&self, mut wanted: CreateRequest) -> Result<Vec<Mount>> {
        check_labels(&mut wanted.labels)?;
        self.create(Kind::View, &wanted)
    }

    /// The mounts of an active snapshot or a view, as Prepare or View gave them.
    pub fn mounts(&self, key: &Key) -> Result<Vec<Mount>> {
        let both = self.store.read(|tx| tx.with_parent(key).map_err(Error::from))?;
        let (snapshot, parent) = both.ok_or_else(|| Error::NotFound(key.clone()))?;
        if snapshot.kind == Kind::Committed {
            return Err(Error::WrongKind {
                key: key.clone(),
                kind: snapshot.kind,
                needs: "only active snapshots and views have mounts",
            });
        }
        self.ensure_files_exist(&snapshot)?;
        let chain = self.attach_parent_chain(parent.as_ref(), ChainRetention::Known);
        // If it was removed or committed meanwhile, its layers were attached for nobody.
        if self.store.read(|tx| tx.id_of(key).map_err(Error::from))? != Some(snapshot.id) {
            if let Ok(chain) = chain {
                self.detach_if_unused(chain);
            }
            return Err(Error::NotFound(key.clone()));
        }
        let chain = chain?;
        Ok(self.mounts_for(snapshot.kind, snapshot.id, &chain.lower))
    }

    /// Stores the remote snapshot for (ref, parent). The inner error says why this has to be
    /// an ordinary snapshot instead.
    fn try_commit_remote(
        &self,
        wanted: &CreateRequest,
        reference: &str,
    ) -> Result<std::result::Result<(), layer_provider::DownloadReason>> {
        use layer_provider::DownloadReason;
        let below = self.store.read(|tx| {
            let parent = validate_create(tx, wanted)?;
            parent.as_ref().map_or(Ok(()), |parent| check_depth(tx, parent))?;
            Ok::<_, Error>(parent.map(|parent| parent.id))
        })?;
        let Some(text) = wanted.labels.get(LABEL_LAYER_DIGEST) else { return Ok(Err(DownloadReason::NoDigest)) };
        let digest = match Digest::parse(text) {
            Ok(digest) => digest,
            Err(why) => return Ok(Err(DownloadReason::BadDigest { digest: text.clone(), why })),
        };
        let repository = match self.sources.locate_layer(&digest) {
            Ok(repository) => repository,
            Err(why) => return Ok(Err(DownloadReason::Missing { digest, why })),
        };
        let scan_key = ScanKey { digest: digest.clone(), repository: repository.name().to_owned() };
        if let Some(why) = self.sources.scans.refusal(&scan_key)? {
            return Ok(Err(DownloadReason::Missing { digest, why: vec![(scan_key.repository, why)] }));
        }
        let id = self.store.reserve_id()?;
        let now = Timestamp::now();
        let committed = self.store.write(|tx| {
            let parent = validate_create_on(tx, wanted, below)?;
            let Ok(name) = remote_name(parent.as_ref(), reference) else { return Ok(Err(DownloadReason::NameTooLong)) };
            // Also under the name that a Go snapshotter gave it.
            match find_present(tx, reference, wanted.parent.as_ref(), &digest)? {
                Ok(Some(_)) => return Ok(Ok(())),
                Ok(None) => {}
                Err(why) => return Ok(Err(why)),
            }
            if tx.get(name.as_str())?.is_some() {
                return Ok(Err(DownloadReason::NameTaken { name }));
            }
            let mut labels = wanted.labels.clone();
            labels.insert(LABEL_REMOTE.0.to_owned(), LABEL_REMOTE.1.to_owned());
            tx.insert(&Snapshot {
                id,
                key: name.clone(),
                parent: wanted.parent.clone(),
                kind: Kind::Committed,
                created: now,
                updated: now,
                labels,
                layer: Some(Layer { digest: digest.clone(), repository: repository.name().to_owned() }),
                usage: None,
            })?;
            Ok::<_, Error>(Ok(()))
        })?;
        if committed.is_ok() {
            METRICS.record_published_layer(repository.name());
            self.sources.prefetch_scan(&scan_key, &repository);
        }
        Ok(committed)
    }

    /// An ordinary snapshot: layers below it attached, directories made, then the record.
    fn create(&self, kind: Kind, wanted: &CreateRequest) -> Result<Vec<Mount>> {
        let mapped_root = mapped_root(&wanted.labels)?;
        let parent = self.store.read(|tx| {
            let parent = validate_create(tx, wanted)?;
            parent.as_ref().map_or(Ok(()), |parent| check_depth(tx, parent))?;
            Ok::<_, Error>(parent)
        })?;
        // A pull prepares a snapshot on each layer, and containers stand on the last one only, so the chains below the
        // others are not worth keeping.
        let keep = if wanted.labels.contains_key(LABEL_SNAPSHOT_REF) {
            ChainRetention::Nothing
        } else {
            ChainRetention::Known
        };
        let chain = self.attach_parent_chain(parent.as_ref(), keep)?;
        let created = self.create_on(kind, wanted, parent.as_ref(), &chain.lower, mapped_root);
        if created.is_err() {
            self.detach_if_unused(chain);
        }
        created
    }

    fn create_on(
        &self,
        kind: Kind,
        wanted: &CreateRequest,
        parent: Option<&Snapshot>,
        lower: &LowerDirectories,
        mapped_root: Option<(u32, u32)>,
    ) -> Result<Vec<Mount>> {
        let id = self.store.reserve_id()?;
        let owner = match (mapped_root, parent) {
            (Some(root), _) => Some(root),
            // What a layer says of its top, containerd passes over: it is root's.
            (None, Some(parent)) if parent.layer.is_some() => None,
            (None, Some(parent)) => {
                let top = self.sys.stat(&self.paths.fs(parent.id))?;
                Some((top.uid, top.gid))
            }
            (None, None) => None,
        };
        let now = Timestamp::now();
        let snapshot = Snapshot {
            id,
            key: wanted.key.clone(),
            parent: wanted.parent.clone(),
            kind,
            created: now,
            updated: now,
            labels: wanted.labels.clone(),
            layer: None,
            usage: None,
        };
        let made = self
            .make_directories(&snapshot, owner)
            .and_then(|()| self.insert(&snapshot, wanted, parent.map(|parent| parent.id)));
        let Err(failed) = made else { return Ok(self.mounts_for(kind, id, lower)) };
        // A write that failed may have reached the disk all the same, and then the directory
        // is somebody's. Where that cannot even be asked, the next start decides.
        match self.store.read_durable(|tx| tx.exists(id).map_err(Error::from)) {
            Ok(true) => Ok(self.mounts_for(kind, id, lower)),
            Ok(false) => match self.sys.remove_tree(&self.paths.snapshot_dir(id), &|| false) {
                Ok(()) => Err(failed),
                Err(undo) => Err(Error::Undo { failed: Box::new(failed), undo }),
            },
            Err(_) => Err(failed),
        }
    }

    /// The record of an ordinary snapshot on `parent`, which was looked at before.
    fn insert(&self, snapshot: &Snapshot, wanted: &CreateRequest, parent: Option<SnapshotId>) -> Result<()> {
        self.store.write(|tx| {
            validate_create_on(tx, wanted, parent)?;
            tx.insert(snapshot).map_err(Error::from)
        })
    }

    /// The layers of `chain` may have been attached for nothing.
    fn detach_if_unused(&self, chain: Arc<AttachedChain>) {
        let published = chain.published();
        drop(chain);
        self.sources.detach_unused(&published);
    }

    fn make_directories(&self, snapshot: &Snapshot, owner: Option<(u32, u32)>) -> Result<()> {
        let id = snapshot.id;
        self.sys.create_dir(&self.paths.snapshot_dir(id), 0o700)?;
        let fs = self.paths.fs(id);
        self.sys.create_dir(&fs, 0o755)?;
        if let Some((uid, gid)) = owner {
            self.sys.chown(&fs, uid, gid)?;
        }
        if snapshot.kind == Kind::Active {
            self.sys.create_dir(&self.paths.work(id), 0o711)?;
        }
        let sidecar = Sidecar { prepared: snapshot.clone(), committed: None };
        self.sys.write_file(&self.paths.record(id), &sidecar.encode())?;
        Ok(())
    }

    fn mounts_for(&self, kind: Kind, id: SnapshotId, lower: &LowerDirectories) -> Vec<Mount> {
        match kind {
            Kind::View => overlay::view(&self.paths, id, lower, &self.overlay_options),
            Kind::Active | Kind::Committed => overlay::active(&self.paths, id, lower, &self.overlay_options),
        }
    }

    /// The chain that begins with `parent`, with all that is published in its place.
    fn attach_parent_chain(&self, parent: Option<&Snapshot>, keep: ChainRetention) -> Result<Arc<AttachedChain>> {
        let Some(parent) = parent else { return Ok(Arc::default()) };
        if parent.layer.is_none() {
            self.ensure_files_exist(parent)?;
        }
        let (sources, limits) = (&self.sources, self.sources.limits());
        if let Some(known) = sources.chains.get_current(parent.id, &sources.attacher, limits) {
            return Ok(known);
        }
        let chain = self.store.read(|tx| tx.chain(&parent.key, |_| false).map_err(Error::from))?;
        // It may have been removed meanwhile, and made again under the same name.
        if chain.first().is_none_or(|first| first.id != parent.id) {
            return Err(Error::ParentNotFound(parent.key.clone()));
        }
        let (published, local): (Vec<_>, Vec<_>) = chain.iter().partition(|snapshot| snapshot.layer.is_some());
        let there = local.into_iter().try_for_each(|local| self.ensure_files_exist(local));
        match there.and_then(|()| sources.attach_chain(&chain, limits)) {
            Ok(attached) => {
                let attached = Arc::new(attached);
                if keep == ChainRetention::Known {
                    sources.chains.keep(&attached);
                }
                Ok(attached)
            }
            Err(e) => {
                let published: Vec<SnapshotId> = published.into_iter().map(|snapshot| snapshot.id).collect();
                sources.detach_unused(&published);
                Err(e)
            }
        }
    }

    fn ensure_files_exist(&self, local: &Snapshot) -> Result<()> {
        match self.sys.lstat(&self.paths.fs(local.id)) {
            Ok(_) => Ok(()),
            Err(system::Error { errno: Errno::ENOENT, .. }) => {
                Err(Error::Broken { key: local.key.clone(), id: local.id })
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// What must hold before `create_request` can be made, in the order in which containerd expects
/// the complaints; the result is the parent.
fn validate_create(tx: &ReadTxn, wanted: &CreateRequest) -> Result<Option<Snapshot>> {
    let parent = match &wanted.parent {
        None => None,
        Some(key) => match tx.get(key.as_str())? {
            None => return Err(Error::ParentNotFound(key.clone())),
            Some(parent) if parent.kind != Kind::Committed => {
                return Err(Error::ParentNotCommitted { parent: key.clone(), kind: parent.kind });
            }
            parent => parent,
        },
    };
    match tx.get(wanted.key.as_str())? {
        Some(_) => Err(Error::AlreadyExists(wanted.key.clone())),
        None => Ok(parent),
    }
}

/// As `validate_create`, where the parent was looked at before and had this id.
fn validate_create_on(tx: &ReadTxn, wanted: &CreateRequest, id: Option<SnapshotId>) -> Result<Option<Snapshot>> {
    let parent = validate_create(tx, wanted)?;
    match &parent {
        // Removed meanwhile, and made again under the same name.
        Some(other) if Some(other.id) != id => Err(Error::ParentNotFound(other.key.clone())),
        _ => Ok(parent),
    }
}

/// Whether a chain goes on with one snapshot more on `parent`.
fn check_depth(tx: &ReadTxn, parent: &Snapshot) -> Result<()> {
    let is_full = tx.depth(parent.id)?.is_some_and(|depth| depth >= MAX_CHAIN);
    if is_full { Err(Error::ChainTooLong { parent: parent.key.clone() }) } else { Ok(()) }
}

/// The name of a remote snapshot: a function of (ref, parent), so that the same chain over
/// two parents, in two namespaces say, makes two snapshots, and over one parent only one.
fn remote_name(parent: Option<&Snapshot>, reference: &str) -> std::result::Result<Key, crate::model::InvalidKey> {
    Key::parse(&format!("cvmfs/{}/{reference}", parent.map_or(0, |p| p.id.0)))
}

/// The committed snapshot that stands for the layer `reference` on `parent` already. Of all that containerd can find
/// for the answer "it is there" it takes the first, and a label can have been changed: so all must be the layer.
fn find_present(
    tx: &ReadTxn,
    reference: &str,
    parent: Option<&Key>,
    digest: &Digest,
) -> Result<std::result::Result<Option<Key>, layer_provider::DownloadReason>> {
    let (mut present, mut other, mut left) = (None, None, SAME_REFERENCE);
    let all = tx.visit_by_ref(reference, parent.map_or("", Key::as_str), |snapshot| {
        left -= 1;
        if snapshot.kind == Kind::Committed {
            if !names_same_layer(&snapshot, reference, digest) {
                other = Some(snapshot.key);
            } else if snapshot.layer.is_some() {
                present.get_or_insert(snapshot.key);
            }
        }
        other.is_none() && left > 0
    })?;
    Ok(match other {
        Some(name) => Err(layer_provider::DownloadReason::ReferenceTaken { name }),
        None if !all => Err(layer_provider::DownloadReason::ReferenceCrowded { limit: SAME_REFERENCE }),
        None => Ok(present),
    })
}

/// Whether a snapshot with the label `reference` was made for it: containerd, Go snapshotters and
/// `remote_name` all end the key with the layer's name, and nobody can change a key.
fn names_same_layer(snapshot: &Snapshot, reference: &str, digest: &Digest) -> bool {
    let before = snapshot.key.as_str().strip_suffix(reference);
    let has_name = before.is_some_and(|before| before.is_empty() || before.ends_with('/'));
    has_name || snapshot.layer.as_ref().is_some_and(|layer| layer.digest == *digest)
}

/// Labels without a value are no labels, and too many are refused.
pub(crate) fn check_labels(labels: &mut Labels) -> Result<()> {
    labels.retain(|_, value| !value.is_empty());
    if labels.len() > MAX_LABELS {
        return Err(Error::TooManyLabels { count: labels.len() });
    }
    match labels.iter().map(|(label, value)| label.len() + value.len()).sum() {
        ..=MAX_LABELS_BYTES => Ok(()),
        bytes => Err(Error::LabelsTooLong { bytes }),
    }
}

/// The host's ids of a container's root, if the labels say so.
pub(crate) fn mapped_root(labels: &Labels) -> Result<Option<(u32, u32)>> {
    let one = |label: &'static str| {
        labels
            .get(label)
            .map(|value| host_id_of_root(value).ok_or_else(|| Error::InvalidMapping { label, value: value.clone() }))
            .transpose()
    };
    Ok(match (one(LABEL_UID_MAPPING)?, one(LABEL_GID_MAPPING)?) {
        (None, None) => None,
        (uid, gid) => Some((uid.unwrap_or(0), gid.unwrap_or(0))),
    })
}

/// `container:host:length[,…]`, all numbers; the range that holds container id 0 counts.
fn host_id_of_root(mapping: &str) -> Option<u32> {
    let mut root = None;
    for range in mapping.split(',') {
        let numbers: Vec<u32> = range.split(':').map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let [container, host, length] = numbers[..] else { return None };
        host.checked_add(length)?;
        if container == 0 && length > 0 {
            root.get_or_insert(host);
        }
    }
    root
}

#[cfg(test)]
mod tests;
