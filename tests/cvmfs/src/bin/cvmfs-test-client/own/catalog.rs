//! A catalog in memory. Its SQLite file is read once, from front to back: lookups then need
//! neither a database handle nor a lock.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row};

use super::fetch::Error;
use crate::backend::{CatalogSummary, Entry, Listing};
use cvmfs_testbed::format::{self, Digest, Malformed, PathKey, SPECIAL};

pub struct Catalog {
    entries: HashMap<PathKey, Arc<Entry>>,
    /// Names below each directory, sorted, with the keys of their paths.
    children: HashMap<PathKey, Vec<(Vec<u8>, PathKey)>>,
    nested: HashMap<Vec<u8>, Digest>,
    summary: CatalogSummary,
}

/// A row as it stands in the file.
struct Found {
    key: PathKey,
    parent: PathKey,
    name: Vec<u8>,
    /// 0 for no group.
    group: i64,
    entry: Entry,
}

impl Catalog {
    /// Reads the catalog file `file`, which has the name `digest`, of the subtree at `root`.
    pub fn read(file: &Path, digest: Digest, root: &[u8]) -> Result<Self, Error> {
        let failed = |error| Error::Catalog { path: file.to_owned(), error };
        let Rows { found, nested, counters } = rows(file).map_err(failed)?;
        let nested = nested
            .into_iter()
            .map(|(path, digest)| Ok((path, digest.parse()?)))
            .collect::<Result<HashMap<_, Digest>, Malformed>>()?;
        let summary = CatalogSummary { digest, path: root.to_vec(), counters };
        let top = PathKey::of(root);
        let mut catalog = Self { entries: HashMap::new(), children: HashMap::new(), nested, summary };
        let mut groups = HashMap::new();
        for row in found {
            if row.group != 0 {
                groups.insert(row.key, row.group);
            }
            if row.key != top {
                catalog.children.entry(row.parent).or_default().push((row.name, row.key));
            }
            catalog.entries.insert(row.key, Arc::new(row.entry));
        }
        catalog.children.values_mut().for_each(|names| names.sort());
        catalog.name_groups(root, &groups);
        Ok(catalog)
    }

    /// Tells every hard link the first path of its group; rows know only a number, which means
    /// nothing in the next revision.
    fn name_groups(&mut self, root: &[u8], groups: &HashMap<PathKey, i64>) {
        if groups.is_empty() {
            return;
        }
        let mut members: HashMap<i64, Vec<(Vec<u8>, PathKey)>> = HashMap::new();
        let mut directories = vec![(root.to_vec(), PathKey::of(root))];
        while let Some((path, key)) = directories.pop() {
            for (name, key) in self.children.get(&key).into_iter().flatten() {
                let path = format::join(&path, name);
                if let Some(group) = groups.get(key) {
                    members.entry(*group).or_default().push((path.clone(), *key));
                }
                if self.children.contains_key(key) {
                    directories.push((path, *key));
                }
            }
        }
        for mut group in members.into_values() {
            group.sort_by(|one, other| one.0.cmp(&other.0));
            let first: Arc<[u8]> = group[0].0.as_slice().into();
            for (_, key) in group {
                if let Some(entry) = self.entries.get_mut(&key) {
                    Arc::make_mut(entry).first_link = Some(Arc::clone(&first));
                }
            }
        }
    }

    pub fn summary(&self) -> &CatalogSummary {
        &self.summary
    }

    pub fn entry(&self, path: &[u8]) -> Option<Arc<Entry>> {
        self.entries.get(&PathKey::of(path)).cloned()
    }

    pub fn list(&self, path: &[u8]) -> Listing {
        let names = self.children.get(&PathKey::of(path)).into_iter().flatten();
        names.filter_map(|(name, key)| Some((name.clone(), Arc::clone(self.entries.get(key)?)))).collect()
    }

    /// The nested catalog at `path` or above it, if this catalog refers to one: its path and its
    /// digest. A nested catalog refers only to others below it, never to itself.
    pub fn towards<'a>(&self, path: &'a [u8]) -> Option<(&'a [u8], Digest)> {
        if self.nested.is_empty() {
            return None;
        }
        let ends = path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let mut prefixes = ends.chain([path.len()]).map(|end| &path[..end]);
        prefixes.find_map(|prefix| Some((prefix, *self.nested.get(prefix)?)))
    }
}

/// The file's tables.
struct Rows {
    found: Vec<Found>,
    /// Paths and digests of the catalogs below.
    nested: Vec<(Vec<u8>, String)>,
    counters: Vec<(String, i64)>,
}

fn rows(file: &Path) -> rusqlite::Result<Rows> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let database = Connection::open_with_flags(file, flags)?;
    let mut select = database.prepare(
        "SELECT md5path_1, md5path_2, parent_1, parent_2, hardlinks, hash, size, mode, mtime, mtimens, flags, \
         name, symlink, uid, gid, xattr FROM catalog",
    )?;
    let found = select.query_map([], read_row)?.collect::<rusqlite::Result<_>>()?;
    let mut select = database.prepare("SELECT path, sha1 FROM nested_catalogs")?;
    let nested = select.query_map([], |row| Ok((bytes(row, 0)?, row.get(1)?)))?.collect::<rusqlite::Result<_>>()?;
    let mut select = database.prepare("SELECT counter, value FROM statistics ORDER BY counter")?;
    let counters = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<rusqlite::Result<_>>()?;
    Ok(Rows { found, nested, counters })
}

fn read_row(row: &Row) -> rusqlite::Result<Found> {
    let hardlinks: i64 = row.get(4)?;
    let size = row.get::<_, i64>(6)?.cast_unsigned();
    let special = row.get::<_, u32>(10)? & SPECIAL != 0;
    let entry = Entry {
        mode: row.get(7)?,
        size: if special { 0 } else { size },
        device: if special { size } else { 0 },
        mtime: row.get(8)?,
        mtime_ns: row.get::<_, Option<u32>>(9)?.unwrap_or(0),
        uid: row.get(13)?,
        gid: row.get(14)?,
        links: u32::try_from(hardlinks & 0xffff_ffff).unwrap_or(1).max(1),
        first_link: None,
        target: bytes(row, 12)?,
        attributes: unpacked_attributes(&bytes(row, 15)?),
        content: Digest::from_slice(&bytes(row, 5)?),
    };
    Ok(Found {
        key: PathKey(row.get(0)?, row.get(1)?),
        parent: PathKey(row.get(2)?, row.get(3)?),
        name: bytes(row, 11)?,
        group: hardlinks >> 32,
        entry,
    })
}

/// TEXT need not be UTF-8 here, and NULL is as good as empty.
fn bytes(row: &Row, column: usize) -> rusqlite::Result<Vec<u8>> {
    Ok(match row.get_ref(column)? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.to_vec(),
        _ => Vec::new(),
    })
}

/// Version 1, count, then for each attribute the lengths of name and value, name, value.
fn unpacked_attributes(packed: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let [1, count, rest @ ..] = packed else { return Vec::new() };
    let mut rest = rest;
    let mut attributes = Vec::new();
    for _ in 0..*count {
        let [name_length, value_length, tail @ ..] = rest else { break };
        let (name_length, value_length) = (usize::from(*name_length), usize::from(*value_length));
        let Some((name, tail)) = tail.split_at_checked(name_length) else { break };
        let Some((value, tail)) = tail.split_at_checked(value_length) else { break };
        attributes.push((name.to_vec(), value.to_vec()));
        rest = tail;
    }
    attributes
}
