//! Group commit: writes that wait together become durable together.
//!
//! Each write runs its body on its own thread, when it has the lock, in a savepoint of the open transaction: one that
//! fails takes back its own rows. If others wait for the lock by then, the transaction stays open for the next of them,
//! and the last one in the line commits it for all. So one alone waits for nobody, and many share one wait for the
//! disk. Nobody gets an answer before the transaction that made it true is on disk.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};
use rusqlite::Connection;

use super::file::{SCHEMA_VERSION, open_writer};
use super::{Error, Read, Result, Store, Write};
use crate::metrics::METRICS;

#[derive(Default)]
pub(super) struct Writer {
    waiting: AtomicUsize,
    state: Mutex<WriterState>,
}

#[derive(Default)]
struct WriterState {
    /// None: not opened yet, or closed.
    connection: Option<Connection>,
    /// The open transaction, which waits for the next write.
    group: Option<Group>,
    /// When a transaction could not be begun for the last time, and why.
    refused: Option<(Instant, Error)>,
    /// A commit failed. Its pages may be in the log all the same, and a recovery after a crash would apply them.
    is_unsettled: bool,
}

/// Writes in one transaction.
#[derive(Default)]
struct Group {
    has_changed: bool,
    /// Writes that wait for its commit.
    members: usize,
    outcome: Arc<Outcome>,
}

/// What becomes of a transaction, for all who have a part in it.
#[derive(Default)]
struct Outcome {
    result: Mutex<Option<std::result::Result<(), Error>>>,
    decided: Condvar,
}

impl Outcome {
    fn decide(&self, result: Result<()>) {
        *self.result.lock() = Some(result);
        self.decided.notify_all();
    }

    fn wait(&self) -> Result<()> {
        let mut result = self.result.lock();
        loop {
            match &*result {
                Some(Ok(())) => return Ok(()),
                Some(Err(cause)) => return Err(cause.clone()),
                None => self.decided.wait(&mut result),
            }
        }
    }
}

impl Store {
    /// Does all of `body` or nothing of it, possibly in one transaction with other writes.
    pub fn write<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&Write) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let since = Instant::now();
        let mut state = self.lock_writer();
        let mut group = match state.group.take() {
            Some(group) => group,
            None => self.begin(&mut state, since)?,
        };
        let Some(connection) = state.connection.as_ref() else { return Err(Error::Closed.into()) };
        let failed = |cause| Error::of(&self.path, connection, &cause);
        let before = connection.total_changes();
        let write = Write::new(connection, &self.path);
        let result = match run(connection, "SAVEPOINT one") {
            // A panic must not leave the transaction with half of a write.
            Ok(()) => catch_unwind(AssertUnwindSafe(|| body(&write))),
            Err(cause) => Ok(Err(failed(cause).into())),
        };
        let is_kept = matches!(result, Ok(Ok(_)));
        // SQLite rolls back the whole transaction after an error of the disk or of memory. After a page that could not
        // be read it does not, but nothing else that it has in memory is relied on then.
        let savepoint = match write.into_failure() {
            Some(cause) if connection.is_autocommit() || cause.is_of_the_disk() => Err(cause),
            _ if is_kept => run(connection, "RELEASE one").map_err(failed),
            _ => run(connection, "ROLLBACK TO one").and_then(|()| run(connection, "RELEASE one")).map_err(failed),
        };
        if let Err(cause) = savepoint {
            self.roll_back(connection);
            group.outcome.decide(Err(cause.clone()));
            drop(state);
            return match result {
                Ok(Ok(_)) => Err(cause.into()),
                Ok(Err(own)) => Err(own),
                Err(panic) => resume_unwind(panic),
            };
        }
        group.has_changed |= is_kept && connection.total_changes() > before;
        // A result that rests on no change in this transaction is certain already.
        let needs_no_commit = !group.has_changed;
        group.members += usize::from(!needs_no_commit);
        let outcome = Arc::clone(&group.outcome);
        // A write that waits for the lock now will commit this transaction, or leave it to one that waits then.
        if self.writer.waiting.load(Ordering::SeqCst) > 0 {
            state.group = Some(group);
        } else {
            self.finish(&mut state, group);
        }
        drop(state);
        let result = result.unwrap_or_else(|panic| resume_unwind(panic));
        if !needs_no_commit {
            outcome.wait()?;
        }
        result
    }

    /// Reads in a write transaction. A commit that failed before is taken back for good first, so what `body` sees stays
    /// true after a crash.
    pub fn read_durable<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&Read) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.write(|write| body(write))
    }

    fn lock_writer(&self) -> MutexGuard<'_, WriterState> {
        self.writer.waiting.fetch_add(1, Ordering::SeqCst);
        let state = self.writer.state.lock();
        self.writer.waiting.fetch_sub(1, Ordering::SeqCst);
        state
    }

    /// Opens the connection that writes.
    pub(super) fn open_writer(&self) -> Result<()> {
        self.writer.state.lock().connection = Some(open_writer(&self.path)?);
        Ok(())
    }

    /// Begins a transaction for a write that has waited since `since`.
    fn begin(&self, state: &mut WriterState, since: Instant) -> Result<Group> {
        let Some(connection) = state.connection.as_ref() else { return Err(Error::Closed) };
        // Another program kept the file locked. The writes that waited meanwhile give up together, for in turns the last
        // of them would wait for minutes.
        if let Some((at, cause)) = state.refused.as_ref().filter(|(at, _)| since < *at) {
            log::debug!("a write gives up that waited for {} ms", at.duration_since(since).as_millis());
            return Err(cause.clone());
        }
        if state.is_unsettled {
            self.settle(connection)?;
            state.is_unsettled = false;
        }
        run(connection, "BEGIN IMMEDIATE")
            .map_err(|e| Error::of(&self.path, connection, &e))
            .inspect_err(|cause| state.refused = Some((Instant::now(), cause.clone())))?;
        Ok(Group::default())
    }

    /// Commits it for all.
    fn finish(&self, state: &mut WriterState, group: Group) {
        let Group { has_changed, members, outcome } = group;
        let Some(connection) = state.connection.as_ref() else { return outcome.decide(Err(Error::Closed)) };
        let since = Instant::now();
        let result = run(connection, "COMMIT").map_err(|e| Error::of(&self.path, connection, &e));
        if has_changed && result.is_ok() {
            METRICS.committed(members as u64, since);
        }
        if result.is_err() {
            self.roll_back(connection);
            state.is_unsettled = self.settle(connection).is_err();
        }
        outcome.decide(result);
    }

    /// Writes the log into the file, so that the next write begins it anew. False: that is not possible now, because
    /// somebody still reads an older state, or the disk fails.
    pub(super) fn write_log_into_file(&self) -> bool {
        let mut state = self.lock_writer();
        // A write may have left its transaction to whoever waits for the lock.
        if let Some(group) = state.group.take() {
            self.finish(&mut state, group);
        }
        let Some(connection) = &state.connection else { return false };
        let pages = |row: &rusqlite::Row<'_>| Ok::<(i64, i64), _>((row.get(1)?, row.get(2)?));
        let written = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], pages);
        written.is_ok_and(|(in_log, written)| in_log == written)
    }

    /// Drops the pages that no transaction needs now, unless somebody writes.
    pub(super) fn drop_cached_pages(&self) {
        let Some(state) = self.writer.state.try_lock() else { return };
        if let Some(connection) = &state.connection
            && let Err(e) = run(connection, "PRAGMA shrink_memory")
        {
            log::warn!("{}", Error::of(&self.path, connection, &e));
        }
    }

    /// Ends the open transaction without effect, if there is one.
    fn roll_back(&self, connection: &Connection) {
        if !connection.is_autocommit()
            && let Err(e) = run(connection, "ROLLBACK")
        {
            log::error!("{}", Error::of(&self.path, connection, &e));
        }
    }

    /// Writes over what a failed commit may have left in the log.
    fn settle(&self, connection: &Connection) -> Result<()> {
        self.roll_back(connection);
        // The version is the same, but its page is written, and so the log goes on after the failed commit.
        let same = format!("PRAGMA user_version = {SCHEMA_VERSION}");
        connection.execute_batch(&same).map_err(|e| Error::of(&self.path, connection, &e))
    }

    /// Closes all connections. Every later call fails.
    pub fn close_for_good(&self) {
        let mut state = self.lock_writer();
        if let Some(group) = state.group.take() {
            self.finish(&mut state, group);
        }
        state.connection = None;
        self.readers.close();
    }
}

/// Does a statement that has no rows.
pub(super) fn run(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([]).map(drop)
}

#[cfg(test)]
mod tests;
