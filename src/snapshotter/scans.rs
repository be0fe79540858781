//! Schedules the scans of published layers: each layer is scanned once, in the background, and the result is stored.
//!
//! A scan runs on a thread of the repository, so one that hangs blocks nobody else; a caller that needs the result waits
//! for it within bounds. The scheduler is in this room and not in `repository`, because it uses the store.
//! Invariant: a scan that was begun or queued ends with a result or an error, even if its thread panics or cannot be
//! started.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Error, Result};
use crate::metrics::METRICS;
use crate::repository::executor::Priority;
use crate::repository::scan::{self, Limit, Progress, Scan, ScanKey};
use crate::repository::{MountGeneration, Repository, SharedResult, Unavailable};
use crate::store::{ScanLookup, Store};
use crate::system::Sys;

/// Capacity of the queue for scans that no container needs yet. When it is full, a pulled layer is not scanned, and the
/// first container that needs it waits for the scan.
const MAX_QUEUED: usize = 4096;

/// The size of a small record, in bytes. Scans with a small record are not shared between calls and not counted.
const SMALL_RECORD: usize = 512;
/// The memory of a scan with a small record at most: a name takes three bytes or more in a record, and a hundred in memory.
const SMALL_SCAN: usize = SMALL_RECORD * 40;
/// The memory of all scans of layers that are being attached, in bytes.
const MAX_SHARED_BYTES: usize = 128 << 20;

#[derive(Clone)]
pub struct ScanScheduler {
    shared: Arc<Inner>,
}

/// Names a job. A scan hangs with the mount that it reads, so the next mount gets a job of its own.
#[derive(Clone, PartialEq, Eq, Hash)]
struct ScanJobKey {
    scan: ScanKey,
    generation: u64,
}

struct Inner {
    store: Arc<Store>,
    sys: Arc<dyn Sys>,
    /// The jobs that are queued or run, so that no layer is scanned twice at the same time.
    in_progress: Mutex<HashMap<ScanJobKey, ScanEntry>>,
    large_scans: Mutex<LargeScans>,
}

/// The large scans that calls use at the moment. Calls share them, and all together are bounded.
#[derive(Default)]
struct LargeScans(HashMap<ScanKey, LargeScan>);

struct LargeScan {
    scan: Weak<Scan>,
    bytes: usize,
}

impl LargeScans {
    fn get(&self, key: &ScanKey) -> Option<Arc<Scan>> {
        self.0.get(key)?.scan.upgrade()
    }

    fn has_room(&mut self) -> bool {
        self.0.retain(|_, large| large.scan.strong_count() > 0);
        self.0.values().map(|large| large.bytes).sum::<usize>() < MAX_SHARED_BYTES
    }

    /// Shares the scan if it is large. Fails if the other large scans leave no room for it.
    fn share(&mut self, key: &ScanKey, scan: Scan) -> ScanResult {
        let bytes = scan.memory();
        if bytes <= SMALL_SCAN {
            return Ok(Arc::new(scan));
        }
        // Another call may have decoded the same scan meanwhile.
        if let Some(shared) = self.get(key) {
            return Ok(shared);
        }
        if !self.has_room() {
            return Err(Unavailable::ScansTakeMemory { limit: MAX_SHARED_BYTES });
        }
        let scan = Arc::new(scan);
        self.0.insert(key.clone(), LargeScan { scan: Arc::downgrade(&scan), bytes });
        Ok(scan)
    }
}

pub type ScanResult = std::result::Result<Arc<Scan>, Unavailable>;

struct ScanEntry {
    job: Arc<ScanJob>,
    guard: Weak<JobGuard>,
}

/// A scan that is queued or runs.
#[derive(Default)]
pub struct ScanJob {
    has_started: AtomicBool,
    progress: Progress,
    result: SharedResult<Arc<Scan>>,
}

/// Held by each queued closure of a job. If the last closure is dropped without a result, because it panicked or never
/// ran, the callers that wait are told.
struct JobGuard {
    shared: Arc<Inner>,
    key: ScanJobKey,
    job: Arc<ScanJob>,
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        let why = if self.job.has_started.load(Ordering::SeqCst) {
            Unavailable::ScanFailed(scan::Error::Panicked)
        } else {
            Unavailable::NoThread
        };
        self.job.result.set(Err(why));
        self.shared.remove(&self.key, &self.job);
    }
}

/// The result of a scan, or the scan that will have it.
pub enum ScanHandle {
    Finished(ScanResult),
    Running { job: Arc<ScanJob>, generation: Arc<MountGeneration> },
}

fn refused(limit: Limit) -> Unavailable {
    Unavailable::ScanFailed(scan::Error::Exceeds(limit))
}

impl ScanScheduler {
    pub fn new(store: Arc<Store>, sys: Arc<dyn Sys>) -> Self {
        let (in_progress, large_scans) = (Mutex::default(), Mutex::default());
        Self { shared: Arc::new(Inner { store, sys, in_progress, large_scans }) }
    }

    /// Why the layer cannot be used, if an earlier scan has found that it exceeds a limit.
    pub fn refusal(&self, scan_key: &ScanKey) -> Result<Option<Unavailable>> {
        // The record of a refusal is small.
        Ok(match self.shared.read_small(scan_key)? {
            ScanLookup::Read(Err(limit)) => Some(refused(limit)),
            ScanLookup::Read(Ok(_)) | ScanLookup::Absent | ScanLookup::TooLong => None,
        })
    }

    /// Begins a scan of the layer, unless its result is stored or it is in progress. A scan that a caller waits for is
    /// `Next`.
    pub fn start(&self, scan_key: &ScanKey, repository: &Repository, priority: Priority) -> Result<ScanHandle> {
        if let Some(result) = self.shared.cached(scan_key)? {
            return Ok(ScanHandle::Finished(result));
        }
        let generation = match repository.live_generation() {
            Ok(generation) => generation,
            Err(why) => return Ok(ScanHandle::Finished(Err(why))),
        };
        let key = ScanJobKey { scan: scan_key.clone(), generation: generation.number() };
        let mut in_progress = self.shared.in_progress.lock();
        let current = in_progress.get(&key).and_then(|entry| Some((Arc::clone(&entry.job), entry.guard.upgrade()?)));
        let is_new = current.is_none();
        if is_new && priority == Priority::Last && in_progress.len() >= MAX_QUEUED {
            return Ok(ScanHandle::Finished(Err(Unavailable::BeingScanned { directories: 0 })));
        }
        let (job, guard) = current.unwrap_or_else(|| {
            let job = Arc::<ScanJob>::default();
            let guard = JobGuard { shared: Arc::clone(&self.shared), key: key.clone(), job: Arc::clone(&job) };
            (job, Arc::new(guard))
        });
        if is_new {
            in_progress.insert(key, ScanEntry { job: Arc::clone(&job), guard: Arc::downgrade(&guard) });
        }
        drop(in_progress);
        // A job that is still queued gets a second place further in front. The closure that runs first does the scan.
        if is_new || (priority == Priority::Next && !job.has_started.load(Ordering::SeqCst)) {
            let run = move |generation: &Arc<MountGeneration>| guard.shared.run(&guard, generation);
            if let Err(why) = generation.spawn_scan(priority, job.progress.heartbeat.clone(), run) {
                return Ok(ScanHandle::Finished(Err(why)));
            }
        }
        Ok(ScanHandle::Running { job, generation })
    }
}

impl ScanHandle {
    /// The result, if it comes before `deadline`. The scan goes on in any case.
    pub fn wait(self, deadline: Instant) -> ScanResult {
        let (job, generation) = match self {
            Self::Finished(result) => return result,
            Self::Running { job, generation } => (job, generation),
        };
        // A scan that is queued is no sign that the repository hangs.
        let idle_for = || {
            let has_started = job.has_started.load(Ordering::SeqCst);
            if has_started { job.progress.heartbeat.idle_for() } else { Duration::ZERO }
        };
        let slow = || Unavailable::BeingScanned { directories: job.progress.directories.load(Ordering::Relaxed) };
        job.result.wait(&generation, deadline, idle_for, slow)
    }
}

impl Inner {
    fn read_small(&self, scan_key: &ScanKey) -> Result<ScanLookup> {
        self.store.read(|tx| tx.scan(scan_key, SMALL_RECORD).map_err(Error::from))
    }

    /// The stored result. Large scans are decoded one after the other, so that no two calls decode the same one, and the
    /// limit of memory is exceeded by one scan at most.
    fn cached(&self, scan_key: &ScanKey) -> Result<Option<ScanResult>> {
        match self.read_small(scan_key)? {
            ScanLookup::Absent => return Ok(None),
            ScanLookup::Read(stored) => return Ok(Some(stored.map(Arc::new).map_err(refused))),
            ScanLookup::TooLong => {}
        }
        let mut large_scans = self.large_scans.lock();
        if let Some(scan) = large_scans.get(scan_key) {
            return Ok(Some(Ok(scan)));
        }
        if !large_scans.has_room() {
            return Ok(Some(Err(Unavailable::ScansTakeMemory { limit: MAX_SHARED_BYTES })));
        }
        Ok(match self.store.read(|tx| tx.scan(scan_key, usize::MAX).map_err(Error::from))? {
            ScanLookup::Read(stored) => {
                Some(stored.map_err(refused).and_then(|scan| large_scans.share(scan_key, scan)))
            }
            ScanLookup::Absent | ScanLookup::TooLong => None,
        })
    }

    /// Does the job, on a thread of the repository.
    fn run(&self, guard: &JobGuard, generation: &MountGeneration) {
        let JobGuard { key, job, .. } = guard;
        if job.has_started.swap(true, Ordering::SeqCst) {
            return;
        }
        // An earlier job may have ended after this one was found to be necessary.
        let result = match self.cached(&key.scan) {
            Ok(Some(known)) => known,
            Ok(None) | Err(_) => self.scan_and_store(&key.scan, job, generation),
        };
        job.result.set(result);
        self.remove(key, job);
    }

    fn scan_and_store(&self, scan_key: &ScanKey, job: &ScanJob, generation: &MountGeneration) -> ScanResult {
        let since = Instant::now();
        let scanned = generation.layer(&scan_key.digest).and_then(|layer| {
            scan::scan(self.sys.as_ref(), &layer, &job.progress, generation.threads()).map_err(|e| match e {
                scan::Error::System(e) => generation.report_failed_call(e),
                e => Unavailable::ScanFailed(e),
            })
        });
        METRICS.record_scan(if scanned.is_ok() { "done" } else { "failed" }, since);
        if let Err(why) = &scanned {
            log::debug!("{} will be scanned when it is needed: {why}", scan_key.digest);
        }
        // From here on the repository is not blamed for the time that the store takes.
        job.progress.heartbeat.pause();
        let to_store = match &scanned {
            Ok(scan) => Some(Ok(scan)),
            Err(Unavailable::ScanFailed(scan::Error::Exceeds(limit))) => Some(Err(*limit)),
            Err(_) => None,
        };
        if let Some(to_store) = to_store
            && let Err(e) = self.store.write(|tx| tx.put_scan(scan_key, to_store).map_err(Error::from))
        {
            log::warn!(event = "scan_not_stored", repository = scan_key.repository.as_str();
                "cannot store the scan of layer {}, so it will be scanned again: {e}", scan_key.digest);
        }
        scanned.and_then(|scan| self.large_scans.lock().share(scan_key, scan))
    }

    /// Forgets a job that has ended. Later callers find its result in the store, or scan again.
    fn remove(&self, key: &ScanJobKey, job: &Arc<ScanJob>) {
        let mut in_progress = self.in_progress.lock();
        if in_progress.get(key).is_some_and(|current| Arc::ptr_eq(&current.job, job)) {
            in_progress.remove(key);
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

    /// Each call decoded the scans of its chain for itself. An image whose layers were all within their limits took
    /// gigabytes, and the daemon was killed whenever a container was started.
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
        assert!(Arc::ptr_eq(&first, &known('a').unwrap()), "two calls have decoded the same scan");
        let mut scans = vec![first];
        let refused = digits[1..].iter().find_map(|digit| known(*digit).map(|scan| scans.push(scan)).err());
        assert_eq!(refused, Some(Unavailable::ScansTakeMemory { limit: MAX_SHARED_BYTES }));
        let bytes: usize = scans.iter().map(|scan| scan.memory()).sum();
        assert!((MAX_SHARED_BYTES..MAX_SHARED_BYTES + large.memory()).contains(&bytes), "{bytes}");
        assert!(known('9').is_ok(), "ordinary layers are attached meanwhile");
        let small = Scan { directories: vec![Directory::default()] };
        assert!(
            scheduler.shared.large_scans.lock().share(&key('8'), small).is_ok(),
            "so are those that were just scanned"
        );
        // It is no reason to download a layer that is pulled.
        assert_eq!(scheduler.refusal(&key('5')).unwrap(), None);
        scans.clear();
        assert!(known('5').is_ok());
    }
}
