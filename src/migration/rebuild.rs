//! `--rebuild-metadata`: creates a store in place of one that is damaged or gone.
//!
//! There are two sources. Beside the files of each local snapshot lies a record, which says what the snapshot was when it
//! was prepared and what a commit makes of it. containerd's own metadata names each snapshot that it uses, so it decides
//! which of the two is true, and its labels are all that a published layer consists of. Nothing is guessed: records that
//! contradict each other are left out, and their directories are not touched. The old file is kept, and a sound one is
//! not replaced.
#![forbid(unsafe_code)]

mod containerd;
mod error;
mod options;
mod report;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use self::containerd::ContainerdSnapshot;
pub use self::error::Error;
pub use self::options::{ContainerdDb, DEFAULT_CONTAINERD, DEFAULT_NAME, RebuildOptions};
pub use self::report::Report;
use crate::migration::bolt::file::{self, LockedFile};
use crate::migration::chain_validation::{self, Candidate, RejectReason};
use crate::model::{Digest, Key, Kind, LABEL_LAYER_DIGEST, Layer, Snapshot, SnapshotId};
use crate::overlay::{SnapshotPaths, SourceVariant};
use crate::sidecar::Sidecar;
use crate::store::{self, Store};
use crate::system::{self, FileType, NOT_REGULAR, Sys};

/// Maximum size of a record beside files, which has labels and two names.
const MAX_RECORD_BYTES: u64 = 4 << 20;

/// Rebuilds the store at `metadata`. The caller holds the lock of the state root. `repository` becomes the repository of
/// published layers.
pub fn run(
    metadata: &Path,
    paths: &SnapshotPaths,
    repository: &str,
    options: &RebuildOptions,
    sys: &dyn Sys,
) -> Result<Report, Error> {
    match Store::check(metadata) {
        Ok(()) => return Err(Error::Sound { path: metadata.to_owned() }),
        Err(store::Error::Damaged { .. }) => {}
        Err(e) if matches!(e.errno(), Some(Errno::ENOENT | Errno::EIO)) => {}
        // A file of another schema version, or one that cannot be read now, is not damaged.
        Err(other) => return Err(Error::Metadata(other)),
    }
    // The lock is kept until the new store exists, so that containerd does not start meanwhile.
    let containerd_db = open_containerd_db(&options.containerd)?;
    let known = match &containerd_db {
        None => Vec::new(),
        Some((path, file)) => containerd::read(&file.bytes, &options.snapshotter)
            .map_err(|cause| Error::Containerd { path: path.clone(), cause: cause.into() })?,
    };
    let by_name: HashMap<&str, &ContainerdSnapshot> =
        known.iter().map(|snapshot| (snapshot.name.as_str(), snapshot)).collect();
    let StateRootScan { sidecars, mut candidates, attachments, ids } = scan_state_root(paths, sys)?;
    candidates.extend(sidecars.into_iter().map(|sidecar| resolve_sidecar(sidecar, &by_name)));
    let local: HashSet<String> = candidates.iter().map(|candidate| candidate.name.clone()).collect();
    let highest = highest_used_id(&ids, &known);
    candidates.extend(remote_candidates(&known, &local, highest, repository));
    let accepted = chain_validation::validate(candidates);
    let old = backup(metadata)?;
    Store::create(metadata, accepted.highest_id().max(Some(highest)), &accepted.snapshots, &attachments).map_err(
        |cause| {
            // If the old file lost its name, the second name is the only one it has.
            if let Some(old) = old.as_ref().filter(|_| metadata.exists()) {
                let _ = fs::remove_file(Store::wal_of(old));
                let _ = fs::remove_file(old);
            }
            Error::Metadata(cause)
        },
    )?;
    Ok(Report {
        metadata: metadata.to_owned(),
        snapshotter: options.snapshotter.clone(),
        old,
        ..Report::new(containerd_db.map(|(path, _)| path), &accepted, &known)
    })
}

fn open_containerd_db(containerd: &ContainerdDb) -> Result<Option<(PathBuf, LockedFile)>, Error> {
    let path = match containerd {
        ContainerdDb::Ignore => return Ok(None),
        ContainerdDb::Default => Path::new(DEFAULT_CONTAINERD),
        ContainerdDb::Path(path) => path,
    };
    match file::read(path) {
        Ok(Some(file)) => Ok(Some((path.to_owned(), file))),
        Ok(None) => Err(Error::NoContainerd { path: path.to_owned() }),
        Err(cause) => Err(Error::Containerd { path: path.to_owned(), cause }),
    }
}

/// The content of the directory of all snapshots.
#[derive(Default)]
struct StateRootScan {
    sidecars: Vec<Sidecar>,
    /// Local snapshots that cannot be restored.
    candidates: Vec<Candidate>,
    /// Directories of attached layers. A layer is attached again when it is needed.
    attachments: Vec<SnapshotId>,
    ids: Vec<SnapshotId>,
}

fn scan_state_root(paths: &SnapshotPaths, sys: &dyn Sys) -> Result<StateRootScan, Error> {
    let mounts = sys.mounts_below(paths.snapshots_dir())?;
    let ids = system::snapshot_ids(sys, paths.snapshots_dir())?;
    let mut scan = StateRootScan::default();
    for &id in &ids {
        // A Go snapshotter's attachment is a mount on `fs`, with nothing beside it.
        if is_attachment(id, paths, sys) || mounts.contains(&paths.fs(id)) {
            scan.attachments.push(id);
            continue;
        }
        let directory = || paths.snapshot_dir(id).display().to_string();
        let (name, reason) = match read_sidecar(&paths.sidecar(id), sys)? {
            None => (directory(), RejectReason::NoSidecar),
            Some(sidecar) if sidecar.prepared.id != id => (directory(), RejectReason::OtherId(sidecar.prepared.id)),
            Some(sidecar) if has_directory(&paths.fs(id), sys) => {
                scan.sidecars.push(sidecar);
                continue;
            }
            Some(Sidecar { prepared, committed }) => {
                (committed.unwrap_or(prepared).key.as_str().to_owned(), RejectReason::NoFiles)
            }
        };
        scan.candidates.push(Candidate { name, record: Err(reason) });
    }
    Ok(StateRootScan { ids, ..scan })
}

fn is_attachment(id: SnapshotId, paths: &SnapshotPaths, sys: &dyn Sys) -> bool {
    let is_link = |path: &Path| sys.lstat(path).is_ok_and(|status| status.file_type == FileType::Symlink);
    let root = paths.attached_root(id, SourceVariant(0));
    sys.lstat(&paths.bind_mounts_dir(id)).is_ok() || is_link(&root) || is_link(&root.with_extension("of"))
}

fn has_directory(path: &Path, sys: &dyn Sys) -> bool {
    sys.lstat(path).is_ok_and(|status| status.file_type == FileType::Directory)
}

/// Reads the record beside the files of a snapshot. None: it is missing or incomplete.
fn read_sidecar(path: &Path, sys: &dyn Sys) -> Result<Option<Sidecar>, Error> {
    match sys.read_file(path, MAX_RECORD_BYTES) {
        Ok(bytes) => Ok(Sidecar::decode(&bytes)),
        Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::EFBIG | NOT_REGULAR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Decides whether a local snapshot is the prepared or the committed one: the one that containerd knows. If it knows
/// neither, a commit that was begun holds.
fn resolve_sidecar(sidecar: Sidecar, by_name: &HashMap<&str, &ContainerdSnapshot>) -> Candidate {
    let Sidecar { prepared, committed } = sidecar;
    let is_known = |snapshot: &Snapshot| by_name.contains_key(snapshot.key.as_str());
    let mut snapshot = match committed {
        Some(committed) if is_known(&committed) || !is_known(&prepared) => committed,
        _ => prepared,
    };
    if let Some(known) = by_name.get(snapshot.key.as_str()) {
        snapshot.labels = known.inherited_labels();
    }
    Candidate { name: snapshot.key.as_str().to_owned(), record: Ok(snapshot) }
}

/// The highest number that was ever used, in directories or in names. New ids are above it.
fn highest_used_id(ids: &[SnapshotId], known: &[ContainerdSnapshot]) -> SnapshotId {
    let in_names = known.iter().filter_map(|known| known.name.strip_prefix("cvmfs/")?.split('/').next()?.parse().ok());
    let in_names = in_names.map(SnapshotId).filter(SnapshotId::is_possible);
    ids.iter().copied().chain(in_names).max().unwrap_or_default()
}

/// The snapshots that containerd knows and that are not in `local`: published layers get new ids, others are lost.
fn remote_candidates(
    known: &[ContainerdSnapshot],
    local: &HashSet<String>,
    highest: SnapshotId,
    repository: &str,
) -> Vec<Candidate> {
    let by_key: HashMap<(&str, &str), &ContainerdSnapshot> =
        known.iter().map(|snapshot| (snapshot.qualified_key(), snapshot)).collect();
    // Namespaces share a layer. It is one candidate if they agree on its parent and its digest.
    let mut identities: HashMap<&str, (Option<Key>, Option<Digest>)> = HashMap::new();
    let mut candidates = Vec::new();
    for snapshot in known.iter().filter(|snapshot| !local.contains(&snapshot.name)) {
        let id = SnapshotId(highest.0 + 1 + candidates.len() as u64);
        let record = remote_snapshot(snapshot, &by_key, id, repository);
        let identity = record.as_ref().map_or((None, None), |record| {
            (record.parent.clone(), record.layer.as_ref().map(|layer| layer.digest.clone()))
        });
        if identities.get(snapshot.name.as_str()) == Some(&identity) {
            continue;
        }
        identities.insert(&snapshot.name, identity);
        candidates.push(Candidate { name: snapshot.name.clone(), record });
    }
    candidates
}

fn remote_snapshot(
    known: &ContainerdSnapshot,
    by_key: &HashMap<(&str, &str), &ContainerdSnapshot>,
    id: SnapshotId,
    repository: &str,
) -> Result<Snapshot, RejectReason> {
    if !known.is_remote() {
        return Err(RejectReason::OnlyInContainerd);
    }
    let text = known.labels.get(LABEL_LAYER_DIGEST).ok_or(RejectReason::NoDigest)?;
    let digest = Digest::parse(text).map_err(|cause| RejectReason::Digest { digest: text.clone(), cause })?;
    let parent = match &known.parent {
        None => None,
        Some(parent) => match by_key.get(&(known.namespace.as_str(), parent.as_str())) {
            Some(parent) => Key::parse_optional(&parent.name)?,
            None => return Err(RejectReason::ParentMissing(Key::parse(parent)?)),
        },
    };
    Ok(Snapshot {
        id,
        key: Key::parse(&known.name)?,
        parent,
        kind: Kind::Committed,
        created: known.created,
        updated: known.updated,
        labels: known.inherited_labels(),
        layer: Some(Layer { digest, repository: repository.to_owned() }),
        usage: None,
    })
}

/// Gives the old file and its write-ahead log second names, because the new store replaces the first ones. After a kill,
/// the last writes are only in the log. None: there is no old file.
fn backup(metadata: &Path) -> Result<Option<PathBuf>, Error> {
    for n in 1.. {
        let mut name = metadata.as_os_str().to_owned();
        name.push(format!(".damaged-{n}"));
        let path = PathBuf::from(name);
        match fs::hard_link(metadata, &path) {
            Ok(()) => {
                return match fs::hard_link(Store::wal_of(metadata), Store::wal_of(&path)) {
                    Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(Error::Backup { path, cause }),
                    _ => Ok(Some(path)),
                };
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(Error::Backup { path, cause }),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
