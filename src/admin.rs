//! The administrator's commands `status` and `gc`, and the clients and tables that they and `doctor` use.
#![forbid(unsafe_code)]

pub mod client;
pub mod gc;
pub mod status;
pub mod table;
