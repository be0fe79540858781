//! A slow start behind a socket that systemd holds: health is answered meanwhile, calls wait, and the start can be
//! stopped.

#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::time::Duration;

use cvmfs_snapshotter::proto::health::HealthCheckRequest;
use cvmfs_snapshotter::proto::health::health_check_response::ServingStatus;
use cvmfs_snapshotter::proto::snapshots::Info;
use cvmfs_snapshotter::server::service;
use grpcio::RpcStatusCode as Code;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use scene::client::{CallResult, Client};
use scene::disk::Disk;
use scene::process::{Output, eventually, run};
use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::assert_refused;

/// The health that the daemon reports.
fn health(client: &Client) -> CallResult<ServingStatus> {
    let request = HealthCheckRequest::default();
    client.call(&service::HEALTH_CHECK, &request).map(|answer| answer.status.enum_value_or_default())
}

/// Calls Stat again as long as other calls fill the queue.
fn stat_when_there_is_room(client: &Client, key: &str) -> CallResult<Info> {
    loop {
        match client.stat(key) {
            Err(status) if status.code() == Code::RESOURCE_EXHAUSTED => std::thread::sleep(Duration::from_millis(50)),
            answer => return answer,
        }
    }
}

/// The first calls held the workers, so health was not answered. After the start they were all carried out, although
/// their clients had gone.
#[test]
fn root_calls_wait_and_health_is_answered_during_slow_start() {
    const QUEUE: usize = 3;
    let sandbox = Sandbox::enter("slow-start");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let disk = Disk::ext4(&sandbox.path("s/root"), 32, &[]);
    let config = format!("workers = 1\nqueue = {QUEUE}");
    let mut snapshotter = Snapshotter::start_behind_socket(&sandbox.path("s"), repository.dir(), &config);
    snapshotter.client().prepare("key", "", &[]).unwrap();
    assert!(snapshotter.end(Signal::SIGTERM).success());
    // The first write of the start waits until the disk is thawed.
    let frozen = disk.freeze();
    snapshotter.start_again();
    let client = snapshotter.client();
    // This call would have held the only worker.
    assert_refused(client.with_timeout(Duration::from_secs(1)).prepare("late", "", &[]), Code::DEADLINE_EXCEEDED);
    let waiting: Vec<_> = (0..QUEUE - 1)
        .map(|_| {
            let client = client.clone();
            std::thread::spawn(move || stat_when_there_is_room(&client, "key"))
        })
        .collect();
    assert_eq!(health(&client).unwrap(), ServingStatus::NOT_SERVING);
    let mut more = None;
    eventually("no more than the queue takes wait", || {
        let answer = client.with_timeout(Duration::from_millis(200)).stat("key").unwrap_err();
        let is_refused = answer.code() == Code::RESOURCE_EXHAUSTED;
        more = Some(answer);
        is_refused
    });
    assert!(more.unwrap().message().contains("too many calls are waiting (3)"));
    assert_eq!(health(&client).unwrap(), ServingStatus::NOT_SERVING);
    assert!(waiting.iter().all(|call| !call.is_finished()));
    drop(frozen);
    for call in waiting {
        call.join().unwrap().unwrap();
    }
    assert_eq!(health(&client).unwrap(), ServingStatus::SERVING);
    assert_refused(client.stat("late"), Code::NOT_FOUND);
    assert!(snapshotter.end(Signal::SIGTERM).success());
}

/// A restart of a daemon that was still starting, for example on a node that boots under load, failed the calls that
/// waited for the start.
#[test]
fn root_stop_during_start_answers_waiting_calls() {
    let sandbox = Sandbox::enter("stop-in-start");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let disk = Disk::ext4(&sandbox.path("s/root"), 32, &[]);
    let mut snapshotter = Snapshotter::start_behind_socket(&sandbox.path("s"), repository.dir(), "");
    snapshotter.client().prepare("key", "", &[]).unwrap();
    assert!(snapshotter.end(Signal::SIGTERM).success());
    // The first write of the start waits until the disk is thawed.
    let frozen = disk.freeze();
    snapshotter.start_again();
    let client = snapshotter.client();
    assert_eq!(health(&client).unwrap(), ServingStatus::NOT_SERVING);
    let waiting = std::thread::spawn(move || client.stat("key"));
    snapshotter.server().signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished() && snapshotter.server().is_running());
    drop(frozen);
    assert_eq!(waiting.join().unwrap().unwrap().name, "key");
    assert!(snapshotter.server().wait_for_end().success());
}

/// A stand-in for a daemon that was killed, cannot end yet, and still has the lock.
struct Held {
    _lock: Flock<fs::File>,
    dead: std::process::Child,
}

impl Held {
    fn hold(root: &Path) -> Self {
        let dead = std::process::Command::new("true").spawn().unwrap();
        let path = root.join("snapshotter/lock");
        fs::write(&path, dead.id().to_string()).unwrap();
        let lock = Flock::lock(fs::File::open(&path).unwrap(), FlockArg::LockExclusive).unwrap();
        Self { _lock: lock, dead }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.dead.wait().unwrap();
    }
}

/// Signals were handled only after the start, so systemd ended the stop of a slow one with SIGKILL.
#[test]
fn root_slow_start_handles_signals_and_can_be_stopped() {
    let sandbox = Sandbox::enter("stopped-start");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start_behind_socket(&sandbox.path("s"), repository.dir(), "");
    snapshotter.client().prepare("key", "", &[]).unwrap();
    assert!(snapshotter.end(Signal::SIGTERM).success());
    let held = Held::hold(&snapshotter.root());
    snapshotter.start_again();
    let client = snapshotter.client();
    assert_eq!(health(&client).unwrap(), ServingStatus::NOT_SERVING);
    let waiting = std::thread::spawn(move || client.stat("key"));
    snapshotter.server().signal(Signal::SIGUSR1);
    eventually("the level of the log changes", || snapshotter.log().contains("\"log_level\":\"TRACE\""));
    let status = snapshotter.end(Signal::SIGTERM);
    let log = snapshotter.log();
    assert!(status.success(), "{status}: {log}");
    assert!(log.contains("\"event\":\"start_aborted\""), "{log}");
    assert_refused(waiting.join().unwrap(), Code::UNAVAILABLE);
    drop(held);
    snapshotter.start_again();
    snapshotter.client().stat("key").unwrap();
    assert!(snapshotter.end(Signal::SIGTERM).success());
}

/// A configured snapshotter that was never started, in a sandbox of its own.
fn unstarted(name: &str) -> (Sandbox, Snapshotter) {
    let sandbox = Sandbox::enter(name);
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let snapshotter = Snapshotter::configured(&sandbox.path("s"), repository.dir(), "");
    (sandbox, snapshotter)
}

/// The output of a start with this state root. A daemon that does start is stopped after a while.
fn start_at(snapshotter: &Snapshotter, root: &Path) -> Output {
    let command = snapshotter.command();
    let usual = snapshotter.root();
    let arguments = command.get_args().map(|word| if word == usual { root.as_os_str() } else { word });
    run("timeout", [OsStr::new("20"), command.get_program()].into_iter().chain(arguments))
}

fn assert_start_refused(what: &str, output: &Output, parts: &[&str]) {
    assert_eq!(output.status.code(), Some(78), "{what}: {output:?}");
    let said = output.stderr.lines().last().unwrap_or_default();
    assert!(parts.iter().all(|part| said.contains(part)), "{what}: {said}");
}

/// A user who could write to the directory put metadata and a symlink there, and root removed the symlink's target.
#[test]
fn root_start_refuses_state_root_with_foreign_directories() {
    let (sandbox, snapshotter) = unstarted("others");
    let victim = sandbox.make_dir("victim/7");
    let cases = [
        ("a user's", "", 1234, 0o755),
        ("a user's snapshotter", "snapshotter", 1234, 0o711),
        ("a group's snapshotter", "snapshotter", 0, 0o770),
        ("everybody's snapshots", "snapshotter/snapshots", 0, 0o1777),
    ];
    for (n, (what, below, owner, mode)) in cases.into_iter().enumerate() {
        let root = sandbox.path(&format!("root-{n}"));
        let bad = root.join(below);
        fs::create_dir_all(&bad).unwrap();
        chown(&bad, Some(owner), None).unwrap();
        fs::set_permissions(&bad, fs::Permissions::from_mode(mode)).unwrap();
        let shown = bad.display().to_string();
        let parts = [
            shown.trim_end_matches('/'),
            &format!("{mode:04o}"),
            &format!("owner {owner}"),
            "chown root",
            "chmod go-w",
        ];
        assert_start_refused(what, &start_at(&snapshotter, &root), &parts);
        assert!(!root.join("snapshotter/metadata.sqlite").exists(), "{what}");
    }
    for link in ["snapshotter", "snapshotter/snapshots"] {
        let root = sandbox.path(&format!("linked-{}", link.len()));
        let link = root.join(link);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(victim.parent().unwrap(), &link).unwrap();
        assert_start_refused("a link", &start_at(&snapshotter, &root), &[&link.display().to_string(), "link"]);
    }
    let (theirs, link) = (sandbox.make_dir("theirs"), sandbox.path("their-link"));
    symlink(&theirs, &link).unwrap();
    lchown(&link, Some(1234), None).unwrap();
    assert_start_refused("a link of a user's", &start_at(&snapshotter, &link), &["owner 1234"]);
    assert!(victim.exists());
}

#[test]
fn root_state_root_writable_by_others_causes_a_warning() {
    let (_sandbox, mut snapshotter) = unstarted("writable");
    let root = snapshotter.root();
    fs::create_dir_all(&root).unwrap();
    for mode in [0o777, 0o1777, 0o770] {
        fs::set_permissions(&root, fs::Permissions::from_mode(mode)).unwrap();
        snapshotter.start_again();
        let warning = format!("{} has mode {mode:04o}", root.display());
        eventually("it is told", || snapshotter.log().contains(&warning));
        assert!(snapshotter.end(Signal::SIGTERM).success());
    }
}

#[test]
fn root_start_accepts_state_root_made_by_go_snapshotter_or_admin() {
    let (sandbox, mut snapshotter) = unstarted("accepted");
    let root = snapshotter.root();
    for mode in [0o700, 0o711, 0o755] {
        for directory in [&root, &root.join("snapshotter"), &snapshotter.snapshots()] {
            fs::create_dir_all(directory).unwrap();
            fs::set_permissions(directory, fs::Permissions::from_mode(mode)).unwrap();
        }
        snapshotter.start_again();
        assert!(snapshotter.end(Signal::SIGTERM).success(), "{mode:o}");
        fs::remove_dir_all(&root).unwrap();
    }
    symlink(sandbox.make_dir("elsewhere"), &root).unwrap();
    snapshotter.start_again();
    assert!(snapshotter.end(Signal::SIGTERM).success());
    assert!(sandbox.path("elsewhere/snapshotter/metadata.sqlite").exists());
}

/// A file as state root gave "File exists (os error 17)" and was tried for ever; a state root in a repository was
/// accepted and written to.
#[test]
fn root_unusable_state_root_is_a_configuration_error() {
    let (sandbox, snapshotter) = unstarted("no-root");
    fs::write(sandbox.path("file"), "").unwrap();
    symlink("cvmfs", sandbox.path("link")).unwrap();
    for (root, parts) in [
        ("file", ["directory", "--root"]),
        ("file/below", ["directory", "--root"]),
        ("cvmfs", ["is inside the repository", "--root"]),
        ("cvmfs/.layers/x", ["is inside the repository", "--root"]),
        ("link/x", ["is inside the repository", "--root"]),
        (".", ["is inside the state root", "--root"]),
    ] {
        let root = sandbox.path(root);
        let shown = root.display().to_string();
        assert_start_refused(
            &shown,
            &start_at(&snapshotter, &root),
            &[shown.trim_end_matches("/."), parts[0], parts[1]],
        );
    }
    // The disk may be mounted later, so systemd tries again.
    symlink("nowhere", sandbox.path("dangling")).unwrap();
    let output = start_at(&snapshotter, &sandbox.path("dangling"));
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    assert!(output.stderr.contains("dangling"), "{}", output.stderr);
    for place in ["", "cvmfs"] {
        assert!(!sandbox.path(place).join("snapshotter").exists(), "nothing is made");
    }
}
