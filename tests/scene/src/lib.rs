//! The real things around the snapshotter: containerd, runc, a registry, a repository of
//! unpacked layers, images made from files, and a comparison of root file systems. The demo
//! and the end-to-end tests are written with these.

pub mod alone;
pub mod automounter;
pub mod calls;
pub mod client;
pub mod compare;
pub mod containerd;
pub mod cri;
pub mod disk;
pub mod doctor;
pub mod footprint;
pub mod gostate;
pub mod image;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod process;
pub mod publisher;
pub mod registry;
pub mod release;
pub mod rootfs;
pub mod sandbox;
pub mod snapshotter;
pub mod stage;
pub mod tell;
pub mod wire;

#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
