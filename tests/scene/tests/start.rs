//! A start that takes long, behind a socket that systemd holds: who is answered meanwhile, what waits, and that it
//! can be stopped.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use cvmfs_snapshotter::proto::health::HealthCheckRequest;
use cvmfs_snapshotter::proto::health::health_check_response::ServingStatus;
use cvmfs_snapshotter::proto::snapshots::Info;
use cvmfs_snapshotter::server::service;
use grpcio::RpcStatusCode as Code;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use scene::alone::refused;
use scene::client::{Answer, Client};
use scene::disk::Disk;
use scene::process::eventually;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use scene::snapshotter::Snapshotter;

/// What the daemon says of its health.
fn health(client: &Client) -> Answer<ServingStatus> {
    let request = HealthCheckRequest::default();
    client.call(&service::HEALTH_CHECK, &request).map(|answer| answer.status.enum_value_or_default())
}

/// Others may have taken the last place in the queue.
fn stat_when_there_is_room(client: &Client, key: &str) -> Answer<Info> {
    loop {
        match client.stat(key) {
            Err(status) if status.code() == Code::RESOURCE_EXHAUSTED => std::thread::sleep(Duration::from_millis(50)),
            answer => return answer,
        }
    }
}

/// The calls that came first held the workers: health was not told to anybody. And when the start was over they were
/// all carried out, although nobody waited any more.
#[test]
fn root_slow_start_holds_calls_back_and_answers_health() {
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
    // It would have had the only worker.
    refused(client.with_timeout(Duration::from_secs(1)).prepare("late", "", &[]), Code::DEADLINE_EXCEEDED);
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
    refused(client.stat("late"), Code::NOT_FOUND);
    assert!(snapshotter.end(Signal::SIGTERM).success());
}

/// A restart that came while the daemon was still starting, as of a node that boots under load, failed the calls that
/// waited for the start.
#[test]
fn root_stop_during_a_start_answers_the_calls_that_wait() {
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

/// A daemon that was killed and cannot end yet still has the lock.
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

/// Signals were looked at only after the start: systemd ended the stop of a long one with SIGKILL.
#[test]
fn root_slow_start_takes_signals_and_can_be_stopped() {
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
    eventually("the level of the log changes", || snapshotter.log().contains("log level TRACE"));
    let status = snapshotter.end(Signal::SIGTERM);
    let log = snapshotter.log();
    assert!(status.success(), "{status}: {log}");
    assert!(log.contains("before the start was over"), "{log}");
    refused(waiting.join().unwrap(), Code::UNAVAILABLE);
    drop(held);
    snapshotter.start_again();
    snapshotter.client().stat("key").unwrap();
    assert!(snapshotter.end(Signal::SIGTERM).success());
}
