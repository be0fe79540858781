//! Published layers in place: which masks are built, and what becomes of a place whose
//! layer is published anew, or has to come from another repository, while containers start.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::{MsFlags, mount};

use super::super::*;
use super::{Fixture, check_files, key, lower, pull, remove_all, wanted};
use crate::system::Host;
use crate::system::testing::FaultySys;

/// The lower directories of the only mount, as `<id>/<name>`.
fn lower_names(place: &Fixture, mounts: &[Mount]) -> Vec<String> {
    let name = |path: &Path| path.strip_prefix(place.snapshots()).unwrap().display().to_string();
    lower(mounts).into_iter().map(name).collect()
}

/// Adds layer 3 to a repository, on top of which a publisher may have put its catalog.
fn publish_third(place: &Fixture, repository: &str, has_catalog: bool) {
    let top = place.layer_of(repository, 3);
    fs::create_dir_all(&top).unwrap();
    fs::write(top.join("three"), "").unwrap();
    if has_catalog {
        fs::write(top.join(".cvmfscatalog"), "").unwrap();
    }
}

fn with_two_repositories(place: &Fixture) -> Snapshotter {
    let store = Store::open(&place.dir.path().join("metadata.sqlite"), None).unwrap();
    place.with_repositories(&[("r", "cvmfs"), ("other", "other")], store, Arc::new(Host))
}

/// Layer 3, and what it is when it is published anew.
fn publish_two_forms(place: &Fixture) -> PathBuf {
    publish_third(place, "cvmfs", false);
    let other = place.dir.path().join("anew");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("three"), "").unwrap();
    other
}

fn exchange(place: &Fixture, other: &Path) {
    renameat2(AT_FDCWD, &place.layer(3), AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE).unwrap();
}

/// A container on a layer that was published anew under it; also the layer's name, and the mounts.
fn published_anew(place: &Fixture, container: &str) -> (Snapshotter, String, Vec<Mount>) {
    let other = publish_two_forms(place);
    let s = place.open(Arc::new(Host));
    let name = pull(&s, 3, "");
    s.prepare(wanted(container, &name, &[])).unwrap();
    exchange(place, &other);
    let mounts = s.mounts(&key(container)).unwrap();
    (s, name, mounts)
}

#[test]
fn root_a_mask_is_built_where_it_is_used_and_when() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let place = Fixture::new(mode);
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
    let place = Fixture::new(AttachMode::Symlink);
    publish_third(&place, "cvmfs", true);
    let s = with_two_repositories(&place);
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
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let place = Fixture::new(mode);
        publish_third(&place, "cvmfs", true);
        fs::write(place.layer(3).join(".cvmfsautocatalog"), "").unwrap();
        fs::create_dir_all(place.layer(4)).unwrap();
        for marker in [".cvmfscatalog", ".cvmfsautocatalog"] {
            fs::write(place.layer(4).join(marker), "").unwrap();
        }
        publish_third(&place, "other", true);
        let s = with_two_repositories(&place);
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
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let place = Fixture::new(mode);
        publish_third(&place, "cvmfs", true);
        publish_third(&place, "other", true);
        fs::write(place.layer_of("other", 3).join(".cvmfsautocatalog"), "").unwrap();
        let s = with_two_repositories(&place);
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
            let bound = if mode == AttachMode::Bind { Some("bound") } else { None };
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
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let place = Fixture::new(mode);
        for (repository, own) in [("cvmfs", "one"), ("other", "two")] {
            publish_third(&place, repository, true);
            let top = place.layer_of(repository, 3);
            fs::create_dir(top.join(own)).unwrap();
            fs::write(top.join(own).join(".cvmfscatalog"), "").unwrap();
        }
        let s = with_two_repositories(&place);
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
                        Err(e) if mode == AttachMode::Symlink && e == Errno::ENOENT => continue,
                        Err(e) => panic!("{mode:?}: {e}"),
                    }
                    let names: Vec<_> = ["one", "two"].iter().filter(|name| at.join(name).exists()).collect();
                    let shows = names.iter().any(|name| at.join(name).join(".cvmfscatalog").exists());
                    Host.unmount(&at, crate::system::Unmount::Detach).unwrap();
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
    let place = Fixture::new(AttachMode::Bind);
    let (s, name, _) = published_anew(&place, "first");
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
    let place = Fixture::new(AttachMode::Bind);
    let (s, _, mounts) = published_anew(&place, "container");
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
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let place = Fixture::new(mode);
        let other = publish_two_forms(&place);
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
                        Host.unmount(&at, crate::system::Unmount::Detach).unwrap();
                        assert!(is_there, "{mode:?}: the layer is missing");
                    }
                })
            });
            let mut exchanged = 0;
            while containers.iter().any(|container| !container.is_finished()) {
                exchange(&place, &other);
                s.mounts(&key("container")).unwrap();
                exchanged += 1;
            }
            exchanged
        });
        assert!(exchanged > 10, "{mode:?}: it was exchanged {exchanged} times");
        let in_order = |mounts| usize::from(mode == AttachMode::Bind) * mounts;
        // Somebody may be on the way to one of those that nobody is led to any more.
        s.mounts(&key("container")).unwrap();
        assert!(place.mounts() >= in_order(1));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while place.mounts() != in_order(1) {
            assert!(std::time::Instant::now() < until, "{} mounts", place.mounts());
            std::thread::sleep(std::time::Duration::from_millis(100));
            s.cleanup(&|| false).unwrap();
        }
        if mode == AttachMode::Bind {
            assert_eq!(fs::read_dir(home.join("bound")).unwrap().count(), 1);
        }
        remove_all(&place, &s);
    }
}

/// An attach took a release that lasted longer than 100 ms for a thread that hangs, went on beside it,
/// and had its layer removed under the container that it was for.
#[test]
fn root_a_slow_release_does_not_remove_a_layer_that_is_attached_meanwhile() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        let place = Fixture::new(mode);
        let (removal_begins, begun) = crossbeam_channel::bounded(1);
        let home = place.snapshots().join("2");
        let sys = FaultySys::before_call(move |call, path| {
            if call == "remove_tree" && path == home {
                let _ = removal_begins.try_send(());
                std::thread::sleep(std::time::Duration::from_millis(300));
            }
        });
        let s = place.open(Arc::new(sys));
        let bottom = pull(&s, 1, "");
        let top = pull(&s, 2, &bottom);
        s.prepare(wanted("first", &top, &[])).unwrap();
        assert_eq!(s.stat(&key(&top)).unwrap().id, SnapshotId(2));
        s.remove(&key("first")).unwrap();
        // The layer was attached more than two seconds ago.
        std::thread::sleep(std::time::Duration::from_millis(2_100));
        let mounts = std::thread::scope(|scope| {
            let cleanup = scope.spawn(|| s.cleanup(&|| false).unwrap());
            begun.recv().unwrap();
            let mounts = s.prepare(wanted("second", &top, &[])).unwrap();
            cleanup.join().unwrap();
            mounts
        });
        check_files(&place, &mounts);
        remove_all(&place, &s);
    }
}

/// Each waited as long as the work took, on a thread that others needed.
#[test]
fn a_call_waits_with_a_limit_for_another_one_that_prepares_the_same_layer() {
    let place = Fixture::new(AttachMode::Symlink);
    let (begun, has_begun) = crossbeam_channel::bounded(1);
    let (go_on, may_go_on) = crossbeam_channel::bounded::<()>(0);
    let below = place.snapshots().join("2");
    let sys = FaultySys::before_call(move |call, path| {
        if call == "create_whiteout" && path.starts_with(&below) && begun.try_send(()).is_ok() {
            let _ = may_go_on.recv();
        }
    });
    let s = place.open(Arc::new(sys));
    let bottom = pull(&s, 1, "");
    let top = pull(&s, 2, &bottom);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| s.prepare(wanted("first", &top, &[])));
        has_begun.recv().unwrap();
        s.prepare(wanted("on another layer", &bottom, &[])).unwrap();
        let second = s.prepare(wanted("second", &top, &[]));
        assert!(matches!(second, Err(Error::LayerBusy { .. })), "{second:?}");
        drop(go_on);
        first.join().unwrap().unwrap();
    });
    check_files(&place, &s.prepare(wanted("second", &top, &[])).unwrap());
    remove_all(&place, &s);
}

/// Between the look at a layer and its mount, a publisher can put a link in its place: mount(2) followed
/// it to the host.
#[test]
fn root_a_layer_that_becomes_a_link_before_it_is_mounted_shows_nothing_of_the_host() {
    let place = Fixture::new(AttachMode::Bind);
    let host = place.dir.path().join("host");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("secret"), "").unwrap();
    publish_third(&place, "cvmfs", false);
    let (top, away) = (place.layer(3), place.dir.path().join("away"));
    let sys = FaultySys::before_call(move |call, _| {
        if call == "bind_read_only" {
            fs::rename(&top, &away).unwrap();
            std::os::unix::fs::symlink(&host, &top).unwrap();
        }
    });
    let s = place.open(Arc::new(sys));
    let name = pull(&s, 3, "");
    let mounts = s.prepare(wanted("container", &name, &[])).unwrap();
    let [layer] = lower(&mounts)[..] else { panic!("{mounts:?}") };
    assert_eq!((layer.join("secret").exists(), layer.join("three").exists()), (false, true));
    remove_all(&place, &s);
}
