//! The file of the metadata: creating it, checking it before it is trusted, and opening it.
//!
//! A new file is built under another name and renamed. A file in its place was complete once, so one that is not a store
//! is damaged, and never one that is still being created.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::transaction::{ReadTxn, WriteTxn};
use super::{Error, Result, Store, with_reserve};
use crate::model::{Snapshot, SnapshotId};

/// SQLite's application id, "cvms".
const APPLICATION_ID: i32 = 0x6376_6d73;
pub(super) const SCHEMA_VERSION: i32 = 1;

const SCHEMA: &str = include_str!("schema.sql");

/// SQLite's interface to the file system that locks the file for this process and keeps the index of the write-ahead log
/// in memory. The default one maps a file for that index, and on a full disk the process dies of SIGBUS.
const VFS: &str = "unix-excl";
/// How long a start waits for another program that has the file open.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const PAGE_BYTES: u64 = 4096;
const FOREIGN: &str = "it is not the metadata of this program";

/// KiB of pages that a connection caches. The kernel caches the file as well.
const WRITER_CACHE_KIB: u32 = 2048;
pub(super) const READER_CACHE_KIB: u32 = 256;
/// Size to which the write-ahead log is truncated when it is written from its beginning again.
const MAX_WAL_BYTES: u32 = 4 << 20;
/// Number of pages at which the write-ahead log is written into the file. They fit into the reserve (`RESERVE_BYTES`), so
/// any number of removals does.
const CHECKPOINT_PAGES: u32 = 128;
/// Size of the write-ahead log from the start on, because it cannot grow on a full disk. It has room for half as many
/// pages again as `CHECKPOINT_PAGES`.
pub(super) const WAL_BYTES: u64 = 192 * (PAGE_BYTES + 24) + WAL_HEADER_BYTES as u64;
/// Size of the header of the write-ahead log. If the header is zero, SQLite takes the log for an empty one.
const WAL_HEADER_BYTES: usize = 32;

impl Store {
    /// Checks that the file at `path` is a complete store with this program's schema. It is not changed.
    pub fn check(path: &Path) -> Result<()> {
        let wal = Self::wal_of(path);
        let had_wal = wal.exists();
        let result = check_file(path);
        if result.is_err() && !had_wal {
            // SQLite created the log when it opened the file.
            let _ = remove(&wal);
        }
        result
    }

    /// The path of the write-ahead log, which holds changes that are not written into the file yet.
    pub fn wal_of(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push("-wal");
        name.into()
    }

    /// Creates a store with `snapshots`, parents before children, and with `leftovers` on the list for cleanup. It hands
    /// out ids above `occupied`, and theirs must not be higher. A file at `path` is replaced.
    pub fn create(
        path: &Path,
        occupied: Option<SnapshotId>,
        snapshots: &[Snapshot],
        leftovers: &[SnapshotId],
    ) -> Result<()> {
        with_reserve(path, || create_and_rename(path, occupied, snapshots, leftovers))
    }
}

fn create_and_rename(
    path: &Path,
    occupied: Option<SnapshotId>,
    snapshots: &[Snapshot],
    leftovers: &[SnapshotId],
) -> Result<()> {
    let new = path.with_extension("new");
    // A process that died while it created a store left this file.
    remove_with_wal(&new).map_err(|cause| io_error(path, &cause))?;
    let result = fill(&new, occupied, snapshots, leftovers)
        .and_then(|()| replace(path, &new).map_err(|cause| io_error(path, &cause)));
    if result.is_err() {
        // The first failure is the one to report.
        let _ = remove_with_wal(&new);
    }
    result
}

fn replace(path: &Path, new: &Path) -> io::Result<()> {
    // The log of the new file is empty.
    remove(&Store::wal_of(new))?;
    // The old file is removed before its log, because a start could take a file without its log for a complete one.
    remove_with_wal(path)?;
    sync_parent(path)?;
    fs::rename(new, path)?;
    sync_parent(path)
}

fn check_file(path: &Path) -> Result<()> {
    let status = fs::metadata(path).map_err(|cause| io_error(path, &cause))?;
    if !status.is_file() {
        return Err(Error::damaged(path, "it is not a regular file"));
    }
    let (length, has_log) = (status.len(), has_log(path));
    // SQLite would take a shorter file for a new database, and remove the log beside it.
    if length < PAGE_BYTES {
        return Err(Error::damaged(path, format!("it has {length} bytes")));
    }
    check_content(path)?;
    // SQLite reads a truncated page as if zeros followed. If the log is not empty, the page may be there.
    if !length.is_multiple_of(PAGE_BYTES) && !has_log {
        return Err(Error::damaged(path, "it ends within a page"));
    }
    Ok(())
}

fn check_content(path: &Path) -> Result<()> {
    let connection = connect(path, OpenFlags::empty())?;
    let failed = |cause: rusqlite::Error| match cause.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => Error::damaged(path, FOREIGN),
        // This is the error for a schema that cannot be parsed, for example.
        Some(ErrorCode::Unknown) => Error::damaged(path, cause),
        _ => Error::from_sqlite(path, &connection, &cause),
    };
    // This comes before the first read, or the end of the connection would write the log into the file.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(failed)?;
    let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    if number("PRAGMA application_id").map_err(failed)? != i64::from(APPLICATION_ID) {
        return Err(Error::damaged(path, FOREIGN));
    }
    let version = number("PRAGMA user_version").map_err(failed)?;
    if version != i64::from(SCHEMA_VERSION) {
        return Err(Error::Schema { path: path.to_owned(), version });
    }
    if statements(&connection).map_err(failed)? != expected_statements().map_err(failed)? {
        return Err(Error::damaged(path, FOREIGN));
    }
    match strings(&connection, "PRAGMA integrity_check(1)").map_err(failed)?.pop() {
        Some(report) if report == "ok" => {}
        // The first lines only name the database.
        report => return Err(Error::damaged(path, report.unwrap_or_default().lines().last().unwrap_or_default())),
    }
    if !strings(&connection, "PRAGMA foreign_key_check").map_err(failed)?.is_empty() {
        return Err(Error::damaged(path, "a snapshot's parent is missing"));
    }
    // Each row that a start reads is decoded, because SQLite has no checksums over the content of rows.
    let read = ReadTxn::new(&connection, path);
    read.id_counters().and_then(|_| read.for_each(|_| {}))
}

/// The statements of a database's schema. They are sorted, because a copy made by VACUUM has them in another order, and
/// the tables of ANALYZE are omitted.
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

fn io_error(path: &Path, cause: &io::Error) -> Error {
    let errno = cause.raw_os_error().map(Errno::from_raw);
    Error::Access { path: path.to_owned(), cause: cause.to_string(), errno }
}

fn fill(path: &Path, occupied: Option<SnapshotId>, snapshots: &[Snapshot], leftovers: &[SnapshotId]) -> Result<()> {
    let connection = open(path, OpenFlags::SQLITE_OPEN_CREATE, WRITER_CACHE_KIB)?;
    let failed = |cause| Error::from_sqlite(path, &connection, &cause);
    // A journal on disk is not needed, because nobody uses the file before it is complete.
    connection.execute_batch(&format!("PRAGMA journal_mode = MEMORY; BEGIN; {SCHEMA}")).map_err(failed)?;
    connection.execute("INSERT INTO numbers VALUES (?1, ?1)", [first_free(occupied)]).map_err(failed)?;
    let write = WriteTxn::new(&connection, path);
    snapshots.iter().try_for_each(|snapshot| write.insert(snapshot))?;
    write.schedule_cleanup(leftovers)?;
    let end = format!(
        "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT; PRAGMA journal_mode = WAL;"
    );
    connection.execute_batch(&end).map_err(failed)?;
    connection.close().map_err(|(connection, cause)| Error::from_sqlite(path, &connection, &cause))?;
    File::open(path).and_then(|file| file.sync_all()).map_err(|cause| io_error(path, &cause))
}

/// The lowest id above those that have a directory.
pub(super) fn first_free(occupied: Option<SnapshotId>) -> SnapshotId {
    SnapshotId(occupied.map_or(0, |id| id.0) + 1)
}

pub(super) fn open_writer(path: &Path) -> Result<Connection> {
    let connection = open(path, OpenFlags::empty(), WRITER_CACHE_KIB)?;
    // A copy made by VACUUM is not in WAL mode.
    let mode: rusqlite::Result<String> = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0));
    match mode.map_err(|cause| Error::from_sqlite(path, &connection, &cause))?.as_str() {
        "wal" => Ok(connection),
        mode => Err(Error::access(path, format!("it cannot have a write-ahead log, its journal mode is {mode}"), None)),
    }
}

pub(super) fn open(path: &Path, flags: OpenFlags, cache_kib: u32) -> Result<Connection> {
    let connection = connect(path, flags)?;
    configure(&connection, cache_kib).map_err(|cause| Error::from_sqlite(path, &connection, &cause))?;
    Ok(connection)
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | flags;
    Connection::open_with_flags_and_vfs(path, flags, VFS).map_err(|cause| {
        let errno = Some(Errno::last()).filter(|_| cause.sqlite_error_code() == Some(ErrorCode::CannotOpen));
        Error::access(path, cause, errno)
    })
}

fn configure(connection: &Connection, cache_kib: u32) -> rusqlite::Result<()> {
    connection.busy_timeout(LOCK_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(64);
    // The log must keep its blocks. `Store::close_for_good` empties it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.execute_batch(&format!(
        "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY;
         PRAGMA cache_size = -{cache_kib}; PRAGMA journal_size_limit = {MAX_WAL_BYTES};
         PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};"
    ))
}

/// Whether the write-ahead log has content that SQLite would read. SQLite creates an empty log when it opens the file.
fn has_log(path: &Path) -> bool {
    let mut header = [0; WAL_HEADER_BYTES];
    let read = File::open(Store::wal_of(path)).and_then(|mut wal| wal.read_exact(&mut header));
    read.is_ok() && header != [0; WAL_HEADER_BYTES]
}

/// Allocates the blocks that the write-ahead log will need, after its present content.
pub(super) fn allocate_wal(path: &Path) -> io::Result<()> {
    let mut wal = OpenOptions::new().create(true).append(true).open(Store::wal_of(path))?;
    let missing = WAL_BYTES.saturating_sub(wal.metadata()?.len());
    wal.write_all(&vec![0; usize::try_from(missing).unwrap_or(0)])
}

/// Empties the write-ahead log, whose changes are in the file, and keeps its blocks. A log with content would be applied to
/// any file that somebody puts in the place of this one.
pub(super) fn clear_wal(path: &Path) -> io::Result<()> {
    let mut wal = OpenOptions::new().write(true).open(Store::wal_of(path))?;
    wal.write_all(&[0; WAL_HEADER_BYTES])?;
    wal.sync_data()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes a store and then its write-ahead log.
fn remove_with_wal(path: &Path) -> io::Result<()> {
    remove(path)?;
    remove(&Store::wal_of(path))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
