//! Some tests need something that not every host has: systemd-nspawn, autofs, a version of containerd.
//!
//! libtest has no result for a test that ends early: it reports the test as ok. A missing prerequisite therefore fails
//! the test that needs it. With `ALLOW_SKIP=1` the test is skipped instead, and its name stands in the output of the run.

use std::thread;

use crate::report;

/// The environment variable that turns a missing prerequisite from a failure into a skip.
const ALLOW_SKIP: &str = "ALLOW_SKIP";

/// Whether the calling test can run. `missing` is what its host lacks, with the remedy. A test returns when the result
/// is false, which it is only where skips are allowed.
#[track_caller]
pub fn is_met(missing: Option<String>) -> bool {
    let Some(missing) = missing else { return true };
    let is_skip_allowed = std::env::var_os(ALLOW_SKIP).is_some_and(|value| value == "1");
    assert!(is_skip_allowed, "{missing}; {ALLOW_SKIP}=1 skips the tests that need it");
    let thread = thread::current();
    report::print(format_args!("SKIPPED {}: {missing}", thread.name().unwrap_or("a test")));
    false
}
