//! A real CernVM-FS repository for end-to-end tests.
//!
//! [`ingest`] unpacks layers into a directory tree, [`publisher`] writes a signed repository of it,
//! [`web`] serves that, and [`client`] mounts it through the binary `cvmfs-test-client` of this package,
//! which can be told to hang, to be slow, to fail, or to load a new revision. [`format`] is the format that
//! publisher and client share. [`listing`] describes a file tree as text, [`real`] has repositories of the real
//! publisher. This is test code: an error panics with a sentence.

#![forbid(unsafe_code)]

pub mod client;
pub mod format;
pub mod ingest;
pub mod listing;
pub mod publisher;
pub mod real;
pub mod web;
