//! What an admin asks and containerd never does: how a snapshot comes by its files, what can be
//! had of them now, how repositories are, and what the next cleanup would take away.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::cleanup::needs_its_directory;
use super::list::Rest;
use super::{Error, Found, Result, Snapshotter};
use crate::attach::Mode;
use crate::repository::scan::ScanKey;
use crate::repository::{Condition, Missing, Remedy, Repository};
use crate::types::{Digest, Snapshot, SnapshotId};

/// Of the list for cleanup, so many at a time.
const LEFTOVERS: usize = 1_000;

/// Whether repositories are asked for what they had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Nobody,
    Repositories,
}

#[derive(Debug)]
pub struct Inspected {
    pub snapshot: Snapshot,
    /// Why its files cannot be had.
    pub trouble: Option<String>,
    /// Its layer is downloaded when it is removed and pulled again.
    pub refused: bool,
}

/// How the daemon is set up.
#[derive(Debug)]
pub struct Setup {
    pub snapshots: PathBuf,
    pub attach: Mode,
    pub found: Found,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    pub path: PathBuf,
    pub of: Of,
}

/// Whose something was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
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
    missing: Missing,
}

impl Snapshotter {
    pub fn setup(&self) -> Setup {
        Setup {
            snapshots: self.places.all().to_owned(),
            attach: self.sources.attacher.mode(),
            found: self.found.get().cloned().unwrap_or_default(),
        }
    }

    /// Each repository, and how it is: they are asked. Of a cache is told if it is on the file system of the state root.
    pub fn conditions(&self) -> Vec<(Arc<Repository>, std::result::Result<Condition, Missing>)> {
        let state = self.device();
        let condition = |repository| {
            let found = Repository::condition(repository);
            found.map(|one| Condition { cache: one.cache.filter(|cache| Some(cache.device) == state), ..one })
        };
        self.sources.repositories.iter().map(|one| (Arc::clone(one), condition(one))).collect()
    }

    /// The name of each repository, and whether it can be used, as far as that is known. Nobody waits.
    pub fn health(&self) -> Vec<(String, bool)> {
        self.sources.repositories.iter().map(|one| (one.name().to_owned(), Repository::seems_well(one))).collect()
    }

    /// How many snapshots there are, and how much waits for a cleanup.
    pub fn counts(&self) -> Result<(u64, u64)> {
        self.store.read(|tx| tx.counts().map_err(Error::from))
    }

    /// A chunk of all snapshots, and what is left.
    pub fn inspect(&self, rest: Option<Rest>, ask: Ask) -> Result<(Vec<Inspected>, Option<Rest>)> {
        let chunk = match rest {
            None => self.list(None, |_| true)?,
            Some(rest) => self.list_rest(rest, |_| true)?,
        };
        let mut inspected: Vec<Inspected> =
            chunk.found.into_iter().map(|snapshot| Inspected { snapshot, trouble: None, refused: false }).collect();
        for one in inspected.iter_mut().filter(|one| one.snapshot.layer.is_none()) {
            one.trouble = self.require_files(&one.snapshot).err().map(|e| e.to_string());
        }
        if ask == Ask::Repositories {
            for AvailabilityQuery { index, digest, repository, missing } in self.find_unavailable(&inspected) {
                inspected[index].refused = missing.remedy() == Remedy::Download;
                inspected[index].trouble = Some(format!("layer {digest} of repository {repository}: {missing}"));
            }
        }
        Ok((inspected, chunk.rest))
    }

    /// The layers that no repository has, or that cannot be shown as it has them.
    fn find_unavailable(&self, inspected: &[Inspected]) -> Vec<AvailabilityQuery> {
        let mut queries: Vec<AvailabilityQuery> = Vec::new();
        for (index, one) in inspected.iter().enumerate() {
            if let Some(layer) = &one.snapshot.layer {
                let first = self.sources.candidates(&layer.repository).swap_remove(0);
                queries.push(AvailabilityQuery {
                    index,
                    digest: layer.digest.clone(),
                    repository: first.name().to_owned(),
                    missing: Missing::NotConfigured { instead: None },
                });
            }
        }
        for repository in &self.sources.repositories {
            let digests = queries.iter().map(|query| query.digest.clone()).collect();
            let mut unavailable = Vec::new();
            for (mut query, answer) in queries.into_iter().zip(answers(repository, digests)) {
                let refusal = || self.refusal(&query.digest, repository);
                let Some(missing) = answer.err().or_else(refusal) else { continue };
                if query.repository == repository.name() || matches!(query.missing, Missing::NotConfigured { .. }) {
                    query.missing = missing;
                }
                unavailable.push(query);
            }
            queries = unavailable;
        }
        queries
    }

    fn refusal(&self, digest: &Digest, repository: &Repository) -> Option<Missing> {
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
                    let of = if tx.exists(id)? { Of::Detached } else { Of::Removed };
                    leftovers.push(Leftover { path: self.places.home(id), of });
                }
            }
            Ok((leftovers, rest))
        })
    }
}

/// Whether the repository has each of the layers `digests`: all are asked with one question.
fn answers(repository: &Arc<Repository>, digests: Vec<Digest>) -> Vec<std::result::Result<(), Missing>> {
    let (asked, count) = (Arc::clone(repository), digests.len());
    if count == 0 {
        return Vec::new();
    }
    let look = move || {
        let begun = Instant::now();
        let mut unreachable: Option<Missing> = None;
        let mut answers = Vec::with_capacity(digests.len());
        for digest in &digests {
            let answer = match &unreachable {
                // Each layer that is not cached takes seconds, and there may be hundreds.
                Some(missing) if begun.elapsed() > asked.timeout() => Err(missing.clone()),
                _ => asked.layer(digest).map(drop),
            };
            if let Err(missing @ Missing::ServerUnreachable(_)) = &answer {
                unreachable = Some(missing.clone());
            }
            answers.push(answer);
        }
        answers
    };
    Repository::ask(repository, look).unwrap_or_else(|missing| vec![Err(missing); count])
}
