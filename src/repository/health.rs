//! Whether one mount of a repository answers, and whether another mount has taken its place.
//!
//! Once a caller has waited in vain, or a call has failed because the FUSE server is dead, every other call fails at once
//! until a probe succeeds. A probe may hang as well, so it has a thread of its own, and when it hangs another one is
//! started beside it. If a probe succeeds because another file system is mounted by then, this mount is replaced: it
//! never answers again, and what hangs in it is no news of the next one.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::executor::ThreadBudget;
use crate::metrics::METRICS;
use crate::sync::{Condvar, Mutex, now, thread};

/// The time between two probes that failed.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a call waits for a probe before it fails.
const RECOVERY_WAIT: Duration = Duration::from_millis(200);
/// Probes of one mount that may hang.
const MAX_HUNG_PROBES: usize = 4;

/// What a probe asks.
pub trait MountProbe: Send + Sync {
    /// Asks something that only the FUSE server can answer. The error says why it has not.
    fn probe(&self) -> Result<(), String>;

    /// The device of the FUSE file system that is mounted now, without a question to its server. None: there is none.
    fn device(&self) -> Option<u64>;
}

/// Since when a mount has not answered, and why that is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    pub since: Instant,
    pub why: String,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it has not answered for {}: {}", Seconds(now() - self.since), self.why)
    }
}

/// A duration in whole seconds. Zero would read as if nothing had been waited for.
pub(super) struct Seconds(pub Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            0 => f.write_str("less than 1 s"),
            seconds => write!(f, "{seconds} s"),
        }
    }
}

#[derive(Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

struct Shared {
    repository: String,
    /// A probe that takes longer hangs.
    timeout: Duration,
    threads: ThreadBudget,
    mount: Arc<dyn MountProbe>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    condition: Condition,
    probes: HashMap<u64, Probe>,
    next_number: u64,
    /// A caller waits for a probe, so that the next one is due.
    is_probe_requested: bool,
    /// Probes that ended.
    finished: u64,
    /// Nobody uses the repository any more.
    is_closed: bool,
}

/// How a mount is. `docs/design.md` has the diagram.
enum Condition {
    /// `device` was mounted when the mount last answered a probe. None: that is not known.
    Up { device: Option<u64> },
    /// `device` was mounted before the outage, as far as that is known, or when it was noticed.
    Down { outage: Outage, device: Option<u64> },
    /// Another file system is mounted in its place, after this outage.
    Replaced { outage: Outage },
}

impl Default for Condition {
    fn default() -> Self {
        Self::Up { device: None }
    }
}

impl Condition {
    fn outage(&self) -> Option<&Outage> {
        match self {
            Self::Up { .. } => None,
            Self::Down { outage, .. } | Self::Replaced { outage } => Some(outage),
        }
    }

    fn is_down(&self) -> bool {
        matches!(self, Self::Down { .. })
    }
}

/// A thread that probes.
#[derive(Clone, Copy)]
enum Probe {
    Running { since: Instant },
    Pausing,
}

impl State {
    /// Whether a probe may answer soon: it pauses, or has run for less than `limit`.
    fn has_live_probe(&self, limit: Duration) -> bool {
        self.probes.values().any(|probe| match probe {
            Probe::Running { since } => now() - *since <= limit,
            Probe::Pausing => true,
        })
    }
}

impl Health {
    pub fn new(repository: &str, timeout: Duration, threads: &ThreadBudget, mount: Arc<dyn MountProbe>) -> Self {
        let (repository, threads) = (repository.to_owned(), threads.clone());
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { repository, timeout, threads, mount, state, changed }) }
    }

    /// Fails if the mount does not answer. Waits a moment for a probe, because the repository may just have come back,
    /// and does not wait for a probe that hangs.
    pub fn check(&self) -> Result<(), Outage> {
        let mut state = self.shared.state.lock();
        let Some(outage) = state.condition.outage().cloned() else { return Ok(()) };
        self.ensure_probe(&mut state);
        if !state.condition.is_down() || !state.has_live_probe(RECOVERY_WAIT) {
            return Err(outage);
        }
        state.is_probe_requested = true;
        self.shared.changed.notify_all();
        let (until, finished_before) = (now() + RECOVERY_WAIT, state.finished);
        while state.condition.is_down() && state.finished == finished_before {
            if self.shared.changed.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.condition.outage().cloned().map_or(Ok(()), Err)
    }

    /// Begins an outage, unless there is one. Does nothing for a mount that was replaced: a caller that still waits for
    /// it says nothing about the mount in its place.
    pub fn mark_down(&self, why: String) {
        let is_device_unknown = matches!(self.shared.state.lock().condition, Condition::Up { device: None });
        // The mount table is read without the lock, because every caller that waits takes it.
        let mounted = if is_device_unknown { self.shared.mount.device() } else { None };
        let name = self.shared.repository.as_str();
        let mut state = self.shared.state.lock();
        let Condition::Up { device } = state.condition else { return self.ensure_probe(&mut state) };
        log::warn!(event = "repository_down", repository = name;
            "repository {name} does not answer: {why}; layers are downloaded and containers on its layers do not \
             start until it does");
        METRICS.record_outage(name);
        state.condition = Condition::Down { outage: Outage { since: now(), why }, device: device.or(mounted) };
        self.ensure_probe(&mut state);
        if state.probes.is_empty() && !state.is_closed {
            log::error!(event = "repository_threads_exhausted", repository = name;
                "repository {name}: no thread is left to probe it, because probes hang in mounts that were replaced; \
                 end the client processes of those mounts");
        }
    }

    /// Remembers what is mounted, after the mount has answered: when an outage is noticed, another file system may be
    /// mounted already.
    pub fn record_device(&self) {
        let mounted = self.shared.mount.device();
        if let Condition::Up { device } = &mut self.shared.state.lock().condition {
            *device = mounted;
        }
    }

    /// Whether it is pointless to wait for an answer: the outage is older than a first probe takes, or the mount was
    /// replaced.
    pub fn is_waiting_pointless(&self) -> bool {
        match &self.shared.state.lock().condition {
            Condition::Up { .. } => false,
            Condition::Down { outage, .. } => now() - outage.since > RECOVERY_WAIT,
            Condition::Replaced { .. } => true,
        }
    }

    pub fn outage(&self) -> Option<Outage> {
        self.shared.state.lock().condition.outage().cloned()
    }

    /// Whether another mount has taken the place of this one, as the mount table says if this one does not answer.
    pub fn is_replaced(&self) -> bool {
        match self.shared.state.lock().condition {
            Condition::Up { .. } => return false,
            Condition::Replaced { .. } => return true,
            Condition::Down { .. } => {}
        }
        let Some(device) = self.shared.mount.device() else { return self.was_replaced() };
        let mut state = self.shared.state.lock();
        self.shared.replace_if_another_is_mounted(&mut state, device);
        matches!(state.condition, Condition::Replaced { .. })
    }

    /// Whether a probe or a caller has noticed that another mount has taken the place of this one.
    pub fn was_replaced(&self) -> bool {
        matches!(self.shared.state.lock().condition, Condition::Replaced { .. })
    }

    /// Ends probing.
    pub fn close(&self) {
        self.shared.state.lock().is_closed = true;
        self.shared.changed.notify_all();
    }

    /// Starts a probe if an outage has none that may answer, unless too many hang.
    fn ensure_probe(&self, state: &mut State) {
        let shared = &self.shared;
        let has_enough = state.has_live_probe(shared.timeout) || state.probes.len() >= MAX_HUNG_PROBES;
        if !state.condition.is_down() || state.is_closed || has_enough {
            return;
        }
        let Some(permit) = shared.threads.acquire_for_probe() else { return };
        let number = state.next_number;
        state.next_number += 1;
        let probing = Arc::clone(shared);
        let run = move || {
            probing.probe_until_up(number);
            drop(permit);
        };
        match thread::Builder::new().name("probe".to_owned()).spawn(run) {
            Ok(_) => drop(state.probes.insert(number, Probe::Running { since: now() })),
            Err(e) => log::error!(event = "probe_thread_failed", repository = shared.repository.as_str();
                "repository {}: cannot start a thread for probes: {e}", shared.repository),
        }
    }
}

impl Shared {
    fn probe_until_up(&self, number: u64) {
        loop {
            let result = self.mount.probe();
            let device = if result.is_ok() { self.mount.device() } else { None };
            let mut state = self.state.lock();
            state.probes.insert(number, Probe::Pausing);
            if let Some(device) = device {
                self.replace_if_another_is_mounted(&mut state, device);
            }
            self.record_probe(&mut state, result);
            let until = now() + PROBE_INTERVAL;
            while state.condition.is_down() && !state.is_probe_requested && !state.is_closed {
                if self.changed.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
            if !state.condition.is_down() || state.is_closed {
                state.probes.remove(&number);
                return;
            }
            state.is_probe_requested = false;
            state.probes.insert(number, Probe::Running { since: now() });
        }
    }

    fn record_probe(&self, state: &mut State, result: Result<(), String>) {
        if let Condition::Down { outage, device } = &mut state.condition {
            let device = *device;
            match result {
                Ok(()) => {
                    let name = self.repository.as_str();
                    log::info!(event = "repository_up", repository = name;
                        "repository {name} answers again, after {}", Seconds(now() - outage.since));
                    state.condition = Condition::Up { device };
                }
                Err(why) => outage.why = why,
            }
        }
        state.finished += 1;
        self.changed.notify_all();
    }

    fn replace_if_another_is_mounted(&self, state: &mut State, mounted: u64) {
        if let Condition::Down { outage, device } = &state.condition
            && *device != Some(mounted)
        {
            let name = self.repository.as_str();
            log::info!(event = "repository_remounted", repository = name; "repository {name} was mounted anew");
            state.condition = Condition::Replaced { outage: outage.clone() };
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
