//! Many clients at once, and clients that mean no good: every call gets its answer, and
//! nobody holds anybody else up.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use cvmfs_snapshotter::proto::snapshots::UsageRequest;
use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use protobuf::Message;
use scene::client::{CallResult, Client};
use scene::http2::{
    DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RawConnection, SETTINGS, Sent, call, frame, message,
};
use scene::metrics::{find_sample, sample, scrape};
use scene::process::{SetOnDrop, eventually};
use scene::resource_usage::ResourceUsage;
use scene::sandbox::mounts_below;
use scene::snapshotter_fixture::{
    SnapshotterFixture, assert_refused, create_pulled_snapshots, create_wide_tree, digest, options,
};

#[test]
fn root_every_call_is_answered_under_load() {
    let mut d = SnapshotterFixture::start("load", "");
    let failures: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|t| {
                let c = d.snapshotter.client();
                scope.spawn(move || {
                    let mut failures = Vec::new();
                    for n in 0..150 {
                        let key = format!("{t}-{n}");
                        for answer in [
                            c.prepare(&key, "", &[]).map(drop),
                            c.stat(&key).map(drop),
                            c.mounts(&key).map(drop),
                            c.list(&[&format!("name==\"{key}\"")]).map(|l| assert_eq!(l.len(), 1)),
                            c.remove(&key),
                        ] {
                            failures.extend(answer.err().map(|s| format!("{:?} {}", s.code(), s.message())));
                        }
                    }
                    failures
                })
            })
            .collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(failures, Vec::<String>::new());
    d.client.cleanup().unwrap();
    assert_eq!(scene::e2e_fixture::names(&d.snapshotter.snapshots()), Vec::<String>::new());
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
}

/// Each connection to the metadata has a cache, and freed pieces of the heap stay with the process: after many calls at
/// once all of that stayed for ever.
#[test]
fn root_memory_is_returned_after_many_concurrent_calls() {
    let mut d = SnapshotterFixture::start("storm", "");
    let clients: Vec<Client> = (0..32).map(|_| d.snapshotter.client()).collect();
    std::thread::scope(|scope| {
        for (t, client) in clients.iter().enumerate() {
            scope.spawn(move || {
                for n in 0..60 {
                    let key = format!("{t}-{n}");
                    client.prepare(&key, "", &[]).unwrap();
                    client.commit(&format!("{key}-committed"), &key, &[]).unwrap();
                    client.list(&[&format!("name==\"{key}-committed\"")]).unwrap();
                }
            });
        }
    });
    let pid = d.snapshotter.server().pid();
    let after = ResourceUsage::read(pid);
    eventually("files are closed and memory is given back", || {
        let now = ResourceUsage::read(pid);
        now.files + 4 < after.files && now.memory + 1024 < after.memory
    });
    drop(clients);
}

#[test]
fn root_concurrent_pulls_of_one_layer_make_one_snapshot() {
    let d = SnapshotterFixture::start("concurrent", "attach = \"bind\"");
    std::thread::scope(|scope| {
        for t in 0..16 {
            let c = d.snapshotter.client();
            scope.spawn(move || c.pull_remote(&format!("extract-{t}"), "", "sha256:c", &digest(1)));
        }
    });
    assert_eq!(d.client.list(&[]).unwrap().len(), 1);
    // A hundred first uses attach the layer once.
    std::thread::scope(|scope| {
        for t in 0..100 {
            let c = d.client.clone();
            scope.spawn(move || c.prepare(&format!("container-{t}"), "cvmfs/0/sha256:c", &[]).unwrap());
        }
    });
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 1);
}

#[test]
fn root_concurrent_cleanups_never_detach_layers_in_use() {
    let d = SnapshotterFixture::start("race", "attach = \"bind\"");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let set_stop = SetOnDrop(&stop);
        let cleaner = d.client.clone();
        let stop = &stop;
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                cleaner.cleanup().unwrap();
            }
        });
        let workers: Vec<_> = (0..4)
            .map(|t| {
                let (c, name) = (d.client.clone(), name.clone());
                scope.spawn(move || {
                    for n in 0..100 {
                        let key = format!("{t}-{n}");
                        let mounts = c.prepare(&key, &name, &[]).unwrap();
                        let lower = options(&mounts).iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
                        let layer = lower.split(':').find(|l| l.ends_with("/fs")).unwrap();
                        assert!(Path::new(layer).join("dir/file-1").exists(), "the layer is not attached");
                        c.remove(&key).unwrap();
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        drop(set_stop);
    });
    d.client.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
}

#[test]
fn root_full_queue_refuses_at_once_and_expired_calls_are_not_started() {
    let d = SnapshotterFixture::start("queue", "workers = 1\nqueue = 2");
    // A directory that takes long to measure keeps the only worker busy.
    let source = PathBuf::from(&d.client.prepare("big", "", &[]).unwrap()[0].source);
    create_wide_tree(&source, 200, 200);
    std::thread::scope(|scope| {
        let busy: Vec<_> = (0..40)
            .map(|_| {
                let c = d.client.clone();
                scope.spawn(move || c.usage("big"))
            })
            .collect();
        let answers: Vec<_> = busy.into_iter().map(|b| b.join().unwrap()).collect();
        let done = answers.iter().filter(|a| a.is_ok()).count();
        let full = answers.iter().filter(|a| a.as_ref().is_err_and(|s| s.code() == Code::RESOURCE_EXHAUSTED)).count();
        assert!(done >= 2 && full >= 1 && done + full == 40, "{done} done, {full} refused");
    });
    std::thread::scope(|scope| {
        let busy = {
            let c = d.client.clone();
            scope.spawn(move || c.usage("big"))
        };
        std::thread::sleep(Duration::from_millis(20));
        let late = d.client.with_timeout(Duration::from_millis(1)).prepare("late", "", &[]);
        assert_refused(late, Code::DEADLINE_EXCEEDED);
        busy.join().unwrap().unwrap();
    });
    assert_refused(d.client.stat("late"), Code::NOT_FOUND);
}

#[test]
fn root_garbage_on_the_socket_does_not_affect_other_clients() {
    let d = SnapshotterFixture::start("garbage", "");
    for n in 0..50 {
        let mut stream = UnixStream::connect(d.snapshotter.socket()).unwrap();
        let bytes: Vec<u8> =
            (0..1000 + n * 37).map(|i: u32| u8::try_from(i.wrapping_mul(2_654_435_761) >> 24).unwrap()).collect();
        let _ = std::io::Write::write_all(&mut stream, &bytes);
    }
    let open: Vec<_> = (0..100).map(|_| UnixStream::connect(d.snapshotter.socket()).unwrap()).collect();
    d.client.prepare("key", "", &[]).unwrap();
    drop(open);
    d.client.stat("key").unwrap();
}

#[test]
fn root_client_not_reading_its_list_holds_no_worker() {
    let d = SnapshotterFixture::start("slow-reader", "workers = 1");
    for n in 0..40 {
        d.client.prepare(&format!("key-{n}"), "", &[("big", &"x".repeat(200_000))]).unwrap();
    }
    let streams: Vec<_> = (0..8).map(|_| d.client.open_list(&[]).unwrap()).collect();
    for n in 0..40 {
        d.snapshotter.client().with_timeout(Duration::from_secs(5)).stat(&format!("key-{n}")).unwrap();
    }
    drop(streams);
}

#[test]
fn root_full_queue_does_not_interrupt_a_running_list() {
    const SNAPSHOTS: usize = 20_000;
    let d = SnapshotterFixture::start_on("begun", "workers = 1\nqueue = 1", |root, _| {
        create_pulled_snapshots(root, SNAPSHOTS as u64);
    });
    let mut listing = d.client.open_list(&[]).unwrap();
    let mut listed = listing.next().unwrap().unwrap().len();
    let (stop, refusals) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let set_stop = SetOnDrop(&stop);
        for _ in 0..16 {
            scope.spawn(|| {
                let c = d.snapshotter.client();
                while !stop.load(Ordering::Relaxed) {
                    if c.stat("pulled-1").is_err_and(|status| status.code() == Code::RESOURCE_EXHAUSTED) {
                        refusals.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        while refusals.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
        let before = refusals.load(Ordering::Relaxed);
        let rest: CallResult<usize> = listing.map(|message| message.map(|infos| infos.len())).sum();
        drop(set_stop);
        listed += rest.unwrap();
        assert!(refusals.load(Ordering::Relaxed) > before, "the queue was not full meanwhile");
    });
    assert_eq!(listed, SNAPSHOTS);
}

#[test]
fn root_list_of_disconnected_client_is_aborted() {
    let d = SnapshotterFixture::start_on("away", "", |root, _| create_pulled_snapshots(root, 20_000));
    let sent = |d: &SnapshotterFixture| -> Vec<usize> {
        let log = d.snapshotter.log();
        let lines = log.lines().filter(|line| line.contains("\"event\":\"list_cancelled\""));
        let counts = lines.filter_map(|line| line.split("\"snapshots_sent\":\"").nth(1));
        counts.map(|count| count.split('"').next().unwrap().parse().unwrap()).collect()
    };
    let mut listing = d.client.open_list(&[]).unwrap();
    listing.next().unwrap().unwrap();
    drop(listing);
    eventually("its end is noticed", || sent(&d).iter().any(|count| (1..20_000).contains(count)));
    // Nothing is sent here, which could fail.
    eventually("its end is noticed between two chunks", || {
        let listing = d.client.open_list(&["labels.nothing"]).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        drop(listing);
        sent(&d).contains(&0)
    });
}

#[test]
fn root_stop_finishes_running_list_and_aborts_unread_one() {
    const SNAPSHOTS: usize = 20_000;
    let mut d = SnapshotterFixture::start_on("stop", "", |root, _| create_pulled_snapshots(root, SNAPSHOTS as u64));
    let (reader, sleeper) = (d.snapshotter.client(), d.snapshotter.client());
    let [mut read, mut unread] = [reader, sleeper].map(|client| client.open_list(&[]).unwrap());
    let first = read.next().unwrap().unwrap().len();
    unread.next().unwrap().unwrap();
    d.snapshotter.server().signal(Signal::SIGTERM);
    eventually("it stops", || d.snapshotter.log().contains("\"event\":\"daemon_stopping\""));
    let rest: CallResult<usize> = read.map(|message| message.map(|infos| infos.len())).sum();
    assert_eq!(rest.unwrap() + first, SNAPSHOTS);
    assert!(d.snapshotter.server().wait_for_end().success());
    let end = unread.find_map(CallResult::err).expect("it did not get all");
    assert_eq!(end.code(), Code::UNAVAILABLE, "{}", end.message());
}

/// A client that did not read its List kept all others from getting GOAWAY, so their calls during the stop failed.
#[test]
fn root_client_not_reading_does_not_keep_others_from_getting_goaway() {
    const SNAPSHOTS: usize = 20_000;
    let mut d = SnapshotterFixture::start_on("goaway", "", |root, _| create_pulled_snapshots(root, SNAPSHOTS as u64));
    let mut unread = Client::connect_with_small_window(&d.snapshotter.socket()).open_list(&[]).unwrap();
    let first = unread.next().unwrap().unwrap().len();
    let mut others = [(); 3].map(|()| RawConnection::connect_with_preface(&d.snapshotter.socket()));
    for other in &mut others {
        assert!(other.receives(SETTINGS, Duration::from_secs(10)));
    }
    d.snapshotter.server().signal(Signal::SIGTERM);
    for other in &mut others {
        assert!(other.receives(GOAWAY, Duration::from_secs(30)), "it was not asked to go");
    }
    // That was not the end, which would take the List along.
    let rest: CallResult<usize> = unread.map(|message| message.map(|infos| infos.len())).sum();
    assert_eq!(rest.unwrap() + first, SNAPSHOTS);
    drop(others);
    assert!(d.snapshotter.server().wait_for_end().success());
}

/// It was counted as OK before it was sent.
#[test]
fn root_call_of_disconnected_client_is_counted_as_cancelled() {
    let dir = PathBuf::from(format!("/run/scene-unsent-{}", std::process::id()));
    let socket = dir.join("m.sock");
    let d = SnapshotterFixture::start("unsent", &format!("metrics-address = {socket:?}"));
    let source = PathBuf::from(&d.client.prepare("big", "", &[]).unwrap()[0].source);
    create_wide_tree(&source, 200, 200);
    let request = UsageRequest { key: "big".to_owned(), ..UsageRequest::default() };
    let request = message(&request.write_to_bytes().unwrap());
    let call = [frame(HEADERS, END_HEADERS, 1, &call("Usage")), frame(DATA, END_STREAM, 1, &request)].concat();
    let counted = |code: &str| {
        let name = format!("call_duration_seconds_count{{method=\"Usage\",code=\"{code}\"}}");
        find_sample(&scrape(&socket), &name).unwrap_or(0)
    };
    let is_busy = || sample(&scrape(&socket), "pool_busy{pool=\"worker\"}") > 0;
    // On a slow machine the client may go away too late, so it has more than one try.
    for tries in 1..=20 {
        let mut client = RawConnection::connect_with_preface(&d.snapshotter.socket());
        assert_eq!(client.send(&call, Duration::from_secs(10)), Sent::All);
        eventually("the call is worked on, or is over", || is_busy() || counted("OK") + counted("CANCELLED") == tries);
        drop(client);
        eventually("the call is counted", || counted("OK") + counted("CANCELLED") == tries);
        if counted("CANCELLED") > 0 {
            fs::remove_dir_all(&dir).unwrap();
            return;
        }
    }
    panic!("{} answers that nobody took are OK", counted("OK"));
}

/// Each Cleanup that waited for the one under way held a worker: a few of them stopped the
/// daemon until a large snapshot was removed.
#[test]
fn root_concurrent_cleanups_leave_workers_for_other_calls() {
    let d = SnapshotterFixture::start("cleanups", "workers = 3");
    let source = PathBuf::from(&d.client.prepare("big", "", &[]).unwrap()[0].source);
    create_wide_tree(&source, 400, 250);
    d.client.prepare("other", "", &[]).unwrap();
    d.client.remove("big").unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| d.client.cleanup().unwrap());
        let begun = || fs::read_dir(&source).map_or(true, |entries| entries.count() < 400);
        while !begun() {
            assert!(!first.is_finished(), "the removal never began");
        }
        for _ in 0..6 {
            scope.spawn(|| d.client.cleanup().unwrap());
        }
        d.client.stat("other").unwrap();
        assert!(source.exists() && !first.is_finished(), "the call was answered only after the removal");
    });
    assert!(!source.exists());
}
