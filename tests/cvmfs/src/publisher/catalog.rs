//! Writes catalogs (schema 2.5) and the history of tags as SQLite files, in memory.

#![forbid(unsafe_code)]

use std::iter::Sum;

use rusqlite::{Connection, params};

use super::store::Store;
use super::tree::{Catalog, Row};
use crate::format::{self, DIRECTORY, Digest, NESTED_MOUNTPOINT, PathKey, SPECIAL, SYMLINK};

const CATALOG: &str = "
CREATE TABLE properties (key TEXT, value TEXT, CONSTRAINT pk_properties PRIMARY KEY (key));
CREATE TABLE catalog (md5path_1 INTEGER, md5path_2 INTEGER, parent_1 INTEGER, parent_2 INTEGER,
 hardlinks INTEGER, hash BLOB, size INTEGER, mode INTEGER, mtime INTEGER, mtimens INTEGER,
 flags INTEGER, name TEXT, symlink TEXT, uid INTEGER, gid INTEGER, xattr BLOB,
 CONSTRAINT pk_catalog PRIMARY KEY (md5path_1, md5path_2));
CREATE INDEX idx_catalog_parent ON catalog (parent_1, parent_2);
CREATE TABLE chunks (md5path_1 INTEGER, md5path_2 INTEGER, offset INTEGER, size INTEGER, hash BLOB,
 CONSTRAINT pk_chunks PRIMARY KEY (md5path_1, md5path_2, offset, size),
 FOREIGN KEY (md5path_1, md5path_2) REFERENCES catalog(md5path_1, md5path_2));
CREATE TABLE nested_catalogs (path TEXT, sha1 TEXT, size INTEGER,
 CONSTRAINT pk_nested_catalogs PRIMARY KEY (path));
CREATE TABLE bind_mountpoints (path TEXT, sha1 TEXT, size INTEGER,
 CONSTRAINT pk_bind_mountpoints PRIMARY KEY (path));
CREATE TABLE statistics (counter TEXT, value INTEGER, CONSTRAINT pk_statistics PRIMARY KEY (counter));
";

const HISTORY: &str = "
CREATE TABLE properties (key TEXT, value TEXT, CONSTRAINT pk_properties PRIMARY KEY (key));
CREATE TABLE branches (branch TEXT, parent TEXT, initial_revision INTEGER,
 CONSTRAINT pk_branch PRIMARY KEY (branch));
CREATE TABLE tags (name TEXT, hash TEXT, revision INTEGER, timestamp INTEGER, channel INTEGER,
 description TEXT, size INTEGER, branch TEXT, CONSTRAINT pk_tags PRIMARY KEY (name));
CREATE TABLE recycle_bin (hash TEXT, flags INTEGER, CONSTRAINT pk_hash PRIMARY KEY (hash));
INSERT INTO properties VALUES ('schema', '1.0'), ('schema_revision', '3');
INSERT INTO branches VALUES ('', NULL, 0);
";

/// A catalog in the store.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    pub digest: Digest,
    /// Decompressed.
    pub size: u64,
    /// Counters of the catalog and of all catalogs below it.
    pub counters: Counters,
}

/// The counters of the statistics table, in the order of [`Counters::NAMES`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters([u64; 12]);

impl Counters {
    const NAMES: [&str; 12] = [
        "regular",
        "symlink",
        "special",
        "dir",
        "nested",
        "file_size",
        "xattr",
        // This publisher never writes such objects, but clients expect the rows.
        "chunked",
        "chunks",
        "chunked_size",
        "external",
        "external_file_size",
    ];

    fn count(&mut self, row: &Row) {
        let what = if row.flags & NESTED_MOUNTPOINT != 0 {
            4 // its directory is counted in the nested catalog
        } else if row.flags & DIRECTORY != 0 {
            3
        } else if row.flags & SYMLINK != 0 {
            1
        } else if row.flags & SPECIAL != 0 {
            2
        } else {
            self.0[5] += row.size;
            0
        };
        self.0[what] += 1;
        self.0[6] += u64::from(row.attributes.is_some());
    }
}

impl Sum for Counters {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, each| Self(std::array::from_fn(|at| sum.0[at] + each.0[at])))
    }
}

/// The catalog as a file, and its counters with those of the catalogs `below` it.
pub fn write(catalog: &Catalog, below: Counters, store: &Store, revision: u64, now: u64) -> (Vec<u8>, Counters) {
    let mut own = Counters::default();
    catalog.rows.iter().for_each(|row| own.count(row));
    let bytes = fill(catalog, own, below, store, revision, now).expect("SQLite takes a catalog");
    (bytes, [own, below].into_iter().sum())
}

fn fill(
    catalog: &Catalog,
    own: Counters,
    below: Counters,
    store: &Store,
    revision: u64,
    now: u64,
) -> rusqlite::Result<Vec<u8>> {
    let mut database = Connection::open_in_memory()?;
    database.execute_batch(CATALOG)?;
    let transaction = database.transaction()?;
    {
        // Names and targets are TEXT that need not be UTF-8: bound as a blob and cast.
        let mut insert = transaction
            .prepare("INSERT INTO catalog VALUES (?,?,?,?,?,?,?,?,?,?,?,CAST(? AS TEXT),CAST(? AS TEXT),?,?,?)")?;
        for row in &catalog.rows {
            let key = PathKey::of(&row.path);
            let parent = if row.path.is_empty() { PathKey::NONE } else { PathKey::of(format::parent(&row.path)) };
            insert.execute(params![
                key.0,
                key.1,
                parent.0,
                parent.1,
                i64::from(row.links.0) << 32 | i64::from(row.links.1),
                row.content.as_ref().map(|content| store.digest(content).as_bytes().to_vec()),
                row.size.cast_signed(),
                row.mode,
                row.mtime,
                (row.mtime_ns != 0).then_some(row.mtime_ns),
                row.flags,
                format::name(&row.path),
                row.target,
                row.uid,
                row.gid,
                row.attributes,
            ])?;
        }
        let mut insert = transaction.prepare("INSERT INTO nested_catalogs VALUES (CAST(? AS TEXT),?,?)")?;
        for (path, digest, size) in &catalog.references {
            insert.execute(params![path, digest.to_string(), size.cast_signed()])?;
        }
        let mut insert = transaction.prepare("INSERT INTO statistics VALUES (?,?)")?;
        for (at, name) in Counters::NAMES.iter().enumerate() {
            insert.execute(params![format!("self_{name}"), own.0[at].cast_signed()])?;
            insert.execute(params![format!("subtree_{name}"), below.0[at].cast_signed()])?;
        }
        let mut insert = transaction.prepare("INSERT INTO properties VALUES (?,CAST(? AS TEXT))")?;
        insert.execute(params!["schema", "2.5"])?;
        insert.execute(params!["schema_revision", "7"])?;
        insert.execute(params!["revision", revision.to_string()])?;
        insert.execute(params!["last_modified", now.to_string()])?;
        if !catalog.path.is_empty() {
            insert.execute(params!["root_prefix", catalog.path])?;
        }
    }
    transaction.commit()?;
    Ok(database.serialize("main")?.to_vec())
}

/// The history with its one tag, the current revision. Some clients take the root catalog from
/// here and not from the manifest.
pub fn history(fqrn: &str, root: &Written, revision: u64, now: u64) -> Vec<u8> {
    let fill = || -> rusqlite::Result<Vec<u8>> {
        let database = Connection::open_in_memory()?;
        database.execute_batch(HISTORY)?;
        database.execute("INSERT INTO properties VALUES ('fqrn', ?)", [fqrn])?;
        database.execute(
            "INSERT INTO tags VALUES ('trunk',?,?,?,0,'',?,'')",
            params![root.digest.to_string(), revision.cast_signed(), now.cast_signed(), root.size.cast_signed()],
        )?;
        Ok(database.serialize("main")?.to_vec())
    };
    fill().expect("SQLite takes a history")
}
