//! The state root: its directories, and the lock that keeps a second daemon out.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use super::Error;
use crate::config::RepositoryConfig;
use crate::system;

/// Below the state root.
pub const SNAPSHOTS: &str = "snapshotter/snapshots";
/// A start waits so long for a daemon that was killed to let go of the state root.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The state directory, locked as long as this lives.
pub struct StateRoot {
    pub metadata: PathBuf,
    pub snapshots: PathBuf,
    _lock: Flock<File>,
}

impl StateRoot {
    pub fn acquire(root: &Path, repositories: &[RepositoryConfig]) -> Result<Self, Error> {
        if !root.is_absolute() {
            return Err(Error::RootNotAbsolute(root.to_owned()));
        }
        // With a slash at the end, a link would not be seen.
        let root = root.components().collect::<PathBuf>();
        let root = root.as_path();
        check_paths_are_disjoint(root, repositories)?;
        make_private(root)?;
        refuse_link_of_others(root)?;
        // The mount table names things by their real paths, and so must we, to recognise what
        // is mounted below us.
        let real = root.canonicalize().map_err(|cause| Error::Root { path: root.to_owned(), cause })?;
        let odd = |c: char| matches!(c, ':' | ',' | '\\' | '"') || c.is_control();
        if real.to_str().is_none_or(|text| text.contains(odd)) {
            return Err(Error::RootNotMountable(real));
        }
        check_root(&real)?;
        let (home, snapshots) = (real.join("snapshotter"), real.join(SNAPSHOTS));
        for directory in [&home, &snapshots] {
            make_private(directory)?;
            refuse_others(directory)?;
        }
        let lock = lock(root, &home.join("lock"))?;
        if !system::supports_d_type(&home).map_err(Error::System)? {
            return Err(Error::RootWithoutTypes { root: real });
        }
        Ok(Self { metadata: home.join("metadata.sqlite"), snapshots, _lock: lock })
    }
}

/// Locks the file at `path`, and writes our process id into it for the next one that finds it
/// locked. Waits a while for a daemon that was killed and is about to end.
fn lock(root: &Path, path: &Path) -> Result<Flock<File>, Error> {
    let failed = |cause| Error::Root { path: path.to_owned(), cause };
    let until = Instant::now() + LOCK_TIMEOUT;
    loop {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // For a message only; a full disk must not stop us.
                let _ = lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id()));
                return Ok(lock);
            }
            Err((_, Errno::EWOULDBLOCK)) => match dead_lock_holder(path) {
                None => return Err(Error::RootInUse { root: root.to_owned() }),
                Some(pid) if Instant::now() >= until => return Err(Error::RootHeld { root: root.to_owned(), pid }),
                Some(_) => thread::sleep(Duration::from_millis(100)),
            },
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}

/// The process that holds the lock, if it has been killed and only its threads are left.
fn dead_lock_holder(path: &Path) -> Option<u32> {
    let pid = fs::read_to_string(path).ok()?.parse().ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything.
    let state = status.rsplit_once(") ")?.1.chars().next()?;
    matches!(state, 'Z' | 'X').then_some(pid)
}

/// Makes `path` and what is missing above it, for root alone.
fn make_private(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            // A link may lead to a disk that is mounted later: the start is tried again.
            match path.ancestors().find(|one| one.is_symlink() && !one.exists()) {
                Some(link) => Error::Root { path: link.to_owned(), cause: io::ErrorKind::NotFound.into() },
                None => Error::RootNotADirectory { path: path.to_owned() },
            }
        }
        _ => Error::Root { path: path.to_owned(), cause },
    })
}

/// Refuses a directory in which others than root and the daemon's own user could put theirs, and a link: what is in
/// the state root decides what root removes. A sticky bit would keep others from replacing what is there, but not from
/// being first.
fn refuse_others(path: &Path) -> Result<(), Error> {
    let (mode, owner) = mode_and_owner(path)?;
    if mode & 0o022 != 0 || !is_trusted(owner) {
        return Err(Error::RootOfOthers { path: path.to_owned(), mode, owner });
    }
    Ok(())
}

/// Refuses a state root of another user. One that others may write to is only reported, because containerd's own tests
/// use such: what others put there before the start is refused, and what they do later is not seen.
fn check_root(path: &Path) -> Result<(), Error> {
    let (mode, owner) = mode_and_owner(path)?;
    if !is_trusted(owner) {
        return Err(Error::RootOfOthers { path: path.to_owned(), mode, owner });
    }
    if mode & 0o022 != 0 {
        log::warn!(
            "the state root {} has mode {mode:04o}: others can replace what is in it, and root would use and remove \
             what they put there; chmod go-w it",
            path.display()
        );
    }
    Ok(())
}

/// The mode and the owner of a directory; an error if it is something else.
fn mode_and_owner(path: &Path) -> Result<(u32, u32), Error> {
    let status = path.symlink_metadata().map_err(|cause| Error::Root { path: path.to_owned(), cause })?;
    if status.is_dir() {
        Ok((status.mode() & 0o7777, status.uid()))
    } else {
        Err(Error::RootNotADirectory { path: path.to_owned() })
    }
}

/// The path of the state root may be a link, whose owner decides where it leads.
fn refuse_link_of_others(path: &Path) -> Result<(), Error> {
    match path.symlink_metadata() {
        Ok(status) if status.is_symlink() && !is_trusted(status.uid()) => {
            Err(Error::RootOfOthers { path: path.to_owned(), mode: status.mode() & 0o7777, owner: status.uid() })
        }
        Ok(_) => Ok(()),
        Err(cause) => Err(Error::Root { path: path.to_owned(), cause }),
    }
}

fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == geteuid().as_raw()
}

/// Refuses a state root inside a repository, which is only read, and a repository inside the state root. Repositories
/// are known by their paths: they are not asked, because they may hang.
fn check_paths_are_disjoint(root: &Path, repositories: &[RepositoryConfig]) -> Result<(), Error> {
    let refuse = |at: &RepositoryConfig| Error::RootInRepository { root: root.to_owned(), repository: at.path.clone() };
    let real = resolve(root, |path| repositories.iter().find(|at| path.starts_with(&at.path))).map_err(refuse)?;
    match repositories.iter().find(|at| at.path.starts_with(&real) || at.path.starts_with(root)) {
        Some(at) => Err(Error::RepositoryInRoot { root: root.to_owned(), repository: at.path.clone() }),
        None => Ok(()),
    }
}

/// Where the links in `path` lead. What is missing is no link, and the way ends with an error before anything that is
/// `forbidden` is looked at.
fn resolve<F>(path: &Path, forbidden: impl Fn(&Path) -> Option<F>) -> Result<PathBuf, F> {
    /// As many as the kernel follows.
    const MAX_LINKS: usize = 40;
    let mut links = 0;
    let mut real = PathBuf::new();
    // The next component is the last one.
    let mut rest: Vec<PathBuf> = reversed(path);
    while let Some(next) = rest.pop() {
        if next == Path::new("..") {
            real.pop();
            continue;
        }
        // An absolute one, "/", begins anew.
        real.push(next);
        if let Some(found) = forbidden(&real) {
            return Err(found);
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

    fn at(path: &Path) -> RepositoryConfig {
        RepositoryConfig { name: "r".to_owned(), path: path.to_owned() }
    }

    #[test]
    fn state_root_and_repository_in_each_other_are_refused_wherever_links_lead() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("repo/below")).unwrap();
        fs::create_dir_all(path("other/deep")).unwrap();
        symlink("repo", path("link")).unwrap();
        symlink(path("link/below"), path("other/deep/link")).unwrap();
        symlink("loop", path("loop")).unwrap();
        let repositories = [at(&path("none")), at(&path("repo"))];
        for root in ["repo", "repo/x/y", "link", "link/x", "other/deep/link", "other/../repo/x", "other/deep/link/../x"]
        {
            let refused = check_paths_are_disjoint(&path(root), &repositories);
            assert!(
                matches!(&refused, Err(Error::RootInRepository { repository, .. }) if *repository == path("repo")),
                "{root}: {refused:?}"
            );
        }
        for root in ["repository", "other", "other/deep", "link2/x", "loop/x"] {
            check_paths_are_disjoint(&path(root), &repositories).unwrap_or_else(|e| panic!("{root}: {e}"));
        }
        symlink("other", path("second")).unwrap();
        for (root, repository) in [("other", "other/deep"), ("second", "other/deep"), ("second", "second/x")] {
            let refused = check_paths_are_disjoint(&path(root), &[at(&path(repository))]);
            assert!(matches!(refused, Err(Error::RepositoryInRoot { .. })), "{root} {repository}: {refused:?}");
        }
    }
}
