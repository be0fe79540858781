//! The harness of the end-to-end tests, the demo and the benchmark. It starts the programs that surround the
//! snapshotter on a node (containerd, runc, a registry, a mounted repository), makes images from files, and compares
//! root file systems. `SnapshotterFixture` is a daemon without containerd, `E2eFixture` has all of it.

pub mod automounter;
pub mod background_calls;
pub mod client;
pub mod compare;
pub mod containerd;
pub mod cri;
pub mod disk;
pub mod doctor;
pub mod e2e_fixture;
pub mod gostate;
pub mod http2;
pub mod image;
pub mod log;
pub mod machine;
pub mod memory_cgroup;
pub mod metrics;
pub mod oci_layout;
pub mod prerequisite;
pub mod process;
pub mod publisher;
pub mod random;
pub mod registry;
pub mod release;
pub mod report;
pub mod resource_usage;
pub mod rootfs;
pub mod sandbox;
pub mod snapshotter;
pub mod snapshotter_fixture;

#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
