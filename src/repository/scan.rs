//! Finds the names in a published layer that no container may see: the markers.
//!
//! A publisher unpacks a layer's tar as it is, so deletions stay in the form of the OCI image format: `.wh.<name>` deletes
//! `<name>` of the layers below, and `.wh..wh..opq` deletes all that they have in its directory. Overlayfs of the kernel
//! knows neither. Other markers are the publisher's own files (`is_publishers`). Any directory of any layer can have
//! markers. The rules are those of containerd's own unpacking, because containers are promised its result.
//! Invariant: a directory that cannot be read is an error, and never one without markers.
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

/// Files at the root of a nested catalog of CernVM-FS. The second is that of a catalog which the publisher made by itself
/// (`CVMFS_AUTOCATALOGS`).
pub const CATALOG_MARKERS: [&str; 2] = [".cvmfscatalog", ".cvmfsautocatalog"];
/// The file that tells a publisher where to make nested catalogs.
const DIRTAB: &[u8] = b".cvmfsdirtab";
/// Since version 2.14, a file with this prefix lists files that the client fetches together.
const BUNDLE_PREFIX: &[u8] = b".cvmfsbundle-";
/// The version of the rules. It has to be raised when they find other markers in the same layer: stored scans of older
/// versions are then made again.
pub const SCAN_FORMAT_VERSION: u32 = 3;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// The prefix of names at the top of a layer that are records of AUFS and delete nothing.
const META_PREFIX: &[u8] = b".wh..wh.";

/// The memory of a scan for names and directories, in bytes. A layer of a million entries needs a few megabytes.
const MAX_MEMORY: usize = 64 << 20;
/// Directories of a layer. Scanning a million of them over FUSE takes minutes.
const MAX_DIRECTORIES: usize = 1_000_000;
/// Directories of the result. The mask and the hide of the layer have as many each, on the local disk.
const MAX_MARKED: usize = 65_536;
/// The memory of the result, in bytes, which is enough for some 80,000 deletions. Ordinary layers need a few kilobytes.
const MAX_RESULT_BYTES: usize = 16 << 20;
/// The length of the path of a directory of the result, in bytes. The kernel accepts 4096, which include the path of the
/// state root.
const MAX_PATH: usize = 3_584;
/// The number that the kernel shows for a user or group that has none, and that of `nobody`. A publisher that keeps owners
/// gives directories which the layer's tar does not contain to the user and the group -1, which do not exist.
pub const NO_OWNER: u32 = 65_534;

/// Names a scan: one layer in one repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ScanKey {
    pub digest: Digest,
    pub repository: String,
}

/// The directories of a layer that have markers or no owner, and the directories above them. Each stands after its parent,
/// siblings are sorted by name, and the first is the top.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub directories: Vec<Directory>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// The index of its parent in the scan. The top has index 0 and is its own parent.
    pub parent: usize,
    /// Empty for the top.
    pub name: OsString,
    /// Names that the layer deletes from the layers below.
    pub deleted: Vec<OsString>,
    /// Whether everything is deleted that the layers below have in this directory.
    pub opaque: bool,
    /// Names in the layer that no container may see.
    pub hidden: Vec<OsString>,
    /// Whether its user or group is `NO_OWNER` and so may not exist. The kernel lets no one, not even root, write into such
    /// a directory as long as containers see it.
    pub has_no_owner: bool,
}

/// A limit of a scan. A layer that exceeds one is not scanned again: later pulls download it, and starts of containers on it
/// fail.
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
                MAX_RESULT_BYTES >> 20
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
    Exceeds(Limit),
    /// The scan hit a bug of ours.
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

/// How far a scan is, for callers that wait for it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Directories that were read.
    pub directories: AtomicUsize,
    pub heartbeat: Heartbeat,
}

/// The memory of a name at most, in bytes, with that of the directory whose name it may be.
fn cost(name: &OsStr) -> usize {
    name.len() + 96
}

impl Scan {
    /// The memory of the scan, in bytes.
    pub fn memory(&self) -> usize {
        self.directories.iter().map(Directory::memory).sum()
    }

    /// Whether the layer has to be shown with a mask: some names are hidden, or some owners replaced.
    pub fn needs_mask(&self) -> bool {
        self.directories.iter().any(Directory::has_mask)
    }

    /// Whether the layer deletes anything of the layers below.
    pub fn needs_hide(&self) -> bool {
        self.directories.iter().any(Directory::hides)
    }

    /// The path of the directory with this index, from the top of the layer.
    pub fn path(&self, mut index: usize) -> PathBuf {
        let mut names = Vec::new();
        while index != 0 {
            names.push(self.directories[index].name.as_os_str());
            index = self.directories[index].parent;
        }
        names.into_iter().rev().collect()
    }

    /// The indices of the directories that `filter` accepts, and of the directories above them, in their order.
    pub fn with_parents(&self, filter: impl Fn(&Directory) -> bool) -> Vec<usize> {
        let mut is_needed = vec![false; self.directories.len()];
        for (index, directory) in self.directories.iter().enumerate().rev() {
            is_needed[index] |= filter(directory);
            is_needed[directory.parent] |= is_needed[index];
        }
        (0..is_needed.len()).filter(|index| is_needed[*index]).collect()
    }
}

impl Directory {
    fn memory(&self) -> usize {
        cost(&self.name) + self.hidden.iter().chain(&self.deleted).map(|name| cost(name)).sum::<usize>()
    }

    /// Whether it has to be in the mask of the layer.
    pub fn has_mask(&self) -> bool {
        !self.hidden.is_empty() || self.has_no_owner
    }

    /// Whether it deletes anything of the layers below.
    pub fn hides(&self) -> bool {
        self.opaque || !self.deleted.is_empty()
    }

    fn with_markers(is_top: bool, markers: Vec<OsString>) -> Self {
        let mut directory = Self { hidden: markers, ..Self::default() };
        for name in &directory.hidden {
            let bytes = name.as_bytes();
            let Some(target) = bytes.strip_prefix(WHITEOUT_PREFIX) else { continue };
            if is_top && bytes.starts_with(META_PREFIX) {
                // containerd ignores these names, and the opaque marker is one of them.
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

/// Whether a publisher adds files of this name to those of an image. A directory of this name belongs to the image.
fn is_publishers(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    CATALOG_MARKERS.iter().any(|marker| name == *marker) || bytes == DIRTAB || bytes.starts_with(BUNDLE_PREFIX)
}

#[cfg(test)]
mod tests;
