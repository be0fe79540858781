//! Records of snapshots that come from another store: from a Go snapshotter, which the first start takes over, and from
//! the directories and containerd's metadata, when `--rebuild-metadata` replaces a lost store.
//!
//! `takeover` and `rebuild` read and write files; the other modules are pure, but for `bolt::file`. A record is input: one
//! that makes no sense is rejected with a reason and stops nothing.
#![forbid(unsafe_code)]

pub mod bolt;
pub mod chain_validation;
pub mod data_loss;
mod go_encoding;
pub mod rebuild;
pub mod takeover;
