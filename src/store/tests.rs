//! The store on a disk that has no room.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use nix::errno::Errno;

use super::disk::Disk;
use super::{Lookup, Store};
use crate::faults::{Fault, Steps};
use crate::types::SnapshotId;

/// A project quota answers EDQUOT. That was no full disk: the reserve was never used, and nothing could be removed.
#[test]
fn removal_uses_the_reserve_on_a_full_disk_and_at_a_quota() {
    for errno in [Errno::ENOSPC, Errno::EDQUOT] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.redb");
        let (disk, steps) = (Disk::default(), Arc::new(Steps::with(Fault::Fails(0, errno))));
        let store = Store::open_with(&path, disk.opener(&steps), |_| Ok(()), None).unwrap();
        assert!(store.reserve.exists());
        steps.arm();
        store.write_to_free(|tx| tx.schedule_cleanup(&[SnapshotId(1)])).unwrap();
        assert!(!store.reserve.exists(), "{errno}: the reserve was not used");
        assert!(store.read(|tx| tx.is_scheduled(SnapshotId(1))).unwrap(), "{errno}");
    }
}
