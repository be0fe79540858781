//! This module turns a failed call into its answer.
//!
//! `CallError::report` decides in one place, for every error, the gRPC code, the log level, the label in the metrics
//! and the text. It must not know methods or requests. Its matches have no wildcard arm, so nobody can add an error
//! without deciding how it is reported.
#![forbid(unsafe_code)]

use std::fmt;

use grpcio::{RpcStatus, RpcStatusCode};
use log::Level;

use super::field_count::MAX_FIELDS;
use super::memory_budget::OverBudget;
use crate::model::{InvalidKey, Quoted};
use crate::repository::Unavailable;
use crate::snapshotter::{self, Error};
use crate::worker_pool::JobError;

/// The gRPC codes that this program answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Ok,
    /// The client went away before it had its response.
    Cancelled,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    ResourceExhausted,
    FailedPrecondition,
    Unavailable,
    Internal,
}

impl Code {
    /// The name in gRPC's documentation. It is the label `code` in the metrics.
    pub fn name(self) -> &'static str {
        self.name_and_wire_code().0
    }

    fn wire_code(self) -> RpcStatusCode {
        self.name_and_wire_code().1
    }

    fn name_and_wire_code(self) -> (&'static str, RpcStatusCode) {
        match self {
            Self::Ok => ("OK", RpcStatusCode::OK),
            Self::Cancelled => ("CANCELLED", RpcStatusCode::CANCELLED),
            Self::InvalidArgument => ("INVALID_ARGUMENT", RpcStatusCode::INVALID_ARGUMENT),
            Self::DeadlineExceeded => ("DEADLINE_EXCEEDED", RpcStatusCode::DEADLINE_EXCEEDED),
            Self::NotFound => ("NOT_FOUND", RpcStatusCode::NOT_FOUND),
            Self::AlreadyExists => ("ALREADY_EXISTS", RpcStatusCode::ALREADY_EXISTS),
            Self::ResourceExhausted => ("RESOURCE_EXHAUSTED", RpcStatusCode::RESOURCE_EXHAUSTED),
            Self::FailedPrecondition => ("FAILED_PRECONDITION", RpcStatusCode::FAILED_PRECONDITION),
            Self::Unavailable => ("UNAVAILABLE", RpcStatusCode::UNAVAILABLE),
            Self::Internal => ("INTERNAL", RpcStatusCode::INTERNAL),
        }
    }
}

/// Why a call failed.
#[derive(Debug)]
pub enum CallError {
    Snapshotter(Error),
    Pool(JobError),
    Memory(OverBudget),
    /// The request has more than `MAX_FIELDS` fields and was not decoded.
    TooManyFields,
    /// The health service does not know the service or repository that it was asked about.
    UnknownService(String),
}

/// How a failed call is reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailureReport {
    /// Goes to the client and, by its name, into the metrics and the log.
    pub code: Code,
    /// The level of the log line. What shows a fault of this program or this host is an error.
    pub level: Level,
    /// Goes to the client and into the log.
    pub text: String,
}

impl FailureReport {
    pub fn into_status(self) -> RpcStatus {
        RpcStatus::with_message(self.code.wire_code(), self.text)
    }
}

impl CallError {
    pub fn report(&self) -> FailureReport {
        let (code, level) = match self {
            Self::Snapshotter(error) => snapshotter_error_code(error),
            Self::Pool(error) => job_error_code(error),
            Self::Memory(OverBudget { .. }) => (Code::ResourceExhausted, Level::Warn),
            Self::TooManyFields => (Code::InvalidArgument, Level::Debug),
            Self::UnknownService(_) => (Code::NotFound, Level::Debug),
        };
        FailureReport { code, level, text: self.to_string() }
    }
}

fn snapshotter_error_code(error: &Error) -> (Code, Level) {
    match error {
        Error::InvalidKey(_)
        | Error::ParentNotCommitted { .. }
        | Error::OtherParent { .. }
        | Error::ImmutableField(_)
        | Error::InvalidFilter { .. }
        | Error::LabelsTooLong { .. }
        | Error::TooManyLabels { .. }
        | Error::InvalidMapping { .. } => (Code::InvalidArgument, Level::Debug),
        Error::NotFound(_) | Error::ParentNotFound(_) => (Code::NotFound, Level::Debug),
        Error::AlreadyExists(_) | Error::RemoteCommitted { .. } => (Code::AlreadyExists, Level::Debug),
        Error::WrongKind { .. } | Error::HasChildren(_) | Error::NewParentNotCommitted { .. } => {
            (Code::FailedPrecondition, Level::Debug)
        }
        Error::ChainTooLong { .. } | Error::AttributesRefused { .. } => (Code::FailedPrecondition, Level::Warn),
        // A job that panicked shows a fault of this program, not of the repository.
        Error::LayerUnavailable { why: Unavailable::JobPanicked, .. } | Error::System(_) | Error::Store(_) => {
            (Code::Internal, Level::Error)
        }
        Error::LayerUnavailable { .. } | Error::LayerBusy { .. } => (Code::Unavailable, Level::Warn),
        Error::FilesMissing { .. } => (Code::Unavailable, Level::Error),
        Error::DeadlineExceeded => (Code::DeadlineExceeded, Level::Debug),
        Error::RollbackFailed { failed, .. } => (snapshotter_error_code(failed).0, Level::Error),
    }
}

fn job_error_code(error: &JobError) -> (Code, Level) {
    match error {
        JobError::QueueFull { .. } => (Code::ResourceExhausted, Level::Warn),
        JobError::DeadlinePassed => (Code::DeadlineExceeded, Level::Debug),
        JobError::Stopping => (Code::Unavailable, Level::Debug),
        JobError::Panicked(_) => (Code::Internal, Level::Error),
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshotter(error) => error.fmt(f),
            Self::Pool(error) => error.fmt(f),
            Self::Memory(error) => error.fmt(f),
            Self::TooManyFields => write!(
                f,
                "the request has more than {MAX_FIELDS} fields; each label, filter and path of a mask counts as one"
            ),
            Self::UnknownService(name) => write!(f, "no service or repository is called {}", Quoted(name)),
        }
    }
}

impl From<snapshotter::Error> for CallError {
    fn from(error: snapshotter::Error) -> Self {
        Self::Snapshotter(error)
    }
}

impl From<InvalidKey> for CallError {
    fn from(error: InvalidKey) -> Self {
        Self::Snapshotter(error.into())
    }
}

impl From<JobError> for CallError {
    fn from(error: JobError) -> Self {
        Self::Pool(error)
    }
}

impl From<OverBudget> for CallError {
    fn from(error: OverBudget) -> Self {
        Self::Memory(error)
    }
}

#[cfg(test)]
mod tests;
