//! The daemon: the only room that connects the others. It decides the order of start and stop.
//!
//! `start` recovers the state, `pools` holds the threads that do the calls' work, `signals` and `watchdog` are threads of
//! their own, `state_root` locks the state, and `error` says why the daemon does not start.
#![forbid(unsafe_code)]

mod error;
mod limits;
mod pools;
mod signals;
mod start;
mod state_root;
mod watchdog;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use log::LevelFilter;

pub use self::error::Error;
use self::pools::Pools;
use self::start::{RecoveredState, StopRequest};
use self::state_root::{SNAPSHOTS, StateRoot};
use crate::cli::Arguments;
use crate::config::{self, Config, LoadedConfig};
use crate::metrics::{Gauges, endpoint};
use crate::migration::rebuild;
use crate::model::{AttachMode, MetricsAddress};
use crate::overlay::SnapshotPaths;
use crate::server::{self, Server, SnapshotterCell};
use crate::snapshotter::Snapshotter;
use crate::system::Host;
use crate::worker_pool::DrainOutcome;
use crate::{logging, notify, system, unix_socket};

/// How long a stop that is requested during the start waits for the start to be over. Most starts take less than a
/// second, and ending earlier would fail the calls of clients that connected to an inherited socket.
const STOP_DURING_START_LIMIT: Duration = Duration::from_secs(5);
/// How long a stop waits for the calls under way.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long a stop waits for the last lines of the log.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// How often memory is released that many calls at once needed.
const MEMORY_INTERVAL: Duration = Duration::from_secs(10);
/// Set by a unit that works with only one value of `attach`.
const REQUIRED_ATTACH_MODE_VAR: &str = "CVMFS_SNAPSHOTTER_ATTACH";

/// Checks the configuration file and nothing else.
pub fn check_config(arguments: &Arguments) -> Result<(), Error> {
    let loaded = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    check_metrics_address(arguments, &loaded.config)?;
    if loaded.unknown.is_empty() { Ok(()) } else { Err(Error::UnknownKeys(loaded.unknown)) }
}

/// Refuses bind mounts in a unit with its own mount namespace, because containers would start without the layers.
fn check_attach_mode(mode: AttachMode) -> Result<(), Error> {
    let requires_symlinks = std::env::var_os(REQUIRED_ATTACH_MODE_VAR).is_some_and(|required| required == "symlink");
    if requires_symlinks && mode != AttachMode::Symlink { Err(Error::BindInNamespace) } else { Ok(()) }
}

fn check_metrics_address(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    match &config.metrics {
        Some(MetricsAddress::Unix(path)) if *path == arguments.address => {
            Err(Error::MetricsAtAddress { address: path.clone() })
        }
        Some(_) | None => Ok(()),
    }
}

/// Rebuilds the metadata and prints a report.
pub fn rebuild_metadata(arguments: &Arguments, options: &rebuild::RebuildOptions) -> Result<(), Error> {
    let LoadedConfig { config, .. } = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    // A state root whose path was mistyped must not be created.
    if !arguments.root.join(SNAPSHOTS).is_dir() {
        return Err(Error::NothingToRebuild { root: arguments.root.clone() });
    }
    let root = StateRoot::acquire(&arguments.root, &config.repositories).map_err(Error::StateRoot)?;
    let first = config.repositories.first().map_or("", |repository| repository.name.as_str());
    let paths = SnapshotPaths::new(root.snapshots.clone());
    let report = rebuild::run(&root.metadata, &paths, first, options, &Host).map_err(Error::Rebuild)?;
    // The work is done, so it does not matter whether anybody reads the report.
    let _ = io::stdout().write_all(report.text(options.json).as_bytes());
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
    // The signals are blocked before the first thread starts, so that every thread inherits that.
    let blocked = signals::block();
    let (config, level) = load_config(arguments)?;
    limits::raise_descriptor_limit();
    unix_socket::check_path(&arguments.address).map_err(Error::Address)?;
    let stop_request = signals::listen(blocked, arguments, level).map_err(Error::Threads)?;
    let pools = Pools::start(&config).map_err(Error::Threads)?;
    let cell = SnapshotterCell::default();
    let start_server = |socket| {
        Server::start(socket, &config.allowed_uids, Arc::clone(&cell), pools.workers.handle(), pools.blocking_pools())
            .map_err(Error::Server)
    };
    // Clients of a socket that systemd holds are accepted during the start, and their calls wait, because containerd
    // gives up a connection that is not answered within a second.
    let preactivated_server = server::inherited_socket().map_err(Error::Socket)?.map(start_server).transpose()?;
    let limit = if preactivated_server.is_some() { STOP_DURING_START_LIMIT } else { Duration::ZERO };
    let recovered = start::recover_state_unless_stopped(&arguments.root, &config, &stop_request, limit);
    let Ok(Some(state)) = recovered else {
        if let Some(server) = preactivated_server {
            server.abandon();
        }
        return recovered.map(drop);
    };
    let server = match preactivated_server {
        Some(server) => server,
        None => server::bind(&arguments.address, &config.allowed_uids).map_err(Error::Socket).and_then(start_server)?,
    };
    let _ = cell.set(Arc::clone(&state.snapshotter));
    pools.workers.start_workers().map_err(Error::Threads)?;
    announce(arguments, &config, &server, &state, &pools)?;
    wait_for_stop(&stop_request, &state.snapshotter);
    stop(server, pools);
    state.snapshotter.close();
    // The lock of the state root is released last.
    drop(state.root);
    Ok(())
}

/// Loads the configuration and starts the log. Also returns the level at which the log starts.
fn load_config(arguments: &Arguments) -> Result<(Config, LevelFilter), Error> {
    let LoadedConfig { config, unknown } = config::load(arguments.config.as_deref()).map_err(Error::Config)?;
    let level = arguments.log_level.or(config.log_level).unwrap_or(LevelFilter::Info);
    logging::start(config.log_format, level);
    for key in &unknown {
        let file = arguments.config_file().display();
        log::warn!(event = "unknown_config_key", key = key.key.as_str(), line = key.line; "{file}, {key}");
    }
    check_attach_mode(config.attach)?;
    check_metrics_address(arguments, &config)?;
    Ok((config, level))
}

/// Tells the log, Prometheus and the service manager that calls are served, and starts what runs beside the calls.
fn announce(
    arguments: &Arguments,
    config: &Config,
    server: &Server,
    state: &RecoveredState,
    pools: &Pools,
) -> Result<(), Error> {
    let version = env!("CARGO_PKG_VERSION");
    let address = server.address();
    if address != arguments.address {
        log::warn!(
            event = "listen_address_ignored", path:% = arguments.address.display();
            "not listening on {}: the daemon was started with the socket {}",
            arguments.address.display(), address.display()
        );
    }
    let paths: Vec<String> = config.repositories.iter().map(|r| r.path.display().to_string()).collect();
    let paths = paths.join(", ");
    log::info!(
        event = "daemon_started", version, address:% = address.display();
        "cvmfs-snapshotter {version} serves {} with layers from {paths}", address.display()
    );
    state.snapshotter.log_repository_availability();
    start::spawn_startup_cleanup(Arc::clone(&state.snapshotter)).map_err(Error::Threads)?;
    if let Some(address) = &config.metrics {
        serve_metrics(address, &state.snapshotter, pools);
    }
    notify::ready(&format!("{} snapshots, from {paths}", state.report.snapshots));
    match notify::watchdog_interval() {
        Some(interval) => watchdog::start(interval, pools.workers.handle()).map_err(Error::Threads),
        None => Ok(()),
    }
}

/// Serves metrics. If that fails, the daemon serves calls without them.
fn serve_metrics(address: &MetricsAddress, snapshotter: &Arc<Snapshotter>, pools: &Pools) {
    let url = match address {
        MetricsAddress::Tcp(address) => format!("http://{address}/metrics"),
        MetricsAddress::Unix(path) => path.display().to_string(),
    };
    let snapshotter = Arc::clone(snapshotter);
    let pools = pools.with_names();
    let gauges = move || {
        let (snapshots, leftovers) = snapshotter.counts().unwrap_or_default();
        Gauges {
            pools: pools.iter().map(|(name, pool)| (*name, pool.state())).collect(),
            repositories: snapshotter.health(),
            snapshots,
            leftovers,
        }
    };
    match endpoint::serve(address, gauges) {
        Ok(()) => log::info!(event = "metrics_served", address:% = url; "serving metrics at {url}"),
        Err(e) => log::error!(event = "metrics_unavailable", address:% = url; "{e}"),
    }
}

/// Returns when the daemon is told to stop. Until then, memory that calls needed is released from time to time.
fn wait_for_stop(stop_request: &StopRequest, snapshotter: &Snapshotter) {
    while stop_request.recv_timeout(MEMORY_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        snapshotter.release_memory();
    }
    notify::stopping();
}

/// Finishes the calls under way. Every snapshot and every mount stays as it is.
fn stop(server: Server, pools: Pools) {
    log::info!(event = "daemon_stopping"; "stopping; snapshots and mounts stay as they are");
    let deadline = Instant::now() + STOP_LIMIT;
    server.stop(deadline, || {
        for pool in pools.into_drain_order() {
            match pool.drain(deadline.saturating_duration_since(Instant::now())) {
                DrainOutcome::Completed => {}
                DrainOutcome::TimedOut { remaining: calls } => {
                    log::warn!(event = "calls_abandoned", calls; "{calls} calls did not finish in {STOP_LIMIT:?} and are abandoned");
                }
            }
        }
    });
    log::info!(event = "daemon_stopped"; "stopped");
}
