//! Locks, threads and time of the rooms whose protocols are tested under explored schedules.
//!
//! A normal build takes them from `parking_lot` and `std`. With the feature `shuttle`, the tests take them from the
//! model in `explored`, in which a scheduler decides who runs next and a clock that stands still unless a test lets time
//! limits pass.
#![forbid(unsafe_code)]

#[cfg(all(test, feature = "shuttle"))]
pub mod explored;

#[cfg(all(test, feature = "shuttle"))]
pub use explored::{Condvar, Mutex, MutexGuard, OnceLock, now, thread};
#[cfg(not(all(test, feature = "shuttle")))]
pub use parking_lot::{Condvar, Mutex, MutexGuard};
#[cfg(all(test, feature = "shuttle"))]
pub use shuttle::{sync::atomic, thread_local};
#[cfg(not(all(test, feature = "shuttle")))]
pub use std::sync::{OnceLock, atomic};
#[cfg(not(all(test, feature = "shuttle")))]
pub use std::{thread, thread_local};

#[cfg(not(all(test, feature = "shuttle")))]
pub fn now() -> std::time::Instant {
    std::time::Instant::now()
}
