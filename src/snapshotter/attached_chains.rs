//! Chains of snapshots whose layers are attached. Most starts of containers need one that an earlier start needed: it
//! is known then, and each of its repositories is asked once whether anything has changed. Layers are looked at only
//! where the repository cannot tell.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::layer_provider::Deadlines;
use crate::attach::{Attacher, LayerPin};
use crate::model::{Digest, SnapshotId};
use crate::overlay::{LowerDirectories, SourceVariant};
use crate::repository::{PendingCall, Repository, RepositoryState, Unavailable};

/// All known chains are dropped before they would have more snapshots than this together. A chain of 40 layers takes
/// about 8 KiB.
const MAX_CACHED_SNAPSHOTS: usize = 8192;

/// A chain whose layers stay in place while this lives.
#[derive(Default)]
pub struct AttachedChain {
    pub lower: LowerDirectories,
    /// Uppermost first.
    snapshots: Vec<SnapshotId>,
    /// In the order of their uppermost layers.
    pub repositories: Vec<RepositoryInUse>,
    _pins: Vec<LayerPin>,
}

/// A repository of a chain, and what of it is attached.
pub struct RepositoryInUse {
    pub repository: Arc<Repository>,
    /// The repository's state before its layers were attached. None: it is not known, or a layer of the chain was
    /// attached from another repository than its own.
    pub state: Option<RepositoryState>,
    /// Uppermost first, at least one.
    pub layers: Arc<[AttachedLayer]>,
}

/// A layer in its place.
#[derive(Clone)]
pub struct AttachedLayer {
    pub id: SnapshotId,
    pub digest: Digest,
    pub variant: SourceVariant,
    /// The inode of its directory in the repository.
    pub inode: u64,
}

impl RepositoryInUse {
    /// Asks, on a thread of the repository, whether its state is what it was when the layers were attached, and whether
    /// each of them still is. Where the state says that nothing was published, opening one layer is enough, which proves
    /// that layers can be read; otherwise each is opened.
    fn ask(
        &self,
        attacher: &Arc<Attacher>,
        since: Instant,
    ) -> Result<PendingCall<Result<bool, Unavailable>>, Unavailable> {
        let (repository, attacher) = (Arc::clone(&self.repository), Arc::clone(attacher));
        let (before, layers) = (self.state.clone(), Arc::clone(&self.layers));
        let job = move || {
            let state = repository.state(since)?;
            if before.as_ref() != Some(&state) {
                return Ok(false);
            }
            let tells_changes = state.tells_changes();
            let looked_up = if tells_changes { &layers[..1] } else { &layers[..] };
            let digests: Vec<Digest> = looked_up.iter().map(|layer| layer.digest.clone()).collect();
            let is_there = repository.inodes(&digests)?.iter().zip(looked_up).all(|(inode, layer)| {
                // A client may give a directory another inode number, so only plain directories are compared by it.
                tells_changes || *inode == layer.inode
            });
            let is_in_place = |one: &AttachedLayer| {
                attacher.is_in_place(one.id, one.variant, state.device, (!tells_changes).then_some(one.inode))
            };
            Ok(is_there && layers.iter().all(is_in_place))
        };
        Repository::spawn(&self.repository, job, drop)
    }
}

impl AttachedChain {
    /// `snapshots` come uppermost first, and `repositories` in the order of their uppermost layers; `pins` hold all layers.
    pub fn new(
        lower: LowerDirectories,
        snapshots: Vec<SnapshotId>,
        repositories: Vec<RepositoryInUse>,
        pins: Vec<LayerPin>,
    ) -> Self {
        Self { lower, snapshots, repositories, _pins: pins }
    }

    /// The published layers in it.
    pub fn published(&self) -> Vec<SnapshotId> {
        self.repositories.iter().flat_map(|one| one.layers.iter().map(|layer| layer.id)).collect()
    }

    /// Whether everything is as it was when the layers were attached.
    fn is_current(&self, attacher: &Arc<Attacher>, limits: Deadlines) -> bool {
        let since = Instant::now();
        // All are asked before the first one is waited for, and all are waited for, so that the call does not wait once
        // more for each of those that hang.
        let pending: Vec<_> = self.repositories.iter().map(|one| one.ask(attacher, since)).collect();
        let answers: Vec<_> =
            pending.into_iter().map(|pending| pending.and_then(|asked| asked.wait(limits.all)).flatten()).collect();
        answers.into_iter().all(|answer| answer == Ok(true))
    }
}

/// Attached chains by their uppermost snapshots. Below a committed snapshot nothing changes.
#[derive(Default)]
pub struct AttachedChains {
    chains: Mutex<HashMap<SnapshotId, Arc<AttachedChain>>>,
}

impl AttachedChains {
    /// The chain of `top`, if it is known, without asking whether anything has changed.
    pub fn get(&self, top: SnapshotId) -> Option<Arc<AttachedChain>> {
        self.chains.lock().get(&top).cloned()
    }

    /// The chain of `top`, if it is known and all of it is as it was.
    pub fn get_current(
        &self,
        top: SnapshotId,
        attacher: &Arc<Attacher>,
        limits: Deadlines,
    ) -> Option<Arc<AttachedChain>> {
        self.get(top).filter(|chain| chain.is_current(attacher, limits))
    }

    /// Keeps `chain`, in the place of what was known of its uppermost snapshot, if the states of its repositories are
    /// known.
    pub fn keep(&self, chain: &Arc<AttachedChain>) {
        let Some(top) = chain.snapshots.first() else { return };
        let mut chains = self.chains.lock();
        chains.remove(top);
        if chain.repositories.iter().any(|one| one.state.is_none()) {
            return;
        }
        let known: usize = chains.values().map(|chain| chain.snapshots.len()).sum();
        if known + chain.snapshots.len() > MAX_CACHED_SNAPSHOTS {
            chains.clear();
        }
        chains.insert(*top, Arc::clone(chain));
    }

    #[cfg(test)]
    fn count(&self) -> usize {
        self.chains.lock().len()
    }

    /// Drops the chains with snapshot `id`, whose pins would keep it from being cleaned up.
    pub fn forget(&self, id: SnapshotId) {
        self.chains.lock().retain(|_, chain| !chain.snapshots.contains(&id));
    }
}

#[cfg(test)]
mod tests;
