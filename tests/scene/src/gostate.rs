//! The state of a Go snapshotter, written by the libraries that it is made of.

use std::collections::BTreeMap;
use std::path::Path;

use crate::process::{run, tool};

/// What containerd's storage package says of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub id: u64,
    pub name: String,
    pub parent: String,
    /// As in containerd's filters.
    pub kind: String,
    /// Nanoseconds since 1970.
    pub created: i64,
    pub updated: i64,
    pub labels: BTreeMap<String, String>,
    pub size: i64,
    pub inodes: i64,
    /// Of active snapshots and views: the ids of the chain below, nearest first.
    pub parents: Vec<u64>,
}

impl Record {
    pub fn is_remote(&self) -> bool {
        self.labels.contains_key("containerd.io/snapshot/remote")
    }
}

/// Writes `what` (small, large or odd) below a state root; the result is what is in it.
#[track_caller]
pub fn write(what: &str, root: &Path) -> Vec<Record> {
    let home = root.join("snapshotter").display().to_string();
    let json = run(tool("gostate"), [what, &home]).ok();
    let all: serde_json::Value = serde_json::from_str(&json).expect("gostate prints JSON");
    all.as_array().expect("a list of records").iter().map(record).collect()
}

fn record(json: &serde_json::Value) -> Record {
    let text = |name: &str| json[name].as_str().unwrap_or_default().to_owned();
    let number = |name: &str| text(name).parse().expect("a number in a string");
    let labels = json["labels"].as_object().into_iter().flatten();
    let parents = json["parents"].as_array().into_iter().flatten();
    Record {
        id: text("id").parse().expect("an id is a number"),
        name: text("name"),
        parent: text("parent"),
        kind: text("kind"),
        created: number("created"),
        updated: number("updated"),
        labels: labels.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect(),
        size: json["size"].as_i64().expect("a size"),
        inodes: json["inodes"].as_i64().expect("a number of inodes"),
        parents: parents.map(|id| id.as_str().and_then(|id| id.parse().ok()).expect("an id")).collect(),
    }
}
