use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::repository::executor::{PoolSize, ThreadBudget, record_progress};
use crate::repository::generation::{PathProbe, RepositorySettings};
use crate::system::Host;

const SOON: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(300);

/// A mount of a plain directory, whose probes succeed. The directory is removed with the first value.
fn generation(calls: PoolSize, timeout: Duration, threads: &ThreadBudget) -> (tempfile::TempDir, Arc<MountGeneration>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(".layers")).unwrap();
    let (name, path, sys, threads) = ("r".to_owned(), dir.path().to_owned(), Arc::new(Host), threads.clone());
    let mount = Arc::new(PathProbe { path: path.clone(), sys: Arc::<Host>::clone(&sys) });
    let settings = RepositorySettings { name, path, timeout, sys, mount, calls, scans: calls, threads };
    (dir, Arc::new(MountGeneration::new(Arc::new(settings), 0)))
}

fn pool(target: usize, max: usize, stuck_after: Duration) -> (tempfile::TempDir, Arc<MountGeneration>) {
    generation(PoolSize { target, max }, stuck_after, &ThreadBudget::new(100, 4))
}

fn within(limit: Duration) -> WaitLimits {
    WaitLimits { no_progress: SOON, deadline: Instant::now() + limit }
}

fn start<T: Send + 'static>(
    generation: &Arc<MountGeneration>,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<PendingJob<T>, PoolExhausted> {
    generation.start(move |_| Ok(job()), drop)
}

/// A job that is stuck until the sender is dropped.
fn start_stuck_job(generation: &Arc<MountGeneration>) -> (mpsc::Sender<()>, PendingJob<()>) {
    let (release, released) = mpsc::channel::<()>();
    let (started, has_started) = mpsc::channel();
    let job = move || {
        started.send(()).unwrap();
        let _ = released.recv();
    };
    let pending = start(generation, job).unwrap();
    has_started.recv_timeout(SOON).expect("the job has started");
    (release, pending)
}

/// A thread is free a moment after its job has delivered its result.
fn start_when_free(generation: &Arc<MountGeneration>, result: u8) -> PendingJob<u8> {
    let until = Instant::now() + SOON;
    loop {
        match start(generation, move || result) {
            Ok(pending) => return pending,
            Err(PoolExhausted { .. }) => assert!(Instant::now() < until, "the thread never came back"),
        }
    }
}

#[test]
fn stuck_threads_are_replaced_and_bounded() {
    let (_dir, pool) = pool(2, 3, SHORT);
    let mut stuck = vec![start_stuck_job(&pool), start_stuck_job(&pool)];
    // Both threads are merely busy, so the third job is queued.
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    let third = start(&pool, move || count.fetch_add(1, Ordering::SeqCst)).unwrap();
    assert_eq!(third.wait(within(Duration::from_millis(5))), Err(pool.too_slow()));
    thread::sleep(SHORT * 2);
    // Now both count as stuck, so there is one more thread; the job that was abandoned does not run.
    assert_eq!(start(&pool, || 7).unwrap().wait(within(SOON)), Ok(7));
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    stuck.push(start_stuck_job(&pool));
    thread::sleep(SHORT * 2);
    assert_eq!(start(&pool, || 8).map(drop), Err(PoolExhausted { threads: 3 }));
    // They come back, and everything works.
    for (release, pending) in stuck {
        drop(release);
        assert_eq!(pending.wait(within(SOON)), Ok(()));
    }
    assert_eq!(start_when_free(&pool, 9).wait(within(SOON)), Ok(9));
}

#[test]
fn result_of_an_abandoned_job_is_handed_over() {
    let (_dir, pool) = pool(1, 1, SOON);
    let (release, released) = mpsc::channel::<()>();
    let (send, abandoned) = mpsc::channel();
    let job = move |_: &Arc<MountGeneration>| {
        let _ = released.recv();
        Ok(5)
    };
    let pending = pool.start(job, move |n| send.send(n).unwrap()).unwrap();
    thread::sleep(SHORT);
    assert_eq!(pending.wait(within(SHORT)), Err(pool.too_slow()));
    drop(release);
    assert_eq!(abandoned.recv_timeout(SOON), Ok(5));
}

#[test]
fn panic_of_a_job_is_its_result_and_its_thread_lives_on() {
    let (_dir, pool) = pool(1, 1, SOON);
    for _ in 0..3 {
        let pending = start(&pool, || -> u8 { panic!("on purpose") }).unwrap();
        assert_eq!(pending.wait(within(SOON)), Err(Unavailable::JobPanicked));
    }
    assert_eq!(start(&pool, || 1).unwrap().wait(within(SOON)), Ok(1));
}

#[test]
fn job_that_makes_progress_is_slow_and_one_that_makes_none_is_not_answered() {
    let (_dir, pool) = pool(2, 2, SOON);
    let limits = || WaitLimits { no_progress: SHORT * 2, deadline: Instant::now() + SHORT * 10 };
    let (stop, stopped) = mpsc::channel::<()>();
    let job = move || {
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
            record_progress();
            thread::sleep(Duration::from_millis(1));
        }
    };
    let busy = start(&pool, job).unwrap();
    assert_eq!(busy.wait(limits()), Err(pool.too_slow()));
    let (_release, stuck) = start_stuck_job(&pool);
    assert_eq!(stuck.wait(limits()), Err(Unavailable::NoAnswer { limit: SOON }));
    let until = Instant::now() + SOON;
    while pool.check().is_err() {
        assert!(Instant::now() < until, "no probe has succeeded");
    }
    // A queued job is not answered only if no job that runs makes progress.
    assert_eq!(start(&pool, || 1).unwrap().wait(limits()), Err(pool.too_slow()));
    drop(stop);
}

#[test]
fn job_with_priority_next_is_the_next_one() {
    let (_dir, pool) = pool(1, 1, SOON);
    let (release, _pending) = start_stuck_job(&pool);
    let order = Arc::new(Mutex::new(Vec::new()));
    let (done, both) = mpsc::channel();
    let record = |n: u8| {
        let (order, done) = (Arc::clone(&order), done.clone());
        Box::new(move || {
            order.lock().push(n);
            done.send(()).unwrap();
        })
    };
    pool.calls.run(Priority::Last, Heartbeat::default(), record(1)).unwrap();
    pool.calls.run(Priority::Next, Heartbeat::default(), record(2)).unwrap();
    drop(release);
    for _ in 0..2 {
        both.recv_timeout(SOON).unwrap();
    }
    assert_eq!(*order.lock(), [2, 1]);
}

/// Callers waited until their deadlines, up to a minute, for a thread that could not be started.
#[test]
fn jobs_that_no_thread_can_run_fail_at_once() {
    let stuck_after = Duration::from_millis(500);
    let (_dir, pool) = generation(PoolSize { target: 1, max: 2 }, stuck_after, &ThreadBudget::new(1, 0));
    let (release, stuck) = start_stuck_job(&pool);
    let queued = start(&pool, || 1).unwrap();
    thread::sleep(stuck_after * 2);
    assert_eq!(start(&pool, || 2).map(drop), Err(PoolExhausted { threads: 1 }));
    assert_eq!(queued.wait(within(SOON)), Err(Unavailable::NoThread));
    drop(release);
    assert_eq!(stuck.wait(within(SOON)), Ok(()));
    assert_eq!(start_when_free(&pool, 3).wait(within(SOON)), Ok(3));
}

#[test]
fn threads_that_hang_in_replaced_mounts_count_against_the_budget() {
    let budget = ThreadBudget::new(3, 0);
    let size = PoolSize { target: 2, max: 4 };
    let (_dir, old) = generation(size, SHORT, &budget);
    let hanging = [start_stuck_job(&old), start_stuck_job(&old)];
    old.calls.close();
    let (_other_dir, new) = generation(size, SHORT, &budget);
    let (release, last) = start_stuck_job(&new);
    thread::sleep(SHORT * 2);
    assert_eq!(start(&new, || 1).map(drop), Err(PoolExhausted { threads: 1 }));
    drop(release);
    last.wait(within(SOON)).unwrap();
    for (release, pending) in hanging {
        drop(release);
        pending.wait(within(SOON)).unwrap();
    }
    assert_eq!(start_when_free(&new, 2).wait(within(SOON)), Ok(2));
}

#[test]
fn job_that_works_on_the_local_disk_is_not_stuck() {
    let (_dir, pool) = pool(1, 1, SHORT);
    let (release, released) = mpsc::channel::<()>();
    let (started, has_started) = mpsc::channel();
    let heartbeat = Heartbeat::default();
    let paused = heartbeat.clone();
    let job = move || {
        paused.pause();
        started.send(()).unwrap();
        let _ = released.recv();
    };
    pool.calls.run(Priority::Last, heartbeat.clone(), Box::new(job)).unwrap();
    has_started.recv_timeout(SOON).unwrap();
    thread::sleep(SHORT * 2);
    assert_eq!((heartbeat.idle_for(), pool.calls.idle_for()), (Duration::ZERO, Duration::ZERO));
    let waiting = start(&pool, || 1).unwrap();
    drop(release);
    assert_eq!(waiting.wait(within(SOON)), Ok(1));
}
