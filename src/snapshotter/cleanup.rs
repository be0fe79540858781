//! Takes away what removed snapshots left: directories, and attachments that no active
//! snapshot stands on. Its cost follows the list of what was removed, not what exists.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use super::{Error, Result, Snapshotter};
use crate::attach::Released;
use crate::overlay::Form;
use crate::store::Lookup;
use crate::types::SnapshotId;

/// So many ids are worked on between two looks at the mount table.
const BATCH: usize = 256;

/// What a cleanup did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub done: usize,
    /// Busy or failed; they stay on the list.
    pub left: usize,
}

impl Snapshotter {
    /// One at a time, and one that waits: what a third one wants done, the waiting one does.
    pub fn cleanup(&self, cancelled: &dyn Fn() -> bool) -> Result<Cleaned> {
        let _turn = match self.cleaning.try_lock() {
            Some(turn) => turn,
            None if self.cleanup_waits.swap(true, Ordering::SeqCst) => return Ok(Cleaned::default()),
            None => {
                let turn = self.cleaning.lock();
                self.cleanup_waits.store(false, Ordering::SeqCst);
                turn
            }
        };
        let mut cleaned = Cleaned::default();
        let mut left = Vec::new();
        let result = self.clean_list(cancelled, &mut cleaned, &mut left);
        cleaned.left = left.len();
        if !left.is_empty() {
            self.store.write_to_free(|tx| tx.schedule_cleanup(&left).map_err(Error::from))?;
        }
        self.store.restore_reserve();
        result.map(|()| cleaned)
    }

    fn clean_list(
        &self,
        cancelled: &dyn Fn() -> bool,
        cleaned: &mut Cleaned,
        left: &mut Vec<SnapshotId>,
    ) -> Result<()> {
        let mut is_first = true;
        loop {
            let mut batch = self.store.write_to_free(|tx| {
                if is_first {
                    // Nobody else cleans: what looks begun is of a cleanup that failed or was killed.
                    tx.forget_begun_cleanups()?;
                }
                tx.begin_cleanup(BATCH).map_err(Error::from)
            })?;
            is_first = false;
            if batch.is_empty() {
                return Ok(());
            }
            let mounts = match self.sys.mounts_below(self.places.all()) {
                Ok(mounts) => mounts,
                Err(e) => {
                    left.extend(batch);
                    return Err(e.into());
                }
            };
            let mut done = Vec::new();
            while let Some(id) = batch.pop() {
                if cancelled() {
                    left.push(id);
                    left.append(&mut batch);
                    self.finish(&done, cleaned)?;
                    return Err(Error::Cancelled);
                }
                if self.clean(id, &mounts) { done.push(id) } else { left.push(id) }
            }
            self.finish(&done, cleaned)?;
        }
    }

    fn finish(&self, done: &[SnapshotId], cleaned: &mut Cleaned) -> Result<()> {
        self.store.write_to_free(|tx| tx.finish_cleanup(done).map_err(Error::from))?;
        cleaned.done += done.len();
        Ok(())
    }

    /// Whether `id` needs no cleanup any more.
    fn clean(&self, id: SnapshotId, mounts: &[PathBuf]) -> bool {
        let home = self.places.home(id);
        let ours = [Form::Layer, Form::Flat].map(|form| self.places.root(id, form));
        if let Some(foreign) = mounts.iter().find(|m| m.starts_with(&home) && !ours.contains(m)) {
            log::warn!("{} is left: something is mounted on {}", home.display(), foreign.display());
            return false;
        }
        match self.sources.release_one(id) {
            Ok(Released::Done) => true,
            Ok(Released::NotYet) => {
                log::debug!("{} is in use, it is taken away later", home.display());
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
pub(super) fn needs_its_directory(tx: &impl Lookup, id: SnapshotId) -> Result<bool> {
    Ok(match tx.by_id(id)? {
        None => false,
        Some(remote) if remote.layer.is_some() => tx.is_live(id)?,
        Some(_) => true,
    })
}
