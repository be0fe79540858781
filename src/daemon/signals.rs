//! Signals, on a thread of their own from the beginning of the start: SIGTERM and SIGINT stop the daemon, SIGHUP reads
//! the log level anew, SIGUSR1 and SIGUSR2 change it.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::io;
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use log::LevelFilter;
use nix::sys::signal::{SigSet, Signal};

use crate::cli::Arguments;
use crate::config::{self, LoadedConfig};
use crate::logging;

/// Keeps the signals from the calling thread and those that it starts; `listen` takes them.
pub fn block() -> SigSet {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        signals.add(signal);
    }
    // Cannot fail: the set holds signals only.
    let _ = signals.thread_block();
    signals
}

/// Acts on the signals that are `blocked`. The result is disconnected when the daemon is to stop, and stays so. `level`
/// is what the log began with.
pub fn listen(blocked: SigSet, arguments: &Arguments, level: LevelFilter) -> io::Result<Receiver<Infallible>> {
    let (stop, stopped) = bounded(0);
    let arguments = arguments.clone();
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        wait_for_stop(&blocked, &arguments, level);
        drop(stop);
    })?;
    Ok(stopped)
}

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
        Ok(LoadedConfig { config, .. }) => {
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
