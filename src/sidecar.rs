//! What lies beside the files of a local snapshot, `snapshots/<id>/record`: enough to make its
//! row again when the store is lost. Written before the row, and not synced: the row counts.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::model::{Kind, Snapshot};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// As it was prepared.
    pub prepared: Snapshot,
    /// As it is if the commit that was begun came to its end.
    pub committed: Option<Snapshot>,
}

impl Sidecar {
    pub fn encode(&self) -> Vec<u8> {
        // Everything in a snapshot has a form in JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// None: not all of one was written, or it is not of a local snapshot.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let read: Self = serde_json::from_slice(bytes).ok()?;
        let is_local = |one: &Snapshot| one.layer.is_none() && one.usage.is_none_or(|u| u.size >= 0 && u.inodes >= 0);
        let fits = |one: &Snapshot| one.id == read.prepared.id && one.kind == Kind::Committed && is_local(one);
        (is_local(&read.prepared) && read.committed.as_ref().is_none_or(fits)).then_some(read)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::model::{Digest, Key, Labels, Layer, SnapshotId, Timestamp, Usage};

    fn snapshot(id: u64, kind: Kind) -> Snapshot {
        Snapshot {
            id: SnapshotId(id),
            key: Key::parse("key").unwrap(),
            parent: None,
            kind,
            created: Timestamp(1),
            updated: Timestamp(2),
            labels: Labels::new(),
            layer: None,
            usage: None,
        }
    }

    /// A record that named another snapshot's number made that snapshot left out as well, and one that named a layer had
    /// the files beside it taken away.
    #[test]
    fn a_record_that_is_not_of_a_local_snapshot_is_none() {
        let good = Sidecar { prepared: snapshot(2, Kind::Active), committed: Some(snapshot(2, Kind::Committed)) };
        assert_eq!(Sidecar::decode(&good.encode()), Some(good.clone()));
        let digest = Digest::parse(&format!("sha256:{}", "a".repeat(64))).unwrap();
        let layer = Some(Layer { digest, repository: "r".to_owned() });
        let usage = Some(Usage { size: -1, inodes: 1 });
        for bad in [
            Sidecar { committed: Some(snapshot(1, Kind::Committed)), ..good.clone() },
            Sidecar { committed: Some(snapshot(2, Kind::View)), ..good.clone() },
            Sidecar { prepared: Snapshot { layer: layer.clone(), ..good.prepared.clone() }, ..good.clone() },
            Sidecar { committed: Some(Snapshot { layer, ..snapshot(2, Kind::Committed) }), ..good.clone() },
            Sidecar { prepared: Snapshot { usage, ..good.prepared.clone() }, ..good.clone() },
        ] {
            assert_eq!(Sidecar::decode(&bad.encode()), None, "{bad:?}");
        }
    }
}
