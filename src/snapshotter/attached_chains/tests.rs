#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::tests::{Fixture, key, lower, pull, remove_all, wanted};
use super::super::{Error, Snapshotter};
use super::*;
use crate::attach::AttachMode;
use crate::model::Labels;
use crate::repository::Unavailable;
use crate::system::testing::FaultySys;
use crate::system::{Host, Sys, Unmount};

/// Gives the repository the attributes that a client of CernVM-FS shows at the root of its mount.
fn set_root_hash(place: &Fixture, root_hash: &str) {
    let root = place.dir.path().join("cvmfs");
    xattr::set(&root, "user.fqrn", b"r").unwrap();
    xattr::set(&root, "user.root_hash", root_hash.as_bytes()).unwrap();
}

/// Publishes and pulls layers up to this one, which have a file each; the result is the name of the uppermost one.
fn pull_layers(place: &Fixture, s: &Snapshotter, up_to: u8) -> String {
    (3..=up_to).fold(String::new(), |below, n| {
        fs::create_dir_all(place.layer(n)).unwrap();
        fs::write(place.layer(n).join(n.to_string()), "").unwrap();
        pull(s, n, &below)
    })
}

fn have_files(mounts: &[crate::model::Mount]) -> bool {
    lower(mounts).iter().all(|layer| fs::read_dir(layer).is_ok_and(|mut files| files.next().is_some()))
}

/// The system calls of Prepare and Mounts of a container on so many layers, in which nothing has to be done for them.
fn calls_of_a_start(place: &Fixture, s: &Snapshotter, calls: &AtomicUsize, layers: u8) -> usize {
    let name = pull_layers(place, s, 2 + layers);
    let calls = (0..5).map(|n| {
        let before = calls.load(Ordering::SeqCst);
        let container = format!("container {n} on {layers}");
        let mounts = s.prepare(wanted(&container, &name, &[])).unwrap();
        assert_eq!(lower(&mounts).len(), usize::from(layers));
        assert_eq!(s.mounts(&key(&container)).unwrap(), mounts);
        std::thread::sleep(std::time::Duration::from_millis(50));
        calls.load(Ordering::SeqCst) - before
    });
    // Other threads look through the layers, at first.
    calls.min().unwrap()
}

/// Every layer was looked up in the repository, and the links to it were read, with each Prepare and each Mounts.
#[test]
fn root_start_on_layers_in_their_places_does_no_work_for_each_of_them() {
    for (mode, is_client, for_each_layer) in [
        (AttachMode::Symlink, true, 0),
        // The link to the mount is read, and what is mounted there is asked.
        (AttachMode::Bind, true, 2),
        // Nobody else tells whether it changed: it is opened and asked for its status.
        (AttachMode::Symlink, false, 2),
        // The same, and the inode of what is mounted.
        (AttachMode::Bind, false, 5),
    ] {
        let place = Fixture::new(mode);
        if is_client {
            set_root_hash(&place, "1");
        }
        let calls = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&calls);
        let s = place.open(Arc::new(FaultySys::before_call(move |_, _| {
            count.fetch_add(1, Ordering::SeqCst);
        })));
        let [few, many] = [2, 40].map(|layers| calls_of_a_start(&place, &s, &calls, layers));
        // A start is one Prepare and one Mounts, so the work for a layer counts twice.
        assert_eq!(many - few, 2 * 38 * for_each_layer, "{mode:?}, a client: {is_client}");
        remove_all(&place, &s);
    }
}

#[test]
fn root_layer_that_is_gone_is_missed_by_a_start_on_a_known_chain() {
    for root_hashes in [None, Some(["1", "2"])] {
        let place = Fixture::new(AttachMode::Symlink);
        if let Some([first, _]) = root_hashes {
            set_root_hash(&place, first);
        }
        let s = place.open(Arc::new(Host));
        let name = pull_layers(&place, &s, 6);
        s.prepare(wanted("container", &name, &[])).unwrap();
        s.mounts(&key("container")).unwrap();
        fs::rename(place.layer(4), place.dir.path().join("away")).unwrap();
        if let Some([_, second]) = root_hashes {
            set_root_hash(&place, second);
        }
        for result in [s.mounts(&key("container")), s.prepare(wanted("another", &name, &[]))] {
            assert!(
                matches!(result, Err(Error::LayerUnavailable { why: Unavailable::NotPublished, .. })),
                "{result:?}"
            );
        }
        fs::rename(place.dir.path().join("away"), place.layer(4)).unwrap();
        assert!(have_files(&s.mounts(&key("container")).unwrap()));
        remove_all(&place, &s);
    }
}

/// A container would have had the empty mount point instead of the layer.
#[test]
fn root_mount_of_a_layer_that_somebody_took_away_is_made_again() {
    let place = Fixture::new(AttachMode::Bind);
    set_root_hash(&place, "1");
    let s = place.open(Arc::new(Host));
    let name = pull_layers(&place, &s, 6);
    s.prepare(wanted("container", &name, &[])).unwrap();
    let points = Host.mounts_below(&place.snapshots()).unwrap();
    assert_eq!(points.len(), 4);
    for point in points {
        Host.unmount(&point, Unmount::Plain).unwrap();
        assert!(have_files(&s.mounts(&key("container")).unwrap()));
    }
    remove_all(&place, &s);
}

#[test]
fn root_known_chain_of_which_nobody_needs_a_layer_is_forgotten_and_its_layers_are_taken_away() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let place = Fixture::new(mode);
        let s = place.open(Arc::new(Host));
        let name = pull_layers(&place, &s, 6);
        s.prepare(wanted("container", &name, &[])).unwrap();
        assert_eq!(s.sources.chains.count(), 1);
        s.remove(&key("container")).unwrap();
        s.cleanup(&|| false).unwrap();
        assert_eq!((s.sources.chains.count(), place.on_disk(), place.mounts()), (0, Vec::new(), 0));
        remove_all(&place, &s);
    }
}

/// A cleanup leaves the layers that a Prepare uses whose snapshot is not in the store yet.
#[test]
fn root_layers_of_a_known_chain_stay_while_a_start_is_under_way() {
    let place = Fixture::new(AttachMode::Symlink);
    let directory: Arc<Mutex<Option<PathBuf>>> = Arc::default();
    let (begun, has_begun) = crossbeam_channel::bounded(1);
    let (go_on, may_go_on) = crossbeam_channel::bounded::<()>(0);
    let awaited = Arc::clone(&directory);
    let s = place.open(Arc::new(FaultySys::before_call(move |call, path| {
        if call == "create_dir" && awaited.lock().as_deref() == Some(path) {
            begun.send(()).unwrap();
            let _ = may_go_on.recv();
        }
    })));
    let name = pull_layers(&place, &s, 6);
    s.prepare(wanted("first", &name, &[])).unwrap();
    assert_eq!(s.sources.chains.count(), 1);
    let next = s.stat(&key("first")).unwrap().id.0 + 1;
    *directory.lock() = Some(place.snapshots().join(next.to_string()));
    let mounts = std::thread::scope(|scope| {
        let second = scope.spawn(|| s.prepare(wanted("second", &name, &[])).unwrap());
        has_begun.recv().unwrap();
        s.remove(&key("first")).unwrap();
        assert_eq!(s.cleanup(&|| false).unwrap().left, 4);
        drop(go_on);
        second.join().unwrap()
    });
    assert!(have_files(&mounts));
    s.cleanup(&|| false).unwrap();
    assert!(have_files(&s.mounts(&key("second")).unwrap()));
    remove_all(&place, &s);
}

/// A pull of many layers would have taken the place of what containers stand on.
#[test]
fn root_pulls_leave_no_known_chains() {
    let place = Fixture::new(AttachMode::Symlink);
    let s = place.open(Arc::new(Host));
    let mut below = pull_layers(&place, &s, 6);
    for n in 0..3 {
        let name = format!("layer {n}");
        let labels = [("containerd.io/snapshot.ref", name.as_str())];
        s.prepare(wanted("extract", &below, &labels)).unwrap();
        s.commit(&key(&name), &key("extract"), Labels::new(), None).unwrap();
        below = name;
    }
    assert_eq!(s.sources.chains.count(), 0);
    s.prepare(wanted("container", &below, &[])).unwrap();
    assert_eq!(s.sources.chains.count(), 1);
    remove_all(&place, &s);
}

#[test]
fn known_chains_are_bounded_by_their_snapshots() {
    let chains = AttachedChains::default();
    for n in 0..100 {
        let snapshots: Vec<SnapshotId> = (0..500).map(|below| SnapshotId(1000 * n + below)).collect();
        let top = snapshots[0];
        chains.keep(&Arc::new(AttachedChain::new(LowerDirectories::default(), snapshots, Vec::new(), Vec::new())));
        assert!(chains.get(top).is_some());
        assert!(chains.count() * 500 <= MAX_CACHED_SNAPSHOTS);
    }
}
