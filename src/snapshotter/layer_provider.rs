//! Provides published layers: finds the repository that has one, attaches them below a chain, and detaches them again.
//!
//! Everything that may wait for a repository runs on the repository's own threads, and is awaited with a deadline.
#![forbid(unsafe_code)]

mod attach;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::Error;
use super::attached_chains::AttachedChains;
use super::cleanup::needs_directory;
use super::scans::{ScanHandle, ScanScheduler};
use crate::attach::{Attacher, ReleaseDecision, ReleaseOutcome};
use crate::model::{Digest, SnapshotId};
use crate::overlay::SnapshotPaths;
use crate::repository::executor::Priority;
use crate::repository::scan::ScanKey;
use crate::repository::{Repository, Unavailable};
use crate::store::Store;

/// Shared by the calls and the jobs on the repositories' threads.
pub struct LayerProvider {
    pub store: Arc<Store>,
    pub attacher: Arc<Attacher>,
    pub scans: ScanScheduler,
    pub paths: SnapshotPaths,
    pub chains: AttachedChains,
    /// The repositories in the order in which they are asked. There is at least one.
    pub repositories: Vec<Arc<Repository>>,
}

/// When a call stops waiting, whatever progress the repository makes.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// The deadline for scans. They go on afterwards, so a later call finds the result.
    pub scan: Instant,
    /// The deadline for everything that is asked of a repository.
    pub total: Instant,
}

/// Why one repository cannot provide a layer.
#[derive(Debug)]
pub struct Refusal {
    pub repository: String,
    pub reason: Unavailable,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.repository, self.reason)
    }
}

impl LayerProvider {
    /// The first repository that has the layer, or why each of them cannot provide it.
    pub fn locate_layer(&self, digest: &Digest) -> Result<Arc<Repository>, Vec<Refusal>> {
        let mut refusals = Vec::new();
        for repository in &self.repositories {
            let reason = match repository.refusal_of_pulls() {
                Some(reason) => reason,
                None => match open_layer(repository, digest) {
                    Ok(()) => return Ok(Arc::clone(repository)),
                    Err(reason) => reason,
                },
            };
            refusals.push(Refusal { repository: repository.name().to_owned(), reason });
        }
        Err(refusals)
    }

    pub fn repository(&self, name: &str) -> Option<&Arc<Repository>> {
        self.repositories.iter().find(|repository| repository.name() == name)
    }

    /// All repositories, the one with this name first: a digest names the same files everywhere. Never empty.
    pub fn repositories_preferring(&self, name: &str) -> Vec<Arc<Repository>> {
        let others = self.repositories.iter().filter(|repository| repository.name() != name);
        self.repository(name).into_iter().chain(others).cloned().collect()
    }

    /// The deadlines of a call that begins now. They are the same for all repositories.
    pub fn deadlines(&self) -> Deadlines {
        let first = &self.repositories[0];
        Deadlines { scan: Instant::now() + first.timeout(), total: first.deadline() }
    }

    /// Queues a scan of a layer that was just pulled, so that the first container need not wait for it. Does not wait.
    pub fn prefetch_scan(&self, scan_key: &ScanKey, repository: &Arc<Repository>) {
        let reason = match self.scans.start(scan_key, repository, Priority::Last) {
            Err(e) => e.to_string(),
            Ok(ScanHandle::Finished(Err(unavailable))) => unavailable.to_string(),
            Ok(_) => return,
        };
        log::debug!("cannot scan layer {} ahead, the first container waits for the scan: {reason}", scan_key.digest);
    }

    /// Removes the directory of `id`, unless somebody needs it.
    pub fn detach_if_unused(&self, id: SnapshotId, cancelled: &dyn Fn() -> bool) -> Result<ReleaseOutcome, Error> {
        self.chains.remove_containing(id);
        self.attacher.release(id, cancelled, || {
            let is_needed = self.store.read(|tx| needs_directory(tx, id))?;
            Ok::<_, Error>(if is_needed { ReleaseDecision::Keep } else { ReleaseDecision::Remove })
        })
    }

    /// Removes the directories of layers that were attached for nobody. Those that are busy are left to the next
    /// cleanup.
    pub fn detach_unused(&self, ids: &[SnapshotId]) {
        let mut remaining = Vec::new();
        for id in ids {
            if !matches!(self.detach_if_unused(*id, &|| false), Ok(ReleaseOutcome::Done)) {
                remaining.push(*id);
            }
        }
        if remaining.is_empty() {
            return;
        }
        if let Err(e) = self.store.write(|tx| tx.schedule_cleanup(&remaining)) {
            log::warn!(event = "cleanup_not_scheduled", layers = remaining.len();
                "cannot schedule {} unused layers for cleanup, they may stay attached until the next start: {e}",
                remaining.len());
        }
    }
}

/// Opens the layer once, on a thread of the repository, which proves that the repository can provide it.
fn open_layer(repository: &Repository, digest: &Digest) -> Result<(), Unavailable> {
    let digest = digest.clone();
    repository.call(move |generation| generation.layer(&digest).map(drop))
}
