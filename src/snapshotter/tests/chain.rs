//! How long a chain may be, and that an older one that is longer stays.

use std::fs;

use super::{Fixture, asked, key, wanted};
use crate::attach::AttachMode;
use crate::model::{Key, Kind, Labels, MAX_CHAIN, MAX_LABELS_BYTES, Snapshot, Timestamp};
use crate::snapshotter::{Error, Result, Snapshotter};

/// So many committed snapshots on each other, as an older version, or a Go snapshotter, could have left them; the
/// result is the names, from below.
fn chain(place: &Fixture, s: &Snapshotter, length: usize, labels: &Labels) -> Vec<String> {
    let names: Vec<String> = (1..=length).map(|n| format!("chain-{n}")).collect();
    let snapshot = |n: usize| {
        let id = s.store.reserve_id().unwrap();
        fs::create_dir_all(place.snapshots().join(id.to_string()).join("fs")).unwrap();
        Snapshot {
            id,
            key: key(&names[n]),
            parent: n.checked_sub(1).map(|below| key(&names[below])),
            kind: Kind::Committed,
            created: Timestamp(0),
            updated: Timestamp(0),
            labels: labels.clone(),
            layer: None,
            usage: None,
        }
    };
    let all: Vec<Snapshot> = (0..length).map(snapshot).collect();
    s.store.write(|tx| all.iter().try_for_each(|one| tx.insert(one)).map_err(Error::from)).unwrap();
    names
}

#[track_caller]
fn is_refused<T: std::fmt::Debug>(result: Result<T>) {
    let error = result.expect_err("the chain is too long");
    assert!(matches!(error, Error::ChainTooLong { .. }), "{error:?}");
    assert!(error.to_string().contains("512 snapshots"), "{error}");
}

#[test]
fn root_chain_ends_at_512_snapshots() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let names = chain(&place, &s, MAX_CHAIN, &Labels::new());
    let (last, before) = (&names[MAX_CHAIN - 1], &names[MAX_CHAIN - 2]);
    // What would be the 512th is possible, in every way.
    s.prepare(wanted("active", before, &[])).unwrap();
    s.view(wanted("view", before, &[])).unwrap();
    s.prepare(wanted("loose", "", &[])).unwrap();
    s.commit(&key("on it"), &key("loose"), Labels::new(), Some(&key(before))).unwrap();
    let pulled = s.prepare(asked(1, before));
    assert!(matches!(pulled, Err(Error::RemoteCommitted { .. })), "{pulled:?}");
    s.commit(&key("committed"), &key("active"), Labels::new(), None).unwrap();
    // The 513th is not.
    is_refused(s.prepare(wanted("one more", last, &[])));
    is_refused(s.view(wanted("one more", last, &[])));
    is_refused(s.prepare(asked(2, last)));
    s.prepare(wanted("loose", "", &[])).unwrap();
    is_refused(s.commit(&key("one more"), &key("loose"), Labels::new(), Some(&key(last))));
    assert!(s.stat(&key("loose")).is_ok() && s.stat(&key("one more")).is_err());
}

/// Nothing that was made before is lost.
#[test]
fn root_longer_chain_of_before_is_kept_and_used_and_removed() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let names = chain(&place, &s, MAX_CHAIN + 100, &Labels::new());
    let last = names.last().unwrap();
    let container = Snapshot {
        id: s.store.reserve_id().unwrap(),
        key: key("container"),
        parent: Some(key(last)),
        kind: Kind::Active,
        created: Timestamp(0),
        updated: Timestamp(0),
        labels: Labels::new(),
        layer: None,
        usage: None,
    };
    fs::create_dir_all(place.snapshots().join(container.id.to_string()).join("fs")).unwrap();
    s.store.write(|tx| tx.insert(&container).map_err(Error::from)).unwrap();
    drop(s);
    let s = place.restart();
    assert_eq!(super::lower(&s.mounts(&key("container")).unwrap()).len(), names.len());
    is_refused(s.view(wanted("view", last, &[])));
    // It can be committed as it is: the chain gets no longer.
    s.commit(&key("committed"), &key("container"), Labels::new(), None).unwrap();
    super::remove_all(&place, &s);
}

/// Every Prepare and Mounts loaded all labels of all that is below, up to 1 MiB of each.
#[test]
fn root_chain_is_read_without_its_labels() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let labels: Labels = [("l".to_owned(), "x".repeat(MAX_LABELS_BYTES / 16))].into();
    let names = chain(&place, &s, 16, &labels);
    let read = s.store.read(|tx| tx.chain(&key(&names[15]), |_| false).map_err(Error::from)).unwrap();
    assert_eq!(read.len(), 16);
    let bytes: usize = read.iter().map(Snapshot::approximate_size).sum();
    assert!(bytes < 16 * 1024, "{bytes} bytes for a chain of 16 snapshots");
    let keys: Vec<&str> = read.iter().rev().map(|one| Key::as_str(&one.key)).collect();
    assert_eq!(keys, names);
}
