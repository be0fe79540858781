//! The state root: its directories, and the lock that keeps a second daemon out.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::config::RepositoryConfig;
use crate::system;

/// The directory of snapshots, below the state root.
pub const SNAPSHOTS: &str = "snapshotter/snapshots";
/// How long a start waits for a daemon that was killed to release the lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub enum Error {
    NotAbsolute(PathBuf),
    /// The options of an overlay mount cannot name the path.
    NotMountable(PathBuf),
    /// There is a file, or a link that is not followed or that leads nowhere.
    NotADirectory {
        path: PathBuf,
    },
    /// Other users could put something into the state root.
    Untrusted {
        path: PathBuf,
        mode: u32,
        owner: u32,
    },
    InRepository {
        root: PathBuf,
        repository: PathBuf,
    },
    RepositoryInRoot {
        root: PathBuf,
        repository: PathBuf,
    },
    /// The file system cannot hold the upper directories of overlays.
    WithoutEntryTypes {
        root: PathBuf,
    },
    Access {
        path: PathBuf,
        cause: io::Error,
    },
    InUse {
        root: PathBuf,
    },
    /// The previous daemon was killed, and the kernel cannot end it yet.
    HeldByDeadProcess {
        root: PathBuf,
        pid: u32,
    },
    System(system::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAbsolute(root) => write!(f, "--root {} must be an absolute path", root.display()),
            Self::NotMountable(root) => write!(
                f,
                "--root {} cannot be used for overlay mounts: it must be UTF-8 without colons, commas, quotes and backslashes",
                root.display()
            ),
            Self::NotADirectory { path } => write!(
                f,
                "the state root needs a directory at {}, and something else is there or above it, such as a file or a \
                 link (only the path of the state root itself may lead over links, to a directory): move it away, or \
                 choose another --root; to have what is below on another disk, mount that there",
                path.display()
            ),
            Self::Untrusted { path, mode, owner } => write!(
                f,
                "the directory {} of the state root has mode {mode:04o} and owner {owner}, and others could put files there that \
                 root then uses: see that all in it is yours, then \"chown root\" and \"chmod go-w\" it",
                path.display()
            ),
            Self::InRepository { root, repository } => write!(
                f,
                "the state root {} is inside the repository {}, which is only read: choose another --root",
                root.display(),
                repository.display()
            ),
            Self::RepositoryInRoot { root, repository } => write!(
                f,
                "the repository {} is inside the state root {}: choose another --root, or correct the path of the \
                 repository in the configuration",
                repository.display(),
                root.display()
            ),
            Self::WithoutEntryTypes { root } => write!(
                f,
                "the file system of the state root {} does not tell the types of directory entries (d_type), which \
                 overlayfs needs: put the state root on another one, or create it again (XFS with -n ftype=1, ext4 with \
                 -O filetype)",
                root.display()
            ),
            Self::Access { path, cause } => write!(f, "cannot use the state directory {}: {cause}", path.display()),
            Self::InUse { root } => write!(
                f,
                "another cvmfs-snapshotter uses the state root {}: stop it first, or choose another --root",
                root.display()
            ),
            Self::HeldByDeadProcess { root, pid } => write!(
                f,
                "the cvmfs-snapshotter with process id {pid} was killed and still holds the state root {}: a thread of \
                 it hangs in a repository, which only the end of that repository's client can end; see what hangs \
                 (cvmfs_config probe), kill or unmount it, and start again",
                root.display()
            ),
            Self::System(cause) => cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// 78 where the next start fails as well unless somebody changes something.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::NotAbsolute(_)
            | Self::NotMountable(_)
            | Self::NotADirectory { .. }
            | Self::Untrusted { .. }
            | Self::InRepository { .. }
            | Self::RepositoryInRoot { .. }
            | Self::WithoutEntryTypes { .. } => 78,
            Self::Access { .. } | Self::InUse { .. } | Self::HeldByDeadProcess { .. } | Self::System(_) => 1,
        }
    }
}

/// The state root, locked while this value lives.
pub struct StateRoot {
    pub metadata: PathBuf,
    pub snapshots: PathBuf,
    _lock: Flock<File>,
}

impl StateRoot {
    /// Makes what is missing of the state root, checks who can write to it, and locks it.
    pub fn acquire(root: &Path, repositories: &[RepositoryConfig]) -> Result<Self, Error> {
        if !root.is_absolute() {
            return Err(Error::NotAbsolute(root.to_owned()));
        }
        // Without a slash at the end: with one, the checks would follow a link.
        let root = root.components().collect::<PathBuf>();
        let root = root.as_path();
        check_paths_are_disjoint(root, repositories)?;
        make_private(root)?;
        check_link_owner(root)?;
        // The mount table has real paths. With any other path, mounts below the state root would not be recognised.
        let real = root.canonicalize().map_err(|cause| Error::Access { path: root.to_owned(), cause })?;
        let is_forbidden = |c: char| matches!(c, ':' | ',' | '\\' | '"') || c.is_control();
        if real.to_str().is_none_or(|text| text.contains(is_forbidden)) {
            return Err(Error::NotMountable(real));
        }
        check_root_directory(&real)?;
        let (home, snapshots) = (real.join("snapshotter"), real.join(SNAPSHOTS));
        for directory in [&home, &snapshots] {
            make_private(directory)?;
            check_trusted(directory)?;
        }
        let lock = lock(root, &home.join("lock"))?;
        if !system::supports_d_type(&home).map_err(Error::System)? {
            return Err(Error::WithoutEntryTypes { root: real });
        }
        Ok(Self { metadata: home.join("metadata.sqlite"), snapshots, _lock: lock })
    }
}

/// Locks the file at `path`, and writes the id of this process into it, so that a process that finds it locked can tell
/// whether the holder is dead. For a dead holder, whose threads are about to end, this waits a while.
fn lock(root: &Path, path: &Path) -> Result<Flock<File>, Error> {
    let failed = |cause| Error::Access { path: path.to_owned(), cause };
    let until = Instant::now() + LOCK_TIMEOUT;
    loop {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // The id is only for a message, so a full disk does not stop the start.
                let _ = lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id()));
                return Ok(lock);
            }
            Err((_, Errno::EWOULDBLOCK)) => match dead_lock_holder(path) {
                None => return Err(Error::InUse { root: root.to_owned() }),
                Some(pid) if Instant::now() >= until => {
                    return Err(Error::HeldByDeadProcess { root: root.to_owned(), pid });
                }
                Some(_) => thread::sleep(Duration::from_millis(100)),
            },
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}

/// The process that holds the lock, if it was killed and only its threads are left.
fn dead_lock_holder(path: &Path) -> Option<u32> {
    let pid = fs::read_to_string(path).ok()?.parse().ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The state follows the name of the program, which stands in brackets and may contain brackets.
    let state = status.rsplit_once(") ")?.1.chars().next()?;
    matches!(state, 'Z' | 'X').then_some(pid)
}

/// Makes `path` and what is missing above it, accessible for root only.
fn make_private(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            // A link may lead to a disk that is mounted later. That error lets the unit try the start again.
            match path.ancestors().find(|ancestor| ancestor.is_symlink() && !ancestor.exists()) {
                Some(link) => Error::Access { path: link.to_owned(), cause: io::ErrorKind::NotFound.into() },
                None => Error::NotADirectory { path: path.to_owned() },
            }
        }
        _ => Error::Access { path: path.to_owned(), cause },
    })
}

/// Refuses a link, and a directory to which users other than root and the daemon's own may write: the content of the
/// state root decides what root removes. A sticky bit is not enough, because it does not keep others from adding files.
fn check_trusted(path: &Path) -> Result<(), Error> {
    let (mode, owner) = mode_and_owner(path)?;
    if mode & 0o022 != 0 || !is_trusted(owner) {
        return Err(Error::Untrusted { path: path.to_owned(), mode, owner });
    }
    Ok(())
}

/// Refuses a state root of another user. A state root that others may write to is only reported, because containerd's
/// own tests use such. What others put there before the start is refused, but what they do later is not noticed.
fn check_root_directory(path: &Path) -> Result<(), Error> {
    let (mode, owner) = mode_and_owner(path)?;
    if !is_trusted(owner) {
        return Err(Error::Untrusted { path: path.to_owned(), mode, owner });
    }
    if mode & 0o022 != 0 {
        log::warn!(
            event = "state_root_writable", path:% = path.display();
            "the state root {} has mode {mode:04o}: other users can replace what is in it, and root would use and \
             remove what they put there; run \"chmod go-w\" on it",
            path.display()
        );
    }
    Ok(())
}

/// The mode and the owner of a directory. Anything but a directory is an error.
fn mode_and_owner(path: &Path) -> Result<(u32, u32), Error> {
    let status = path.symlink_metadata().map_err(|cause| Error::Access { path: path.to_owned(), cause })?;
    if status.is_dir() {
        Ok((status.mode() & 0o7777, status.uid()))
    } else {
        Err(Error::NotADirectory { path: path.to_owned() })
    }
}

/// Refuses a link of another user as the path of the state root, because its owner decides where it leads.
fn check_link_owner(path: &Path) -> Result<(), Error> {
    match path.symlink_metadata() {
        Ok(status) if status.is_symlink() && !is_trusted(status.uid()) => {
            Err(Error::Untrusted { path: path.to_owned(), mode: status.mode() & 0o7777, owner: status.uid() })
        }
        Ok(_) => Ok(()),
        Err(cause) => Err(Error::Access { path: path.to_owned(), cause }),
    }
}

fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == geteuid().as_raw()
}

/// Refuses a state root inside a repository, which is never written to, and a repository inside the state root. Only
/// paths are compared, and no repository is accessed, because it may hang.
fn check_paths_are_disjoint(root: &Path, repositories: &[RepositoryConfig]) -> Result<(), Error> {
    let containing = |path: &Path| repositories.iter().find(|repository| path.starts_with(&repository.path));
    let real = resolve(root, containing)
        .map_err(|repository| Error::InRepository { root: root.to_owned(), repository: repository.path.clone() })?;
    match repositories.iter().find(|other| other.path.starts_with(&real) || other.path.starts_with(root)) {
        Some(inside) => Err(Error::RepositoryInRoot { root: root.to_owned(), repository: inside.path.clone() }),
        None => Ok(()),
    }
}

/// Resolves the links in `path`. A component that does not exist counts as a directory. As soon as `forbidden` returns
/// a value for a prefix, that value is the error, and the prefix is not accessed.
fn resolve<F>(path: &Path, forbidden: impl Fn(&Path) -> Option<F>) -> Result<PathBuf, F> {
    /// The kernel follows as many.
    const MAX_LINKS: usize = 40;
    let mut links = 0;
    let mut real = PathBuf::new();
    // The components that are left, the next one last.
    let mut rest: Vec<PathBuf> = reversed(path);
    while let Some(next) = rest.pop() {
        if next == Path::new("..") {
            real.pop();
            continue;
        }
        // Pushing "/" replaces the whole path.
        real.push(next);
        if let Some(reason) = forbidden(&real) {
            return Err(reason);
        }
        if let Ok(target) = real.read_link()
            && links < MAX_LINKS
        {
            links += 1;
            real.pop();
            rest.extend(reversed(&target));
        }
    }
    Ok(real)
}

fn reversed(path: &Path) -> Vec<PathBuf> {
    let components = path.components().filter(|component| *component != Component::CurDir);
    components.rev().map(|component| PathBuf::from(component.as_os_str())).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn repository_at(path: &Path) -> RepositoryConfig {
        RepositoryConfig { name: "r".to_owned(), path: path.to_owned() }
    }

    #[test]
    fn state_root_and_repository_inside_each_other_are_refused_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("repo/below")).unwrap();
        fs::create_dir_all(path("other/deep")).unwrap();
        symlink("repo", path("link")).unwrap();
        symlink(path("link/below"), path("other/deep/link")).unwrap();
        symlink("loop", path("loop")).unwrap();
        let repositories = [repository_at(&path("none")), repository_at(&path("repo"))];
        for root in ["repo", "repo/x/y", "link", "link/x", "other/deep/link", "other/../repo/x", "other/deep/link/../x"]
        {
            let refused = check_paths_are_disjoint(&path(root), &repositories);
            assert!(
                matches!(&refused, Err(Error::InRepository { repository, .. }) if *repository == path("repo")),
                "{root}: {refused:?}"
            );
        }
        for root in ["repository", "other", "other/deep", "link2/x", "loop/x"] {
            check_paths_are_disjoint(&path(root), &repositories).unwrap_or_else(|e| panic!("{root}: {e}"));
        }
        symlink("other", path("second")).unwrap();
        for (root, repository) in [("other", "other/deep"), ("second", "other/deep"), ("second", "second/x")] {
            let refused = check_paths_are_disjoint(&path(root), &[repository_at(&path(repository))]);
            assert!(matches!(refused, Err(Error::RepositoryInRoot { .. })), "{root} {repository}: {refused:?}");
        }
    }
}
