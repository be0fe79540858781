//! Published layers on their way into a chain: why one is not taken, scanning one for
//! markers, attaching one.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::{Error, Result, Snapshotter};
use crate::attach::{self, Pin};
use crate::overlay::Lower;
use crate::repository::scan::{self, Scan};
use crate::repository::{Missing, Repository};
use crate::store::{Lookup, Store};
use crate::sys::Sys;
use crate::types::{Digest, InvalidDigest, Key, LABEL_LAYER_DIGEST, Layer, Quoted, SnapshotId};

/// Why the layer of a pull is downloaded after all.
#[derive(Debug)]
pub enum Fallback {
    NoDigest,
    BadDigest { digest: String, why: InvalidDigest },
    Missing { digest: Digest, why: Missing },
    NameTooLong,
    NameTaken { name: Key },
}

impl Fallback {
    /// One line for each layer that is downloaded.
    pub fn log(&self, key: &Key, reference: &str, repository: &str) {
        let key = key.to_string();
        match self {
            Self::Missing { digest, why: why @ Missing::NotPublished } => log::info!(
                digest = digest.as_str(), repository = repository;
                "layer {digest} will be downloaded: {why}"
            ),
            Self::Missing { digest, why } => log::warn!(
                digest = digest.as_str(), repository = repository;
                "layer {digest} will be downloaded: {why}"
            ),
            Self::NoDigest => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: the pull of {} came without the label {LABEL_LAYER_DIGEST}; \
                 containerd must be configured to pass image annotations to snapshotters, see the README",
                Quoted(reference)
            ),
            Self::BadDigest { digest, why } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: label {LABEL_LAYER_DIGEST} is {}: {why}", Quoted(digest)
            ),
            Self::NameTooLong => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: the label containerd.io/snapshot.ref is too long"
            ),
            Self::NameTaken { name } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: a snapshot that is not this layer has the name {name}"
            ),
        }
    }
}

/// So many layers wait for their scan at most; one that finds no place is scanned when it
/// is needed.
const WAITING_SCANS: usize = 4096;

/// Looks through each layer for markers, once per digest; what it found is kept in the store.
pub struct Scanner {
    finder: Arc<Finder>,
    soon: Sender<Digest>,
}

struct Finder {
    store: Arc<Store>,
    repository: Arc<Repository>,
    sys: Arc<dyn Sys>,
    /// Digests that are being scanned, so that nobody walks a layer beside somebody else.
    under_way: Mutex<HashMap<Digest, Arc<Mutex<()>>>>,
}

impl Scanner {
    pub fn start(store: Arc<Store>, repository: Arc<Repository>, sys: Arc<dyn Sys>) -> std::io::Result<Self> {
        let finder = Arc::new(Finder { store, repository, sys, under_way: Mutex::default() });
        let (soon, waiting) = bounded(WAITING_SCANS);
        let background = Arc::clone(&finder);
        thread::Builder::new().name("layer-scan".to_owned()).spawn(move || background.work(&waiting))?;
        Ok(Self { finder, soon })
    }

    /// Scans the layer in the background, so that the first container need not wait.
    pub fn scan_soon(&self, digest: Digest) {
        if self.soon.try_send(digest).is_err() {
            log::debug!("many layers are waiting for their scan; this one is scanned when it is needed");
        }
    }

    /// What the layer at `top` holds.
    pub fn scan(&self, digest: &Digest, top: &Path) -> Result<Scan> {
        self.finder.scan(digest, top)
    }
}

impl Finder {
    fn work(&self, waiting: &Receiver<Digest>) {
        while let Ok(digest) = waiting.recv() {
            let result = self
                .repository
                .layer(&digest)
                .map_err(|why| why.to_string())
                .and_then(|top| self.scan(&digest, &top).map_err(|e| e.to_string()));
            if let Err(why) = result {
                log::debug!("layer {digest} will be scanned when it is needed: {why}");
            }
        }
    }

    /// What the layer at `top` holds; walks it only if nobody has before.
    fn scan(&self, digest: &Digest, top: &Path) -> Result<Scan> {
        if let Some(known) = self.known(digest)? {
            return Ok(known);
        }
        let turn = Arc::clone(self.under_way.lock().entry(digest.clone()).or_default());
        let result = {
            let _turn = turn.lock();
            match self.known(digest)? {
                Some(known) => Ok(known),
                None => self.walk(digest, top),
            }
        };
        // Whoever comes later finds the result in the store, or walks again.
        self.under_way.lock().remove(digest);
        result
    }

    fn known(&self, digest: &Digest) -> Result<Option<Scan>> {
        self.store.read(|tx| tx.scan(digest).map_err(Error::from))
    }

    fn walk(&self, digest: &Digest, top: &Path) -> Result<Scan> {
        let found = scan::scan(self.sys.as_ref(), top)?;
        self.store.write(|tx| tx.put_scan(digest, &found).map_err(Error::from))?;
        Ok(found)
    }
}

impl Snapshotter {
    pub(super) fn unavailable(&self, layer: &Layer, why: Missing) -> Error {
        Error::LayerUnavailable { digest: layer.digest.clone(), repository: self.repository.name().to_owned(), why }
    }

    /// Attaches a published layer as snapshot `id` and says how overlayfs is to see it.
    pub(super) fn attach(&self, id: SnapshotId, layer: &Layer) -> Result<(Lower, Pin)> {
        let unavailable = |why| self.unavailable(layer, why);
        let top = self.repository.layer(&layer.digest).map_err(unavailable)?;
        let scan = self.scanner.scan(&layer.digest, &top).map_err(|e| match e {
            Error::System(cause) => unavailable(Missing::Unreadable(cause)),
            other => other,
        })?;
        let pin = self.attacher.attach(id, &top, &scan).map_err(|e| {
            // Gone while we were at it?
            let of_repository = e.path.starts_with(&top) || self.repository.layer(&layer.digest).is_err();
            if of_repository { unavailable(Missing::Unreadable(e)) } else { Error::System(e) }
        })?;
        let (mask, hides) = attach::skeletons(&scan);
        Ok((Lower::Remote { id, digest: layer.digest.clone(), mask, hides }, pin))
    }
}
