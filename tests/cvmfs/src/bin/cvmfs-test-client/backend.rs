//! The interface between the file system and a reader of the repository. Paths are those of the catalogs: the root is
//! empty, and all others begin with a slash.

#![forbid(unsafe_code)]

use std::sync::Arc;

use fuser::Errno;

use cvmfs_testbed::format::Digest;

/// A file, directory, link or device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// With the file type.
    pub mode: u32,
    pub size: u64,
    /// The device number of `stat`; 0 for an entry that is no device.
    pub device: u64,
    pub mtime: i64,
    pub mtime_ns: u32,
    pub uid: u32,
    pub gid: u32,
    pub links: u32,
    /// The first path of the entry's group of hard links.
    pub first_link: Option<Arc<[u8]>>,
    /// The target of a symbolic link.
    pub target: Vec<u8>,
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// The digest of a regular file; None if the reader opens files by their paths.
    pub content: Option<Digest>,
}

impl Entry {
    /// The bits of the mode that say what it is.
    pub fn kind(&self) -> u32 {
        self.mode & 0o170_000
    }
}

/// The content of an open file. It stays readable when a new revision replaces it.
pub trait Content: Send + Sync {
    /// Fewer bytes than `size` only at the end.
    fn read(&self, offset: u64, size: usize) -> Result<Vec<u8>, Errno>;
}

/// Names and entries of a directory, without `.` and `..`.
pub type Listing = Vec<(Vec<u8>, Arc<Entry>)>;

/// The properties of a catalog.
#[derive(Clone, Debug)]
pub struct CatalogSummary {
    pub digest: Digest,
    /// The directory whose entries it lists.
    pub path: Vec<u8>,
    /// Sorted by name.
    pub counters: Vec<(String, i64)>,
}

pub trait Backend: Send + Sync {
    fn lookup(&self, path: &[u8]) -> Result<Arc<Entry>, Errno>;

    fn list(&self, path: &[u8]) -> Result<Listing, Errno>;

    fn open(&self, path: &[u8], entry: &Entry) -> Result<Arc<dyn Content>, Errno>;

    /// Takes up the newest revision; returns the revision that is served from now on.
    fn reload(&self) -> Result<u64, String>;

    fn fqrn(&self) -> String;

    fn revision(&self) -> u64;

    fn root_hash(&self) -> String;

    /// The catalog that lists the directory `path`.
    fn catalog(&self, path: &[u8]) -> Result<CatalogSummary, Errno>;
}
