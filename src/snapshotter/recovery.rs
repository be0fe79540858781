//! What the start does with the disk as it finds it: compare it with the records, put what
//! nobody owns on the cleanup list, say what is broken, and stop at nothing.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::PathBuf;

use nix::errno::Errno;

use super::cleanup::needs_its_directory;
use super::{Error, Result, Snapshotter};
use crate::sys::FileType;
use crate::types::SnapshotId;

/// What a start found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub snapshots: usize,
    /// Ids with something on disk that nothing needs.
    pub leftovers: usize,
    /// Local snapshots whose files are missing.
    pub broken: Vec<SnapshotId>,
    /// Files that no record knows and nobody removed: the metadata is older than they are.
    pub unknown: Vec<SnapshotId>,
    /// Entries beside our directories that are not ours.
    pub foreign: usize,
}

impl Snapshotter {
    /// To be called once, before the first call is served. Of each snapshot no more is kept in
    /// memory than numbers: there may be many.
    pub fn recover(&self) -> Result<Found> {
        let mut found = Found::default();
        let mut local = HashSet::new();
        self.store.read(|tx| {
            tx.for_each(|snapshot| {
                found.snapshots += 1;
                if snapshot.layer.is_some() {
                    return;
                }
                local.insert(snapshot.id);
                if let Err(e) = self.require_files(&snapshot) {
                    log::error!("{e}");
                    found.broken.push(snapshot.id);
                }
            })
            .map_err(Error::from)
        })?;
        let mut others = Vec::new();
        self.sys.for_each_entry(self.places.all(), &mut |name, _| {
            let id = name.to_str().and_then(SnapshotId::from_directory_name);
            if id.is_none_or(|id| !local.contains(&id)) {
                others.push(id);
            }
            ControlFlow::Continue(())
        })?;
        let leftovers = self.look_at(&others, &mut found)?;
        self.store.write_to_free(|tx| tx.forget_unneeded_scans().map_err(Error::from))?;
        found.leftovers = leftovers.len();
        if !leftovers.is_empty() {
            self.store.write_to_free(|tx| tx.schedule_cleanup(&leftovers).map_err(Error::from))?;
        }
        let _ = self.found.set(found.clone());
        Ok(found)
    }

    /// Entries that are no directories of local snapshots; the result is what nothing needs.
    fn look_at(&self, entries: &[Option<SnapshotId>], found: &mut Found) -> Result<Vec<SnapshotId>> {
        let mounts = self.sys.mounts_below(self.places.all())?;
        let mut leftovers = Vec::new();
        for id in entries {
            match *id {
                Some(id) if id >= self.store.first_id() || self.is_known(id)? => {
                    if self.store.read(|tx| needs_its_directory(tx, id))? {
                        // What led elsewhere in the process before, whose memory of it is gone.
                        self.sources.attacher.retire(&self.places.home(id));
                        continue;
                    }
                    if self.holds_unknown_files(id, &mounts)? {
                        log::error!(
                            "{} holds files that the metadata does not know: it is left alone; remove it once you \
                             are sure that nothing needs it",
                            self.places.home(id).display()
                        );
                        found.unknown.push(id);
                    } else {
                        leftovers.push(id);
                    }
                }
                // Of whoever used this state root before us. It is not ours to remove.
                _ => found.foreign += 1,
            }
        }
        Ok(leftovers)
    }

    /// Whether the metadata has this number, of a snapshot or of one that was removed.
    fn is_known(&self, id: SnapshotId) -> Result<bool> {
        self.store.read(|tx| Ok(tx.exists(id)? || tx.is_scheduled(id)?))
    }

    /// A crash while a snapshot was made leaves an empty `fs`, and one while it was removed
    /// leaves its id on the cleanup list. Files of anything else were somebody's: an older
    /// copy of the metadata was put back, or the file was damaged and lost its last entries.
    fn holds_unknown_files(&self, id: SnapshotId, mounts: &[PathBuf]) -> Result<bool> {
        let fs = self.places.fs(id);
        if self.is_known(id)? || mounts.contains(&fs) {
            return Ok(false);
        }
        let mut has_files = false;
        let read = self.sys.lstat(&fs).and_then(|status| match status.file_type {
            FileType::Directory => self.sys.for_each_entry(&fs, &mut |_, _| {
                has_files = true;
                ControlFlow::Break(())
            }),
            _ => Ok(()),
        });
        // What cannot be read may be somebody's files, and one bad directory must not end the start.
        let is_unreadable = read.is_err_and(|e| !matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR));
        Ok(has_files || is_unreadable)
    }
}
