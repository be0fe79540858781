//! Cleanups of many snapshots, and cleanups that are interrupted.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use nix::mount::{MsFlags, mount};

use super::fixture::{Fixture, key, request};
use crate::model::AttachMode;
use crate::snapshotter::{CleanupBatch, Error, Snapshotter};
use crate::system::testing::FaultySys;
use crate::system::{Host, Sys, Unmount};

/// A cleanup went on as long as somebody else removed snapshots.
#[test]
fn root_cleanup_ends_although_snapshots_are_removed_meanwhile() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let shared: Arc<OnceLock<Weak<Snapshotter>>> = Arc::default();
    let removed = Arc::new(AtomicUsize::new(0));
    let sys = {
        let (shared, removed) = (Arc::clone(&shared), Arc::clone(&removed));
        FaultySys::before_call(move |call, _| {
            // The mount table is read once for each batch.
            if call == "mounts_below"
                && let Some(s) = shared.get().and_then(Weak::upgrade)
            {
                let name = format!("more-{}", removed.fetch_add(1, Ordering::SeqCst));
                assert!(removed.load(Ordering::SeqCst) < 10, "the cleanup does not end");
                s.prepare(request(&name, "", &[])).unwrap();
                s.remove(&key(&name)).unwrap();
            }
        })
    };
    let s = Arc::new(fixture.open(Arc::new(sys)));
    s.prepare(request("first", "", &[])).unwrap();
    s.remove(&key("first")).unwrap();
    shared.set(Arc::downgrade(&s)).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 1, remaining: 0 });
    assert_eq!(removed.load(Ordering::SeqCst), 1);
    assert_eq!(
        s.cleanup(&|| false).unwrap(),
        CleanupBatch { done: 1, remaining: 0 },
        "what was removed meanwhile is not forgotten"
    );
}

/// There is work for more than one thread.
#[test]
fn root_cleanup_of_many_leaves_a_busy_snapshot_to_the_next_cleanup() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.open(Arc::new(Host));
    let names: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    for name in &names {
        let mounts = s.prepare(request(name, "", &[])).unwrap();
        fs::write(Path::new(&mounts[0].source).join("file"), name).unwrap();
    }
    let busy = Path::new(&s.mounts(&key("77")).unwrap()[0].source).join("busy");
    fs::create_dir(&busy).unwrap();
    for name in &names {
        s.remove(&key(name)).unwrap();
    }
    mount(Some("tmpfs"), &busy, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 199, remaining: 1 });
    assert_eq!(fixture.on_disk().len(), 1);
    Host.unmount(&busy, Unmount::Plain).unwrap();
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 1, remaining: 0 });
    assert!(fixture.on_disk().is_empty());
}

/// A cleanup went on after the deadline of its call, to the end of the directory that it was removing.
#[test]
fn root_interrupted_cleanup_continues_where_it_stopped() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.open(Arc::new(Host));
    let source = PathBuf::from(&s.prepare(request("active", "", &[])).unwrap()[0].source);
    for n in 0..1_000 {
        fs::write(source.join(n.to_string()), "").unwrap();
    }
    s.remove(&key("active")).unwrap();
    let questions = AtomicUsize::default();
    let cancelled = || questions.fetch_add(1, Ordering::SeqCst) > 500;
    assert!(matches!(s.cleanup(&cancelled), Err(Error::DeadlineExceeded)));
    let remaining = fs::read_dir(&source).unwrap().count();
    assert!((500..600).contains(&remaining), "{remaining} of 1000 remain");
    assert_eq!(s.cleanup(&|| false).unwrap(), CleanupBatch { done: 1, remaining: 0 });
    assert!(fixture.on_disk().is_empty());
}
