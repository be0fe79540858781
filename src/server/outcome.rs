//! How a finished call is counted and logged, for all methods alike. It must not know what a call does.
#![forbid(unsafe_code)]

use std::time::Duration;

use grpcio::RpcStatus;

use super::status::{CallError, Code};
use crate::metrics::METRICS;

/// `elapsed` is the time from the arrival of the request to the beginning of the response.
pub fn record_success(method: &str, elapsed: Duration) {
    METRICS.record_call(method, Code::Ok.name(), elapsed);
}

/// The client went away before it had its response.
pub fn record_cancelled(method: &str, elapsed: Duration) {
    METRICS.record_call(method, Code::Cancelled.name(), elapsed);
}

/// The result is the status to send.
pub fn record_failure(method: &str, elapsed: Duration, error: &CallError) -> RpcStatus {
    let report = error.report();
    let code = report.code.name();
    METRICS.record_call(method, code, elapsed);
    log::log!(report.level, event = "call_failed", method, code; "{}", report.text);
    report.into_status()
}
