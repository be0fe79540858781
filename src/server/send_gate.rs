//! The send gate: knows on which connections gRPC is sending a response, and can pause all sending.
//!
//! A stop writes GOAWAY to the connections itself (see `listener`). That must not mix with a response, so the stop
//! pauses sending for a moment and leaves out the connections on which a response is still being sent.
//! The gate must not know what is sent. Its invariants:
//! - While a `SendPause` lives, no `begin_send` returns.
//! - Every connection on which a `SendGuard` lives is busy for a pause that begins meanwhile.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::listener::ConnectionId;

#[derive(Default)]
pub struct SendGate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    /// The number of responses that are being sent on each connection. `None` stands for a connection that gRPC does
    /// not name.
    sending: BTreeMap<Option<ConnectionId>, usize>,
    is_paused: bool,
}

impl SendGate {
    /// To be called before a response, or a part of one, is sent. It waits while sending is paused, so it must not be
    /// called on a thread of gRPC.
    pub fn begin_send(self: &Arc<Self>, connection: Option<ConnectionId>) -> SendGuard {
        let mut state = self.state.lock();
        while state.is_paused {
            self.changed.wait(&mut state);
        }
        *state.sending.entry(connection).or_default() += 1;
        SendGuard { gate: Arc::clone(self), connection }
    }

    /// Lets no response begin until the result is dropped, and waits for those that are being sent. A client may not
    /// read, so it waits for `time_limit` at most.
    pub fn pause(&self, time_limit: Duration) -> SendPause<'_> {
        let deadline = Instant::now() + time_limit;
        let mut state = self.state.lock();
        state.is_paused = true;
        while !state.sending.is_empty() {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let busy = state.sending.keys().copied().collect();
        SendPause { gate: self, busy }
    }
}

/// Marks a response that is being sent, until it is dropped.
pub struct SendGuard {
    gate: Arc<SendGate>,
    connection: Option<ConnectionId>,
}

impl Drop for SendGuard {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        if let Some(count) = state.sending.get_mut(&self.connection) {
            *count -= 1;
            if *count == 0 {
                state.sending.remove(&self.connection);
            }
        }
        self.gate.changed.notify_all();
    }
}

/// Pauses sending until it is dropped.
pub struct SendPause<'g> {
    gate: &'g SendGate,
    /// The connections on which a response is being sent in spite of the pause.
    busy: Vec<Option<ConnectionId>>,
}

impl SendPause<'_> {
    /// Whether a response is being sent on this connection, or may be on one that gRPC does not name.
    pub fn is_busy(&self, connection: ConnectionId) -> bool {
        self.busy.iter().any(|busy| busy.is_none_or(|busy| busy == connection))
    }

    /// The number of connections on which a response is being sent. Those that gRPC does not name count as one.
    pub fn busy_connections(&self) -> usize {
        self.busy.len()
    }
}

impl Drop for SendPause<'_> {
    fn drop(&mut self) {
        self.gate.state.lock().is_paused = false;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_names_busy_connections_and_holds_new_responses_back() {
        let gate = Arc::new(SendGate::default());
        let [slow, idle] = [3, 4].map(ConnectionId::from_descriptor);
        let sending = gate.begin_send(Some(slow));
        let pause = gate.pause(Duration::from_millis(10));
        assert!(pause.is_busy(slow) && !pause.is_busy(idle));
        drop(pause);
        drop(sending);
        let pause = gate.pause(Duration::from_secs(10));
        assert!(!pause.is_busy(slow) && pause.busy_connections() == 0);
        let waiting = Arc::clone(&gate);
        let sender = std::thread::spawn(move || drop(waiting.begin_send(Some(idle))));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!sender.is_finished());
        drop(pause);
        sender.join().unwrap();
    }

    /// A response on a connection without a name may be on any connection.
    #[test]
    fn response_on_an_unnamed_connection_makes_all_connections_busy() {
        let gate = Arc::new(SendGate::default());
        let _sending = gate.begin_send(None);
        assert!(gate.pause(Duration::from_millis(10)).is_busy(ConnectionId::from_descriptor(4)));
    }
}
