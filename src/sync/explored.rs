//! The model behind `sync` in tests of schedules: locks and threads of the crate `shuttle`, and a clock of our own.
//!
//! With `Time::StandsStill`, a time limit never passes, so a wakeup that is lost is a deadlock, which fails the test. With
//! `Time::Passes`, each wait with a time limit may end at its limit, whatever else happens; the clock jumps there.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use shuttle::rand::{Rng, thread_rng};
use shuttle::sync as model;
pub use shuttle::thread;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Time {
    StandsStill,
    Passes,
}

// All threads of an execution run on the thread of the test.
std::thread_local! {
    static TIME: Cell<Time> = const { Cell::new(Time::StandsStill) };
    static CLOCK: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Runs `test` under this number of random schedules.
pub fn explore(time: Time, schedules: usize, test: impl Fn() + Send + Sync + 'static) {
    let run = move || {
        TIME.set(time);
        test();
    };
    // SQLite needs more than the default stack.
    let mut config = shuttle::Config::default();
    config.stack_size = 1 << 20;
    shuttle::Runner::new(shuttle::scheduler::RandomScheduler::new(schedules), config).run(run);
}

pub fn now() -> Instant {
    let now = CLOCK.get().unwrap_or_else(Instant::now);
    CLOCK.set(Some(now));
    now
}

/// Lets other threads run, and possibly the time pass until `limit`.
fn pass_time(limit: Instant) {
    thread::yield_now();
    if TIME.get() == Time::Passes && thread_rng().gen_bool(0.25) {
        CLOCK.set(Some(now().max(limit)));
    }
}

#[derive(Default)]
pub struct Mutex<T>(model::Mutex<T>);

pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    /// None: a condition variable has it.
    inner: Option<model::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub fn new(value: T) -> Self {
        Self(model::Mutex::new(value))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        let inner = Some(self.0.lock().unwrap_or_else(PoisonError::into_inner));
        MutexGuard { mutex: self, inner }
    }

    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok().map(|inner| MutexGuard { mutex: self, inner: Some(inner) })
    }

    pub fn try_lock_until(&self, limit: Instant) -> Option<MutexGuard<'_, T>> {
        if TIME.get() == Time::StandsStill {
            return Some(self.lock());
        }
        loop {
            match self.try_lock() {
                None if now() < limit => pass_time(limit),
                locked => return locked,
            }
        }
    }

    pub fn try_lock_for(&self, limit: Duration) -> Option<MutexGuard<'_, T>> {
        self.try_lock_until(now() + limit)
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mutex")
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.inner.as_ref().expect("the guard is not in a wait")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().expect("the guard is not in a wait")
    }
}

#[derive(Default)]
pub struct Condvar(model::Condvar);

pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    pub fn notify_all(&self) {
        self.0.notify_all();
    }

    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        guard.inner = guard.inner.take().map(|inner| self.0.wait(inner).unwrap_or_else(PoisonError::into_inner));
    }

    /// With a time that passes, the wait may also end for no reason, as the time of all other threads goes on.
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, limit: Instant) -> WaitTimeoutResult {
        if TIME.get() == Time::StandsStill {
            self.wait(guard);
            return WaitTimeoutResult(false);
        }
        drop(guard.inner.take());
        pass_time(limit);
        guard.inner = guard.mutex.lock().inner.take();
        WaitTimeoutResult(now() >= limit)
    }
}

pub struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> OnceLock<T> {
    pub fn new() -> Self {
        Self { value: std::sync::OnceLock::new(), is_set: Mutex::new(false), changed: Condvar::new() }
    }

    pub fn get(&self) -> Option<&T> {
        self.value.get()
    }

    pub fn get_or_init(&self, value: impl FnOnce() -> T) -> &T {
        self.value.get_or_init(value)
    }

    pub fn set(&self, value: T) -> Result<(), T> {
        self.value.set(value)?;
        *self.is_set.lock() = true;
        self.changed.notify_all();
        Ok(())
    }

    pub fn wait(&self) -> &T {
        let mut is_set = self.is_set.lock();
        while !*is_set {
            self.changed.wait(&mut is_set);
        }
        self.value.get().expect("it is set")
    }
}
