//! Commits beside other calls: what each is answered, and what the sidecar says afterwards.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Barrier};

use super::fixture::{Fixture, key, request};
use crate::model::AttachMode;
use crate::model::{Key, Labels};
use crate::sidecar::Sidecar;
use crate::snapshotter::{Error, Snapshotter};
use crate::system::testing::FaultySys;
use crate::testing::{Fault, Steps};

/// The name that the sidecar of snapshot `name` gives to the committed snapshot.
fn name_in_sidecar(fixture: &Fixture, s: &Snapshotter, name: &str) -> Option<Key> {
    let snapshot = s.stat(&key(name)).unwrap();
    let bytes =
        fs::read(s.paths.sidecar(snapshot.id)).unwrap_or_else(|e| panic!("{name}: {e}: {:?}", fixture.on_disk()));
    Sidecar::decode(&bytes).expect("the sidecar is complete").committed.map(|committed| committed.key)
}

/// Both commits wrote the sidecar before either was stored. The one that lost could overwrite the winner's, and
/// `--rebuild-metadata` would have given the snapshot a name that nobody knows.
#[test]
fn root_concurrent_commits_of_one_key_leave_the_sidecar_of_the_winner() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    for n in 0..300 {
        s.prepare(request("active", "", &[])).unwrap();
        let names = ["a", "b"].map(|name| format!("{name}-{n}"));
        let start = Barrier::new(2);
        let answers = std::thread::scope(|scope| {
            names
                .each_ref()
                .map(|name| {
                    let (s, start) = (&s, &start);
                    scope.spawn(move || {
                        start.wait();
                        s.commit(&key(name), &key("active"), Labels::new(), None)
                    })
                })
                .map(|thread| thread.join().unwrap())
        });
        let winner = match &answers {
            [Ok(()), Err(Error::NotFound(_))] => &names[0],
            [Err(Error::NotFound(_)), Ok(())] => &names[1],
            _ => panic!("{answers:?}"),
        };
        assert_eq!(name_in_sidecar(&fixture, &s, winner), Some(key(winner)), "round {n}");
    }
}

/// The sidecar of the snapshot whose commit lost claimed the name as well, and `--rebuild-metadata` keeps neither of two
/// snapshots with one name.
#[test]
fn root_concurrent_commits_to_one_name_give_it_to_one_sidecar() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    for n in 0..300 {
        let (name, keys) = (format!("name-{n}"), ["a", "b"].map(|name| format!("{name}-{n}")));
        let start = Barrier::new(2);
        let answers = std::thread::scope(|scope| {
            keys.each_ref()
                .map(|active| {
                    s.prepare(request(active, "", &[])).unwrap();
                    let (s, start, name) = (&s, &start, &name);
                    scope.spawn(move || {
                        start.wait();
                        s.commit(&key(name), &key(active), Labels::new(), None)
                    })
                })
                .map(|thread| thread.join().unwrap())
        });
        let loser = match &answers {
            [Ok(()), Err(Error::AlreadyExists(_))] => &keys[1],
            [Err(Error::AlreadyExists(_)), Ok(())] => &keys[0],
            _ => panic!("{answers:?}"),
        };
        assert_eq!(name_in_sidecar(&fixture, &s, &name), Some(key(&name)), "round {n}");
        assert_eq!(name_in_sidecar(&fixture, &s, loser), None, "round {n}");
    }
}

/// The answer was UNAVAILABLE, because the files of a snapshot that was removed are missing. And if the key was used again
/// at once, the committed snapshot had no sidecar.
#[test]
fn root_commit_of_a_snapshot_removed_meanwhile_is_not_found() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let (mut committed, mut removed) = (0, 0);
    for n in 0..600 {
        let name = format!("name-{n}");
        s.prepare(request("active", "", &[])).unwrap();
        let start = Barrier::new(2);
        let answer = std::thread::scope(|scope| {
            let remover = scope.spawn(|| {
                start.wait();
                if s.remove(&key("active")).is_ok() {
                    s.cleanup(&|| false).unwrap();
                    s.prepare(request("active", "", &[])).unwrap();
                }
            });
            start.wait();
            let answer = s.commit(&key(&name), &key("active"), Labels::new(), None);
            remover.join().unwrap();
            answer
        });
        match answer {
            Ok(()) => {
                committed += 1;
                assert_eq!(name_in_sidecar(&fixture, &s, &name), Some(key(&name)), "round {n}");
            }
            Err(Error::NotFound(_)) => removed += 1,
            other => panic!("round {n}: {other:?}"),
        }
        let _ = s.remove(&key("active"));
    }
    println!("{committed} committed, {removed} removed");
}

/// containerd waits for a Commit inside a transaction of its own.
#[test]
fn root_commit_reads_no_file_of_the_snapshot() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let steps = Arc::new(Steps::with(Fault::None));
    let s = fixture.open(Arc::new(FaultySys::with(Arc::clone(&steps))));
    let mounts = s.prepare(request("active", "", &[])).unwrap();
    fs::write(Path::new(&mounts[0].source).join("file"), vec![1; 100_000]).unwrap();
    steps.arm();
    s.commit(&key("committed"), &key("active"), Labels::new(), None).unwrap();
    let calls: Vec<&str> = steps.recorded().iter().map(|step| step.call).collect();
    assert_eq!(calls, ["write_file", "rename"], "only the sidecar is written");
    // The usage is right when it is asked for.
    let usage = s.usage(&key("committed"), &|| false).unwrap();
    assert!(usage.size >= 100_000 && usage.inodes == 2, "{usage:?}");
}
