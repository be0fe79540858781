//! Looks through what is published for markers: once, in the background, kept in the store.
//!
//! Walks go on threads of the repository they walk, so one that hangs holds nobody up; who
//! needs the result waits for it, with a limit.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::{Error, Result};
use crate::metrics::METRICS;
use crate::repository::lane::{LOOK_UP, Turn};
use crate::repository::scan::{self, Progress, Scan, ScanKey};
use crate::repository::{Missing, Repository};
use crate::store::{Lookup, Store};
use crate::sys::Sys;

#[derive(Clone)]
pub struct Scans {
    shared: Arc<Shared>,
}

/// A walk hangs with the mount it is on: one of the next mount is another.
type Key = (ScanKey, u64);

struct Shared {
    store: Arc<Store>,
    sys: Arc<dyn Sys>,
    /// So that nobody walks a layer beside somebody else.
    under_way: Mutex<HashMap<Key, Arc<Walk>>>,
}

/// A walk that is queued or under way, until its result is there.
#[derive(Default)]
struct Walk {
    begun: AtomicBool,
    progress: Progress,
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
    pub fn known(&self, scan_key: &ScanKey) -> Result<Option<Arc<Scan>>> {
        self.shared.known(scan_key)
    }

    /// Begins a walk of `top`, unless there is one. One that somebody waits for is `Next`.
    pub fn start(
        &self,
        scan_key: &ScanKey,
        repository: &Arc<Repository>,
        top: PathBuf,
        turn: Turn,
    ) -> std::result::Result<Pending, Missing> {
        let key = (scan_key.clone(), repository.mount_number());
        let (walk, is_new) = {
            let mut under_way = self.shared.under_way.lock();
            let is_new = !under_way.contains_key(&key);
            (Arc::clone(under_way.entry(key.clone()).or_default()), is_new)
        };
        // One that waits in the queue gets a second place further in front; the first that has
        // its turn does the work.
        if is_new || (turn == Turn::Next && !walk.begun.load(Ordering::SeqCst)) {
            let job = {
                let (shared, walk, key) = (Arc::clone(&self.shared), Arc::clone(&walk), key.clone());
                let repository = Arc::clone(repository);
                move || shared.walk(&key, &walk, &repository, &top)
            };
            if let Err(missing) = repository.walk(turn, walk.progress.pulse.clone(), job) {
                if is_new {
                    self.shared.finish(&key, &walk, Err(missing.clone()));
                }
                return Err(missing);
            }
        }
        Ok(Pending { walk, repository: Arc::clone(repository) })
    }
}

impl Pending {
    /// The result, if it comes before `until`. The walk goes on all the same.
    pub fn wait(self, until: Instant) -> std::result::Result<Arc<Scan>, Missing> {
        let mut result = self.walk.result.lock();
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            // One that waits for its turn is no sign that the repository hangs.
            let has_begun = self.walk.begun.load(Ordering::SeqCst);
            let is_silent = has_begun && self.walk.progress.pulse.silence() >= self.repository.timeout();
            if is_silent || self.repository.is_hopeless() {
                return Err(self.repository.no_answer());
            }
            if Instant::now() >= until {
                let directories = self.walk.progress.directories.load(Ordering::Relaxed);
                return Err(Missing::BeingScanned { directories });
            }
            let step = LOOK_UP.min(until.saturating_duration_since(Instant::now()));
            self.walk.changed.wait_for(&mut result, step);
        }
    }
}

impl Shared {
    fn known(&self, scan_key: &ScanKey) -> Result<Option<Arc<Scan>>> {
        self.store.read(|tx| Ok(tx.scan(scan_key).map_err(Error::from)?.map(Arc::new)))
    }

    fn walk(&self, key: &Key, walk: &Walk, repository: &Repository, top: &Path) {
        if walk.begun.swap(true, Ordering::SeqCst) {
            return;
        }
        let scan_key = &key.0;
        // Finished between the question of who wants it and this job.
        if let Ok(Some(known)) = self.known(scan_key) {
            self.finish(key, walk, Ok(known));
            return;
        }
        let since = Instant::now();
        let result = match scan::scan(self.sys.as_ref(), top, &walk.progress) {
            Ok(found) => {
                if let Err(e) = self.store.write(|tx| tx.put_scan(scan_key, &found).map_err(Error::from)) {
                    log::warn!("{} will be looked through again: {e}", scan_key.digest);
                }
                Ok(Arc::new(found))
            }
            Err(scan::Error::System(e)) => Err(repository.unreadable(e)),
            Err(e) => Err(Missing::Unscannable(e)),
        };
        METRICS.scanned(if result.is_ok() { "done" } else { "failed" }, since);
        if let Err(why) = &result {
            log::debug!("{} will be looked through when it is needed: {why}", scan_key.digest);
        }
        self.finish(key, walk, result);
    }

    /// Whoever comes later finds the result in the store, or walks again.
    fn finish(&self, key: &Key, walk: &Walk, result: std::result::Result<Arc<Scan>, Missing>) {
        self.under_way.lock().remove(key);
        *walk.result.lock() = Some(result);
        walk.changed.notify_all();
    }
}
