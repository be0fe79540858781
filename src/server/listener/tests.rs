use super::*;
use std::io::Read;
use std::sync::mpsc;

const TIMEOUT: Duration = Duration::from_secs(10);

fn open(
    allowed_uids: AllowedUids,
) -> (tempfile::TempDir, std::path::PathBuf, ConnectionListener, mpsc::Receiver<UnixStream>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (send, receive) = mpsc::channel();
    let listener =
        ConnectionListener::open(UnixListener::bind(&path).unwrap(), allowed_uids, move |s| drop(send.send(s)))
            .unwrap();
    (dir, path, listener, receive)
}

#[test]
fn connection_of_another_user_is_closed() {
    let (_dir, path, listener, accepted) = open(AllowedUids(BTreeSet::from([u32::MAX])));
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the connection is not closed");
    assert!(listener.close().0.is_empty());
    assert!(accepted.try_recv().is_err());
}

#[test]
fn connections_are_limited_and_a_closed_one_makes_room() {
    let (_dir, path, listener, accepted) = open(AllowedUids::new(&[]));
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let servers: Vec<_> = (0..MAX_CONNECTIONS).map(|_| accepted.recv_timeout(TIMEOUT).unwrap()).collect();
    let mut excess = UnixStream::connect(&path).unwrap();
    excess.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(excess.read(&mut [0]).unwrap(), 0);
    clients.pop();
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let _client = UnixStream::connect(&path).unwrap();
        if accepted.recv_timeout(Duration::from_millis(50)).is_ok() {
            break;
        }
        assert!(Instant::now() < deadline, "a closed connection makes no room");
    }
    drop(servers);
    drop(listener.close());
}

#[test]
fn closing_listener_sends_goaway_to_idle_clients_and_waits_for_all() {
    let (_dir, path, listener, accepted) = open(AllowedUids::new(&[]));
    let connect = || (UnixStream::connect(&path).unwrap(), accepted.recv_timeout(TIMEOUT).unwrap());
    let ((mut client, _server), (mut busy, busy_server)) = (connect(), connect());
    let busy_id = ConnectionId::from_peer(&format!("fd:{}", busy_server.as_raw_fd())).unwrap();
    let mut open_connections = listener.close();
    open_connections.send_goaway(|connection| connection == busy_id);
    let mut received = [0; GOAWAY.len()];
    client.read_exact(&mut received).unwrap();
    assert_eq!(received, GOAWAY);
    busy.set_nonblocking(true).unwrap();
    assert_eq!(busy.read(&mut received).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    open_connections.wait_for_end(|| true);
    assert_eq!(open_connections.0.len(), 2, "it stops waiting when it is told to");
    drop((client, busy));
    open_connections.wait_for_end(|| false);
    assert!(open_connections.0.is_empty());
}
