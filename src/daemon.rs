//! The only place that wires the rooms together: start order, signals, stop order.
#![forbid(unsafe_code)]

mod error;
mod root;

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::LevelFilter;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};

pub use self::error::Error;
use self::root::{SNAPSHOTS, StateRoot};
use crate::attach::Mode;
use crate::cli::Arguments;
use crate::config::{self, Config, Loaded, MetricsAddress};
use crate::metrics::{Gauges, METRICS, endpoint};
use crate::overlay::Places;
use crate::pool::{Drained, Entrance, Pool};
use crate::repository::Repository;
use crate::server::{self, Late, Server, Waiters};
use crate::snapshotter::{Found, Snapshotter, Ways};
use crate::store::Store;
use crate::sys::{Host, Sys};
use crate::types::SnapshotId;
use crate::{logging, notify, rebuild, sys, takeover};

/// A stop waits so long for the calls under way.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// And so long for the last lines of the log.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// File descriptors: two for each connection, up to three for each thread, and a few more.
const DESCRIPTORS: u64 = 1024;
/// Set by a unit: the one value of `attach` that it is made for.
const ONLY_ATTACH: &str = "CVMFS_SNAPSHOTTER_ATTACH";
/// Its presence says that this kernel knows the overlay option `index`.
const OVERLAY_INDEX: &str = "/sys/module/overlay/parameters/index";

/// Checks the configuration file and nothing else.
pub fn check_config(arguments: &Arguments) -> Result<(), Error> {
    let loaded = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    check_metrics(arguments, &loaded.config)?;
    if loaded.unknown.is_empty() { Ok(()) } else { Err(Error::UnknownKeys(loaded.unknown)) }
}

/// A unit that keeps to itself what is mounted says so; containers would miss it in silence.
fn check_attach(wanted: Mode) -> Result<(), Error> {
    let only_links = std::env::var_os(ONLY_ATTACH).is_some_and(|only| only == "symlink");
    if only_links && wanted != Mode::Symlink { Err(Error::BindInNamespace) } else { Ok(()) }
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
pub fn rebuild_metadata(arguments: &Arguments, wanted: &rebuild::Wanted) -> Result<(), Error> {
    let Loaded { config, .. } = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    // A root that was mistyped must not be made.
    if !arguments.root.join(SNAPSHOTS).is_dir() {
        return Err(Error::NothingToRebuild { root: arguments.root.clone() });
    }
    let root = StateRoot::take(&arguments.root)?;
    let first = config.repositories.first().map_or("", |at| at.name.as_str());
    let places = Places::new(root.snapshots.clone());
    let report = rebuild::run(&root.metadata, &places, first, wanted, &Host).map_err(Error::Rebuild)?;
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
    sys::share_arenas();
    // Blocked before the first thread starts, so that every thread inherits it and the
    // signals wait for us.
    let signals = block_signals();
    let Loaded { config, unknown } = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    logging::start(config.log_format, level(arguments, &config));
    for key in &unknown {
        log::warn!("{}, {key}", arguments.config_file().display());
    }
    check_attach(config.attach)?;
    check_metrics(arguments, &config)?;
    raise_descriptor_limit();
    server::check_address(&arguments.address).map_err(Error::Address)?;
    let pools = Pools::start(&config).map_err(Error::Threads)?;
    let late = Late::default();
    let serve_on = |bound| {
        let late = Arc::clone(&late);
        Server::start(bound, &config.allowed_uids, late, pools.workers.entrance(), pools.waiters())
    };
    // Whoever connects to a socket that systemd holds is greeted at once, and its calls wait:
    // containerd gives up a connection that is not greeted within a second.
    let early = server::inherited().and_then(|bound| bound.map(serve_on).transpose()).map_err(Error::Server)?;
    let (root, snapshotter, found) = match begin(arguments, &config) {
        Ok(begun) => begun,
        Err(e) => {
            if let Some(server) = early {
                server.abandon();
            }
            return Err(e);
        }
    };
    let server = match early {
        Some(server) => {
            if server.address() != arguments.address {
                log::warn!("the address {} is not used: a socket came with the start", arguments.address.display());
            }
            server
        }
        None => server::bind(&arguments.address, &config.allowed_uids).and_then(serve_on).map_err(Error::Server)?,
    };
    let _ = late.set(Arc::clone(&snapshotter));
    let paths: Vec<String> = config.repositories.iter().map(|r| r.path.display().to_string()).collect();
    log::info!(
        "cvmfs-snapshotter {} serves {} from {}",
        env!("CARGO_PKG_VERSION"),
        server.address().display(),
        paths.join(", ")
    );
    snapshotter.look_at_repositories();
    clean_leftovers(Arc::clone(&snapshotter))?;
    if let Some(address) = &config.metrics {
        // Containers can start without.
        match endpoint::serve(address, gauges(&snapshotter, &pools)) {
            Ok(()) => log::info!("metrics are at {}", metrics_at(address)),
            Err(e) => log::error!("{e}"),
        }
    }
    notify::ready(&format!("{} snapshots, from {}", found.snapshots, paths.join(", ")));
    if let Some(interval) = notify::watchdog_interval() {
        show_life(interval, pools.workers.entrance())?;
    }
    wait_for_stop(&signals, arguments, level(arguments, &config));
    notify::stopping();
    stop(server, pools);
    snapshotter.close();
    drop(root);
    Ok(())
}

/// Everything up to the first call: the state root, the metadata, and what a crash left.
fn begin(arguments: &Arguments, config: &Config) -> Result<(StateRoot, Arc<Snapshotter>, Found), Error> {
    let root = StateRoot::take(&arguments.root)?;
    let snapshotter = Arc::new(open(&root, config)?);
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

fn level(arguments: &Arguments, config: &Config) -> LevelFilter {
    arguments.log_level.or(config.log_level).unwrap_or(LevelFilter::Info)
}

fn block_signals() -> SigSet {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        signals.add(signal);
    }
    // Cannot fail: the set holds signals only.
    let _ = signals.thread_block();
    signals
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

/// `level` is what the log began with.
fn wait_for_stop(signals: &SigSet, arguments: &Arguments, mut level: LevelFilter) {
    loop {
        match signals.wait() {
            Ok(Signal::SIGTERM | Signal::SIGINT) => return,
            Ok(Signal::SIGHUP) => level = reload(arguments).unwrap_or(level),
            Ok(Signal::SIGUSR1) => change_level(log::max_level().increment_severity()),
            Ok(Signal::SIGUSR2) => change_level(level),
            Ok(_) | Err(_) => {}
        }
    }
}

fn change_level(level: LevelFilter) {
    logging::set_level(level);
    // Somebody waits for it, so it is said at any level; at the usual ones it is no alarm.
    let as_what = level.to_level().map_or(log::Level::Error, |most| most.min(log::Level::Info));
    log::log!(as_what, "log level {level}");
}

/// SIGHUP: only the log level changes while the program runs.
fn reload(arguments: &Arguments) -> Option<LevelFilter> {
    match config::load(arguments.config.as_deref()) {
        Ok(Loaded { config, .. }) => {
            // What somebody just wrote into the file wins over what the service was started with.
            let level = config.log_level.or(arguments.log_level).unwrap_or(LevelFilter::Info);
            logging::set_level(level);
            log::info!("log level {level}; other keys of the configuration need a restart");
            Some(level)
        }
        Err(e) => {
            log::error!("nothing was changed: {e}");
            None
        }
    }
}

/// What a scrape finds now, without waiting for anybody.
fn gauges(snapshotter: &Arc<Snapshotter>, pools: &Pools) -> impl Fn() -> Gauges + Send + 'static {
    let snapshotter = Arc::clone(snapshotter);
    let pools = pools.named();
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

fn metrics_at(address: &MetricsAddress) -> String {
    match address {
        MetricsAddress::Tcp(address) => format!("http://{address}/metrics"),
        MetricsAddress::Unix(path) => path.display().to_string(),
    }
}

/// Tells the service manager that a worker was free, four times in each of its intervals. Nothing
/// that hangs in a repository keeps them all; a bug might.
fn show_life(interval: Duration, workers: Entrance) -> Result<(), Error> {
    let (free, was_free) = crossbeam_channel::bounded(1);
    let work = move || {
        loop {
            let free = free.clone();
            // Not in the queue of calls, which a flood may have filled.
            workers.go_on(
                || false,
                || (),
                move |_| {
                    let _ = free.try_send(());
                },
            );
            if was_free.recv().is_err() {
                return;
            }
            notify::alive();
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
        for pool in pools.in_order() {
            match pool.drain(until.saturating_duration_since(Instant::now())) {
                Drained::Completely => {}
                Drained::LeavingBehind(calls) => {
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
    fn start(config: &Config) -> io::Result<Self> {
        let waiters = |name: &str| Pool::start(name, config.waiter_threads(), config.queue);
        Ok(Self {
            workers: Pool::start("worker", config.worker_threads(), config.queue)?,
            pulls: waiters("pull")?,
            repositories: config.repositories.iter().map(|_| waiters("start")).collect::<io::Result<_>>()?,
        })
    }

    fn waiters(&self) -> Waiters {
        let repositories = self.repositories.iter().map(Pool::entrance).collect();
        Waiters { pulls: self.pulls.entrance(), repositories }
    }

    /// For the metrics.
    fn named(&self) -> Vec<(&'static str, Entrance)> {
        let repositories = self.repositories.iter().map(|pool| ("start", pool.entrance()));
        [("worker", self.workers.entrance()), ("pull", self.pulls.entrance())].into_iter().chain(repositories).collect()
    }

    /// In the order in which calls go through them.
    fn in_order(self) -> impl Iterator<Item = Pool> {
        [self.workers, self.pulls].into_iter().chain(self.repositories)
    }
}

/// What a crash left, beside the first calls: nothing waits for it.
fn clean_leftovers(snapshotter: Arc<Snapshotter>) -> Result<(), Error> {
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
/// tells: the space put by, which is made after it, and the records of local snapshots, but for
/// those that a takeover from a Go snapshotter writes before.
fn refuse_to_forget(root: &StateRoot, places: &Places, sys: &dyn Sys) -> Result<(), Error> {
    let entries = sys.read_dir(&root.snapshots).map_err(Error::System)?;
    let ids = entries.iter().filter_map(|(name, _)| SnapshotId::from_directory_name(name.to_str()?));
    let snapshots = ids.filter(|id| places.record(*id).exists()).count();
    let takes_over = root.metadata.with_file_name(takeover::GO_METADATA).exists();
    if Store::was_at(&root.metadata) || (snapshots > 0 && !takes_over) {
        return Err(Error::MetadataGone { path: root.metadata.clone(), snapshots });
    }
    Ok(())
}

fn open(root: &StateRoot, config: &Config) -> Result<Snapshotter, Error> {
    let sys: Arc<dyn Sys> = Arc::new(Host);
    // Another snapshotter's directories, if the state root had one before us.
    let occupied = sys
        .read_dir(&root.snapshots)
        .map_err(Error::System)?
        .iter()
        .filter_map(|(name, _)| SnapshotId::from_directory_name(name.to_str()?))
        .max();
    if !root.metadata.exists() {
        let places = Places::new(root.snapshots.clone());
        refuse_to_forget(root, &places, sys.as_ref())?;
        let first = config.repositories.first().map_or("", |at| at.name.as_str());
        takeover::take_over(&root.metadata, &places, occupied, first, sys.as_ref()).map_err(|e| match e {
            takeover::Error::Store(cause) => Error::Store(cause),
            other => Error::Takeover(other),
        })?;
    }
    let store = Store::open(&root.metadata, occupied).map_err(Error::Store)?;
    let repositories = config
        .repositories
        .iter()
        .inspect(|at| METRICS.expect(&at.name))
        .map(|at| Repository::new(at.name.clone(), at.path.clone(), config.repository_timeout, Arc::clone(&sys)))
        .collect();
    let overlay_options = if Path::new(OVERLAY_INDEX).exists() { vec!["index=off".to_owned()] } else { Vec::new() };
    let ways = Ways { attach: config.attach, overlay_options };
    Ok(Snapshotter::new(store, repositories, sys, &root.snapshots, ways))
}
