//! What calls weigh while they are here, and when their answers may leave.
//!
//! Every request, and every list on its way out, has its bytes counted from its arrival until
//! its answer was sent, against one limit for all clients: what does not fit is refused, so no
//! client can make the daemon grow. And all answers can be held back for a moment, which is
//! how a stop finds one in which nothing is being written to a connection.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// All requests and lists that are here at one time. containerd allows a message 16 MiB.
const LIMIT: usize = 256 << 20;
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
        write!(f, "requests and lists of {mebibytes} MiB are being worked on, that is the limit: try again later")
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
    /// Answers that are being sent.
    sending: usize,
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

    /// Takes in a call whose request has so many bytes.
    pub fn take(self: &Arc<Self>, bytes: u64) -> Result<Burden, Overload> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut burden = Burden { load: Arc::clone(self), bytes: 0 };
        burden.grow(usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(CALL_BYTES))?;
        Ok(burden)
    }

    /// Calls that are not answered yet.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// Waits for the answers that are being sent, and lets no other begin until the result is
    /// dropped. None: they were not through in time.
    pub fn hold_answers(&self, limit: Duration) -> Option<Held<'_>> {
        let until = Instant::now() + limit;
        let held = Held(self);
        let mut outgoing = self.outgoing.lock();
        outgoing.held = true;
        while outgoing.sending > 0 {
            if self.changed.wait_until(&mut outgoing, until).timed_out() {
                // It takes the lock itself.
                drop(outgoing);
                return None;
            }
        }
        Some(held)
    }
}

/// Answers wait while this lives.
pub struct Held<'l>(&'l Load);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.outgoing.lock().held = false;
        self.0.changed.notify_all();
    }
}

/// A call that is here. It counts until this is dropped.
pub struct Burden {
    load: Arc<Load>,
    bytes: usize,
}

impl Burden {
    pub fn grow(&mut self, bytes: usize) -> Result<(), Overload> {
        let limit = self.load.limit;
        let fits = |now: usize| now.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.load.bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits) {
            Ok(_) => {
                self.bytes += bytes;
                Ok(())
            }
            Err(_) => Err(Overload { limit }),
        }
    }

    /// Before the answer is sent; waits while answers are held. Not for gRPC's own threads.
    pub fn answer(self) -> Sending {
        let mut outgoing = self.load.outgoing.lock();
        while outgoing.held {
            self.load.changed.wait(&mut outgoing);
        }
        outgoing.sending += 1;
        drop(outgoing);
        Sending(self)
    }
}

impl Drop for Burden {
    fn drop(&mut self) {
        self.load.bytes.fetch_sub(self.bytes, Ordering::SeqCst);
        self.load.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An answer on its way, until this is dropped.
pub struct Sending(Burden);

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.load.outgoing.lock().sending -= 1;
        self.0.load.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_refused_and_what_is_over_weighs_nothing() {
        let load = Load::with_limit(10 * CALL_BYTES);
        let mut first = load.take(0).unwrap();
        first.grow(8 * CALL_BYTES).unwrap();
        let second = load.take(0).unwrap();
        assert_eq!(load.take(0).err(), Some(Overload { limit: 10 * CALL_BYTES }));
        assert_eq!(load.take(u64::MAX).err(), Some(Overload { limit: 10 * CALL_BYTES }));
        assert_eq!(load.calls(), 2);
        drop((first, second));
        assert_eq!((load.calls(), load.bytes.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn held_answers_wait_and_none_is_being_sent_meanwhile() {
        let load = Load::new();
        let slow = load.take(1).unwrap().answer();
        assert!(load.hold_answers(Duration::from_millis(10)).is_none());
        drop(slow);
        let held = load.hold_answers(Duration::from_secs(10)).unwrap();
        let waiting = load.take(1).unwrap();
        let sent = std::thread::spawn(move || drop(waiting.answer()));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!sent.is_finished());
        drop(held);
        sent.join().unwrap();
        assert_eq!(load.calls(), 0);
    }
}
