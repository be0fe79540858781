//! Reads the snapshots of one snapshotter from containerd's own metadata. Pure.
//!
//! It is a bbolt file with the buckets `v1`, namespace, `snapshots` and snapshotter. In the last one is a bucket for each
//! snapshot, under containerd's key, with `name` (our key), `parent` (containerd's key), labels and times.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::migration::bolt::{self, Database, Entries, Entry};
use crate::migration::go_encoding::{self, text, value};
use crate::model::{LABEL_IMAGE_REF, LABEL_REMOTE, LABEL_SNAPSHOT_REF, Labels, Timestamp};

/// A snapshot in containerd's metadata.
#[derive(Clone, Debug)]
pub struct ContainerdSnapshot {
    pub namespace: String,
    pub key: String,
    /// The key that we know it by.
    pub name: String,
    /// The key of the parent in the same namespace.
    pub parent: Option<String>,
    pub labels: Labels,
    pub created: Timestamp,
    pub updated: Timestamp,
}

impl ContainerdSnapshot {
    pub fn qualified_key(&self) -> (&str, &str) {
        (&self.namespace, &self.key)
    }

    pub fn is_remote(&self) -> bool {
        self.labels.contains_key(LABEL_REMOTE.0)
    }

    /// The labels that containerd passes on to a snapshotter.
    pub fn inherited_labels(&self) -> Labels {
        let inherited = |label: &str| label == LABEL_SNAPSHOT_REF || label.starts_with("containerd.io/snapshot/");
        self.labels.iter().filter(|(label, _)| inherited(label)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

pub fn read(bytes: &[u8], snapshotter: &str) -> bolt::Result<Vec<ContainerdSnapshot>> {
    let database = Database::parse(bytes)?;
    let mut root = database.read(&database.root())?;
    let mut snapshots = Vec::new();
    for (namespace, entry) in database.read_child(&mut root, b"v1")? {
        let (Ok(namespace), Entry::Bucket(bucket)) = (text(namespace), entry) else { continue };
        let mut objects = database.read(&bucket)?;
        let mut snapshotters = database.read_child(&mut objects, b"snapshots")?;
        for (key, entry) in database.read_child(&mut snapshotters, snapshotter.as_bytes())? {
            let Entry::Bucket(bucket) = entry else { continue };
            let mut fields = database.read(&bucket)?;
            let labels = database.read_child(&mut fields, b"labels")?;
            snapshots.extend(decode(namespace, key, &fields, &labels));
        }
    }
    Ok(snapshots)
}

/// None: containerd did not write it, because the names of its snapshots are text.
fn decode(namespace: &str, key: &[u8], fields: &Entries<'_>, labels: &Entries<'_>) -> Option<ContainerdSnapshot> {
    let string = |name| value(fields, name).and_then(|bytes| text(bytes).ok()).map(str::to_owned);
    let time = |name| value(fields, name).and_then(go_encoding::time).unwrap_or(Timestamp(0));
    Some(ContainerdSnapshot {
        namespace: namespace.to_owned(),
        key: text(key).ok()?.to_owned(),
        name: string(b"name")?,
        parent: string(b"parent").filter(|parent| !parent.is_empty()),
        labels: go_encoding::labels(labels).ok()?,
        created: time(b"createdat"),
        updated: time(b"updatedat"),
    })
}

/// An object of containerd that an administrator has to remove, because a part of it was not restored.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Repair {
    /// An image, which has to be pulled again.
    Image { namespace: String, reference: String },
    /// The snapshot of a container, or of an image that no label names.
    Snapshot { namespace: String, key: String },
}

/// What has to be removed so that no snapshot remains that was not restored.
pub fn repairs(known: &[ContainerdSnapshot], is_restored: &dyn Fn(&str) -> bool) -> Vec<Repair> {
    let by_key: HashMap<(&str, &str), &ContainerdSnapshot> =
        known.iter().map(|snapshot| (snapshot.qualified_key(), snapshot)).collect();
    let mut repairs = BTreeSet::new();
    // Snapshots that are removed together with an image.
    let mut covered: HashSet<(&str, &str)> = HashSet::new();
    for image in known {
        let Some(reference) = image.labels.get(LABEL_IMAGE_REF) else { continue };
        let mut chain: Vec<&ContainerdSnapshot> = Vec::new();
        let mut next = Some(image);
        // The bound on the length ends a circle.
        while let Some(layer) = next.filter(|_| chain.len() < known.len()) {
            chain.push(layer);
            next = layer.parent.as_ref().and_then(|parent| by_key.get(&(layer.namespace.as_str(), parent)).copied());
        }
        if chain.iter().any(|layer| !is_restored(&layer.name)) {
            covered.extend(chain.iter().map(|layer| layer.qualified_key()));
            repairs.insert(Repair::Image { namespace: image.namespace.clone(), reference: reference.clone() });
        }
    }
    for lost in known.iter().filter(|snapshot| !is_restored(&snapshot.name)) {
        if !covered.contains(&lost.qualified_key()) {
            repairs.insert(Repair::Snapshot { namespace: lost.namespace.clone(), key: lost.key.clone() });
        }
    }
    repairs.into_iter().collect()
}
