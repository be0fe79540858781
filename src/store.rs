//! The metadata: an SQLite database behind typed operations.
//!
//! It knows rows, but neither containerd's rules nor the directories of snapshots. All SQL is here; docs/format.md
//! describes the file. Invariants, kept inside each transaction: a snapshot is live if it is active or a view, or has such
//! a descendant; `ref` is its label `containerd.io/snapshot.ref`. A write that returned is on disk.
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

/// Number of ids that one durable write reserves. Those that are unused at a stop are never used.
const ID_BLOCK: u32 = 1024;
const RESERVE_BYTES: usize = 1 << 20;

#[derive(Clone, Debug)]
pub enum Error {
    /// Another version of this program wrote the file.
    Schema { path: PathBuf, version: i64 },
    /// The file is no store, is incomplete, or has a row that this program did not write.
    Damaged { path: PathBuf, damage: String },
    /// The file could not be read or written.
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
            Self::Schema { path, version } => write!(
                f,
                "the metadata {} has schema version {version}, this program knows {}: install the version that wrote it",
                path.display(),
                file::SCHEMA_VERSION
            ),
            Self::Damaged { path, damage } => write!(f, "the metadata {} is damaged: {damage}", path.display()),
            Self::Access { path, cause, .. } => write!(f, "cannot access the metadata {}: {cause}", path.display()),
            Self::Closed => f.write_str("the metadata is closed: the daemon is about to end"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    fn from_sqlite(path: &Path, connection: &Connection, cause: &rusqlite::Error) -> Self {
        if let rusqlite::Error::InvalidColumnType(..) | rusqlite::Error::IntegralValueOutOfRange(..) = cause {
            return Self::damaged(path, cause);
        }
        match cause.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::damaged(path, cause),
            Some(ErrorCode::DiskFull) => Self::access(path, cause, Some(Errno::ENOSPC)),
            Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => {
                Self::access(path, cause, system::sqlite_errno(connection))
            }
            Some(ErrorCode::DatabaseBusy) => Self::access(path, "another program has it open: stop that program", None),
            _ => Self::access(path, cause, None),
        }
    }

    fn access(path: &Path, cause: impl fmt::Display, errno: Option<Errno>) -> Self {
        let os_error = errno.map(|errno| format!(": {} ({errno:?})", errno.desc())).unwrap_or_default();
        Self::Access { path: path.to_owned(), cause: format!("{cause}{os_error}"), errno }
    }

    fn damaged(path: &Path, damage: impl fmt::Display) -> Self {
        Self::Damaged { path: path.to_owned(), damage: damage.to_string() }
    }

    /// Whether the disk or its content is the cause.
    fn is_disk_error(&self) -> bool {
        matches!(self, Self::Damaged { .. }) || self.errno().is_some()
    }

    /// The error of the system call that failed, if one did.
    pub fn errno(&self) -> Option<Errno> {
        if let Self::Access { errno, .. } = self { *errno } else { None }
    }

    /// Whether the disk is full or a quota is used up.
    pub fn is_full_disk(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOSPC | Errno::EDQUOT))
    }
}

pub type Result<T> = std::result::Result<T, Error>;

pub struct Store {
    path: PathBuf,
    writer: Writer,
    readers: Readers,
    /// Reserved ids that are not handed out yet.
    reserved: Mutex<std::ops::Range<u64>>,
    first_id: SnapshotId,
}

impl Store {
    /// Opens or creates the store. It hands out ids above `occupied`, the highest number that has a directory. Such a
    /// directory is another snapshotter's, or newer than the file if somebody restored it from a copy.
    pub fn open(path: &Path, occupied: Option<SnapshotId>) -> Result<Self> {
        let open = || {
            if matches!(path.try_exists(), Ok(false)) {
                Self::create(path, occupied, &[], &[])?;
            } else {
                Self::check(path)?;
            }
            Self::open_checked(path, occupied)
        };
        let store = with_reserve(path, open)?;
        store.restore_reserve();
        Ok(store)
    }

    fn open_checked(path: &Path, occupied: Option<SnapshotId>) -> Result<Self> {
        if let Err(e) = file::allocate_wal(path) {
            log::warn!(
                event = "wal_not_allocated",
                path:% = Self::wal_of(path).display();
                "cannot allocate the write-ahead log, removals may fail on a full disk: {e}"
            );
        }
        let connection = file::open_writer(path)?;
        // Outside a transaction, each statement is a transaction of its own.
        let write = WriteTxn::new(&connection, path);
        let counters = write.id_counters()?;
        let next = file::first_free(occupied);
        // If there is nothing to write, the start needs no space on the disk.
        if counters.next < next {
            write.skip_ids(next)?;
        }
        let (writer, readers) = (Writer::new(connection), Readers::default());
        Ok(Self { path: path.to_owned(), writer, readers, reserved: Mutex::default(), first_id: counters.first })
    }

    /// Whether a store was open at `path` before. Its reserve is the evidence.
    pub fn existed_at(path: &Path) -> bool {
        reserve_of(path).exists()
    }

    /// Does the same as `write` for changes that free space. They may use the reserve.
    pub fn write_using_reserve<T, E: From<Error>>(
        &self,
        body: impl Fn(&WriteTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        with_reserve(&self.path, || self.try_write(&body))?
    }

    /// Creates the reserve if it is missing and there is room.
    pub fn restore_reserve(&self) {
        let reserve = reserve_of(&self.path);
        if fs::metadata(&reserve).is_ok_and(|status| status.len() == RESERVE_BYTES as u64) {
            return;
        }
        // Bytes other than zero, so that the file system allocates blocks.
        if fs::write(&reserve, vec![0xff; RESERVE_BYTES]).is_err() {
            let _ = fs::remove_file(&reserve);
        }
    }

    /// Directories with a lower number are older than this store.
    pub fn first_id(&self) -> SnapshotId {
        self.first_id
    }

    /// Returns an id that was never handed out before, also not by a process that was killed.
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

    /// Closes idle connections and frees cached pages.
    pub fn release_memory(&self) {
        self.readers.close_unused();
        self.shrink_writer();
    }

    /// Reads a consistent state. Reads and writes do not wait for each other. `body` must not call the store, because it
    /// could wait for itself.
    pub fn read<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&ReadTxn) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let mut slot = self.readers.lock()?;
        let connection = slot.connection(&self.path)?;
        self.run(connection, "BEGIN")?;
        let result = body(&ReadTxn::new(connection, &self.path));
        // If this fails, `Slot::connection` replaces the connection.
        let _ = self.run(connection, "ROLLBACK");
        result
    }
}

/// A file that takes up space. It is deleted when a write that frees space needs room.
fn reserve_of(path: &Path) -> PathBuf {
    path.with_extension("reserve")
}

/// Runs `attempt`. If the disk is full, deletes the reserve, if there is one, and runs it again.
fn with_reserve<T>(path: &Path, attempt: impl Fn() -> Result<T>) -> Result<T> {
    match attempt() {
        Err(e) if e.is_full_disk() && fs::remove_file(reserve_of(path)).is_ok() => {
            log::warn!(
                event = "reserve_used",
                path:% = path.display();
                "the disk of the metadata is full, using the space reserved for removals"
            );
            attempt()
        }
        result => result,
    }
}
