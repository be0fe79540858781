//! Finds out from a sample of a repository's layers whether the owners of files are those of the images.
//!
//! A publisher may have given everything to one user, and a client may show everything as owned by its own user. Both look
//! the same, and differ by the user that the client's process runs as.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::client::{self, ClientUser};
use super::executor::record_progress;
use super::{LAYER_ROOT, LAYERS, lists_own_attributes};
use crate::model::Owner;
use crate::system::{self, DirHandle, FileType, Status, Sys, is_entry_name};

/// Layers in a sample.
const MAX_LAYERS: usize = 8;
/// Entries of each layer in a sample.
const MAX_ENTRIES: usize = 200;
/// A sample that takes longer ends with the entries read so far. A layer that is not in the client's cache takes a few round
/// trips to the server.
const MAX_TIME: Duration = Duration::from_secs(3);
/// From fewer entries of the same owner nothing follows for the others.
const MIN_ENTRIES: usize = 10;

/// Who owns the files of a repository, as this mount shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// There are several owners, so the publisher kept those of the images.
    Kept,
    /// The user that the client runs as, perhaps root, owns everything. The owners in the repository cannot be seen.
    Claimed(Owner),
    /// The repository's owner, perhaps root, owns everything.
    Lost(Owner),
    /// One user, perhaps root, owns everything: the client's user or the repository's owner. Which of the two is unknown,
    /// because the client's process cannot be seen from here, for example if it runs in a container.
    Undecided(Owner),
    /// The sample was too small.
    Unknown,
}

impl Owners {
    /// A sentence about repository `name`, with the consequences.
    pub fn describe(self, name: &str) -> String {
        match self {
            Self::Kept => format!("owners are kept: files in repository {name} belong to several users or groups"),
            Self::Undecided(Owner { uid: 0, gid: 0 }) => format!(
                "everything in repository {name} belongs to root: that is the repository's owner, and nothing has to be \
                 mapped, or the CernVM-FS client runs as root and shows everything as its own; which of the two cannot be \
                 told, because its process cannot be seen from here"
            ),
            Self::Claimed(Owner { uid, gid }) => format!(
                "owners are claimed: the CernVM-FS client shows everything in repository {name} as its own user's, uid \
                 {uid}, gid {gid}, and containers see that instead of the owners of the image; those that the repository has \
                 cannot be seen"
            ),
            Self::Lost(Owner { uid: 0, gid: 0 }) => format!(
                "everything in repository {name} belongs to root: nothing has to be mapped, but what an image gives to \
                 another user is root's in containers, if the publisher dropped the owners"
            ),
            Self::Lost(Owner { uid, gid }) => format!(
                "owners are lost: everything in repository {name} belongs to its owner, uid {uid}, gid {gid}, and containers \
                 see that instead of the owners of the image"
            ),
            Self::Undecided(Owner { uid, gid }) => format!(
                "owners are claimed or lost: everything in repository {name} belongs to uid {uid}, gid {gid}, and containers \
                 see that instead of the owners of the image; whether that is the user of the CernVM-FS client cannot be \
                 told, because its process cannot be seen from here"
            ),
            Self::Unknown => {
                format!("whether owners are kept is unknown: too little of repository {name} was seen")
            }
        }
    }

    /// Whether nothing is known to be wrong. Repositories in which root owns everything are usual.
    pub fn is_usual(self) -> bool {
        match self {
            Self::Kept | Self::Unknown => true,
            Self::Lost(owner) | Self::Undecided(owner) => owner == Owner { uid: 0, gid: 0 },
            Self::Claimed(_) => false,
        }
    }

    /// The settings of the client that help, if there are any.
    pub fn remedy(self, name: &str) -> Option<String> {
        const UNCLAIM: &str = "set CVMFS_CLAIM_OWNERSHIP=no in /etc/cvmfs/default.local, run cvmfs_config reload, and ask \
                               again";
        match self {
            Self::Kept | Self::Unknown | Self::Lost(Owner { uid: 0, gid: 0 }) => None,
            Self::Claimed(Owner { uid: 0, gid: 0 }) => Some(format!(
                "{UNCLAIM}: then the repository's owners show. If that is set already, the repository's owner is root too, and \
                 nothing has to be mapped"
            )),
            Self::Undecided(Owner { uid: 0, gid: 0 }) => {
                Some(format!("to find out, {UNCLAIM}. If everything is root's then too, nothing has to be mapped"))
            }
            Self::Claimed(owner) => Some(format!(
                "{UNCLAIM}: then the repository's owners show. If that is set already, the repository's owner has the same \
                 number by chance, and {}",
                mapping_remedy(owner, name)
            )),
            Self::Undecided(owner) => Some(format!(
                "{UNCLAIM}. If the owner is the same then, it is the repository's, and {}",
                mapping_remedy(owner, name)
            )),
            Self::Lost(owner) => Some(mapping_remedy(owner, name)),
        }
    }
}

/// How to make files of `owner` appear as owned by root.
fn mapping_remedy(owner: Owner, name: &str) -> String {
    let maps = [("UID", "uid", owner.uid), ("GID", "gid", owner.gid)];
    let maps: Vec<_> = maps.into_iter().filter(|(.., id)| *id != 0).collect();
    let lines: Vec<_> = maps.iter().map(|(_, file, id)| format!("\"{id} 0\" to /etc/cvmfs/{file}.map")).collect();
    let settings: Vec<_> = maps.iter().map(|(key, file, _)| format!("CVMFS_{key}_MAP=/etc/cvmfs/{file}.map")).collect();
    // The configuration names the repository by its path, so its name in CernVM-FS is unknown.
    let fqrn = if name.starts_with('/') { "<repository>" } else { name };
    format!(
        "root's files are root's again with these: write {}, set {} in /etc/cvmfs/config.d/{fqrn}.local, and run \
         cvmfs_config reload {fqrn}; see docs/repository.md",
        lines.join(" and "),
        settings.join(" and ")
    )
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerSample {
    pub owners: Owners,
    /// Whether the client lists the attributes that it makes up on files, and not only on the repository's root.
    pub lists_own_attributes: bool,
}

/// Reads a sample of the layers of the repository at `path`, on a thread of the repository.
pub fn sample(sys: &dyn Sys, path: &Path) -> system::Result<OwnerSample> {
    let root = sys.open_dir(path)?;
    record_progress();
    let mut sampler =
        Sampler { until: Instant::now() + MAX_TIME, first_owner: None, has_other_owners: false, entries: 0 };
    for layer in layer_paths(sys, &root)? {
        match sys.open_below(&root, &layer) {
            Ok(layer) => sampler.read(sys, &layer)?,
            // Not every directory here is a layer.
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => record_progress(),
            Err(e) => return Err(e),
        }
        if sampler.is_finished() {
            break;
        }
    }
    let owners = match sampler.first_owner {
        _ if sampler.has_other_owners => Owners::Kept,
        Some(owner) if sampler.entries >= MIN_ENTRIES => explain_single_owner(sys, path, owner),
        _ => Owners::Unknown,
    };
    Ok(OwnerSample { owners, lists_own_attributes: lists_own_attributes(sys, path)? })
}

fn explain_single_owner(sys: &dyn Sys, path: &Path, owner: Owner) -> Owners {
    match client::client_user(sys, path) {
        ClientUser::Uid(uid) if uid == owner.uid => Owners::Claimed(owner),
        ClientUser::Uid(_) | ClientUser::NoClient => Owners::Lost(owner),
        ClientUser::Hidden => Owners::Undecided(owner),
    }
}

/// Up to `MAX_LAYERS` layers of a repository, as paths below its root.
fn layer_paths(sys: &dyn Sys, root: &DirHandle) -> system::Result<Vec<PathBuf>> {
    let mut layers = Vec::new();
    let top = PathBuf::from(LAYERS);
    let prefixes = match subdirectories(sys, root, &top, MAX_LAYERS) {
        Err(e) if e.errno == Errno::ENOENT => return Ok(layers),
        names => names?,
    };
    for prefix in prefixes {
        let prefix = top.join(prefix);
        let digests = subdirectories(sys, root, &prefix, MAX_LAYERS - layers.len())?;
        layers.extend(digests.into_iter().map(|digest| prefix.join(digest).join(LAYER_ROOT)));
        if layers.len() == MAX_LAYERS {
            break;
        }
    }
    Ok(layers)
}

/// The names of at most `limit` directories in the directory `path`, which is given from the root.
fn subdirectories(sys: &dyn Sys, root: &DirHandle, path: &Path, limit: usize) -> system::Result<Vec<OsString>> {
    let mut names = Vec::new();
    sys.for_each_entry_below(root, path, &mut |name, file_type| {
        if file_type == FileType::Directory && is_entry_name(name) {
            names.push(name.to_owned());
        }
        continue_if(names.len() < limit)
    })?;
    record_progress();
    Ok(names)
}

fn continue_if(condition: bool) -> ControlFlow<()> {
    if condition { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

struct Sampler {
    until: Instant,
    /// The owner of the first entry.
    first_owner: Option<Owner>,
    has_other_owners: bool,
    /// Entries that were read.
    entries: usize,
}

impl Sampler {
    /// Whether more entries would not change the result, or would take too long.
    fn is_finished(&self) -> bool {
        self.has_other_owners || Instant::now() > self.until
    }

    fn add(&mut self, status: &Status) {
        let owner = Owner { uid: status.uid, gid: status.gid };
        self.has_other_owners |= *self.first_owner.get_or_insert(owner) != owner;
        self.entries += 1;
    }

    /// Reads a layer, beginning with the entries near its top.
    fn read(&mut self, sys: &dyn Sys, layer: &DirHandle) -> system::Result<()> {
        let mut unread = VecDeque::from([PathBuf::new()]);
        let end = self.entries + MAX_ENTRIES;
        while let Some(path) = unread.pop_front() {
            let directory = match sys.open_below(layer, &path) {
                // The directory lies so deep that its path is too long.
                Err(e) if e.errno == Errno::ENAMETOOLONG => continue,
                directory => directory?,
            };
            record_progress();
            let (mut names, limit) = (Vec::new(), end.saturating_sub(self.entries));
            let status = sys.for_each_entry_below(&directory, Path::new(""), &mut |name, file_type| {
                // A hostile file system may return others.
                if is_entry_name(name) {
                    names.push((name.to_owned(), file_type));
                }
                continue_if(names.len() < limit)
            })?;
            record_progress();
            self.add(&status);
            for (name, file_type) in names {
                if file_type == FileType::Directory {
                    unread.push_back(path.join(name));
                } else {
                    self.add(&sys.lstat(&directory.entry(&name))?);
                    record_progress();
                }
                if self.is_finished() || self.entries >= end {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
