//! One handler for each method: from a request on gRPC's thread to an answer on its way.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use grpcio::{ClientStreamingSink, ClientStreamingSinkResult, Deadline, Method, RpcStatus, Service, ServiceBuilder};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use super::listener::ConnectionId;
use super::memory_budget::{MemoryBudget, MemoryReservation};
use super::request::{DecodedRequest, IncomingCall, limit_fields};
use super::status::{CallError, Code};
use super::{SnapshotterCell, convert, service};
use crate::metrics::METRICS;
use crate::model::{Key, Timestamp};
use crate::proto::snapshots::{
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, StatSnapshotResponse,
    UpdateSnapshotResponse, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use crate::snapshotter::{self, RepositoryDependency, Snapshotter};
use crate::worker_pool::{PoolHandle, Refusal};

/// What every handler holds a copy of.
#[derive(Clone)]
pub struct Handlers {
    pub(super) snapshotter: SnapshotterCell,
    pub(super) pool: PoolHandle,
    blocking_pools: Arc<BlockingPools>,
    pub(super) load: Arc<MemoryBudget>,
}

/// Who does the calls that may have to wait, apart for each thing that they may wait for.
pub struct BlockingPools {
    pub pulls: PoolHandle,
    /// In the order of the repositories.
    pub repositories: Vec<PoolHandle>,
}

impl BlockingPools {
    fn of(&self, asks: RepositoryDependency) -> &PoolHandle {
        match asks {
            RepositoryDependency::Any => &self.pulls,
            RepositoryDependency::Index(n) => self.repositories.get(n).unwrap_or(&self.pulls),
        }
    }
}

pub(super) type CallResult<T> = Result<T, CallError>;

/// What a call may have to wait for.
type DependencyOf<Q> = fn(&Snapshotter, &Q) -> snapshotter::Result<Option<RepositoryDependency>>;

impl Handlers {
    pub fn new(
        snapshotter: SnapshotterCell,
        pool: PoolHandle,
        blocking_pools: BlockingPools,
        load: Arc<MemoryBudget>,
    ) -> Self {
        Self { snapshotter, pool, blocking_pools: Arc::new(blocking_pools), load }
    }

    /// `started`: when the process was.
    pub fn service(&self, started: Timestamp) -> Service {
        let mut service = self.admin(ServiceBuilder::new(), started);
        let asks: DependencyOf<PrepareSnapshotRequest> =
            |s, request| s.repository_dependency_of_prepare(&request.parent, &request.labels);
        service = self.unary(service, &service::PREPARE, Some(asks), |s, request, _| {
            let wanted = convert::create_request(&request.key, &request.parent, request.labels)?;
            let mounts = convert::mounts(s.prepare(wanted)?);
            Ok(PrepareSnapshotResponse { mounts, ..PrepareSnapshotResponse::default() })
        });
        let asks: DependencyOf<ViewSnapshotRequest> = |s, request| s.repository_dependency(&request.parent);
        service = self.unary(service, &service::VIEW, Some(asks), |s, request, _| {
            let wanted = convert::create_request(&request.key, &request.parent, request.labels)?;
            let mounts = convert::mounts(s.view(wanted)?);
            Ok(ViewSnapshotResponse { mounts, ..ViewSnapshotResponse::default() })
        });
        let asks: DependencyOf<MountsRequest> = |s, request| s.repository_dependency(&request.key);
        service = self.unary(service, &service::MOUNTS, Some(asks), |s, request, _| {
            let mounts = convert::mounts(s.mounts(&Key::parse(&request.key)?)?);
            Ok(MountsResponse { mounts, ..MountsResponse::default() })
        });
        service = self.unary(service, &service::COMMIT, None, |s, request, _| {
            let (name, key) = (Key::parse(&request.name)?, Key::parse(&request.key)?);
            let parent = Key::parse_optional(&request.parent)?;
            s.commit(&name, &key, request.labels.into_iter().collect(), parent.as_ref())?;
            Ok(Empty::new())
        });
        service = self.unary(service, &service::REMOVE, None, |s, request, _| {
            s.remove(&Key::parse(&request.key)?)?;
            Ok(Empty::new())
        });
        service = self.unary(service, &service::STAT, None, |s, request, _| {
            let info = convert::info(s.stat(&Key::parse(&request.key)?)?);
            Ok(StatSnapshotResponse { info: Some(info).into(), ..StatSnapshotResponse::default() })
        });
        service = self.unary(service, &service::UPDATE, None, |s, request, _| {
            let (key, change) = convert::update(request)?;
            let info = convert::info(s.update(&key, &change)?);
            Ok(UpdateSnapshotResponse { info: Some(info).into(), ..UpdateSnapshotResponse::default() })
        });
        service = self.unary(service, &service::USAGE, None, |s, request, cancelled| {
            let usage = s.usage(&Key::parse(&request.key)?, cancelled)?;
            Ok(UsageResponse { size: usage.size, inodes: usage.inodes, ..UsageResponse::default() })
        });
        service = self.unary(service, &service::CLEANUP, None, |s, _, cancelled| {
            let cleaned = s.cleanup(cancelled)?;
            log::debug!("cleanup: {} done, {} left for later", cleaned.done, cleaned.remaining);
            Ok(Empty::new())
        });
        let handlers = self.clone();
        METRICS.init_methods(service::LIST.name);
        service
            .add_duplex_streaming_handler(&limit_fields(&service::LIST), move |context, messages, sink| {
                context.spawn(handlers.clone().list(IncomingCall::new(&context, messages), sink));
            })
            .build()
    }

    /// Adds a method that is answered once. `work` runs on a worker, or on a waiter if the call
    /// `waits`; it gets a function that says whether the caller has given up.
    pub(super) fn unary<Q, R, F>(
        &self,
        service: ServiceBuilder,
        method: &Method<Q, R>,
        waits: Option<DependencyOf<Q>>,
        work: F,
    ) -> ServiceBuilder
    where
        Q: Message,
        R: Message,
        F: Fn(&Snapshotter, Q, &(dyn Fn() -> bool + Sync)) -> snapshotter::Result<R> + Clone + Send + 'static,
    {
        self.unary_before_ready(service, method, None, waits, move |s, request, cancelled| {
            Ok(work(s, request, cancelled)?)
        })
    }

    /// As `unary`; as long as the start is not over, the answer is what `early` gives, where there is such an answer.
    /// Other calls wait in the queue of the workers, which begin when the start is over.
    pub(super) fn unary_before_ready<Q, R, F>(
        &self,
        service: ServiceBuilder,
        method: &Method<Q, R>,
        early: Option<fn() -> R>,
        waits: Option<DependencyOf<Q>>,
        work: F,
    ) -> ServiceBuilder
    where
        Q: Message,
        R: Message,
        F: Fn(&Snapshotter, Q, &(dyn Fn() -> bool + Sync)) -> CallResult<R> + Clone + Send + 'static,
    {
        let handlers = self.clone();
        let name = method.name;
        METRICS.init_methods(name);
        service.add_client_streaming_handler(&limit_fields(method), move |context, messages, sink| {
            let (handlers, work) = (handlers.clone(), work.clone());
            let mut call = IncomingCall::new(&context, messages);
            context.spawn(async move {
                let request = match call.message().await {
                    Ok(request) => request,
                    Err(status) => return drop(sink.fail(status).await),
                };
                let reply = Reply { name, since: Instant::now(), sink };
                let (request, mut reservation) = match handlers.admit(call.connection, request) {
                    Ok(admitted) => admitted,
                    Err(failure) => return reply.send(Err(failure)).finish().await,
                };
                let early = early.filter(|_| handlers.snapshotter.get().is_none());
                if let Some(early) = early {
                    return reply.send(Ok(early())).finish().await;
                }
                let (started, sending) = oneshot::channel();
                let answer = move |result: Result<CallResult<R>, Refusal>| {
                    // A refusal may be said on gRPC's own thread, which must not wait.
                    let permit = result.is_ok().then(|| reservation.begin_send());
                    let result = result.map_err(CallError::Pool).flatten().and_then(|response| {
                        reservation.reserve_answer(response.compute_size())?;
                        Ok(response)
                    });
                    // Sending starts here, on the worker, without another change of threads.
                    let sent = reply.send(result);
                    drop(started.send((sent, permit, reservation)));
                };
                handlers.begin(call.deadline, request, waits, work, answer);
                // grpcio cancels a call whose answer is dropped before it is sent, so somebody has to
                // wait for the end of it: not the worker, which a slow client must not hold.
                if let Ok((sent, permit, reservation)) = sending.await {
                    sent.finish().await;
                    drop((permit, reservation));
                }
            });
        })
    }

    /// Counts a request that came in, if there is room for it.
    pub(super) fn admit<Q>(
        &self,
        connection: Option<ConnectionId>,
        request: DecodedRequest<Q>,
    ) -> CallResult<(Q, MemoryReservation)> {
        match request {
            DecodedRequest::Request { request, memory } => Ok((request, self.load.admit(connection, memory)?)),
            DecodedRequest::TooManyFields => Err(CallError::TooManyFields),
        }
    }

    /// Has a worker, and then a waiter if the call `waits`, do `work`, and `answer` with its result.
    fn begin<Q, R, F>(
        &self,
        deadline: Deadline,
        request: Q,
        waits: Option<DependencyOf<Q>>,
        work: F,
        answer: impl FnOnce(Result<CallResult<R>, Refusal>) + Send + 'static,
    ) where
        Q: Message,
        R: Message,
        F: Fn(&Snapshotter, Q, &(dyn Fn() -> bool + Sync)) -> CallResult<R> + Clone + Send + 'static,
    {
        let (snapshotter, blocking_pools) = (Arc::clone(&self.snapshotter), Arc::clone(&self.blocking_pools));
        let run = {
            let snapshotter = Arc::clone(&snapshotter);
            move |request| work(snapshotter.wait(), request, &|| deadline.exceeded())
        };
        let run_here = run.clone();
        self.pool.submit(
            move || deadline.exceeded(),
            move || match waits.map_or(Ok(None), |waits| waits(snapshotter.wait(), &request)) {
                Ok(Some(asks)) => Dispatch::PassOn(asks, request),
                Ok(None) => Dispatch::Done(run_here(request)),
                Err(e) => Dispatch::Done(Err(e.into())),
            },
            move |step| match step {
                Ok(Dispatch::PassOn(asks, request)) => {
                    blocking_pools.of(asks).submit(move || deadline.exceeded(), move || run(request), answer);
                }
                Ok(Dispatch::Done(result)) => answer(Ok(result)),
                Err(refusal) => answer(Err(refusal)),
            },
        );
    }
}

/// What it takes to answer a call once.
struct Reply<R> {
    name: &'static str,
    since: Instant,
    sink: ClientStreamingSink<R>,
}

impl<R> Reply<R> {
    fn send(self, result: CallResult<R>) -> AnswerInFlight {
        let Self { name, since, sink } = self;
        let success = result.is_ok().then(|| since.elapsed());
        let answer = match result {
            Ok(response) => sink.success(response),
            Err(failure) => sink.fail(failed(name, since, &failure)),
        };
        AnswerInFlight { name, success, answer }
    }
}

/// An answer that is being sent.
struct AnswerInFlight {
    name: &'static str,
    /// After which time a call succeeded that is not counted yet.
    success: Option<Duration>,
    answer: ClientStreamingSinkResult,
}

impl AnswerInFlight {
    /// Waits for the end of the sending.
    async fn finish(self) {
        let code = if self.answer.await.is_ok() { Code::Ok } else { Code::Cancelled };
        if let Some(took) = self.success {
            METRICS.record_call(self.name, code.name(), took);
        }
    }
}

/// What a worker did with a call.
enum Dispatch<Q, R> {
    Done(CallResult<R>),
    PassOn(RepositoryDependency, Q),
}

/// The status for a failure, counted and logged.
pub(super) fn failed(method: &str, since: Instant, failure: &CallError) -> RpcStatus {
    METRICS.record_call(method, failure.code().name(), since.elapsed());
    log::log!(failure.level(), method = method; "{failure}");
    failure.status()
}
