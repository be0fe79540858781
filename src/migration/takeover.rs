//! Takes over the metadata of a Go snapshotter, at the first start on its state root.
//!
//! `metadata.db` is a bbolt file as containerd's package `core/snapshots/storage` writes it, and is only read. Ids are
//! kept, so that directories stay where they are, and so are names, because containerd's own metadata refers to them.
//! Everything is taken over or nothing: the new store is built beside its place.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::bolt::{self, Database, Entries, Entry, file};
use super::chain_validation::{self, Accepted, Candidate, RejectReason, Rejected};
use super::data_loss::{self, ImageLoss};
use super::go_encoding::{self, value};
use crate::model::{
    Digest, Key, Kind, LABEL_LAYER_DIGEST, LABEL_REMOTE, Layer, Snapshot, SnapshotId, Timestamp, Usage,
};
use crate::overlay::SnapshotPaths;
use crate::sidecar::Sidecar;
use crate::store::{self, Store};
use crate::system::{self, Sys};

/// The name of a Go snapshotter's metadata, which is in the same directory as ours.
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
                "cannot take over the metadata of a Go snapshotter, {}: {cause}, the Go snapshotter still runs: kill it \
                 with \"systemctl kill --signal=SIGKILL cvmfs-snapshotter; systemctl disable --now cvmfs-snapshotter\", \
                 both with the name of its unit, and start again (a stop without SIGKILL empties its snapshots, those of \
                 running containers too)",
                path.display()
            ),
            Self::File { path, cause } => write!(
                f,
                "cannot take over the metadata of a Go snapshotter, {}: {cause}; nothing was changed: restore it from a \
                 copy, or move it away to start without its snapshots (then remove the images and pull them again)",
                path.display()
            ),
            Self::System(cause) => cause.fmt(f),
            Self::Store(cause) => cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// The metadata of a Go snapshotter.
#[derive(Debug, Default)]
pub struct GoMetadata {
    pub records: Accepted,
    /// The last number that was given to a snapshot.
    pub last_id: SnapshotId,
}

/// Creates our store at `metadata` from a Go snapshotter's metadata beside it, if there is any. `occupied` is the highest
/// number that has a directory; `repository` becomes the repository of published layers.
pub fn take_over(
    metadata: &Path,
    paths: &SnapshotPaths,
    occupied: Option<SnapshotId>,
    repository: &str,
    sys: &dyn Sys,
) -> Result<(), Error> {
    let path = metadata.with_file_name(GO_METADATA);
    let file_error = |cause| Error::File { path: path.clone(), cause };
    // The lock is kept until our store exists, so that no Go snapshotter begins to write meanwhile.
    let Some(file) = file::read(&path).map_err(file_error)? else { return Ok(()) };
    let GoMetadata { records, last_id } = decode(&file.bytes, repository).map_err(|e| file_error(e.into()))?;
    let has_files = |id| match sys.lstat(&paths.fs(id)) {
        Err(e) if e.errno == Errno::ENOENT => Ok(false),
        status => status.map(|_| true),
    };
    let losses = data_loss::find_losses(&records.snapshots, has_files).map_err(Error::System)?;
    // A rebuild of our store reads these records, because the Go snapshotter's file becomes outdated.
    for local in records.snapshots.iter().filter(|snapshot| snapshot.layer.is_none()) {
        if has_files(local.id).is_ok_and(|has_files| has_files) {
            let sidecar = Sidecar { prepared: local.clone(), committed: None };
            sys.write_file(&paths.sidecar(local.id), &sidecar.encode()).map_err(Error::System)?;
        }
    }
    Store::create(metadata, occupied.max(Some(last_id)), &records.snapshots, &[]).map_err(Error::Store)?;
    log_result(&path, &records, &losses);
    Ok(())
}

fn log_result(path: &Path, records: &Accepted, losses: &[ImageLoss]) {
    for Rejected { name, reason } in &records.rejected {
        log::warn!(
            event = "takeover_record_rejected",
            name = name.as_str(),
            path:% = path.display(),
            reason:? = reason;
            "snapshot {name} of the Go snapshotter is not taken over: {reason}"
        );
    }
    for loss in losses {
        log::error!(
            event = "takeover_files_lost",
            object = loss.object.name(),
            layers = loss.layers,
            lost_layers = loss.lost_layers,
            lost_containers = loss.lost_containers;
            "{loss}"
        );
    }
    let counts = records.counts();
    log::info!(
        event = "takeover_finished",
        path:% = path.display(),
        snapshots = records.snapshots.len(),
        published = counts.published,
        committed = counts.committed,
        active = counts.active,
        views = counts.views,
        rejected = records.rejected.len(),
        lost_files = losses.iter().map(ImageLoss::lost_files).sum::<usize>();
        "took over {} snapshots of a Go snapshotter; its metadata is not needed any more",
        records.snapshots.len()
    );
}

/// Decodes the buckets `v1`, `snapshots`. They are missing in a file that was never used.
pub fn decode(bytes: &[u8], repository: &str) -> bolt::Result<GoMetadata> {
    let database = Database::parse(bytes)?;
    let mut root = database.read(&database.root())?;
    let mut version = database.read_child(&mut root, b"v1")?;
    let Some(Entry::Bucket(bucket)) = version.remove(b"snapshots".as_slice()) else {
        return Ok(GoMetadata::default());
    };
    let sequence = Some(SnapshotId(bucket.sequence)).filter(SnapshotId::is_possible);
    let mut candidates = Vec::new();
    for (key, entry) in database.read(&bucket)? {
        let record = match entry {
            Entry::Bucket(bucket) => {
                let mut fields = database.read(&bucket)?;
                let labels = database.read_child(&mut fields, b"labels")?;
                decode_snapshot(key, &fields, &labels, repository)
            }
            Entry::Value(_) => Err(RejectReason::NoRecord),
        };
        candidates.push(Candidate { name: String::from_utf8_lossy(key).into_owned(), record });
    }
    let records = chain_validation::validate(candidates);
    let last_id = sequence.max(records.highest_id()).unwrap_or_default();
    Ok(GoMetadata { records, last_id })
}

fn decode_snapshot(
    key: &[u8],
    fields: &Entries<'_>,
    labels: &Entries<'_>,
    repository: &str,
) -> Result<Snapshot, RejectReason> {
    let id = value(fields, b"id").and_then(go_encoding::unsigned).filter(|id| *id > 0);
    let id = id.map(SnapshotId).ok_or(RejectReason::NoId)?;
    if !id.is_possible() {
        return Err(RejectReason::Id(id));
    }
    let kind = match value(fields, b"kind") {
        Some([1]) => Kind::View,
        Some([2]) => Kind::Active,
        Some([3]) => Kind::Committed,
        other => return Err(RejectReason::Kind(other.and_then(|bytes| bytes.first().copied()))),
    };
    let parent = value(fields, b"parent").unwrap_or_default();
    let labels = go_encoding::labels(labels)?;
    let layer = match labels.get(LABEL_LAYER_DIGEST) {
        _ if kind != Kind::Committed || !labels.contains_key(LABEL_REMOTE.0) => None,
        None => return Err(RejectReason::NoDigest),
        Some(text) => {
            let digest = Digest::parse(text).map_err(|cause| RejectReason::Digest { digest: text.clone(), cause })?;
            Some(Layer { digest, repository: repository.to_owned() })
        }
    };
    let number = |name| value(fields, name).and_then(go_encoding::signed);
    let usage = match (number(b"size"), number(b"inodes")) {
        (Some(size), Some(inodes)) if kind == Kind::Committed && layer.is_none() => Some(Usage { size, inodes }),
        _ => None,
    };
    let time = |name| value(fields, name).and_then(go_encoding::time).unwrap_or(Timestamp(0));
    Ok(Snapshot {
        id,
        key: Key::parse(go_encoding::text(key)?)?,
        parent: Key::parse_optional(go_encoding::text(parent)?)?,
        kind,
        created: time(b"createdat"),
        updated: time(b"updatedat"),
        labels,
        layer,
        usage,
    })
}
