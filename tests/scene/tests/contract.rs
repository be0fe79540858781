//! The contract of the snapshots service, call by call, over the real socket of a real
//! daemon: what containerd and other clients may send, and what they get.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use cvmfs_snapshotter::proto::snapshots::{Info, Kind};
use grpcio::RpcStatusCode as Code;
use scene::client::{LAYER_DIGEST, REF, labels};
use scene::process::run;
use scene::rootfs::Mounted;
use scene::sandbox::mounts_below;
use scene::snapshotter_fixture::{SnapshotterFixture, assert_refused, digest, options};

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
fn root_invalid_calls_return_the_documented_codes() {
    let d = SnapshotterFixture::start("codes", "");
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
        // The parent is checked before the key.
        c.prepare("active", "absent", &[]).map(drop),
    ] {
        assert_refused(absent, Code::NOT_FOUND);
    }
    for parent in ["active", "view"] {
        assert_refused(c.prepare("new", parent, &[]), Code::INVALID_ARGUMENT);
        assert_refused(c.view("committed", parent, &[]), Code::INVALID_ARGUMENT);
    }
    for key in ["active", "view", "committed"] {
        assert_refused(c.prepare(key, "", &[]), Code::ALREADY_EXISTS);
        assert_refused(c.view(key, "committed", &[]), Code::ALREADY_EXISTS);
        assert_refused(c.commit(key, "active", &[]), Code::ALREADY_EXISTS);
    }
    assert_refused(c.mounts("committed"), Code::FAILED_PRECONDITION);
    for key in ["view", "committed"] {
        assert_refused(c.commit("new", key, &[]), Code::FAILED_PRECONDITION);
    }
    let message = assert_refused(c.remove("committed"), Code::FAILED_PRECONDITION);
    assert!(message.contains("remove"), "{message}");
    c.remove("view").unwrap();
    c.remove("committed").unwrap();
    assert_refused(c.stat("committed"), Code::NOT_FOUND);
    c.commit("committed", "active", &[]).unwrap();
}

#[test]
fn root_commit_may_name_the_parent() {
    let d = SnapshotterFixture::start("rebase", "");
    let c = &d.client;
    for name in ["one", "two"] {
        c.prepare("key", "", &[]).unwrap();
        c.commit(name, "key", &[]).unwrap();
    }
    c.prepare("other", "", &[]).unwrap();
    c.prepare("on-one", "one", &[]).unwrap();
    assert_refused(c.commit_on("new", "on-one", "two", &[]), Code::INVALID_ARGUMENT);
    c.commit_on("three", "on-one", "one", &[]).unwrap();
    c.prepare("free", "", &[]).unwrap();
    assert_refused(c.commit_on("new", "free", "absent", &[]), Code::NOT_FOUND);
    assert_refused(c.commit_on("new", "free", "other", &[]), Code::FAILED_PRECONDITION);
    c.commit_on("four", "free", "two", &[]).unwrap();
    assert_eq!(c.stat("four").unwrap().parent, "two");
    assert_refused(c.remove("two"), Code::FAILED_PRECONDITION);
    c.remove("four").unwrap();
    c.remove("two").unwrap();
}

#[test]
fn root_labels_and_times_follow_the_contract() {
    let d = SnapshotterFixture::start("labels", "");
    let c = &d.client;
    let before = now();
    c.prepare("key", "", &[("a", "1"), ("empty", ""), ("containerd.io/gc.root", "x")]).unwrap();
    let made = c.stat("key").unwrap();
    let (created, updated) = nanos(&made);
    assert!(before <= created && created == updated && updated <= now());
    assert_eq!(made.labels, labels(&[("a", "1"), ("containerd.io/gc.root", "x")]));
    assert_eq!((made.kind.enum_value(), made.parent.as_str()), (Ok(Kind::ACTIVE), ""));

    // Immutable fields that the mask does not name are ignored.
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
    assert_refused(c.update(change(&[("b", "2")]), &["labels.b", "parent"]), Code::INVALID_ARGUMENT);
    let kept = c.stat("key").unwrap();
    assert_eq!(kept.labels, labels(&[("q", "1")]), "a refused update writes nothing");
    assert_eq!(c.list(&["name==key"]).unwrap(), [kept], "Stat and List say the same");

    let before = now();
    c.commit("name", "key", &[("own", "1")]).unwrap();
    let committed = c.stat("name").unwrap();
    assert_eq!(committed.labels, labels(&[("own", "1")]), "Commit replaces the labels");
    assert!(nanos(&committed).0 >= before && nanos(&committed).0 == nanos(&committed).1);
    assert_refused(c.stat("key"), Code::NOT_FOUND);
}

#[test]
fn root_mounts_follow_the_contract_and_do_not_change() {
    let d = SnapshotterFixture::start("mounts", "");
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
            let message = assert_refused(answer, Code::INVALID_ARGUMENT);
            assert!(message.contains("uidmapping") && message.contains(bad), "{message}");
        }
    }
}

#[test]
fn root_usage_counts_only_files_of_the_snapshot() {
    let d = SnapshotterFixture::start("usage", "");
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
fn root_list_is_sent_in_batches_and_filtered() {
    let d = SnapshotterFixture::start("list", "");
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
    let message = assert_refused(c.list(&["name==", "kind"]).map(|l| l.len()), Code::INVALID_ARGUMENT);
    assert!(message.contains("\"name==\""), "{message}");
}

#[test]
fn root_prepare_of_remote_layers_follows_the_protocol() {
    let d = SnapshotterFixture::start("remote", "attach = \"bind\"");
    let c = &d.client;
    let first = c.pull_remote("default/1/extract-1 sha256:c1", "", "sha256:c1", &digest(1));
    let second = c.pull_remote("default/2/extract-2 sha256:c2", &first, "sha256:c2", &digest(2));
    // A second pull, and a pull in another namespace, give the same snapshot.
    assert_eq!(c.pull_remote("other/3/extract-3 sha256:c1", "", "sha256:c1", &digest(1)), first);
    assert_refused(c.stat("default/1/extract-1 sha256:c1"), Code::NOT_FOUND);
    let info = c.stat(&first).unwrap();
    assert_eq!(info.kind.enum_value(), Ok(Kind::COMMITTED));
    assert_eq!(info.labels.get(REF).map(String::as_str), Some("sha256:c1"));
    assert_eq!(info.labels.get("containerd.io/snapshot/remote").map(String::as_str), Some("remote snapshot"));
    assert_eq!(
        scene::e2e_fixture::names(&d.snapshotter.snapshots()),
        Vec::<String>::new(),
        "nothing is made at pull time"
    );
    // The same chain over another parent is another snapshot.
    c.prepare("local", "", &[]).unwrap();
    c.commit("local-parent", "local", &[]).unwrap();
    let other = c.pull_remote("other/4/extract-4 sha256:c2", "local-parent", "sha256:c2", &digest(2));
    assert_ne!(other, second);

    let view = c.view("view", &second, &[]).unwrap();
    let at = d.sandbox.path("mnt");
    let mounted = Mounted::new(&view, &at).unwrap();
    assert_eq!(scene::e2e_fixture::names(&at), ["dir"]);
    assert_eq!(scene::e2e_fixture::names(&at.join("dir")), ["file-1", "file-2"]);
    drop(mounted);
    assert_refused(c.remove(&first), Code::FAILED_PRECONDITION);
    assert_refused(c.remove(&second), Code::FAILED_PRECONDITION);
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 2);
    c.remove("view").unwrap();
    c.remove(&second).unwrap();
    c.remove(&first).unwrap();
    c.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
    // Only the local parent is left.
    assert_eq!(scene::e2e_fixture::names(&d.snapshotter.snapshots()).len(), 1);
}

#[test]
fn root_unpublished_layer_becomes_an_ordinary_snapshot() {
    let d = SnapshotterFixture::start("fallback", "");
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
    assert_eq!(log.matches("layer_download").count(), 10, "one line for each");
    assert!(log.contains("configure containerd to pass image annotations"));
    // The repository is checked again each time.
    fs::create_dir_all(d.repository.layer_dir(&digest(9)).join("layerfs")).unwrap();
    d.repository.commit();
    c.pull_remote("extract-y sha256:c", "", "sha256:c", &digest(9));
    // A name that is taken by another snapshot causes no wrong answer.
    c.prepare("squatter", "", &[]).unwrap();
    c.commit("cvmfs/0/sha256:taken", "squatter", &[]).unwrap();
    c.prepare("extract-z", "", &[(REF, "sha256:taken"), (LAYER_DIGEST, &digest(1))]).unwrap();
    // A reference that is too long for a name causes no wrong answer either.
    let long = "r".repeat(32_761);
    c.prepare("extract-l", "", &[(REF, &long), (LAYER_DIGEST, &digest(1))]).unwrap();
    // A key that just fits is cut in the message, so that gRPC delivers it.
    let answer = c.prepare("extract-m", "", &[(REF, &long[1..]), (LAYER_DIGEST, &digest(1))]);
    let message = assert_refused(answer, Code::ALREADY_EXISTS);
    assert!(message.contains("rrr\"… (32760 bytes)"), "{message}");
    for long in [&long, &"\u{1f980}\n".repeat(6000)] {
        assert_refused(c.stat(long), Code::NOT_FOUND);
        assert_refused(c.list(&[&format!("{long}==")]), Code::INVALID_ARGUMENT);
        assert_refused(c.update(Info { name: "squatter".into(), ..Info::default() }, &[long]), Code::INVALID_ARGUMENT);
        assert_refused(c.prepare("m", "", &[("containerd.io/snapshot/uidmapping", long)]), Code::INVALID_ARGUMENT);
    }
}

#[test]
fn root_keys_with_special_characters_are_accepted_unchanged() {
    let d = SnapshotterFixture::start("keys", "");
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
        assert_refused(c.prepare(bad, "", &[]), Code::INVALID_ARGUMENT);
        assert_refused(c.view(bad, "", &[]), Code::INVALID_ARGUMENT);
        assert_refused(c.stat(bad), Code::INVALID_ARGUMENT);
        assert_refused(c.mounts(bad), Code::INVALID_ARGUMENT);
        assert_refused(c.remove(bad), Code::INVALID_ARGUMENT);
        assert_refused(c.usage(bad), Code::INVALID_ARGUMENT);
        assert_refused(c.commit(bad, "x", &[]), Code::INVALID_ARGUMENT);
        assert_refused(c.commit("x", bad, &[]), Code::INVALID_ARGUMENT);
        assert_refused(c.update(Info { name: bad.into(), ..Info::default() }, &[]), Code::INVALID_ARGUMENT);
    }
    assert_refused(c.prepare("x", &too_long, &[]), Code::INVALID_ARGUMENT);
    let numbers = scene::e2e_fixture::names(&d.snapshotter.snapshots());
    assert!(numbers.iter().all(|name| name.parse::<u64>().is_ok()), "{numbers:?}");
    // A mebibyte of labels is fine; more is refused, and a message above the limit costs only
    // its own call.
    let most = "x".repeat((1 << 20) - 3);
    for n in 0..20 {
        c.prepare(&format!("labels-{n}"), "", &[("big", &most)]).unwrap();
    }
    assert_refused(c.prepare("more", "", &[("bigger", &most)]), Code::INVALID_ARGUMENT);
    assert_refused(c.prepare("huge", "", &[("big", &"x".repeat(17 << 20))]), Code::RESOURCE_EXHAUSTED);
    // Batches are cut so that a List of them can always be sent.
    assert_eq!(c.list(&["labels.big"]).unwrap().len(), 20);
}
