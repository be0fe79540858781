//! A fixed number of worker threads behind a bounded queue.
//!
//! The pool knows no snapshot. It promises that every job it is given is answered exactly
//! once: with its result, or with the reason why there is none. A full queue refuses at
//! once instead of growing, a panic costs nothing but its own job, and a job whose caller
//! has given up is not started. Work that is done in parts goes on through a second queue,
//! which is never full; the workers serve both in turns, so neither can hold up the other.
//! A pool for jobs that wait most of their time may grow: it has one thread, and more while jobs need them.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError, Sender, TrySendError, bounded, select_biased, unbounded};
use parking_lot::{Condvar, Mutex};

use crate::logging::panic_message;
use crate::metrics::PoolState;

/// Why a job has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `limit` jobs are waiting already.
    QueueFull { limit: usize },
    /// The caller's deadline passed before a worker was free.
    DeadlinePassed,
    /// The pool takes no more jobs.
    Stopping,
    /// The job panicked; the message is for the log.
    Panicked(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { limit } => {
                write!(
                    f,
                    "too many calls are waiting ({limit}), try again later or raise \"queue\" in the configuration"
                )
            }
            Self::DeadlinePassed => f.write_str("the deadline passed while the call was waiting for a worker"),
            Self::Stopping => f.write_str("the snapshotter is stopping"),
            Self::Panicked(what) => write!(f, "the call hit a bug in the snapshotter: {what}"),
        }
    }
}

type Job = Box<dyn FnOnce(Option<Refusal>) + Send>;

/// Handing jobs in; cheap to clone, one for every gRPC thread.
#[derive(Clone)]
pub struct PoolHandle {
    jobs: Sender<Job>,
    limit: usize,
    threads: usize,
    continuations: Sender<Job>,
    running: Arc<JobCounter>,
    growth: Option<Arc<ThreadSpawner>>,
}

/// How a pool gets more threads.
struct ThreadSpawner {
    name: String,
    queues: JobQueues,
    /// A thread that had no job for so long ends.
    idle: Duration,
}

/// Jobs that are waiting or under way, and whether more may come.
#[derive(Default)]
struct JobCounter {
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Default)]
struct State {
    jobs: usize,
    /// Of a pool that grows.
    threads: usize,
    closed: bool,
}

pub struct Pool {
    name: String,
    handle: PoolHandle,
    queues: JobQueues,
    workers: Vec<JoinHandle<()>>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainOutcome {
    Completely,
    /// The limit passed first; so many jobs were still waiting or under way.
    LeavingBehind(usize),
}

impl Pool {
    /// `workers` threads, called `name`, that share a queue of `queue` waiting jobs.
    pub fn start(name: &str, workers: usize, queue: usize) -> io::Result<Self> {
        let mut pool = Self::idle(name, workers, queue);
        pool.run()?;
        Ok(pool)
    }

    /// As `start`, but jobs wait in the queue until `run`.
    pub fn idle(name: &str, workers: usize, queue: usize) -> Self {
        let (jobs, queued) = bounded::<Job>(queue);
        let (continuations, begun) = unbounded::<Job>();
        let running = Arc::new(JobCounter::default());
        let handle = PoolHandle { jobs, limit: queue, threads: workers, continuations, running, growth: None };
        Self { name: name.to_owned(), handle, queues: JobQueues { queued, begun }, workers: Vec::new() }
    }

    /// As `start`, with one thread, and up to `most` while there are jobs for them. One that had none for as long as
    /// `idle` ends.
    pub fn growing(name: &str, most: usize, queue: usize, idle: Duration) -> io::Result<Self> {
        let mut pool = Self::idle(name, most, queue);
        pool.spawn(1)?;
        pool.handle.running.state.lock().threads = 1;
        let growth = ThreadSpawner { name: pool.name.clone(), queues: pool.queues.clone(), idle };
        pool.handle.growth = Some(Arc::new(growth));
        Ok(pool)
    }

    /// Starts the threads. To be called once.
    pub fn run(&mut self) -> io::Result<()> {
        self.spawn(self.handle.threads)
    }

    fn spawn(&mut self, threads: usize) -> io::Result<()> {
        for n in 0..threads {
            let queues = self.queues.clone();
            let thread = thread::Builder::new().name(format!("{}-{n}", self.name));
            self.workers.push(thread.spawn(move || work(&queues))?);
        }
        Ok(())
    }

    pub fn handle(&self) -> PoolHandle {
        self.handle.clone()
    }

    /// Takes no more jobs and waits for those that were taken, `limit` at most.
    pub fn drain(self, limit: Duration) -> DrainOutcome {
        let until = Instant::now() + limit;
        let PoolHandle { jobs, continuations, running, .. } = self.handle;
        {
            let mut state = running.state.lock();
            state.closed = true;
            while state.jobs > 0 {
                if running.idle.wait_until(&mut state, until).timed_out() {
                    return DrainOutcome::LeavingBehind(state.jobs);
                }
            }
        }
        // Entrances may live on in gRPC handlers, so the workers may never see the channel
        // close. They own nothing and wait for nothing: they end with the process.
        drop((jobs, continuations, self.workers));
        DrainOutcome::Completely
    }
}

/// Where a worker finds its jobs.
#[derive(Clone)]
struct JobQueues {
    queued: Receiver<Job>,
    begun: Receiver<Job>,
}

/// Which queue is served first where both have something.
#[derive(Clone, Copy)]
enum NextQueue {
    Begun,
    Queued,
}

impl JobQueues {
    /// None: there was no job for so long.
    fn next_within(&self, turn: &mut NextQueue, limit: Duration) -> Option<Job> {
        let (first, second, then) = self.in_priority_order(*turn);
        let (job, of_first) = select_biased! {
            recv(first) -> job => (job, true),
            recv(second) -> job => (job, false),
            default(limit) => return None,
        };
        if of_first {
            *turn = then;
        }
        job.ok()
    }

    /// The queue that is served first, the other one, and whose turn is next if the first has something.
    fn in_priority_order(&self, turn: NextQueue) -> (&Receiver<Job>, &Receiver<Job>, NextQueue) {
        match turn {
            NextQueue::Begun => (&self.begun, &self.queued, NextQueue::Queued),
            NextQueue::Queued => (&self.queued, &self.begun, NextQueue::Begun),
        }
    }

    /// None: nobody can hand in jobs any more.
    fn next(&self, turn: &mut NextQueue) -> Option<Job> {
        let (first, second, then) = self.in_priority_order(*turn);
        // One that is closed and empty may hide what the other one still has.
        let (job, of_first) = select_biased! {
            recv(first) -> job => (job.or_else(|_| second.recv()), true),
            recv(second) -> job => (job.or_else(|_| first.recv()), false),
        };
        if of_first {
            *turn = then;
        }
        job.ok()
    }
}

fn work(queues: &JobQueues) {
    let mut turn = NextQueue::Begun;
    while let Some(job) = queues.next(&mut turn) {
        do_job(job);
    }
}

fn do_job(job: Job) {
    // `submit` fences the work itself; this fence is for a panic while answering.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(None))) {
        log::error!("a worker could not send an answer: {}", panic_message(panic.as_ref()));
    }
}

impl ThreadSpawner {
    /// Works until there was nothing to do for a while.
    fn work(&self, running: &JobCounter) {
        let mut turn = NextQueue::Begun;
        loop {
            if let Some(job) = self.queues.next_within(&mut turn, self.idle) {
                do_job(job);
                continue;
            }
            let mut state = running.state.lock();
            // `submit` counts its job before it calls `grow`, so a thread that ends here leaves none for every job.
            if state.threads > state.jobs {
                state.threads -= 1;
                return;
            }
        }
    }
}

impl PoolHandle {
    /// Runs `work` on a worker and hands its result to `answer`, unless there is a reason
    /// not to: then `answer` gets the reason, possibly at once and on this thread.
    /// `expired` is asked when a worker is free.
    pub fn submit<T: 'static>(
        &self,
        expired: impl FnOnce() -> bool + Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
        answer: impl FnOnce(Result<T, Refusal>) + Send + 'static,
    ) {
        let Some(job) = self.job(expired, work, answer) else { return };
        match self.jobs.try_send(job) {
            Ok(()) => self.grow(),
            Err(TrySendError::Full(job)) => job(Some(Refusal::QueueFull { limit: self.limit })),
            Err(TrySendError::Disconnected(job)) => job(Some(Refusal::Stopping)),
        }
    }

    /// How it is at this moment.
    pub fn state(&self) -> PoolState {
        let waiting = self.jobs.len() + self.continuations.len();
        let jobs = self.running.state.lock().jobs;
        let busy = jobs.saturating_sub(waiting).min(self.threads);
        PoolState { threads: self.threads, busy, waiting, room: self.limit }
    }

    /// As `submit`, for the next part of work of which a part is done: no queue is too full for
    /// it. The caller sees to it that there is one such job at a time for each `submit`.
    pub fn submit_continuation<T: 'static>(
        &self,
        expired: impl FnOnce() -> bool + Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
        answer: impl FnOnce(Result<T, Refusal>) + Send + 'static,
    ) {
        let Some(job) = self.job(expired, work, answer) else { return };
        match self.continuations.send(job) {
            Ok(()) => self.grow(),
            Err(SendError(job)) => job(Some(Refusal::Stopping)),
        }
    }

    /// Starts a thread if there are more jobs than threads, and there may be more threads.
    fn grow(&self) {
        let Some(growth) = &self.growth else { return };
        let number = {
            let mut state = self.running.state.lock();
            if state.threads >= state.jobs.min(self.threads) {
                return;
            }
            state.threads += 1;
            state.threads - 1
        };
        let (running, growth) = (Arc::clone(&self.running), Arc::clone(growth));
        let thread = thread::Builder::new().name(format!("{}-{number}", growth.name));
        if let Err(e) = thread.spawn(move || growth.work(&running)) {
            self.running.state.lock().threads -= 1;
            log::warn!("a call waits for another one, because no thread can be started for it: {e}");
        }
    }

    /// None: no more jobs are taken, and that was answered.
    fn job<T: 'static>(
        &self,
        expired: impl FnOnce() -> bool + Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
        answer: impl FnOnce(Result<T, Refusal>) + Send + 'static,
    ) -> Option<Job> {
        let Some(ticket) = JobGuard::take(&self.running) else {
            answer(Err(Refusal::Stopping));
            return None;
        };
        Some(Box::new(move |refusal| {
            let _ticket = ticket;
            let result = match refusal {
                Some(refusal) => Err(refusal),
                None if expired() => Err(Refusal::DeadlinePassed),
                None => catch_unwind(AssertUnwindSafe(work))
                    .map_err(|panic| Refusal::Panicked(panic_message(panic.as_ref()).to_owned())),
            };
            answer(result);
        }))
    }
}

/// Counts a job as long as it lives, whatever way it ends.
struct JobGuard(Arc<JobCounter>);

impl JobGuard {
    fn take(running: &Arc<JobCounter>) -> Option<Self> {
        let mut state = running.state.lock();
        if state.closed {
            return None;
        }
        state.jobs += 1;
        Some(Self(Arc::clone(running)))
    }
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.jobs -= 1;
        if state.jobs == 0 {
            self.0.idle.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_secs(10);

    /// A job that occupies a worker until the returned sender is dropped.
    fn occupy(handle: &PoolHandle) -> mpsc::Sender<()> {
        let (release, released) = mpsc::channel::<()>();
        let (started, has_started) = mpsc::channel();
        handle.submit(
            || false,
            move || {
                let _ = started.send(());
                let _ = released.recv();
            },
            |_| {},
        );
        has_started.recv_timeout(SOON).expect("a worker is free");
        release
    }

    #[derive(Clone, Copy)]
    enum Work {
        New,
        Begun,
    }

    fn outcome(
        handle: &PoolHandle,
        which: Work,
        work: impl FnOnce() -> u32 + Send + 'static,
    ) -> mpsc::Receiver<Result<u32, Refusal>> {
        let (send, receive) = mpsc::channel();
        let answer = move |result| drop(send.send(result));
        match which {
            Work::New => handle.submit(|| false, work, answer),
            Work::Begun => handle.submit_continuation(|| false, work, answer),
        }
        receive
    }

    #[test]
    fn a_full_queue_refuses_at_once() {
        let pool = Pool::start("t", 1, 2).unwrap();
        let handle = pool.handle();
        let busy = occupy(&handle);
        let waiting: Vec<_> = (0..2).map(|n| outcome(&handle, Work::New, move || n)).collect();
        let refused = outcome(&handle, Work::New, || 99);
        assert_eq!(refused.try_recv(), Ok(Err(Refusal::QueueFull { limit: 2 })));
        drop(busy);
        let answers: Vec<_> = waiting.iter().map(|w| w.recv_timeout(SOON).unwrap()).collect();
        assert_eq!(answers, [Ok(0), Ok(1)]);
    }

    #[test]
    fn a_panic_costs_only_its_own_job() {
        let pool = Pool::start("t", 1, 8).unwrap();
        let handle = pool.handle();
        for _ in 0..3 {
            let bad = outcome(&handle, Work::New, || panic!("on purpose"));
            assert_eq!(bad.recv_timeout(SOON), Ok(Err(Refusal::Panicked("on purpose".into()))));
        }
        assert_eq!(outcome(&handle, Work::New, || 7).recv_timeout(SOON), Ok(Ok(7)));
    }

    #[test]
    fn a_job_past_its_deadline_is_not_started() {
        let pool = Pool::start("t", 1, 8).unwrap();
        let (send, receive) = mpsc::channel();
        pool.handle().submit(|| true, || panic!("it ran"), move |result: Result<(), _>| drop(send.send(result)));
        assert_eq!(receive.recv_timeout(SOON), Ok(Err(Refusal::DeadlinePassed)));
    }

    /// At a start that takes long: nothing is begun, as much waits as the queue takes, and then everything is done
    /// whose caller still waits.
    #[test]
    fn an_idle_pool_lets_jobs_wait_until_it_runs() {
        let mut pool = Pool::idle("t", 1, 2);
        let handle = pool.handle();
        let waiting = outcome(&handle, Work::New, || 1);
        let (expire, has_expired) = mpsc::channel::<()>();
        let (send, receive) = mpsc::channel();
        let expired = move || has_expired.try_recv() == Err(mpsc::TryRecvError::Disconnected);
        handle.submit(expired, || panic!("it ran"), move |result: Result<(), _>| drop(send.send(result)));
        assert_eq!(outcome(&handle, Work::New, || 2).try_recv(), Ok(Err(Refusal::QueueFull { limit: 2 })));
        assert!(waiting.try_recv().is_err());
        drop(expire);
        pool.run().unwrap();
        assert_eq!(waiting.recv_timeout(SOON), Ok(Ok(1)));
        assert_eq!(receive.recv_timeout(SOON), Ok(Err(Refusal::DeadlinePassed)));
    }

    #[test]
    fn a_drain_finishes_what_runs_and_refuses_the_rest() {
        let pool = Pool::start("t", 2, 8).unwrap();
        let handle = pool.handle();
        let busy = occupy(&handle);
        let waiting = outcome(&handle, Work::New, || 5);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(busy);
        });
        assert_eq!(pool.drain(SOON), DrainOutcome::Completely);
        assert_eq!(waiting.try_recv(), Ok(Ok(5)));
        assert_eq!(outcome(&handle, Work::New, || 6).try_recv(), Ok(Err(Refusal::Stopping)));
    }

    #[test]
    fn work_that_has_begun_is_not_refused_by_a_full_queue() {
        let pool = Pool::start("t", 1, 1).unwrap();
        let handle = pool.handle();
        let busy = occupy(&handle);
        let waiting = outcome(&handle, Work::New, || 1);
        assert_eq!(outcome(&handle, Work::New, || 99).try_recv(), Ok(Err(Refusal::QueueFull { limit: 1 })));
        let begun: Vec<_> = (0..10).map(|n| outcome(&handle, Work::Begun, move || n)).collect();
        drop(busy);
        let answers: Vec<_> = begun.iter().map(|w| w.recv_timeout(SOON).unwrap().unwrap()).collect();
        assert_eq!(answers, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(waiting.recv_timeout(SOON), Ok(Ok(1)));
    }

    /// Whichever had the right of way, enough of it would keep the other from ever being done.
    #[test]
    fn new_and_begun_work_take_turns() {
        let pool = Pool::start("t", 1, 8).unwrap();
        let handle = pool.handle();
        let busy = occupy(&handle);
        let (done, order) = mpsc::channel();
        for n in 0..4 {
            let (new, begun) = (done.clone(), done.clone());
            handle.submit(|| false, move || new.send(("new", n)), |_| {});
            handle.submit_continuation(|| false, move || begun.send(("begun", n)), |_| {});
        }
        drop((busy, done));
        let order: Vec<_> = order.iter().collect();
        assert_eq!(order.len(), 8);
        for pair in order.chunks(2) {
            assert_ne!(pair[0].0, pair[1].0, "{order:?}");
            assert_eq!(pair[0].1, pair[1].1, "{order:?}");
        }
    }

    #[test]
    fn work_that_goes_on_is_fenced_and_asked_for_its_deadline() {
        let pool = Pool::start("t", 1, 8).unwrap();
        let handle = pool.handle();
        for _ in 0..3 {
            let bad = outcome(&handle, Work::Begun, || panic!("on purpose"));
            assert_eq!(bad.recv_timeout(SOON), Ok(Err(Refusal::Panicked("on purpose".into()))));
        }
        let (send, receive) = mpsc::channel();
        handle.submit_continuation(|| true, || panic!("it ran"), move |result: Result<(), _>| drop(send.send(result)));
        assert_eq!(receive.recv_timeout(SOON), Ok(Err(Refusal::DeadlinePassed)));
        assert_eq!(outcome(&handle, Work::Begun, || 7).recv_timeout(SOON), Ok(Ok(7)));
    }

    #[test]
    fn a_drain_finishes_the_part_that_was_asked_for_and_refuses_the_next() {
        let pool = Pool::start("t", 1, 8).unwrap();
        let handle = pool.handle();
        let busy = occupy(&handle);
        let part = outcome(&handle, Work::Begun, || 5);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(busy);
        });
        assert_eq!(pool.drain(SOON), DrainOutcome::Completely);
        assert_eq!(part.try_recv(), Ok(Ok(5)));
        assert_eq!(outcome(&handle, Work::Begun, || 6).try_recv(), Ok(Err(Refusal::Stopping)));
    }

    #[test]
    fn jobs_of_both_queues_are_done_though_nobody_can_hand_in_more() {
        // One of them is empty while the other still has some.
        for first_begun in [1, 5] {
            let pool = Pool::start("t", 1, 8).unwrap();
            let handle = pool.handle();
            let busy = occupy(&handle);
            let new = (0..first_begun).map(|n| outcome(&handle, Work::New, move || n));
            let begun = (first_begun..6).map(|n| outcome(&handle, Work::Begun, move || n));
            let waiting: Vec<_> = new.chain(begun).collect();
            drop((handle, pool));
            drop(busy);
            let answers: Vec<_> = waiting.iter().map(|w| w.recv_timeout(SOON).unwrap().unwrap()).collect();
            assert_eq!(answers, [0, 1, 2, 3, 4, 5]);
        }
    }

    /// Threads that waited for nothing were there from the start, 32 for each repository.
    #[test]
    fn a_pool_that_grows_has_as_many_threads_as_jobs_and_then_one_again() {
        let pool = Pool::growing("t", 3, 8, Duration::from_millis(20)).unwrap();
        let handle = pool.handle();
        let threads = || handle.running.state.lock().threads;
        assert_eq!(threads(), 1);
        for round in 0..3 {
            let busy: Vec<_> = (0..3).map(|_| occupy(&handle)).collect();
            assert_eq!(threads(), 3, "round {round}");
            let waiting = outcome(&handle, Work::New, || 7);
            assert_eq!(threads(), 3, "round {round}");
            assert!(waiting.try_recv().is_err());
            drop(busy);
            assert_eq!(waiting.recv_timeout(SOON), Ok(Ok(7)));
            let until = Instant::now() + SOON;
            while threads() > 1 && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(threads(), 1, "round {round}");
            assert_eq!(outcome(&handle, Work::Begun, || 8).recv_timeout(SOON), Ok(Ok(8)));
        }
    }

    #[test]
    fn a_drain_ends_at_its_limit() {
        let pool = Pool::start("t", 1, 8).unwrap();
        let _busy = occupy(&pool.handle());
        assert_eq!(pool.drain(Duration::from_millis(50)), DrainOutcome::LeavingBehind(1));
    }
}
