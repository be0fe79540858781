//! Unpacks a layer's tar into the publisher's tree as `cvmfs_server ingest` does, losses included:
//! owners, hard links, attributes, parts of seconds, and all that a tar does not say of the
//! directories that it does not name.

#![forbid(unsafe_code)]

mod auto_catalogs;
pub mod entry;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tar::{Archive, Entry, EntryType};

pub use auto_catalogs::AutoCatalogs;

/// With `--keep-ownership`, ingest gives a directory that the tar does not name to the user and the
/// group -1, which is 4294967295 to everybody who reads the catalog. No file can be given to them, so
/// in a tree on a disk this number stands for them.
pub const NO_OWNER: u32 = u32::MAX - 1;

/// Makes a directory a catalog of its own.
pub const MARKER: &str = ".cvmfscatalog";
/// Stand both in a directory that became a catalog without being asked for.
pub const MARKERS: [&str; 2] = [MARKER, ".cvmfsautocatalog"];

/// Whose the files are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ownership {
    /// The repository's owner has everything.
    #[default]
    Lost,
    /// Everything but directories belongs to whom the tar says (`--keep-ownership`).
    Kept,
}

/// How tars become directories of a repository.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ingest {
    /// The user and the group of the repository's owner.
    pub owner: (u32, u32),
    pub ownership: Ownership,
    pub auto_catalogs: Option<AutoCatalogs>,
}

/// Properties that are set last, because writing a file or into a directory changes them.
#[derive(Clone, Copy, Debug)]
struct Metadata {
    mode: u32,
    owner: (u32, u32),
    mtime: u64,
}

/// A tar that is being unpacked.
struct Unpacking<'a> {
    ingest: &'a Ingest,
    tree: &'a Path,
    now: u64,
    /// The directories that this ingest made or found in the tar, by their paths in the tree.
    directories: BTreeMap<PathBuf, Metadata>,
    /// The paths that were added, in this order, and whether each is a directory.
    added: Vec<(PathBuf, bool)>,
    /// The paths of hard links, and of the files that they are links to.
    links: Vec<(PathBuf, PathBuf)>,
}

impl Ingest {
    /// Unpacks `tar` into the directory `base` of `tree`, and makes it a catalog.
    pub fn unpack(&self, tar: impl Read, tree: &Path, base: &Path) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
        let (directories, added, links) = (BTreeMap::new(), Vec::new(), Vec::new());
        let mut unpacking = Unpacking { ingest: self, tree, now, directories, added, links };
        for entry in Archive::new(tar).entries().expect("a layer is a tar") {
            let entry = entry.expect("a layer is a tar");
            if !entry.header().entry_type().is_pax_global_extensions() {
                unpacking.add(entry, base);
            }
        }
        unpacking.invent(base);
        unpacking.copy_links();
        unpacking.write_marker(&base.join(MARKER), 0o664, self.owner);
        if let Some(auto_catalogs) = self.auto_catalogs {
            for directory in auto_catalogs.choose(base, &unpacking.added) {
                for name in MARKERS {
                    unpacking.write_marker(&directory.join(name), 0o600, unpacking.directories[&directory].owner);
                }
            }
        }
        // From the bottom up: to write into a directory changes its time.
        for (path, metadata) in unpacking.directories.iter().rev() {
            metadata.apply(&tree.join(path));
        }
    }
}

impl Unpacking<'_> {
    fn add(&mut self, mut entry: Entry<impl Read>, base: &Path) {
        let path = in_tree(base, &entry.path_bytes());
        self.invent(path.parent().expect("a layer lies in a directory"));
        if entry.header().entry_type() == EntryType::Link {
            let target = entry.link_name_bytes().expect("a hard link has a target");
            self.links.push((path, in_tree(base, &target)));
            return;
        }
        let metadata = self.metadata(&mut entry);
        if entry.header().entry_type().is_dir() {
            self.make_directory(&path, metadata);
            return;
        }
        let host = self.tree.join(&path);
        // The same name again: the later one counts.
        let _ = fs::remove_file(&host);
        entry::write(&mut entry, &host).unwrap_or_else(|error| panic!("unpack {path:?}: {error}"));
        metadata.apply(&host);
        self.added.push((path, false));
    }

    fn metadata(&self, entry: &mut Entry<impl Read>) -> Metadata {
        let header = entry.header();
        let mode = header.mode().expect("an entry has a mode") & 0o7777;
        let owner = match (self.ingest.ownership, header.entry_type()) {
            (Ownership::Kept, kind) if !kind.is_dir() => {
                let number = |id: io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok());
                number(header.uid()).zip(number(header.gid())).expect("an entry has an owner")
            }
            _ => self.ingest.owner,
        };
        Metadata { mode, owner, mtime: header.mtime().expect("an entry has a time") }
    }

    /// Makes the directory `path` and those above it unless they are there. Nobody says anything of
    /// them, so they get what ingest has for such directories.
    fn invent(&mut self, path: &Path) {
        if self.directories.contains_key(path) || self.tree.join(path).is_dir() {
            return;
        }
        if let Some(parent) = path.parent() {
            self.invent(parent);
        }
        let owner = match self.ingest.ownership {
            Ownership::Lost => self.ingest.owner,
            Ownership::Kept => (NO_OWNER, NO_OWNER),
        };
        self.make_directory(path, Metadata { mode: 0o755, owner, mtime: self.now });
    }

    fn make_directory(&mut self, path: &Path, metadata: Metadata) {
        fs::create_dir_all(self.tree.join(path)).unwrap_or_else(|error| panic!("make {path:?}: {error}"));
        if self.directories.insert(path.to_owned(), metadata).is_none() {
            self.added.push((path.to_owned(), true));
        }
    }

    /// A hard link becomes a file of its own, with all that its target has, its time included.
    fn copy_links(&mut self) {
        for (path, target) in std::mem::take(&mut self.links) {
            let (from, to) = (self.tree.join(&target), self.tree.join(&path));
            let found = from.symlink_metadata().unwrap_or_else(|error| {
                panic!(
                    "unpack {path:?}: its target {target:?} is not in the same layer, on which ingest fails: {error}"
                )
            });
            let copied = if found.is_symlink() {
                fs::read_link(&from).and_then(|link| symlink(link, &to))
            } else {
                fs::copy(&from, &to).map(drop)
            };
            copied.unwrap_or_else(|error| panic!("copy {target:?} to {path:?}: {error}"));
            Metadata::of(&found).apply(&to);
            self.added.push((path, false));
        }
    }

    fn write_marker(&mut self, path: &Path, mode: u32, owner: (u32, u32)) {
        let host = self.tree.join(path);
        File::create(&host).unwrap_or_else(|error| panic!("write {path:?}: {error}"));
        Metadata { mode, owner, mtime: self.now }.apply(&host);
        self.added.push((path.to_owned(), false));
    }
}

impl Metadata {
    fn of(found: &fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        let mtime = found.mtime().try_into().expect("the times in a layer are past 1970");
        Self { mode: found.mode() & 0o7777, owner: (found.uid(), found.gid()), mtime }
    }

    /// The mode comes after the owner: to change that takes setuid and setgid bits away.
    fn apply(&self, path: &Path) {
        let applied = || -> io::Result<()> {
            lchown(path, Some(self.owner.0), Some(self.owner.1))?;
            if !path.is_symlink() {
                fs::set_permissions(path, Permissions::from_mode(self.mode))?;
            }
            entry::set_mtime(path, Duration::from_secs(self.mtime))
        };
        applied().unwrap_or_else(|error| panic!("set the mode, owner and time of {path:?}: {error}"));
    }
}

/// The path in the tree of the tar's entry `name`.
fn in_tree(base: &Path, name: &[u8]) -> PathBuf {
    let name = Path::new(OsStr::from_bytes(name));
    let inside = name.components().filter(|part| !matches!(part, Component::CurDir | Component::RootDir));
    inside.fold(base.to_owned(), |path, part| match part {
        Component::Normal(part) => path.join(part),
        _ => panic!("unpack {name:?}: it leads out of its layer"),
    })
}
