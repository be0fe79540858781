//! Calls to a repository: a job on one of its threads, and the caller that waits for the result.
//!
//! A caller waits no longer than its deadline, and gives up before when the repository makes no progress or is known to
//! be down. Invariants: each job that was begun has its result delivered to the caller or, if the caller has given up,
//! to `on_abandoned`; the caller of a job that never ran is told so at once.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Unavailable;
use super::executor::{Heartbeat, PoolExhausted, Priority};
use super::generation::MountGeneration;
use crate::metrics::METRICS;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex, now};

/// How often a caller that waits checks its deadline and the health of the repository.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The result of a job, once it is there. Dropping the handle abandons the job.
pub struct JobHandle<T>(Result<PendingJob<T>, Unavailable>);

struct PendingJob<T> {
    result: Arc<JobResult<T>>,
    generation: Arc<MountGeneration>,
}

/// How long a caller waits.
#[derive(Clone, Copy, Debug)]
struct WaitLimits {
    /// The longest time without an answer of the repository to the job.
    pub no_progress: Duration,
    deadline: Instant,
}

/// Why a caller waits no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitError {
    /// The repository does not answer.
    NoProgress,
    /// The repository answers, and the job takes too long.
    DeadlineExceeded,
}

/// Waits until `result` has something in `state`, which `changed` tells, or until it is pointless to wait.
/// `idle_for` is the time since the repository has answered the job, or the jobs before it in the queue.
fn wait<S, T>(
    (state, changed): (&Mutex<S>, &Condvar),
    limits: WaitLimits,
    generation: &MountGeneration,
    idle_for: impl Fn() -> Duration,
    mut result: impl FnMut(&mut S) -> Option<T>,
) -> Result<T, WaitError> {
    let mut state = state.lock();
    loop {
        if let Some(result) = result(&mut state) {
            return Ok(result);
        }
        let (now, idle) = (now(), idle_for());
        // If another caller has waited in vain already, this one does not wait as long.
        if idle >= limits.no_progress || generation.health.is_waiting_pointless() {
            return Err(WaitError::NoProgress);
        }
        if now >= limits.deadline {
            return Err(WaitError::DeadlineExceeded);
        }
        let until = (now + POLL_INTERVAL.min(limits.no_progress.saturating_sub(idle))).min(limits.deadline);
        changed.wait_until(&mut state, until);
    }
}

/// A result that several callers wait for.
pub struct SharedResult<T> {
    result: Mutex<Option<Result<T, Unavailable>>>,
    changed: Condvar,
}

impl<T> Default for SharedResult<T> {
    fn default() -> Self {
        Self { result: Mutex::new(None), changed: Condvar::new() }
    }
}

impl<T: Clone> SharedResult<T> {
    /// Sets the result, unless it is there already.
    pub fn set(&self, result: Result<T, Unavailable>) {
        self.result.lock().get_or_insert(result);
        self.changed.notify_all();
    }

    /// Waits for the result of a job on `generation`. `idle_for` is the time since the repository has answered the job;
    /// `slow` is the error of a caller whose deadline passes.
    pub fn wait(
        &self,
        generation: &MountGeneration,
        deadline: Instant,
        idle_for: impl Fn() -> Duration,
        slow: impl FnOnce() -> Unavailable,
    ) -> Result<T, Unavailable> {
        let limits = WaitLimits { no_progress: generation.timeout(), deadline };
        wait((&self.result, &self.changed), limits, generation, idle_for, |result| result.clone())
            .unwrap_or_else(|e| Err(generation.wait_failed(e, slow)))
    }
}

struct JobResult<T> {
    state: Mutex<JobState<T>>,
    changed: Condvar,
    has_started: AtomicBool,
    heartbeat: Heartbeat,
}

enum JobState<T> {
    Pending,
    Ready(Result<T, Unavailable>),
    /// The caller has given up, or has taken the result.
    Abandoned,
}

impl<T> JobResult<T> {
    /// Returns the value if the caller has given up.
    fn deliver(&self, result: Result<T, Unavailable>) -> Option<T> {
        let mut state = self.state.lock();
        if matches!(*state, JobState::Pending) {
            *state = JobState::Ready(result);
            self.changed.notify_all();
            return None;
        }
        result.ok()
    }

    fn take(state: &mut JobState<T>) -> Option<Result<T, Unavailable>> {
        match std::mem::replace(state, JobState::Abandoned) {
            JobState::Ready(result) => Some(result),
            other => {
                *state = other;
                None
            }
        }
    }
}

/// The job's end of a result. If the job is dropped before it has run, the caller is told.
struct JobPromise<T>(Arc<JobResult<T>>);

impl<T> Drop for JobPromise<T> {
    fn drop(&mut self) {
        // A result that is there already stays.
        let mut state = self.0.state.lock();
        if matches!(*state, JobState::Pending) {
            *state = JobState::Ready(Err(Unavailable::NoThread));
            self.0.changed.notify_all();
        }
    }
}

impl MountGeneration {
    /// Runs `job` on a thread of the repository. A result that comes after the handle was dropped goes to
    /// `on_abandoned`, on that thread.
    pub(super) fn spawn<T: Send + 'static>(
        self: &Arc<Self>,
        job: impl FnOnce(&Arc<Self>) -> Result<T, Unavailable> + Send + 'static,
        on_abandoned: impl FnOnce(T) + Send + 'static,
    ) -> JobHandle<T> {
        JobHandle(self.start(job, on_abandoned).map_err(|exhausted| self.report_exhausted(exhausted)))
    }

    fn start<T: Send + 'static>(
        self: &Arc<Self>,
        job: impl FnOnce(&Arc<Self>) -> Result<T, Unavailable> + Send + 'static,
        on_abandoned: impl FnOnce(T) + Send + 'static,
    ) -> Result<PendingJob<T>, PoolExhausted> {
        let heartbeat = Heartbeat::default();
        let result = Arc::new(JobResult {
            state: Mutex::new(JobState::Pending),
            changed: Condvar::new(),
            has_started: AtomicBool::new(false),
            heartbeat: heartbeat.clone(),
        });
        let promise = JobPromise(Arc::clone(&result));
        let generation = Arc::clone(self);
        let run = move || {
            let result = &promise.0;
            result.has_started.store(true, Ordering::SeqCst);
            // A job whose caller has given up does not run.
            if matches!(*result.state.lock(), JobState::Abandoned) {
                return;
            }
            let value = catch_unwind(AssertUnwindSafe(|| job(&generation))).unwrap_or(Err(Unavailable::JobPanicked));
            if let Some(abandoned) = result.deliver(value) {
                on_abandoned(abandoned);
            }
        };
        self.calls.run(Priority::Last, heartbeat, Box::new(run))?;
        Ok(PendingJob { result, generation: Arc::clone(self) })
    }
}

impl<T> JobHandle<T> {
    /// The handle of a job that cannot be run.
    pub(super) fn failed(why: Unavailable) -> Self {
        Self(Err(why))
    }

    /// The result, if the job ends before `deadline` and the repository makes progress until then.
    pub fn wait(self, deadline: Instant) -> Result<T, Unavailable> {
        let job = self.0?;
        let limits = WaitLimits { no_progress: job.generation.timeout(), deadline };
        job.wait(limits)
    }
}

impl<T> PendingJob<T> {
    fn wait(self, limits: WaitLimits) -> Result<T, Unavailable> {
        let Self { result, generation } = &self;
        let since = Instant::now();
        let idle_for = || {
            let has_started = result.has_started.load(Ordering::SeqCst);
            if has_started { result.heartbeat.idle_for() } else { generation.calls.idle_for() }
        };
        let waited = wait((&result.state, &result.changed), limits, generation, idle_for, JobResult::take);
        METRICS.record_wait(generation.name(), since);
        waited.unwrap_or_else(|e| {
            // The result may have come since.
            let late = std::mem::replace(&mut *result.state.lock(), JobState::Abandoned);
            match late {
                JobState::Ready(result) => result,
                JobState::Pending | JobState::Abandoned => Err(generation.wait_failed(e, || generation.too_slow())),
            }
        })
    }
}

impl<T> Drop for PendingJob<T> {
    fn drop(&mut self) {
        let state = std::mem::replace(&mut *self.result.state.lock(), JobState::Abandoned);
        drop(state);
    }
}

#[cfg(test)]
mod tests;
