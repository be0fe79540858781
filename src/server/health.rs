//! gRPC's health service (`grpc.health.v1.Health`): whether the daemon, or one repository, can be used.
//!
//! It must not wait for a repository: it answers from what is known. It is the only service that answers before the
//! start of the daemon is over.
#![forbid(unsafe_code)]

use grpcio::ServiceBuilder;
use protobuf::EnumOrUnknown;

use super::dispatch::CallContext;
use super::handlers::{CallResult, Handlers};
use super::service;
use super::status::CallError;
use super::unary::UnaryMethod;
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};

/// The service that containerd uses, by its name in the health protocol.
const SNAPSHOTS_SERVICE: &str = "containerd.services.snapshots.v1.Snapshots";

impl Handlers {
    pub(super) fn add_health(&self, service: ServiceBuilder) -> ServiceBuilder {
        self.add_unary(
            service,
            UnaryMethod::new(&service::HEALTH_CHECK, check)
                .answer_before_ready(|| response(ServingStatus::NOT_SERVING)),
        )
    }
}

fn check(call: &CallContext<'_>, request: HealthCheckRequest) -> CallResult<HealthCheckResponse> {
    // The daemon itself is healthy if this runs, because then a worker was free.
    if matches!(request.service.as_str(), "" | SNAPSHOTS_SERVICE) {
        return Ok(response(ServingStatus::SERVING));
    }
    match call.snapshotter.health().into_iter().find(|(repository, _)| *repository == request.service) {
        Some((_, true)) => Ok(response(ServingStatus::SERVING)),
        Some((_, false)) => Ok(response(ServingStatus::NOT_SERVING)),
        None => Err(CallError::UnknownService(request.service)),
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: EnumOrUnknown::new(status), ..HealthCheckResponse::default() }
}
