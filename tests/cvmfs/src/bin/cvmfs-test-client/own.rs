//! Our own reader: manifest, root catalog, nested catalogs when something below them is asked for,
//! objects when they are opened.

#![forbid(unsafe_code)]

mod catalog;
mod fetch;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use fuser::Errno;

use crate::backend::{Backend, CatalogSummary, Content, Entry, Listing};
use crate::error_log::ErrorLog;
use catalog::Catalog;
use cvmfs_testbed::format::{self, Digest, Kind, Manifest};
pub use fetch::Fetch;

pub struct Own {
    fetch: Fetch,
    log: Arc<ErrorLog>,
    current: RwLock<Arc<Revision>>,
    /// The catalogs read so far, of every revision. Each is locked while it is read, so that those
    /// who want the same one wait and others do not.
    catalogs: Mutex<HashMap<Digest, Arc<Slot>>>,
}

/// A catalog, once it is read.
type Slot = Mutex<Option<Arc<Catalog>>>;

struct Revision {
    manifest: Manifest,
    root: Arc<Catalog>,
}

impl Own {
    pub fn open(fetch: Fetch, log: Arc<ErrorLog>) -> Result<Self, fetch::Error> {
        let manifest = fetch.manifest()?;
        let root = Arc::new(read_catalog(&fetch, manifest.root, b"")?);
        let current = RwLock::new(Arc::new(Revision { manifest, root }));
        Ok(Self { fetch, log, current, catalogs: Mutex::default() })
    }

    fn current(&self) -> Arc<Revision> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn nested(&self, digest: Digest, path: &[u8]) -> Result<Arc<Catalog>, Errno> {
        let slot = Arc::clone(self.catalogs.lock().unwrap_or_else(PoisonError::into_inner).entry(digest).or_default());
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(catalog) = &*slot {
            return Ok(Arc::clone(catalog));
        }
        let read = read_catalog(&self.fetch, digest, path);
        let catalog = Arc::new(read.map_err(|error| self.log.report(error))?);
        *slot = Some(Arc::clone(&catalog));
        Ok(catalog)
    }

    /// The catalog that lists the directory `path`.
    fn listing(&self, path: &[u8]) -> Result<Arc<Catalog>, Errno> {
        let mut catalog = Arc::clone(&self.current().root);
        while let Some((path, digest)) = catalog.towards(path) {
            catalog = self.nested(digest, path)?;
        }
        Ok(catalog)
    }
}

impl Backend for Own {
    /// The entry of a nested catalog's directory is taken from above it: looking at a directory
    /// fetches nothing.
    fn lookup(&self, path: &[u8]) -> Result<Arc<Entry>, Errno> {
        self.listing(format::parent(path))?.entry(path).ok_or(Errno::ENOENT)
    }

    fn list(&self, path: &[u8]) -> Result<Listing, Errno> {
        Ok(self.listing(path)?.list(path))
    }

    fn open(&self, _: &[u8], entry: &Entry) -> Result<Arc<dyn Content>, Errno> {
        // Files cut into chunks have none; the publisher makes no such files.
        let digest = entry.content.ok_or(Errno::EIO)?;
        let path = self.fetch.object(digest, Kind::File).map_err(|error| self.log.report(error))?;
        Ok(Arc::new(Object(File::open(path)?)))
    }

    fn reload(&self) -> Result<u64, String> {
        let read = || -> Result<Option<Revision>, fetch::Error> {
            let manifest = self.fetch.manifest()?;
            if manifest.revision == self.revision() {
                return Ok(None);
            }
            let root = Arc::new(read_catalog(&self.fetch, manifest.root, b"")?);
            Ok(Some(Revision { manifest, root }))
        };
        if let Some(revision) = read().map_err(|error| error.to_string())? {
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(revision);
        }
        Ok(self.revision())
    }

    fn fqrn(&self) -> String {
        self.current().manifest.fqrn.clone()
    }

    fn revision(&self) -> u64 {
        self.current().manifest.revision
    }

    fn root_hash(&self) -> String {
        self.current().manifest.root.to_string()
    }

    fn catalog(&self, path: &[u8]) -> Result<CatalogSummary, Errno> {
        Ok(self.listing(path)?.summary().clone())
    }
}

fn read_catalog(fetch: &Fetch, digest: Digest, path: &[u8]) -> Result<Catalog, fetch::Error> {
    Catalog::read(&fetch.object(digest, Kind::Catalog)?, digest, path)
}

struct Object(File);

impl Content for Object {
    fn read(&self, offset: u64, size: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; size];
        let mut filled = 0;
        while filled < size {
            let count = self.0.read_at(&mut bytes[filled..], offset + filled as u64)?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        bytes.truncate(filled);
        Ok(bytes)
    }
}
