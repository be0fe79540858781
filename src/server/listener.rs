//! Accepts connections, and hands those of allowed users to gRPC.
//!
//! It must not know gRPC: it gets a function that takes over a connection. Its invariants:
//! - gRPC gets no connection of another user, and at most `MAX_CONNECTIONS` are open.
//! - A duplicate of each connection's descriptor is kept here. It is only watched for a hangup, which is how open
//!   connections are counted, and used once, at a stop, to send GOAWAY.
//!
//! We send GOAWAY ourselves because gRPC cannot send one without refusing the calls that cross it on the wire. For
//! containerd a refused call is a failed pull.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, UnixCredentials, getsockopt, send, sockopt::PeerCredentials};
use nix::unistd::geteuid;

/// Open connections at one time. containerd has one or two; each costs two descriptors.
pub const MAX_CONNECTIONS: usize = 128;
/// The pause after a failed `accept`, which would fail again at once (without a free descriptor, for example).
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// At most one log line about connections that were not accepted is written in this time.
const MIN_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// An HTTP/2 GOAWAY frame: 8 bytes, type 7, no flags, stream 0. The last stream that is served has the highest number
/// possible, so every call that was begun is served. The error code is 0. See RFC 9113, section 6.8.
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// The numeric ids of the users that may connect.
#[derive(Clone, Debug)]
pub struct AllowedUids(BTreeSet<u32>);

impl AllowedUids {
    /// Allows root, the daemon's own user, and `others`.
    pub fn new(others: &[u32]) -> Self {
        Self(others.iter().copied().chain([0, geteuid().as_raw()]).collect())
    }
}

/// Identifies a connection by the number of the descriptor that gRPC has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(RawFd);

impl ConnectionId {
    pub fn from_descriptor(number: RawFd) -> Self {
        Self(number)
    }

    /// Parses gRPC's name of the peer, which is `fd:<number>` for a connection that gRPC got as a descriptor.
    /// `None`: the name has another form.
    pub fn from_peer(peer: &str) -> Option<Self> {
        peer.strip_prefix("fd:")?.parse().ok().map(Self)
    }
}

/// The thread that accepts connections.
pub struct ConnectionListener {
    thread: JoinHandle<OpenConnections>,
    /// Dropping it makes the thread end.
    close_sender: PipeWriter,
}

impl ConnectionListener {
    /// Starts to accept connections of `allowed_uids`. Each is passed to `on_accept`.
    pub fn open(
        listener: UnixListener,
        allowed_uids: AllowedUids,
        on_accept: impl FnMut(UnixStream) + Send + 'static,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (close_receiver, close_sender) = io::pipe()?;
        let acceptor = Acceptor {
            listener,
            close_receiver,
            allowed_uids,
            on_accept,
            open_connections: OpenConnections::default(),
            log: RateLimitedLog::default(),
        };
        let thread = thread::Builder::new().name("listener".to_owned()).spawn(move || acceptor.run())?;
        Ok(Self { thread, close_sender })
    }

    /// Stops accepting, and returns the open connections. If the listening socket is systemd's, a client that connects
    /// now waits for the next process.
    pub fn close(self) -> OpenConnections {
        drop(self.close_sender);
        self.thread.join().unwrap_or_default()
    }
}

/// The connections that are open, each by a duplicate of its descriptor.
#[derive(Default)]
pub struct OpenConnections(Vec<WatchedConnection>);

struct WatchedConnection {
    id: ConnectionId,
    duplicate: OwnedFd,
}

impl WatchedConnection {
    /// `poll` reports a hangup without being asked for any event. Data on the connection is only for gRPC.
    fn poll_hangup(&self) -> PollFd<'_> {
        PollFd::new(self.duplicate.as_fd(), PollFlags::empty())
    }

    fn try_send(&self, bytes: &[u8]) -> nix::Result<usize> {
        send(self.duplicate.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
    }
}

impl OpenConnections {
    /// Asks clients to send further calls to the next process, except on busy connections. Must be called while gRPC
    /// begins no response. What gRPC may write meanwhile on an idle connection is as small as GOAWAY, and small writes
    /// to a unix socket do not mix.
    pub fn send_goaway(&self, is_busy: impl Fn(ConnectionId) -> bool) {
        for connection in self.0.iter().filter(|connection| !is_busy(connection.id)) {
            // A client that is gone or does not read is disconnected at the end of the stop.
            let _ = connection.try_send(&GOAWAY);
        }
    }

    /// Waits until all connections are closed, or until `stop_waiting`, which is called every 20 ms, returns true.
    pub fn wait_for_end(&mut self, stop_waiting: impl Fn() -> bool) {
        const POLL_INTERVAL_MS: u16 = 20;
        while !self.0.is_empty() && !stop_waiting() {
            let mut fds: Vec<PollFd<'_>> = self.0.iter().map(WatchedConnection::poll_hangup).collect();
            let _ = poll(&mut fds, PollTimeout::from(POLL_INTERVAL_MS));
            let hung_up: Vec<bool> = fds.iter().map(has_event).collect();
            self.drop_closed(&hung_up);
        }
    }

    /// `hung_up` has an element for each connection.
    fn drop_closed(&mut self, hung_up: &[bool]) {
        let mut hung_up = hung_up.iter();
        self.0.retain(|_| !hung_up.next().is_some_and(|hung_up| *hung_up));
    }
}

fn has_event(fd: &PollFd<'_>) -> bool {
    fd.revents().is_none_or(|events| !events.is_empty())
}

/// Why a connection was not accepted.
#[derive(Debug)]
enum AcceptError {
    UserNotAllowed { uid: u32, pid: i32 },
    TooManyConnections { pid: i32 },
    Setup(io::Error),
    Accept(io::Error),
}

impl fmt::Display for AcceptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UserNotAllowed { uid, pid } => write!(
                f,
                "refused a connection of user {uid} (process {pid}): only root and the users of \"allowed-uids\" in the \
                 configuration may connect"
            ),
            Self::TooManyConnections { pid } => write!(
                f,
                "refused a connection of process {pid}: limit of {MAX_CONNECTIONS} connections reached; \"ss -xp\" \
                 shows which processes hold them"
            ),
            Self::Setup(cause) => write!(f, "cannot set up a connection: {cause}"),
            Self::Accept(cause) => write!(f, "cannot accept a connection: {cause}"),
        }
    }
}

/// The state of the accepting thread.
struct Acceptor<F> {
    listener: UnixListener,
    close_receiver: PipeReader,
    allowed_uids: AllowedUids,
    on_accept: F,
    open_connections: OpenConnections,
    log: RateLimitedLog,
}

/// What `poll` reported.
struct PollEvents {
    is_closing: bool,
    is_connecting: bool,
    /// An element for each open connection.
    hung_up: Vec<bool>,
}

impl<F: FnMut(UnixStream)> Acceptor<F> {
    fn run(mut self) -> OpenConnections {
        loop {
            match self.poll() {
                Ok(events) => {
                    self.open_connections.drop_closed(&events.hung_up);
                    if events.is_closing {
                        return self.open_connections;
                    }
                    if events.is_connecting {
                        self.accept();
                    }
                }
                Err(Errno::EINTR) => {}
                Err(e) => {
                    log::error!(event = "connection_poll_failed"; "cannot wait for connections: {}", e.desc());
                    thread::sleep(ACCEPT_RETRY_INTERVAL);
                }
            }
        }
    }

    fn poll(&self) -> nix::Result<PollEvents> {
        let mut fds = vec![
            PollFd::new(self.close_receiver.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.open_connections.0.iter().map(WatchedConnection::poll_hangup));
        poll(&mut fds, PollTimeout::NONE)?;
        Ok(PollEvents {
            is_closing: has_event(&fds[0]),
            is_connecting: has_event(&fds[1]),
            hung_up: fds[2..].iter().map(has_event).collect(),
        })
    }

    fn accept(&mut self) {
        // A connection takes two descriptors. If the second one is not free, the client stays in the backlog, where it
        // waits instead of being disconnected.
        let spare_descriptor = match self.listener.as_fd().try_clone_to_owned() {
            Ok(spare) => spare,
            Err(e) => return self.log_and_pause(e),
        };
        match self.listener.accept() {
            Ok((stream, _)) => {
                drop(spare_descriptor);
                if let Err(error) = self.admit(stream) {
                    self.log.warn(&error);
                }
            }
            // The client disconnected before it was accepted, or a signal came.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => self.log_and_pause(e),
        }
    }

    fn log_and_pause(&mut self, cause: io::Error) {
        self.log.warn(&AcceptError::Accept(cause));
        thread::sleep(ACCEPT_RETRY_INTERVAL);
    }

    fn admit(&mut self, stream: UnixStream) -> Result<(), AcceptError> {
        let peer = getsockopt(&stream, PeerCredentials).map_err(|e| AcceptError::Setup(e.into()))?;
        self.authorize(&peer)?;
        stream.set_nonblocking(true).map_err(AcceptError::Setup)?;
        let id = ConnectionId::from_descriptor(stream.as_raw_fd());
        let duplicate = stream.as_fd().try_clone_to_owned().map_err(AcceptError::Setup)?;
        self.open_connections.0.push(WatchedConnection { id, duplicate });
        (self.on_accept)(stream);
        Ok(())
    }

    fn authorize(&self, peer: &UnixCredentials) -> Result<(), AcceptError> {
        let (uid, pid) = (peer.uid(), peer.pid());
        if !self.allowed_uids.0.contains(&uid) {
            return Err(AcceptError::UserNotAllowed { uid, pid });
        }
        if self.open_connections.0.len() >= MAX_CONNECTIONS {
            return Err(AcceptError::TooManyConnections { pid });
        }
        Ok(())
    }
}

/// Keeps a client that connects in a loop from filling the log.
#[derive(Default)]
struct RateLimitedLog {
    last_line: Option<Instant>,
    suppressed: usize,
}

impl RateLimitedLog {
    fn warn(&mut self, error: &AcceptError) {
        if self.last_line.is_some_and(|last| last.elapsed() < MIN_LOG_INTERVAL) {
            self.suppressed += 1;
            return;
        }
        let suppressed = std::mem::take(&mut self.suppressed);
        match error {
            AcceptError::UserNotAllowed { .. } => {
                log::warn!(event = "connection_user_refused", suppressed; "{error}");
            }
            AcceptError::TooManyConnections { .. } => {
                log::warn!(event = "connection_limit_reached", suppressed; "{error}");
            }
            AcceptError::Setup(_) => log::warn!(event = "connection_setup_failed", suppressed; "{error}"),
            AcceptError::Accept(_) => log::warn!(event = "accept_failed", suppressed; "{error}"),
        }
        self.last_line = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests;
