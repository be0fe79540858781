//! The promises, tried from the inside: an operation stopped between any two of its steps,
//! and random operations against a model of the contract.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::overlay::Form;
use crate::repository::lane::Turn;
use crate::repository::scan::{Extent, Subject};
use crate::sys::Host;
use crate::sys::failing::{After, Failing};
use crate::types::LABEL_IMAGE_REF;

/// A state root and a repository with two layers: the second deletes a file and replaces a
/// directory of the first.
struct Place {
    dir: tempfile::TempDir,
    mode: Mode,
}

fn digest(n: u8) -> Digest {
    Digest::parse(&format!("sha256:{}", format!("{n:02x}").repeat(32))).unwrap()
}

impl Place {
    fn new(mode: Mode) -> Self {
        // What is mounted here nobody else sees, and it is gone with the test.
        unshare(CloneFlags::CLONE_NEWNS).expect("needs root: run make test as root");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
        let place = Self { dir: tempfile::tempdir().unwrap(), mode };
        fs::create_dir(place.snapshots()).unwrap();
        for (n, files) in
            [(1, &["gone", "dir/old", ".cvmfscatalog"][..]), (2, &[".wh.gone", "dir/.wh..wh..opq", "dir/new"])]
        {
            let top = place.layer(n);
            for file in files {
                fs::create_dir_all(top.join(file).parent().unwrap()).unwrap();
                fs::write(top.join(file), "").unwrap();
            }
        }
        place
    }

    fn layer(&self, n: u8) -> PathBuf {
        let hex = digest(n).hex().to_owned();
        self.dir.path().join("cvmfs/.layers").join(&hex[..2]).join(hex).join("layerfs")
    }

    fn snapshots(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    /// As after the start of a process. One that ended before has let go of the store.
    fn open(&self, sys: Arc<dyn Sys>) -> Snapshotter {
        let path = self.dir.path().join("metadata.redb");
        let store = loop {
            match Store::open(&path, None) {
                Err(crate::store::Error::InUse { .. }) => std::thread::yield_now(),
                store => break store.unwrap(),
            }
        };
        let timeout = std::time::Duration::from_secs(10);
        let repository = Repository::new("r".into(), self.dir.path().join("cvmfs"), timeout, Arc::clone(&sys));
        let ways = Ways { attach: self.mode, rootfs: RootfsMode::Auto, overlay_options: Vec::new() };
        Snapshotter::new(store, vec![repository], sys, &self.snapshots(), ways).unwrap()
    }

    /// A process that finds what another one left.
    fn restart(&self) -> Snapshotter {
        let snapshotter = self.open(Arc::new(Host));
        assert_eq!(snapshotter.recover().unwrap().broken, []);
        snapshotter.cleanup(&|| false).unwrap();
        snapshotter
    }

    fn on_disk(&self) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(self.snapshots()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn mounts(&self) -> usize {
        Host.mounts_below(self.dir.path()).unwrap().len()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for point in Host.mounts_below(self.dir.path()).unwrap_or_default() {
            let _ = Host.unmount(&point, crate::sys::Unmount::Detach);
        }
    }
}

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

fn wanted(name: &str, parent: &str, labels: &[(&str, &str)]) -> Wanted {
    Wanted {
        key: key(name),
        parent: Key::parse_optional(parent).unwrap(),
        labels: labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
    }
}

/// Pulls layer `n` onto `parent`; the result is the name of its snapshot.
fn pull(s: &Snapshotter, n: u8, parent: &str) -> String {
    let reference = format!("sha256:chain-{n}");
    let digest = digest(n);
    let labels = [
        (LABEL_SNAPSHOT_REF, reference.as_str()),
        (LABEL_LAYER_DIGEST, digest.as_str()),
        (LABEL_IMAGE_REF, "example.org/image:1"),
    ];
    let asked = wanted("extract", parent, &labels);
    assert!(matches!(s.prepare(asked), Err(Error::RemoteCommitted { .. })));
    let parent_id = if parent.is_empty() { 0 } else { s.stat(&key(parent)).unwrap().id.0 };
    format!("cvmfs/{parent_id}/{reference}")
}

/// The number of directories with markers in layer `n`.
fn look_through(s: &Snapshotter, place: &Place, n: u8) -> usize {
    let repository = &s.sources.repositories[0];
    let subject = Subject { extent: Extent::Layer, digest: digest(n), repository: repository.name().to_owned() };
    let soon = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let found = match s.sources.scans.known(&subject).unwrap() {
        Some(known) => known,
        None => s.sources.scans.start(&subject, repository, place.layer(n), Turn::Next).unwrap().wait(soon).unwrap(),
    };
    found.directories.len()
}

/// Removes all snapshots, children first; whatever state they are in, nothing may be left.
fn remove_all(place: &Place, s: &Snapshotter) {
    loop {
        let mut all = s.list(None, |_| true).unwrap();
        if all.is_empty() {
            break;
        }
        let before = all.len();
        all.retain(|snapshot| s.remove(&snapshot.key).is_err());
        assert!(all.len() < before, "something cannot be removed");
    }
    s.cleanup(&|| false).unwrap();
    assert_eq!((place.on_disk(), place.mounts()), (Vec::<String>::new(), 0));
}

/// Publishes the image of both layers whole: what its manifest says, and its root.
fn publish_flat(place: &Place) {
    let cvmfs = place.dir.path().join("cvmfs");
    let metadata = cvmfs.join(".metadata/example.org/image:1");
    fs::create_dir_all(&metadata).unwrap();
    let [one, two, config] = [1, 2, 9].map(|n| digest(n).as_str().to_owned());
    let manifest =
        format!(r#"{{"Config":{{"Digest":"{config}"}},"Layers":[{{"Digest":"{one}"}},{{"Digest":"{two}"}}]}}"#);
    fs::write(metadata.join("manifest.json"), manifest).unwrap();
    let top = cvmfs.join(".flat/09").join(digest(9).hex());
    for file in [".cvmfscatalog", "dir/new", "dir/.cvmfscatalog", "environment"] {
        fs::create_dir_all(top.join(file).parent().unwrap()).unwrap();
        fs::write(top.join(file), "").unwrap();
    }
}

/// As `check_files`, where the whole root is the only lower directory.
fn check_flat(mounts: &[Mount]) {
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
    let [mask, flat] = lower.split(':').map(Path::new).collect::<Vec<_>>()[..] else { panic!("{lower}") };
    for hidden in [".cvmfscatalog", "dir/.cvmfscatalog", "environment"] {
        assert!(flat.join(hidden).exists());
        assert_eq!(fs::symlink_metadata(mask.join(hidden)).unwrap().mode() & 0o170_000, 0o020_000);
    }
    assert!(flat.join("dir/new").exists());
}

/// The lower directories hold what they should: a layer whose attachment was cut short
/// must not pass for an empty one.
fn check_files(place: &Place, mounts: &[Mount]) {
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
    let all: Vec<&Path> = lower.split(':').map(Path::new).collect();
    assert_eq!(all.len(), 5, "{lower}");
    let whiteout = |path: PathBuf| {
        let status = fs::symlink_metadata(path).unwrap();
        assert_eq!((status.rdev(), status.mode() & 0o170_000), (0, 0o020_000));
    };
    let [mask2, layer2, hide2, mask1, layer1] = all[..] else { unreachable!() };
    whiteout(mask2.join(".wh.gone"));
    whiteout(mask2.join("dir/.wh..wh..opq"));
    assert!(layer2.join("dir/new").exists());
    whiteout(hide2.join("gone"));
    assert_eq!(xattr::get(hide2.join("dir"), "trusted.overlay.opaque").unwrap().as_deref(), Some(&b"y"[..]));
    whiteout(mask1.join(".cvmfscatalog"));
    assert!(layer1.join("gone").exists());
    let mode = |path: PathBuf| fs::metadata(path).map(|m| (m.mode(), m.mtime(), m.mtime_nsec())).unwrap();
    assert_eq!(mode(mask2.join("dir")), mode(place.layer(2).join("dir")), "a mask looks like the layer");
}

/// Runs `operation` again and again, each time with another of its steps failing, until it
/// has no more steps. Afterwards the same must work, and everything can be removed.
fn stop_at_every_step(mode: Mode, prepare: impl Fn(&Snapshotter), operation: impl Fn(&Snapshotter) -> Result<()>) {
    for (after, form) in [
        (After::Recovers, Form::Layer),
        (After::Dead, Form::Layer),
        (After::Recovers, Form::Flat),
        (After::Dead, Form::Flat),
    ] {
        for step in 0.. {
            let place = Place::new(mode);
            if form == Form::Flat {
                publish_flat(&place);
            }
            {
                let s = place.open(Arc::new(Host));
                let chain = pull(&s, 1, "");
                let top = pull(&s, 2, &chain);
                assert_eq!(top, "cvmfs/1/sha256:chain-2");
                // The scans are made, so that only the operation's own steps are counted.
                drop(s.view(wanted("scan", &top, &[])).unwrap());
                s.remove(&key("scan")).unwrap();
                s.cleanup(&|| false).unwrap();
                prepare(&s);
            }
            let failing = Arc::new(Failing::at(step, Errno::EIO, after));
            let result = {
                let s = place.open(Arc::<Failing>::clone(&failing));
                operation(&s)
            };
            let steps = failing.recorded().len();
            let s = place.restart();
            if result.is_err() {
                assert!(s.stat(&key("new")).is_err(), "step {step}: what was refused is there");
                let again = operation(&s);
                assert!(again.is_ok(), "step {step}, {after:?}: {}", again.unwrap_err());
            }
            if s.stat(&key("new")).is_ok() {
                let mounts = s.mounts(&key("new")).unwrap();
                if form == Form::Flat { check_flat(&mounts) } else { check_files(&place, &mounts) }
            }
            remove_all(&place, &s);
            if steps <= step {
                assert!(step > 0, "the operation has no steps");
                break;
            }
        }
    }
}

#[test]
fn root_a_prepare_may_stop_between_any_two_steps() {
    for mode in [Mode::Bind, Mode::Symlink] {
        stop_at_every_step(mode, |_| {}, |s| s.prepare(wanted("new", "cvmfs/1/sha256:chain-2", &[])).map(drop));
    }
}

#[test]
fn root_a_view_may_stop_between_any_two_steps() {
    stop_at_every_step(Mode::Bind, |_| {}, |s| s.view(wanted("new", "cvmfs/1/sha256:chain-2", &[])).map(drop));
}

#[test]
fn root_a_cleanup_may_stop_between_any_two_steps() {
    for mode in [Mode::Bind, Mode::Symlink] {
        stop_at_every_step(
            mode,
            |s| {
                for name in ["a", "b"] {
                    s.prepare(wanted(name, "cvmfs/1/sha256:chain-2", &[])).unwrap();
                    s.remove(&key(name)).unwrap();
                }
            },
            |s| s.cleanup(&|| false).map(drop),
        );
    }
}

#[test]
fn root_a_commit_may_stop_between_any_two_steps() {
    for after in [After::Recovers, After::Dead] {
        for step in 0.. {
            let place = Place::new(Mode::Symlink);
            place.open(Arc::new(Host)).prepare(wanted("work", "", &[])).unwrap();
            let failing = Arc::new(Failing::at(step, Errno::EIO, after));
            let commit = |s: &Snapshotter| s.commit(&key("new"), &key("work"), Labels::new(), None);
            let result = commit(&place.open(Arc::<Failing>::clone(&failing)));
            let s = place.restart();
            if result.is_err() {
                assert_eq!(s.stat(&key("work")).unwrap().kind, Kind::Active, "step {step}");
                assert!(s.stat(&key("new")).is_err(), "step {step}: what was refused is there");
                commit(&s).unwrap();
            }
            let committed = s.stat(&key("new")).unwrap();
            let beside = Sidecar::decode(&fs::read(s.places.record(committed.id)).unwrap()).unwrap();
            assert_eq!((beside.made.key, beside.committed), (key("work"), Some(committed)), "step {step}");
            remove_all(&place, &s);
            if result.is_ok() {
                assert_eq!(step, failing.recorded().len());
                break;
            }
        }
    }
}

#[test]
fn root_a_panic_in_a_transaction_costs_only_its_own_call() {
    let place = Place::new(Mode::Bind);
    let s = place.open(Arc::new(Host));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        s.store.write(|tx| -> Result<()> {
            tx.schedule_cleanup(&[SnapshotId(99)])?;
            panic!("on purpose")
        })
    }));
    assert!(panicked.is_err());
    s.prepare(wanted("key", "", &[])).unwrap();
    assert_eq!(s.store.write(|tx| tx.begin_cleanup(9).map_err(Error::from)).unwrap(), []);
}

#[test]
fn root_a_layer_is_scanned_once_and_what_was_found_is_kept() {
    let place = Place::new(Mode::Symlink);
    let s = place.open(Arc::new(Host));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| look_through(&s, &place, 2));
        }
    });
    // Nobody looks at the layer again.
    fs::remove_dir_all(place.layer(2)).unwrap();
    assert_eq!(look_through(&s, &place, 2), 2);
}

/// The first container need not wait: what it stands on was decided and looked through.
#[test]
fn root_a_pull_does_ahead_what_the_first_container_needs() {
    for (form, extents) in [(Form::Layer, ["bottom", "layer"].as_slice()), (Form::Flat, &["flat"])] {
        let place = Place::new(Mode::Symlink);
        if form == Form::Flat {
            publish_flat(&place);
        }
        let s = place.restart();
        let chain = pull(&s, 1, "");
        pull(&s, 2, &chain);
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while scanned(&s) != extents {
            assert!(std::time::Instant::now() < until, "{form:?}: {:?}", scanned(&s));
            std::thread::yield_now();
        }
        assert_eq!(place.on_disk(), Vec::<String>::new(), "nothing is attached for it");
    }
}

/// The extents of what was looked through, in order.
fn scanned(s: &Snapshotter) -> Vec<String> {
    let all = s.store.read(|tx| tx.scans_of_nobody(|_| false).map_err(Error::from)).unwrap();
    let mut extents: Vec<String> = all.iter().map(|key| key.split(' ').next().unwrap().to_owned()).collect();
    extents.sort();
    extents
}

#[test]
fn root_scans_of_layers_that_nobody_has_are_forgotten_at_the_start() {
    let place = Place::new(Mode::Symlink);
    publish_flat(&place);
    let s = place.restart();
    let chain = pull(&s, 1, "");
    let top = pull(&s, 2, &chain);
    s.view(wanted("view", &top, &[])).unwrap();
    look_through(&s, &place, 2);
    s.remove(&key("view")).unwrap();
    drop(s);
    let s = place.restart();
    assert_eq!(scanned(&s), ["flat", "layer"]);
    remove_all(&place, &s);
    drop(s);
    assert_eq!(scanned(&place.restart()), Vec::<String>::new());
}

/// Layers were attached for a snapshot that was gone by then, and nobody took them away.
#[test]
fn root_mounts_of_a_snapshot_that_is_being_removed_leave_nothing_attached() {
    let place = Place::new(Mode::Bind);
    let shared: Arc<std::sync::OnceLock<Snapshotter>> = Arc::default();
    let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (other, trigger) = (Arc::clone(&shared), Arc::clone(&armed));
    let sys = Failing::meanwhile(move |call, path| {
        if call == "statfs" && path.ends_with("layerfs") && trigger.swap(false, Ordering::SeqCst) {
            let s = other.get().unwrap();
            s.remove(&key("container")).unwrap();
            s.cleanup(&|| false).unwrap();
        }
    });
    let s = shared.get_or_init(|| place.open(Arc::new(sys)));
    let chain = pull(s, 1, "");
    let top = pull(s, 2, &chain);
    s.prepare(wanted("container", &top, &[])).unwrap();
    armed.store(true, Ordering::SeqCst);
    assert!(matches!(s.mounts(&key("container")), Err(Error::NotFound(_))));
    s.cleanup(&|| false).unwrap();
    assert_eq!((place.on_disk(), place.mounts()), (Vec::<String>::new(), 0));
}

#[test]
fn root_a_repository_that_goes_away_in_the_middle_of_a_call_is_unavailable() {
    for mode in [Mode::Bind, Mode::Symlink] {
        // Before each question that is asked of the repository, one after the other.
        for step in 0.. {
            let place = Place::new(mode);
            let (here, away) = (place.dir.path().join("cvmfs"), place.dir.path().join("away"));
            let asked = std::sync::atomic::AtomicUsize::new(0);
            let gone = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let (top, tell) = (here.clone(), Arc::clone(&gone));
            let target = away.clone();
            let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let is_armed = Arc::clone(&armed);
            let sys = Failing::meanwhile(move |_, path| {
                let of_repository = path.starts_with(&top) && is_armed.load(Ordering::SeqCst);
                if of_repository && asked.fetch_add(1, Ordering::SeqCst) == step {
                    fs::rename(&top, &target).unwrap();
                    tell.store(true, Ordering::SeqCst);
                }
            });
            let s = place.open(Arc::new(sys));
            let chain = pull(&s, 1, "");
            let top = pull(&s, 2, &chain);
            drop(s.view(wanted("scan", &top, &[])).unwrap());
            s.remove(&key("scan")).unwrap();
            s.cleanup(&|| false).unwrap();
            armed.store(true, Ordering::SeqCst);
            let result = s.prepare(wanted("container", &top, &[]));
            if !gone.load(Ordering::SeqCst) {
                result.unwrap();
                assert!(step > 3, "the repository was hardly asked");
                break;
            }
            assert!(matches!(result, Ok(_) | Err(Error::LayerUnavailable { .. })), "{mode:?}, step {step}: {result:?}");
            fs::rename(&away, &here).unwrap();
            remove_all(&place, &s);
        }
    }
}

/// The contract in a page, without disks, threads and transactions.
#[derive(Default)]
struct Model {
    snapshots: BTreeMap<String, Modelled>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Modelled {
    parent: String,
    kind: Kind,
    labels: Labels,
    remote: bool,
}

/// The kinds of refusal that the model knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    NotFound,
    Invalid,
    Exists,
    Precondition,
}

fn refusal(error: &Error) -> Refused {
    match error {
        Error::NotFound(_) | Error::ParentNotFound(_) => Refused::NotFound,
        Error::ParentNotCommitted { .. } | Error::OtherParent { .. } => Refused::Invalid,
        Error::AlreadyExists(_) | Error::RemoteCommitted { .. } => Refused::Exists,
        Error::WrongKind { .. } | Error::HasChildren(_) | Error::NewParentNotCommitted { .. } => Refused::Precondition,
        other => panic!("the model knows no such error: {other}"),
    }
}

impl Model {
    fn check_new(&self, name: &str, parent: &str) -> std::result::Result<(), Refused> {
        match self.snapshots.get(parent) {
            None if !parent.is_empty() => Err(Refused::NotFound),
            Some(parent) if parent.kind != Kind::Committed => Err(Refused::Invalid),
            _ if self.snapshots.contains_key(name) => Err(Refused::Exists),
            _ => Ok(()),
        }
    }

    fn create(&mut self, kind: Kind, name: &str, parent: &str, labels: Labels) -> std::result::Result<(), Refused> {
        self.check_new(name, parent)?;
        self.snapshots.insert(name.to_owned(), Modelled { parent: parent.to_owned(), kind, labels, remote: false });
        Ok(())
    }

    fn commit(&mut self, name: &str, key: &str, parent: &str, labels: Labels) -> std::result::Result<(), Refused> {
        let active = self.snapshots.get(key).cloned().ok_or(Refused::NotFound)?;
        if self.snapshots.contains_key(name) {
            return Err(Refused::Exists);
        }
        if active.kind != Kind::Active {
            return Err(Refused::Precondition);
        }
        let parent = match (active.parent.as_str(), parent) {
            (own, "") => own.to_owned(),
            ("", named) => match self.snapshots.get(named) {
                None => return Err(Refused::NotFound),
                Some(found) if found.kind != Kind::Committed => return Err(Refused::Precondition),
                Some(_) => named.to_owned(),
            },
            (own, named) if own != named => return Err(Refused::Invalid),
            (own, _) => own.to_owned(),
        };
        self.snapshots.remove(key);
        self.snapshots.insert(name.to_owned(), Modelled { parent, kind: Kind::Committed, labels, remote: false });
        Ok(())
    }

    fn remove(&mut self, key: &str) -> std::result::Result<(), Refused> {
        if !self.snapshots.contains_key(key) {
            return Err(Refused::NotFound);
        }
        if self.snapshots.values().any(|s| s.parent == key) {
            return Err(Refused::Precondition);
        }
        self.snapshots.remove(key);
        Ok(())
    }

    /// Remote snapshots that an active one or a view stands on.
    fn attached(&self) -> usize {
        let mut needed = std::collections::BTreeSet::new();
        for snapshot in self.snapshots.values().filter(|s| s.kind != Kind::Committed) {
            let mut next = snapshot.parent.as_str();
            while let Some(ancestor) = self.snapshots.get(next) {
                if ancestor.remote {
                    needed.insert(next);
                }
                next = &ancestor.parent;
            }
        }
        needed.len()
    }
}

/// A small generator of numbers; the same seed gives the same run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

#[test]
fn root_random_operations_agree_with_the_model() {
    for seed in 0..6 {
        let place = Place::new(if seed % 2 == 0 { Mode::Bind } else { Mode::Symlink });
        let mut random = Random(seed);
        let mut model = Model::default();
        let mut s = place.restart();
        for step in 0..400 {
            let mut name = || ["", "a", "b", "c", "d", "e", "f"][1 + random.below(6)].to_owned();
            let (one, two) = (name(), name());
            let known: Vec<String> = model.snapshots.keys().cloned().chain([String::new()]).collect();
            let parent = known[random.below(known.len())].clone();
            let any = known[random.below(known.len())].clone();
            let any = if any.is_empty() { "absent".to_owned() } else { any };
            let labels: Labels = [("l".to_owned(), step.to_string())].into();
            let new = Wanted { key: key(&one), parent: Key::parse_optional(&parent).unwrap(), labels: labels.clone() };
            let (expected, actual) = match random.below(12) {
                0..=2 => (model.create(Kind::Active, &one, &parent, labels), s.prepare(new).map(drop)),
                3 => (model.create(Kind::View, &one, &parent, labels), s.view(new).map(drop)),
                4 | 5 => {
                    let named = if random.below(3) == 0 { parent } else { String::new() };
                    let expected = model.commit(&two, &any, &named, labels.clone());
                    let named = Key::parse_optional(&named).unwrap();
                    (expected, s.commit(&key(&two), &key(&any), labels, named.as_ref()))
                }
                6 | 7 => (model.remove(&any), s.remove(&key(&any))),
                8 => {
                    let present = model.snapshots.get_mut(&any);
                    let expected = present.map(|found| found.labels.clone_from(&labels)).ok_or(Refused::NotFound);
                    (expected, s.update(&key(&any), &LabelChange::Replace(labels)).map(drop))
                }
                9 => {
                    let n = u8::try_from(1 + random.below(2)).unwrap();
                    let reference = format!("sha256:chain-{n}");
                    let digest = digest(n);
                    let with = [(LABEL_SNAPSHOT_REF, reference.as_str()), (LABEL_LAYER_DIGEST, digest.as_str())];
                    let id = s.stat(&key(if parent.is_empty() { "none" } else { &parent })).map_or(0, |p| p.id.0);
                    let name = format!("cvmfs/{id}/{reference}");
                    let mut labels: Labels = with.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
                    let expected = match (model.check_new("extract", &parent), model.snapshots.get(&name)) {
                        (Err(refused), _) => Err(refused),
                        // Somebody changed its labels: containerd would not find it any more.
                        (Ok(()), Some(found)) if !found.labels.contains_key(LABEL_SNAPSHOT_REF) => {
                            model.create(Kind::Active, "extract", &parent, labels)
                        }
                        (Ok(()), Some(_)) => Err(Refused::Exists),
                        (Ok(()), None) => {
                            labels.insert(LABEL_REMOTE.0.to_owned(), LABEL_REMOTE.1.to_owned());
                            let parent = parent.clone();
                            model
                                .snapshots
                                .insert(name, Modelled { parent, kind: Kind::Committed, labels, remote: true });
                            Err(Refused::Exists)
                        }
                    };
                    (expected, s.prepare(wanted("extract", &parent, &with)).map(drop))
                }
                10 => {
                    s.cleanup(&|| false).unwrap();
                    let attached = if place.mode == Mode::Bind { model.attached() } else { 0 };
                    // A committed snapshot that became live again is attached when it is used.
                    assert!(place.mounts() <= attached, "seed {seed}, step {step}");
                    (Ok(()), Ok(()))
                }
                _ => {
                    drop(s);
                    s = place.restart();
                    (Ok(()), Ok(()))
                }
            };
            assert_eq!(actual.map_err(|e| refusal(&e)), expected, "seed {seed}, step {step}");
            let found: BTreeMap<String, Modelled> = s
                .list(None, |_| true)
                .unwrap()
                .into_iter()
                .map(|found| {
                    let parent = found.parent.map_or_else(String::new, |p| p.as_str().to_owned());
                    let (kind, labels, remote) = (found.kind, found.labels, found.layer.is_some());
                    (found.key.as_str().to_owned(), Modelled { parent, kind, labels, remote })
                })
                .collect();
            assert_eq!(found, model.snapshots, "seed {seed}, step {step}");
        }
        remove_all(&place, &s);
    }
}
