//! The file beside the files of a local snapshot, `snapshots/<id>/record`, from which `--rebuild-metadata` makes the row
//! again when the store is lost.
//!
//! It is written before the row, and never synced: as long as the store is there, only the row counts.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::model::{Kind, Snapshot};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// The snapshot as it was prepared.
    pub prepared: Snapshot,
    /// The snapshot as it is if a commit that was begun succeeded.
    pub committed: Option<Snapshot>,
}

impl Sidecar {
    pub fn encode(&self) -> Vec<u8> {
        // This cannot fail: everything in a snapshot can be written as JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// None if the file was not written to its end, or does not describe a local snapshot.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let sidecar: Self = serde_json::from_slice(bytes).ok()?;
        let is_valid = is_local(&sidecar.prepared)
            && sidecar.committed.as_ref().is_none_or(|committed| {
                committed.id == sidecar.prepared.id && committed.kind == Kind::Committed && is_local(committed)
            });
        is_valid.then_some(sidecar)
    }
}

fn is_local(snapshot: &Snapshot) -> bool {
    snapshot.layer.is_none() && snapshot.usage.is_none_or(|usage| usage.size >= 0 && usage.inodes >= 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::model::testing::local_snapshot;
    use crate::model::{Digest, Layer, Usage};

    fn snapshot(id: u64, kind: Kind) -> Snapshot {
        local_snapshot(id, "key", kind)
    }

    /// A file that named the number of another snapshot once made the rebuild leave out that snapshot as well, and one
    /// that named a layer had the files beside it removed.
    #[test]
    fn sidecar_of_anything_but_a_local_snapshot_is_not_decoded() {
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

    /// The fuzzer's inputs of an older form were refused at once, so it tested nothing.
    #[test]
    fn inputs_of_the_fuzzer_are_sidecars() {
        let inputs = [
            &include_bytes!("../tests/fuzz/corpus/records/sidecar")[..],
            include_bytes!("../tests/fuzz/corpus/records/sidecar-prepared"),
        ];
        for input in inputs {
            assert!(Sidecar::decode(&input[1..]).is_some(), "{}", String::from_utf8_lossy(input));
        }
    }
}
