//! The metadata: an embedded transactional store behind typed operations.
//!
//! Knows records and their indexes, not containerd's rules and not the file system.
//! Invariants, kept inside each transaction: every snapshot has one row in `snapshots` and
//! one in `keys`; `children` counts who names it as parent; `by_ref` has a row for every
//! snapshot with a `containerd.io/snapshot.ref` label. A `write` that returned is on disk.
#![forbid(unsafe_code)]

mod record;

use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, StorageError, TableDefinition, Value,
    WriteTransaction,
};

use crate::repository::scan::{Extent, Scan, Subject};
use crate::types::{Key, Kind, LABEL_SNAPSHOT_REF, Quoted, Rootfs, Snapshot, SnapshotId};

/// Counters and the schema version, by name.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Snapshot key to `SnapshotRecord`.
const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
/// Snapshot id to its key.
const KEYS: TableDefinition<u64, &str> = TableDefinition::new("keys");
/// Snapshot id to the number of its children, and of those children that are live: active,
/// a view, or committed with a live child. Rows of zeros are left out.
const CHILDREN: TableDefinition<u64, (u64, u64)> = TableDefinition::new("children");
/// `(snapshot.ref, parent key or "", key)`: what containerd asks after every remote layer.
const BY_REF: TableDefinition<(&str, &str, &str), ()> = TableDefinition::new("by_ref");
/// Ids that may have something on disk that nothing needs any more, and whether a cleanup
/// has begun with them.
const CLEANUP: TableDefinition<u64, bool> = TableDefinition::new("cleanup");
/// `<extent> <digest> <repository>` to `LayerScan`.
const SCANS: TableDefinition<&str, &[u8]> = TableDefinition::new("scans");
/// Id of the uppermost snapshot of a chain to `RootfsChoice`.
const ROOTFS: TableDefinition<u64, &[u8]> = TableDefinition::new("rootfs");

const SCHEMA: &str = "schema";
const SCHEMA_VERSION: u64 = 1;
/// The first id that is certainly not reserved.
const NEXT_ID: &str = "next_id";
/// The first id that this store handed out: lower directories belong to somebody else.
const FIRST_ID: &str = "first_id";

/// So many ids are reserved by one durable write. What is left of a block at a stop is skipped.
const ID_BLOCK: u64 = 64;
const CACHE_BYTES: usize = 16 << 20;
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

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse { path } => write!(f, "the metadata {} is in use by another process", path.display()),
            Self::Schema { path, found } => write!(
                f,
                "the metadata {} has schema version {found}, this program knows {SCHEMA_VERSION}: install the version that wrote it",
                path.display()
            ),
            Self::BadRow { table, key } => {
                write!(f, "the metadata has a damaged row in table {table}, key {}", Quoted(key))
            }
            Self::Engine { path, cause } => write!(f, "cannot access the metadata {}: {cause}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

pub struct Store {
    path: PathBuf,
    /// A file that only takes space, until that space is needed to free more.
    reserve: PathBuf,
    /// None after a failed write, until the file could be opened again.
    database: RwLock<Option<Database>>,
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
        let reserve = path.with_extension("reserve");
        let open = || -> Result<_> {
            let database = open_database(path)?;
            let first_id = initialise(&database, occupied).map_err(|e| match e {
                Initialise::Schema(found) => Error::Schema { path: path.to_owned(), found },
                Initialise::Engine(cause) => Error::Engine { path: path.to_owned(), cause },
            })?;
            Ok((database, first_id))
        };
        let (database, first_id) = match open() {
            Err(e) if e.is_full_disk() && fs::remove_file(&reserve).is_ok() => open()?,
            result => result?,
        };
        let store = Self {
            path: path.to_owned(),
            reserve,
            database: RwLock::new(Some(database)),
            closed: AtomicBool::new(false),
            reserved: Mutex::new(0..0),
            first_id: SnapshotId(first_id),
        };
        store.restore_reserve();
        Ok(store)
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
        self.ensure_open()?;
        let database = self.database.read();
        let transaction = database
            .as_ref()
            .ok_or_else(|| self.error(StorageError::DatabaseClosed))?
            .begin_read()
            .map_err(|e| self.error(e))?;
        body(&Read { transaction, path: &self.path })
    }

    /// All of `body` or nothing of it. `body` may run a second time, on a fresh transaction,
    /// when the engine had to be opened again.
    pub fn write<T, E: From<Error>>(
        &self,
        body: impl Fn(&Write) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        for last in [false, true] {
            self.ensure_open()?;
            let result = self.try_write(&body);
            match result {
                Attempt::Done(result) => return result,
                // The engine refuses everything after a write failed (a full disk, say) until
                // its file is opened anew. Only the first call that notices has to try again.
                Attempt::Failed(error) => {
                    let stale = matches!(error, Error::Engine { cause: redb::Error::PreviousIo, .. });
                    self.close();
                    if !stale || last {
                        return Err(error.into());
                    }
                }
            }
        }
        unreachable!("the second attempt returns")
    }

    fn try_write<T, E: From<Error>>(&self, body: &impl Fn(&Write) -> std::result::Result<T, E>) -> Attempt<T, E> {
        let database = self.database.read();
        let Some(database) = database.as_ref() else {
            return Attempt::Failed(self.error(StorageError::DatabaseClosed));
        };
        let transaction = match database.begin_write() {
            Ok(transaction) => transaction,
            Err(e) => return Attempt::Failed(self.error(e)),
        };
        let write = Write { transaction, path: &self.path };
        // A panic must not leave the engine with a transaction that nobody ends.
        match catch_unwind(AssertUnwindSafe(|| body(&write))) {
            Ok(Ok(value)) => match write.transaction.commit() {
                Ok(()) => Attempt::Done(Ok(value)),
                Err(e) => Attempt::Failed(self.error(e)),
            },
            Ok(Err(refused)) => match write.transaction.abort() {
                Ok(()) => Attempt::Done(Err(refused)),
                Err(e) => Attempt::Failed(self.error(e)),
            },
            Err(panic) => {
                if let Err(e) = write.transaction.abort() {
                    log::error!("{}", self.error(e));
                }
                resume_unwind(panic)
            }
        }
    }

    fn ensure_open(&self) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(self.error(StorageError::DatabaseClosed));
        }
        if self.database.read().is_some() {
            return Ok(());
        }
        let mut database = self.database.write();
        if database.is_none() {
            *database = Some(open_database(&self.path)?);
            log::warn!("the metadata {} was opened again after a failed write", self.path.display());
        }
        Ok(())
    }

    fn close(&self) {
        *self.database.write() = None;
    }

    /// As at the end of the process: nothing can be read or written any more.
    pub fn close_for_good(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.close();
    }

    fn error(&self, cause: impl Into<redb::Error>) -> Error {
        Error::Engine { path: self.path.clone(), cause: cause.into() }
    }
}

/// Whether an error means that the disk is full.
pub trait FullDisk {
    fn is_full_disk(&self) -> bool;
}

impl FullDisk for Error {
    fn is_full_disk(&self) -> bool {
        let Self::Engine { cause: redb::Error::Io(cause), .. } = self else { return false };
        cause.raw_os_error() == Some(nix::errno::Errno::ENOSPC as i32)
    }
}

enum Attempt<T, E> {
    /// Committed, or refused by the body and undone.
    Done(std::result::Result<T, E>),
    /// The engine failed; nothing was written.
    Failed(Error),
}

fn open_database(path: &Path) -> Result<Database> {
    redb::Builder::new().set_cache_size(CACHE_BYTES).create(path).map_err(|cause| match cause {
        DatabaseError::DatabaseAlreadyOpen => Error::InUse { path: path.to_owned() },
        cause => Error::Engine { path: path.to_owned(), cause: cause.into() },
    })
}

enum Initialise {
    Schema(u64),
    Engine(redb::Error),
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
    if let (Ok(meta), Ok(_)) = (read.open_table(META), read.open_table(ROOTFS))
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
    transaction.open_table(KEYS)?;
    transaction.open_table(CHILDREN)?;
    transaction.open_table(BY_REF)?;
    transaction.open_table(CLEANUP)?;
    transaction.open_table(SCANS)?;
    transaction.open_table(ROOTFS)?;
    transaction.commit()?;
    Ok(first_id)
}

/// A read transaction.
pub struct Read<'s> {
    transaction: ReadTransaction,
    path: &'s Path,
}

/// A write transaction; what it wrote, it reads.
pub struct Write<'s> {
    transaction: WriteTransaction,
    path: &'s Path,
}

/// What can be asked inside either kind of transaction.
pub trait Lookup {
    #[doc(hidden)]
    fn table<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<impl ReadableTable<K, V> + '_>;

    #[doc(hidden)]
    fn error(&self, cause: impl Into<redb::Error>) -> Error;

    fn get(&self, key: &str) -> Result<Option<Snapshot>> {
        let snapshots = self.table(SNAPSHOTS)?;
        let row = snapshots.get(key).map_err(|e| self.error(e))?;
        row.map(|row| record::decode_snapshot(key, row.value())).transpose()
    }

    /// The snapshot `key` and all its ancestors, nearest first. Empty when there is none.
    fn chain(&self, key: &Key) -> Result<Vec<Snapshot>> {
        let snapshots = self.table(SNAPSHOTS)?;
        let mut chain: Vec<Snapshot> = Vec::new();
        let mut next = Some(key.clone());
        while let Some(key) = next.take() {
            let Some(row) = snapshots.get(key.as_str()).map_err(|e| self.error(e))? else { break };
            let snapshot = record::decode_snapshot(key.as_str(), row.value())?;
            next.clone_from(&snapshot.parent);
            chain.push(snapshot);
        }
        Ok(chain)
    }

    fn has_children(&self, id: SnapshotId) -> Result<bool> {
        Ok(self.children(id)?.0 > 0)
    }

    /// Whether an active snapshot or a view stands on this one, however far above.
    fn is_live(&self, id: SnapshotId) -> Result<bool> {
        Ok(self.children(id)?.1 > 0)
    }

    #[doc(hidden)]
    fn children(&self, id: SnapshotId) -> Result<(u64, u64)> {
        let table = self.table(CHILDREN)?;
        let row = table.get(id.0).map_err(|e| self.error(e))?;
        Ok(row.map_or((0, 0), |row| row.value()))
    }

    fn exists(&self, id: SnapshotId) -> Result<bool> {
        let keys = self.table(KEYS)?;
        let row = keys.get(id.0).map_err(|e| self.error(e))?;
        Ok(row.is_some())
    }

    fn by_id(&self, id: SnapshotId) -> Result<Option<Snapshot>> {
        let key = {
            let keys = self.table(KEYS)?;
            let row = keys.get(id.0).map_err(|e| self.error(e))?;
            row.map(|row| row.value().to_owned())
        };
        key.map_or(Ok(None), |key| self.get(&key))
    }

    /// The snapshots with this `snapshot.ref` label and this parent ("" for none).
    fn by_ref(&self, reference: &str, parent: &str) -> Result<Vec<Snapshot>> {
        let index = self.table(BY_REF)?;
        let snapshots = self.table(SNAPSHOTS)?;
        let mut found = Vec::new();
        for row in index.range((reference, parent, "")..).map_err(|e| self.error(e))? {
            let (row, _) = row.map_err(|e| self.error(e))?;
            let (row_reference, row_parent, key) = row.value();
            if (row_reference, row_parent) != (reference, parent) {
                break;
            }
            if let Some(row) = snapshots.get(key).map_err(|e| self.error(e))? {
                found.push(record::decode_snapshot(key, row.value())?);
            }
        }
        Ok(found)
    }

    /// Calls `each` for every snapshot.
    fn for_each(&self, mut each: impl FnMut(Snapshot)) -> Result<()> {
        for row in self.table(SNAPSHOTS)?.iter().map_err(|e| self.error(e))? {
            let (key, value) = row.map_err(|e| self.error(e))?;
            each(record::decode_snapshot(key.value(), value.value())?);
        }
        Ok(())
    }

    /// Whether `id` is on the list for cleanup.
    fn is_scheduled(&self, id: SnapshotId) -> Result<bool> {
        let table = self.table(CLEANUP)?;
        let row = table.get(id.0).map_err(|e| self.error(e))?;
        Ok(row.is_some())
    }

    fn scan(&self, subject: &Subject) -> Result<Option<Scan>> {
        let scans = self.table(SCANS)?;
        let key = scan_key(subject);
        let row = scans.get(key.as_str()).map_err(|e| self.error(e))?;
        row.map_or(Ok(None), |row| record::decode_scan(&key, row.value()))
    }

    /// What was decided for the chain below and with snapshot `id`.
    fn rootfs(&self, id: SnapshotId) -> Result<Option<Rootfs>> {
        let table = self.table(ROOTFS)?;
        let row = table.get(id.0).map_err(|e| self.error(e))?;
        row.map(|row| record::decode_rootfs(id, row.value())).transpose()
    }
}

impl Lookup for Read<'_> {
    fn table<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<impl ReadableTable<K, V> + '_> {
        self.transaction.open_table(definition).map_err(|e| self.error(e))
    }

    fn error(&self, cause: impl Into<redb::Error>) -> Error {
        Error::Engine { path: self.path.to_owned(), cause: cause.into() }
    }
}

impl Lookup for Write<'_> {
    fn table<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<impl ReadableTable<K, V> + '_> {
        self.open(definition)
    }

    fn error(&self, cause: impl Into<redb::Error>) -> Error {
        Error::Engine { path: self.path.to_owned(), cause: cause.into() }
    }
}

impl Write<'_> {
    fn open<K: redb::Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<K, V>,
    ) -> Result<redb::Table<'_, K, V>> {
        self.transaction.open_table(definition).map_err(|e| self.error(e))
    }

    /// Adds a snapshot that has no children. Its key and its id must be free.
    pub fn insert(&self, snapshot: &Snapshot) -> Result<()> {
        self.put(snapshot)?;
        self.open(KEYS)?.insert(snapshot.id.0, snapshot.key.as_str()).map_err(|e| self.error(e))?;
        self.count_child(snapshot, 1)
    }

    /// Takes away a snapshot that has no children.
    pub fn remove(&self, snapshot: &Snapshot) -> Result<()> {
        self.open(SNAPSHOTS)?.remove(snapshot.key.as_str()).map_err(|e| self.error(e))?;
        self.unindex(snapshot)?;
        self.open(KEYS)?.remove(snapshot.id.0).map_err(|e| self.error(e))?;
        if snapshot.layer.is_some() {
            self.open(ROOTFS)?.remove(snapshot.id.0).map_err(|e| self.error(e))?;
        }
        self.count_child(snapshot, -1)
    }

    /// Stores `new`, which differs from `old` in labels, times or usage only.
    pub fn update(&self, old: &Snapshot, new: &Snapshot) -> Result<()> {
        debug_assert!(old.id == new.id && old.key == new.key && old.parent == new.parent && old.kind == new.kind);
        self.unindex(old)?;
        self.put(new)
    }

    fn put(&self, snapshot: &Snapshot) -> Result<()> {
        let record = record::encode_snapshot(snapshot);
        self.open(SNAPSHOTS)?.insert(snapshot.key.as_str(), record.as_slice()).map_err(|e| self.error(e))?;
        if let Some(row) = index_row(snapshot) {
            self.open(BY_REF)?.insert(row, ()).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    fn unindex(&self, snapshot: &Snapshot) -> Result<()> {
        if let Some(row) = index_row(snapshot) {
            self.open(BY_REF)?.remove(row).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    /// Counts `child` up or down at its parent. Where that makes an ancestor live, or ends
    /// it, the next ancestor counts on; a remote layer that nothing stands on any more is
    /// put on the list for cleanup. So the cost is one row, mostly, however long the chain.
    fn count_child(&self, child: &Snapshot, step: i64) -> Result<()> {
        let mut children_step = step;
        let live_step = match child.kind {
            Kind::Committed => 0,
            Kind::Active | Kind::View => step,
        };
        let mut next = child.parent.clone();
        while let Some(key) = next {
            // Callers have looked; and if it were missing, the child could be removed all the same.
            let Some(parent) = self.get(key.as_str())? else { break };
            let (children, live) = self.children(parent.id)?;
            let counted = (children.saturating_add_signed(children_step), live.saturating_add_signed(live_step));
            {
                let mut table = self.open(CHILDREN)?;
                if counted == (0, 0) {
                    table.remove(parent.id.0).map_err(|e| self.error(e))?;
                } else {
                    table.insert(parent.id.0, counted).map_err(|e| self.error(e))?;
                }
            }
            if (live > 0) == (counted.1 > 0) {
                break;
            }
            if counted.1 == 0 && parent.layer.is_some() {
                self.schedule_cleanup(&[parent.id])?;
            }
            children_step = 0;
            next = parent.parent;
        }
        Ok(())
    }

    pub fn schedule_cleanup(&self, ids: &[SnapshotId]) -> Result<()> {
        let mut table = self.open(CLEANUP)?;
        for id in ids {
            table.insert(id.0, false).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    /// Up to `limit` ids of the list that no cleanup has begun with. They stay on it, so that
    /// a crash does not lose them.
    pub fn begin_cleanup(&self, limit: usize) -> Result<Vec<SnapshotId>> {
        let mut table = self.open(CLEANUP)?;
        let mut begun = Vec::new();
        for row in table.iter().map_err(|e| self.error(e))? {
            let (id, is_begun) = row.map_err(|e| self.error(e))?;
            if !is_begun.value() {
                begun.push(SnapshotId(id.value()));
                if begun.len() == limit {
                    break;
                }
            }
        }
        for id in &begun {
            table.insert(id.0, true).map_err(|e| self.error(e))?;
        }
        Ok(begun)
    }

    /// Takes ids off the list with which a cleanup is through, unless they were put on it
    /// again meanwhile.
    pub fn finish_cleanup(&self, ids: &[SnapshotId]) -> Result<()> {
        let mut table = self.open(CLEANUP)?;
        for id in ids {
            table.retain_in(id.0..=id.0, |_, is_begun| !is_begun).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    /// What a cleanup had begun with when it failed or was killed is to be done again.
    pub fn forget_begun_cleanups(&self) -> Result<()> {
        let mut table = self.open(CLEANUP)?;
        let begun: Vec<u64> = table
            .iter()
            .map_err(|e| self.error(e))?
            .filter_map(|row| row.map(|(id, is_begun)| is_begun.value().then(|| id.value())).transpose())
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| self.error(e))?;
        for id in begun {
            table.insert(id, false).map_err(|e| self.error(e))?;
        }
        Ok(())
    }

    pub fn put_scan(&self, subject: &Subject, scan: &Scan) -> Result<()> {
        let record = record::encode_scan(scan);
        self.open(SCANS)?.insert(scan_key(subject).as_str(), record.as_slice()).map_err(|e| self.error(e))?;
        Ok(())
    }

    /// Forgets the scans whose digests `is_needed` does not know.
    pub fn prune_scans(&self, is_needed: impl Fn(&str) -> bool) -> Result<()> {
        let mut table = self.open(SCANS)?;
        table.retain(|key, _| key.split(' ').nth(1).is_some_and(&is_needed)).map_err(|e| self.error(e))
    }

    pub fn put_rootfs(&self, id: SnapshotId, rootfs: &Rootfs) -> Result<()> {
        let record = record::encode_rootfs(rootfs);
        self.open(ROOTFS)?.insert(id.0, record.as_slice()).map_err(|e| self.error(e))?;
        Ok(())
    }
}

fn scan_key(subject: &Subject) -> String {
    let extent = match subject.extent {
        Extent::Layer => "layer",
        Extent::Bottom => "bottom",
        Extent::Flat => "flat",
    };
    format!("{extent} {} {}", subject.digest, subject.repository)
}

fn index_row(snapshot: &Snapshot) -> Option<(&str, &str, &str)> {
    let reference = snapshot.labels.get(LABEL_SNAPSHOT_REF)?;
    Some((reference, snapshot.parent.as_ref().map_or("", Key::as_str), snapshot.key.as_str()))
}
