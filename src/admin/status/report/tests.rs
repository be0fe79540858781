use protobuf::EnumOrUnknown;

use super::*;

fn snapshot(id: u64, key: &str, parent: &str, kind: Kind, digest: &str) -> Snapshot {
    Snapshot {
        id,
        key: key.to_owned(),
        parent: parent.to_owned(),
        kind: EnumOrUnknown::new(kind),
        digest: digest.to_owned(),
        ..Snapshot::default()
    }
}

fn report(snapshots: &[Snapshot]) -> Report {
    let usages = snapshots.iter().map(|snapshot| (snapshot.id, 1000 * snapshot.id));
    let local: HashSet<u64> =
        snapshots.iter().filter(|snapshot| snapshot.digest.is_empty()).map(|snapshot| snapshot.id).collect();
    let usages = usages.filter(|(id, _)| local.contains(id)).collect();
    Report::new(&DescribeResponse::new(), snapshots, &usages, 2)
}

#[test]
fn images_are_snapshots_that_end_a_chain_or_have_containers() {
    let mut all = vec![
        snapshot(1, "base", "", Kind::COMMITTED, "sha256:1"),
        snapshot(2, "middle", "base", Kind::COMMITTED, "sha256:2"),
        snapshot(3, "top", "middle", Kind::COMMITTED, ""),
        snapshot(4, "container", "middle", Kind::ACTIVE, ""),
        snapshot(5, "view", "middle", Kind::VIEW, ""),
        snapshot(6, "alone", "", Kind::COMMITTED, ""),
        snapshot(7, "unpacking", "top", Kind::ACTIVE, ""),
    ];
    all[2].image = "example.org/a:1".to_owned();
    let report = report(&all);
    let images: Vec<_> = report
        .images
        .iter()
        .map(|i| (i.key.as_str(), i.layers, i.published, i.source, i.users.len(), i.bytes))
        .collect();
    assert_eq!(
        images,
        [
            ("alone", 1, 0, ImageOrigin::Local, 0, 6000),
            ("middle", 2, 2, ImageOrigin::Lazy, 2, 0),
            ("top", 3, 2, ImageOrigin::Mixed, 1, 3000),
        ]
    );
    assert_eq!(report.images[1].users, ["container", "view"]);
    let text = report.text();
    assert!(text.contains("\nexample.org/a:1 "), "{text}");
    assert!(text.contains("2 containers wrote 11.0 kB; 2 directories"), "{text}");
    let json: Value = serde_json::from_str(&report.json()).unwrap();
    assert_eq!(json["images"][2]["source"], "mixed");
    assert_eq!(json["images"][1]["used_by"], json!(["container", "view"]));
    assert_eq!(json["containers"][0], json!({"snapshot": "container", "bytes": 4000}));
}

#[test]
fn namespace_of_an_image_is_read_from_keys_of_containerd() {
    for (key, namespace) in [
        ("k8s.io/12/sha256:a", Some("k8s.io")),
        ("default/1/a/b", Some("default")),
        ("cvmfs/0/sha256:a", None),
        ("a/b/c", None),
        ("a/1", None),
    ] {
        assert_eq!(namespace_of(key), namespace, "{key}");
    }
}

#[test]
fn image_with_unavailable_layer_is_broken() {
    let mut base = snapshot(1, "base", "", Kind::COMMITTED, "sha256:1");
    let top = snapshot(2, "top", "base", Kind::COMMITTED, "sha256:2");
    assert_eq!(report(&[base.clone(), top.clone()]).images[0].broken, None);
    base.trouble = "gone".to_owned();
    assert_eq!(report(&[base, top]).images[0].broken, Some("gone".to_owned()));
}
