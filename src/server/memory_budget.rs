//! The memory budget: bounds what the requests and responses of all clients take together.
//!
//! A call reserves memory for its request when it arrives and for its response before it is sent, and releases both
//! after the response was sent. It must not know gRPC, nor what a call does. Its invariants:
//! - A reservation that does not fit is refused at once, so no client can make the daemon grow.
//! - A quarter of the budget is for requests and small responses only, so that large responses whose clients do not
//!   read cannot block other calls.
//! - A response that does not grow is never refused, and neither is a small response of a call that was executed.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of all requests and responses together. containerd allows a single message 16 MiB.
const MAX_BYTES: usize = 256 << 20;
/// One part in this many of the budget is reserved for requests and small responses.
const RESERVE_DIVISOR: usize = 4;
/// Responses up to this size may use the reserve as well. The lookups of a pull are that small.
const MAX_SMALL_RESPONSE: usize = 64 << 10;
/// Bytes that a call takes besides its request.
const CALL_OVERHEAD: usize = 4 << 10;

/// The error of a reservation that does not fit into `limit` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverBudget {
    pub limit: usize,
}

impl fmt::Display for OverBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = self.limit >> 20;
        write!(f, "memory limit for requests and responses ({mebibytes} MiB) reached; try again later")
    }
}

pub struct MemoryBudget {
    max_bytes: usize,
    reserved_bytes: AtomicUsize,
    pending_calls: AtomicUsize,
}

impl MemoryBudget {
    pub fn new() -> Arc<Self> {
        Self::with_max_bytes(MAX_BYTES)
    }

    fn with_max_bytes(max_bytes: usize) -> Arc<Self> {
        Arc::new(Self { max_bytes, reserved_bytes: AtomicUsize::default(), pending_calls: AtomicUsize::default() })
    }

    /// Admits a call whose request takes `request_bytes`.
    pub fn admit(self: &Arc<Self>, request_bytes: usize) -> Result<MemoryReservation, OverBudget> {
        self.pending_calls.fetch_add(1, Ordering::SeqCst);
        let mut reservation = MemoryReservation { budget: Arc::clone(self), request_bytes: 0, response_bytes: 0 };
        let bytes = request_bytes.saturating_add(CALL_OVERHEAD);
        self.reserve(bytes, self.max_bytes)?;
        reservation.request_bytes = bytes;
        Ok(reservation)
    }

    /// The number of admitted calls whose response was not sent yet.
    pub fn pending_calls(&self) -> usize {
        self.pending_calls.load(Ordering::SeqCst)
    }

    fn reserve(&self, bytes: usize, limit: usize) -> Result<(), OverBudget> {
        let add = |reserved: usize| reserved.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.reserved_bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add) {
            Ok(_) => Ok(()),
            Err(_) => Err(OverBudget { limit }),
        }
    }
}

/// The memory of one call. Dropping it releases the memory, and the call is no longer pending.
pub struct MemoryReservation {
    budget: Arc<MemoryBudget>,
    request_bytes: usize,
    response_bytes: usize,
}

impl MemoryReservation {
    /// Replaces what is reserved for the response by `bytes`. It fails only if that is more than before.
    pub fn resize_response(&mut self, bytes: usize) -> Result<(), OverBudget> {
        let budget = &self.budget;
        if bytes > self.response_bytes {
            let reserve = if bytes <= MAX_SMALL_RESPONSE { 0 } else { budget.max_bytes / RESERVE_DIVISOR };
            budget.reserve(bytes - self.response_bytes, budget.max_bytes - reserve)?;
        } else {
            budget.reserved_bytes.fetch_sub(self.response_bytes - bytes, Ordering::SeqCst);
        }
        self.response_bytes = bytes;
        Ok(())
    }

    /// Reserves memory for the response of a call that was executed. A small one is never refused, because the call
    /// may have changed something. It may exceed the budget, which keeps new calls out.
    pub fn reserve_response(&mut self, bytes: u64) -> Result<(), OverBudget> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if bytes > MAX_SMALL_RESPONSE {
            return self.resize_response(bytes);
        }
        self.budget.reserved_bytes.fetch_add(bytes, Ordering::SeqCst);
        self.response_bytes += bytes;
        Ok(())
    }
}

impl Drop for MemoryReservation {
    fn drop(&mut self) {
        self.budget.reserved_bytes.fetch_sub(self.request_bytes + self.response_bytes, Ordering::SeqCst);
        self.budget.pending_calls.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
