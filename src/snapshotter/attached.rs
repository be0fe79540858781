//! Chains of snapshots whose layers are in their places. Most starts of containers need one that an earlier start
//! needed: it is known then, and its repositories are asked whether anything has changed, not each layer.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::attach::{Attacher, Pin};
use crate::overlay::{Edition, LowerDirectories};
use crate::repository::{Asked, Missing, Repository, RepositoryState};
use crate::types::{Digest, SnapshotId};

/// Snapshots of all known chains together. A chain of 40 layers takes about 8 KiB.
const MAX_SNAPSHOTS: usize = 8192;

/// A chain whose layers stay in their places while this lives.
#[derive(Default)]
pub struct AttachedChain {
    pub lower: LowerDirectories,
    /// Uppermost first, and so are the repositories, by their uppermost layers.
    snapshots: Vec<SnapshotId>,
    pub repositories: Vec<RepositoryInUse>,
    _pins: Vec<Pin>,
}

/// A repository of a chain, and what of it is attached.
pub struct RepositoryInUse {
    pub repository: Arc<Repository>,
    pub layers: Arc<[Digest]>,
    /// Where the layers are attached.
    pub places: Vec<(SnapshotId, Edition)>,
    /// When they were attached. None: that is not known, or they were attached from another repository instead.
    pub state: Option<RepositoryState>,
}

impl RepositoryInUse {
    /// Asks for the state of the repository, after `since`.
    pub fn ask(&self, since: Instant) -> Result<Asked<Result<RepositoryState, Missing>>, Missing> {
        let (asked, layers) = (Arc::clone(&self.repository), Arc::clone(&self.layers));
        Repository::start(&self.repository, move || asked.state(&layers, since), drop)
    }
}

impl AttachedChain {
    /// Of `snapshots`, uppermost first. The repositories are in the order of their uppermost layers; `pins` hold all
    /// layers.
    pub fn new(
        lower: LowerDirectories,
        snapshots: Vec<SnapshotId>,
        repositories: Vec<RepositoryInUse>,
        pins: Vec<Pin>,
    ) -> Self {
        Self { lower, snapshots, repositories, _pins: pins }
    }

    /// The published layers in it.
    pub fn published(&self) -> Vec<SnapshotId> {
        self.repositories.iter().flat_map(|one| one.places.iter().map(|(id, _)| *id)).collect()
    }

    /// Whether everything is as it was when the layers were attached.
    fn is_current(&self, attacher: &Attacher) -> bool {
        let since = Instant::now();
        // All are asked before the first one is waited for.
        let asked: Vec<_> = self.repositories.iter().map(|one| (one, one.ask(since))).collect();
        asked.into_iter().all(|(one, asked)| {
            let now = asked.and_then(|asked| asked.wait(one.repository.give_up_at())).flatten();
            let is_in_place = |(id, edition): &(_, _), device| attacher.is_in_place(*id, *edition, device);
            now.is_ok_and(|now| {
                one.state.as_ref() == Some(&now) && one.places.iter().all(|place| is_in_place(place, now.device()))
            })
        })
    }
}

/// The known ones, by their uppermost snapshots: below a committed snapshot nothing changes.
#[derive(Default)]
pub struct AttachedChains {
    chains: Mutex<HashMap<SnapshotId, Arc<AttachedChain>>>,
}

impl AttachedChains {
    /// The chain of `top`, if it is known; what has changed meanwhile is not asked.
    pub fn get(&self, top: SnapshotId) -> Option<Arc<AttachedChain>> {
        self.chains.lock().get(&top).cloned()
    }

    /// The chain of `top`, if it is known and all of it is as it was.
    pub fn get_current(&self, top: SnapshotId, attacher: &Attacher) -> Option<Arc<AttachedChain>> {
        self.get(top).filter(|chain| chain.is_current(attacher))
    }

    /// Keeps `chain`, in the place of what was known of its uppermost snapshot, if it is known in what state it was
    /// attached.
    pub fn keep(&self, chain: &Arc<AttachedChain>) {
        let Some(top) = chain.snapshots.first() else { return };
        let mut chains = self.chains.lock();
        chains.remove(top);
        if chain.repositories.iter().any(|one| one.state.is_none()) {
            return;
        }
        let known: usize = chains.values().map(|chain| chain.snapshots.len()).sum();
        if known + chain.snapshots.len() > MAX_SNAPSHOTS {
            chains.clear();
        }
        chains.insert(*top, Arc::clone(chain));
    }

    #[cfg(test)]
    fn count(&self) -> usize {
        self.chains.lock().len()
    }

    /// Keeps no chain with snapshot `id` any more, so that it can be taken away unless somebody uses it.
    pub fn forget(&self, id: SnapshotId) {
        self.chains.lock().retain(|_, chain| !chain.snapshots.contains(&id));
    }
}

#[cfg(test)]
mod tests;
