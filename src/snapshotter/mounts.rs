//! Mounts, and what it shares with Prepare and View: the chain below a snapshot is attached before its mounts are
//! returned.
#![forbid(unsafe_code)]

use std::sync::Arc;

use nix::errno::Errno;

use super::attached_chains::AttachedChain;
use super::{Error, Result, Snapshotter};
use crate::model::{Key, Kind, Mount, Snapshot, SnapshotId};
use crate::overlay::{self, LowerDirectories};
use crate::system;

/// Whether an attached chain is cached for the next call that needs it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ChainCaching {
    Cache,
    Skip,
}

impl Snapshotter {
    /// The mounts of an active snapshot or a view, as Prepare or View returned them.
    pub fn mounts(&self, key: &Key) -> Result<Vec<Mount>> {
        let (snapshot, parent) =
            self.store.read(|tx| tx.with_parent(key))?.ok_or_else(|| Error::NotFound(key.clone()))?;
        if snapshot.kind == Kind::Committed {
            return Err(Error::WrongKind {
                key: key.clone(),
                kind: snapshot.kind,
                needs: "only active snapshots and views have mounts",
            });
        }
        self.ensure_files_exist(&snapshot)?;
        let chain = self.attach_parent_chain(parent.as_ref(), ChainCaching::Cache);
        // If the snapshot was removed or committed meanwhile, its layers were attached for nobody.
        if self.store.read(|tx| tx.id_of(key))? != Some(snapshot.id) {
            if let Ok(chain) = chain {
                self.detach_chain_if_unused(chain);
            }
            return Err(Error::NotFound(key.clone()));
        }
        Ok(self.mounts_for(snapshot.kind, snapshot.id, &chain?.lower))
    }

    pub(super) fn mounts_for(&self, kind: Kind, id: SnapshotId, lower: &LowerDirectories) -> Vec<Mount> {
        match kind {
            Kind::View => overlay::view(&self.paths, id, lower, &self.overlay_options),
            Kind::Active | Kind::Committed => overlay::active(&self.paths, id, lower, &self.overlay_options),
        }
    }

    /// Attaches all published layers of the chain whose uppermost snapshot is `parent`.
    pub(super) fn attach_parent_chain(
        &self,
        parent: Option<&Snapshot>,
        caching: ChainCaching,
    ) -> Result<Arc<AttachedChain>> {
        let Some(parent) = parent else { return Ok(Arc::default()) };
        if parent.layer.is_none() {
            self.ensure_files_exist(parent)?;
        }
        let (provider, deadlines) = (&self.layer_provider, self.layer_provider.deadlines());
        if let Some(attached) = provider.chains.get_current(parent.id, &provider.attacher, deadlines) {
            return Ok(attached);
        }
        let chain = self.store.read(|tx| tx.chain(&parent.key, |_| false))?;
        // The parent may have been removed meanwhile, and another one made under the same name.
        if chain.first().is_none_or(|first| first.id != parent.id) {
            return Err(Error::ParentNotFound(parent.key.clone()));
        }
        match self.ensure_local_files_exist(&chain).and_then(|()| provider.attach_chain(&chain, deadlines)) {
            Ok(attached) => {
                let attached = Arc::new(attached);
                if caching == ChainCaching::Cache {
                    provider.chains.insert(&attached);
                }
                Ok(attached)
            }
            Err(e) => {
                let published: Vec<SnapshotId> =
                    chain.iter().filter(|snapshot| snapshot.layer.is_some()).map(|snapshot| snapshot.id).collect();
                provider.detach_unused(&published);
                Err(e)
            }
        }
    }

    /// Gives up a chain whose layers may have been attached for nobody.
    pub(super) fn detach_chain_if_unused(&self, chain: Arc<AttachedChain>) {
        let published = chain.published_ids();
        // Its pins would keep the layers attached.
        drop(chain);
        self.layer_provider.detach_unused(&published);
    }

    fn ensure_local_files_exist(&self, chain: &[Snapshot]) -> Result<()> {
        let mut local = chain.iter().filter(|snapshot| snapshot.layer.is_none());
        local.try_for_each(|snapshot| self.ensure_files_exist(snapshot))
    }

    pub(super) fn ensure_files_exist(&self, local: &Snapshot) -> Result<()> {
        match self.sys.lstat(&self.paths.fs(local.id)) {
            Ok(_) => Ok(()),
            Err(system::Error { errno: Errno::ENOENT, .. }) => {
                Err(Error::FilesMissing { key: local.key.clone(), id: local.id })
            }
            Err(e) => Err(e.into()),
        }
    }
}
