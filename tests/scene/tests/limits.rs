//! The limits of docs/limits.md, and what happens at each of them.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cvmfs_snapshotter::server::MAX_CONNECTIONS;
use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use scene::client::{CallResult, Client, ListStream};
use scene::memory_cgroup::MemoryCgroup;
use scene::process::eventually;
use scene::snapshotter_fixture::{SnapshotterFixture, assert_refused, create_pulled_snapshots, digest};

/// Whether the daemon closes this connection at once.
fn is_turned_away(connection: &mut UnixStream) -> bool {
    connection.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    // An accepted connection gets SETTINGS first.
    connection.read(&mut [0; 9]).unwrap() == 0
}

#[test]
fn root_connections_are_bounded_and_accepted_ones_are_served() {
    let mut d = SnapshotterFixture::start("connections", "");
    d.client.prepare("key", "", &[]).unwrap();
    let connect = |d: &SnapshotterFixture| UnixStream::connect(d.snapshotter.socket()).unwrap();
    let mut connections: Vec<UnixStream> = (0..MAX_CONNECTIONS).map(|_| connect(&d)).collect();
    let turned_away = connections.iter_mut().filter_map(|one| is_turned_away(one).then_some(())).count();
    assert!((1..=2).contains(&turned_away), "{turned_away}: the client and the start hold one or two");
    assert!(is_turned_away(&mut connect(&d)));
    let full = d.snapshotter.server().descriptors();
    assert!(full < 2 * MAX_CONNECTIONS + 64, "{full}");
    d.client.stat("key").unwrap();
    assert!(d.snapshotter.log().contains("\"event\":\"connection_limit_reached\""));
    drop(connections);
    eventually("there is room again", || !is_turned_away(&mut connect(&d)));
    eventually("descriptors are given back", || d.snapshotter.server().descriptors() < 64);
}

/// The snapshots in the messages that are left.
fn rest(listing: ListStream) -> CallResult<usize> {
    listing.map(|message| message.map(|infos| infos.len())).sum()
}

/// A node with this many snapshots could never collect garbage, because a List of them was too large.
#[test]
fn root_unread_lists_hold_one_batch_each_and_block_nobody() {
    const SNAPSHOTS: usize = 20_000;
    let mut d =
        SnapshotterFixture::start_on("lists", "workers = 1", |root, _| create_pulled_snapshots(root, SNAPSHOTS as u64));
    d.client.list(&["labels.nothing"]).unwrap();
    let before = d.snapshotter.server().status("VmRSS") >> 10;
    let unread: Vec<(ListStream, usize)> = (0..64)
        .map(|_| {
            let mut listing = Client::connect_with_small_window(&d.snapshotter.socket()).open_list(&[]).unwrap();
            let first = listing.next().expect("a first message").expect("a List is not refused");
            (listing, first.len())
        })
        .collect();
    for n in 0..50 {
        let key = format!("key-{n}");
        d.client.prepare(&key, "", &[]).unwrap();
        d.client.stat(&key).unwrap();
        d.client.remove(&key).unwrap();
    }
    let now = d.snapshotter.server().status("VmRSS") >> 10;
    println!("64 unread lists of {SNAPSHOTS} snapshots: {before} MiB before, {now} MiB now");
    assert!(now < before + 128, "{before} MiB before, {now} MiB now");
    for (listing, first) in unread.into_iter().step_by(8) {
        assert_eq!(rest(listing).unwrap() + first, SNAPSHOTS);
    }
}

#[test]
fn root_lists_over_memory_budget_are_refused_and_running_ones_finish() {
    const SNAPSHOTS: usize = 5_000;
    let mut d = SnapshotterFixture::start_on("share", "", |root, _| create_pulled_snapshots(root, SNAPSHOTS as u64));
    let before = d.snapshotter.server().status("VmRSS") >> 10;
    let clients: Vec<Client> = (0..10).map(|_| Client::connect_with_small_window(&d.snapshotter.socket())).collect();
    let (mut begun, mut refusals) = (Vec::new(), Vec::new());
    for n in 0..300 {
        let mut listing = clients[n % clients.len()].open_list(&[]).unwrap();
        match listing.next().expect("an answer") {
            Ok(first) => begun.push((listing, first.len())),
            Err(status) => refusals.push(status),
        }
    }
    let now = d.snapshotter.server().status("VmRSS") >> 10;
    println!("{} unread lists: {before} MiB before, {now} MiB now", begun.len());
    assert!(now < before + 320, "{before} MiB before, {now} MiB now");
    assert!(begun.len() > 150 && !refusals.is_empty(), "{} are served", begun.len());
    for status in &refusals {
        assert_eq!(status.code(), Code::RESOURCE_EXHAUSTED, "{}", status.message());
        assert!(status.message().starts_with("memory limit for requests and responses"), "{}", status.message());
    }
    // Other clients are served as before, and a pull includes a List.
    let layer = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    d.client.prepare("key", &layer, &[]).unwrap();
    d.client.remove("key").unwrap();
    for (listing, first) in begun.drain(..8) {
        assert_eq!(rest(listing).unwrap() + first, SNAPSHOTS);
    }
    drop(begun);
    eventually("there is room again", || d.client.list(&[]).is_ok_and(|all| all.len() == SNAPSHOTS + 1));
}

#[test]
fn root_memory_of_largest_requests_is_bounded_in_total() {
    let mut d = SnapshotterFixture::start("large", "");
    let before = d.snapshotter.server().status("VmRSS") >> 10;
    let largest = "x".repeat((16 << 20) - 1000);
    let answered = std::sync::atomic::AtomicUsize::default();
    std::thread::scope(|scope| {
        for t in 0..32 {
            let (c, largest, answered) = (d.snapshotter.client(), &largest, &answered);
            scope.spawn(move || {
                for n in 0..2 {
                    let status = c.prepare(&format!("{t}-{n}"), "", &[("l", largest)]).unwrap_err();
                    match status.code() {
                        Code::INVALID_ARGUMENT | Code::RESOURCE_EXHAUSTED => {
                            answered.fetch_add(1, Ordering::SeqCst);
                        }
                        // gRPC refuses more memory and closes connections.
                        Code::UNAVAILABLE => {}
                        other => panic!("{other:?} {}", status.message()),
                    }
                }
            });
        }
    });
    let peak = d.snapshotter.server().status("VmHWM") >> 10;
    println!("32 clients with requests of 16 MiB: {before} MiB before, {peak} MiB at the peak");
    assert!(peak < 1200, "{peak} MiB");
    assert!(answered.into_inner() > 0, "not one was answered");
    d.client = d.snapshotter.client();
    let too_long = "x".repeat((16 << 20) + 1);
    let message = assert_refused(d.client.prepare("key", "", &[("l", &too_long)]), Code::RESOURCE_EXHAUSTED);
    assert!(message.contains("larger than max"), "{message}");
    d.client.prepare("key", "", &[]).unwrap();
}

/// The names of the threads that gRPC's C core starts.
const CORE_THREADS: [&str; 5] =
    ["default-executo", "event_engine", "grpc_global_tim", "resolver-execut", "timer_manager"];

#[test]
fn root_thread_count_does_not_grow_under_load() {
    let mut d = SnapshotterFixture::start("threads", "workers = 4");
    d.client.prepare("key", "", &[]).unwrap();
    let clients: Vec<Client> = (0..48).map(|_| d.snapshotter.client()).collect();
    let server = d.snapshotter.server();
    let threads = |of_grpc: bool| {
        let mut names = server.threads();
        names.retain(|name| CORE_THREADS.contains(&name.as_str()) == of_grpc);
        names
    };
    let before = threads(false);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for (t, c) in clients.iter().enumerate() {
            scope.spawn(move || {
                for n in 0..20 {
                    let key = format!("{t}-{n}");
                    c.prepare(&key, "", &[]).unwrap();
                    c.remove(&key).unwrap();
                }
            });
        }
        for _ in 0..20 {
            // A thread that gRPC has just started has the name of the worker that started it, until it sets its own.
            let mut now = threads(false);
            for _ in 0..10 {
                if now == before {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
                now = threads(false);
            }
            assert_eq!(now, before);
            // gRPC starts some of these when it first needs them. Both executors may have two for each core.
            let core = threads(true);
            assert!(core.len() <= 4 * cores + 16, "{cores} cores, {core:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

/// When every descriptor is in use, calls report it, the daemon keeps running, and freed descriptors are used again.
#[test]
fn root_exhausted_descriptors_are_logged_and_recovered_from() {
    let mut d = SnapshotterFixture::start("descriptors", "");
    let pid = d.snapshotter.server().pid().to_string();
    let used = d.snapshotter.server().descriptors();
    let limit = |n: usize| {
        let limit = format!("--nofile={n}:4096");
        scene::process::run("prlimit", ["--pid", &pid, &limit]).ok();
    };
    d.client.prepare("key", "", &[]).unwrap();
    limit(used + 6);
    let connections: Vec<UnixStream> = (0..16).map(|_| UnixStream::connect(d.snapshotter.socket()).unwrap()).collect();
    eventually("it runs out", || d.snapshotter.log().contains("Too many open files"));
    d.client.stat("key").unwrap();
    let message = assert_refused(d.client.usage("key"), Code::INTERNAL);
    assert!(message.contains("(EMFILE)"), "{message}");
    limit(1024);
    d.client.usage("key").unwrap();
    // Waiting connections are accepted, except one that may have got the very last descriptor.
    let turned_away = connections.into_iter().filter_map(|mut one| is_turned_away(&mut one).then_some(())).count();
    assert!(turned_away <= 1, "{turned_away}");
    d.client.remove("key").unwrap();
    d.client.cleanup().unwrap();
}

/// Makes `count` names in `directory`, each of the greatest length. They are links to a few files, because ext4 takes
/// 65,000 links to each. `beside` becomes a further link to one of these files.
fn make_names(directory: &Path, count: usize, beside: &Path) {
    const LINKS: usize = 60_000;
    let mut file = PathBuf::new();
    for n in 0..count {
        let name = directory.join(format!("{n:0255}"));
        if n % LINKS == 0 {
            fs::write(&name, "x").unwrap();
            file = name;
        } else {
            fs::hard_link(&file, &name).unwrap();
        }
    }
    fs::hard_link(&file, beside).unwrap();
}

/// A process in a container can make hard links without any privilege. All names of a directory were read into
/// memory, so the kernel killed the daemon for a Usage, which the kubelet asks for again and again, and for a
/// Cleanup, at each start anew, before the first name was removed.
#[test]
fn root_directory_of_500000_names_is_measured_and_removed_in_64_mib() {
    const NAMES: usize = 500_000;
    const LIMIT: Duration = Duration::from_mins(5);
    let group = MemoryCgroup::create("names", 64 << 20);
    let mut d = SnapshotterFixture::start("names", "");
    let command = group.command();
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    d.snapshotter.end(Signal::SIGTERM);
    d.snapshotter.start_again_below(&words);
    let c = d.snapshotter.client().with_timeout(LIMIT);
    let source = PathBuf::from(&c.prepare("key", "", &[]).unwrap()[0].source);
    let beside = d.sandbox.path("beside");
    make_names(&source, NAMES, &beside);
    let names_left = || fs::metadata(&beside).unwrap().nlink();
    let at_first = names_left();
    let begun = Instant::now();
    let usage = c.usage("key");
    assert_eq!(group.oom_kills(), 0, "the kernel killed the daemon for the memory that a Usage took");
    let (size, inodes) = usage.unwrap();
    println!("Usage of {NAMES} names took {:?}", begun.elapsed());
    let blocks = fs::metadata(&source).unwrap().blocks() + 9 * 8;
    assert_eq!((size, inodes), (i64::try_from(blocks * 512).unwrap(), 1 + 9));

    c.remove("key").unwrap();
    let cleanup = std::thread::spawn(move || c.cleanup());
    d.snapshotter.server().wait_until("remove names", || names_left() < at_first - 100);
    d.snapshotter.end(Signal::SIGKILL);
    cleanup.join().unwrap().unwrap_err();
    let at_the_kill = names_left();
    assert!((2..at_first).contains(&at_the_kill), "{at_the_kill} of {at_first} names are left");

    let begun = Instant::now();
    d.snapshotter.start_again_below(&words);
    d.client = d.snapshotter.client().with_timeout(LIMIT);
    // The call waits for the background work of the start.
    let cleaned = d.client.cleanup();
    assert_eq!(group.oom_kills(), 0, "the kernel killed the daemon for the memory that a Cleanup took");
    cleaned.unwrap();
    println!("the rest of the removal took {:?}; the group's peak: {:?} bytes", begun.elapsed(), group.peak());
    assert!(!source.exists() && names_left() == 1, "{} names are left", names_left());
    println!("{} KiB at the peak of the second daemon", d.snapshotter.server().status("VmHWM"));
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
}
