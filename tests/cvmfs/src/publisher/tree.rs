//! Reads a source tree into catalogs: one for everything from a directory down to the next
//! directories that hold a regular file `.cvmfscatalog`. Reads no file content.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::Settings;
use super::store::ContentKey;
use crate::format::{self, DIRECTORY, Digest, FILE, NESTED_MOUNTPOINT, NESTED_ROOT, SPECIAL, SYMLINK};
use crate::ingest::NO_OWNER;

/// The content of a catalog. Equal catalogs are written once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalog {
    pub path: Vec<u8>,
    pub rows: Vec<Row>,
    /// The catalogs below, until they are written.
    pub nested: Vec<Catalog>,
    /// The catalogs below, once they are written: path, digest, decompressed size.
    pub references: Vec<(Vec<u8>, Digest, u64)>,
}

/// An entry of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub path: Vec<u8>,
    pub flags: u32,
    pub mode: u32,
    /// Bytes of a file, length of a link's target, device number of a device.
    pub size: u64,
    pub mtime: i64,
    pub mtime_ns: i64,
    pub uid: u32,
    pub gid: u32,
    pub target: Vec<u8>,
    /// The extended attributes in the format of [`packed_attributes`].
    pub attributes: Option<Vec<u8>>,
    pub content: Option<ContentKey>,
    /// Number of the group of hard links, from 1, and how many links it has in this catalog; a
    /// lone entry has 0 and 1. Links across catalogs become files of their own.
    pub links: (u32, u32),
}

/// The root catalog, and where to read each content in it and below.
pub fn read(source: &Path, settings: Settings) -> (Catalog, HashMap<ContentKey, PathBuf>) {
    let mut reader = Reader { settings, files: HashMap::new() };
    let root = reader.catalog(source, b"");
    (root, reader.files)
}

struct Reader {
    settings: Settings,
    files: HashMap<ContentKey, PathBuf>,
}

/// The hard links of one catalog: the rows of each inode.
type Links = HashMap<(u64, u64), Vec<usize>>;

impl Reader {
    fn catalog(&mut self, host: &Path, path: &[u8]) -> Catalog {
        let own = if path.is_empty() { 0 } else { NESTED_ROOT };
        let mut links = Links::new();
        let mut catalog = Catalog { path: path.to_vec(), rows: Vec::new(), nested: Vec::new(), references: Vec::new() };
        catalog.rows.push(self.row(host, path.to_vec(), &metadata(host), own));
        self.directory(host, path, &mut catalog, &mut links);
        let mut groups: Vec<_> = links.into_values().filter(|rows| rows.len() > 1).collect();
        groups.sort();
        for (group, rows) in (1..).zip(groups) {
            for &row in &rows {
                catalog.rows[row].links = (group, rows.len().try_into().expect("a link count fits 32 bits"));
            }
        }
        catalog
    }

    fn directory(&mut self, host: &Path, path: &[u8], catalog: &mut Catalog, links: &mut Links) {
        let entries = fs::read_dir(host).unwrap_or_else(|error| panic!("list {host:?}: {error}"));
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap_or_else(|error| panic!("list {host:?}: {error}")).file_name().into_vec())
            .collect();
        names.sort();
        for name in names {
            let host = host.join(OsStr::from_bytes(&name));
            let path = format::join(path, &name);
            let found = metadata(&host);
            if found.is_dir() {
                let marker = host.join(".cvmfscatalog");
                if marker.symlink_metadata().is_ok_and(|marker| marker.is_file()) {
                    catalog.rows.push(self.row(&host, path.clone(), &found, NESTED_MOUNTPOINT));
                    catalog.nested.push(self.catalog(&host, &path));
                } else {
                    catalog.rows.push(self.row(&host, path.clone(), &found, 0));
                    self.directory(&host, &path, catalog, links);
                }
            } else {
                if found.nlink() > 1 && self.settings.hard_links {
                    links.entry((found.dev(), found.ino())).or_default().push(catalog.rows.len());
                }
                catalog.rows.push(self.row(&host, path, &found, 0));
            }
        }
    }

    fn row(&mut self, host: &Path, path: Vec<u8>, found: &Metadata, flags: u32) -> Row {
        let kind = found.file_type();
        let (mut target, mut content) = (Vec::new(), None);
        let (kind_flags, size) = if kind.is_dir() {
            (DIRECTORY, found.len())
        } else if kind.is_symlink() {
            let read = fs::read_link(host).unwrap_or_else(|error| panic!("read the link {host:?}: {error}"));
            target = read.into_os_string().into_vec();
            (FILE | SYMLINK, target.len().try_into().expect("a length fits 64 bits"))
        } else if kind.is_file() {
            let key = ContentKey {
                device: found.dev(),
                inode: found.ino(),
                size: found.len(),
                modified: nanoseconds(found.mtime(), found.mtime_nsec()),
                changed: nanoseconds(found.ctime(), found.ctime_nsec()),
            };
            self.files.entry(key).or_insert_with(|| host.to_owned());
            content = Some(key);
            (FILE, found.len())
        } else {
            let device = if kind.is_block_device() || kind.is_char_device() { found.rdev() } else { 0 };
            (FILE | SPECIAL, device)
        };
        Row {
            path,
            flags: flags | kind_flags,
            mode: found.mode(),
            size,
            mtime: found.mtime(),
            mtime_ns: if self.settings.nanoseconds { found.mtime_nsec() } else { 0 },
            uid: published_id(found.uid()),
            gid: published_id(found.gid()),
            target,
            attributes: if self.settings.attributes { packed_attributes(host) } else { None },
            content,
            links: (0, 1),
        }
    }
}

fn published_id(id: u32) -> u32 {
    if id == NO_OWNER { u32::MAX } else { id }
}

fn metadata(path: &Path) -> Metadata {
    path.symlink_metadata().unwrap_or_else(|error| panic!("look at {path:?}: {error}"))
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
}

/// Version 1, count, then for each attribute the lengths of name and value, name, value. Every
/// number is one byte, so a longer value cannot be published.
fn packed_attributes(path: &Path) -> Option<Vec<u8>> {
    let names = xattr::list(path).unwrap_or_else(|error| panic!("list the attributes of {path:?}: {error}"));
    let mut names: Vec<_> = names.filter(|name| is_published(name.as_bytes())).collect();
    names.sort();
    let (mut count, mut packed) = (0_u8, Vec::new());
    for name in names {
        // An attribute removed meanwhile is not there.
        let Ok(Some(value)) = xattr::get(path, &name) else { continue };
        let (Ok(name_length), Ok(value_length)) = (u8::try_from(name.len()), u8::try_from(value.len())) else {
            continue;
        };
        count = count.checked_add(1).unwrap_or_else(|| panic!("publish {path:?}: more than 255 attributes"));
        packed.extend([name_length, value_length]);
        packed.extend(name.as_bytes());
        packed.extend(value);
    }
    (count > 0).then(|| [&[1, count], packed.as_slice()].concat())
}

/// Overlayfs' own marks describe the publisher's disk, not the tree.
fn is_published(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name == b"security.capability"
        || name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay.")
}
