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
const IDLE: Duration = Duration::from_secs(30);

/// So often whoever waits looks whether there is still hope.
pub const LOOK_UP: Duration = Duration::from_millis(100);

pub type Job = Box<dyn FnOnce() + Send>;

/// When something last got on. None: it does not wait for the repository at the moment.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<Mutex<Option<Instant>>>);

impl Default for Pulse {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(Instant::now()))))
    }
}

impl Pulse {
    pub fn beat(&self) {
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
    static JOB: RefCell<Option<Pulse>> = const { RefCell::new(None) };
}

/// The job on this thread got an answer. Does nothing on other threads.
pub fn alive() {
    JOB.with_borrow(|pulse| pulse.iter().for_each(Pulse::beat));
}

/// Does `work` that is on the local disk: however long it takes, the repository is not to blame.
pub fn without_repository<T>(work: impl FnOnce() -> T) -> T {
    JOB.with_borrow(|pulse| pulse.iter().for_each(Pulse::pause));
    let done = work();
    alive();
    done
}

#[derive(Clone, Debug)]
pub struct Lane {
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
    pub fn take(&self) -> Option<BudgetGuard> {
        let below_max = |used: usize| (used < self.max).then_some(used + 1);
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, below_max).ok()?;
        Some(BudgetGuard(Arc::clone(&self.used)))
    }
}

/// A thread's part of a budget.
#[derive(Debug)]
pub struct BudgetGuard(Arc<AtomicUsize>);

impl Drop for BudgetGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(Pulse, Job)>,
    idle: usize,
    /// Nobody asks any more.
    closed: bool,
    /// Threads that work, by a number, with the pulses of their jobs.
    running: HashMap<u64, Pulse>,
    next_number: u64,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} jobs wait, {} run, {} threads are idle", self.jobs.len(), self.running.len(), self.idle)
    }
}

/// Where a job stands in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Next,
    Last,
}

/// Every thread that may exist is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllStuck {
    pub threads: usize,
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
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
pub struct Patience {
    /// Without a sign of life.
    pub silence: Duration,
    /// In all.
    pub until: Instant,
}

/// The result of a job, once it is there. Dropped, it gives the job up.
#[derive(Debug)]
pub struct Ticket<T> {
    cell: Arc<Cell<T>>,
    lane: Lane,
}

#[derive(Debug)]
struct Cell<T> {
    answer: Mutex<Answer<T>>,
    changed: Condvar,
    begun: AtomicBool,
    pulse: Pulse,
}

#[derive(Debug)]
enum Answer<T> {
    Awaited,
    Here(T),
    Panicked,
    Dropped,
    /// Nobody waits any more.
    Unwanted,
}

/// Held by a job. When the job goes without an answer, whoever waits for it is told.
struct Promise<T> {
    cell: Arc<Cell<T>>,
}

impl<T> Promise<T> {
    fn is_unwanted(&self) -> bool {
        matches!(*self.cell.answer.lock(), Answer::Unwanted)
    }

    /// The value, if nobody waits for it any more.
    fn settle(&self, answer: Answer<T>) -> Option<T> {
        let mut current = self.cell.answer.lock();
        if let Answer::Unwanted = *current {
            return if let Answer::Here(value) = answer { Some(value) } else { None };
        }
        *current = answer;
        self.cell.changed.notify_all();
        None
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        let mut answer = self.cell.answer.lock();
        if matches!(*answer, Answer::Awaited) {
            *answer = Answer::Dropped;
            self.cell.changed.notify_all();
        }
    }
}

impl Lane {
    /// `width` threads, and further ones in place of those that are stuck, `most` in all, as far as
    /// `budget` goes.
    /// Asks `repository`, on threads whose names begin with `name`.
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
    ) -> Result<Ticket<T>, AllStuck> {
        let pulse = Pulse::default();
        let cell = Arc::new(Cell {
            answer: Mutex::new(Answer::Awaited),
            changed: Condvar::new(),
            begun: AtomicBool::new(false),
            pulse: pulse.clone(),
        });
        let ticket = Ticket { cell: Arc::clone(&cell), lane: self.clone() };
        let promise = Promise { cell };
        let work: Job = Box::new(move || {
            promise.cell.begun.store(true, Ordering::SeqCst);
            if promise.is_unwanted() {
                return;
            }
            let answer = catch_unwind(AssertUnwindSafe(job)).map_or(Answer::Panicked, Answer::Here);
            if let Some(unwanted) = promise.settle(answer) {
                late(unwanted);
            }
        });
        self.run(Turn::Last, pulse, work)?;
        Ok(ticket)
    }

    /// Queues a job that nobody waits for; `pulse` is its sign of life.
    pub fn run(&self, turn: Turn, pulse: Pulse, job: Job) -> Result<(), AllStuck> {
        let mut state = self.shared.state.lock();
        let stuck = self.shared.stuck(&state);
        let threads = state.running.len() + state.idle;
        if stuck >= self.shared.most {
            return Err(AllStuck { threads });
        }
        match turn {
            Turn::Next => state.jobs.push_front((pulse, job)),
            Turn::Last => state.jobs.push_back((pulse, job)),
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
        Err(AllStuck { threads })
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
        state.running.insert(number, Pulse::default());
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
        self.shared.state.lock().running.values().map(Pulse::silence).min().unwrap_or_default()
    }
}

impl Shared {
    fn stuck(&self, state: &State) -> usize {
        state.running.values().filter(|pulse| pulse.silence() > self.stuck_after).count()
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
                    is_idle_for_long = self.work.wait_for(&mut state, IDLE).timed_out();
                }
                state.idle -= 1;
                let Some((pulse, job)) = state.jobs.pop_front() else { return };
                pulse.beat();
                state.running.insert(number, pulse.clone());
                JOB.set(Some(pulse));
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

impl<T> Ticket<T> {
    /// The result, if it comes in time and before it is known to be `hopeless`.
    pub fn wait(self, patience: Patience, hopeless: impl Fn() -> bool) -> Result<T, Lost> {
        let mut lost = Lost::Late;
        let mut answer = self.cell.answer.lock();
        while matches!(*answer, Answer::Awaited) {
            let now = Instant::now();
            let silence =
                if self.cell.begun.load(Ordering::SeqCst) { self.cell.pulse.silence() } else { self.lane.silence() };
            if silence >= patience.silence || hopeless() {
                lost = Lost::Silent;
                break;
            }
            if now >= patience.until {
                break;
            }
            let step = patience.silence.saturating_sub(silence).min(patience.until.duration_since(now)).min(LOOK_UP);
            self.cell.changed.wait_for(&mut answer, step);
        }
        match std::mem::replace(&mut *answer, Answer::Unwanted) {
            Answer::Here(value) => Ok(value),
            Answer::Panicked => Err(Lost::Panicked),
            Answer::Dropped => Err(Lost::Dropped),
            Answer::Awaited | Answer::Unwanted => Err(lost),
        }
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        let mut answer = self.cell.answer.lock();
        if matches!(*answer, Answer::Awaited) {
            *answer = Answer::Unwanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(300);

    fn lane(threads: (usize, usize), stuck_after: Duration) -> Lane {
        Lane::new("r", "t", threads, stuck_after, &ThreadBudget::new(100))
    }

    fn within(limit: Duration) -> Patience {
        Patience { silence: SOON, until: Instant::now() + limit }
    }

    fn never() -> bool {
        false
    }

    /// A job that is stuck until the sender is dropped.
    fn stuck(lane: &Lane) -> (mpsc::Sender<()>, Ticket<()>) {
        let (release, released) = mpsc::channel::<()>();
        let (begun, has_begun) = mpsc::channel();
        let job = move || {
            begun.send(()).unwrap();
            let _ = released.recv();
        };
        let ticket = lane.start(job, |()| {}).unwrap();
        has_begun.recv_timeout(SOON).expect("the job has begun");
        (release, ticket)
    }

    #[test]
    fn stuck_threads_are_replaced_and_bounded() {
        let lane = self::lane((2, 3), SHORT);
        let mut held = vec![stuck(&lane), stuck(&lane)];
        // Both are merely busy: the third waits.
        let ran = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&ran);
        let third = lane.start(move || count.fetch_add(1, Ordering::SeqCst), drop).unwrap();
        assert_eq!(third.wait(within(Duration::from_millis(5)), never), Err(Lost::Late));
        thread::sleep(SHORT * 2);
        // Now they count as stuck, so there is one more; the job nobody waits for is passed over.
        assert_eq!(lane.start(|| 7, drop).unwrap().wait(within(SOON), never), Ok(7));
        assert_eq!(ran.load(Ordering::SeqCst), 0);
        held.push(stuck(&lane));
        thread::sleep(SHORT * 2);
        assert_eq!(lane.start(|| 8, drop).map(drop), Err(AllStuck { threads: 3 }));
        // They come back, and everything works.
        for (release, ticket) in held {
            drop(release);
            assert_eq!(ticket.wait(within(SOON), never), Ok(()));
        }
        assert_eq!(lane.start(|| 9, drop).unwrap().wait(within(SOON), never), Ok(9));
    }

    #[test]
    fn what_comes_too_late_is_handed_over() {
        let lane = self::lane((1, 1), SOON);
        let (release, released) = mpsc::channel::<()>();
        let (send, late) = mpsc::channel();
        let job = move || {
            let _ = released.recv();
            5
        };
        let ticket = lane.start(job, move |n| send.send(n).unwrap()).unwrap();
        thread::sleep(SHORT);
        assert_eq!(ticket.wait(within(SHORT), never), Err(Lost::Late));
        drop(release);
        assert_eq!(late.recv_timeout(SOON), Ok(5));
    }

    #[test]
    fn a_panic_is_an_answer_and_the_thread_lives_on() {
        let lane = self::lane((1, 1), SOON);
        for _ in 0..3 {
            let ticket = lane.start(|| -> u8 { panic!("on purpose") }, drop).unwrap();
            assert_eq!(ticket.wait(within(SOON), never), Err(Lost::Panicked));
        }
        assert_eq!(lane.start(|| 1, drop).unwrap().wait(within(SOON), never), Ok(1));
    }

    #[test]
    fn a_job_that_gets_on_is_late_and_one_that_does_not_is_silent() {
        let lane = self::lane((2, 2), SOON);
        let patience = || Patience { silence: SHORT * 2, until: Instant::now() + SHORT * 10 };
        let (stop, stopped) = mpsc::channel::<()>();
        let job = move || {
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                alive();
                thread::sleep(Duration::from_millis(1));
            }
        };
        let busy = lane.start(job, drop).unwrap();
        assert_eq!(busy.wait(patience(), never), Err(Lost::Late));
        let (_release, held) = stuck(&lane);
        assert_eq!(held.wait(patience(), never), Err(Lost::Silent));
        // One that waits for its turn is as silent as those before it together.
        assert_eq!(lane.start(|| 1, drop).unwrap().wait(patience(), never), Err(Lost::Late));
        drop(stop);
    }

    #[test]
    fn an_urgent_job_is_the_next_one() {
        let lane = self::lane((1, 1), SOON);
        let (release, _ticket) = stuck(&lane);
        let order = Arc::new(Mutex::new(Vec::new()));
        let (done, both) = mpsc::channel();
        let note = |n: u8| {
            let (order, done) = (Arc::clone(&order), done.clone());
            Box::new(move || {
                order.lock().push(n);
                done.send(()).unwrap();
            })
        };
        lane.run(Turn::Last, Pulse::default(), note(1)).unwrap();
        lane.run(Turn::Next, Pulse::default(), note(2)).unwrap();
        drop(release);
        for _ in 0..2 {
            both.recv_timeout(SOON).unwrap();
        }
        assert_eq!(*order.lock(), [2, 1]);
    }

    /// They waited until their deadlines, up to a minute, for a thread that nobody could start.
    #[test]
    fn jobs_that_no_thread_can_take_are_given_up_at_once() {
        let stuck_after = Duration::from_millis(500);
        let lane = Lane::new("r", "t", (1, 2), stuck_after, &ThreadBudget::new(1));
        let (release, held) = stuck(&lane);
        let queued = lane.start(|| 1, drop).unwrap();
        thread::sleep(stuck_after * 2);
        assert_eq!(lane.start(|| 2, drop).map(drop), Err(AllStuck { threads: 1 }));
        assert_eq!(queued.wait(within(SOON), never), Err(Lost::Dropped));
        drop(release);
        assert_eq!(held.wait(within(SOON), never), Ok(()));
        // The thread is free a moment after its job has answered.
        let until = Instant::now() + SOON;
        let next = loop {
            match lane.start(|| 3, drop) {
                Ok(ticket) => break ticket,
                Err(AllStuck { .. }) => assert!(Instant::now() < until, "the thread never came back"),
            }
        };
        assert_eq!(next.wait(within(SOON), never), Ok(3));
    }

    #[test]
    fn threads_that_hang_in_replaced_lanes_count_against_the_budget() {
        let budget = ThreadBudget::new(3);
        let old = Lane::new("r", "old", (2, 4), SHORT, &budget);
        let held = [stuck(&old), stuck(&old)];
        old.close();
        let new = Lane::new("r", "new", (2, 4), SHORT, &budget);
        let (release, last) = stuck(&new);
        thread::sleep(SHORT * 2);
        assert_eq!(new.start(|| 1, drop).map(drop), Err(AllStuck { threads: 1 }));
        drop(release);
        last.wait(within(SOON), never).unwrap();
        for (release, ticket) in held {
            drop(release);
            ticket.wait(within(SOON), never).unwrap();
        }
        assert_eq!(new.start(|| 2, drop).unwrap().wait(within(SOON), never), Ok(2));
    }

    #[test]
    fn a_job_that_works_on_the_local_disk_is_not_silent() {
        let lane = self::lane((1, 1), SHORT);
        let (release, released) = mpsc::channel::<()>();
        let (begun, has_begun) = mpsc::channel();
        let pulse = Pulse::default();
        let paused = pulse.clone();
        let job = move || {
            paused.pause();
            begun.send(()).unwrap();
            let _ = released.recv();
        };
        lane.run(Turn::Last, pulse.clone(), Box::new(job)).unwrap();
        has_begun.recv_timeout(SOON).unwrap();
        thread::sleep(SHORT * 2);
        assert_eq!((pulse.silence(), lane.silence()), (Duration::ZERO, Duration::ZERO));
        let waiting = lane.start(|| 1, drop).unwrap();
        drop(release);
        assert_eq!(waiting.wait(within(SOON), never), Ok(1));
    }
}
