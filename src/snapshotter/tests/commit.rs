//! Commits beside other calls: who is told what, and what the record beside the files says then.

use std::fs;
use std::sync::Barrier;

use super::{Fixture, key, wanted};
use crate::attach::AttachMode;
use crate::model::{Key, Labels};
use crate::sidecar::Sidecar;
use crate::snapshotter::{Error, Snapshotter};

/// What the record beside the files of `name` says that the snapshot becomes.
fn recorded_name(place: &Fixture, s: &Snapshotter, name: &str) -> Option<Key> {
    let snapshot = s.stat(&key(name)).unwrap();
    let bytes = fs::read(s.paths.record(snapshot.id)).unwrap_or_else(|e| panic!("{name}: {e}: {:?}", place.on_disk()));
    Sidecar::decode(&bytes).expect("the record is whole").committed.map(|committed| committed.key)
}

/// Both wrote the record before either was committed: the one that lost could leave its own there, and
/// `--rebuild-metadata` would have given the snapshot a name that nobody knows.
#[test]
fn root_concurrent_commits_of_one_key_leave_the_record_of_the_one_that_won() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    for n in 0..300 {
        s.prepare(wanted("active", "", &[])).unwrap();
        let names = ["a", "b"].map(|name| format!("{name}-{n}"));
        let begin = Barrier::new(2);
        let answers = std::thread::scope(|scope| {
            names
                .each_ref()
                .map(|name| {
                    let (s, begin) = (&s, &begin);
                    scope.spawn(move || {
                        begin.wait();
                        s.commit(&key(name), &key("active"), Labels::new(), None)
                    })
                })
                .map(|thread| thread.join().unwrap())
        });
        let won = match &answers {
            [Ok(()), Err(Error::NotFound(_))] => &names[0],
            [Err(Error::NotFound(_)), Ok(())] => &names[1],
            _ => panic!("{answers:?}"),
        };
        assert_eq!(recorded_name(&place, &s, won), Some(key(won)), "round {n}");
    }
}

/// As above, with two snapshots and one name: the record of the one that lost said that it has the name too,
/// and of two with one name `--rebuild-metadata` keeps neither.
#[test]
fn root_concurrent_commits_to_one_name_leave_it_to_one_record() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    for n in 0..300 {
        let (name, keys) = (format!("name-{n}"), ["a", "b"].map(|name| format!("{name}-{n}")));
        let begin = Barrier::new(2);
        let answers = std::thread::scope(|scope| {
            keys.each_ref()
                .map(|active| {
                    s.prepare(wanted(active, "", &[])).unwrap();
                    let (s, begin, name) = (&s, &begin, &name);
                    scope.spawn(move || {
                        begin.wait();
                        s.commit(&key(name), &key(active), Labels::new(), None)
                    })
                })
                .map(|thread| thread.join().unwrap())
        });
        let lost = match &answers {
            [Ok(()), Err(Error::AlreadyExists(_))] => &keys[1],
            [Err(Error::AlreadyExists(_)), Ok(())] => &keys[0],
            _ => panic!("{answers:?}"),
        };
        assert_eq!(recorded_name(&place, &s, &name), Some(key(&name)), "round {n}");
        assert_eq!(recorded_name(&place, &s, lost), None, "round {n}");
    }
}

/// The answer was UNAVAILABLE, "files are missing from disk", for a snapshot that was removed. And where the
/// key was used again at once, what was committed had no record.
#[test]
fn root_commit_of_a_snapshot_that_is_removed_meanwhile_finds_none() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let (mut committed, mut removed) = (0, 0);
    for n in 0..600 {
        let name = format!("name-{n}");
        s.prepare(wanted("active", "", &[])).unwrap();
        let begin = Barrier::new(2);
        let answer = std::thread::scope(|scope| {
            let remover = scope.spawn(|| {
                begin.wait();
                if s.remove(&key("active")).is_ok() {
                    s.cleanup(&|| false).unwrap();
                    s.prepare(wanted("active", "", &[])).unwrap();
                }
            });
            begin.wait();
            let answer = s.commit(&key(&name), &key("active"), Labels::new(), None);
            remover.join().unwrap();
            answer
        });
        match answer {
            Ok(()) => {
                committed += 1;
                assert_eq!(recorded_name(&place, &s, &name), Some(key(&name)), "round {n}");
            }
            Err(Error::NotFound(_)) => removed += 1,
            other => panic!("round {n}: {other:?}"),
        }
        let _ = s.remove(&key("active"));
    }
    println!("{committed} committed, {removed} removed");
}
