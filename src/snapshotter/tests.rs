//! Tests of the snapshotter from the inside: with a real store and real files, and with system calls that fail, hang or
//! do something else meanwhile.

#![allow(clippy::unwrap_used)]

mod attach;
mod chain;
mod cleanup;
mod commit;
mod crash;
pub mod fixture;
mod hostile;
mod metadata;
mod mounts;
mod pull;
mod recovery;
mod scan;
