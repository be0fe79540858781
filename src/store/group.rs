//! Group commit: writes that wait together become durable together.
//!
//! Each write runs its body on its own thread, when it has its turn. If others wait by then,
//! the open transaction is handed on to the next of them instead of being committed, and who
//! finds nobody waiting commits it for all. So one alone waits for nobody, and many share one
//! wait for the disk. Nobody gets an answer before the transaction that made it true is on
//! disk. A body that fails after it changed something ends its transaction: it alone is told,
//! and the others run again.
#![forbid(unsafe_code)]

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};
use redb::{ReadableDatabase, StorageError, WriteTransaction};

use super::transaction::META;
use super::{Error, For, Opened, Result, Store, Write};
use crate::metrics::METRICS;

/// In `META`: the number of the last transaction of several writes that reached the disk.
const LAST_GROUP: &str = "last_group";

#[derive(Default)]
pub(super) struct Turns {
    waiting: AtomicUsize,
    turn: Mutex<Turn>,
}

#[derive(Default)]
struct Turn {
    /// Open, and handed on to the next one that waits.
    group: Option<Group>,
    /// Of the last transaction of several writes that was tried.
    number: u64,
}

/// Writes in one transaction.
struct Group {
    transaction: WriteTransaction,
    changed: bool,
    /// Writes whose answers hang on it.
    members: usize,
    fate: Arc<Fate>,
}

/// What becomes of a transaction, for all who have a part in it.
#[derive(Default)]
struct Fate {
    end: Mutex<Option<End>>,
    decided: Condvar,
}

enum End {
    Durable,
    /// For certain nothing of it is on disk.
    Undone,
    /// It may be on disk or not.
    Failed(redb::Error),
}

/// Whether a write shares its transaction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Company {
    Welcome,
    /// It has had its transaction undone by another one.
    Alone,
}

impl Fate {
    fn decide(&self, end: End) {
        *self.end.lock() = Some(end);
        self.decided.notify_all();
    }

    fn wait(&self) -> End {
        let mut end = self.end.lock();
        loop {
            match &*end {
                Some(end) => return end.copy(),
                None => self.decided.wait(&mut end),
            }
        }
    }
}

impl End {
    fn copy(&self) -> Self {
        match self {
            Self::Durable => Self::Durable,
            Self::Undone => Self::Undone,
            Self::Failed(cause) => Self::Failed(copy(cause)),
        }
    }
}

impl Store {
    /// All of `body` or nothing of it, possibly together with other writes. `body` runs again, on
    /// a fresh transaction, where one that it shared, or the engine, failed.
    pub fn write<T, E: From<Error>>(
        &self,
        body: impl Fn(&Write) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        match self.try_write(&body, Company::Welcome) {
            Some(result) => result,
            None => match self.try_write(&body, Company::Alone) {
                Some(result) => result,
                // The engine had failed before, twice in a row.
                None => Err(self.error(StorageError::PreviousIo).into()),
            },
        }
    }

    /// None: for certain nothing is on disk, and it may be tried again.
    fn try_write<T, E: From<Error>>(
        &self,
        body: &impl Fn(&Write) -> std::result::Result<T, E>,
        company: Company,
    ) -> Option<std::result::Result<T, E>> {
        let mut turn = self.take_turn();
        let mut group = match turn.group.take() {
            Some(group) if company == Company::Welcome => group,
            others => {
                if let Some(others) = others {
                    self.finish(&mut turn, others);
                }
                match self.begin() {
                    Ok(group) => group,
                    Err(e) => return Some(Err(e.into())),
                }
            }
        };
        let write = Write::new(group.transaction, &self.path);
        // A panic must not leave the engine with a transaction that nobody ends.
        let result = catch_unwind(AssertUnwindSafe(|| body(&write)));
        let has_changed = write.has_changed();
        group.transaction = write.transaction;
        let result = match result {
            Ok(Err(refused)) if has_changed => {
                self.undo(group);
                return Some(Err(refused));
            }
            // Even without a change the engine may have been left half way.
            Err(panic) => {
                self.undo(group);
                drop(turn);
                resume_unwind(panic)
            }
            Ok(result) => result,
        };
        group.changed |= has_changed;
        let fate = Arc::clone(&group.fate);
        // What nothing undecided is a reason for is true already.
        let is_certain = !group.changed;
        group.members += usize::from(!is_certain);
        // Whoever waits now will have a turn, and look again.
        if company == Company::Welcome && self.turns.waiting.load(Ordering::SeqCst) > 0 {
            turn.group = Some(group);
        } else {
            self.finish(&mut turn, group);
        }
        drop(turn);
        if is_certain {
            return Some(result);
        }
        match fate.wait() {
            End::Durable => Some(result),
            End::Undone => None,
            End::Failed(cause) => Some(Err(self.error(cause).into())),
        }
    }

    fn take_turn(&self) -> MutexGuard<'_, Turn> {
        self.turns.waiting.fetch_add(1, Ordering::SeqCst);
        let turn = self.turns.turn.lock();
        self.turns.waiting.fetch_sub(1, Ordering::SeqCst);
        turn
    }

    fn begin(&self) -> Result<Group> {
        let begin = || {
            self.ensure_open(For::Writing)?;
            let database = self.database.read();
            let Some(Opened { database, frozen: false }) = database.as_ref() else {
                return Err(self.error(StorageError::DatabaseClosed));
            };
            database.begin_write().map_err(|e| self.error(e))
        };
        let transaction = match begin() {
            // The engine refuses everything after an access failed (a full disk, say) until its
            // file is opened anew.
            Err(Error::Engine { cause: redb::Error::PreviousIo, .. }) => {
                self.close();
                begin()
            }
            result => result,
        };
        Ok(Group { transaction: transaction?, changed: false, members: 0, fate: Arc::default() })
    }

    /// Nothing of it happened.
    fn undo(&self, group: Group) {
        if let Err(e) = group.transaction.abort() {
            log::error!("{}", self.error(e));
            self.close();
        }
        group.fate.decide(End::Undone);
    }

    /// Commits it for all.
    fn finish(&self, turn: &mut Turn, group: Group) {
        let Group { transaction, changed, members, fate } = group;
        let number = (members > 1).then(|| {
            turn.number += 1;
            turn.number
        });
        let since = Instant::now();
        let result = match number {
            _ if !changed => transaction.abort().map_err(redb::Error::from),
            None => transaction.commit().map_err(redb::Error::from),
            Some(number) => commit_numbered(transaction, number),
        };
        if changed && result.is_ok() {
            METRICS.committed(members as u64, since);
        }
        let end = match result {
            Ok(()) => End::Durable,
            Err(cause) => {
                self.close();
                match number {
                    _ if !changed || matches!(cause, redb::Error::PreviousIo) => End::Undone,
                    None => End::Failed(cause),
                    Some(number) => self.find_out(number, cause),
                }
            }
        };
        fate.decide(end);
    }

    /// A transaction whose commit failed may be on disk. Opened again, the file tells; so
    /// neighbours need not suffer for what was too much of one of them.
    fn find_out(&self, number: u64, failed: redb::Error) -> End {
        match self.ensure_open(For::Writing).and_then(|()| self.last_group()) {
            Ok(last) if last == number => End::Durable,
            Ok(_) => End::Undone,
            Err(e) => {
                log::error!("{e}");
                End::Failed(failed)
            }
        }
    }

    fn last_group(&self) -> Result<u64> {
        let database = self.database.read();
        let opened = database.as_ref().ok_or_else(|| self.error(StorageError::DatabaseClosed))?;
        let read = opened.database.begin_read().map_err(|e| self.error(e))?;
        let meta = read.open_table(META).map_err(|e| self.error(e))?;
        Ok(meta.get(LAST_GROUP).map_err(|e| self.error(e))?.map_or(0, |number| number.value()))
    }

    /// Numbers go on from those of the process before.
    pub(super) fn go_on_numbering(&self) -> Result<()> {
        self.turns.turn.lock().number = self.last_group()?;
        Ok(())
    }

    /// As at the end of the process: nothing can be read or written any more.
    pub fn close_for_good(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let mut turn = self.take_turn();
        if let Some(group) = turn.group.take() {
            self.finish(&mut turn, group);
        }
        self.close();
    }
}

fn commit_numbered(transaction: WriteTransaction, number: u64) -> std::result::Result<(), redb::Error> {
    transaction.open_table(META)?.insert(LAST_GROUP, number)?;
    Ok(transaction.commit()?)
}

/// As good as `cause`, for one more who has to know.
fn copy(cause: &redb::Error) -> redb::Error {
    let io = |kind: io::ErrorKind| io::Error::new(kind, cause.to_string());
    match cause {
        redb::Error::Io(own) => own.raw_os_error().map_or_else(|| io(own.kind()), io::Error::from_raw_os_error),
        _ => io(io::ErrorKind::Other),
    }
    .into()
}

#[cfg(test)]
mod tests;
