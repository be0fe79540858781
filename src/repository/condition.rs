//! How a repository is, for an admin: whether it can be used, and whether the owners of its files
//! are those of the images.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::client::{self, Cache};
use super::lane::alive;
use super::missing::Missing;
use super::server::IoErrors;
use super::{LAYER_ROOT, LAYERS, Repository, probe};
use crate::types::Digest;

/// Entries that are looked at to see whose they are.
const OWNED_ENTRIES: usize = 32;
/// And layers.
const OWNED_LAYERS: usize = 8;

/// Of a repository that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// User and group of everything in it, as far as it was looked at, if that is not root.
    pub owner: Option<(u32, u32)>,
    /// Where its client keeps what it has fetched, as far as that can be told.
    pub cache: Option<Cache>,
    /// What its client answered others with within the last minutes, if that is not explained by an
    /// outage which is over.
    pub io_errors: Option<IoErrors>,
}

impl Repository {
    /// How it is: asked, and waited for within bounds.
    pub fn condition(repository: &Arc<Self>) -> Result<Condition, Missing> {
        let (asked, mount) = (Arc::clone(repository), repository.mount());
        Self::ask(repository, move || {
            let probed = probe(asked.sys.as_ref(), &asked.path);
            mount.watch.saw(probed.is_ok());
            probed.map_err(|why| asked.known(why))?;
            if let Some(unreachable) = mount.server.outage() {
                return Err(Missing::ServerUnreachable(Box::new(unreachable)));
            }
            let owner = asked.owner_of_all();
            // Counts what that was answered with as well.
            let io_errors = IoErrors::recent(asked.sys.as_ref(), &asked.path);
            let io_errors = io_errors.and_then(|errors| mount.server.unexplained(errors));
            Ok(Condition { owner, cache: asked.cache(), io_errors })
        })?
    }

    fn cache(&self) -> Option<Cache> {
        client::cache(self.sys.as_ref(), &self.path, Path::new(client::CONFIGURATION))
    }

    /// Logs if the client's cache is on the file system of the state root, whose device is `state`.
    pub(super) fn warn_of_cache(&self, state: Option<u64>) {
        if let Some(cache) = self.cache().filter(|cache| Some(cache.device) == state) {
            log::warn!(repository = self.name.as_str();
                "the CernVM-FS client of repository {} keeps its cache in {}, on the file system of the state root: starting                  containers can make every rename on it hang, for all programs of this node. Put one of them on another                  file system: the cache with CVMFS_CACHE_BASE in /etc/cvmfs/default.local, or the state root with --root;                  see docs/install.md", self.name, cache.path.display());
        }
    }

    /// User and group of some of what is at the top of an image.
    fn owners_of(&self, top: &Path) -> Option<Vec<(u32, u32)>> {
        let entries = self.sys.read_dir(top).ok()?;
        let owner = |name| self.sys.lstat(&top.join(name)).ok().map(|status| (status.uid, status.gid));
        entries.iter().take(OWNED_ENTRIES).map(|(name, _)| owner(name)).collect()
    }

    /// The one owner of some of its layers, if there is one and it is not root.
    fn owner_of_all(&self) -> Option<(u32, u32)> {
        let layers = self.path.join(LAYERS);
        let mut owners = Vec::new();
        for (two, _) in self.sys.read_dir(&layers).ok()?.into_iter().take(OWNED_LAYERS) {
            alive();
            let some = layers.join(two);
            let (digest, _) = self.sys.read_dir(&some).ok()?.into_iter().next()?;
            owners.append(&mut self.owners_of(&some.join(digest).join(LAYER_ROOT))?);
        }
        sole_owner(&owners)
    }

    /// Says once if nothing at the top of an image belongs to root: the publisher dropped the
    /// owners, or the client shows one of its own. Nobody but the site's admin can mend that.
    pub fn notice_owners(&self, digest: &Digest, top: &Path) {
        if self.owners_told.load(Ordering::Relaxed) {
            return;
        }
        if let Some((uid, gid)) = self.owners_of(top).as_deref().and_then(sole_owner)
            && !self.owners_told.swap(true, Ordering::Relaxed)
        {
            log::warn!(repository = self.name.as_str();
                "everything in layer {digest} of repository {} belongs to uid {uid}, gid {gid}: containers will see that \
                 instead of the owners of the image. Either the CernVM-FS client claims the files (set \
                 CVMFS_CLAIM_OWNERSHIP=no), or the publisher dropped the owners (map {uid} to 0 with CVMFS_UID_MAP \
                 and {gid} to 0 with CVMFS_GID_MAP); see docs/repository.md", self.name);
        }
    }
}

/// The owner of all, if that is one, and not root.
fn sole_owner(owners: &[(u32, u32)]) -> Option<(u32, u32)> {
    let [first, others @ ..] = owners else { return None };
    let is_one = first.0 != 0 && !others.is_empty() && others.iter().all(|(uid, _)| *uid == first.0);
    is_one.then_some(*first)
}
