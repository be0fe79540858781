//! The promises of the pool, each at its worst moment.

use super::*;
use std::sync::mpsc;

const TIMEOUT: Duration = Duration::from_secs(10);

fn start_pool(threads: usize, queue_capacity: usize) -> Pool {
    let pool = Pool::unstarted("t", threads, queue_capacity);
    pool.start_workers().unwrap();
    pool
}

/// Occupies a worker until the returned sender is dropped.
fn occupy(handle: &PoolHandle) -> mpsc::Sender<()> {
    let (release, wait_for_release) = mpsc::channel::<()>();
    let (started_sender, started) = mpsc::channel();
    handle.submit(
        || false,
        move || {
            let _ = started_sender.send(());
            let _ = wait_for_release.recv();
        },
        |_| {},
    );
    started.recv_timeout(TIMEOUT).expect("a worker is free");
    release
}

#[derive(Clone, Copy)]
enum Queue {
    NewJobs,
    Continuations,
}

fn submit(
    handle: &PoolHandle,
    queue: Queue,
    work: impl FnOnce() -> u32 + Send + 'static,
) -> mpsc::Receiver<Result<u32, JobError>> {
    let (send, receive) = mpsc::channel();
    let answer = move |result| drop(send.send(result));
    match queue {
        Queue::NewJobs => handle.submit(|| false, work, answer),
        Queue::Continuations => handle.submit_continuation(|| false, work, answer),
    }
    receive
}

#[test]
fn full_queue_refuses_at_once() {
    let pool = start_pool(1, 2);
    let handle = pool.handle();
    let busy = occupy(&handle);
    let waiting: Vec<_> = (0..2).map(|n| submit(&handle, Queue::NewJobs, move || n)).collect();
    let refused = submit(&handle, Queue::NewJobs, || 99);
    assert_eq!(refused.try_recv(), Ok(Err(JobError::QueueFull { capacity: 2 })));
    drop(busy);
    let answers: Vec<_> = waiting.iter().map(|job| job.recv_timeout(TIMEOUT).unwrap()).collect();
    assert_eq!(answers, [Ok(0), Ok(1)]);
}

#[test]
fn panic_fails_only_its_own_job() {
    let pool = start_pool(1, 8);
    let handle = pool.handle();
    for _ in 0..3 {
        let panicked = submit(&handle, Queue::NewJobs, || panic!("on purpose"));
        assert_eq!(panicked.recv_timeout(TIMEOUT), Ok(Err(JobError::Panicked("on purpose".into()))));
    }
    assert_eq!(submit(&handle, Queue::NewJobs, || 7).recv_timeout(TIMEOUT), Ok(Ok(7)));
}

#[test]
fn job_past_its_deadline_is_not_started() {
    let pool = start_pool(1, 8);
    let (send, receive) = mpsc::channel();
    pool.handle().submit(|| true, || panic!("it ran"), move |result: Result<(), _>| drop(send.send(result)));
    assert_eq!(receive.recv_timeout(TIMEOUT), Ok(Err(JobError::DeadlinePassed)));
}

/// This is a long start of the daemon: calls wait in the queue, further ones are refused, and those that have expired
/// by the end of the start are not run.
#[test]
fn unstarted_pool_queues_jobs_until_its_workers_start() {
    let pool = Pool::unstarted("t", 1, 2);
    let handle = pool.handle();
    let waiting = submit(&handle, Queue::NewJobs, || 1);
    let (expire, has_expired) = mpsc::channel::<()>();
    let (send, receive) = mpsc::channel();
    let expired = move || has_expired.try_recv() == Err(mpsc::TryRecvError::Disconnected);
    handle.submit(expired, || panic!("it ran"), move |result: Result<(), _>| drop(send.send(result)));
    assert_eq!(submit(&handle, Queue::NewJobs, || 2).try_recv(), Ok(Err(JobError::QueueFull { capacity: 2 })));
    assert!(waiting.try_recv().is_err());
    drop(expire);
    pool.start_workers().unwrap();
    assert_eq!(waiting.recv_timeout(TIMEOUT), Ok(Ok(1)));
    assert_eq!(receive.recv_timeout(TIMEOUT), Ok(Err(JobError::DeadlinePassed)));
}

fn check_drain(threads: usize, queue: Queue) {
    let pool = start_pool(threads, 8);
    let handle = pool.handle();
    let busy = occupy(&handle);
    let waiting = submit(&handle, queue, || 5);
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        drop(busy);
    });
    assert_eq!(pool.drain(TIMEOUT), DrainOutcome::Completed);
    assert_eq!(waiting.try_recv(), Ok(Ok(5)));
    assert_eq!(submit(&handle, queue, || 6).try_recv(), Ok(Err(JobError::Stopping)));
}

#[test]
fn drain_finishes_accepted_jobs_and_refuses_new_ones() {
    check_drain(2, Queue::NewJobs);
}

#[test]
fn continuation_is_accepted_while_the_queue_is_full() {
    let pool = start_pool(1, 1);
    let handle = pool.handle();
    let busy = occupy(&handle);
    let waiting = submit(&handle, Queue::NewJobs, || 1);
    assert_eq!(submit(&handle, Queue::NewJobs, || 99).try_recv(), Ok(Err(JobError::QueueFull { capacity: 1 })));
    let continuations: Vec<_> = (0..10).map(|n| submit(&handle, Queue::Continuations, move || n)).collect();
    drop(busy);
    let answers: Vec<_> = continuations.iter().map(|job| job.recv_timeout(TIMEOUT).unwrap().unwrap()).collect();
    assert_eq!(answers, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(waiting.recv_timeout(TIMEOUT), Ok(Ok(1)));
}

/// If one queue had priority, enough jobs in it would starve the other.
#[test]
fn new_jobs_and_continuations_alternate() {
    let pool = start_pool(1, 8);
    let handle = pool.handle();
    let busy = occupy(&handle);
    let (done, order) = mpsc::channel();
    for n in 0..4 {
        let (new, continuation) = (done.clone(), done.clone());
        handle.submit(|| false, move || new.send(("new", n)), |_| {});
        handle.submit_continuation(|| false, move || continuation.send(("continuation", n)), |_| {});
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
fn continuation_may_panic_and_has_a_deadline() {
    let pool = start_pool(1, 8);
    let handle = pool.handle();
    for _ in 0..3 {
        let panicked = submit(&handle, Queue::Continuations, || panic!("on purpose"));
        assert_eq!(panicked.recv_timeout(TIMEOUT), Ok(Err(JobError::Panicked("on purpose".into()))));
    }
    let (send, receive) = mpsc::channel();
    handle.submit_continuation(|| true, || panic!("it ran"), move |result: Result<(), _>| drop(send.send(result)));
    assert_eq!(receive.recv_timeout(TIMEOUT), Ok(Err(JobError::DeadlinePassed)));
    assert_eq!(submit(&handle, Queue::Continuations, || 7).recv_timeout(TIMEOUT), Ok(Ok(7)));
}

#[test]
fn drain_finishes_an_accepted_continuation_and_refuses_the_next() {
    check_drain(1, Queue::Continuations);
}

#[test]
fn jobs_of_both_queues_run_after_the_last_handle_is_dropped() {
    // With 1 and 5 new jobs of 6, either queue is empty while the other still has jobs.
    for new_count in [1, 5] {
        let pool = start_pool(1, 8);
        let handle = pool.handle();
        let busy = occupy(&handle);
        let new = (0..new_count).map(|n| submit(&handle, Queue::NewJobs, move || n));
        let continuations = (new_count..6).map(|n| submit(&handle, Queue::Continuations, move || n));
        let waiting: Vec<_> = new.chain(continuations).collect();
        drop((handle, pool));
        drop(busy);
        let answers: Vec<_> = waiting.iter().map(|job| job.recv_timeout(TIMEOUT).unwrap().unwrap()).collect();
        assert_eq!(answers, [0, 1, 2, 3, 4, 5]);
    }
}

/// Earlier versions started 32 threads for each repository, which had nothing to do most of the time.
#[test]
fn growing_pool_has_a_thread_for_each_job_and_shrinks_to_one() {
    let pool = Pool::growing("t", 3, 8, Duration::from_millis(20)).unwrap();
    let handle = pool.handle();
    let threads = || handle.counters.counts.lock().threads;
    assert_eq!(threads(), 1);
    for round in 0..3 {
        let busy: Vec<_> = (0..3).map(|_| occupy(&handle)).collect();
        assert_eq!(threads(), 3, "round {round}");
        let waiting = submit(&handle, Queue::NewJobs, || 7);
        assert_eq!(threads(), 3, "round {round}");
        assert!(waiting.try_recv().is_err());
        drop(busy);
        assert_eq!(waiting.recv_timeout(TIMEOUT), Ok(Ok(7)));
        let until = Instant::now() + TIMEOUT;
        while threads() > 1 && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(threads(), 1, "round {round}");
        assert_eq!(submit(&handle, Queue::Continuations, || 8).recv_timeout(TIMEOUT), Ok(Ok(8)));
    }
}

#[test]
fn drain_ends_at_its_time_limit() {
    let pool = start_pool(1, 8);
    let _busy = occupy(&pool.handle());
    assert_eq!(pool.drain(Duration::from_millis(50)), DrainOutcome::TimedOut { remaining: 1 });
}
