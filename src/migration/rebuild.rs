//! `--rebuild-metadata`: a store that was lost is made again.
//!
//! Two things know what was in it. Beside the files of each local snapshot lies a record, which
//! says what it was when it was made and what a commit made of it. And containerd's own metadata
//! names each snapshot that it uses, says which of the two holds, and has what published layers
//! are all there is of them: labels. Nothing is invented: what contradicts itself is left out, and its
//! directory is left alone. The old file is kept; a sound one is not touched.
#![forbid(unsafe_code)]

mod containerd;
mod report;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use self::containerd::KnownSnapshot;
pub use self::report::Report;
use crate::migration::bolt::file;
use crate::migration::chain_validation::{self, Accepted, Candidate, RejectReason};
use crate::model::{Digest, Key, Kind, LABEL_LAYER_DIGEST, Layer, Snapshot, SnapshotId};
use crate::overlay::{SnapshotPaths, SourceVariant};
use crate::sidecar::Sidecar;
use crate::store::{self, Store};
use crate::system::{self, FileType, NOT_REGULAR, Sys};

pub const DEFAULT_CONTAINERD: &str = "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db";
pub const DEFAULT_NAME: &str = "cvmfs-snapshotter";
/// A record beside files has labels and two names; this is more than both can have.
const MAX_RECORD: u64 = 4 << 20;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuildOptions {
    pub containerd: ContainerdDb,
    /// Under which name containerd knows us.
    pub snapshotter: String,
    pub json: bool,
}

/// Where containerd's metadata is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerdDb {
    /// At its usual place, if it is there.
    Default,
    At(PathBuf),
    Without,
}

impl ContainerdDb {
    pub fn from_argument(path: Option<PathBuf>) -> Self {
        match path {
            None => Self::Default,
            Some(path) if path.as_os_str() == "none" => Self::Without,
            Some(path) => Self::At(path),
        }
    }
}

#[derive(Debug)]
pub enum Error {
    /// There is nothing to mend.
    Sound {
        path: PathBuf,
    },
    Metadata(store::Error),
    Containerd {
        path: PathBuf,
        cause: file::Error,
    },
    NoContainerd {
        path: PathBuf,
    },
    System(system::Error),
    Keep {
        path: PathBuf,
        cause: io::Error,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WITHOUT: &str = "or go on without it with --containerd-metadata none: then only what was downloaded or \
                               written on this node comes back, and published images must be removed and pulled again";
        match self {
            Self::Sound { path } => write!(
                f,
                "the metadata {} is sound, nothing was changed; move it away if it is to be rebuilt all the same",
                path.display()
            ),
            Self::Metadata(cause) => write!(f, "{cause}; nothing was changed"),
            Self::Containerd { path, cause: cause @ file::Error::Locked } => write!(
                f,
                "cannot read containerd's metadata {}: {cause}, containerd runs. Nothing was changed: stop containerd \
                 (containers run on) and try again, {WITHOUT}",
                path.display()
            ),
            Self::Containerd { path, cause } => write!(
                f,
                "cannot read containerd's metadata {}: {cause}. Nothing was changed: give the right path with \
                 --containerd-metadata, {WITHOUT}",
                path.display()
            ),
            Self::NoContainerd { path } => write!(
                f,
                "there is no metadata of containerd at {}. Nothing was changed: give the right path with \
                 --containerd-metadata (it is io.containerd.metadata.v1.bolt/meta.db in containerd's root), {WITHOUT}",
                path.display()
            ),
            Self::System(cause) => write!(f, "{cause}; nothing was changed"),
            Self::Keep { path, cause } => {
                write!(f, "cannot keep the old metadata as {}: {cause}; nothing was changed", path.display())
            }
        }
    }
}

impl std::error::Error for Error {}

impl From<system::Error> for Error {
    fn from(cause: system::Error) -> Self {
        Self::System(cause)
    }
}

/// The caller holds the lock of the state root. `repository` is where published layers are.
pub fn run(
    metadata: &Path,
    paths: &SnapshotPaths,
    repository: &str,
    wanted: &RebuildOptions,
    sys: &dyn Sys,
) -> Result<Report, Error> {
    match Store::check(metadata) {
        Ok(()) => return Err(Error::Sound { path: metadata.to_owned() }),
        Err(store::Error::Damaged { .. }) => {}
        Err(e) if matches!(e.errno(), Some(Errno::ENOENT | Errno::EIO)) => {}
        // A file of another version, and one that the machine cannot read now, are not damaged.
        Err(other) => return Err(Error::Metadata(other)),
    }
    // Held until the new store stands: containerd must not begin meanwhile.
    let held = open_containerd_db(&wanted.containerd)?;
    let known = match &held {
        None => Vec::new(),
        Some((path, held)) => containerd::read(&held.bytes, &wanted.snapshotter)
            .map_err(|cause| Error::Containerd { path: path.clone(), cause: cause.into() })?,
    };
    let names: HashMap<&str, &KnownSnapshot> = known.iter().map(|known| (known.name.as_str(), known)).collect();
    let found = scan_state_root(paths, sys)?;
    let mut candidates = found.candidates;
    for sidecar in found.sidecars {
        candidates.push(resolve_sidecar(sidecar, &names));
    }
    let present: HashSet<String> = candidates.iter().map(|candidate| candidate.name.clone()).collect();
    let highest = highest_used_id(&found.ids, &known);
    candidates.extend(remote_candidates(&known, &present, highest, repository));
    let kept = chain_validation::validate(candidates);
    let last = kept.snapshots.iter().map(|snapshot| snapshot.id).max().max(Some(highest));
    let old = keep_old(metadata)?;
    Store::create(metadata, last, &kept.snapshots, &found.leftovers).map_err(|cause| {
        // Otherwise the second names are the only ones of the old files.
        if let Some(old) = old.as_ref().filter(|_| metadata.exists()) {
            let _ = fs::remove_file(Store::wal_of(old));
            let _ = fs::remove_file(old);
        }
        Error::Metadata(cause)
    })?;
    let containerd = held.map(|(path, _)| path);
    let (metadata, snapshotter) = (metadata.to_owned(), wanted.snapshotter.clone());
    Ok(Report { metadata, snapshotter, old, ..report(containerd, &kept, &known) })
}

fn open_containerd_db(containerd: &ContainerdDb) -> Result<Option<(PathBuf, file::LockedFile)>, Error> {
    let path = match containerd {
        ContainerdDb::Without => return Ok(None),
        ContainerdDb::Default => Path::new(DEFAULT_CONTAINERD),
        ContainerdDb::At(path) => path,
    };
    match file::read(path) {
        Ok(Some(held)) => Ok(Some((path.to_owned(), held))),
        Ok(None) => Err(Error::NoContainerd { path: path.to_owned() }),
        Err(cause) => Err(Error::Containerd { path: path.to_owned(), cause }),
    }
}

/// What is in the directory of all snapshots.
#[derive(Default)]
struct StateRootScan {
    sidecars: Vec<Sidecar>,
    /// Local ones that cannot be told.
    candidates: Vec<Candidate>,
    /// Where something published was attached: it is attached anew where it is needed.
    leftovers: Vec<SnapshotId>,
    ids: Vec<SnapshotId>,
}

fn scan_state_root(paths: &SnapshotPaths, sys: &dyn Sys) -> Result<StateRootScan, Error> {
    let mut found = StateRootScan::default();
    let mounts = sys.mounts_below(paths.snapshots_dir())?;
    found.ids = system::snapshot_ids(sys, paths.snapshots_dir())?;
    for &id in &found.ids {
        let is_link = |path: &Path| sys.lstat(path).is_ok_and(|status| status.file_type == FileType::Symlink);
        let root = paths.attached_root(id, SourceVariant(0));
        let is_attached =
            sys.lstat(&paths.bind_mounts_dir(id)).is_ok() || is_link(&root) || is_link(&root.with_extension("of"));
        // A Go snapshotter's attachment has nothing beside it.
        if is_attached || mounts.contains(&paths.fs(id)) {
            found.leftovers.push(id);
            continue;
        }
        let odd = match read_sidecar(&paths.sidecar(id), sys)? {
            Some(sidecar) if sidecar.prepared.id != id => RejectReason::OtherId(sidecar.prepared.id),
            None => RejectReason::NoSidecar,
            Some(sidecar) => match sys.lstat(&paths.fs(id)) {
                Ok(status) if status.file_type == FileType::Directory => {
                    found.sidecars.push(sidecar);
                    continue;
                }
                _ => {
                    let name = sidecar.committed.as_ref().unwrap_or(&sidecar.prepared).key.as_str().to_owned();
                    found.candidates.push(Candidate { name, record: Err(RejectReason::NoFiles) });
                    continue;
                }
            },
        };
        found.candidates.push(Candidate { name: paths.snapshot_dir(id).display().to_string(), record: Err(odd) });
    }
    Ok(found)
}

/// None: there is none, or not all of one.
fn read_sidecar(path: &Path, sys: &dyn Sys) -> Result<Option<Sidecar>, Error> {
    match sys.read_file(path, MAX_RECORD) {
        Ok(bytes) => Ok(Sidecar::decode(&bytes)),
        Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::EFBIG | NOT_REGULAR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// What a local snapshot is: what containerd calls it by, or else what was begun.
fn resolve_sidecar(sidecar: Sidecar, names: &HashMap<&str, &KnownSnapshot>) -> Candidate {
    let Sidecar { prepared: made, committed } = sidecar;
    let mut snapshot = match committed {
        Some(committed) if names.contains_key(committed.key.as_str()) => committed,
        Some(committed) if !names.contains_key(made.key.as_str()) => committed,
        _ => made,
    };
    if let Some(known) = names.get(snapshot.key.as_str()) {
        snapshot.labels = known.inherited_labels();
    }
    Candidate { name: snapshot.key.as_str().to_owned(), record: Ok(snapshot) }
}

/// New ids are above every number that was ever used, in directories or in names.
fn highest_used_id(ids: &[SnapshotId], known: &[KnownSnapshot]) -> SnapshotId {
    let in_names = known.iter().filter_map(|known| known.name.strip_prefix("cvmfs/")?.split('/').next()?.parse().ok());
    let in_names = in_names.map(SnapshotId).filter(SnapshotId::is_possible);
    ids.iter().copied().chain(in_names).max().unwrap_or_default()
}

/// The published layers that containerd knows, with new ids; and what it knows that is lost.
fn remote_candidates(
    known: &[KnownSnapshot],
    present: &HashSet<String>,
    highest: SnapshotId,
    repository: &str,
) -> Vec<Candidate> {
    let by_key: HashMap<(&str, &str), &KnownSnapshot> =
        known.iter().map(|known| ((known.namespace.as_str(), known.key.as_str()), known)).collect();
    let mut seen: HashMap<&str, (Option<Key>, Option<String>)> = HashMap::new();
    let mut candidates = Vec::new();
    for one in known.iter().filter(|known| !present.contains(&known.name)) {
        let record = read_remote(one, &by_key, SnapshotId(highest.0 + 1 + candidates.len() as u64), repository);
        // Namespaces share a layer; they agree on what it is.
        let what = match &record {
            Ok(snapshot) => (snapshot.parent.clone(), snapshot.layer.as_ref().map(|l| l.digest.to_string())),
            Err(_) => (None, None),
        };
        if seen.get(one.name.as_str()) == Some(&what) {
            continue;
        }
        seen.insert(&one.name, what);
        candidates.push(Candidate { name: one.name.clone(), record });
    }
    candidates
}

fn read_remote(
    known: &KnownSnapshot,
    by_key: &HashMap<(&str, &str), &KnownSnapshot>,
    id: SnapshotId,
    repository: &str,
) -> Result<Snapshot, RejectReason> {
    if !known.is_remote() {
        return Err(RejectReason::OnlyInContainerd);
    }
    let text = known.labels.get(LABEL_LAYER_DIGEST).ok_or(RejectReason::NoDigest)?;
    let digest = Digest::parse(text).map_err(|why| RejectReason::Digest { digest: text.clone(), why })?;
    let parent = match &known.parent {
        None => None,
        Some(parent) => match by_key.get(&(known.namespace.as_str(), parent.as_str())) {
            Some(found) => Key::parse_optional(&found.name)?,
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

/// Second names for the old file and its log, which the new one then takes the first ones from. After a kill, the last
/// writes are in the log and not in the file.
fn keep_old(metadata: &Path) -> Result<Option<PathBuf>, Error> {
    for n in 1.. {
        let mut name = metadata.as_os_str().to_owned();
        name.push(format!(".damaged-{n}"));
        let kept = PathBuf::from(name);
        match fs::hard_link(metadata, &kept) {
            Ok(()) => {
                return match fs::hard_link(Store::wal_of(metadata), Store::wal_of(&kept)) {
                    Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(Error::Keep { path: kept, cause }),
                    _ => Ok(Some(kept)),
                };
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            // It was moved away.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(Error::Keep { path: kept, cause }),
        }
    }
    Ok(None)
}

/// What came back, and what did not.
fn report(containerd: Option<PathBuf>, kept: &Accepted, known: &[KnownSnapshot]) -> Report {
    let count = |wanted: fn(&&Snapshot) -> bool| kept.snapshots.iter().filter(wanted).count();
    let names: HashSet<&str> = known.iter().map(|known| known.name.as_str()).collect();
    let keys: HashSet<&str> = kept.snapshots.iter().map(|snapshot| snapshot.key.as_str()).collect();
    let unknown = |snapshot: &&Snapshot| containerd.is_some() && !names.contains(snapshot.key.as_str());
    Report {
        published: count(|s| s.layer.is_some()),
        committed: count(|s| s.layer.is_none() && s.kind == Kind::Committed),
        active: count(|s| s.kind == Kind::Active),
        views: count(|s| s.kind == Kind::View),
        unknown: kept.snapshots.iter().filter(unknown).count(),
        left_out: kept.left_out.iter().map(|one| (one.name.clone(), one.why.to_string())).collect(),
        repairs: containerd::repairs(known, &|name| keys.contains(name)),
        containerd,
        ..Report::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LABEL_IMAGE_REF, LABEL_REMOTE, LABEL_SNAPSHOT_REF, Labels, Timestamp};

    fn known(namespace: &str, key: &str, name: &str, parent: &str, labels: &[(&str, &str)]) -> KnownSnapshot {
        KnownSnapshot {
            namespace: namespace.to_owned(),
            key: key.to_owned(),
            name: name.to_owned(),
            parent: Some(parent.to_owned()).filter(|parent| !parent.is_empty()),
            labels: labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
            created: Timestamp(7),
            updated: Timestamp(8),
        }
    }

    fn snapshot(key: &str, kind: Kind) -> Snapshot {
        Snapshot {
            id: SnapshotId(3),
            key: Key::parse(key).unwrap(),
            parent: None,
            kind,
            created: Timestamp(1),
            updated: Timestamp(1),
            labels: Labels::from([("of".to_owned(), key.to_owned())]),
            layer: None,
            usage: None,
        }
    }

    #[test]
    fn containerd_says_whether_a_commit_that_was_begun_holds() {
        let made = || snapshot("ns/1/extract", Kind::Active);
        let begun = || Sidecar { prepared: made(), committed: Some(snapshot("ns/2/layer", Kind::Committed)) };
        let decided = |sidecar, known: &[KnownSnapshot]| {
            let names = known.iter().map(|known| (known.name.as_str(), known)).collect();
            let record = resolve_sidecar(sidecar, &names).record.unwrap();
            (record.kind, record.labels)
        };
        let of = |key: &str| Labels::from([("of".to_owned(), key.to_owned())]);
        let inherited = [("containerd.io/snapshot/a", "1"), ("containerd.io/gc.root", "x"), (LABEL_SNAPSHOT_REF, "r")];
        let kept = Labels::from([inherited[0], inherited[2]].map(|(k, v)| (k.to_owned(), v.to_owned())));
        let only_made = [known("ns", "extract", "ns/1/extract", "", &inherited)];
        let only_layer = [known("ns", "sha256:c", "ns/2/layer", "", &inherited)];
        assert_eq!(decided(begun(), &only_made), (Kind::Active, kept.clone()));
        assert_eq!(decided(begun(), &only_layer), (Kind::Committed, kept));
        assert_eq!(decided(begun(), &[]), (Kind::Committed, of("ns/2/layer")));
        let plain = Sidecar { prepared: made(), committed: None };
        assert_eq!(decided(plain, &[]), (Kind::Active, of("ns/1/extract")));
    }

    #[test]
    fn published_layers_come_from_labels_once_for_all_namespaces() {
        let digest = format!("sha256:{}", "1".repeat(64));
        let labels = [(LABEL_REMOTE.0, LABEL_REMOTE.1), (LABEL_LAYER_DIGEST, digest.as_str())];
        let all = [
            known("a", "c1", "cvmfs/0/c1", "", &labels),
            known("b", "c1", "cvmfs/0/c1", "", &labels),
            known("a", "c2", "cvmfs/90/c2", "c1", &labels),
            known("a", "box", "a/7/box", "c2", &[]),
            known("a", "bad", "cvmfs/0/bad", "", &[labels[0], (LABEL_LAYER_DIGEST, "sha256:../..")]),
            known("a", "none", "cvmfs/0/none", "", &labels[..1]),
            known("a", "orphan", "cvmfs/0/orphan", "gone", &labels),
            known("a", "local", "a/1/local", "", &[]),
        ];
        let highest = highest_used_id(&[SnapshotId(12)], &all);
        assert_eq!(highest, SnapshotId(90));
        let present = HashSet::from(["a/1/local".to_owned()]);
        let kept = chain_validation::validate(remote_candidates(&all, &present, highest, "r"));
        let names: Vec<_> =
            kept.snapshots.iter().map(|s| (s.key.as_str(), s.parent.as_ref().map(Key::as_str))).collect();
        assert_eq!(names, [("cvmfs/0/c1", None), ("cvmfs/90/c2", Some("cvmfs/0/c1"))]);
        assert!(kept.snapshots.iter().all(|s| s.id > highest && s.layer.as_ref().unwrap().repository == "r"));
        let whys: Vec<&RejectReason> = kept.left_out.iter().map(|one| &one.why).collect();
        assert!(matches!(
            whys[..],
            [
                RejectReason::OnlyInContainerd,
                RejectReason::Digest { .. },
                RejectReason::NoDigest,
                RejectReason::ParentMissing(_)
            ]
        ));
        // Two that say different things of one name.
        let other = [(LABEL_REMOTE.0, LABEL_REMOTE.1), (LABEL_LAYER_DIGEST, digest.as_str())];
        let torn = [
            known("a", "x", "same", "", &other),
            known("b", "p", "p", "", &other),
            known("b", "x", "same", "p", &other),
        ];
        let kept = chain_validation::validate(remote_candidates(&torn, &HashSet::new(), SnapshotId(0), "r"));
        assert_eq!(kept.snapshots.len(), 1);
        assert!(kept.left_out.iter().all(|one| one.why == RejectReason::SameKey));
    }

    #[test]
    fn what_is_lost_is_repaired_by_image_and_the_rest_by_snapshot() {
        let image = |reference| [(LABEL_IMAGE_REF, reference)];
        let all = [
            known("k8s.io", "c1", "1", "", &image("r/a:1")),
            known("k8s.io", "c2", "2", "c1", &image("r/a:1")),
            known("k8s.io", "c3", "3", "c2", &image("r/b:1")),
            known("k8s.io", "d1", "4", "", &image("r/fine:1")),
            known("default", "e1", "5", "", &[]),
            known("default", "box", "6", "e1", &[]),
        ];
        let repairs = containerd::repairs(&all, &|name| ["1", "3", "4", "5"].contains(&name));
        let shown: Vec<String> = repairs.iter().map(|repair| format!("{repair:?}")).collect();
        assert_eq!(
            shown,
            [
                r#"Image { namespace: "k8s.io", reference: "r/a:1" }"#,
                r#"Image { namespace: "k8s.io", reference: "r/b:1" }"#,
                r#"Snapshot { namespace: "default", key: "box" }"#,
            ]
        );
    }
}
