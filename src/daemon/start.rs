//! The start: from the state root to a snapshotter that can serve calls.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::io;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, select};

use super::Error;
use super::state_root::StateRoot;
use crate::config::Config;
use crate::metrics::METRICS;
use crate::migration::takeover;
use crate::overlay::SnapshotPaths;
use crate::repository::Repository;
use crate::snapshotter::{RecoveryReport, Snapshotter, SnapshotterOptions};
use crate::store::Store;
use crate::system::{Host, Sys};
use crate::{notify, system};

/// The kernel knows the overlay option `index` if this file exists.
const OVERLAY_INDEX: &str = "/sys/module/overlay/parameters/index";

/// The channel that is disconnected as soon as the daemon is told to stop.
pub type StopRequest = Receiver<Infallible>;

/// The result of the start.
pub struct RecoveredState {
    pub root: StateRoot,
    pub snapshotter: Arc<Snapshotter>,
    pub report: RecoveryReport,
}

/// Recovers the state on a thread of its own. The result is None if the daemon was told to stop and the recovery was not
/// over `limit` later. Then the state is as after a crash, and the next start recovers it.
pub fn recover_state_unless_stopped(
    root: &Path,
    config: &Config,
    stop_request: &StopRequest,
    limit: Duration,
) -> Result<Option<RecoveredState>, Error> {
    let (sender, receiver) = bounded(1);
    let (root, config) = (root.to_owned(), config.clone());
    let recover = move || drop(sender.send(recover_state(&root, &config)));
    let thread = thread::Builder::new().name("start".to_owned()).spawn(recover).map_err(Error::Threads)?;
    let received = select! {
        recv(receiver) -> result => result.map_err(RecvTimeoutError::from),
        recv(stop_request) -> _ => receiver.recv_timeout(limit),
    };
    match received {
        Ok(result) => result.map(Some),
        Err(RecvTimeoutError::Disconnected) => thread.join().map_or_else(|panic| resume_unwind(panic), |()| Ok(None)),
        Err(RecvTimeoutError::Timeout) => {
            log::info!(event = "start_aborted"; "stopped before the start was over");
            notify::stopping();
            Ok(None)
        }
    }
}

/// Acquires the state root, opens the metadata, and finds what a crash left.
fn recover_state(root: &Path, config: &Config) -> Result<RecoveredState, Error> {
    let root = StateRoot::acquire(root, &config.repositories).map_err(Error::StateRoot)?;
    let snapshotter = Arc::new(open_snapshotter(&root, config)?);
    let report = snapshotter.recover().map_err(Error::Recovery)?;
    log::info!(
        event = "state_recovered", snapshots = report.snapshots, leftovers = report.leftovers, broken = report.broken.len();
        "{} snapshots, {} leftovers to clean up, {} without their files",
        report.snapshots, report.leftovers, report.broken.len()
    );
    if !report.unknown.is_empty() {
        log::error!(
            event = "unknown_directories", count = report.unknown.len();
            "{} directories hold files that the metadata does not know: was an older copy of the metadata put back?",
            report.unknown.len()
        );
    }
    if report.foreign > 0 {
        log::warn!(
            event = "foreign_directories", count = report.foreign, path:% = root.snapshots.display();
            "{} holds {} entries of another snapshotter: they are left alone, remove them once nothing needs them",
            root.snapshots.display(), report.foreign
        );
    }
    Ok(RecoveredState { root, snapshotter, report })
}

fn open_snapshotter(root: &StateRoot, config: &Config) -> Result<Snapshotter, Error> {
    let sys: Arc<dyn Sys> = Arc::new(Host);
    // The state root may already have directories of another snapshotter, whose ids must not be used.
    let highest_id = system::snapshot_ids(sys.as_ref(), &root.snapshots).map_err(Error::System)?.into_iter().max();
    if !root.metadata.exists() {
        let paths = SnapshotPaths::new(root.snapshots.clone());
        check_metadata_present(root, &paths, sys.as_ref())?;
        let first = config.repositories.first().map_or("", |repository| repository.name.as_str());
        takeover::take_over(&root.metadata, &paths, highest_id, first, sys.as_ref()).map_err(|e| match e {
            takeover::Error::Store(cause) => Error::Store(cause),
            other => Error::Takeover(other),
        })?;
    }
    let store = Store::open(&root.metadata, highest_id).map_err(Error::Store)?;
    let open_repository = |repository: &crate::config::RepositoryConfig| {
        METRICS.init_repository(&repository.name);
        let (name, path) = (repository.name.clone(), repository.path.clone());
        Repository::new(name, path, config.repository_timeout, Arc::clone(&sys))
    };
    let repositories = config.repositories.iter().map(open_repository).collect();
    let overlay_options = if Path::new(OVERLAY_INDEX).exists() { vec!["index=off".to_owned()] } else { Vec::new() };
    let options = SnapshotterOptions { attach: config.attach, overlay_options };
    Ok(Snapshotter::new(store, repositories, sys, &root.snapshots, options))
}

/// Refuses to create metadata if there was some before, because the daemon would forget every snapshot. Two things tell
/// that: the reserve beside the metadata, and records of local snapshots. Records without metadata are also what a
/// takeover from a Go snapshotter leaves that was cut short, and then they are no reason to refuse.
fn check_metadata_present(root: &StateRoot, paths: &SnapshotPaths, sys: &dyn Sys) -> Result<(), Error> {
    let earlier = root.metadata.with_extension("redb");
    if earlier.exists() {
        return Err(Error::MetadataOfEarlierVersion { path: earlier });
    }
    let ids = system::snapshot_ids(sys, &root.snapshots).map_err(Error::System)?;
    let snapshots = ids.iter().filter(|id| paths.sidecar(**id).exists()).count();
    let has_go_metadata = root.metadata.with_file_name(takeover::GO_METADATA).exists();
    if Store::existed_at(&root.metadata) || (snapshots > 0 && !has_go_metadata) {
        return Err(Error::MetadataGone { path: root.metadata.clone(), snapshots });
    }
    Ok(())
}

/// Cleans up what a crash left, beside the first calls.
pub fn spawn_startup_cleanup(snapshotter: Arc<Snapshotter>) -> io::Result<()> {
    let cleanup = move || {
        if let Err(e) = snapshotter.cleanup(&|| false) {
            log::warn!(event = "startup_cleanup_failed"; "leftovers stay until the next cleanup: {e}");
        }
    };
    thread::Builder::new().name("leftovers".to_owned()).spawn(cleanup).map(drop)
}
