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
mod tests;
