//! Snapshots, as the store keeps them, and their parts.
#![forbid(unsafe_code)]

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{Digest, Key, Labels};

/// The number of a snapshot, which is also the name of its directory. It is never used again, not even after the
/// snapshot is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub u64);

impl SnapshotId {
    /// Highest number that can have a directory. No node creates this many snapshots, so a directory with a higher
    /// number is not ours.
    const MAX: u64 = 1 << 48;

    /// The id that a directory name stands for, if the name is spelled exactly as we spell it.
    pub fn from_directory_name(name: &str) -> Option<Self> {
        let id = name.parse().ok().map(Self).filter(Self::is_possible)?;
        (id.to_string() == name).then_some(id)
    }

    /// Whether a snapshot can have this number.
    pub fn is_possible(&self) -> bool {
        self.0 <= Self::MAX
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a snapshot is, in containerd's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    View,
    Active,
    Committed,
}

impl Kind {
    /// The reverse of `as_str`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::View, Self::Active, Self::Committed].into_iter().find(|kind| kind.as_str() == name)
    }

    /// The word that containerd's filters use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// Nanoseconds since the epoch, UTC. containerd compares all digits of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp(pub i64);

impl Timestamp {
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The type ends in the year 2262, as Go's does.
        Self(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }
}

/// What a snapshot itself takes on disk, without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub size: i64,
    /// Distinct inodes.
    pub inodes: i64,
}

/// A layer that a repository publishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub digest: Digest,
    /// The repository from which the layer was pulled. It is asked first, and named in messages; the same digest means
    /// the same files in every repository.
    pub repository: String,
}

/// A snapshot, as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub key: Key,
    pub parent: Option<Key>,
    pub kind: Kind,
    pub created: Timestamp,
    pub updated: Timestamp,
    pub labels: Labels,
    /// A *remote* snapshot has a layer, and its files are those of the published layer. A *local* snapshot has none, and
    /// owns its files.
    pub layer: Option<Layer>,
    /// The usage of a committed local snapshot, once it was measured.
    pub usage: Option<Usage>,
}

impl Snapshot {
    /// About how many bytes the snapshot takes in memory.
    pub fn approximate_size(&self) -> usize {
        /// What a string, or a node of a map, costs besides its bytes.
        const LABEL_OVERHEAD: usize = 64;
        let keys: usize = [Some(&self.key), self.parent.as_ref()]
            .into_iter()
            .flatten()
            .map(|key| key.as_str().len() + LABEL_OVERHEAD)
            .sum();
        let labels: usize = self.labels.iter().map(|(name, value)| name.len() + value.len() + 2 * LABEL_OVERHEAD).sum();
        size_of::<Self>() + keys + labels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_name_is_an_id_only_in_our_own_spelling() {
        assert_eq!(SnapshotId::from_directory_name("12"), Some(SnapshotId(12)));
        for other in ["", "012", "+12", "12x", "new-12", "-1", "99999999999999999999999", "18446744073709551615"] {
            assert_eq!(SnapshotId::from_directory_name(other), None, "{other:?}");
        }
    }
}
