//! The promises, tried from the inside: an operation stopped between any two of its steps.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::faults::{Fault, Steps};
use crate::overlay::Form;
use crate::repository::lane::Turn;
use crate::repository::scan::{Extent, Subject};
use crate::sys::Host;
use crate::sys::failing::Failing;
use crate::types::LABEL_IMAGE_REF;

/// Where the tests build. Every Linux has it, and in here nobody else uses it.
const GROUND: &str = "/mnt";

/// A state root and a repository with two layers: the second deletes a file and replaces a
/// directory of the first.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub mode: Mode,
}

pub fn digest(n: u8) -> Digest {
    Digest::parse(&format!("sha256:{}", format!("{n:02x}").repeat(32))).unwrap()
}

impl Place {
    pub fn new(mode: Mode) -> Self {
        // What is mounted here nobody else sees, and it is gone with the test's thread.
        thread_local! {
            static ALONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
        }
        if !ALONE.replace(true) {
            unshare(CloneFlags::CLONE_NEWNS).expect("needs root: run make test as root");
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
            // Thousands of places are made and removed, which ext4 is slow at.
            mount(Some("tmpfs"), GROUND, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        }
        let place = Self { dir: tempfile::tempdir_in(GROUND).unwrap(), mode };
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
        self.layer_of("cvmfs", n)
    }

    fn layer_of(&self, repository: &str, n: u8) -> PathBuf {
        let hex = digest(n).hex().to_owned();
        self.dir.path().join(repository).join(".layers").join(&hex[..2]).join(hex).join("layerfs")
    }

    pub fn snapshots(&self) -> PathBuf {
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
        self.with_store(store, sys)
    }

    pub fn with_store(&self, store: Store, sys: Arc<dyn Sys>) -> Snapshotter {
        self.with_repositories(&[("r", "cvmfs")], store, sys)
    }

    /// Of names, and of directories beside our own.
    fn with_repositories(&self, repositories: &[(&str, &str)], store: Store, sys: Arc<dyn Sys>) -> Snapshotter {
        let timeout = std::time::Duration::from_secs(10);
        let repository = |&(name, dir): &(&str, &str)| {
            Repository::new(name.into(), self.dir.path().join(dir), timeout, Arc::clone(&sys))
        };
        let repositories = repositories.iter().map(repository).collect();
        let ways = Ways { attach: self.mode, rootfs: RootfsMode::Auto, overlay_options: Vec::new() };
        Snapshotter::new(store, repositories, sys, &self.snapshots(), ways).unwrap()
    }

    /// A process that finds what another one left.
    fn restart(&self) -> Snapshotter {
        let snapshotter = self.open(Arc::new(Host));
        assert_eq!(snapshotter.recover().unwrap().broken, []);
        snapshotter.cleanup(&|| false).unwrap();
        snapshotter
    }

    pub fn on_disk(&self) -> Vec<String> {
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

pub fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

pub fn wanted(name: &str, parent: &str, labels: &[(&str, &str)]) -> Wanted {
    Wanted {
        key: key(name),
        parent: Key::parse_optional(parent).unwrap(),
        labels: labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
    }
}

/// What containerd asks for layer `n` on `parent`.
pub fn asked(n: u8, parent: &str) -> Wanted {
    let (reference, digest) = (format!("sha256:chain-{n}"), digest(n));
    let labels = [
        (LABEL_SNAPSHOT_REF, reference.as_str()),
        (LABEL_LAYER_DIGEST, digest.as_str()),
        (LABEL_IMAGE_REF, "example.org/image:1"),
    ];
    wanted("extract", parent, &labels)
}

/// Pulls layer `n` onto `parent`; the result is the name of its snapshot.
pub fn pull(s: &Snapshotter, n: u8, parent: &str) -> String {
    assert!(matches!(s.prepare(asked(n, parent)), Err(Error::RemoteCommitted { .. })));
    let parent_id = if parent.is_empty() { 0 } else { s.stat(&key(parent)).unwrap().id.0 };
    format!("cvmfs/{parent_id}/sha256:chain-{n}")
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

pub fn list_all(s: &Snapshotter) -> Vec<Snapshot> {
    let mut chunk = s.list(None, |_| true).unwrap();
    let mut all = std::mem::take(&mut chunk.found);
    while let Some(rest) = chunk.rest {
        chunk = s.list_rest(rest, |_| true).unwrap();
        all.append(&mut chunk.found);
    }
    all
}

/// Removes all snapshots, children first; whatever state they are in, nothing may be left.
pub fn remove_all(place: &Place, s: &Snapshotter) {
    loop {
        let mut all = list_all(s);
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
pub fn publish_flat(place: &Place) {
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

/// The lower directories of the only mount.
pub fn lower(mounts: &[Mount]) -> Vec<&Path> {
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
    lower.split(':').map(Path::new).collect()
}

/// As `check_files`, where the whole root is the only lower directory.
pub fn check_flat(mounts: &[Mount]) {
    let [mask, flat] = lower(mounts)[..] else { panic!("{mounts:?}") };
    for hidden in [".cvmfscatalog", "dir/.cvmfscatalog", "environment"] {
        assert!(flat.join(hidden).exists());
        assert_eq!(fs::symlink_metadata(mask.join(hidden)).unwrap().mode() & 0o170_000, 0o020_000);
    }
    assert!(flat.join("dir/new").exists());
}

/// The lower directories hold what they should: a layer whose attachment was cut short
/// must not pass for an empty one.
pub fn check_files(place: &Place, mounts: &[Mount]) {
    let all = lower(mounts);
    assert_eq!(all.len(), 5, "{all:?}");
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

/// The lower directories of the only mount, as `<id>/<name>`.
fn lower_names(place: &Place, mounts: &[Mount]) -> Vec<String> {
    let name = |path: &Path| path.strip_prefix(place.snapshots()).unwrap().display().to_string();
    lower(mounts).into_iter().map(name).collect()
}

/// Adds layer 3 to a repository, on top of which a publisher may have put its catalog.
fn publish_third(place: &Place, repository: &str, has_catalog: bool) {
    let top = place.layer_of(repository, 3);
    fs::create_dir_all(&top).unwrap();
    fs::write(top.join("three"), "").unwrap();
    if has_catalog {
        fs::write(top.join(".cvmfscatalog"), "").unwrap();
    }
}

#[test]
fn root_a_mask_is_built_where_it_is_used_and_when() {
    for mode in [Mode::Bind, Mode::Symlink] {
        let place = Place::new(mode);
        publish_third(&place, "cvmfs", true);
        let s = place.open(Arc::new(Host));
        let bottom = pull(&s, 1, "");
        let top = pull(&s, 3, &bottom);
        let [bottom_id, top_id] = [&bottom, &top].map(|name| s.stat(&key(name)).unwrap().id);
        let has_mask = |id| place.snapshots().join(format!("{id}/m/.cvmfscatalog")).symlink_metadata().is_ok();
        let mounts = s.prepare(wanted("container", &top, &[])).unwrap();
        assert_eq!(
            lower_names(&place, &mounts),
            [format!("{top_id}/m"), format!("{top_id}/fs"), format!("{bottom_id}/fs")]
        );
        assert_eq!((has_mask(top_id), has_mask(bottom_id)), (true, false));
        // The layer is in its place already.
        let mounts = s.prepare(wanted("another", &bottom, &[])).unwrap();
        assert_eq!(lower_names(&place, &mounts), [format!("{bottom_id}/m"), format!("{bottom_id}/fs")]);
        assert_eq!((has_mask(top_id), has_mask(bottom_id)), (true, true));
        // A rebuild of the metadata tells attachments from files by this.
        assert!([top_id, bottom_id].iter().all(|id| place.snapshots().join(format!("{id}/fs")).is_symlink()));
        remove_all(&place, &s);
    }
}

/// The layer above hides the names in one repository, and has none to hide in the other one.
#[test]
fn root_a_mask_is_built_although_a_layer_above_would_have_had_one_in_another_repository() {
    let place = Place::new(Mode::Symlink);
    publish_third(&place, "cvmfs", true);
    let store = Store::open(&place.dir.path().join("metadata.redb"), None).unwrap();
    let s = place.with_repositories(&[("r", "cvmfs"), ("other", "other")], store, Arc::new(Host));
    let bottom = pull(&s, 1, "");
    let top = pull(&s, 3, &bottom);
    let [bottom_id, top_id] = [&bottom, &top].map(|name| s.stat(&key(name)).unwrap().id);
    // What is known of it stays known.
    s.prepare(wanted("first", &top, &[])).unwrap();
    s.remove(&key("first")).unwrap();
    s.cleanup(&|| false).unwrap();
    fs::remove_dir_all(place.layer(3)).unwrap();
    publish_third(&place, "other", false);
    let mounts = s.prepare(wanted("container", &top, &[])).unwrap();
    assert_eq!(
        lower_names(&place, &mounts),
        [format!("{top_id}/fs"), format!("{bottom_id}/m"), format!("{bottom_id}/fs")]
    );
    assert!(place.snapshots().join(format!("{bottom_id}/m/.cvmfscatalog")).symlink_metadata().is_ok());
    remove_all(&place, &s);
}

/// A start that did not need a layer's mask led the layer to another repository, and left the mask of
/// the first one to a container that was about to be mounted with it: a marker showed.
#[test]
fn root_a_mask_is_of_the_same_repository_as_its_layer_whoever_leads_it_elsewhere() {
    for mode in [Mode::Bind, Mode::Symlink] {
        let place = Place::new(mode);
        publish_third(&place, "cvmfs", true);
        fs::write(place.layer(3).join(".cvmfsautocatalog"), "").unwrap();
        fs::create_dir_all(place.layer(4)).unwrap();
        for marker in [".cvmfscatalog", ".cvmfsautocatalog"] {
            fs::write(place.layer(4).join(marker), "").unwrap();
        }
        publish_third(&place, "other", true);
        let store = Store::open(&place.dir.path().join("metadata.redb"), None).unwrap();
        let s = place.with_repositories(&[("r", "cvmfs"), ("other", "other")], store, Arc::new(Host));
        let bottom = pull(&s, 1, "");
        let middle = pull(&s, 3, &bottom);
        let top = pull(&s, 4, &middle);
        let (here, away) = (place.layer(3), place.dir.path().join("away"));
        fs::rename(&here, &away).unwrap();
        let mounts = s.prepare(wanted("container", &middle, &[])).unwrap();
        fs::rename(&away, &here).unwrap();
        s.prepare(wanted("another", &top, &[])).unwrap();
        // It may be mounted only now: of whatever repository the layer is, the mask is of the same.
        let [mask, layer, ..] = lower(&mounts)[..] else { panic!("{mounts:?}") };
        let is_there = |marker: &&str| layer.join(marker).exists();
        assert!([".cvmfscatalog", ".cvmfsautocatalog"].iter().any(is_there));
        for marker in [".cvmfscatalog", ".cvmfsautocatalog"].iter().filter(|marker| is_there(marker)) {
            let hidden = fs::symlink_metadata(mask.join(marker)).unwrap();
            assert_eq!((hidden.mode() & 0o170_000, hidden.rdev()), (0o020_000, 0), "{marker}");
        }
        remove_all(&place, &s);
    }
}

/// With each turn what had been built for the other repository was put aside, and stayed there.
#[test]
fn root_a_layer_that_goes_to_and_fro_between_repositories_has_one_edition_of_each() {
    for mode in [Mode::Bind, Mode::Symlink] {
        let place = Place::new(mode);
        publish_third(&place, "cvmfs", true);
        publish_third(&place, "other", true);
        fs::write(place.layer_of("other", 3).join(".cvmfsautocatalog"), "").unwrap();
        let store = Store::open(&place.dir.path().join("metadata.redb"), None).unwrap();
        let s = place.with_repositories(&[("r", "cvmfs"), ("other", "other")], store, Arc::new(Host));
        let layer = pull(&s, 3, "");
        let home = place.snapshots().join(s.stat(&key(&layer)).unwrap().id.to_string());
        s.prepare(wanted("container", &layer, &[])).unwrap();
        let (here, away) = (place.layer(3), place.dir.path().join("away"));
        for turn in 0..20 {
            let (from, to) = if turn % 2 == 0 { (&here, &away) } else { (&away, &here) };
            fs::rename(from, to).unwrap();
            let mounts = s.mounts(&key("container")).unwrap();
            let [mask, attached, ..] = lower(&mounts)[..] else { panic!("{mounts:?}") };
            assert!(attached.join("three").exists());
            let hidden = |name: &str| mask.join(name).symlink_metadata().is_ok();
            let marker = ".cvmfsautocatalog";
            assert_eq!(
                (hidden(".cvmfscatalog"), hidden(marker)),
                (true, attached.join(marker).exists()),
                "turn {turn}"
            );
            let mut names: Vec<_> = fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            let both = ["fs", "fs.of", "fs1", "fs1.of", "m", "m1"];
            let bound = if mode == Mode::Bind { Some("bound") } else { None };
            let expected: Vec<&str> = bound.into_iter().chain(both).collect();
            assert_eq!(names, expected, "turn {turn}");
        }
        remove_all(&place, &s);
    }
}

/// The mask of the one repository stood over the layer of the other for a moment, or was missing: a
/// container that was mounted right then showed markers, or was not mounted at all.
#[test]
fn root_what_prepare_has_answered_can_be_mounted_while_the_layer_goes_to_and_fro() {
    for mode in [Mode::Bind, Mode::Symlink] {
        let place = Place::new(mode);
        for (repository, own) in [("cvmfs", "one"), ("other", "two")] {
            publish_third(&place, repository, true);
            let top = place.layer_of(repository, 3);
            fs::create_dir(top.join(own)).unwrap();
            fs::write(top.join(own).join(".cvmfscatalog"), "").unwrap();
        }
        let store = Store::open(&place.dir.path().join("metadata.redb"), None).unwrap();
        let s = place.with_repositories(&[("r", "cvmfs"), ("other", "other")], store, Arc::new(Host));
        // Of the lowest layer, only the top would be looked at.
        let bottom = pull(&s, 1, "");
        let above = pull(&s, 3, &bottom);
        let (here, away) = (place.layer(3), place.dir.path().join("away"));
        let answer = parking_lot::Mutex::new(s.prepare(wanted("container", &above, &[])).unwrap());
        std::thread::scope(|scope| {
            let at = place.dir.path().join("at");
            fs::create_dir(&at).unwrap();
            let answer = &answer;
            let container = scope.spawn(move || {
                for _ in 0..400 {
                    let mounts = answer.lock().clone();
                    let lower = mounts[0].options.iter().find(|o| o.starts_with("lowerdir=")).unwrap().clone();
                    match mount(Some("overlay"), &at, Some("overlay"), MsFlags::empty(), Some(lower.as_str())) {
                        Ok(()) => {}
                        // Its repository is away, and with links there is nothing behind them.
                        Err(e) if mode == Mode::Symlink && e == Errno::ENOENT => continue,
                        Err(e) => panic!("{mode:?}: {e}"),
                    }
                    let names: Vec<_> = ["one", "two"].iter().filter(|name| at.join(name).exists()).collect();
                    let shows = names.iter().any(|name| at.join(name).join(".cvmfscatalog").exists());
                    Host.unmount(&at, crate::sys::Unmount::Detach).unwrap();
                    assert!(names.len() == 1 && !shows, "{mode:?}: {names:?}, a marker shows: {shows}");
                }
            });
            for turn in 0.. {
                if container.is_finished() && turn % 2 == 0 {
                    break;
                }
                let (from, to) = if turn % 2 == 0 { (&here, &away) } else { (&away, &here) };
                fs::rename(from, to).unwrap();
                *answer.lock() = s.mounts(&key("container")).unwrap();
            }
        });
        remove_all(&place, &s);
    }
}

/// The number of an old mount point was used again for the next one, and the old one's end was the new
/// one's as well.
#[test]
fn root_what_takes_an_old_mount_away_takes_no_new_one() {
    let place = Place::new(Mode::Bind);
    publish_third(&place, "cvmfs", false);
    let other = place.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("three"), "").unwrap();
    let s = place.open(Arc::new(Host));
    let name = pull(&s, 3, "");
    s.prepare(wanted("first", &name, &[])).unwrap();
    renameat2(AT_FDCWD, &place.layer(3), AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE).unwrap();
    s.mounts(&key("first")).unwrap();
    s.remove(&key("first")).unwrap();
    s.cleanup(&|| false).unwrap();
    assert_eq!(place.mounts(), 0, "nobody needs the layer");
    let mounts = s.prepare(wanted("second", &name, &[])).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    s.cleanup(&|| false).unwrap();
    assert!(lower(&mounts)[0].join("three").exists(), "its mount was taken for the old one");
    remove_all(&place, &s);
}

/// What led elsewhere when a process ended, the next one does not know of.
#[test]
fn root_mounts_that_nobody_is_led_to_go_after_a_restart_as_well() {
    let place = Place::new(Mode::Bind);
    publish_third(&place, "cvmfs", false);
    let other = place.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("three"), "").unwrap();
    let s = place.open(Arc::new(Host));
    let name = pull(&s, 3, "");
    s.prepare(wanted("container", &name, &[])).unwrap();
    renameat2(AT_FDCWD, &place.layer(3), AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE).unwrap();
    let mounts = s.mounts(&key("container")).unwrap();
    drop(s);
    let s = place.restart();
    assert_eq!(place.mounts(), 2);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    s.cleanup(&|| false).unwrap();
    assert_eq!(place.mounts(), 1);
    assert!(lower(&mounts)[0].join("three").exists());
    remove_all(&place, &s);
}

/// With bind mounts, the old one was taken away before the new one was there: the container went
/// without the layer, and nobody was told.
#[test]
fn root_a_container_that_is_mounted_while_its_layer_is_exchanged_has_the_layer() {
    const MOUNTED: usize = 300;
    for mode in [Mode::Bind, Mode::Symlink] {
        let place = Place::new(mode);
        publish_third(&place, "cvmfs", false);
        let (layer, other) = (place.layer(3), place.dir.path().join("other"));
        fs::create_dir(&other).unwrap();
        fs::write(other.join("three"), "").unwrap();
        let s = place.open(Arc::new(Host));
        let name = pull(&s, 3, "");
        let id = s.stat(&key(&name)).unwrap().id;
        let home = place.snapshots().join(id.to_string());
        let mounts = s.prepare(wanted("container", &name, &[])).unwrap();
        let lower = lower(&mounts)[0].to_owned();
        let exchanged = std::thread::scope(|scope| {
            let containers = [0, 1].map(|n| {
                let at = place.dir.path().join(format!("at-{n}"));
                let empty = place.dir.path().join(format!("empty-{n}"));
                fs::create_dir(&at).unwrap();
                fs::create_dir(&empty).unwrap();
                let options = format!("lowerdir={}:{}", lower.display(), empty.display());
                scope.spawn(move || {
                    for _ in 0..MOUNTED {
                        mount(Some("overlay"), &at, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
                        let is_there = at.join("three").exists();
                        Host.unmount(&at, crate::sys::Unmount::Detach).unwrap();
                        assert!(is_there, "{mode:?}: the layer is missing");
                    }
                })
            });
            let mut exchanged = 0;
            while containers.iter().any(|container| !container.is_finished()) {
                renameat2(AT_FDCWD, &layer, AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE).unwrap();
                s.mounts(&key("container")).unwrap();
                exchanged += 1;
            }
            exchanged
        });
        assert!(exchanged > 10, "{mode:?}: it was exchanged {exchanged} times");
        let in_order = |mounts| usize::from(mode == Mode::Bind) * mounts;
        // Somebody may be on the way to one of those that nobody is led to any more.
        s.mounts(&key("container")).unwrap();
        assert!(place.mounts() >= in_order(1));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while place.mounts() != in_order(1) {
            assert!(std::time::Instant::now() < until, "{} mounts", place.mounts());
            std::thread::sleep(std::time::Duration::from_millis(100));
            s.cleanup(&|| false).unwrap();
        }
        if mode == Mode::Bind {
            assert_eq!(fs::read_dir(home.join("bound")).unwrap().count(), 1);
        }
        remove_all(&place, &s);
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
    assert_eq!(
        s.store.write(|tx| tx.begin_cleanup(SnapshotId(0)..=SnapshotId(u64::MAX), 9).map_err(Error::from)).unwrap(),
        []
    );
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
        if call == "stat" && path.ends_with("layerfs") && trigger.swap(false, Ordering::SeqCst) {
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

/// It went on as long as somebody else removed snapshots.
#[test]
fn root_a_cleanup_ends_although_more_is_removed_meanwhile() {
    let place = Place::new(Mode::Symlink);
    let inside: Arc<std::sync::OnceLock<std::sync::Weak<Snapshotter>>> = Arc::default();
    let removed = Arc::new(AtomicUsize::new(0));
    let meanwhile = {
        let (inside, removed) = (Arc::clone(&inside), Arc::clone(&removed));
        // Once for each batch.
        move |call: &str, _: &Path| {
            let Some(s) = inside.get().filter(|_| call == "mounts_below").and_then(std::sync::Weak::upgrade) else {
                return;
            };
            let name = format!("more-{}", removed.fetch_add(1, Ordering::SeqCst));
            assert!(removed.load(Ordering::SeqCst) < 10, "the cleanup takes up whatever comes");
            s.prepare(wanted(&name, "", &[])).unwrap();
            s.remove(&key(&name)).unwrap();
        }
    };
    let s = Arc::new(place.open(Arc::new(Failing::meanwhile(meanwhile))));
    s.prepare(wanted("first", "", &[])).unwrap();
    s.remove(&key("first")).unwrap();
    inside.set(Arc::downgrade(&s)).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), Cleaned { done: 1, left: 0 });
    assert_eq!(removed.load(Ordering::SeqCst), 1);
    assert_eq!(s.cleanup(&|| false).unwrap(), Cleaned { done: 1, left: 0 }, "what came meanwhile is not forgotten");
}

/// More than one thread has something to do, and one of the snapshots is busy.
#[test]
fn root_a_cleanup_of_many_leaves_what_is_busy_for_the_next_one() {
    let place = Place::new(Mode::Symlink);
    let s = place.open(Arc::new(Host));
    let names: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    for name in &names {
        let mounts = s.prepare(wanted(name, "", &[])).unwrap();
        fs::write(Path::new(&mounts[0].source).join("file"), name).unwrap();
    }
    let busy = Path::new(&s.mounts(&key("77")).unwrap()[0].source).join("busy");
    fs::create_dir(&busy).unwrap();
    for name in &names {
        s.remove(&key(name)).unwrap();
    }
    mount(Some("tmpfs"), &busy, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), Cleaned { done: 199, left: 1 });
    assert_eq!(place.on_disk().len(), 1);
    Host.unmount(&busy, crate::sys::Unmount::Plain).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), Cleaned { done: 1, left: 0 });
    assert!(place.on_disk().is_empty());
}

/// containerd waits for it inside a transaction of its own.
#[test]
fn root_a_commit_looks_at_no_file_of_the_snapshot() {
    let place = Place::new(Mode::Symlink);
    let steps = Arc::new(Steps::with(Fault::None));
    let s = place.open(Arc::new(Failing::with(Arc::clone(&steps))));
    let mounts = s.prepare(wanted("active", "", &[])).unwrap();
    fs::write(Path::new(&mounts[0].source).join("file"), vec![1; 100_000]).unwrap();
    steps.arm();
    s.commit(&key("committed"), &key("active"), Labels::new(), None).unwrap();
    let calls: Vec<&str> = steps.recorded().iter().map(|step| step.call).collect();
    assert_eq!(calls, ["write_file", "rename"], "beside the files, what would make the record again");
    // And what it takes is right when it is asked for.
    let usage = s.usage(&key("committed"), &|| false).unwrap();
    assert!(usage.size >= 100_000 && usage.inodes == 2, "{usage:?}");
}
