//! A count of memory that is shared by several threads, for a common bound.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The bytes that one user of memory has added to a common sum. Dropping it subtracts them.
pub struct CountedMemory {
    bytes: usize,
    sum: Arc<AtomicUsize>,
}

impl CountedMemory {
    pub fn new(sum: &Arc<AtomicUsize>) -> Self {
        Self { bytes: 0, sum: Arc::clone(sum) }
    }

    /// Adds `bytes` and returns the new sum over all users.
    pub fn add(&mut self, bytes: usize) -> usize {
        self.bytes += bytes;
        self.sum.fetch_add(bytes, Ordering::Relaxed) + bytes
    }
}

impl Drop for CountedMemory {
    fn drop(&mut self) {
        self.sum.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
