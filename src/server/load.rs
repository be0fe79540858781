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

use super::door::ConnectionId;

/// All requests and answers that are here at one time. containerd allows a message 16 MiB.
const LIMIT: usize = 256 << 20;
/// One part in so many is not for answers: those that nobody reads must not keep others out.
const PARTS: usize = 4;
/// But for the short ones, such as what a pull asks for: those are sent whether they are read or not.
const SHORT: usize = 64 << 10;
/// What a call costs besides the bytes of its request.
const CALL_BYTES: usize = 4 << 10;

/// A call that would have been too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overload {
    pub limit: usize,
}

impl fmt::Display for Overload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = self.limit >> 20;
        write!(f, "requests and answers of {mebibytes} MiB are being worked on, that is the limit: try again later")
    }
}

pub struct Load {
    limit: usize,
    bytes: AtomicUsize,
    calls: AtomicUsize,
    outgoing: Mutex<Outgoing>,
    changed: Condvar,
}

#[derive(Default)]
struct Outgoing {
    /// How many answers are being sent on each connection. None: on one that gRPC does not name.
    sending: BTreeMap<Option<ConnectionId>, usize>,
    held: bool,
}

impl Load {
    pub fn new() -> Arc<Self> {
        Self::with_limit(LIMIT)
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
    pub fn take(self: &Arc<Self>, connection: Option<ConnectionId>, bytes: usize) -> Result<Burden, Overload> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut burden = Burden { load: Arc::clone(self), connection, request: 0, answer: 0 };
        let bytes = bytes.saturating_add(CALL_BYTES);
        self.add(bytes, self.limit)?;
        burden.request = bytes;
        Ok(burden)
    }

    /// Calls that are not answered yet.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn add(&self, bytes: usize, limit: usize) -> Result<(), Overload> {
        let fits = |now: usize| now.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits) {
            Ok(_) => Ok(()),
            Err(_) => Err(Overload { limit }),
        }
    }

    /// Lets no answer begin until the result is dropped, and waits for those that are being sent, `limit` at
    /// most: a client may not read.
    pub fn hold_answers(&self, limit: Duration) -> Held<'_> {
        let until = Instant::now() + limit;
        let mut outgoing = self.outgoing.lock();
        outgoing.held = true;
        while !outgoing.sending.is_empty() {
            if self.changed.wait_until(&mut outgoing, until).timed_out() {
                break;
            }
        }
        let busy = outgoing.sending.keys().copied().collect();
        Held { load: self, busy }
    }
}

/// Answers wait while this lives.
pub struct Held<'l> {
    load: &'l Load,
    /// Connections on which an answer is being sent all the same.
    busy: Vec<Option<ConnectionId>>,
}

impl Held<'_> {
    /// Whether an answer is, or may be, being sent on this connection.
    pub fn is_busy(&self, connection: ConnectionId) -> bool {
        self.busy.iter().any(|busy| busy.is_none_or(|busy| busy == connection))
    }

    /// How many connections, at least, have an answer on its way.
    pub fn busy(&self) -> usize {
        self.busy.len()
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.load.outgoing.lock().held = false;
        self.load.changed.notify_all();
    }
}

/// A call that is here. It counts until this is dropped.
pub struct Burden {
    load: Arc<Load>,
    connection: Option<ConnectionId>,
    request: usize,
    answer: usize,
}

impl Burden {
    /// Counts `bytes` for the answer, instead of what was counted for it before. What is not more
    /// is never refused.
    pub fn hold(&mut self, bytes: usize) -> Result<(), Overload> {
        let limit = self.load.limit;
        if bytes > self.answer {
            let limit = if bytes <= SHORT { limit } else { limit - limit / PARTS };
            self.load.add(bytes - self.answer, limit)?;
        } else {
            self.load.bytes.fetch_sub(self.answer - bytes, Ordering::SeqCst);
        }
        self.answer = bytes;
        Ok(())
    }

    /// Counts an answer that is made already. A short one is never refused, because its call may have changed
    /// something; what it takes keeps others out.
    pub fn hold_answer(&mut self, bytes: u64) -> Result<(), Overload> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if bytes > SHORT {
            return self.hold(bytes);
        }
        self.load.bytes.fetch_add(bytes, Ordering::SeqCst);
        self.answer += bytes;
        Ok(())
    }

    /// Before an answer, or a part of one, is sent; waits while answers are held. Not for gRPC's
    /// own threads.
    pub fn answer(&self) -> Sending {
        let mut outgoing = self.load.outgoing.lock();
        while outgoing.held {
            self.load.changed.wait(&mut outgoing);
        }
        *outgoing.sending.entry(self.connection).or_default() += 1;
        drop(outgoing);
        Sending { load: Arc::clone(&self.load), connection: self.connection }
    }
}

impl Drop for Burden {
    fn drop(&mut self) {
        self.load.bytes.fetch_sub(self.request + self.answer, Ordering::SeqCst);
        self.load.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An answer on its way, until this is dropped.
pub struct Sending {
    load: Arc<Load>,
    connection: Option<ConnectionId>,
}

impl Drop for Sending {
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
        let load = Load::with_limit(8 * CALL_BYTES);
        let calls: Vec<Burden> = (0..8).map(|_| load.take(None, 0).unwrap()).collect();
        assert_eq!(load.take(None, 0).err(), Some(Overload { limit: 8 * CALL_BYTES }));
        assert_eq!(load.take(None, usize::MAX).err(), Some(Overload { limit: 8 * CALL_BYTES }));
        assert_eq!(load.calls(), 8);
        drop(calls);
        assert_eq!((load.calls(), load.bytes.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn long_lists_leave_room_for_requests_and_short_ones_and_keep_what_they_have() {
        let load = Load::with_limit(8 * SHORT);
        let mut list = load.take(None, 0).unwrap();
        list.hold(5 * SHORT).unwrap();
        assert_eq!(list.hold(6 * SHORT).err(), Some(Overload { limit: 6 * SHORT }));
        let mut others = [(); 2].map(|()| load.take(None, 0).unwrap());
        assert!(others[0].hold(SHORT + 1).is_err());
        for other in &mut others {
            other.hold(SHORT).unwrap();
        }
        // There is no room for a single byte more.
        let _large = load.take(None, SHORT - 4 * CALL_BYTES).unwrap();
        assert!(load.take(None, 0).is_err());
        list.hold(5 * SHORT).unwrap();
        list.hold(SHORT + 1).unwrap();
        list.hold(2 * SHORT).unwrap();
        drop((list, others));
        assert_eq!((load.calls(), load.bytes.load(Ordering::SeqCst)), (1, SHORT - 3 * CALL_BYTES));
    }

    /// A call that has done something is told so.
    #[test]
    fn short_answers_are_counted_and_never_refused() {
        let load = Load::with_limit(8 * SHORT);
        let mut calls: Vec<Burden> = (0..10).map(|_| load.take(None, 0).unwrap()).collect();
        for call in &mut calls {
            call.hold_answer(SHORT as u64).unwrap();
        }
        assert!(load.take(None, 0).is_err(), "there is more than there may be");
        calls.truncate(1);
        assert!(calls[0].hold_answer(6 * SHORT as u64).is_err());
        calls[0].hold_answer(4 * SHORT as u64).unwrap();
        drop(calls);
        assert_eq!((load.calls(), load.bytes.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn held_answers_wait_and_connections_with_an_answer_on_its_way_are_known() {
        let load = Load::new();
        let [slow_connection, other] = [3, 4].map(ConnectionId::of_descriptor);
        let slow = load.take(Some(slow_connection), 1).unwrap();
        let sending = slow.answer();
        let held = load.hold_answers(Duration::from_millis(10));
        assert!(held.is_busy(slow_connection) && !held.is_busy(other));
        drop(held);
        // A list is being read further.
        drop(sending);
        let held = load.hold_answers(Duration::from_secs(10));
        assert!(!held.is_busy(slow_connection) && held.busy() == 0);
        let waiting = load.take(Some(other), 1).unwrap();
        let sent = std::thread::spawn(move || drop(waiting.answer()));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!sent.is_finished());
        drop(held);
        sent.join().unwrap();
        assert_eq!(load.calls(), 1);
        drop(slow);
        assert_eq!(load.calls(), 0);
        // Where gRPC does not say on which connection an answer goes out, it may be any.
        let unknown = load.take(None, 1).unwrap();
        let _sending = unknown.answer();
        assert!(load.hold_answers(Duration::from_millis(10)).is_busy(other));
    }
}
