//! The metadata: an embedded transactional store behind typed operations.
//!
//! Knows records and their indexes, not containerd's rules and not the file system.
//! Invariants, kept inside each transaction: every snapshot has one row in `snapshots` and
//! one in `ids`, which counts who names it as parent; `by_ref` has a row for every snapshot
//! with a `containerd.io/snapshot.ref` label. A `write` that returned is on disk.
#![forbid(unsafe_code)]

mod aside;
mod creation;
#[cfg(test)]
pub mod disk;
mod group;
pub(crate) mod record;
pub mod sidecar;
#[cfg(test)]
mod tests;
mod transaction;
mod trial;

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};
use redb::{Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError};

use self::aside::{Aside, Locks};
use self::group::Turns;
use self::transaction::{BY_REF, CLEANUP, IDS, META, SCANS, SNAPSHOTS};
pub use self::transaction::{Lookup, Read, Write};
use crate::types::{Quoted, SnapshotId};

const SCHEMA: &str = "schema";
const SCHEMA_VERSION: u64 = 2;
/// The first id that is certainly not reserved.
const NEXT_ID: &str = "next_id";
/// The first id that this store handed out: lower directories belong to somebody else.
const FIRST_ID: &str = "first_id";

/// So many ids are reserved by one durable write. What is left of a block at a stop is skipped.
const ID_BLOCK: u64 = 1024;
const CACHE_BYTES: usize = 3 << 20;
const RESERVE_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub enum Error {
    /// Another process has the file open.
    InUse {
        path: PathBuf,
    },
    /// Written by another version of this program.
    Schema {
        path: PathBuf,
        found: u64,
    },
    /// No store, or not all of one.
    Damaged {
        path: PathBuf,
        found: Damage,
    },
    /// A row that this program did not write.
    BadRow {
        table: &'static str,
        key: String,
    },
    Engine {
        path: PathBuf,
        cause: redb::Error,
    },
}

/// What is wrong with a file.
#[derive(Debug)]
pub enum Damage {
    Empty,
    /// A file of the engine that this program did not write.
    NoSchema,
    Engine(redb::Error),
    /// The engine gave up over it.
    Panic,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("it has 0 bytes"),
            Self::NoSchema => f.write_str("it has no schema version"),
            Self::Engine(cause) => cause.fmt(f),
            Self::Panic => f.write_str("its pages contradict each other"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse { path } => write!(f, "the metadata {} is in use by another process", path.display()),
            Self::Schema { path, found } => write!(
                f,
                "the metadata {} has schema version {found}, this program knows {SCHEMA_VERSION}: install the version that wrote it",
                path.display()
            ),
            Self::Damaged { path, found } => write!(f, "the metadata {} is damaged: {found}", path.display()),
            Self::BadRow { table, key } => {
                write!(f, "the metadata has a damaged row in table {table}, key {}", Quoted(key))
            }
            Self::Engine { path, cause } => write!(f, "cannot access the metadata {}: {cause}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// Opens the engine on wherever the metadata is.
pub type Open = Box<dyn Fn(&Builder) -> std::result::Result<Database, DatabaseError> + Send + Sync>;

pub struct Store {
    path: PathBuf,
    open: Open,
    /// A file that only takes space, until that space is needed to free more.
    reserve: PathBuf,
    /// None after a failed write, until the file is opened again.
    database: RwLock<Option<Opened>>,
    turns: Turns,
    closed: AtomicBool,
    /// Ids that are reserved and not handed out yet.
    reserved: Mutex<std::ops::Range<u64>>,
    first_id: SnapshotId,
}

impl Store {
    /// Opens or creates the store. It hands out ids above `occupied`, the highest number that
    /// already has a directory: another snapshotter's, or made after the copy of the file
    /// that somebody put back.
    pub fn open(path: &Path, occupied: Option<SnapshotId>) -> Result<Self> {
        let prepare = |path: &Path| match path.try_exists() {
            Ok(false) => Self::create(path, occupied, &[], &[]),
            _ => trial::check(path),
        };
        Self::open_with(path, engine(path), prepare, occupied)
    }

    /// As `open`, after `prepare`, wherever `engine` finds what is at `path` for people.
    pub fn open_with(
        path: &Path,
        engine: Open,
        prepare: impl Fn(&Path) -> Result<()>,
        occupied: Option<SnapshotId>,
    ) -> Result<Self> {
        let reserve = path.with_extension("reserve");
        let open = || -> Result<_> {
            prepare(path)?;
            let database = open_database(path, &engine)?;
            let first_id = initialise(&database, occupied).map_err(|e| e.at(path))?;
            Ok((database, first_id))
        };
        let (database, first_id) = match open() {
            Err(e) if e.is_full_disk() && fs::remove_file(&reserve).is_ok() => open()?,
            result => result?,
        };
        let store = Self {
            path: path.to_owned(),
            open: engine,
            reserve,
            database: RwLock::new(Some(Opened { database, frozen: false })),
            turns: Turns::default(),
            closed: AtomicBool::new(false),
            reserved: Mutex::new(0..0),
            first_id: SnapshotId(first_id),
        };
        store.go_on_numbering()?;
        store.restore_reserve();
        Ok(store)
    }

    /// Whether a store was open at `path` once, as far as what lies beside it tells.
    pub fn was_at(path: &Path) -> bool {
        path.with_extension("reserve").exists()
    }

    /// As `write`, for what frees space: it works on a full disk as well, because space was
    /// put by for it.
    pub fn write_to_free<T, E: From<Error> + FullDisk>(
        &self,
        body: impl Fn(&Write) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        match self.write(&body) {
            Err(e) if e.is_full_disk() && fs::remove_file(&self.reserve).is_ok() => {
                log::warn!("the disk of {} is full: the space put by for removals is used", self.path.display());
                self.write(&body)
            }
            result => result,
        }
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
            *reserved = self.write(|tx| {
                let mut meta = tx.open(META)?;
                let next = meta.get(NEXT_ID).map_err(|e| tx.error(e))?.map_or(1, |n| n.value());
                meta.insert(NEXT_ID, next + ID_BLOCK).map_err(|e| tx.error(e))?;
                Ok::<_, Error>(next..next + ID_BLOCK)
            })?;
        }
        let id = reserved.start;
        reserved.start += 1;
        Ok(SnapshotId(id))
    }

    /// A consistent view. It blocks nobody and nobody blocks it.
    pub fn read<T, E: From<Error>>(
        &self,
        body: impl FnOnce(&Read) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.ensure_open(For::Reading)?;
        let database = self.database.read();
        let transaction = database
            .as_ref()
            .ok_or_else(|| self.error(StorageError::DatabaseClosed))?
            .database
            .begin_read()
            .map_err(|e| self.error(e))?;
        body(&Read { transaction, path: &self.path })
    }

    fn ensure_open(&self, purpose: For) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(self.error(StorageError::DatabaseClosed));
        }
        if self.database.read().as_ref().is_some_and(|opened| opened.is_for(purpose)) {
            return Ok(());
        }
        let mut database = self.database.write();
        if database.as_ref().is_some_and(|opened| opened.is_for(purpose)) {
            return Ok(());
        }
        match open_database(&self.path, &self.open) {
            Ok(reopened) => {
                *database = Some(Opened { database: reopened, frozen: false });
                log::warn!("the metadata {} was opened again after a failed write", self.path.display());
                Ok(())
            }
            Err(cause) if purpose == For::Writing => Err(cause),
            // It cannot even be opened, because that takes a write as well.
            Err(cause) => {
                let file = File::open(&self.path).map_err(|e| self.error(StorageError::Io(e)))?;
                let frozen = Aside::new(file, Locks::Left).map_err(|e| self.error(e))?;
                let frozen = builder().create_with_backend(frozen).map_err(|e| self.error(e))?;
                log::error!("{cause}; what was written before can be read, and nothing can be changed");
                *database = Some(Opened { database: frozen, frozen: true });
                Ok(())
            }
        }
    }

    fn close(&self) {
        *self.database.write() = None;
    }

    fn error(&self, cause: impl Into<redb::Error>) -> Error {
        Error::Engine { path: self.path.clone(), cause: cause.into() }
    }
}

/// Whether an error means that the disk is full, or that all is used that a quota allows of it.
pub trait FullDisk {
    fn is_full_disk(&self) -> bool;
}

impl FullDisk for Error {
    fn is_full_disk(&self) -> bool {
        let Self::Engine { cause: redb::Error::Io(cause), .. } = self else { return false };
        let errno = cause.raw_os_error().map(Errno::from_raw);
        matches!(errno, Some(Errno::ENOSPC | Errno::EDQUOT))
    }
}

/// The engine, open.
struct Opened {
    database: Database,
    /// It can only be read: what is written stays in memory.
    frozen: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    Reading,
    Writing,
}

impl Opened {
    fn is_for(&self, purpose: For) -> bool {
        purpose == For::Reading || !self.frozen
    }
}

/// The engine on a file.
fn engine(path: &Path) -> Open {
    let file = path.to_owned();
    Box::new(move |builder| builder.create(&file))
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn open_database(path: &Path, open: &Open) -> Result<Database> {
    open(&builder()).map_err(|cause| match cause {
        DatabaseError::DatabaseAlreadyOpen => Error::InUse { path: path.to_owned() },
        cause => Error::Engine { path: path.to_owned(), cause: cause.into() },
    })
}

enum Initialise {
    Schema(u64),
    Engine(redb::Error),
}

impl Initialise {
    fn at(self, path: &Path) -> Error {
        match self {
            Self::Schema(found) => Error::Schema { path: path.to_owned(), found },
            Self::Engine(cause) => Error::Engine { path: path.to_owned(), cause },
        }
    }
}

impl<E: Into<redb::Error>> From<E> for Initialise {
    fn from(e: E) -> Self {
        Self::Engine(e.into())
    }
}

/// Creates the tables of a new store; the result is its first id.
fn initialise(database: &Database, occupied: Option<SnapshotId>) -> std::result::Result<u64, Initialise> {
    let above = occupied.map_or(1, |id| id.0.saturating_add(1));
    // A start that has nothing to write must not need space.
    let read = database.begin_read()?;
    if let (Ok(meta), Ok(_)) = (read.open_table(META), read.open_table(SCANS))
        && meta.get(SCHEMA)?.is_some_and(|v| v.value() == SCHEMA_VERSION)
        && meta.get(NEXT_ID)?.is_some_and(|v| v.value() >= above)
    {
        return Ok(meta.get(FIRST_ID)?.map_or(1, |v| v.value()));
    }
    let transaction = database.begin_write()?;
    let first_id;
    {
        let mut meta = transaction.open_table(META)?;
        let schema = meta.get(SCHEMA)?.map(|v| v.value());
        match schema {
            Some(SCHEMA_VERSION) => first_id = meta.get(FIRST_ID)?.map_or(1, |v| v.value()),
            Some(other) => return Err(Initialise::Schema(other)),
            None => {
                first_id = above;
                meta.insert(SCHEMA, SCHEMA_VERSION)?;
                meta.insert(FIRST_ID, first_id)?;
            }
        }
        let next_id = meta.get(NEXT_ID)?.map_or(1, |v| v.value());
        meta.insert(NEXT_ID, next_id.max(above))?;
    }
    transaction.open_table(SNAPSHOTS)?;
    transaction.open_table(IDS)?;
    transaction.open_table(BY_REF)?;
    transaction.open_table(CLEANUP)?;
    transaction.open_table(SCANS)?;
    transaction.commit()?;
    Ok(first_id)
}
