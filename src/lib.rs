//! `cvmfs-snapshotter`: a containerd snapshotter whose image layers come, unpacked, from a
//! CernVM-FS repository. `docs/design.md` says how the rooms fit together.

pub mod attach;
pub mod bolt;
pub mod cli;
pub mod config;
#[cfg(feature = "server")]
pub mod daemon;
#[cfg(test)]
mod faults;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod logging;
pub mod notify;
pub mod overlay;
pub mod pool;
pub mod rebuild;
pub mod repository;
#[cfg(feature = "server")]
pub mod server;
pub mod snapshotter;
pub mod store;
pub mod sys;
pub mod takeover;
pub mod types;

/// Messages made from the `.proto` files by `build.rs`.
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
