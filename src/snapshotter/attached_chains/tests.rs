#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::tests::fixture::{Fixture, key, lower_dirs, pull, request};
use super::super::{Error, Snapshotter};
use super::*;
use crate::model::AttachMode;
use crate::model::Labels;
use crate::repository::Unavailable;
use crate::system::testing::FaultySys;
use crate::system::{Host, Sys, Unmount};

/// Gives the repository the attributes that CernVM-FS's client shows at the root of its mount.
fn set_root_hash(fixture: &Fixture, root_hash: &str) {
    let root = fixture.dir.path().join("cvmfs");
    xattr::set(&root, "user.fqrn", b"r").unwrap();
    xattr::set(&root, "user.root_hash", root_hash.as_bytes()).unwrap();
}

/// Publishes and pulls the layers from 3 to `last`, which have a file each. Returns the name of the uppermost one.
fn pull_layers(fixture: &Fixture, s: &Snapshotter, last: u8) -> String {
    (3..=last).fold(String::new(), |below, n| {
        fs::create_dir_all(fixture.layer(n)).unwrap();
        fs::write(fixture.layer(n).join(n.to_string()), "").unwrap();
        pull(s, n, &below)
    })
}

fn have_files(mounts: &[crate::model::Mount]) -> bool {
    lower_dirs(mounts).iter().all(|layer| fs::read_dir(layer).is_ok_and(|mut files| files.next().is_some()))
}

/// The number of system calls of Prepare and Mounts of a container whose layers are all attached.
fn count_calls_of_start(fixture: &Fixture, s: &Snapshotter, calls: &AtomicUsize, layers: u8) -> usize {
    let name = pull_layers(fixture, s, 2 + layers);
    let calls = (0..5).map(|n| {
        let before = calls.load(Ordering::SeqCst);
        let container = format!("container {n} on {layers}");
        let mounts = s.prepare(request(&container, &name, &[])).unwrap();
        assert_eq!(lower_dirs(&mounts).len(), usize::from(layers));
        assert_eq!(s.mounts(&key(&container)).unwrap(), mounts);
        std::thread::sleep(std::time::Duration::from_millis(50));
        calls.load(Ordering::SeqCst) - before
    });
    // During the first starts, other threads scan the layers.
    calls.min().unwrap()
}

/// Each Prepare and each Mounts opened every layer in the repository, and read the links to it.
#[test]
fn root_start_on_a_cached_chain_makes_few_calls_for_each_layer() {
    for (mode, is_client, for_each_layer) in [
        (AttachMode::Symlink, true, 0),
        // The link to the mount is read, and the mount table.
        (AttachMode::Bind, true, 2),
        // Without a client nobody tells whether the layer changed, so it is opened and its status is read.
        (AttachMode::Symlink, false, 2),
        // All of these, and the inode of the mount.
        (AttachMode::Bind, false, 5),
    ] {
        let fixture = Fixture::new(mode);
        if is_client {
            set_root_hash(&fixture, "1");
        }
        let calls = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&calls);
        let s = fixture.open(Arc::new(FaultySys::before_call(move |_, _| {
            count.fetch_add(1, Ordering::SeqCst);
        })));
        let [few, many] = [2, 40].map(|layers| count_calls_of_start(&fixture, &s, &calls, layers));
        // A start is one Prepare and one Mounts, so the calls for a layer count twice.
        assert_eq!(many - few, 2 * 38 * for_each_layer, "{mode:?}, a client: {is_client}");
        fixture.remove_all(&s);
    }
}

#[test]
fn root_start_on_a_cached_chain_notices_a_missing_layer() {
    for root_hashes in [None, Some(["1", "2"])] {
        let fixture = Fixture::new(AttachMode::Symlink);
        if let Some([first, _]) = root_hashes {
            set_root_hash(&fixture, first);
        }
        let s = fixture.open(Arc::new(Host));
        let name = pull_layers(&fixture, &s, 6);
        s.prepare(request("container", &name, &[])).unwrap();
        s.mounts(&key("container")).unwrap();
        fs::rename(fixture.layer(4), fixture.dir.path().join("away")).unwrap();
        if let Some([_, second]) = root_hashes {
            set_root_hash(&fixture, second);
        }
        for result in [s.mounts(&key("container")), s.prepare(request("another", &name, &[]))] {
            assert!(
                matches!(result, Err(Error::LayerUnavailable { why: Unavailable::NotPublished, .. })),
                "{result:?}"
            );
        }
        fs::rename(fixture.dir.path().join("away"), fixture.layer(4)).unwrap();
        assert!(have_files(&s.mounts(&key("container")).unwrap()));
        fixture.remove_all(&s);
    }
}

/// The container would have got the empty mount point instead of the layer.
#[test]
fn root_layer_that_somebody_unmounted_is_mounted_again() {
    let fixture = Fixture::new(AttachMode::Bind);
    set_root_hash(&fixture, "1");
    let s = fixture.open(Arc::new(Host));
    let name = pull_layers(&fixture, &s, 6);
    s.prepare(request("container", &name, &[])).unwrap();
    let points = Host.mounts_below(&fixture.snapshots()).unwrap();
    assert_eq!(points.len(), 4);
    for point in points {
        Host.unmount(&point, Unmount::Plain).unwrap();
        assert!(have_files(&s.mounts(&key("container")).unwrap()));
    }
    fixture.remove_all(&s);
}

#[test]
fn root_cleanup_drops_a_cached_chain_that_nobody_needs() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let fixture = Fixture::new(mode);
        let s = fixture.open(Arc::new(Host));
        let name = pull_layers(&fixture, &s, 6);
        s.prepare(request("container", &name, &[])).unwrap();
        assert_eq!(s.layer_provider.chains.len(), 1);
        s.remove(&key("container")).unwrap();
        s.cleanup(&|| false).unwrap();
        assert_eq!((s.layer_provider.chains.len(), fixture.on_disk(), fixture.mounts()), (0, Vec::new(), 0));
        fixture.remove_all(&s);
    }
}

/// The snapshot that a Prepare makes is not in the store yet.
#[test]
fn root_cleanup_keeps_the_layers_of_a_cached_chain_during_a_prepare() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let directory: Arc<Mutex<Option<PathBuf>>> = Arc::default();
    let (started, has_started) = crossbeam_channel::bounded(1);
    let (resume, may_resume) = crossbeam_channel::bounded::<()>(0);
    let trigger = Arc::clone(&directory);
    let s = fixture.open(Arc::new(FaultySys::before_call(move |call, path| {
        if call == "create_dir" && trigger.lock().as_deref() == Some(path) {
            started.send(()).unwrap();
            let _ = may_resume.recv();
        }
    })));
    let name = pull_layers(&fixture, &s, 6);
    s.prepare(request("first", &name, &[])).unwrap();
    assert_eq!(s.layer_provider.chains.len(), 1);
    let next = s.stat(&key("first")).unwrap().id.0 + 1;
    *directory.lock() = Some(fixture.snapshots().join(next.to_string()));
    let mounts = std::thread::scope(|scope| {
        let second = scope.spawn(|| s.prepare(request("second", &name, &[])).unwrap());
        has_started.recv().unwrap();
        s.remove(&key("first")).unwrap();
        assert_eq!(s.cleanup(&|| false).unwrap().remaining, 4);
        drop(resume);
        second.join().unwrap()
    });
    assert!(have_files(&mounts));
    s.cleanup(&|| false).unwrap();
    assert!(have_files(&s.mounts(&key("second")).unwrap()));
    fixture.remove_all(&s);
}

/// A pull of many layers would have displaced the chains that containers stand on.
#[test]
fn root_pulls_cache_no_chains() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.open(Arc::new(Host));
    let mut below = pull_layers(&fixture, &s, 6);
    for n in 0..3 {
        let name = format!("layer {n}");
        let labels = [("containerd.io/snapshot.ref", name.as_str())];
        s.prepare(request("extract", &below, &labels)).unwrap();
        s.commit(&key(&name), &key("extract"), Labels::new(), None).unwrap();
        below = name;
    }
    assert_eq!(s.layer_provider.chains.len(), 0);
    s.prepare(request("container", &below, &[])).unwrap();
    assert_eq!(s.layer_provider.chains.len(), 1);
    fixture.remove_all(&s);
}

#[test]
fn cached_chains_are_bounded_by_their_snapshots() {
    let chains = AttachedChains::default();
    for n in 0..100 {
        let snapshots: Vec<SnapshotId> = (0..500).map(|below| SnapshotId(1000 * n + below)).collect();
        let top = snapshots[0];
        chains.insert(&Arc::new(AttachedChain { snapshots, ..AttachedChain::default() }));
        assert!(chains.get(top).is_some());
        assert!(chains.len() * 500 <= MAX_CACHED_SNAPSHOTS);
    }
}
