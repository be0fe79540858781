//! What can be asked and changed inside a transaction.
//!
//! The invariants of the module above are kept here, by each operation for itself.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::ops::{Deref, RangeInclusive};
use std::path::Path;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Params, Row, params};

use super::{Error, Result};
use crate::model::{Digest, Key, Kind, LABEL_SNAPSHOT_REF, Layer, Quoted, Snapshot, SnapshotId, Timestamp, Usage};
use crate::repository::scan::record::{self, StoredScan};
use crate::repository::scan::{Limit, Scan, ScanKey};

/// A consistent view of the metadata.
pub struct ReadTxn<'s> {
    connection: &'s Connection,
    path: &'s Path,
    /// The last error of SQLite, even if `body` passed over it: some end the whole transaction.
    failure: RefCell<Option<Error>>,
}

/// The stored scan of a layer, as it was found. A record that is too long is not read.
pub enum ScanLookup {
    Absent,
    Read(StoredScan),
    TooLong,
}

/// Changes that happen together; what it wrote, it reads.
pub struct WriteTxn<'s>(ReadTxn<'s>);

impl<'s> Deref for WriteTxn<'s> {
    type Target = ReadTxn<'s>;

    fn deref(&self) -> &ReadTxn<'s> {
        &self.0
    }
}

/// Snapshots as rows for `decode`, those that `$which` names. The second form is for `CHAIN`, which leaves the labels
/// out.
macro_rules! select {
    ($which:literal) => {
        select!("s.labels", "FROM snapshots s", $which)
    };
    ($labels:literal, $from:literal, $which:literal) => {
        concat!(
            "SELECT s.id, s.key, p.key, s.kind, s.created, s.updated, ",
            $labels,
            ", s.digest, s.repository, s.size, s.inodes ",
            $from,
            " LEFT JOIN snapshots p ON p.id = s.parent ",
            $which
        )
    };
}

const BY_KEY: &str = select!("WHERE s.key = ?1");
const BY_ID: &str = select!("WHERE s.id = ?1");
const BY_IDS: &str = select!("WHERE s.id BETWEEN ?1 AND ?2 ORDER BY s.id");
// The order is that of an index, so SQLite reads only the rows that are taken.
const BY_REF_ON_PARENT: &str =
    select!("WHERE s.ref = ?1 AND s.parent = (SELECT id FROM snapshots WHERE key = ?2) ORDER BY s.key");
const BY_REF_ALONE: &str = select!("WHERE s.ref = ?1 AND s.parent IS NULL ORDER BY s.key");
// The nearest comes first, because a recursion is in this order. Sorting would read all of the chain at once.
const CHAIN: &str = concat!(
    "WITH RECURSIVE chain (id) AS (SELECT id FROM snapshots WHERE key = ?1 UNION ",
    "SELECT parent FROM chain CROSS JOIN snapshots USING (id) WHERE parent IS NOT NULL) ",
    select!("'{}'", "FROM chain CROSS JOIN snapshots s USING (id)", "")
);

impl<'s> ReadTxn<'s> {
    pub(super) fn new(connection: &'s Connection, path: &'s Path) -> Self {
        Self { connection, path, failure: RefCell::default() }
    }

    fn failed(&self, cause: &rusqlite::Error) -> Error {
        let failure = Error::from_sqlite(self.path, self.connection, cause);
        self.failure.replace(Some(failure.clone()));
        failure
    }

    /// Gives `take` the rows, until it breaks off with a result.
    fn rows<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        mut take: impl FnMut(&Row<'_>) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let mut statement = self.connection.prepare_cached(sql).map_err(|e| self.failed(&e))?;
        let mut rows = statement.query(parameters).map_err(|e| self.failed(&e))?;
        while let Some(row) = rows.next().map_err(|e| self.failed(&e))? {
            if let Some(result) = take(row)? {
                return Ok(Some(result));
            }
        }
        Ok(None)
    }

    fn snapshots<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        mut take: impl FnMut(Snapshot) -> Option<T>,
    ) -> Result<Option<T>> {
        self.rows(sql, parameters, |row| {
            let id: i64 = self.column(row, 0)?;
            Ok(take(decode(row).ok_or_else(|| self.bad_row("snapshots", &id.to_string()))?))
        })
    }

    /// The first column of the one row. None: there is no row, or it is NULL.
    fn value<T: FromSql>(&self, sql: &str, parameters: impl Params) -> Result<Option<T>> {
        let mut statement = self.connection.prepare_cached(sql).map_err(|e| self.failed(&e))?;
        let value = statement.query_row(parameters, |row| row.get(0)).optional();
        Ok(value.map_err(|e| self.failed(&e))?.flatten())
    }

    fn column<T: FromSql>(&self, row: &Row<'_>, column: usize) -> Result<T> {
        row.get(column).map_err(|e| self.failed(&e))
    }

    fn is(&self, sql: &str, parameters: impl Params) -> Result<bool> {
        Ok(self.value(sql, parameters)?.unwrap_or(false))
    }

    /// The first id that this store handed out, and the first that is not reserved.
    pub(super) fn numbers(&self) -> Result<(SnapshotId, SnapshotId)> {
        let both = |row: &Row<'_>| Ok(Some((self.column(row, 0)?, self.column(row, 1)?)));
        self.rows("SELECT first_id, next_id FROM numbers", [], both)?.ok_or_else(|| self.bad_row("numbers", ""))
    }

    fn bad_row(&self, table: &str, key: &str) -> Error {
        Error::damaged(
            self.path,
            &format!("a row of table {table} was not written by this program, key {}", Quoted(key)),
        )
    }

    pub fn get(&self, key: &str) -> Result<Option<Snapshot>> {
        self.snapshots(BY_KEY, [key], Some)
    }

    /// The snapshot `key` and its ancestors, nearest first and no further than the first that is `last`, without their
    /// labels, of which each may have 1 MiB. Empty when there is no such snapshot.
    pub fn chain(&self, key: &Key, mut last: impl FnMut(&Snapshot) -> bool) -> Result<Vec<Snapshot>> {
        let mut chain: Vec<Snapshot> = Vec::new();
        self.snapshots(CHAIN, [key.as_str()], |snapshot| {
            let is_last = last(&snapshot);
            chain.push(snapshot);
            is_last.then_some(())
        })?;
        Ok(chain)
    }

    /// How many snapshots the chain of this one has, with itself. None: there is no such snapshot.
    pub fn depth(&self, id: SnapshotId) -> Result<Option<usize>> {
        let depth: Option<u32> = self.value("SELECT depth FROM snapshots WHERE id = ?1", [id])?;
        Ok(depth.map(|depth| depth as usize))
    }

    /// The snapshot `key` and its parent, without their labels.
    pub fn with_parent(&self, key: &Key) -> Result<Option<(Snapshot, Option<Snapshot>)>> {
        let mut is_second = false;
        let mut both = self.chain(key, |_| std::mem::replace(&mut is_second, true))?.into_iter();
        Ok(both.next().map(|snapshot| (snapshot, both.next())))
    }

    pub fn id_of(&self, key: &Key) -> Result<Option<SnapshotId>> {
        self.value("SELECT id FROM snapshots WHERE key = ?1", [key.as_str()])
    }

    pub fn has_children(&self, id: SnapshotId) -> Result<bool> {
        self.is("SELECT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?1)", [id])
    }

    /// Whether a descendant of this one is active or a view.
    pub fn is_in_use(&self, id: SnapshotId) -> Result<bool> {
        self.is("SELECT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?1 AND live = 1)", [id])
    }

    pub fn exists(&self, id: SnapshotId) -> Result<bool> {
        self.is("SELECT EXISTS (SELECT 1 FROM snapshots WHERE id = ?1)", [id])
    }

    pub fn by_id(&self, id: SnapshotId) -> Result<Option<Snapshot>> {
        self.snapshots(BY_ID, [id], Some)
    }

    /// The snapshots with this `snapshot.ref` label and this parent ("" for none), one after the other, as long as
    /// `take` takes them. The result says whether it took all.
    pub fn visit_by_ref(&self, reference: &str, parent: &str, mut take: impl FnMut(Snapshot) -> bool) -> Result<bool> {
        let take = |one| (!take(one)).then_some(());
        let refused = match parent {
            "" => self.snapshots(BY_REF_ALONE, [reference], take)?,
            parent => self.snapshots(BY_REF_ON_PARENT, [reference, parent], take)?,
        };
        Ok(refused.is_none())
    }

    /// The highest id that a snapshot has.
    pub fn last_id(&self) -> Result<Option<SnapshotId>> {
        self.value("SELECT max(id) FROM snapshots", [])
    }

    /// The snapshots with these ids, in their order, as long as `take` takes them, and no more
    /// than `most`. The result is the first id that is left; None: there is none.
    pub fn visit_range(
        &self,
        ids: RangeInclusive<SnapshotId>,
        most: usize,
        mut take: impl FnMut(Snapshot) -> bool,
    ) -> Result<Option<SnapshotId>> {
        let mut taken = 0;
        self.snapshots(BY_IDS, [ids.start(), ids.end()], |snapshot| {
            let id = snapshot.id;
            if taken == most || !take(snapshot) {
                return Some(id);
            }
            taken += 1;
            None
        })
    }

    /// Calls `each` for every snapshot.
    pub fn for_each(&self, mut each: impl FnMut(Snapshot)) -> Result<()> {
        self.snapshots(BY_IDS, (0, i64::MAX), |snapshot| {
            each(snapshot);
            None::<()>
        })?;
        Ok(())
    }

    /// The highest id on the list for cleanup.
    pub fn last_scheduled(&self) -> Result<Option<SnapshotId>> {
        self.value("SELECT max(id) FROM cleanup", [])
    }

    /// Ids on the list for cleanup from `next` on, so many at most, and the first that is left.
    pub fn scheduled(&self, next: SnapshotId, most: usize) -> Result<(Vec<SnapshotId>, Option<SnapshotId>)> {
        let mut ids = Vec::new();
        let left = self.rows("SELECT id FROM cleanup WHERE id >= ?1 ORDER BY id", [next], |row| {
            let id = self.column(row, 0)?;
            if ids.len() == most {
                return Ok(Some(id));
            }
            ids.push(id);
            Ok(None)
        })?;
        Ok((ids, left))
    }

    /// How many snapshots there are, and ids on the list for cleanup.
    pub fn counts(&self) -> Result<(u64, u64)> {
        let count = |sql| Ok(self.value::<u32>(sql, [])?.map_or(0, u64::from));
        Ok((count("SELECT count(*) FROM snapshots")?, count("SELECT count(*) FROM cleanup")?))
    }

    /// Whether `id` is on the list for cleanup.
    pub fn is_scheduled(&self, id: SnapshotId) -> Result<bool> {
        self.is("SELECT EXISTS (SELECT 1 FROM cleanup WHERE id = ?1)", [id])
    }

    /// Looks up the stored scan of a layer, and reads it if its record has fewer than `bytes`.
    pub fn scan(&self, key: &ScanKey, bytes: usize) -> Result<ScanLookup> {
        const SQL: &str =
            "SELECT iif(length(result) < ?3, result, NULL) FROM scans WHERE digest = ?1 AND repository = ?2";
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let row = self.rows(SQL, params![key.digest.as_str(), key.repository, bytes], |row| {
            self.column::<Option<Vec<u8>>>(row, 0).map(Some)
        })?;
        Ok(match row {
            None => ScanLookup::Absent,
            Some(None) => ScanLookup::TooLong,
            Some(Some(record)) => {
                let bad = |_| self.bad_row("scans", &format!("{} {}", key.digest, key.repository));
                record::decode(&record).map_err(bad)?.map_or(ScanLookup::Absent, ScanLookup::Read)
            }
        })
    }
}

impl<'s> WriteTxn<'s> {
    pub(super) fn new(connection: &'s Connection, path: &'s Path) -> Self {
        Self(ReadTxn::new(connection, path))
    }

    /// What failed last.
    pub(super) fn into_failure(self) -> Option<Error> {
        self.0.failure.into_inner()
    }

    /// The result is how many rows were changed.
    fn change(&self, sql: &str, parameters: impl Params) -> Result<usize> {
        let changed = self.connection.prepare_cached(sql).and_then(|mut statement| statement.execute(parameters));
        changed.map_err(|e| self.failed(&e))
    }

    /// Reserves `count` ids; the result is the first.
    pub(super) fn reserve_ids(&self, count: u32) -> Result<SnapshotId> {
        let first = self.value("UPDATE numbers SET next_id = next_id + ?1 RETURNING next_id - ?1", [count])?;
        first.ok_or_else(|| self.bad_row("numbers", ""))
    }

    /// Hands out no id below `next`.
    pub(super) fn skip_ids(&self, next: SnapshotId) -> Result<()> {
        self.change("UPDATE numbers SET next_id = max(next_id, ?1)", [next]).map(drop)
    }

    /// Adds a snapshot that has no children. Its key and its id must be free.
    pub fn insert(&self, snapshot: &Snapshot) -> Result<()> {
        const SQL: &str = "INSERT INTO snapshots (id, key, parent, depth, kind, live, created, updated, labels, ref, \
            digest, repository, size, inodes) \
            VALUES (?1, ?2, ?3, 1 + ifnull((SELECT depth FROM snapshots WHERE id = ?3), 0), ?4, ?5, ?6, ?7, ?8, ?9, \
            ?10, ?11, ?12, ?13)";
        let id_of = |key| self.id_of(key)?.ok_or_else(|| self.bad_row("snapshots", key.as_str()));
        let parent = snapshot.parent.as_ref().map(id_of).transpose()?;
        let (layer, usage) = (snapshot.layer.as_ref(), snapshot.usage);
        let is_live = snapshot.kind != Kind::Committed;
        self.change(
            SQL,
            params![
                snapshot.id,
                snapshot.key.as_str(),
                parent,
                snapshot.kind.as_str(),
                is_live,
                snapshot.created.0,
                snapshot.updated.0,
                labels(snapshot),
                snapshot.labels.get(LABEL_SNAPSHOT_REF),
                layer.map(|layer| layer.digest.as_str()),
                layer.map(|layer| &layer.repository),
                usage.map(|usage| usage.size),
                usage.map(|usage| usage.inodes),
            ],
        )?;
        let mut next = parent.filter(|_| is_live);
        // The first ancestor that is live already has told those below it.
        while let Some(parent) = next {
            next = self.value("UPDATE snapshots SET live = 1 WHERE id = ?1 AND live = 0 RETURNING parent", [parent])?;
        }
        Ok(())
    }

    /// Removes a snapshot that has no children. An ancestor that has no live descendant any more is put on the list for
    /// cleanup, if it is a published layer.
    pub fn remove(&self, snapshot: &Snapshot) -> Result<()> {
        const END: &str = "UPDATE snapshots SET live = 0 WHERE id = ?1 AND live = 1 AND kind = 'committed' \
            AND NOT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?1 AND live = 1) RETURNING digest IS NOT NULL, parent";
        let mut next =
            self.value::<SnapshotId>("DELETE FROM snapshots WHERE id = ?1 RETURNING parent", [snapshot.id])?;
        while let Some(parent) = next.take() {
            self.rows(END, [parent], |row| {
                if self.column(row, 0)? {
                    self.schedule_cleanup(&[parent])?;
                }
                next = self.column(row, 1)?;
                Ok(None::<()>)
            })?;
        }
        Ok(())
    }

    /// Stores new times, labels and usage of a snapshot.
    pub fn update(&self, snapshot: &Snapshot) -> Result<()> {
        const SQL: &str = "UPDATE snapshots SET created = ?2, updated = ?3, labels = ?4, ref = ?5, size = ?6, inodes = ?7 \
            WHERE id = ?1";
        self.change(
            SQL,
            params![
                snapshot.id,
                snapshot.created.0,
                snapshot.updated.0,
                labels(snapshot),
                snapshot.labels.get(LABEL_SNAPSHOT_REF),
                snapshot.usage.map(|usage| usage.size),
                snapshot.usage.map(|usage| usage.inodes),
            ],
        )?;
        Ok(())
    }

    pub fn schedule_cleanup(&self, ids: &[SnapshotId]) -> Result<()> {
        const SQL: &str = "INSERT INTO cleanup (id, begun) VALUES (?1, 0) ON CONFLICT (id) DO UPDATE SET begun = 0";
        ids.iter().try_for_each(|id| self.change(SQL, [*id]).map(drop))
    }

    /// Up to `limit` of these ids that are on the list, in their order. They stay on it, so that a crash does not lose
    /// them, and are marked as begun until they are put on it again.
    pub fn mark_cleanup_started(&self, ids: RangeInclusive<SnapshotId>, limit: usize) -> Result<Vec<SnapshotId>> {
        const SQL: &str = "UPDATE cleanup SET begun = 1 WHERE id IN \
            (SELECT id FROM cleanup WHERE id BETWEEN ?1 AND ?2 ORDER BY id LIMIT ?3) RETURNING id";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut begun = Vec::new();
        self.rows(SQL, params![ids.start(), ids.end(), limit], |row| {
            begun.push(self.column(row, 0)?);
            Ok(None::<()>)
        })?;
        begun.sort();
        Ok(begun)
    }

    /// Takes ids off the list with which a cleanup is through, unless they were put on it
    /// again meanwhile.
    pub fn finish_cleanup(&self, ids: impl IntoIterator<Item = SnapshotId>) -> Result<()> {
        let mut ids = ids.into_iter();
        ids.try_for_each(|id| self.change("DELETE FROM cleanup WHERE id = ?1 AND begun = 1", [id]).map(drop))
    }

    /// Stores what a scan found, or the bound that the layer exceeds.
    pub fn put_scan(&self, key: &ScanKey, scan: std::result::Result<&Scan, Limit>) -> Result<()> {
        const SQL: &str = "INSERT INTO scans (digest, repository, result) VALUES (?1, ?2, ?3) \
            ON CONFLICT (digest, repository) DO UPDATE SET result = excluded.result";
        self.change(SQL, params![key.digest.as_str(), key.repository, record::encode(scan)]).map(drop)
    }

    /// Forgets what was found in layers that no snapshot has any more.
    pub fn forget_unneeded_scans(&self) -> Result<()> {
        const SQL: &str =
            "DELETE FROM scans WHERE digest NOT IN (SELECT digest FROM snapshots WHERE digest IS NOT NULL)";
        self.change(SQL, []).map(drop)
    }
}

impl ToSql for SnapshotId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        // No id is that large (`SnapshotId::MAX`), but the end of a range may be.
        Ok(i64::try_from(self.0).unwrap_or(i64::MAX).into())
    }
}

impl FromSql for SnapshotId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let id = i64::column_result(value)?;
        u64::try_from(id).map(Self).map_err(|_| FromSqlError::OutOfRange(id))
    }
}

fn labels(snapshot: &Snapshot) -> String {
    serde_json::to_string(&snapshot.labels).expect("strings have a form in JSON")
}

/// None: this program did not write it.
fn decode(row: &Row<'_>) -> Option<Snapshot> {
    let text = |column| row.get_ref(column).ok()?.as_str_or_null().ok();
    let integer = |column| row.get::<_, Option<i64>>(column).ok();
    let layer = match (text(7)?, text(8)?) {
        (Some(digest), Some(repository)) => {
            Some(Layer { digest: Digest::parse(digest).ok()?, repository: repository.to_owned() })
        }
        (None, None) => None,
        _ => return None,
    };
    let usage = match (integer(9)?, integer(10)?) {
        (Some(size), Some(inodes)) => Some(Usage { size, inodes }),
        (None, None) => None,
        _ => return None,
    };
    Some(Snapshot {
        id: row.get(0).ok()?,
        key: Key::parse(text(1)??).ok()?,
        parent: text(2)?.map(Key::parse).transpose().ok()?,
        kind: Kind::from_name(text(3)??)?,
        created: Timestamp(integer(4)??),
        updated: Timestamp(integer(5)??),
        labels: serde_json::from_str(text(6)??).ok()?,
        layer,
        usage,
    })
}

/// For the tests of the snapshotter.
#[cfg(test)]
impl ReadTxn<'_> {
    pub fn scans(&self) -> Result<i64> {
        Ok(self.value("SELECT count(*) FROM scans", [])?.unwrap_or_default())
    }
}

#[cfg(test)]
impl WriteTxn<'_> {
    pub fn forget_scans_but(&self, digest: &Digest) -> Result<()> {
        self.change("DELETE FROM scans WHERE digest <> ?1", [digest.as_str()]).map(drop)
    }
}
