//! Transactions and usage.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::fixture::{Fixture, key, request};
use crate::model::AttachMode;
use crate::model::{Labels, SnapshotId};
use crate::snapshotter::Result;
use crate::system::Host;

#[test]
fn root_panic_in_a_transaction_fails_only_its_own_call() {
    let fixture = Fixture::new(AttachMode::Bind);
    let s = fixture.open(Arc::new(Host));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        s.store.write(|tx| -> Result<()> {
            tx.schedule_cleanup(&[SnapshotId(99)])?;
            panic!("on purpose")
        })
    }));
    assert!(panicked.is_err());
    s.prepare(request("key", "", &[])).unwrap();
    let scheduled = s.store.write(|tx| tx.mark_cleanup_started(SnapshotId(0)..=SnapshotId(u64::MAX), 9)).unwrap();
    assert_eq!(scheduled, []);
}

/// A committed snapshot's usage is stored for good, so it must be that of files at rest.
#[test]
fn root_usage_of_changing_files_is_not_stored() {
    let fixture = Fixture::new(AttachMode::Symlink);
    let s = fixture.open(Arc::new(Host));
    let source = PathBuf::from(&s.prepare(request("active", "", &[])).unwrap()[0].source);
    fs::create_dir(source.join("dir")).unwrap();
    s.commit(&key("committed"), &key("active"), Labels::new(), None).unwrap();
    let count = AtomicUsize::default();
    let change = || {
        fs::write(source.join("dir").join(count.fetch_add(1, Ordering::SeqCst).to_string()), "x").unwrap();
        false
    };
    let disturbed = s.usage(&key("committed"), &change).unwrap();
    assert!(disturbed.inodes >= 2, "{disturbed:?}");
    let changes = count.load(Ordering::SeqCst);
    assert!(changes > 1, "it was measured a second time");
    let at_rest = s.usage(&key("committed"), &|| false).unwrap();
    assert_eq!(at_rest.inodes, 2 + i64::try_from(changes).unwrap());
    let stored = s.usage(&key("committed"), &|| panic!("it is measured although it is stored")).unwrap();
    assert_eq!(stored, at_rest);
}
