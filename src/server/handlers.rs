//! One handler for each method: from a request on gRPC's thread to an answer on its way.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use grpcio::{ClientStreamingSink, ClientStreamingSinkResult, Deadline, Method, RpcStatus, Service, ServiceBuilder};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use super::door::ConnectionId;
use super::load::{Burden, Load};
use super::request::{Begun, Incoming, limit_fields};
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
            .add_duplex_streaming_handler(&limit_fields(&service::LIST), move |context, messages, sink| {
                context.spawn(handlers.clone().list(Begun::new(&context, messages), sink));
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
        R: Message,
        F: Fn(&Snapshotter, Q, &(dyn Fn() -> bool + Sync)) -> snapshotter::Result<R> + Clone + Send + 'static,
    {
        self.unary_from_the_start(service, method, None, waits, move |s, request, cancelled| {
            Ok(work(s, request, cancelled)?)
        })
    }

    /// As `unary`; as long as the start is not over, the answer is what `early` gives, where there is such an answer.
    /// Other calls wait in the queue of the workers, which begin when the start is over.
    pub(super) fn unary_from_the_start<Q, R, F>(
        &self,
        service: ServiceBuilder,
        method: &Method<Q, R>,
        early: Option<fn() -> R>,
        waits: Option<Waits<Q>>,
        work: F,
    ) -> ServiceBuilder
    where
        Q: Message,
        R: Message,
        F: Fn(&Snapshotter, Q, &(dyn Fn() -> bool + Sync)) -> Outcome<R> + Clone + Send + 'static,
    {
        let handlers = self.clone();
        let name = method.name;
        METRICS.expect_calls(name);
        service.add_client_streaming_handler(&limit_fields(method), move |context, messages, sink| {
            let (handlers, work) = (handlers.clone(), work.clone());
            let mut call = Begun::new(&context, messages);
            context.spawn(async move {
                let request = match call.message().await {
                    Ok(request) => request,
                    Err(status) => return drop(sink.fail(status).await),
                };
                let reply = Reply { name, since: Instant::now(), sink };
                let (request, mut burden) = match handlers.admit(call.connection, request) {
                    Ok(admitted) => admitted,
                    Err(failure) => return reply.send(Err(failure)).finish().await,
                };
                let early = early.filter(|_| handlers.snapshotter.get().is_none());
                if let Some(early) = early {
                    return reply.send(Ok(early())).finish().await;
                }
                let (started, sending) = oneshot::channel();
                let answer = move |result: Result<Outcome<R>, Refusal>| {
                    // A refusal may be said on gRPC's own thread, which must not wait.
                    let permit = result.is_ok().then(|| burden.answer());
                    let result = result.map_err(Failure::Pool).flatten().and_then(|response| {
                        burden.hold_answer(response.compute_size())?;
                        Ok(response)
                    });
                    // Sending starts here, on the worker, without another change of threads.
                    let sent = reply.send(result);
                    drop(started.send((sent, permit, burden)));
                };
                handlers.begin(call.deadline, request, waits, work, answer);
                // grpcio cancels a call whose answer is dropped before it is sent, so somebody has to
                // wait for the end of it: not the worker, which a slow client must not hold.
                if let Ok((sent, permit, burden)) = sending.await {
                    sent.finish().await;
                    drop((permit, burden));
                }
            });
        })
    }

    /// Counts a request that came in, if there is room for it.
    pub(super) fn admit<Q>(&self, connection: Option<ConnectionId>, request: Incoming<Q>) -> Outcome<(Q, Burden)> {
        match request {
            Incoming::Request { request, memory } => Ok((request, self.load.take(connection, memory)?)),
            Incoming::TooManyFields => Err(Failure::TooManyFields),
        }
    }

    /// Has a worker, and then a waiter if the call `waits`, do `work`, and `answer` with its result.
    fn begin<Q, R, F>(
        &self,
        deadline: Deadline,
        request: Q,
        waits: Option<Waits<Q>>,
        work: F,
        answer: impl FnOnce(Result<Outcome<R>, Refusal>) + Send + 'static,
    ) where
        Q: Message,
        R: Message,
        F: Fn(&Snapshotter, Q, &(dyn Fn() -> bool + Sync)) -> Outcome<R> + Clone + Send + 'static,
    {
        let (snapshotter, waiters) = (Arc::clone(&self.snapshotter), Arc::clone(&self.waiters));
        let run = {
            let snapshotter = Arc::clone(&snapshotter);
            move |request| work(snapshotter.wait(), request, &|| deadline.exceeded())
        };
        let run_here = run.clone();
        self.pool.submit(
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
    }
}

/// What it takes to answer a call once.
struct Reply<R> {
    name: &'static str,
    since: Instant,
    sink: ClientStreamingSink<R>,
}

impl<R> Reply<R> {
    fn send(self, result: Outcome<R>) -> Sent {
        let Self { name, since, sink } = self;
        let success = result.is_ok().then(|| since.elapsed());
        let answer = match result {
            Ok(response) => sink.success(response),
            Err(failure) => sink.fail(failed(name, since, &failure)),
        };
        Sent { name, success, answer }
    }
}

/// An answer that is being sent.
struct Sent {
    name: &'static str,
    /// After which time a call succeeded that is not counted yet.
    success: Option<Duration>,
    answer: ClientStreamingSinkResult,
}

impl Sent {
    /// Waits for the end of the sending.
    async fn finish(self) {
        let code = if self.answer.await.is_ok() { Code::Ok } else { Code::Cancelled };
        if let Some(took) = self.success {
            METRICS.called(self.name, code.name(), took);
        }
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
