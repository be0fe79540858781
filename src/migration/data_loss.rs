//! Finds the images whose files are gone, and how to repair them. Pure.
//!
//! A new pull alone restores nothing, because containerd's own metadata still has the snapshots: the image and everything
//! that uses it must be removed first.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use crate::model::{Key, Kind, LABEL_IMAGE_REF, Quoted, Snapshot, SnapshotId, shell_quote_all};

/// The lost files of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLoss {
    pub object: AffectedObject,
    /// Number of layers that are not published.
    pub layers: usize,
    pub lost_layers: usize,
    /// Number of lost root file systems of containers, and of views.
    pub lost_containers: usize,
    /// The containerd namespaces that lost something.
    pub namespaces: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AffectedObject {
    Image(String),
    /// An image that no label names, by its uppermost layer.
    TopLayer(Key),
    /// A snapshot without a parent that a container uses.
    Container(Key),
}

impl AffectedObject {
    pub fn name(&self) -> &str {
        match self {
            Self::Image(image) => image,
            Self::TopLayer(key) | Self::Container(key) => key.as_str(),
        }
    }
}

impl ImageLoss {
    fn none(object: AffectedObject) -> Self {
        Self { object, layers: 0, lost_layers: 0, lost_containers: 0, namespaces: BTreeSet::new() }
    }

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
        let cause = "the Go snapshotter removed them when it was stopped";
        match &self.object {
            AffectedObject::Image(image) if self.lost_layers == 0 => {
                write!(f, "image {}: {lost}, {cause}: remove these containers (namespace {namespaces})", Quoted(image))
            }
            AffectedObject::Image(image) => write!(
                f,
                "image {0}: {lost}, {cause}: remove its pods and containers, then the image, with \"crictl rmi {1}\" \
                 or \"ctr -n {namespaces} images rm --sync {1}\", and pull it again",
                Quoted(image),
                shell_quote_all([image.as_str()])
            ),
            AffectedObject::TopLayer(top) => write!(
                f,
                "the image with the uppermost layer {top}: {lost}, {cause}: remove its containers, then the image, \
                 with \"ctr -n {namespaces} images rm --sync REFERENCE\" and all its other names, and pull it again"
            ),
            AffectedObject::Container(key) => write!(
                f,
                "the files of {key} are gone, {cause}: remove the container that it belongs to (namespace {namespaces})"
            ),
        }
    }
}

/// Finds what each image has lost. `snapshots` stand parents first; `has_files` says whether a local snapshot has its
/// files.
pub fn find_losses<E>(
    snapshots: &[Snapshot],
    mut has_files: impl FnMut(SnapshotId) -> Result<bool, E>,
) -> Result<Vec<ImageLoss>, E> {
    let mut lost = HashSet::new();
    for local in snapshots.iter().filter(|snapshot| snapshot.layer.is_none()) {
        if !has_files(local.id)? {
            lost.insert(local.id);
        }
    }
    if lost.is_empty() {
        return Ok(Vec::new());
    }
    let chains = Chains { snapshots, by_key: snapshots.iter().map(|snapshot| (&snapshot.key, snapshot)).collect() };
    let mut losses = BTreeMap::new();
    for (object, layers) in chains.images() {
        let local: Vec<&Snapshot> = layers.into_values().filter(|layer| layer.layer.is_none()).collect();
        for layer in local.iter().filter(|layer| lost.contains(&layer.id)) {
            let loss = losses.entry(object.clone()).or_insert_with(|| ImageLoss::none(object.clone()));
            loss.layers = local.len();
            loss.lost_layers += 1;
            loss.namespaces.extend(namespace(&layer.key));
        }
    }
    for container in snapshots.iter().filter(|s| s.kind != Kind::Committed && lost.contains(&s.id)) {
        let object = chains.image_of_container(container);
        let loss = losses.entry(object.clone()).or_insert_with(|| ImageLoss::none(object));
        loss.lost_containers += 1;
        loss.namespaces.extend(namespace(&container.key));
    }
    Ok(losses.into_values().collect())
}

struct Chains<'s> {
    snapshots: &'s [Snapshot],
    by_key: HashMap<&'s Key, &'s Snapshot>,
}

impl<'s> Chains<'s> {
    fn parent(&self, snapshot: &Snapshot) -> Option<&'s Snapshot> {
        self.by_key.get(snapshot.parent.as_ref()?).copied()
    }

    /// The layers of each image. An image consists of all layers that have its name and of all layers below them.
    fn images(&self) -> BTreeMap<AffectedObject, HashMap<SnapshotId, &'s Snapshot>> {
        let committed = || self.snapshots.iter().filter(|snapshot| snapshot.kind == Kind::Committed);
        let with_children: HashSet<&Key> = committed().filter_map(|layer| layer.parent.as_ref()).collect();
        let mut images: BTreeMap<_, HashMap<SnapshotId, &Snapshot>> = BTreeMap::new();
        for layer in committed() {
            let object = match layer.labels.get(LABEL_IMAGE_REF) {
                Some(image) => AffectedObject::Image(image.clone()),
                None if !with_children.contains(&layer.key) => AffectedObject::TopLayer(layer.key.clone()),
                None => continue,
            };
            let layers = images.entry(object).or_default();
            let mut next = Some(layer);
            while let Some(current) = next.filter(|layer| layers.insert(layer.id, layer).is_none()) {
                next = self.parent(current);
            }
        }
        images
    }

    /// The image by the nearest label with its name, or else by its uppermost layer.
    fn image_of_container(&self, container: &Snapshot) -> AffectedObject {
        let Some(top) = self.parent(container) else { return AffectedObject::Container(container.key.clone()) };
        let mut next = Some(top);
        while let Some(layer) = next {
            if let Some(image) = layer.labels.get(LABEL_IMAGE_REF) {
                return AffectedObject::Image(image.clone());
            }
            next = self.parent(layer);
        }
        AffectedObject::TopLayer(top.key.clone())
    }
}

/// The containerd namespace, which is the part of a name before the first slash.
fn namespace(key: &Key) -> Option<String> {
    let (namespace, rest) = key.as_str().split_once('/')?;
    rest.contains('/').then(|| namespace.to_owned())
}

#[cfg(test)]
mod tests;
