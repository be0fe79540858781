//! containerd's rules for snapshots: what each of the ten calls means.
//!
//! Knows the store, the repositories and the disk, and nothing of the wire. All calls block, and come from many threads
//! at once. Invariant: a snapshot's directory is made first, under an id that is never used again, then the row, then
//! the answer; a removal goes the other way. So what was acknowledged is there, and a crash leaves at most directories
//! without a row and layers that are attached for nobody. The next start schedules both for cleanup.
//!
//! `pull` decides whether a layer has to be downloaded, `create` makes ordinary snapshots, `layer_provider` and
//! `attached_chains` bring published layers under them, `cleanup` takes away what removed ones left.
#![forbid(unsafe_code)]

mod attached_chains;
mod cleanup;
mod commit;
mod create;
mod error;
mod id_map;
pub mod inspect;
mod layer_provider;
mod list;
mod metadata;
mod mounts;
mod pull;
mod recovery;
mod scans;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use self::attached_chains::AttachedChains;
pub use self::cleanup::CleanupBatch;
use self::commit::CommitLocks;
pub(crate) use self::create::check_labels;
pub use self::error::{Error, Result};
pub(crate) use self::id_map::mapped_root;
use self::layer_provider::LayerProvider;
pub use self::list::{Cursor, MAX_PAGE_BYTES, Page};
pub use self::metadata::LabelChange;
pub use self::recovery::RecoveryReport;
use self::scans::ScanScheduler;
use crate::attach::Attacher;
use crate::model::{AttachMode, Key, Kind, LABEL_SNAPSHOT_REF, Labels};
use crate::overlay::SnapshotPaths;
use crate::repository::Repository;
use crate::store::Store;
use crate::system::{self, Sys};

pub struct Snapshotter {
    store: Arc<Store>,
    layer_provider: Arc<LayerProvider>,
    paths: SnapshotPaths,
    sys: Arc<dyn Sys>,
    /// Options that are added to every overlay, such as `index=off`.
    overlay_options: Vec<String>,
    commit_locks: CommitLocks,
    /// Held by the one cleanup that runs.
    cleanup_lock: parking_lot::Mutex<()>,
    /// Whether another cleanup waits for `cleanup_lock`.
    cleanup_queued: AtomicBool,
    /// The report of the recovery, once the start is over.
    recovery: OnceLock<RecoveryReport>,
}

/// The parameters of Prepare and View.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    pub key: Key,
    pub parent: Option<Key>,
    pub labels: Labels,
}

/// Which repositories a call may have to wait for. It decides which threads do the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepositoryDependency {
    /// Any of them: a pull asks one after the other.
    Any,
    /// Mostly the repository with this index, in the order of the configuration.
    Index(usize),
}

/// The settings of the snapshotter.
#[derive(Clone, Debug)]
pub struct SnapshotterOptions {
    pub attach: AttachMode,
    /// Options that are added to every overlay, such as `index=off`.
    pub overlay_options: Vec<String>,
}

impl Snapshotter {
    /// `snapshots` is an existing directory that nobody else uses. `repositories` are asked in their order, and there is
    /// at least one.
    pub fn new(
        store: Store,
        repositories: Vec<Repository>,
        sys: Arc<dyn Sys>,
        snapshots: &Path,
        options: SnapshotterOptions,
    ) -> Self {
        let paths = SnapshotPaths::new(snapshots.to_owned());
        let store = Arc::new(store);
        let layer_provider = Arc::new(LayerProvider {
            store: Arc::clone(&store),
            attacher: Arc::new(Attacher::new(paths.clone(), options.attach, Arc::clone(&sys))),
            scans: ScanScheduler::new(Arc::clone(&store), Arc::clone(&sys)),
            paths: paths.clone(),
            chains: AttachedChains::default(),
            repositories: repositories.into_iter().map(Arc::new).collect(),
        });
        Self {
            store,
            layer_provider,
            paths,
            sys,
            overlay_options: options.overlay_options,
            commit_locks: CommitLocks::default(),
            cleanup_lock: parking_lot::Mutex::default(),
            cleanup_queued: AtomicBool::default(),
            recovery: OnceLock::new(),
        }
    }

    /// Logs for each repository whether it is available. Does not wait for the answers.
    pub fn log_repository_availability(&self) {
        let state_root = self.state_root_device();
        for repository in &self.layer_provider.repositories {
            repository.log_availability(state_root);
        }
    }

    /// The device of the state root.
    fn state_root_device(&self) -> Option<u64> {
        self.sys.stat(self.paths.snapshots_dir()).ok().map(|status| status.device)
    }

    /// Returns memory to the system that a burst of calls needed.
    pub fn release_memory(&self) {
        self.store.release_memory();
        system::give_back_free_memory();
    }

    /// Closes the store. A thread that hangs in a repository may outlive everything else, and must not keep the metadata
    /// locked.
    pub fn close(&self) {
        self.store.close_for_good();
    }

    /// The repository that a call on `key` may have to wait for, which is that of the uppermost published layer. None if
    /// there is no published layer.
    pub fn repository_dependency(&self, key: &str) -> Result<Option<RepositoryDependency>> {
        let Some(key) = Key::parse_optional(key)? else { return Ok(None) };
        // Every start of a container comes by here, so no more rows are read than necessary, and only one if the chain
        // is attached already.
        let repository = self.store.read(|tx| {
            let Some((snapshot, parent)) = tx.with_parent(&key)? else { return Ok(None) };
            let top = if snapshot.kind == Kind::Committed { Some(snapshot) } else { parent };
            let Some(top) = top else { return Ok(None) };
            if let Some(attached) = self.layer_provider.chains.get(top.id) {
                return Ok(attached.repositories.first().map(|in_use| in_use.repository.name().to_owned()));
            }
            let chain = tx.chain(&top.key, |snapshot| snapshot.layer.is_some())?;
            let uppermost = chain.into_iter().next_back().and_then(|snapshot| snapshot.layer);
            Ok::<_, Error>(uppermost.map(|layer| layer.repository))
        })?;
        let Some(repository) = repository else { return Ok(None) };
        let index = self.layer_provider.repositories.iter().position(|other| other.name() == repository);
        Ok(Some(index.map_or(RepositoryDependency::Any, RepositoryDependency::Index)))
    }

    /// The same for a Prepare with these labels.
    pub fn repository_dependency_of_prepare(
        &self,
        parent: &str,
        labels: &HashMap<String, String>,
    ) -> Result<Option<RepositoryDependency>> {
        if labels.contains_key(LABEL_SNAPSHOT_REF) {
            Ok(Some(RepositoryDependency::Any))
        } else {
            self.repository_dependency(parent)
        }
    }
}

#[cfg(test)]
mod tests;
