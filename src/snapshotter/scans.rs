//! Scans published layers for markers: each layer once, in the background, and kept in the store.
//!
//! A scan runs on a thread of the repository that it asks, so one that hangs holds nobody up; whoever
//! needs the result waits for it, with a limit. Invariant: a scan that was begun or queued is finished
//! with a result or an error, even if its thread panics or cannot be started.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::{Error, Result};
use crate::metrics::METRICS;
use crate::repository::executor::{POLL_INTERVAL, Priority};
use crate::repository::scan::{self, Limit, Progress, Scan, ScanKey};
use crate::repository::{MountGeneration, Repository, Unavailable};
use crate::store::{ScanLookup, Store};
use crate::system::Sys;

/// Layers that wait for a scan which no container needs yet. When there are as many, the scan of a
/// pulled layer is left to the first container that needs it.
const MAX_QUEUED: usize = 4096;

/// Records of scans that are shorter are decoded by every call for itself, and not counted.
const SMALL_RECORD: usize = 512;
/// What such a scan takes at most: a name takes three bytes or more in a record, and a hundred in memory.
const SMALL_SCAN: usize = SMALL_RECORD * 40;
/// What the scans of layers that are being attached may take together, in bytes.
const MAX_HELD: usize = 128 << 20;

#[derive(Clone)]
pub struct ScanScheduler {
    shared: Arc<Inner>,
}

/// A scan hangs with the mount that it reads: one of the next mount is another.
type JobKey = (ScanKey, u64);

struct Inner {
    store: Arc<Store>,
    sys: Arc<dyn Sys>,
    /// So that nobody scans a layer beside somebody else.
    in_progress: Mutex<HashMap<JobKey, ScanEntry>>,
    held: Mutex<ScanMemory>,
}

/// The large scans that somebody holds, which share them.
#[derive(Default)]
struct ScanMemory(HashMap<ScanKey, (Weak<Scan>, usize)>);

impl ScanMemory {
    fn get(&self, key: &ScanKey) -> Option<Arc<Scan>> {
        self.0.get(key)?.0.upgrade()
    }

    fn has_room(&mut self) -> bool {
        self.0.retain(|_, (scan, _)| scan.strong_count() > 0);
        self.0.values().map(|(_, bytes)| bytes).sum::<usize>() < MAX_HELD
    }

    /// The scan, shared from now on if it is large, unless others leave no room for it.
    fn add(&mut self, key: &ScanKey, scan: Scan) -> std::result::Result<Arc<Scan>, Unavailable> {
        let bytes = scan.memory();
        if bytes <= SMALL_SCAN {
            return Ok(Arc::new(scan));
        }
        // Somebody may have decoded it between its way into the store and here.
        if let Some(shared) = self.get(key) {
            return Ok(shared);
        }
        if !self.has_room() {
            return Err(Unavailable::ScansTakeMemory { limit: MAX_HELD });
        }
        let scan = Arc::new(scan);
        self.0.insert(key.clone(), (Arc::downgrade(&scan), bytes));
        Ok(scan)
    }
}

/// A job, and the guard that its queued closures hold.
type ScanEntry = (Arc<ScanJob>, Weak<JobGuard>);

/// A scan that is queued or running, until its result is there.
#[derive(Default)]
pub struct ScanJob {
    begun: AtomicBool,
    progress: Progress,
    result: Mutex<Option<std::result::Result<Arc<Scan>, Unavailable>>>,
    changed: Condvar,
}

/// Held by every queued closure of a job. When the last one is gone without a result, because its
/// thread panicked or never came to it, whoever waits is told.
struct JobGuard {
    shared: Arc<Inner>,
    key: JobKey,
    job: Arc<ScanJob>,
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        let missing = if self.job.begun.load(Ordering::SeqCst) {
            Unavailable::Unscannable(scan::Error::Panicked)
        } else {
            Unavailable::NoThread
        };
        self.job.finish(Err(missing));
        self.shared.forget(&self.key, &self.job);
    }
}

/// A scan that somebody may wait for.
pub enum ScanHandle {
    Known(Arc<Scan>),
    Running { job: Arc<ScanJob>, mount: Arc<MountGeneration>, repository: Arc<Repository> },
}

fn refused(limit: Limit) -> Unavailable {
    Unavailable::Unscannable(scan::Error::Exceeds(limit))
}

impl ScanScheduler {
    pub fn new(store: Arc<Store>, sys: Arc<dyn Sys>) -> Self {
        Self { shared: Arc::new(Inner { store, sys, in_progress: Mutex::default(), held: Mutex::default() }) }
    }

    /// Why the layer cannot be shown, if a scan has found that out.
    pub fn refusal(&self, scan_key: &ScanKey) -> Result<Option<Unavailable>> {
        // The record of a refusal is short.
        Ok(match self.shared.try_cached(scan_key)? {
            ScanLookup::Read(Err(limit)) => Some(refused(limit)),
            ScanLookup::Read(Ok(_)) | ScanLookup::Absent | ScanLookup::TooLong => None,
        })
    }

    /// Begins a scan of the layer, unless it is known or there is one. A scan that somebody waits
    /// for is `Next`.
    pub fn start(
        &self,
        scan_key: &ScanKey,
        repository: &Arc<Repository>,
        turn: Priority,
    ) -> Result<std::result::Result<ScanHandle, Unavailable>> {
        if let Some(known) = self.shared.cached(scan_key)? {
            return Ok(known.map(ScanHandle::Known));
        }
        let mount = repository.mount();
        let key = (scan_key.clone(), mount.number());
        let mut in_progress = self.shared.in_progress.lock();
        let current = in_progress.get(&key).and_then(|(job, guard)| Some((Arc::clone(job), guard.upgrade()?)));
        let is_new = current.is_none();
        if is_new && turn == Priority::Last && in_progress.len() >= MAX_QUEUED {
            return Ok(Err(Unavailable::BeingScanned { directories: 0 }));
        }
        let (job, guard) = current.unwrap_or_else(|| {
            let job = Arc::<ScanJob>::default();
            let guard = JobGuard { shared: Arc::clone(&self.shared), key: key.clone(), job: Arc::clone(&job) };
            (job, Arc::new(guard))
        });
        if is_new {
            in_progress.insert(key, (Arc::clone(&job), Arc::downgrade(&guard)));
        }
        drop(in_progress);
        // One that waits in the queue gets a second place further in front; the first that has its
        // turn does the work.
        if is_new || (turn == Priority::Next && !job.begun.load(Ordering::SeqCst)) {
            let asked = Arc::clone(repository);
            let work = move || guard.shared.run(&guard, &asked);
            if let Err(missing) = mount.spawn_scan(repository, turn, job.progress.heartbeat.clone(), work) {
                return Ok(Err(missing));
            }
        }
        Ok(Ok(ScanHandle::Running { job, mount, repository: Arc::clone(repository) }))
    }
}

impl ScanHandle {
    /// The result, if it comes before `until`. The scan goes on all the same.
    pub fn wait(self, until: Instant) -> std::result::Result<Arc<Scan>, Unavailable> {
        let (job, mount, repository) = match self {
            Self::Known(scan) => return Ok(scan),
            Self::Running { job, mount, repository } => (job, mount, repository),
        };
        let mut result = job.result.lock();
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            // A scan that waits for its turn is no sign that the repository hangs.
            let has_begun = job.begun.load(Ordering::SeqCst);
            let is_silent = has_begun && job.progress.heartbeat.silence() >= repository.timeout();
            if is_silent || mount.is_confirmed_down() {
                return Err(mount.report_no_answer(&repository));
            }
            if Instant::now() >= until {
                let directories = job.progress.directories.load(Ordering::Relaxed);
                return Err(Unavailable::BeingScanned { directories });
            }
            let step = POLL_INTERVAL.min(until.saturating_duration_since(Instant::now()));
            job.changed.wait_for(&mut result, step);
        }
    }
}

impl Inner {
    fn try_cached(&self, scan_key: &ScanKey) -> Result<ScanLookup> {
        self.store.read(|tx| tx.scan(scan_key, SMALL_RECORD).map_err(Error::from))
    }

    /// What the store has: the scan, or why there is none. Large ones are decoded one after the other, so that
    /// no two calls decode the same one, and at most one is above the limit.
    fn cached(&self, scan_key: &ScanKey) -> Result<Option<std::result::Result<Arc<Scan>, Unavailable>>> {
        match self.try_cached(scan_key)? {
            ScanLookup::Absent => return Ok(None),
            ScanLookup::Read(stored) => return Ok(Some(stored.map(Arc::new).map_err(refused))),
            ScanLookup::TooLong => {}
        }
        let mut held = self.held.lock();
        if let Some(scan) = held.get(scan_key) {
            return Ok(Some(Ok(scan)));
        }
        if !held.has_room() {
            return Ok(Some(Err(Unavailable::ScansTakeMemory { limit: MAX_HELD })));
        }
        Ok(match self.store.read(|tx| tx.scan(scan_key, usize::MAX).map_err(Error::from))? {
            ScanLookup::Read(stored) => Some(stored.map_err(refused).and_then(|scan| held.add(scan_key, scan))),
            ScanLookup::Absent | ScanLookup::TooLong => None,
        })
    }

    /// On a thread of the repository.
    fn run(self: &Arc<Self>, guard: &JobGuard, repository: &Repository) {
        let JobGuard { key, job, .. } = guard;
        if job.begun.swap(true, Ordering::SeqCst) {
            return;
        }
        let scan_key = &key.0;
        // Finished between the question of who wants it and this job.
        if let Ok(Some(known)) = self.cached(scan_key) {
            job.finish(known);
            self.forget(key, job);
            return;
        }
        let since = Instant::now();
        let scanned = repository.layer(&scan_key.digest).and_then(|layer| {
            scan::scan(self.sys.as_ref(), &layer, &job.progress).map_err(|e| match e {
                scan::Error::System(e) => repository.unreadable(e),
                e => Unavailable::Unscannable(e),
            })
        });
        METRICS.record_scan(if scanned.is_ok() { "done" } else { "failed" }, since);
        if let Err(why) = &scanned {
            log::debug!("{} will be scanned when it is needed: {why}", scan_key.digest);
        }
        // The repository has nothing to do with how long the store takes.
        job.progress.heartbeat.pause();
        let stored = match &scanned {
            Ok(scan) => Some(Ok(scan)),
            Err(Unavailable::Unscannable(scan::Error::Exceeds(limit))) => Some(Err(*limit)),
            Err(_) => None,
        };
        if let Some(stored) = stored
            && let Err(e) = self.store.write(|tx| tx.put_scan(scan_key, stored).map_err(Error::from))
        {
            log::warn!("{} will be scanned again: {e}", scan_key.digest);
        }
        job.finish(scanned.and_then(|scan| self.held.lock().add(scan_key, scan)));
        self.forget(key, job);
    }

    /// Whoever comes later finds the result in the store, or scans again.
    fn forget(&self, key: &JobKey, job: &Arc<ScanJob>) {
        let mut in_progress = self.in_progress.lock();
        if in_progress.get(key).is_some_and(|(current, _)| Arc::ptr_eq(current, job)) {
            in_progress.remove(key);
        }
    }
}

impl ScanJob {
    /// The first result counts.
    fn finish(&self, finished: std::result::Result<Arc<Scan>, Unavailable>) {
        let mut result = self.result.lock();
        if result.is_none() {
            *result = Some(finished);
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Digest;
    use crate::repository::scan::Directory;
    use crate::system::Host;

    fn key(digit: char) -> ScanKey {
        let digest = Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap();
        ScanKey { digest, repository: "r".into() }
    }

    /// Every call decoded the scans of its whole chain for itself: an image within the bounds of each layer took
    /// gigabytes, and the daemon was killed at each start of a container.
    #[test]
    fn large_scans_are_shared_and_bounded_together() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("m"), None).unwrap());
        let scheduler = ScanScheduler::new(Arc::clone(&store), Arc::new(Host));
        let known = |digit| scheduler.shared.cached(&key(digit)).unwrap().unwrap();
        let deleted = (0..150_000).map(|n| format!("{n}").into()).collect();
        let large = Scan { directories: vec![Directory { deleted, ..Directory::default() }] };
        let digits = ['a', 'b', 'c', 'd', 'e', 'f', '0', '1', '2', '3', '4', '5'];
        for digit in digits {
            store.write(|tx| tx.put_scan(&key(digit), Ok(&large)).map_err(Error::from)).unwrap();
        }
        store
            .write(|tx| {
                tx.put_scan(&key('9'), Ok(&Scan { directories: vec![Directory::default()] })).map_err(Error::from)
            })
            .unwrap();
        let first = known('a').unwrap();
        assert!(Arc::ptr_eq(&first, &known('a').unwrap()), "two calls hold the same scan twice");
        let mut held = vec![first];
        let refused = digits[1..].iter().find_map(|digit| known(*digit).map(|scan| held.push(scan)).err());
        assert_eq!(refused, Some(Unavailable::ScansTakeMemory { limit: MAX_HELD }));
        let bytes: usize = held.iter().map(|scan| scan.memory()).sum();
        assert!((MAX_HELD..MAX_HELD + large.memory()).contains(&bytes), "{bytes}");
        assert!(known('9').is_ok(), "ordinary layers are attached meanwhile");
        let small = Scan { directories: vec![Directory::default()] };
        assert!(scheduler.shared.held.lock().add(&key('8'), small).is_ok(), "so are those that were just scanned");
        // It is no reason to download a layer that is pulled.
        assert_eq!(scheduler.refusal(&key('5')).unwrap(), None);
        held.clear();
        assert!(known('5').is_ok());
    }
}
