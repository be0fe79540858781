//! Threads that make system calls on a repository, so that no other thread blocks there.
//!
//! A system call on a FUSE mount that hangs can neither be given a deadline nor be ended. So a caller waits beside the
//! thread and gives up in time. The pool knows jobs and not what they do: a job calls `record_progress` whenever the
//! repository has answered, and counts as stuck when it has not for long.
//! Invariants: `target` jobs run at once beside those that are stuck; there are never more than `max` threads, and never
//! more than the budget of the repository allows; a job that no thread can ever take is dropped, not kept.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, now, thread};

/// A thread that has had no job for this time ends.
const IDLE_THREAD_LIFETIME: Duration = Duration::from_secs(30);

pub type Job = Box<dyn FnOnce() + Send>;

/// When a job last had an answer. None: it does not wait for the repository at the moment.
#[derive(Clone, Debug)]
pub struct Heartbeat(Arc<Mutex<Option<Instant>>>);

impl Default for Heartbeat {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(now()))))
    }
}

impl Heartbeat {
    pub fn record(&self) {
        *self.0.lock() = Some(now());
    }

    /// From here on the job works on the local disk. The repository is not blamed for the time that takes.
    pub fn pause(&self) {
        *self.0.lock() = None;
    }

    /// The time since the last answer; zero while the job works on the local disk.
    pub fn idle_for(&self) -> Duration {
        self.0.lock().map_or(Duration::ZERO, |since| now() - since)
    }
}

crate::sync::thread_local! {
    /// The heartbeat of the job that runs on this thread.
    static CURRENT_JOB: RefCell<Option<Heartbeat>> = const { RefCell::new(None) };
}

/// Tells that the repository has answered the job on this thread. Does nothing on other threads.
pub fn record_progress() {
    CURRENT_JOB.with(|job| job.borrow().iter().for_each(Heartbeat::record));
}

/// Runs `work`, which uses the local disk only. The repository is not blamed for the time that takes.
pub fn without_repository<T>(work: impl FnOnce() -> T) -> T {
    CURRENT_JOB.with(|job| job.borrow().iter().for_each(Heartbeat::pause));
    let result = work();
    record_progress();
    result
}

/// How many threads a pool has.
#[derive(Clone, Copy, Debug)]
pub struct PoolSize {
    /// Jobs that run at once while none is stuck.
    pub target: usize,
    /// Threads at most, those included that are stuck.
    pub max: usize,
}

#[derive(Clone)]
pub struct HangTolerantPool {
    shared: Arc<Shared>,
}

struct Shared {
    repository: String,
    /// What the names of the threads begin with.
    name: &'static str,
    size: PoolSize,
    /// A job that has had no answer for longer counts as stuck.
    stuck_after: Duration,
    budget: ThreadBudget,
    state: Mutex<State>,
    job_queued: Condvar,
}

/// The number of threads that all pools and probes of a repository may have together, over all its mounts. A thread that
/// hangs in a mount which was replaced is counted until that mount's client ends.
#[derive(Clone)]
pub struct ThreadBudget {
    used: Arc<AtomicUsize>,
    max: usize,
    /// Further threads, for probes only: without a probe nobody would learn that the repository is back.
    max_probes: usize,
    used_by_probes: Arc<AtomicUsize>,
}

impl ThreadBudget {
    pub fn new(max: usize, max_probes: usize) -> Self {
        Self { used: Arc::default(), max, max_probes, used_by_probes: Arc::default() }
    }

    /// None: the budget is used up. The thread gives its part back when it drops the permit.
    pub fn acquire(&self) -> Option<ThreadPermit> {
        ThreadPermit::acquire(&self.used, self.max)
    }

    pub fn acquire_for_probe(&self) -> Option<ThreadPermit> {
        ThreadPermit::acquire(&self.used_by_probes, self.max_probes)
    }

    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::SeqCst) + self.used_by_probes.load(Ordering::SeqCst)
    }
}

/// A thread's part of a budget.
pub struct ThreadPermit(Arc<AtomicUsize>);

impl ThreadPermit {
    fn acquire(used: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        let if_below_max = |used: usize| (used < max).then_some(used + 1);
        used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, if_below_max).ok()?;
        Some(Self(Arc::clone(used)))
    }
}

impl Drop for ThreadPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(Heartbeat, Job)>,
    idle: usize,
    /// Idle threads end at once.
    is_closed: bool,
    /// The heartbeats of the jobs that run, by the numbers of their threads.
    running: HashMap<u64, Heartbeat>,
    next_number: u64,
}

/// Where a job stands in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    Next,
    Last,
}

/// Every thread that may exist is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolExhausted {
    pub threads: usize,
}

impl HangTolerantPool {
    pub fn new(
        repository: &str,
        name: &'static str,
        size: PoolSize,
        stuck_after: Duration,
        budget: &ThreadBudget,
    ) -> Self {
        let (repository, budget) = (repository.to_owned(), budget.clone());
        let (state, job_queued) = (Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { repository, name, size, stuck_after, budget, state, job_queued }) }
    }

    /// Queues a job, whose progress `heartbeat` shows. On an error the job is dropped.
    pub fn run(&self, priority: Priority, heartbeat: Heartbeat, job: Job) -> Result<(), PoolExhausted> {
        let PoolSize { target, max } = self.shared.size;
        let mut state = self.shared.state.lock();
        let stuck = self.shared.stuck_threads(&state);
        let threads = state.running.len() + state.idle;
        if stuck >= max {
            drop(state);
            return Err(PoolExhausted { threads });
        }
        match priority {
            Priority::Next => state.jobs.push_front((heartbeat, job)),
            Priority::Last => state.jobs.push_back((heartbeat, job)),
        }
        // Another thread is started only if the idle ones do not suffice for the queue, fewer than `target` threads get on,
        // and there are fewer than `max`.
        if state.idle >= state.jobs.len() || threads - stuck >= target || threads >= max {
            self.shared.job_queued.notify_one();
            return Ok(());
        }
        // If it could not be started, a thread that gets on takes the job later.
        if self.start_thread(&mut state) || threads > stuck {
            return Ok(());
        }
        // No thread will ever take these jobs, so they are dropped, which tells whoever waits for them. That runs their
        // code, and so it is done without the lock.
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        drop(jobs);
        Err(PoolExhausted { threads })
    }

    /// Returns whether another thread was started.
    fn start_thread(&self, state: &mut State) -> bool {
        let shared = Arc::clone(&self.shared);
        let repository = self.shared.repository.as_str();
        let Some(permit) = shared.budget.acquire() else {
            log::error!(event = "repository_threads_exhausted", repository = repository;
                "repository {repository}: cannot start a thread: all {} are in use, most of them in mounts that were \
                 replaced; end the client processes of those mounts", shared.budget.max);
            return false;
        };
        // The thread is counted before it runs, so that the next caller does not start one as well.
        let number = state.next_number;
        state.next_number += 1;
        state.running.insert(number, Heartbeat::default());
        let run = move || {
            shared.run_jobs(number);
            drop(permit);
        };
        let name = format!("{}-{number}", self.shared.name);
        if let Err(e) = thread::Builder::new().name(name).spawn(run) {
            state.running.remove(&number);
            log::error!(event = "repository_thread_failed", repository = repository;
                "repository {repository}: cannot start a thread: {e}");
            return false;
        }
        true
    }

    /// Ends the threads that have no job. Jobs that are queued are still run.
    pub fn close(&self) {
        self.shared.state.lock().is_closed = true;
        self.shared.job_queued.notify_all();
    }

    /// The time since any job has had an answer; zero when none runs.
    pub fn idle_for(&self) -> Duration {
        self.shared.state.lock().running.values().map(Heartbeat::idle_for).min().unwrap_or_default()
    }
}

impl Shared {
    fn stuck_threads(&self, state: &State) -> usize {
        state.running.values().filter(|heartbeat| heartbeat.idle_for() > self.stuck_after).count()
    }

    fn run_jobs(&self, number: u64) {
        while let Some((heartbeat, job)) = self.next_job(number) {
            CURRENT_JOB.with(|current| *current.borrow_mut() = Some(heartbeat));
            // A job catches its own panics; this is for a panic in what is called for an abandoned result.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                log::error!(event = "repository_job_panicked", repository = self.repository.as_str();
                    "repository {}: a job panicked; its thread goes on", self.repository);
            }
            CURRENT_JOB.with(|current| *current.borrow_mut() = None);
        }
    }

    /// None: the thread `number` has to end.
    fn next_job(&self, number: u64) -> Option<(Heartbeat, Job)> {
        let mut state = self.state.lock();
        state.running.remove(&number);
        let others = state.running.len() + state.idle - self.stuck_threads(&state);
        // While this thread was stuck, another one was started in its place.
        if others >= self.size.target && state.jobs.is_empty() {
            return None;
        }
        state.idle += 1;
        let until = now() + IDLE_THREAD_LIFETIME;
        while state.jobs.is_empty() && !state.is_closed {
            if self.job_queued.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.idle -= 1;
        let (heartbeat, job) = state.jobs.pop_front()?;
        heartbeat.record();
        state.running.insert(number, heartbeat.clone());
        Some((heartbeat, job))
    }
}
