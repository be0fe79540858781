//! The store on a full disk, and the check of its file before it is trusted.

#![allow(clippy::unwrap_used)]

use crate::model::testing::local_snapshot;
use std::fs;
use std::sync::Arc;

use super::*;
use crate::model::{Key, Kind, Labels, Snapshot};
use crate::store::testing::FaultyDisk;
use crate::testing::{Fault, Steps};

/// A project quota answers EDQUOT. The reserve was used for ENOSPC only, so nothing could be removed at a quota.
#[test]
fn root_removal_uses_the_reserve_on_a_full_disk_and_at_a_quota() {
    for errno in [Errno::ENOSPC, Errno::EDQUOT] {
        let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Fails(0, errno))));
        disk.count(&steps);
        let store = Store::open(&disk.metadata(), None).unwrap();
        assert!(reserve_of(&store.path).exists());
        steps.arm();
        store.write_using_reserve(|tx| tx.schedule_cleanup(&[SnapshotId(1)])).unwrap();
        assert!(!reserve_of(&store.path).exists(), "{errno}: the reserve was not used");
        assert!(store.read(|tx| tx.is_scheduled(SnapshotId(1))).unwrap(), "{errno}");
    }
}

fn snapshots() -> Vec<Snapshot> {
    let snapshot = |id: u64| Snapshot {
        parent: (id > 1).then(|| Key::parse(&format!("snapshot-{}", id - 1)).unwrap()),
        labels: Labels::from([("label".to_owned(), "v".repeat(200))]),
        ..local_snapshot(id, &format!("snapshot-{id}"), Kind::Committed)
    };
    (1..=40).map(snapshot).collect()
}

/// A file with all of `snapshots`, and the directory that it is in.
fn filled() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.sqlite");
    Store::create(&path, None, &snapshots(), &[]).unwrap();
    (dir, path)
}

fn rows(path: &Path) -> Result<Vec<Snapshot>> {
    let store = Store::open(path, None)?;
    let mut rows = Vec::new();
    store.read(|tx| tx.for_each(|snapshot| rows.push(snapshot)))?;
    Ok(rows)
}

/// A damaged file must not be changed by the check, and never lead to a panic or a store with fewer rows.
#[test]
fn file_changed_anywhere_is_refused_unchanged_or_can_be_read() {
    let (_dir, path) = filled();
    let whole = fs::read(&path).unwrap();
    assert_eq!(rows(&path).unwrap(), snapshots());
    let (mut refused, mut read) = (0, 0);
    // Each byte of the header, and some bytes of each page.
    for at in (0..256).chain((256..whole.len()).step_by(whole.len() / 300)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x11;
        fs::write(&path, &bytes).unwrap();
        if let Err(e) = Store::check(&path) {
            refused += 1;
            assert!(matches!(e, Error::Damaged { .. } | Error::Schema { .. }), "byte {at}: {e}");
            assert!(fs::read(&path).unwrap() == bytes, "byte {at}: the file was changed");
        } else {
            // SQLite does not notice a changed text in a row. The row may be refused or differ, but is not missing.
            match rows(&path) {
                Ok(rows) => assert_eq!(rows.len(), snapshots().len(), "byte {at}"),
                Err(e) => assert!(matches!(e, Error::Damaged { .. }), "byte {at}: {e}"),
            }
            read += 1;
        }
    }
    assert!(refused > 50 && read > 50, "{refused} refused, {read} read");
}

#[test]
fn truncated_or_foreign_file_is_refused() {
    let (_dir, path) = filled();
    let whole = fs::read(&path).unwrap();
    let check = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Store::check(&path).unwrap_err().to_string()
    };
    for length in (0..whole.len()).step_by(whole.len() / 50) {
        assert!(check(&whole[..length]).contains("is damaged"), "{length} bytes of {}", whole.len());
    }
    for (bytes, why) in [(&b""[..], "0 bytes"), (&b"a text of somebody else. ".repeat(1000), "not the metadata")] {
        assert!(check(bytes).contains(why), "{}", check(bytes));
    }
    fs::remove_file(&path).unwrap();
    rusqlite::Connection::open(&path).unwrap().execute_batch("CREATE TABLE snapshots (id)").unwrap();
    assert!(Store::check(&path).unwrap_err().to_string().contains("not the metadata"));
}

/// The check came after SQLite had created an empty log, and a log was taken for a reason why the file may be truncated.
#[test]
fn truncated_file_beside_an_empty_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.sqlite");
    Store::open(&path, None).unwrap().close_for_good();
    // The last page belongs to an empty index and ends with zeros.
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    for has_log in [true, false] {
        assert_eq!(Store::wal_of(&path).exists(), has_log);
        let refused = Store::check(&path).unwrap_err();
        assert!(refused.to_string().ends_with("it ends within a page"), "{refused}");
        let _ = fs::remove_file(Store::wal_of(&path));
    }
}

/// SQLite's integrity check does not notice it, and the snapshot was taken for one without a parent.
#[test]
fn file_with_a_missing_parent_is_refused() {
    let (_dir, path) = filled();
    let admin = Connection::open(&path).unwrap();
    admin.execute_batch("PRAGMA foreign_keys = OFF; DELETE FROM snapshots WHERE id = 7").unwrap();
    drop(admin);
    let refused = Store::check(&path).unwrap_err();
    assert!(refused.to_string().ends_with("is damaged: a snapshot's parent is missing"), "{refused}");
}

/// A killed process left a part of the reserve, which was taken for a complete one.
#[test]
fn truncated_reserve_is_replaced() {
    let (_dir, path) = filled();
    let reserve = reserve_of(&path);
    fs::write(&reserve, [0xff; 10]).unwrap();
    drop(Store::open(&path, None).unwrap());
    assert_eq!(fs::metadata(&reserve).unwrap().len(), RESERVE_BYTES as u64);
}

/// The log was removed at a stop, and could not be created again on a disk that was full by then.
#[test]
fn stop_keeps_the_blocks_of_the_log_and_completes_the_file() {
    let (_dir, path) = filled();
    let store = Store::open(&path, None).unwrap();
    let length = || fs::metadata(Store::wal_of(&path)).unwrap().len();
    assert_eq!(length(), file::WAL_BYTES);
    store.write(|tx| tx.schedule_cleanup(&[SnapshotId(1)])).unwrap();
    assert_eq!(length(), file::WAL_BYTES);
    store.close_for_good();
    assert_eq!(length(), file::WAL_BYTES);
    // The copy has the log of another file instead of its own.
    let copy = path.with_file_name("copy.sqlite");
    fs::copy(&path, &copy).unwrap();
    let other = Store::open(&path, None).unwrap();
    other.write(|tx| tx.finish_cleanup(tx.mark_cleanup_started(SnapshotId(1)..=SnapshotId(1), 1)?)).unwrap();
    other.close_for_good();
    fs::copy(Store::wal_of(&path), Store::wal_of(&copy)).unwrap();
    assert!(Store::open(&copy, None).unwrap().read(|tx| tx.is_scheduled(SnapshotId(1))).unwrap());
}

/// docs/format.md describes this way to copy it.
#[test]
fn copy_made_by_vacuum_is_opened_with_a_log() {
    let (_dir, path) = filled();
    let copy = path.with_file_name("copy.sqlite");
    let vacuum = format!("VACUUM INTO '{}'", copy.display());
    Connection::open(&path).unwrap().execute_batch(&vacuum).unwrap();
    assert_eq!(rows(&copy).unwrap(), snapshots());
    let mode: String = Connection::open(&copy).unwrap().query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
    assert_eq!(mode, "wal");
}

/// An administrator may run ANALYZE.
#[test]
fn file_with_statistics_of_analyze_is_opened() {
    let (_dir, path) = filled();
    Connection::open(&path).unwrap().execute_batch("ANALYZE").unwrap();
    assert_eq!(rows(&path).unwrap(), snapshots());
}

/// The check wrote the log into the file and removed the log.
#[test]
fn file_with_a_damaged_schema_keeps_its_log() {
    let (_dir, path) = filled();
    let store = Store::open(&path, None).unwrap();
    store.write(|tx| tx.schedule_cleanup(&[SnapshotId(1)])).unwrap();
    // The copies are what a killed process leaves: a file, and a log with the last write.
    let left = path.with_file_name("left.sqlite");
    let (log, log_left) = (Store::wal_of(&path), Store::wal_of(&left));
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(12).position(|text| text == b"CREATE TABLE").unwrap();
    bytes[at] ^= 0x11;
    fs::write(&left, &bytes).unwrap();
    fs::copy(&log, &log_left).unwrap();
    let logged = fs::read(&log_left).unwrap();
    assert!(!logged.is_empty());
    let refused = Store::check(&left).unwrap_err();
    assert!(matches!(refused, Error::Damaged { .. }), "{refused}");
    assert!(fs::read(&left).unwrap() == bytes && fs::read(&log_left).unwrap() == logged);
}
