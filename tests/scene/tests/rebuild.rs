//! Damaged metadata: the daemon refuses it and changes nothing, and a rebuild restores it from the directories and from
//! containerd's metadata.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cvmfs_snapshotter::proto::snapshots::Info;
use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use scene::client::Client;
use scene::e2e_fixture::E2eFixture;
use scene::gostate;
use scene::process::{Output, eventually, run, tool};
use scene::sandbox::mounts_below;
use scene::snapshotter::{Snapshotter, binary};
use scene::snapshotter_fixture::{SnapshotterFixture, assert_refused, options, pull_chain};

/// Everything below the state root but the lock: type, mode, time and content. Only the times of directories are left
/// out, because SQLite makes a log beside the file to look at it, which is removed again.
fn state(snapshotter: &Snapshotter) -> BTreeMap<PathBuf, (u32, i64, Vec<u8>)> {
    let lock = snapshotter.root().join("snapshotter/lock");
    let mut found = BTreeMap::new();
    let mut unread = vec![snapshotter.root()];
    while let Some(directory) = unread.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let status = fs::symlink_metadata(&path).unwrap();
            if status.is_dir() {
                unread.push(path.clone());
            }
            let time = if status.is_dir() { 0 } else { status.mtime_nsec() };
            let content = if status.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if path != lock {
                found.insert(path, (status.mode(), time, content));
            }
        }
    }
    found
}

fn metadata(snapshotter: &Snapshotter) -> PathBuf {
    snapshotter.root().join("snapshotter/metadata.sqlite")
}

fn rebuild(snapshotter: &Snapshotter, more: &[&str]) -> Output {
    let (root, config) = (snapshotter.root(), snapshotter.root().with_file_name("config.toml"));
    let (root, config) = (root.display().to_string(), config.display().to_string());
    run(binary(), [&["--root", &root, "--config", &config, "--rebuild-metadata"], more].concat())
}

/// The properties of all snapshots that a rebuild must not change.
fn records(c: &Client) -> BTreeSet<(String, String, i32, BTreeMap<String, String>)> {
    let all = c.list(&[]).unwrap().into_iter();
    all.map(|Info { name, parent, kind, labels, .. }| (name, parent, kind.value(), labels.into_iter().collect()))
        .collect()
}

/// A chain of published layers, local ones on it and beside it, in every kind.
fn create_all_kinds(c: &Client) -> String {
    let chain = pull_chain(c);
    for (name, parent) in [("on-remote", chain.as_str()), ("base", ""), ("on-base", "base")] {
        let source = c.prepare("extract", parent, &[]).unwrap();
        let upper = options(&source).iter().find_map(|o| o.strip_prefix("upperdir="));
        let fs = upper.map_or_else(|| PathBuf::from(&source[0].source), PathBuf::from);
        fs::write(fs.join(name), name).unwrap();
        c.commit(name, "extract", &[("note", name)]).unwrap();
    }
    c.prepare("box", "on-base", &[("box", "1")]).unwrap();
    c.prepare("remote-box", "on-remote", &[]).unwrap();
    c.view("view", "base", &[]).unwrap();
    chain
}

fn newer_schema(path: &Path) {
    let database = rusqlite::Connection::open(path).unwrap();
    database.pragma_update(None, "user_version", 99).unwrap();
}

/// A shell of sqlite3 that was left open kept the index of the old log, and the file that a rebuild had made passed for a
/// damaged one.
#[test]
fn root_rebuild_and_daemon_refuse_metadata_that_the_other_has_open() {
    let mut d = SnapshotterFixture::start("open", "");
    create_all_kinds(&d.client);
    let file = metadata(&d.snapshotter);
    let count = |other: &rusqlite::Connection| -> rusqlite::Result<i64> {
        other.query_row("SELECT count(*) FROM snapshots", [], |row| row.get(0))
    };
    let locked = count(&rusqlite::Connection::open(&file).unwrap()).unwrap_err();
    assert_eq!(locked.sqlite_error_code(), Some(rusqlite::ErrorCode::DatabaseBusy));
    d.snapshotter.end(Signal::SIGKILL);
    let other = rusqlite::Connection::open(&file).unwrap();
    let snapshots = count(&other).unwrap();
    let output = d.snapshotter.command().output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    for part in ["metadata.sqlite", "another program has it open", "nothing was changed"] {
        assert!(message.contains(part), "{message}");
    }
    drop(other);
    d.snapshotter.start_again();
    assert_eq!(i64::try_from(d.snapshotter.client().list(&[]).unwrap().len()).unwrap(), snapshots);
}

/// The start waited for a writer of the FIFO for ever, without a message.
#[test]
fn root_start_refuses_metadata_that_is_not_a_regular_file() {
    let mut d = SnapshotterFixture::start("fifo", "");
    d.snapshotter.end(Signal::SIGTERM);
    let file = metadata(&d.snapshotter);
    fs::remove_file(&file).unwrap();
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let output = d.snapshotter.command().output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("it is not a regular file") && message.contains("--rebuild-metadata"), "{message}");
}

#[test]
fn root_start_refuses_damaged_metadata_and_changes_nothing() {
    let mut d = SnapshotterFixture::start("damaged", "");
    create_all_kinds(&d.client);
    d.snapshotter.end(Signal::SIGTERM);
    let file = metadata(&d.snapshotter);
    let whole = fs::read(&file).unwrap();
    let assert_start_refused = |name: &str, why: &str, remedy: &str| {
        let before = state(&d.snapshotter);
        let output = d.snapshotter.command().output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{name}: {message}");
        assert!(state(&d.snapshotter) == before, "{name}: something was changed");
        for part in [why, remedy, "metadata.sqlite", "nothing was changed"] {
            assert!(message.contains(part), "{name}: {part} is missing in {message}");
        }
        assert_eq!(message.lines().count(), 1, "{name}: {message}");
        message
    };
    let (damaged, rebuild) = ("is damaged", "cvmfs-snapshotter --rebuild-metadata");
    let lengths = [1, 100, 4096, 5000, whole.len() / 2, whole.len() - 4096, whole.len() - 1];
    for length in lengths {
        fs::write(&file, &whole[..length]).unwrap();
        assert_start_refused(&format!("{length} bytes"), damaged, rebuild);
    }
    for (name, content, why) in [
        ("empty", Vec::new(), "it has 0 bytes"),
        ("zeroed", vec![0; whole.len()], damaged),
        ("other", b"no database".repeat(1000), damaged),
        ("a hole", [&whole[..8192], &vec![0xff; whole.len() - 8192]].concat(), damaged),
        ("zeros behind its head", [&whole[..4096], &vec![0; whole.len() - 4096]].concat(), damaged),
    ] {
        fs::write(&file, content).unwrap();
        assert_start_refused(name, why, rebuild);
    }
    fs::write(&file, &whole).unwrap();
    let database = rusqlite::Connection::open(&file).unwrap();
    database.execute_batch("PRAGMA wal_checkpoint; UPDATE snapshots SET labels = '{' WHERE key = 'base'").unwrap();
    drop(database);
    assert_start_refused("a row", "is damaged: a row of table snapshots was not written by this program", rebuild);
    fs::write(&file, &whole).unwrap();
    newer_schema(&file);
    let message = assert_start_refused(
        "newer",
        "has schema version 99, this program knows 1",
        "install the version that wrote it",
    );
    assert!(!message.contains("rebuild"), "{message}");
    // An empty store in its place would have forgotten everything.
    fs::remove_file(&file).unwrap();
    fs::write(file.with_extension("redb"), "of an earlier version").unwrap();
    let message = d.snapshotter.command().output().unwrap().stderr;
    let message = String::from_utf8_lossy(&message).into_owned();
    assert!(message.contains("metadata.redb is of a version before") && message.contains(rebuild), "{message}");
    fs::remove_file(file.with_extension("redb")).unwrap();
    assert_start_refused("gone", "is gone, and the records of 6 local snapshots are there", "--rebuild-metadata");
    fs::write(&file, &whole).unwrap();
    d.snapshotter.start_again();
    assert_eq!(d.snapshotter.client().list(&[]).unwrap().len(), 9);
}

#[test]
fn root_rebuild_restores_metadata_from_snapshot_directories() {
    let mut d = SnapshotterFixture::start("alone", "");
    let chain = create_all_kinds(&d.client);
    let before = records(&d.client);
    let usage = d.client.usage("on-base").unwrap();
    let snapshots = d.snapshotter.snapshots();
    let sources: Vec<_> = ["box", "view"].map(|key| d.client.mounts(key).unwrap()).to_vec();
    // The directory of a removed snapshot still exists.
    d.client.prepare("removed", "", &[]).unwrap();
    d.client.remove("removed").unwrap();

    let wrong = d.sandbox.path("wrong").display().to_string();
    let output = run(binary(), ["--rebuild-metadata", "--containerd-metadata", "none", "--root", &wrong]);
    assert!(
        output.stderr.contains("there is nothing to rebuild") && output.stderr.contains(&wrong),
        "{}",
        output.stderr
    );
    assert!(!Path::new(&wrong).exists(), "a root that was mistyped is made");
    let output = rebuild(&d.snapshotter, &["--containerd-metadata", "none"]);
    assert!(output.stderr.contains("another cvmfs-snapshotter uses the state root"), "{}", output.stderr);
    d.snapshotter.end(Signal::SIGKILL);
    let output = rebuild(&d.snapshotter, &["--containerd-metadata", "none"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("is sound, nothing was changed"), "{}", output.stderr);

    let file = metadata(&d.snapshotter);
    let length = fs::metadata(&file).unwrap().len();
    fs::write(&file, vec![0; usize::try_from(length).unwrap()]).unwrap();
    let missing = d.sandbox.path("meta.db").display().to_string();
    let untouched = state(&d.snapshotter);
    let output = rebuild(&d.snapshotter, &["--containerd-metadata", &missing]);
    assert!(output.stderr.contains("there is no metadata of containerd at"), "{}", output.stderr);
    // containerd runs: bbolt holds its file.
    gostate::write("small", d.sandbox.dir());
    let home = d.sandbox.path("snapshotter");
    let (mut go, locked) = lock(&home);
    let output = rebuild(&d.snapshotter, &["--containerd-metadata", &locked]);
    for part in ["it is locked, containerd runs", "stop containerd", "--containerd-metadata none"] {
        assert!(output.stderr.contains(part), "{}", output.stderr);
    }
    drop(go.stdin.take());
    go.wait().unwrap();
    assert!(state(&d.snapshotter) == untouched, "a rebuild that was refused changed something");

    let table = rebuild(&d.snapshotter, &["--containerd-metadata", "none"]).ok();
    for part in [
        "published layers                0",
        "other committed snapshots       2",
        "active snapshots                2",
        "views                           1",
        "left out                        2",
        &format!("\"on-remote\": its parent {chain:?} is missing"),
        "\"remote-box\": its parent \"on-remote\" is left out",
        "without containerd's metadata: published layers are not restored",
        "the old file is kept as",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
    let kept = file.with_file_name("metadata.sqlite.damaged-1");
    assert!(fs::read(&kept).unwrap().iter().all(|byte| *byte == 0));

    d.snapshotter.start_again();
    let c = d.snapshotter.client();
    let after = records(&c);
    let local = |(name, ..): &&(String, String, i32, BTreeMap<String, String>)| {
        ["base", "on-base", "box", "view"].contains(&name.as_str())
    };
    assert_eq!(after.iter().filter(local).collect::<Vec<_>>(), before.iter().filter(local).collect::<Vec<_>>());
    // The snapshot that was removed is kept until containerd's garbage collection, which does not know it.
    c.remove("removed").unwrap();
    assert_eq!(after.len(), 5);
    assert_eq!(["box", "view"].map(|key| c.mounts(key).unwrap()).to_vec(), sources);
    assert_eq!(c.usage("on-base").unwrap(), usage);
    // Omitted directories stay on disk, and their ids are not used again.
    assert!(snapshots.join("4/fs/on-remote").exists());
    let fresh = PathBuf::from(&c.prepare("fresh", "", &[]).unwrap()[0].source);
    let fresh: u64 = fresh.parent().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
    assert!(fresh > 9, "{fresh}");
    // Attachments of layers without a record are removed, and the layers are pulled again.
    eventually("old attachments are gone", || {
        c.cleanup().unwrap();
        [1, 2, 3].iter().all(|id| !snapshots.join(id.to_string()).exists())
    });
    let chain = pull_chain(&c);
    c.prepare("again", &chain, &[]).unwrap();
}

/// Holds the lock of a bbolt file, as containerd does.
fn lock(home: &Path) -> (std::process::Child, String) {
    let mut command = Command::new(tool("gostate"));
    command.args(["lock".as_ref(), home.as_os_str()]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut go = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(go.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (go, home.join("metadata.db").display().to_string())
}

#[test]
fn root_rebuild_omits_contradictory_records() {
    let mut d = SnapshotterFixture::start("contradict", "");
    for key in ["one", "two", "three", "four", "five", "six"] {
        d.client.prepare(key, "", &[]).unwrap();
    }
    let home = |id: u64| d.snapshotter.snapshots().join(id.to_string());
    let [one, two, three, four, five] = [1, 2, 3, 4, 5].map(home);
    d.snapshotter.end(Signal::SIGTERM);
    fs::remove_file(metadata(&d.snapshotter)).unwrap();
    fs::copy(one.join("record"), two.join("record")).unwrap();
    let record = fs::read(three.join("record")).unwrap();
    fs::write(three.join("record"), &record[..record.len() / 2]).unwrap();
    fs::remove_dir(four.join("fs")).unwrap();
    fs::write(five.join("record"), vec![0; 5 << 20]).unwrap();
    let output = rebuild(&d.snapshotter, &["--containerd-metadata", "none", "--json"]).ok();
    let report: serde_json::Value = serde_json::from_str(&output).unwrap();
    assert_eq!(report["rebuilt"]["active"], 2, "{report:#}");
    assert_eq!(report["old"], serde_json::Value::Null);
    let left_out: BTreeMap<&str, &str> = report["left_out"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["name"].as_str().unwrap(), one["reason"].as_str().unwrap()))
        .collect();
    let reason = |path: &Path| left_out.get(format!("{:?}", path.display().to_string()).as_str()).copied();
    assert_eq!(reason(&two), Some("the record beside its files has the id 1"));
    assert_eq!(reason(&three), Some("the record beside its files is missing or incomplete"));
    assert_eq!(reason(&five), Some("the record beside its files is missing or incomplete"));
    assert_eq!(left_out.get("\"four\""), Some(&"its files are missing"));
    assert_eq!(left_out.len(), 4, "{left_out:?}");
    d.snapshotter.start_again();
    let c = d.snapshotter.client();
    for key in ["one", "six"] {
        c.mounts(key).unwrap();
    }
    assert_refused(c.stat("two"), Code::NOT_FOUND);
    for left_alone in [&two, &three, &four, &five] {
        assert!(left_alone.exists(), "{}", left_alone.display());
    }
}

#[test]
fn root_node_keeps_working_after_its_metadata_was_lost_and_rebuilt() {
    let mut stage = E2eFixture::start("rebuild", "");
    let published = stage.shell_image("published:1", "x");
    let local = stage.shell_image("local:1", "y");
    let mixed = stage.shell_image("mixed:1", "z");
    stage.repository.publish_layers(&mixed.layers[..1]);
    let references = [stage.publish_and_push(&published), stage.registry.push(&local), stage.registry.push(&mixed)];
    for (n, reference) in references.iter().enumerate() {
        stage.ours.pull(reference);
        stage.ours.start_container(reference, &format!("running-{n}"), &["/bin/sleep", "1000"]);
        stage.ours.exec(&format!("running-{n}"), &["/bin/sh", "-c", "echo mine > /tmp/mine"]).ok();
    }
    // The images share layers, so they share the finding.
    stage
        .ours
        .ctr(&[
            "--namespace",
            "other",
            "images",
            "pull",
            "--plain-http",
            "--snapshotter",
            "cvmfs-snapshotter",
            &references[1],
        ])
        .ok();
    let before = records(&stage.snapshotter.client());
    assert!(before.len() > 9);

    stage.ours.end();
    stage.snapshotter.end(Signal::SIGTERM);
    let file = metadata(&stage.snapshotter);
    let length = fs::metadata(&file).unwrap().len();
    fs::write(&file, vec![0; usize::try_from(length).unwrap()]).unwrap();
    let refused = stage.snapshotter.command().output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let meta = stage.ours.root().join("io.containerd.metadata.v1.bolt/meta.db").display().to_string();
    let untouched = fs::read(&meta).unwrap();
    let table = rebuild(&stage.snapshotter, &["--containerd-metadata", &meta]).ok();
    assert!(table.contains("left out                        0"), "{table}");
    assert!(!table.contains("containerd does not know"), "{table}");
    assert!(fs::read(&meta).unwrap() == untouched, "containerd's metadata was changed");

    stage.snapshotter.start_again();
    assert_eq!(records(&stage.snapshotter.client()), before);
    stage.ours.start_again();
    for (n, (reference, text)) in references.iter().zip(["x", "y", "z"]).enumerate() {
        // The container kept running with its files, the image starts others, and both can be removed.
        let running = format!("running-{n}");
        let root = stage.ours.root_of(&running);
        assert_eq!(fs::read_to_string(root.join("tmp/mine")).unwrap(), "mine\n");
        assert_eq!(fs::read_to_string(root.join("data/text")).unwrap(), text);
        assert_eq!(stage.ours.run(reference, &format!("new-{n}"), &["/bin/cat", "/data/text"]).ok(), text);
        stage.ours.end_container(&running);
        stage.ours.remove(reference);
    }
    stage.ours.ctr(&["--namespace", "other", "images", "rm", "--sync", &references[1]]).ok();
    eventually("everything is gone", || {
        stage.ours.collect_garbage();
        stage.snapshotter.client().list(&[]).unwrap().is_empty() && stage.snapshot_dirs().is_empty()
    });
    assert_eq!(mounts_below(&stage.snapshotter.root()), Vec::<PathBuf>::new());
    for (reference, text) in references.iter().zip(["x", "y", "z"]) {
        stage.ours.pull(reference);
        assert_eq!(stage.ours.run(reference, "again", &["/bin/cat", "/data/text"]).ok(), text);
    }
}
