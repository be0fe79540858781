//! The promises, tried from the inside: an operation stopped between any two of its steps.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

mod attach;
mod chain;
mod commit;
mod crash;
mod hostile;

use super::*;
use crate::model::LABEL_IMAGE_REF;
use crate::repository::Unavailable;
use crate::repository::executor::Priority;
use crate::repository::scan::{self, ScanKey};
use crate::system::Host;
use crate::system::testing::FaultySys;
use crate::testing::{Fault, Steps};

/// Where the tests build. Every Linux has it, and in here nobody else uses it.
const GROUND: &str = "/mnt";

/// A state root and a repository with two layers: the second deletes a file and replaces a
/// directory of the first.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub mode: AttachMode,
}

pub fn digest(n: u8) -> Digest {
    Digest::parse(&format!("sha256:{}", format!("{n:02x}").repeat(32))).unwrap()
}

impl Fixture {
    pub fn new(mode: AttachMode) -> Self {
        // What is mounted here nobody else sees, and it is gone with the test's thread.
        thread_local! {
            static ALONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
        }
        if !ALONE.replace(true) {
            unshare(CloneFlags::CLONE_NEWNS).expect("needs root: run make test as root");
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
            // Thousands of files are made and removed, which ext4 is slow at.
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

    pub fn layer(&self, n: u8) -> PathBuf {
        self.layer_of("cvmfs", n)
    }

    pub fn layer_of(&self, repository: &str, n: u8) -> PathBuf {
        let hex = digest(n).hex().to_owned();
        self.dir.path().join(repository).join(".layers").join(&hex[..2]).join(hex).join("layerfs")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    /// As after the start of a process.
    pub fn open(&self, sys: Arc<dyn Sys>) -> Snapshotter {
        let path = self.dir.path().join("metadata.sqlite");
        self.with_store(Store::open(&path, None).unwrap(), sys)
    }

    pub fn with_store(&self, store: Store, sys: Arc<dyn Sys>) -> Snapshotter {
        self.with_repositories(&[("r", "cvmfs")], store, sys)
    }

    /// Of names, and of directories beside our own.
    pub fn with_repositories(&self, repositories: &[(&str, &str)], store: Store, sys: Arc<dyn Sys>) -> Snapshotter {
        let timeout = std::time::Duration::from_secs(10);
        let repository = |&(name, dir): &(&str, &str)| {
            Repository::new(name.into(), self.dir.path().join(dir), timeout, Arc::clone(&sys))
        };
        let repositories = repositories.iter().map(repository).collect();
        let ways = SnapshotterOptions { attach: self.mode, overlay_options: Vec::new() };
        Snapshotter::new(store, repositories, sys, &self.snapshots(), ways)
    }

    /// A process that finds what another one left.
    pub fn restart(&self) -> Snapshotter {
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

    pub fn mounts(&self) -> usize {
        Host.mounts_below(self.dir.path()).unwrap().len()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for point in Host.mounts_below(self.dir.path()).unwrap_or_default() {
            let _ = Host.unmount(&point, crate::system::Unmount::Detach);
        }
    }
}

pub fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

pub fn wanted(name: &str, parent: &str, labels: &[(&str, &str)]) -> CreateRequest {
    CreateRequest {
        key: key(name),
        parent: Key::parse_optional(parent).unwrap(),
        labels: labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
    }
}

/// What containerd asks for layer `n` on `parent`.
pub fn asked(n: u8, parent: &str) -> CreateRequest {
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
fn scan_layer(s: &Snapshotter, n: u8) -> usize {
    let repository = &s.sources.repositories[0];
    let scan_key = ScanKey { digest: digest(n), repository: repository.name().to_owned() };
    let soon = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let scan = s.sources.scans.start(&scan_key, repository, Priority::Next).unwrap();
    scan.wait(soon).unwrap().directories.len()
}

pub fn list_all(s: &Snapshotter) -> Vec<Snapshot> {
    let mut chunk = s.list(None, |_| true).unwrap();
    let mut all = std::mem::take(&mut chunk.found);
    while let Some(rest) = chunk.rest {
        chunk = s.next_page(rest, |_| true).unwrap();
        all.append(&mut chunk.found);
    }
    all
}

/// Removes all snapshots, children first; whatever state they are in, nothing may be left.
pub fn remove_all(place: &Fixture, s: &Snapshotter) {
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

/// The lower directories of the only mount.
pub fn lower(mounts: &[Mount]) -> Vec<&Path> {
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
    lower.split(':').map(Path::new).collect()
}

/// The lower directories hold what they should: a layer whose attachment was cut short
/// must not pass for an empty one.
pub fn check_files(place: &Fixture, mounts: &[Mount]) {
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

#[test]
fn root_a_snapshot_whose_label_was_changed_stands_in_for_no_other_layer() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let relabel = |name: &str, n: u8| {
        let reference = (LABEL_SNAPSHOT_REF.to_owned(), Some(format!("sha256:chain-{n}")));
        s.update(&key(name), &LabelChange::Each(vec![reference])).unwrap();
    };
    let prepared = |n: u8| {
        let answer = s.prepare(asked(n, ""));
        if answer.is_ok() {
            s.remove(&key("extract")).unwrap();
        }
        answer
    };
    let second = pull(&s, 2, "");
    // Before and after what was meant, in the order of the index.
    relabel(&second, 1);
    prepared(1).expect("containerd would take layer 2 for layer 1");
    relabel(&second, 2);
    let first = pull(&s, 1, "");
    relabel(&first, 2);
    prepared(2).expect("containerd would take layer 1 for layer 2");
    s.remove(&key(&first)).unwrap();
    // One that was downloaded is no other one.
    s.prepare(wanted("default/7/extract", "", &[])).unwrap();
    let labels = [(LABEL_SNAPSHOT_REF.to_owned(), "sha256:chain-1".to_owned())].into();
    s.commit(&key("default/8/sha256:chain-1"), &key("default/7/extract"), labels, None).unwrap();
    pull(&s, 1, "");
}

/// All of them were loaded at once, with their labels, in the write transaction that all others wait for.
#[test]
fn root_pull_reads_a_bounded_number_of_snapshots_with_its_reference() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let labels: Labels = [(LABEL_SNAPSHOT_REF.to_owned(), "sha256:chain-1".to_owned())].into();
    let snapshot = |n: usize| Snapshot {
        id: s.store.reserve_id().unwrap(),
        key: key(&format!("attempt-{n}")),
        parent: None,
        kind: Kind::Active,
        created: Timestamp(0),
        updated: Timestamp(0),
        labels: labels.clone(),
        layer: None,
        usage: None,
    };
    let crowd: Vec<Snapshot> = (0..SAME_REFERENCE).map(snapshot).collect();
    s.store.write(|tx| crowd[1..].iter().try_for_each(|one| tx.insert(one)).map_err(Error::from)).unwrap();
    let layer = pull(&s, 1, "");
    s.remove(&key(&layer)).unwrap();
    s.store.write(|tx| tx.insert(&crowd[0]).map_err(Error::from)).unwrap();
    s.prepare(asked(1, "")).expect("the layer is downloaded, so the snapshot is an ordinary one");
}

#[test]
fn root_a_panic_in_a_transaction_costs_only_its_own_call() {
    let place = Fixture::new(AttachMode::Bind);
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
        s.store
            .write(|tx| tx.mark_cleanup_started(SnapshotId(0)..=SnapshotId(u64::MAX), 9).map_err(Error::from))
            .unwrap(),
        []
    );
}

#[test]
fn root_a_layer_is_scanned_once_and_what_was_found_is_kept() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.open(Arc::new(Host));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| scan_layer(&s, 2));
        }
    });
    // Nobody looks at the layer again.
    fs::remove_dir_all(place.layer(2)).unwrap();
    assert_eq!(scan_layer(&s, 2), 2);
}

/// A panic left the scan begun for ever: whoever needed the layer waited until its repository was
/// taken for one that does not answer, again and again.
#[test]
fn root_a_scan_that_panics_fails_once_and_the_next_one_works() {
    let place = Fixture::new(AttachMode::Symlink);
    let top = place.layer(2);
    let panics = std::sync::atomic::AtomicBool::new(true);
    let sys = FaultySys::before_call(move |_, path| {
        let is_scan = std::thread::current().name().is_some_and(|name| name.starts_with("scan"));
        assert!(!(is_scan && path == top && panics.swap(false, Ordering::SeqCst)), "on purpose");
    });
    let s = place.open(Arc::new(sys));
    let scan_key = ScanKey { digest: digest(2), repository: "r".to_owned() };
    let start = || s.sources.scans.start(&scan_key, &s.sources.repositories[0], Priority::Next).unwrap();
    let soon = || std::time::Instant::now() + std::time::Duration::from_secs(10);
    let begun = std::time::Instant::now();
    assert_eq!(start().wait(soon()), Err(Unavailable::ScanFailed(scan::Error::Panicked)));
    assert_eq!(start().wait(soon()).unwrap().directories.len(), 2);
    assert!(begun.elapsed() < std::time::Duration::from_secs(10), "it was waited for until the repository was blamed");
    assert_eq!(s.health(), [("r".to_owned(), true)]);
}

#[test]
fn root_the_layers_of_a_pull_are_scanned_before_a_container_needs_them() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let chain = pull(&s, 1, "");
    pull(&s, 2, &chain);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while scans(&s) != 2 {
        assert!(std::time::Instant::now() < until, "{} layers were scanned", scans(&s));
        std::thread::yield_now();
    }
    assert_eq!(place.on_disk(), Vec::<String>::new(), "nothing is attached for it");
}

/// How many scans are stored.
fn scans(s: &Snapshotter) -> i64 {
    s.store.read(|tx| tx.scans().map_err(Error::from)).unwrap()
}

#[test]
fn root_scans_of_layers_that_nobody_has_are_forgotten_at_the_start() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.restart();
    let chain = pull(&s, 1, "");
    let top = pull(&s, 2, &chain);
    s.view(wanted("view", &top, &[])).unwrap();
    s.remove(&key("view")).unwrap();
    drop(s);
    let s = place.restart();
    assert_eq!(scans(&s), 2);
    remove_all(&place, &s);
    drop(s);
    assert_eq!(scans(&place.restart()), 0);
}

/// Layers were attached for a snapshot that was gone by then, and nobody took them away.
#[test]
fn root_mounts_of_a_snapshot_that_is_being_removed_leave_nothing_attached() {
    let place = Fixture::new(AttachMode::Bind);
    let shared: Arc<std::sync::OnceLock<Snapshotter>> = Arc::default();
    let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (other, trigger) = (Arc::clone(&shared), Arc::clone(&armed));
    let sys = FaultySys::before_call(move |call, path| {
        if call == "dir_status" && path.ends_with("layerfs") && trigger.swap(false, Ordering::SeqCst) {
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

/// A commit keeps the number of the snapshot, so it passed for the one that was asked for: its layers were attached
/// again, and stayed.
#[test]
fn root_mounts_of_a_snapshot_that_is_being_committed_leave_nothing_attached() {
    let place = Fixture::new(AttachMode::Bind);
    let shared: Arc<std::sync::OnceLock<Snapshotter>> = Arc::default();
    let (other, files) = (Arc::clone(&shared), Arc::new(parking_lot::Mutex::new(PathBuf::new())));
    let trigger = Arc::clone(&files);
    let sys = FaultySys::before_call(move |call, path| {
        if call == "lstat" && std::mem::take(&mut *trigger.lock()) == path {
            let s = other.get().unwrap();
            s.commit(&key("committed"), &key("container"), Labels::new(), None).unwrap();
            s.cleanup(&|| false).unwrap();
        }
    });
    let s = shared.get_or_init(|| place.open(Arc::new(sys)));
    let chain = pull(s, 1, "");
    s.prepare(wanted("container", &chain, &[])).unwrap();
    let id = s.stat(&key("container")).unwrap().id;
    *files.lock() = place.snapshots().join(id.to_string()).join("fs");
    assert!(matches!(s.mounts(&key("container")), Err(Error::NotFound(_))));
    assert_eq!(place.mounts(), 0, "the layer is attached for nobody");
    remove_all(&place, s);
}

#[test]
fn root_a_repository_that_goes_away_in_the_middle_of_a_call_is_unavailable() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        // Before each question that is asked of the repository, one after the other.
        for step in 0.. {
            let place = Fixture::new(mode);
            let (here, away) = (place.dir.path().join("cvmfs"), place.dir.path().join("away"));
            let asked = std::sync::atomic::AtomicUsize::new(0);
            let gone = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let (top, tell) = (here.clone(), Arc::clone(&gone));
            let target = away.clone();
            let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let is_armed = Arc::clone(&armed);
            let sys = FaultySys::before_call(move |_, path| {
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
    let place = Fixture::new(AttachMode::Symlink);
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
    let s = Arc::new(place.open(Arc::new(FaultySys::before_call(meanwhile))));
    s.prepare(wanted("first", "", &[])).unwrap();
    s.remove(&key("first")).unwrap();
    inside.set(Arc::downgrade(&s)).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 1, left: 0 });
    assert_eq!(removed.load(Ordering::SeqCst), 1);
    assert_eq!(
        s.cleanup(&|| false).unwrap(),
        CleanupBatch { done: 1, left: 0 },
        "what came meanwhile is not forgotten"
    );
}

/// More than one thread has something to do, and one of the snapshots is busy.
#[test]
fn root_a_cleanup_of_many_leaves_what_is_busy_for_the_next_one() {
    let place = Fixture::new(AttachMode::Symlink);
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
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 199, left: 1 });
    assert_eq!(place.on_disk().len(), 1);
    Host.unmount(&busy, crate::system::Unmount::Plain).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 1, left: 0 });
    assert!(place.on_disk().is_empty());
}

/// containerd waits for it inside a transaction of its own.
#[test]
fn root_a_commit_looks_at_no_file_of_the_snapshot() {
    let place = Fixture::new(AttachMode::Symlink);
    let steps = Arc::new(Steps::with(Fault::None));
    let s = place.open(Arc::new(FaultySys::with(Arc::clone(&steps))));
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

/// The start failed: leftovers could not be put on the list for cleanup, though the next start finds them again.
#[test]
fn root_a_start_that_cannot_write_serves_and_leaves_leftovers_to_the_next() {
    let place = Fixture::new(AttachMode::Symlink);
    drop(place.restart());
    fs::create_dir_all(place.snapshots().join("1/fs")).unwrap();
    let writer = rusqlite::Connection::open(place.dir.path().join("metadata.sqlite")).unwrap();
    let s = place.open(Arc::new(Host));
    writer.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(s.recover().unwrap().leftovers, 1);
    drop(writer);
    drop(s);
    assert_eq!(place.on_disk(), ["1"]);
    place.restart();
    assert_eq!(place.on_disk(), Vec::<String>::new());
}

/// The start ended with such a directory; and one of which nothing could be said counted as empty, and was removed.
#[test]
fn root_directory_that_cannot_be_read_holds_files_and_does_not_end_the_start() {
    let place = Fixture::new(AttachMode::Symlink);
    drop(place.open(Arc::new(Host)));
    let unknown = place.snapshots().join("500/fs");
    fs::create_dir_all(&unknown).unwrap();
    fs::write(unknown.join("precious"), "").unwrap();
    for call in ["lstat", "for_each_entry"] {
        let s = place.open(Arc::new(FaultySys::refusing_call(call, unknown.clone(), Errno::EIO)));
        assert_eq!(s.recover().unwrap().unknown, [SnapshotId(500)], "{call} fails");
        s.cleanup(&|| false).unwrap();
        assert!(unknown.join("precious").exists());
    }
    fs::remove_file(unknown.join("precious")).unwrap();
    assert_eq!(place.open(Arc::new(Host)).recover().unwrap().leftovers, 1, "an empty one is what a crash leaves");
}

/// A Cleanup went on after its caller had given up, to the end of the directory that it was in.
#[test]
fn root_cleanup_that_is_broken_off_goes_on_where_it_was() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.open(Arc::new(Host));
    let source = PathBuf::from(&s.prepare(wanted("active", "", &[])).unwrap()[0].source);
    for n in 0..1_000 {
        fs::write(source.join(n.to_string()), "").unwrap();
    }
    s.remove(&key("active")).unwrap();
    let asked = AtomicUsize::default();
    let cancelled = || asked.fetch_add(1, Ordering::SeqCst) > 500;
    assert!(matches!(s.cleanup(&cancelled), Err(Error::Cancelled)));
    let left = fs::read_dir(&source).unwrap().count();
    assert!((500..600).contains(&left), "{left} of 1000 are left");
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 1, left: 0 });
    assert!(place.on_disk().is_empty());
}

/// A committed snapshot's usage is kept for good, so it must be that of files at rest.
#[test]
fn root_usage_of_files_that_change_meanwhile_is_not_kept() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.open(Arc::new(Host));
    let source = PathBuf::from(&s.prepare(wanted("active", "", &[])).unwrap()[0].source);
    fs::create_dir(source.join("dir")).unwrap();
    s.commit(&key("committed"), &key("active"), Labels::new(), None).unwrap();
    let count = AtomicUsize::default();
    let change = || {
        fs::write(source.join("dir").join(count.fetch_add(1, Ordering::SeqCst).to_string()), "x").unwrap();
        false
    };
    let disturbed = s.usage(&key("committed"), &change).unwrap();
    assert!(disturbed.inodes >= 2, "{disturbed:?}");
    let changes = count.load(Ordering::SeqCst);
    assert!(changes > 1, "it was measured anew");
    let at_rest = s.usage(&key("committed"), &|| false).unwrap();
    assert_eq!(at_rest.inodes, 2 + i64::try_from(changes).unwrap());
    let kept = s.usage(&key("committed"), &|| panic!("it is kept")).unwrap();
    assert_eq!(kept, at_rest);
}
