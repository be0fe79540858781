//! Pulls that must not take another snapshot for the layer.

use super::fixture::{Fixture, key, pull, pull_request, request, snapshot};
use crate::model::AttachMode;
use crate::model::{Kind, LABEL_SNAPSHOT_REF, Labels};
use crate::snapshotter::LabelChange;
use crate::snapshotter::pull::MAX_SAME_REFERENCE;

#[test]
fn root_snapshot_with_a_changed_reference_label_stands_in_for_no_other_layer() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let relabel = |name: &str, n: u8| {
        let reference = (LABEL_SNAPSHOT_REF.to_owned(), Some(format!("sha256:chain-{n}")));
        s.update(&key(name), &LabelChange::Each(vec![reference])).unwrap();
    };
    let prepare_pull = |n: u8| {
        let answer = s.prepare(pull_request(n, ""));
        if answer.is_ok() {
            s.remove(&key("extract")).unwrap();
        }
        answer
    };
    let second = pull(&s, 2, "");
    // The wrong snapshot comes after the right one in the index, and then before it.
    relabel(&second, 1);
    prepare_pull(1).expect("containerd would take layer 2 for layer 1");
    relabel(&second, 2);
    let first = pull(&s, 1, "");
    relabel(&first, 2);
    prepare_pull(2).expect("containerd would take layer 1 for layer 2");
    s.remove(&key(&first)).unwrap();
    // A snapshot of the layer that was downloaded is no other layer.
    s.prepare(request("default/7/extract", "", &[])).unwrap();
    let labels = [(LABEL_SNAPSHOT_REF.to_owned(), "sha256:chain-1".to_owned())].into();
    s.commit(&key("default/8/sha256:chain-1"), &key("default/7/extract"), labels, None).unwrap();
    pull(&s, 1, "");
}

/// All of them were loaded at once, with their labels, in the write transaction that all other writes wait for.
#[test]
fn root_pull_reads_a_bounded_number_of_snapshots_with_its_reference() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let labels: Labels = [(LABEL_SNAPSHOT_REF.to_owned(), "sha256:chain-1".to_owned())].into();
    let attempts: Vec<_> =
        (0..MAX_SAME_REFERENCE).map(|n| snapshot(&s, &format!("attempt-{n}"), None, Kind::Active, &labels)).collect();
    s.store.write(|tx| attempts[1..].iter().try_for_each(|attempt| tx.insert(attempt))).unwrap();
    let layer = pull(&s, 1, "");
    s.remove(&key(&layer)).unwrap();
    s.store.write(|tx| tx.insert(&attempts[0])).unwrap();
    s.prepare(pull_request(1, "")).expect("the layer is downloaded, so the snapshot is an ordinary one");
}
