//! Takes away what removed snapshots left: directories, and attachments that no active
//! snapshot stands on. Its cost follows the list of what was removed, not what exists.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::{Error, Result, Snapshotter};
use crate::attach::{Release, Released};
use crate::store::Lookup;
use crate::types::SnapshotId;

/// So many ids are taken off the list at a time.
const BATCH: usize = 256;

/// What a cleanup did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub done: usize,
    /// Busy or failed; they stay on the list.
    pub left: usize,
}

impl Snapshotter {
    pub fn cleanup(&self, cancelled: &dyn Fn() -> bool) -> Result<Cleaned> {
        let _one_at_a_time = self.cleaning.lock();
        let mut cleaned = Cleaned::default();
        let mut left = Vec::new();
        let result = self.clean_list(cancelled, &mut cleaned, &mut left);
        cleaned.left = left.len();
        if !left.is_empty() {
            self.store.write(|tx| left.iter().try_for_each(|id| tx.schedule_cleanup(*id)).map_err(Error::from))?;
        }
        result.map(|()| cleaned)
    }

    fn clean_list(
        &self,
        cancelled: &dyn Fn() -> bool,
        cleaned: &mut Cleaned,
        left: &mut Vec<SnapshotId>,
    ) -> Result<()> {
        while !cancelled() {
            // Off the list first: an id that is put on it from now on means something new.
            let batch = self.store.write(|tx| tx.take_cleanup(BATCH).map_err(Error::from))?;
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
            for id in batch {
                if self.clean(id, &mounts) {
                    cleaned.done += 1;
                } else {
                    left.push(id);
                }
            }
        }
        Err(Error::Cancelled)
    }

    /// Whether `id` needs no cleanup any more.
    fn clean(&self, id: SnapshotId, mounts: &[PathBuf]) -> bool {
        let (home, fs) = (self.places.home(id), self.places.fs(id));
        if let Some(foreign) = mounts.iter().find(|m| m.starts_with(&home) && **m != fs) {
            log::warn!("{} is left: something is mounted on {}", home.display(), foreign.display());
            return false;
        }
        let released = self.attacher.release(id, || {
            let needed = self.store.read(|tx| needs_its_directory(tx, id))?;
            Ok::<_, Error>(if needed { Release::Keep } else { Release::Remove })
        });
        match released {
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
