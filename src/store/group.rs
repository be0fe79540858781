//! Group commit: writes that wait together become durable together.
//!
//! Each write runs its body on its own thread, when it has the lock, in a savepoint of the open transaction: one that
//! fails takes back its own rows. If others wait for the lock by then, the transaction stays open for the next of them,
//! and the last one in the line commits it for all. So one alone waits for nobody, and many share one wait for the
//! disk. Nobody gets an answer before the transaction that made it true is on disk.
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
    /// None: it is closed.
    open: Mutex<Option<OpenWriter>>,
}

/// The connection that writes.
struct OpenWriter {
    connection: Connection,
    /// The open transaction, which waits for the next write.
    group: Option<Group>,
    /// A commit failed. Its pages may be in the write-ahead log all the same, and a recovery after a crash would apply
    /// them.
    wal_may_hold_failed_commit: bool,
}

/// Writes in one transaction.
#[derive(Default)]
struct Group {
    /// Those that wait for its commit: the first one that changed something, and all after it.
    members: usize,
    /// The result of the commit, shared by the members.
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
    /// Does all of `body` or nothing of it, possibly in one transaction with other writes. `body` must not call the
    /// store: it would wait for itself.
    pub fn write<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&WriteTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.try_write(body)?
    }

    /// Does the same as `write`, and returns a failure of the store apart from the result of `body`.
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
        // If no write of this transaction has changed anything yet, the result depends on nothing that is not durable.
        let waits = has_changed || group.members > 0;
        group.members += usize::from(waits);
        let commit = Arc::clone(&group.commit);
        // A write that waits for the lock now will commit this transaction, or leave it to one that waits then.
        if self.writer.waiting.load(Ordering::SeqCst) > 0 {
            writer.group = Some(group);
        } else {
            self.finish(writer, &group);
        }
        drop(open);
        let result = result.unwrap_or_else(|panic| resume_unwind(panic));
        if waits {
            commit.wait().clone()?;
        }
        Ok(result)
    }

    /// Reads in a write transaction. A failed commit that may still be in the write-ahead log is overwritten first, so
    /// that no crash can bring it back, and what `body` sees stays true.
    pub fn read_durable<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&ReadTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.write(|write| body(write))
    }

    /// The error is one after which the whole transaction has to be rolled back; the result is what `body` said, or its
    /// panic, and without its rows if it failed.
    fn in_savepoint<T, E>(
        &self,
        connection: &Connection,
        body: impl FnOnce(&WriteTxn) -> std::result::Result<T, E>,
    ) -> Result<std::thread::Result<std::result::Result<T, E>>> {
        self.run(connection, "SAVEPOINT one")?;
        let write = WriteTxn::new(connection, &self.path);
        // A panic must not leave the transaction with half of a write.
        let result = catch_unwind(AssertUnwindSafe(|| body(&write)));
        match write.into_failure() {
            // SQLite rolls back the whole transaction after an error of the disk or of memory. After a page that could
            // not be read it does not, but nothing else that it has in memory is relied on then.
            Some(cause) if connection.is_autocommit() || cause.is_disk_error() => return Err(cause),
            _ if !matches!(result, Ok(Ok(_))) => self.run(connection, "ROLLBACK TO one")?,
            _ => {}
        }
        self.run(connection, "RELEASE one")?;
        Ok(result)
    }

    fn begin(&self, writer: &mut OpenWriter) -> Result<Group> {
        let connection = &writer.connection;
        // The last one may have failed to roll back.
        self.roll_back(connection);
        if writer.wal_may_hold_failed_commit {
            self.overwrite_failed_commit(connection)?;
            writer.wal_may_hold_failed_commit = false;
        }
        self.run(connection, "BEGIN IMMEDIATE")?;
        Ok(Group::default())
    }

    /// Commits the transaction, and tells all of its members.
    fn finish(&self, writer: &mut OpenWriter, group: &Group) {
        let since = Instant::now();
        let result = self.run(&writer.connection, "COMMIT");
        if result.is_err() {
            writer.wal_may_hold_failed_commit = self.overwrite_failed_commit(&writer.connection).is_err();
        } else if group.members > 0 {
            METRICS.record_commit(group.members as u64, since);
        }
        let _ = group.commit.set(result);
    }

    /// Frees the pages that the writer has in memory, unless somebody writes.
    pub(super) fn shrink_writer(&self) {
        if let Some(writer) = self.writer.open.try_lock().as_ref().and_then(|open| open.as_ref())
            && let Err(e) = self.run(&writer.connection, "PRAGMA shrink_memory")
        {
            log::warn!("{e}");
        }
    }

    /// Ends the open transaction without effect, if there is one.
    fn roll_back(&self, connection: &Connection) {
        if !connection.is_autocommit()
            && let Err(e) = self.run(connection, "ROLLBACK")
        {
            log::error!("{e}");
        }
    }

    /// Ends a transaction whose commit failed, and overwrites what it may have left in the write-ahead log.
    fn overwrite_failed_commit(&self, connection: &Connection) -> Result<()> {
        self.roll_back(connection);
        // The version is the same, but its page is written, and so the log goes on after the failed commit.
        self.run(connection, &format!("PRAGMA user_version = {SCHEMA_VERSION}"))
    }

    /// Writes the write-ahead log into the file and closes all connections. Every later call fails.
    pub fn close_for_good(&self) {
        let Some(mut writer) = self.writer.lock().take() else { return };
        // A write may have left its transaction to whoever waits for the lock.
        if let Some(group) = writer.group.take() {
            self.finish(&mut writer, &group);
        }
        self.readers.close();
        let pages = |row: &rusqlite::Row<'_>| Ok::<(i64, i64), _>((row.get(1)?, row.get(2)?));
        let written = writer.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], pages);
        drop(writer);
        if written.is_ok_and(|(in_log, written)| in_log == written) {
            // If the log cannot be emptied, the next start reads it, and finds the pages that the file has.
            let _ = clear_wal(&self.path);
        }
    }

    /// Executes a statement that returns no rows.
    pub(super) fn run(&self, connection: &Connection, sql: &str) -> Result<()> {
        let done = connection.prepare_cached(sql).and_then(|mut statement| statement.execute([]));
        done.map(drop).map_err(|e| Error::from_sqlite(&self.path, connection, &e))
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;
#[cfg(test)]
mod tests;
