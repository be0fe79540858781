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

use self::containerd::Known;
pub use self::report::Report;
use crate::bolt::file;
use crate::overlay::{Edition, Places};
use crate::sidecar::Sidecar;
use crate::store::{self, Store};
use crate::sys::{self, FileType, NOT_REGULAR, Sys};
use crate::takeover::lineage::{self, Candidate, Kept, Odd};
use crate::types::{Digest, Key, Kind, LABEL_LAYER_DIGEST, Layer, Snapshot, SnapshotId};

pub const DEFAULT_CONTAINERD: &str = "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db";
pub const DEFAULT_NAME: &str = "cvmfs-snapshotter";
/// A record beside files has labels and two names; this is more than both can have.
const MOST_RECORD: u64 = 4 << 20;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub containerd: Containerd,
    /// Under which name containerd knows us.
    pub snapshotter: String,
    pub json: bool,
}

/// Where containerd's metadata is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Containerd {
    /// At its usual place, if it is there.
    Default,
    At(PathBuf),
    Without,
}

impl Containerd {
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
    System(sys::Error),
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

impl From<sys::Error> for Error {
    fn from(cause: sys::Error) -> Self {
        Self::System(cause)
    }
}

/// The caller holds the lock of the state root. `repository` is where published layers are.
pub fn run(
    metadata: &Path,
    places: &Places,
    repository: &str,
    wanted: &Wanted,
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
    let held = hold(&wanted.containerd)?;
    let known = match &held {
        None => Vec::new(),
        Some((path, held)) => containerd::read(&held.bytes, &wanted.snapshotter)
            .map_err(|cause| Error::Containerd { path: path.clone(), cause: cause.into() })?,
    };
    let names: HashMap<&str, &Known> = known.iter().map(|known| (known.name.as_str(), known)).collect();
    let found = look(places, sys)?;
    let mut candidates = found.candidates;
    for sidecar in found.sidecars {
        candidates.push(decide(sidecar, &names));
    }
    let present: HashSet<String> = candidates.iter().map(|candidate| candidate.name.clone()).collect();
    let highest = highest(&found.ids, &known);
    candidates.extend(remote(&known, &present, highest, repository));
    let kept = lineage::keep(candidates);
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

fn hold(containerd: &Containerd) -> Result<Option<(PathBuf, file::Held)>, Error> {
    let path = match containerd {
        Containerd::Without => return Ok(None),
        Containerd::Default => Path::new(DEFAULT_CONTAINERD),
        Containerd::At(path) => path,
    };
    match file::read(path) {
        Ok(Some(held)) => Ok(Some((path.to_owned(), held))),
        Ok(None) => Err(Error::NoContainerd { path: path.to_owned() }),
        Err(cause) => Err(Error::Containerd { path: path.to_owned(), cause }),
    }
}

/// What is in the directory of all snapshots.
#[derive(Default)]
struct Found {
    sidecars: Vec<Sidecar>,
    /// Local ones that cannot be told.
    candidates: Vec<Candidate>,
    /// Where something published was attached: it is attached anew where it is needed.
    leftovers: Vec<SnapshotId>,
    ids: Vec<SnapshotId>,
}

fn look(places: &Places, sys: &dyn Sys) -> Result<Found, Error> {
    let mut found = Found::default();
    let mounts = sys.mounts_below(places.all())?;
    found.ids = sys::snapshot_ids(sys, places.all())?;
    for &id in &found.ids {
        let is_link = |path: &Path| sys.lstat(path).is_ok_and(|status| status.file_type == FileType::Symlink);
        let root = places.root(id, Edition(0));
        let is_attached = sys.lstat(&places.bound(id)).is_ok() || is_link(&root) || is_link(&root.with_extension("of"));
        // A Go snapshotter's attachment has nothing beside it.
        if is_attached || mounts.contains(&places.fs(id)) {
            found.leftovers.push(id);
            continue;
        }
        let odd = match sidecar(&places.record(id), sys)? {
            Some(sidecar) if sidecar.made.id != id => Odd::OtherId(sidecar.made.id),
            None => Odd::NoSidecar,
            Some(sidecar) => match sys.lstat(&places.fs(id)) {
                Ok(status) if status.file_type == FileType::Directory => {
                    found.sidecars.push(sidecar);
                    continue;
                }
                _ => {
                    let name = sidecar.committed.as_ref().unwrap_or(&sidecar.made).key.as_str().to_owned();
                    found.candidates.push(Candidate { name, record: Err(Odd::NoFiles) });
                    continue;
                }
            },
        };
        found.candidates.push(Candidate { name: places.home(id).display().to_string(), record: Err(odd) });
    }
    Ok(found)
}

/// None: there is none, or not all of one.
fn sidecar(path: &Path, sys: &dyn Sys) -> Result<Option<Sidecar>, Error> {
    match sys.read_file(path, MOST_RECORD) {
        Ok(bytes) => Ok(Sidecar::decode(&bytes)),
        Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::EFBIG | NOT_REGULAR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// What a local snapshot is: what containerd calls it by, or else what was begun.
fn decide(sidecar: Sidecar, names: &HashMap<&str, &Known>) -> Candidate {
    let Sidecar { made, committed } = sidecar;
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
fn highest(ids: &[SnapshotId], known: &[Known]) -> SnapshotId {
    let in_names = known.iter().filter_map(|known| known.name.strip_prefix("cvmfs/")?.split('/').next()?.parse().ok());
    let in_names = in_names.map(SnapshotId).filter(SnapshotId::is_possible);
    ids.iter().copied().chain(in_names).max().unwrap_or_default()
}

/// The published layers that containerd knows, with new ids; and what it knows that is lost.
fn remote(known: &[Known], present: &HashSet<String>, highest: SnapshotId, repository: &str) -> Vec<Candidate> {
    let by_key: HashMap<(&str, &str), &Known> =
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
    known: &Known,
    by_key: &HashMap<(&str, &str), &Known>,
    id: SnapshotId,
    repository: &str,
) -> Result<Snapshot, Odd> {
    if !known.is_remote() {
        return Err(Odd::OnlyInContainerd);
    }
    let text = known.labels.get(LABEL_LAYER_DIGEST).ok_or(Odd::NoDigest)?;
    let digest = Digest::parse(text).map_err(|why| Odd::Digest { digest: text.clone(), why })?;
    let parent = match &known.parent {
        None => None,
        Some(parent) => match by_key.get(&(known.namespace.as_str(), parent.as_str())) {
            Some(found) => Key::parse_optional(&found.name)?,
            None => return Err(Odd::ParentMissing(Key::parse(parent)?)),
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
fn report(containerd: Option<PathBuf>, kept: &Kept, known: &[Known]) -> Report {
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
    use crate::types::{LABEL_IMAGE_REF, LABEL_REMOTE, LABEL_SNAPSHOT_REF, Labels, Timestamp};

    fn known(namespace: &str, key: &str, name: &str, parent: &str, labels: &[(&str, &str)]) -> Known {
        Known {
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
        let begun = || Sidecar { made: made(), committed: Some(snapshot("ns/2/layer", Kind::Committed)) };
        let decided = |sidecar, known: &[Known]| {
            let names = known.iter().map(|known| (known.name.as_str(), known)).collect();
            let record = decide(sidecar, &names).record.unwrap();
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
        let plain = Sidecar { made: made(), committed: None };
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
        let highest = highest(&[SnapshotId(12)], &all);
        assert_eq!(highest, SnapshotId(90));
        let present = HashSet::from(["a/1/local".to_owned()]);
        let kept = lineage::keep(remote(&all, &present, highest, "r"));
        let names: Vec<_> =
            kept.snapshots.iter().map(|s| (s.key.as_str(), s.parent.as_ref().map(Key::as_str))).collect();
        assert_eq!(names, [("cvmfs/0/c1", None), ("cvmfs/90/c2", Some("cvmfs/0/c1"))]);
        assert!(kept.snapshots.iter().all(|s| s.id > highest && s.layer.as_ref().unwrap().repository == "r"));
        let whys: Vec<&Odd> = kept.left_out.iter().map(|one| &one.why).collect();
        assert!(matches!(whys[..], [Odd::OnlyInContainerd, Odd::Digest { .. }, Odd::NoDigest, Odd::ParentMissing(_)]));
        // Two that say different things of one name.
        let other = [(LABEL_REMOTE.0, LABEL_REMOTE.1), (LABEL_LAYER_DIGEST, digest.as_str())];
        let torn = [
            known("a", "x", "same", "", &other),
            known("b", "p", "p", "", &other),
            known("b", "x", "same", "p", &other),
        ];
        let kept = lineage::keep(remote(&torn, &HashSet::new(), SnapshotId(0), "r"));
        assert_eq!(kept.snapshots.len(), 1);
        assert!(kept.left_out.iter().all(|one| one.why == Odd::SameKey));
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
