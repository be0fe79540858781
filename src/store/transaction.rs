//! What can be asked and changed inside a transaction, and the tables it works on.
//!
//! The invariants of the module above are kept here, by each operation for itself.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::path::Path;

use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata, TableDefinition, Value, WriteTransaction};

use super::record::{ShortScan, StoredScan};
use super::{Error, Result, record};
use crate::repository::scan::{Limit, Scan, ScanKey};
use crate::types::{Key, Kind, LABEL_SNAPSHOT_REF, Labels, Snapshot, SnapshotId};

/// Counters and the schema version, by name.
pub(super) const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Snapshot key to `SnapshotRecord`.
pub(super) const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
/// Snapshot id to its key, the number of its children, and of those children that are live:
/// active, a view, or committed with a live child. One table, because each one that a
/// transaction changes costs.
pub(super) const IDS: TableDefinition<u64, (&str, u64, u64)> = TableDefinition::new("ids");
/// `(snapshot.ref, parent key or "", key)`: what containerd asks after every remote layer.
pub(super) const BY_REF: TableDefinition<(&str, &str, &str), ()> = TableDefinition::new("by_ref");
/// Ids that may have something on disk that nothing needs any more, and whether a cleanup
/// has begun with them.
pub(super) const CLEANUP: TableDefinition<u64, bool> = TableDefinition::new("cleanup");
/// `<digest> <repository>` to `LayerScan`.
pub(super) const SCANS: TableDefinition<&str, &[u8]> = TableDefinition::new("scans");

/// A read transaction.
pub struct Read<'s> {
    pub(super) transaction: ReadTransaction,
    pub(super) path: &'s Path,
}

/// A write transaction; what it wrote, it reads.
pub struct Write<'s> {
    pub(super) transaction: WriteTransaction,
    path: &'s Path,
    changed: Cell<bool>,
}

/// What can be asked inside either kind of transaction.
pub trait Lookup {
    #[doc(hidden)]
    fn table<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<impl ReadableTable<K, V> + '_>;

    #[doc(hidden)]
    fn error(&self, cause: impl Into<redb::Error>) -> Error;

    fn get(&self, key: &str) -> Result<Option<Snapshot>> {
        let snapshots = self.table(SNAPSHOTS)?;
        let row = snapshots.get(key).map_err(|e| self.error(e))?;
        row.map(|row| record::decode_snapshot(key, row.value())).transpose()
    }

    /// The snapshot `key` and all its ancestors, nearest first, without their labels, of which each may have 1 MiB.
    /// Empty when there is none.
    fn chain(&self, key: &Key) -> Result<Vec<Snapshot>> {
        self.chain_until(key, |_| false)
    }

    /// As `chain`, and no further than the first that is `last`.
    fn chain_until(&self, key: &Key, mut last: impl FnMut(&Snapshot) -> bool) -> Result<Vec<Snapshot>> {
        let snapshots = self.table(SNAPSHOTS)?;
        let mut chain: Vec<Snapshot> = Vec::new();
        let mut next = Some(key.clone());
        while let Some(key) = next.take() {
            let Some(row) = snapshots.get(key.as_str()).map_err(|e| self.error(e))? else { break };
            let mut snapshot = record::decode_snapshot(key.as_str(), row.value())?;
            snapshot.labels = Labels::new();
            if !last(&snapshot) {
                next.clone_from(&snapshot.parent);
            }
            chain.push(snapshot);
        }
        Ok(chain)
    }

    fn has_children(&self, id: SnapshotId) -> Result<bool> {
        Ok(self.children(id)?.0 > 0)
    }

    /// Whether an active snapshot or a view stands on this one, however far above.
    fn is_live(&self, id: SnapshotId) -> Result<bool> {
        Ok(self.children(id)?.1 > 0)
    }

    #[doc(hidden)]
    fn children(&self, id: SnapshotId) -> Result<(u64, u64)> {
        let ids = self.table(IDS)?;
        let row = ids.get(id.0).map_err(|e| self.error(e))?;
        Ok(row.map_or((0, 0), |row| (row.value().1, row.value().2)))
    }

    fn exists(&self, id: SnapshotId) -> Result<bool> {
        let ids = self.table(IDS)?;
        let row = ids.get(id.0).map_err(|e| self.error(e))?;
        Ok(row.is_some())
    }

    fn by_id(&self, id: SnapshotId) -> Result<Option<Snapshot>> {
        let key = {
            let ids = self.table(IDS)?;
            let row = ids.get(id.0).map_err(|e| self.error(e))?;
            row.map(|row| row.value().0.to_owned())
        };
        key.map_or(Ok(None), |key| self.get(&key))
    }

    /// The snapshots with this `snapshot.ref` label and this parent ("" for none), one after the other, as long as
    /// `take` takes them. The result says whether it took all.
    fn take_by_ref(&self, reference: &str, parent: &str, mut take: impl FnMut(Snapshot) -> bool) -> Result<bool> {
        let index = self.table(BY_REF)?;
        let snapshots = self.table(SNAPSHOTS)?;
        for row in index.range((reference, parent, "")..).map_err(|e| self.error(e))? {
            let (row, _) = row.map_err(|e| self.error(e))?;
            let (row_reference, row_parent, key) = row.value();
            if (row_reference, row_parent) != (reference, parent) {
                break;
            }
            if let Some(row) = snapshots.get(key).map_err(|e| self.error(e))?
                && !take(record::decode_snapshot(key, row.value())?)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The highest id that a snapshot has.
    fn last_id(&self) -> Result<Option<SnapshotId>> {
        let ids = self.table(IDS)?;
        let row = ids.last().map_err(|e| self.error(e))?;
        Ok(row.map(|(id, _)| SnapshotId(id.value())))
    }

    /// The snapshots with these ids, in their order, as long as `take` takes them, and no more
    /// than `most`. The result is the first id that is left; None: there is none.
    fn take_by_id(
        &self,
        ids: RangeInclusive<SnapshotId>,
        most: usize,
        mut take: impl FnMut(Snapshot) -> bool,
    ) -> Result<Option<SnapshotId>> {
        let rows = self.table(IDS)?;
        let snapshots = self.table(SNAPSHOTS)?;
        for (n, row) in rows.range(ids.start().0..=ids.end().0).map_err(|e| self.error(e))?.enumerate() {
            let (id, row) = row.map_err(|e| self.error(e))?;
            let id = SnapshotId(id.value());
            if n == most {
                return Ok(Some(id));
            }
            let (key, ..) = row.value();
            if let Some(row) = snapshots.get(key).map_err(|e| self.error(e))?
                && !take(record::decode_snapshot(key, row.value())?)
            {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Calls `each` for every snapshot.
    fn for_each(&self, mut each: impl FnMut(Snapshot)) -> Result<()> {
        for row in self.table(SNAPSHOTS)?.iter().map_err(|e| self.error(e))? {
            let (key, value) = row.map_err(|e| self.error(e))?;
            each(record::decode_snapshot(key.value(), value.value())?);
        }
        Ok(())
    }

    /// The highest id on the list for cleanup.
    fn last_scheduled(&self) -> Result<Option<SnapshotId>> {
        let table = self.table(CLEANUP)?;
        let row = table.last().map_err(|e| self.error(e))?;
        Ok(row.map(|(id, _)| SnapshotId(id.value())))
    }

    /// Ids on the list for cleanup from `next` on, so many at most, and the first that is left.
    fn scheduled(&self, next: SnapshotId, most: usize) -> Result<(Vec<SnapshotId>, Option<SnapshotId>)> {
        let mut ids = Vec::new();
        for row in self.table(CLEANUP)?.range(next.0..).map_err(|e| self.error(e))? {
            let (id, _) = row.map_err(|e| self.error(e))?;
            if ids.len() == most {
                return Ok((ids, Some(SnapshotId(id.value()))));
            }
            ids.push(SnapshotId(id.value()));
        }
        Ok((ids, None))
    }

    /// How many snapshots there are, and ids on the list for cleanup.
    fn counts(&self) -> Result<(u64, u64)> {
        let snapshots = self.table(IDS)?.len().map_err(|e| self.error(e))?;
        let scheduled = self.table(CLEANUP)?.len().map_err(|e| self.error(e))?;
        Ok((snapshots, scheduled))
    }

    /// Whether `id` is on the list for cleanup.
    fn is_scheduled(&self, id: SnapshotId) -> Result<bool> {
        let table = self.table(CLEANUP)?;
        let row = table.get(id.0).map_err(|e| self.error(e))?;
        Ok(row.is_some())
    }

    fn scan(&self, key: &ScanKey) -> Result<Option<StoredScan>> {
        Ok(match self.scan_shorter_than(usize::MAX, key)? {
            ShortScan::Short(scan) => Some(scan),
            ShortScan::Absent | ShortScan::Long => None,
        })
    }

    /// The scan, if its record has fewer than `bytes`.
    fn scan_shorter_than(&self, bytes: usize, key: &ScanKey) -> Result<ShortScan> {
        let scans = self.table(SCANS)?;
        let key = scan_row(key);
        let Some(row) = scans.get(key.as_str()).map_err(|e| self.error(e))? else { return Ok(ShortScan::Absent) };
        if row.value().len() >= bytes {
            return Ok(ShortScan::Long);
        }
        Ok(record::decode_scan(&key, row.value())?.map_or(ShortScan::Absent, ShortScan::Short))
    }

    /// The keys of scans whose digests `is_needed` does not know.
    fn scans_of_nobody(&self, is_needed: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let mut keys = Vec::new();
        for row in self.table(SCANS)?.iter().map_err(|e| self.error(e))? {
            let (key, _) = row.map_err(|e| self.error(e))?;
            if !key.value().split(' ').next().is_some_and(&is_needed) {
                keys.push(key.value().to_owned());
            }
        }
        Ok(keys)
    }
}

impl Lookup for Read<'_> {
    fn table<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<impl ReadableTable<K, V> + '_> {
        self.transaction.open_table(definition).map_err(|e| self.error(e))
    }

    fn error(&self, cause: impl Into<redb::Error>) -> Error {
        Error::Engine { path: self.path.to_owned(), cause: cause.into() }
    }
}

impl Lookup for Write<'_> {
    fn table<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<impl ReadableTable<K, V> + '_> {
        self.transaction.open_table(definition).map_err(|e| self.error(e))
    }

    fn error(&self, cause: impl Into<redb::Error>) -> Error {
        Error::Engine { path: self.path.to_owned(), cause: cause.into() }
    }
}

impl<'s> Write<'s> {
    pub(super) fn new(transaction: WriteTransaction, path: &'s Path) -> Self {
        Self { transaction, path, changed: Cell::new(false) }
    }

    /// Whether more than questions were asked.
    pub(super) fn has_changed(&self) -> bool {
        self.changed.get()
    }

    /// A table that is about to be changed.
    pub(super) fn open<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<redb::Table<'_, K, V>> {
        self.changed.set(true);
        self.transaction.open_table(definition).map_err(|e| self.error(e))
    }

    /// Adds a snapshot that has no children. Its key and its id must be free.
    pub fn insert(&self, snapshot: &Snapshot) -> Result<()> {
        self.put(snapshot)?;
        self.open(IDS)?.insert(snapshot.id.0, (snapshot.key.as_str(), 0, 0)).map_err(|e| self.error(e))?;
        self.count_child(snapshot, 1)
    }

    /// Takes away a snapshot that has no children.
    pub fn remove(&self, snapshot: &Snapshot) -> Result<()> {
        self.open(SNAPSHOTS)?.remove(snapshot.key.as_str()).map_err(|e| self.error(e))?;
        self.unindex(snapshot)?;
        self.open(IDS)?.remove(snapshot.id.0).map_err(|e| self.error(e))?;
        self.count_child(snapshot, -1)
    }

    /// Stores `new`, which differs from `old` in labels, times or usage only.
    pub fn update(&self, old: &Snapshot, new: &Snapshot) -> Result<()> {
        debug_assert!(old.id == new.id && old.key == new.key && old.parent == new.parent && old.kind == new.kind);
        self.unindex(old)?;
        self.put(new)
    }

    fn put(&self, snapshot: &Snapshot) -> Result<()> {
        let record = record::encode_snapshot(snapshot);
        self.open(SNAPSHOTS)?.insert(snapshot.key.as_str(), record.as_slice()).map_err(|e| self.error(e))?;
        if let Some(row) = index_row(snapshot) {
            self.open(BY_REF)?.insert(row, ()).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    fn unindex(&self, snapshot: &Snapshot) -> Result<()> {
        if let Some(row) = index_row(snapshot) {
            self.open(BY_REF)?.remove(row).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    /// Counts `child` up or down at its parent. Where that makes an ancestor live, or ends
    /// it, the next ancestor counts on; a remote layer that nothing stands on any more is
    /// put on the list for cleanup. So the cost is one row, mostly, however long the chain.
    fn count_child(&self, child: &Snapshot, step: i64) -> Result<()> {
        let mut children_step = step;
        let live_step = match child.kind {
            Kind::Committed => 0,
            Kind::Active | Kind::View => step,
        };
        let mut next = child.parent.clone();
        while let Some(key) = next {
            // Callers have looked; and if it were missing, the child could be removed all the same.
            let Some(parent) = self.get(key.as_str())? else { break };
            let (children, live) = self.children(parent.id)?;
            let counted = (children.saturating_add_signed(children_step), live.saturating_add_signed(live_step));
            let row = (parent.key.as_str(), counted.0, counted.1);
            self.open(IDS)?.insert(parent.id.0, row).map_err(|e| self.error(e))?;
            if (live > 0) == (counted.1 > 0) {
                break;
            }
            if counted.1 == 0 && parent.layer.is_some() {
                self.schedule_cleanup(&[parent.id])?;
            }
            children_step = 0;
            next = parent.parent;
        }
        Ok(())
    }

    pub fn schedule_cleanup(&self, ids: &[SnapshotId]) -> Result<()> {
        let mut table = self.open(CLEANUP)?;
        for id in ids {
            table.insert(id.0, false).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    /// Up to `limit` of these ids that are on the list, in their order. They stay on it, so that a
    /// crash does not lose them, and are marked, so that it shows if they are put on it again.
    pub fn begin_cleanup(&self, ids: RangeInclusive<SnapshotId>, limit: usize) -> Result<Vec<SnapshotId>> {
        let ids = {
            let table = self.table(CLEANUP)?;
            let rows = table.range(ids.start().0..=ids.end().0).map_err(|e| self.error(e))?.take(limit);
            rows.map(|row| Ok(SnapshotId(row.map_err(|e| self.error(e))?.0.value()))).collect::<Result<Vec<_>>>()?
        };
        // A list with nothing on it costs no write.
        for id in &ids {
            self.open(CLEANUP)?.insert(id.0, true).map_err(|e| self.error(e))?;
        }
        Ok(ids)
    }

    /// Takes ids off the list with which a cleanup is through, unless they were put on it
    /// again meanwhile.
    pub fn finish_cleanup(&self, ids: impl IntoIterator<Item = SnapshotId>) -> Result<()> {
        let mut begun = Vec::new();
        {
            let table = self.table(CLEANUP)?;
            for id in ids {
                if table.get(id.0).map_err(|e| self.error(e))?.is_some_and(|is_begun| is_begun.value()) {
                    begun.push(id);
                }
            }
        }
        // Nothing to take off costs no write either.
        if begun.is_empty() {
            return Ok(());
        }
        let mut table = self.open(CLEANUP)?;
        for id in begun {
            table.remove(id.0).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    /// Stores what a scan found, or the bound that the layer exceeds.
    pub fn put_scan(&self, key: &ScanKey, scan: std::result::Result<&Scan, Limit>) -> Result<()> {
        let record = record::encode_scan(scan);
        self.open(SCANS)?.insert(scan_row(key).as_str(), record.as_slice()).map_err(|e| self.error(e))?;
        Ok(())
    }

    pub fn forget_scans(&self, keys: &[String]) -> Result<()> {
        let mut table = self.open(SCANS)?;
        for key in keys {
            table.remove(key.as_str()).map_err(|e| self.error(e))?;
        }
        Ok(())
    }
}

fn scan_row(key: &ScanKey) -> String {
    format!("{} {}", key.digest, key.repository)
}

fn index_row(snapshot: &Snapshot) -> Option<(&str, &str, &str)> {
    let reference = snapshot.labels.get(LABEL_SNAPSHOT_REF)?;
    Some((reference, snapshot.parent.as_ref().map_or("", Key::as_str), snapshot.key.as_str()))
}
