//! Who comes in: connections are accepted here, one by one, and those of the right users are
//! handed to gRPC.
//!
//! A duplicate of each connection's descriptor is kept and only watched for its end, which is
//! how they are counted. At a stop the same descriptor tells the client to go: gRPC itself
//! knows no way to send GOAWAY without refusing the calls that cross it on the wire, and to
//! containerd a refused call is a failed pull.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, UnixCredentials, getsockopt, send, sockopt::PeerCredentials};
use nix::unistd::geteuid;

/// Connections at one time. containerd has one or two; each costs two descriptors.
pub const MAX_CONNECTIONS: usize = 128;
/// After an `accept` that failed (no free descriptor, say) the next one waits so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Refused connections are logged so often at most.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// HTTP/2's GOAWAY: 8 bytes, type 7, no flags, stream 0; every stream that was begun is
/// served (the last one has the highest number there is), no error. RFC 9113, section 6.8.
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// The users that may connect, by their numeric ids.
#[derive(Clone, Debug)]
pub struct AllowedUids(BTreeSet<u32>);

impl AllowedUids {
    /// root, the daemon's own user, and `others`.
    pub fn new(others: &[u32]) -> Self {
        Self(others.iter().copied().chain([0, geteuid().as_raw()]).collect())
    }
}

/// A connection, by the number of the descriptor under which gRPC has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(RawFd);

impl ConnectionId {
    pub fn of_descriptor(number: RawFd) -> Self {
        Self(number)
    }

    /// What gRPC calls the other end of a connection whose descriptor it was given, `fd:<number>`. None: gRPC
    /// calls it otherwise.
    pub fn from_peer(peer: &str) -> Option<Self> {
        peer.strip_prefix("fd:")?.parse().ok().map(Self)
    }
}

pub struct ConnectionListener {
    thread: JoinHandle<OpenConnections>,
    close: PipeWriter,
}

impl ConnectionListener {
    /// Accepts connections of the `admitted` from now on, and gives them to `into_grpc_fd`.
    pub fn open(
        listener: UnixListener,
        admitted: AllowedUids,
        hand_over: impl FnMut(UnixStream) + Send + 'static,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (closed, close) = io::pipe()?;
        let porter = Acceptor { listener, admitted, hand_over, complaints: RateLimitedLog::default() };
        let thread = thread::Builder::new().name("door".to_owned()).spawn(move || porter.work(&closed))?;
        Ok(Self { thread, close })
    }

    /// Accepts no more: whoever connects now waits for the next process, if the listening
    /// socket lives on. The result is who is inside.
    pub fn close(self) -> OpenConnections {
        drop(self.close);
        self.thread.join().unwrap_or_default()
    }
}

/// The connections that are open, by their watched duplicates.
#[derive(Default)]
pub struct OpenConnections(Vec<(ConnectionId, OwnedFd)>);

impl OpenConnections {
    /// Asks the clients to take their further calls elsewhere, to the next process, but for those of connections
    /// that are busy. To be called while gRPC begins to write no answer: what it may write then on the others
    /// is as small as this, and small writes to a unix socket do not mix.
    pub fn send_goaway(&self, is_busy: impl Fn(ConnectionId) -> bool) {
        for (_, connection) in self.0.iter().filter(|(id, _)| !is_busy(*id)) {
            // One that is gone, or that does not read, is cut off at the end.
            let _ = try_send(connection, &GOAWAY);
        }
    }

    /// Waits for the end of all, until `enough` at most; it is asked now and then.
    pub fn wait_for_end(&mut self, enough: impl Fn() -> bool) {
        const POLL_INTERVAL: u16 = 20;
        while !self.0.is_empty() && !enough() {
            let ended = {
                let mut fds: Vec<PollFd<'_>> = self.0.iter().map(|(_, connection)| poll_hangup(connection)).collect();
                let _ = poll(&mut fds, PollTimeout::from(POLL_INTERVAL));
                fds.iter().map(has_event).collect::<Vec<_>>()
            };
            self.drop_closed(&ended);
        }
    }

    fn drop_closed(&mut self, ended: &[bool]) {
        let mut ended = ended.iter();
        self.0.retain(|_| !ended.next().is_some_and(|ended| *ended));
    }
}

fn try_send(connection: &OwnedFd, bytes: &[u8]) -> nix::Result<usize> {
    send(connection.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
}

/// Only its end, which needs no asking: what it carries is gRPC's.
fn poll_hangup(connection: &OwnedFd) -> PollFd<'_> {
    PollFd::new(connection.as_fd(), PollFlags::empty())
}

fn has_event(fd: &PollFd<'_>) -> bool {
    fd.revents().is_none_or(|events| !events.is_empty())
}

struct Acceptor<F> {
    listener: UnixListener,
    admitted: AllowedUids,
    hand_over: F,
    complaints: RateLimitedLog,
}

impl<F: FnMut(UnixStream)> Acceptor<F> {
    fn work(mut self, closed: &PipeReader) -> OpenConnections {
        let mut inside = OpenConnections::default();
        loop {
            let (is_closed, is_knocking, ended) = {
                let mut fds = vec![
                    PollFd::new(closed.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                ];
                fds.extend(inside.0.iter().map(|(_, connection)| poll_hangup(connection)));
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) => {}
                    Err(Errno::EINTR) => continue,
                    Err(e) => {
                        log::error!("cannot wait for connections: {}", e.desc());
                        thread::sleep(ACCEPT_PAUSE);
                        continue;
                    }
                }
                (has_event(&fds[0]), has_event(&fds[1]), fds[2..].iter().map(has_event).collect::<Vec<_>>())
            };
            inside.drop_closed(&ended);
            if is_closed {
                return inside;
            }
            if is_knocking {
                self.accept(&mut inside);
            }
        }
    }

    fn accept(&mut self, inside: &mut OpenConnections) {
        // A connection takes two descriptors: without the second, whoever waits goes on waiting.
        let second = match self.listener.as_fd().try_clone_to_owned() {
            Ok(second) => second,
            Err(e) => return self.complaints.add_and_pause(&e),
        };
        match self.listener.accept() {
            Ok((stream, _)) => {
                drop(second);
                if let Err(why) = self.admit(stream, inside) {
                    self.complaints.add(&why);
                }
            }
            // It went away again.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => self.complaints.add_and_pause(&e),
        }
    }

    fn admit(&mut self, stream: UnixStream, inside: &mut OpenConnections) -> Result<(), String> {
        let failed = |e: &dyn std::fmt::Display| format!("cannot take a connection: {e}");
        let peer = getsockopt(&stream, PeerCredentials).map_err(|e| failed(&e.desc()))?;
        self.authorize(&peer, inside.0.len())?;
        stream.set_nonblocking(true).map_err(|e| failed(&e))?;
        let id = ConnectionId::of_descriptor(stream.as_raw_fd());
        inside.0.push((id, stream.as_fd().try_clone_to_owned().map_err(|e| failed(&e))?));
        (self.hand_over)(stream);
        Ok(())
    }

    fn authorize(&self, peer: &UnixCredentials, inside: usize) -> Result<(), String> {
        let (uid, pid) = (peer.uid(), peer.pid());
        if !self.admitted.0.contains(&uid) {
            return Err(format!(
                "refused a connection of user {uid} (process {pid}): only root may connect, and who is in \
                 \"allowed-uids\" in the configuration"
            ));
        }
        if inside >= MAX_CONNECTIONS {
            return Err(format!(
                "refused a connection of process {pid}: there are {inside} connections, that is the limit; \
                 see which process holds them (ss -xp)"
            ));
        }
        Ok(())
    }
}

/// What happens very often fills no log.
#[derive(Default)]
struct RateLimitedLog {
    last: Option<Instant>,
    left_out: usize,
}

impl RateLimitedLog {
    /// It would only fail again, and again, until something changes.
    fn add_and_pause(&mut self, cause: &io::Error) {
        self.add(&format!("cannot accept a connection: {cause}"));
        thread::sleep(ACCEPT_PAUSE);
    }

    fn add(&mut self, what: &str) {
        if self.last.is_some_and(|last| last.elapsed() < LOG_INTERVAL) {
            self.left_out += 1;
            return;
        }
        match std::mem::take(&mut self.left_out) {
            0 => log::warn!("{what}"),
            more => log::warn!("{what} (and {more} times like this since the last such line)"),
        }
        self.last = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_secs(10);

    fn open(
        admitted: AllowedUids,
    ) -> (tempfile::TempDir, std::path::PathBuf, ConnectionListener, mpsc::Receiver<UnixStream>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (send, receive) = mpsc::channel();
        let door = ConnectionListener::open(UnixListener::bind(&path).unwrap(), admitted, move |s| drop(send.send(s)))
            .unwrap();
        (dir, path, door, receive)
    }

    #[test]
    fn whoever_is_not_admitted_is_turned_away() {
        let (_dir, path, door, handed_over) = open(AllowedUids(BTreeSet::from([u32::MAX])));
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "it is closed at once");
        assert!(door.close().0.is_empty());
        assert!(handed_over.try_recv().is_err());
    }

    #[test]
    fn connections_are_bounded_and_one_that_ends_makes_room() {
        let (_dir, path, door, handed_over) = open(AllowedUids::new(&[]));
        let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let servers: Vec<_> = (0..MAX_CONNECTIONS).map(|_| handed_over.recv_timeout(SOON).unwrap()).collect();
        let mut one_more = UnixStream::connect(&path).unwrap();
        one_more.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(one_more.read(&mut [0]).unwrap(), 0);
        clients.pop();
        let until = Instant::now() + SOON;
        loop {
            let _client = UnixStream::connect(&path).unwrap();
            if handed_over.recv_timeout(Duration::from_millis(50)).is_ok() {
                break;
            }
            assert!(Instant::now() < until, "there is no room again");
        }
        drop(servers);
        drop(door.close());
    }

    #[test]
    fn at_the_end_clients_are_asked_to_go_and_waited_for() {
        let (_dir, path, door, handed_over) = open(AllowedUids::new(&[]));
        let connect = || (UnixStream::connect(&path).unwrap(), handed_over.recv_timeout(SOON).unwrap());
        let ((mut client, _server), (mut busy, busy_server)) = (connect(), connect());
        let busy_id = ConnectionId::from_peer(&format!("fd:{}", busy_server.as_raw_fd())).unwrap();
        let mut inside = door.close();
        inside.send_goaway(|connection| connection == busy_id);
        let mut heard = [0; GOAWAY.len()];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(heard, GOAWAY);
        busy.set_nonblocking(true).unwrap();
        assert_eq!(busy.read(&mut heard).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        inside.wait_for_end(|| true);
        assert_eq!(inside.0.len(), 2, "it waits no longer than it is enough");
        drop((client, busy));
        inside.wait_for_end(|| false);
        assert!(inside.0.is_empty());
    }
}
