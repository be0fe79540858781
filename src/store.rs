//! The metadata: an SQLite database behind typed operations.
//!
//! Knows rows, not containerd's rules and not the directories of snapshots. All SQL is in here. What is on disk is
//! described in docs/format.md. Invariants, kept inside each transaction: a snapshot is live if it is active or a view,
//! or has such a descendant; `ref` is its label `containerd.io/snapshot.ref`. A `write` that returned is on disk.
#![forbid(unsafe_code)]

mod file;
mod group;
mod readers;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
mod transaction;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode};

use self::group::Writer;
use self::readers::Readers;
pub use self::transaction::{ReadTxn, ScanLookup, WriteTxn};
use crate::model::SnapshotId;
use crate::system;

/// Ids that one durable write reserves. Those that are unused at a stop are never used.
const ID_BLOCK: u32 = 1024;
const RESERVE_BYTES: usize = 1 << 20;

#[derive(Clone, Debug)]
pub enum Error {
    /// Written by another version of this program.
    Schema { path: PathBuf, found: i64 },
    /// No store, not all of one, or one with a row that this program did not write.
    Damaged { path: PathBuf, found: String },
    /// It could not be read or written.
    Access {
        path: PathBuf,
        cause: String,
        /// The error of the system call that failed, if one did.
        errno: Option<Errno>,
    },
    /// The daemon is about to end.
    Closed,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Schema { path, found } => write!(
                f,
                "the metadata {} has schema version {found}, this program knows {}: install the version that wrote it",
                path.display(),
                file::SCHEMA_VERSION
            ),
            Self::Damaged { path, found } => write!(f, "the metadata {} is damaged: {found}", path.display()),
            Self::Access { path, cause, .. } => write!(f, "cannot access the metadata {}: {cause}", path.display()),
            Self::Closed => f.write_str("the metadata is closed: the daemon is about to end"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    fn from_sqlite(path: &Path, connection: &Connection, cause: &rusqlite::Error) -> Self {
        if let rusqlite::Error::InvalidColumnType(..) | rusqlite::Error::IntegralValueOutOfRange(..) = cause {
            return Self::damaged(path, &cause.to_string());
        }
        let errno = match cause.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                return Self::damaged(path, &cause.to_string());
            }
            Some(ErrorCode::DiskFull) => Some(Errno::ENOSPC),
            Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => system::sqlite_errno(connection),
            Some(ErrorCode::DatabaseBusy) => {
                let cause = "another program has it open, end that one".to_owned();
                return Self::Access { path: path.to_owned(), cause, errno: None };
            }
            _ => None,
        };
        Self::access(path, cause, errno)
    }

    fn access(path: &Path, cause: &rusqlite::Error, errno: Option<Errno>) -> Self {
        let os_error = errno.map(|errno| format!(": {} ({errno:?})", errno.desc())).unwrap_or_default();
        Self::Access { path: path.to_owned(), cause: format!("{cause}{os_error}"), errno }
    }

    fn damaged(path: &Path, found: &str) -> Self {
        Self::Damaged { path: path.to_owned(), found: found.to_owned() }
    }

    /// Whether the disk, or what is on it, is to blame.
    fn is_disk_error(&self) -> bool {
        matches!(self, Self::Damaged { .. }) || self.errno().is_some()
    }

    /// The error of the system call that failed, if one did.
    pub fn errno(&self) -> Option<Errno> {
        if let Self::Access { errno, .. } = self { *errno } else { None }
    }

    /// Whether the disk is full, or all is used that a quota allows of it.
    pub fn is_full_disk(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOSPC | Errno::EDQUOT))
    }
}

pub type Result<T> = std::result::Result<T, Error>;

pub struct Store {
    path: PathBuf,
    writer: Writer,
    readers: Readers,
    /// Ids that are reserved and not handed out yet.
    reserved: Mutex<std::ops::Range<u64>>,
    first_id: SnapshotId,
}

impl Store {
    /// Opens or creates the store. It hands out ids above `occupied`, the highest number that has a directory: another
    /// snapshotter's, or made after the copy of the file that somebody put back.
    pub fn open(path: &Path, occupied: Option<SnapshotId>) -> Result<Self> {
        let open = || {
            if matches!(path.try_exists(), Ok(false)) {
                Self::create(path, occupied, &[], &[])?;
            } else {
                Self::check(path)?;
            }
            Self::open_checked(path, occupied)
        };
        let store = match open() {
            Err(e) if e.is_full_disk() && use_reserve(path) => open()?,
            result => result?,
        };
        store.restore_reserve();
        Ok(store)
    }

    fn open_checked(path: &Path, occupied: Option<SnapshotId>) -> Result<Self> {
        if let Err(e) = file::allocate_wal(path) {
            log::warn!("removals may fail on a full disk: cannot allocate {}: {e}", Self::wal_of(path).display());
        }
        let connection = file::open_writer(path)?;
        // Outside a transaction, each statement is one of its own.
        let write = WriteTxn::new(&connection, path);
        let (first_id, next_id) = write.numbers()?;
        let free = file::first_free(occupied);
        // A start that has nothing to write must not need space.
        if next_id < free {
            write.skip_ids(free)?;
        }
        let (writer, readers) = (Writer::new(connection), Readers::default());
        Ok(Self { path: path.to_owned(), writer, readers, reserved: Mutex::default(), first_id })
    }

    /// Whether a store was open at `path` once, as far as what lies beside it tells.
    pub fn existed_at(path: &Path) -> bool {
        reserve_of(path).exists()
    }

    /// Writes what frees space. On a full disk the reserve is given up, and it is tried again.
    pub fn write_using_reserve<T, E: From<Error>>(
        &self,
        body: impl Fn(&WriteTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        match self.try_write(&body) {
            Err(e) if e.is_full_disk() && use_reserve(&self.path) => self.try_write(&body)?,
            result => result?,
        }
    }

    /// Makes the reserve again, if there is room.
    pub fn restore_reserve(&self) {
        let reserve = reserve_of(&self.path);
        if fs::metadata(&reserve).is_ok_and(|found| found.len() == RESERVE_BYTES as u64) {
            return;
        }
        // Real blocks, not a hole.
        if fs::write(&reserve, vec![0xff; RESERVE_BYTES]).is_err() {
            let _ = fs::remove_file(&reserve);
        }
    }

    /// Directories with a lower number were there before this store was.
    pub fn first_id(&self) -> SnapshotId {
        self.first_id
    }

    /// An id that was never handed out before, not even by a process that was killed.
    pub fn reserve_id(&self) -> Result<SnapshotId> {
        let mut reserved = self.reserved.lock();
        if reserved.is_empty() {
            let first = self.write(|tx| tx.reserve_ids(ID_BLOCK))?;
            *reserved = first.0..first.0 + u64::from(ID_BLOCK);
        }
        let id = reserved.start;
        reserved.start += 1;
        Ok(SnapshotId(id))
    }

    /// Closes idle connections and frees cached pages after many calls at once.
    pub fn release_memory(&self) {
        self.readers.close_unused();
        self.shrink_writer();
    }

    /// A consistent view. It waits for no write, and no write for it. `body` must not call the store: it could wait for
    /// itself.
    pub fn read<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&ReadTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let mut slot = self.readers.lock()?;
        let connection = slot.connection(&self.path)?;
        self.run(connection, "BEGIN")?;
        let result = body(&ReadTxn::new(connection, &self.path));
        // If this fails, the connection is not used again.
        let _ = self.run(connection, "ROLLBACK");
        result
    }
}

/// A file that only takes space, until that is needed to free more.
fn reserve_of(path: &Path) -> PathBuf {
    path.with_extension("reserve")
}

/// Gives up the reserve; false if there is none.
fn use_reserve(path: &Path) -> bool {
    let is_used = fs::remove_file(reserve_of(path)).is_ok();
    if is_used {
        log::warn!("the disk of {} is full: the space reserved for removals is used", path.display());
    }
    is_used
}
