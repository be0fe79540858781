//! How a repository is, for an admin: whether it can be used, whether the owners of its files are those of the images,
//! and where its client keeps its cache.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use super::client::{self, CacheDirectory};
use super::generation::MountGeneration;
use super::layout;
use super::owners::{self, OwnerSample, Owners};
use super::server_health::IoErrors;
use super::unavailable::Unavailable;
use crate::sync::atomic::Ordering;

/// The remedy for a client that lists its own attributes on every file.
pub const HIDE_ATTRIBUTES: &str = "set CVMFS_MAGIC_XATTRS_VISIBILITY=rootonly (CVMFS_HIDE_MAGIC_XATTRS=yes where the \
    client is too old for it) in /etc/cvmfs/default.local and run cvmfs_config reload";

/// The consequence, for a repository whose client lists its own attributes on every file.
pub fn own_attributes(name: &str) -> String {
    format!(
        "the CernVM-FS client of repository {name} lists attributes of its own on every file: its layers are not used, \
         because containers would see these attributes and copy them with every file that they change"
    )
}

/// The status of a repository that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryStatus {
    /// What a sample of its layers shows. None: they could not be read.
    pub sample: Option<OwnerSample>,
    /// Where its client keeps its cache, as far as that can be told.
    pub cache: Option<CacheDirectory>,
    /// Input/output errors of its client within the last minutes, unless an outage that is over explains them.
    pub io_errors: Option<IoErrors>,
}

impl MountGeneration {
    pub(super) fn status(self: &Arc<Self>) -> Result<RepositoryStatus, Unavailable> {
        let checked = self.check_layers_directory();
        self.availability.record(checked.is_ok());
        match checked {
            // The sample shows it as well.
            Ok(()) | Err(Unavailable::OwnAttributes) => self.health.record_device(),
            Err(why) => return Err(self.report(why)),
        }
        if let Some(unreachable) = self.server.outage() {
            return Err(Unavailable::ServerUnreachable(Box::new(unreachable)));
        }
        let sample = self.log_sample();
        // Errors that the sample met are counted as well.
        let io_errors = IoErrors::recent(self.sys(), self.path());
        let io_errors = io_errors.and_then(|errors| self.server.unexplained(errors));
        Ok(RepositoryStatus { sample, cache: self.cache(), io_errors })
    }

    /// Logs whether the repository is mounted. `state_device` is the device of the state root.
    pub(super) fn log_availability(self: &Arc<Self>, state_device: Option<u64>) {
        let name = self.name();
        match layout::probe(self.sys(), self.path()) {
            Ok(()) => {
                self.health.record_device();
                self.warn_of_cache(state_device);
                log::info!(event = "repository_available", repository = name;
                    "repository {name} is there, at {}", self.path().display());
                self.sample_layers();
            }
            Err(why) => log::warn!(event = "repository_unavailable", repository = name;
                "repository {name} is not there yet: {}; layers are downloaded until it is, and no service has to be \
                 restarted then", self.report(why)),
        }
    }

    fn cache(&self) -> Option<CacheDirectory> {
        client::find_cache(self.sys(), self.path(), Path::new(client::CONFIGURATION))
    }

    fn warn_of_cache(&self, state_device: Option<u64>) {
        if let Some(cache) = self.cache().filter(|cache| Some(cache.device) == state_device) {
            log::warn!(event = "client_cache_on_state_root", repository = self.name(), path:% = cache.path.display();
                "the CernVM-FS client of repository {} keeps its cache in {}, on the file system of the state root: starting \
                 containers can make every rename on it hang, for all programs of this node. Put one of them on another \
                 file system: the cache with CVMFS_CACHE_BASE in /etc/cvmfs/default.local, or the state root with --root; \
                 see docs/install.md", self.name(), cache.path.display());
        }
    }

    /// Reads a sample of the layers in the background and logs what it shows, once for each mount.
    pub fn sample_layers(self: &Arc<Self>) {
        if self.is_sampled.swap(true, Ordering::Relaxed) {
            return;
        }
        let sampled = self.spawn_background(|generation| {
            generation.log_sample();
        });
        if sampled.is_err() {
            self.is_sampled.store(false, Ordering::Relaxed);
        }
    }

    /// Reads a sample of the layers, and logs what this mount has not shown before.
    fn log_sample(&self) -> Option<OwnerSample> {
        let name = self.name();
        let sample = owners::sample(self.sys(), self.path()).map_err(|e| self.report_failed_call(e)).ok();
        let is_known = sample.is_some_and(|sample| sample.owners != Owners::Unknown);
        self.is_sampled.store(is_known, Ordering::Relaxed);
        let sample = sample?;
        let previous = self.sample.lock().replace(sample);
        if previous.map(|previous| previous.owners) != Some(sample.owners) {
            let description = sample.owners.describe(name);
            match sample.owners.remedy(name) {
                None => log::info!(event = "owners_sampled", repository = name; "{description}"),
                Some(remedy) if sample.owners.is_usual() => {
                    log::info!(event = "owners_sampled", repository = name; "{description}; {remedy}");
                }
                Some(remedy) => log::warn!(event = "owners_wrong", repository = name; "{description}: {remedy}"),
            }
        }
        if sample.lists_own_attributes && !previous.is_some_and(|previous| previous.lists_own_attributes) {
            log::warn!(event = "client_lists_own_attributes", repository = name;
                "{}: {HIDE_ATTRIBUTES}", own_attributes(name));
        }
        Some(sample)
    }
}
