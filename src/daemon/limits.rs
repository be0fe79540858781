//! Limits of the process.
#![forbid(unsafe_code)]

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Number of file descriptors that are needed when everything is busy: two for each connection, up to three for each
/// thread, and a few more.
const NEEDED_DESCRIPTORS: u64 = 1024;

/// Raises the soft limit of open files. Services usually start with 1024, and may raise that to much more.
pub fn raise_descriptor_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let raised = soft.max(hard.min(NEEDED_DESCRIPTORS * 4));
    let limit = setrlimit(Resource::RLIMIT_NOFILE, raised, hard).map_or(soft, |()| raised);
    if limit < NEEDED_DESCRIPTORS {
        log::warn!(
            event = "descriptor_limit_low", limit;
            "only {limit} files may be open, but up to {NEEDED_DESCRIPTORS} are needed: raise LimitNOFILE= in the unit"
        );
    }
}
