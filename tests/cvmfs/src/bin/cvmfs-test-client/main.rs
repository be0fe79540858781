//! `cvmfs-test-client --url URL --mountpoint DIR --cache DIR [options]`: mounts a CernVM-FS repository
//! and takes commands on stdin (`commands`). As the real client does, it works in its cache directory:
//! `/proc/<pid>/cwd` says where that is. Options, and the real client's parameters:
//!
//! - `--name-length N`: what statfs says; the real client says 0.
//! - `--ttl SECONDS`: how long the kernel keeps names and attributes.
//! - `--magic-xattrs rootonly|always`: where made-up attributes are listed
//!   (`CVMFS_MAGIC_XATTRS_VISIBILITY`).
//! - `--claim-ownership UID:GID`: everything belongs to one user, and the client runs as that user
//!   (`CVMFS_CLAIM_OWNERSHIP=yes`, `CVMFS_USER`).
//! - `--retry-delay MILLISECONDS`: how long it waits before its second and last try when the server
//!   cannot be reached (`CVMFS_BACKOFF_INIT`, `CVMFS_MAX_RETRIES`).
//! - `--backend own|crate`: who reads the repository.
//!
//! `served` is the file system as the kernel sees it, `gate` decides when a request is answered,
//! `inodes` numbers what was seen, `magic` has the made-up attributes, `error_log` what went wrong.
//! `backend` is the boundary to the reader of the repository: `own` is ours, `library` is the crate
//! `cvmfs`.

#![forbid(unsafe_code)]

mod attributes;
mod backend;
mod commands;
mod error_log;
mod gate;
mod inodes;
#[cfg(feature = "cvmfs-crate")]
mod library;
mod magic;
mod options;
mod own;
mod served;

use std::env;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::lchown;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use fuser::{Config, MountOption, Session, SessionACL};
use nix::mount::{MntFlags, umount2};
use nix::unistd::{Gid, Uid, seteuid, setresgid, setresuid};

use backend::Backend;
use error_log::ErrorLog;
use magic::MagicAttributes;
use options::{Options, Reader};
use served::{FileSystem, Served};

/// Event loops that work at once. A request that waits for the web server keeps one of them; a
/// request that waits by command keeps none.
const THREADS: usize = 12;

fn main() -> ExitCode {
    match Options::parse(env::args_os().skip(1)).map_err(Into::into).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cvmfs-test-client: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut options: Options) -> Result<(), Box<dyn std::error::Error>> {
    options.mountpoint = options.mountpoint.canonicalize()?;
    fs::create_dir_all(&options.cache)?;
    options.cache = options.cache.canonicalize()?;
    env::set_current_dir(&options.cache)?;
    let log = Arc::new(ErrorLog::new());
    let magic = MagicAttributes::new(options.magic_xattrs, &options.url, Arc::clone(&log));
    let served = Arc::new(Served::new(reader(&options, &log)?, magic, log, &options));
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("cvmfs2".to_owned()),
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::DefaultPermissions,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(THREADS);
    let session = Session::new(FileSystem::new(Arc::clone(&served)), &options.mountpoint, &config)?.spawn()?;
    let notifier = session.notifier();
    if let Some((uid, gid)) = options.claimed_by {
        become_user(&options.cache, uid, gid)?;
    }
    println!("mounted");
    io::stdout().flush()?;
    commands::run(&served, &notifier);
    if options.claimed_by.is_some() {
        // An unmount needs root.
        seteuid(Uid::from_raw(0))?;
    }
    // Lazy, since the mount may be in use. Afterwards the session must not unmount a second time:
    // something else may be mounted there by then.
    let unmounted = umount2(&options.mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    std::mem::forget(session);
    Ok(unmounted?)
}

/// Goes on as another user, to whom the cache then belongs. Root remains the saved user.
fn become_user(cache: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let mut unread = vec![cache.to_owned()];
    while let Some(path) = unread.pop() {
        lchown(&path, Some(uid), Some(gid))?;
        if path.symlink_metadata()?.is_dir() {
            for entry in fs::read_dir(&path)? {
                unread.push(entry?.path());
            }
        }
    }
    let (root, uid, gid) = (Uid::from_raw(0), Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, root)?;
    Ok(())
}

fn reader(options: &Options, log: &Arc<ErrorLog>) -> Result<Box<dyn Backend>, Box<dyn std::error::Error>> {
    match options.reader {
        Reader::Own => {
            let fetch = own::Fetch::new(&options.url, &options.cache, options.retry_delay)?;
            Ok(Box::new(own::Own::open(fetch, Arc::clone(log))?))
        }
        #[cfg(feature = "cvmfs-crate")]
        Reader::Library => Ok(Box::new(library::Library::open(&options.url, &options.cache)?)),
        #[cfg(not(feature = "cvmfs-crate"))]
        Reader::Library => Err("serve with the crate: this client was built without its feature `cvmfs-crate`".into()),
    }
}
