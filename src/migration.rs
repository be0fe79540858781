//! Snapshots that another store knows: those of a Go snapshotter, which the first start takes over, and those of a lost
//! store, which `--rebuild-metadata` finds in the state root and in containerd's metadata.
#![forbid(unsafe_code)]

pub mod bolt;
pub mod chain_validation;
pub mod data_loss;
pub mod rebuild;
pub mod takeover;
