//! The first moment of a store: whole or not there at all.
//!
//! It is built beside its place and renamed, so what stands at its place was complete once: a
//! file there that is not a store is a damaged one, and never one that is just being made.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::{Error, Result, Store, Write, engine, initialise, open_database, trial};
use crate::types::{Snapshot, SnapshotId};

impl Store {
    /// Whether the file at `path` is a whole store; it is not changed.
    pub fn check(path: &Path) -> Result<()> {
        trial::check(path)
    }

    /// Makes a store with `snapshots`, parents before children, and with `leftovers` on the list
    /// for cleanup. As with `open`, it hands out ids above `occupied`; theirs must not be higher.
    /// What was at `path` before is replaced.
    pub fn create(
        path: &Path,
        occupied: Option<SnapshotId>,
        snapshots: &[Snapshot],
        leftovers: &[SnapshotId],
    ) -> Result<()> {
        let new = path.with_extension("new");
        let failed = |cause: io::Error| Error::Engine { path: path.to_owned(), cause: cause.into() };
        // Of one who died here.
        remove(&new).map_err(failed)?;
        let result = fill(&new, occupied, snapshots, leftovers)
            .and_then(|()| fs::rename(&new, path).map_err(failed))
            .and_then(|()| sync_directory(path).map_err(failed));
        if result.is_err() {
            // The first failure is the one to tell.
            let _ = remove(&new);
        }
        result
    }
}

fn fill(path: &Path, occupied: Option<SnapshotId>, snapshots: &[Snapshot], leftovers: &[SnapshotId]) -> Result<()> {
    let database = open_database(path, &engine(path))?;
    initialise(&database, occupied).map_err(|e| e.at(path))?;
    let failed = |cause: redb::Error| Error::Engine { path: path.to_owned(), cause };
    let write = Write::new(database.begin_write().map_err(|e| failed(e.into()))?, path);
    snapshots.iter().try_for_each(|snapshot| write.insert(snapshot))?;
    write.schedule_cleanup(leftovers)?;
    write.transaction.commit().map_err(|e| failed(e.into()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
