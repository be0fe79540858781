//! The contract of the snapshots service, call by call, over the real socket of a real
//! daemon: what containerd, other clients and hostile ones may send, and what they get.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use cvmfs_snapshotter::proto::mount::Mount;
use cvmfs_snapshotter::proto::snapshots::{Info, Kind};
use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use scene::client::{Answer, Client, LAYER_DIGEST, REF, labels};
use scene::process::run;
use scene::publisher::Repository;
use scene::rootfs::Mounted;
use scene::sandbox::{Sandbox, mount_tmpfs, mounts_below};
use scene::snapshotter::{Snapshotter, binary};

/// A snapshotter alone, with a repository that has a few layers.
struct Daemon {
    client: Client,
    snapshotter: Snapshotter,
    repository: Repository,
    sandbox: Sandbox,
}

fn digest(n: u8) -> String {
    format!("sha256:{}", format!("{n:02x}").repeat(32))
}

fn daemon(name: &str, config: &str) -> Daemon {
    let sandbox = Sandbox::enter(name);
    let repository = Repository::create(&sandbox.path("cvmfs"));
    for n in 1..=3 {
        let top = repository.layer_dir(&digest(n)).join("layerfs");
        fs::create_dir_all(top.join("dir")).unwrap();
        fs::write(top.join(format!("dir/file-{n}")), n.to_string()).unwrap();
        fs::write(top.join(".cvmfscatalog"), "").unwrap();
    }
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
    Daemon { client: snapshotter.client(), snapshotter, repository, sandbox }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: Code) -> String {
    let status = answer.expect_err("the call is refused");
    assert_eq!(status.code(), code, "{}", status.message());
    status.message().to_owned()
}

fn options(mounts: &[Mount]) -> &[String] {
    let [mount] = mounts else { panic!("one mount describes a snapshot") };
    &mount.options
}

fn nanos(info: &Info) -> (i128, i128) {
    let all = |t: &protobuf::well_known_types::timestamp::Timestamp| {
        i128::from(t.seconds) * 1_000_000_000 + i128::from(t.nanos)
    };
    (all(&info.created_at), all(&info.updated_at))
}

fn now() -> i128 {
    i128::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

#[test]
fn root_each_wrong_call_gets_its_code() {
    let d = daemon("codes", "");
    let c = &d.client;
    c.prepare("active", "", &[]).unwrap();
    c.prepare("to-commit", "", &[]).unwrap();
    c.commit("committed", "to-commit", &[]).unwrap();
    c.view("view", "committed", &[]).unwrap();
    for absent in [
        c.stat("absent").map(drop),
        c.usage("absent").map(drop),
        c.mounts("absent").map(drop),
        c.remove("absent"),
        c.commit("new", "absent", &[]),
        c.commit("committed", "absent", &[]),
        c.update(Info { name: "absent".into(), ..Info::default() }, &[]).map(drop),
        c.prepare("new", "absent", &[]).map(drop),
        c.view("new", "absent", &[]).map(drop),
        // The parent is looked at before the key.
        c.prepare("active", "absent", &[]).map(drop),
    ] {
        refused(absent, Code::NOT_FOUND);
    }
    for parent in ["active", "view"] {
        refused(c.prepare("new", parent, &[]), Code::INVALID_ARGUMENT);
        refused(c.view("committed", parent, &[]), Code::INVALID_ARGUMENT);
    }
    for key in ["active", "view", "committed"] {
        refused(c.prepare(key, "", &[]), Code::ALREADY_EXISTS);
        refused(c.view(key, "committed", &[]), Code::ALREADY_EXISTS);
        refused(c.commit(key, "active", &[]), Code::ALREADY_EXISTS);
    }
    refused(c.mounts("committed"), Code::FAILED_PRECONDITION);
    for key in ["view", "committed"] {
        refused(c.commit("new", key, &[]), Code::FAILED_PRECONDITION);
    }
    let message = refused(c.remove("committed"), Code::FAILED_PRECONDITION);
    assert!(message.contains("remove"), "{message}");
    c.remove("view").unwrap();
    c.remove("committed").unwrap();
    refused(c.stat("committed"), Code::NOT_FOUND);
    c.commit("committed", "active", &[]).unwrap();
}

#[test]
fn root_commit_may_name_the_parent() {
    let d = daemon("rebase", "");
    let c = &d.client;
    for name in ["one", "two"] {
        c.prepare("key", "", &[]).unwrap();
        c.commit(name, "key", &[]).unwrap();
    }
    c.prepare("other", "", &[]).unwrap();
    c.prepare("on-one", "one", &[]).unwrap();
    refused(c.commit_on("new", "on-one", "two", &[]), Code::INVALID_ARGUMENT);
    c.commit_on("three", "on-one", "one", &[]).unwrap();
    c.prepare("free", "", &[]).unwrap();
    refused(c.commit_on("new", "free", "absent", &[]), Code::NOT_FOUND);
    refused(c.commit_on("new", "free", "other", &[]), Code::FAILED_PRECONDITION);
    c.commit_on("four", "free", "two", &[]).unwrap();
    assert_eq!(c.stat("four").unwrap().parent, "two");
    refused(c.remove("two"), Code::FAILED_PRECONDITION);
    c.remove("four").unwrap();
    c.remove("two").unwrap();
}

#[test]
fn root_labels_and_times_follow_the_contract() {
    let d = daemon("labels", "");
    let c = &d.client;
    let before = now();
    c.prepare("key", "", &[("a", "1"), ("empty", ""), ("containerd.io/gc.root", "x")]).unwrap();
    let made = c.stat("key").unwrap();
    let (created, updated) = nanos(&made);
    assert!(before <= created && created == updated && updated <= now());
    assert_eq!(made.labels, labels(&[("a", "1"), ("containerd.io/gc.root", "x")]));
    assert_eq!((made.kind.enum_value(), made.parent.as_str()), (Ok(Kind::ACTIVE), ""));

    // Immutable fields that no mask names are passed over.
    let change = |with: &[(&str, &str)]| Info {
        name: "key".into(),
        parent: "doesnotexist".into(),
        labels: labels(with),
        ..Info::default()
    };
    let changed = c.update(change(&[("b", "2"), ("a", "9")]), &["labels.b", "labels.gone"]).unwrap();
    assert_eq!(changed.labels, labels(&[("a", "1"), ("b", "2"), ("containerd.io/gc.root", "x")]));
    assert_eq!((nanos(&changed).0, changed.parent.as_str()), (created, ""));
    assert!(nanos(&changed).1 > updated);
    assert_eq!(c.update(change(&[("b", "")]), &["labels.b"]).unwrap().labels.get("b"), None);
    assert_eq!(c.update(change(&[("x.y/z", "1")]), &["labels"]).unwrap().labels, labels(&[("x.y/z", "1")]));
    assert_eq!(c.update(change(&[("q", "1")]), &[]).unwrap().labels, labels(&[("q", "1")]));
    refused(c.update(change(&[("b", "2")]), &["labels.b", "parent"]), Code::INVALID_ARGUMENT);
    let kept = c.stat("key").unwrap();
    assert_eq!(kept.labels, labels(&[("q", "1")]), "a refused update writes nothing");
    assert_eq!(c.list(&["name==key"]).unwrap(), [kept], "Stat and List say the same");

    let before = now();
    c.commit("name", "key", &[("own", "1")]).unwrap();
    let committed = c.stat("name").unwrap();
    assert_eq!(committed.labels, labels(&[("own", "1")]), "Commit replaces the labels");
    assert!(nanos(&committed).0 >= before && nanos(&committed).0 == nanos(&committed).1);
    refused(c.stat("key"), Code::NOT_FOUND);
}

#[test]
fn root_mounts_are_those_of_the_contract_and_stay_the_same() {
    let d = daemon("mounts", "");
    let c = &d.client;
    let first = c.prepare("first", "", &[]).unwrap();
    assert_eq!((first[0].type_.as_str(), options(&first)), ("bind", ["rw", "rbind"].map(String::from).as_slice()));
    assert_eq!(c.mounts("first").unwrap(), first);
    let source = PathBuf::from(&first[0].source);
    assert_eq!(fs::metadata(&source).unwrap().mode() & 0o7777, 0o755);
    std::os::unix::fs::chown(&source, Some(12), Some(34)).unwrap();
    fs::write(source.join("file"), "x").unwrap();
    c.commit("one", "first", &[]).unwrap();
    let second = c.prepare("second", "one", &[]).unwrap();
    assert_eq!(second[0].type_, "overlay");
    let upper = options(&second).iter().find_map(|o| o.strip_prefix("upperdir=")).unwrap();
    let status = fs::metadata(upper).unwrap();
    assert_eq!((status.uid(), status.gid(), status.mode() & 0o7777), (12, 34, 0o755), "the owner is the parent's");
    assert!(options(&second).contains(&format!("lowerdir={}", source.display())));
    assert_eq!(c.mounts("second").unwrap(), second);
    c.commit("two", "second", &[]).unwrap();
    let view = c.view("view-one", "one", &[]).unwrap();
    assert_eq!(
        (view[0].source.as_str(), options(&view)),
        (source.to_str().unwrap(), ["ro", "rbind"].map(String::from).as_slice())
    );
    let view = c.view("view-two", "two", &[]).unwrap();
    assert!(!options(&view).iter().any(|o| o.starts_with("upperdir=")));
    let at = d.sandbox.path("mnt");
    let mounted = Mounted::new(&view, &at).unwrap();
    assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "x");
    assert!(fs::write(at.join("new"), "x").is_err(), "a view is read-only");
    drop(mounted);
    let mapped =
        [("containerd.io/snapshot/uidmapping", "0:5000:65536"), ("containerd.io/snapshot/gidmapping", "0:6000:65536")];
    let mounts = c.prepare("mapped", "one", &mapped).unwrap();
    let upper = options(&mounts).iter().find_map(|o| o.strip_prefix("upperdir=")).unwrap();
    assert_eq!((fs::metadata(upper).unwrap().uid(), fs::metadata(upper).unwrap().gid()), (5000, 6000));
    for bad in ["", "0", "0:1", "a:b:c", "0:4294967295:2", "1:2:3:4", "-1:0:1", "5:5000:10", "0:0:0"] {
        let answer = c.prepare("bad", "one", &[("containerd.io/snapshot/uidmapping", bad)]);
        if bad.is_empty() {
            answer.unwrap(); // A label without a value is none.
        } else {
            let message = refused(answer, Code::INVALID_ARGUMENT);
            assert!(message.contains("uidmapping") && message.contains(bad), "{message}");
        }
    }
}

#[test]
fn root_usage_counts_the_snapshots_own_files() {
    let d = daemon("usage", "");
    let c = &d.client;
    let source = PathBuf::from(&c.prepare("key", "", &[]).unwrap()[0].source);
    fs::create_dir(source.join("dir")).unwrap();
    fs::write(source.join("dir/file"), vec![1; 100_000]).unwrap();
    fs::hard_link(source.join("dir/file"), source.join("again")).unwrap();
    let du: i64 = run("du", ["--block-size=1", "--summarize", source.to_str().unwrap()])
        .ok()
        .split('\t')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(c.usage("key").unwrap(), (du, 3));
    c.commit("name", "key", &[]).unwrap();
    assert_eq!(c.usage("name").unwrap(), (du, 3));
    fs::write(source.join("later"), "x").unwrap();
    assert_eq!(c.usage("name").unwrap(), (du, 3), "a committed snapshot is measured once");
    c.view("view", "name", &[]).unwrap();
    assert_eq!(c.usage("view").unwrap(), (0, 0));
    c.pull_remote("extract-1 a", "", "sha256:a", &digest(1));
    assert_eq!(c.usage("cvmfs/0/sha256:a").unwrap(), (0, 0));
}

#[test]
fn root_list_comes_in_batches_and_follows_filters() {
    let d = daemon("list", "");
    let c = &d.client;
    assert_eq!(c.list_batches(&[]).unwrap().len(), 0, "no message for no snapshot");
    for n in 0..250 {
        c.prepare(&format!("key-{n}"), "", &[("n", &n.to_string())]).unwrap();
    }
    let batches = c.list_batches(&[]).unwrap();
    assert!(batches.iter().all(|b| b.len() <= 100));
    let names: HashSet<String> = batches.into_iter().flatten().map(|i| i.name).collect();
    assert_eq!(names.len(), 250);
    assert_eq!(c.list(&["labels.n==7", "name==key-9,kind==active"]).unwrap().len(), 2);
    assert_eq!(c.list(&[""]).unwrap().len(), 250);
    let message = refused(c.list(&["name==", "kind"]).map(|l| l.len()), Code::INVALID_ARGUMENT);
    assert!(message.contains("\"name==\""), "{message}");
}

#[test]
fn root_remote_layers_follow_the_protocol() {
    let d = daemon("remote", "");
    let c = &d.client;
    let first = c.pull_remote("default/1/extract-1 sha256:c1", "", "sha256:c1", &digest(1));
    let second = c.pull_remote("default/2/extract-2 sha256:c2", &first, "sha256:c2", &digest(2));
    // Again, and for another namespace: the same snapshot.
    assert_eq!(c.pull_remote("other/3/extract-3 sha256:c1", "", "sha256:c1", &digest(1)), first);
    refused(c.stat("default/1/extract-1 sha256:c1"), Code::NOT_FOUND);
    let info = c.stat(&first).unwrap();
    assert_eq!(info.kind.enum_value(), Ok(Kind::COMMITTED));
    assert_eq!(info.labels.get(REF).map(String::as_str), Some("sha256:c1"));
    assert_eq!(info.labels.get("containerd.io/snapshot/remote").map(String::as_str), Some("remote snapshot"));
    assert_eq!(scene::stage::names(&d.snapshotter.snapshots()), Vec::<String>::new(), "nothing is made at pull time");
    // The same chain over another parent is another snapshot.
    c.prepare("local", "", &[]).unwrap();
    c.commit("local-parent", "local", &[]).unwrap();
    let other = c.pull_remote("other/4/extract-4 sha256:c2", "local-parent", "sha256:c2", &digest(2));
    assert_ne!(other, second);

    let view = c.view("view", &second, &[]).unwrap();
    let at = d.sandbox.path("mnt");
    let mounted = Mounted::new(&view, &at).unwrap();
    assert_eq!(scene::stage::names(&at), ["dir"]);
    assert_eq!(scene::stage::names(&at.join("dir")), ["file-1", "file-2"]);
    drop(mounted);
    refused(c.remove(&first), Code::FAILED_PRECONDITION);
    refused(c.remove(&second), Code::FAILED_PRECONDITION);
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 2);
    c.remove("view").unwrap();
    c.remove(&second).unwrap();
    c.remove(&first).unwrap();
    c.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
    // What is left: the local parent.
    assert_eq!(scene::stage::names(&d.snapshotter.snapshots()).len(), 1);
}

#[test]
fn root_a_layer_that_cannot_be_remote_becomes_an_ordinary_snapshot() {
    let d = daemon("fallback", "");
    let c = &d.client;
    let hex = "0".repeat(64);
    for (n, bad) in [
        String::new(),
        hex.clone(),
        format!("sha512:{hex}{hex}"),
        format!("sha256:{}", "A".repeat(64)),
        "sha256:../../../../etc".to_owned(),
        format!("sha256:{}/", "0".repeat(63)),
        format!("sha256:{}", "0".repeat(4096)),
        format!("sha256:{hex}\0"),
        digest(9),
    ]
    .iter()
    .enumerate()
    {
        let key = format!("extract-{n} sha256:c");
        let mounts = c.prepare(&key, "", &[(REF, "sha256:c"), (LAYER_DIGEST, bad)]).unwrap();
        assert_eq!(mounts[0].type_, "bind", "{bad}");
        c.remove(&key).unwrap();
    }
    c.prepare("extract-x sha256:c", "", &[(REF, "sha256:c")]).unwrap();
    let log = d.snapshotter.log();
    assert_eq!(log.matches("will be downloaded").count(), 10, "one line for each");
    assert!(log.contains("containerd must be configured to pass image annotations"));
    // The repository is asked anew each time.
    fs::create_dir_all(d.repository.layer_dir(&digest(9)).join("layerfs")).unwrap();
    c.pull_remote("extract-y sha256:c", "", "sha256:c", &digest(9));
    // A name that somebody took makes no wrong answer.
    c.prepare("squatter", "", &[]).unwrap();
    c.commit("cvmfs/0/sha256:taken", "squatter", &[]).unwrap();
    c.prepare("extract-z", "", &[(REF, "sha256:taken"), (LAYER_DIGEST, &digest(1))]).unwrap();
    // Nor does a reference that is too long for a name.
    let long = "r".repeat(32_761);
    c.prepare("extract-l", "", &[(REF, &long), (LAYER_DIGEST, &digest(1))]).unwrap();
    // One that just fits comes back in a message that is delivered, so it is cut.
    let answer = c.prepare("extract-m", "", &[(REF, &long[1..]), (LAYER_DIGEST, &digest(1))]);
    let message = refused(answer, Code::ALREADY_EXISTS);
    assert!(message.contains("rrr\"… (32760 bytes)"), "{message}");
    for long in [&long, &"\u{1f980}\n".repeat(6000)] {
        refused(c.stat(long), Code::NOT_FOUND);
        refused(c.list(&[&format!("{long}==")]), Code::INVALID_ARGUMENT);
        refused(c.update(Info { name: "squatter".into(), ..Info::default() }, &[long]), Code::INVALID_ARGUMENT);
        refused(c.prepare("m", "", &[("containerd.io/snapshot/uidmapping", long)]), Code::INVALID_ARGUMENT);
    }
}

#[test]
fn root_odd_keys_are_data() {
    let d = daemon("keys", "");
    let c = &d.client;
    let long = "k".repeat(32_768);
    for (n, key) in
        ["k8s.io/12/extract a sha256:b", "../../etc/passwd", "/", ".", "..", "a\0b", "line\nbreak", "\u{1f980}", &long]
            .into_iter()
            .enumerate()
    {
        let name = format!("name {n}");
        c.prepare(key, "", &[]).unwrap();
        assert_eq!(c.stat(key).unwrap().name, key);
        c.commit(&name, key, &[]).unwrap();
        c.prepare(key, &name, &[]).unwrap();
        assert_eq!(c.mounts(key).unwrap()[0].type_, "overlay");
        c.remove(key).unwrap();
    }
    let too_long = "k".repeat(32_769);
    for bad in ["", &too_long] {
        refused(c.prepare(bad, "", &[]), Code::INVALID_ARGUMENT);
        refused(c.view(bad, "", &[]), Code::INVALID_ARGUMENT);
        refused(c.stat(bad), Code::INVALID_ARGUMENT);
        refused(c.mounts(bad), Code::INVALID_ARGUMENT);
        refused(c.remove(bad), Code::INVALID_ARGUMENT);
        refused(c.usage(bad), Code::INVALID_ARGUMENT);
        refused(c.commit(bad, "x", &[]), Code::INVALID_ARGUMENT);
        refused(c.commit("x", bad, &[]), Code::INVALID_ARGUMENT);
        refused(c.update(Info { name: bad.into(), ..Info::default() }, &[]), Code::INVALID_ARGUMENT);
    }
    refused(c.prepare("x", &too_long, &[]), Code::INVALID_ARGUMENT);
    let numbers = scene::stage::names(&d.snapshotter.snapshots());
    assert!(numbers.iter().all(|name| name.parse::<u64>().is_ok()), "{numbers:?}");
    // A mebibyte of labels is fine, and a message above the limit costs only its own call.
    c.prepare("labels", "", &[("big", &"x".repeat(1 << 20))]).unwrap();
    refused(c.prepare("huge", "", &[("big", &"x".repeat(17 << 20))]), Code::RESOURCE_EXHAUSTED);
    c.stat("labels").unwrap();
}

#[test]
fn root_every_call_is_answered_under_load() {
    let mut d = daemon("load", "");
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
    assert_eq!(scene::stage::names(&d.snapshotter.snapshots()), Vec::<String>::new());
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
}

#[test]
fn root_concurrent_pulls_of_one_layer_make_one_snapshot() {
    let d = daemon("concurrent", "");
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
fn root_uses_and_cleanups_at_once_never_take_a_layer_that_is_needed() {
    let d = daemon("race", "");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
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
        stop.store(true, Ordering::Relaxed);
    });
    d.client.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
}

#[test]
fn root_a_full_queue_refuses_at_once_and_a_late_call_is_not_started() {
    let d = daemon("queue", "workers = 1\nqueue = 2");
    // A directory that takes long to measure keeps the only worker busy.
    let source = PathBuf::from(&d.client.prepare("big", "", &[]).unwrap()[0].source);
    for dir in 0..200 {
        fs::create_dir(source.join(dir.to_string())).unwrap();
        for file in 0..200 {
            fs::write(source.join(format!("{dir}/{file}")), "").unwrap();
        }
    }
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
        refused(late, Code::DEADLINE_EXCEEDED);
        busy.join().unwrap().unwrap();
    });
    refused(d.client.stat("late"), Code::NOT_FOUND);
}

/// 56 kills of containerd's own overlayfs left 14 calls that failed with "file exists": an
/// id whose transaction never committed was handed out again.
#[test]
fn root_what_was_acknowledged_survives_sigkill() {
    let mut d = daemon("sigkill", "");
    let remote = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let mut present: HashSet<String> = HashSet::from([remote.clone()]);
    let mut absent: HashSet<String> = HashSet::new();
    for round in 0..12 {
        let acknowledged: Vec<(HashSet<String>, HashSet<String>, Vec<String>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|t| {
                    let (c, remote) = (d.snapshotter.client(), remote.clone());
                    scope.spawn(move || {
                        let (mut made, mut removed, mut odd) = (HashSet::new(), HashSet::new(), Vec::new());
                        for n in 0.. {
                            let key = format!("{round}-{t}-{n}");
                            let parent = if n % 2 == 0 { "" } else { &remote };
                            match c.prepare(&key, parent, &[]) {
                                Ok(_) => made.insert(key.clone()),
                                Err(s) if s.code() == Code::UNAVAILABLE => break,
                                Err(s) => {
                                    odd.push(s.message().to_owned());
                                    break;
                                }
                            };
                            if n % 3 == 0 {
                                // Killed in between: it may be there or not.
                                made.remove(&key);
                                if c.remove(&key).is_err() {
                                    break;
                                }
                                removed.insert(key);
                            } else if n % 3 == 1 {
                                let name = format!("name-{key}");
                                made.remove(&key);
                                if c.commit(&name, &key, &[]).is_err() {
                                    break;
                                }
                                made.insert(name);
                                removed.insert(key);
                            }
                        }
                        (made, removed, odd)
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(30 + 17 * round));
            d.snapshotter.end(Signal::SIGKILL);
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for (made, removed, odd) in acknowledged {
            assert_eq!(odd, Vec::<String>::new());
            present.extend(made);
            absent.extend(removed);
        }
        d.snapshotter.start_again();
        let client = d.snapshotter.client();
        let listed = client.list(&[]).unwrap();
        let names: HashSet<&str> = listed.iter().map(|i| i.name.as_str()).collect();
        for key in &present {
            assert!(names.contains(key.as_str()), "{key} was acknowledged and is lost");
        }
        for key in &absent {
            assert!(!names.contains(key.as_str()), "{key} was removed and is back");
        }
        for info in listed.iter().filter(|i| i.kind.enum_value() == Ok(Kind::ACTIVE)) {
            client.mounts(&info.name).unwrap();
        }
    }
    assert!(present.len() > 50, "too little happened: {}", present.len());
    // Everything can be removed, and then nothing is left.
    let c = d.snapshotter.client();
    let mut left = c.list(&[]).unwrap();
    while !left.is_empty() {
        let before = left.len();
        left.retain(|info| c.remove(&info.name).is_err());
        assert!(left.len() < before, "something cannot be removed");
    }
    c.cleanup().unwrap();
    assert_eq!(scene::stage::names(&d.snapshotter.snapshots()), Vec::<String>::new());
    assert_eq!(mounts_below(&d.snapshotter.root()).len(), 0);
}

#[test]
fn root_a_full_disk_loses_nothing_and_heals() {
    let sandbox = Sandbox::enter("full");
    let repository = Repository::create(&sandbox.path("cvmfs"));
    let small = sandbox.make_dir("s/root");
    mount_tmpfs(&small, "size=8m");
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    let c = snapshotter.client();
    c.prepare("before", "", &[("kept", "yes")]).unwrap();
    let filler = small.join("filler");
    let mut made = Vec::new();
    let mut failed = 0;
    let file = fs::File::create(&filler).unwrap();
    let mut file = std::io::BufWriter::new(file);
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() && std::io::Write::flush(&mut file).is_ok() {}
    drop(file.into_parts());
    for n in 0..3000 {
        let key = format!("key-{n}");
        match c.prepare(&key, "", &[("big", &"x".repeat(8000))]) {
            Ok(_) => made.push(key),
            Err(status) => {
                assert_eq!(status.code(), Code::INTERNAL, "{}", status.message());
                failed += 1;
                if failed > 20 {
                    break;
                }
            }
        }
    }
    assert!(failed > 20, "the disk never got full");
    fs::remove_file(&filler).unwrap();
    c.prepare("after", "", &[]).unwrap();
    for restart in [false, true] {
        if restart {
            snapshotter.end(Signal::SIGKILL);
            snapshotter.start_again();
        }
        let c = snapshotter.client();
        let names: HashSet<String> = c.list(&[]).unwrap().into_iter().map(|i| i.name).collect();
        assert_eq!(names.len(), made.len() + 2);
        assert!(made.iter().all(|key| names.contains(key)));
        assert_eq!(c.stat("before").unwrap().labels.get("kept").map(String::as_str), Some("yes"));
    }
}

#[test]
fn root_one_broken_snapshot_blocks_neither_the_start_nor_its_removal() {
    let mut d = daemon("broken", "");
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
    let message = refused(c.mounts("on-bad"), Code::UNAVAILABLE);
    assert!(
        message.contains("\"bad\"") && message.contains("ctr snapshots --snapshotter cvmfs-snapshotter rm"),
        "{message}"
    );
    refused(c.prepare("new", "bad", &[]), Code::UNAVAILABLE);
    c.prepare("fine", "good", &[]).unwrap();
    c.remove("on-bad").unwrap();
    c.remove("bad").unwrap();
    c.cleanup().unwrap();
}

#[test]
fn root_directories_of_another_snapshotter_are_left_alone() {
    let sandbox = Sandbox::enter("foreign");
    let repository = Repository::create(&sandbox.path("cvmfs"));
    let theirs = sandbox.make_dir("s/root/snapshotter/snapshots/7/fs");
    fs::write(theirs.join("precious"), "x").unwrap();
    fs::write(sandbox.path("s/root/snapshotter/metadata.db"), "theirs").unwrap();
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    for _ in 0..2 {
        let c = snapshotter.client();
        c.prepare("key", "", &[]).unwrap();
        assert!(
            PathBuf::from(&c.mounts("key").unwrap()[0].source).ends_with("8/fs")
                || snapshotter.log().matches("serves").count() > 1
        );
        c.remove("key").unwrap();
        c.cleanup().unwrap();
        snapshotter.end(Signal::SIGTERM);
        snapshotter.start_again();
    }
    assert_eq!(fs::read_to_string(theirs.join("precious")).unwrap(), "x");
    assert!(snapshotter.log().contains("1 entries of another snapshotter"));
}

#[test]
fn root_socket_and_state_belong_to_one_daemon() {
    let mut d = daemon("exclusive", "");
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
    // Killed, it leaves a socket that the next start replaces; stopped, it takes it away.
    d.snapshotter.end(Signal::SIGKILL);
    assert!(socket.exists());
    d.snapshotter.start_again();
    assert!(d.snapshotter.end(Signal::SIGINT).success());
    assert!(!socket.exists());
}

#[test]
fn root_a_stop_finishes_what_runs_and_takes_no_longer_than_it_says() {
    let mut d = daemon("stop", "workers = 1");
    let source = PathBuf::from(&d.client.prepare("big", "", &[]).unwrap()[0].source);
    for dir in 0..300 {
        fs::create_dir(source.join(dir.to_string())).unwrap();
        for file in 0..200 {
            fs::write(source.join(format!("{dir}/{file}")), "").unwrap();
        }
    }
    let c = d.client.clone();
    let running = std::thread::spawn(move || c.usage("big"));
    std::thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(running.join().unwrap().unwrap().1, 300 * 201 + 1, "a call under way is finished");
    // A connection that only sits there holds nobody up.
    d.snapshotter.start_again();
    let idle = UnixStream::connect(d.snapshotter.socket()).unwrap();
    let begun = Instant::now();
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
    assert!(begun.elapsed() < Duration::from_secs(11), "{:?}", begun.elapsed());
    drop(idle);
}

#[test]
fn root_garbage_on_the_socket_disturbs_nobody() {
    let d = daemon("garbage", "");
    for n in 0..50 {
        let mut stream = UnixStream::connect(d.snapshotter.socket()).unwrap();
        let bytes: Vec<u8> =
            (0..1000 + n * 37).map(|i: u32| u8::try_from(i.wrapping_mul(2_654_435_761) >> 24).unwrap()).collect();
        let _ = std::io::Write::write_all(&mut stream, &bytes);
    }
    let open: Vec<_> = (0..200).map(|_| UnixStream::connect(d.snapshotter.socket()).unwrap()).collect();
    d.client.prepare("key", "", &[]).unwrap();
    drop(open);
    d.client.stat("key").unwrap();
}

#[test]
fn root_a_client_that_does_not_read_its_list_holds_no_worker() {
    let d = daemon("slow-reader", "workers = 1");
    for n in 0..40 {
        d.client.prepare(&format!("key-{n}"), "", &[("big", &"x".repeat(200_000))]).unwrap();
    }
    let request = cvmfs_snapshotter::proto::snapshots::ListSnapshotsRequest::default();
    let grpc = grpcio::Client::new(d.client.channel().clone());
    let streams: Vec<_> = (0..8)
        .map(|_| {
            grpc.server_streaming(&cvmfs_snapshotter::server::service::LIST, &request, grpcio::CallOption::default())
                .unwrap()
        })
        .collect();
    for n in 0..40 {
        d.snapshotter.client().with_timeout(Duration::from_secs(5)).stat(&format!("key-{n}")).unwrap();
    }
    drop(streams);
}

#[test]
fn root_changing_the_way_of_attaching_works_on_what_is_there() {
    let mut d = daemon("modes", "");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let before = d.client.prepare("container", &name, &[]).unwrap();
    for (config, mounts) in [("attach = \"symlink\"", 0), ("attach = \"bind\"", 1)] {
        d.snapshotter.end(Signal::SIGTERM);
        drop(std::mem::replace(
            &mut d.snapshotter,
            Snapshotter::start(&d.sandbox.path("s"), d.repository.dir(), config),
        ));
        let c = d.snapshotter.client();
        assert_eq!(c.mounts("container").unwrap(), before);
        assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), mounts, "{config}");
        let at = d.sandbox.path("mnt");
        let mounted = Mounted::new(&before, &at).unwrap();
        assert_eq!(fs::read_to_string(at.join("dir/file-1")).unwrap(), "1");
        drop(mounted);
    }
    let c = d.snapshotter.client();
    c.remove("container").unwrap();
    c.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
}

#[test]
fn root_attachments_lost_in_a_reboot_are_made_again() {
    let mut d = daemon("reboot", "");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let before = d.client.prepare("container", &name, &[]).unwrap();
    d.snapshotter.end(Signal::SIGKILL);
    for mount in mounts_below(&d.snapshotter.snapshots()) {
        run("umount", [mount]).ok();
    }
    d.snapshotter.start_again();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0, "nothing is mounted until it is needed");
    let c = d.snapshotter.client();
    assert_eq!(c.mounts("container").unwrap(), before);
    let [mount] = &mounts_below(&d.snapshotter.snapshots())[..] else { panic!("the layer is attached again") };
    assert_eq!(fs::read_to_string(mount.join("dir/file-1")).unwrap(), "1");
}

#[test]
fn root_an_attachment_that_is_not_the_layer_any_more_is_replaced() {
    let d = daemon("stale", "");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    d.client.prepare("container", &name, &[]).unwrap();
    let [layer] = &mounts_below(&d.snapshotter.snapshots())[..] else { panic!("the layer is attached") };
    let fine = |what: &str| {
        d.client.mounts("container").unwrap();
        assert_eq!(fs::read_to_string(layer.join("dir/file-1")).unwrap(), "1", "{what}");
        assert!(fs::write(layer.join("new"), "").is_err(), "{what}: the layer is writable");
        assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 1, "{what}");
    };
    let path = layer.to_str().unwrap();
    run("mount", ["-o", "remount,bind,rw", path]).ok();
    fine("a crash came before read-only");
    mount_tmpfs(layer, "size=1m");
    fine("something else is mounted there");
    mount_tmpfs(layer, "size=1m");
    let open = fs::File::create(layer.join("in-use")).unwrap();
    fine("something else is mounted there and busy");
    drop(open);
    run("umount", [path]).ok();
    fine("nothing is mounted there");
    d.client.remove("container").unwrap();
    // Busy for a moment if another test's thread is just starting a process.
    scene::process::eventually("the layer is detached", || {
        d.client.cleanup().unwrap();
        mounts_below(&d.snapshotter.snapshots()).is_empty()
    });
}

#[test]
fn root_a_start_that_fails_half_way_leaves_no_layer_attached() {
    let d = daemon("half-way", "");
    let first = d.client.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    let second = d.client.pull_remote("extract-2", &first, "sha256:c2", &digest(2));
    d.repository.withdraw(&digest(1));
    let message = refused(d.client.prepare("container", &second, &[]), Code::UNAVAILABLE);
    assert!(
        message.contains(&digest(1)) && message.contains("scene.test") && message.contains("pull it anew"),
        "{message}"
    );
    d.client.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
    assert_eq!(scene::stage::names(&d.snapshotter.snapshots()), Vec::<String>::new());
    // The image can still be removed.
    d.client.remove(&second).unwrap();
    d.client.remove(&first).unwrap();
}

#[test]
fn root_configuration_is_checked_and_the_log_level_can_change() {
    let mut d = daemon("config", "log-format = \"text\"\n[plugins.cri]\nx = 1");
    let log = d.snapshotter.log();
    assert!(log.contains("line 4: unknown key \"plugins\""), "{log}");
    assert!(log.contains(" info ") && !log.contains("{\"level\""), "{log}");
    let check = |text: &str| {
        let file = d.sandbox.path("check.toml");
        fs::write(&file, text).unwrap();
        run(binary(), ["-check-config", "-config", file.to_str().unwrap()])
    };
    assert!(check("repository = \"a.b\"").status.success());
    for (text, message) in [
        ("\nattach = \"copy\"", "line 2: attach = \"copy\" is not possible: it is \"bind\" or \"symlink\""),
        ("repositry = \"a\"", "\"repositry\" (line 1)"),
        ("repository", "not TOML"),
    ] {
        let output = check(text);
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(output.stderr.contains(message), "{}", output.stderr);
    }
    // A wrong value stops the start as well, and changes nothing.
    d.snapshotter.end(Signal::SIGTERM);
    let good = fs::read_to_string(d.sandbox.path("s/config.toml")).unwrap();
    fs::write(d.sandbox.path("s/config.toml"), "workers = 0").unwrap();
    let output = d.snapshotter.command().output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    fs::write(d.sandbox.path("s/config.toml"), format!("log-level = \"error\"\n{good}")).unwrap();
    d.snapshotter.start_again();
    let quiet = |d: &Daemon| {
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
