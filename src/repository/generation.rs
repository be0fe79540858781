//! One mount of a repository, from the first call on it until another mount has taken its place.
//!
//! A generation owns all that is true of this mount only: its threads with their heartbeats, its health, the health of
//! its server, the cached availability, and what was read once. All of that ends with the generation, so what hangs in a
//! mount that was replaced is no news of the next one. Only the budget of threads is shared by all generations, because
//! threads that hang go on using memory. The states are those of `health`; `docs/design.md` has the diagram.
//! Invariant: a job keeps the generation on which it was begun, and reports its failures there and nowhere else.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::availability::AvailabilityCache;
use super::call::WaitError;
use super::executor::{HangTolerantPool, Heartbeat, Job, PoolExhausted, PoolSize, Priority, ThreadBudget};
use super::health::{Health, MountProbe};
use super::layout;
use super::owners::OwnerSample;
use super::server_health::{self, RepositoryServer, ServerHealth, Unreachable};
use super::{TOTAL_WAIT_FACTOR, Unavailable};
use crate::sync::atomic::AtomicBool;
use crate::sync::{Mutex, OnceLock};
use crate::system::{self, Sys};

/// What is the same for all mounts of a repository.
pub(super) struct RepositorySettings {
    pub name: String,
    pub path: PathBuf,
    /// How long a caller waits without an answer.
    pub timeout: Duration,
    pub sys: Arc<dyn Sys>,
    pub mount: Arc<dyn MountProbe>,
    /// Threads for calls.
    pub calls: PoolSize,
    /// Threads that begin scans; each scan has a few helpers.
    pub scans: PoolSize,
    pub threads: ThreadBudget,
}

pub struct MountGeneration {
    settings: Arc<RepositorySettings>,
    number: u64,
    pub(super) calls: HangTolerantPool,
    scans: HangTolerantPool,
    pub(super) health: Health,
    pub(super) server: ServerHealth,
    pub(super) availability: AvailabilityCache,
    /// The start time of the last successful `require_usable`. A caller that began earlier need not check again.
    pub(super) shown_usable_at: Mutex<Option<Instant>>,
    pub(super) client_attributes: OnceLock<Arc<Vec<OsString>>>,
    /// Whether a sample of the layers is being read, or has shown who owns the files.
    pub(super) is_sampled: AtomicBool,
    /// The last sample, as it was logged.
    pub(super) sample: Mutex<Option<OwnerSample>>,
}

/// Idle threads would wait for jobs that can no longer come, so they are ended.
impl Drop for MountGeneration {
    fn drop(&mut self) {
        self.close();
    }
}

/// Probes whatever is mounted at `path`.
pub(super) struct PathProbe {
    pub path: PathBuf,
    pub sys: Arc<dyn Sys>,
}

impl MountProbe for PathProbe {
    fn probe(&self) -> Result<(), String> {
        layout::probe(self.sys.as_ref(), &self.path).map_err(|why| why.to_string())
    }

    fn device(&self) -> Option<u64> {
        self.sys.mounted_fuse(&self.path).ok().flatten()
    }
}

impl MountGeneration {
    pub(super) fn new(settings: Arc<RepositorySettings>, number: u64) -> Self {
        let RepositorySettings { name, path, timeout, sys, mount, calls, scans, threads } = &*settings;
        let probe_server = {
            let (path, sys) = (path.clone(), Arc::clone(sys));
            Box::new(move |below_root: &Path| server_health::ProbeResult {
                result: layout::list_first_entry(sys.as_ref(), &path, below_root),
                io_errors: server_health::io_errors(sys.as_ref(), &path).unwrap_or(0),
            })
        };
        Self {
            number,
            calls: HangTolerantPool::new(name, "repository", *calls, *timeout, threads),
            scans: HangTolerantPool::new(name, "scan", *scans, *timeout, threads),
            health: Health::new(name, *timeout, threads, Arc::clone(mount)),
            server: ServerHealth::new(name, threads, probe_server),
            availability: AvailabilityCache::default(),
            shown_usable_at: Mutex::default(),
            client_attributes: OnceLock::new(),
            is_sampled: AtomicBool::new(false),
            sample: Mutex::default(),
            settings,
        }
    }

    /// The generation of the mount that has taken the place of this one, which ends. None: there is no other mount.
    pub(super) fn close_if_replaced(&self) -> Option<Self> {
        if !self.health.is_replaced() {
            return None;
        }
        self.close();
        Some(Self::new(Arc::clone(&self.settings), self.number + 1))
    }

    /// Lets idle threads end now, and busy ones after their jobs. Threads that hang end when their mount's client does.
    pub(super) fn close(&self) {
        self.health.close();
        self.server.close();
        self.calls.close();
        self.scans.close();
    }

    /// The place of this mount among those of the repository, in the order of time.
    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn name(&self) -> &str {
        &self.settings.name
    }

    pub fn path(&self) -> &Path {
        &self.settings.path
    }

    pub fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    pub fn sys(&self) -> &dyn Sys {
        self.settings.sys.as_ref()
    }

    pub fn threads(&self) -> &ThreadBudget {
        &self.settings.threads
    }

    /// Fails if the mount does not answer, after a moment in which it may come back.
    pub(super) fn check(&self) -> Result<(), Unavailable> {
        self.health.check().map_err(Unavailable::KnownDown)
    }

    /// The error of a caller whose wait ended without a result; `slow` is the error if its deadline has passed.
    pub(super) fn wait_failed(&self, error: WaitError, slow: impl FnOnce() -> Unavailable) -> Unavailable {
        match (error, self.health.outage()) {
            (WaitError::NoProgress, Some(outage)) => Unavailable::KnownDown(outage),
            (WaitError::NoProgress, None) => self.mark_down(Unavailable::NoAnswer { limit: self.timeout() }),
            (WaitError::DeadlineExceeded, _) => slow(),
        }
    }

    pub(super) fn too_slow(&self) -> Unavailable {
        Unavailable::Slow { limit: self.timeout() * TOTAL_WAIT_FACTOR }
    }

    pub(super) fn report_exhausted(&self, PoolExhausted { threads }: PoolExhausted) -> Unavailable {
        // Without a thread the repository was not asked, so nothing is known about it. Otherwise all threads are stuck in
        // it, so it is down.
        if threads == 0 { Unavailable::NoThread } else { self.mark_down(Unavailable::ThreadsExhausted { threads }) }
    }

    fn mark_down(&self, why: Unavailable) -> Unavailable {
        self.health.mark_down(why.to_string());
        why
    }

    /// Turns a failed system call on the repository into an error, and marks the mount as down if the error says so.
    pub fn report_failed_call(&self, error: system::Error) -> Unavailable {
        if error.is_dead() {
            self.health.mark_down(error.to_string());
        }
        match self.server_outage(&error) {
            Some(unreachable) => Unavailable::ServerUnreachable(Box::new(unreachable)),
            None => Unavailable::Unreadable(error),
        }
    }

    /// Does what `report_failed_call` does if `why` is a failed system call; any other failure is returned unchanged.
    pub(super) fn report(&self, why: Unavailable) -> Unavailable {
        match why {
            Unavailable::Unreadable(e) => self.report_failed_call(e),
            other => other,
        }
    }

    /// A client of CernVM-FS fails with an input/output error when it cannot reach its server.
    fn server_outage(&self, error: &system::Error) -> Option<Unreachable> {
        let below_root = error.path.strip_prefix(self.path()).ok().filter(|_| error.errno == Errno::EIO)?;
        let server = RepositoryServer::read(self.sys(), self.path())?;
        Some(self.server.report_error(below_root.to_owned(), error.clone(), server))
    }

    /// Queues a scan, on threads that do nothing else. `scan` stores its result; the caller gets none from here.
    pub fn spawn_scan(
        self: &Arc<Self>,
        priority: Priority,
        heartbeat: Heartbeat,
        scan: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<(), Unavailable> {
        self.scans.run(priority, heartbeat, self.job(scan)).map_err(|exhausted| self.report_exhausted(exhausted))
    }

    /// Queues a call that nobody waits for.
    pub(super) fn spawn_background(
        self: &Arc<Self>,
        call: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<(), PoolExhausted> {
        self.calls.run(Priority::Last, Heartbeat::default(), self.job(call))
    }

    fn job(self: &Arc<Self>, job: impl FnOnce(&Arc<Self>) + Send + 'static) -> Job {
        let generation = Arc::clone(self);
        Box::new(move || job(&generation))
    }

    /// Whether the mount can be used, as far as that is known. If nothing recent is known, a probe is begun, which nobody
    /// waits for.
    pub(super) fn is_healthy_cached(self: &Arc<Self>) -> bool {
        let is_up = self.health.outage().is_none();
        if is_up && let Some(probe) = self.availability.try_begin_probe() {
            // If no thread can be started, the closure is dropped with `probe`, whose `drop` records "unavailable".
            let _ = self.spawn_background(move |generation| {
                let is_available = generation.check_layers_directory().is_ok();
                if is_available {
                    generation.health.record_device();
                }
                probe.record(is_available);
            });
        }
        is_up && self.availability.is_available(self.timeout()) && self.server.outage().is_none()
    }
}
