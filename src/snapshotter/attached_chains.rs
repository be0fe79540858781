//! The cache of attached chains. Most containers start on a chain that an earlier one needed. Such a chain is not attached
//! again: each of its repositories is asked once whether anything has changed, and layers are opened only where the
//! repository cannot tell.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::layer_provider::Deadlines;
use crate::attach::{Attacher, LayerPin};
use crate::model::{Digest, SnapshotId};
use crate::overlay::{LowerDirectories, SourceVariant};
use crate::repository::{JobHandle, MountGeneration, Repository, RepositoryState};

/// Maximum number of snapshots in all cached chains together. Before it would be exceeded, all chains are dropped. A
/// chain of 40 layers takes about 8 KiB.
const MAX_CACHED_SNAPSHOTS: usize = 8192;

/// A chain whose layers stay attached while this lives.
#[derive(Default)]
pub struct AttachedChain {
    pub lower: LowerDirectories,
    /// All snapshots of the chain, uppermost first.
    pub snapshots: Vec<SnapshotId>,
    /// The repositories of the chain, in the order of their uppermost layers.
    pub repositories: Vec<RepositoryInUse>,
    /// They hold all published layers: while they live, a cleanup leaves these attached.
    pub _pins: Vec<LayerPin>,
}

/// A repository, and those of its layers that are attached for a chain.
pub struct RepositoryInUse {
    pub repository: Arc<Repository>,
    /// The repository's state before its layers were attached. None if it is not known, or if a layer of the chain was
    /// attached from another repository than its own. Then it is None for all repositories, and the chain is not cached.
    pub state: Option<RepositoryState>,
    /// At least one layer, uppermost first.
    pub layers: Arc<[AttachedLayer]>,
}

/// A layer that is attached.
#[derive(Clone)]
pub struct AttachedLayer {
    pub id: SnapshotId,
    pub digest: Digest,
    pub variant: SourceVariant,
    /// The inode of its directory in the repository.
    pub inode: u64,
}

impl RepositoryInUse {
    /// Asks, on a thread of the repository, whether its state is still that before the layers were attached, and whether
    /// all layers are in place.
    fn start_check(&self, attacher: &Arc<Attacher>, since: Instant) -> JobHandle<bool> {
        let attacher = Arc::clone(attacher);
        let (old_state, layers) = (self.state.clone(), Arc::clone(&self.layers));
        let job = move |generation: &Arc<MountGeneration>| {
            let state = generation.state(since)?;
            if old_state.as_ref() != Some(&state) {
                return Ok(false);
            }
            // If the state tells changes, nothing was published since. Opening one layer proves that layers can be read.
            let compares_inodes = !state.tells_changes();
            let opened = if compares_inodes { &layers[..] } else { &layers[..1] };
            let digests: Vec<Digest> = opened.iter().map(|layer| layer.digest.clone()).collect();
            let inodes = generation.inodes(&digests)?;
            // Inodes are compared only in a plain directory, where they are stable. A client may give a directory a new one.
            let is_unchanged = !compares_inodes || layers.iter().zip(inodes).all(|(layer, inode)| layer.inode == inode);
            let is_in_place = |layer: &AttachedLayer| {
                let inode = compares_inodes.then_some(layer.inode);
                attacher.is_in_place(layer.id, layer.variant, state.device, inode)
            };
            Ok(is_unchanged && layers.iter().all(is_in_place))
        };
        self.repository.spawn(job, drop)
    }
}

impl AttachedChain {
    /// The ids of the published layers.
    pub fn published_ids(&self) -> Vec<SnapshotId> {
        self.repositories.iter().flat_map(|in_use| in_use.layers.iter().map(|layer| layer.id)).collect()
    }

    /// Whether everything is as it was when the layers were attached.
    fn is_current(&self, attacher: &Arc<Attacher>, deadlines: Deadlines) -> bool {
        let since = Instant::now();
        // All repositories are asked before the first answer is awaited, so that several that hang take the time of one.
        let pending: Vec<JobHandle<bool>> =
            self.repositories.iter().map(|in_use| in_use.start_check(attacher, since)).collect();
        let mut is_current = true;
        for check in pending {
            is_current &= check.wait(deadlines.total) == Ok(true);
        }
        is_current
    }
}

/// The cache of attached chains, by their uppermost snapshots. Entries are dropped or replaced, but never changed: below a
/// committed snapshot nothing changes.
#[derive(Default)]
pub struct AttachedChains {
    chains: Mutex<HashMap<SnapshotId, Arc<AttachedChain>>>,
}

impl AttachedChains {
    /// The cached chain of `top`, which may be outdated.
    pub fn get(&self, top: SnapshotId) -> Option<Arc<AttachedChain>> {
        self.chains.lock().get(&top).cloned()
    }

    /// The cached chain of `top`, if all of it is as it was when it was attached.
    pub fn get_current(
        &self,
        top: SnapshotId,
        attacher: &Arc<Attacher>,
        deadlines: Deadlines,
    ) -> Option<Arc<AttachedChain>> {
        self.get(top).filter(|chain| chain.is_current(attacher, deadlines))
    }

    /// Caches `chain`, if the states of its repositories are known, in place of an older one with the same uppermost
    /// snapshot.
    pub fn insert(&self, chain: &Arc<AttachedChain>) {
        let Some(top) = chain.snapshots.first() else { return };
        let mut chains = self.chains.lock();
        chains.remove(top);
        if chain.repositories.iter().any(|in_use| in_use.state.is_none()) {
            return;
        }
        let cached: usize = chains.values().map(|chain| chain.snapshots.len()).sum();
        if cached + chain.snapshots.len() > MAX_CACHED_SNAPSHOTS {
            chains.clear();
        }
        chains.insert(*top, Arc::clone(chain));
    }

    /// Drops the chains that contain snapshot `id`. Their pins would prevent its cleanup.
    pub fn remove_containing(&self, id: SnapshotId) {
        self.chains.lock().retain(|_, chain| !chain.snapshots.contains(&id));
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.chains.lock().len()
    }
}

#[cfg(test)]
mod tests;
