//! The maximum length of chains.

use std::fs;

use super::fixture::{Fixture, key, lower_dirs, pull_request, request, snapshot};
use crate::model::AttachMode;
use crate::model::{Key, Kind, Labels, MAX_CHAIN, MAX_LABELS_BYTES, Snapshot};
use crate::snapshotter::{Error, Result, Snapshotter};

/// Inserts committed snapshots on each other, as an older version or a Go snapshotter could have left them. Returns the
/// names, the lowest first.
fn insert_chain(fixture: &Fixture, s: &Snapshotter, length: usize, labels: &Labels) -> Vec<String> {
    let names: Vec<String> = (1..=length).map(|n| format!("chain-{n}")).collect();
    let mut snapshots = Vec::with_capacity(length);
    for (n, name) in names.iter().enumerate() {
        let parent = n.checked_sub(1).map(|below| names[below].as_str());
        let snapshot = snapshot(s, name, parent, Kind::Committed, labels);
        fs::create_dir_all(fixture.snapshot_dir(snapshot.id).join("fs")).unwrap();
        snapshots.push(snapshot);
    }
    s.store.write(|tx| snapshots.iter().try_for_each(|snapshot| tx.insert(snapshot))).unwrap();
    names
}

#[track_caller]
fn expect_too_long<T: std::fmt::Debug>(result: Result<T>) {
    let error = result.expect_err("the chain is too long");
    assert!(matches!(error, Error::ChainTooLong { .. }), "{error:?}");
    assert!(error.to_string().contains("512 snapshots"), "{error}");
}

#[test]
fn root_chain_ends_at_512_snapshots() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let names = insert_chain(&fixture, &s, MAX_CHAIN, &Labels::new());
    let (last, next_to_last) = (&names[MAX_CHAIN - 1], &names[MAX_CHAIN - 2]);
    // A 512th snapshot is possible in every way.
    s.prepare(request("active", next_to_last, &[])).unwrap();
    s.view(request("view", next_to_last, &[])).unwrap();
    s.prepare(request("loose", "", &[])).unwrap();
    s.commit(&key("on it"), &key("loose"), Labels::new(), Some(&key(next_to_last))).unwrap();
    let pulled = s.prepare(pull_request(1, next_to_last));
    assert!(matches!(pulled, Err(Error::RemoteCommitted { .. })), "{pulled:?}");
    s.commit(&key("committed"), &key("active"), Labels::new(), None).unwrap();
    // A 513th is not.
    expect_too_long(s.prepare(request("too many", last, &[])));
    expect_too_long(s.view(request("too many", last, &[])));
    expect_too_long(s.prepare(pull_request(2, last)));
    s.prepare(request("loose", "", &[])).unwrap();
    expect_too_long(s.commit(&key("too many"), &key("loose"), Labels::new(), Some(&key(last))));
    assert!(s.stat(&key("loose")).is_ok() && s.stat(&key("too many")).is_err());
}

/// Nothing is lost that was made before there was a limit.
#[test]
fn root_chain_longer_than_the_limit_stays_usable_and_removable() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let names = insert_chain(&fixture, &s, MAX_CHAIN + 100, &Labels::new());
    let last = names.last().unwrap();
    let container = snapshot(&s, "container", Some(last), Kind::Active, &Labels::new());
    fs::create_dir_all(fixture.snapshot_dir(container.id).join("fs")).unwrap();
    s.store.write(|tx| tx.insert(&container)).unwrap();
    drop(s);
    let s = fixture.restart();
    assert_eq!(lower_dirs(&s.mounts(&key("container")).unwrap()).len(), names.len());
    expect_too_long(s.view(request("view", last, &[])));
    // It can be committed, because that makes the chain no longer.
    s.commit(&key("committed"), &key("container"), Labels::new(), None).unwrap();
    fixture.remove_all(&s);
}

/// Every Prepare and Mounts loaded all labels of all snapshots of the chain, up to 1 MiB for each.
#[test]
fn root_chain_is_read_without_its_labels() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let labels: Labels = [("l".to_owned(), "x".repeat(MAX_LABELS_BYTES / 16))].into();
    let names = insert_chain(&fixture, &s, 16, &labels);
    let chain = s.store.read(|tx| tx.chain(&key(&names[15]), |_| false)).unwrap();
    assert_eq!(chain.len(), 16);
    let bytes: usize = chain.iter().map(Snapshot::approximate_size).sum();
    assert!(bytes < 16 * 1024, "{bytes} bytes for a chain of 16 snapshots");
    let keys: Vec<&str> = chain.iter().rev().map(|snapshot| Key::as_str(&snapshot.key)).collect();
    assert_eq!(keys, names);
}
