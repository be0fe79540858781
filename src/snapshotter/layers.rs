//! Published files on their way under a chain: finding them, looking through them, attaching
//! them. All questions go through the repositories' own threads and come back in time.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::scans::{Pending, Scans};
use super::{Error, Result, cleanup};
use crate::attach::{self, Attach, Attacher, Pin, Release, Released};
use crate::metrics::{METRICS, Reason};
use crate::overlay::{self, Edition, Lower, Shown};
use crate::repository::lane::Turn;
use crate::repository::scan::{Scan, ScanKey};
use crate::repository::{Asked, Missing, Repository};
use crate::store::{Lookup, Store};
use crate::types::{
    Digest, InvalidDigest, Key, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF, Layer, Quoted, Snapshot, SnapshotId,
};

/// Why the layer of a pull is downloaded after all.
#[derive(Debug)]
pub enum Fallback {
    NoDigest,
    BadDigest {
        digest: String,
        why: InvalidDigest,
    },
    /// What each repository said.
    Missing {
        digest: Digest,
        why: Vec<(String, Missing)>,
    },
    NameTooLong,
    NameTaken {
        name: Key,
    },
    /// A snapshot that is not this layer has its `snapshot.ref`.
    ReferenceTaken {
        name: Key,
    },
}

impl Fallback {
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoDigest => Reason::NoDigest,
            Self::BadDigest { .. } => Reason::BadDigest,
            Self::NameTooLong | Self::NameTaken { .. } | Self::ReferenceTaken { .. } => Reason::Name,
            // What is odd about one of them says more than that another one does not have it.
            Self::Missing { why, .. } => {
                let reasons = why.iter().map(|(_, missing)| missing.reason());
                reasons
                    .reduce(|one, other| if one == Reason::NotPublished { other } else { one })
                    .unwrap_or(Reason::NotPublished)
            }
        }
    }

    /// One line for each layer that is downloaded.
    pub fn log(&self, key: &Key, reference: &str) {
        let key = key.to_string();
        match self {
            Self::Missing { digest, why } => {
                let names: Vec<&str> = why.iter().map(|(name, _)| name.as_str()).collect();
                let reasons: Vec<String> = why.iter().map(|(name, why)| format!("{name}: {why}")).collect();
                let (repositories, reasons) = (names.join(" "), reasons.join("; "));
                let is_usual = why.iter().all(|(_, why)| *why == Missing::NotPublished);
                let level = if is_usual { log::Level::Info } else { log::Level::Warn };
                log::log!(level, digest = digest.as_str(), repository = repositories.as_str();
                    "layer {digest} will be downloaded: {reasons}");
            }
            Self::NoDigest => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: the pull of {} came without the label {LABEL_LAYER_DIGEST}; \
                 containerd must be configured to pass image annotations to snapshotters, see the README",
                Quoted(reference)
            ),
            Self::BadDigest { digest, why } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: label {LABEL_LAYER_DIGEST} is {}: {why}", Quoted(digest)
            ),
            Self::NameTooLong => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: the label containerd.io/snapshot.ref is too long"
            ),
            Self::NameTaken { name } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: a snapshot that is not this layer has the name {name}"
            ),
            Self::ReferenceTaken { name } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: somebody gave its label {LABEL_SNAPSHOT_REF}={} to snapshot {name}, \
                 which containerd would take for it",
                Quoted(reference)
            ),
        }
    }
}

/// What it takes to bring published files under a chain; shared with the repositories' threads.
pub struct Sources {
    pub store: Arc<Store>,
    pub attacher: Attacher,
    pub scans: Scans,
    /// In the order in which they are asked.
    pub repositories: Vec<Arc<Repository>>,
}

/// A published layer that is to be attached for a snapshot.
#[derive(Clone)]
struct AttachTarget {
    id: SnapshotId,
    scan_key: ScanKey,
    /// Whether its mask will be used, if it needs one.
    masked: bool,
    is_lowest: bool,
}

/// A layer in its place. It stays there while this lives.
pub struct Attached {
    pub pin: Pin,
    pub scan: Arc<Scan>,
    masked: bool,
}

/// Why a layer is not in its place.
#[derive(Debug)]
enum Trouble {
    /// The repository cannot provide it.
    Missing(Missing),
    /// Our own disk, or our own store.
    Own(Error),
}

impl Trouble {
    /// What a caller who needs `layer` is told.
    fn of(self, layer: &Layer) -> Error {
        match self {
            Self::Missing(why) => unavailable(layer, why),
            Self::Own(e) => e,
        }
    }
}

impl From<Missing> for Trouble {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

/// When a call waits no longer, however well the repository gets on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For walks; they go on without it.
    pub scans: Instant,
    pub all: Instant,
}

impl Limits {
    /// Of a call that begins now.
    pub fn of(repository: &Repository) -> Self {
        Self { scans: Instant::now() + repository.timeout(), all: repository.give_up_at() }
    }
}

/// A layer, and what is known of its markers.
type Scanned = (AttachTarget, Arc<Scan>);
type Tried = std::result::Result<Attached, Trouble>;

/// How far the search for the markers of a layer is. Those of many layers are begun together and
/// waited for in turn.
enum Looking {
    Known(Arc<Scan>),
    /// Where what is to be looked through lies.
    Asked(std::result::Result<Asked<std::result::Result<PathBuf, Missing>>, Missing>),
}

enum Walking {
    Known(Arc<Scan>),
    Begun(std::result::Result<Pending, Missing>),
}

/// A published layer of a chain.
struct Wanted<'a> {
    snapshot: &'a Snapshot,
    layer: &'a Layer,
    scan_key: ScanKey,
    /// The first that is asked.
    repository: Arc<Repository>,
}

impl Sources {
    /// The first repository that has the layer, or what each of them said.
    pub fn find(&self, digest: &Digest) -> std::result::Result<Arc<Repository>, Vec<(String, Missing)>> {
        let mut reasons = Vec::new();
        for repository in &self.repositories {
            let (asked, wanted) = (Arc::clone(repository), digest.clone());
            match Repository::ask(repository, move || asked.layer(&wanted)).and_then(|top| top) {
                Ok(_) => return Ok(Arc::clone(repository)),
                Err(missing) => reasons.push((repository.name().to_owned(), missing)),
            }
        }
        Err(reasons)
    }

    pub fn named(&self, name: &str) -> Option<&Arc<Repository>> {
        self.repositories.iter().find(|repository| repository.name() == name)
    }

    /// The one that it came from, then the others: a digest names the same files everywhere.
    /// Never empty, as the configuration's list is not.
    pub fn candidates(&self, name: &str) -> Vec<Arc<Repository>> {
        let others = self.repositories.iter().filter(|repository| repository.name() != name);
        self.named(name).into_iter().chain(others).cloned().collect()
    }

    /// Attaches the layers of `chain`, nearest first; None where a snapshot is local.
    pub fn attach_chain(self: &Arc<Self>, chain: &[Snapshot]) -> Result<Vec<(Lower, Option<Attached>)>> {
        // All repositories have the same limits.
        let limits = Limits::of(&self.repositories[0]);
        let remote = chain.iter().filter_map(|snapshot| Some((snapshot, snapshot.layer.as_ref()?)));
        let wanted: Vec<Wanted<'_>> = remote
            .map(|(snapshot, layer)| {
                let repository = self.candidates(&layer.repository).swap_remove(0);
                Wanted { snapshot, layer, scan_key: scan_key(layer, &repository), repository }
            })
            .collect();
        let looking = wanted.iter().map(|one| self.look(&one.scan_key, &one.repository));
        let looking = looking.collect::<Result<Vec<_>>>()?;
        let walking = wanted
            .iter()
            .zip(looking)
            .map(|(one, looking)| looking.walk(self, &one.scan_key, &one.repository, limits, Turn::Next));
        let walking: Vec<_> = walking.collect();
        let scans: Vec<_> = walking.into_iter().map(|walking| walking.result(limits)).collect();
        let masked = masked(chain, &lowers(chain, scans.iter().map(|scan| Some((scan.as_deref().ok()?, Edition(0))))));
        let mut attached = Vec::with_capacity(wanted.len());
        for (tried, one) in self.attach_together(&wanted, scans, &masked, limits).into_iter().zip(&wanted) {
            attached.push(match tried {
                Err(Trouble::Missing(why)) => self.attach_from_others(one, why)?,
                Err(Trouble::Own(e)) => return Err(e),
                Ok(attached) => attached,
            });
        }
        let all = |attached: &[Attached]| lowers(chain, attached.iter().map(|one| Some((&*one.scan, one.pin.edition))));
        // A layer of another repository may hide less than the one that it stands in for.
        let needed = self::masked(chain, &all(&attached));
        for ((needs_mask, attached), one) in needed.into_iter().zip(&mut attached).zip(&wanted) {
            if needs_mask && !attached.masked {
                *attached =
                    self.attach(&one.target(true), &one.repository, limits).map_err(|trouble| trouble.of(one.layer))?;
            }
        }
        let lowers = all(&attached);
        let mut attached = attached.into_iter();
        let attached = chain.iter().map(|snapshot| snapshot.layer.as_ref().and_then(|_| attached.next()));
        Ok(lowers.into_iter().zip(attached).collect())
    }

    /// Attaches what was looked through, each layer from the first repository that is asked. A
    /// thread of the repository takes several layers, for the way to it and back costs more
    /// than a layer that is in place.
    fn attach_together(
        self: &Arc<Self>,
        wanted: &[Wanted<'_>],
        scans: Vec<std::result::Result<Arc<Scan>, Missing>>,
        masked: &[bool],
        limits: Limits,
    ) -> Vec<Tried> {
        // With their places in `wanted`.
        let mut tried: Vec<(usize, Tried)> = Vec::with_capacity(wanted.len());
        let mut targets = Vec::with_capacity(wanted.len());
        for (n, (one, scan)) in wanted.iter().zip(scans).enumerate() {
            match scan {
                Err(missing) => tried.push((n, Err(missing.into()))),
                Ok(scan) => targets.push((n, (one.target(masked[n]), scan))),
            }
        }
        let repository = |n: usize| &wanted[n].repository;
        targets.sort_by(|(a, _), (b, _)| repository(*a).name().cmp(repository(*b).name()));
        let since = Instant::now();
        let mut begun = Vec::new();
        for of_one in targets.chunk_by(|(a, _), (b, _)| repository(*a).name() == repository(*b).name()) {
            for some in of_one.chunks(of_one.len().div_ceil(Repository::AT_ONCE)) {
                let (places, targets): (Vec<_>, Vec<_>) = some.iter().cloned().unzip();
                begun.push((self.begin(targets, repository(places[0]), since), places));
            }
        }
        for (begun, places) in begun {
            match begun.and_then(|asked| asked.wait(limits.all)) {
                Ok(all) => tried.extend(places.into_iter().zip(all)),
                Err(missing) => tried.extend(places.into_iter().map(|n| (n, Err(missing.clone().into())))),
            }
        }
        tried.sort_by_key(|(n, _)| *n);
        tried.into_iter().map(|(_, one)| one).collect()
    }

    /// The repository that the layer came from cannot provide it: another one may.
    fn attach_from_others(self: &Arc<Self>, one: &Wanted<'_>, why: Missing) -> Result<Attached> {
        let layer = one.layer;
        for other in self.candidates(&layer.repository).iter().skip(1) {
            let target = AttachTarget { scan_key: scan_key(layer, other), ..one.target(true) };
            match self.attach(&target, other, Limits::of(other)) {
                Ok(attached) => return Ok(attached),
                Err(Trouble::Own(e)) => return Err(e),
                Err(Trouble::Missing(_)) => {}
            }
        }
        if self.named(&layer.repository).is_some() {
            return Err(unavailable(layer, why));
        }
        let instead = self.repositories.first().map(|first| (first.name().to_owned(), Box::new(why)));
        Err(unavailable(layer, Missing::NotConfigured { instead }))
    }

    /// Attaches one layer, looked through before if need be.
    fn attach(self: &Arc<Self>, target: &AttachTarget, repository: &Arc<Repository>, limits: Limits) -> Tried {
        let looking = self.look(&target.scan_key, repository).map_err(Trouble::Own)?;
        let scan = looking.walk(self, &target.scan_key, repository, limits, Turn::Next).result(limits)?;
        self.begin(vec![(target.clone(), scan)], repository, Instant::now())?.wait(limits.all)?.swap_remove(0)
    }

    fn look(&self, scan_key: &ScanKey, repository: &Arc<Repository>) -> Result<Looking> {
        if let Some(scan) = self.scans.known(scan_key)? {
            return Ok(Looking::Known(scan));
        }
        let (asked, digest) = (Arc::clone(repository), scan_key.digest.clone());
        Ok(Looking::Asked(Repository::start(repository, move || asked.layer(&digest), drop)))
    }

    /// Begins to scan a layer that was just pulled, for the first container that will need it.
    pub fn prefetch_scan(self: &Arc<Self>, key: &Key) -> Result<()> {
        let snapshot = self.store.read(|tx| tx.get(key.as_str()).map_err(Error::from))?;
        let Some(layer) = snapshot.and_then(|snapshot| snapshot.layer) else { return Ok(()) };
        let Some(repository) = self.named(&layer.repository) else { return Ok(()) };
        let scan_key = scan_key(&layer, repository);
        let looking = self.look(&scan_key, repository)?;
        match looking.walk(self, &scan_key, repository, Limits::of(repository), Turn::Last) {
            Walking::Known(_) => Ok(()),
            Walking::Begun(begun) => begun.map(drop).map_err(|why| unavailable(&layer, why)),
        }
    }

    /// Has `targets` attached on a thread of the repository, one after the other. What it answered
    /// after `since` says that it is there.
    fn begin(
        self: &Arc<Self>,
        targets: Vec<Scanned>,
        repository: &Arc<Repository>,
        since: Instant,
    ) -> std::result::Result<Asked<Vec<Tried>>, Missing> {
        let ids: Vec<SnapshotId> = targets.iter().map(|(target, _)| target.id).collect();
        let job = {
            let (sources, repository) = (Arc::clone(self), Arc::clone(repository));
            move || targets.iter().map(|(target, scan)| sources.attach_now(target, scan, &repository, since)).collect()
        };
        let late = {
            let sources = Arc::clone(self);
            move |tried: Vec<Tried>| {
                let attached = ids.into_iter().zip(tried).filter_map(|(id, one)| one.ok().map(|_| id));
                sources.release_unused(&attached.collect::<Vec<_>>());
            }
        };
        Repository::start(repository, job, late)
    }

    /// On a thread of the repository.
    fn attach_now(&self, target: &AttachTarget, scan: &Arc<Scan>, repository: &Repository, since: Instant) -> Tried {
        let AttachTarget { id, masked, is_lowest, scan_key: ScanKey { digest, .. } } = target;
        let (id, masked, is_lowest) = (*id, *masked, *is_lowest);
        let top = repository.layer_since(digest, since)?;
        let pin = self.attacher.attach(&Attach { id, source: &top, scan, masked, is_lowest }).map_err(|e| {
            // Gone while we were at it?
            // Or another thread hangs in it, and keeps this one from attaching.
            let of_repository = e.path.starts_with(repository.path()) || e.is_dead() || e.errno == Errno::EAGAIN;
            METRICS.attached("failed");
            if of_repository || repository.layer(digest).is_err() {
                Trouble::Missing(repository.unreadable(e))
            } else {
                Trouble::Own(Error::System(e))
            }
        })?;
        if pin.fresh {
            METRICS.attached("attached");
        }
        if pin.fresh && is_lowest {
            repository.notice_owners(digest, &top);
        }
        Ok(Attached { pin, scan: Arc::clone(scan), masked })
    }

    /// Takes away what `id` has on disk, unless it is needed.
    pub fn release_one(&self, id: SnapshotId) -> Result<Released> {
        self.attacher.release(id, || {
            let needed = self.store.read(|tx| cleanup::needs_its_directory(tx, id))?;
            Ok::<_, Error>(if needed { Release::Keep } else { Release::Remove })
        })
    }

    /// Takes away what was attached for nobody, now; what is in somebody's hands is looked at
    /// by the next cleanup.
    pub fn release_unused(&self, ids: &[SnapshotId]) {
        let mut left = Vec::new();
        for id in ids {
            if !matches!(self.release_one(*id), Ok(Released::Done)) {
                left.push(*id);
            }
        }
        if left.is_empty() {
            return;
        }
        if let Err(e) = self.store.write(|tx| tx.schedule_cleanup(&left).map_err(Error::from)) {
            log::warn!("layers may stay attached until the next start: {e}");
        }
    }
}

impl Looking {
    fn walk(
        self,
        sources: &Sources,
        scan_key: &ScanKey,
        repository: &Arc<Repository>,
        limits: Limits,
        turn: Turn,
    ) -> Walking {
        match self {
            Self::Known(scan) => Walking::Known(scan),
            Self::Asked(asked) => {
                let top = asked.and_then(|asked| asked.wait(limits.all)).and_then(|top| top);
                Walking::Begun(top.and_then(|top| sources.scans.start(scan_key, repository, top, turn)))
            }
        }
    }
}

impl Walking {
    fn result(self, limits: Limits) -> std::result::Result<Arc<Scan>, Missing> {
        match self {
            Self::Known(scan) => Ok(scan),
            Self::Begun(pending) => pending?.wait(limits.scans),
        }
    }
}

impl Wanted<'_> {
    fn target(&self, masked: bool) -> AttachTarget {
        let is_lowest = self.snapshot.parent.is_none();
        AttachTarget { id: self.snapshot.id, scan_key: self.scan_key.clone(), masked, is_lowest }
    }
}

/// What overlayfs is to see of `chain`; `scans` are of its published layers, None where one is not known.
fn lowers<'s>(chain: &[Snapshot], mut scans: impl Iterator<Item = Option<(&'s Scan, Edition)>>) -> Vec<Lower> {
    let lower = |snapshot: &Snapshot| match &snapshot.layer {
        None => Lower::Local(snapshot.id),
        Some(layer) => {
            let known = scans.next().flatten().map(|(scan, edition)| (attach::skeletons(scan), edition));
            let ((mask, deletes), edition) = known.unwrap_or_default();
            let hides = deletes && snapshot.parent.is_some();
            Lower::Remote { id: snapshot.id, edition, digest: layer.digest.clone(), mask, hides }
        }
    };
    chain.iter().map(lower).collect()
}

/// Which of the published layers of `chain` need their masks.
fn masked(chain: &[Snapshot], lowers: &[Lower]) -> Vec<bool> {
    let remote = chain.iter().zip(overlay::shown(lowers)).filter(|(snapshot, _)| snapshot.layer.is_some());
    remote.map(|(_, shown)| shown == Shown::Masked).collect()
}

fn scan_key(layer: &Layer, repository: &Repository) -> ScanKey {
    ScanKey { digest: layer.digest.clone(), repository: repository.name().to_owned() }
}

fn unavailable(layer: &Layer, why: Missing) -> Error {
    Error::LayerUnavailable { digest: layer.digest.clone(), repository: layer.repository.clone(), why }
}
