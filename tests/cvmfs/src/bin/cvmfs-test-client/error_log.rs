//! The errors that the client remembers, as the real one does: the last lines of its log, the number of requests that were
//! answered with an input/output error, and the time of the last of them.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use fuser::Errno;

/// Lines that the real client keeps.
const LINES: usize = 10;
/// The lines of the start are filled up to this length, so that the log has 3 KiB from the beginning.
const START_LINE: usize = 300;

pub struct ErrorLog {
    /// With the time of each in seconds since 1970; the newest is the last.
    lines: Mutex<VecDeque<(u64, String)>>,
    io_errors: AtomicU64,
    last_io_error: AtomicU64,
}

impl ErrorLog {
    pub fn new() -> Self {
        let start = |step| format!("{:.<START_LINE$}", format!("CernVM-FS: step {step} of the start "));
        let lines = (1..=LINES).map(|step| (now(), start(step))).collect();
        Self { lines: Mutex::new(lines), io_errors: AtomicU64::new(0), last_io_error: AtomicU64::new(0) }
    }

    /// The words go to stderr and into the log, the kernel only gets a number.
    pub fn report(&self, error: impl Display) -> Errno {
        eprintln!("cvmfs-test-client: {error}");
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.pop_front();
        lines.push_back((now(), error.to_string()));
        Errno::EIO
    }

    /// Counts the answer if it is an input/output error.
    pub fn count(&self, errno: Errno) {
        if errno.code() == Errno::EIO.code() {
            self.io_errors.fetch_add(1, Ordering::Relaxed);
            self.last_io_error.store(now(), Ordering::Relaxed);
        }
    }

    /// The newest line first.
    pub fn text(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().rev().fold(String::new(), |mut text, (time, line)| {
            writeln!(text, "[{time}] {line}").expect("a String takes every line");
            text
        })
    }

    pub fn io_errors(&self) -> u64 {
        self.io_errors.load(Ordering::Relaxed)
    }

    /// In seconds since 1970; 0 when there was none.
    pub fn last_io_error(&self) -> u64 {
        self.last_io_error.load(Ordering::Relaxed)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
