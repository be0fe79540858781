//! What a call is answered with when it fails: code, level of the log line and text of every error. One match for
//! each kind of error, without a wildcard, so that nobody adds an error without deciding.
#![forbid(unsafe_code)]

use std::fmt;

use grpcio::{RpcStatus, RpcStatusCode};
use log::Level;

use super::field_count::MAX_FIELDS;
use super::memory_budget::OverBudget;
use crate::model::Quoted;
use crate::snapshotter::{self, Error};
use crate::worker_pool::Refusal;

/// The codes of gRPC that this program answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Ok,
    /// The client went away before it had its answer.
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
    /// As gRPC's documentation writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Cancelled => "CANCELLED",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::Unavailable => "UNAVAILABLE",
            Self::Internal => "INTERNAL",
        }
    }

    fn on_the_wire(self) -> RpcStatusCode {
        match self {
            Self::Ok => RpcStatusCode::OK,
            Self::Cancelled => RpcStatusCode::CANCELLED,
            Self::InvalidArgument => RpcStatusCode::INVALID_ARGUMENT,
            Self::DeadlineExceeded => RpcStatusCode::DEADLINE_EXCEEDED,
            Self::NotFound => RpcStatusCode::NOT_FOUND,
            Self::AlreadyExists => RpcStatusCode::ALREADY_EXISTS,
            Self::ResourceExhausted => RpcStatusCode::RESOURCE_EXHAUSTED,
            Self::FailedPrecondition => RpcStatusCode::FAILED_PRECONDITION,
            Self::Unavailable => RpcStatusCode::UNAVAILABLE,
            Self::Internal => RpcStatusCode::INTERNAL,
        }
    }
}

/// Why a call has no answer but a status.
#[derive(Debug)]
pub enum CallError {
    Call(Error),
    Pool(Refusal),
    Load(OverBudget),
    /// The request has more fields than it may have, and was not decoded.
    TooManyFields,
    /// Health was asked for something that is not here.
    UnknownService(String),
}

impl CallError {
    pub fn code(&self) -> Code {
        self.code_and_level().0
    }

    /// How loudly the log says it: what shows a fault of this program or host is an error.
    pub fn level(&self) -> Level {
        self.code_and_level().1
    }

    pub fn status(&self) -> RpcStatus {
        RpcStatus::with_message(self.code().on_the_wire(), self.to_string())
    }

    fn code_and_level(&self) -> (Code, Level) {
        match self {
            Self::Call(error) => of_error(error),
            Self::Pool(refusal) => of_refusal(refusal),
            Self::Load(OverBudget { .. }) => (Code::ResourceExhausted, Level::Warn),
            Self::TooManyFields => (Code::InvalidArgument, Level::Debug),
            Self::UnknownService(_) => (Code::NotFound, Level::Debug),
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(error) => error.fmt(f),
            Self::Pool(refusal) => refusal.fmt(f),
            Self::Load(overload) => overload.fmt(f),
            Self::TooManyFields => write!(
                f,
                "the request has more than {MAX_FIELDS} fields: labels, filters and paths of a mask count, each as one"
            ),
            Self::UnknownService(name) => write!(f, "there is no service or repository {} here", Quoted(name)),
        }
    }
}

impl From<snapshotter::Error> for CallError {
    fn from(error: snapshotter::Error) -> Self {
        Self::Call(error)
    }
}

impl From<OverBudget> for CallError {
    fn from(overload: OverBudget) -> Self {
        Self::Load(overload)
    }
}

fn of_error(error: &Error) -> (Code, Level) {
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
        Error::LayerUnavailable { .. } | Error::LayerBusy { .. } => (Code::Unavailable, Level::Warn),
        Error::FilesMissing { .. } => (Code::Unavailable, Level::Error),
        Error::DeadlineExceeded => (Code::DeadlineExceeded, Level::Debug),
        Error::System(_) | Error::Store(_) => (Code::Internal, Level::Error),
        Error::RollbackFailed { failed, .. } => (of_error(failed).0, Level::Error),
    }
}

fn of_refusal(refusal: &Refusal) -> (Code, Level) {
    match refusal {
        Refusal::QueueFull { .. } => (Code::ResourceExhausted, Level::Warn),
        Refusal::DeadlinePassed => (Code::DeadlineExceeded, Level::Debug),
        Refusal::Stopping => (Code::Unavailable, Level::Debug),
        Refusal::Panicked(_) => (Code::Internal, Level::Error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::RefusedAttributes;
    use crate::model::{Digest, InvalidKey, Key, Kind, SnapshotId};
    use crate::repository::Unavailable;
    use crate::{store, system};
    use nix::errno::Errno;

    const DEBUG: Level = Level::Debug;

    #[test]
    fn every_error_has_its_code_and_its_level() {
        let key = || Key::parse("k").unwrap();
        let system = || system::Error { call: "stat", path: "/x".into(), errno: Errno::EIO };
        let digest = Digest::parse(&format!("sha256:{}", "0".repeat(64))).unwrap();
        let attributes = RefusedAttributes {
            directory: "d".into(),
            bytes: 5_008,
            largest: ("user.big".into(), 5_000),
            errno: Errno::ENOSPC,
        };
        let refused = Error::AttributesRefused { digest: digest.clone(), refused: attributes };
        let unavailable = Error::LayerUnavailable { digest, repository: "r".into(), why: Unavailable::NotPublished };
        for (error, code, level) in [
            (Error::InvalidKey(InvalidKey::Empty), Code::InvalidArgument, DEBUG),
            (Error::NotFound(key()), Code::NotFound, DEBUG),
            (Error::ParentNotFound(key()), Code::NotFound, DEBUG),
            (Error::ParentNotCommitted { parent: key(), kind: Kind::View }, Code::InvalidArgument, DEBUG),
            (Error::AlreadyExists(key()), Code::AlreadyExists, DEBUG),
            (Error::RemoteCommitted { reference: "r".into() }, Code::AlreadyExists, DEBUG),
            (Error::WrongKind { key: key(), kind: Kind::View, needs: "n" }, Code::FailedPrecondition, DEBUG),
            (Error::HasChildren(key()), Code::FailedPrecondition, DEBUG),
            (Error::OtherParent { key: key(), parent: key(), named: key() }, Code::InvalidArgument, DEBUG),
            (Error::NewParentNotCommitted { parent: key(), kind: Kind::View }, Code::FailedPrecondition, DEBUG),
            (Error::ChainTooLong { parent: key() }, Code::FailedPrecondition, Level::Warn),
            (Error::ImmutableField("f".into()), Code::InvalidArgument, DEBUG),
            (Error::InvalidFilter { filter: "f".into(), why: "w".into() }, Code::InvalidArgument, DEBUG),
            (Error::LabelsTooLong { bytes: 1 }, Code::InvalidArgument, DEBUG),
            (Error::TooManyLabels { count: 1 }, Code::InvalidArgument, DEBUG),
            (Error::InvalidMapping { label: "l", value: "v".into() }, Code::InvalidArgument, DEBUG),
            (unavailable, Code::Unavailable, Level::Warn),
            (refused, Code::FailedPrecondition, Level::Warn),
            (Error::FilesMissing { key: key(), id: SnapshotId(1) }, Code::Unavailable, Level::Error),
            (Error::DeadlineExceeded, Code::DeadlineExceeded, DEBUG),
            (Error::System(system()), Code::Internal, Level::Error),
            (
                Error::RollbackFailed { failed: Box::new(Error::NotFound(key())), rollback: system() },
                Code::NotFound,
                Level::Error,
            ),
            (Error::Store(store::Error::Closed), Code::Internal, Level::Error),
        ] {
            let failure = CallError::Call(error);
            assert_eq!((failure.code(), failure.level()), (code, level), "{failure:?}");
            // containerd gives FailedPrecondition with these endings another type.
            let text = failure.to_string();
            assert!(!text.ends_with(": conflict") && !text.ends_with(": not modified"), "{text}");
        }
        assert!(Error::HasChildren(key()).to_string().contains("remove"));
    }

    #[test]
    fn every_refusal_has_its_code_and_its_level() {
        for (refusal, code, level) in [
            (Refusal::QueueFull { limit: 1 }, Code::ResourceExhausted, Level::Warn),
            (Refusal::DeadlinePassed, Code::DeadlineExceeded, DEBUG),
            (Refusal::Stopping, Code::Unavailable, DEBUG),
            (Refusal::Panicked("p".into()), Code::Internal, Level::Error),
        ] {
            let failure = CallError::Pool(refusal);
            assert_eq!((failure.code(), failure.level()), (code, level), "{failure:?}");
        }
        assert_eq!(CallError::Load(OverBudget { limit: 1 }).code(), Code::ResourceExhausted);
        assert_eq!(CallError::TooManyFields.code(), Code::InvalidArgument);
        assert_eq!(CallError::UnknownService("x".into()).code(), Code::NotFound);
    }

    #[test]
    fn every_code_is_on_the_wire_what_its_name_says() {
        for code in [
            Code::Ok,
            Code::Cancelled,
            Code::InvalidArgument,
            Code::DeadlineExceeded,
            Code::NotFound,
            Code::AlreadyExists,
            Code::ResourceExhausted,
            Code::FailedPrecondition,
            Code::Unavailable,
            Code::Internal,
        ] {
            let wire = code.on_the_wire().to_string();
            assert!(wire.contains(code.name()), "{code:?} is {wire}");
        }
    }
}
