//! The reader of the crate `cvmfs`, which we did not write, behind our own file system.
//!
//! Its metadata is not safe to use from two threads and its cold reads race with its own writes to
//! the cache, so one lock serializes every call into it. What it cannot show: devices (all are
//! 0:0), attributes, nanoseconds, hard links, names that are not UTF-8 (their directory cannot be
//! listed), and directories at the top that exist on the host as links (it asks the host). It does
//! not verify objects, and a missing one takes it 24 s.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cvmfs::common::{CvmfsError, FileLike};
use cvmfs::directory_entry::DirectoryEntry;
use cvmfs::fetcher::Fetcher;
use cvmfs::repository::Repository;
use fuser::Errno;

use crate::backend::{Backend, CatalogSummary, Content, Entry, Listing};

pub struct Library {
    url: String,
    cache: PathBuf,
    repository: Shared,
}

type Shared = Arc<Mutex<Repository>>;

impl Library {
    pub fn open(url: &str, cache: &Path) -> Result<Self, CvmfsError> {
        let repository = Arc::new(Mutex::new(read(url, cache)?));
        Ok(Self { url: url.to_owned(), cache: cache.to_owned(), repository })
    }

    /// Makes one call at a time. A panic in a call does not affect the next one.
    fn call<T>(&self, call: impl FnOnce(&Repository) -> Result<T, CvmfsError>) -> Result<T, Errno> {
        call(&self.repository.lock().unwrap_or_else(PoisonError::into_inner)).map_err(|error| errno(&error))
    }
}

fn read(url: &str, cache: &Path) -> Result<Repository, CvmfsError> {
    let cache = cache.to_str().ok_or(CvmfsError::FileNotFound)?;
    let repository = Repository::new(Fetcher::new(url, cache, true)?)?;
    repository.retrieve_current_root_catalog()?;
    Ok(repository)
}

/// A name that is not there is no complaint.
fn errno(error: &CvmfsError) -> Errno {
    if matches!(error, CvmfsError::FileNotFound) {
        return Errno::ENOENT;
    }
    eprintln!("cvmfs-test-client: the crate cvmfs: {error}");
    Errno::EIO
}

fn text(path: &[u8]) -> Result<&str, Errno> {
    std::str::from_utf8(path).map_err(|_| Errno::ENOENT)
}

fn entry(found: &DirectoryEntry) -> Entry {
    let target = found.symlink.clone().unwrap_or_default().into_bytes();
    Entry {
        mode: found.mode.into(),
        size: found.size.try_into().unwrap_or(0),
        device: 0,
        mtime: found.mtime,
        mtime_ns: 0,
        uid: found.uid,
        gid: found.gid,
        links: found.nlink().max(1),
        first_link: None,
        target,
        attributes: Vec::new(),
        content: None,
    }
}

impl Backend for Library {
    fn lookup(&self, path: &[u8]) -> Result<Arc<Entry>, Errno> {
        let path = text(path)?;
        self.call(|repository| repository.lookup(path)).map(|found| Arc::new(entry(&found)))
    }

    fn list(&self, path: &[u8]) -> Result<Listing, Errno> {
        let path = text(path)?;
        let found = self.call(|repository| repository.list_directory(path))?;
        Ok(found.iter().map(|each| (each.name.clone().into_bytes(), Arc::new(entry(each)))).collect())
    }

    fn open(&self, path: &[u8], _: &Entry) -> Result<Arc<dyn Content>, Errno> {
        let path = text(path)?;
        let file = self.call(|repository| repository.get_file(path))?;
        Ok(Arc::new(Open { file, repository: Arc::clone(&self.repository) }))
    }

    /// It knows no new revision, so it is opened anew.
    fn reload(&self) -> Result<u64, String> {
        let mut repository = self.repository.lock().unwrap_or_else(PoisonError::into_inner);
        *repository = read(&self.url, &self.cache).map_err(|error| format!("reload: the crate cvmfs: {error}"))?;
        Ok(repository.manifest.revision.into())
    }

    fn fqrn(&self) -> String {
        self.repository.lock().unwrap_or_else(PoisonError::into_inner).fqrn.clone()
    }

    fn revision(&self) -> u64 {
        self.repository.lock().unwrap_or_else(PoisonError::into_inner).manifest.revision.into()
    }

    fn root_hash(&self) -> String {
        self.repository.lock().unwrap_or_else(PoisonError::into_inner).manifest.root_catalog.clone()
    }

    /// The crate does not say of a path which catalog lists it.
    fn catalog(&self, _: &[u8]) -> Result<CatalogSummary, Errno> {
        Err(Errno::ENODATA)
    }
}

struct Open {
    file: Box<dyn FileLike>,
    repository: Shared,
}

impl Content for Open {
    fn read(&self, offset: u64, size: usize) -> Result<Vec<u8>, Errno> {
        let _one_at_a_time = self.repository.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; size];
        let mut filled = 0;
        while filled < size {
            let count = self.file.read_at(offset + filled as u64, &mut bytes[filled..])?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        bytes.truncate(filled);
        Ok(bytes)
    }
}
