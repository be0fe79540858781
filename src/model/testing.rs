//! A snapshot for tests, which change what matters to them.

use super::{Key, Kind, Labels, Snapshot, SnapshotId, Timestamp};

/// A local snapshot without a parent, labels and usage.
pub fn local_snapshot(id: u64, key: &str, kind: Kind) -> Snapshot {
    Snapshot {
        id: SnapshotId(id),
        key: Key::parse(key).unwrap(),
        parent: None,
        kind,
        created: Timestamp(1),
        updated: Timestamp(2),
        labels: Labels::new(),
        layer: None,
        usage: None,
    }
}
