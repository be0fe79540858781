//! Full disks, broken state, lost mounts, wrong configuration: nothing is lost, any
//! state starts, and anything can be removed.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use scene::process::run;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use scene::snapshotter::{Snapshotter, binary};
use scene::snapshotter_fixture::{SnapshotterFixture, assert_refused, create_wide_tree, options};

#[test]
fn root_broken_snapshot_blocks_neither_start_nor_its_removal() {
    let mut d = SnapshotterFixture::start("broken", "");
    let c = &d.client;
    for (key, name) in [("a", "bad"), ("b", "good")] {
        c.prepare(key, "", &[]).unwrap();
        c.commit(name, key, &[]).unwrap();
    }
    let mounts = c.prepare("on-bad", "bad", &[]).unwrap();
    let bad = options(&mounts).iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap().to_owned();
    d.snapshotter.end(Signal::SIGTERM);
    fs::remove_dir_all(Path::new(&bad).parent().unwrap()).unwrap();
    d.snapshotter.start_again();
    let c = d.snapshotter.client();
    let message = assert_refused(c.mounts("on-bad"), Code::UNAVAILABLE);
    assert!(
        message.contains("\"bad\"") && message.contains("remove all containers and images that use it"),
        "{message}"
    );
    assert_refused(c.prepare("new", "bad", &[]), Code::UNAVAILABLE);
    c.prepare("fine", "good", &[]).unwrap();
    c.remove("on-bad").unwrap();
    c.remove("bad").unwrap();
    c.cleanup().unwrap();
}

#[test]
fn root_start_leaves_existing_directories_alone() {
    let sandbox = Sandbox::enter("foreign");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    let theirs = sandbox.make_dir("s/root/snapshotter/snapshots/7/fs");
    // Numbers at the end of the range are no ids of snapshots.
    sandbox.make_dir("s/root/snapshotter/snapshots/18446744073709551615");
    fs::write(theirs.join("precious"), "x").unwrap();
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    for _ in 0..2 {
        let c = snapshotter.client();
        c.prepare("key", "", &[]).unwrap();
        assert!(
            PathBuf::from(&c.mounts("key").unwrap()[0].source).ends_with("8/fs")
                || snapshotter.log().matches("\"event\":\"daemon_started\"").count() > 1
        );
        c.remove("key").unwrap();
        c.cleanup().unwrap();
        snapshotter.end(Signal::SIGTERM);
        snapshotter.start_again();
    }
    assert_eq!(fs::read_to_string(theirs.join("precious")).unwrap(), "x");
    assert!(snapshotter.log().contains("\"event\":\"foreign_directories\",\"count\":\"2\""));
}

#[test]
fn root_second_daemon_is_refused_on_socket_and_state_root_in_use() {
    let mut d = SnapshotterFixture::start("exclusive", "");
    let socket = d.snapshotter.socket();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(socket.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    let start = |address: &Path, root: &Path| {
        let path = |p: &Path| p.display().to_string();
        run(binary(), ["--address", &path(address), "--root", &path(root), "--config", "/dev/null"])
    };
    let other = start(&socket, &d.sandbox.path("elsewhere"));
    assert_eq!(other.status.code(), Some(1));
    assert!(
        other.stderr.contains("another process serves the socket") && other.stderr.contains("s.sock"),
        "{}",
        other.stderr
    );
    let other = start(&d.sandbox.path("other.sock"), &d.snapshotter.root());
    assert_eq!(other.status.code(), Some(1));
    assert!(other.stderr.contains("another cvmfs-snapshotter uses the state root"), "{}", other.stderr);
    d.client.prepare("still-served", "", &[]).unwrap();
    // A killed daemon leaves a socket that the next start replaces; a stopped daemon removes its socket.
    d.snapshotter.end(Signal::SIGKILL);
    assert!(socket.exists());
    d.snapshotter.start_again();
    assert!(d.snapshotter.end(Signal::SIGINT).success());
    assert!(!socket.exists());
}

#[test]
fn root_stop_finishes_running_calls_within_its_limit() {
    let mut d = SnapshotterFixture::start("stop", "workers = 1");
    let source = PathBuf::from(&d.client.prepare("big", "", &[]).unwrap()[0].source);
    create_wide_tree(&source, 300, 200);
    let c = d.client.clone();
    let running = std::thread::spawn(move || c.usage("big"));
    std::thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(running.join().unwrap().unwrap().1, 300 * 2 + 1, "a call under way is finished");
    // An idle connection does not delay the stop.
    d.snapshotter.start_again();
    let idle = UnixStream::connect(d.snapshotter.socket()).unwrap();
    let begun = Instant::now();
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
    assert!(begun.elapsed() < Duration::from_secs(11), "{:?}", begun.elapsed());
    drop(idle);
}

#[test]
fn root_invalid_configuration_is_refused_and_log_level_can_change() {
    let mut d = SnapshotterFixture::start("config", "log-format = \"text\"\n[plugins.cri]\nx = 1");
    let log = d.snapshotter.log();
    assert!(log.contains("event=unknown_config_key key=plugins line=4"), "{log}");
    assert!(log.contains(" info ") && !log.contains("{\""), "{log}");
    let check = |text: &str| {
        let file = d.sandbox.path("check.toml");
        fs::write(&file, text).unwrap();
        run(binary(), ["-check-config", "-config", file.to_str().unwrap()])
    };
    assert!(check("repository = \"a.b\"").status.success());
    for (text, message) in [
        ("\nattach = \"copy\"", "line 2: invalid value \"copy\" for attach: expected \"bind\" or \"symlink\""),
        ("repositry = \"a\"", "\"repositry\" (line 1)"),
        ("repository", "not TOML"),
    ] {
        let output = check(text);
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(output.stderr.contains(message), "{}", output.stderr);
    }
    // An invalid value prevents the start as well, and changes nothing.
    d.snapshotter.end(Signal::SIGTERM);
    let good = fs::read_to_string(d.sandbox.path("s/config.toml")).unwrap();
    fs::write(d.sandbox.path("s/config.toml"), "workers = 0").unwrap();
    let output = d.snapshotter.command().output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    fs::write(d.sandbox.path("s/config.toml"), format!("log-level = \"error\"\n{good}")).unwrap();
    d.snapshotter.start_again();
    let quiet = |d: &SnapshotterFixture| {
        let before = d.snapshotter.log().len();
        let _ = d.client.stat("absent");
        d.snapshotter.log().len() == before
    };
    let client = d.snapshotter.client();
    d.client = client;
    assert!(!quiet(&d), "the flag says debug, and it wins at the start");
    d.snapshotter.server().signal(Signal::SIGHUP);
    scene::process::eventually("SIGHUP makes the log quiet", || quiet(&d));
}

/// The start waited for a writer of the FIFO for ever, without a message.
#[test]
fn root_start_refuses_configuration_that_is_not_a_file() {
    let sandbox = Sandbox::enter("fifo");
    let fifo = sandbox.path("config.toml");
    mkfifo(&fifo, Mode::S_IRUSR).unwrap();
    let (root, address) = (sandbox.path("root"), sandbox.path("s.sock"));
    let program = binary();
    let serve = ["--root", root.to_str().unwrap(), "--address", address.to_str().unwrap()];
    for task in [&["--check-config"][..], &serve] {
        let limited = ["--signal=KILL", "60", program.to_str().unwrap(), "--config", fifo.to_str().unwrap()];
        let output = run("timeout", [&limited, task].concat());
        assert_eq!(output.status.code(), Some(78), "{task:?}: {}", output.stderr);
        let said = output.stderr.trim_end();
        assert!(said.contains(fifo.to_str().unwrap()) && said.ends_with("name another with --config"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert!(!root.exists(), "nothing is made");
}

/// The mount table has real paths. With a state root behind a symlink the search for foreign mounts found none, and a
/// cleanup emptied a directory that was mounted below ours.
#[test]
fn root_removal_never_empties_a_mount_in_a_snapshot() {
    let sandbox = Sandbox::enter("linked-root");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    fs::create_dir_all(sandbox.make_dir("real").join("root")).unwrap();
    fs::create_dir(sandbox.path("s")).unwrap();
    std::os::unix::fs::symlink(sandbox.path("real/root"), sandbox.path("s/root")).unwrap();
    let precious = sandbox.make_dir("precious");
    fs::write(precious.join("file"), "x").unwrap();
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    let c = snapshotter.client();
    let source = PathBuf::from(&c.prepare("key", "", &[]).unwrap()[0].source);
    assert!(source.starts_with(sandbox.path("real")), "{}", source.display());
    let at = source.join("a/b");
    fs::create_dir_all(&at).unwrap();
    run("mount", ["--bind", precious.to_str().unwrap(), at.to_str().unwrap()]).ok();
    c.remove("key").unwrap();
    c.cleanup().unwrap();
    assert!(precious.join("file").exists());
    assert!(snapshotter.log().contains("something is mounted on"), "{}", snapshotter.log());
    run("umount", [at.to_str().unwrap()]).ok();
    c.cleanup().unwrap();
    assert!(!source.exists(), "it is taken away once nothing is mounted there");
}

/// A container can make a tree whose paths are longer than a path may be. Its removal ran out of stack, in the daemon
/// and again at every start.
#[test]
fn root_very_deep_tree_is_measured_and_removed() {
    let mut d = SnapshotterFixture::start("deep", "");
    let source = PathBuf::from(&d.client.prepare("key", "", &[]).unwrap()[0].source);
    let (flags, mode) = (nix::fcntl::OFlag::O_DIRECTORY, nix::sys::stat::Mode::from_bits_truncate(0o755));
    let mut directory = nix::fcntl::open(&source, flags, mode).unwrap();
    for _ in 0..19_000 {
        nix::sys::stat::mkdirat(&directory, "d", mode).unwrap();
        directory = nix::fcntl::openat(&directory, "d", flags, mode).unwrap();
    }
    drop(directory);
    assert_eq!(d.client.usage("key").unwrap().1, 19_001);
    d.client.remove("key").unwrap();
    d.client.cleanup().unwrap();
    assert!(!source.exists());
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
}

/// An older copy of the metadata has no records of later snapshots. Their directories looked like leftovers of a crash,
/// and were removed at the start.
#[test]
fn root_restored_older_metadata_keeps_newer_files() {
    let mut d = SnapshotterFixture::start("restored", "");
    d.client.prepare("old", "", &[]).unwrap();
    d.snapshotter.end(Signal::SIGTERM);
    let metadata = d.snapshotter.root().join("snapshotter/metadata.sqlite");
    fs::copy(&metadata, d.sandbox.path("copy")).unwrap();
    d.snapshotter.start_again();
    let c = d.snapshotter.client();
    let source = PathBuf::from(&c.prepare("new", "", &[]).unwrap()[0].source);
    fs::write(source.join("precious"), "x").unwrap();
    c.commit("newer", "new", &[]).unwrap();
    d.snapshotter.end(Signal::SIGTERM);
    fs::copy(d.sandbox.path("copy"), &metadata).unwrap();
    for _ in 0..2 {
        d.snapshotter.start_again();
        let c = d.snapshotter.client();
        c.prepare("another", "", &[]).unwrap();
        c.remove("another").unwrap();
        c.cleanup().unwrap();
        assert_eq!(fs::read_to_string(source.join("precious")).unwrap(), "x");
        d.snapshotter.end(Signal::SIGTERM);
    }
    assert!(d.snapshotter.log().contains("\"event\":\"unknown_directories\""));
}

#[test]
fn root_unusable_address_is_a_configuration_error() {
    let sandbox = Sandbox::enter("address");
    let root = sandbox.path("root");
    for address in ["relative.sock", "/", "/tmp/a%41b", "/tmp/a/"] {
        let output = run(binary(), ["--address", address, "--root", root.to_str().unwrap(), "--config", "/dev/null"]);
        assert_eq!(output.status.code(), Some(78), "{address}: {}", output.stderr);
        assert!(output.stderr.contains(address), "{}", output.stderr);
        assert!(!root.exists(), "nothing is made for a wrong address");
    }
    // The message cannot be written; the exit code is the same.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = std::process::Command::new(binary()).args(["--address", "x"]).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(78));
}

/// When standard error was a pipe that was not read, the first worker that logged waited for ever, then the others, and
/// SIGTERM did nothing.
#[test]
fn root_unread_log_blocks_neither_calls_nor_stop() {
    let mut d = SnapshotterFixture::start("stalled-log", "");
    d.snapshotter.end(Signal::SIGTERM);
    let mut command = d.snapshotter.command();
    let mut daemon = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut unread = daemon.stderr.take().unwrap();
    let socket = d.snapshotter.socket();
    scene::process::eventually("it listens", || UnixStream::connect(&socket).is_ok());
    let c = d.snapshotter.client().with_timeout(Duration::from_secs(10));
    for n in 0..3000 {
        c.prepare(&format!("key-{n}"), "", &[(scene::client::REF, "sha256:c")]).unwrap();
        c.remove(&format!("key-{n}")).unwrap();
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let begun = Instant::now();
    let mut status = None;
    scene::process::eventually("it stops", || {
        status = daemon.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success() && begun.elapsed() < Duration::from_secs(12));
    drop(std::io::Read::read(&mut unread, &mut [0; 1]));
}

/// A slow reader of the log learns how many lines are missing.
#[test]
fn root_dropped_log_lines_are_counted_in_the_log() {
    let mut d = SnapshotterFixture::start("dropped", "log-format = \"text\"");
    d.snapshotter.end(Signal::SIGTERM);
    let mut daemon = d.snapshotter.command().stderr(std::process::Stdio::piped()).spawn().unwrap();
    let socket = d.snapshotter.socket();
    scene::process::eventually("it listens", || UnixStream::connect(&socket).is_ok());
    let c = d.snapshotter.client();
    for _ in 0..7000 {
        assert_refused(c.stat("absent"), Code::NOT_FOUND);
    }
    let mut stderr = daemon.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stderr, &mut text).unwrap();
        text
    });
    std::thread::sleep(Duration::from_millis(500));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    let text = reader.join().unwrap();
    let notice = text.lines().find(|line| line.contains("event=log_lines_dropped")).unwrap();
    let dropped: usize = notice.split(" count=").nth(1).unwrap().parse().unwrap();
    let written = text.lines().filter(|line| line.contains("\"absent\" does not exist")).count();
    assert_eq!(written + dropped, 7000, "{notice}");
}

/// A directory whose cleanup had failed was never cleaned up again.
#[test]
fn root_failed_cleanup_is_retried_by_the_next() {
    let d = SnapshotterFixture::start("taken-up", "");
    let source = PathBuf::from(&d.client.prepare("key", "", &[]).unwrap()[0].source);
    let foreign = d.sandbox.make_dir("foreign");
    let at = source.join("at");
    fs::create_dir(&at).unwrap();
    run("mount", ["--bind", foreign.to_str().unwrap(), at.to_str().unwrap()]).ok();
    d.client.remove("key").unwrap();
    for _ in 0..2 {
        d.client.cleanup().unwrap();
        assert!(source.exists(), "something is mounted in it");
    }
    run("umount", [at]).ok();
    d.client.cleanup().unwrap();
    assert!(!source.exists());
}
