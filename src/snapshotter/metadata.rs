//! The calls that only read or change records: stat, update, usage, commit, remove.
#![forbid(unsafe_code)]

use std::hash::{DefaultHasher, Hash, Hasher};

use nix::errno::Errno;
use parking_lot::{Mutex, MutexGuard};

use super::{Error, Result, Snapshotter, check_depth, check_labels};
use crate::model::{Key, Kind, Labels, Snapshot, Timestamp, Usage};
use crate::sidecar::Sidecar;
use crate::store::ReadTxn;
use crate::system::DiskUsage;

/// What an Update does to the labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelChange {
    Replace(Labels),
    /// Sets the labels that have a value and deletes those that have none.
    Each(Vec<(String, Option<String>)>),
}

impl Snapshotter {
    pub fn stat(&self, key: &Key) -> Result<Snapshot> {
        self.store.read(|tx| tx.get(key.as_str())?.ok_or_else(|| Error::NotFound(key.clone())))
    }

    pub fn update(&self, key: &Key, change: &LabelChange) -> Result<Snapshot> {
        let now = Timestamp::now();
        self.store.write(|tx| {
            let old = tx.get(key.as_str())?.ok_or_else(|| Error::NotFound(key.clone()))?;
            let mut new = old.clone();
            new.updated = now;
            match change {
                LabelChange::Replace(labels) => new.labels.clone_from(labels),
                LabelChange::Each(changes) => {
                    for (label, value) in changes {
                        match value {
                            Some(value) => new.labels.insert(label.clone(), value.clone()),
                            None => new.labels.remove(label),
                        };
                    }
                }
            }
            check_labels(&mut new.labels)?;
            tx.update(&new)?;
            Ok(new)
        })
    }

    /// What the snapshot itself takes on disk, without its parents. Walks the files of a
    /// local snapshot: each time while it is active, once when it is committed and nobody changes
    /// them. Never walks a repository. `cancelled` is asked now and then.
    pub fn usage(&self, key: &Key, cancelled: &dyn Fn() -> bool) -> Result<Usage> {
        let snapshot = self.stat(key)?;
        match (snapshot.kind, &snapshot.layer, snapshot.usage) {
            (_, Some(_), _) | (Kind::View, _, _) => Ok(Usage::default()),
            (Kind::Committed, None, Some(usage)) => Ok(usage),
            (Kind::Active, None, _) => self.measure(&snapshot, cancelled).map(usage_of),
            (Kind::Committed, None, None) => {
                let measured = self.measure(&snapshot, cancelled)?;
                let usage = usage_of(measured);
                if !measured.is_stable {
                    return Ok(usage);
                }
                let kept = self.store.write(|tx| {
                    if let Some(now) = tx.get(key.as_str())?.filter(|now| now.id == snapshot.id) {
                        tx.update(&Snapshot { usage: Some(usage), ..now.clone() })?;
                    }
                    Ok::<_, Error>(())
                });
                if let Err(e) = kept {
                    log::debug!("the usage of {key} will be measured again: {e}");
                }
                Ok(usage)
            }
        }
    }

    fn measure(&self, snapshot: &Snapshot, cancelled: &dyn Fn() -> bool) -> Result<DiskUsage> {
        self.ensure_files_exist(snapshot)?;
        self.sys.disk_usage(&self.paths.fs(snapshot.id), cancelled).map_err(|e| match e.errno {
            Errno::ECANCELED => Error::Cancelled,
            _ => e.into(),
        })
    }

    /// Makes the active snapshot `key` the committed snapshot `name`, with exactly `labels`.
    /// `parent` may give one to a snapshot that was prepared without.
    pub fn commit(&self, name: &Key, key: &Key, mut labels: Labels, parent: Option<&Key>) -> Result<()> {
        check_labels(&mut labels)?;
        let _lock = self.commits.lock(key);
        let (active, on) = self.store.read(|tx| check_commit(tx, name, key, parent))?;
        let now = Timestamp::now();
        let committed = Snapshot {
            id: active.id,
            key: name.clone(),
            parent: on,
            kind: Kind::Committed,
            created: now,
            updated: now,
            labels,
            layer: None,
            usage: None,
        };
        self.write_sidecar(&Sidecar { prepared: active.clone(), committed: Some(committed.clone()) }).map_err(|e| {
            // Somebody removed it meanwhile, and its files are gone for that reason.
            let now = self.store.read(|tx| check_commit(tx, name, key, parent));
            now.and_then(|(now, _)| is_same(&active, &now)).err().unwrap_or(e)
        })?;
        let result = self.store.write(|tx| {
            let (now, _) = check_commit(tx, name, key, parent)?;
            is_same(&active, &now)?;
            tx.remove(&active)?;
            tx.insert(&committed)?;
            Ok(())
        });
        // Of a write that failed nobody knows whether it reached the disk. Any other refusal is certain, and then
        // the record must not give the snapshot a name that another one may have by now.
        if result.as_ref().is_err_and(|e| !matches!(e, Error::Store(_))) {
            let _ = self.write_sidecar(&Sidecar { prepared: active, committed: None });
        }
        result
    }

    /// Replaces what lies beside the files of a local snapshot.
    fn write_sidecar(&self, sidecar: &Sidecar) -> Result<()> {
        let path = self.paths.record(sidecar.prepared.id);
        let new = path.with_extension("new");
        let written = self.sys.write_file(&new, &sidecar.encode()).and_then(|()| self.sys.rename(&new, &path));
        written.map_err(|e| match e.errno {
            Errno::ENOENT => Error::Broken { key: sidecar.prepared.key.clone(), id: sidecar.prepared.id },
            _ => e.into(),
        })
    }

    /// One short transaction, because containerd holds its lock meanwhile; what the
    /// snapshot left on disk is the business of `cleanup`.
    pub fn remove(&self, key: &Key) -> Result<()> {
        self.store.write_using_reserve(|tx| {
            let snapshot = tx.get(key.as_str())?.ok_or_else(|| Error::NotFound(key.clone()))?;
            if tx.has_children(snapshot.id)? {
                return Err(Error::HasChildren(key.clone()));
            }
            tx.remove(&snapshot)?;
            tx.schedule_cleanup(&[snapshot.id])?;
            Ok(())
        })
    }
}

/// Locks for commits: of those of one key only one may write its record and commit. A fixed number of them, so
/// that keys of clients take no memory; two keys that share one wait for each other.
#[derive(Default)]
pub(super) struct CommitLocks([Mutex<()>; 32]);

impl CommitLocks {
    fn lock(&self, key: &Key) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let n = usize::try_from(hasher.finish() % self.0.len() as u64).unwrap_or(0);
        self.0[n].lock()
    }
}

/// Whether `now` is the snapshot that was looked at before, and not a later one with its key.
fn is_same(before: &Snapshot, now: &Snapshot) -> Result<()> {
    if before.id == now.id { Ok(()) } else { Err(Error::NotFound(before.key.clone())) }
}

fn usage_of(DiskUsage { bytes, inodes, .. }: DiskUsage) -> Usage {
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    Usage { size: number(bytes), inodes: number(inodes) }
}

/// The active snapshot `key`, and the parent on which it can be committed as `name`.
fn check_commit(tx: &ReadTxn, name: &Key, key: &Key, parent: Option<&Key>) -> Result<(Snapshot, Option<Key>)> {
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
            let found = tx.get(named.as_str())?.ok_or_else(|| Error::ParentNotFound(named.clone()))?;
            if found.kind != Kind::Committed {
                return Err(Error::NewParentNotCommitted { parent: named.clone(), kind: found.kind });
            }
            check_depth(tx, &found)?;
            Some(named.clone())
        }
        (None, None) => None,
    };
    Ok((active, parent))
}
