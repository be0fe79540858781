//! Published files on their way under a chain: finding them, looking through them, attaching
//! them. All questions go through the repositories' own threads and come back in time.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use super::attached::{AttachedChain, AttachedChains, AttachedLayer, RepositoryInUse};
use super::scans::{ScanHandle, ScanScheduler};
use super::{Error, Result, cleanup};
use crate::attach::{
    self, AttachError, AttachOutcome, AttachRequest, Attacher, LayerPin, LayerSurvey, ReleaseDecision, ReleaseOutcome,
};
use crate::metrics::{DownloadCause, METRICS};
use crate::model::{
    Digest, InvalidDigest, Key, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF, Layer, Quoted, Snapshot, SnapshotId,
};
use crate::overlay::{self, ChainEntry, LayerUse, SnapshotPaths, SourceVariant};
use crate::repository::executor::Priority;
use crate::repository::scan::{Scan, ScanKey};
use crate::repository::{JobHandle, MountGeneration, Repository, RepositoryState, Unavailable};
use crate::store::Store;

/// Why the layer of a pull is downloaded after all.
#[derive(Debug)]
pub enum DownloadReason {
    NoDigest,
    BadDigest {
        digest: String,
        why: InvalidDigest,
    },
    /// What each repository said.
    Missing {
        digest: Digest,
        why: Vec<(String, Unavailable)>,
    },
    NameTooLong,
    NameTaken {
        name: Key,
    },
    /// A snapshot that is not this layer has its `snapshot.ref`.
    ReferenceTaken {
        name: Key,
    },
    /// So many snapshots, or more, have its `snapshot.ref`.
    ReferenceCrowded {
        limit: usize,
    },
}

impl DownloadReason {
    pub fn reason(&self) -> DownloadCause {
        match self {
            Self::NoDigest => DownloadCause::NoDigest,
            Self::BadDigest { .. } => DownloadCause::BadDigest,
            Self::NameTooLong
            | Self::NameTaken { .. }
            | Self::ReferenceTaken { .. }
            | Self::ReferenceCrowded { .. } => DownloadCause::Name,
            // What is odd about one of them says more than that another one does not have it.
            Self::Missing { why, .. } => {
                let reasons = why.iter().map(|(_, missing)| missing.reason());
                reasons
                    .reduce(|one, other| if one == DownloadCause::NotPublished { other } else { one })
                    .unwrap_or(DownloadCause::NotPublished)
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
                let is_usual = why.iter().all(|(_, why)| *why == Unavailable::NotPublished);
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
            Self::ReferenceCrowded { limit } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: {limit} snapshots or more have its label {LABEL_SNAPSHOT_REF}={}",
                Quoted(reference)
            ),
        }
    }
}

/// What it takes to bring published files under a chain; shared with the repositories' threads.
pub struct LayerProvider {
    pub store: Arc<Store>,
    pub attacher: Arc<Attacher>,
    pub scans: ScanScheduler,
    pub paths: SnapshotPaths,
    pub chains: AttachedChains,
    /// In the order in which they are asked.
    pub repositories: Vec<Arc<Repository>>,
}

/// A published layer that is to be attached.
struct AttachTarget {
    request: AttachRequest,
    digest: Digest,
    repository: Arc<Repository>,
}

impl AttachTarget {
    fn busy(&self) -> LayerError {
        LayerError::Own(Error::LayerBusy { digest: self.digest.clone() })
    }
}

/// A layer in its place. It stays there while this lives.
struct AttachedEntry {
    pin: LayerPin,
    variant: SourceVariant,
    inode: u64,
    scan: Arc<Scan>,
    masked: bool,
}

/// Why a layer is not in its place.
#[derive(Debug)]
enum LayerError {
    /// The repository cannot provide it.
    Missing(Unavailable),
    /// Our own disk, or our own store.
    Own(Error),
}

impl LayerError {
    /// What a caller who needs `layer` is told.
    fn of(self, layer: &Layer) -> Error {
        match self {
            Self::Missing(why) => unavailable(layer, why),
            Self::Own(e) => e,
        }
    }
}

impl From<Unavailable> for LayerError {
    fn from(missing: Unavailable) -> Self {
        Self::Missing(missing)
    }
}

/// When a call waits no longer, however well the repository gets on.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For scans, which go on without it.
    pub scans: Instant,
    pub all: Instant,
}

impl Deadlines {
    /// Of a call that begins now.
    pub fn of(repository: &Repository) -> Self {
        Self { scans: Instant::now() + repository.timeout(), all: repository.deadline() }
    }
}

type TryAttachResult = std::result::Result<AttachedEntry, LayerError>;

/// What a repository said about a layer.
type SurveyResult = std::result::Result<LayerSurvey, LayerError>;

/// A published layer of a chain.
struct ChainLayer<'a> {
    snapshot: &'a Snapshot,
    layer: &'a Layer,
    /// The one that is asked.
    repository: Arc<Repository>,
}

impl ChainLayer<'_> {
    fn scan_key(&self) -> ScanKey {
        ScanKey { digest: self.layer.digest.clone(), repository: self.repository.name().to_owned() }
    }

    fn target(&self, scan: Arc<Scan>, masked: bool) -> AttachTarget {
        let digest = self.layer.digest.clone();
        let source = self.repository.layer_path(&digest);
        let is_lowest = self.snapshot.parent.is_none();
        let request = AttachRequest { id: self.snapshot.id, source, scan, masked, is_lowest };
        AttachTarget { request, digest, repository: Arc::clone(&self.repository) }
    }
}

impl LayerProvider {
    /// The first repository that has the layer, or what each of them said.
    pub fn locate_layer(&self, digest: &Digest) -> std::result::Result<Arc<Repository>, Vec<(String, Unavailable)>> {
        let mut reasons = Vec::new();
        for repository in &self.repositories {
            if let Some(missing) = repository.refusal_of_pulls() {
                reasons.push((repository.name().to_owned(), missing));
                continue;
            }
            let wanted = digest.clone();
            match repository.call(move |generation| generation.layer(&wanted)) {
                Ok(_) => return Ok(Arc::clone(repository)),
                Err(missing) => reasons.push((repository.name().to_owned(), missing)),
            }
        }
        Err(reasons)
    }

    pub fn repository(&self, name: &str) -> Option<&Arc<Repository>> {
        self.repositories.iter().find(|repository| repository.name() == name)
    }

    /// The one that it came from, then the others: a digest names the same files everywhere.
    /// Never empty, as the configuration's list is not.
    pub fn repositories_preferring(&self, name: &str) -> Vec<Arc<Repository>> {
        let others = self.repositories.iter().filter(|repository| repository.name() != name);
        self.repository(name).into_iter().chain(others).cloned().collect()
    }

    /// When a call that begins now waits no longer. All repositories have the same limits.
    pub fn limits(&self) -> Deadlines {
        Deadlines::of(&self.repositories[0])
    }

    /// Attaches the layers of `chain`, whose nearest snapshot is the first.
    pub fn attach_chain(self: &Arc<Self>, chain: &[Snapshot], limits: Deadlines) -> Result<AttachedChain> {
        let remote = chain.iter().filter_map(|snapshot| Some((snapshot, snapshot.layer.as_ref()?)));
        let layers: Vec<ChainLayer<'_>> = remote
            .map(|(snapshot, layer)| {
                let repository = self.repositories_preferring(&layer.repository).swap_remove(0);
                ChainLayer { snapshot, layer, repository }
            })
            .collect();
        let states = query_states(&layers);
        // All are begun before the first one is waited for.
        let begun = layers.iter().map(|one| self.scans.start(&one.scan_key(), &one.repository, Priority::Next));
        let begun = begun.collect::<Result<Vec<_>>>()?;
        let scans: Vec<_> = begun.into_iter().map(|scan| scan.wait(limits.scans)).collect();
        // No other repository would help, and what is held keeps others out.
        let too_much = layers.iter().zip(&scans).find_map(|(one, scan)| match scan {
            Err(why @ Unavailable::ScansTakeMemory { .. }) => Some(unavailable(one.layer, why.clone())),
            _ => None,
        });
        if let Some(e) = too_much {
            return Err(e);
        }
        // The states are known before the layers are looked at, so a later change makes the next start look again.
        let states: Vec<_> =
            states.into_iter().map(|(repository, asked)| (repository, asked.wait(limits.all).ok())).collect();
        let masked = layers_needing_mask(
            chain,
            &lower_dirs(chain, scans.iter().map(|scan| Some((scan.as_deref().ok()?, SourceVariant(0))))),
        );
        let targets = layers.iter().zip(scans).zip(masked).map(|((one, scan), masked)| Ok(one.target(scan?, masked)));
        let mut attached = Vec::with_capacity(layers.len());
        let mut is_from_another = false;
        for (tried, one) in self.attach_targets(targets.collect(), limits).into_iter().zip(&layers) {
            attached.push(match tried {
                Err(LayerError::Missing(why)) => {
                    is_from_another = true;
                    self.attach_from_others(one, why)?
                }
                Err(LayerError::Own(e)) => return Err(e),
                Ok(attached) => attached,
            });
        }
        let all =
            |attached: &[AttachedEntry]| lower_dirs(chain, attached.iter().map(|one| Some((&*one.scan, one.variant))));
        // A layer of another repository may hide less than the one that it stands in for.
        let needed = self::layers_needing_mask(chain, &all(&attached));
        for ((needs_mask, attached), one) in needed.into_iter().zip(&mut attached).zip(&layers) {
            if needs_mask && !attached.masked {
                *attached = self.attach(one, limits).map_err(|trouble| trouble.of(one.layer))?;
            }
        }
        let in_use = |(repository, state): (_, Option<_>)| RepositoryInUse {
            layers: layers_of(&repository, &layers, &attached),
            state: state.filter(|_| !is_from_another),
            repository,
        };
        let repositories = states.into_iter().map(in_use).collect();
        let lower = overlay::lower_directories(&self.paths, &all(&attached));
        let snapshots = chain.iter().map(|snapshot| snapshot.id).collect();
        let pins = attached.into_iter().map(|one| one.pin).collect();
        Ok(AttachedChain::new(lower, snapshots, repositories, pins))
    }

    /// Attaches layers, each from its repository; the results are in the order of `targets`.
    fn attach_targets(
        self: &Arc<Self>,
        targets: Vec<std::result::Result<AttachTarget, Unavailable>>,
        limits: Deadlines,
    ) -> Vec<TryAttachResult> {
        let timeout = self.repositories[0].timeout();
        let pinned_until = limits.scans.max(Instant::now() + timeout);
        // With their positions in `targets`.
        let mut tried: Vec<(usize, TryAttachResult)> = Vec::with_capacity(targets.len());
        let mut to_survey = Vec::with_capacity(targets.len());
        for (place, target) in targets.into_iter().enumerate() {
            match target {
                Ok(target) => match self.attacher.pin(target.request.id, pinned_until) {
                    Some(pin) => to_survey.push((place, pin, Arc::new(target))),
                    None => tried.push((place, Err(target.busy()))),
                },
                Err(missing) => tried.push((place, Err(missing.into()))),
            }
        }
        to_survey.sort_by(|(_, _, a), (_, _, b)| a.repository.name().cmp(b.repository.name()));
        let since = Instant::now();
        let mut begun = Vec::new();
        for of_one in to_survey.chunk_by(|(_, _, a), (_, _, b)| a.repository.name() == b.repository.name()) {
            // A thread of the repository takes several layers, for the way to it and back costs more
            // than a layer that is in place.
            for some in of_one.chunks(of_one.len().div_ceil(Repository::PARALLELISM)) {
                begun.push(self.start_survey(some.iter().map(|(_, _, target)| Arc::clone(target)).collect(), since));
            }
        }
        // The time of the repository is over before that of the local disk begins.
        let surveyed: Vec<_> = begun.into_iter().map(|(begun, count)| (begun.wait(limits.all), count)).collect();
        let attached_until = Instant::now() + timeout;
        let mut to_attach = to_survey.into_iter();
        for (surveyed, count) in surveyed {
            let some = to_attach.by_ref().take(count);
            match surveyed {
                Ok(surveyed) => tried.extend(some.zip(surveyed).map(|((place, pin, target), survey)| {
                    (
                        place,
                        survey.and_then(|survey| self.attach_surveyed(&target, pin, survey, limits, attached_until)),
                    )
                })),
                Err(missing) => tried.extend(some.map(|(place, ..)| (place, Err(missing.clone().into())))),
            }
        }
        tried.sort_by_key(|(place, _)| *place);
        tried.into_iter().map(|(_, one)| one).collect()
    }

    /// Has layers surveyed on a thread of their repository, one after the other; the result says how
    /// many. What the repository answered after `since` says that it is there. Whoever waits holds the
    /// pins: a thread that hangs must keep nobody from taking the layers away.
    fn start_survey(
        self: &Arc<Self>,
        targets: Vec<Arc<AttachTarget>>,
        since: Instant,
    ) -> (JobHandle<Vec<SurveyResult>>, usize) {
        let count = targets.len();
        let ids: Vec<SnapshotId> = targets.iter().map(|target| target.request.id).collect();
        let repository = Arc::clone(&targets[0].repository);
        let job = {
            let sources = Arc::clone(self);
            move |generation: &Arc<MountGeneration>| Ok(sources.survey_all(generation, &targets, since))
        };
        let late = {
            let sources = Arc::clone(self);
            move |surveyed: Vec<SurveyResult>| {
                for (id, survey) in ids.iter().zip(surveyed) {
                    if let Ok(survey) = survey {
                        sources.attacher.discard(*id, survey);
                    }
                }
                sources.detach_unused(&ids);
            }
        };
        (repository.spawn(job, late), count)
    }

    /// On a thread of the repository. Where its server cannot be reached, the client takes seconds for each
    /// layer to say so: it is asked for no more of them.
    fn survey_all(
        &self,
        generation: &Arc<MountGeneration>,
        targets: &[Arc<AttachTarget>],
        since: Instant,
    ) -> Vec<SurveyResult> {
        let mut surveyed: Vec<SurveyResult> = Vec::with_capacity(targets.len());
        for target in targets {
            let next = match surveyed.last() {
                Some(Err(LayerError::Missing(missing @ Unavailable::ServerUnreachable(_)))) => {
                    Err(missing.clone().into())
                }
                _ => self.survey(generation, target, since),
            };
            surveyed.push(next);
        }
        surveyed
    }

    /// On a thread of the repository.
    fn survey(&self, generation: &Arc<MountGeneration>, target: &AttachTarget, since: Instant) -> SurveyResult {
        let AttachTarget { request, digest, .. } = target;
        let layer = generation.layer_since(digest, since)?;
        let ignored = generation.client_attributes()?;
        let survey = self.attacher.survey(request, &layer, &ignored).map_err(|e| {
            METRICS.record_attach("failed");
            if self.attacher.is_local(&e) {
                LayerError::Own(Error::System(e))
            } else {
                LayerError::Missing(generation.unreadable(e))
            }
        })?;
        if request.is_lowest && !survey.is_begun {
            generation.sample_layers();
        }
        Ok(survey)
    }

    /// Work on the local disk: the repository has said all that it has to.
    fn attach_surveyed(
        self: &Arc<Self>,
        target: &AttachTarget,
        pin: LayerPin,
        survey: LayerSurvey,
        limits: Deadlines,
        until: Instant,
    ) -> TryAttachResult {
        let AttachTarget { request, digest, repository } = target;
        match self.attacher.attach(&pin, request, survey, until) {
            Ok(AttachOutcome::Done { variant, inode, fresh }) => {
                if fresh {
                    METRICS.record_attach("attached");
                }
                Ok(AttachedEntry { pin, variant, inode, scan: Arc::clone(&request.scan), masked: request.masked })
            }
            Ok(AttachOutcome::Busy) => Err(target.busy()),
            Ok(AttachOutcome::SurveyAgain) => {
                let (request, digest, repository) = (request.clone(), digest.clone(), Arc::clone(repository));
                let again = AttachTarget { request, digest, repository };
                self.attach_targets(vec![Ok(again)], limits).swap_remove(0)
            }
            Err(e) => {
                METRICS.record_attach("failed");
                Err(LayerError::Own(match e {
                    AttachError::System(e) => Error::System(e),
                    AttachError::Attributes(refused) => Error::AttributesRefused { digest: digest.clone(), refused },
                }))
            }
        }
    }

    /// The repository that the layer came from cannot provide it: another one may.
    fn attach_from_others(self: &Arc<Self>, one: &ChainLayer<'_>, why: Unavailable) -> Result<AttachedEntry> {
        let layer = one.layer;
        let others = self.repositories_preferring(&layer.repository).split_off(1);
        // One bound for all of them together.
        let limits = others.first().map(|other| Deadlines::of(other));
        for (repository, limits) in others.into_iter().zip(limits.into_iter().cycle()) {
            match self.attach(&ChainLayer { repository, ..*one }, limits) {
                Ok(attached) => return Ok(attached),
                Err(LayerError::Own(e)) => return Err(e),
                Err(LayerError::Missing(_)) => {}
            }
        }
        if self.repository(&layer.repository).is_some() {
            return Err(unavailable(layer, why));
        }
        let instead = self.repositories.first().map(|first| (first.name().to_owned(), Box::new(why)));
        Err(unavailable(layer, Unavailable::NotConfigured { instead }))
    }

    /// Attaches one layer with its mask, scanned before if need be.
    fn attach(self: &Arc<Self>, one: &ChainLayer<'_>, limits: Deadlines) -> TryAttachResult {
        let scan = self.scans.start(&one.scan_key(), &one.repository, Priority::Next).map_err(LayerError::Own)?;
        let scan = scan.wait(limits.scans)?;
        self.attach_targets(vec![Ok(one.target(scan, true))], limits).swap_remove(0)
    }

    /// Begins to scan a layer that was just pulled, for the first container that will need it. Waits for
    /// nothing.
    pub fn prefetch_scan(&self, scan_key: &ScanKey, repository: &Arc<Repository>) {
        let why = match self.scans.start(scan_key, repository, Priority::Last) {
            Err(e) => e.to_string(),
            Ok(ScanHandle::Finished(Err(why))) => why.to_string(),
            Ok(_) => return,
        };
        log::debug!("{} will be scanned when a container needs it: {why}", scan_key.digest);
    }

    /// Takes away what `id` has on disk, unless it is needed.
    pub fn detach_one_if_unused(&self, id: SnapshotId, cancelled: &dyn Fn() -> bool) -> Result<ReleaseOutcome> {
        self.chains.forget(id);
        self.attacher.release(id, cancelled, || {
            let needed = self.store.read(|tx| cleanup::needs_its_directory(tx, id))?;
            Ok::<_, Error>(if needed { ReleaseDecision::Keep } else { ReleaseDecision::Remove })
        })
    }

    /// Takes away what was attached for nobody, now; what is in somebody's hands is looked at
    /// by the next cleanup.
    pub fn detach_unused(&self, ids: &[SnapshotId]) {
        let mut left = Vec::new();
        for id in ids {
            if !matches!(self.detach_one_if_unused(*id, &|| false), Ok(ReleaseOutcome::Done)) {
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

/// What overlayfs is to see of `chain`; `scans` are of its published layers, None where one is not known.
fn lower_dirs<'s>(
    chain: &[Snapshot],
    mut scans: impl Iterator<Item = Option<(&'s Scan, SourceVariant)>>,
) -> Vec<ChainEntry> {
    let lower = |snapshot: &Snapshot| match &snapshot.layer {
        None => ChainEntry::Local(snapshot.id),
        Some(layer) => {
            let known = scans.next().flatten().map(|(scan, variant)| (attach::skeletons_needed(scan), variant));
            let ((mask, deletes), variant) = known.unwrap_or_default();
            let hides = deletes && snapshot.parent.is_some();
            ChainEntry::Remote { id: snapshot.id, variant, digest: layer.digest.clone(), mask, hides }
        }
    };
    chain.iter().map(lower).collect()
}

/// Asks the repositories of `layers` for their states, in the order of their uppermost layers.
fn query_states(layers: &[ChainLayer<'_>]) -> Vec<(Arc<Repository>, JobHandle<RepositoryState>)> {
    let since = Instant::now();
    let mut states: Vec<(Arc<Repository>, JobHandle<RepositoryState>)> = Vec::new();
    for ChainLayer { repository, .. } in layers {
        if !states.iter().any(|(known, _)| Arc::ptr_eq(known, repository)) {
            states.push((Arc::clone(repository), repository.spawn(move |generation| generation.state(since), drop)));
        }
    }
    states
}

/// The layers of one repository, as they were attached.
fn layers_of(
    repository: &Arc<Repository>,
    layers: &[ChainLayer<'_>],
    attached: &[AttachedEntry],
) -> Arc<[AttachedLayer]> {
    let of_it = layers.iter().zip(attached).filter(|(layer, _)| Arc::ptr_eq(&layer.repository, repository));
    of_it
        .map(|(layer, attached)| AttachedLayer {
            id: layer.snapshot.id,
            digest: layer.layer.digest.clone(),
            variant: attached.variant,
            inode: attached.inode,
        })
        .collect()
}

/// Which of the published layers of `chain` need their masks.
fn layers_needing_mask(chain: &[Snapshot], lowers: &[ChainEntry]) -> Vec<bool> {
    let remote = chain.iter().zip(overlay::layer_uses(lowers)).filter(|(snapshot, _)| snapshot.layer.is_some());
    remote.map(|(_, shown)| shown == LayerUse::Masked).collect()
}

fn unavailable(layer: &Layer, why: Unavailable) -> Error {
    Error::LayerUnavailable { digest: layer.digest.clone(), repository: layer.repository.clone(), why }
}
