//! What calls weigh while they are here, and when their answers may leave.
//!
//! Every request has what it takes counted from its arrival until its answer was sent, and every
//! answer what of it is here, against one limit for all clients: what does not fit is refused, so
//! no client can make the daemon grow. And all answers can be held back for a moment, which is
//! how a stop finds one in which nothing is being written to a connection, or learns on which
//! connections something is.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::listener::ConnectionId;

/// All requests and answers that are here at one time. containerd allows a message 16 MiB.
const BUDGET: usize = 256 << 20;
/// One part in so many is not for answers: those that nobody reads must not keep others out.
const RESERVE_DIVISOR: usize = 4;
/// But for the short ones, such as what a pull asks for: those are sent whether they are read or not.
const SMALL_PAGE: usize = 64 << 10;
/// What a call costs besides the bytes of its request.
const CALL_OVERHEAD: usize = 4 << 10;

/// A call that would have been too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverBudget {
    pub limit: usize,
}

impl fmt::Display for OverBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = self.limit >> 20;
        write!(f, "requests and answers of {mebibytes} MiB are being worked on, that is the limit: try again later")
    }
}

pub struct MemoryBudget {
    limit: usize,
    bytes: AtomicUsize,
    calls: AtomicUsize,
    outgoing: Mutex<SendState>,
    changed: Condvar,
}

#[derive(Default)]
struct SendState {
    /// How many answers are being sent on each connection. None: on one that gRPC does not name.
    sending: BTreeMap<Option<ConnectionId>, usize>,
    held: bool,
}

impl MemoryBudget {
    pub fn new() -> Arc<Self> {
        Self::with_limit(BUDGET)
    }

    fn with_limit(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            bytes: AtomicUsize::default(),
            calls: AtomicUsize::default(),
            outgoing: Mutex::default(),
            changed: Condvar::default(),
        })
    }

    /// Takes in a call on `connection` whose request takes so many bytes.
    pub fn admit(
        self: &Arc<Self>,
        connection: Option<ConnectionId>,
        bytes: usize,
    ) -> Result<MemoryReservation, OverBudget> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut reservation = MemoryReservation { load: Arc::clone(self), connection, request: 0, answer: 0 };
        let bytes = bytes.saturating_add(CALL_OVERHEAD);
        self.add(bytes, self.limit)?;
        reservation.request = bytes;
        Ok(reservation)
    }

    /// Calls that are not answered yet.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn add(&self, bytes: usize, limit: usize) -> Result<(), OverBudget> {
        let fits = |now: usize| now.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits) {
            Ok(_) => Ok(()),
            Err(_) => Err(OverBudget { limit }),
        }
    }

    /// Lets no answer begin until the result is dropped, and waits for those that are being sent, `limit` at
    /// most: a client may not read.
    pub fn pause_sending(&self, limit: Duration) -> SendPause<'_> {
        let until = Instant::now() + limit;
        let mut outgoing = self.outgoing.lock();
        outgoing.held = true;
        while !outgoing.sending.is_empty() {
            if self.changed.wait_until(&mut outgoing, until).timed_out() {
                break;
            }
        }
        let busy = outgoing.sending.keys().copied().collect();
        SendPause { load: self, busy }
    }
}

/// Answers wait while this lives.
pub struct SendPause<'l> {
    load: &'l MemoryBudget,
    /// Connections on which an answer is being sent all the same.
    busy: Vec<Option<ConnectionId>>,
}

impl SendPause<'_> {
    /// Whether an answer is, or may be, being sent on this connection.
    pub fn is_busy(&self, connection: ConnectionId) -> bool {
        self.busy.iter().any(|busy| busy.is_none_or(|busy| busy == connection))
    }

    /// How many connections, at least, have an answer on its way.
    pub fn busy(&self) -> usize {
        self.busy.len()
    }
}

impl Drop for SendPause<'_> {
    fn drop(&mut self) {
        self.load.outgoing.lock().held = false;
        self.load.changed.notify_all();
    }
}

/// A call that is here. It counts until this is dropped.
pub struct MemoryReservation {
    load: Arc<MemoryBudget>,
    connection: Option<ConnectionId>,
    request: usize,
    answer: usize,
}

impl MemoryReservation {
    /// Counts `bytes` for the answer, instead of what was counted for it before. What is not more
    /// is never refused.
    pub fn resize_answer(&mut self, bytes: usize) -> Result<(), OverBudget> {
        let limit = self.load.limit;
        if bytes > self.answer {
            let limit = if bytes <= SMALL_PAGE { limit } else { limit - limit / RESERVE_DIVISOR };
            self.load.add(bytes - self.answer, limit)?;
        } else {
            self.load.bytes.fetch_sub(self.answer - bytes, Ordering::SeqCst);
        }
        self.answer = bytes;
        Ok(())
    }

    /// Counts an answer that is made already. A short one is never refused, because its call may have changed
    /// something; what it takes keeps others out.
    pub fn reserve_answer(&mut self, bytes: u64) -> Result<(), OverBudget> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if bytes > SMALL_PAGE {
            return self.resize_answer(bytes);
        }
        self.load.bytes.fetch_add(bytes, Ordering::SeqCst);
        self.answer += bytes;
        Ok(())
    }

    /// Before an answer, or a part of one, is sent; waits while answers are held. Not for gRPC's
    /// own threads.
    pub fn begin_send(&self) -> SendGuard {
        let mut outgoing = self.load.outgoing.lock();
        while outgoing.held {
            self.load.changed.wait(&mut outgoing);
        }
        *outgoing.sending.entry(self.connection).or_default() += 1;
        drop(outgoing);
        SendGuard { load: Arc::clone(&self.load), connection: self.connection }
    }
}

impl Drop for MemoryReservation {
    fn drop(&mut self) {
        self.load.bytes.fetch_sub(self.request + self.answer, Ordering::SeqCst);
        self.load.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An answer on its way, until this is dropped.
pub struct SendGuard {
    load: Arc<MemoryBudget>,
    connection: Option<ConnectionId>,
}

impl Drop for SendGuard {
    fn drop(&mut self) {
        let mut outgoing = self.load.outgoing.lock();
        if let Some(count) = outgoing.sending.get_mut(&self.connection) {
            *count -= 1;
            if *count == 0 {
                outgoing.sending.remove(&self.connection);
            }
        }
        self.load.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_refused_and_what_is_over_weighs_nothing() {
        let load = MemoryBudget::with_limit(8 * CALL_OVERHEAD);
        let calls: Vec<MemoryReservation> = (0..8).map(|_| load.admit(None, 0).unwrap()).collect();
        assert_eq!(load.admit(None, 0).err(), Some(OverBudget { limit: 8 * CALL_OVERHEAD }));
        assert_eq!(load.admit(None, usize::MAX).err(), Some(OverBudget { limit: 8 * CALL_OVERHEAD }));
        assert_eq!(load.calls(), 8);
        drop(calls);
        assert_eq!((load.calls(), load.bytes.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn long_lists_leave_room_for_requests_and_short_ones_and_keep_what_they_have() {
        let load = MemoryBudget::with_limit(8 * SMALL_PAGE);
        let mut list = load.admit(None, 0).unwrap();
        list.resize_answer(5 * SMALL_PAGE).unwrap();
        assert_eq!(list.resize_answer(6 * SMALL_PAGE).err(), Some(OverBudget { limit: 6 * SMALL_PAGE }));
        let mut others = [(); 2].map(|()| load.admit(None, 0).unwrap());
        assert!(others[0].resize_answer(SMALL_PAGE + 1).is_err());
        for other in &mut others {
            other.resize_answer(SMALL_PAGE).unwrap();
        }
        // There is no room for a single byte more.
        let _large = load.admit(None, SMALL_PAGE - 4 * CALL_OVERHEAD).unwrap();
        assert!(load.admit(None, 0).is_err());
        list.resize_answer(5 * SMALL_PAGE).unwrap();
        list.resize_answer(SMALL_PAGE + 1).unwrap();
        list.resize_answer(2 * SMALL_PAGE).unwrap();
        drop((list, others));
        assert_eq!((load.calls(), load.bytes.load(Ordering::SeqCst)), (1, SMALL_PAGE - 3 * CALL_OVERHEAD));
    }

    /// A call that has done something is told so.
    #[test]
    fn short_answers_are_counted_and_never_refused() {
        let load = MemoryBudget::with_limit(8 * SMALL_PAGE);
        let mut calls: Vec<MemoryReservation> = (0..10).map(|_| load.admit(None, 0).unwrap()).collect();
        for call in &mut calls {
            call.reserve_answer(SMALL_PAGE as u64).unwrap();
        }
        assert!(load.admit(None, 0).is_err(), "there is more than there may be");
        calls.truncate(1);
        assert!(calls[0].reserve_answer(6 * SMALL_PAGE as u64).is_err());
        calls[0].reserve_answer(4 * SMALL_PAGE as u64).unwrap();
        drop(calls);
        assert_eq!((load.calls(), load.bytes.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn held_answers_wait_and_connections_with_an_answer_on_its_way_are_known() {
        let load = MemoryBudget::new();
        let [slow_connection, other] = [3, 4].map(ConnectionId::of_descriptor);
        let slow = load.admit(Some(slow_connection), 1).unwrap();
        let sending = slow.begin_send();
        let held = load.pause_sending(Duration::from_millis(10));
        assert!(held.is_busy(slow_connection) && !held.is_busy(other));
        drop(held);
        // A list is being read further.
        drop(sending);
        let held = load.pause_sending(Duration::from_secs(10));
        assert!(!held.is_busy(slow_connection) && held.busy() == 0);
        let waiting = load.admit(Some(other), 1).unwrap();
        let sent = std::thread::spawn(move || drop(waiting.begin_send()));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!sent.is_finished());
        drop(held);
        sent.join().unwrap();
        assert_eq!(load.calls(), 1);
        drop(slow);
        assert_eq!(load.calls(), 0);
        // Where gRPC does not say on which connection an answer goes out, it may be any.
        let unknown = load.admit(None, 1).unwrap();
        let _sending = unknown.begin_send();
        assert!(load.pause_sending(Duration::from_millis(10)).is_busy(other));
    }
}
