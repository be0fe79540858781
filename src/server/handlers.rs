//! One handler for each method: from a request on gRPC's thread to an answer on its way.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use futures_channel::oneshot;
use grpcio::{Method, RpcContext, RpcStatus, Service, ServiceBuilder, UnarySink};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use super::door::ConnectionId;
use super::load::Load;
use super::status::{Code, Failure};
use super::{Late, convert, service};
use crate::metrics::METRICS;
use crate::pool::{Entrance, Refusal};
use crate::proto::snapshots::{
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, StatSnapshotResponse,
    UpdateSnapshotResponse, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use crate::snapshotter::{self, Asks, Snapshotter};
use crate::types::{Key, Timestamp};

/// What every handler holds a copy of.
#[derive(Clone)]
pub struct Handlers {
    pub(super) snapshotter: Late,
    pub(super) pool: Entrance,
    waiters: Arc<Waiters>,
    pub(super) load: Arc<Load>,
}

/// Who does the calls that may have to wait, apart for each thing that they may wait for.
pub struct Waiters {
    pub pulls: Entrance,
    /// In the order of the repositories.
    pub repositories: Vec<Entrance>,
}

impl Waiters {
    fn of(&self, asks: Asks) -> &Entrance {
        match asks {
            Asks::All => &self.pulls,
            Asks::One(n) => self.repositories.get(n).unwrap_or(&self.pulls),
        }
    }
}

pub(super) type Outcome<T> = Result<T, Failure>;

/// What a call may have to wait for.
type Waits<Q> = fn(&Snapshotter, &Q) -> snapshotter::Result<Option<Asks>>;

impl Handlers {
    pub fn new(snapshotter: Late, pool: Entrance, waiters: Waiters, load: Arc<Load>) -> Self {
        Self { snapshotter, pool, waiters: Arc::new(waiters), load }
    }

    /// `started`: when the process was.
    pub fn service(&self, started: Timestamp) -> Service {
        let mut service = self.admin(ServiceBuilder::new(), started);
        let asks: Waits<PrepareSnapshotRequest> = |s, request| s.asks_for_prepare(&request.parent, &request.labels);
        service = self.unary(service, &service::PREPARE, Some(asks), |s, request, _| {
            let wanted = convert::wanted(&request.key, &request.parent, request.labels)?;
            let mounts = convert::mounts(s.prepare(wanted)?);
            Ok(PrepareSnapshotResponse { mounts, ..PrepareSnapshotResponse::default() })
        });
        let asks: Waits<ViewSnapshotRequest> = |s, request| s.asks(&request.parent);
        service = self.unary(service, &service::VIEW, Some(asks), |s, request, _| {
            let wanted = convert::wanted(&request.key, &request.parent, request.labels)?;
            let mounts = convert::mounts(s.view(wanted)?);
            Ok(ViewSnapshotResponse { mounts, ..ViewSnapshotResponse::default() })
        });
        let asks: Waits<MountsRequest> = |s, request| s.asks(&request.key);
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
            log::debug!("cleanup: {} done, {} left for later", cleaned.done, cleaned.left);
            Ok(Empty::new())
        });
        let handlers = self.clone();
        METRICS.expect_calls(service::LIST.name);
        service
            .add_server_streaming_handler(&service::LIST, move |context, request, sink| {
                handlers.list(&context, request, sink);
            })
            .build()
    }

    /// Adds a method that is answered once. `work` runs on a worker, or on a waiter if the call
    /// `waits`; it gets a function that says whether the caller has given up.
    pub(super) fn unary<Q, R, F>(
        &self,
        service: ServiceBuilder,
        method: &Method<Q, R>,
        waits: Option<Waits<Q>>,
        work: F,
    ) -> ServiceBuilder
    where
        Q: Message,
        R: Send + 'static,
        F: Fn(&Snapshotter, Q, &(dyn Fn() -> bool + Sync)) -> snapshotter::Result<R> + Clone + Send + 'static,
    {
        self.unary_at_once(service, method, waits, move |late, request, cancelled| {
            Ok(work(late.wait(), request, cancelled)?)
        })
    }

    /// As `unary`, and before the start is over.
    pub(super) fn unary_at_once<Q, R, F>(
        &self,
        service: ServiceBuilder,
        method: &Method<Q, R>,
        waits: Option<Waits<Q>>,
        work: F,
    ) -> ServiceBuilder
    where
        Q: Message,
        R: Send + 'static,
        F: Fn(&Late, Q, &(dyn Fn() -> bool + Sync)) -> Outcome<R> + Clone + Send + 'static,
    {
        let handlers = self.clone();
        let name = method.name;
        METRICS.expect_calls(name);
        service.add_unary_handler(method, move |context: RpcContext<'_>, request: Q, sink: UnarySink<R>| {
            let (deadline, since) = (context.deadline(), Instant::now());
            let burden = match handlers.load.take(ConnectionId::from_peer(&context.peer()), request.compute_size()) {
                Ok(burden) => burden,
                Err(overload) => {
                    let answer = sink.fail(failed(name, since, &Failure::Load(overload)));
                    return context.spawn(async move { drop(answer.await) });
                }
            };
            let (snapshotter, waiters) = (Arc::clone(&handlers.snapshotter), Arc::clone(&handlers.waiters));
            let (started, sending) = oneshot::channel();
            let answer = move |result: Result<Outcome<R>, Refusal>| {
                let was_worked_on = result.is_ok();
                let result = result.map_err(Failure::Pool).flatten();
                // A refusal may be said on gRPC's own thread, which must not wait.
                let turn = was_worked_on.then(|| burden.answer());
                let success = result.is_ok().then(|| since.elapsed());
                // Sending starts here, on the worker, without another change of threads.
                let answer = match result {
                    Ok(response) => sink.success(response),
                    Err(failure) => sink.fail(failed(name, since, &failure)),
                };
                drop(started.send((answer, success, turn, burden)));
            };
            let run = {
                let (snapshotter, work) = (Arc::clone(&snapshotter), work.clone());
                move |request| work(&snapshotter, request, &|| deadline.exceeded())
            };
            let run_here = run.clone();
            handlers.pool.submit(
                move || deadline.exceeded(),
                move || match waits.map_or(Ok(None), |waits| waits(snapshotter.wait(), &request)) {
                    Ok(Some(asks)) => Step::PassOn(asks, request),
                    Ok(None) => Step::Done(run_here(request)),
                    Err(e) => Step::Done(Err(e.into())),
                },
                move |step| match step {
                    Ok(Step::PassOn(asks, request)) => {
                        waiters.of(asks).submit(move || deadline.exceeded(), move || run(request), answer);
                    }
                    Ok(Step::Done(result)) => answer(Ok(result)),
                    Err(refusal) => answer(Err(refusal)),
                },
            );
            // grpcio cancels a call whose answer is dropped before it is sent, so somebody has to
            // wait for the end of it: not the worker, which a slow client must not hold.
            context.spawn(async move {
                if let Ok((answer, success, turn, burden)) = sending.await {
                    let code = if answer.await.is_ok() { Code::Ok } else { Code::Cancelled };
                    if let Some(took) = success {
                        METRICS.called(name, code.name(), took);
                    }
                    drop((turn, burden));
                }
            });
        })
    }
}

/// What a worker did with a call.
enum Step<Q, R> {
    Done(Outcome<R>),
    PassOn(Asks, Q),
}

/// The status for a failure, counted and logged.
pub(super) fn failed(method: &str, since: Instant, failure: &Failure) -> RpcStatus {
    METRICS.called(method, failure.code().name(), since.elapsed());
    log::log!(failure.level(), method = method; "{failure}");
    failure.status()
}
