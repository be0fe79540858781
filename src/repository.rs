//! A repository of CernVM-FS with unpacked layers, through all mounts of it.
//!
//! Each system call on a repository may hang. So it runs on one of the repository's own threads, and callers wait for it
//! within bounds: `Repository::call` and `spawn` are the only ways in. The threads, and all that is known of the
//! repository's health, belong to the `MountGeneration` on which a call was begun; a new mount is a new generation.
//! Files: `layout` (what is published where), `generation` (one mount), `call` (a job and the wait for it), `executor`
//! (the threads), `health`, `server_health` and `availability` (how the mount is), `scan` (markers in layers), `status`
//! and `owners` (what admins are told), `client` (the process that serves the mount).
#![forbid(unsafe_code)]

mod availability;
mod call;
pub mod client;
pub mod executor;
mod generation;
pub mod health;
mod layout;
pub mod manifest;
pub mod owners;
pub mod scan;
pub mod server_health;
mod status;
mod unavailable;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::call::{JobHandle, SharedResult};
use self::executor::{PoolSize, ThreadBudget};
pub use self::generation::MountGeneration;
use self::generation::{PathProbe, RepositorySettings};
pub use self::layout::RepositoryState;
use self::layout::{FQRN_XATTR, LAYER_ROOT, LAYERS, layer_path, lists_own_attributes};
pub use self::status::{HIDE_ATTRIBUTES, RepositoryStatus, own_attributes};
pub use self::unavailable::{Remedy, Unavailable};
use crate::model::Digest;
use crate::sync::Mutex;
use crate::system::Sys;

const CALL_THREADS: PoolSize = PoolSize { target: 4, max: 16 };
const SCAN_THREADS: PoolSize = PoolSize { target: 2, max: 6 };
/// Threads of one repository that make calls, scan, or wait for a lost server, over all its mounts.
const MAX_THREADS: usize = 96;
/// Threads of one repository that probe, over all its mounts.
const MAX_PROBE_THREADS: usize = 16;
/// A caller waits for a repository that makes progress longer than for one that does not answer, by this factor.
const TOTAL_WAIT_FACTOR: u32 = 6;

pub struct Repository {
    settings: Arc<RepositorySettings>,
    current: Mutex<Arc<MountGeneration>>,
}

impl Repository {
    /// Calls that run at once.
    pub const PARALLELISM: usize = CALL_THREADS.target;

    /// `timeout` bounds each wait for an answer.
    pub fn new(name: String, path: PathBuf, timeout: Duration, sys: Arc<dyn Sys>) -> Self {
        let threads = ThreadBudget::new(MAX_THREADS, MAX_PROBE_THREADS);
        let (calls, scans) = (CALL_THREADS, SCAN_THREADS);
        let mount = Arc::new(PathProbe { path: path.clone(), sys: Arc::clone(&sys) });
        Self::with_settings(RepositorySettings { name, path, timeout, sys, mount, calls, scans, threads })
    }

    fn with_settings(settings: RepositorySettings) -> Self {
        let settings = Arc::new(settings);
        let current = Mutex::new(Arc::new(MountGeneration::new(Arc::clone(&settings), 0)));
        Self { settings, current }
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

    /// The path of an unpacked layer, if the repository has it. This asks nobody.
    pub fn layer_path(&self, digest: &Digest) -> PathBuf {
        self.path().join(layer_path(digest))
    }

    /// When a call that begins now fails even if the repository makes progress.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.timeout() * TOTAL_WAIT_FACTOR
    }

    /// The generation of what is mounted now.
    pub fn generation(&self) -> Arc<MountGeneration> {
        let mut current = self.current.lock();
        if let Some(next) = current.close_if_replaced() {
            *current = Arc::new(next);
        }
        Arc::clone(&current)
    }

    /// The generation of what is mounted now, or an error if the mount does not answer.
    pub fn live_generation(&self) -> Result<Arc<MountGeneration>, Unavailable> {
        loop {
            let generation = self.generation();
            match generation.check() {
                Ok(()) => return Ok(generation),
                // The probe that was waited for has found another mount.
                Err(_) if generation.health.was_replaced() => {}
                Err(why) => return Err(why),
            }
        }
    }

    /// Runs `job` on a thread of the repository. A result that comes after the handle was dropped goes to
    /// `on_abandoned`, on that thread.
    pub fn spawn<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Arc<MountGeneration>) -> Result<T, Unavailable> + Send + 'static,
        on_abandoned: impl FnOnce(T) + Send + 'static,
    ) -> JobHandle<T> {
        match self.live_generation() {
            Ok(generation) => generation.spawn(job, on_abandoned),
            Err(why) => JobHandle::failed(why),
        }
    }

    /// Runs `job` on a thread of the repository and waits for the result.
    pub fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Arc<MountGeneration>) -> Result<T, Unavailable> + Send + 'static,
    ) -> Result<T, Unavailable> {
        let deadline = self.deadline();
        self.spawn(job, drop).wait(deadline)
    }

    /// Why a pull does not ask the repository: for each of its layers it would wait until the client gives up.
    pub fn refusal_of_pulls(&self) -> Option<Unavailable> {
        let unreachable = self.generation().server.refusal_of_pulls()?;
        Some(Unavailable::ServerUnreachable(Box::new(unreachable)))
    }

    /// Whether the repository can be used, as of a quarter of a minute ago if it is asked that often. Waits for nothing.
    pub fn is_healthy_cached(&self) -> bool {
        self.generation().is_healthy_cached()
    }

    /// Logs, in the background, whether the repository is mounted. `state_device` is the device of the state root.
    pub fn log_availability(&self, state_device: Option<u64>) {
        let generation = self.generation();
        let logged = generation.spawn_background(move |generation| generation.log_availability(state_device));
        if let Err(exhausted) = logged {
            log::warn!(event = "repository_not_probed", repository = self.name();
                "repository {}: {}", self.name(), generation.report_exhausted(exhausted));
        }
    }

    /// How the repository is, for an admin. Waits for it within bounds.
    pub fn status(&self) -> Result<RepositoryStatus, Unavailable> {
        self.call(MountGeneration::status)
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;
#[cfg(test)]
mod tests;
