//! The calls that only read or change records: stat, update, usage, commit, remove.
#![forbid(unsafe_code)]

use nix::errno::Errno;

use super::{Error, Result, Snapshotter, check_labels};
use crate::store::Lookup;
use crate::store::sidecar::Sidecar;
use crate::types::{Key, Kind, Labels, Snapshot, Timestamp, Usage};

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
            tx.update(&old, &new)?;
            Ok(new)
        })
    }

    /// What the snapshot itself takes on disk, without its parents. Walks the files of a
    /// local snapshot: each time while it is active, once when it is committed. Never walks
    /// a repository. `cancelled` is asked now and then.
    pub fn usage(&self, key: &Key, cancelled: &dyn Fn() -> bool) -> Result<Usage> {
        let snapshot = self.stat(key)?;
        match (snapshot.kind, &snapshot.layer, snapshot.usage) {
            (_, Some(_), _) | (Kind::View, _, _) => Ok(Usage::default()),
            (Kind::Committed, None, Some(usage)) => Ok(usage),
            (Kind::Active, None, _) => self.measure(&snapshot, cancelled),
            (Kind::Committed, None, None) => {
                let usage = self.measure(&snapshot, cancelled)?;
                self.store.write(|tx| {
                    if let Some(now) = tx.get(key.as_str())?.filter(|now| now.id == snapshot.id) {
                        tx.update(&now, &Snapshot { usage: Some(usage), ..now.clone() })?;
                    }
                    Ok::<_, Error>(())
                })?;
                Ok(usage)
            }
        }
    }

    fn measure(&self, snapshot: &Snapshot, cancelled: &dyn Fn() -> bool) -> Result<Usage> {
        self.require_files(snapshot)?;
        match self.sys.disk_usage(&self.places.fs(snapshot.id), cancelled) {
            Ok((bytes, inodes)) => {
                let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
                Ok(Usage { size: number(bytes), inodes: number(inodes) })
            }
            Err(e) if e.errno == Errno::ECANCELED => Err(Error::Cancelled),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes the active snapshot `key` the committed snapshot `name`, with exactly `labels`.
    /// `parent` may give one to a snapshot that was prepared without.
    pub fn commit(&self, name: &Key, key: &Key, mut labels: Labels, parent: Option<&Key>) -> Result<()> {
        check_labels(&mut labels)?;
        let now = Timestamp::now();
        let committed = |active: &Snapshot, parent| Snapshot {
            id: active.id,
            key: name.clone(),
            parent,
            kind: Kind::Committed,
            created: now,
            updated: now,
            labels: labels.clone(),
            layer: None,
            usage: None,
        };
        let (active, on) = self.store.read(|tx| check_commit(tx, name, key, parent))?;
        let committed_as = committed(&active, on);
        self.note(&Sidecar { made: active, committed: Some(committed_as) })?;
        self.store.write(|tx| {
            let (active, parent) = check_commit(tx, name, key, parent)?;
            tx.remove(&active)?;
            tx.insert(&committed(&active, parent))?;
            Ok(())
        })
    }

    /// Replaces what lies beside the files of a local snapshot.
    fn note(&self, sidecar: &Sidecar) -> Result<()> {
        let place = self.places.record(sidecar.made.id);
        let new = place.with_extension("new");
        match self.sys.write_file(&new, &sidecar.encode()) {
            Err(e) if e.errno == Errno::ENOENT => {
                return Err(Error::Broken { key: sidecar.made.key.clone(), id: sidecar.made.id });
            }
            result => result?,
        }
        Ok(self.sys.rename(&new, &place)?)
    }

    /// One short transaction, because containerd holds its lock meanwhile; what the
    /// snapshot left on disk is the business of `cleanup`.
    pub fn remove(&self, key: &Key) -> Result<()> {
        self.store.write_to_free(|tx| {
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

/// The active snapshot `key`, and the parent on which it can be committed as `name`.
fn check_commit(tx: &impl Lookup, name: &Key, key: &Key, parent: Option<&Key>) -> Result<(Snapshot, Option<Key>)> {
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
            Some(named.clone())
        }
        (None, None) => None,
    };
    Ok((active, parent))
}
