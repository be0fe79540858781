//! The report of `status`, made from what the daemon answered. Nothing here does any I/O.
//!
//! A snapshotter knows snapshots and no images. An image is shown for each committed snapshot that ends a chain, or that
//! has containers or views on it, with the reference that was pulled if containerd passed it on.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use serde_json::{Value, json};

use crate::admin::table::{age, size, table};
use crate::model::{Timestamp, printable};
use crate::proto::admin::snapshot::Kind;
use crate::proto::admin::{DescribeResponse, Repository, Snapshot};
use crate::repository::owners::Owners;
use crate::repository::{HIDE_ATTRIBUTES, Remedy, own_attributes};
use crate::server::convert;

const NANOS: i64 = 1_000_000_000;

/// Where the files of an image come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageOrigin {
    /// All layers are published.
    Lazy,
    /// Some layers were downloaded.
    Mixed,
    /// All layers were downloaded.
    Local,
}

impl ImageOrigin {
    fn as_str(self) -> &'static str {
        match self {
            Self::Lazy => "lazy",
            Self::Mixed => "mixed",
            Self::Local => "local",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The reference that was pulled.
    pub reference: Option<String>,
    /// The key of the uppermost snapshot.
    pub key: String,
    pub layers: usize,
    pub published: usize,
    pub source: ImageOrigin,
    /// The reason why no container can start on it.
    pub broken: Option<String>,
    /// The repository of the layer that is broken. None if that layer was downloaded.
    pub broken_in: Option<String>,
    /// A download helps: the layer is published in a way that the daemon cannot show.
    pub refused: bool,
    /// containerd's namespace, if a key of its snapshots tells it.
    pub namespace: Option<String>,
    /// Keys of the containers' snapshots and the views on it.
    pub users: Vec<String>,
    /// Bytes on disk of its downloaded layers, which other images may share.
    pub bytes: u64,
    /// Nanoseconds since 1970.
    pub created: i64,
}

#[derive(Clone, Debug)]
pub struct Report {
    daemon: DescribeResponse,
    pub images: Vec<Image>,
    /// The key of each container's snapshot, and the bytes that the container wrote.
    containers: Vec<(String, Option<u64>)>,
    snapshots: usize,
    leftovers: usize,
    now: i64,
}

pub fn is_committed(snapshot: &Snapshot) -> bool {
    snapshot.kind.enum_value() == Ok(Kind::COMMITTED)
}

impl Report {
    /// `usages` are bytes on disk by the ids of snapshots.
    pub fn new(
        daemon: &DescribeResponse,
        snapshots: &[Snapshot],
        usages: &HashMap<u64, u64>,
        leftovers: usize,
    ) -> Self {
        let by_key: HashMap<&str, &Snapshot> =
            snapshots.iter().map(|snapshot| (snapshot.key.as_str(), snapshot)).collect();
        let mut users: HashMap<&str, Vec<String>> = HashMap::new();
        let mut has_layer_above = HashSet::new();
        for snapshot in snapshots.iter().filter(|snapshot| !snapshot.parent.is_empty()) {
            if is_committed(snapshot) {
                has_layer_above.insert(snapshot.parent.as_str());
            } else {
                users.entry(&snapshot.parent).or_default().push(snapshot.key.clone());
            }
        }
        let is_image = |snapshot: &&Snapshot| {
            let key = snapshot.key.as_str();
            is_committed(snapshot) && (!has_layer_above.contains(key) || users.contains_key(key))
        };
        let mut images: Vec<Image> = snapshots
            .iter()
            .filter(is_image)
            .map(|top| image(top, &by_key, usages, users.get(top.key.as_str()).cloned().unwrap_or_default()))
            .collect();
        images.sort_by(|a, b| (&a.reference, &a.key).cmp(&(&b.reference, &b.key)));
        let writable = snapshots.iter().filter(|snapshot| snapshot.kind.enum_value() == Ok(Kind::ACTIVE));
        let mut containers: Vec<_> =
            writable.map(|snapshot| (snapshot.key.clone(), usages.get(&snapshot.id).copied())).collect();
        containers.sort();
        Self {
            daemon: daemon.clone(),
            images,
            containers,
            snapshots: snapshots.len(),
            leftovers,
            now: Timestamp::now().0,
        }
    }

    pub fn json(&self) -> String {
        let daemon = &self.daemon;
        let containers = self.containers.iter().map(|(key, bytes)| json!({"snapshot": key, "bytes": bytes}));
        let pulls = &daemon.pulls;
        let report = json!({
            "daemon": {
                "version": daemon.version,
                "pid": daemon.pid,
                "started": daemon.started / NANOS,
                "snapshots": daemon.snapshots,
                "attach": daemon.attach,
            },
            "repositories": daemon.repositories.iter().map(repository_json).collect::<Vec<Value>>(),
            "images": self.images.iter().map(image_json).collect::<Vec<Value>>(),
            "containers": containers.collect::<Vec<Value>>(),
            "snapshots": self.snapshots,
            "leftovers": self.leftovers,
            "layers_pulled_since_start": {
                "published": pulls.published,
                "not_published": pulls.not_published,
                "without_digest": pulls.unnamed,
                "failed": pulls.failed,
            },
        });
        format!("{report:#}\n")
    }

    pub fn text(&self) -> String {
        let daemon = &self.daemon;
        let pulls = &daemon.pulls;
        let mut text = format!(
            "cvmfs-snapshotter {}, process {}, for {}: {} snapshots in {}\n",
            daemon.version,
            daemon.pid,
            self.since(daemon.started),
            self.snapshots,
            daemon.snapshots
        );
        let downloaded = pulls.not_published + pulls.unnamed + pulls.failed;
        // Writing into memory cannot fail.
        let _ = writeln!(text, "layers pulled since then: {} published, {downloaded} downloaded\n", pulls.published);
        text.push_str(&self.repository_table());
        text.push_str(&self.repository_notes());
        text.push('\n');
        text.push_str(&self.image_table());
        for image in &self.images {
            if let Some(reason) = &image.broken {
                let remedy = if image.refused { format!("; {}", Remedy::Download) } else { String::new() };
                let _ = writeln!(text, "broken: {}: {}{remedy}", printable(name(image)), printable(reason));
            }
        }
        let written: u64 = self.containers.iter().filter_map(|(_, bytes)| *bytes).sum();
        let or_more = if self.containers.iter().any(|(_, bytes)| bytes.is_none()) { " or more" } else { "" };
        let _ = writeln!(
            text,
            "\n{} containers wrote {}{or_more}; {} directories wait for a cleanup (cvmfs-snapshotter gc)",
            self.containers.len(),
            size(written),
            self.leftovers
        );
        text
    }

    /// The lines below the table of repositories: owners and attributes, caches, and I/O errors.
    fn repository_notes(&self) -> String {
        let repositories = &self.daemon.repositories;
        let answering = repositories.iter().filter(|repository| repository.trouble.is_empty());
        let mut notes: String = answering.map(ownership_notes).collect();
        for repository in repositories.iter().filter(|repository| !repository.cache.is_empty()) {
            // Writing into memory cannot fail.
            let _ = writeln!(
                notes,
                "{}: its client's cache, {}, is on the file system of the snapshots, and containers that start can make that \
                 hang: cvmfs-snapshotter doctor",
                printable(&repository.name),
                printable(&repository.cache)
            );
        }
        for repository in repositories {
            if let Some(errors) = repository.io_errors.as_ref() {
                let _ = writeln!(
                    notes,
                    "{}: its client answered with an input/output error {} ago (host {}, proxy {}): cvmfs-snapshotter doctor",
                    printable(&repository.name),
                    self.since(errors.last),
                    printable(&errors.host),
                    printable(&errors.proxy)
                );
            }
        }
        notes
    }

    fn since(&self, then: i64) -> String {
        age(u64::try_from((self.now - then) / NANOS).unwrap_or(0))
    }

    fn repository_table(&self) -> String {
        let rows = self.daemon.repositories.iter().map(|repository| {
            let health = if repository.trouble.is_empty() { "answers" } else { repository.trouble.as_str() };
            [repository.name.clone(), repository.path.clone(), health.to_owned()]
        });
        table(["REPOSITORY", "AT", "HEALTH"], rows)
    }

    fn image_table(&self) -> String {
        let rows = self.images.iter().map(|image| {
            let source = if image.broken.is_some() { "broken" } else { image.source.as_str() };
            [
                name(image).to_owned(),
                image.layers.to_string(),
                image.published.to_string(),
                source.to_owned(),
                image.users.len().to_string(),
                size(image.bytes),
                self.since(image.created),
            ]
        });
        table(["IMAGE", "LAYERS", "PUBLISHED", "SOURCE", "USED BY", "ON DISK", "AGE"], rows)
    }
}

fn name(image: &Image) -> &str {
    image.reference.as_deref().unwrap_or(&image.key)
}

fn repository_json(repository: &Repository) -> Value {
    json!({
        "name": repository.name,
        "path": repository.path,
        "answers": repository.trouble.is_empty(),
        "trouble": none_if_empty(&repository.trouble),
        "cache_on_state_file_system": none_if_empty(&repository.cache),
        "server_unreachable": repository.server_outage.as_ref().map(|outage| json!({
            "host": outage.host,
            "proxy": outage.proxy,
            "since": outage.since / NANOS,
        })),
        "client_io_errors": repository.io_errors.as_ref().map(|errors| json!({
            "count": errors.count,
            "last": errors.last / NANOS,
            "host": errors.host,
            "proxy": errors.proxy,
        })),
        "owners": owners_json(repository),
        "lists_own_attributes": repository.lists_own_attributes,
    })
}

fn image_json(image: &Image) -> Value {
    json!({
        "image": image.reference,
        "snapshot": image.key,
        "layers": image.layers,
        "published": image.published,
        "source": image.source.as_str(),
        "broken": image.broken,
        "remedy": image.refused.then(|| Remedy::Download.to_string()),
        "used_by": image.users,
        "bytes": image.bytes,
        "created": image.created / NANOS,
    })
}

/// The lines about the owners and the attributes of the files in a repository.
fn ownership_notes(repository: &Repository) -> String {
    let (owners, name) = (convert::owners(repository), printable(&repository.name));
    let mut text = format!("{}\n", owners.describe(&name));
    if let Some(remedy) = owners.remedy(&name) {
        let _ = writeln!(text, "  {remedy}");
    }
    if repository.lists_own_attributes {
        let _ = writeln!(text, "{}\n  {}", own_attributes(&name), HIDE_ATTRIBUTES);
    }
    text
}

/// The state of the owners in a repository, and the owner if all files have the same.
fn owners_json(repository: &Repository) -> Value {
    let (state, owner) = match convert::owners(repository) {
        Owners::Kept => ("kept", None),
        Owners::Claimed(owner) => ("claimed", Some(owner)),
        Owners::Lost(owner) => ("lost", Some(owner)),
        Owners::Undecided(owner) => ("undecided", Some(owner)),
        Owners::Unknown => ("unknown", None),
    };
    json!({"state": state, "uid": owner.map(|owner| owner.uid), "gid": owner.map(|owner| owner.gid)})
}

fn none_if_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// The namespace in a key of containerd, which is `namespace/number/name`. Keys that this snapshotter made begin with
/// `cvmfs`.
fn namespace_of(key: &str) -> Option<&str> {
    let mut parts = key.splitn(3, '/');
    let (namespace, number) = (parts.next()?, parts.next()?);
    let is_from_containerd = namespace != "cvmfs" && number.parse::<u64>().is_ok() && parts.next().is_some();
    is_from_containerd.then_some(namespace)
}

fn image(
    top: &Snapshot,
    by_key: &HashMap<&str, &Snapshot>,
    usages: &HashMap<u64, u64>,
    mut users: Vec<String>,
) -> Image {
    users.sort();
    let mut chain = vec![top];
    while let Some(parent) = chain.last().and_then(|snapshot| by_key.get(snapshot.parent.as_str())) {
        chain.push(parent);
    }
    let published = chain.iter().filter(|snapshot| !snapshot.digest.is_empty()).count();
    let broken = chain.iter().find(|snapshot| !snapshot.trouble.is_empty());
    let mut keys = users.iter().map(String::as_str).chain(chain.iter().map(|snapshot| snapshot.key.as_str()));
    let namespace = keys.find_map(namespace_of).map(str::to_owned);
    Image {
        reference: none_if_empty(&top.image).map(str::to_owned),
        key: top.key.clone(),
        layers: chain.len(),
        published,
        source: match published {
            0 => ImageOrigin::Local,
            all if all == chain.len() => ImageOrigin::Lazy,
            _ => ImageOrigin::Mixed,
        },
        broken: broken.map(|snapshot| snapshot.trouble.clone()),
        broken_in: broken.and_then(|snapshot| none_if_empty(&snapshot.repository)).map(str::to_owned),
        refused: broken.is_some_and(|snapshot| snapshot.refused),
        namespace,
        users,
        bytes: chain.iter().filter_map(|snapshot| usages.get(&snapshot.id)).sum(),
        created: top.created,
    }
}

#[cfg(test)]
mod tests;
