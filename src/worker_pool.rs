//! A thread pool with a bounded queue, for jobs that may block.
//!
//! It must not know what the jobs do: no snapshot, no gRPC. Its invariants:
//! - Every job gets exactly one result: what it returned, or a `JobError`.
//! - A full queue refuses a job at once. It does not grow, and the submitter does not wait.
//! - A panic fails only the job that panicked.
//! - A job whose deadline has passed is not started.
//! - Continuations, which are further steps of work that has begun, have a queue of their own that is never full.
//!   Workers alternate between the two queues, so that neither starves the other.
//!
//! A growing pool is for jobs that wait most of the time: it has one thread, and more while there are jobs for them.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError, Sender, TrySendError, bounded, select_biased, unbounded};
use parking_lot::{Condvar, Mutex};

use crate::logging::panic_message;
use crate::metrics::PoolState;

/// Why a job has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobError {
    /// `capacity` jobs are waiting already.
    QueueFull { capacity: usize },
    /// The caller's deadline passed before a worker was free.
    DeadlinePassed,
    /// The pool accepts no more jobs.
    Stopping,
    /// The job panicked with this message.
    Panicked(String),
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { capacity } => {
                write!(
                    f,
                    "too many calls are waiting ({capacity}); try again later or raise \"queue\" in the configuration"
                )
            }
            Self::DeadlinePassed => f.write_str("the deadline passed while the call was waiting for a worker"),
            Self::Stopping => f.write_str("the snapshotter is stopping"),
            Self::Panicked(message) => write!(f, "the call hit a bug in the snapshotter: {message}"),
        }
    }
}

/// A queued job, which reports its result itself. It is run unless the pool passes it an error to fail with.
type Job = Box<dyn FnOnce(Result<(), JobError>) + Send>;

/// A pool of worker threads. Dropping it leaves the threads running; `drain` ends it properly.
pub struct Pool {
    name: String,
    handle: PoolHandle,
    queues: JobQueues,
}

/// Submits jobs to a pool. It is cheap to clone.
#[derive(Clone)]
pub struct PoolHandle {
    new_jobs: Sender<Job>,
    continuations: Sender<Job>,
    queue_capacity: usize,
    max_threads: usize,
    counters: Arc<Counters>,
    /// Only a growing pool has one.
    spawner: Option<Arc<ThreadSpawner>>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainOutcome {
    Completed,
    /// The time limit passed while `remaining` jobs were still waiting or running.
    TimedOut {
        remaining: usize,
    },
}

impl Pool {
    /// Creates a pool of `threads` workers that share a queue of `queue_capacity` waiting jobs. Jobs stay in the queue
    /// until `start_workers` is called.
    pub fn unstarted(name: &str, threads: usize, queue_capacity: usize) -> Self {
        let (new_jobs, new_jobs_receiver) = bounded(queue_capacity);
        let (continuations, continuations_receiver) = unbounded();
        let handle = PoolHandle {
            new_jobs,
            continuations,
            queue_capacity,
            max_threads: threads,
            counters: Arc::default(),
            spawner: None,
        };
        let queues = JobQueues { new_jobs: new_jobs_receiver, continuations: continuations_receiver };
        Self { name: name.to_owned(), handle, queues }
    }

    /// Starts one worker, and up to `max_threads` while there are jobs for them. An additional worker that had no job
    /// for `idle_timeout` ends.
    pub fn growing(name: &str, max_threads: usize, queue_capacity: usize, idle_timeout: Duration) -> io::Result<Self> {
        let mut pool = Self::unstarted(name, max_threads, queue_capacity);
        pool.spawn_workers(1)?;
        pool.handle.counters.counts.lock().threads = 1;
        let spawner = ThreadSpawner { name: pool.name.clone(), queues: pool.queues.clone(), idle_timeout };
        pool.handle.spawner = Some(Arc::new(spawner));
        Ok(pool)
    }

    /// Starts the workers of an unstarted pool. It must be called once.
    pub fn start_workers(&self) -> io::Result<()> {
        self.spawn_workers(self.handle.max_threads)
    }

    fn spawn_workers(&self, count: usize) -> io::Result<()> {
        for n in 0..count {
            let queues = self.queues.clone();
            let thread = thread::Builder::new().name(format!("{}-{n}", self.name));
            thread.spawn(move || run_jobs(&queues))?;
        }
        Ok(())
    }

    pub fn handle(&self) -> PoolHandle {
        self.handle.clone()
    }

    /// Refuses further jobs and waits for those that were accepted, for `time_limit` at most.
    pub fn drain(self, time_limit: Duration) -> DrainOutcome {
        let deadline = Instant::now() + time_limit;
        let counters = &self.handle.counters;
        let mut counts = counters.counts.lock();
        counts.is_closed = true;
        while counts.jobs > 0 {
            if counters.all_jobs_done.wait_until(&mut counts, deadline).timed_out() {
                return DrainOutcome::TimedOut { remaining: counts.jobs };
            }
        }
        // The workers are not joined. gRPC handlers may keep a `PoolHandle`, so the queues may never close. An idle
        // worker owns nothing, so it may end with the process.
        DrainOutcome::Completed
    }
}

impl PoolHandle {
    /// Runs `work` on a worker and passes its result to `on_result`. If the job is not run, `on_result` gets the
    /// reason, possibly at once and on this thread. `is_expired` is called when a worker is free.
    pub fn submit<T: 'static>(
        &self,
        is_expired: impl FnOnce() -> bool + Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
        on_result: impl FnOnce(Result<T, JobError>) + Send + 'static,
    ) {
        let Some(job) = self.new_job(is_expired, work, on_result) else { return };
        match self.new_jobs.try_send(job) {
            Ok(()) => self.spawn_worker_if_needed(),
            Err(TrySendError::Full(job)) => job(Err(JobError::QueueFull { capacity: self.queue_capacity })),
            Err(TrySendError::Disconnected(job)) => job(Err(JobError::Stopping)),
        }
    }

    /// Submits the next step of work that has begun: the queue is never too full for it. The caller must ensure that
    /// there is only one such job at a time for each `submit`.
    pub fn submit_continuation<T: 'static>(
        &self,
        is_expired: impl FnOnce() -> bool + Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
        on_result: impl FnOnce(Result<T, JobError>) + Send + 'static,
    ) {
        let Some(job) = self.new_job(is_expired, work, on_result) else { return };
        match self.continuations.send(job) {
            Ok(()) => self.spawn_worker_if_needed(),
            Err(SendError(job)) => job(Err(JobError::Stopping)),
        }
    }

    /// The state of the pool at this moment, for the metrics.
    pub fn state(&self) -> PoolState {
        let waiting = self.new_jobs.len() + self.continuations.len();
        let jobs = self.counters.counts.lock().jobs;
        let busy = jobs.saturating_sub(waiting).min(self.max_threads);
        PoolState { threads: self.max_threads, busy, waiting, max_waiting: self.queue_capacity }
    }

    /// Wraps `work` as a job. `None`: the pool is closed, and `on_result` was told so.
    fn new_job<T: 'static>(
        &self,
        is_expired: impl FnOnce() -> bool + Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
        on_result: impl FnOnce(Result<T, JobError>) + Send + 'static,
    ) -> Option<Job> {
        let Some(guard) = JobGuard::new(&self.counters) else {
            on_result(Err(JobError::Stopping));
            return None;
        };
        Some(Box::new(move |may_run| {
            let _guard = guard;
            let result = match may_run {
                Err(error) => Err(error),
                Ok(()) if is_expired() => Err(JobError::DeadlinePassed),
                Ok(()) => catch_unwind(AssertUnwindSafe(work))
                    .map_err(|panic| JobError::Panicked(panic_message(panic.as_ref()).to_owned())),
            };
            on_result(result);
        }))
    }

    /// Starts a thread of a growing pool if there are more jobs than threads.
    fn spawn_worker_if_needed(&self) {
        let Some(spawner) = &self.spawner else { return };
        let number = {
            let mut counts = self.counters.counts.lock();
            if counts.threads >= counts.jobs.min(self.max_threads) {
                return;
            }
            counts.threads += 1;
            counts.threads - 1
        };
        let (counters, spawner) = (Arc::clone(&self.counters), Arc::clone(spawner));
        let thread = thread::Builder::new().name(format!("{}-{number}", spawner.name));
        if let Err(e) = thread.spawn(move || spawner.run_jobs_until_idle(&counters)) {
            self.counters.counts.lock().threads -= 1;
            log::warn!(
                event = "pool_thread_not_started";
                "cannot start a thread, so a call waits until another one is done: {e}"
            );
        }
    }
}

/// The receiving ends of the queues, from which workers take jobs.
#[derive(Clone)]
struct JobQueues {
    new_jobs: Receiver<Job>,
    continuations: Receiver<Job>,
}

/// The queue that a worker serves first when both have jobs.
#[derive(Clone, Copy)]
enum NextQueue {
    Continuations,
    NewJobs,
}

impl JobQueues {
    /// Waits for a job. `None`: nobody can submit jobs any more, or there was none for `timeout`.
    fn next(&self, next_queue: &mut NextQueue, timeout: Option<Duration>) -> Option<Job> {
        let (first, second, queue_after) = match next_queue {
            NextQueue::Continuations => (&self.continuations, &self.new_jobs, NextQueue::NewJobs),
            NextQueue::NewJobs => (&self.new_jobs, &self.continuations, NextQueue::Continuations),
        };
        // `recv` fails on a queue that is closed and empty, while the other one may still have jobs.
        select_biased! {
            recv(first) -> job => {
                *next_queue = queue_after;
                job.or_else(|_| second.recv()).ok()
            }
            recv(second) -> job => job.or_else(|_| first.recv()).ok(),
            default(timeout.unwrap_or(Duration::MAX)) => None,
        }
    }
}

fn run_jobs(queues: &JobQueues) {
    let mut next_queue = NextQueue::Continuations;
    while let Some(job) = queues.next(&mut next_queue, None) {
        run(job);
    }
}

fn run(job: Job) {
    // `new_job` catches a panic of the work itself. This one catches a panic while the result is reported.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(Ok(())))) {
        let message = panic_message(panic.as_ref());
        log::error!(event = "job_result_lost"; "reporting the result of a job panicked: {message}");
    }
}

/// Runs the additional threads of a growing pool.
struct ThreadSpawner {
    name: String,
    queues: JobQueues,
    idle_timeout: Duration,
}

impl ThreadSpawner {
    fn run_jobs_until_idle(&self, counters: &Counters) {
        let mut next_queue = NextQueue::Continuations;
        loop {
            if let Some(job) = self.queues.next(&mut next_queue, Some(self.idle_timeout)) {
                run(job);
                continue;
            }
            let mut counts = counters.counts.lock();
            // `submit` counts its job before it decides whether to start a thread. So if a thread ends here, every
            // counted job has another one.
            if counts.threads > counts.jobs {
                counts.threads -= 1;
                return;
            }
        }
    }
}

/// Counts jobs and threads, and says when a drain is over.
#[derive(Default)]
struct Counters {
    counts: Mutex<Counts>,
    all_jobs_done: Condvar,
}

#[derive(Default)]
struct Counts {
    /// Jobs that are waiting or running.
    jobs: usize,
    /// Threads of a growing pool; 0 in others.
    threads: usize,
    /// No more jobs are accepted.
    is_closed: bool,
}

/// Counts a job until it is dropped, however the job ends.
struct JobGuard(Arc<Counters>);

impl JobGuard {
    /// `None`: the pool is closed.
    fn new(counters: &Arc<Counters>) -> Option<Self> {
        let mut counts = counters.counts.lock();
        if counts.is_closed {
            return None;
        }
        counts.jobs += 1;
        Some(Self(Arc::clone(counters)))
    }
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        let mut counts = self.0.counts.lock();
        counts.jobs -= 1;
        if counts.jobs == 0 {
            self.0.all_jobs_done.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
