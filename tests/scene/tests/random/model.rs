//! A model of the contract, without disks, threads, connections and transactions.

use std::collections::BTreeMap;

use cvmfs_snapshotter::proto::snapshots::Kind;
use grpcio::RpcStatusCode as Code;
use scene::client::REF;

pub type Labels = BTreeMap<String, String>;
pub type CallResult = Result<(), Code>;

/// The label that marks a remote snapshot.
const REMOTE: (&str, &str) = ("containerd.io/snapshot/remote", "remote snapshot");

#[derive(Default)]
pub struct Model {
    pub snapshots: BTreeMap<String, Snapshot>,
    /// Counts the operations, which serves as the time.
    pub now: usize,
}

#[derive(Clone, Debug)]
pub struct Snapshot {
    pub parent: String,
    pub kind: Kind,
    pub labels: Labels,
    pub created: usize,
    pub updated: usize,
    pub files: Files,
}

/// The files that a snapshot adds to those of its parents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// Its own file, with the number of the operation that made it.
    Own(usize),
    /// The files of a published layer.
    Layer(u8),
}

/// A condition of a filter.
#[derive(Clone, Debug)]
pub enum Test<Name> {
    Kind(Kind),
    Name(Name),
    Parent(Option<Name>),
    Has(&'static str),
    Is(&'static str, &'static str),
    IsNot(&'static str, &'static str),
}

fn without_empty(labels: Labels) -> Labels {
    labels.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

impl Model {
    fn get(&self, key: &str) -> Result<&Snapshot, Code> {
        self.snapshots.get(key).ok_or(Code::NOT_FOUND)
    }

    fn check_new(&self, key: &str, parent: &str) -> CallResult {
        if !parent.is_empty() && self.get(parent)?.kind != Kind::COMMITTED {
            return Err(Code::INVALID_ARGUMENT);
        }
        if self.snapshots.contains_key(key) { Err(Code::ALREADY_EXISTS) } else { Ok(()) }
    }

    fn insert(&mut self, key: &str, parent: &str, kind: Kind, labels: Labels, files: Files) {
        let (parent, labels, now) = (parent.to_owned(), without_empty(labels), self.now);
        self.snapshots.insert(key.to_owned(), Snapshot { parent, kind, labels, created: now, updated: now, files });
    }

    pub fn create(&mut self, kind: Kind, key: &str, parent: &str, labels: Labels) -> CallResult {
        self.check_new(key, parent)?;
        self.insert(key, parent, kind, labels, Files::Own(self.now));
        Ok(())
    }

    /// A Prepare of the layer `published`, or of one that is not published. `name` is the name that the snapshotter
    /// gave to a new remote snapshot.
    pub fn pull(&mut self, key: &str, parent: &str, labels: Labels, published: Option<u8>, name: &str) -> CallResult {
        self.check_new(key, parent)?;
        let Some(layer) = published else { return self.create(Kind::ACTIVE, key, parent, labels) };
        let reference = labels[REF].clone();
        let found =
            |s: &&Snapshot| s.kind == Kind::COMMITTED && s.parent == parent && s.labels.get(REF) == Some(&reference);
        let is_meant =
            |name: &str, s: &Snapshot| name.ends_with(&format!("/{reference}")) || s.files == Files::Layer(layer);
        // The labels were changed, so containerd would take another snapshot for this layer.
        if self.snapshots.iter().any(|(name, s)| found(&s) && !is_meant(name, s)) {
            return self.create(Kind::ACTIVE, key, parent, labels);
        }
        if self.snapshots.values().filter(found).any(|s| matches!(s.files, Files::Layer(_))) {
            return Err(Code::ALREADY_EXISTS);
        }
        if self.has_remote(&reference, parent) {
            // containerd would not find our snapshot any more.
            return self.create(Kind::ACTIVE, key, parent, labels);
        }
        let mut labels = labels;
        labels.insert(REMOTE.0.to_owned(), REMOTE.1.to_owned());
        self.insert(name, parent, Kind::COMMITTED, labels, Files::Layer(layer));
        Err(Code::ALREADY_EXISTS)
    }

    /// Whether the remote snapshot for (ref, parent) exists. The names of the test have at most one letter.
    fn has_remote(&self, reference: &str, parent: &str) -> bool {
        let end = format!("/{reference}");
        self.snapshots.iter().any(|(name, snapshot)| name.ends_with(&end) && snapshot.parent == parent)
    }

    pub fn commit(&mut self, name: &str, key: &str, parent: &str, labels: Labels) -> CallResult {
        let active = self.get(key)?.clone();
        if self.snapshots.contains_key(name) {
            return Err(Code::ALREADY_EXISTS);
        }
        if active.kind != Kind::ACTIVE {
            return Err(Code::FAILED_PRECONDITION);
        }
        let parent = match (active.parent.as_str(), parent) {
            (own, "") => own,
            ("", named) if self.get(named)?.kind != Kind::COMMITTED => return Err(Code::FAILED_PRECONDITION),
            ("", named) => named,
            (own, named) if own != named => return Err(Code::INVALID_ARGUMENT),
            (own, _) => own,
        };
        self.snapshots.remove(key);
        self.insert(name, parent, Kind::COMMITTED, labels, active.files);
        Ok(())
    }

    pub fn remove(&mut self, key: &str) -> CallResult {
        self.get(key)?;
        if self.snapshots.values().any(|s| s.parent == key) {
            return Err(Code::FAILED_PRECONDITION);
        }
        self.snapshots.remove(key);
        Ok(())
    }

    pub fn stat(&self, key: &str) -> CallResult {
        self.get(key).map(drop)
    }

    pub fn mounts(&self, key: &str) -> CallResult {
        if self.get(key)?.kind == Kind::COMMITTED { Err(Code::FAILED_PRECONDITION) } else { Ok(()) }
    }

    /// Changes the fields that `mask` names; an empty mask means all labels.
    pub fn update(&mut self, key: &str, labels: &Labels, mask: &[String]) -> CallResult {
        if mask.iter().any(|path| path != "labels" && !path.starts_with("labels.")) {
            return Err(Code::INVALID_ARGUMENT);
        }
        let now = self.now;
        let snapshot = self.snapshots.get_mut(key).ok_or(Code::NOT_FOUND)?;
        snapshot.updated = now;
        if mask.is_empty() || mask.iter().any(|path| path == "labels") {
            snapshot.labels.clone_from(labels);
        }
        for label in mask.iter().filter_map(|path| path.strip_prefix("labels.")) {
            let value = labels.get(label).cloned().unwrap_or_default();
            snapshot.labels.insert(label.to_owned(), value);
        }
        snapshot.labels = without_empty(std::mem::take(&mut snapshot.labels));
        Ok(())
    }

    /// Lists snapshots that meet all conditions of one of `tests`; no tests mean all snapshots.
    pub fn list(&self, tests: &[Vec<Test<String>>]) -> Vec<&str> {
        let holds = |name: &str, snapshot: &Snapshot, test: &Test<String>| match test {
            Test::Kind(kind) => snapshot.kind == *kind,
            Test::Name(wanted) => name == wanted,
            Test::Parent(wanted) => snapshot.parent == wanted.as_deref().unwrap_or(""),
            Test::Has(label) => snapshot.labels.contains_key(*label),
            Test::Is(label, value) => snapshot.labels.get(*label).is_some_and(|v| v == value),
            // containerd compares an absent label as an empty text here.
            Test::IsNot(label, value) => snapshot.labels.get(*label).map_or("", String::as_str) != *value,
        };
        let matches = |name: &str, snapshot: &Snapshot| {
            tests.is_empty() || tests.iter().any(|all| all.iter().all(|test| holds(name, snapshot, test)))
        };
        self.snapshots.iter().filter(|(name, s)| matches(name, s)).map(|(name, _)| name.as_str()).collect()
    }

    /// The parents of `key`, nearest first.
    pub fn below(&self, key: &str) -> Vec<(&str, &Snapshot)> {
        let mut chain = Vec::new();
        let mut next = self.snapshots.get(key).map_or("", |s| s.parent.as_str());
        while let Some((name, snapshot)) = self.snapshots.get_key_value(next) {
            chain.push((name.as_str(), snapshot));
            next = &snapshot.parent;
        }
        chain
    }

    /// The snapshots that have a directory after a cleanup: local ones, and remote ones below an active snapshot or a
    /// view.
    pub fn on_disk(&self) -> (usize, usize) {
        let in_use = self.snapshots.iter().filter(|(_, s)| s.kind != Kind::COMMITTED);
        let below = in_use.flat_map(|(key, _)| self.below(key));
        let remote = |s: &Snapshot| matches!(s.files, Files::Layer(_));
        let live: std::collections::BTreeSet<&str> = below.filter(|(_, s)| remote(s)).map(|(name, _)| name).collect();
        (self.snapshots.values().filter(|s| !remote(s)).count(), live.len())
    }
}
