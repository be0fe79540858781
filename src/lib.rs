//! `cvmfs-snapshotter`: a containerd snapshotter whose image layers come, unpacked, from a
//! CernVM-FS repository. `docs/design.md` says how the rooms fit together.

#[cfg(feature = "server")]
pub mod admin;
pub mod attach;
pub mod bolt;
pub mod cli;
pub mod config;
#[cfg(feature = "server")]
pub mod daemon;
#[cfg(feature = "server")]
pub mod doctor;
#[cfg(test)]
mod faults;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
#[cfg(feature = "server")]
pub mod gc;
pub mod logging;
pub mod metrics;
pub mod notify;
pub mod overlay;
pub mod pool;
pub mod rebuild;
pub mod repository;
#[cfg(feature = "server")]
pub mod server;
pub mod sidecar;
pub mod snapshotter;
#[cfg(feature = "server")]
pub mod status;
pub mod store;
pub mod sys;
#[cfg(feature = "server")]
mod table;
pub mod takeover;
pub mod types;

/// Messages made from the `.proto` files by `build.rs`.
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
