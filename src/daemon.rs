//! The only place that wires the rooms together: start order, signals, stop order.
#![forbid(unsafe_code)]

mod error;
mod signals;
mod state_root;

use std::convert::Infallible;
use std::io::{self, Write};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, select};
use log::LevelFilter;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use self::error::Error;
use self::state_root::{SNAPSHOTS, StateRoot};
use crate::attach::AttachMode;
use crate::cli::Arguments;
use crate::config::{self, Config, LoadedConfig};
use crate::metrics::{Gauges, METRICS, endpoint};
use crate::migration::{rebuild, takeover};
use crate::model::MetricsAddress;
use crate::overlay::SnapshotPaths;
use crate::repository::Repository;
use crate::server::{self, BlockingPools, Server, SnapshotterCell};
use crate::snapshotter::{RecoveryReport, Snapshotter, SnapshotterOptions};
use crate::store::Store;
use crate::system::{Host, Sys};
use crate::worker_pool::{DrainOutcome, Pool, PoolHandle};
use crate::{logging, notify, system, unix_socket};

/// A stop that comes during the start waits so long for the start to be over: calls of those who connected to an
/// inherited socket would fail, and most starts take less than a second.
const STOP_DURING_START_LIMIT: Duration = Duration::from_secs(5);
/// A stop waits so long for the calls under way.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// And so long for the last lines of the log.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// A thread that waits for pulls or for a repository ends after so long without a job.
const IDLE: Duration = Duration::from_secs(10);
/// Memory that many calls at once needed is given up so often.
const MEMORY_INTERVAL: Duration = Duration::from_secs(10);
/// File descriptors: two for each connection, up to three for each thread, and a few more.
const DESCRIPTORS: u64 = 1024;
/// Set by a unit: the one value of `attach` that it is made for.
const REQUIRED_ATTACH_MODE_VAR: &str = "CVMFS_SNAPSHOTTER_ATTACH";
/// Its presence says that this kernel knows the overlay option `index`.
const OVERLAY_INDEX: &str = "/sys/module/overlay/parameters/index";

/// Checks the configuration file and nothing else.
pub fn check_config(arguments: &Arguments) -> Result<(), Error> {
    let loaded = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    check_metrics(arguments, &loaded.config)?;
    if loaded.unknown.is_empty() { Ok(()) } else { Err(Error::UnknownKeys(loaded.unknown)) }
}

/// A unit that keeps to itself what is mounted says so; containers would miss it in silence.
fn check_attach(wanted: AttachMode) -> Result<(), Error> {
    let only_links = std::env::var_os(REQUIRED_ATTACH_MODE_VAR).is_some_and(|only| only == "symlink");
    if only_links && wanted != AttachMode::Symlink { Err(Error::BindInNamespace) } else { Ok(()) }
}

fn check_metrics(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    match &config.metrics {
        Some(MetricsAddress::Unix(path)) if *path == arguments.address => {
            Err(Error::MetricsAtAddress { address: path.clone() })
        }
        Some(_) | None => Ok(()),
    }
}

/// Makes the metadata anew, and says of what.
pub fn rebuild_metadata(arguments: &Arguments, wanted: &rebuild::RebuildOptions) -> Result<(), Error> {
    let LoadedConfig { config, .. } = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    // A root that was mistyped must not be made.
    if !arguments.root.join(SNAPSHOTS).is_dir() {
        return Err(Error::NothingToRebuild { root: arguments.root.clone() });
    }
    let root = StateRoot::acquire(&arguments.root, &config.repositories)?;
    let first = config.repositories.first().map_or("", |at| at.name.as_str());
    let paths = SnapshotPaths::new(root.snapshots.clone());
    let report = rebuild::run(&root.metadata, &paths, first, wanted, &Host).map_err(Error::Rebuild)?;
    // Nobody may be listening; the work is done.
    let _ = io::stdout().write_all(report.text(wanted.json).as_bytes());
    Ok(())
}

/// Serves until SIGTERM or SIGINT.
pub fn run(arguments: &Arguments) -> Result<(), Error> {
    let result = serve(arguments);
    logging::flush(LOG_LIMIT);
    result
}

fn serve(arguments: &Arguments) -> Result<(), Error> {
    system::configure_allocator();
    // Blocked before the first thread starts, so that every thread inherits it and the
    // signals wait for us.
    let blocked = signals::block();
    let LoadedConfig { config, unknown } = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    let level = arguments.log_level.or(config.log_level).unwrap_or(LevelFilter::Info);
    logging::start(config.log_format, level);
    for key in &unknown {
        log::warn!("{}, {key}", arguments.config_file().display());
    }
    check_attach(config.attach)?;
    check_metrics(arguments, &config)?;
    raise_descriptor_limit();
    unix_socket::check_path(&arguments.address).map_err(Error::Address)?;
    let told_to_stop = signals::listen(blocked, arguments, level).map_err(Error::Threads)?;
    let mut pools = Pools::start(&config).map_err(Error::Threads)?;
    let late = SnapshotterCell::default();
    let serve_on = |bound| {
        let late = Arc::clone(&late);
        Server::start(bound, &config.allowed_uids, late, pools.workers.handle(), pools.blocking_pools())
            .map_err(Error::Server)
    };
    // Whoever connects to a socket that systemd holds is greeted at once, and its calls wait:
    // containerd gives up a connection that is not greeted within a second.
    let early = server::inherited_socket().map_err(Error::Socket)?.map(serve_on).transpose()?;
    let patience = if early.is_some() { STOP_DURING_START_LIMIT } else { Duration::ZERO };
    let begun = recover_state_unless_stopped(&arguments.root, &config, &told_to_stop, patience);
    let Ok(Some((root, snapshotter, found))) = begun else {
        if let Some(server) = early {
            server.abandon();
        }
        return begun.map(drop);
    };
    let server = match early {
        Some(server) => {
            if server.address() != arguments.address {
                log::warn!("the address {} is not used: a socket came with the start", arguments.address.display());
            }
            server
        }
        None => server::bind(&arguments.address, &config.allowed_uids).map_err(Error::Socket).and_then(serve_on)?,
    };
    let _ = late.set(Arc::clone(&snapshotter));
    pools.workers.start_workers().map_err(Error::Threads)?;
    let paths: Vec<String> = config.repositories.iter().map(|r| r.path.display().to_string()).collect();
    log::info!(
        "cvmfs-snapshotter {} serves {} from {}",
        env!("CARGO_PKG_VERSION"),
        server.address().display(),
        paths.join(", ")
    );
    snapshotter.log_repository_availability();
    spawn_startup_cleanup(Arc::clone(&snapshotter))?;
    if let Some(address) = &config.metrics {
        // Containers can start without.
        match endpoint::serve(address, gauges(&snapshotter, &pools)) {
            Ok(()) => log::info!("metrics are at {}", serve_metrics(address)),
            Err(e) => log::error!("{e}"),
        }
    }
    notify::ready(&format!("{} snapshots, from {}", found.snapshots, paths.join(", ")));
    if let Some(interval) = notify::watchdog_interval() {
        run_watchdog(interval, pools.workers.handle())?;
    }
    while told_to_stop.recv_timeout(MEMORY_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        snapshotter.release_memory();
    }
    notify::stopping();
    stop(server, pools);
    snapshotter.close();
    drop(root);
    Ok(())
}

type RecoveredState = (StateRoot, Arc<Snapshotter>, RecoveryReport);

/// As `recover_state`. None: the daemon was told to stop meanwhile, and `patience` later the start was not over. What is half
/// done then is as after a crash, which the next start takes up.
fn recover_state_unless_stopped(
    root: &Path,
    config: &Config,
    stop: &Receiver<Infallible>,
    patience: Duration,
) -> Result<Option<RecoveredState>, Error> {
    let (done, begun) = bounded(1);
    let (root, config) = (root.to_owned(), config.clone());
    let work = move || drop(done.send(recover_state(&root, &config)));
    let thread = thread::Builder::new().name("start".to_owned()).spawn(work).map_err(Error::Threads)?;
    let result = select! {
        recv(begun) -> result => result.map_err(RecvTimeoutError::from),
        recv(stop) -> _ => begun.recv_timeout(patience),
    };
    match result {
        Ok(result) => result.map(Some),
        Err(RecvTimeoutError::Disconnected) => thread.join().map_or_else(|panic| resume_unwind(panic), |()| Ok(None)),
        Err(RecvTimeoutError::Timeout) => {
            log::info!("stopped before the start was over");
            notify::stopping();
            Ok(None)
        }
    }
}

/// Everything up to the first call: the state root, the metadata, and what a crash left.
fn recover_state(root: &Path, config: &Config) -> Result<RecoveredState, Error> {
    let root = StateRoot::acquire(root, &config.repositories)?;
    let snapshotter = Arc::new(open_snapshotter(&root, config)?);
    let found = snapshotter.recover().map_err(Error::Recovery)?;
    log::info!(
        "{} snapshots, {} leftovers to clean up, {} without their files",
        found.snapshots,
        found.leftovers,
        found.broken.len()
    );
    if !found.unknown.is_empty() {
        log::error!(
            "{} directories hold files that the metadata does not know: was an older copy of it put back?",
            found.unknown.len()
        );
    }
    if found.foreign > 0 {
        log::warn!(
            "{} holds {} entries of another snapshotter: they are left alone, remove them once nothing needs them",
            root.snapshots.display(),
            found.foreign
        );
    }
    Ok((root, snapshotter, found))
}

/// Services are started with 1024 that may be opened, and often with many more that may be asked for.
fn raise_descriptor_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let wanted = soft.max(hard.min(DESCRIPTORS * 4));
    let limit = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_or(soft, |()| wanted);
    if limit < DESCRIPTORS {
        log::warn!(
            "only {limit} files may be open, {DESCRIPTORS} are needed at the bounds: raise LimitNOFILE= in the unit"
        );
    }
}

/// What a scrape finds now, without waiting for anybody.
fn gauges(snapshotter: &Arc<Snapshotter>, pools: &Pools) -> impl Fn() -> Gauges + Send + 'static {
    let snapshotter = Arc::clone(snapshotter);
    let pools = pools.with_names();
    move || {
        let (snapshots, leftovers) = snapshotter.counts().unwrap_or_default();
        Gauges {
            pools: pools.iter().map(|(name, pool)| (*name, pool.state())).collect(),
            repositories: snapshotter.health(),
            snapshots,
            leftovers,
        }
    }
}

fn serve_metrics(address: &MetricsAddress) -> String {
    match address {
        MetricsAddress::Tcp(address) => format!("http://{address}/metrics"),
        MetricsAddress::Unix(path) => path.display().to_string(),
    }
}

/// Tells the service manager that a worker was free, four times in each of its intervals. Nothing
/// that hangs in a repository keeps them all; a bug might.
fn run_watchdog(interval: Duration, workers: PoolHandle) -> Result<(), Error> {
    let (free, was_free) = crossbeam_channel::bounded(1);
    let work = move || {
        loop {
            let free = free.clone();
            // Not in the queue of calls, which a flood may have filled.
            workers.submit_continuation(
                || false,
                || (),
                move |_| {
                    let _ = free.try_send(());
                },
            );
            if was_free.recv().is_err() {
                return;
            }
            notify::watchdog_ping();
            thread::sleep(interval / 4);
        }
    };
    thread::Builder::new().name("watchdog".to_owned()).spawn(work).map(drop).map_err(Error::Threads)
}

/// Leaves every snapshot and every mount as it is.
fn stop(server: Server, pools: Pools) {
    log::info!("stopping; snapshots and mounts stay as they are");
    let until = Instant::now() + STOP_LIMIT;
    server.stop(until, || {
        for pool in pools.drain_order() {
            match pool.drain(until.saturating_duration_since(Instant::now())) {
                DrainOutcome::Completed => {}
                DrainOutcome::TimedOut { remaining: calls } => {
                    log::warn!("{calls} calls did not finish in {STOP_LIMIT:?} and are given up");
                }
            }
        }
    });
    log::info!("stopped");
}

/// The threads that do the work of calls. Who waits for one repository, or for the answers to a
/// pull, takes no thread from anybody else.
struct Pools {
    workers: Pool,
    pulls: Pool,
    repositories: Vec<Pool>,
}

impl Pools {
    /// All but the workers: calls that come before the start is over wait for those.
    fn start(config: &Config) -> io::Result<Self> {
        let blocking_pools = |name: &str| Pool::growing(name, config.blocking_threads(), config.queue, IDLE);
        Ok(Self {
            workers: Pool::unstarted("worker", config.worker_threads(), config.queue),
            pulls: blocking_pools("pull")?,
            repositories: config.repositories.iter().map(|_| blocking_pools("start")).collect::<io::Result<_>>()?,
        })
    }

    fn blocking_pools(&self) -> BlockingPools {
        let repositories = self.repositories.iter().map(Pool::handle).collect();
        BlockingPools { pulls: self.pulls.handle(), repositories }
    }

    /// For the metrics.
    fn with_names(&self) -> Vec<(&'static str, PoolHandle)> {
        let repositories = self.repositories.iter().map(|pool| ("start", pool.handle()));
        [("worker", self.workers.handle()), ("pull", self.pulls.handle())].into_iter().chain(repositories).collect()
    }

    /// In the order in which calls go through them.
    fn drain_order(self) -> impl Iterator<Item = Pool> {
        [self.workers, self.pulls].into_iter().chain(self.repositories)
    }
}

/// What a crash left, beside the first calls: nothing waits for it.
fn spawn_startup_cleanup(snapshotter: Arc<Snapshotter>) -> Result<(), Error> {
    thread::Builder::new()
        .name("leftovers".to_owned())
        .spawn(move || {
            if let Err(e) = snapshotter.cleanup(&|| false) {
                log::warn!("leftovers stay until the next cleanup: {e}");
            }
        })
        .map(drop)
        .map_err(Error::Threads)
}

/// There was metadata, and it is gone: a start would forget every snapshot. What lies beside it
/// tells: the reserve, which is made after it, and the records of local snapshots, but for
/// those that a takeover from a Go snapshotter writes before.
fn check_metadata_present(root: &StateRoot, paths: &SnapshotPaths, sys: &dyn Sys) -> Result<(), Error> {
    let earlier = root.metadata.with_extension("redb");
    if earlier.exists() {
        return Err(Error::MetadataOfEarlierVersion { path: earlier });
    }
    let ids = system::snapshot_ids(sys, &root.snapshots).map_err(Error::System)?;
    let snapshots = ids.iter().filter(|id| paths.sidecar(**id).exists()).count();
    let takes_over = root.metadata.with_file_name(takeover::GO_METADATA).exists();
    if Store::existed_at(&root.metadata) || (snapshots > 0 && !takes_over) {
        return Err(Error::MetadataGone { path: root.metadata.clone(), snapshots });
    }
    Ok(())
}

fn open_snapshotter(root: &StateRoot, config: &Config) -> Result<Snapshotter, Error> {
    let sys: Arc<dyn Sys> = Arc::new(Host);
    // Another snapshotter's directories, if the state root had one before us.
    let occupied = system::snapshot_ids(sys.as_ref(), &root.snapshots).map_err(Error::System)?.into_iter().max();
    if !root.metadata.exists() {
        let paths = SnapshotPaths::new(root.snapshots.clone());
        check_metadata_present(root, &paths, sys.as_ref())?;
        let first = config.repositories.first().map_or("", |at| at.name.as_str());
        takeover::take_over(&root.metadata, &paths, occupied, first, sys.as_ref()).map_err(|e| match e {
            takeover::Error::Store(cause) => Error::Store(cause),
            other => Error::Takeover(other),
        })?;
    }
    let store = Store::open(&root.metadata, occupied).map_err(Error::Store)?;
    let repositories = config
        .repositories
        .iter()
        .inspect(|at| METRICS.init_repository(&at.name))
        .map(|at| Repository::new(at.name.clone(), at.path.clone(), config.repository_timeout, Arc::clone(&sys)))
        .collect();
    let overlay_options = if Path::new(OVERLAY_INDEX).exists() { vec!["index=off".to_owned()] } else { Vec::new() };
    let ways = SnapshotterOptions { attach: config.attach, overlay_options };
    Ok(Snapshotter::new(store, repositories, sys, &root.snapshots, ways))
}
