//! The methods of all services as tables of `grpcio::Method`.
//!
//! The server needs no more to serve them, and a client needs no more to call them. It must not know what they do.
#![forbid(unsafe_code)]

use protobuf::well_known_types::empty::Empty;

use crate::proto::admin::{
    DescribeRequest, DescribeResponse, LeftoversRequest, LeftoversResponse, SnapshotsRequest, SnapshotsResponse,
};
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};
use crate::proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest, MountsResponse,
    PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse,
    UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest,
    ViewSnapshotResponse,
};

macro_rules! methods {
    ($service:literal $($constant:ident $kind:ident $name:literal $request:ty => $response:ty;)*) => {
        $(pub const $constant: grpcio::Method<$request, $response> = grpcio::Method {
            ty: grpcio::MethodType::$kind,
            name: concat!("/", $service, "/", $name),
            req_mar: grpcio::Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de },
            resp_mar: grpcio::Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de },
        };)*
    };
}

pub(crate) use methods;

methods! {
    "containerd.services.snapshots.v1.Snapshots"
    PREPARE Unary "Prepare" PrepareSnapshotRequest => PrepareSnapshotResponse;
    VIEW Unary "View" ViewSnapshotRequest => ViewSnapshotResponse;
    MOUNTS Unary "Mounts" MountsRequest => MountsResponse;
    COMMIT Unary "Commit" CommitSnapshotRequest => Empty;
    REMOVE Unary "Remove" RemoveSnapshotRequest => Empty;
    STAT Unary "Stat" StatSnapshotRequest => StatSnapshotResponse;
    UPDATE Unary "Update" UpdateSnapshotRequest => UpdateSnapshotResponse;
    LIST ServerStreaming "List" ListSnapshotsRequest => ListSnapshotsResponse;
    USAGE Unary "Usage" UsageRequest => UsageResponse;
    CLEANUP Unary "Cleanup" CleanupRequest => Empty;
}

methods! {
    "cvmfs_snapshotter.admin.Admin"
    DESCRIBE Unary "Describe" DescribeRequest => DescribeResponse;
    SNAPSHOTS Unary "Snapshots" SnapshotsRequest => SnapshotsResponse;
    LEFTOVERS Unary "Leftovers" LeftoversRequest => LeftoversResponse;
}

methods! {
    "grpc.health.v1.Health"
    HEALTH_CHECK Unary "Check" HealthCheckRequest => HealthCheckResponse;
}
