//! Attached layers: which masks are built, and what happens when a layer is published again, or has to come from another
//! repository, while containers start.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::{MsFlags, mount};

use super::fixture::{Fixture, key, lower_dirs, pull, request};
use crate::model::AttachMode;
use crate::model::{Mount, SnapshotId};
use crate::snapshotter::{Error, Snapshotter};
use crate::store::Store;
use crate::system::testing::FaultySys;
use crate::system::{Host, Sys, Unmount};

/// The lower directories of the only mount, as `<id>/<name>`.
fn lower_names(fixture: &Fixture, mounts: &[Mount]) -> Vec<String> {
    let name = |path: &Path| path.strip_prefix(fixture.snapshots()).unwrap().display().to_string();
    lower_dirs(mounts).into_iter().map(name).collect()
}

/// Adds layer 3 to a repository. `has_catalog` puts a catalog marker of the publisher at its top.
fn publish_third(fixture: &Fixture, repository: &str, has_catalog: bool) {
    let top = fixture.layer_of(repository, 3);
    fs::create_dir_all(&top).unwrap();
    fs::write(top.join("three"), "").unwrap();
    if has_catalog {
        fs::write(top.join(".cvmfscatalog"), "").unwrap();
    }
}

fn open_with_two_repositories(fixture: &Fixture) -> Snapshotter {
    let store = Store::open(&fixture.metadata(), None).unwrap();
    fixture.open_with_repositories(&[("r", "cvmfs"), ("other", "other")], store, Arc::new(Host))
}

/// Adds layer 3, and returns a copy of it to be published in its place.
fn publish_third_with_copy(fixture: &Fixture) -> PathBuf {
    publish_third(fixture, "cvmfs", false);
    let other = fixture.dir.path().join("copy");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("three"), "").unwrap();
    other
}

/// Publishes the copy in place of layer 3, and keeps the layer as the copy.
fn exchange(fixture: &Fixture, other: &Path) {
    renameat2(AT_FDCWD, &fixture.layer(3), AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE).unwrap();
}

/// A container whose layer was published again since it started.
struct RepublishedLayer {
    s: Snapshotter,
    layer: String,
    /// The mounts of the container.
    mounts: Vec<Mount>,
}

fn republish_under(fixture: &Fixture, container: &str) -> RepublishedLayer {
    let other = publish_third_with_copy(fixture);
    let s = fixture.open(Arc::new(Host));
    let layer = pull(&s, 3, "");
    s.prepare(request(container, &layer, &[])).unwrap();
    exchange(fixture, &other);
    let mounts = s.mounts(&key(container)).unwrap();
    RepublishedLayer { s, layer, mounts }
}

#[test]
fn root_mask_is_built_when_a_chain_first_uses_it() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let fixture = Fixture::new(mode);
        publish_third(&fixture, "cvmfs", true);
        let s = fixture.open(Arc::new(Host));
        let bottom = pull(&s, 1, "");
        let top = pull(&s, 3, &bottom);
        let [bottom_id, top_id] = [&bottom, &top].map(|name| s.stat(&key(name)).unwrap().id);
        let has_mask = |id| fixture.snapshots().join(format!("{id}/m/.cvmfscatalog")).symlink_metadata().is_ok();
        let mounts = s.prepare(request("container", &top, &[])).unwrap();
        assert_eq!(
            lower_names(&fixture, &mounts),
            [format!("{top_id}/m"), format!("{top_id}/fs"), format!("{bottom_id}/fs")]
        );
        assert_eq!((has_mask(top_id), has_mask(bottom_id)), (true, false));
        // The layer is attached already, and only its mask is missing.
        let mounts = s.prepare(request("another", &bottom, &[])).unwrap();
        assert_eq!(lower_names(&fixture, &mounts), [format!("{bottom_id}/m"), format!("{bottom_id}/fs")]);
        assert_eq!((has_mask(top_id), has_mask(bottom_id)), (true, true));
        // A rebuild of the metadata recognises attached layers by these links.
        assert!([top_id, bottom_id].iter().all(|id| fixture.snapshots().join(format!("{id}/fs")).is_symlink()));
        fixture.remove_all(&s);
    }
}

/// In its own repository the upper layer has a mask that hides the names in the lower one too. In the other repository it
/// has nothing to hide.
#[test]
fn root_layer_gets_its_own_mask_if_the_layer_above_comes_from_another_repository_without_one() {
    let fixture = Fixture::new(AttachMode::Symlink);
    publish_third(&fixture, "cvmfs", true);
    let s = open_with_two_repositories(&fixture);
    let bottom = pull(&s, 1, "");
    let top = pull(&s, 3, &bottom);
    let [bottom_id, top_id] = [&bottom, &top].map(|name| s.stat(&key(name)).unwrap().id);
    // The scan of the layer in its own repository stays known.
    s.prepare(request("first", &top, &[])).unwrap();
    s.remove(&key("first")).unwrap();
    s.cleanup(&|| false).unwrap();
    fs::remove_dir_all(fixture.layer(3)).unwrap();
    publish_third(&fixture, "other", false);
    let mounts = s.prepare(request("container", &top, &[])).unwrap();
    assert_eq!(
        lower_names(&fixture, &mounts),
        [format!("{top_id}/fs"), format!("{bottom_id}/m"), format!("{bottom_id}/fs")]
    );
    assert!(fixture.snapshots().join(format!("{bottom_id}/m/.cvmfscatalog")).symlink_metadata().is_ok());
    fixture.remove_all(&s);
}

/// A start that did not use the mask of a layer attached the layer from another repository, and left the old mask to a
/// container that was about to be mounted with it. The container saw a marker.
#[test]
fn root_mask_and_layer_come_from_same_repository() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let fixture = Fixture::new(mode);
        publish_third(&fixture, "cvmfs", true);
        fs::write(fixture.layer(3).join(".cvmfsautocatalog"), "").unwrap();
        fs::create_dir_all(fixture.layer(4)).unwrap();
        for marker in [".cvmfscatalog", ".cvmfsautocatalog"] {
            fs::write(fixture.layer(4).join(marker), "").unwrap();
        }
        publish_third(&fixture, "other", true);
        let s = open_with_two_repositories(&fixture);
        let bottom = pull(&s, 1, "");
        let middle = pull(&s, 3, &bottom);
        let top = pull(&s, 4, &middle);
        let (here, away) = (fixture.layer(3), fixture.dir.path().join("away"));
        fs::rename(&here, &away).unwrap();
        let mounts = s.prepare(request("container", &middle, &[])).unwrap();
        fs::rename(&away, &here).unwrap();
        s.prepare(request("another", &top, &[])).unwrap();
        // containerd may mount the first container only now.
        let [mask, layer, ..] = lower_dirs(&mounts)[..] else { panic!("{mounts:?}") };
        let exists = |marker: &&str| layer.join(marker).exists();
        assert!([".cvmfscatalog", ".cvmfsautocatalog"].iter().any(exists));
        for marker in [".cvmfscatalog", ".cvmfsautocatalog"].iter().filter(|marker| exists(marker)) {
            let hidden = fs::symlink_metadata(mask.join(marker)).unwrap();
            assert_eq!((hidden.mode() & 0o170_000, hidden.rdev()), (0o020_000, 0), "{marker}");
        }
        fixture.remove_all(&s);
    }
}

/// At each change, what had been built for the other repository was moved aside, and stayed there.
#[test]
fn root_layer_alternating_between_repositories_has_one_variant_for_each() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let fixture = Fixture::new(mode);
        publish_third(&fixture, "cvmfs", true);
        publish_third(&fixture, "other", true);
        fs::write(fixture.layer_of("other", 3).join(".cvmfsautocatalog"), "").unwrap();
        let s = open_with_two_repositories(&fixture);
        let layer = pull(&s, 3, "");
        let home = fixture.snapshots().join(s.stat(&key(&layer)).unwrap().id.to_string());
        s.prepare(request("container", &layer, &[])).unwrap();
        let (here, away) = (fixture.layer(3), fixture.dir.path().join("away"));
        for round in 0..20 {
            let (from, to) = if round % 2 == 0 { (&here, &away) } else { (&away, &here) };
            fs::rename(from, to).unwrap();
            let mounts = s.mounts(&key("container")).unwrap();
            let [mask, attached, ..] = lower_dirs(&mounts)[..] else { panic!("{mounts:?}") };
            assert!(attached.join("three").exists());
            let hidden = |name: &str| mask.join(name).symlink_metadata().is_ok();
            let marker = ".cvmfsautocatalog";
            assert_eq!(
                (hidden(".cvmfscatalog"), hidden(marker)),
                (true, attached.join(marker).exists()),
                "round {round}"
            );
            let mut names: Vec<_> = fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            let both = ["fs", "fs.of", "fs1", "fs1.of", "m", "m1"];
            let bind_mounts = if mode == AttachMode::Bind { Some("bound") } else { None };
            let expected: Vec<&str> = bind_mounts.into_iter().chain(both).collect();
            assert_eq!(names, expected, "round {round}");
        }
        fixture.remove_all(&s);
    }
}

/// For a moment the mask from one repository stood above the layer from the other, or was missing. A container that was
/// mounted at that moment showed markers, or was not mounted at all.
#[test]
fn root_prepared_mounts_stay_valid_while_layer_source_alternates() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let fixture = Fixture::new(mode);
        for (repository, own) in [("cvmfs", "one"), ("other", "two")] {
            publish_third(&fixture, repository, true);
            let top = fixture.layer_of(repository, 3);
            fs::create_dir(top.join(own)).unwrap();
            fs::write(top.join(own).join(".cvmfscatalog"), "").unwrap();
        }
        let s = open_with_two_repositories(&fixture);
        // Only the top of the lowest layer is scanned, so another one has to be below.
        let bottom = pull(&s, 1, "");
        let above = pull(&s, 3, &bottom);
        let (here, away) = (fixture.layer(3), fixture.dir.path().join("away"));
        let prepared = parking_lot::Mutex::new(s.prepare(request("container", &above, &[])).unwrap());
        thread::scope(|scope| {
            let target = fixture.dir.path().join("target");
            fs::create_dir(&target).unwrap();
            let prepared = &prepared;
            let container = scope.spawn(move || {
                for _ in 0..400 {
                    let mounts = prepared.lock().clone();
                    let lower = mounts[0].options.iter().find(|o| o.starts_with("lowerdir=")).unwrap().clone();
                    match mount(Some("overlay"), &target, Some("overlay"), MsFlags::empty(), Some(lower.as_str())) {
                        Ok(()) => {}
                        // The repository is away, so the link leads nowhere.
                        Err(e) if mode == AttachMode::Symlink && e == Errno::ENOENT => continue,
                        Err(e) => panic!("{mode:?}: {e}"),
                    }
                    let names: Vec<_> = ["one", "two"].iter().filter(|name| target.join(name).exists()).collect();
                    let shows = names.iter().any(|name| target.join(name).join(".cvmfscatalog").exists());
                    Host.unmount(&target, Unmount::Detach).unwrap();
                    assert!(names.len() == 1 && !shows, "{mode:?}: {names:?}, a marker shows: {shows}");
                }
            });
            for round in 0.. {
                if container.is_finished() && round % 2 == 0 {
                    break;
                }
                let (from, to) = if round % 2 == 0 { (&here, &away) } else { (&away, &here) };
                fs::rename(from, to).unwrap();
                *prepared.lock() = s.mounts(&key("container")).unwrap();
            }
        });
        fixture.remove_all(&s);
    }
}

/// The name of an old mount point was used again for the next one, so that unmounting the old one unmounted the new one.
#[test]
fn root_unmounting_superseded_mount_keeps_new_mount() {
    let fixture = Fixture::new(AttachMode::Bind);
    let RepublishedLayer { s, layer, .. } = republish_under(&fixture, "first");
    s.remove(&key("first")).unwrap();
    s.cleanup(&|| false).unwrap();
    assert_eq!(fixture.mounts(), 0, "nobody needs the layer");
    let mounts = s.prepare(request("second", &layer, &[])).unwrap();
    thread::sleep(Duration::from_millis(1100));
    s.cleanup(&|| false).unwrap();
    assert!(lower_dirs(&mounts)[0].join("three").exists(), "its mount was unmounted in place of the old one");
    fixture.remove_all(&s);
}

/// The next process does not know which mounts were superseded when the last one ended.
#[test]
fn root_superseded_mounts_are_removed_after_restart() {
    let fixture = Fixture::new(AttachMode::Bind);
    let RepublishedLayer { s, mounts, .. } = republish_under(&fixture, "container");
    drop(s);
    let s = fixture.restart();
    assert_eq!(fixture.mounts(), 2);
    thread::sleep(Duration::from_millis(1100));
    s.cleanup(&|| false).unwrap();
    assert_eq!(fixture.mounts(), 1);
    assert!(lower_dirs(&mounts)[0].join("three").exists());
    fixture.remove_all(&s);
}

/// The old bind mount was unmounted before the new one was there. The container ran without the layer, and nobody was told.
#[test]
fn root_container_mounted_while_its_layer_is_exchanged_has_the_layer() {
    const MOUNTED: usize = 300;
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let fixture = Fixture::new(mode);
        let other = publish_third_with_copy(&fixture);
        let s = fixture.open(Arc::new(Host));
        let name = pull(&s, 3, "");
        let id = s.stat(&key(&name)).unwrap().id;
        let home = fixture.snapshots().join(id.to_string());
        let mounts = s.prepare(request("container", &name, &[])).unwrap();
        let lower = lower_dirs(&mounts)[0].to_owned();
        let exchanged = thread::scope(|scope| {
            let containers = [0, 1].map(|n| {
                let target = fixture.dir.path().join(format!("target-{n}"));
                let empty = fixture.dir.path().join(format!("empty-{n}"));
                fs::create_dir(&target).unwrap();
                fs::create_dir(&empty).unwrap();
                let options = format!("lowerdir={}:{}", lower.display(), empty.display());
                scope.spawn(move || {
                    for _ in 0..MOUNTED {
                        let (overlay, options) = (Some("overlay"), Some(options.as_str()));
                        mount(overlay, &target, overlay, MsFlags::empty(), options).unwrap();
                        let is_there = target.join("three").exists();
                        Host.unmount(&target, Unmount::Detach).unwrap();
                        assert!(is_there, "{mode:?}: the layer is missing");
                    }
                })
            });
            let mut exchanged = 0;
            while containers.iter().any(|container| !container.is_finished()) {
                exchange(&fixture, &other);
                s.mounts(&key("container")).unwrap();
                exchanged += 1;
            }
            exchanged
        });
        assert!(exchanged > 10, "{mode:?}: the layer was exchanged {exchanged} times");
        let expected = usize::from(mode == AttachMode::Bind);
        // Superseded mounts stay a while, because somebody may be following an old link to them.
        s.mounts(&key("container")).unwrap();
        assert!(fixture.mounts() >= expected);
        let deadline = Instant::now() + Duration::from_secs(10);
        while fixture.mounts() != expected {
            assert!(Instant::now() < deadline, "{} mounts", fixture.mounts());
            thread::sleep(Duration::from_millis(100));
            s.cleanup(&|| false).unwrap();
        }
        if mode == AttachMode::Bind {
            assert_eq!(fs::read_dir(home.join("bound")).unwrap().count(), 1);
        }
        fixture.remove_all(&s);
    }
}

/// An attach took a release that lasted longer than 100 ms for a thread that hangs, and went on beside it. The release then
/// removed the layer under the new container.
#[test]
fn root_slow_release_does_not_remove_a_layer_that_is_attached_meanwhile() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let fixture = Fixture::new(mode);
        let (removal_starts, has_started) = crossbeam_channel::bounded(1);
        let home = fixture.snapshots().join("2");
        let sys = FaultySys::before_call(move |call, path| {
            if call == "remove_tree" && path == home {
                let _ = removal_starts.try_send(());
                thread::sleep(Duration::from_millis(300));
            }
        });
        let s = fixture.open(Arc::new(sys));
        let bottom = pull(&s, 1, "");
        let top = pull(&s, 2, &bottom);
        s.prepare(request("first", &top, &[])).unwrap();
        assert_eq!(s.stat(&key(&top)).unwrap().id, SnapshotId(2));
        s.remove(&key("first")).unwrap();
        // The layer was attached more than two seconds ago.
        thread::sleep(Duration::from_millis(2_100));
        let mounts = thread::scope(|scope| {
            let cleanup = scope.spawn(|| s.cleanup(&|| false).unwrap());
            has_started.recv().unwrap();
            let mounts = s.prepare(request("second", &top, &[])).unwrap();
            cleanup.join().unwrap();
            mounts
        });
        fixture.check_files(&mounts);
        fixture.remove_all(&s);
    }
}

/// Each call waited as long as the other one worked, on a thread that others needed.
#[test]
fn root_call_waits_with_a_limit_for_another_call_on_the_same_layer() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let (started, has_started) = crossbeam_channel::bounded(1);
    let (resume, may_resume) = crossbeam_channel::bounded::<()>(0);
    let below = fixture.snapshots().join("2");
    let sys = FaultySys::before_call(move |call, path| {
        if call == "create_whiteout" && path.starts_with(&below) && started.try_send(()).is_ok() {
            let _ = may_resume.recv();
        }
    });
    let s = fixture.open(Arc::new(sys));
    let bottom = pull(&s, 1, "");
    let top = pull(&s, 2, &bottom);
    thread::scope(|scope| {
        let first = scope.spawn(|| s.prepare(request("first", &top, &[])));
        has_started.recv().unwrap();
        s.prepare(request("on another layer", &bottom, &[])).unwrap();
        let second = s.prepare(request("second", &top, &[]));
        assert!(matches!(second, Err(Error::LayerBusy { .. })), "{second:?}");
        drop(resume);
        first.join().unwrap().unwrap();
    });
    fixture.check_files(&s.prepare(request("second", &top, &[])).unwrap());
    fixture.remove_all(&s);
}

/// A publisher can put a link in place of a layer after it was opened. mount(2) followed the link to the host.
#[test]
fn root_layer_replaced_by_a_link_before_its_mount_shows_nothing_of_the_host() {
    let fixture = Fixture::new(AttachMode::Bind);
    let host = fixture.dir.path().join("host");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("secret"), "").unwrap();
    publish_third(&fixture, "cvmfs", false);
    let (top, away) = (fixture.layer(3), fixture.dir.path().join("away"));
    let sys = FaultySys::before_call(move |call, _| {
        if call == "bind_read_only" {
            fs::rename(&top, &away).unwrap();
            std::os::unix::fs::symlink(&host, &top).unwrap();
        }
    });
    let s = fixture.open(Arc::new(sys));
    let name = pull(&s, 3, "");
    let mounts = s.prepare(request("container", &name, &[])).unwrap();
    let [layer] = lower_dirs(&mounts)[..] else { panic!("{mounts:?}") };
    assert_eq!((layer.join("secret").exists(), layer.join("three").exists()), (false, true));
    fixture.remove_all(&s);
}
