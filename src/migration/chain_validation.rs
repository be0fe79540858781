//! Records from elsewhere, put in order: what can be kept comes out with parents before
//! children, and what cannot is named with the reason. Pure.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;

use crate::model::{InvalidDigest, InvalidKey, Key, Kind, MAX_LABELS_BYTES, Quoted, Snapshot, SnapshotId, labels_size};

/// Something that may be a snapshot.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// For messages.
    pub name: String,
    pub record: Result<Snapshot, RejectReason>,
}

#[derive(Debug, Default)]
pub struct Accepted {
    /// Parents before their children.
    pub snapshots: Vec<Snapshot>,
    pub left_out: Vec<Rejected>,
}

/// A record that is not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Quoted, and cut if it is long.
    pub name: String,
    pub why: RejectReason,
}

/// Why a record is not kept.
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
        why: InvalidDigest,
    },
    SameId(SnapshotId),
    /// The record beside the files is of another number.
    OtherId(SnapshotId),
    SameKey,
    /// The record beside the files is missing or damaged.
    NoSidecar,
    NoFiles,
    /// Neither a published layer nor beside any files.
    OnlyInContainerd,
    ParentMissing(Key),
    ParentNotCommitted(Key),
    ParentLeftOut(Key),
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRecord => f.write_str("it is no record"),
            Self::NoId => f.write_str("it has no number"),
            Self::Id(id) => write!(f, "its number {id} is too high"),
            Self::Kind(None) => f.write_str("it does not say of which kind it is"),
            Self::Kind(Some(found)) => write!(f, "it is of the unknown kind {found}"),
            Self::Key(why) => why.fmt(f),
            Self::NotText => f.write_str("its name, its parent or its labels are not UTF-8"),
            Self::LabelsTooLong(bytes) => write!(f, "its labels have {bytes} bytes, the limit is {MAX_LABELS_BYTES}"),
            Self::NoDigest => f.write_str("it is a published layer, and no label says which"),
            Self::Digest { digest, why } => write!(f, "it is a published layer, {}: {why}", Quoted(digest)),
            Self::SameId(id) => write!(f, "another one has the same number {id}"),
            Self::OtherId(id) => write!(f, "the record beside its files is of number {id}"),
            Self::NoSidecar => f.write_str("there is no whole record beside its files"),
            Self::NoFiles => f.write_str("its files are missing"),
            Self::OnlyInContainerd => f.write_str("containerd knows it, and there are no files and no record of it"),
            Self::SameKey => f.write_str("another one has the same name"),
            Self::ParentMissing(parent) => write!(f, "its parent {parent} is missing"),
            Self::ParentNotCommitted(parent) => write!(f, "its parent {parent} is not committed"),
            Self::ParentLeftOut(parent) => write!(f, "its parent {parent} is left out, or a circle leads to it"),
        }
    }
}

/// Where the walk over the parents has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Unseen,
    /// On the way that is being followed: who meets it again goes in a circle.
    OnTheWay,
    Kept,
    LeftOut,
}

/// Keeps what has a parent that is kept, or none, and shares neither key nor id.
pub fn validate(candidates: Vec<Candidate>) -> Accepted {
    let mut kept = Accepted::default();
    let mut records = Vec::with_capacity(candidates.len());
    for Candidate { name, record } in candidates {
        match record.and_then(check_labels) {
            Ok(snapshot) => records.push(snapshot),
            Err(why) => kept.reject(&name, why),
        }
    }
    let (mut ids, mut keys) = (HashMap::<SnapshotId, usize>::new(), HashMap::<Key, usize>::new());
    for snapshot in &records {
        *ids.entry(snapshot.id).or_default() += 1;
        *keys.entry(snapshot.key.clone()).or_default() += 1;
    }
    let by_key: HashMap<Key, usize> = records.iter().enumerate().map(|(n, s)| (s.key.clone(), n)).collect();
    let mut states = vec![State::Unseen; records.len()];
    for (n, snapshot) in records.iter().enumerate() {
        let why = match &snapshot.parent {
            _ if ids[&snapshot.id] > 1 => RejectReason::SameId(snapshot.id),
            _ if keys[&snapshot.key] > 1 => RejectReason::SameKey,
            Some(parent) => match by_key.get(parent).map(|at| &records[*at]) {
                None => RejectReason::ParentMissing(parent.clone()),
                Some(found) if found.kind != Kind::Committed => RejectReason::ParentNotCommitted(parent.clone()),
                Some(_) => continue,
            },
            None => continue,
        };
        states[n] = State::LeftOut;
        kept.reject(snapshot.key.as_str(), why);
    }
    let mut order = Vec::with_capacity(records.len());
    for n in 0..records.len() {
        resolve(n, &records, &by_key, &mut states, &mut order, &mut kept);
    }
    let mut records: Vec<Option<Snapshot>> = records.into_iter().map(Some).collect();
    kept.snapshots = order.into_iter().filter_map(|n| records[n].take()).collect();
    kept
}

/// Decides about record `n` and all that lead to it from below.
fn resolve(
    n: usize,
    records: &[Snapshot],
    by_key: &HashMap<Key, usize>,
    states: &mut [State],
    order: &mut Vec<usize>,
    kept: &mut Accepted,
) {
    let mut path: Vec<usize> = Vec::new();
    let mut next = Some(n);
    while let Some(at) = next.filter(|at| states[*at] == State::Unseen) {
        states[at] = State::OnTheWay;
        path.push(at);
        next = records[at].parent.as_ref().and_then(|parent| by_key.get(parent).copied());
    }
    let is_sound = next.is_none_or(|below| states[below] == State::Kept);
    for at in path.into_iter().rev() {
        match &records[at].parent {
            Some(parent) if !is_sound => {
                states[at] = State::LeftOut;
                kept.reject(records[at].key.as_str(), RejectReason::ParentLeftOut(parent.clone()));
            }
            _ => {
                states[at] = State::Kept;
                order.push(at);
            }
        }
    }
}

impl Accepted {
    fn reject(&mut self, name: &str, why: RejectReason) {
        self.left_out.push(Rejected { name: Quoted(name).to_string(), why });
    }
}

fn check_labels(snapshot: Snapshot) -> Result<Snapshot, RejectReason> {
    match labels_size(&snapshot.labels) {
        bytes if bytes > MAX_LABELS_BYTES => Err(RejectReason::LabelsTooLong(bytes)),
        _ => Ok(snapshot),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Labels, Timestamp};

    fn candidate(id: u64, key: &str, parent: &str, kind: Kind) -> Candidate {
        let record = Snapshot {
            id: SnapshotId(id),
            key: Key::parse(key).unwrap(),
            parent: Key::parse_optional(parent).unwrap(),
            kind,
            created: Timestamp(0),
            updated: Timestamp(0),
            labels: Labels::new(),
            layer: None,
            usage: None,
        };
        Candidate { name: key.to_owned(), record: Ok(record) }
    }

    fn kept(candidates: Vec<Candidate>) -> (Vec<String>, Vec<String>) {
        let kept = validate(candidates);
        let mut left_out: Vec<String> = kept.left_out.iter().map(|l| format!("{}: {}", l.name, l.why)).collect();
        left_out.sort();
        (kept.snapshots.iter().map(|s| s.key.as_str().to_owned()).collect(), left_out)
    }

    #[test]
    fn parents_come_before_their_children() {
        use Kind::{Active, Committed};
        let (order, left_out) = kept(vec![
            candidate(4, "top", "middle", Active),
            candidate(3, "middle", "bottom", Committed),
            candidate(2, "bottom", "", Committed),
            candidate(1, "other", "bottom", Active),
        ]);
        assert_eq!((order, left_out), (["bottom", "middle", "top", "other"].map(str::to_owned).to_vec(), Vec::new()));
    }

    #[test]
    fn what_makes_no_sense_is_left_out_with_all_that_stands_on_it() {
        use Kind::{Active, Committed, View};
        let (order, left_out) = kept(vec![
            candidate(1, "fine", "", Committed),
            candidate(2, "twin-a", "", Committed),
            candidate(2, "twin-b", "fine", Committed),
            candidate(3, "on-twin", "twin-a", Committed),
            candidate(4, "on-on-twin", "on-twin", Active),
            candidate(5, "orphan", "gone", View),
            candidate(6, "active", "fine", Active),
            candidate(7, "on-active", "active", Active),
            candidate(8, "circle-a", "circle-b", Committed),
            candidate(9, "circle-b", "circle-a", Committed),
            candidate(10, "on-circle", "circle-a", Active),
            candidate(11, "itself", "itself", Committed),
            candidate(12, "double", "", Committed),
            candidate(13, "double", "", Committed),
            Candidate { name: "odd".to_owned(), record: Err(RejectReason::NoId) },
        ]);
        assert_eq!(order, ["fine", "active"]);
        assert_eq!(left_out.len(), 13, "{left_out:#?}");
        for claim in [
            "\"twin-a\": another one has the same number 2",
            "\"twin-b\": another one has the same number 2",
            "\"on-twin\": its parent \"twin-a\" is left out",
            "\"on-on-twin\": its parent \"on-twin\" is left out",
            "\"orphan\": its parent \"gone\" is missing",
            "\"on-active\": its parent \"active\" is not committed",
            "\"circle-a\": its parent \"circle-b\" is left out",
            "\"on-circle\": its parent \"circle-a\" is left out",
            "\"itself\": its parent \"itself\" is left out",
            "\"double\": another one has the same name",
            "\"odd\": it has no number",
        ] {
            assert!(left_out.iter().any(|line| line.starts_with(claim)), "{claim} is missing in {left_out:#?}");
        }
    }

    #[test]
    fn a_chain_of_any_length_is_followed() {
        let chain = (1..=50_000).rev().map(|n| {
            let parent = if n == 1 { String::new() } else { (n - 1).to_string() };
            candidate(n, &n.to_string(), &parent, Kind::Committed)
        });
        let kept = validate(chain.collect());
        assert_eq!((kept.snapshots.len(), kept.left_out.len()), (50_000, 0));
        assert_eq!(kept.snapshots[0].key.as_str(), "1");
    }
}
