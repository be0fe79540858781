//! Takes away what removed snapshots left: directories, and attachments that no active
//! snapshot stands on. Its cost follows the list of what was removed, not what exists.
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

/// So many ids are worked on between two looks at the mount table.
const BATCH: usize = 1024;
/// Threads that delete, at most,
const MAX_CLEANUP_THREADS: usize = 4;
/// one more for so many snapshots.
const SNAPSHOTS_PER_THREAD: usize = 16;

type MountsBySnapshot = HashMap<SnapshotId, Vec<PathBuf>>;

/// What a cleanup did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanupBatch {
    pub done: usize,
    /// Busy or failed; they stay on the list.
    pub left: usize,
}

impl Snapshotter {
    /// One at a time, and one that waits: what a third one wants done, the waiting one does.
    pub fn cleanup(&self, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<CleanupBatch> {
        let _turn = match self.cleaning.try_lock() {
            Some(turn) => turn,
            None if self.cleanup_waits.swap(true, Ordering::SeqCst) => return Ok(CleanupBatch::default()),
            None => {
                let turn = self.cleaning.lock();
                self.cleanup_waits.store(false, Ordering::SeqCst);
                turn
            }
        };
        self.sources.attacher.unmount_superseded();
        let mut cleaned = CleanupBatch::default();
        let mut left = Vec::new();
        let result = self.cleanup_scheduled(cancelled, &mut cleaned, &mut left);
        cleaned.left = left.len();
        if !left.is_empty() {
            self.store.write_using_reserve(|tx| tx.schedule_cleanup(&left).map_err(Error::from))?;
        }
        self.store.restore_reserve();
        METRICS.record_cleanup(cleaned.done, cleaned.left);
        result.map(|()| cleaned)
    }

    fn cleanup_scheduled(
        &self,
        cancelled: &(dyn Fn() -> bool + Sync),
        cleaned: &mut CleanupBatch,
        left: &mut Vec<SnapshotId>,
    ) -> Result<()> {
        // Ids that come onto the list meanwhile are mostly higher: with them it might never end.
        let Some(end) = self.store.read(|tx| tx.last_scheduled().map_err(Error::from))? else { return Ok(()) };
        let mut next = SnapshotId(0);
        while next <= end {
            let batch =
                self.store.write_using_reserve(|tx| tx.mark_cleanup_started(next..=end, BATCH).map_err(Error::from))?;
            let Some(last) = batch.last() else { break };
            next = SnapshotId(last.0.saturating_add(1));
            let mounts = match self.mounts_by_snapshot() {
                Ok(mounts) => mounts,
                Err(e) => {
                    left.extend(batch);
                    return Err(e);
                }
            };
            let done = self.cleanup_batch(&batch, &mounts, cancelled);
            left.extend(batch.iter().filter(|id| !done.contains(id)));
            self.store.write_using_reserve(|tx| tx.finish_cleanup(done.iter().copied()).map_err(Error::from))?;
            cleaned.done += done.len();
            if cancelled() {
                return Err(Error::Cancelled);
            }
        }
        Ok(())
    }

    /// What is mounted below each snapshot's directory.
    fn mounts_by_snapshot(&self) -> Result<MountsBySnapshot> {
        let all = self.paths.snapshots_dir();
        let mut mounts = MountsBySnapshot::new();
        for mount in self.sys.mounts_below(all)? {
            let below = mount.strip_prefix(all).ok();
            let home = below.and_then(|below| below.iter().next()?.to_str());
            if let Some(id) = home.and_then(SnapshotId::from_directory_name) {
                mounts.entry(id).or_default().push(mount);
            }
        }
        Ok(mounts)
    }

    /// With several threads, if it is worth it: they wait for the disk, mostly. The result is
    /// what needs no cleanup any more.
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
            let helpers = (batch.len() / SNAPSHOTS_PER_THREAD).min(MAX_CLEANUP_THREADS - 1);
            let name = || thread::Builder::new().name("cleaner".to_owned());
            // One that cannot be started is done without.
            let helpers: Vec<_> = (0..helpers).filter_map(|_| name().spawn_scoped(scope, work).ok()).collect();
            let mut done = work();
            for helper in helpers {
                done.extend(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
            done
        })
    }

    /// Whether `id` needs no cleanup any more.
    fn cleanup_one(&self, id: SnapshotId, mounts: &[PathBuf], cancelled: &dyn Fn() -> bool) -> bool {
        let home = self.paths.snapshot_dir(id);
        let (taken_over, bound) = (self.paths.fs(id), self.paths.bind_mounts_dir(id));
        let is_ours = |mount: &Path| mount == taken_over || mount.parent() == Some(&bound);
        if let Some(foreign) = mounts.iter().find(|mount| !is_ours(mount)) {
            log::warn!("{} is left: something is mounted on {}", home.display(), foreign.display());
            return false;
        }
        match self.sources.detach_one_if_unused(id, cancelled) {
            Ok(ReleaseOutcome::Done) => true,
            Ok(ReleaseOutcome::NotYet) => {
                log::debug!("{} is in use, it is taken away later", home.display());
                false
            }
            Err(Error::System(e)) if e.errno == Errno::ECANCELED => {
                log::debug!("the removal of {} goes on in the next cleanup: the caller has given up", home.display());
                false
            }
            Err(e) => {
                log::warn!("{} is left until the next cleanup: {e}", home.display());
                false
            }
        }
    }
}

/// A local snapshot owns its directory; a remote one has it while something stands on it.
pub(super) fn needs_its_directory(tx: &ReadTxn, id: SnapshotId) -> Result<bool> {
    Ok(match tx.by_id(id)? {
        None => false,
        Some(remote) if remote.layer.is_some() => tx.is_in_use(id)?,
        Some(_) => true,
    })
}
