//! How a repository is, for an admin: whether it can be used, and whether the owners of its files
//! are those of the images.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::client::{self, CacheDirectory};
use super::executor::{Heartbeat, Priority};
use super::owners::{self, OwnerSample, Owners};
use super::server_health::IoErrors;
use super::unavailable::Unavailable;
use super::{MountGeneration, Repository};

/// The setting of a client that lists its own attributes on every file.
pub const HIDE_ATTRIBUTES: &str = "set CVMFS_MAGIC_XATTRS_VISIBILITY=rootonly (CVMFS_HIDE_MAGIC_XATTRS=yes where the \
    client is too old for it) in /etc/cvmfs/default.local and run cvmfs_config reload";

/// What is said of a repository whose client lists its own attributes on every file.
pub fn own_attributes(name: &str) -> String {
    format!(
        "the CernVM-FS client of repository {name} lists attributes of its own on every file: its layers are not used, \
         because containers would see these attributes and copy them with every file that they change"
    )
}

/// Of a repository that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryStatus {
    /// What a sample of its layers showed. None: they could not be read.
    pub sample: Option<OwnerSample>,
    /// Where its client keeps what it has fetched, as far as that can be told.
    pub cache: Option<CacheDirectory>,
    /// What its client answered others with within the last minutes, if that is not explained by an
    /// outage which is over.
    pub io_errors: Option<IoErrors>,
}

impl Repository {
    /// How it is: asked, and waited for within bounds.
    pub fn status(repository: &Arc<Self>) -> Result<RepositoryStatus, Unavailable> {
        let (asked, mount) = (Arc::clone(repository), repository.mount());
        Self::call(repository, move || {
            let looked = asked.check_layers_directory();
            mount.watch.record(looked.is_ok());
            if let Err(why) = looked
                && why != Unavailable::OwnAttributes
            {
                return Err(asked.note_failure(why));
            }
            if let Some(unreachable) = mount.server.outage() {
                return Err(Unavailable::ServerUnreachable(Box::new(unreachable)));
            }
            let sample = asked.log_sample(&mount);
            // Counts what that was answered with as well.
            let io_errors = IoErrors::recent(asked.sys.as_ref(), &asked.path);
            let io_errors = io_errors.and_then(|errors| mount.server.unexplained(errors));
            Ok(RepositoryStatus { sample, cache: asked.cache(), io_errors })
        })?
    }

    fn cache(&self) -> Option<CacheDirectory> {
        client::cache(self.sys.as_ref(), &self.path, Path::new(client::CONFIGURATION))
    }

    /// Logs if the client's cache is on the file system of the state root, whose device is `state`.
    pub(super) fn warn_of_cache(&self, state: Option<u64>) {
        if let Some(cache) = self.cache().filter(|cache| Some(cache.device) == state) {
            log::warn!(repository = self.name.as_str();
                "the CernVM-FS client of repository {} keeps its cache in {}, on the file system of the state root: starting \
                 containers can make every rename on it hang, for all programs of this node. Put one of them on another \
                 file system: the cache with CVMFS_CACHE_BASE in /etc/cvmfs/default.local, or the state root with --root; \
                 see docs/install.md", self.name, cache.path.display());
        }
    }

    /// Reads a sample of the layers in the background and logs what it shows, once for each mount.
    pub fn sample_layers(repository: &Arc<Self>) {
        let (asked, mount) = (Arc::clone(repository), repository.mount());
        if mount.is_sampled.swap(true, Ordering::Relaxed) {
            return;
        }
        let of = Arc::clone(&mount);
        let job = move || {
            asked.log_sample(&of);
        };
        if mount.calls.run(Priority::Last, Heartbeat::default(), Box::new(job)).is_err() {
            mount.is_sampled.store(false, Ordering::Relaxed);
        }
    }

    /// Reads a sample of the layers, and logs what it shows if that is news for this mount.
    pub(super) fn log_sample(&self, mount: &MountGeneration) -> Option<OwnerSample> {
        let sample = owners::sample(self.sys.as_ref(), &self.path).map_err(|e| self.unreadable(e)).ok();
        let is_known = sample.is_some_and(|sample| sample.owners != Owners::Unknown);
        mount.is_sampled.store(is_known, Ordering::Relaxed);
        let sample = sample?;
        let before = mount.sample.lock().replace(sample);
        let name = self.name.as_str();
        if before.map(|before| before.owners) != Some(sample.owners) {
            let what = sample.owners.describe(name);
            match sample.owners.remedy(name) {
                None => log::info!(repository = name; "{what}"),
                Some(remedy) if sample.owners.is_usual() => log::info!(repository = name; "{what}; {remedy}"),
                Some(remedy) => log::warn!(repository = name; "{what}: {remedy}"),
            }
        }
        if sample.lists_own_attributes && !before.is_some_and(|before| before.lists_own_attributes) {
            log::warn!(repository = name; "{}: {}", own_attributes(name), HIDE_ATTRIBUTES);
        }
        Some(sample)
    }
}
