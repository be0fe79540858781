//! Whether a repository can be used, for those who ask and must not wait: what was seen last, and a
//! look that goes on in the background.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A look is not older than this, if somebody asked before.
const FRESH: Duration = Duration::from_secs(15);

/// What is known.
#[derive(Debug, Default)]
pub struct Watch(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// None: nobody has looked yet.
    can_be_used: Option<bool>,
    looked: Option<Instant>,
    /// A look is under way.
    looking_since: Option<Instant>,
}

impl Watch {
    /// Somebody has found out.
    pub fn saw(&self, can_be_used: bool) {
        let mut known = self.0.lock();
        *known = Known { can_be_used: Some(can_be_used), looked: Some(Instant::now()), looking_since: None };
    }

    /// What was seen last; one look that is not back after `patience` says no.
    pub fn can_be_used(&self, patience: Duration) -> bool {
        let known = self.0.lock();
        let hangs = known.looking_since.is_some_and(|since| since.elapsed() > patience);
        !hangs && known.can_be_used.unwrap_or(true)
    }

    /// Whether it is time for another look, which the caller then begins.
    pub fn wants_a_look(&self) -> bool {
        let mut known = self.0.lock();
        if known.looking_since.is_some() || known.looked.is_some_and(|looked| looked.elapsed() < FRESH) {
            return false;
        }
        known.looking_since = Some(Instant::now());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_look_at_a_time_is_begun_and_one_that_hangs_says_no() {
        let watch = Watch::default();
        assert!(watch.can_be_used(Duration::ZERO), "nobody has looked: nothing speaks against it");
        assert!(watch.wants_a_look() && !watch.wants_a_look());
        assert!(watch.can_be_used(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(5));
        assert!(!watch.can_be_used(Duration::from_millis(1)));
        watch.saw(false);
        assert!(!watch.can_be_used(Duration::from_secs(60)) && !watch.wants_a_look(), "it was looked at just now");
        watch.saw(true);
        assert!(watch.can_be_used(Duration::ZERO));
    }
}
