//! Mounts and Prepare while the snapshot or the repository disappears.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::fixture::{Fixture, key, pull, request};
use crate::model::AttachMode;
use crate::model::Labels;
use crate::snapshotter::{Error, Snapshotter};
use crate::system::testing::FaultySys;

/// Layers were attached for a snapshot that was gone by then, and nobody detached them.
#[test]
fn root_mounts_during_a_removal_leaves_nothing_attached() {
    let fixture = Fixture::new(AttachMode::Bind);
    let shared: Arc<OnceLock<Snapshotter>> = Arc::default();
    let is_armed = Arc::new(AtomicBool::new(false));
    let (other, trigger) = (Arc::clone(&shared), Arc::clone(&is_armed));
    let sys = FaultySys::before_call(move |call, path| {
        if call == "dir_status" && path.ends_with("layerfs") && trigger.swap(false, Ordering::SeqCst) {
            let s = other.get().unwrap();
            s.remove(&key("container")).unwrap();
            s.cleanup(&|| false).unwrap();
        }
    });
    let s = shared.get_or_init(|| fixture.open(Arc::new(sys)));
    let bottom = pull(s, 1, "");
    let top = pull(s, 2, &bottom);
    s.prepare(request("container", &top, &[])).unwrap();
    is_armed.store(true, Ordering::SeqCst);
    assert!(matches!(s.mounts(&key("container")), Err(Error::NotFound(_))));
    s.cleanup(&|| false).unwrap();
    assert_eq!((fixture.on_disk(), fixture.mounts()), (Vec::<String>::new(), 0));
}

/// A commit keeps the id of the snapshot, so the committed one passed for the one that was asked for: its layers were
/// attached again, and stayed.
#[test]
fn root_mounts_during_a_commit_leaves_nothing_attached() {
    let fixture = Fixture::new(AttachMode::Bind);
    let shared: Arc<OnceLock<Snapshotter>> = Arc::default();
    let files = Arc::new(Mutex::new(PathBuf::new()));
    let (other, trigger) = (Arc::clone(&shared), Arc::clone(&files));
    let sys = FaultySys::before_call(move |call, path| {
        if call == "lstat" && std::mem::take(&mut *trigger.lock()) == path {
            let s = other.get().unwrap();
            s.commit(&key("committed"), &key("container"), Labels::new(), None).unwrap();
            s.cleanup(&|| false).unwrap();
        }
    });
    let s = shared.get_or_init(|| fixture.open(Arc::new(sys)));
    let layer = pull(s, 1, "");
    s.prepare(request("container", &layer, &[])).unwrap();
    let id = s.stat(&key("container")).unwrap().id;
    *files.lock() = fixture.snapshot_dir(id).join("fs");
    assert!(matches!(s.mounts(&key("container")), Err(Error::NotFound(_))));
    assert_eq!(fixture.mounts(), 0, "the layer is attached for nobody");
    fixture.remove_all(s);
}

/// The repository disappears before each of the system calls on it, one after the other.
#[test]
fn root_repository_that_disappears_during_a_call_is_unavailable() {
    for mode in [AttachMode::Bind, AttachMode::Symlink] {
        for step in 0.. {
            let fixture = Fixture::new(mode);
            let (here, away) = (fixture.repository(), fixture.dir.path().join("away"));
            let calls = AtomicUsize::new(0);
            let is_gone = Arc::new(AtomicBool::new(false));
            let is_armed = Arc::new(AtomicBool::new(false));
            let sys = {
                let (here, away) = (here.clone(), away.clone());
                let (is_gone, is_armed) = (Arc::clone(&is_gone), Arc::clone(&is_armed));
                FaultySys::before_call(move |_, path| {
                    let counts = path.starts_with(&here) && is_armed.load(Ordering::SeqCst);
                    if counts && calls.fetch_add(1, Ordering::SeqCst) == step {
                        fs::rename(&here, &away).unwrap();
                        is_gone.store(true, Ordering::SeqCst);
                    }
                })
            };
            let s = fixture.open(Arc::new(sys));
            let bottom = pull(&s, 1, "");
            let top = pull(&s, 2, &bottom);
            drop(s.view(request("scan", &top, &[])).unwrap());
            s.remove(&key("scan")).unwrap();
            s.cleanup(&|| false).unwrap();
            is_armed.store(true, Ordering::SeqCst);
            let result = s.prepare(request("container", &top, &[]));
            if !is_gone.load(Ordering::SeqCst) {
                result.unwrap();
                assert!(step > 3, "the repository was hardly asked");
                break;
            }
            assert!(matches!(result, Ok(_) | Err(Error::LayerUnavailable { .. })), "{mode:?}, step {step}: {result:?}");
            fs::rename(&away, &here).unwrap();
            fixture.remove_all(&s);
        }
    }
}
