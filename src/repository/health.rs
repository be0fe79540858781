//! Whether a repository answers.
//!
//! Once somebody waited in vain, or was told that the server is dead, everybody else is told
//! so at once, until a probe succeeds. A probe may hang as well, so it has a thread of its
//! own, and another one is tried beside it: the mount that it hangs on may be an old one.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::metrics::METRICS;

/// Between two probes that failed.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// So long a call lets a probe try, before it is told that the repository does not answer.
const RECOVERY_WAIT: Duration = Duration::from_millis(200);
/// Probes that hang, at most.
const MAX_HUNG_PROBES: usize = 4;

/// Asks the repository something that only its server can answer; the error says why not.
pub type Probe = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Since when a repository does not answer, and what is known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    pub since: Instant,
    pub why: String,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it has not answered for {}: {}", Seconds(self.since.elapsed()), self.why)
    }
}

/// Whole seconds, as people are told; none would read as if nothing had been waited for.
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
    patience: Duration,
    probe: Probe,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    outage: Option<Outage>,
    /// Threads that probe, by a number, and since when they ask; None: it pauses.
    probes: HashMap<u64, Option<Instant>>,
    next_number: u64,
    /// Somebody wants a probe now.
    wanted: bool,
    /// Probes that came back.
    finished: u64,
    /// Nobody asks any more.
    closed: bool,
}

impl State {
    /// A probe pauses, or has asked for less than `limit`.
    fn has_probe_within(&self, limit: Duration) -> bool {
        self.probes.values().any(|asking| asking.is_none_or(|since| since.elapsed() <= limit))
    }
}

impl Health {
    pub fn new(repository: &str, patience: Duration, probe: Probe) -> Self {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { repository: repository.to_owned(), patience, probe, state, changed }) }
    }

    /// Fails if the repository does not answer. Waits for a moment where it may just have come
    /// back, and not for one that hangs.
    pub fn check(&self) -> Result<(), Outage> {
        let mut state = self.shared.state.lock();
        let Some(outage) = state.outage.clone() else { return Ok(()) };
        self.ensure_probe(&mut state);
        if !state.has_probe_within(RECOVERY_WAIT) {
            return Err(outage);
        }
        state.wanted = true;
        self.shared.changed.notify_all();
        let (until, before) = (Instant::now() + RECOVERY_WAIT, state.finished);
        while state.outage.is_some() && state.finished == before {
            if self.shared.changed.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.outage.clone().map_or(Ok(()), Err)
    }

    /// Somebody waited in vain, or was told that the server is dead.
    pub fn mark_unhealthy(&self, why: String) {
        let mut state = self.shared.state.lock();
        if state.outage.is_none() {
            log::warn!(repository = self.shared.repository.as_str();
                "repository {} does not answer: {why}; layers are downloaded and containers on its layers do not \
                 start until it does", self.shared.repository);
            METRICS.record_outage(&self.shared.repository);
            state.outage = Some(Outage { since: Instant::now(), why });
        }
        self.ensure_probe(&mut state);
    }

    /// It does not answer, and the first probe has not helped.
    pub fn is_confirmed_down(&self) -> bool {
        self.shared.state.lock().outage.as_ref().is_some_and(|outage| outage.since.elapsed() > RECOVERY_WAIT)
    }

    pub fn outage(&self) -> Option<Outage> {
        self.shared.state.lock().outage.clone()
    }

    /// Probing ends.
    pub fn close(&self) {
        self.shared.state.lock().closed = true;
        self.shared.changed.notify_all();
    }

    /// There is a probe that does not hang, unless too many do.
    fn ensure_probe(&self, state: &mut State) {
        if state.has_probe_within(self.shared.patience) || state.probes.len() >= MAX_HUNG_PROBES {
            return;
        }
        let (shared, number) = (Arc::clone(&self.shared), state.next_number);
        state.next_number += 1;
        match thread::Builder::new().name("probe".to_owned()).spawn(move || shared.probe(number)) {
            Ok(_) => drop(state.probes.insert(number, Some(Instant::now()))),
            Err(e) => log::error!("cannot start a thread that probes {}: {e}", self.shared.repository),
        }
    }
}

impl Shared {
    fn probe(&self, number: u64) {
        loop {
            let result = (self.probe)();
            let mut state = self.state.lock();
            state.probes.insert(number, None);
            match (result, &mut state.outage) {
                (Ok(()), outage) => {
                    if let Some(outage) = outage.take() {
                        log::info!(repository = self.repository.as_str();
                            "repository {} answers again, after {}", self.repository, Seconds(outage.since.elapsed()));
                    }
                }
                (Err(why), Some(outage)) => outage.why = why,
                (Err(_), None) => {}
            }
            state.finished += 1;
            self.changed.notify_all();
            let until = Instant::now() + PROBE_INTERVAL;
            while state.outage.is_some() && !state.wanted && !state.closed {
                if self.changed.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
            if state.outage.is_none() || state.closed {
                state.probes.remove(&number);
                return;
            }
            state.wanted = false;
            state.probes.insert(number, Some(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

    const FINE: u8 = 0;
    const DEAD: u8 = 1;
    const HANGING: u8 = 2;

    struct FakeRepository {
        health: Health,
        mood: Arc<AtomicU8>,
        asked: Arc<AtomicUsize>,
    }

    fn fake_repository(patience: Duration) -> FakeRepository {
        let (mood, asked) = (Arc::new(AtomicU8::new(FINE)), Arc::new(AtomicUsize::new(0)));
        let (now, count) = (Arc::clone(&mood), Arc::clone(&asked));
        let probe = move || {
            count.fetch_add(1, Ordering::SeqCst);
            // What hangs goes on hanging, whatever is mounted in its place.
            let hangs = now.load(Ordering::SeqCst) == HANGING;
            while hangs && now.load(Ordering::SeqCst) != DEAD {
                thread::sleep(Duration::from_millis(5));
            }
            if now.load(Ordering::SeqCst) == FINE { Ok(()) } else { Err("it is dead".to_owned()) }
        };
        FakeRepository { health: Health::new("r", patience, Box::new(probe)), mood, asked }
    }

    /// One call is enough, unless this machine is so busy that no thread has its turn.
    fn settled(p: &FakeRepository) -> Result<(), Outage> {
        (0..20).map(|_| p.health.check()).find(Result::is_ok).unwrap_or_else(|| p.health.check())
    }

    #[test]
    fn a_dead_repository_fails_fast_until_a_probe_succeeds() {
        let p = fake_repository(Duration::from_secs(10));
        assert_eq!(p.health.check(), Ok(()));
        p.mood.store(DEAD, Ordering::SeqCst);
        p.health.mark_unhealthy("first".to_owned());
        let until = Instant::now() + Duration::from_secs(10);
        while p.health.check().map_err(|outage| outage.why) != Err("it is dead".to_owned()) {
            assert!(Instant::now() < until, "what the probe said is passed on");
        }
        p.mood.store(FINE, Ordering::SeqCst);
        assert_eq!(settled(&p), Ok(()), "a call after it came back finds it");
        assert_eq!(p.health.outage(), None);
    }

    #[test]
    fn less_than_a_second_is_not_said_to_be_none() {
        // Not yet begun, however slow this machine is.
        let outage = Outage { since: Instant::now() + Duration::from_hours(1), why: "it is dead".to_owned() };
        assert_eq!(outage.to_string(), "it has not answered for less than 1 s: it is dead");
        for (milliseconds, said) in [(0, "less than 1 s"), (999, "less than 1 s"), (1_000, "1 s"), (61_500, "61 s")] {
            assert_eq!(Seconds(Duration::from_millis(milliseconds)).to_string(), said);
        }
    }

    #[test]
    fn a_suspicion_that_is_wrong_costs_nobody_anything() {
        let p = fake_repository(Duration::from_secs(10));
        p.health.mark_unhealthy("slow".to_owned());
        assert_eq!(settled(&p), Ok(()));
    }

    #[test]
    fn a_probe_that_hangs_on_an_old_mount_is_not_the_last_one() {
        let p = fake_repository(Duration::from_millis(300));
        p.mood.store(HANGING, Ordering::SeqCst);
        p.health.mark_unhealthy("hangs".to_owned());
        assert!(p.health.check().is_err());
        let begun = Instant::now();
        for _ in 0..50 {
            assert!(p.health.check().is_err());
        }
        assert!(begun.elapsed() < 25 * RECOVERY_WAIT, "a probe that hangs is waited for once");
        thread::sleep(Duration::from_millis(400));
        assert_eq!(p.asked.load(Ordering::SeqCst), 1);
        // The old mount goes on hanging, another one is in its place.
        p.mood.store(FINE, Ordering::SeqCst);
        let until = Instant::now() + Duration::from_secs(10);
        while p.health.check().is_err() {
            assert!(Instant::now() < until, "it was never probed again");
        }
        p.mood.store(DEAD, Ordering::SeqCst);
    }
}
