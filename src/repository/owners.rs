//! Whether the owners of files are those of the images, by a sample of a repository's layers.
//!
//! A publisher may have given everything to one user, and a client may show everything as its own
//! user's. Both look the same: the user of the client's process tells them apart.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::client::{self, ClientUser};
use super::executor::record_progress;
use super::{LAYER_ROOT, LAYERS, lists_own_attributes};
use crate::system::{self, DirHandle, FileType, Status, Sys};

/// Layers of a sample.
const MAX_LAYERS: usize = 8;
/// Entries that are read of each of these layers.
const MAX_ENTRIES: usize = 200;
/// A sample ends after this time with what it has. A layer that is not in the client's cache yet
/// takes a few round trips to the server.
const MAX_TIME: Duration = Duration::from_secs(3);
/// Fewer entries of one owner say nothing about the others.
const MIN_ENTRIES: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// To whom the files of a repository belong, as this mount shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// To more than one owner: the publisher kept those of the images.
    Kept,
    /// Everything to the user that the client runs as, who may be root. The owners that the repository has cannot be seen.
    Claimed(Owner),
    /// Everything to the repository's owner, who may be root.
    Lost(Owner),
    /// Everything to one owner, who may be root: the client's user or the repository's owner. The client's
    /// process cannot be seen from here, as when it runs in a container.
    Undecided(Owner),
    /// Too little was seen.
    Unknown,
}

impl Owners {
    /// The state and what it means, as a sentence about repository `name`.
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

    /// Nothing says that something is wrong. Repositories in which everything is root's are usual.
    pub fn is_usual(self) -> bool {
        match self {
            Self::Kept | Self::Unknown => true,
            Self::Lost(owner) | Self::Undecided(owner) => owner == Owner { uid: 0, gid: 0 },
            Self::Claimed(_) => false,
        }
    }

    /// The settings of the client that help, if any do.
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
                map(owner, name)
            )),
            Self::Undecided(owner) => Some(format!(
                "{UNCLAIM}. If the owner is the same then, it is the repository's, and {}",
                map(owner, name)
            )),
            Self::Lost(owner) => Some(map(owner, name)),
        }
    }
}

/// How to show files of `owner` as root's.
fn map(owner: Owner, name: &str) -> String {
    let maps = [("UID", "uid", owner.uid), ("GID", "gid", owner.gid)];
    let maps: Vec<_> = maps.into_iter().filter(|(.., id)| *id != 0).collect();
    let lines: Vec<_> = maps.iter().map(|(_, file, id)| format!("\"{id} 0\" to /etc/cvmfs/{file}.map")).collect();
    let settings: Vec<_> = maps.iter().map(|(key, file, _)| format!("CVMFS_{key}_MAP=/etc/cvmfs/{file}.map")).collect();
    // A repository that the configuration names by its path may have any name in CernVM-FS.
    let fqrn = if name.starts_with('/') { "<repository>" } else { name };
    format!(
        "root's files are root's again with these: write {}, set {} in /etc/cvmfs/config.d/{fqrn}.local, and run \
         cvmfs_config reload {fqrn}; see docs/repository.md",
        lines.join(" and "),
        settings.join(" and ")
    )
}

/// What a sample of a repository's layers showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerSample {
    pub owners: Owners,
    /// The client lists the attributes that it makes up on files, not only at the repository's root.
    pub lists_own_attributes: bool,
}

/// Reads a sample of the layers of the repository at `path`. Runs on a thread of the repository.
pub fn sample(sys: &dyn Sys, path: &Path) -> system::Result<OwnerSample> {
    let root = sys.open_dir(path)?;
    record_progress();
    let mut found = OwnersSoFar { until: Instant::now() + MAX_TIME, owner: None, others: false, entries: 0 };
    for layer in layers(sys, &root)? {
        match sys.open_below(&root, &layer) {
            Ok(layer) => found.read(sys, &layer)?,
            // Not every directory here is a layer.
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => record_progress(),
            Err(e) => return Err(e),
        }
        if found.is_over() {
            break;
        }
    }
    let owners = match found.owner {
        _ if found.others => Owners::Kept,
        Some(owner) if found.entries >= MIN_ENTRIES => one_owner(sys, path, owner),
        _ => Owners::Unknown,
    };
    Ok(OwnerSample { owners, lists_own_attributes: lists_own_attributes(sys, path)? })
}

fn one_owner(sys: &dyn Sys, path: &Path, owner: Owner) -> Owners {
    match client::user(sys, path) {
        ClientUser::Uid(uid) if uid == owner.uid => Owners::Claimed(owner),
        ClientUser::Uid(_) | ClientUser::NoClient => Owners::Lost(owner),
        ClientUser::Hidden => Owners::Undecided(owner),
    }
}

/// Some layers of a repository, as paths below its root.
fn layers(sys: &dyn Sys, root: &DirHandle) -> system::Result<Vec<PathBuf>> {
    let mut layers = Vec::new();
    let top = PathBuf::from(LAYERS);
    let prefixes = match directories(sys, root, &top, MAX_LAYERS) {
        Err(e) if e.errno == Errno::ENOENT => return Ok(layers),
        names => names?,
    };
    for prefix in prefixes {
        let prefix = top.join(prefix);
        let digests = directories(sys, root, &prefix, MAX_LAYERS - layers.len())?;
        layers.extend(digests.into_iter().map(|digest| prefix.join(digest).join(LAYER_ROOT)));
        if layers.len() == MAX_LAYERS {
            break;
        }
    }
    Ok(layers)
}

/// The names of at most `limit` directories in the directory `below` the root.
fn directories(sys: &dyn Sys, root: &DirHandle, below: &Path, limit: usize) -> system::Result<Vec<OsString>> {
    let mut names = Vec::new();
    sys.for_each_entry_below(root, below, &mut |name, file_type| {
        if file_type == FileType::Directory && is_name(name) {
            names.push(name.to_owned());
        }
        go_on_if(names.len() < limit)
    })?;
    record_progress();
    Ok(names)
}

/// Whether it names an entry of a directory, and nothing elsewhere.
fn is_name(name: &OsStr) -> bool {
    !matches!(name.as_bytes(), b"" | b"." | b"..") && !name.as_bytes().contains(&b'/')
}

fn go_on_if(wanted: bool) -> ControlFlow<()> {
    if wanted { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

struct OwnersSoFar {
    until: Instant,
    /// Of the first entry.
    owner: Option<Owner>,
    /// Another entry has another owner.
    others: bool,
    entries: usize,
}

impl OwnersSoFar {
    /// More entries would not change the result, or there is no time for them.
    fn is_over(&self) -> bool {
        self.others || Instant::now() > self.until
    }

    fn add(&mut self, status: &Status) {
        let owner = Owner { uid: status.uid, gid: status.gid };
        self.others |= *self.owner.get_or_insert(owner) != owner;
        self.entries += 1;
    }

    /// Reads a layer, those entries first that lie near its top.
    fn read(&mut self, sys: &dyn Sys, layer: &DirHandle) -> system::Result<()> {
        let mut unread = VecDeque::from([PathBuf::new()]);
        let end = self.entries + MAX_ENTRIES;
        while let Some(below) = unread.pop_front() {
            let directory = match sys.open_below(layer, &below) {
                // It lies so deep that no path leads to it.
                Err(e) if e.errno == Errno::ENAMETOOLONG => continue,
                directory => directory?,
            };
            record_progress();
            let (mut names, limit) = (Vec::new(), end.saturating_sub(self.entries));
            let status = sys.for_each_entry_below(&directory, Path::new(""), &mut |name, file_type| {
                // A hostile file system may hand out others.
                if is_name(name) {
                    names.push((name.to_owned(), file_type));
                }
                go_on_if(names.len() < limit)
            })?;
            record_progress();
            self.add(&status);
            for (name, file_type) in names {
                if file_type == FileType::Directory {
                    unread.push_back(below.join(name));
                } else {
                    self.add(&sys.lstat(&directory.entry(&name))?);
                    record_progress();
                }
                if self.is_over() || self.entries >= end {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::lchown;

    use super::*;
    use crate::repository::FQRN_XATTR;
    use crate::repository::client::tests::ServingProcess;
    use crate::system::Host;

    const OWNER: Owner = Owner { uid: 991, gid: 990 };

    /// A layer with `files` files in `/dir`, all of one owner.
    fn layer(repository: &Path, digit: char, files: usize, owner: Owner) -> PathBuf {
        let hex = digit.to_string().repeat(64);
        let top = repository.join(format!(".layers/{}/{hex}/layerfs", &hex[..2]));
        fs::create_dir_all(top.join("dir")).unwrap();
        for n in 0..files {
            fs::write(top.join(format!("dir/{n}")), "").unwrap();
            give(&top.join(format!("dir/{n}")), owner);
        }
        give(&top.join("dir"), owner);
        give(&top, owner);
        top
    }

    fn give(path: &Path, Owner { uid, gid }: Owner) {
        lchown(path, Some(uid), Some(gid)).unwrap();
    }

    fn owners(repository: &Path) -> Owners {
        sample(&Host, repository).unwrap().owners
    }

    #[test]
    fn root_two_owners_anywhere_in_a_sample_mean_that_owners_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(owners(dir.path()), Owners::Unknown);
        // The old rule saw one owner at the top of both.
        layer(dir.path(), 'a', 20, OWNER);
        let top = layer(dir.path(), 'b', 20, OWNER);
        assert_eq!(owners(dir.path()), Owners::Lost(OWNER));
        give(&top.join("dir/7"), Owner { uid: 0, ..OWNER });
        assert_eq!(owners(dir.path()), Owners::Kept);
        give(&top.join("dir/7"), Owner { gid: 0, ..OWNER });
        assert_eq!(owners(dir.path()), Owners::Kept);
    }

    #[test]
    fn root_directories_of_the_repositorys_owner_are_no_sign_of_lost_owners() {
        let dir = tempfile::tempdir().unwrap();
        let top = layer(dir.path(), 'a', 20, Owner { uid: 0, gid: 0 });
        for directory in [&top, &top.join("dir")] {
            give(directory, OWNER);
        }
        assert_eq!(owners(dir.path()), Owners::Kept);
    }

    #[test]
    fn root_a_repository_in_which_root_owns_everything_is_lost_without_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let root = Owner { uid: 0, gid: 0 };
        layer(dir.path(), 'a', 20, root);
        assert_eq!(owners(dir.path()), Owners::Lost(root));
        assert_eq!(Owners::Lost(root).remedy("r"), None);
        let remedy = Owners::Lost(Owner { uid: 0, gid: 990 }).remedy("r").unwrap();
        assert!(remedy.contains("CVMFS_GID_MAP") && !remedy.contains("CVMFS_UID_MAP"), "{remedy}");
    }

    #[test]
    fn root_few_entries_of_one_owner_say_nothing() {
        let dir = tempfile::tempdir().unwrap();
        layer(dir.path(), 'a', MIN_ENTRIES - 3, OWNER);
        assert_eq!(owners(dir.path()), Owners::Unknown);
        layer(dir.path(), 'b', 0, OWNER);
        assert_eq!(owners(dir.path()), Owners::Lost(OWNER));
    }

    /// The old rule advised to map the uid that is seen, which is the client's own here.
    #[test]
    fn root_an_owner_that_the_client_runs_as_is_claimed_and_one_of_a_hidden_client_undecided() {
        let served = ServingProcess::of_user("a.example.org", OWNER.uid);
        let repository = served.path("repository");
        let top = layer(&repository, 'a', 20, OWNER);
        assert_eq!(owners(&repository), Owners::Claimed(OWNER));
        let other = Owner { uid: 777, gid: 777 };
        for entry in fs::read_dir(top.join("dir")).unwrap() {
            give(&entry.unwrap().path(), other);
        }
        for directory in [&top, &top.join("dir")] {
            give(directory, other);
        }
        assert_eq!(owners(&repository), Owners::Lost(other));
        // A process that does not serve this repository.
        xattr::set(&repository, "user.pid", std::process::id().to_string().as_bytes()).unwrap();
        assert_eq!(owners(&repository), Owners::Undecided(other));
    }

    /// Nobody asked for the client of a repository in which everything is root's: it was lost to root, and
    /// nothing was to be done.
    #[test]
    fn root_everything_of_root_is_claimed_by_a_client_of_root_and_undecided_with_a_hidden_one() {
        let root = Owner { uid: 0, gid: 0 };
        let served = |uid| {
            let served = ServingProcess::of_user("a.example.org", uid);
            layer(&served.path("repository"), 'a', 20, root);
            served
        };
        let by_root = served(0);
        let repository = by_root.path("repository");
        assert_eq!(owners(&repository), Owners::Claimed(root));
        // A process that does not serve this repository.
        xattr::set(&repository, "user.pid", std::process::id().to_string().as_bytes()).unwrap();
        assert_eq!(owners(&repository), Owners::Undecided(root));
        let by_another = served(OWNER.uid);
        assert_eq!(owners(&by_another.path("repository")), Owners::Lost(root));
        for owners in [Owners::Claimed(root), Owners::Undecided(root)] {
            let remedy = owners.remedy("r").unwrap();
            assert!(remedy.contains("CVMFS_CLAIM_OWNERSHIP=no") && !remedy.contains("_MAP"), "{remedy}");
        }
    }

    #[test]
    fn root_a_sample_of_a_layer_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        layer(dir.path(), 'a', MAX_ENTRIES * 2, OWNER);
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::default());
        let counted = std::sync::Arc::clone(&asked);
        let sys = crate::system::testing::FaultySys::before_call(move |call, _| {
            counted.fetch_add(usize::from(call == "lstat"), std::sync::atomic::Ordering::SeqCst);
        });
        assert_eq!(sample(&sys, dir.path()).unwrap().owners, Owners::Lost(OWNER));
        assert!((100..=MAX_ENTRIES).contains(&asked.load(std::sync::atomic::Ordering::SeqCst)), "{asked:?}");
    }

    #[test]
    fn root_a_client_that_lists_its_own_attributes_on_files_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        layer(dir.path(), 'a', 1, OWNER);
        assert!(!sample(&Host, dir.path()).unwrap().lists_own_attributes);
        xattr::set(dir.path().join(LAYERS), FQRN_XATTR, b"a.example.org").unwrap();
        assert!(sample(&Host, dir.path()).unwrap().lists_own_attributes);
    }
}
