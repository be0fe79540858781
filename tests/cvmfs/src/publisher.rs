//! Publishes directory trees as revisions of a signed CernVM-FS repository.
//!
//! `tree` reads a source tree into catalogs, `store` keeps objects, `catalog` writes the SQLite
//! files, `keys` signs. The order makes a revision atomic for clients: objects first, the
//! manifest last. Objects of older revisions stay.

#![forbid(unsafe_code)]

mod catalog;
mod keys;
mod store;
mod tree;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::format::{self, Digest, Kind, Manifest};
use catalog::Written;
use keys::Keys;
use store::Store;
use tree::Catalog;

/// The properties of a source tree that are published, which depend on a release manager's settings and union file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Extended attributes (`CVMFS_INCLUDE_XATTRS`).
    pub attributes: bool,
    /// Parts of seconds (`CVMFS_ENABLE_MTIME_NS`).
    pub nanoseconds: bool,
    /// That several names are one file, which the real publisher sees on aufs and not on overlayfs.
    pub hard_links: bool,
}

impl Settings {
    /// All that a catalog can say.
    pub const EVERYTHING: Self = Self { attributes: true, nanoseconds: true, hard_links: true };
}

/// A repository and what is needed to publish its next revision.
#[derive(Debug)]
pub struct Publisher {
    dir: PathBuf,
    fqrn: String,
    settings: Settings,
    revision: u64,
    keys: Keys,
    certificate: Digest,
    store: Store,
    /// The catalogs of the last revision by path: an unchanged one is not written again, so that
    /// clients need not fetch it again either.
    catalogs: HashMap<Vec<u8>, (Catalog, Written)>,
}

impl Publisher {
    /// An empty repository with keys of its own; `dir` is what a web server serves. Nothing can
    /// be mounted before the first [`publish`](Self::publish).
    pub fn create(dir: &Path, fqrn: &str, settings: Settings) -> Self {
        let mut store = Store::create(dir);
        let keys = Keys::create(fqrn);
        let certificate = store.put(&keys.certificate(), Kind::Certificate);
        // The crate `cvmfs` asks for these two, and asks again for 24 s when they are missing.
        for name in [".cvmfs_last_snapshot", ".cvmfs_is_snapshotting"] {
            store::write_atomically(&dir.join(name), b"");
        }
        Self {
            dir: dir.to_owned(),
            fqrn: fqrn.to_owned(),
            settings,
            revision: 0,
            keys,
            certificate,
            store,
            catalogs: HashMap::new(),
        }
    }

    /// Publishes the tree at `source` as the next revision; returns the revision number. Only
    /// files that changed since the last publish are read again.
    pub fn publish(&mut self, source: &Path) -> u64 {
        let (root, files) = tree::read(source, self.settings);
        self.store.put_files(&files);
        self.revision += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
        let mut catalogs = HashMap::new();
        let written = self.write_catalog(root, now, &mut catalogs);
        self.catalogs = catalogs;
        let history = catalog::history(&self.fqrn, &written, self.revision, now);
        let manifest = Manifest {
            root: written.digest,
            root_size: written.size,
            revision: self.revision,
            fqrn: self.fqrn.clone(),
            certificate: self.certificate,
            history: self.store.put(&history, Kind::History),
            published: now,
        };
        store::write_atomically(&self.dir.join(format::WHITELIST), &self.keys.whitelist(&self.fqrn, now));
        store::write_atomically(&self.dir.join(format::MANIFEST), &self.keys.manifest(&manifest));
        self.revision
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The public key with which a client verifies the whitelist, as a PEM file. It goes with the
    /// publisher.
    pub fn public_key(&self) -> PathBuf {
        self.keys.public_key()
    }

    /// Writes the nested catalogs first: their parent names them by their digest.
    fn write_catalog(
        &mut self,
        mut catalog: Catalog,
        now: u64,
        done: &mut HashMap<Vec<u8>, (Catalog, Written)>,
    ) -> Written {
        let nested: Vec<_> = std::mem::take(&mut catalog.nested)
            .into_iter()
            .map(|nested| (nested.path.clone(), self.write_catalog(nested, now, done)))
            .collect();
        catalog.references =
            nested.iter().map(|(path, written)| (path.clone(), written.digest, written.size)).collect();
        let written = match self.catalogs.remove(&catalog.path) {
            Some((old, written)) if old == catalog => written,
            _ => {
                let below = nested.iter().map(|(_, written)| written.counters).sum();
                let (bytes, counters) = catalog::write(&catalog, below, &self.store, self.revision, now);
                let size = bytes.len().try_into().expect("a length fits 64 bits");
                Written { digest: self.store.put(&bytes, Kind::Catalog), size, counters }
            }
        };
        done.insert(catalog.path.clone(), (catalog, written));
        written
    }
}
