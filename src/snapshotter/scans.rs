//! Looks through what is published for markers: once, in the background, kept in the store.
//!
//! Walks go on threads of the repository they walk, so one that hangs holds nobody up; who
//! needs the result waits for it, with a limit.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::{Error, Result};
use crate::repository::lane::Turn;
use crate::repository::scan::{self, Scan, Subject};
use crate::repository::{Missing, Repository};
use crate::store::{Lookup, Store};
use crate::sys::Sys;

#[derive(Clone)]
pub struct Scans {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    sys: Arc<dyn Sys>,
    /// So that nobody walks a layer beside somebody else.
    under_way: Mutex<HashMap<Subject, Arc<Walk>>>,
}

/// A walk that is queued or under way, until its result is there.
#[derive(Default)]
struct Walk {
    begun: AtomicBool,
    directories: AtomicUsize,
    result: Mutex<Option<std::result::Result<Arc<Scan>, Missing>>>,
    changed: Condvar,
}

/// A walk that somebody may wait for.
pub struct Pending {
    walk: Arc<Walk>,
    repository: Arc<Repository>,
}

impl Scans {
    pub fn new(store: Arc<Store>, sys: Arc<dyn Sys>) -> Self {
        Self { shared: Arc::new(Shared { store, sys, under_way: Mutex::default() }) }
    }

    /// What is known already. Asks the store only.
    pub fn known(&self, subject: &Subject) -> Result<Option<Arc<Scan>>> {
        self.shared.known(subject)
    }

    /// Begins a walk of `top`, unless there is one. One that somebody waits for is `Next`.
    pub fn start(
        &self,
        subject: &Subject,
        repository: &Arc<Repository>,
        top: PathBuf,
        turn: Turn,
    ) -> std::result::Result<Pending, Missing> {
        let (walk, is_new) = {
            let mut under_way = self.shared.under_way.lock();
            let is_new = !under_way.contains_key(subject);
            (Arc::clone(under_way.entry(subject.clone()).or_default()), is_new)
        };
        // One that waits in the queue gets a second place further in front; the first that has
        // its turn does the work.
        if is_new || (turn == Turn::Next && !walk.begun.load(Ordering::SeqCst)) {
            let job = {
                let (shared, walk, subject) = (Arc::clone(&self.shared), Arc::clone(&walk), subject.clone());
                let repository = Arc::clone(repository);
                move || shared.walk(&subject, &walk, &repository, &top)
            };
            if let Err(missing) = repository.walk(turn, job) {
                if is_new {
                    self.shared.finish(subject, &walk, Err(missing.clone()));
                }
                return Err(missing);
            }
        }
        Ok(Pending { walk, repository: Arc::clone(repository) })
    }
}

impl Pending {
    /// The result, if it comes within the repository's limit. The walk goes on all the same.
    pub fn wait(self) -> std::result::Result<Arc<Scan>, Missing> {
        let until = Instant::now() + self.repository.timeout();
        let before = self.walk.directories.load(Ordering::Relaxed);
        let mut result = self.walk.result.lock();
        while result.is_none() {
            if self.walk.changed.wait_until(&mut result, until).timed_out() {
                break;
            }
        }
        if let Some(result) = &*result {
            return result.clone();
        }
        drop(result);
        let directories = self.walk.directories.load(Ordering::Relaxed);
        // It gets on: the layer is large. Or it waits for others that do. Else the repository is to blame.
        let is_queued = !self.walk.begun.load(Ordering::SeqCst);
        if directories > before || is_queued {
            Err(Missing::BeingScanned { directories })
        } else {
            Err(self.repository.no_answer())
        }
    }
}

impl Shared {
    fn known(&self, subject: &Subject) -> Result<Option<Arc<Scan>>> {
        self.store.read(|tx| Ok(tx.scan(subject).map_err(Error::from)?.map(Arc::new)))
    }

    fn walk(&self, subject: &Subject, walk: &Walk, repository: &Repository, top: &std::path::Path) {
        if walk.begun.swap(true, Ordering::SeqCst) {
            return;
        }
        // Finished between the question of who wants it and this job.
        if let Ok(Some(known)) = self.known(subject) {
            self.finish(subject, walk, Ok(known));
            return;
        }
        let found = scan::scan(self.sys.as_ref(), top, subject.extent, &walk.directories);
        let result = match found {
            Ok(found) => {
                if let Err(e) = self.store.write(|tx| tx.put_scan(subject, &found).map_err(Error::from)) {
                    log::warn!("{} will be looked through again: {e}", subject.digest);
                }
                Ok(Arc::new(found))
            }
            Err(scan::Error::System(e)) => Err(repository.unreadable(e)),
            Err(e) => Err(Missing::Unscannable(e)),
        };
        if let Err(why) = &result {
            log::debug!("{} will be looked through when it is needed: {why}", subject.digest);
        }
        self.finish(subject, walk, result);
    }

    /// Whoever comes later finds the result in the store, or walks again.
    fn finish(&self, subject: &Subject, walk: &Walk, result: std::result::Result<Arc<Scan>, Missing>) {
        self.under_way.lock().remove(subject);
        *walk.result.lock() = Some(result);
        walk.changed.notify_all();
    }
}
