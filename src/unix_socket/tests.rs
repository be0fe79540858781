use std::os::unix::net::UnixDatagram;

use nix::sys::socket::Backlog;

use super::*;

/// A start of the daemon, and an administrator's command, waited for ever.
#[test]
fn bind_and_connect_do_not_wait_for_server_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("s.sock");
    let hung = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
    socket::bind(hung.as_raw_fd(), &UnixAddr::new(&address).unwrap()).unwrap();
    socket::listen(&hung, Backlog::new(1).unwrap()).unwrap();
    let mut waiting = Vec::new();
    let refused = loop {
        match connect(&address) {
            Ok(stream) => waiting.push(stream),
            Err(e) => break e,
        }
    };
    assert_eq!((waiting.len(), refused.kind()), (2, io::ErrorKind::WouldBlock));
    assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::InUse { .. })));
}

#[test]
fn stale_socket_is_replaced_and_live_socket_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("new/s.sock");
    let stale = bind(&address, SocketAccess::Root).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(address.parent().unwrap()), 0o700);
    drop(stale.listener);
    let live = bind(&address, SocketAccess::Root).unwrap();
    assert_eq!(mode(&address), 0o600);
    assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::InUse { .. })));
    stale.file.remove();
    assert!(address.exists(), "another process's socket was removed");
    drop(live.listener);
    let open = bind(&address, SocketAccess::Everybody).unwrap();
    assert_eq!(mode(&address), 0o666, "the listener checks the user of each connection");
    open.file.remove();
    assert!(!address.exists());
}

/// A file system gives the number of a file that is gone to the next one. Because of that, a daemon that
/// ended late took away the socket of the next one.
#[test]
fn socket_of_another_process_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("s.sock");
    let old = bind(&address, SocketAccess::Root).unwrap();
    for _ in 0..100 {
        fs::remove_file(&address).unwrap();
        let new = bind(&address, SocketAccess::Root).unwrap();
        old.file.remove();
        assert!(address.exists(), "the socket of another process was removed");
        drop(new);
    }
    let last = bind(&address, SocketAccess::Root).unwrap();
    last.file.remove();
    assert!(!address.exists());
}

#[test]
fn only_listening_unix_socket_with_path_is_adopted() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("s");
    let bound = adopt(UnixListener::bind(&address).unwrap().into()).unwrap();
    assert_eq!(bound.file.address(), address);
    bound.file.remove();
    assert!(address.exists(), "it is not ours to remove");
    let file = File::open(dir.path()).unwrap();
    let datagram = UnixDatagram::bind(dir.path().join("d")).unwrap();
    let (connected, _other) = UnixStream::pair().unwrap();
    let inet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for wrong in [OwnedFd::from(file), datagram.into(), connected.into(), inet.into()] {
        assert!(matches!(adopt(wrong), Err(Error::Inherited { .. })));
    }
}

#[test]
fn file_that_is_not_a_socket_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("file");
    fs::write(&address, "precious").unwrap();
    assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::NotASocket { .. })));
    assert_eq!(fs::read_to_string(&address).unwrap(), "precious");
}

#[test]
fn unsafe_addresses_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(bind(Path::new("s.sock"), SocketAccess::Root), Err(Error::NotAbsolute { .. })));
    let long = dir.path().join("s".repeat(120));
    assert!(matches!(bind(&long, SocketAccess::Root), Err(Error::TooLong { .. })));
    for odd in ["/", "/tmp/a%41", "/tmp/a#b", "/tmp/a?b", "/tmp/a/"] {
        assert!(matches!(bind(Path::new(odd), SocketAccess::Root), Err(Error::ForbiddenCharacter { .. })), "{odd}");
    }
    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    std::os::unix::fs::chown(&theirs, Some(65_534), None).unwrap();
    assert!(matches!(
        bind(&theirs.join("s"), SocketAccess::Root),
        Err(Error::UntrustedDirectory { owner: 65_534, .. })
    ));
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(bind(&dir.path().join("s"), SocketAccess::Root), Err(Error::UntrustedDirectory { .. })));
}
