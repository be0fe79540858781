//! A look at a store before it is opened for work: whether it can be read as a whole.
//!
//! The engine writes when it opens a file, even one that it then refuses, and may panic over
//! one that was changed outside. So a file is opened here first, every page of it checked, with
//! a backend that keeps in memory what is written: a damaged one stays as it was found.
#![forbid(unsafe_code)]

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use redb::{ReadableDatabase, TableError};

use super::aside::{Aside, Locks};
use super::transaction::META;
use super::{Damage, Error, Result, SCHEMA, SCHEMA_VERSION, builder};

/// Whether the file is a whole store of our schema.
pub fn check(path: &Path) -> Result<()> {
    let failed = |cause: redb::Error| Error::Engine { path: path.to_owned(), cause };
    let file = File::options().read(true).write(true).open(path).map_err(|e| failed(e.into()))?;
    if file.metadata().map_err(|e| failed(e.into()))?.len() == 0 {
        return Err(Error::Damaged { path: path.to_owned(), found: Damage::Empty });
    }
    let backend = Aside::new(file, Locks::Taken).map_err(|e| failed(e.into()))?;
    // What panics here is dropped as a whole.
    let schema = catch_unwind(AssertUnwindSafe(|| schema(backend)));
    match schema {
        Ok(Ok(Some(SCHEMA_VERSION))) => Ok(()),
        Ok(Ok(Some(found))) => Err(Error::Schema { path: path.to_owned(), found }),
        Ok(Ok(None)) => Err(Error::Damaged { path: path.to_owned(), found: Damage::NoSchema }),
        Ok(Err(redb::Error::DatabaseAlreadyOpen)) => Err(Error::InUse { path: path.to_owned() }),
        // Of the machine, not of the file.
        Ok(Err(redb::Error::Io(cause))) if cause.raw_os_error().is_some() => Err(failed(cause.into())),
        Ok(Err(cause)) => Err(Error::Damaged { path: path.to_owned(), found: Damage::Engine(cause) }),
        Err(_) => Err(Error::Damaged { path: path.to_owned(), found: Damage::Panic }),
    }
}

fn schema(backend: Aside) -> std::result::Result<Option<u64>, redb::Error> {
    let database = builder().set_check_integrity_on_open(true).create_with_backend(backend)?;
    let read = database.begin_read().map_err(redb::Error::from)?;
    match read.open_table(META) {
        Ok(meta) => Ok(meta.get(SCHEMA)?.map(|version| version.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::{Lookup, Store};
    use crate::types::{Key, Kind, Labels, Snapshot, SnapshotId, Timestamp};

    fn snapshots() -> Vec<Snapshot> {
        let snapshot = |id: u64| Snapshot {
            id: SnapshotId(id),
            key: Key::parse(&format!("snapshot-{id}")).unwrap(),
            parent: (id > 1).then(|| Key::parse(&format!("snapshot-{}", id - 1)).unwrap()),
            kind: Kind::Committed,
            created: Timestamp(1),
            updated: Timestamp(2),
            labels: Labels::from([("label".to_owned(), "v".repeat(200))]),
            layer: None,
            usage: None,
        };
        (1..=40).map(snapshot).collect()
    }

    fn rows(path: &Path) -> Result<Vec<Snapshot>> {
        let store = Store::open(path, None)?;
        let mut rows = Vec::new();
        store.read(|tx| tx.for_each(|snapshot| rows.push(snapshot)))?;
        rows.sort_by_key(|snapshot| snapshot.id);
        Ok(rows)
    }

    #[test]
    fn a_file_that_was_changed_anywhere_is_refused_as_it_is_or_holds_all_it_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.redb");
        Store::create(&path, None, &snapshots(), &[]).unwrap();
        let whole = fs::read(&path).unwrap();
        assert_eq!(rows(&path).unwrap(), snapshots());
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
        let (mut refused, mut sound) = (0, 0);
        // The head byte by byte, and something of every page.
        for at in (0..256).chain((256..=used).step_by(used / 200)) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x11;
            fs::write(&path, &bytes).unwrap();
            if let Err(e) = check(&path) {
                refused += 1;
                assert!(matches!(e, Error::Damaged { .. } | Error::Schema { .. }), "byte {at}: {e}");
                assert!(fs::read(&path).unwrap() == bytes, "byte {at}: the file was changed");
            } else {
                sound += 1;
                assert_eq!(rows(&path).unwrap(), snapshots(), "byte {at}");
            }
        }
        assert!(refused > 50 && sound > 50, "{refused} refused, {sound} sound");
    }
}
