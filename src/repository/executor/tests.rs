use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

const SOON: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(300);

fn executor(threads: (usize, usize), stuck_after: Duration) -> HangTolerantPool {
    HangTolerantPool::new("r", "t", threads, stuck_after, &ThreadBudget::new(100))
}

fn within(limit: Duration) -> WaitLimits {
    WaitLimits { silence: SOON, until: Instant::now() + limit }
}

fn never() -> bool {
    false
}

/// A job that is stuck until the sender is dropped.
fn stuck(executor: &HangTolerantPool) -> (mpsc::Sender<()>, JobHandle<()>) {
    let (release, released) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    let job = move || {
        begun.send(()).unwrap();
        let _ = released.recv();
    };
    let ticket = executor.start(job, |()| {}).unwrap();
    has_begun.recv_timeout(SOON).expect("the job has begun");
    (release, ticket)
}

/// A thread is free a moment after its job has answered.
fn start_when_free(executor: &HangTolerantPool, result: u8) -> JobHandle<u8> {
    let until = Instant::now() + SOON;
    loop {
        match executor.start(move || result, drop) {
            Ok(ticket) => return ticket,
            Err(PoolExhausted { .. }) => assert!(Instant::now() < until, "the thread never came back"),
        }
    }
}

#[test]
fn stuck_threads_are_replaced_and_bounded() {
    let executor = self::executor((2, 3), SHORT);
    let mut held = vec![stuck(&executor), stuck(&executor)];
    // Both are merely busy: the third waits.
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    let third = executor.start(move || count.fetch_add(1, Ordering::SeqCst), drop).unwrap();
    assert_eq!(third.wait(within(Duration::from_millis(5)), never), Err(WaitError::Late));
    thread::sleep(SHORT * 2);
    // Now they count as stuck, so there is one more; the job nobody waits for is passed over.
    assert_eq!(executor.start(|| 7, drop).unwrap().wait(within(SOON), never), Ok(7));
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    held.push(stuck(&executor));
    thread::sleep(SHORT * 2);
    assert_eq!(executor.start(|| 8, drop).map(drop), Err(PoolExhausted { threads: 3 }));
    // They come back, and everything works.
    for (release, ticket) in held {
        drop(release);
        assert_eq!(ticket.wait(within(SOON), never), Ok(()));
    }
    assert_eq!(start_when_free(&executor, 9).wait(within(SOON), never), Ok(9));
}

#[test]
fn what_comes_too_late_is_handed_over() {
    let executor = self::executor((1, 1), SOON);
    let (release, released) = mpsc::channel::<()>();
    let (send, late) = mpsc::channel();
    let job = move || {
        let _ = released.recv();
        5
    };
    let ticket = executor.start(job, move |n| send.send(n).unwrap()).unwrap();
    thread::sleep(SHORT);
    assert_eq!(ticket.wait(within(SHORT), never), Err(WaitError::Late));
    drop(release);
    assert_eq!(late.recv_timeout(SOON), Ok(5));
}

#[test]
fn a_panic_is_an_answer_and_the_thread_lives_on() {
    let executor = self::executor((1, 1), SOON);
    for _ in 0..3 {
        let ticket = executor.start(|| -> u8 { panic!("on purpose") }, drop).unwrap();
        assert_eq!(ticket.wait(within(SOON), never), Err(WaitError::Panicked));
    }
    assert_eq!(executor.start(|| 1, drop).unwrap().wait(within(SOON), never), Ok(1));
}

#[test]
fn a_job_that_gets_on_is_late_and_one_that_does_not_is_silent() {
    let executor = self::executor((2, 2), SOON);
    let patience = || WaitLimits { silence: SHORT * 2, until: Instant::now() + SHORT * 10 };
    let (stop, stopped) = mpsc::channel::<()>();
    let job = move || {
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
            record_progress();
            thread::sleep(Duration::from_millis(1));
        }
    };
    let busy = executor.start(job, drop).unwrap();
    assert_eq!(busy.wait(patience(), never), Err(WaitError::Late));
    let (_release, held) = stuck(&executor);
    assert_eq!(held.wait(patience(), never), Err(WaitError::Silent));
    // A queued job counts as silent only if no job before it in the executor gave a sign of life.
    assert_eq!(executor.start(|| 1, drop).unwrap().wait(patience(), never), Err(WaitError::Late));
    drop(stop);
}

#[test]
fn an_urgent_job_is_the_next_one() {
    let executor = self::executor((1, 1), SOON);
    let (release, _ticket) = stuck(&executor);
    let order = Arc::new(Mutex::new(Vec::new()));
    let (done, both) = mpsc::channel();
    let note = |n: u8| {
        let (order, done) = (Arc::clone(&order), done.clone());
        Box::new(move || {
            order.lock().push(n);
            done.send(()).unwrap();
        })
    };
    executor.run(Priority::Last, Heartbeat::default(), note(1)).unwrap();
    executor.run(Priority::Next, Heartbeat::default(), note(2)).unwrap();
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
    let executor = HangTolerantPool::new("r", "t", (1, 2), stuck_after, &ThreadBudget::new(1));
    let (release, held) = stuck(&executor);
    let queued = executor.start(|| 1, drop).unwrap();
    thread::sleep(stuck_after * 2);
    assert_eq!(executor.start(|| 2, drop).map(drop), Err(PoolExhausted { threads: 1 }));
    assert_eq!(queued.wait(within(SOON), never), Err(WaitError::Dropped));
    drop(release);
    assert_eq!(held.wait(within(SOON), never), Ok(()));
    assert_eq!(start_when_free(&executor, 3).wait(within(SOON), never), Ok(3));
}

#[test]
fn threads_that_hang_in_replaced_lanes_count_against_the_budget() {
    let budget = ThreadBudget::new(3);
    let old = HangTolerantPool::new("r", "old", (2, 4), SHORT, &budget);
    let held = [stuck(&old), stuck(&old)];
    old.close();
    let new = HangTolerantPool::new("r", "new", (2, 4), SHORT, &budget);
    let (release, last) = stuck(&new);
    thread::sleep(SHORT * 2);
    assert_eq!(new.start(|| 1, drop).map(drop), Err(PoolExhausted { threads: 1 }));
    drop(release);
    last.wait(within(SOON), never).unwrap();
    for (release, ticket) in held {
        drop(release);
        ticket.wait(within(SOON), never).unwrap();
    }
    assert_eq!(start_when_free(&new, 2).wait(within(SOON), never), Ok(2));
}

#[test]
fn a_job_that_works_on_the_local_disk_is_not_silent() {
    let executor = self::executor((1, 1), SHORT);
    let (release, released) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    let heartbeat = Heartbeat::default();
    let paused = heartbeat.clone();
    let job = move || {
        paused.pause();
        begun.send(()).unwrap();
        let _ = released.recv();
    };
    executor.run(Priority::Last, heartbeat.clone(), Box::new(job)).unwrap();
    has_begun.recv_timeout(SOON).unwrap();
    thread::sleep(SHORT * 2);
    assert_eq!((heartbeat.silence(), executor.silence()), (Duration::ZERO, Duration::ZERO));
    let waiting = executor.start(|| 1, drop).unwrap();
    drop(release);
    assert_eq!(waiting.wait(within(SOON), never), Ok(1));
}
