//! Whether a mount can be used, for callers that must not wait: the result of the last probe, which a new probe replaces
//! in the background.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sync::{Mutex, now};

/// A result that is older is still returned, and a new probe is begun.
const CACHE_TTL: Duration = Duration::from_secs(15);

#[derive(Clone, Default)]
pub struct AvailabilityCache(Arc<Mutex<Availability>>);

#[derive(Default)]
struct Availability {
    /// None: no probe has ended yet.
    is_available: Option<bool>,
    probed: Option<Instant>,
    /// When the probe that runs was begun.
    probe_started: Option<Instant>,
}

/// The probe that runs. If it ends without a result, because it panicked or no thread could run it, the mount counts as
/// unavailable until the next probe.
pub struct AvailabilityProbe {
    cache: AvailabilityCache,
    is_available: bool,
}

impl AvailabilityProbe {
    pub fn record(mut self, is_available: bool) {
        self.is_available = is_available;
    }
}

impl Drop for AvailabilityProbe {
    fn drop(&mut self) {
        self.cache.record(self.is_available);
    }
}

impl AvailabilityCache {
    pub fn record(&self, is_available: bool) {
        let (is_available, probed) = (Some(is_available), Some(now()));
        *self.0.lock() = Availability { is_available, probed, probe_started: None };
    }

    /// The result of the last probe. False if the probe that runs has taken longer than `timeout`.
    pub fn is_available(&self, timeout: Duration) -> bool {
        let known = self.0.lock();
        let hangs = known.probe_started.is_some_and(|since| now() - since > timeout);
        !hangs && known.is_available.unwrap_or(true)
    }

    /// A new probe, which the caller then runs. None: one runs, or the last result is recent.
    pub fn try_begin_probe(&self) -> Option<AvailabilityProbe> {
        let mut known = self.0.lock();
        if known.probe_started.is_some() || known.probed.is_some_and(|probed| now() - probed < CACHE_TTL) {
            return None;
        }
        known.probe_started = Some(now());
        Some(AvailabilityProbe { cache: self.clone(), is_available: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_probe_runs_at_a_time_and_one_that_hangs_means_unavailable() {
        let cache = AvailabilityCache::default();
        assert!(cache.is_available(Duration::ZERO), "no probe has ended: nothing speaks against it");
        let probe = cache.try_begin_probe().unwrap();
        assert!(cache.try_begin_probe().is_none());
        assert!(cache.is_available(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(5));
        assert!(!cache.is_available(Duration::from_millis(1)));
        probe.record(true);
        assert!(cache.is_available(Duration::ZERO) && cache.try_begin_probe().is_none(), "it was probed just now");
        cache.record(false);
        assert!(!cache.is_available(Duration::from_secs(60)));
    }

    /// A probe whose thread could not be started left the repository unavailable for ever.
    #[test]
    fn probe_that_never_ran_means_unavailable_until_the_next_one() {
        let cache = AvailabilityCache::default();
        drop(cache.try_begin_probe());
        assert!(!cache.is_available(Duration::from_secs(60)));
        let known = cache.0.lock();
        assert_eq!((known.is_available, known.probe_started), (Some(false), None));
    }
}
