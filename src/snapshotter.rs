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
mod layers;
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
pub use self::cleanup::Cleaned;
pub use self::error::{Error, Result};
use self::layers::Sources;
pub use self::list::{CHUNK_BYTES, Chunk, Rest};
pub use self::metadata::LabelChange;
pub use self::recovery::Found;
use self::scans::ScanScheduler;
use crate::attach::{Attacher, Mode};
use crate::metrics::METRICS;
use crate::overlay::{self, LowerDirectories, Places};
use crate::repository::Repository;
use crate::repository::scan::ScanKey;
use crate::sidecar::Sidecar;
use crate::store::{Read, Store};
use crate::sys::{self, Sys};
use crate::types::{
    CHAIN_SNAPSHOTS, Digest, Key, Kind, LABEL_GID_MAPPING, LABEL_LAYER_DIGEST, LABEL_REMOTE, LABEL_SNAPSHOT_REF,
    LABEL_UID_MAPPING, LABELS_BYTES, LABELS_COUNT, Labels, Layer, Mount, Snapshot, SnapshotId, Timestamp,
};

/// Snapshots with one `snapshot.ref` on one parent that are read, one after the other, before a pull is answered that
/// its layer is there: others wait meanwhile to write. There is one, and one for each attempt that is under way.
const SAME_REFERENCE: usize = 1000;

pub struct Snapshotter {
    store: Arc<Store>,
    sources: Arc<Sources>,
    places: Places,
    sys: Arc<dyn Sys>,
    /// For every overlay, such as `index=off`.
    overlay_options: Vec<String>,
    commits: metadata::CommitLocks,
    /// Held by the one cleanup that runs.
    cleaning: parking_lot::Mutex<()>,
    /// Another one waits for it to end.
    cleanup_waits: AtomicBool,
    /// What the start found.
    found: OnceLock<Found>,
}

/// A snapshot that a client wants made.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub key: Key,
    pub parent: Option<Key>,
    pub labels: Labels,
}

/// Whom a call asks, and may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    /// The repositories one after the other, as a pull does.
    All,
    /// Above all the repository of this number, in their order.
    One(usize),
}

/// What becomes of a chain when its layers are in their places.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// It is known to the next call that needs it.
    Known,
    Nothing,
}

/// How published files come under a container.
#[derive(Clone, Debug)]
pub struct Ways {
    pub attach: Mode,
    /// For every overlay, such as `index=off`.
    pub overlay_options: Vec<String>,
}

impl Snapshotter {
    /// `snapshots` is a directory that exists and that nobody else uses. `repositories` are
    /// asked in their order; there is at least one.
    pub fn new(store: Store, repositories: Vec<Repository>, sys: Arc<dyn Sys>, snapshots: &Path, ways: Ways) -> Self {
        let places = Places::new(snapshots.to_owned());
        let store = Arc::new(store);
        let sources = Arc::new(Sources {
            store: Arc::clone(&store),
            attacher: Arc::new(Attacher::new(places.clone(), ways.attach, Arc::clone(&sys))),
            scans: ScanScheduler::new(Arc::clone(&store), Arc::clone(&sys)),
            places: places.clone(),
            chains: AttachedChains::default(),
            repositories: repositories.into_iter().map(Arc::new).collect(),
        });
        Self {
            store,
            sources,
            places,
            sys,
            overlay_options: ways.overlay_options,
            commits: metadata::CommitLocks::default(),
            cleaning: parking_lot::Mutex::default(),
            cleanup_waits: AtomicBool::default(),
            found: OnceLock::new(),
        }
    }

    /// Asks each repository whether it is there, without waiting, and says so where it is not.
    pub fn look_at_repositories(&self) {
        let state = self.device();
        self.sources.repositories.iter().for_each(|repository| Repository::look(repository, state));
    }

    /// That of the state root.
    fn device(&self) -> Option<u64> {
        self.sys.stat(self.places.all()).ok().map(|status| status.device)
    }

    /// Gives up memory that many calls at once needed, when no more such come.
    pub fn release_memory(&self) {
        self.store.release_memory();
        sys::give_back_free_memory();
    }

    /// Lets go of the metadata: a thread that hangs in a repository must not keep it locked
    /// after the end of everything else.
    pub fn close(&self) {
        self.store.close_for_good();
    }

    /// What a call on `key` may have to wait for: the repository of the first layer in or below it.
    pub fn asks(&self, key: &str) -> Result<Option<Asks>> {
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
        Ok(name.map(|name| number(name).map_or(Asks::All, Asks::One)))
    }

    /// As `asks`, for a Prepare with these labels.
    pub fn asks_for_prepare(&self, parent: &str, labels: &HashMap<String, String>) -> Result<Option<Asks>> {
        if labels.contains_key(LABEL_SNAPSHOT_REF) { Ok(Some(Asks::All)) } else { self.asks(parent) }
    }

    /// A writable snapshot on `parent`. With a `snapshot.ref` label it is a pull that asks:
    /// if the layer is published, the answer is `RemoteCommitted`.
    pub fn prepare(&self, mut wanted: Wanted) -> Result<Vec<Mount>> {
        check_labels(&mut wanted.labels)?;
        if let Some(reference) = wanted.labels.get(LABEL_SNAPSHOT_REF) {
            let reference = reference.clone();
            match self.commit_remote(&wanted, &reference)? {
                Ok(()) => return Err(Error::RemoteCommitted { reference }),
                Err(why) => {
                    METRICS.downloaded(why.reason());
                    why.log(&wanted.key, &reference);
                }
            }
        }
        self.create(Kind::Active, &wanted)
    }

    /// A read-only snapshot of `parent`.
    pub fn view(&self, mut wanted: Wanted) -> Result<Vec<Mount>> {
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
        self.require_files(&snapshot)?;
        let chain = self.chain_below(parent.as_ref(), Keep::Known);
        // If it was removed or committed meanwhile, its layers were attached for nobody.
        if self.store.read(|tx| tx.id_of(key).map_err(Error::from))? != Some(snapshot.id) {
            if let Ok(chain) = chain {
                self.release(chain);
            }
            return Err(Error::NotFound(key.clone()));
        }
        let chain = chain?;
        Ok(self.describe(snapshot.kind, snapshot.id, &chain.lower))
    }

    /// Stores the remote snapshot for (ref, parent). The inner error says why this has to be
    /// an ordinary snapshot instead.
    fn commit_remote(&self, wanted: &Wanted, reference: &str) -> Result<std::result::Result<(), layers::Fallback>> {
        use layers::Fallback;
        let below = self.store.read(|tx| {
            let parent = check_new(tx, wanted)?;
            parent.as_ref().map_or(Ok(()), |parent| check_depth(tx, parent))?;
            Ok::<_, Error>(parent.map(|parent| parent.id))
        })?;
        let Some(text) = wanted.labels.get(LABEL_LAYER_DIGEST) else { return Ok(Err(Fallback::NoDigest)) };
        let digest = match Digest::parse(text) {
            Ok(digest) => digest,
            Err(why) => return Ok(Err(Fallback::BadDigest { digest: text.clone(), why })),
        };
        let repository = match self.sources.find(&digest) {
            Ok(repository) => repository,
            Err(why) => return Ok(Err(Fallback::Missing { digest, why })),
        };
        let scan_key = ScanKey { digest: digest.clone(), repository: repository.name().to_owned() };
        if let Some(why) = self.sources.scans.refusal(&scan_key)? {
            return Ok(Err(Fallback::Missing { digest, why: vec![(scan_key.repository, why)] }));
        }
        let id = self.store.reserve_id()?;
        let now = Timestamp::now();
        let committed = self.store.write(|tx| {
            let parent = check_new_on(tx, wanted, below)?;
            let Ok(name) = remote_name(parent.as_ref(), reference) else { return Ok(Err(Fallback::NameTooLong)) };
            // Also under the name that a Go snapshotter gave it.
            match find_present(tx, reference, wanted.parent.as_ref(), &digest)? {
                Ok(Some(_)) => return Ok(Ok(())),
                Ok(None) => {}
                Err(why) => return Ok(Err(why)),
            }
            if tx.get(name.as_str())?.is_some() {
                return Ok(Err(Fallback::NameTaken { name }));
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
            METRICS.published(repository.name());
            self.sources.prefetch_scan(&scan_key, &repository);
        }
        Ok(committed)
    }

    /// An ordinary snapshot: layers below it attached, directories made, then the record.
    fn create(&self, kind: Kind, wanted: &Wanted) -> Result<Vec<Mount>> {
        let mapped_root = mapped_root(&wanted.labels)?;
        let parent = self.store.read(|tx| {
            let parent = check_new(tx, wanted)?;
            parent.as_ref().map_or(Ok(()), |parent| check_depth(tx, parent))?;
            Ok::<_, Error>(parent)
        })?;
        // A pull prepares a snapshot on each layer, and containers stand on the last one only, so the chains below the
        // others are not worth keeping.
        let keep = if wanted.labels.contains_key(LABEL_SNAPSHOT_REF) { Keep::Nothing } else { Keep::Known };
        let chain = self.chain_below(parent.as_ref(), keep)?;
        let created = self.create_on(kind, wanted, parent.as_ref(), &chain.lower, mapped_root);
        if created.is_err() {
            self.release(chain);
        }
        created
    }

    fn create_on(
        &self,
        kind: Kind,
        wanted: &Wanted,
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
                let top = self.sys.stat(&self.places.fs(parent.id))?;
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
        let Err(failed) = made else { return Ok(self.describe(kind, id, lower)) };
        // A write that failed may have reached the disk all the same, and then the directory
        // is somebody's. Where that cannot even be asked, the next start decides.
        match self.store.read_durable(|tx| tx.exists(id).map_err(Error::from)) {
            Ok(true) => Ok(self.describe(kind, id, lower)),
            Ok(false) => match self.sys.remove_tree(&self.places.home(id), &|| false) {
                Ok(()) => Err(failed),
                Err(undo) => Err(Error::Undo { failed: Box::new(failed), undo }),
            },
            Err(_) => Err(failed),
        }
    }

    /// The record of an ordinary snapshot on `parent`, which was looked at before.
    fn insert(&self, snapshot: &Snapshot, wanted: &Wanted, parent: Option<SnapshotId>) -> Result<()> {
        self.store.write(|tx| {
            check_new_on(tx, wanted, parent)?;
            tx.insert(snapshot).map_err(Error::from)
        })
    }

    /// The layers of `chain` may have been attached for nothing.
    fn release(&self, chain: Arc<AttachedChain>) {
        let published = chain.published();
        drop(chain);
        self.sources.release_unused(&published);
    }

    fn make_directories(&self, snapshot: &Snapshot, owner: Option<(u32, u32)>) -> Result<()> {
        let id = snapshot.id;
        self.sys.create_dir(&self.places.home(id), 0o700)?;
        let fs = self.places.fs(id);
        self.sys.create_dir(&fs, 0o755)?;
        if let Some((uid, gid)) = owner {
            self.sys.chown(&fs, uid, gid)?;
        }
        if snapshot.kind == Kind::Active {
            self.sys.create_dir(&self.places.work(id), 0o711)?;
        }
        let sidecar = Sidecar { made: snapshot.clone(), committed: None };
        self.sys.write_file(&self.places.record(id), &sidecar.encode())?;
        Ok(())
    }

    fn describe(&self, kind: Kind, id: SnapshotId, lower: &LowerDirectories) -> Vec<Mount> {
        match kind {
            Kind::View => overlay::view(&self.places, id, lower, &self.overlay_options),
            Kind::Active | Kind::Committed => overlay::active(&self.places, id, lower, &self.overlay_options),
        }
    }

    /// The chain that begins with `parent`, with all that is published in its place.
    fn chain_below(&self, parent: Option<&Snapshot>, keep: Keep) -> Result<Arc<AttachedChain>> {
        let Some(parent) = parent else { return Ok(Arc::default()) };
        if parent.layer.is_none() {
            self.require_files(parent)?;
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
        let there = local.into_iter().try_for_each(|local| self.require_files(local));
        match there.and_then(|()| sources.attach_chain(&chain, limits)) {
            Ok(attached) => {
                let attached = Arc::new(attached);
                if keep == Keep::Known {
                    sources.chains.keep(&attached);
                }
                Ok(attached)
            }
            Err(e) => {
                let published: Vec<SnapshotId> = published.into_iter().map(|snapshot| snapshot.id).collect();
                sources.release_unused(&published);
                Err(e)
            }
        }
    }

    fn require_files(&self, local: &Snapshot) -> Result<()> {
        match self.sys.lstat(&self.places.fs(local.id)) {
            Ok(_) => Ok(()),
            Err(sys::Error { errno: Errno::ENOENT, .. }) => Err(Error::Broken { key: local.key.clone(), id: local.id }),
            Err(e) => Err(e.into()),
        }
    }
}

/// What must hold before `wanted` can be made, in the order in which containerd expects
/// the complaints; the result is the parent.
fn check_new(tx: &Read, wanted: &Wanted) -> Result<Option<Snapshot>> {
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

/// As `check_new`, where the parent was looked at before and had this id.
fn check_new_on(tx: &Read, wanted: &Wanted, id: Option<SnapshotId>) -> Result<Option<Snapshot>> {
    let parent = check_new(tx, wanted)?;
    match &parent {
        // Removed meanwhile, and made again under the same name.
        Some(other) if Some(other.id) != id => Err(Error::ParentNotFound(other.key.clone())),
        _ => Ok(parent),
    }
}

/// Whether a chain goes on with one snapshot more on `parent`.
fn check_depth(tx: &Read, parent: &Snapshot) -> Result<()> {
    let is_full = tx.depth(parent.id)?.is_some_and(|depth| depth >= CHAIN_SNAPSHOTS);
    if is_full { Err(Error::ChainTooLong { parent: parent.key.clone() }) } else { Ok(()) }
}

/// The name of a remote snapshot: a function of (ref, parent), so that the same chain over
/// two parents, in two namespaces say, makes two snapshots, and over one parent only one.
fn remote_name(parent: Option<&Snapshot>, reference: &str) -> std::result::Result<Key, crate::types::InvalidKey> {
    Key::parse(&format!("cvmfs/{}/{reference}", parent.map_or(0, |p| p.id.0)))
}

/// The committed snapshot that stands for the layer `reference` on `parent` already. Of all that containerd can find
/// for the answer "it is there" it takes the first, and a label can have been changed: so all must be the layer.
fn find_present(
    tx: &Read,
    reference: &str,
    parent: Option<&Key>,
    digest: &Digest,
) -> Result<std::result::Result<Option<Key>, layers::Fallback>> {
    let (mut present, mut other, mut left) = (None, None, SAME_REFERENCE);
    let all = tx.take_by_ref(reference, parent.map_or("", Key::as_str), |snapshot| {
        left -= 1;
        if snapshot.kind == Kind::Committed {
            if !is_the_layer(&snapshot, reference, digest) {
                other = Some(snapshot.key);
            } else if snapshot.layer.is_some() {
                present.get_or_insert(snapshot.key);
            }
        }
        other.is_none() && left > 0
    })?;
    Ok(match other {
        Some(name) => Err(layers::Fallback::ReferenceTaken { name }),
        None if !all => Err(layers::Fallback::ReferenceCrowded { limit: SAME_REFERENCE }),
        None => Ok(present),
    })
}

/// Whether a snapshot with the label `reference` was made for it: containerd, Go snapshotters and
/// `remote_name` all end the key with the layer's name, and nobody can change a key.
fn is_the_layer(snapshot: &Snapshot, reference: &str, digest: &Digest) -> bool {
    let before = snapshot.key.as_str().strip_suffix(reference);
    let has_name = before.is_some_and(|before| before.is_empty() || before.ends_with('/'));
    has_name || snapshot.layer.as_ref().is_some_and(|layer| layer.digest == *digest)
}

/// Labels without a value are no labels, and too many are refused.
pub(crate) fn check_labels(labels: &mut Labels) -> Result<()> {
    labels.retain(|_, value| !value.is_empty());
    if labels.len() > LABELS_COUNT {
        return Err(Error::TooManyLabels { count: labels.len() });
    }
    match labels.iter().map(|(label, value)| label.len() + value.len()).sum() {
        ..=LABELS_BYTES => Ok(()),
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
mod attaching;
#[cfg(test)]
mod crashes;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
