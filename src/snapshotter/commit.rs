//! Commit: an active snapshot becomes a committed one.
#![forbid(unsafe_code)]

use std::hash::{DefaultHasher, Hash, Hasher};

use nix::errno::Errno;
use parking_lot::{Mutex, MutexGuard};

use super::create::check_depth;
use super::{Error, Result, Snapshotter, check_labels};
use crate::model::{Key, Kind, Labels, Snapshot, Timestamp};
use crate::sidecar::Sidecar;
use crate::store::ReadTxn;

impl Snapshotter {
    /// Makes the active snapshot `key` the committed snapshot `name`, with exactly `labels`. `parent` may give a parent
    /// to a snapshot that was prepared without one.
    pub fn commit(&self, name: &Key, key: &Key, mut labels: Labels, parent: Option<&Key>) -> Result<()> {
        check_labels(&mut labels)?;
        let _lock = self.commit_locks.lock(key);
        let (active, parent_key) = self.store.read(|tx| validate_commit(tx, name, key, parent))?;
        let now = Timestamp::now();
        let committed = Snapshot {
            id: active.id,
            key: name.clone(),
            parent: parent_key,
            kind: Kind::Committed,
            created: now,
            updated: now,
            labels,
            layer: None,
            usage: None,
        };
        let sidecar = Sidecar { prepared: active.clone(), committed: Some(committed.clone()) };
        if let Err(e) = self.write_sidecar(&sidecar) {
            // If the snapshot was removed meanwhile, its files are missing for that reason.
            self.store.read(|tx| validate_commit_again(tx, name, &active, parent))?;
            return Err(e);
        }
        let result = self.store.write(|tx| {
            validate_commit_again(tx, name, &active, parent)?;
            tx.remove(&active)?;
            tx.insert(&committed)?;
            Ok(())
        });
        // After any error but one of the store it is certain that the commit did not happen. The sidecar must not give
        // the snapshot a name then that another one may have by now.
        if result.as_ref().is_err_and(|e| !matches!(e, Error::Store(_))) {
            let _ = self.write_sidecar(&Sidecar { prepared: active, committed: None });
        }
        result
    }

    /// Atomically replaces the sidecar of a local snapshot.
    fn write_sidecar(&self, sidecar: &Sidecar) -> Result<()> {
        let path = self.paths.sidecar(sidecar.prepared.id);
        let staging = path.with_extension("new");
        let result = self.sys.write_file(&staging, &sidecar.encode()).and_then(|()| self.sys.rename(&staging, &path));
        result.map_err(|e| match e.errno {
            Errno::ENOENT => Error::FilesMissing { key: sidecar.prepared.key.clone(), id: sidecar.prepared.id },
            _ => e.into(),
        })
    }
}

/// Locks for commits, so that two commits of one key do not overwrite each other's sidecar. Their number is fixed,
/// because clients choose the keys, and those must not take memory. Two keys may share a lock and then wait for each
/// other.
#[derive(Default)]
pub(super) struct CommitLocks([Mutex<()>; 32]);

impl CommitLocks {
    fn lock(&self, key: &Key) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % self.0.len() as u64).unwrap_or(0);
        self.0[index].lock()
    }
}

/// Checks a commit, and returns the active snapshot `key` and the parent that the committed one has.
fn validate_commit(tx: &ReadTxn, name: &Key, key: &Key, parent: Option<&Key>) -> Result<(Snapshot, Option<Key>)> {
    let active = tx.get(key.as_str())?.ok_or_else(|| Error::NotFound(key.clone()))?;
    if tx.get(name.as_str())?.is_some() {
        return Err(Error::AlreadyExists(name.clone()));
    }
    if active.kind != Kind::Active {
        return Err(Error::WrongKind {
            key: key.clone(),
            kind: active.kind,
            needs: "only active snapshots can be committed",
        });
    }
    let parent = match (&active.parent, parent) {
        (Some(own), Some(named)) if own != named => {
            return Err(Error::OtherParent { key: key.clone(), parent: own.clone(), named: named.clone() });
        }
        (Some(own), _) => Some(own.clone()),
        (None, Some(named)) => {
            let new_parent = tx.get(named.as_str())?.ok_or_else(|| Error::ParentNotFound(named.clone()))?;
            if new_parent.kind != Kind::Committed {
                return Err(Error::NewParentNotCommitted { parent: named.clone(), kind: new_parent.kind });
            }
            check_depth(tx, Some(&new_parent))?;
            Some(named.clone())
        }
        (None, None) => None,
    };
    Ok((active, parent))
}

/// Checks a commit once more. It fails as well if the key belongs to a later snapshot than `active` by now.
fn validate_commit_again(tx: &ReadTxn, name: &Key, active: &Snapshot, parent: Option<&Key>) -> Result<()> {
    let (current, _) = validate_commit(tx, name, &active.key, parent)?;
    if current.id == active.id { Ok(()) } else { Err(Error::NotFound(active.key.clone())) }
}
