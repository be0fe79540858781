use super::*;
use crate::model::testing::local_snapshot;
use crate::model::{Digest, Layer};

fn snapshot(id: u64, key: &str, parent: &str, kind: Kind, image: Option<&str>) -> Snapshot {
    let labels = image.map(|image| (LABEL_IMAGE_REF.to_owned(), image.to_owned())).into_iter().collect();
    Snapshot { parent: Key::parse_optional(parent).unwrap(), labels, ..local_snapshot(id, key, kind) }
}

fn lost(snapshots: &[Snapshot], there: &[u64]) -> Vec<String> {
    let losses = find_losses(snapshots, |id| Ok::<_, ()>(there.contains(&id.0))).unwrap();
    losses.iter().map(ImageLoss::to_string).collect()
}

#[test]
fn each_image_with_a_lost_layer_is_named_with_its_repair() {
    use Kind::{Active, Committed};
    let digest = Digest::parse(&format!("sha256:{}", "0".repeat(64))).unwrap();
    let remote = Layer { digest, repository: String::new() };
    let all = [
        Snapshot { layer: Some(remote), ..snapshot(1, "sha256:c1", "", Committed, Some("r/a:1")) },
        snapshot(2, "k8s.io/2/sha256:c2", "sha256:c1", Committed, Some("r/a:1")),
        // Another image with the same lower layers, which have the name of the image that was pulled first.
        snapshot(3, "k8s.io/3/sha256:c3", "k8s.io/2/sha256:c2", Committed, Some("r/b:1")),
        snapshot(4, "default/4/sha256:d1", "", Committed, None),
        snapshot(5, "default/5/sha256:d2", "default/4/sha256:d1", Committed, None),
        snapshot(6, "k8s.io/6/box", "k8s.io/3/sha256:c3", Active, None),
        snapshot(7, "default/7/empty", "", Active, None),
        snapshot(8, "default/8/fine", "", Active, None),
    ];
    let lines = lost(&all, &[3, 5, 8]);
    let [a, b, top_layer, container] = &lines[..] else { panic!("{lines:#?}") };
    assert!(a.starts_with("image \"r/a:1\": the files of 1 of its 1 downloaded layers and of 0 containers"), "{a}");
    assert!(a.contains("\"crictl rmi r/a:1\" or \"ctr -n k8s.io images rm --sync r/a:1\""), "{a}");
    assert!(b.starts_with("image \"r/b:1\": the files of 1 of its 2 downloaded layers and of 1 containers"), "{b}");
    assert!(top_layer.starts_with("the image with the uppermost layer \"default/5/sha256:d2\""), "{top_layer}");
    assert!(top_layer.contains("ctr -n default images rm --sync"), "{top_layer}");
    assert!(container.starts_with("the files of \"default/7/empty\" are gone"), "{container}");
    assert_eq!(lost(&all, &[2, 3, 4, 5, 6, 7, 8]), Vec::<String>::new());
    let [only] = &lost(&all, &[2, 3, 4, 5, 7, 8])[..] else { panic!("one loss") };
    assert!(only.ends_with("remove these containers (namespace k8s.io)"), "{only}");
}
