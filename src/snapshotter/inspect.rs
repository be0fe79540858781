//! What an admin asks and containerd never does: how a snapshot comes by its files, what can be
//! had of them now, how repositories are, and what the next cleanup would take away.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::cleanup::needs_its_directory;
use super::list::Cursor;
use super::{Error, RecoveryReport, Result, Snapshotter};
use crate::attach::AttachMode;
use crate::model::{Digest, Snapshot, SnapshotId};
use crate::repository::scan::ScanKey;
use crate::repository::{MountGeneration, Remedy, Repository, RepositoryStatus, Unavailable};

/// Of the list for cleanup, so many at a time.
const LEFTOVERS: usize = 1_000;

/// Whether repositories are asked for what they had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeRepositories {
    Nobody,
    Repositories,
}

#[derive(Debug)]
pub struct SnapshotStatus {
    pub snapshot: Snapshot,
    /// Why its files cannot be had.
    pub trouble: Option<String>,
    /// Its layer is downloaded when it is removed and pulled again.
    pub refused: bool,
}

/// How the daemon is set up.
#[derive(Debug)]
pub struct DaemonInfo {
    pub snapshots: PathBuf,
    pub attach: AttachMode,
    pub found: RecoveryReport,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    pub path: PathBuf,
    pub of: LeftoverKind,
}

/// Whose something was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftoverKind {
    /// A snapshot that was removed, or never finished.
    Removed,
    /// A layer that no container stands on any more.
    Detached,
}

/// A published layer, and why no repository could provide it so far.
struct AvailabilityQuery {
    /// Its place among the inspected.
    index: usize,
    digest: Digest,
    /// The repository it was pulled from, whose answer is told.
    repository: String,
    missing: Unavailable,
}

impl Snapshotter {
    pub fn daemon_info(&self) -> DaemonInfo {
        DaemonInfo {
            snapshots: self.paths.snapshots_dir().to_owned(),
            attach: self.sources.attacher.mode(),
            found: self.found.get().cloned().unwrap_or_default(),
        }
    }

    /// Each repository, and how it is: they are asked. Of a cache is told if it is on the file system of the state root.
    pub fn conditions(&self) -> Vec<(Arc<Repository>, std::result::Result<RepositoryStatus, Unavailable>)> {
        let state = self.device();
        let condition = |repository: &Repository| {
            let found = repository.status();
            found.map(|one| RepositoryStatus { cache: one.cache.filter(|cache| Some(cache.device) == state), ..one })
        };
        self.sources.repositories.iter().map(|one| (Arc::clone(one), condition(one))).collect()
    }

    /// The name of each repository, and whether it can be used, as far as that is known. Nobody waits.
    pub fn health(&self) -> Vec<(String, bool)> {
        self.sources.repositories.iter().map(|one| (one.name().to_owned(), one.is_healthy_cached())).collect()
    }

    /// How many snapshots there are, and how much waits for a cleanup.
    pub fn counts(&self) -> Result<(u64, u64)> {
        self.store.read(|tx| tx.counts().map_err(Error::from))
    }

    /// A page of all snapshots, and what is left.
    pub fn inspect(
        &self,
        rest: Option<Cursor>,
        ask: ProbeRepositories,
    ) -> Result<(Vec<SnapshotStatus>, Option<Cursor>)> {
        let page = match rest {
            None => self.list(None, |_| true)?,
            Some(rest) => self.next_page(rest, |_| true)?,
        };
        let mut inspected: Vec<SnapshotStatus> =
            page.found.into_iter().map(|snapshot| SnapshotStatus { snapshot, trouble: None, refused: false }).collect();
        for one in inspected.iter_mut().filter(|one| one.snapshot.layer.is_none()) {
            one.trouble = self.ensure_files_exist(&one.snapshot).err().map(|e| e.to_string());
        }
        if ask == ProbeRepositories::Repositories {
            for AvailabilityQuery { index, digest, repository, missing } in self.find_unavailable(&inspected) {
                inspected[index].refused = missing.remedy() == Remedy::Download;
                inspected[index].trouble = Some(format!("layer {digest} of repository {repository}: {missing}"));
            }
        }
        Ok((inspected, page.rest))
    }

    /// The layers that no repository has, or that cannot be shown as it has them.
    fn find_unavailable(&self, inspected: &[SnapshotStatus]) -> Vec<AvailabilityQuery> {
        let mut queries: Vec<AvailabilityQuery> = Vec::new();
        for (index, one) in inspected.iter().enumerate() {
            if let Some(layer) = &one.snapshot.layer {
                let first = self.sources.repositories_preferring(&layer.repository).swap_remove(0);
                queries.push(AvailabilityQuery {
                    index,
                    digest: layer.digest.clone(),
                    repository: first.name().to_owned(),
                    missing: Unavailable::NotConfigured { instead: None },
                });
            }
        }
        for repository in &self.sources.repositories {
            let digests = queries.iter().map(|query| query.digest.clone()).collect();
            let mut unavailable = Vec::new();
            for (mut query, answer) in queries.into_iter().zip(query(repository, digests)) {
                let refusal = || self.refusal(&query.digest, repository);
                let Some(missing) = answer.err().or_else(refusal) else { continue };
                if query.repository == repository.name() || matches!(query.missing, Unavailable::NotConfigured { .. }) {
                    query.missing = missing;
                }
                unavailable.push(query);
            }
            queries = unavailable;
        }
        queries
    }

    fn refusal(&self, digest: &Digest, repository: &Repository) -> Option<Unavailable> {
        let scan_key = ScanKey { digest: digest.clone(), repository: repository.name().to_owned() };
        self.sources.scans.refusal(&scan_key).unwrap_or_else(|e| {
            // A row that is damaged must not keep the answer about all others.
            log::warn!("{e}");
            None
        })
    }

    /// What the next cleanup would take away, from id `next` on, and where it goes on.
    pub fn leftovers(&self, next: SnapshotId) -> Result<(Vec<Leftover>, Option<SnapshotId>)> {
        self.store.read(|tx| {
            let (ids, rest) = tx.scheduled(next, LEFTOVERS)?;
            let mut leftovers = Vec::new();
            for id in ids {
                if !needs_its_directory(tx, id)? {
                    let of = if tx.exists(id)? { LeftoverKind::Detached } else { LeftoverKind::Removed };
                    leftovers.push(Leftover { path: self.paths.snapshot_dir(id), of });
                }
            }
            Ok((leftovers, rest))
        })
    }
}

/// Whether the repository has each of the layers `digests`: all are asked with one question.
fn query(repository: &Arc<Repository>, digests: Vec<Digest>) -> Vec<std::result::Result<(), Unavailable>> {
    let count = digests.len();
    if count == 0 {
        return Vec::new();
    }
    let look = move |generation: &Arc<MountGeneration>| {
        let begun = Instant::now();
        let mut unreachable: Option<Unavailable> = None;
        let mut answers = Vec::with_capacity(digests.len());
        for digest in &digests {
            let answer = match &unreachable {
                // Each layer that is not cached takes seconds, and there may be hundreds.
                Some(missing) if begun.elapsed() > generation.timeout() => Err(missing.clone()),
                _ => generation.layer(digest).map(drop),
            };
            if let Err(missing @ Unavailable::ServerUnreachable(_)) = &answer {
                unreachable = Some(missing.clone());
            }
            answers.push(answer);
        }
        Ok(answers)
    };
    repository.call(look).unwrap_or_else(|missing| vec![Err(missing); count])
}
