//! A node that ran the Go snapshotter: the first start takes over its records and changes none of its files. The states
//! are written by containerd's own storage package.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cvmfs_snapshotter::migration::bolt::{Database, Entry};
use cvmfs_snapshotter::migration::takeover;
use cvmfs_snapshotter::proto::mount::Mount;
use cvmfs_snapshotter::proto::snapshots::{Info, Kind};
use grpcio::RpcStatusCode as Code;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use scene::client::Client;
use scene::e2e_fixture::E2eFixture;
use scene::gostate::{self, Record};
use scene::process::{Server, eventually, run, tool};
use scene::publisher::Repository;
use scene::sandbox::{Sandbox, mounts_below};
use scene::snapshotter::{Snapshotter, binary};
use scene::snapshotter_fixture::{SnapshotterFixture, assert_refused, options};

/// The lines of a log in JSON that have this event.
fn events(log: &str, event: &str) -> Vec<serde_json::Value> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    lines.filter(|line| line["event"] == event).collect()
}

/// Everything that is in a tree, by path: what it is and what is in it.
fn tree(top: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut unread = vec![top.to_owned()];
    while let Some(directory) = unread.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let status = fs::symlink_metadata(&path).unwrap();
            if status.is_dir() {
                unread.push(path.clone());
            }
            let content = if status.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            found.insert(path, (status.mode(), content));
        }
    }
    found
}

fn nanoseconds(time: &protobuf::well_known_types::timestamp::Timestamp) -> i64 {
    time.seconds * 1_000_000_000 + i64::from(time.nanos)
}

/// A snapshot in the form of the API, made from a record of containerd's storage package; the API has no ids.
fn described(info: &Info) -> (String, String, String, i64, i64, BTreeMap<String, String>) {
    let kind = match info.kind.enum_value().unwrap() {
        Kind::VIEW => "view",
        Kind::ACTIVE => "active",
        Kind::COMMITTED => "committed",
        Kind::UNKNOWN => "unknown",
    };
    let (created, updated) = (nanoseconds(&info.created_at), nanoseconds(&info.updated_at));
    let labels = info.labels.clone().into_iter().collect();
    (info.name.clone(), info.parent.clone(), kind.to_owned(), created, updated, labels)
}

fn expected(record: &Record) -> (String, String, String, i64, i64, BTreeMap<String, String>) {
    let r = record.clone();
    (r.name, r.parent, r.kind, r.created, r.updated, r.labels)
}

#[track_caller]
fn assert_same_records(c: &Client, records: &[Record]) {
    let mut listed: Vec<_> = c.list(&[]).unwrap().iter().map(described).collect();
    let mut wanted: Vec<_> = records.iter().map(expected).collect();
    listed.sort();
    wanted.sort();
    assert_eq!(listed.len(), wanted.len());
    for (listed, wanted) in listed.iter().zip(&wanted) {
        assert_eq!(listed, wanted);
    }
}

/// The ids in the directories of an option.
fn ids(mounts: &[Mount], option: &str) -> Vec<u64> {
    let Some(value) = options(mounts).iter().find_map(|o| o.strip_prefix(option)) else { return Vec::new() };
    let id = |path: &str| Path::new(path).parent().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
    let mut ids: Vec<u64> = value.split(':').map(id).collect();
    ids.dedup();
    ids
}

#[test]
fn root_takeover_keeps_every_record_of_the_go_snapshotter() {
    let mut records = Vec::new();
    let mut before = BTreeMap::new();
    let mut d = SnapshotterFixture::start_on("takeover", "", |root, _| {
        records = gostate::write("small", root);
        // The first directory is that of an interrupted Prepare; the second has no record.
        for stray in ["new-123/fs", "77/fs/precious"] {
            fs::create_dir_all(root.join("snapshotter/snapshots").join(stray)).unwrap();
        }
        before = tree(root);
    });
    let home = d.snapshotter.root().join("snapshotter");
    let c = d.client.clone();
    assert_same_records(&c, &records);
    for record in &records {
        assert_eq!(described(&c.stat(&record.name).unwrap()), expected(record));
        if record.kind == "committed" {
            assert_eq!(c.usage(&record.name).unwrap(), (record.size, record.inodes), "{}", record.name);
            continue;
        }
        let mounts = c.mounts(&record.name).unwrap();
        let sources = ids(&mounts, "lowerdir=");
        match (record.kind.as_str(), record.parents.len()) {
            ("active", 0) => assert!(Path::new(&mounts[0].source).ends_with(format!("{}/fs", record.id))),
            ("active", _) => {
                assert_eq!((ids(&mounts, "upperdir="), sources), (vec![record.id], record.parents.clone()));
            }
            _ => assert_eq!(sources.iter().filter(|id| record.parents.contains(id)).count(), record.parents.len()),
        }
    }
    // Every record exists with the same properties.
    let after = tree(&d.snapshotter.root());
    let in_use = |path: &Path| path.ends_with("fs") && fs::symlink_metadata(path).unwrap().is_symlink();
    for (path, content) in before.iter().filter(|(path, _)| !in_use(path)) {
        assert_eq!(after.get(path), Some(content), "{}", path.display());
    }
    let log = d.snapshotter.log();
    let [finished] = &events(&log, "takeover_finished")[..] else { panic!("{log}") };
    for (count, expected) in [
        ("snapshots", "11"),
        ("published", "3"),
        ("committed", "3"),
        ("active", "4"),
        ("views", "1"),
        ("rejected", "0"),
        ("lost_files", "0"),
    ] {
        assert_eq!(finished[count], expected, "{count}: {finished}");
    }
    assert!(log.contains("\"event\":\"foreign_directories\",\"count\":\"2\""), "{log}");
    // Ids go on above the last one, directories that nobody knows included.
    let source = PathBuf::from(&c.prepare("new", "", &[]).unwrap()[0].source);
    assert!(source.ends_with("78/fs"), "{}", source.display());
    // Removed snapshots do not come back.
    for gone in ["k8s.io/11/container-1", "k8s.io/9/sha256:d2"] {
        c.remove(gone).unwrap();
    }
    c.cleanup().unwrap();
    assert!(!home.join("snapshots/5").exists() && !home.join("snapshots/7").exists());
    d.snapshotter.end(Signal::SIGTERM);
    d.snapshotter.start_again();
    let c = d.snapshotter.client();
    assert_eq!(c.list(&[]).unwrap().len(), records.len() + 1 - 2);
    assert_refused(c.stat("k8s.io/9/sha256:d2"), Code::NOT_FOUND);
    assert_eq!(events(&d.snapshotter.log(), "takeover_finished").len(), 1);
    // The same image, pulled by another namespace, finds its layers.
    let again = c.pull_remote("extract-again", "sha256:c1", "sha256:c2", &scene::snapshotter_fixture::digest(2));
    assert_eq!(again, "sha256:c2");
    // The old metadata is outdated once there is new metadata, and is not taken over again.
    d.snapshotter.end(Signal::SIGTERM);
    fs::remove_file(home.join("metadata.sqlite")).unwrap();
    let message = refusal(&d.snapshotter);
    assert!(message.contains("is gone") && message.contains("--rebuild-metadata"), "{message}");
}

#[test]
fn root_takeover_of_thousands_of_snapshots_survives_kills_at_any_moment() {
    let sandbox = Sandbox::enter("large");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let records = gostate::write("large", &sandbox.make_dir("s/root"));
    assert_eq!(records.len(), 2000);
    let file = sandbox.path("s/root/snapshotter/metadata.db");
    let before = fs::read(&file).unwrap();
    // The daemon is killed before, during and after the takeover.
    let (root, address, config) = (sandbox.path("s/root"), sandbox.path("s.sock"), sandbox.path("config.toml"));
    fs::write(&config, format!("absolute-mountpoint = {:?}\n", repository.dir())).unwrap();
    let home = root.join("snapshotter");
    let mut in_between = 0;
    for n in 0..5_u64 {
        let mut command = Command::new(binary());
        command.arg("--root").arg(&root).arg("--address").arg(&address).arg("--config").arg(&config);
        let mut server = Server::start(&mut command, &sandbox.path("log"));
        // The first kill comes before it begins, the others when files of it appear.
        let begun = || ["metadata.new", "metadata.sqlite"].map(|name| home.join(name).exists()).contains(&true);
        server.wait_until("begin", || n == 0 || begun());
        std::thread::sleep(Duration::from_millis(n * 20));
        server.end(Signal::SIGKILL);
        let is_whole = home.join("metadata.sqlite").exists();
        in_between += usize::from(begun() && !is_whole);
    }
    scene::report::print(format_args!("takeover: killed {in_between} times while it wrote"));
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    assert_same_records(&snapshotter.client(), &records);
    assert!(records.iter().any(|r| r.name.len() > 32_000) && records.iter().any(|r| r.labels.contains_key("long")));
    assert!(fs::read(&file).unwrap() == before, "the old file was changed");
    let log = fs::read_to_string(sandbox.path("log")).unwrap() + &snapshotter.log();
    // Once, and a kill may have been faster than the log.
    let finished = events(&log, "takeover_finished");
    assert!(finished.len() <= 1 && finished.iter().all(|line| line["snapshots"] == "2000"), "{finished:?}");
    assert!(!sandbox.path("s/root/snapshotter/metadata.new").exists());
}

/// Starts a snapshotter that must refuse and change nothing but its lock. The result is its message.
#[track_caller]
fn refusal(snapshotter: &Snapshotter) -> String {
    let lock = snapshotter.root().join("snapshotter/lock");
    let state = || {
        let mut state = tree(&snapshotter.root());
        state.remove(&lock);
        state
    };
    let before = state();
    let output = snapshotter.command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(state() == before, "a start that was refused changed something");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn root_takeover_refuses_running_go_snapshotter_and_damaged_database() {
    let mut d = SnapshotterFixture::start_on("refused", "", |_, _| ());
    d.snapshotter.end(Signal::SIGKILL);
    let home = d.snapshotter.root().join("snapshotter");
    fs::remove_dir_all(&home).unwrap();
    let records = gostate::write("small", &d.snapshotter.root());
    let file = home.join("metadata.db");
    let whole = fs::read(&file).unwrap();

    let mut go = Command::new(tool("gostate"))
        .args(["lock".as_ref(), home.as_os_str()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(go.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let message = refusal(&d.snapshotter);
    for part in ["the Go snapshotter still runs", "systemctl kill --signal=SIGKILL cvmfs-snapshotter"] {
        assert!(message.contains(part), "{message}");
    }
    drop(go.stdin.take());
    go.wait().unwrap();

    let zeros = vec![0; whole.len()];
    for (name, content, why) in [
        ("truncated", &whole[..whole.len() / 8], "its pages need"),
        ("zeroed", &zeros, "no bbolt file"),
        ("empty", b"", "no bbolt file of 0 bytes"),
        ("other", b"theirs", "no bbolt file of 6 bytes"),
    ] {
        fs::write(&file, content).unwrap();
        let message = refusal(&d.snapshotter);
        assert!(message.contains(why) && message.contains("move it away"), "{name}: {message}");
        assert!(message.contains("snapshotter/metadata.db") && message.contains("nothing was changed"), "{message}");
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert!(refusal(&d.snapshotter).contains("is not a regular file"));
    fs::remove_dir(&file).unwrap();
    std::os::unix::fs::symlink("nowhere", &file).unwrap();
    assert!(refusal(&d.snapshotter).contains("snapshotter/metadata.db"));
    fs::remove_file(&file).unwrap();
    // After a copy is restored the takeover succeeds.
    fs::write(&file, &whole).unwrap();
    d.snapshotter.start_again();
    assert_same_records(&d.snapshotter.client(), &records);
}

#[test]
fn root_takeover_reports_lost_files_by_image_with_repair() {
    let d = SnapshotterFixture::start_on("destroyed", "", |root, _| {
        gostate::write("small", root);
        // A stop of the Go snapshotter empties this directory.
        let snapshots = root.join("snapshotter/snapshots");
        fs::remove_dir_all(&snapshots).unwrap();
        fs::create_dir(&snapshots).unwrap();
        // The directory of one snapshot exists, without its files.
        fs::create_dir_all(snapshots.join("4/work")).unwrap();
    });
    let log = d.snapshotter.log();
    let losses = events(&log, "takeover_files_lost");
    for (object, layers, lost_layers, lost_containers) in [
        ("example.org/mixed:2", "2", "2", "1"),
        ("example.org/published:1", "0", "0", "2"),
        ("default/20/sha256:e1", "1", "1", "1"),
        ("default/21/alone", "0", "0", "1"),
    ] {
        let loss = losses.iter().find(|loss| loss["object"] == object);
        let loss = loss.unwrap_or_else(|| panic!("{object} is missing in\n{log}"));
        let counts = ["layers", "lost_layers", "lost_containers"].map(|count| loss[count].as_str().unwrap());
        assert_eq!(counts, [layers, lost_layers, lost_containers], "{loss}");
    }
    for command in ["crictl rmi example.org/mixed:2", "ctr -n k8s.io images rm --sync example.org/mixed:2"] {
        assert!(log.contains(command), "{command} is missing in\n{log}");
    }
    let [finished] = &events(&log, "takeover_finished")[..] else { panic!("{log}") };
    let counts = ["snapshots", "rejected", "lost_files"].map(|count| finished[count].as_str().unwrap());
    assert_eq!(counts, ["11", "0", "8"]);
    // What is published needs no directory; the rest says what is wrong, and can be removed.
    d.client.prepare("new", "sha256:c3", &[]).unwrap();
    let message = assert_refused(d.client.prepare("other", "k8s.io/9/sha256:d2", &[]), Code::UNAVAILABLE);
    assert!(message.contains("missing from disk"), "{message}");
    let message = assert_refused(d.client.commit("name", "default/21/alone", &[]), Code::UNAVAILABLE);
    assert!(message.contains("missing from disk"), "{message}");
    for key in ["k8s.io/11/container-1", "k8s.io/9/sha256:d2", "k8s.io/7/sha256:d1"] {
        d.client.remove(key).unwrap();
    }
    d.client.cleanup().unwrap();
    assert!(!d.snapshotter.snapshots().join("4").exists());
}

#[test]
fn root_takeover_omits_invalid_records_and_names_them() {
    let mut records = Vec::new();
    let d = SnapshotterFixture::start_on("odd", "", |root, _| records = gostate::write("odd", root));
    assert_same_records(&d.client, &records);
    let log = d.snapshotter.log();
    let rejected = events(&log, "takeover_record_rejected");
    for (name, reason) in [
        ("no-id", "NoId"),
        ("no-kind", "Kind(None)"),
        ("strange-kind", "Kind(Some(9))"),
        ("orphan", "ParentMissing"),
        ("twin-1", "SameId(SnapshotId(103))"),
        ("twin-2", "SameId(SnapshotId(103))"),
        ("child-of-twin", "ParentRejected"),
        ("on-active", "ParentNotCommitted"),
        ("circle-1", "ParentRejected"),
        ("circle-2", "ParentRejected"),
        ("not-\u{fffd}-text", "NotText"),
        ("bad-digest", "Digest"),
        ("no-bucket", "NoRecord"),
    ] {
        let line = rejected.iter().find(|line| line["name"] == format!("\"{name}\""));
        let line = line.unwrap_or_else(|| panic!("{name} is missing in\n{log}"));
        assert!(line["reason"].as_str().unwrap().starts_with(reason), "{name}: {line}");
    }
    for (name, parent) in [
        ("orphan", "gone"),
        ("child-of-twin", "twin-1"),
        ("on-active", "default/21/alone"),
        ("circle-1", "circle-2"),
        ("circle-2", "circle-1"),
    ] {
        let line = rejected.iter().find(|line| line["name"] == format!("\"{name}\"")).unwrap();
        assert!(line["reason"].as_str().unwrap().contains(&format!("\"{parent}\"")), "{name}: {line}");
    }
    assert_eq!(rejected.len(), 13, "{log}");
    assert_eq!(events(&log, "takeover_finished")[0]["rejected"], "13");
}

/// The Go snapshotter binds layers read-write, and a kill leaves its mounts. Writes of a container below the layer must
/// not reach the repository, and the layer must be visible.
#[test]
fn root_takeover_replaces_live_mounts_of_the_go_snapshotter() {
    for attach in ["symlink", "bind"] {
        let d = SnapshotterFixture::start_on(attach, &format!("attach = \"{attach}\""), |root, repository| {
            for record in gostate::write("small", root).iter().filter(|record| record.is_remote()) {
                let digest = &record.labels["containerd.io/snapshot/cri.layer-digest"];
                let layer = repository.dir().join(".layers").join(&digest[7..9]).join(&digest[7..]).join("layerfs");
                let place = root.join(format!("snapshotter/snapshots/{}/fs", record.id));
                mount(Some(&layer), &place, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            }
        });
        let snapshots = d.snapshotter.snapshots();
        // A container keeps the directory of its layer open.
        let held = fs::File::open(snapshots.join("3/fs")).unwrap();
        let mounts = d.client.prepare("box", "sha256:c3", &[]).unwrap();
        assert_eq!(ids(&mounts, "lowerdir="), [3, 2, 1]);
        for n in 1..=3 {
            let place = snapshots.join(format!("{n}/fs"));
            assert_eq!(fs::read_to_string(place.join(format!("dir/file-{n}"))).unwrap(), n.to_string());
            assert!(fs::symlink_metadata(&place).unwrap().is_symlink(), "{attach}");
        }
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let ours = table.lines().filter(|line| line.contains(&format!("{}/", snapshots.display())));
        let writable = ours.filter(|line| line.split(' ').nth(5).is_none_or(|o| !o.split(',').any(|o| o == "ro")));
        assert_eq!(writable.count(), 0, "{table}");
        drop(held);
        for key in ["box", "k8s.io/11/container-1", "k8s.io/12/container-2", "k8s.io/13/view"] {
            d.client.remove(key).unwrap();
        }
        for key in ["k8s.io/9/sha256:d2", "k8s.io/7/sha256:d1", "sha256:c3", "sha256:c2", "sha256:c1"] {
            d.client.remove(key).unwrap();
        }
        d.client.cleanup().unwrap();
        assert_eq!(mounts_below(&snapshots), Vec::<PathBuf>::new());
        for id in [1, 2, 3, 4, 5, 7, 8, 9] {
            assert!(!snapshots.join(id.to_string()).exists(), "{id} is left");
        }
        let layer = d.repository.layer_dir(&scene::snapshotter_fixture::digest(1)).join("layerfs/dir/file-1");
        assert!(layer.exists(), "a layer of the repository was emptied");
    }
}

/// containerd's own overlayfs snapshotter behind our socket writes its state with the same package as the Go
/// snapshotter, so it stands for that here.
#[test]
fn root_containerd_keeps_working_with_snapshots_taken_over() {
    let mut stage = E2eFixture::start("goes-on", "");
    stage.snapshotter.end(Signal::SIGTERM);
    let home = stage.snapshotter.root().join("snapshotter");
    fs::remove_dir_all(&home).unwrap();
    let mut command = Command::new(tool("gostate"));
    command.arg("serve").arg(&home).arg(stage.snapshotter.socket());
    let mut go = Server::start(&mut command, &stage.sandbox.path("go.log"));
    go.wait_until("listen", || stage.snapshotter.socket().exists());
    // containerd may have called while no daemon was running, and pauses before it calls again.
    eventually("containerd finds the Go one", || stage.ours.snapshots().list(&[]).is_ok());
    let image = stage.shell_image("local:1", "x");
    let reference = stage.registry.push(&image);
    stage.ours.pull(&reference);
    stage.ours.start_container(&reference, "running", &["/bin/sleep", "1000"]);
    stage.ours.exec("running", &["/bin/sh", "-c", "echo mine > /tmp/mine"]).ok();
    go.end(Signal::SIGKILL);

    stage.snapshotter.start_again();
    let ours = stage.snapshotter.client();
    assert_eq!(ours.list(&[]).unwrap().len(), image.layers.len() + 1, "the layers and the container");
    // The container keeps running, the image starts others, and everything can be removed and pulled again.
    let written = stage.ours.root_of("running").join("tmp/mine");
    assert_eq!(fs::read_to_string(written).unwrap(), "mine\n");
    eventually("containerd finds the new one", || stage.ours.snapshots().list(&[]).is_ok());
    let program = ["/bin/sh", "-c", "cat /data/text; ls /data"];
    assert_eq!(stage.ours.run(&reference, "new", &program).ok(), "xtext\ntop\n");
    let before = stage.registry.fetched();
    stage.ours.pull(&reference);
    assert_eq!(stage.registry.fetched().since(&before).layers_of(&image), 0, "a layer was fetched again");
    stage.ours.end_container("running");
    stage.ours.remove(&reference);
    eventually("everything is gone", || {
        stage.ours.collect_garbage();
        ours.list(&[]).unwrap().is_empty() && stage.snapshot_dirs().is_empty()
    });
    stage.repository.publish(&image);
    stage.ours.pull(&reference);
    assert_eq!(stage.ours.run(&reference, "again", &program).ok(), "xtext\ntop\n");
    let published = ours.list(&["kind==committed,labels.\"containerd.io/snapshot/remote\""]).unwrap();
    assert_eq!(published.len(), image.layers.len(), "this time its layers come from the repository");
}

/// Reads all values. The result is their number.
fn read_all(bytes: &[u8]) -> Result<usize, cvmfs_snapshotter::migration::bolt::Error> {
    let bolt = Database::parse(bytes)?;
    let mut unread = vec![bolt.root()];
    let mut values = 0;
    while let Some(bucket) = unread.pop() {
        for entry in bolt.read(&bucket)?.into_values() {
            match entry {
                Entry::Value(_) => values += 1,
                Entry::Bucket(bucket) => unread.push(bucket),
            }
        }
    }
    Ok(values)
}

#[test]
fn damaged_bolt_file_is_read_or_refused_without_panic() {
    let dir = std::env::temp_dir().join(format!("gostate-{}", std::process::id()));
    run(tool("gostate"), ["odd".as_ref(), dir.as_os_str()]).ok();
    let whole = fs::read(dir.join("metadata.db")).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    assert!(read_all(&whole).unwrap() > 100);
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    let (mut refused, mut read) = (0, 0);
    let mut look = |bytes: &[u8]| {
        let all = read_all(bytes);
        let taken = takeover::decode(bytes, "r");
        // A file that can be read as a whole can be taken over, though records in it may be omitted.
        assert!(taken.is_ok() || all.is_err());
        if all.is_ok() { read += 1 } else { refused += 1 }
    };
    let mut bytes = whole.clone();
    // The bytes are the heads of all pages, and a part of the rest.
    for at in (0..=used).filter(|at| at % 4096 < 128 || at % 7 == 0) {
        for value in [whole[at] ^ 1, whole[at] ^ 0x80, 0, 0xff] {
            bytes[at] = value;
            look(&bytes);
        }
        bytes[at] = whole[at];
    }
    for length in (0..whole.len()).step_by(97) {
        look(&whole[..length]);
    }
    scene::report::print(format_args!(
        "a bolt file damaged at {} places: {refused} refused, {read} read",
        refused + read
    ));
    assert!(refused > 1000 && read > 1000);
}
