//! A look at a store before it is opened for work: whether it can be read as a whole.
//!
//! The engine writes when it opens a file, even one that it then refuses, and may panic over
//! one that was changed outside. So a file is opened here first, every page of it checked, with
//! a backend that keeps in memory what is written: a damaged one stays as it was found.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parking_lot::Mutex;
use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, ReadableDatabase, StorageBackend, StorageError, TableError};

use super::transaction::META;
use super::{CACHE_BYTES, Damage, Error, Result, SCHEMA, SCHEMA_VERSION};

/// Whether the file is a whole store of our schema.
pub fn check(path: &Path) -> Result<()> {
    let failed = |cause: redb::Error| Error::Engine { path: path.to_owned(), cause };
    let file = File::options().read(true).write(true).open(path).map_err(|e| failed(e.into()))?;
    if file.metadata().map_err(|e| failed(e.into()))?.len() == 0 {
        return Err(Error::Damaged { path: path.to_owned(), found: Damage::Empty });
    }
    let backend = Aside::new(file).map_err(|e| failed(e.into()))?;
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
    let mut builder = redb::Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    let database = builder.create_with_backend(backend)?;
    let read = database.begin_read().map_err(redb::Error::from)?;
    match read.open_table(META) {
        Ok(meta) => Ok(meta.get(SCHEMA)?.map(|version| version.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

const BLOCK: usize = 4096;

/// A file that is read and locked, and never written.
#[derive(Debug)]
struct Aside {
    file: FileBackend,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    length: u64,
    /// The file counts up to here: it may have been cut and made longer again.
    of_file: u64,
    blocks: HashMap<u64, Box<[u8]>>,
}

impl Aside {
    fn new(file: File) -> std::result::Result<Self, DatabaseError> {
        let file = FileBackend::new(file)?;
        let length = file.len().map_err(StorageError::Io)?;
        Ok(Self { file, written: Mutex::new(Written { length, of_file: length, blocks: HashMap::new() }) })
    }

    /// The parts of a range in blocks: number, first byte, length.
    fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = offset + done as u64;
            // Less than a block.
            let within = usize::try_from(at % BLOCK as u64).unwrap_or_default();
            let part = (BLOCK - within).min(length - done);
            done += part;
            (part > 0).then_some((at / BLOCK as u64, within, part))
        })
    }

    fn block(&self, written: &Written, number: u64) -> io::Result<Box<[u8]>> {
        if let Some(block) = written.blocks.get(&number) {
            return Ok(block.clone());
        }
        let mut block = vec![0; BLOCK].into_boxed_slice();
        let from = number * BLOCK as u64;
        let there = written.of_file.saturating_sub(from).min(BLOCK as u64);
        if let Ok(there @ 1..) = usize::try_from(there) {
            self.file.read(from, &mut block[..there])?;
        }
        Ok(block)
    }
}

impl StorageBackend for Aside {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written.lock().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written.lock();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.length) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before a page that it names"));
        }
        let mut out = out;
        for (number, within, part) in Self::parts(offset, out.len()) {
            let (now, rest) = out.split_at_mut(part);
            now.copy_from_slice(&self.block(&written, number)?[within..within + part]);
            out = rest;
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut written = self.written.lock();
        if length < written.length {
            written.of_file = written.of_file.min(length);
            written.blocks.retain(|number, block| {
                let kept = length.saturating_sub(number * BLOCK as u64);
                if let Some(cut) = usize::try_from(kept).ok().and_then(|kept| block.get_mut(kept..)) {
                    cut.fill(0);
                }
                kept > 0
            });
        }
        written.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written.lock();
        let (end, mut rest) = (offset + data.len() as u64, data);
        for (number, within, part) in Self::parts(offset, data.len()) {
            let (now, left) = rest.split_at(part);
            let mut block = self.block(&written, number)?;
            block[within..within + part].copy_from_slice(now);
            written.blocks.insert(number, block);
            rest = left;
        }
        written.length = written.length.max(end);
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
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

    #[test]
    fn what_is_written_aside_is_read_again_and_the_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let content: Vec<u8> = (0..10_000).map(|n| u8::try_from(n % 251).unwrap()).collect();
        fs::write(&path, &content).unwrap();
        let aside = Aside::new(File::options().read(true).write(true).open(&path).unwrap()).unwrap();
        let mut expected = content.clone();
        for (at, length) in [(0, 1), (4090, 20), (8191, 1500), (4096, 4096)] {
            aside.write(at as u64, &vec![9; length]).unwrap();
            expected[at..at + length].fill(9);
        }
        let all = |length: usize| {
            let mut out = vec![1; length];
            aside.read(0, &mut out).map(|()| out)
        };
        assert_eq!(all(10_000).unwrap(), expected);
        assert!(all(10_001).is_err());
        aside.set_len(5000).unwrap();
        aside.set_len(12_000).unwrap();
        expected.truncate(5000);
        expected.resize(12_000, 0);
        assert_eq!(all(12_000).unwrap(), expected);
        assert_eq!(fs::read(&path).unwrap(), content);
    }
}
