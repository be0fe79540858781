//! When layers are scanned, and how long scans are kept.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::fixture::{Fixture, digest, key, pull, request};
use crate::model::AttachMode;
use crate::repository::Unavailable;
use crate::repository::executor::Priority;
use crate::repository::scan::{self, ScanKey};
use crate::snapshotter::{Error, Snapshotter};
use crate::system::Host;
use crate::system::testing::FaultySys;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Scans layer `n`, and returns the number of directories with markers in it.
fn scan_layer(s: &Snapshotter, n: u8) -> Result<usize, Unavailable> {
    let repository = &s.layer_provider.repositories[0];
    let scan_key = ScanKey { digest: digest(n), repository: repository.name().to_owned() };
    let handle = s.layer_provider.scans.start(&scan_key, repository, Priority::Next).unwrap();
    handle.wait(Instant::now() + TIMEOUT).map(|scan| scan.directories.len())
}

fn stored_scans(s: &Snapshotter) -> i64 {
    s.store.read(|tx| tx.scans().map_err(Error::from)).unwrap()
}

#[test]
fn root_layer_is_scanned_once_and_its_scan_is_stored() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.open(Arc::new(Host));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| scan_layer(&s, 2).unwrap());
        }
    });
    // The stored scan is used, because the layer is not there any more.
    fs::remove_dir_all(fixture.layer(2)).unwrap();
    assert_eq!(scan_layer(&s, 2), Ok(2));
}

/// A panic left the scan in progress for ever: whoever needed the layer waited for it until the repository was declared
/// dead, again and again.
#[test]
fn root_panicking_scan_fails_once_and_the_next_scan_works() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let top = fixture.layer(2);
    let panics = AtomicBool::new(true);
    let sys = FaultySys::before_call(move |_, path| {
        let is_scan = std::thread::current().name().is_some_and(|name| name.starts_with("scan"));
        assert!(!(is_scan && path == top && panics.swap(false, Ordering::SeqCst)), "on purpose");
    });
    let s = fixture.open(Arc::new(sys));
    let started = Instant::now();
    assert_eq!(scan_layer(&s, 2), Err(Unavailable::ScanFailed(scan::Error::Panicked)));
    assert_eq!(scan_layer(&s, 2), Ok(2));
    assert!(started.elapsed() < TIMEOUT, "it was awaited until the repository was declared dead");
    assert_eq!(s.health(), [("r".to_owned(), true)]);
}

#[test]
fn root_pulled_layers_are_scanned_before_a_container_needs_them() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let bottom = pull(&s, 1, "");
    pull(&s, 2, &bottom);
    let deadline = Instant::now() + TIMEOUT;
    while stored_scans(&s) != 2 {
        assert!(Instant::now() < deadline, "{} layers were scanned", stored_scans(&s));
        std::thread::yield_now();
    }
    assert_eq!(fixture.on_disk(), Vec::<String>::new(), "nothing is attached for a scan");
}

#[test]
fn root_start_drops_scans_of_layers_without_snapshots() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.restart();
    let bottom = pull(&s, 1, "");
    let top = pull(&s, 2, &bottom);
    s.view(request("view", &top, &[])).unwrap();
    s.remove(&key("view")).unwrap();
    drop(s);
    let s = fixture.restart();
    assert_eq!(stored_scans(&s), 2);
    fixture.remove_all(&s);
    drop(s);
    assert_eq!(stored_scans(&fixture.restart()), 0);
}
