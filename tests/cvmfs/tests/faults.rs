//! The client when it is told to be ill.

#![forbid(unsafe_code)]

mod fixture;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use cvmfs_testbed::client::Mount;
use fixture::{Detail, RepositoryFixture, assert_same, plain_tree, write};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::statvfs::statvfs;

/// Attributes and names are asked for again at once.
const NO_CACHE: [&str; 2] = ["--ttl", "0"];

fn stage() -> RepositoryFixture {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    stage
}

/// Runs `call` on a thread that may never come back.
fn aside<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(call()));
    receiver
}

/// Every kind of question about a path.
fn questions(path: &Path) -> Vec<Receiver<Result<(), Errno>>> {
    fn ask<T: 'static>(path: &Path, call: fn(PathBuf) -> io::Result<T>) -> Receiver<Result<(), Errno>> {
        let path = path.to_owned();
        aside(move || match call(path) {
            Ok(_) => Ok(()),
            Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(0))),
        })
    }
    vec![
        ask(path, |path| path.symlink_metadata()),
        ask(path, |path| {
            path.join("missing").symlink_metadata().or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Path::new("/").metadata(),
                _ => Err(error),
            })
        }),
        ask(path, |path| fs::read_dir(path)?.next().transpose()),
        ask(path, |path| fs::read(path.join("file"))),
        ask(path, |path| xattr::get(path, "user.fqrn")),
    ]
}

fn no_answer<T: std::fmt::Debug>(receiver: &Receiver<T>) {
    let answer = receiver.recv_timeout(Duration::from_millis(200));
    assert!(matches!(answer, Err(RecvTimeoutError::Timeout)), "{answer:?}");
}

fn answer<T>(receiver: &Receiver<T>) -> T {
    receiver.recv_timeout(Duration::from_secs(10)).expect("an answer comes")
}

fn statfs(mount: &Mount) -> Receiver<Result<(), Errno>> {
    let root = mount.mountpoint().to_owned();
    aside(move || statvfs(&root).map(drop))
}

#[test]
fn root_hang_all_blocks_every_request_until_normal() {
    let stage = stage();
    let mut mount = stage.mount("mount", &NO_CACHE);
    assert_eq!(mount.command("hang all"), "ok");
    let mut waiting = questions(&mount.mountpoint().join("home/user"));
    waiting.push(statfs(&mount));
    waiting.iter().for_each(no_answer);
    assert_eq!(mount.command("normal"), "ok");
    for question in &waiting {
        assert_eq!(answer(question), Ok(()));
    }
    assert_same(&stage.source(), mount.mountpoint(), Detail::Everything);
}

#[test]
fn root_hang_tree_still_answers_statfs() {
    let stage = stage();
    let mut mount = stage.mount("mount", &NO_CACHE);
    assert_eq!(mount.command("hang tree"), "ok");
    let waiting = questions(&mount.mountpoint().join("home/user"));
    waiting.iter().for_each(no_answer);
    assert_eq!(answer(&statfs(&mount)), Ok(()));
    assert!(mount.command("reload").starts_with("error "));
    assert_eq!(mount.command("normal"), "ok");
    for question in &waiting {
        assert_eq!(answer(question), Ok(()));
    }
}

/// A hundred hanging requests keep nobody from being answered afterwards.
#[test]
fn root_waiting_requests_occupy_no_threads() {
    let stage = stage();
    let mut mount = stage.mount("mount", &NO_CACHE);
    let many = mount.mountpoint().join("many");
    assert_eq!(mount.command("hang tree"), "ok");
    let waiting: Vec<_> = (0..100)
        .map(|number| {
            let path = many.join(format!("a rather long name for a small file {number}"));
            aside(move || fs::read(path).expect("the file can be read"))
        })
        .collect();
    no_answer(&waiting[99]);
    assert_eq!(answer(&statfs(&mount)), Ok(()));
    assert_eq!(mount.command("normal"), "ok");
    for (number, content) in waiting.iter().enumerate() {
        assert_eq!(answer(content), number.to_string().into_bytes());
    }
}

#[test]
fn root_slow_delays_each_request_independently() {
    let stage = stage();
    let mut mount = stage.mount("mount", &NO_CACHE);
    assert_eq!(mount.command("slow 500"), "ok");
    let begin = Instant::now();
    let all: Vec<_> = (0..20).map(|_| statfs(&mount)).collect();
    for each in &all {
        assert_eq!(answer(each), Ok(()));
    }
    let time = begin.elapsed();
    assert!(time >= Duration::from_millis(500), "answered after {time:?}");
    assert!(time < Duration::from_secs(3), "answered one after the other, in {time:?}");
    assert_eq!(mount.command("normal"), "ok");
    let begin = Instant::now();
    assert_eq!(answer(&statfs(&mount)), Ok(()));
    assert!(begin.elapsed() < Duration::from_millis(400));
}

#[test]
fn root_fail_spares_statfs_and_root_directory() {
    let stage = stage();
    let mut mount = stage.mount("mount", &NO_CACHE);
    for (name, errno) in [("EIO", Errno::EIO), ("ENOENT", Errno::ENOENT), ("ESTALE", Errno::ESTALE)] {
        assert_eq!(mount.command(&format!("fail {name}")), "ok");
        assert_eq!(answer(&statfs(&mount)), Ok(()));
        assert!(fs::read_dir(mount.mountpoint()).expect("the root can be listed").count() > 5);
        let error = fs::read(mount.mountpoint().join("hello")).expect_err("a file cannot be read");
        assert_eq!(error.raw_os_error(), Some(errno as i32));
    }
    assert_eq!(mount.command("normal"), "ok");
    assert_same(&stage.source(), mount.mountpoint(), Detail::Everything);
}

#[test]
fn root_killed_client_leaves_dead_mount_that_drop_removes() {
    let stage = stage();
    let mut mount = stage.mount("mount", &[]);
    let root = mount.mountpoint().to_owned();
    root.join("hello").metadata().expect("the file is there");
    mount.kill();
    assert!(!mount.is_running());
    assert_eq!(answer(&statfs(&mount)), Err(Errno::ENOTCONN));
    // The kernel's caches still know what was looked up.
    root.join("hello").metadata().expect("stat of a known path is no liveness check");
    drop(mount);
    assert_eq!(fs::read_dir(&root).expect("the mountpoint is a plain directory").count(), 0);
    let mount = stage.mount("mount", &[]);
    assert_same(&stage.source(), mount.mountpoint(), Detail::Everything);
}

#[test]
fn root_stopped_client_hangs_until_continued() {
    let stage = stage();
    let mount = stage.mount("mount", &NO_CACHE);
    mount.signal(Signal::SIGSTOP);
    let waiting = questions(&mount.mountpoint().join("home/user"));
    waiting.iter().for_each(no_answer);
    mount.signal(Signal::SIGCONT);
    for question in &waiting {
        assert_eq!(answer(question), Ok(()));
    }
}

/// Dropping a mount that hangs frees those who wait for it.
#[test]
fn root_dropping_mount_frees_blocked_readers() {
    let stage = stage();
    let mut mount = stage.mount("mount", &NO_CACHE);
    assert_eq!(mount.command("hang all"), "ok");
    let waiting = questions(&mount.mountpoint().join("home/user"));
    waiting.iter().for_each(no_answer);
    drop(mount);
    for question in &waiting {
        assert!(answer(question).is_err());
    }
}

#[test]
fn root_requests_are_counted_by_kind() {
    let stage = stage();
    let mut mount = stage.mount("mount", &[]);
    let total = |answer: &str| answer.split(' ').nth(1).and_then(|number| number.parse::<u64>().ok());
    let before = total(&mount.command("requests")).expect("a number comes first");
    statvfs(mount.mountpoint()).expect("statfs is answered");
    let after = mount.command("requests");
    assert_eq!(total(&after), Some(before + 1));
    assert!(after.ends_with("statfs=1"), "{after}");
}

#[test]
fn root_terminated_client_unmounts_even_while_in_use() {
    let stage = stage();
    let mut mount = stage.mount("mount", &[]);
    let open = fs::File::open(mount.mountpoint().join("large")).expect("the file opens");
    mount.finish();
    assert_eq!(fs::read_dir(mount.mountpoint()).expect("the mountpoint is a plain directory").count(), 0);
    drop(open);
}

#[test]
fn root_unknown_command_is_an_error() {
    let stage = stage();
    let mut mount = stage.mount("mount", &[]);
    for line in ["", "dance", "fail EWHATEVER", "slow down", "hang"] {
        assert!(mount.command(line).starts_with("error "), "{line}");
    }
}

#[test]
#[should_panic(expected = "the client did not mount")]
fn root_client_without_repository_reports_the_reason() {
    let stage = RepositoryFixture::new();
    write(&stage.source().join("file"), "never published");
    drop(stage.mount("mount", &[]));
}
