//! The file of the metadata: how it is made, looked at before it is trusted, and opened.
//!
//! It is built beside its place and renamed, so what stands at its place was complete once: a
//! file there that is not a store is a damaged one, and never one that is just being made.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::transaction::{ReadTxn, WriteTxn};
use super::{Error, Result, Store, use_reserve};
use crate::model::{Snapshot, SnapshotId};

/// In the head of each file: "cvms".
const APPLICATION: i32 = 0x6376_6d73;
pub(super) const SCHEMA_VERSION: i32 = 1;

const SCHEMA: &str = include_str!("schema.sql");

/// SQLite's interface to the file system that keeps the file for this process alone, and the index of the write-ahead log
/// in its memory. The usual one maps a file for it, and a full disk that has no block for a page of that file ends the
/// process with SIGBUS.
const VFS: &str = "unix-excl";
/// How long a start waits for another program that has the file open.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const PAGE: u64 = 4096;
const FOREIGN: &str = "it is not the metadata of this program";

/// KiB of pages that a connection keeps. The kernel has the file in memory as well.
const WRITER_CACHE_KIB: u32 = 2048;
pub(super) const READER_CACHE_KIB: u32 = 256;
/// Size to which the write-ahead log is cut when it begins anew.
const LOG_SIZE_LIMIT: u32 = 4 << 20;
/// The write-ahead log is written into the file when it has this number of pages. They fit into the reserve
/// (`RESERVE_BYTES`), so any number of removals fits, too.
const CHECKPOINT_PAGES: u32 = 128;
/// Size that the write-ahead log has from the start on, with half as many pages again: on a full disk it cannot grow.
pub(super) const WAL_BYTES: u64 = 192 * (PAGE + 24) + WAL_HEAD as u64;
/// Without it, SQLite takes a write-ahead log for an empty one.
const WAL_HEAD: usize = 32;

impl Store {
    /// Whether the file at `path` is a whole store of this program's schema. It is not changed.
    pub fn check(path: &Path) -> Result<()> {
        let wal = Self::wal_of(path);
        let had_wal = wal.exists();
        let result = check_file(path);
        if result.is_err() && !had_wal {
            // SQLite made it to look at the file.
            let _ = remove(&wal);
        }
        result
    }

    /// The write-ahead log of the metadata at `path`: what is not written into the file yet.
    pub fn wal_of(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push("-wal");
        name.into()
    }

    /// Makes a store with `snapshots`, parents before children, and with `leftovers` on the list for cleanup. As with
    /// `open`, it hands out ids above `occupied`; theirs must not be higher. What was at `path` before is replaced.
    pub fn create(
        path: &Path,
        occupied: Option<SnapshotId>,
        snapshots: &[Snapshot],
        leftovers: &[SnapshotId],
    ) -> Result<()> {
        match Self::try_create(path, occupied, snapshots, leftovers) {
            Err(e) if e.is_full_disk() && use_reserve(path) => Self::try_create(path, occupied, snapshots, leftovers),
            result => result,
        }
    }

    fn try_create(
        path: &Path,
        occupied: Option<SnapshotId>,
        snapshots: &[Snapshot],
        leftovers: &[SnapshotId],
    ) -> Result<()> {
        let new = path.with_extension("new");
        let failed = |cause: io::Error| failed(path, &cause);
        // A process that died while it made new metadata left these files.
        remove(&new).and_then(|()| remove(&Self::wal_of(&new))).map_err(failed)?;
        let put_in_place = || {
            // SQLite made it, and nothing is in it.
            remove(&Self::wal_of(&new))?;
            // The old file is removed before its log, because a start could take a file without its log for a whole one.
            remove(path)?;
            remove(&Self::wal_of(path))?;
            sync_directory(path)?;
            fs::rename(&new, path)?;
            sync_directory(path)
        };
        let result = fill(&new, occupied, snapshots, leftovers).and_then(|()| put_in_place().map_err(failed));
        if result.is_err() {
            // The first failure is the one to tell.
            let _ = remove(&new).and_then(|()| remove(&Self::wal_of(&new)));
        }
        result
    }
}

fn check_file(path: &Path) -> Result<()> {
    let found = fs::metadata(path).map_err(|cause| failed(path, &cause))?;
    if !found.is_file() {
        return Err(Error::damaged(path, "it is no regular file"));
    }
    let (length, has_log) = (found.len(), has_log(path));
    // SQLite would take it for a new database, and remove the log beside it.
    if length < PAGE {
        return Err(Error::damaged(path, &format!("it has {length} bytes")));
    }
    check_content(path)?;
    // SQLite reads a page that is cut as if zeros followed. If something is in the log, the page may be there.
    if !length.is_multiple_of(PAGE) && !has_log {
        return Err(Error::damaged(path, "it ends within a page"));
    }
    Ok(())
}

fn check_content(path: &Path) -> Result<()> {
    let connection = connect(path, OpenFlags::empty())?;
    let failed = |cause: rusqlite::Error| match cause.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => Error::damaged(path, FOREIGN),
        // SQLite says so of a schema that cannot be read, for example.
        Some(ErrorCode::Unknown) => Error::damaged(path, &cause.to_string()),
        _ => Error::from_sqlite(path, &connection, &cause),
    };
    // Before anything is read: otherwise the end of this connection would write the log into the file.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(failed)?;
    let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    if number("PRAGMA application_id").map_err(failed)? != i64::from(APPLICATION) {
        return Err(Error::damaged(path, FOREIGN));
    }
    let version = number("PRAGMA user_version").map_err(failed)?;
    if version != i64::from(SCHEMA_VERSION) {
        return Err(Error::Schema { path: path.to_owned(), found: version });
    }
    if statements(&connection).map_err(failed)? != expected_statements().map_err(failed)? {
        return Err(Error::damaged(path, FOREIGN));
    }
    match strings(&connection, "PRAGMA integrity_check(1)").map_err(failed)?.pop() {
        Some(sound) if sound == "ok" => {}
        // The lines before say which database it is.
        report => return Err(Error::damaged(path, report.unwrap_or_default().lines().last().unwrap_or_default())),
    }
    if !strings(&connection, "PRAGMA foreign_key_check").map_err(failed)?.is_empty() {
        return Err(Error::damaged(path, "a snapshot's parent is missing"));
    }
    check_rows(path, &connection)
}

/// Whether this program can have written each row that a start reads. SQLite has no sums over what is in a row.
fn check_rows(path: &Path, connection: &Connection) -> Result<()> {
    let read = ReadTxn::new(connection, path);
    read.numbers().and_then(|_| read.for_each(|_| {}))
}

/// The statements that make the schema of a database. A copy that VACUUM made has them in another order, and ANALYZE adds
/// tables.
fn statements(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    const SQL: &str =
        "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_stat%' ORDER BY name";
    strings(connection, SQL)
}

fn expected_statements() -> rusqlite::Result<Vec<String>> {
    let empty = Connection::open_in_memory()?;
    empty.execute_batch(SCHEMA)?;
    statements(&empty)
}

fn strings(connection: &Connection, sql: &str) -> rusqlite::Result<Vec<String>> {
    connection.prepare(sql)?.query_map([], |row| row.get(0))?.collect()
}

fn failed(path: &Path, cause: &io::Error) -> Error {
    let errno = cause.raw_os_error().map(Errno::from_raw);
    Error::Access { path: path.to_owned(), cause: cause.to_string(), errno }
}

fn fill(path: &Path, occupied: Option<SnapshotId>, snapshots: &[Snapshot], leftovers: &[SnapshotId]) -> Result<()> {
    let connection = open_with(path, OpenFlags::SQLITE_OPEN_CREATE, WRITER_CACHE_KIB)?;
    let failed = |cause| Error::from_sqlite(path, &connection, &cause);
    // Nobody sees the file before it is whole.
    connection.execute_batch(&format!("PRAGMA journal_mode = MEMORY; BEGIN; {SCHEMA}")).map_err(failed)?;
    connection.execute("INSERT INTO numbers VALUES (?1, ?1)", [first_free(occupied)]).map_err(failed)?;
    let write = WriteTxn::new(&connection, path);
    snapshots.iter().try_for_each(|snapshot| write.insert(snapshot))?;
    write.schedule_cleanup(leftovers)?;
    let end = format!(
        "PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT; PRAGMA journal_mode = WAL;"
    );
    connection.execute_batch(&end).map_err(failed)?;
    connection.close().map_err(|(connection, cause)| Error::from_sqlite(path, &connection, &cause))?;
    File::open(path).and_then(|file| file.sync_all()).map_err(|cause| self::failed(path, &cause))
}

/// The first id above those that have a directory.
pub(super) fn first_free(occupied: Option<SnapshotId>) -> SnapshotId {
    SnapshotId(occupied.map_or(0, |id| id.0) + 1)
}

pub(super) fn open_writer(path: &Path) -> Result<Connection> {
    let connection = open(path, WRITER_CACHE_KIB)?;
    // A copy that VACUUM made is not in WAL mode.
    let mode: rusqlite::Result<String> = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0));
    match mode.map_err(|cause| Error::from_sqlite(path, &connection, &cause))?.as_str() {
        "wal" => Ok(connection),
        mode => {
            let cause = format!("it cannot have a write-ahead log, its journal mode is {mode}");
            Err(Error::Access { path: path.to_owned(), cause, errno: None })
        }
    }
}

pub(super) fn open(path: &Path, cache_kib: u32) -> Result<Connection> {
    open_with(path, OpenFlags::empty(), cache_kib)
}

fn open_with(path: &Path, more: OpenFlags, cache_kib: u32) -> Result<Connection> {
    let connection = connect(path, more)?;
    configure(&connection, cache_kib).map_err(|cause| Error::from_sqlite(path, &connection, &cause))?;
    Ok(connection)
}

fn connect(path: &Path, more: OpenFlags) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
    Connection::open_with_flags_and_vfs(path, flags, VFS).map_err(|cause| {
        let errno = Some(Errno::last()).filter(|_| cause.sqlite_error_code() == Some(ErrorCode::CannotOpen));
        Error::access(path, &cause, errno)
    })
}

fn configure(connection: &Connection, cache_kib: u32) -> rusqlite::Result<()> {
    connection.busy_timeout(LOCK_WAIT)?;
    connection.set_prepared_statement_cache_capacity(64);
    // The log keeps its blocks. `Store::close_for_good` empties it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.execute_batch(&format!(
        "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY;
         PRAGMA cache_size = -{cache_kib}; PRAGMA journal_size_limit = {LOG_SIZE_LIMIT};
         PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};"
    ))
}

/// Whether the write-ahead log has anything that SQLite would read. It is made by SQLite when it opens the file.
fn has_log(path: &Path) -> bool {
    let mut head = [0; WAL_HEAD];
    let read = File::open(Store::wal_of(path)).and_then(|mut wal| wal.read_exact(&mut head));
    read.is_ok() && head != [0; WAL_HEAD]
}

/// Gives the write-ahead log the blocks that it will need, behind what is in it.
pub(super) fn allocate_wal(path: &Path) -> io::Result<()> {
    let mut wal = OpenOptions::new().create(true).append(true).open(Store::wal_of(path))?;
    let missing = WAL_BYTES.saturating_sub(wal.metadata()?.len());
    wal.write_all(&vec![0; usize::try_from(missing).unwrap_or(0)])
}

/// Empties the write-ahead log, which is written into the file, and keeps its blocks. A log that can be read would be
/// taken for that of whatever file is put in the place of this one.
pub(super) fn clear_wal(path: &Path) -> io::Result<()> {
    let mut wal = OpenOptions::new().write(true).open(Store::wal_of(path))?;
    wal.write_all(&[0; WAL_HEAD])?;
    wal.sync_data()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
