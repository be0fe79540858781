//! Memory that several threads take, and that is bounded together.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of one user of memory, which are part of a sum over all users until this is dropped.
pub struct CountedMemory {
    bytes: usize,
    sum: Arc<AtomicUsize>,
}

impl CountedMemory {
    pub fn new(sum: &Arc<AtomicUsize>) -> Self {
        Self { bytes: 0, sum: Arc::clone(sum) }
    }

    /// Counts `bytes` more, and returns the sum.
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
