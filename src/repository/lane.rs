//! Threads on which a repository is asked, so that nobody else gets stuck there.
//!
//! A system call on a FUSE mount that hangs can neither be given a deadline nor be ended, so
//! whoever needs an answer waits beside it and walks away in time. Knows jobs, not what they
//! do. Invariants: `width` jobs run at once beside those that are stuck, never more than
//! `most` threads exist, and what a job brings after its caller has left goes to `late`.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// A thread that has nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(30);

/// So often whoever waits looks whether there is still hope.
const LOOK_UP: Duration = Duration::from_millis(100);

pub type Job = Box<dyn FnOnce() + Send>;

#[derive(Clone, Debug)]
pub struct Lane {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    width: usize,
    most: usize,
    /// A job that runs for longer counts as stuck.
    stuck_after: Duration,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    /// Threads that work, by a number, and since when.
    running: HashMap<u64, Instant>,
    next_number: u64,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// It did not come in time.
    Late,
    Panicked,
}

/// The answer of a job, once it is there. Dropped, it gives the job up.
#[derive(Debug)]
pub struct Ticket<T>(Arc<Cell<T>>);

#[derive(Debug)]
struct Cell<T> {
    answer: Mutex<Answer<T>>,
    changed: Condvar,
}

#[derive(Debug)]
enum Answer<T> {
    Awaited,
    Here(T),
    Panicked,
    /// Nobody waits any more.
    Unwanted,
}

impl Lane {
    /// `width` threads, and further ones in place of those that are stuck, `most` in all.
    pub fn new(name: &str, width: usize, most: usize, stuck_after: Duration) -> Self {
        let (state, work) = (Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { name: name.to_owned(), width, most, stuck_after, state, work }) }
    }

    /// Queues `job`. What it returns when its ticket is gone is handed to `late`, on the
    /// thread of the job. A job whose ticket is gone before its turn does not run.
    pub fn start<T: Send + 'static>(
        &self,
        turn: Turn,
        job: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<Ticket<T>, AllStuck> {
        let cell = Arc::new(Cell { answer: Mutex::new(Answer::Awaited), changed: Condvar::new() });
        let ticket = Ticket(Arc::clone(&cell));
        let work: Job = Box::new(move || {
            if matches!(*cell.answer.lock(), Answer::Unwanted) {
                return;
            }
            let result = catch_unwind(AssertUnwindSafe(job));
            let mut answer = cell.answer.lock();
            match (result, &*answer) {
                (Ok(result), Answer::Unwanted) => {
                    drop(answer);
                    late(result);
                    return;
                }
                (Ok(result), _) => *answer = Answer::Here(result),
                (Err(_), _) => *answer = Answer::Panicked,
            }
            cell.changed.notify_all();
        });
        self.run(turn, work)?;
        Ok(ticket)
    }

    /// Queues a job that nobody waits for.
    pub fn run(&self, turn: Turn, job: Job) -> Result<(), AllStuck> {
        let mut state = self.shared.state.lock();
        let stuck = self.shared.stuck(&state);
        let threads = state.running.len() + state.idle;
        if stuck >= self.shared.most {
            return Err(AllStuck { threads });
        }
        match turn {
            Turn::Next => state.jobs.push_front(job),
            Turn::Last => state.jobs.push_back(job),
        }
        if state.idle >= state.jobs.len() || threads - stuck >= self.shared.width || threads >= self.shared.most {
            self.shared.work.notify_one();
            return Ok(());
        }
        // Counted before it runs, so that the next caller does not start one as well.
        let number = state.next_number;
        state.next_number += 1;
        state.running.insert(number, Instant::now());
        let shared = Arc::clone(&self.shared);
        let name = format!("{}-{number}", shared.name);
        if let Err(e) = thread::Builder::new().name(name).spawn(move || shared.work(number)) {
            state.running.remove(&number);
            log::error!("cannot start a thread for {}: {e}", self.shared.name);
            if state.running.is_empty() && state.idle == 0 {
                state.jobs.clear();
                return Err(AllStuck { threads: 0 });
            }
        }
        Ok(())
    }
}

impl Shared {
    fn stuck(&self, state: &State) -> usize {
        state.running.values().filter(|since| since.elapsed() > self.stuck_after).count()
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
                while state.jobs.is_empty() && !is_idle_for_long {
                    is_idle_for_long = self.work.wait_for(&mut state, IDLE).timed_out();
                }
                state.idle -= 1;
                let Some(job) = state.jobs.pop_front() else { return };
                state.running.insert(number, Instant::now());
                job
            };
            // Jobs fence themselves; this fence is for a panic in `late`.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                log::error!("a thread of {} hit a bug; it goes on", self.name);
            }
        }
    }
}

impl<T> Ticket<T> {
    /// The answer, if it comes within `limit` and before it is known to be `hopeless`.
    pub fn wait(self, limit: Duration, hopeless: impl Fn() -> bool) -> Result<T, Lost> {
        let until = Instant::now() + limit;
        let mut answer = self.0.answer.lock();
        while matches!(*answer, Answer::Awaited) {
            let step = until.min(Instant::now() + LOOK_UP);
            if self.0.changed.wait_until(&mut answer, step).timed_out() && (Instant::now() >= until || hopeless()) {
                break;
            }
        }
        match std::mem::replace(&mut *answer, Answer::Unwanted) {
            Answer::Here(value) => Ok(value),
            Answer::Panicked => Err(Lost::Panicked),
            Answer::Awaited | Answer::Unwanted => Err(Lost::Late),
        }
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        let mut answer = self.0.answer.lock();
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
    const SHORT: Duration = Duration::from_millis(40);

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
        let ticket = lane.start(Turn::Last, job, |()| {}).unwrap();
        has_begun.recv_timeout(SOON).expect("the job has begun");
        (release, ticket)
    }

    #[test]
    fn stuck_threads_are_replaced_and_bounded() {
        let lane = Lane::new("t", 2, 3, SHORT);
        let mut held = vec![stuck(&lane), stuck(&lane)];
        // Both are merely busy: the third waits.
        let ran = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&ran);
        let third = lane.start(Turn::Last, move || count.fetch_add(1, Ordering::SeqCst), drop).unwrap();
        assert_eq!(third.wait(Duration::from_millis(5), never), Err(Lost::Late));
        thread::sleep(SHORT * 2);
        // Now they count as stuck, so there is one more; the job nobody waits for is passed over.
        assert_eq!(lane.start(Turn::Last, || 7, drop).unwrap().wait(SOON, never), Ok(7));
        assert_eq!(ran.load(Ordering::SeqCst), 0);
        held.push(stuck(&lane));
        thread::sleep(SHORT * 2);
        assert_eq!(lane.start(Turn::Last, || 8, drop).map(drop), Err(AllStuck { threads: 3 }));
        // They come back, and everything works.
        for (release, ticket) in held {
            drop(release);
            assert_eq!(ticket.wait(SOON, never), Ok(()));
        }
        assert_eq!(lane.start(Turn::Last, || 9, drop).unwrap().wait(SOON, never), Ok(9));
    }

    #[test]
    fn what_comes_too_late_is_handed_over() {
        let lane = Lane::new("t", 1, 1, SOON);
        let (release, released) = mpsc::channel::<()>();
        let (send, late) = mpsc::channel();
        let job = move || {
            let _ = released.recv();
            5
        };
        let ticket = lane.start(Turn::Last, job, move |n| send.send(n).unwrap()).unwrap();
        thread::sleep(SHORT);
        assert_eq!(ticket.wait(SHORT, never), Err(Lost::Late));
        drop(release);
        assert_eq!(late.recv_timeout(SOON), Ok(5));
    }

    #[test]
    fn a_panic_is_an_answer_and_the_thread_lives_on() {
        let lane = Lane::new("t", 1, 1, SOON);
        for _ in 0..3 {
            let ticket = lane.start(Turn::Last, || -> u8 { panic!("on purpose") }, drop).unwrap();
            assert_eq!(ticket.wait(SOON, never), Err(Lost::Panicked));
        }
        assert_eq!(lane.start(Turn::Last, || 1, drop).unwrap().wait(SOON, never), Ok(1));
    }

    #[test]
    fn an_urgent_job_is_the_next_one() {
        let lane = Lane::new("t", 1, 1, SOON);
        let (release, _ticket) = stuck(&lane);
        let order = Arc::new(Mutex::new(Vec::new()));
        let note = |n: u8| {
            let order = Arc::clone(&order);
            move || order.lock().push(n)
        };
        let last = lane.start(Turn::Last, note(1), drop).unwrap();
        let first = lane.start(Turn::Next, note(2), drop).unwrap();
        drop(release);
        assert_eq!((first.wait(SOON, never), last.wait(SOON, never)), (Ok(()), Ok(())));
        assert_eq!(*order.lock(), [2, 1]);
    }
}
