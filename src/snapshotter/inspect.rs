//! The questions of administrators, which containerd does not ask: where the files of a snapshot are, whether they are available, how
//! the repositories are, and what the next cleanup would remove.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::cleanup::needs_directory;
use super::list::Cursor;
use super::{Error, RecoveryReport, Result, Snapshotter};
use crate::model::{AttachMode, Digest, Snapshot, SnapshotId};
use crate::repository::scan::ScanKey;
use crate::repository::{MountGeneration, Remedy, Repository, RepositoryStatus, Unavailable};

/// Maximum number of scheduled ids that are read for one page of leftovers.
const MAX_LEFTOVERS: usize = 1_000;

/// Whether `inspect` asks the repositories for the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeRepositories {
    No,
    Yes,
}

#[derive(Debug)]
pub struct SnapshotStatus {
    pub snapshot: Snapshot,
    /// Why the files of the snapshot are not available.
    pub problem: Option<String>,
    /// Whether the layer is downloaded if the snapshot is removed and pulled again.
    pub repull_downloads: bool,
}

/// How the daemon is set up.
#[derive(Debug)]
pub struct DaemonInfo {
    pub snapshots: PathBuf,
    pub attach: AttachMode,
    pub recovery: RecoveryReport,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    pub path: PathBuf,
    pub kind: LeftoverKind,
}

/// The former purpose of a directory that nobody needs any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftoverKind {
    /// A snapshot that was removed, or never finished.
    Removed,
    /// A layer that no container stands on any more.
    Detached,
}

/// A published layer that no repository was able to provide so far.
struct UnavailableLayer {
    /// The index of its snapshot among those that are inspected.
    index: usize,
    digest: Digest,
    /// The repository from which it was pulled. Its reason is reported.
    repository: String,
    reason: Unavailable,
}

impl Snapshotter {
    pub fn daemon_info(&self) -> DaemonInfo {
        DaemonInfo {
            snapshots: self.paths.snapshots_dir().to_owned(),
            attach: self.layer_provider.attacher.mode(),
            recovery: self.recovery.get().cloned().unwrap_or_default(),
        }
    }

    /// Asks each repository for its status. The cache of its client is reported only if it is on the file system of the
    /// state root.
    pub fn repository_statuses(&self) -> Vec<(Arc<Repository>, std::result::Result<RepositoryStatus, Unavailable>)> {
        let state_root = self.state_root_device();
        let mut statuses = Vec::new();
        for repository in &self.layer_provider.repositories {
            let status = repository.status().map(|status| RepositoryStatus {
                cache: status.cache.filter(|cache| Some(cache.device) == state_root),
                ..status
            });
            statuses.push((Arc::clone(repository), status));
        }
        statuses
    }

    /// The name of each repository, and whether it is usable as far as that is known. Does not wait for repositories.
    pub fn health(&self) -> Vec<(String, bool)> {
        let repositories = self.layer_provider.repositories.iter();
        repositories.map(|repository| (repository.name().to_owned(), repository.is_healthy_cached())).collect()
    }

    /// The number of snapshots, and the number of ids that are scheduled for cleanup.
    pub fn counts(&self) -> Result<(u64, u64)> {
        self.store.read(|tx| tx.counts().map_err(Error::from))
    }

    /// A page of all snapshots with their status, and the cursor of the next page.
    pub fn inspect(
        &self,
        cursor: Option<Cursor>,
        probe: ProbeRepositories,
    ) -> Result<(Vec<SnapshotStatus>, Option<Cursor>)> {
        let page = match cursor {
            None => self.list(None, |_| true)?,
            Some(cursor) => self.next_page(cursor, |_| true)?,
        };
        let mut statuses = Vec::with_capacity(page.snapshots.len());
        for snapshot in page.snapshots {
            let problem = match snapshot.layer {
                None => self.ensure_files_exist(&snapshot).err().map(|e| e.to_string()),
                Some(_) => None,
            };
            statuses.push(SnapshotStatus { snapshot, problem, repull_downloads: false });
        }
        if probe == ProbeRepositories::Yes {
            for UnavailableLayer { index, digest, repository, reason } in self.find_unavailable(&statuses) {
                statuses[index].repull_downloads = reason.remedy() == Remedy::Download;
                statuses[index].problem = Some(format!("layer {digest} of repository {repository}: {reason}"));
            }
        }
        Ok((statuses, page.cursor))
    }

    /// The layers that no repository can provide. Each repository is asked only for those that the ones before it could
    /// not.
    fn find_unavailable(&self, statuses: &[SnapshotStatus]) -> Vec<UnavailableLayer> {
        let mut unavailable = Vec::new();
        for (index, status) in statuses.iter().enumerate() {
            if let Some(layer) = &status.snapshot.layer {
                let first = self.layer_provider.repositories_preferring(&layer.repository).swap_remove(0);
                unavailable.push(UnavailableLayer {
                    index,
                    digest: layer.digest.clone(),
                    repository: first.name().to_owned(),
                    reason: Unavailable::NotConfigured { instead: None },
                });
            }
        }
        for repository in &self.layer_provider.repositories {
            let digests = unavailable.iter().map(|layer| layer.digest.clone()).collect();
            let answers = query_layers(repository, digests);
            let mut still_unavailable = Vec::new();
            for (mut layer, answer) in unavailable.into_iter().zip(answers) {
                let Some(reason) = answer.err().or_else(|| self.refusal(&layer.digest, repository)) else { continue };
                if layer.repository == repository.name() || matches!(layer.reason, Unavailable::NotConfigured { .. }) {
                    layer.reason = reason;
                }
                still_unavailable.push(layer);
            }
            unavailable = still_unavailable;
        }
        unavailable
    }

    /// Why the layer cannot be used although the repository has it, if a scan found that out.
    fn refusal(&self, digest: &Digest, repository: &Repository) -> Option<Unavailable> {
        let scan_key = ScanKey { digest: digest.clone(), repository: repository.name().to_owned() };
        self.layer_provider.scans.refusal(&scan_key).unwrap_or_else(|e| {
            // A damaged row must not prevent the answer about all other layers.
            log::warn!(event = "scan_record_unreadable", digest = digest.as_str();
                "cannot read the scan of layer {digest}: {e}");
            None
        })
    }

    /// The directories that the next cleanup would remove, from id `next` on, and the id at which the next page begins.
    pub fn leftovers(&self, next: SnapshotId) -> Result<(Vec<Leftover>, Option<SnapshotId>)> {
        self.store.read(|tx| {
            let (ids, next_page) = tx.scheduled(next, MAX_LEFTOVERS)?;
            let mut leftovers = Vec::new();
            for id in ids {
                if !needs_directory(tx, id)? {
                    let kind = if tx.exists(id)? { LeftoverKind::Detached } else { LeftoverKind::Removed };
                    leftovers.push(Leftover { path: self.paths.snapshot_dir(id), kind });
                }
            }
            Ok((leftovers, next_page))
        })
    }
}

/// Whether the repository has each of the layers. All are asked for by one job.
fn query_layers(repository: &Repository, digests: Vec<Digest>) -> Vec<std::result::Result<(), Unavailable>> {
    let count = digests.len();
    if count == 0 {
        return Vec::new();
    }
    let job = move |generation: &Arc<MountGeneration>| {
        let started = Instant::now();
        let mut unreachable: Option<Unavailable> = None;
        let mut answers = Vec::with_capacity(digests.len());
        for digest in &digests {
            let answer = match &unreachable {
                // The client takes seconds for each layer that is not cached, and there may be hundreds.
                Some(reason) if started.elapsed() > generation.timeout() => Err(reason.clone()),
                _ => generation.layer(digest).map(drop),
            };
            if let Err(reason @ Unavailable::ServerUnreachable(_)) = &answer {
                unreachable = Some(reason.clone());
            }
            answers.push(answer);
        }
        Ok(answers)
    };
    repository.call(job).unwrap_or_else(|reason| vec![Err(reason); count])
}
