//! Group commit: writes that wait at the same time become durable with one sync.
//!
//! Each write runs its body on its own thread while it has the lock, in a savepoint of the open transaction, so a write
//! that fails undoes only its own changes. If other writes wait for the lock at its end, the next of them inherits the
//! transaction, and the last one commits it for all. A write that is alone waits for nobody, and nobody gets a result
//! before the transaction on which it depends is on disk. A write that waits for the commit blocks its thread, so a group
//! has at most as many writes as there are threads that write.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Instant;

use rusqlite::Connection;

use super::file::{SCHEMA_VERSION, clear_wal};
use super::{Error, ReadTxn, Result, Store, WriteTxn};
use crate::metrics::METRICS;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, OnceLock};

pub(super) struct Writer {
    waiting: AtomicUsize,
    /// None: the store is closed.
    open: Mutex<Option<OpenWriter>>,
}

/// The connection that writes.
struct OpenWriter {
    connection: Connection,
    /// The open transaction, to which the next write belongs.
    group: Option<Group>,
    /// A commit failed, but its pages may be in the write-ahead log, and a recovery after a crash would apply them.
    wal_may_hold_failed_commit: bool,
}

/// The writes in one transaction.
#[derive(Default)]
struct Group {
    /// Number of writes that wait for its commit: the first that changed something, and all after it, refused ones and
    /// reads included.
    writes: usize,
    /// The result of the commit, shared by these writes.
    commit: Arc<OnceLock<Result<()>>>,
}

impl Writer {
    pub(super) fn new(connection: Connection) -> Self {
        let open = OpenWriter { connection, group: None, wal_may_hold_failed_commit: false };
        Self { waiting: AtomicUsize::new(0), open: Mutex::new(Some(open)) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<OpenWriter>> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.open.lock();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        open
    }
}

impl Store {
    /// Makes all changes of `body` or none, possibly in one transaction with other writes. `body` must not call the store,
    /// because it would wait for itself.
    pub fn write<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&WriteTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.try_write(body)?
    }

    /// Does the same as `write`, but separates a failure of the store from the result of `body`.
    pub(super) fn try_write<T, E>(
        &self,
        body: impl FnOnce(&WriteTxn) -> std::result::Result<T, E>,
    ) -> Result<std::result::Result<T, E>> {
        let mut open = self.writer.lock();
        let writer = open.as_mut().ok_or(Error::Closed)?;
        let mut group = match writer.group.take() {
            Some(group) => group,
            None => self.begin(writer)?,
        };
        let before = writer.connection.total_changes();
        let result = match self.in_savepoint(&writer.connection, body) {
            Ok(result) => result,
            Err(cause) => {
                self.roll_back(&writer.connection);
                let _ = group.commit.set(Err(cause.clone()));
                return Err(cause);
            }
        };
        let has_changed = matches!(result, Ok(Ok(_))) && writer.connection.total_changes() > before;
        // If no write of this transaction has changed anything yet, this result depends on durable data only.
        let needs_commit = has_changed || group.writes > 0;
        group.writes += usize::from(needs_commit);
        let commit = Arc::clone(&group.commit);
        // A write that waits for the lock now inherits this transaction: it commits it, or leaves it to the next one.
        if self.writer.waiting.load(Ordering::SeqCst) > 0 {
            writer.group = Some(group);
        } else {
            self.commit(writer, &group);
        }
        drop(open);
        let result = result.unwrap_or_else(|panic| resume_unwind(panic));
        if needs_commit {
            commit.wait().clone()?;
        }
        Ok(result)
    }

    /// Reads in a write transaction. It first overwrites a failed commit that may still be in the write-ahead log, so what
    /// `body` sees stays true after a crash.
    pub fn read_durable<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&ReadTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.write(|write| body(write))
    }

    /// Runs `body` and returns its result or its panic; if it fails, its changes are undone. After an error of this
    /// function itself, the whole transaction has to be rolled back.
    fn in_savepoint<T, E>(
        &self,
        connection: &Connection,
        body: impl FnOnce(&WriteTxn) -> std::result::Result<T, E>,
    ) -> Result<std::thread::Result<std::result::Result<T, E>>> {
        self.run(connection, "SAVEPOINT body")?;
        let write = WriteTxn::new(connection, &self.path);
        // A panic must not leave half of a write in the transaction.
        let result = catch_unwind(AssertUnwindSafe(|| body(&write)));
        match write.into_failure() {
            // SQLite rolls back the whole transaction after an error of the disk or of memory. It does not do so if a
            // page could not be read, but its other pages in memory are not relied on then.
            Some(cause) if connection.is_autocommit() || cause.is_disk_error() => return Err(cause),
            _ if !matches!(result, Ok(Ok(_))) => self.run(connection, "ROLLBACK TO body")?,
            _ => {}
        }
        self.run(connection, "RELEASE body")?;
        Ok(result)
    }

    fn begin(&self, writer: &mut OpenWriter) -> Result<Group> {
        let connection = &writer.connection;
        // The last transaction may still be open, if its rollback failed.
        self.roll_back(connection);
        if writer.wal_may_hold_failed_commit {
            self.overwrite_failed_commit(connection)?;
            writer.wal_may_hold_failed_commit = false;
        }
        self.run(connection, "BEGIN IMMEDIATE")?;
        Ok(Group::default())
    }

    /// Commits the transaction and publishes the result to all its writes.
    fn commit(&self, writer: &mut OpenWriter, group: &Group) {
        let since = Instant::now();
        let result = self.run(&writer.connection, "COMMIT");
        if result.is_err() {
            writer.wal_may_hold_failed_commit = self.overwrite_failed_commit(&writer.connection).is_err();
        } else if group.writes > 0 {
            METRICS.record_commit(group.writes as u64, since);
        }
        let _ = group.commit.set(result);
    }

    /// Frees the cached pages of the writer, unless a write runs.
    pub(super) fn shrink_writer(&self) {
        if let Some(writer) = self.writer.open.try_lock().as_ref().and_then(|open| open.as_ref())
            && let Err(e) = self.run(&writer.connection, "PRAGMA shrink_memory")
        {
            log::warn!(event = "metadata_memory_not_freed"; "{e}");
        }
    }

    /// Rolls back the open transaction, if there is one.
    fn roll_back(&self, connection: &Connection) {
        if !connection.is_autocommit()
            && let Err(e) = self.run(connection, "ROLLBACK")
        {
            log::error!(event = "metadata_rollback_failed"; "{e}");
        }
    }

    /// Rolls back a transaction whose commit failed, and overwrites its pages in the write-ahead log.
    fn overwrite_failed_commit(&self, connection: &Connection) -> Result<()> {
        self.roll_back(connection);
        // The version does not change, but SQLite writes its page to the log in place of the failed commit.
        self.run(connection, &format!("PRAGMA user_version = {SCHEMA_VERSION}"))
    }

    /// Writes the write-ahead log into the file and closes all connections. Every later call fails.
    pub fn close_for_good(&self) {
        let Some(mut writer) = self.writer.lock().take() else { return };
        // A write may have left its transaction to this call, which was waiting for the lock.
        if let Some(group) = writer.group.take() {
            self.commit(&mut writer, &group);
        }
        self.readers.close();
        let pages = |row: &rusqlite::Row<'_>| Ok::<(i64, i64), _>((row.get(1)?, row.get(2)?));
        let checkpoint = writer.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], pages);
        drop(writer);
        if checkpoint.is_ok_and(|(in_log, written)| in_log == written) {
            // If this fails, the next start reads the log, whose pages are the same as those in the file.
            let _ = clear_wal(&self.path);
        }
    }

    /// Executes a statement that returns no rows.
    pub(super) fn run(&self, connection: &Connection, sql: &str) -> Result<()> {
        let result = connection.prepare_cached(sql).and_then(|mut statement| statement.execute([]));
        result.map(drop).map_err(|e| Error::from_sqlite(&self.path, connection, &e))
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;
#[cfg(test)]
mod tests;
