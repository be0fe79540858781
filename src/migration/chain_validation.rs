//! Validates records of snapshots that come from another store. The accepted ones come out with parents before their
//! children, and each rejected one with its reason. Pure.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;

use crate::model::{InvalidDigest, InvalidKey, Key, Kind, MAX_LABELS_BYTES, Quoted, Snapshot, SnapshotId, labels_size};

/// A record that has not been validated, or the reason for which it could not be read.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The name for messages.
    pub name: String,
    pub record: Result<Snapshot, RejectReason>,
}

#[derive(Debug, Default)]
pub struct Accepted {
    /// Snapshots with parents before their children.
    pub snapshots: Vec<Snapshot>,
    pub rejected: Vec<Rejected>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The name in quotes, shortened if it is long.
    pub name: String,
    pub reason: RejectReason,
}

/// Number of snapshots of each kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub published: usize,
    /// Committed snapshots with files of their own.
    pub committed: usize,
    pub active: usize,
    pub views: usize,
}

/// Why a record is rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RejectReason {
    NoRecord,
    NoId,
    Id(SnapshotId),
    Kind(Option<u8>),
    Key(InvalidKey),
    NotText,
    LabelsTooLong(usize),
    NoDigest,
    Digest {
        digest: String,
        cause: InvalidDigest,
    },
    SameId(SnapshotId),
    /// The record beside the files has another id than their directory.
    OtherId(SnapshotId),
    SameKey,
    /// The record beside the files is missing or damaged.
    NoSidecar,
    NoFiles,
    /// containerd knows a snapshot that is not published and has no files.
    OnlyInContainerd,
    ParentMissing(Key),
    ParentNotCommitted(Key),
    ParentRejected(Key),
}

impl From<InvalidKey> for RejectReason {
    fn from(cause: InvalidKey) -> Self {
        Self::Key(cause)
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRecord => f.write_str("it is not a record"),
            Self::NoId => f.write_str("it has no id"),
            Self::Id(id) => write!(f, "its id {id} is too high"),
            Self::Kind(None) => f.write_str("it has no kind"),
            Self::Kind(Some(kind)) => write!(f, "its kind {kind} is unknown"),
            Self::Key(cause) => cause.fmt(f),
            Self::NotText => f.write_str("its name, its parent or its labels are not UTF-8"),
            Self::LabelsTooLong(bytes) => write!(f, "its labels have {bytes} bytes, the limit is {MAX_LABELS_BYTES}"),
            Self::NoDigest => f.write_str("it is a published layer without a digest label"),
            Self::Digest { digest, cause } => {
                write!(f, "it is a published layer with the digest {}: {cause}", Quoted(digest))
            }
            Self::SameId(id) => write!(f, "another snapshot has the same id {id}"),
            Self::OtherId(id) => write!(f, "the record beside its files has the id {id}"),
            Self::NoSidecar => f.write_str("the record beside its files is missing or incomplete"),
            Self::NoFiles => f.write_str("its files are missing"),
            Self::OnlyInContainerd => f.write_str("only containerd knows it: it has no files and no record"),
            Self::SameKey => f.write_str("another snapshot has the same name"),
            Self::ParentMissing(parent) => write!(f, "its parent {parent} is missing"),
            Self::ParentNotCommitted(parent) => write!(f, "its parent {parent} is not committed"),
            Self::ParentRejected(parent) => write!(f, "its parent {parent} is left out, or depends on it"),
        }
    }
}

/// Accepts the records that share neither key nor id with another one, and have no parent or an accepted one.
pub fn validate(candidates: Vec<Candidate>) -> Accepted {
    let mut accepted = Accepted::default();
    let mut records = Vec::with_capacity(candidates.len());
    for Candidate { name, record } in candidates {
        match record.and_then(check_labels) {
            Ok(snapshot) => records.push(snapshot),
            Err(reason) => accepted.reject(&name, reason),
        }
    }
    let mut chains = Chains::new(&records);
    for (index, snapshot) in records.iter().enumerate() {
        if let Some(reason) = chains.conflict(snapshot) {
            chains.states[index] = State::Rejected;
            accepted.reject(snapshot.key.as_str(), reason);
        }
    }
    for index in 0..records.len() {
        chains.resolve(index, &mut accepted);
    }
    let order = chains.order;
    let mut records: Vec<Option<Snapshot>> = records.into_iter().map(Some).collect();
    accepted.snapshots = order.into_iter().filter_map(|index| records[index].take()).collect();
    accepted
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Unresolved,
    /// The record is on the path that is being followed. Meeting it again means that its parents form a circle.
    OnPath,
    Accepted,
    Rejected,
}

/// The records as chains of parents. Records are named by their index.
struct Chains<'r> {
    records: &'r [Snapshot],
    by_key: HashMap<&'r Key, usize>,
    ids: HashMap<SnapshotId, usize>,
    keys: HashMap<&'r Key, usize>,
    states: Vec<State>,
    /// The accepted records, parents before their children.
    order: Vec<usize>,
}

impl<'r> Chains<'r> {
    fn new(records: &'r [Snapshot]) -> Self {
        let (mut ids, mut keys) = (HashMap::new(), HashMap::new());
        for snapshot in records {
            *ids.entry(snapshot.id).or_default() += 1;
            *keys.entry(&snapshot.key).or_default() += 1;
        }
        let by_key = records.iter().enumerate().map(|(index, snapshot)| (&snapshot.key, index)).collect();
        Self { records, by_key, ids, keys, states: vec![State::Unresolved; records.len()], order: Vec::new() }
    }

    /// Why the record is rejected whatever becomes of its parent.
    fn conflict(&self, snapshot: &Snapshot) -> Option<RejectReason> {
        if self.ids[&snapshot.id] > 1 {
            return Some(RejectReason::SameId(snapshot.id));
        }
        if self.keys[&snapshot.key] > 1 {
            return Some(RejectReason::SameKey);
        }
        let parent = snapshot.parent.as_ref()?;
        match self.by_key.get(parent).map(|index| self.records[*index].kind) {
            None => Some(RejectReason::ParentMissing(parent.clone())),
            Some(Kind::Committed) => None,
            Some(_) => Some(RejectReason::ParentNotCommitted(parent.clone())),
        }
    }

    /// Accepts or rejects a record and its unresolved ancestors.
    fn resolve(&mut self, index: usize, accepted: &mut Accepted) {
        let mut path: Vec<usize> = Vec::new();
        let mut next = Some(index);
        while let Some(current) = next.filter(|index| self.states[*index] == State::Unresolved) {
            self.states[current] = State::OnPath;
            path.push(current);
            next = self.records[current].parent.as_ref().and_then(|parent| self.by_key.get(parent).copied());
        }
        let is_accepted = next.is_none_or(|ancestor| self.states[ancestor] == State::Accepted);
        for index in path.into_iter().rev() {
            match &self.records[index].parent {
                Some(parent) if !is_accepted => {
                    self.states[index] = State::Rejected;
                    accepted.reject(self.records[index].key.as_str(), RejectReason::ParentRejected(parent.clone()));
                }
                _ => {
                    self.states[index] = State::Accepted;
                    self.order.push(index);
                }
            }
        }
    }
}

impl Accepted {
    fn reject(&mut self, name: &str, reason: RejectReason) {
        self.rejected.push(Rejected { name: Quoted(name).to_string(), reason });
    }

    pub fn highest_id(&self) -> Option<SnapshotId> {
        self.snapshots.iter().map(|snapshot| snapshot.id).max()
    }

    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for snapshot in &self.snapshots {
            let count = match snapshot.kind {
                _ if snapshot.layer.is_some() => &mut counts.published,
                Kind::Committed => &mut counts.committed,
                Kind::Active => &mut counts.active,
                Kind::View => &mut counts.views,
            };
            *count += 1;
        }
        counts
    }
}

fn check_labels(snapshot: Snapshot) -> Result<Snapshot, RejectReason> {
    match labels_size(&snapshot.labels) {
        bytes if bytes > MAX_LABELS_BYTES => Err(RejectReason::LabelsTooLong(bytes)),
        _ => Ok(snapshot),
    }
}

#[cfg(test)]
mod tests;
