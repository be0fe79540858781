//! Attaches the published layers of a chain.
//!
//! 1. All layers are scanned, because the scans say which skeletons the chain needs.
//! 2. Layers are pinned, and surveyed in batches on the threads of their repositories.
//! 3. They are attached on the thread of the call, once all repositories have answered.
//! 4. A layer that its repository cannot provide is attached from another one.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::{Deadlines, LayerProvider};
use crate::attach::{AttachError, AttachOutcome, AttachRequest, LayerPin, LayerSurvey, skeleton_needs};
use crate::metrics::METRICS;
use crate::model::{Digest, Layer, Snapshot, SnapshotId};
use crate::overlay::{ChainEntry, LayerUse, LowerDirectories, SkeletonNeeds, SourceVariant, layer_uses};
use crate::repository::executor::Priority;
use crate::repository::scan::{Scan, ScanKey};
use crate::repository::{JobHandle, MountGeneration, Repository, RepositoryState, Unavailable};
use crate::snapshotter::Error;
use crate::snapshotter::attached_chains::{AttachedChain, AttachedLayer, RepositoryInUse};
use crate::snapshotter::scans::ScanResult;

/// A published layer of a chain.
struct ChainLayer<'a> {
    snapshot: &'a Snapshot,
    layer: &'a Layer,
    /// The repository that is asked for the layer.
    repository: Arc<Repository>,
}

impl ChainLayer<'_> {
    fn scan_key(&self) -> ScanKey {
        ScanKey { digest: self.layer.digest.clone(), repository: self.repository.name().to_owned() }
    }

    fn target(&self, scan: Arc<Scan>, uses_mask: bool) -> AttachTarget {
        let digest = self.layer.digest.clone();
        let request = AttachRequest {
            id: self.snapshot.id,
            source: self.repository.layer_path(&digest),
            scan,
            uses_mask,
            is_lowest: self.snapshot.parent.is_none(),
        };
        AttachTarget { request, digest, repository: Arc::clone(&self.repository) }
    }

    fn unavailable(&self, why: Unavailable) -> Error {
        Error::LayerUnavailable { digest: self.layer.digest.clone(), repository: self.layer.repository.clone(), why }
    }
}

/// A layer that is to be attached from a repository.
#[derive(Clone)]
struct AttachTarget {
    request: AttachRequest,
    digest: Digest,
    repository: Arc<Repository>,
}

impl AttachTarget {
    fn busy(&self) -> LayerError {
        LayerError::Local(Error::LayerBusy { digest: self.digest.clone() })
    }
}

/// A layer that was attached. It stays so while this lives.
struct AttachedEntry {
    pin: LayerPin,
    repository: Arc<Repository>,
    variant: SourceVariant,
    inode: u64,
    scan: Arc<Scan>,
    uses_mask: bool,
}

/// Why a layer is not attached.
#[derive(Debug)]
enum LayerError {
    /// The repository cannot provide it, but another one may.
    Unavailable(Unavailable),
    /// The local disk or the store failed.
    Local(Error),
}

impl LayerError {
    /// The error for a caller who needs `layer`.
    fn for_layer(self, layer: &ChainLayer<'_>) -> Error {
        match self {
            Self::Unavailable(why) => layer.unavailable(why),
            Self::Local(e) => e,
        }
    }
}

impl From<Unavailable> for LayerError {
    fn from(why: Unavailable) -> Self {
        Self::Unavailable(why)
    }
}

type AttachResult = Result<AttachedEntry, LayerError>;
type SurveyResult = Result<LayerSurvey, LayerError>;

/// A repository of a chain that was asked for its state.
struct StateQuery {
    repository: Arc<Repository>,
    pending: JobHandle<RepositoryState>,
}

/// A layer that cannot be removed any more, so that it can be surveyed.
struct PinnedTarget {
    /// The position of the result.
    index: usize,
    pin: LayerPin,
    target: Arc<AttachTarget>,
}

/// Layers of one repository that are surveyed by one job.
struct SurveyBatch {
    targets: Vec<PinnedTarget>,
    pending: JobHandle<Vec<SurveyResult>>,
}

/// The properties of a layer that decide which lower directories it has.
#[derive(Clone, Copy)]
struct LayoutInput<'s> {
    /// None if the layer has no scan, because its repository cannot provide it.
    scan: Option<&'s Scan>,
    variant: SourceVariant,
}

impl LayerProvider {
    /// Attaches the published layers of `chain`, which begins with the uppermost snapshot.
    pub fn attach_chain(self: &Arc<Self>, chain: &[Snapshot], deadlines: Deadlines) -> Result<AttachedChain, Error> {
        let layers = self.chain_layers(chain);
        let queries = query_states(&layers);
        let scans = self.scan_layers(&layers, deadlines)?;
        // If a state were read after the survey, a change in between would be cached as the state in which the layers were
        // attached, and never noticed.
        let mut states = Vec::with_capacity(queries.len());
        for StateQuery { repository, pending } in queries {
            states.push((repository, pending.wait(deadlines.total).ok()));
        }
        let attached = self.attach_layers(chain, &layers, scans, deadlines)?;
        let is_from_another =
            layers.iter().zip(&attached).any(|(layer, entry)| !Arc::ptr_eq(&layer.repository, &entry.repository));
        let mut repositories = Vec::with_capacity(states.len());
        for (repository, state) in states {
            repositories.push(RepositoryInUse {
                layers: layers_of(&repository, &layers, &attached),
                state: state.filter(|_| !is_from_another),
                repository,
            });
        }
        let lower = LowerDirectories::of_chain(&self.paths, &chain_entries(chain, &layout_inputs(&attached)));
        let snapshots = chain.iter().map(|snapshot| snapshot.id).collect();
        let pins = attached.into_iter().map(|entry| entry.pin).collect();
        Ok(AttachedChain { lower, snapshots, repositories, _pins: pins })
    }

    /// The published layers of `chain`, each with the repository that is asked first.
    fn chain_layers<'c>(&self, chain: &'c [Snapshot]) -> Vec<ChainLayer<'c>> {
        let mut layers = Vec::new();
        for snapshot in chain {
            if let Some(layer) = &snapshot.layer {
                let repository = self.repositories_preferring(&layer.repository).swap_remove(0);
                layers.push(ChainLayer { snapshot, layer, repository });
            }
        }
        layers
    }

    /// Scans all layers, or finds their scans. All scans are started before the first is awaited.
    fn scan_layers(&self, layers: &[ChainLayer<'_>], deadlines: Deadlines) -> Result<Vec<ScanResult>, Error> {
        let mut handles = Vec::with_capacity(layers.len());
        for layer in layers {
            handles.push(self.scans.start(&layer.scan_key(), &layer.repository, Priority::Next)?);
        }
        let scans: Vec<ScanResult> = handles.into_iter().map(|handle| handle.wait(deadlines.scan)).collect();
        for (layer, scan) in layers.iter().zip(&scans) {
            // Only memory is short, so no other repository would help. The error frees the scans of this call; until then
            // other calls are refused.
            if let Err(why @ Unavailable::ScansTakeMemory { .. }) = scan {
                return Err(layer.unavailable(why.clone()));
            }
        }
        Ok(scans)
    }

    /// Attaches all layers, with their masks where the chain uses them: first each from its own repository, then those that
    /// failed from another one. Layers whose mask turns out to be needed only then are attached again.
    fn attach_layers(
        self: &Arc<Self>,
        chain: &[Snapshot],
        layers: &[ChainLayer<'_>],
        scans: Vec<ScanResult>,
        deadlines: Deadlines,
    ) -> Result<Vec<AttachedEntry>, Error> {
        let inputs: Vec<LayoutInput<'_>> = scans
            .iter()
            .map(|scan| LayoutInput { scan: scan.as_deref().ok(), variant: SourceVariant::default() })
            .collect();
        let uses_masks = uses_masks(&chain_entries(chain, &inputs));
        let mut targets = Vec::with_capacity(layers.len());
        for ((layer, scan), uses_mask) in layers.iter().zip(scans).zip(uses_masks) {
            targets.push(scan.map(|scan| layer.target(scan, uses_mask)));
        }
        let mut attached = Vec::with_capacity(layers.len());
        for (result, layer) in self.attach_targets(targets, deadlines).into_iter().zip(layers) {
            attached.push(match result {
                Ok(entry) => entry,
                Err(LayerError::Local(e)) => return Err(e),
                Err(LayerError::Unavailable(why)) => self.attach_from_others(layer, why)?,
            });
        }
        // A layer from another repository may hide fewer names than the one that it replaces. Then a layer below may
        // need the mask of its own that it could do without before. Such an entry is from its own repository: from another
        // one a layer is always attached with its mask.
        let uses_masks = self::uses_masks(&chain_entries(chain, &layout_inputs(&attached)));
        for ((layer, entry), uses_mask) in layers.iter().zip(&mut attached).zip(uses_masks) {
            if uses_mask && !entry.uses_mask {
                *entry = self.attach_layer(layer, deadlines).map_err(|e| e.for_layer(layer))?;
            }
        }
        Ok(attached)
    }

    /// Attaches each target from its repository. A target that is an error has that as its result. There is one result for
    /// each target, in the order of `targets`.
    fn attach_targets(
        self: &Arc<Self>,
        targets: Vec<Result<AttachTarget, Unavailable>>,
        deadlines: Deadlines,
    ) -> Vec<AttachResult> {
        let local_timeout = self.repositories[0].timeout();
        let pin_deadline = Instant::now() + local_timeout;
        // By the index of the target.
        let mut results: BTreeMap<usize, AttachResult> = BTreeMap::new();
        let mut pinned = Vec::with_capacity(targets.len());
        for (index, target) in targets.into_iter().enumerate() {
            match target {
                Err(why) => {
                    results.insert(index, Err(why.into()));
                }
                Ok(target) => match self.attacher.pin(target.request.id, pin_deadline) {
                    None => {
                        results.insert(index, Err(target.busy()));
                    }
                    Some(pin) => pinned.push(PinnedTarget { index, pin, target: Arc::new(target) }),
                },
            }
        }
        let mut surveyed = Vec::new();
        for SurveyBatch { targets, pending } in self.start_surveys(pinned) {
            // A job without a result has failed for each of its targets.
            let all_failed = |why: Unavailable| targets.iter().map(|_| Err(why.clone().into())).collect();
            let surveys: Vec<SurveyResult> = pending.wait(deadlines.total).unwrap_or_else(all_failed);
            surveyed.extend(targets.into_iter().zip(surveys));
        }
        // The repositories have answered. From here on only the local disk takes time, except for a target whose survey is
        // outdated.
        let attach_deadline = Instant::now() + local_timeout;
        for (pinned, survey) in surveyed {
            let index = pinned.index;
            let result = survey.and_then(|survey| self.attach_surveyed(pinned, survey, deadlines, attach_deadline));
            results.insert(index, result);
        }
        results.into_values().collect()
    }

    /// Begins to survey the targets on the threads of their repositories. Each job takes several layers, because
    /// switching threads costs more than the survey of a layer that is attached already.
    fn start_surveys(self: &Arc<Self>, pinned: Vec<PinnedTarget>) -> Vec<SurveyBatch> {
        let since = Instant::now();
        let mut by_repository: BTreeMap<String, Vec<PinnedTarget>> = BTreeMap::new();
        for target in pinned {
            by_repository.entry(target.target.repository.name().to_owned()).or_default().push(target);
        }
        let mut batches = Vec::new();
        for targets in by_repository.into_values() {
            let batch_size = targets.len().div_ceil(Repository::PARALLELISM);
            let mut targets = targets.into_iter().peekable();
            while targets.peek().is_some() {
                batches.push(self.start_survey(targets.by_ref().take(batch_size).collect(), since));
            }
        }
        batches
    }

    /// Starts a job that surveys targets of one repository, one after the other. What was checked after
    /// `since` is not checked again. The caller holds the pins and not the job, so that a job that hangs does not
    /// keep the layers from being removed.
    fn start_survey(self: &Arc<Self>, pinned: Vec<PinnedTarget>, since: Instant) -> SurveyBatch {
        let targets: Vec<Arc<AttachTarget>> = pinned.iter().map(|pinned| Arc::clone(&pinned.target)).collect();
        let ids: Vec<SnapshotId> = targets.iter().map(|target| target.request.id).collect();
        let repository = Arc::clone(&targets[0].repository);
        let job = {
            let provider = Arc::clone(self);
            move |generation: &Arc<MountGeneration>| Ok(provider.survey_all(generation, &targets, since))
        };
        let on_abandoned = {
            let provider = Arc::clone(self);
            move |surveys: Vec<SurveyResult>| {
                for (id, survey) in ids.iter().zip(surveys) {
                    if let Ok(survey) = survey {
                        provider.attacher.discard_survey(*id, survey);
                    }
                }
                provider.detach_unused(&ids);
            }
        };
        SurveyBatch { targets: pinned, pending: repository.spawn(job, on_abandoned) }
    }

    /// Runs on a thread of the repository. Once its server was unreachable, no more layers are asked for: the client
    /// takes seconds to fail for each.
    fn survey_all(
        &self,
        generation: &Arc<MountGeneration>,
        targets: &[Arc<AttachTarget>],
        since: Instant,
    ) -> Vec<SurveyResult> {
        let mut surveys: Vec<SurveyResult> = Vec::with_capacity(targets.len());
        for target in targets {
            let survey = match surveys.last() {
                Some(Err(LayerError::Unavailable(why @ Unavailable::ServerUnreachable(_)))) => Err(why.clone().into()),
                _ => self.survey(generation, target, since),
            };
            surveys.push(survey);
        }
        surveys
    }

    /// Runs on a thread of the repository.
    fn survey(&self, generation: &Arc<MountGeneration>, target: &AttachTarget, since: Instant) -> SurveyResult {
        let AttachTarget { request, digest, .. } = target;
        let layer = generation.layer_since(digest, since)?;
        let ignored = generation.client_attributes()?;
        let survey = self.attacher.survey(request, &layer, &ignored).map_err(|e| {
            METRICS.record_attach("failed");
            if self.attacher.is_local(&e) {
                LayerError::Local(Error::System(e))
            } else {
                LayerError::Unavailable(generation.report_failed_call(e))
            }
        })?;
        if request.is_lowest && !survey.variant_exists {
            generation.sample_layers();
        }
        Ok(survey)
    }

    /// Attaches a surveyed target, which takes only the local disk. If another call has exchanged the layer's source since the
    /// survey, the target is surveyed again; that ends, because the next survey finds the variant of the new source.
    fn attach_surveyed(
        self: &Arc<Self>,
        pinned: PinnedTarget,
        survey: LayerSurvey,
        deadlines: Deadlines,
        attach_deadline: Instant,
    ) -> AttachResult {
        let PinnedTarget { pin, target, .. } = pinned;
        let request = &target.request;
        match self.attacher.attach(&pin, request, survey, attach_deadline) {
            Ok(AttachOutcome::Attached { variant, inode, is_new }) => {
                if is_new {
                    METRICS.record_attach("attached");
                }
                Ok(AttachedEntry {
                    pin,
                    repository: Arc::clone(&target.repository),
                    variant,
                    inode,
                    scan: Arc::clone(&request.scan),
                    uses_mask: request.uses_mask,
                })
            }
            Ok(AttachOutcome::Busy) => Err(target.busy()),
            Ok(AttachOutcome::SurveyOutdated) => self.attach_one(AttachTarget::clone(&target), deadlines),
            Err(e) => {
                METRICS.record_attach("failed");
                Err(LayerError::Local(match e {
                    AttachError::System(e) => Error::System(e),
                    AttachError::Attributes(refused) => {
                        Error::AttributesRefused { digest: target.digest.clone(), refused }
                    }
                }))
            }
        }
    }

    /// Attaches a layer from another repository, because the one that was asked first cannot provide it.
    fn attach_from_others(self: &Arc<Self>, layer: &ChainLayer<'_>, why: Unavailable) -> Result<AttachedEntry, Error> {
        let name = &layer.layer.repository;
        let others = self.repositories_preferring(name).split_off(1);
        // The call's own deadline may have been used up by the first repository. The others share a new one.
        let deadlines = self.deadlines();
        for repository in others {
            match self.attach_layer(&ChainLayer { repository, ..*layer }, deadlines) {
                Ok(entry) => return Ok(entry),
                Err(LayerError::Local(e)) => return Err(e),
                Err(LayerError::Unavailable(_)) => {}
            }
        }
        if self.repository(name).is_some() {
            return Err(layer.unavailable(why));
        }
        let instead = self.repositories.first().map(|first| (first.name().to_owned(), Box::new(why)));
        Err(layer.unavailable(Unavailable::NotConfigured { instead }))
    }

    /// Scans one layer, if it was not scanned yet, and attaches it with its mask.
    fn attach_layer(self: &Arc<Self>, layer: &ChainLayer<'_>, deadlines: Deadlines) -> AttachResult {
        let handle =
            self.scans.start(&layer.scan_key(), &layer.repository, Priority::Next).map_err(LayerError::Local)?;
        let scan = handle.wait(deadlines.scan)?;
        self.attach_one(layer.target(scan, true), deadlines)
    }

    fn attach_one(self: &Arc<Self>, target: AttachTarget, deadlines: Deadlines) -> AttachResult {
        self.attach_targets(vec![Ok(target)], deadlines).swap_remove(0)
    }
}

/// Asks the repositories of `layers` for their states, in the order of their uppermost layers.
fn query_states(layers: &[ChainLayer<'_>]) -> Vec<StateQuery> {
    let since = Instant::now();
    let mut queries: Vec<StateQuery> = Vec::new();
    for ChainLayer { repository, .. } in layers {
        if !queries.iter().any(|query| Arc::ptr_eq(&query.repository, repository)) {
            let pending = repository.spawn(move |generation| generation.state(since), drop);
            queries.push(StateQuery { repository: Arc::clone(repository), pending });
        }
    }
    queries
}

/// Those of `layers` that belong to `repository`, as they were attached.
fn layers_of(
    repository: &Arc<Repository>,
    layers: &[ChainLayer<'_>],
    attached: &[AttachedEntry],
) -> Arc<[AttachedLayer]> {
    let mut layers_of_repository = Vec::new();
    for (layer, entry) in layers.iter().zip(attached) {
        if Arc::ptr_eq(&layer.repository, repository) {
            layers_of_repository.push(AttachedLayer {
                id: layer.snapshot.id,
                digest: layer.layer.digest.clone(),
                variant: entry.variant,
                inode: entry.inode,
            });
        }
    }
    layers_of_repository.into()
}

fn layout_inputs(attached: &[AttachedEntry]) -> Vec<LayoutInput<'_>> {
    attached.iter().map(|entry| LayoutInput { scan: Some(&entry.scan), variant: entry.variant }).collect()
}

/// The entries of `chain`, as overlayfs is to see them. `layers` describes its published layers, in their order.
fn chain_entries(chain: &[Snapshot], layers: &[LayoutInput<'_>]) -> Vec<ChainEntry> {
    let mut layers = layers.iter();
    let mut entries = Vec::with_capacity(chain.len());
    for snapshot in chain {
        entries.push(match &snapshot.layer {
            None => ChainEntry::Local(snapshot.id),
            Some(layer) => {
                let input = layers.next();
                let needs: SkeletonNeeds = input.and_then(|input| input.scan).map(skeleton_needs).unwrap_or_default();
                ChainEntry::Remote {
                    id: snapshot.id,
                    variant: input.map_or(SourceVariant::default(), |input| input.variant),
                    digest: layer.digest.clone(),
                    mask: needs.mask,
                    needs_hide: needs.hide && snapshot.parent.is_some(),
                }
            }
        });
    }
    entries
}

/// Whether the chain uses the mask of each of its published layers.
fn uses_masks(entries: &[ChainEntry]) -> Vec<bool> {
    let mut uses_masks = Vec::new();
    for (entry, layer_use) in entries.iter().zip(layer_uses(entries)) {
        if matches!(entry, ChainEntry::Remote { .. }) {
            uses_masks.push(layer_use == LayerUse::WithMask);
        }
    }
    uses_masks
}
