//! What containerd's own metadata says of our snapshots. Pure.
//!
//! A bbolt file: `v1`, namespace, `snapshots`, snapshotter, and there a bucket for each snapshot
//! by containerd's key, with `name` (our key), `parent` (containerd's key), labels and times.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::migration::bolt::{self, Database, Entry};
use crate::migration::takeover::{text, text_labels, time};
use crate::model::{LABEL_IMAGE_REF, LABEL_REMOTE, LABEL_SNAPSHOT_REF, Labels, Timestamp};

/// A snapshot as containerd knows it.
#[derive(Clone, Debug)]
pub struct KnownSnapshot {
    pub namespace: String,
    pub key: String,
    /// Our key.
    pub name: String,
    /// A key of containerd's, in the same namespace.
    pub parent: Option<String>,
    pub labels: Labels,
    pub created: Timestamp,
    pub updated: Timestamp,
}

impl KnownSnapshot {
    pub fn is_remote(&self) -> bool {
        self.labels.contains_key(LABEL_REMOTE.0)
    }

    /// Those that containerd passes on to a snapshotter.
    pub fn inherited_labels(&self) -> Labels {
        let inherited = |label: &str| label == LABEL_SNAPSHOT_REF || label.starts_with("containerd.io/snapshot/");
        self.labels.iter().filter(|(label, _)| inherited(label)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

pub fn read(bytes: &[u8], snapshotter: &str) -> bolt::Result<Vec<KnownSnapshot>> {
    let bolt = Database::parse(bytes)?;
    let mut root = bolt.read(&bolt.root())?;
    let mut known = Vec::new();
    for (namespace, entry) in bolt.read_in(&mut root, b"v1")? {
        let Entry::Bucket(bucket) = entry else { continue };
        let Ok(namespace) = text(namespace) else { continue };
        let mut objects = bolt.read(&bucket)?;
        let mut snapshotters = bolt.read_in(&mut objects, b"snapshots")?;
        for (key, entry) in bolt.read_in(&mut snapshotters, snapshotter.as_bytes())? {
            let Entry::Bucket(bucket) = entry else { continue };
            let mut fields = bolt.read(&bucket)?;
            let labels = bolt.read_in(&mut fields, b"labels")?;
            let value = |name: &[u8]| match fields.get(name) {
                Some(Entry::Value(value)) => Some(*value),
                _ => None,
            };
            let word = |name: &[u8]| value(name).and_then(|bytes| text(bytes).ok()).map(str::to_owned);
            // containerd writes text; of anything else there is nothing to say.
            let (Ok(key), Some(name), Ok(labels)) = (text(key), word(b"name"), text_labels(&labels)) else { continue };
            known.push(KnownSnapshot {
                namespace: namespace.to_owned(),
                key: key.to_owned(),
                name,
                parent: word(b"parent").filter(|parent| !parent.is_empty()),
                labels,
                created: value(b"createdat").and_then(time).unwrap_or(Timestamp(0)),
                updated: value(b"updatedat").and_then(time).unwrap_or(Timestamp(0)),
            });
        }
    }
    Ok(known)
}

/// Something that an admin has to remove, because part of it is not kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Repair {
    /// And to pull again.
    Image { namespace: String, reference: String },
    /// A container's, or of an image that no label names.
    Snapshot { namespace: String, key: String },
}

/// What to do about the snapshots of containerd that are not kept.
pub fn repairs(known: &[KnownSnapshot], is_kept: &dyn Fn(&str) -> bool) -> Vec<Repair> {
    let by_key: HashMap<(&str, &str), &KnownSnapshot> =
        known.iter().map(|one| ((one.namespace.as_str(), one.key.as_str()), one)).collect();
    let mut repairs = BTreeSet::new();
    // What an image that is to be removed takes along.
    let mut covered: HashSet<(&str, &str)> = HashSet::new();
    for image in known {
        let Some(reference) = image.labels.get(LABEL_IMAGE_REF) else { continue };
        let mut chain: Vec<&KnownSnapshot> = Vec::new();
        let mut next = Some(image);
        // A circle is no longer than all there is.
        while let Some(at) = next.filter(|_| chain.len() < known.len()) {
            chain.push(at);
            next = at.parent.as_ref().and_then(|parent| by_key.get(&(at.namespace.as_str(), parent)).copied());
        }
        if chain.iter().any(|layer| !is_kept(&layer.name)) {
            covered.extend(chain.iter().map(|layer| (layer.namespace.as_str(), layer.key.as_str())));
            repairs.insert(Repair::Image { namespace: image.namespace.clone(), reference: reference.clone() });
        }
    }
    for lost in known.iter().filter(|one| !is_kept(&one.name)) {
        if !covered.contains(&(lost.namespace.as_str(), lost.key.as_str())) {
            repairs.insert(Repair::Snapshot { namespace: lost.namespace.clone(), key: lost.key.clone() });
        }
    }
    repairs.into_iter().collect()
}
