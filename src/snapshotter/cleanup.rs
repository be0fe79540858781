//! Cleanup: removes the directories of removed snapshots, and of published layers that no active snapshot or view needs.
//!
//! It works through the list of ids that removals scheduled, so its cost follows what was removed and not what exists.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nix::errno::Errno;

use super::{Error, Result, Snapshotter};
use crate::attach::ReleaseOutcome;
use crate::metrics::METRICS;
use crate::model::SnapshotId;
use crate::store::ReadTxn;

/// Maximum number of ids that are cleaned up between two reads of the mount table.
const MAX_BATCH: usize = 1024;
/// Maximum number of threads that remove directories.
const MAX_CLEANUP_THREADS: usize = 4;
/// Number of snapshots that justifies one more thread.
const SNAPSHOTS_PER_THREAD: usize = 16;

type MountsBySnapshot = HashMap<SnapshotId, Vec<PathBuf>>;

/// How many snapshots a cleanup has done, and how many it has not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanupBatch {
    pub done: usize,
    /// Snapshots that were busy or failed. They stay scheduled.
    pub remaining: usize,
}

impl Snapshotter {
    /// Cleans up everything that is scheduled. One cleanup runs and one waits; a third returns at once, because the
    /// waiting one does its work too.
    pub fn cleanup(&self, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<CleanupBatch> {
        let _guard = match self.cleanup_lock.try_lock() {
            Some(guard) => guard,
            None if self.cleanup_queued.swap(true, Ordering::SeqCst) => return Ok(CleanupBatch::default()),
            None => {
                let guard = self.cleanup_lock.lock();
                self.cleanup_queued.store(false, Ordering::SeqCst);
                guard
            }
        };
        self.layer_provider.attacher.unmount_superseded();
        let mut done = 0;
        let mut remaining = Vec::new();
        let result = self.cleanup_scheduled(cancelled, &mut done, &mut remaining);
        if !remaining.is_empty() {
            self.store.write_using_reserve(|tx| tx.schedule_cleanup(&remaining))?;
        }
        self.store.restore_reserve();
        METRICS.record_cleanup(done, remaining.len());
        result.map(|()| CleanupBatch { done, remaining: remaining.len() })
    }

    fn cleanup_scheduled(
        &self,
        cancelled: &(dyn Fn() -> bool + Sync),
        done: &mut usize,
        remaining: &mut Vec<SnapshotId>,
    ) -> Result<()> {
        // Ids that are scheduled meanwhile are mostly higher. They are left to the next cleanup, or this one might never
        // end.
        let Some(last) = self.store.read(|tx| tx.last_scheduled().map_err(Error::from))? else { return Ok(()) };
        let mut next = SnapshotId(0);
        while next <= last {
            let batch = self.store.write_using_reserve(|tx| tx.mark_cleanup_started(next..=last, MAX_BATCH))?;
            let Some(last_of_batch) = batch.last() else { break };
            next = SnapshotId(last_of_batch.0.saturating_add(1));
            let mounts = match self.mounts_by_snapshot() {
                Ok(mounts) => mounts,
                Err(e) => {
                    remaining.extend(batch);
                    return Err(e);
                }
            };
            let cleaned = self.cleanup_batch(&batch, &mounts, cancelled);
            remaining.extend(batch.iter().filter(|id| !cleaned.contains(id)));
            self.store.write_using_reserve(|tx| tx.finish_cleanup(cleaned.iter().copied()))?;
            *done += cleaned.len();
            if cancelled() {
                return Err(Error::DeadlineExceeded);
            }
        }
        Ok(())
    }

    /// The mount points in each snapshot's directory.
    fn mounts_by_snapshot(&self) -> Result<MountsBySnapshot> {
        let snapshots = self.paths.snapshots_dir();
        let mut mounts = MountsBySnapshot::new();
        for mount in self.sys.mounts_below(snapshots)? {
            let below = mount.strip_prefix(snapshots).ok();
            let directory = below.and_then(|below| below.iter().next()?.to_str());
            if let Some(id) = directory.and_then(SnapshotId::from_directory_name) {
                mounts.entry(id).or_default().push(mount);
            }
        }
        Ok(mounts)
    }

    /// Cleans up a batch, with several threads if it is large, because they mostly wait for the disk. Returns the ids
    /// that are done.
    fn cleanup_batch(
        &self,
        batch: &[SnapshotId],
        mounts: &MountsBySnapshot,
        cancelled: &(dyn Fn() -> bool + Sync),
    ) -> HashSet<SnapshotId> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = HashSet::new();
            while !cancelled()
                && let Some(id) = batch.get(next.fetch_add(1, Ordering::Relaxed))
            {
                if self.cleanup_one(*id, mounts.get(id).map_or(&[], Vec::as_slice), cancelled) {
                    done.insert(*id);
                }
            }
            done
        };
        thread::scope(|scope| {
            let count = (batch.len() / SNAPSHOTS_PER_THREAD).min(MAX_CLEANUP_THREADS - 1);
            // A thread that cannot be started is not needed: the others do its work.
            let helpers: Vec<_> = (0..count)
                .filter_map(|_| thread::Builder::new().name("cleaner".to_owned()).spawn_scoped(scope, work).ok())
                .collect();
            let mut done = work();
            for helper in helpers {
                done.extend(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
            done
        })
    }

    /// Removes the directory of `id` if nobody needs it. Returns false if the next cleanup has to try again.
    fn cleanup_one(&self, id: SnapshotId, mounts: &[PathBuf], cancelled: &dyn Fn() -> bool) -> bool {
        let home = self.paths.snapshot_dir(id);
        let (fs, bind_mounts) = (self.paths.fs(id), self.paths.bind_mounts_dir(id));
        // A Go snapshotter mounted layers on `fs`.
        let is_ours = |mount: &Path| mount == fs || mount.parent() == Some(&bind_mounts);
        if let Some(foreign) = mounts.iter().find(|mount| !is_ours(mount)) {
            log::warn!(event = "cleanup_foreign_mount", path:% = home.display();
                "cannot remove {}, something is mounted on {}: unmount it, and the next cleanup removes the directory",
                home.display(), foreign.display());
            return false;
        }
        match self.layer_provider.detach_if_unused(id, cancelled) {
            Ok(ReleaseOutcome::Done) => true,
            Ok(ReleaseOutcome::Busy) => {
                log::debug!("{} is in use, the next cleanup removes it", home.display());
                false
            }
            Err(Error::System(e)) if e.errno == Errno::ECANCELED => {
                log::debug!("removal of {} interrupted by the deadline of the call", home.display());
                false
            }
            Err(e) => {
                log::warn!(event = "cleanup_failed", path:% = home.display();
                    "cannot remove {}, the next cleanup tries again: {e}", home.display());
                false
            }
        }
    }
}

/// Whether anybody needs the directory of `id`. A local snapshot needs it always, and a remote one while an active
/// snapshot or a view stands on it.
pub(super) fn needs_directory(tx: &ReadTxn, id: SnapshotId) -> Result<bool> {
    Ok(match tx.by_id(id)? {
        None => false,
        Some(remote) if remote.layer.is_some() => tx.is_in_use(id)?,
        Some(_) => true,
    })
}
