//! The metadata: an SQLite database behind typed operations.
//!
//! Knows rows, not containerd's rules and not the file system. All SQL is in here. What is on disk is described in
//! docs/format.md. Invariants, kept inside each transaction: a snapshot is live if it is active or a view, or if a live
//! one stands on it; `ref` is its label `containerd.io/snapshot.ref`. A `write` that returned is on disk.
#![forbid(unsafe_code)]

#[cfg(test)]
pub mod disk;
mod file;
mod group;
mod readers;
pub mod sidecar;
#[cfg(test)]
mod tests;
mod transaction;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode};

use self::group::{Writer, run};
use self::readers::Readers;
pub use self::transaction::{Read, ShortScan, Write};
use crate::sys;
use crate::types::{Quoted, SnapshotId};

/// So many ids are reserved by one durable write. What is left of a block at a stop is skipped.
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
        /// What the operating system said, if it was asked.
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
    /// What `connection` failed with.
    fn of(path: &Path, connection: &Connection, cause: &rusqlite::Error) -> Self {
        let errno = match cause.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                return Self::damaged(path, &cause.to_string());
            }
            Some(ErrorCode::DiskFull) => Some(Errno::ENOSPC),
            Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => sys::sqlite_errno(connection),
            _ => None,
        };
        Self::access(path, cause, errno)
    }

    fn access(path: &Path, cause: &rusqlite::Error, errno: Option<Errno>) -> Self {
        let of_system = errno.map(|errno| format!(": {} ({errno:?})", errno.desc())).unwrap_or_default();
        Self::Access { path: path.to_owned(), cause: format!("{cause}{of_system}"), errno }
    }

    fn damaged(path: &Path, found: &str) -> Self {
        Self::Damaged { path: path.to_owned(), found: found.to_owned() }
    }

    fn bad_row(path: &Path, table: &str, key: &str) -> Self {
        Self::damaged(path, &format!("a row of table {table} was not written by this program, key {}", Quoted(key)))
    }

    /// Whether the disk, or what is on it, is to blame.
    fn is_of_the_disk(&self) -> bool {
        matches!(self, Self::Damaged { .. }) || self.errno().is_some()
    }

    /// What the operating system said.
    pub fn errno(&self) -> Option<Errno> {
        if let Self::Access { errno, .. } = self { *errno } else { None }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

pub struct Store {
    path: PathBuf,
    /// A file that only takes space, until that space is needed to free more.
    reserve: PathBuf,
    writer: Writer,
    readers: Readers,
    /// Ids that are reserved and not handed out yet.
    reserved: Mutex<std::ops::Range<u64>>,
    first_id: SnapshotId,
}

impl Store {
    /// Opens or creates the store. It hands out ids above `occupied`, the highest number that
    /// already has a directory: another snapshotter's, or made after the copy of the file
    /// that somebody put back.
    pub fn open(path: &Path, occupied: Option<SnapshotId>) -> Result<Self> {
        let reserve = path.with_extension("reserve");
        let open = || {
            match path.try_exists() {
                Ok(false) => Self::create(path, occupied, &[], &[])?,
                Ok(true) | Err(_) => Self::check(path)?,
            }
            Self::open_checked(path, &reserve, occupied)
        };
        let store = match open() {
            Err(e) if e.is_full_disk() && fs::remove_file(&reserve).is_ok() => open()?,
            result => result?,
        };
        store.restore_reserve();
        Ok(store)
    }

    fn open_checked(path: &Path, reserve: &Path, occupied: Option<SnapshotId>) -> Result<Self> {
        let mut store = Self {
            path: path.to_owned(),
            reserve: reserve.to_owned(),
            writer: Writer::default(),
            readers: Readers::default(),
            reserved: Mutex::new(0..0),
            first_id: SnapshotId(0),
        };
        store.open_writer()?;
        let above = file::above(occupied);
        let (first_id, next_id) = store.read(|tx| Ok::<_, Error>((tx.first_id()?, tx.next_id()?)))?;
        store.first_id = first_id;
        // A start that has nothing to write must not need space.
        if next_id < above {
            store.write(|tx| tx.skip_ids(above))?;
        }
        Ok(store)
    }

    /// Whether a store was open at `path` once, as far as what lies beside it tells.
    pub fn was_at(path: &Path) -> bool {
        path.with_extension("reserve").exists()
    }

    /// Writes what frees space. It works on a full disk as well, because space was put by for it. A program that reads
    /// for long keeps the log from beginning anew, so that the log takes that space, too. When the read has ended, the
    /// log is written into the file here, because no commit succeeds that would have it written.
    pub fn write_to_free<T, E: From<Error> + FullDisk>(
        &self,
        body: impl Fn(&Write) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let mut result = self.write(&body);
        for make_room in [Self::use_reserve, Self::write_log_into_file] {
            if matches!(&result, Err(e) if e.is_full_disk()) && make_room(self) {
                result = self.write(&body);
            }
        }
        result
    }

    /// Frees the space that was put by; false if there is none.
    fn use_reserve(&self) -> bool {
        let is_used = fs::remove_file(&self.reserve).is_ok();
        if is_used {
            log::warn!("the disk of {} is full: the space put by for removals is used", self.path.display());
        }
        is_used
    }

    /// Puts space by again, if there is any.
    pub fn restore_reserve(&self) {
        if self.reserve.exists() {
            return;
        }
        // Real blocks, not a hole.
        if fs::write(&self.reserve, vec![0xff; RESERVE_BYTES]).is_err() {
            let _ = fs::remove_file(&self.reserve);
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

    /// Gives up the memory of reads and writes that came at once, when no more such come.
    pub fn release_memory(&self) {
        self.readers.close_unused();
        self.drop_cached_pages();
    }

    /// A consistent view. It waits for no write, and no write for it. `body` must not read or write by itself.
    pub fn read<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&Read) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let reader = self.readers.take(&self.path)?;
        run(&reader, "BEGIN").map_err(|e| Error::of(&self.path, &reader, &e))?;
        body(&Read::new(&reader, &self.path))
    }
}

/// Whether an error means that the disk is full, or that all is used that a quota allows of it.
pub trait FullDisk {
    fn is_full_disk(&self) -> bool;
}

impl FullDisk for Error {
    fn is_full_disk(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOSPC | Errno::EDQUOT))
    }
}
