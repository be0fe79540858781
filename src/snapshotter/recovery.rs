//! The start compares the disk with the metadata, puts what nobody owns on the cleanup list, and logs what is broken. It
//! goes on whatever it finds.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::PathBuf;

use nix::errno::Errno;

use super::cleanup::needs_its_directory;
use super::{Error, Result, Snapshotter};
use crate::model::SnapshotId;
use crate::system::FileType;

/// What a start found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    pub snapshots: usize,
    /// Ids with something on disk that nothing needs.
    pub leftovers: usize,
    /// Local snapshots whose files are missing.
    pub broken: Vec<SnapshotId>,
    /// Directories with files that the metadata does not know: it is older than they are.
    pub unknown: Vec<SnapshotId>,
    /// Entries beside our directories that are not ours.
    pub foreign: usize,
}

impl Snapshotter {
    /// To be called once, before the first call is served. Only ids are kept in memory, because there may be many
    /// snapshots.
    pub fn recover(&self) -> Result<RecoveryReport> {
        let mut found = RecoveryReport::default();
        let mut local = HashSet::new();
        self.store.read(|tx| {
            tx.for_each(|snapshot| {
                found.snapshots += 1;
                if snapshot.layer.is_some() {
                    return;
                }
                local.insert(snapshot.id);
                if let Err(e) = self.ensure_files_exist(&snapshot) {
                    log::error!("{e}");
                    found.broken.push(snapshot.id);
                }
            })
            .map_err(Error::from)
        })?;
        let mut others = Vec::new();
        self.sys.for_each_entry(self.paths.snapshots_dir(), &mut |name, _| {
            match name.to_str().and_then(SnapshotId::from_directory_name) {
                Some(id) if local.contains(&id) => {}
                Some(id) => others.push(id),
                None => found.foreign += 1,
            }
            ControlFlow::Continue(())
        })?;
        let leftovers = self.find_leftovers(&others, &mut found)?;
        found.leftovers = leftovers.len();
        let tidied = self.store.write_using_reserve(|tx| {
            tx.forget_unneeded_scans()?;
            tx.schedule_cleanup(&leftovers).map_err(Error::from)
        });
        if let Err(e) = tidied {
            log::error!("{} leftovers stay until the next start: {e}", leftovers.len());
        }
        let _ = self.found.set(found.clone());
        Ok(found)
    }

    /// Finds the directories that nothing needs among `others`, which are not those of local snapshots.
    fn find_leftovers(&self, others: &[SnapshotId], found: &mut RecoveryReport) -> Result<Vec<SnapshotId>> {
        let mounts = self.sys.mounts_below(self.paths.snapshots_dir())?;
        let mut leftovers = Vec::new();
        for &id in others {
            let (is_known, is_needed) = self.store.read(|tx| {
                let is_known = tx.exists(id)? || tx.is_scheduled(id)?;
                Ok::<_, Error>((is_known, is_known && needs_its_directory(tx, id)?))
            })?;
            if is_needed {
                // Mounts in it that an earlier process was about to take away.
                self.sources.attacher.schedule_unmount(&self.paths.snapshot_dir(id));
            } else if !is_known && id < self.store.first_id() {
                // Of whoever used this state root before us. It is not ours to remove.
                found.foreign += 1;
            } else if !is_known && self.holds_files(id, &mounts) {
                log::error!(
                    "{} holds files that the metadata does not know: it is left alone; remove it once you are sure \
                     that nothing needs it",
                    self.paths.snapshot_dir(id).display()
                );
                found.unknown.push(id);
            } else {
                leftovers.push(id);
            }
        }
        Ok(leftovers)
    }

    /// A crash while a snapshot was made leaves an empty `fs`, and one while it was removed
    /// leaves its id on the cleanup list. Files of anything else were somebody's: an older
    /// copy of the metadata was put back, or the file was damaged and lost its last entries.
    fn holds_files(&self, id: SnapshotId, mounts: &[PathBuf]) -> bool {
        let fs = self.paths.fs(id);
        // A mount at this place shows a published layer, whose files are the repository's.
        if mounts.contains(&fs) {
            return false;
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
        has_files || is_unreadable
    }
}
