//! The gRPC boundary: decode, hand to the pool, encode.
//!
//! A handler runs on one of grpcio's threads and must not block: it takes the request, the
//! deadline and the sink, and submits a job. A worker does the work and answers. The wire's
//! generated types stop in here.
#![forbid(unsafe_code)]

mod convert;
mod filters;
pub mod service;
mod socket;
mod status;

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use futures_channel::oneshot;
use futures_util::SinkExt;
use grpcio::{
    ChannelBuilder, Deadline, EnvBuilder, Method, RpcContext, RpcStatus, ServerBuilder, ServerCredentials,
    ServerStreamingSink, Service, ServiceBuilder, UnarySink, WriteFlags,
};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use self::filters::Filters;
pub use self::socket::{Error, Result, check as check_address};
use crate::pool::{Entrance, Refusal};
use crate::proto::snapshots::{
    ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest, MountsResponse, PrepareSnapshotRequest,
    PrepareSnapshotResponse, StatSnapshotResponse, UpdateSnapshotResponse, UsageResponse, ViewSnapshotRequest,
    ViewSnapshotResponse,
};
use crate::snapshotter::{self, Asks, Snapshotter};
use crate::types::{Key, Snapshot};

/// What containerd itself allows a message to be, both ways.
const MESSAGE_BYTES: i32 = 16 << 20;
/// Threads of grpcio's own that read requests and send answers; they never wait for a disk.
const TRANSPORT_THREADS: usize = 2;
/// Snapshots in one message of a streamed List, and bytes after which one is sent.
const LIST_BATCH: usize = 100;
const LIST_BATCH_BYTES: u64 = 1 << 20;

pub struct Server {
    grpc: grpcio::Server,
    socket: socket::Bound,
}

impl Server {
    /// Listens on the unix socket `address` and begins to serve. `pool` does the work, except for calls that a repository may keep waiting.
    pub fn start(address: &Path, snapshotter: Arc<Snapshotter>, pool: Entrance, waiters: Waiters) -> Result<Self> {
        grpcio::redirect_log();
        let environment = Arc::new(EnvBuilder::new().cq_count(TRANSPORT_THREADS).name_prefix("grpc").build());
        let args = ChannelBuilder::new(Arc::clone(&environment))
            .max_receive_message_len(MESSAGE_BYTES)
            .max_send_message_len(MESSAGE_BYTES)
            .build_args();
        let mut grpc = ServerBuilder::new(environment)
            .channel_args(args)
            .register_service(snapshots(&Handlers { snapshotter, pool, waiters: Arc::new(waiters) }))
            .build()
            .map_err(Error::Transport)?;
        let socket =
            socket::bind(address, |uri| grpc.add_listening_port(uri, ServerCredentials::insecure()).map(drop))?;
        grpc.start();
        Ok(Self { grpc, socket })
    }

    /// Takes no more calls and lets `drain` finish those under way; then sends their answers,
    /// until `until` at most.
    pub fn stop(mut self, until: Instant, drain: impl FnOnce()) {
        self.socket.remove();
        let all_answered = self.grpc.shutdown();
        drain();
        if !wait(all_answered, until) {
            log::warn!("some answers could not be sent before the stop");
        }
    }
}

/// Whether `future` was ready before `until`.
fn wait(future: impl Future, until: Instant) -> bool {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            return true;
        }
        let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
        thread::park_timeout(left);
    }
}

/// What every handler holds a copy of.
#[derive(Clone)]
struct Handlers {
    snapshotter: Arc<Snapshotter>,
    pool: Entrance,
    waiters: Arc<Waiters>,
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

/// What a call may have to wait for.
type Waits<Q> = fn(&Snapshotter, &Q) -> snapshotter::Result<Option<Asks>>;

fn snapshots(handlers: &Handlers) -> Service {
    let mut service = ServiceBuilder::new();
    let asks: Waits<PrepareSnapshotRequest> = |s, request| s.asks_for_prepare(&request.parent, &request.labels);
    service = unary(service, handlers, &service::PREPARE, Some(asks), |s, request, _| {
        let wanted = convert::wanted(&request.key, &request.parent, request.labels)?;
        let mounts = convert::mounts(s.prepare(wanted)?);
        Ok(PrepareSnapshotResponse { mounts, ..PrepareSnapshotResponse::default() })
    });
    let asks: Waits<ViewSnapshotRequest> = |s, request| s.asks(&request.parent);
    service = unary(service, handlers, &service::VIEW, Some(asks), |s, request, _| {
        let wanted = convert::wanted(&request.key, &request.parent, request.labels)?;
        let mounts = convert::mounts(s.view(wanted)?);
        Ok(ViewSnapshotResponse { mounts, ..ViewSnapshotResponse::default() })
    });
    let asks: Waits<MountsRequest> = |s, request| s.asks(&request.key);
    service = unary(service, handlers, &service::MOUNTS, Some(asks), |s, request, _| {
        let mounts = convert::mounts(s.mounts(&Key::parse(&request.key)?)?);
        Ok(MountsResponse { mounts, ..MountsResponse::default() })
    });
    service = unary(service, handlers, &service::COMMIT, None, |s, request, _| {
        let (name, key) = (Key::parse(&request.name)?, Key::parse(&request.key)?);
        let parent = Key::parse_optional(&request.parent)?;
        s.commit(&name, &key, request.labels.into_iter().collect(), parent.as_ref())?;
        Ok(Empty::new())
    });
    service = unary(service, handlers, &service::REMOVE, None, |s, request, _| {
        s.remove(&Key::parse(&request.key)?)?;
        Ok(Empty::new())
    });
    service = unary(service, handlers, &service::STAT, None, |s, request, _| {
        let info = convert::info(s.stat(&Key::parse(&request.key)?)?);
        Ok(StatSnapshotResponse { info: Some(info).into(), ..StatSnapshotResponse::default() })
    });
    service = unary(service, handlers, &service::UPDATE, None, |s, request, _| {
        let (key, change) = convert::update(request)?;
        let info = convert::info(s.update(&key, &change)?);
        Ok(UpdateSnapshotResponse { info: Some(info).into(), ..UpdateSnapshotResponse::default() })
    });
    service = unary(service, handlers, &service::USAGE, None, |s, request, cancelled| {
        let usage = s.usage(&Key::parse(&request.key)?, cancelled)?;
        Ok(UsageResponse { size: usage.size, inodes: usage.inodes, ..UsageResponse::default() })
    });
    service = unary(service, handlers, &service::CLEANUP, None, |s, _, cancelled| {
        let cleaned = s.cleanup(cancelled)?;
        log::debug!("cleanup: {} done, {} left for later", cleaned.done, cleaned.left);
        Ok(Empty::new())
    });
    let handlers = handlers.clone();
    service
        .add_server_streaming_handler(&service::LIST, move |context, request, sink| {
            list(&handlers, &context, request, sink);
        })
        .build()
}

/// Adds a method that is answered once. `work` runs on a worker, or on a waiter if the call
/// `waits`; it gets a function that says whether the caller has given up.
fn unary<Q, R, F>(
    service: ServiceBuilder,
    handlers: &Handlers,
    method: &Method<Q, R>,
    waits: Option<Waits<Q>>,
    work: F,
) -> ServiceBuilder
where
    Q: Send + 'static,
    R: Send + 'static,
    F: Fn(&Snapshotter, Q, &dyn Fn() -> bool) -> snapshotter::Result<R> + Clone + Send + 'static,
{
    let handlers = handlers.clone();
    let name = method.name;
    service.add_unary_handler(method, move |context: RpcContext<'_>, request: Q, sink: UnarySink<R>| {
        let deadline = context.deadline();
        let (snapshotter, waiters) = (Arc::clone(&handlers.snapshotter), Arc::clone(&handlers.waiters));
        let (started, sending) = oneshot::channel();
        let answer = move |result| {
            // Sending starts here, on the worker, without another change of threads.
            let answer = match status_or_value(name, result) {
                Ok(response) => sink.success(response),
                Err(status) => sink.fail(status),
            };
            drop(started.send(answer));
        };
        let run = {
            let (snapshotter, work) = (Arc::clone(&snapshotter), work.clone());
            move |request| work(&snapshotter, request, &|| deadline.exceeded())
        };
        let run_here = run.clone();
        handlers.pool.submit(
            move || deadline.exceeded(),
            move || match waits.map_or(Ok(None), |waits| waits(&snapshotter, &request)) {
                Ok(Some(asks)) => Step::PassOn(asks, request),
                Ok(None) => Step::Done(run_here(request)),
                Err(e) => Step::Done(Err(e)),
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
            if let Ok(answer) = sending.await {
                drop(answer.await);
            }
        });
    })
}

/// What a worker did with a call.
enum Step<Q, R> {
    Done(snapshotter::Result<R>),
    PassOn(Asks, Q),
}

/// The answer to a call, and a line in the log if it shows a fault of this program or host.
fn status_or_value<T>(
    method: &str,
    result: std::result::Result<snapshotter::Result<T>, Refusal>,
) -> std::result::Result<T, RpcStatus> {
    use snapshotter::Error;
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            match error {
                Error::System(_) | Error::Undo { .. } | Error::Store(_) | Error::Broken { .. } => {
                    log::error!(method = method; "{error}");
                }
                Error::LayerUnavailable { .. } => log::warn!(method = method; "{error}"),
                _ => log::debug!(method = method; "{error}"),
            }
            Err(status::of_error(&error))
        }
        Err(refusal) => {
            match refusal {
                Refusal::Panicked(_) => log::error!(method = method; "{refusal}"),
                Refusal::QueueFull { .. } => log::warn!(method = method; "{refusal}"),
                Refusal::DeadlinePassed | Refusal::Stopping => log::debug!(method = method; "{refusal}"),
            }
            Err(status::of_refusal(&refusal))
        }
    }
}

/// A worker reads the list at once; grpcio's thread sends it as fast as the client takes
/// it. So a client that does not read holds memory, but no worker.
fn list(
    handlers: &Handlers,
    context: &RpcContext<'_>,
    request: ListSnapshotsRequest,
    mut sink: ServerStreamingSink<ListSnapshotsResponse>,
) {
    let deadline: Deadline = context.deadline();
    let (answer, answered) = oneshot::channel();
    let snapshotter = Arc::clone(&handlers.snapshotter);
    handlers.pool.submit(
        move || deadline.exceeded(),
        move || read_list(&snapshotter, &request.filters),
        move |result| drop(answer.send(status_or_value(service::LIST.name, result))),
    );
    context.spawn(async move {
        let snapshots = match answered.await {
            Ok(Ok(snapshots)) => snapshots,
            Ok(Err(status)) => return drop(sink.fail(status).await),
            Err(oneshot::Canceled) => return,
        };
        let mut rest = snapshots.into_iter().peekable();
        while rest.peek().is_some() {
            let mut batch = ListSnapshotsResponse::default();
            let mut bytes = 0;
            while batch.info.len() < LIST_BATCH && bytes < LIST_BATCH_BYTES {
                let Some(snapshot) = rest.next() else { break };
                let info = convert::info(snapshot);
                bytes += info.compute_size();
                batch.info.push(info);
            }
            if sink.send((batch, WriteFlags::default())).await.is_err() {
                return; // The client went away.
            }
        }
        drop(sink.close().await);
    });
}

fn read_list(snapshotter: &Snapshotter, texts: &[String]) -> snapshotter::Result<Vec<Snapshot>> {
    let filters = Filters::parse(texts)
        .map_err(|invalid| snapshotter::Error::InvalidFilter { why: invalid.to_string(), filter: invalid.filter })?;
    snapshotter.list(filters.reference_and_parent(), |snapshot| filters.matches(snapshot))
}
