//! The state root: its directories, and the lock that keeps a second daemon out.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::Error;
use crate::sys;

/// Below the state root.
pub const SNAPSHOTS: &str = "snapshotter/snapshots";
/// A start waits so long for a daemon that was killed to let go of the state root.
const HELD_LIMIT: Duration = Duration::from_secs(10);

/// The state directory, locked as long as this lives.
pub struct StateRoot {
    pub metadata: PathBuf,
    pub snapshots: PathBuf,
    _lock: Flock<File>,
}

impl StateRoot {
    pub fn take(root: &Path) -> Result<Self, Error> {
        if !root.is_absolute() {
            return Err(Error::RootNotAbsolute(root.to_owned()));
        }
        make_private(root)?;
        // The mount table names things by their real paths, and so must we, to recognise what
        // is mounted below us.
        let real = root.canonicalize().map_err(|cause| Error::Root { path: root.to_owned(), cause })?;
        let odd = |c: char| matches!(c, ':' | ',' | '\\' | '"') || c.is_control();
        if real.to_str().is_none_or(|text| text.contains(odd)) {
            return Err(Error::RootNotMountable(real));
        }
        let home = real.join("snapshotter");
        make_private(&home.join("snapshots"))?;
        let snapshots = home.join("snapshots");
        let snapshots = snapshots.canonicalize().map_err(|cause| Error::Root { path: snapshots, cause })?;
        let lock = lock(root, &home.join("lock"))?;
        if !sys::tells_types(&home).map_err(Error::System)? {
            return Err(Error::RootWithoutTypes { root: real });
        }
        Ok(Self { metadata: home.join("metadata.redb"), snapshots, _lock: lock })
    }
}

/// Locks the file at `path`, and writes our process id into it for the next one that finds it
/// locked. Waits a while for a daemon that was killed and is about to end.
fn lock(root: &Path, path: &Path) -> Result<Flock<File>, Error> {
    let failed = |cause| Error::Root { path: path.to_owned(), cause };
    let until = Instant::now() + HELD_LIMIT;
    loop {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // For a message only; a full disk must not stop us.
                let _ = lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id()));
                return Ok(lock);
            }
            Err((_, Errno::EWOULDBLOCK)) => match killed_holder(path) {
                None => return Err(Error::RootInUse { root: root.to_owned() }),
                Some(pid) if Instant::now() >= until => return Err(Error::RootHeld { root: root.to_owned(), pid }),
                Some(_) => thread::sleep(Duration::from_millis(100)),
            },
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}

/// The process that holds the lock, if it has been killed and only its threads are left.
fn killed_holder(path: &Path) -> Option<u32> {
    let pid = fs::read_to_string(path).ok()?.parse().ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything.
    let state = status.rsplit_once(") ")?.1.chars().next()?;
    matches!(state, 'Z' | 'X').then_some(pid)
}

/// Makes `path` and what is missing above it, for root alone.
fn make_private(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|cause| Error::Root { path: path.to_owned(), cause })
}
