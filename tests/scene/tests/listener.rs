//! The daemon's socket: which users may connect, and restarts behind a socket that systemd holds.

#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use scene::background_calls::BackgroundCalls;
use scene::client::Client;
use scene::containerd::Containerd;
use scene::process::run;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use scene::snapshotter::Snapshotter;

/// A restart is an upgrade: containerd must not notice. gRPC's own graceful stop refuses calls
/// that cross its GOAWAY on the wire, and each of those was a failed call of containerd.
#[test]
fn root_containerd_calls_succeed_during_daemon_restart_behind_its_socket() {
    const RESTARTS: usize = 20;
    let sandbox = Sandbox::enter("restart");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start_behind_socket(&sandbox.path("s"), repository.dir(), "");
    let containerd = Containerd::with_snapshotter(&sandbox.path("o"), "none:1", &snapshotter.socket());
    let clients: Vec<Client> = (0..6).map(|_| containerd.snapshots()).collect();
    let calls = BackgroundCalls::run_during(&clients, |calls| {
        for n in 0..RESTARTS {
            calls.wait_for_more(30);
            std::thread::sleep(Duration::from_millis(7 * (n as u64 % 5)));
            assert!(snapshotter.end(Signal::SIGTERM).success());
            snapshotter.start_again();
        }
    });
    let (made, failed) = (calls.made(), calls.drain_failures());
    scene::report::print(format_args!(
        "behind a socket: {RESTARTS} restarts, {made} calls through containerd, {} failed",
        failed.len()
    ));
    assert_eq!(failed, Vec::<String>::new());
}

/// A probe that connects and says nothing made a stop last 10 s: long enough for containerd to give up whom it
/// connected to meanwhile.
#[test]
fn root_silent_client_does_not_delay_stop() {
    let sandbox = Sandbox::enter("silent");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start_behind_socket(&sandbox.path("s"), repository.dir(), "");
    snapshotter.client().prepare("key", "", &[]).unwrap();
    let _silent = UnixStream::connect(snapshotter.socket()).unwrap();
    snapshotter.client().stat("key").unwrap();
    let begun = Instant::now();
    assert!(snapshotter.end(Signal::SIGTERM).success());
    assert!(begun.elapsed() < Duration::from_secs(7), "the stop took {:?}", begun.elapsed());
}

/// A kill fails the calls under way. A client that connects while no daemon runs must wait for the next one.
#[test]
fn root_connection_made_while_daemon_is_down_is_served_by_its_successor() {
    let sandbox = Sandbox::enter("dead");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start_behind_socket(&sandbox.path("s"), repository.dir(), "");
    snapshotter.client().prepare("before", "", &[]).unwrap();
    snapshotter.end(Signal::SIGKILL);
    let client = snapshotter.client();
    let waiting = std::thread::spawn(move || client.stat("before").map(|info| info.name));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished());
    snapshotter.start_again();
    assert_eq!(waiting.join().unwrap().unwrap(), "before");
    assert!(snapshotter.end(Signal::SIGTERM).success());
    assert!(snapshotter.socket().exists(), "it is not the daemon's to remove");
}

/// containerd gives up a connection that is not greeted within a second, and then fails calls for
/// another one: a start that took longer, over a large store or behind a daemon that was killed
/// and could not end yet, failed them although the socket was there.
#[test]
fn root_slow_start_fails_no_call_behind_its_socket() {
    let sandbox = Sandbox::enter("slow-start");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start_behind_socket(&sandbox.path("s"), repository.dir(), "");
    let containerd = Containerd::with_snapshotter(&sandbox.path("o"), "none:1", &snapshotter.socket());
    containerd.snapshots().prepare("key", "", &[("containerd.io/gc.root", "scene")]).unwrap();
    snapshotter.end(Signal::SIGTERM);
    // Dead and not gone: who holds the lock looks like a daemon whose threads hang.
    let mut dead = std::process::Command::new("true").spawn().unwrap();
    let path = snapshotter.root().join("snapshotter/lock");
    fs::write(&path, dead.id().to_string()).unwrap();
    let lock = nix::fcntl::Flock::lock(fs::File::open(&path).unwrap(), nix::fcntl::FlockArg::LockExclusive).unwrap();
    snapshotter.start_again();
    let client = containerd.snapshots();
    let call = std::thread::spawn(move || client.usage("key"));
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!call.is_finished(), "nobody can have answered");
    drop(lock);
    call.join().unwrap().unwrap();
    dead.wait().unwrap();
    assert!(snapshotter.log().contains("\"event\":\"daemon_started\""), "it did start late");
}

/// The answer that a process of another user gets when it sends HTTP/2 to the socket.
fn answer_to_user(uid: u32, socket: &Path) -> String {
    // Perl, which is in every Debian, sends the preface of HTTP/2 and an empty SETTINGS frame.
    const SPEAK: &str = r#"
        use IO::Socket::UNIX;
        my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or do { print "cannot connect: $!"; exit };
        $SIG{PIPE} = 'IGNORE';
        $s->syswrite("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" . pack("H*", "000000040000000000"));
        my $n = $s->sysread(my $answer, 9);
        print $n ? "served, frame type " . ord(substr($answer, 3, 1)) : "closed";
    "#;
    let uid = uid.to_string();
    let user = ["--reuid", &uid, "--regid", &uid, "--clear-groups", "perl", "-e", SPEAK];
    run("setpriv", user.iter().map(OsStr::new).chain([socket.as_os_str()])).ok()
}

#[test]
fn root_only_root_and_configured_users_may_connect() {
    const SERVED: &str = "served, frame type 4";
    let sandbox = Sandbox::enter("users");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    let socket = snapshotter.socket();
    assert_eq!(answer_to_user(0, &socket), SERVED);
    assert!(answer_to_user(1234, &socket).starts_with("cannot connect: Permission denied"));
    // Even if somebody opens the file to all, the door asks.
    fs::set_permissions(socket.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    for _ in 0..3 {
        assert_eq!(answer_to_user(1234, &socket), "closed");
    }
    let log = snapshotter.log();
    assert!(log.contains("refused a connection of user 1234 (process "), "{log}");
    assert_eq!(log.matches("\"event\":\"connection_user_refused\"").count(), 1, "not one line: {log}");
    snapshotter.end(Signal::SIGTERM);
    fs::remove_dir(socket.parent().unwrap()).unwrap();
    let config = sandbox.path("s/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}allowed-uids = [1234]\n")).unwrap();
    snapshotter.start_again();
    for (uid, answer) in [(0, SERVED), (1234, SERVED), (1235, "closed")] {
        assert_eq!(answer_to_user(uid, &socket), answer, "user {uid}");
    }
}

#[test]
fn root_start_fails_on_unusable_socket() {
    let sandbox = Sandbox::enter("activation");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    snapshotter.end(Signal::SIGTERM);
    let daemon = snapshotter.command();
    let behind = |variables: &str, third: &str| {
        let script = format!("exec 3{third}; export {variables}; exec \"$@\"");
        let mut words = vec![OsStr::new("-c"), OsStr::new(&script), OsStr::new("sh"), OsStr::new("timeout")];
        words.extend(["5".as_ref(), daemon.get_program()]);
        words.extend(daemon.get_args());
        run("sh", words)
    };
    let output = behind("LISTEN_PID=$$ LISTEN_FDS=1", "</dev/null");
    // `timeout` has another process id: the variables are not for the daemon, which serves.
    assert_eq!(output.status.code(), Some(124), "{}", output.stderr);
    let script = "exec 3</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    let words = ["-c", script, "sh"].map(OsStr::new).into_iter();
    let output = run("sh", words.chain([daemon.get_program()]).chain(daemon.get_args()));
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("LISTEN_FDS") && output.stderr.contains("ListenStream="), "{}", output.stderr);
}
