use super::*;
use crate::model::testing::local_snapshot;
use crate::model::{LABEL_IMAGE_REF, LABEL_REMOTE, LABEL_SNAPSHOT_REF, Labels, Timestamp};

fn known(namespace: &str, key: &str, name: &str, parent: &str, labels: &[(&str, &str)]) -> ContainerdSnapshot {
    ContainerdSnapshot {
        namespace: namespace.to_owned(),
        key: key.to_owned(),
        name: name.to_owned(),
        parent: Some(parent.to_owned()).filter(|parent| !parent.is_empty()),
        labels: labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
        created: Timestamp(7),
        updated: Timestamp(8),
    }
}

fn snapshot(key: &str, kind: Kind) -> Snapshot {
    Snapshot { labels: Labels::from([("key".to_owned(), key.to_owned())]), ..local_snapshot(3, key, kind) }
}

#[test]
fn commit_that_was_begun_holds_if_containerd_knows_it() {
    let prepared = || snapshot("ns/1/extract", Kind::Active);
    let begun = || Sidecar { prepared: prepared(), committed: Some(snapshot("ns/2/layer", Kind::Committed)) };
    let resolved = |sidecar, known: &[ContainerdSnapshot]| {
        let names = known.iter().map(|known| (known.name.as_str(), known)).collect();
        let record = resolve_sidecar(sidecar, &names).record.unwrap();
        (record.kind, record.labels)
    };
    let own_labels = |key: &str| Labels::from([("key".to_owned(), key.to_owned())]);
    let inherited = [("containerd.io/snapshot/a", "1"), ("containerd.io/gc.root", "x"), (LABEL_SNAPSHOT_REF, "r")];
    let inherited_labels = Labels::from([inherited[0], inherited[2]].map(|(k, v)| (k.to_owned(), v.to_owned())));
    let only_prepared = [known("ns", "extract", "ns/1/extract", "", &inherited)];
    let only_layer = [known("ns", "sha256:c", "ns/2/layer", "", &inherited)];
    assert_eq!(resolved(begun(), &only_prepared), (Kind::Active, inherited_labels.clone()));
    assert_eq!(resolved(begun(), &only_layer), (Kind::Committed, inherited_labels));
    assert_eq!(resolved(begun(), &[]), (Kind::Committed, own_labels("ns/2/layer")));
    let plain = Sidecar { prepared: prepared(), committed: None };
    assert_eq!(resolved(plain, &[]), (Kind::Active, own_labels("ns/1/extract")));
}

#[test]
fn published_layer_is_restored_from_labels_once_for_all_namespaces() {
    let digest = format!("sha256:{}", "1".repeat(64));
    let labels = [(LABEL_REMOTE.0, LABEL_REMOTE.1), (LABEL_LAYER_DIGEST, digest.as_str())];
    let all = [
        known("a", "c1", "cvmfs/0/c1", "", &labels),
        known("b", "c1", "cvmfs/0/c1", "", &labels),
        known("a", "c2", "cvmfs/90/c2", "c1", &labels),
        known("a", "box", "a/7/box", "c2", &[]),
        known("a", "bad", "cvmfs/0/bad", "", &[labels[0], (LABEL_LAYER_DIGEST, "sha256:../..")]),
        known("a", "none", "cvmfs/0/none", "", &labels[..1]),
        known("a", "orphan", "cvmfs/0/orphan", "gone", &labels),
        known("a", "local", "a/1/local", "", &[]),
    ];
    let highest = highest_used_id(&[SnapshotId(12)], &all);
    assert_eq!(highest, SnapshotId(90));
    let local = HashSet::from(["a/1/local".to_owned()]);
    let accepted = chain_validation::validate(remote_candidates(&all, &local, highest, "r"));
    let names: Vec<_> =
        accepted.snapshots.iter().map(|s| (s.key.as_str(), s.parent.as_ref().map(Key::as_str))).collect();
    assert_eq!(names, [("cvmfs/0/c1", None), ("cvmfs/90/c2", Some("cvmfs/0/c1"))]);
    assert!(accepted.snapshots.iter().all(|s| s.id > highest && s.layer.as_ref().unwrap().repository == "r"));
    let reasons: Vec<&RejectReason> = accepted.rejected.iter().map(|one| &one.reason).collect();
    assert!(matches!(
        reasons[..],
        [
            RejectReason::OnlyInContainerd,
            RejectReason::Digest { .. },
            RejectReason::NoDigest,
            RejectReason::ParentMissing(_)
        ]
    ));
    // Two namespaces disagree on the snapshot of one name.
    let other = [(LABEL_REMOTE.0, LABEL_REMOTE.1), (LABEL_LAYER_DIGEST, digest.as_str())];
    let contradictory =
        [known("a", "x", "same", "", &other), known("b", "p", "p", "", &other), known("b", "x", "same", "p", &other)];
    let accepted = chain_validation::validate(remote_candidates(&contradictory, &HashSet::new(), SnapshotId(0), "r"));
    assert_eq!(accepted.snapshots.len(), 1);
    assert!(accepted.rejected.iter().all(|one| one.reason == RejectReason::SameKey));
}

#[test]
fn lost_snapshots_are_repaired_by_image_or_alone() {
    let image = |reference| [(LABEL_IMAGE_REF, reference)];
    let all = [
        known("k8s.io", "c1", "1", "", &image("r/a:1")),
        known("k8s.io", "c2", "2", "c1", &image("r/a:1")),
        known("k8s.io", "c3", "3", "c2", &image("r/b:1")),
        known("k8s.io", "d1", "4", "", &image("r/fine:1")),
        known("default", "e1", "5", "", &[]),
        known("default", "box", "6", "e1", &[]),
    ];
    let repairs = containerd::repairs(&all, &|name| ["1", "3", "4", "5"].contains(&name));
    let shown: Vec<String> = repairs.iter().map(|repair| format!("{repair:?}")).collect();
    assert_eq!(
        shown,
        [
            r#"Image { namespace: "k8s.io", reference: "r/a:1" }"#,
            r#"Image { namespace: "k8s.io", reference: "r/b:1" }"#,
            r#"Snapshot { namespace: "default", key: "box" }"#,
        ]
    );
}
