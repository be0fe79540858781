use std::collections::BTreeSet;

use nix::errno::Errno;

use super::*;
use crate::attach::RefusedAttributes;
use crate::model::{Digest, Key, Kind, SnapshotId};
use crate::repository::Unavailable;
use crate::{store, system};

const DEBUG: Level = Level::Debug;

/// Requires that `$values` contains every variant of an enum at least once. A variant that is not listed here does not
/// compile.
macro_rules! assert_all_variants {
    ($values:expr, $enum:ident: $($variant:ident)*) => {
        let name = |value: &$enum| match value {
            $($enum::$variant { .. } => stringify!($variant),)*
        };
        let tested: BTreeSet<&str> = $values.map(name).collect();
        assert_eq!(tested, BTreeSet::from([$(stringify!($variant)),*]));
    };
}

#[test]
fn every_snapshotter_error_has_its_code_and_level() {
    let key = || Key::parse("k").unwrap();
    let system = || system::Error { call: "stat", path: "/x".into(), errno: Errno::EIO };
    let digest = Digest::parse(&format!("sha256:{}", "0".repeat(64))).unwrap();
    let busy = digest.clone();
    let attributes = RefusedAttributes {
        directory: "d".into(),
        bytes: 5_008,
        largest: ("user.big".into(), 5_000),
        errno: Errno::ENOSPC,
    };
    let refused = Error::AttributesRefused { digest: digest.clone(), refused: attributes };
    let unavailable = |why| Error::LayerUnavailable { digest: digest.clone(), repository: "r".into(), why };
    let table = [
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
        (unavailable(Unavailable::NotPublished), Code::Unavailable, Level::Warn),
        (unavailable(Unavailable::JobPanicked), Code::Internal, Level::Error),
        (Error::LayerBusy { digest: busy }, Code::Unavailable, Level::Warn),
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
    ];
    assert_all_variants!(table.iter().map(|(error, ..)| error), Error:
        InvalidKey NotFound ParentNotFound ParentNotCommitted AlreadyExists RemoteCommitted WrongKind HasChildren
        OtherParent NewParentNotCommitted ChainTooLong ImmutableField InvalidFilter LabelsTooLong TooManyLabels LayerBusy
        InvalidMapping LayerUnavailable AttributesRefused FilesMissing DeadlineExceeded System RollbackFailed
        Store);
    for (error, code, level) in table {
        let text = error.to_string();
        let report = CallError::Snapshotter(error).report();
        assert_eq!(report, FailureReport { code, level, text: text.clone() });
        // containerd turns FailedPrecondition with these endings into another error.
        assert!(!text.ends_with(": conflict") && !text.ends_with(": not modified"), "{text}");
    }
    assert!(Error::HasChildren(key()).to_string().contains("remove"));
}

#[test]
fn every_job_error_has_its_code_and_level() {
    let table = [
        (JobError::QueueFull { capacity: 1 }, Code::ResourceExhausted, Level::Warn),
        (JobError::DeadlinePassed, Code::DeadlineExceeded, DEBUG),
        (JobError::Stopping, Code::Unavailable, DEBUG),
        (JobError::Panicked("p".into()), Code::Internal, Level::Error),
    ];
    assert_all_variants!(table.iter().map(|(error, ..)| error), JobError: QueueFull DeadlinePassed Stopping Panicked);
    for (error, code, level) in table {
        let text = error.to_string();
        assert_eq!(CallError::Pool(error).report(), FailureReport { code, level, text });
    }
}

#[test]
fn every_call_error_has_its_code_and_level() {
    let table = [
        (CallError::Snapshotter(Error::DeadlineExceeded), Code::DeadlineExceeded, DEBUG),
        (CallError::Pool(JobError::Stopping), Code::Unavailable, DEBUG),
        (CallError::Memory(OverBudget { limit: 1 }), Code::ResourceExhausted, Level::Warn),
        (CallError::TooManyFields, Code::InvalidArgument, DEBUG),
        (CallError::UnknownService("x".into()), Code::NotFound, DEBUG),
    ];
    assert_all_variants!(table.iter().map(|(error, ..)| error), CallError:
        Snapshotter Pool Memory TooManyFields UnknownService);
    for (error, code, level) in table {
        let text = error.to_string();
        assert_eq!(error.report(), FailureReport { code, level, text });
    }
}

#[test]
fn every_code_has_the_same_name_in_metrics_and_on_the_wire() {
    let codes = [
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
    ];
    assert_all_variants!(codes.iter(), Code:
        Ok Cancelled InvalidArgument DeadlineExceeded NotFound AlreadyExists ResourceExhausted FailedPrecondition
        Unavailable Internal);
    for code in codes {
        let wire_code = code.wire_code().to_string();
        assert!(wire_code.contains(code.name()), "{code:?} is {wire_code}");
    }
}
