//! Runs LLVM's fuzzer on the target that `FUZZ_TARGET` names. See `make fuzz`.
#![no_main]

use std::sync::LazyLock;

use cvmfs_snapshotter::fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let names = TARGETS.map(|target| target.name).join(", ");
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("FUZZ_TARGET must be one of {names}"))
});

fuzz_target!(|input: &[u8]| (TARGET.run)(input));
