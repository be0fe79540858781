//! The protocols of calls and of a mount's life under explored schedules.
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::executor::{PoolSize, ThreadBudget};
use super::generation::RepositorySettings;
use super::health::MountProbe;
use super::*;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::explored::{Time, explore};
use crate::sync::{Condvar, now, thread};
use crate::system::Host;

const TIMEOUT: Duration = Duration::from_secs(2);

/// A FUSE mount, of which the first one hangs until it is released.
#[derive(Default)]
struct FakeMount {
    device: AtomicU64,
    is_released: Mutex<bool>,
    released: Condvar,
}

impl FakeMount {
    /// A system call on what is mounted now.
    fn call(&self) {
        let mut is_released = self.is_released.lock();
        while self.device.load(Ordering::SeqCst) == 0 && !*is_released {
            self.released.wait(&mut is_released);
        }
    }

    /// A system call on the first mount, which was begun before another one was there.
    fn call_first(&self) {
        let mut is_released = self.is_released.lock();
        while !*is_released {
            self.released.wait(&mut is_released);
        }
    }

    fn release(&self) {
        *self.is_released.lock() = true;
        self.released.notify_all();
    }
}

impl MountProbe for FakeMount {
    fn probe(&self) -> Result<(), String> {
        if self.device.load(Ordering::SeqCst) == 0 {
            self.call_first();
            return Err("it is dead".to_owned());
        }
        Ok(())
    }

    fn device(&self) -> Option<u64> {
        Some(self.device.load(Ordering::SeqCst))
    }
}

fn repository(calls: PoolSize, threads: &ThreadBudget, mount: &Arc<FakeMount>) -> Repository {
    Repository::with_settings(RepositorySettings {
        name: "r".to_owned(),
        path: PathBuf::from("/nonexistent"),
        timeout: TIMEOUT,
        sys: Arc::new(Host),
        mount: Arc::<FakeMount>::clone(mount),
        calls,
        scans: calls,
        threads: threads.clone(),
    })
}

/// A repository whose mount answers.
fn mounted(calls: PoolSize, threads: &ThreadBudget) -> Arc<Repository> {
    let mount = Arc::new(FakeMount::default());
    mount.device.store(1, Ordering::SeqCst);
    Arc::new(repository(calls, threads, &mount))
}

fn deadline(limit: Duration) -> Instant {
    now() + limit
}

fn join_all<T>(threads: Vec<thread::JoinHandle<T>>) -> Vec<T> {
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// Threads of the repository end, and give their parts of the budget back.
fn wait_for_end(repository: &Arc<Repository>, threads: &ThreadBudget) {
    repository.generation().close();
    while threads.used() > 0 {
        thread::yield_now();
    }
}

#[test]
fn every_call_has_its_result_without_the_help_of_a_time_limit() {
    explore(Time::StandsStill, 1_000, || {
        let threads = ThreadBudget::new(8, 2);
        let repository = mounted(PoolSize { target: 2, max: 3 }, &threads);
        let callers = (0..3).map(|n| {
            let repository = Arc::clone(&repository);
            thread::spawn(move || {
                let first = repository.spawn(move |_| Ok(n), drop);
                let second = repository.spawn(move |_| Ok(n + 10), drop);
                let last = repository.call(move |_| Ok(n + 20));
                (first.wait(deadline(TIMEOUT)), second.wait(deadline(TIMEOUT)), last)
            })
        });
        for (n, results) in join_all(callers.collect()).into_iter().enumerate() {
            assert_eq!(results, (Ok(n), Ok(n + 10), Ok(n + 20)));
        }
        assert!(threads.used() <= 3);
        wait_for_end(&repository, &threads);
    });
}

#[test]
fn each_result_goes_to_the_caller_or_is_handed_over_and_never_both() {
    explore(Time::Passes, 1_000, || {
        let threads = ThreadBudget::new(8, 2);
        let repository = mounted(PoolSize { target: 1, max: 2 }, &threads);
        let (ran, abandoned) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let callers = (0..3).map(|n| {
            let (repository, ran, abandoned) = (Arc::clone(&repository), Arc::clone(&ran), Arc::clone(&abandoned));
            thread::spawn(move || {
                let job = move |_: &Arc<MountGeneration>| {
                    ran.fetch_add(1, Ordering::SeqCst);
                    Ok(n)
                };
                let on_abandoned = move |_| drop(abandoned.fetch_add(1, Ordering::SeqCst));
                let handle = repository.spawn(job, on_abandoned);
                usize::from(handle.wait(deadline(Duration::from_millis(1))).is_ok())
            })
        });
        let returned: usize = join_all(callers.collect()).into_iter().sum();
        wait_for_end(&repository, &threads);
        assert_eq!(ran.load(Ordering::SeqCst), returned + abandoned.load(Ordering::SeqCst));
    });
}

#[test]
fn no_call_waits_for_ever_for_a_thread_that_cannot_be_started() {
    explore(Time::Passes, 1_000, || {
        let threads = ThreadBudget::new(1, 1);
        let mount = Arc::new(FakeMount::default());
        let repository = Arc::new(repository(PoolSize { target: 1, max: 2 }, &threads, &mount));
        let callers = (0..3).map(|n| {
            let (repository, mount) = (Arc::clone(&repository), Arc::clone(&mount));
            thread::spawn(move || {
                let handle = repository.spawn(
                    move |_| {
                        mount.call_first();
                        Ok(n)
                    },
                    drop,
                );
                handle.wait(deadline(TIMEOUT * 2)).is_ok()
            })
        });
        assert_eq!(join_all(callers.collect()), [false; 3], "the mount hangs until all have given up");
        mount.release();
        wait_for_end(&repository, &threads);
    });
}

/// The first mount hangs; another one is mounted in its place while calls on the first are waited for, and failures of
/// the first come after that.
#[test]
fn new_mount_is_used_and_is_not_blamed_for_the_old_one() {
    explore(Time::Passes, 500, || {
        let threads = ThreadBudget::new(8, 4);
        let mount = Arc::new(FakeMount::default());
        let repository = Arc::new(repository(PoolSize { target: 1, max: 3 }, &threads, &mount));
        // The start of the daemon has seen the first mount.
        let first = repository.generation();
        first.health.record_device();
        let hanging = (0..2).map(|_| {
            let (repository, mount) = (Arc::clone(&repository), Arc::clone(&mount));
            thread::spawn(move || {
                let begun = repository.spawn(
                    move |generation| {
                        if generation.number() > 0 {
                            return Ok(true);
                        }
                        mount.call_first();
                        let (path, errno) = (PathBuf::from("/nonexistent"), nix::errno::Errno::ENOTCONN);
                        Err(generation.report_failed_call(crate::system::Error { call: "late call", path, errno }))
                    },
                    drop,
                );
                begun.wait(deadline(TIMEOUT * 2))
            })
        });
        let hanging: Vec<_> = hanging.collect();
        mount.device.store(7, Ordering::SeqCst);
        let results = join_all(hanging);
        // Somebody has waited in vain, unless both calls came late enough for the new mount.
        if results.iter().any(Result::is_err) {
            while !matches!(repository.call(|generation| Ok(generation.number())), Ok(1)) {
                thread::yield_now();
            }
            assert_eq!(repository.generation().number(), 1);
            assert!(first.check().is_err() && first.health.is_waiting_pointless());
        }
        mount.release();
        while threads.used() > 0 {
            repository.generation().close();
            thread::yield_now();
        }
        if let Err(Unavailable::KnownDown(outage)) = repository.generation().check() {
            assert!(!outage.why.contains("late call"), "{}", outage.why);
        }
    });
}
