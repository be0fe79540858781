//! `cvmfs-snapshotter`: a containerd snapshotter whose image layers come, unpacked, from a
//! CernVM-FS repository. `docs/design.md` says how the rooms fit together.

#[cfg(feature = "server")]
pub mod admin;
pub mod attach;
pub mod cli;
pub mod config;
#[cfg(feature = "server")]
pub mod daemon;
#[cfg(feature = "server")]
pub mod doctor;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod logging;
pub mod metrics;
pub mod migration;
pub mod model;
pub mod notify;
pub mod overlay;
pub mod repository;
#[cfg(feature = "server")]
pub mod server;
// Fuzzers are built without gRPC, and the server then consists of its parsers.
#[cfg(not(feature = "server"))]
pub mod server {
    pub mod convert;
    pub mod field_count;
    pub mod filters;
}
pub mod sidecar;
pub mod snapshotter;
pub mod store;
mod sync;
pub mod system;
#[cfg(test)]
mod testing;
pub mod unix_socket;
pub mod worker_pool;

/// Messages made from the `.proto` files by `build.rs`.
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
