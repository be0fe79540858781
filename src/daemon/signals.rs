//! Signals, handled by a thread of their own from the beginning of the start: SIGTERM and SIGINT stop the daemon, SIGHUP
//! reads the log level from the configuration, SIGUSR1 and SIGUSR2 change it.
#![forbid(unsafe_code)]

use std::io;
use std::thread;

use crossbeam_channel::bounded;
use log::LevelFilter;
use nix::sys::signal::{SigSet, Signal};

use super::StopRequest;
use crate::cli::Arguments;
use crate::config::{self, LoadedConfig};

/// Blocks the signals for the calling thread and for those that it starts, so that they wait for `listen`.
pub fn block() -> SigSet {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        signals.add(signal);
    }
    // This cannot fail, because the set is valid.
    let _ = signals.thread_block();
    signals
}

/// Handles the `blocked` signals on a new thread. `level` is the log level of the start.
pub fn listen(blocked: SigSet, arguments: &Arguments, level: LevelFilter) -> io::Result<StopRequest> {
    let (sender, stop_request) = bounded(0);
    let arguments = arguments.clone();
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        handle_until_stop(&blocked, &arguments, level);
        drop(sender);
    })?;
    Ok(stop_request)
}

fn handle_until_stop(signals: &SigSet, arguments: &Arguments, mut configured_level: LevelFilter) {
    loop {
        match signals.wait() {
            Ok(Signal::SIGTERM | Signal::SIGINT) => return,
            Ok(Signal::SIGHUP) => configured_level = reload(arguments).unwrap_or(configured_level),
            Ok(Signal::SIGUSR1) => change_level(log::max_level().increment_severity()),
            Ok(Signal::SIGUSR2) => change_level(configured_level),
            Ok(_) | Err(_) => {}
        }
    }
}

fn change_level(level: LevelFilter) {
    log::set_max_level(level);
    // An admin who sent the signal looks for this line, so it is logged at a level that the new one lets through, at most at
    // info.
    let line_level = level.to_level().map_or(log::Level::Error, |most_verbose| most_verbose.min(log::Level::Info));
    log::log!(line_level, event = "log_level_changed", log_level:% = level; "log level {level}");
}

/// Reads the log level from the configuration. Other keys need a restart.
fn reload(arguments: &Arguments) -> Option<LevelFilter> {
    match config::load(arguments.config.as_deref()) {
        Ok(LoadedConfig { config, .. }) => {
            // The key in the file wins over the flag, because somebody has just written it.
            let level = config.log_level.or(arguments.log_level).unwrap_or(LevelFilter::Info);
            change_level(level);
            log::info!(event = "config_reloaded"; "other keys of the configuration need a restart");
            Some(level)
        }
        Err(e) => {
            log::error!(event = "config_reload_failed"; "cannot reload the log level, nothing was changed: {e}");
            None
        }
    }
}
