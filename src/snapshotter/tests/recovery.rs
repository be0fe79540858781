//! Starts that meet errors.

use std::fs;
use std::sync::Arc;

use nix::errno::Errno;

use super::fixture::Fixture;
use crate::model::AttachMode;
use crate::model::SnapshotId;
use crate::system::Host;
use crate::system::testing::FaultySys;

/// The start failed because leftovers could not be scheduled for cleanup, though the next start finds them again.
#[test]
fn root_start_that_cannot_write_serves_and_leaves_leftovers_to_the_next_start() {
    let fixture = Fixture::new(AttachMode::Symlink);
    drop(fixture.restart());
    fs::create_dir_all(fixture.snapshots().join("1/fs")).unwrap();
    let writer = rusqlite::Connection::open(fixture.metadata()).unwrap();
    let s = fixture.open(Arc::new(Host));
    writer.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(s.recover().unwrap().leftovers, 1);
    drop(writer);
    drop(s);
    assert_eq!(fixture.on_disk(), ["1"]);
    fixture.restart();
    assert_eq!(fixture.on_disk(), Vec::<String>::new());
}

/// Such a directory ended the start; and one that could not be read passed for an empty one, and was removed.
#[test]
fn root_unreadable_directory_is_kept_and_does_not_end_the_start() {
    let fixture = Fixture::new(AttachMode::Symlink);
    drop(fixture.open(Arc::new(Host)));
    let unknown = fixture.snapshots().join("500/fs");
    fs::create_dir_all(&unknown).unwrap();
    fs::write(unknown.join("precious"), "").unwrap();
    for call in ["lstat", "for_each_entry"] {
        let s = fixture.open(Arc::new(FaultySys::refusing_call(call, unknown.clone(), Errno::EIO)));
        assert_eq!(s.recover().unwrap().unknown, [SnapshotId(500)], "{call} fails");
        s.cleanup(&|| false).unwrap();
        assert!(unknown.join("precious").exists());
    }
    fs::remove_file(unknown.join("precious")).unwrap();
    let report = fixture.open(Arc::new(Host)).recover().unwrap();
    assert_eq!(report.leftovers, 1, "a crash leaves an empty directory");
}
