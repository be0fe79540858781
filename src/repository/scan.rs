//! Finds what is published besides files of the image: the markers.
//!
//! A publisher unpacks a layer's tar as it is, so deletions stay in the form of the OCI
//! image format: `.wh.<name>` deletes `<name>` of the layers below, `.wh..wh..opq` empties
//! its directory of them. Kernel overlayfs knows neither, and no container may see them.
//! Other names are the publisher's own (`is_publishers`). All of them can stand in every directory of
//! every layer, the lowest included. The rules for odd cases are those of containerd's own
//! unpacking, because its result is what a container is promised to see. What cannot be read is an
//! error, never a directory without markers.
#![forbid(unsafe_code)]

pub mod record;
mod walk;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;

pub use self::walk::scan;
use super::executor::Heartbeat;
use crate::model::Digest;
use crate::system;

/// Files that mark the root of a nested catalog of CernVM-FS; the second one stands where the
/// publisher itself decided to make one (`CVMFS_AUTOCATALOGS`).
pub const CATALOG_MARKERS: [&str; 2] = [".cvmfscatalog", ".cvmfsautocatalog"];
/// The file that tells a publisher where to make nested catalogs.
const DIRTAB: &[u8] = b".cvmfsdirtab";
/// From version 2.14 on, a file with this prefix lists what the client fetches together.
const BUNDLE_PREFIX: &[u8] = b".cvmfsbundle-";
/// Version of the rules in this file. It is counted up whenever they find something else in the
/// same layer: a scan that was stored under older rules is then made again.
pub const SCAN_FORMAT_VERSION: u32 = 3;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// At the top of a layer, names with this prefix are records of AUFS and mean nothing.
const META_PREFIX: &[u8] = b".wh..wh.";

/// Names and directories that a scan holds at once, in bytes. A layer of a million entries needs a few
/// megabytes.
const MAX_MEMORY: usize = 64 << 20;
/// Directories of a layer. Of a million, a scan over FUSE takes minutes.
const MAX_DIRECTORIES: usize = 1_000_000;
/// Directories of the result. A mask and a hide have as many each, on the local disk.
const MAX_MARKED: usize = 65_536;
/// What the result takes in memory, in bytes: some 80,000 deletions. An ordinary layer has a few kilobytes.
const MAX_RESULT: usize = 16 << 20;
/// Length of the path of a directory of the result, in bytes: the kernel takes 4096, and the path of
/// the state root comes before it.
const MAX_PATH: usize = 3_584;
/// What the kernel says of a user or group that has no number, as well as of `nobody`, who has this one.
/// A publisher that keeps owners gives directories which the layer's tar does not name to the user and
/// the group -1, which are none.
pub const NO_OWNER: u32 = 65_534;

/// Names a scan: one layer in one repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ScanKey {
    pub digest: Digest,
    pub repository: String,
}

/// The directories that hold markers or have no owner, and their parents. A directory stands after
/// its parent, siblings are sorted by name, and the first one is the top.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub directories: Vec<Directory>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Its parent's place in the scan; that of the top is its own, 0.
    pub parent: usize,
    /// Empty for the top.
    pub name: OsString,
    /// Names that the layer deletes from the layers below.
    pub deleted: Vec<OsString>,
    /// Nothing of this directory shows from the layers below.
    pub opaque: bool,
    /// Names in the layer that no container may see.
    pub hidden: Vec<OsString>,
    /// Its user or group may be none. The kernel lets nobody, root included, write into such a directory
    /// as long as it shows.
    pub has_no_owner: bool,
}

/// A bound that a layer can exceed. It is not used then, and not scanned again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    Memory,
    Directories,
    Marked,
    Names,
    Path,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => write!(f, "more names of directories and markers than {} MiB hold", MAX_MEMORY >> 20),
            Self::Directories => write!(f, "more than {MAX_DIRECTORIES} directories"),
            Self::Marked => write!(
                f,
                "more than {MAX_MARKED} directories that have markers or are of nobody (uid or gid {NO_OWNER}), with those \
                 above them"
            ),
            Self::Names => write!(
                f,
                "markers, and directories that have markers or are of nobody (uid or gid {NO_OWNER}), that take more than \
                 {} MiB of memory",
                MAX_RESULT >> 20
            ),
            Self::Path => write!(
                f,
                "a directory whose path is longer than 4095 bytes, or one that has markers or is of nobody (uid or gid \
                 {NO_OWNER}) and has a path of more than {MAX_PATH} bytes"
            ),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    System(system::Error),
    /// Not an image that anybody built for use.
    Exceeds(Limit),
    /// A thread of ours failed.
    Panicked,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(cause) => cause.fmt(f),
            Self::Exceeds(limit) => write!(f, "the layer has {limit}, and cannot be shown"),
            Self::Panicked => f.write_str("its scan hit a bug in the snapshotter"),
        }
    }
}

impl From<system::Error> for Error {
    fn from(cause: system::Error) -> Self {
        Self::System(cause)
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// How far a walk is, for whoever waits for it.
#[derive(Debug, Default)]
pub struct Progress {
    pub directories: AtomicUsize,
    /// Beats with each answer.
    pub heartbeat: Heartbeat,
}

/// What a name takes in memory at most, with the directory that it may be of, in bytes.
fn cost(name: &OsStr) -> usize {
    name.len() + 96
}

impl Scan {
    /// What it takes, in bytes.
    pub fn memory(&self) -> usize {
        self.directories.iter().map(Directory::memory).sum()
    }

    /// Something in it is to be hidden, or shown with another owner.
    pub fn needs_mask(&self) -> bool {
        self.directories.iter().any(Directory::has_mask)
    }

    /// It deletes something of the layers below.
    pub fn needs_hide(&self) -> bool {
        self.directories.iter().any(Directory::hides)
    }

    /// Where the directory at `place` is, from the top of the layer.
    pub fn path(&self, mut place: usize) -> PathBuf {
        let mut names = Vec::new();
        while place != 0 {
            names.push(self.directories[place].name.as_os_str());
            place = self.directories[place].parent;
        }
        names.into_iter().rev().collect()
    }

    /// The positions of the directories that are `wanted`, and of those above them, in their order.
    pub fn with_parents(&self, wanted: impl Fn(&Directory) -> bool) -> Vec<usize> {
        let mut is_needed = vec![false; self.directories.len()];
        for (place, directory) in self.directories.iter().enumerate().rev() {
            is_needed[place] |= wanted(directory);
            is_needed[directory.parent] |= is_needed[place];
        }
        (0..is_needed.len()).filter(|place| is_needed[*place]).collect()
    }
}

impl Directory {
    fn memory(&self) -> usize {
        cost(&self.name) + self.hidden.iter().chain(&self.deleted).map(|name| cost(name)).sum::<usize>()
    }

    /// Something of it is to be hidden, or it is to be shown with another owner.
    pub fn has_mask(&self) -> bool {
        !self.hidden.is_empty() || self.has_no_owner
    }

    /// It deletes something of the layers below.
    pub fn hides(&self) -> bool {
        self.opaque || !self.deleted.is_empty()
    }

    fn with_markers(is_top: bool, markers: Vec<OsString>) -> Self {
        let mut directory = Self { hidden: markers, ..Self::default() };
        for name in &directory.hidden {
            let bytes = name.as_bytes();
            let Some(target) = bytes.strip_prefix(WHITEOUT_PREFIX) else { continue };
            if is_top && bytes.starts_with(META_PREFIX) {
                // containerd passes over these, an opaque marker among them.
            } else if bytes == OPAQUE_MARKER {
                directory.opaque = true;
            } else if !matches!(target, b"" | b"." | b"..") {
                directory.deleted.push(OsStr::from_bytes(target).to_owned());
            }
        }
        directory.hidden.sort();
        directory
    }
}

fn is_whiteout(name: &OsStr) -> bool {
    name.as_bytes().starts_with(WHITEOUT_PREFIX)
}

/// Whether a publisher puts files of this name beside those of an image. A directory of such a name
/// is the image's.
fn is_publishers(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    CATALOG_MARKERS.iter().any(|marker| name == *marker) || bytes == DIRTAB || bytes.starts_with(BUNDLE_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::{Host, Sys};
    use std::fs;
    use std::path::Path;

    fn layer(directories: &[&str], files: &[&str]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for directory in directories {
            fs::create_dir_all(top.path().join(directory)).unwrap();
        }
        for file in files {
            fs::write(top.path().join(file), "").unwrap();
        }
        top
    }

    fn find(sys: &dyn Sys, top: &Path) -> Result<Scan> {
        scan(sys, &Host.open_dir(top).unwrap(), &Progress::default())
    }

    /// `path: -deleted … !hidden … =opaque`, one line a directory.
    fn shown(top: &tempfile::TempDir) -> Vec<String> {
        let scan = find(&Host, top.path()).unwrap();
        scan.directories
            .iter()
            .enumerate()
            .map(|(place, d)| {
                let mut line = format!("{}:", scan.path(place).display());
                for name in &d.deleted {
                    line = format!("{line} -{}", name.display());
                }
                for name in &d.hidden {
                    line = format!("{line} !{}", name.display());
                }
                line + if d.opaque { " =opaque" } else { "" }
            })
            .collect()
    }

    #[test]
    fn markers_are_found_with_their_parents() {
        let top = layer(
            &["a/b/c", "x/y"],
            &[".cvmfscatalog", "x/.cvmfsautocatalog", "a/b/c/.wh.gone", "a/b/c/kept", "x/y/.wh..wh..opq", "x/f"],
        );
        assert_eq!(
            shown(&top),
            [
                ": !.cvmfscatalog",
                "a:",
                "a/b:",
                "a/b/c: -gone !.wh.gone",
                "x: !.cvmfsautocatalog",
                "x/y: !.wh..wh..opq =opaque"
            ]
        );
    }

    #[test]
    fn a_layer_without_markers_has_only_its_top() {
        assert_eq!(shown(&layer(&["a/b"], &["a/f"])), [":"]);
    }

    #[test]
    fn a_name_that_is_there_is_not_deleted() {
        let top = layer(&["d", "d/dir"], &["d/.wh.file", "d/file", "d/.wh.dir", "d/.wh.gone"]);
        assert_eq!(shown(&top), [":", "d: -gone !.wh.dir !.wh.file !.wh.gone"]);
    }

    #[test]
    fn records_of_aufs_at_the_top_are_hidden_and_mean_nothing() {
        let top = layer(&[".wh..wh.plnk/inner"], &[".wh..wh..opq", ".wh..wh.aufs"]);
        assert_eq!(shown(&top), [": !.wh..wh..opq !.wh..wh.aufs !.wh..wh.plnk"]);
    }

    #[test]
    fn markers_that_name_no_entry_are_only_hidden() {
        let top = layer(&["d"], &["d/.wh.", "d/.wh..", "d/.wh..."]);
        assert_eq!(shown(&top), [":", "d: !.wh. !.wh.. !.wh..."]);
    }

    #[test]
    fn odd_names_are_found() {
        let long = format!("d/.wh.{}", "n".repeat(251));
        let top = layer(&["d"], &["d/.wh.two words", "d/.wh.line\nbreak", &long]);
        let scan = find(&Host, top.path()).unwrap();
        let deleted: Vec<usize> = scan.directories[1].deleted.iter().map(|n| n.len()).collect();
        assert_eq!(deleted, [10, 251, 9]);
    }

    #[test]
    fn a_directory_named_like_the_catalog_marker_is_the_images_own() {
        assert_eq!(shown(&layer(&[".cvmfscatalog"], &[])), [":"]);
    }

    #[test]
    fn every_name_of_the_publisher_is_hidden_in_every_directory() {
        let names = [".cvmfsautocatalog", ".cvmfsbundle-python", ".cvmfscatalog", ".cvmfsdirtab"];
        let files: Vec<String> = names.iter().flat_map(|n| [(*n).to_owned(), format!("a/b/{n}")]).collect();
        let top = layer(&["a/b"], &files.iter().map(String::as_str).collect::<Vec<_>>());
        let hidden = names.map(|name| format!(" !{name}")).concat();
        assert_eq!(shown(&top), [format!(":{hidden}"), "a:".to_owned(), format!("a/b:{hidden}")]);
    }

    #[test]
    fn names_that_only_resemble_the_publishers_are_the_images_own() {
        assert_eq!(shown(&layer(&["a"], &[".cvmfs", "a/.cvmfscatalog.old", "a/.cvmfsbundle", "a/cvmfsdirtab"])), [":"]);
    }

    #[test]
    fn many_walkers_find_what_one_finds() {
        let names: Vec<String> = (0..400).map(|n| format!("{}/{}/{n}", n % 7, n % 31)).collect();
        let directories: Vec<&str> = names.iter().map(String::as_str).collect();
        let marked: Vec<String> = names.iter().map(|name| format!("{name}/.wh.gone")).collect();
        let files: Vec<&str> = marked.iter().map(String::as_str).collect();
        let top = layer(&directories, &files);
        let scan = find(&Host, top.path()).unwrap();
        let found = scan.directories.iter().filter(|d| d.deleted == ["gone"]).count();
        let parents = 1 + 7 + 7 * 31;
        assert_eq!((found, scan.directories.len()), (400, 400 + parents));
        assert!((0..scan.directories.len()).is_sorted_by_key(|place| scan.path(place)));
    }

    /// An unreadable directory must not pass for one without deletions.
    #[test]
    fn what_cannot_be_read_is_an_error() {
        let names: Vec<String> = (0..300).map(|n| format!("d/{n}")).collect();
        let top = layer(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
        for unreadable in ["", "d", "d/0", "d/150", "d/299"] {
            let at = top.path().join(unreadable);
            let sys = crate::system::testing::FaultySys::refusing(at.clone(), nix::errno::Errno::EIO);
            let Err(Error::System(e)) = find(&sys, top.path()) else { panic!("{unreadable} was read") };
            assert_eq!((e.path, e.errno), (at, nix::errno::Errno::EIO));
        }
    }

    /// A layer of 65,600 directories of nobody, without a marker, was said to have markers in so many.
    #[test]
    fn reason_of_a_bound_that_directories_of_nobody_count_for_names_them() {
        for limit in [Limit::Marked, Limit::Names, Limit::Path] {
            assert!(limit.to_string().contains("of nobody (uid or gid 65534)"), "{limit}");
        }
    }

    #[test]
    fn names_without_end_do_not_eat_the_memory() {
        let top = tempfile::tempdir().unwrap();
        let sys = crate::system::testing::FaultySys::endless(MAX_MEMORY / 200);
        let read = Progress::default();
        let handle = sys.open_dir(top.path()).unwrap();
        assert_eq!(scan(&sys, &handle, &read), Err(Error::Exceeds(Limit::Memory)));
        assert!(read.directories.into_inner() < 100);
    }

    /// Each marker made an entry with its whole path for every directory above it, twice: 200 chains of
    /// directories took 1.7 GiB.
    #[test]
    fn deep_chains_of_directories_cost_their_names_and_are_bounded() {
        let deep = |chains: usize, depth: usize| {
            // Of memory: a disk takes minutes for so many directories.
            let top = tempfile::tempdir_in("/dev/shm").unwrap();
            for chain in 0..chains {
                let path: PathBuf = std::iter::once(chain.to_string()).chain(vec!["d".to_owned(); depth]).collect();
                fs::create_dir_all(top.path().join(&path)).unwrap();
                fs::write(top.path().join(path).join(".wh.gone"), "").unwrap();
            }
            top
        };
        let scan = find(&Host, deep(20, 1_000).path()).unwrap();
        assert_eq!(scan.directories.len(), 1 + 20 * 1_001);
        let bytes: usize = scan.directories.iter().map(|d| size_of::<Directory>() + d.name.len()).sum();
        assert!(bytes < 4 << 20, "{bytes} bytes");
        assert_eq!(find(&Host, deep(70, 1_000).path()), Err(Error::Exceeds(Limit::Marked)));
        assert_eq!(find(&Host, deep(1, 1_800).path()), Err(Error::Exceeds(Limit::Path)));
    }

    #[test]
    fn names_of_markers_are_bounded() {
        let top = tempfile::tempdir().unwrap();
        for n in 0..MAX_RESULT / 500 {
            fs::write(top.path().join(format!(".wh.{n:0250}")), "").unwrap();
        }
        assert_eq!(find(&Host, top.path()), Err(Error::Exceeds(Limit::Names)));
    }

    #[test]
    fn directories_without_an_owner_are_found_and_the_top_is_none_of_them() {
        let top = layer(&["a/b/c", "d"], &[]);
        let found = |path: &str| {
            let sys = crate::system::testing::FaultySys::without_owner(top.path().join(path));
            let scan = find(&sys, top.path()).unwrap();
            let unowned = (0..scan.directories.len()).filter(|place| scan.directories[*place].has_no_owner);
            unowned.map(|place| scan.path(place).display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(found("a/b"), ["a/b"]);
        assert_eq!(found("d"), ["d"]);
        assert_eq!(found(""), Vec::<String>::new());
    }
}
