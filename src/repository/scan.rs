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

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};

use super::lane::Pulse;
use crate::sys::{self, FileType, Sys};
use crate::types::Digest;

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

/// Threads that read directories of one tree. The time goes to the FUSE server's round
/// trips, not to our cores: four need half the time of one.
const WALKERS: usize = 4;
/// A tree with fewer directories is read by one.
const FEW: usize = 64;
/// Names that a scan holds at once, in bytes: directories that are still to be read, and
/// markers. A layer of a million entries needs a few megabytes.
const MOST_BYTES: usize = 64 << 20;

/// A walk shows life after so many entries of one directory.
const BEAT: usize = 100;

/// Names a scan: one layer in one repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ScanKey {
    pub digest: Digest,
    pub repository: String,
}

/// The directories that hold markers, and their parents; a directory stands after its
/// parent, and the first is the top.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub directories: Vec<Directory>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Relative to the top of the layer, empty for the top itself.
    pub path: PathBuf,
    /// Names that the layer deletes from the layers below.
    pub deleted: Vec<OsString>,
    /// Nothing of this directory shows from the layers below.
    pub opaque: bool,
    /// Names in the layer that no container may see.
    pub hidden: Vec<OsString>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    System(sys::Error),
    /// Not an image that anybody built: it would take too much memory.
    TooMuch {
        top: PathBuf,
    },
    /// A thread of ours failed.
    Panicked {
        top: PathBuf,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(cause) => cause.fmt(f),
            Self::TooMuch { top } => write!(
                f,
                "{} has more names of directories and markers than {} MiB hold",
                top.display(),
                MOST_BYTES >> 20
            ),
            Self::Panicked { top } => write!(f, "looking through {} hit a bug in the snapshotter", top.display()),
        }
    }
}

impl From<sys::Error> for Error {
    fn from(cause: sys::Error) -> Self {
        Self::System(cause)
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// How far a walk is, for whoever waits for it.
#[derive(Debug, Default)]
pub struct Progress {
    pub directories: AtomicUsize,
    /// Beats with each answer.
    pub pulse: Pulse,
}

/// Walks the directories at `top`. What is found is a matter of names only: owners and
/// modes look different through another mount of the same repository.
pub fn scan(sys: &dyn Sys, top: &Path, progress: &Progress) -> Result<Scan> {
    let walk = Walk { sys, top, progress, state: Mutex::default(), changed: Condvar::new() };
    walk.state.lock().unread.push(Unread { parent: Arc::from(Path::new("")), name: OsString::new() });
    walk.read_until(FEW);
    if !walk.is_over() {
        thread::scope(|scope| {
            for _ in 0..WALKERS {
                scope.spawn(|| walk.read_until(usize::MAX));
            }
        });
    }
    walk.result()
}

/// A directory by its parent, which it shares with its siblings.
struct Unread {
    parent: Arc<Path>,
    name: OsString,
}

struct Walk<'a> {
    sys: &'a dyn Sys,
    top: &'a Path,
    progress: &'a Progress,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    unread: Vec<Unread>,
    /// Walkers that read a directory, and may find more.
    busy: usize,
    bytes: usize,
    marked: BTreeMap<PathBuf, Directory>,
    failed: Option<Error>,
}

impl State {
    fn is_over(&self) -> bool {
        self.failed.is_some() || (self.unread.is_empty() && self.busy == 0)
    }
}

impl Walk<'_> {
    fn is_over(&self) -> bool {
        self.state.lock().is_over()
    }

    /// Reads directories until all are, or somebody failed, or this one has read `limit`.
    fn read_until(&self, limit: usize) {
        for _ in 0..limit {
            let next = {
                let mut state = self.state.lock();
                while state.unread.is_empty() && !state.is_over() {
                    self.changed.wait(&mut state);
                }
                if state.is_over() {
                    return;
                }
                state.busy += 1;
                state.unread.pop()
            };
            let Some(next) = next else { return };
            // A panic must not leave the others waiting for this one.
            let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.read(&next)))
                .unwrap_or_else(|_| Err(Error::Panicked { top: self.top.to_owned() }));
            self.progress.directories.fetch_add(1, Ordering::Relaxed);
            self.progress.pulse.beat();
            let mut state = self.state.lock();
            state.busy -= 1;
            state.bytes = state.bytes.saturating_sub(cost(&next.name));
            match found {
                Ok((directory, below)) => {
                    let parent: Arc<Path> = Arc::from(directory.path.as_path());
                    state.bytes += below.iter().map(|name| cost(name)).sum::<usize>() + directory.cost();
                    state.unread.extend(below.into_iter().map(|name| Unread { parent: Arc::clone(&parent), name }));
                    if directory.opaque || !directory.hidden.is_empty() {
                        state.marked.insert(directory.path.clone(), directory);
                    }
                    if state.bytes > MOST_BYTES {
                        state.failed = Some(Error::TooMuch { top: self.top.to_owned() });
                    }
                }
                Err(e) => state.failed = Some(e),
            }
            self.changed.notify_all();
        }
    }

    /// The markers of one directory, and the directories in it.
    fn read(&self, unread: &Unread) -> Result<(Directory, Vec<OsString>)> {
        let path = unread.parent.join(&unread.name);
        let at = self.top.join(&path);
        let is_top = path.as_os_str().is_empty();
        let mut below = Vec::new();
        let mut markers = Vec::new();
        let mut bytes = 0;
        let mut entries = 0_usize;
        let mut leads_out = false;
        self.sys.for_each_entry(&at, &mut |name, file_type| {
            entries += 1;
            leads_out |= matches!(name.as_bytes(), b"" | b"." | b"..") || name.as_bytes().contains(&b'/');
            // Names come many at a time: a large directory gets on while it is being read.
            if entries.is_multiple_of(BEAT) {
                self.progress.pulse.beat();
            }
            let kept = match file_type {
                _ if is_whiteout(name) => &mut markers,
                FileType::Other if is_publishers(name) => &mut markers,
                FileType::Directory => &mut below,
                _ => return,
            };
            bytes += cost(name);
            if bytes <= MOST_BYTES {
                kept.push(name.to_owned());
            }
        })?;
        if bytes > MOST_BYTES {
            return Err(Error::TooMuch { top: self.top.to_owned() });
        }
        if leads_out {
            // As the kernel says to a file system that hands out such names.
            return Err(sys::Error { call: "read directory", path: at, errno: Errno::EIO }.into());
        }
        let mut directory = Directory::of(path, is_top, markers);
        if !directory.deleted.is_empty() {
            // A name that the layer both deletes and has is simply there: a file hides what is
            // below, and a directory is merged with it, for unpacking it removes the whiteout.
            let mut absent: HashSet<OsString> = directory.deleted.drain(..).collect();
            self.sys.for_each_entry(&at, &mut |name, _| {
                absent.remove(name);
            })?;
            directory.deleted = absent.into_iter().collect();
            directory.deleted.sort();
        }
        Ok((directory, below))
    }

    fn result(self) -> Result<Scan> {
        let State { mut marked, failed, .. } = self.state.into_inner();
        if let Some(e) = failed {
            return Err(e);
        }
        let parents: HashSet<PathBuf> =
            marked.keys().flat_map(|path| path.ancestors().skip(1)).map(Path::to_owned).collect();
        for path in parents.into_iter().chain([PathBuf::new()]) {
            marked.entry(path.clone()).or_insert_with(|| Directory { path, ..Directory::default() });
        }
        Ok(Scan { directories: marked.into_values().collect() })
    }
}

impl Scan {
    /// Something in it is to be hidden.
    pub fn has_mask(&self) -> bool {
        self.directories.iter().any(Directory::has_mask)
    }

    /// It deletes something of the layers below.
    pub fn hides(&self) -> bool {
        self.directories.iter().any(Directory::hides)
    }
}

impl Directory {
    /// Something of it is to be hidden.
    pub fn has_mask(&self) -> bool {
        !self.hidden.is_empty()
    }

    /// It deletes something of the layers below.
    pub fn hides(&self) -> bool {
        self.opaque || !self.deleted.is_empty()
    }

    fn of(path: PathBuf, is_top: bool, markers: Vec<OsString>) -> Self {
        let mut directory = Self { path, hidden: markers, ..Self::default() };
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

    fn cost(&self) -> usize {
        let names = self.hidden.iter().chain(&self.deleted);
        if self.hidden.is_empty() { 0 } else { cost(self.path.as_os_str()) + names.map(|n| cost(n)).sum::<usize>() }
    }
}

/// What a name takes in memory, about.
fn cost(name: &OsStr) -> usize {
    name.len() + 64
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
    use crate::sys::Host;
    use std::fs;

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
        scan(sys, top, &Progress::default())
    }

    /// `path: -deleted … !hidden … =opaque`, one line a directory.
    fn shown(top: &tempfile::TempDir) -> Vec<String> {
        let scan = find(&Host, top.path()).unwrap();
        scan.directories
            .iter()
            .map(|d| {
                let mut line = format!("{}:", d.path.display());
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
        assert!(scan.directories.is_sorted_by_key(|d| &d.path));
    }

    /// An unreadable directory must not pass for one without deletions.
    #[test]
    fn what_cannot_be_read_is_an_error() {
        let names: Vec<String> = (0..300).map(|n| format!("d/{n}")).collect();
        let top = layer(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
        for unreadable in ["", "d", "d/0", "d/150", "d/299"] {
            let at = top.path().join(unreadable);
            let sys = crate::sys::failing::Failing::refusing(at.clone(), nix::errno::Errno::EIO);
            let Err(Error::System(e)) = find(&sys, top.path()) else { panic!("{unreadable} was read") };
            assert_eq!((e.path, e.errno), (at, nix::errno::Errno::EIO));
        }
    }

    #[test]
    fn names_without_end_do_not_eat_the_memory() {
        let top = tempfile::tempdir().unwrap();
        let sys = crate::sys::failing::Failing::endless(MOST_BYTES / 200);
        let read = Progress::default();
        assert_eq!(scan(&sys, top.path(), &read), Err(Error::TooMuch { top: top.path().to_owned() }));
        assert!(read.directories.into_inner() < 100);
    }
}
