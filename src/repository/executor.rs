//! Threads on which a repository is asked, so that nobody else gets stuck there.
//!
//! A system call on a FUSE mount that hangs can neither be given a deadline nor be ended, so
//! whoever needs an answer waits beside it and walks away in time. Knows jobs, not what they
//! do: a job calls `alive` whenever it got an answer, and is stuck when it has not for long.
//! Invariants: `width` jobs run at once beside those that are stuck, never more than `most`
//! threads exist, what a job brings after its caller has left goes to `late`, and whoever waits for
//! a job that is dropped without having run is told so at once.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// A thread that has nothing to do for so long ends.
const IDLE_THREAD_LIFETIME: Duration = Duration::from_secs(30);

/// So often whoever waits looks whether there is still hope.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);

pub type Job = Box<dyn FnOnce() + Send>;

/// When something last got on. None: it does not wait for the repository at the moment.
#[derive(Clone, Debug)]
pub struct Heartbeat(Arc<Mutex<Option<Instant>>>);

impl Default for Heartbeat {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(Instant::now()))))
    }
}

impl Heartbeat {
    pub fn record(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    /// From here on the job works on the local disk: however long that takes, the repository is not
    /// to blame.
    pub fn pause(&self) {
        *self.0.lock() = None;
    }

    pub fn silence(&self) -> Duration {
        self.0.lock().map_or(Duration::ZERO, |since| since.elapsed())
    }
}

thread_local! {
    /// Of the job that runs on this thread.
    static JOB: RefCell<Option<Heartbeat>> = const { RefCell::new(None) };
}

/// The job on this thread got an answer. Does nothing on other threads.
pub fn record_progress() {
    JOB.with_borrow(|heartbeat| heartbeat.iter().for_each(Heartbeat::record));
}

/// Does `work` that is on the local disk: however long it takes, the repository is not to blame.
pub fn without_repository<T>(work: impl FnOnce() -> T) -> T {
    JOB.with_borrow(|heartbeat| heartbeat.iter().for_each(Heartbeat::pause));
    let done = work();
    record_progress();
    done
}

#[derive(Clone, Debug)]
pub struct HangTolerantPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    repository: String,
    name: String,
    width: usize,
    most: usize,
    /// A job that gets no answer for longer counts as stuck.
    stuck_after: Duration,
    budget: ThreadBudget,
    state: Mutex<State>,
    work: Condvar,
}

/// How many threads several lanes may have together: those of one repository, over all its mounts. What
/// hangs in a mount that was replaced keeps its threads until the old client ends.
#[derive(Clone, Debug)]
pub struct ThreadBudget {
    used: Arc<AtomicUsize>,
    max: usize,
}

impl ThreadBudget {
    pub fn new(max: usize) -> Self {
        Self { used: Arc::default(), max }
    }

    /// None: the budget is used up. The thread gives its part back when it drops the guard.
    pub fn take(&self) -> Option<ThreadPermit> {
        let below_max = |used: usize| (used < self.max).then_some(used + 1);
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, below_max).ok()?;
        Some(ThreadPermit(Arc::clone(&self.used)))
    }
}

/// A thread's part of a budget.
#[derive(Debug)]
pub struct ThreadPermit(Arc<AtomicUsize>);

impl Drop for ThreadPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(Heartbeat, Job)>,
    idle: usize,
    /// Nobody asks any more.
    closed: bool,
    /// Threads that work, by a number, with the pulses of their jobs.
    running: HashMap<u64, Heartbeat>,
    next_number: u64,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} jobs wait, {} run, {} threads are idle", self.jobs.len(), self.running.len(), self.idle)
    }
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

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitError {
    /// The job gets no answers, or those before it get none.
    Silent,
    /// The time is over; the job gets on.
    Late,
    Panicked,
    /// The job was dropped before it ran: no thread could be started for it.
    Dropped,
}

/// How long a result is waited for.
#[derive(Clone, Copy, Debug)]
pub struct WaitLimits {
    /// Without a sign of life.
    pub silence: Duration,
    /// In all.
    pub until: Instant,
}

/// The result of a job, once it is there. Dropped, it gives the job up.
#[derive(Debug)]
pub struct JobHandle<T> {
    cell: Arc<OneShot<T>>,
    executor: HangTolerantPool,
}

#[derive(Debug)]
struct OneShot<T> {
    answer: Mutex<JobState<T>>,
    changed: Condvar,
    begun: AtomicBool,
    heartbeat: Heartbeat,
}

#[derive(Debug)]
enum JobState<T> {
    Awaited,
    Here(T),
    Panicked,
    Dropped,
    /// Nobody waits any more.
    Unwanted,
}

/// Held by a job. When the job goes without an answer, whoever waits for it is told.
struct Promise<T> {
    cell: Arc<OneShot<T>>,
}

impl<T> Promise<T> {
    fn is_unwanted(&self) -> bool {
        matches!(*self.cell.answer.lock(), JobState::Unwanted)
    }

    /// The value, if nobody waits for it any more.
    fn settle(&self, answer: JobState<T>) -> Option<T> {
        let mut current = self.cell.answer.lock();
        if let JobState::Unwanted = *current {
            return if let JobState::Here(value) = answer { Some(value) } else { None };
        }
        *current = answer;
        self.cell.changed.notify_all();
        None
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        let mut answer = self.cell.answer.lock();
        if matches!(*answer, JobState::Awaited) {
            *answer = JobState::Dropped;
            self.cell.changed.notify_all();
        }
    }
}

impl HangTolerantPool {
    /// Asks `repository` on `width` threads whose names begin with `name`, and on further ones in place of those that
    /// are stuck: `most` in all, as far as `budget` goes.
    pub fn new(
        repository: &str,
        name: &str,
        (width, most): (usize, usize),
        stuck_after: Duration,
        budget: &ThreadBudget,
    ) -> Self {
        let (repository, name) = (repository.to_owned(), name.to_owned());
        let (budget, state, work) = (budget.clone(), Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { repository, name, width, most, stuck_after, budget, state, work }) }
    }

    /// Queues `job`. What it returns when its ticket is gone is handed to `late`, on the
    /// thread of the job. A job whose ticket is gone before its turn does not run.
    pub fn start<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<JobHandle<T>, PoolExhausted> {
        let heartbeat = Heartbeat::default();
        let cell = Arc::new(OneShot {
            answer: Mutex::new(JobState::Awaited),
            changed: Condvar::new(),
            begun: AtomicBool::new(false),
            heartbeat: heartbeat.clone(),
        });
        let ticket = JobHandle { cell: Arc::clone(&cell), executor: self.clone() };
        let promise = Promise { cell };
        let work: Job = Box::new(move || {
            promise.cell.begun.store(true, Ordering::SeqCst);
            if promise.is_unwanted() {
                return;
            }
            let answer = catch_unwind(AssertUnwindSafe(job)).map_or(JobState::Panicked, JobState::Here);
            if let Some(unwanted) = promise.settle(answer) {
                late(unwanted);
            }
        });
        self.run(Priority::Last, heartbeat, work)?;
        Ok(ticket)
    }

    /// Queues a job that nobody waits for; `heartbeat` is its sign of life.
    pub fn run(&self, turn: Priority, heartbeat: Heartbeat, job: Job) -> Result<(), PoolExhausted> {
        let mut state = self.shared.state.lock();
        let stuck = self.shared.stuck(&state);
        let threads = state.running.len() + state.idle;
        if stuck >= self.shared.most {
            return Err(PoolExhausted { threads });
        }
        match turn {
            Priority::Next => state.jobs.push_front((heartbeat, job)),
            Priority::Last => state.jobs.push_back((heartbeat, job)),
        }
        if state.idle >= state.jobs.len() || threads - stuck >= self.shared.width || threads >= self.shared.most {
            self.shared.work.notify_one();
            return Ok(());
        }
        if self.spawn(&mut state) || threads > stuck {
            return Ok(());
        }
        // Nobody would ever take these jobs. Dropped, they tell whoever waits for them; that is done
        // without the lock, because it runs other people's code.
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        drop(jobs);
        Err(PoolExhausted { threads })
    }

    /// Whether another thread was started.
    fn spawn(&self, state: &mut State) -> bool {
        let Some(budget) = self.shared.budget.take() else {
            log::error!(repository = self.shared.repository.as_str();
                "repository {}: no thread can be started to ask it: all {} are in use, most of them in mounts that \
                 were replaced; end the client processes of those mounts", self.shared.repository, self.shared.budget.max);
            return false;
        };
        // Counted before it runs, so that the next caller does not start one as well.
        let number = state.next_number;
        state.next_number += 1;
        state.running.insert(number, Heartbeat::default());
        let shared = Arc::clone(&self.shared);
        let name = format!("{}-{number}", shared.name);
        let work = move || {
            shared.work(number);
            drop(budget);
        };
        if let Err(e) = thread::Builder::new().name(name).spawn(work) {
            state.running.remove(&number);
            log::error!(repository = self.shared.repository.as_str();
                "repository {}: no thread can be started to ask it: {e}", self.shared.repository);
            return false;
        }
        true
    }

    /// Threads without a job end.
    pub fn close(&self) {
        self.shared.state.lock().closed = true;
        self.shared.work.notify_all();
    }

    /// For how long no job has got an answer; zero when none runs.
    fn silence(&self) -> Duration {
        self.shared.state.lock().running.values().map(Heartbeat::silence).min().unwrap_or_default()
    }
}

impl Shared {
    fn stuck(&self, state: &State) -> usize {
        state.running.values().filter(|heartbeat| heartbeat.silence() > self.stuck_after).count()
    }

    fn work(&self, number: u64) {
        loop {
            let job = {
                let mut state = self.state.lock();
                state.running.remove(&number);
                let others = state.running.len() + state.idle - self.stuck(&state);
                // It was stuck, and others work in its place by now.
                if others >= self.width && state.jobs.is_empty() {
                    return;
                }
                state.idle += 1;
                let mut is_idle_for_long = false;
                while state.jobs.is_empty() && !is_idle_for_long && !state.closed {
                    is_idle_for_long = self.work.wait_for(&mut state, IDLE_THREAD_LIFETIME).timed_out();
                }
                state.idle -= 1;
                let Some((heartbeat, job)) = state.jobs.pop_front() else { return };
                heartbeat.record();
                state.running.insert(number, heartbeat.clone());
                JOB.set(Some(heartbeat));
                job
            };
            // Jobs fence themselves; this fence is for a panic in `late`.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                log::error!(repository = self.repository.as_str();
                    "repository {}: a question to it panicked; its thread goes on", self.repository);
            }
            JOB.set(None);
        }
    }
}

impl<T> JobHandle<T> {
    /// The result, if it comes in time and before it is known to be `hopeless`.
    pub fn wait(self, patience: WaitLimits, hopeless: impl Fn() -> bool) -> Result<T, WaitError> {
        let mut lost = WaitError::Late;
        let mut answer = self.cell.answer.lock();
        while matches!(*answer, JobState::Awaited) {
            let now = Instant::now();
            let silence = if self.cell.begun.load(Ordering::SeqCst) {
                self.cell.heartbeat.silence()
            } else {
                self.executor.silence()
            };
            if silence >= patience.silence || hopeless() {
                lost = WaitError::Silent;
                break;
            }
            if now >= patience.until {
                break;
            }
            let step =
                patience.silence.saturating_sub(silence).min(patience.until.duration_since(now)).min(POLL_INTERVAL);
            self.cell.changed.wait_for(&mut answer, step);
        }
        match std::mem::replace(&mut *answer, JobState::Unwanted) {
            JobState::Here(value) => Ok(value),
            JobState::Panicked => Err(WaitError::Panicked),
            JobState::Dropped => Err(WaitError::Dropped),
            JobState::Awaited | JobState::Unwanted => Err(lost),
        }
    }
}

impl<T> Drop for JobHandle<T> {
    fn drop(&mut self) {
        let mut answer = self.cell.answer.lock();
        if matches!(*answer, JobState::Awaited) {
            *answer = JobState::Unwanted;
        }
    }
}

#[cfg(test)]
mod tests;
