//! `cvmfs-test-client --url URL --mountpoint DIR --cache DIR [--name-length N] [--ttl SECONDS]
//! [--backend own|crate]`: mounts a CernVM-FS repository and takes commands on stdin.
//!
//! `served` is the file system as the kernel sees it, `gate` decides when a request is answered,
//! `inodes` numbers what was seen, `backend` is the boundary to the reader of the repository:
//! `own` is ours, `library` is the crate `cvmfs`.

#![forbid(unsafe_code)]

mod attributes;
mod backend;
mod commands;
mod gate;
mod inodes;
#[cfg(feature = "cvmfs-crate")]
mod library;
mod options;
mod own;
mod served;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use fuser::{Config, MountOption, Session, SessionACL};
use nix::mount::{MntFlags, umount2};

use backend::Backend;
use options::{Options, Reader};
use served::{FileSystem, Served};

/// Event loops that work at once. A request that waits for the web server keeps one of them; a
/// request that waits by command keeps none.
const THREADS: usize = 12;

fn main() -> ExitCode {
    match Options::parse(std::env::args_os().skip(1)).map_err(Into::into).and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cvmfs-test-client: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    let served = Arc::new(Served::new(reader(options)?, options.name_length, options.ttl));
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
    println!("mounted");
    io::stdout().flush()?;
    commands::run(&served, &notifier);
    // Lazy, since the mount may be in use. Afterwards the session must not unmount a second time:
    // something else may be mounted there by then.
    let unmounted = umount2(&options.mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    std::mem::forget(session);
    Ok(unmounted?)
}

fn reader(options: &Options) -> Result<Box<dyn Backend>, Box<dyn std::error::Error>> {
    match options.reader {
        Reader::Own => Ok(Box::new(own::Own::open(&options.url, &options.cache)?)),
        #[cfg(feature = "cvmfs-crate")]
        Reader::Library => Ok(Box::new(library::Library::open(&options.url, &options.cache)?)),
        #[cfg(not(feature = "cvmfs-crate"))]
        Reader::Library => Err("serve with the crate: this client was built without its feature `cvmfs-crate`".into()),
    }
}
