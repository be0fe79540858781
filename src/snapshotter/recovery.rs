//! The start compares the disk with the metadata: it schedules what nobody needs for cleanup, and logs what is broken.
//! Nothing that it finds ends the start.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::PathBuf;

use nix::errno::Errno;

use super::cleanup::needs_directory;
use super::{Error, Result, Snapshotter};
use crate::model::SnapshotId;
use crate::system::FileType;

/// What a start found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    pub snapshots: usize,
    /// Number of directories that nobody needs.
    pub leftovers: usize,
    /// Local snapshots whose files are missing.
    pub broken: Vec<SnapshotId>,
    /// Directories with files that the metadata does not know, because it is older than they are.
    pub unknown: Vec<SnapshotId>,
    /// Number of entries beside our directories that are not ours.
    pub foreign: usize,
}

/// Why a directory is there that is not one of a local snapshot.
enum DirectoryOwner {
    /// A published layer that is in use.
    AttachedLayer,
    /// Whoever used this state root before us.
    PreviousUser,
    /// Nobody that the metadata knows, though there are files in it.
    Unknown,
    Nobody,
}

impl Snapshotter {
    /// Must be called once, before the first call is served. Keeps only ids in memory, because there may be many
    /// snapshots.
    pub fn recover(&self) -> Result<RecoveryReport> {
        let mut report = RecoveryReport::default();
        let local = self.check_local_snapshots(&mut report)?;
        let mut others = Vec::new();
        self.sys.for_each_entry(self.paths.snapshots_dir(), &mut |name, _| {
            match name.to_str().and_then(SnapshotId::from_directory_name) {
                Some(id) if local.contains(&id) => {}
                Some(id) => others.push(id),
                None => report.foreign += 1,
            }
            ControlFlow::Continue(())
        })?;
        let leftovers = self.find_leftovers(&others, &mut report)?;
        report.leftovers = leftovers.len();
        let result = self.store.write_using_reserve(|tx| {
            tx.forget_unneeded_scans()?;
            tx.schedule_cleanup(&leftovers)
        });
        if let Err(e) = result {
            log::error!(event = "leftovers_not_scheduled", leftovers = leftovers.len();
                "cannot schedule {} leftovers for cleanup, the next start finds them again: {e}", leftovers.len());
        }
        let _ = self.recovery.set(report.clone());
        Ok(report)
    }

    /// Counts all snapshots, reports local ones whose files are missing, and returns the ids of all local ones.
    fn check_local_snapshots(&self, report: &mut RecoveryReport) -> Result<HashSet<SnapshotId>> {
        let mut local = HashSet::new();
        self.store.read(|tx| {
            tx.for_each(|snapshot| {
                report.snapshots += 1;
                if snapshot.layer.is_some() {
                    return;
                }
                local.insert(snapshot.id);
                if let Err(e) = self.ensure_files_exist(&snapshot) {
                    log::error!(event = "snapshot_files_missing", snapshot = snapshot.id.0; "{e}");
                    report.broken.push(snapshot.id);
                }
            })
        })?;
        Ok(local)
    }

    /// Returns those directories of `ids` that nobody needs. None of `ids` is a local snapshot.
    fn find_leftovers(&self, ids: &[SnapshotId], report: &mut RecoveryReport) -> Result<Vec<SnapshotId>> {
        let mounts = self.sys.mounts_below(self.paths.snapshots_dir())?;
        let mut leftovers = Vec::new();
        for &id in ids {
            let home = self.paths.snapshot_dir(id);
            match self.directory_owner(id, &mounts)? {
                // An earlier process may have left superseded mounts in it.
                DirectoryOwner::AttachedLayer => self.layer_provider.attacher.schedule_unmount(&home),
                DirectoryOwner::PreviousUser => report.foreign += 1,
                DirectoryOwner::Unknown => {
                    log::error!(event = "unknown_directory", path:% = home.display();
                        "{} contains files that the metadata does not know; it is left alone, remove it once you are \
                         sure that nothing needs it", home.display());
                    report.unknown.push(id);
                }
                DirectoryOwner::Nobody => leftovers.push(id),
            }
        }
        Ok(leftovers)
    }

    fn directory_owner(&self, id: SnapshotId, mounts: &[PathBuf]) -> Result<DirectoryOwner> {
        let (is_known, is_needed) = self.store.read(|tx| {
            let is_known = tx.exists(id)? || tx.is_scheduled(id)?;
            Ok::<_, Error>((is_known, is_known && needs_directory(tx, id)?))
        })?;
        Ok(if is_needed {
            DirectoryOwner::AttachedLayer
        } else if is_known {
            DirectoryOwner::Nobody
        } else if id < self.store.first_id() {
            DirectoryOwner::PreviousUser
        } else if self.contains_files(id, mounts) {
            DirectoryOwner::Unknown
        } else {
            DirectoryOwner::Nobody
        })
    }

    /// Whether somebody's files may be in the directory of `id`. A crash during a Prepare leaves an empty `fs`, and one
    /// during a removal leaves a scheduled id. Any other files belong to a snapshot that the metadata has lost: an older
    /// copy of it was put back, or it was damaged.
    fn contains_files(&self, id: SnapshotId, mounts: &[PathBuf]) -> bool {
        let fs = self.paths.fs(id);
        // A mount on `fs` shows a published layer, whose files are the repository's.
        if mounts.contains(&fs) {
            return false;
        }
        let mut has_entries = false;
        let result = self.sys.lstat(&fs).and_then(|status| match status.file_type {
            FileType::Directory => self.sys.for_each_entry(&fs, &mut |_, _| {
                has_entries = true;
                ControlFlow::Break(())
            }),
            _ => Ok(()),
        });
        // A directory that cannot be read may contain somebody's files, and must not end the start.
        let is_unreadable = result.is_err_and(|e| !matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR));
        has_entries || is_unreadable
    }
}
