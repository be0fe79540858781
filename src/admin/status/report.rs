//! What a status says, from what the daemon answered. Pure.
//!
//! A snapshotter knows snapshots and no images: an image is shown for each committed snapshot that
//! ends a chain, or that a container stands on, under the reference that was pulled, if containerd
//! said it.
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
    /// All its layers are published.
    Lazy,
    /// Some were downloaded.
    Mixed,
    /// All were.
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
    /// Of the uppermost snapshot.
    pub key: String,
    pub layers: usize,
    pub published: usize,
    pub source: ImageOrigin,
    /// Why no container can start on it.
    pub broken: Option<String>,
    /// The repository of what that is about; none, if it was downloaded.
    pub broken_in: Option<String>,
    /// It can be had by a download: the daemon cannot show it as it is published.
    pub refused: bool,
    /// containerd's namespace, as far as keys of its snapshots tell.
    pub namespace: Option<String>,
    /// Keys of the snapshots of containers, and of views, on it.
    pub users: Vec<String>,
    /// Bytes of its downloaded layers on this node's disk; others may share them.
    pub bytes: u64,
    /// Nanoseconds since 1970.
    pub created: i64,
}

#[derive(Clone, Debug)]
pub struct Report {
    daemon: DescribeResponse,
    pub images: Vec<Image>,
    /// What containers wrote: key and bytes.
    containers: Vec<(String, Option<u64>)>,
    snapshots: usize,
    leftovers: usize,
    now: i64,
}

pub fn is_committed(one: &Snapshot) -> bool {
    one.kind.enum_value() == Ok(Kind::COMMITTED)
}

impl Report {
    /// `usages`: bytes, by the ids of snapshots.
    pub fn new(
        daemon: &DescribeResponse,
        snapshots: &[Snapshot],
        usages: &HashMap<u64, u64>,
        leftovers: usize,
    ) -> Self {
        let by_key: HashMap<&str, &Snapshot> = snapshots.iter().map(|one| (one.key.as_str(), one)).collect();
        let mut users: HashMap<&str, Vec<String>> = HashMap::new();
        let mut has_layer_above = HashSet::new();
        for one in snapshots.iter().filter(|one| !one.parent.is_empty()) {
            if is_committed(one) {
                has_layer_above.insert(one.parent.as_str());
            } else {
                users.entry(&one.parent).or_default().push(one.key.clone());
            }
        }
        let is_image = |one: &&Snapshot| {
            let key = one.key.as_str();
            is_committed(one) && (!has_layer_above.contains(key) || users.contains_key(key))
        };
        let mut images: Vec<Image> = snapshots
            .iter()
            .filter(is_image)
            .map(|top| image(top, &by_key, usages, users.get(top.key.as_str()).cloned().unwrap_or_default()))
            .collect();
        images.sort_by(|a, b| (&a.reference, &a.key).cmp(&(&b.reference, &b.key)));
        let writable = snapshots.iter().filter(|one| one.kind.enum_value() == Ok(Kind::ACTIVE));
        let mut containers: Vec<_> = writable.map(|one| (one.key.clone(), usages.get(&one.id).copied())).collect();
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
        let repositories = daemon.repositories.iter().map(|one| {
            json!({
                "name": one.name,
                "path": one.path,
                "answers": one.trouble.is_empty(),
                "trouble": none_if_empty(&one.trouble),
                "cache_on_state_file_system": none_if_empty(&one.cache),
                "server_unreachable": one.server_outage.as_ref().map(|outage| json!({
                    "host": outage.host,
                    "proxy": outage.proxy,
                    "since": outage.since / NANOS,
                })),
                "client_io_errors": one.io_errors.as_ref().map(|errors| json!({
                    "count": errors.count,
                    "last": errors.last / NANOS,
                    "host": errors.host,
                    "proxy": errors.proxy,
                })),
                "owners": owners(one),
                "lists_own_attributes": one.lists_own_attributes,
            })
        });
        let images = self.images.iter().map(|one| {
            json!({
                "image": one.reference,
                "snapshot": one.key,
                "layers": one.layers,
                "published": one.published,
                "source": one.source.as_str(),
                "broken": one.broken,
                "remedy": one.refused.then(|| Remedy::Download.to_string()),
                "used_by": one.users,
                "bytes": one.bytes,
                "created": one.created / NANOS,
            })
        });
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
            "repositories": repositories.collect::<Vec<Value>>(),
            "images": images.collect::<Vec<Value>>(),
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
        let mut text = String::new();
        // Writing into memory cannot fail.
        let _ = writeln!(
            text,
            "cvmfs-snapshotter {}, process {}, for {}: {} snapshots in {}",
            daemon.version,
            daemon.pid,
            self.since(daemon.started),
            self.snapshots,
            daemon.snapshots
        );
        let downloaded = pulls.not_published + pulls.unnamed + pulls.failed;
        let _ = writeln!(text, "layers pulled since then: {} published, {downloaded} downloaded", pulls.published);
        text.push('\n');
        text.push_str(&table(&self.repositories()));
        for one in daemon.repositories.iter().filter(|one| one.trouble.is_empty()) {
            text.push_str(&sample(one));
        }
        for one in daemon.repositories.iter().filter(|one| !one.cache.is_empty()) {
            let _ = writeln!(
                text,
                "{}: its client's cache, {}, is on the file system of the snapshots, and containers that start can make that \
                 hang: cvmfs-snapshotter doctor",
                printable(&one.name),
                printable(&one.cache)
            );
        }
        for one in &daemon.repositories {
            if let Some(errors) = one.io_errors.as_ref() {
                let _ = writeln!(
                    text,
                    "{}: its client answered with an input/output error {} ago (host {}, proxy {}): cvmfs-snapshotter doctor",
                    printable(&one.name),
                    self.since(errors.last),
                    printable(&errors.host),
                    printable(&errors.proxy)
                );
            }
        }
        text.push('\n');
        text.push_str(&table(&self.image_rows()));
        for one in &self.images {
            if let Some(why) = &one.broken {
                let remedy = if one.refused { format!("; {}", Remedy::Download) } else { String::new() };
                let _ = writeln!(text, "broken: {}: {}{remedy}", printable(name(one)), printable(why));
            }
        }
        let written: u64 = self.containers.iter().filter_map(|(_, bytes)| *bytes).sum();
        let _ = writeln!(
            text,
            "\n{} containers wrote {}; {} directories wait for a cleanup (cvmfs-snapshotter gc)",
            self.containers.len(),
            if self.containers.iter().any(|(_, bytes)| bytes.is_none()) {
                format!("{} or more", size(written))
            } else {
                size(written)
            },
            self.leftovers
        );
        text
    }

    fn since(&self, then: i64) -> String {
        age(u64::try_from((self.now - then) / NANOS).unwrap_or(0))
    }

    fn repositories(&self) -> Vec<Vec<String>> {
        let row = |one: &Repository| {
            let health = if one.trouble.is_empty() { "answers" } else { one.trouble.as_str() };
            vec![one.name.clone(), one.path.clone(), health.to_owned()]
        };
        [["REPOSITORY", "AT", "HEALTH"].map(str::to_owned).to_vec()]
            .into_iter()
            .chain(self.daemon.repositories.iter().map(row))
            .collect()
    }

    fn image_rows(&self) -> Vec<Vec<String>> {
        let head = ["IMAGE", "LAYERS", "PUBLISHED", "SOURCE", "USED BY", "ON DISK", "AGE"];
        let row = |one: &Image| {
            let source = if one.broken.is_some() { "broken" } else { one.source.as_str() };
            vec![
                name(one).to_owned(),
                one.layers.to_string(),
                one.published.to_string(),
                source.to_owned(),
                one.users.len().to_string(),
                size(one.bytes),
                self.since(one.created),
            ]
        };
        [head.map(str::to_owned).to_vec()].into_iter().chain(self.images.iter().map(row)).collect()
    }
}

fn name(image: &Image) -> &str {
    image.reference.as_deref().unwrap_or(&image.key)
}

/// What is known of the owners and the attributes in a repository.
fn sample(one: &Repository) -> String {
    let (owners, name) = (convert::owners(one), printable(&one.name));
    let mut text = format!("{}\n", owners.describe(&name));
    if let Some(remedy) = owners.remedy(&name) {
        let _ = writeln!(text, "  {remedy}");
    }
    if one.lists_own_attributes {
        let _ = writeln!(text, "{}\n  {}", own_attributes(&name), HIDE_ATTRIBUTES);
    }
    text
}

/// The state of the owners in a repository, and the one owner if there is one.
fn owners(one: &Repository) -> Value {
    let (state, owner) = match convert::owners(one) {
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

/// containerd's keys are `namespace/number/name`; ours begin with another word.
fn namespace_of(key: &str) -> Option<&str> {
    let mut parts = key.splitn(3, '/');
    let (namespace, number) = (parts.next()?, parts.next()?);
    let is_containerds = namespace != "cvmfs" && number.parse::<u64>().is_ok() && parts.next().is_some();
    is_containerds.then_some(namespace)
}

fn image(
    top: &Snapshot,
    by_key: &HashMap<&str, &Snapshot>,
    usages: &HashMap<u64, u64>,
    mut users: Vec<String>,
) -> Image {
    users.sort();
    let mut chain = vec![top];
    while let Some(parent) = chain.last().and_then(|one| by_key.get(one.parent.as_str())) {
        chain.push(parent);
    }
    let published = chain.iter().filter(|one| !one.digest.is_empty()).count();
    let broken = chain.iter().find(|one| !one.trouble.is_empty());
    let mut keys = users.iter().map(String::as_str).chain(chain.iter().map(|one| one.key.as_str()));
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
        broken: broken.map(|one| one.trouble.clone()),
        broken_in: broken.and_then(|one| none_if_empty(&one.repository)).map(str::to_owned),
        refused: broken.is_some_and(|one| one.refused),
        namespace,
        users,
        bytes: chain.iter().filter_map(|one| usages.get(&one.id)).sum(),
        created: top.created,
    }
}

#[cfg(test)]
mod tests {
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
        let usages = snapshots.iter().map(|one| (one.id, 1000 * one.id));
        let local: HashSet<u64> = snapshots.iter().filter(|one| one.digest.is_empty()).map(|one| one.id).collect();
        let usages = usages.filter(|(id, _)| local.contains(id)).collect();
        Report::new(&DescribeResponse::new(), snapshots, &usages, 2)
    }

    #[test]
    fn an_image_is_what_ends_a_chain_or_what_a_container_stands_on() {
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
        let found: Vec<_> = report
            .images
            .iter()
            .map(|i| (i.key.as_str(), i.layers, i.published, i.source, i.users.len(), i.bytes))
            .collect();
        assert_eq!(
            found,
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
    fn the_namespace_of_an_image_is_in_the_keys_of_what_containerd_named() {
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
    fn an_image_is_broken_if_a_layer_of_it_cannot_be_had() {
        let mut base = snapshot(1, "base", "", Kind::COMMITTED, "sha256:1");
        let top = snapshot(2, "top", "base", Kind::COMMITTED, "sha256:2");
        assert_eq!(report(&[base.clone(), top.clone()]).images[0].broken, None);
        base.trouble = "gone".to_owned();
        assert_eq!(report(&[base, top]).images[0].broken, Some("gone".to_owned()));
    }
}
