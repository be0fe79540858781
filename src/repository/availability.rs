//! Whether a repository can be used, for those who ask and must not wait: what was seen last, and a
//! look that goes on in the background.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A look is not older than this, if somebody asked before.
const CACHE_TTL: Duration = Duration::from_secs(15);

/// What is known.
#[derive(Debug, Default)]
pub struct AvailabilityCache(Mutex<Availability>);

#[derive(Debug, Default)]
struct Availability {
    /// None: nobody has looked yet.
    can_be_used: Option<bool>,
    probed: Option<Instant>,
    /// A look is under way.
    probe_started: Option<Instant>,
}

impl AvailabilityCache {
    /// Somebody has found out.
    pub fn record(&self, can_be_used: bool) {
        let mut known = self.0.lock();
        *known = Availability { can_be_used: Some(can_be_used), probed: Some(Instant::now()), probe_started: None };
    }

    /// What was seen last; one look that is not back after `patience` says no.
    pub fn can_be_used(&self, patience: Duration) -> bool {
        let known = self.0.lock();
        let hangs = known.probe_started.is_some_and(|since| since.elapsed() > patience);
        !hangs && known.can_be_used.unwrap_or(true)
    }

    /// Whether it is time for another look, which the caller then begins.
    pub fn try_begin_probe(&self) -> bool {
        let mut known = self.0.lock();
        if known.probe_started.is_some() || known.probed.is_some_and(|looked| looked.elapsed() < CACHE_TTL) {
            return false;
        }
        known.probe_started = Some(Instant::now());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_look_at_a_time_is_begun_and_one_that_hangs_says_no() {
        let watch = AvailabilityCache::default();
        assert!(watch.can_be_used(Duration::ZERO), "nobody has looked: nothing speaks against it");
        assert!(watch.try_begin_probe() && !watch.try_begin_probe());
        assert!(watch.can_be_used(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(5));
        assert!(!watch.can_be_used(Duration::from_millis(1)));
        watch.record(false);
        assert!(!watch.can_be_used(Duration::from_secs(60)) && !watch.try_begin_probe(), "it was looked at just now");
        watch.record(true);
        assert!(watch.can_be_used(Duration::ZERO));
    }
}
