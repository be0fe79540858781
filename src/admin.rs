//! The admin's commands `status` and `gc`, and the client with which they and `doctor` ask the daemon.
#![forbid(unsafe_code)]

pub mod client;
pub mod gc;
pub mod status;
pub mod table;
