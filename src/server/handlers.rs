//! The snapshots service: each method is one function from a request to a response.
//!
//! It must not know how a call gets to a thread or how its response is sent; that is `unary`, `dispatch` and `list`.
//! It decides nothing: it converts the request, calls the snapshotter and converts the result.
#![forbid(unsafe_code)]

use std::sync::Arc;

use grpcio::{Service, ServiceBuilder};
use protobuf::well_known_types::empty::Empty;

use super::dispatch::{BlockingPools, CallContext};
use super::memory_budget::{MemoryBudget, MemoryReservation};
use super::request::DecodedRequest;
use super::send_gate::SendGate;
use super::status::CallError;
use super::unary::UnaryMethod;
use super::{SnapshotterCell, convert, service};
use crate::model::{Key, Timestamp};
use crate::proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, MountsRequest, MountsResponse, PrepareSnapshotRequest,
    PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest,
    UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use crate::worker_pool::PoolHandle;

/// The state that all handlers share. Every handler has a clone.
#[derive(Clone)]
pub struct Handlers {
    pub(super) snapshotter: SnapshotterCell,
    pub(super) workers: PoolHandle,
    pub(super) blocking_pools: Arc<BlockingPools>,
    pub(super) budget: Arc<MemoryBudget>,
    pub(super) send_gate: Arc<SendGate>,
    pub(super) process_start: Timestamp,
}

pub(super) type CallResult<T> = Result<T, CallError>;

impl Handlers {
    /// Reserves memory for a request, or refuses it.
    pub(super) fn admit<Q>(&self, request: DecodedRequest<Q>) -> CallResult<(Q, MemoryReservation)> {
        match request {
            DecodedRequest::Request { request, bytes } => Ok((request, self.budget.admit(bytes)?)),
            DecodedRequest::TooManyFields => Err(CallError::TooManyFields),
        }
    }

    /// All methods of all services.
    pub fn service(&self) -> Service {
        let mut service = ServiceBuilder::new();
        service = self.add_admin(service);
        service = self.add_health(service);
        service = self.add_snapshots(service);
        service.build()
    }

    fn add_snapshots(&self, mut service: ServiceBuilder) -> ServiceBuilder {
        service = self.add_unary(
            service,
            UnaryMethod::new(&service::PREPARE, prepare).may_wait_for(|snapshotter, request| {
                snapshotter.repository_dependency_of_prepare(&request.parent, &request.labels)
            }),
        );
        service = self.add_unary(
            service,
            UnaryMethod::new(&service::VIEW, view)
                .may_wait_for(|snapshotter, request| snapshotter.repository_dependency(&request.parent)),
        );
        service = self.add_unary(
            service,
            UnaryMethod::new(&service::MOUNTS, mounts)
                .may_wait_for(|snapshotter, request| snapshotter.repository_dependency(&request.key)),
        );
        service = self.add_unary(service, UnaryMethod::new(&service::COMMIT, commit));
        service = self.add_unary(service, UnaryMethod::new(&service::REMOVE, remove));
        service = self.add_unary(service, UnaryMethod::new(&service::STAT, stat));
        service = self.add_unary(service, UnaryMethod::new(&service::UPDATE, update));
        service = self.add_unary(service, UnaryMethod::new(&service::USAGE, usage));
        service = self.add_unary(service, UnaryMethod::new(&service::CLEANUP, cleanup));
        self.add_list(service)
    }
}

fn prepare(call: &CallContext<'_>, request: PrepareSnapshotRequest) -> CallResult<PrepareSnapshotResponse> {
    let create = convert::create_request(&request.key, &request.parent, request.labels)?;
    let mounts = convert::mounts(call.snapshotter.prepare(create)?);
    Ok(PrepareSnapshotResponse { mounts, ..PrepareSnapshotResponse::default() })
}

fn view(call: &CallContext<'_>, request: ViewSnapshotRequest) -> CallResult<ViewSnapshotResponse> {
    let create = convert::create_request(&request.key, &request.parent, request.labels)?;
    let mounts = convert::mounts(call.snapshotter.view(create)?);
    Ok(ViewSnapshotResponse { mounts, ..ViewSnapshotResponse::default() })
}

fn mounts(call: &CallContext<'_>, MountsRequest { key, .. }: MountsRequest) -> CallResult<MountsResponse> {
    let mounts = convert::mounts(call.snapshotter.mounts(&Key::parse(&key)?)?);
    Ok(MountsResponse { mounts, ..MountsResponse::default() })
}

fn commit(call: &CallContext<'_>, request: CommitSnapshotRequest) -> CallResult<Empty> {
    let (name, key) = (Key::parse(&request.name)?, Key::parse(&request.key)?);
    let parent = Key::parse_optional(&request.parent)?;
    call.snapshotter.commit(&name, &key, request.labels.into_iter().collect(), parent.as_ref())?;
    Ok(Empty::new())
}

fn remove(call: &CallContext<'_>, RemoveSnapshotRequest { key, .. }: RemoveSnapshotRequest) -> CallResult<Empty> {
    call.snapshotter.remove(&Key::parse(&key)?)?;
    Ok(Empty::new())
}

fn stat(
    call: &CallContext<'_>,
    StatSnapshotRequest { key, .. }: StatSnapshotRequest,
) -> CallResult<StatSnapshotResponse> {
    let info = convert::info(call.snapshotter.stat(&Key::parse(&key)?)?);
    Ok(StatSnapshotResponse { info: Some(info).into(), ..StatSnapshotResponse::default() })
}

fn update(call: &CallContext<'_>, request: UpdateSnapshotRequest) -> CallResult<UpdateSnapshotResponse> {
    let (key, change) = convert::update(request)?;
    let info = convert::info(call.snapshotter.update(&key, &change)?);
    Ok(UpdateSnapshotResponse { info: Some(info).into(), ..UpdateSnapshotResponse::default() })
}

fn usage(call: &CallContext<'_>, UsageRequest { key, .. }: UsageRequest) -> CallResult<UsageResponse> {
    let usage = call.snapshotter.usage(&Key::parse(&key)?, &|| call.is_expired())?;
    Ok(UsageResponse { size: usage.size, inodes: usage.inodes, ..UsageResponse::default() })
}

fn cleanup(call: &CallContext<'_>, _: CleanupRequest) -> CallResult<Empty> {
    let cleaned = call.snapshotter.cleanup(&|| call.is_expired())?;
    log::debug!("cleanup removed {} and left {} for the next one", cleaned.done, cleaned.remaining);
    Ok(Empty::new())
}
