//! What an admin asks and containerd never does: how a snapshot comes by its files, what can be
//! had of them now, how repositories are, and what the next cleanup would take away.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;

use super::cleanup::needs_its_directory;
use super::layers::layer_subject;
use super::list::Rest;
use super::rootfs::flat_subject;
use super::{Error, Found, Result, Snapshotter};
use crate::attach::Mode;
use crate::repository::scan::Subject;
use crate::repository::{Condition, Missing, Repository};
use crate::store::Lookup;
use crate::types::{Rootfs, RootfsMode, Snapshot, SnapshotId};

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
    /// What was decided for containers on it.
    pub rootfs: Option<Rootfs>,
    /// Why its files cannot be had.
    pub trouble: Option<String>,
    /// And those of the whole root that was decided for.
    pub flat_trouble: Option<String>,
}

/// How the daemon is set up.
#[derive(Debug)]
pub struct Setup {
    pub snapshots: PathBuf,
    pub attach: Mode,
    pub rootfs: RootfsMode,
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

/// Something published, and why nobody could provide it so far.
struct Question {
    /// Its place among the inspected.
    n: usize,
    subject: Subject,
    is_flat: bool,
    missing: Missing,
}

impl Snapshotter {
    pub fn setup(&self) -> Setup {
        Setup {
            snapshots: self.places.all().to_owned(),
            attach: self.sources.attacher.mode(),
            rootfs: self.sources.rootfs,
            found: self.found.get().cloned().unwrap_or_default(),
        }
    }

    /// Each repository, and how it is: they are asked.
    pub fn conditions(&self) -> Vec<(Arc<Repository>, std::result::Result<Condition, Missing>)> {
        let all = self.sources.repositories.iter();
        all.map(|repository| (Arc::clone(repository), Repository::condition(repository))).collect()
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
        let mut inspected: Vec<Inspected> = self.store.read(|tx| {
            let with_rootfs = |snapshot: Snapshot| {
                let rootfs = tx.rootfs(snapshot.id)?;
                Ok::<_, Error>(Inspected { snapshot, rootfs, trouble: None, flat_trouble: None })
            };
            chunk.found.into_iter().map(with_rootfs).collect()
        })?;
        for one in inspected.iter_mut().filter(|one| one.snapshot.layer.is_none()) {
            one.trouble = self.require_files(&one.snapshot).err().map(|e| e.to_string());
        }
        if ask == Ask::Repositories {
            for Question { n, is_flat, missing, subject } in self.unanswered(&inspected) {
                let what = if is_flat { "root file system" } else { "layer" };
                let missing = format!("{what} {} of repository {}: {missing}", subject.digest, subject.repository);
                let trouble = if is_flat { &mut inspected[n].flat_trouble } else { &mut inspected[n].trouble };
                *trouble = Some(missing);
            }
        }
        Ok((inspected, chunk.rest))
    }

    /// What no repository has. A layer may come from any of them, a root from its own.
    fn unanswered(&self, inspected: &[Inspected]) -> Vec<Question> {
        let mut questions = Vec::new();
        for (n, one) in inspected.iter().enumerate() {
            let missing = || Missing::NotConfigured { instead: None };
            if let Some(layer) = &one.snapshot.layer {
                let first = self.sources.candidates(&layer.repository).swap_remove(0);
                let subject = layer_subject(&one.snapshot, layer, &first);
                questions.push(Question { n, subject, is_flat: false, missing: missing() });
            }
            if let Some(Rootfs::Flat(flat)) = &one.rootfs {
                questions.push(Question { n, subject: flat_subject(flat), is_flat: true, missing: missing() });
            }
        }
        for repository in &self.sources.repositories {
            let is_for = |q: &Question| !q.is_flat || q.subject.repository == repository.name();
            let subjects: Vec<Subject> = questions.iter().filter(|q| is_for(q)).map(|q| q.subject.clone()).collect();
            let mut answers = answers(repository, subjects).into_iter();
            questions.retain_mut(|question| {
                if !is_for(question) {
                    return true;
                }
                match answers.next() {
                    Some(Ok(())) => false,
                    // What its own repository says is what matters.
                    Some(Err(missing)) => {
                        let is_own = question.subject.repository == repository.name();
                        if is_own || matches!(question.missing, Missing::NotConfigured { .. }) {
                            question.missing = missing;
                        }
                        true
                    }
                    None => true,
                }
            });
        }
        questions
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

/// Whether the repository has each of `subjects`: all asked with one question.
fn answers(repository: &Arc<Repository>, subjects: Vec<Subject>) -> Vec<std::result::Result<(), Missing>> {
    let (asked, count) = (Arc::clone(repository), subjects.len());
    if count == 0 {
        return Vec::new();
    }
    let look = move || subjects.iter().map(|subject| asked.top(subject).map(drop)).collect();
    Repository::ask(repository, look).unwrap_or_else(|missing| vec![Err(missing); count])
}
