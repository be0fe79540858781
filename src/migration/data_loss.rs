//! Which images have lost files, and what repairs them. Pure.
//!
//! containerd's own metadata still has the snapshots, so a new pull alone brings nothing back:
//! the image and all that stands on it must go first.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use crate::model::{Key, Kind, LABEL_IMAGE_REF, Quoted, Snapshot, SnapshotId, shell_quote_all};

/// What an image has lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLoss {
    pub subject: AffectedObject,
    /// So many layers it has that are not published.
    pub layers: usize,
    pub lost_layers: usize,
    /// Root file systems of containers that are gone, and views.
    pub lost_containers: usize,
    /// Those of containerd that what was lost is in.
    pub namespaces: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AffectedObject {
    Image(String),
    /// No label says which image it is: the uppermost layer.
    Chain(Key),
    /// A container's own, that stands on nothing.
    Alone(Key),
}

impl ImageLoss {
    pub fn lost_files(&self) -> usize {
        self.lost_layers + self.lost_containers
    }
}

impl fmt::Display for ImageLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let namespaces: Vec<&str> = self.namespaces.iter().map(String::as_str).collect();
        let namespaces = if namespaces.is_empty() { "NAMESPACE".to_owned() } else { namespaces.join(" and ") };
        let lost = format!(
            "the files of {} of its {} downloaded layers and of {} containers are gone",
            self.lost_layers, self.layers, self.lost_containers
        );
        let cannot = "the Go snapshotter removed them when it was stopped";
        match &self.subject {
            AffectedObject::Image(image) if self.lost_layers == 0 => {
                write!(f, "image {}: {lost}, {cannot}: remove these containers (namespace {namespaces})", Quoted(image))
            }
            AffectedObject::Image(image) => write!(
                f,
                "image {0}: {lost}, {cannot}: remove its pods and containers, then the image, with \"crictl rmi {1}\" \
                 or \"ctr -n {namespaces} images rm --sync {1}\", and pull it again",
                Quoted(image),
                shell_quote_all([image.as_str()])
            ),
            AffectedObject::Chain(top) => write!(
                f,
                "the image with the uppermost layer {top}: {lost}, {cannot}: remove its containers, then the image, \
                 with \"ctr -n {namespaces} images rm --sync REFERENCE\" and all its other names, and pull it again"
            ),
            AffectedObject::Alone(key) => write!(
                f,
                "the files of {key} are gone, {cannot}: remove the container that it belongs to (namespace {namespaces})"
            ),
        }
    }
}

/// What each image has lost, if anything. `snapshots` stand parents first; `is_there` says
/// whether a local one has its files.
pub fn find_losses<E>(
    snapshots: &[Snapshot],
    mut is_there: impl FnMut(SnapshotId) -> Result<bool, E>,
) -> Result<Vec<ImageLoss>, E> {
    let mut lost = HashSet::new();
    for local in snapshots.iter().filter(|snapshot| snapshot.layer.is_none()) {
        if !is_there(local.id)? {
            lost.insert(local.id);
        }
    }
    if lost.is_empty() {
        return Ok(Vec::new());
    }
    let by_key: HashMap<&Key, &Snapshot> = snapshots.iter().map(|s| (&s.key, s)).collect();
    let parent = |snapshot: &Snapshot| snapshot.parent.as_ref().and_then(|key| by_key.get(key).copied());
    let mut tops: HashSet<&Key> =
        snapshots.iter().filter(|s| s.kind == Kind::Committed).map(|snapshot| &snapshot.key).collect();
    for layer in snapshots.iter().filter(|s| s.kind == Kind::Committed) {
        layer.parent.as_ref().map(|below| tops.remove(below));
    }
    // The layers of an image are all below any that carries its name, and that one.
    let mut layers: BTreeMap<AffectedObject, HashMap<SnapshotId, &Snapshot>> = BTreeMap::new();
    for layer in snapshots.iter().filter(|s| s.kind == Kind::Committed) {
        let subject = match layer.labels.get(LABEL_IMAGE_REF) {
            Some(image) => AffectedObject::Image(image.clone()),
            None if tops.contains(&layer.key) => AffectedObject::Chain(layer.key.clone()),
            None => continue,
        };
        let known = layers.entry(subject).or_default();
        let mut next = Some(layer);
        while let Some(at) = next.filter(|at| known.insert(at.id, at).is_none()) {
            next = parent(at);
        }
    }
    let mut losses: BTreeMap<AffectedObject, ImageLoss> = BTreeMap::new();
    for (subject, layers) in layers {
        let local: Vec<&&Snapshot> = layers.values().filter(|layer| layer.layer.is_none()).collect();
        let gone: Vec<&&&Snapshot> = local.iter().filter(|layer| lost.contains(&layer.id)).collect();
        if !gone.is_empty() {
            let namespaces = gone.iter().filter_map(|layer| namespace(&layer.key)).collect();
            let (layers, lost_layers) = (local.len(), gone.len());
            losses.insert(subject.clone(), ImageLoss { subject, layers, lost_layers, lost_containers: 0, namespaces });
        }
    }
    for container in snapshots.iter().filter(|s| s.kind != Kind::Committed && lost.contains(&s.id)) {
        let mut subject = AffectedObject::Alone(container.key.clone());
        let mut next = parent(container);
        while let Some(at) = next {
            if let Some(image) = at.labels.get(LABEL_IMAGE_REF) {
                subject = AffectedObject::Image(image.clone());
                break;
            }
            if matches!(subject, AffectedObject::Alone(_)) {
                subject = AffectedObject::Chain(at.key.clone());
            }
            next = parent(at);
        }
        let loss = losses.entry(subject.clone()).or_insert_with(|| ImageLoss {
            subject,
            layers: 0,
            lost_layers: 0,
            lost_containers: 0,
            namespaces: BTreeSet::new(),
        });
        loss.lost_containers += 1;
        loss.namespaces.extend(namespace(&container.key));
    }
    Ok(losses.into_values().collect())
}

/// containerd puts it before the first slash of a name.
fn namespace(key: &Key) -> Option<String> {
    let (namespace, rest) = key.as_str().split_once('/')?;
    rest.contains('/').then(|| namespace.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Digest, Labels, Layer, Timestamp};

    fn snapshot(id: u64, key: &str, parent: &str, kind: Kind, image: Option<&str>) -> Snapshot {
        let labels: Labels = image.map(|image| (LABEL_IMAGE_REF.to_owned(), image.to_owned())).into_iter().collect();
        Snapshot {
            id: SnapshotId(id),
            key: Key::parse(key).unwrap(),
            parent: Key::parse_optional(parent).unwrap(),
            kind,
            created: Timestamp(0),
            updated: Timestamp(0),
            labels,
            layer: None,
            usage: None,
        }
    }

    fn lost(snapshots: &[Snapshot], there: &[u64]) -> Vec<String> {
        let losses = find_losses(snapshots, |id| Ok::<_, ()>(there.contains(&id.0))).unwrap();
        losses.iter().map(ImageLoss::to_string).collect()
    }

    #[test]
    fn every_image_that_has_a_lost_layer_is_named_with_its_repair() {
        use Kind::{Active, Committed};
        let digest = Digest::parse(&format!("sha256:{}", "0".repeat(64))).unwrap();
        let remote = Layer { digest, repository: String::new() };
        let all = [
            Snapshot { layer: Some(remote), ..snapshot(1, "sha256:c1", "", Committed, Some("r/a:1")) },
            snapshot(2, "k8s.io/2/sha256:c2", "sha256:c1", Committed, Some("r/a:1")),
            // Another image on the same layer, which carries the name of the first that was pulled.
            snapshot(3, "k8s.io/3/sha256:c3", "k8s.io/2/sha256:c2", Committed, Some("r/b:1")),
            snapshot(4, "default/4/sha256:d1", "", Committed, None),
            snapshot(5, "default/5/sha256:d2", "default/4/sha256:d1", Committed, None),
            snapshot(6, "k8s.io/6/box", "k8s.io/3/sha256:c3", Active, None),
            snapshot(7, "default/7/empty", "", Active, None),
            snapshot(8, "default/8/fine", "", Active, None),
        ];
        let lines = lost(&all, &[3, 5, 8]);
        let [a, b, chain, alone] = &lines[..] else { panic!("{lines:#?}") };
        assert!(a.starts_with("image \"r/a:1\": the files of 1 of its 1 downloaded layers and of 0 containers"), "{a}");
        assert!(a.contains("\"crictl rmi r/a:1\" or \"ctr -n k8s.io images rm --sync r/a:1\""), "{a}");
        assert!(b.starts_with("image \"r/b:1\": the files of 1 of its 2 downloaded layers and of 1 containers"), "{b}");
        assert!(chain.starts_with("the image with the uppermost layer \"default/5/sha256:d2\""), "{chain}");
        assert!(chain.contains("ctr -n default images rm --sync"), "{chain}");
        assert!(alone.starts_with("the files of \"default/7/empty\" are gone"), "{alone}");
        assert_eq!(lost(&all, &[2, 3, 4, 5, 6, 7, 8]), Vec::<String>::new());
        let [only] = &lost(&all, &[2, 3, 4, 5, 7, 8])[..] else { panic!("one loss") };
        assert!(only.ends_with("remove these containers (namespace k8s.io)"), "{only}");
    }
}
