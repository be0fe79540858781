//! Queries and changes inside a transaction. Each operation keeps the invariants of the store by itself.
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
    /// The last error of SQLite, also if the caller ignored it: some errors end the whole transaction.
    failure: RefCell<Option<Error>>,
}

/// The result of looking up the stored scan of a layer.
pub enum ScanLookup {
    Absent,
    Read(StoredScan),
    /// The record is longer than the caller allows, and was not read.
    TooLong,
}

pub(super) struct IdCounters {
    /// The first id that this store handed out.
    pub first: SnapshotId,
    /// The first id that is not reserved.
    pub next: SnapshotId,
}

/// Changes that happen together or not at all. Its queries see its own changes.
pub struct WriteTxn<'s>(ReadTxn<'s>);

impl<'s> Deref for WriteTxn<'s> {
    type Target = ReadTxn<'s>;

    fn deref(&self) -> &ReadTxn<'s> {
        &self.0
    }
}

/// A query for the rows that `decode` reads. The second form is for `CHAIN`, which omits the labels.
macro_rules! select {
    ($condition:literal) => {
        select!("s.labels", "FROM snapshots s", $condition)
    };
    ($labels:literal, $from:literal, $condition:literal) => {
        concat!(
            "SELECT s.id, s.key, p.key, s.kind, s.created, s.updated, ",
            $labels,
            ", s.digest, s.repository, s.size, s.inodes ",
            $from,
            " LEFT JOIN snapshots p ON p.id = s.parent ",
            $condition
        )
    };
}

const BY_KEY: &str = select!("WHERE s.key = ?1");
const BY_ID: &str = select!("WHERE s.id = ?1");
const BY_IDS: &str = select!("WHERE s.id BETWEEN ?1 AND ?2 ORDER BY s.id");
// This is the order of an index, so SQLite reads only the rows that the caller visits.
const BY_REF_ON_PARENT: &str =
    select!("WHERE s.ref = ?1 AND s.parent = (SELECT id FROM snapshots WHERE key = ?2) ORDER BY s.key");
const BY_REF_ALONE: &str = select!("WHERE s.ref = ?1 AND s.parent IS NULL ORDER BY s.key");
// A recursive query returns its rows in the order of the recursion, which is nearest first. Sorting would read the whole
// chain at once.
const CHAIN: &str = concat!(
    "WITH RECURSIVE chain (id) AS (SELECT id FROM snapshots WHERE key = ?1 UNION ",
    "SELECT parent FROM chain CROSS JOIN snapshots USING (id) WHERE parent IS NOT NULL) ",
    select!("'{}'", "FROM chain CROSS JOIN snapshots s USING (id)", "")
);

impl<'s> ReadTxn<'s> {
    pub(super) fn new(connection: &'s Connection, path: &'s Path) -> Self {
        Self { connection, path, failure: RefCell::default() }
    }

    /// Runs statements. Errors of SQLite are recorded for the end of the transaction.
    fn run<T>(&self, statements: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        statements(self.connection).map_err(|cause| {
            let failure = Error::from_sqlite(self.path, self.connection, &cause);
            self.failure.replace(Some(failure.clone()));
            failure
        })
    }

    /// Calls `visitor` with each row until it returns a result.
    fn visit_rows<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        mut visitor: impl FnMut(&Row<'_>) -> rusqlite::Result<Option<T>>,
    ) -> Result<Option<T>> {
        self.run(|connection| {
            let mut statement = connection.prepare_cached(sql)?;
            let mut rows = statement.query(parameters)?;
            while let Some(row) = rows.next()? {
                if let Some(result) = visitor(row)? {
                    return Ok(Some(result));
                }
            }
            Ok(None)
        })
    }

    fn visit_snapshots<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        mut visitor: impl FnMut(Snapshot) -> Option<T>,
    ) -> Result<Option<T>> {
        let result = self.visit_rows(sql, parameters, |row| match decode(row) {
            Some(snapshot) => Ok(visitor(snapshot).map(Ok)),
            None => Ok(Some(Err(self.bad_row("snapshots", &row.get::<_, i64>(0)?.to_string())))),
        })?;
        result.transpose()
    }

    /// Decodes the first row of a result. None: there is no row.
    fn first<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        decode: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        self.run(|connection| connection.prepare_cached(sql)?.query_row(parameters, decode).optional())
    }

    /// The first column of the first row. None: there is no row, or the value is NULL.
    fn value<T: FromSql>(&self, sql: &str, parameters: impl Params) -> Result<Option<T>> {
        Ok(self.first(sql, parameters, |row| row.get(0))?.flatten())
    }

    fn is_true(&self, sql: &str, parameters: impl Params) -> Result<bool> {
        Ok(self.value(sql, parameters)?.unwrap_or(false))
    }

    pub(super) fn id_counters(&self) -> Result<IdCounters> {
        let decode = |row: &Row<'_>| Ok(IdCounters { first: row.get(0)?, next: row.get(1)? });
        self.first("SELECT first_id, next_id FROM numbers", [], decode)?.ok_or_else(|| self.bad_row("numbers", ""))
    }

    fn bad_row(&self, table: &str, key: &str) -> Error {
        Error::damaged(
            self.path,
            format!("a row of table {table} was not written by this program, key {}", Quoted(key)),
        )
    }

    pub fn get(&self, key: &str) -> Result<Option<Snapshot>> {
        self.visit_snapshots(BY_KEY, [key], Some)
    }

    /// The snapshot `key` and its ancestors, nearest first, up to the first for which `is_last` is true. Labels are
    /// omitted, because those of one snapshot can have 1 MiB. The chain is empty if there is no such snapshot.
    pub fn chain(&self, key: &Key, mut is_last: impl FnMut(&Snapshot) -> bool) -> Result<Vec<Snapshot>> {
        let mut chain: Vec<Snapshot> = Vec::new();
        self.visit_snapshots(CHAIN, [key.as_str()], |snapshot| {
            let is_last = is_last(&snapshot);
            chain.push(snapshot);
            is_last.then_some(())
        })?;
        Ok(chain)
    }

    /// Number of snapshots in the chain of this one, itself included. None: there is no such snapshot.
    pub fn depth(&self, id: SnapshotId) -> Result<Option<usize>> {
        let depth: Option<u32> = self.value("SELECT depth FROM snapshots WHERE id = ?1", [id])?;
        Ok(depth.map(|depth| depth as usize))
    }

    /// The snapshot `key` and its parent, without their labels.
    pub fn with_parent(&self, key: &Key) -> Result<Option<(Snapshot, Option<Snapshot>)>> {
        let mut is_second = false;
        let mut chain = self.chain(key, |_| std::mem::replace(&mut is_second, true))?.into_iter();
        Ok(chain.next().map(|snapshot| (snapshot, chain.next())))
    }

    pub fn id_of(&self, key: &Key) -> Result<Option<SnapshotId>> {
        self.value("SELECT id FROM snapshots WHERE key = ?1", [key.as_str()])
    }

    pub fn has_children(&self, id: SnapshotId) -> Result<bool> {
        self.is_true("SELECT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?1)", [id])
    }

    /// Whether a descendant of this one is active or a view.
    pub fn is_in_use(&self, id: SnapshotId) -> Result<bool> {
        self.is_true("SELECT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?1 AND live = 1)", [id])
    }

    pub fn exists(&self, id: SnapshotId) -> Result<bool> {
        self.is_true("SELECT EXISTS (SELECT 1 FROM snapshots WHERE id = ?1)", [id])
    }

    pub fn by_id(&self, id: SnapshotId) -> Result<Option<Snapshot>> {
        self.visit_snapshots(BY_ID, [id], Some)
    }

    /// Calls `visitor` with each snapshot that has this `snapshot.ref` label and this parent ("": none), as long as it
    /// returns true. Returns whether it visited all.
    pub fn visit_by_ref(
        &self,
        reference: &str,
        parent: &str,
        mut visitor: impl FnMut(Snapshot) -> bool,
    ) -> Result<bool> {
        let stop = |snapshot| (!visitor(snapshot)).then_some(());
        let stopped = match parent {
            "" => self.visit_snapshots(BY_REF_ALONE, [reference], stop)?,
            parent => self.visit_snapshots(BY_REF_ON_PARENT, [reference, parent], stop)?,
        };
        Ok(stopped.is_none())
    }

    /// The highest id of a snapshot.
    pub fn last_id(&self) -> Result<Option<SnapshotId>> {
        self.value("SELECT max(id) FROM snapshots", [])
    }

    /// Calls `visitor` with at most `limit` snapshots with these ids, in their order, as long as it returns true. Returns
    /// the first id that was not visited. None: all were visited.
    pub fn visit_range(
        &self,
        ids: RangeInclusive<SnapshotId>,
        limit: usize,
        mut visitor: impl FnMut(Snapshot) -> bool,
    ) -> Result<Option<SnapshotId>> {
        let mut visited = 0;
        self.visit_snapshots(BY_IDS, [ids.start(), ids.end()], |snapshot| {
            let id = snapshot.id;
            if visited == limit || !visitor(snapshot) {
                return Some(id);
            }
            visited += 1;
            None
        })
    }

    /// Calls `visitor` with each snapshot.
    pub fn for_each(&self, mut visitor: impl FnMut(Snapshot)) -> Result<()> {
        self.visit_snapshots(BY_IDS, (0, i64::MAX), |snapshot| {
            visitor(snapshot);
            None::<()>
        })?;
        Ok(())
    }

    /// The highest id on the list for cleanup.
    pub fn last_scheduled(&self) -> Result<Option<SnapshotId>> {
        self.value("SELECT max(id) FROM cleanup", [])
    }

    /// At most `limit` ids on the list for cleanup, from `first` on, and the next one after them.
    pub fn scheduled(&self, first: SnapshotId, limit: usize) -> Result<(Vec<SnapshotId>, Option<SnapshotId>)> {
        let mut ids = Vec::new();
        let next = self.visit_rows("SELECT id FROM cleanup WHERE id >= ?1 ORDER BY id", [first], |row| {
            let id = row.get(0)?;
            if ids.len() == limit {
                return Ok(Some(id));
            }
            ids.push(id);
            Ok(None)
        })?;
        Ok((ids, next))
    }

    /// Number of snapshots, and of ids on the list for cleanup.
    pub fn counts(&self) -> Result<(u64, u64)> {
        let count = |sql| Ok(self.value::<u32>(sql, [])?.map_or(0, u64::from));
        Ok((count("SELECT count(*) FROM snapshots")?, count("SELECT count(*) FROM cleanup")?))
    }

    /// Whether `id` is on the list for cleanup.
    pub fn is_scheduled(&self, id: SnapshotId) -> Result<bool> {
        self.is_true("SELECT EXISTS (SELECT 1 FROM cleanup WHERE id = ?1)", [id])
    }

    /// Looks up the stored scan of a layer, and reads it if its record has fewer than `limit` bytes.
    pub fn scan(&self, key: &ScanKey, limit: usize) -> Result<ScanLookup> {
        const SQL: &str =
            "SELECT iif(length(result) < ?3, result, NULL) FROM scans WHERE digest = ?1 AND repository = ?2";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let parameters = params![key.digest.as_str(), key.repository, limit];
        Ok(match self.first(SQL, parameters, |row| row.get::<_, Option<Vec<u8>>>(0))? {
            None => ScanLookup::Absent,
            Some(None) => ScanLookup::TooLong,
            Some(Some(record)) => {
                let bad_row = |_| self.bad_row("scans", &format!("{} {}", key.digest, key.repository));
                record::decode(&record).map_err(bad_row)?.map_or(ScanLookup::Absent, ScanLookup::Read)
            }
        })
    }
}

impl<'s> WriteTxn<'s> {
    pub(super) fn new(connection: &'s Connection, path: &'s Path) -> Self {
        Self(ReadTxn::new(connection, path))
    }

    /// The last error of SQLite.
    pub(super) fn into_failure(self) -> Option<Error> {
        self.0.failure.into_inner()
    }

    fn execute(&self, sql: &str, parameters: impl Params) -> Result<()> {
        self.run(|connection| connection.prepare_cached(sql)?.execute(parameters).map(drop))
    }

    /// Reserves `count` ids and returns the first.
    pub(super) fn reserve_ids(&self, count: u32) -> Result<SnapshotId> {
        let first = self.value("UPDATE numbers SET next_id = next_id + ?1 RETURNING next_id - ?1", [count])?;
        first.ok_or_else(|| self.bad_row("numbers", ""))
    }

    /// Makes `next` the lowest id that can be reserved.
    pub(super) fn skip_ids(&self, next: SnapshotId) -> Result<()> {
        self.execute("UPDATE numbers SET next_id = max(next_id, ?1)", [next])
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
        self.execute(
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
        // The ancestors of one that is live already are live, too.
        while let Some(parent) = next {
            next = self.value("UPDATE snapshots SET live = 1 WHERE id = ?1 AND live = 0 RETURNING parent", [parent])?;
        }
        Ok(())
    }

    /// Removes a snapshot that has no children. Published layers among its ancestors that have no live descendant any
    /// more are put on the list for cleanup.
    pub fn remove(&self, snapshot: &Snapshot) -> Result<()> {
        const END_USE: &str = "UPDATE snapshots SET live = 0 WHERE id = ?1 AND live = 1 AND kind = 'committed' \
            AND NOT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?1 AND live = 1) RETURNING digest IS NOT NULL, parent";
        let mut next =
            self.value::<SnapshotId>("DELETE FROM snapshots WHERE id = ?1 RETURNING parent", [snapshot.id])?;
        while let Some(parent) = next {
            let Some((is_published, ancestor)) = self.first(END_USE, [parent], |row| Ok((row.get(0)?, row.get(1)?)))?
            else {
                break;
            };
            if is_published {
                self.schedule_cleanup(&[parent])?;
            }
            next = ancestor;
        }
        Ok(())
    }

    /// Stores new times, labels and usage of a snapshot.
    pub fn update(&self, snapshot: &Snapshot) -> Result<()> {
        const SQL: &str = "UPDATE snapshots SET created = ?2, updated = ?3, labels = ?4, ref = ?5, size = ?6, inodes = ?7 \
            WHERE id = ?1";
        self.execute(
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
        )
    }

    pub fn schedule_cleanup(&self, ids: &[SnapshotId]) -> Result<()> {
        const SQL: &str = "INSERT INTO cleanup (id, begun) VALUES (?1, 0) ON CONFLICT (id) DO UPDATE SET begun = 0";
        ids.iter().try_for_each(|id| self.execute(SQL, [*id]))
    }

    /// Marks at most `limit` of these ids that are on the list for cleanup as begun, and returns them in their order. They
    /// stay on the list, so that a crash does not lose them.
    pub fn mark_cleanup_started(&self, ids: RangeInclusive<SnapshotId>, limit: usize) -> Result<Vec<SnapshotId>> {
        const SQL: &str = "UPDATE cleanup SET begun = 1 WHERE id IN \
            (SELECT id FROM cleanup WHERE id BETWEEN ?1 AND ?2 ORDER BY id LIMIT ?3) RETURNING id";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut begun = Vec::new();
        self.visit_rows(SQL, params![ids.start(), ids.end(), limit], |row| {
            begun.push(row.get(0)?);
            Ok(None::<()>)
        })?;
        begun.sort();
        Ok(begun)
    }

    /// Takes ids whose cleanup is finished off the list, unless they were put on it again meanwhile.
    pub fn finish_cleanup(&self, ids: impl IntoIterator<Item = SnapshotId>) -> Result<()> {
        let mut ids = ids.into_iter();
        ids.try_for_each(|id| self.execute("DELETE FROM cleanup WHERE id = ?1 AND begun = 1", [id]))
    }

    /// Stores the result of a scan, or the limit that the layer exceeds.
    pub fn put_scan(&self, key: &ScanKey, scan: std::result::Result<&Scan, Limit>) -> Result<()> {
        const SQL: &str = "INSERT INTO scans (digest, repository, result) VALUES (?1, ?2, ?3) \
            ON CONFLICT (digest, repository) DO UPDATE SET result = excluded.result";
        self.execute(SQL, params![key.digest.as_str(), key.repository, record::encode(scan)])
    }

    /// Deletes the scans of layers that no snapshot has any more.
    pub fn forget_unneeded_scans(&self) -> Result<()> {
        const SQL: &str =
            "DELETE FROM scans WHERE digest NOT IN (SELECT digest FROM snapshots WHERE digest IS NOT NULL)";
        self.execute(SQL, [])
    }
}

impl ToSql for SnapshotId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        // Ids are smaller (`SnapshotId::MAX`), but the end of a range need not be.
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
    serde_json::to_string(&snapshot.labels).expect("a map of strings can be written as JSON")
}

/// Decodes a row of `select!`. None: this program did not write it.
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

#[cfg(test)]
mod testing;
