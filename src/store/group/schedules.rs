//! Group commit under explored schedules.
use super::*;
use crate::model::Digest;
use crate::repository::scan::{Directory, Scan, ScanKey};
use crate::store::ScanLookup;
use crate::sync::explored::{Time, explore};
use crate::sync::thread;

fn key(n: usize) -> ScanKey {
    ScanKey { digest: Digest::parse(&format!("sha256:{n:064}")).unwrap(), repository: "r".to_owned() }
}

/// Whether another connection sees the row, that is, whether it is committed.
fn is_committed(store: &Store, n: usize) -> bool {
    store.read(|tx| Ok::<_, Error>(!matches!(tx.scan(&key(n), usize::MAX)?, ScanLookup::Absent))).unwrap()
}

#[test]
fn every_write_is_answered_after_the_commit_and_none_fails_for_another() {
    explore(Time::StandsStill, 200, || {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("m"), None).unwrap());
        let writers: Vec<_> = (0..4)
            .map(|n| {
                let store = Arc::clone(&store);
                thread::spawn(move || {
                    let scan = Scan { directories: vec![Directory::default()] };
                    let write = || {
                        store.write(|tx| {
                            tx.put_scan(&key(n), Ok(&scan))?;
                            thread::yield_now();
                            match n {
                                1 => Err(Error::Closed),
                                2 => panic!("on purpose"),
                                _ => Ok(()),
                            }
                        })
                    };
                    let is_written = matches!(catch_unwind(AssertUnwindSafe(write)), Ok(Ok(())));
                    assert_eq!((is_written, is_committed(&store, n)), (n != 1 && n != 2, is_written));
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert!(store.writer.waiting.load(Ordering::SeqCst) == 0);
        assert_eq!([0, 1, 2, 3].map(|n| is_committed(&store, n)), [true, false, false, true]);
        store.close_for_good();
    });
}
