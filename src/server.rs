//! The gRPC server: who may connect, how requests are decoded, on which thread a call runs, how it is answered.
//!
//! A handler runs on a thread of gRPC, which must not block. It submits a job with the request, and a worker executes
//! the call and begins to send the response. The room must not know how snapshots are stored, nor which commands use
//! the administration service. Its invariants:
//! - The generated types of the wire (`crate::proto`) go no further into the daemon than this room.
//! - Everything that clients can make the daemon keep is bounded (`docs/limits.md`).
//! - A stop fails no call that was begun in time (`Server::stop`).
#![forbid(unsafe_code)]

pub(crate) mod admin;
pub(crate) mod convert;
mod dispatch;
pub(crate) mod field_count;
pub(crate) mod filters;
mod handlers;
mod health;
mod list;
mod listener;
mod memory_budget;
mod outcome;
mod request;
mod send_gate;
pub mod service;
mod status;
mod unary;

use std::fmt;
use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use grpcio::{ChannelBuilder, EnvBuilder, Environment, ResourceQuota, ServerBuilder};
use parking_lot::Mutex;

pub use self::dispatch::BlockingPools;
use self::handlers::Handlers;
pub use self::listener::MAX_CONNECTIONS;
use self::listener::{AllowedUids, ConnectionListener};
use self::memory_budget::MemoryBudget;
use self::send_gate::SendGate;
use crate::model::Timestamp;
use crate::snapshotter::Snapshotter;
use crate::system;
use crate::unix_socket::{self, ListeningSocket, SocketAccess, SocketFile};
use crate::worker_pool::PoolHandle;

/// The largest message in either direction, which is containerd's own limit.
const MAX_MESSAGE_BYTES: i32 = 16 << 20;
/// The bit that stands for no compression in gRPC's set of compression algorithms.
const ONLY_UNCOMPRESSED: i32 = 1;
/// gRPC closes a connection after this many pings that come too early; 0 means never. Until it can close the
/// connection it keeps 8 KiB for each further ping, and a client that does not read keeps it from closing.
const MAX_EARLY_PINGS: i32 = 0;
/// Threads of grpcio that read requests and send responses. They never wait for a disk.
const TRANSPORT_THREADS: usize = 1;
/// Calls at one time on one connection. containerd sends all its calls over one. A client keeps further calls to
/// itself until others are answered.
const MAX_CALLS_PER_CONNECTION: i32 = 1024;
/// What gRPC may hold of messages that are still coming in. When that is exceeded, gRPC closes connections, and not
/// always those of the clients that sent so much.
const MAX_TRANSPORT_BYTES: usize = 512 << 20;
/// How long a stop waits for responses that are being sent, before it sends GOAWAY to the other connections.
const MAX_SEND_PAUSE: Duration = Duration::from_secs(1);
/// How long a stop waits for clients without a call to disconnect.
const MAX_IDLE_WAIT: Duration = Duration::from_secs(1);

pub struct Server {
    grpc: Arc<Mutex<grpcio::Server>>,
    budget: Arc<MemoryBudget>,
    send_gate: Arc<SendGate>,
    listener: ConnectionListener,
    socket_file: SocketFile,
}

/// The snapshotter, once the start of the daemon is over. Calls that come earlier wait in the queue of the workers,
/// which are started afterwards.
pub type SnapshotterCell = Arc<OnceLock<Arc<Snapshotter>>>;

/// Why the server cannot start.
#[derive(Debug)]
pub enum Error {
    Transport(grpcio::Error),
    Threads(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport(cause) => write!(f, "cannot start the gRPC server: {cause}"),
            Self::Threads(cause) => write!(f, "cannot accept connections: {cause}"),
        }
    }
}

impl std::error::Error for Error {}

/// The socket that systemd passed to this process, if there is one.
pub fn inherited_socket() -> unix_socket::Result<Option<ListeningSocket>> {
    let Some((socket, count)) = system::inherited_sockets() else { return Ok(None) };
    let listening = unix_socket::adopt(socket)?;
    if count > 1 {
        // A client of another socket waits in vain. That is no reason to fail the clients of this one.
        let address = listening.file.address().display();
        log::error!(
            event = "extra_sockets_ignored", count, address:%;
            "systemd passed {count} sockets (LISTEN_FDS), only {address} is served; leave one ListenStream= in the \
             socket unit"
        );
    }
    Ok(Some(listening))
}

/// Listens on `address`, for root and `allowed_uids`.
pub fn bind(address: &Path, allowed_uids: &[u32]) -> unix_socket::Result<ListeningSocket> {
    unix_socket::bind(address, if allowed_uids.is_empty() { SocketAccess::Root } else { SocketAccess::Everybody })
}

impl Server {
    /// Starts to serve root and `allowed_uids`. Calls run on `workers`, except those that may have to wait for a
    /// repository, which go on in `blocking_pools`.
    pub fn start(
        socket: ListeningSocket,
        allowed_uids: &[u32],
        snapshotter: SnapshotterCell,
        workers: PoolHandle,
        blocking_pools: BlockingPools,
    ) -> Result<Self, Error> {
        grpcio::redirect_log();
        let environment = Arc::new(EnvBuilder::new().cq_count(TRANSPORT_THREADS).name_prefix("grpc").build());
        let budget = MemoryBudget::new();
        let send_gate = Arc::new(SendGate::default());
        let handlers = Handlers {
            snapshotter,
            workers,
            blocking_pools: Arc::new(blocking_pools),
            budget: Arc::clone(&budget),
            send_gate: Arc::clone(&send_gate),
            process_start: Timestamp::now(),
        };
        let mut grpc = ServerBuilder::new(Arc::clone(&environment))
            .channel_args(channel_builder(environment).build_args())
            .register_service(handlers.service())
            .build()
            .map_err(Error::Transport)?;
        grpc.start();
        let grpc = Arc::new(Mutex::new(grpc));
        let on_accept = {
            let grpc = Arc::clone(&grpc);
            move |connection| system::into_grpc_fd(&mut grpc.lock(), connection)
        };
        let ListeningSocket { listener, file: socket_file } = socket;
        let listener =
            ConnectionListener::open(listener, AllowedUids::new(allowed_uids), on_accept).map_err(Error::Threads)?;
        Ok(Self { grpc, budget, send_gate, listener, socket_file })
    }

    pub fn address(&self) -> &Path {
        self.socket_file.address()
    }

    /// Leaves the server as it is until the process ends. A start that failed calls this: no call was executed, so
    /// none has a response to wait for.
    pub fn abandon(self) {
        std::mem::forget(self);
    }

    /// Stops in an order that fails no call that was begun in time. It returns at `deadline` at the latest, apart from
    /// `drain_pools`, which must end then by itself.
    ///
    /// 1. Accept no more connections.
    /// 2. Ask clients with GOAWAY to send further calls elsewhere, and wait until they disconnect.
    /// 3. Refuse further calls, and let `drain_pools` finish those that are running.
    /// 4. Wait until their responses were sent.
    pub fn stop(self, deadline: Instant, drain_pools: impl FnOnce()) {
        let Self { grpc, budget, send_gate, listener, socket_file } = self;
        socket_file.remove();
        let mut open_connections = listener.close();
        {
            let pause = send_gate.pause(MAX_SEND_PAUSE);
            open_connections.send_goaway(|connection| pause.is_busy(connection));
            let busy = pause.busy_connections();
            if busy > 0 {
                log::debug!("{busy} connections got no GOAWAY, because a response is being sent: calls may fail there");
            }
        }
        let goaway_sent = Instant::now();
        open_connections.wait_for_end(|| {
            let is_idle = budget.pending_calls() == 0 && goaway_sent.elapsed() >= MAX_IDLE_WAIT;
            is_idle || Instant::now() >= deadline
        });
        let mut shutdown = pin!(grpc.lock().shutdown());
        drain_pools();
        // The shutdown also waits for clients that are connected and idle, so it is not waited for to its end if all
        // calls were answered.
        let idle_deadline = deadline.min(Instant::now() + MAX_IDLE_WAIT);
        let is_over = poll_until(&mut shutdown, idle_deadline)
            || budget.pending_calls() == 0
            || poll_until(&mut shutdown, deadline);
        if !is_over {
            log::warn!(event = "responses_not_sent"; "some responses could not be sent before the stop");
        }
    }
}

fn channel_builder(environment: Arc<Environment>) -> ChannelBuilder {
    ChannelBuilder::new(environment)
        .max_receive_message_len(MAX_MESSAGE_BYTES)
        .max_send_message_len(MAX_MESSAGE_BYTES)
        .max_concurrent_stream(MAX_CALLS_PER_CONNECTION)
        // gRPC would check the size of a compressed message only after inflating it, so none is inflated.
        .raw_cfg_int(c"grpc.per_message_decompression".to_owned(), 0)
        .raw_cfg_int(c"grpc.compression_enabled_algorithms_bitset".to_owned(), ONLY_UNCOMPRESSED)
        .raw_cfg_int(c"grpc.http2.max_ping_strikes".to_owned(), MAX_EARLY_PINGS)
        .set_resource_quota(ResourceQuota::new(None).resize_memory(MAX_TRANSPORT_BYTES))
}

/// Waits for `future`, until `deadline` at most. The result says whether it was ready.
fn poll_until<F: Future>(future: &mut Pin<&mut F>, deadline: Instant) -> bool {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            return true;
        }
        let Some(remaining) = deadline.checked_duration_since(Instant::now()) else { return false };
        thread::park_timeout(remaining);
    }
}
