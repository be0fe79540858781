//! The calls that mostly read or change records: Stat, Update, Usage and Remove.
#![forbid(unsafe_code)]

use nix::errno::Errno;

use super::{Error, Result, Snapshotter, check_labels};
use crate::model::{Key, Kind, Labels, Snapshot, Timestamp, Usage};
use crate::system::DiskUsage;

/// What an Update does to the labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelChange {
    Replace(Labels),
    /// Sets the labels that have a value, and deletes those that have none.
    Each(Vec<(String, Option<String>)>),
}

impl Snapshotter {
    pub fn stat(&self, key: &Key) -> Result<Snapshot> {
        self.store.read(|tx| tx.get(key.as_str())?.ok_or_else(|| Error::NotFound(key.clone())))
    }

    pub fn update(&self, key: &Key, change: &LabelChange) -> Result<Snapshot> {
        let now = Timestamp::now();
        self.store.write(|tx| {
            let mut snapshot = tx.get(key.as_str())?.ok_or_else(|| Error::NotFound(key.clone()))?;
            snapshot.updated = now;
            match change {
                LabelChange::Replace(labels) => snapshot.labels.clone_from(labels),
                LabelChange::Each(changes) => {
                    for (label, value) in changes {
                        match value {
                            Some(value) => snapshot.labels.insert(label.clone(), value.clone()),
                            None => snapshot.labels.remove(label),
                        };
                    }
                }
            }
            check_labels(&mut snapshot.labels)?;
            tx.update(&snapshot)?;
            Ok(snapshot)
        })
    }

    /// What the snapshot itself takes on disk, without its parents. The files of an active snapshot are measured each
    /// time, those of a committed one once, because nobody changes them. Layers in a repository take nothing on this
    /// disk, and are never read for it. Fails if `cancelled` becomes true.
    pub fn usage(&self, key: &Key, cancelled: &dyn Fn() -> bool) -> Result<Usage> {
        let snapshot = self.stat(key)?;
        if snapshot.layer.is_some() {
            return Ok(Usage::default());
        }
        match (snapshot.kind, snapshot.usage) {
            (Kind::View, _) => Ok(Usage::default()),
            (Kind::Committed, Some(usage)) => Ok(usage),
            (Kind::Active, _) => self.measure(&snapshot, cancelled).map(to_usage),
            (Kind::Committed, None) => {
                let measured = self.measure(&snapshot, cancelled)?;
                let usage = to_usage(measured);
                if measured.is_stable {
                    self.store_usage(&snapshot, usage);
                }
                Ok(usage)
            }
        }
    }

    fn measure(&self, snapshot: &Snapshot, cancelled: &dyn Fn() -> bool) -> Result<DiskUsage> {
        self.ensure_files_exist(snapshot)?;
        self.sys.disk_usage(&self.paths.fs(snapshot.id), cancelled).map_err(|e| match e.errno {
            Errno::ECANCELED => Error::DeadlineExceeded,
            _ => e.into(),
        })
    }

    fn store_usage(&self, snapshot: &Snapshot, usage: Usage) {
        let result = self.store.write(|tx| {
            if let Some(current) = tx.get(snapshot.key.as_str())?.filter(|current| current.id == snapshot.id) {
                tx.update(&Snapshot { usage: Some(usage), ..current })?;
            }
            Ok::<_, Error>(())
        });
        if let Err(e) = result {
            log::debug!("cannot store the usage of {}, it will be measured again: {e}", snapshot.key);
        }
    }

    /// Removes the row of a snapshot, and leaves its directory to the next cleanup: containerd holds a lock of its own
    /// while it waits, so this is one short transaction.
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

fn to_usage(DiskUsage { bytes, inodes, .. }: DiskUsage) -> Usage {
    let saturate = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    Usage { size: saturate(bytes), inodes: saturate(inodes) }
}
