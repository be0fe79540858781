//! The first start on a state root that a Go snapshotter used: its records become ours.
//!
//! Reads `metadata.db`, a bbolt file as containerd's package `core/snapshots/storage` writes it,
//! and only reads it. Ids are kept, so that directories stay where they are, and names, because
//! containerd's own metadata refers to them. A record that makes no sense is reported and left
//! out, and stops nothing. Everything is taken over or nothing: the new store is built beside
//! its place. `lineage` puts records in order, `losses` says what the Go one has destroyed.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::chain_validation::{Accepted, Candidate, RejectReason, Rejected};
use super::{chain_validation, data_loss};
use crate::migration::bolt::{self, Database, Entries, Entry, file};
use crate::model::{
    Digest, InvalidKey, Key, Kind, LABEL_LAYER_DIGEST, LABEL_REMOTE, Labels, Layer, Snapshot, SnapshotId, Timestamp,
    Usage,
};
use crate::overlay::SnapshotPaths;
use crate::sidecar::Sidecar;
use crate::store::{self, Store};
use crate::system::{self, Sys};

/// A Go snapshotter's metadata, beside where ours is.
/// What the Go snapshotter calls its metadata.
pub const GO_METADATA: &str = "metadata.db";

#[derive(Debug)]
pub enum Error {
    File { path: PathBuf, cause: file::Error },
    System(system::Error),
    Store(store::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, cause: cause @ file::Error::Locked } => write!(
                f,
                "cannot take over the metadata of a Go snapshotter, {}: {cause}, the Go snapshotter still runs. End it \
                 with \"systemctl kill --signal=SIGKILL cvmfs-snapshotter; systemctl disable --now cvmfs-snapshotter\", \
                 both with the name of the unit that runs it (stopped without SIGKILL, it empties its snapshots, under \
                 running containers as well) and start again",
                path.display()
            ),
            Self::File { path, cause } => write!(
                f,
                "cannot take over the metadata of a Go snapshotter, {}: {cause}; nothing was changed; put a copy back, \
                 or move it away to start without what it holds (then remove the images and pull them anew)",
                path.display()
            ),
            Self::System(cause) => cause.fmt(f),
            Self::Store(cause) => cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// What a Go snapshotter knew.
#[derive(Debug, Default)]
pub struct TakeoverReport {
    pub kept: Accepted,
    /// The last number that it gave to a snapshot.
    pub last_id: SnapshotId,
}

/// Makes our store at `metadata` of what a Go snapshotter has left beside it, if one has.
/// `occupied` is the highest number that has a directory; `repository` is where remote layers
/// are from now on.
pub fn take_over(
    metadata: &Path,
    paths: &SnapshotPaths,
    occupied: Option<SnapshotId>,
    repository: &str,
    sys: &dyn Sys,
) -> Result<(), Error> {
    let path = metadata.with_file_name(GO_METADATA);
    let failed = |cause| Error::File { path: path.clone(), cause };
    // Locked until our store stands, so that no Go snapshotter begins to write meanwhile.
    let Some(held) = file::read(&path).map_err(failed)? else { return Ok(()) };
    let inheritance = decode(&held.bytes, repository).map_err(|e| failed(e.into()))?;
    let TakeoverReport { kept: Accepted { snapshots, left_out }, last_id } = inheritance;
    let losses = data_loss::find_losses(&snapshots, |id| match sys.lstat(&paths.fs(id)) {
        Err(e) if e.errno == Errno::ENOENT => Ok(false),
        Err(e) => Err(e),
        Ok(_) => Ok(true),
    })
    .map_err(Error::System)?;
    // For a rebuild of our store: what is in the old file will not be true for long.
    for local in snapshots.iter().filter(|s| s.layer.is_none() && sys.lstat(&paths.fs(s.id)).is_ok()) {
        let sidecar = Sidecar { prepared: local.clone(), committed: None };
        sys.write_file(&paths.sidecar(local.id), &sidecar.encode()).map_err(Error::System)?;
    }
    Store::create(metadata, occupied.max(Some(last_id)), &snapshots, &[]).map_err(Error::Store)?;
    report(&path, &snapshots, &left_out, &losses);
    Ok(())
}

fn report(path: &Path, snapshots: &[Snapshot], left_out: &[Rejected], losses: &[data_loss::ImageLoss]) {
    for Rejected { name, why } in left_out {
        log::warn!("{name} of {} is not taken over: {why}", path.display());
    }
    for loss in losses {
        log::error!("{loss}");
    }
    let count = |wanted: fn(&&Snapshot) -> bool| snapshots.iter().filter(wanted).count();
    log::info!(
        "took over {} snapshots of the Go snapshotter from {}: {} published layers, {} other committed ones, {} active \
         ones, {} views; {} were left out, {} have lost their files; that file is not needed any more",
        snapshots.len(),
        path.display(),
        count(|s| s.layer.is_some()),
        count(|s| s.layer.is_none() && s.kind == Kind::Committed),
        count(|s| s.kind == Kind::Active),
        count(|s| s.kind == Kind::View),
        left_out.len(),
        losses.iter().map(data_loss::ImageLoss::lost_files).sum::<usize>(),
    );
}

/// Reads the buckets `v1`, `snapshots`. A file without them is one that was never used.
pub fn decode(bytes: &[u8], repository: &str) -> bolt::Result<TakeoverReport> {
    let bolt = Database::parse(bytes)?;
    let mut root = bolt.read(&bolt.root())?;
    let mut version = bolt.read_in(&mut root, b"v1")?;
    let Some(Entry::Bucket(bucket)) = version.remove(b"snapshots".as_slice()) else {
        return Ok(TakeoverReport::default());
    };
    let sequence = SnapshotId(bucket.sequence);
    let mut candidates = Vec::new();
    for (key, entry) in bolt.read(&bucket)? {
        let record = match entry {
            Entry::Bucket(bucket) => {
                let mut fields = bolt.read(&bucket)?;
                let labels = bolt.read_in(&mut fields, b"labels")?;
                snapshot(key, &fields, &labels, repository)
            }
            Entry::Value(_) => Err(RejectReason::NoRecord),
        };
        candidates.push(Candidate { name: String::from_utf8_lossy(key).into_owned(), record });
    }
    let kept = chain_validation::validate(candidates);
    let highest = kept.snapshots.iter().map(|snapshot| snapshot.id).max();
    let sequence = Some(sequence).filter(SnapshotId::is_possible);
    Ok(TakeoverReport { kept, last_id: sequence.max(highest).unwrap_or_default() })
}

fn snapshot(
    key: &[u8],
    fields: &Entries<'_>,
    labels: &Entries<'_>,
    repository: &str,
) -> Result<Snapshot, RejectReason> {
    let value = |name: &[u8]| match fields.get(name) {
        Some(Entry::Value(value)) => Some(*value),
        _ => None,
    };
    let id = value(b"id").and_then(unsigned).filter(|id| *id > 0).map(SnapshotId).ok_or(RejectReason::NoId)?;
    if !id.is_possible() {
        return Err(RejectReason::Id(id));
    }
    let kind = match value(b"kind") {
        Some([1]) => Kind::View,
        Some([2]) => Kind::Active,
        Some([3]) => Kind::Committed,
        other => return Err(RejectReason::Kind(other.and_then(|bytes| bytes.first().copied()))),
    };
    let parent = value(b"parent").unwrap_or_default();
    let labels = text_labels(labels)?;
    let layer = match labels.get(LABEL_LAYER_DIGEST) {
        _ if kind != Kind::Committed || !labels.contains_key(LABEL_REMOTE.0) => None,
        None => return Err(RejectReason::NoDigest),
        Some(text) => {
            let digest = Digest::parse(text).map_err(|why| RejectReason::Digest { digest: text.clone(), why })?;
            Some(Layer { digest, repository: repository.to_owned() })
        }
    };
    let usage = match (value(b"size").and_then(signed), value(b"inodes").and_then(signed)) {
        (Some(size), Some(inodes)) if kind == Kind::Committed && layer.is_none() => Some(Usage { size, inodes }),
        _ => None,
    };
    let time = |name| value(name).and_then(time).unwrap_or(Timestamp(0));
    Ok(Snapshot {
        id,
        key: Key::parse(text(key)?)?,
        parent: Key::parse_optional(text(parent)?)?,
        kind,
        created: time(b"createdat".as_slice()),
        updated: time(b"updatedat".as_slice()),
        labels,
        layer,
        usage,
    })
}

impl From<InvalidKey> for RejectReason {
    fn from(why: InvalidKey) -> Self {
        Self::Key(why)
    }
}

pub fn text(bytes: &[u8]) -> Result<&str, RejectReason> {
    std::str::from_utf8(bytes).map_err(|_| RejectReason::NotText)
}

/// The labels of a bucket of containerd's.
pub fn text_labels(entries: &Entries<'_>) -> Result<Labels, RejectReason> {
    let values = entries.iter().filter_map(|(key, entry)| match entry {
        Entry::Value(value) => Some((*key, *value)),
        Entry::Bucket(_) => None,
    });
    values.map(|(key, value)| Ok((text(key)?.to_owned(), text(value)?.to_owned()))).collect()
}

/// As Go's `binary.Uvarint`.
fn unsigned(bytes: &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for (n, byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        number |= bits.checked_shl(7 * u32::try_from(n).ok()?)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// As Go's `binary.Varint`.
fn signed(bytes: &[u8]) -> Option<i64> {
    let number = unsigned(bytes)?;
    let half = (number >> 1).cast_signed();
    Some(if number & 1 == 0 { half } else { !half })
}

/// As Go's `Time.MarshalBinary`: a version, seconds since the year 1, nanoseconds, time zone.
pub fn time(bytes: &[u8]) -> Option<Timestamp> {
    const TO_1970: i64 = 62_135_596_800;
    let (version, rest) = bytes.split_first()?;
    let (seconds, rest) = rest.split_first_chunk()?;
    let (nanoseconds, zone) = rest.split_first_chunk()?;
    if !matches!((version, zone.len()), (1, 2) | (2, 3)) {
        return None;
    }
    let seconds = i64::from_be_bytes(*seconds).checked_sub(TO_1970)?;
    let nanoseconds = i64::from(i32::from_be_bytes(*nanoseconds));
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds).map(Timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_writes_them() {
        for (bytes, expected) in [
            (&[0][..], Some(0)),
            (&[0xac, 0x02], Some(300)),
            (&[], None),
            (&[0x80], None),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], Some(u64::MAX)),
            (&[0x80; 12], None),
        ] {
            assert_eq!(unsigned(bytes), expected, "{bytes:?}");
        }
        assert_eq!([&[0][..], &[1], &[2], &[3]].map(signed), [Some(0), Some(-1), Some(1), Some(-2)]);
    }

    #[test]
    fn a_time_is_read_to_the_nanosecond() {
        // 2001-09-09T01:46:40.123456789Z, and the same with a zone that has seconds.
        let utc = [1, 0, 0, 0, 0x0e, 0xb3, 0x2c, 0xc1, 0, 0x07, 0x5b, 0xcd, 0x15, 0xff, 0xff];
        assert_eq!(time(&utc), Some(Timestamp(1_000_000_000_123_456_789)));
        let mut zone = utc.to_vec();
        zone.push(7);
        assert_eq!(time(&zone), None, "version 1 has no seconds in its zone");
        zone[0] = 2;
        assert_eq!(time(&zone), Some(Timestamp(1_000_000_000_123_456_789)));
        let far = [1, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0];
        assert_eq!((time(&far), time(&[]), time(&[1, 2])), (None, None, None));
    }
}
