//! The state root of a Go snapshotter, written by the program `gostate`, which uses the libraries of the Go snapshotter.

use std::collections::BTreeMap;
use std::path::Path;

use crate::process::{run, tool};

/// A snapshot, as containerd's storage package returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub id: u64,
    pub name: String,
    pub parent: String,
    /// The word for the kind that containerd's filters use.
    pub kind: String,
    /// Nanoseconds since 1970.
    pub created: i64,
    pub updated: i64,
    pub labels: BTreeMap<String, String>,
    pub size: i64,
    pub inodes: i64,
    /// The ids of the chain below, nearest first; empty for committed snapshots.
    pub parents: Vec<u64>,
}

impl Record {
    pub fn is_remote(&self) -> bool {
        self.labels.contains_key("containerd.io/snapshot/remote")
    }
}

/// Writes the state `name` (small, large or odd) below a state root. The result is its snapshots.
#[track_caller]
pub fn write(name: &str, root: &Path) -> Vec<Record> {
    let home = root.join("snapshotter").display().to_string();
    let json = run(tool("gostate"), [name, &home]).ok();
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
