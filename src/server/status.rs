//! From a domain error to a gRPC status: one match, without a wildcard.
#![forbid(unsafe_code)]

use grpcio::{RpcStatus, RpcStatusCode};

use super::load::Overload;
use crate::pool::Refusal;
use crate::snapshotter::Error;
use crate::types::Quoted;

pub fn of_error(error: &Error) -> RpcStatus {
    RpcStatus::with_message(code(error), error.to_string())
}

fn code(error: &Error) -> RpcStatusCode {
    match error {
        Error::InvalidKey(_)
        | Error::ParentNotCommitted { .. }
        | Error::OtherParent { .. }
        | Error::ImmutableField(_)
        | Error::InvalidFilter { .. }
        | Error::LabelsTooLong { .. }
        | Error::InvalidMapping { .. } => RpcStatusCode::INVALID_ARGUMENT,
        Error::NotFound(_) | Error::ParentNotFound(_) => RpcStatusCode::NOT_FOUND,
        Error::AlreadyExists(_) | Error::RemoteCommitted { .. } => RpcStatusCode::ALREADY_EXISTS,
        Error::WrongKind { .. } | Error::HasChildren(_) | Error::NewParentNotCommitted { .. } => {
            RpcStatusCode::FAILED_PRECONDITION
        }
        Error::LayerUnavailable { .. } | Error::Broken { .. } => RpcStatusCode::UNAVAILABLE,
        Error::Cancelled => RpcStatusCode::DEADLINE_EXCEEDED,
        Error::System(_) | Error::Store(_) => RpcStatusCode::INTERNAL,
        Error::Undo { failed, .. } => code(failed),
    }
}

pub fn of_refusal(refusal: &Refusal) -> RpcStatus {
    let code = match refusal {
        Refusal::QueueFull { .. } => RpcStatusCode::RESOURCE_EXHAUSTED,
        Refusal::DeadlinePassed => RpcStatusCode::DEADLINE_EXCEEDED,
        Refusal::Stopping => RpcStatusCode::UNAVAILABLE,
        Refusal::Panicked(_) => RpcStatusCode::INTERNAL,
    };
    RpcStatus::with_message(code, refusal.to_string())
}

pub fn of_unknown_service(name: &str) -> RpcStatus {
    let message = format!("there is no service or repository {} here", Quoted(name));
    RpcStatus::with_message(RpcStatusCode::NOT_FOUND, message)
}

/// As gRPC's documentation writes it.
pub fn name(code: RpcStatusCode) -> &'static str {
    match code {
        RpcStatusCode::OK => "OK",
        RpcStatusCode::CANCELLED => "CANCELLED",
        RpcStatusCode::INVALID_ARGUMENT => "INVALID_ARGUMENT",
        RpcStatusCode::DEADLINE_EXCEEDED => "DEADLINE_EXCEEDED",
        RpcStatusCode::NOT_FOUND => "NOT_FOUND",
        RpcStatusCode::ALREADY_EXISTS => "ALREADY_EXISTS",
        RpcStatusCode::RESOURCE_EXHAUSTED => "RESOURCE_EXHAUSTED",
        RpcStatusCode::FAILED_PRECONDITION => "FAILED_PRECONDITION",
        RpcStatusCode::UNAVAILABLE => "UNAVAILABLE",
        RpcStatusCode::INTERNAL => "INTERNAL",
        // There is no other that this program answers with.
        _ => "UNKNOWN",
    }
}

pub fn of_overload(overload: Overload) -> RpcStatus {
    RpcStatus::with_message(RpcStatusCode::RESOURCE_EXHAUSTED, overload.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::Missing;
    use crate::types::{Digest, InvalidKey, Key, Kind, SnapshotId};
    use crate::{store, sys};
    use nix::errno::Errno;

    #[test]
    fn every_error_has_the_code_of_the_contract() {
        let key = || Key::parse("k").unwrap();
        let system = || sys::Error { call: "stat", path: "/x".into(), errno: Errno::EIO };
        let digest = Digest::parse(&format!("sha256:{}", "0".repeat(64))).unwrap();
        let unavailable = Error::LayerUnavailable { digest, repository: "r".into(), why: Missing::NotPublished };
        for (error, expected) in [
            (Error::InvalidKey(InvalidKey::Empty), RpcStatusCode::INVALID_ARGUMENT),
            (Error::NotFound(key()), RpcStatusCode::NOT_FOUND),
            (Error::ParentNotFound(key()), RpcStatusCode::NOT_FOUND),
            (Error::ParentNotCommitted { parent: key(), kind: Kind::View }, RpcStatusCode::INVALID_ARGUMENT),
            (Error::AlreadyExists(key()), RpcStatusCode::ALREADY_EXISTS),
            (Error::RemoteCommitted { reference: "r".into() }, RpcStatusCode::ALREADY_EXISTS),
            (Error::WrongKind { key: key(), kind: Kind::View, needs: "n" }, RpcStatusCode::FAILED_PRECONDITION),
            (Error::HasChildren(key()), RpcStatusCode::FAILED_PRECONDITION),
            (Error::OtherParent { key: key(), parent: key(), named: key() }, RpcStatusCode::INVALID_ARGUMENT),
            (Error::NewParentNotCommitted { parent: key(), kind: Kind::View }, RpcStatusCode::FAILED_PRECONDITION),
            (Error::ImmutableField("f".into()), RpcStatusCode::INVALID_ARGUMENT),
            (Error::InvalidFilter { filter: "f".into(), why: "w".into() }, RpcStatusCode::INVALID_ARGUMENT),
            (Error::LabelsTooLong { bytes: 1 }, RpcStatusCode::INVALID_ARGUMENT),
            (Error::InvalidMapping { label: "l", value: "v".into() }, RpcStatusCode::INVALID_ARGUMENT),
            (unavailable, RpcStatusCode::UNAVAILABLE),
            (Error::Broken { key: key(), id: SnapshotId(1) }, RpcStatusCode::UNAVAILABLE),
            (Error::Cancelled, RpcStatusCode::DEADLINE_EXCEEDED),
            (Error::System(system()), RpcStatusCode::INTERNAL),
            (Error::Undo { failed: Box::new(Error::NotFound(key())), undo: system() }, RpcStatusCode::NOT_FOUND),
            (Error::Store(store::Error::InUse { path: "/x".into() }), RpcStatusCode::INTERNAL),
        ] {
            let status = of_error(&error);
            assert_eq!(status.code(), expected, "{error:?}");
            assert_ne!(name(status.code()), "UNKNOWN", "{error:?}");
            // containerd gives FailedPrecondition with these endings another type.
            assert!(!status.message().ends_with(": conflict") && !status.message().ends_with(": not modified"));
        }
        assert!(Error::HasChildren(key()).to_string().contains("remove"));
    }

    #[test]
    fn every_refusal_has_its_code() {
        for (refusal, expected) in [
            (Refusal::QueueFull { limit: 1 }, RpcStatusCode::RESOURCE_EXHAUSTED),
            (Refusal::DeadlinePassed, RpcStatusCode::DEADLINE_EXCEEDED),
            (Refusal::Stopping, RpcStatusCode::UNAVAILABLE),
            (Refusal::Panicked("p".into()), RpcStatusCode::INTERNAL),
        ] {
            assert_eq!(of_refusal(&refusal).code(), expected, "{refusal:?}");
        }
    }
}
