//! `cvmfs-snapshotter`: a containerd snapshotter whose image layers come, unpacked, from a
//! CernVM-FS repository. `docs/design.md` says how the rooms fit together.

pub mod attach;
pub mod bolt;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod logging;
pub mod overlay;
pub mod pool;
pub mod rebuild;
pub mod repository;
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
