//! The gRPC boundary: who may connect, decode, hand to the pool, encode.
//!
//! A handler runs on one of grpcio's threads and must not block: it takes the request, the
//! deadline and the sink, and submits a job. A worker does the work and answers. The wire's
//! generated types stop in here.
#![forbid(unsafe_code)]

mod admin;
pub(crate) mod convert;
pub(crate) mod field_count;
mod filter_parser;
pub(crate) mod filters;
mod handlers;
mod list;
mod listener;
mod memory_budget;
mod request;
pub mod service;
mod socket;
mod status;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use grpcio::{ChannelBuilder, EnvBuilder, ResourceQuota, ServerBuilder};
use parking_lot::Mutex;

pub use self::handlers::BlockingPools;
use self::handlers::Handlers;
pub use self::listener::MAX_CONNECTIONS;
use self::listener::{AllowedUids, ConnectionListener};
use self::memory_budget::MemoryBudget;
pub use self::socket::{Error, ListeningSocket, Result, check_path as check_address, connect};
use self::socket::{SocketAccess, SocketFile};
use crate::model::Timestamp;
use crate::snapshotter::Snapshotter;
use crate::system;
use crate::worker_pool::PoolHandle;

/// What containerd itself allows a message to be, both ways.
const MESSAGE_BYTES: i32 = 16 << 20;
/// The one bit of gRPC's set of compression algorithms that stands for none.
const ONLY_UNCOMPRESSED: i32 = 1;
/// gRPC closes a connection after so many pings that come too early; 0 stands for never. Until it can do so it keeps
/// 8 KiB for each further one, and a client that does not read keeps it from doing so.
const MAX_EARLY_PINGS: i32 = 0;
/// Threads of grpcio's own that read requests and send answers; they never wait for a disk.
const TRANSPORT_THREADS: usize = 1;
/// Calls at one time on one connection. containerd sends all its calls over one; a client keeps
/// what is more to itself until others are answered.
const CALLS_PER_CONNECTION: i32 = 1024;
/// What gRPC itself may hold of messages that are still coming in. Beyond it closes connections, and
/// not always those of the clients that send so much.
const TRANSPORT_BYTES: usize = 512 << 20;
/// A stop waits so long for answers that are being sent, to say goodbye between two of them.
const GOAWAY_LIMIT: Duration = Duration::from_secs(1);
/// And so long for clients without a call to go by themselves.
const IDLE_LIMIT: Duration = Duration::from_secs(1);

pub struct Server {
    grpc: Arc<Mutex<grpcio::Server>>,
    load: Arc<MemoryBudget>,
    door: ConnectionListener,
    file: SocketFile,
}

/// What the calls are about. Those that come before it is there wait in the queue of `pool`, which is started then.
pub type SnapshotterCell = Arc<OnceLock<Arc<Snapshotter>>>;

/// The socket that this process was started with, if there is one.
pub fn inherited() -> Result<Option<ListeningSocket>> {
    let Some((socket, count)) = system::inherited_sockets() else { return Ok(None) };
    let bound = socket::adopt(socket)?;
    if count > 1 {
        // Who calls at another one waits in vain; whoever calls here need not.
        let address = bound.file.address().display();
        log::error!(
            "{count} sockets came with the start (LISTEN_FDS), and {address} alone is served: the socket unit needs one ListenStream="
        );
    }
    Ok(Some(bound))
}

/// Listens on `address`, for root and `allowed_uids`.
pub fn bind(address: &Path, allowed_uids: &[u32]) -> Result<ListeningSocket> {
    socket::bind(address, if allowed_uids.is_empty() { SocketAccess::Root } else { SocketAccess::Everybody })
}

/// A socket on `path` that everybody may connect to.
pub fn bind_for_all(path: &Path) -> Result<UnixListener> {
    socket::bind(path, SocketAccess::Everybody).map(|bound| bound.listener)
}

impl Server {
    /// Begins to serve root and `allowed_uids`. `pool` does the work, except for calls that a
    /// repository may keep waiting; it begins when `snapshotter` is there.
    pub fn start(
        bound: ListeningSocket,
        allowed_uids: &[u32],
        snapshotter: SnapshotterCell,
        pool: PoolHandle,
        blocking_pools: BlockingPools,
    ) -> Result<Self> {
        grpcio::redirect_log();
        let environment = Arc::new(EnvBuilder::new().cq_count(TRANSPORT_THREADS).name_prefix("grpc").build());
        let args = ChannelBuilder::new(Arc::clone(&environment))
            .max_receive_message_len(MESSAGE_BYTES)
            .max_send_message_len(MESSAGE_BYTES)
            .max_concurrent_stream(CALLS_PER_CONNECTION)
            // Messages are not inflated: gRPC would look at their size only afterwards.
            .raw_cfg_int(c"grpc.per_message_decompression".to_owned(), 0)
            .raw_cfg_int(c"grpc.compression_enabled_algorithms_bitset".to_owned(), ONLY_UNCOMPRESSED)
            .raw_cfg_int(c"grpc.http2.max_ping_strikes".to_owned(), MAX_EARLY_PINGS)
            .set_resource_quota(ResourceQuota::new(None).resize_memory(TRANSPORT_BYTES))
            .build_args();
        let load = MemoryBudget::new();
        let handlers = Handlers::new(snapshotter, pool, blocking_pools, Arc::clone(&load));
        let mut grpc = ServerBuilder::new(environment)
            .channel_args(args)
            .register_service(handlers.service(Timestamp::now()))
            .build()
            .map_err(Error::Transport)?;
        grpc.start();
        let ListeningSocket { listener, file } = bound;
        let grpc = Arc::new(Mutex::new(grpc));
        let inside = Arc::clone(&grpc);
        let hand_over = move |connection| system::into_grpc_fd(&mut inside.lock(), connection);
        let door =
            ConnectionListener::open(listener, AllowedUids::new(allowed_uids), hand_over).map_err(Error::Threads)?;
        Ok(Self { grpc, load, door, file })
    }

    /// Where it can be reached.
    pub fn address(&self) -> &Path {
        self.file.address()
    }

    /// The process ends without ever having answered a call: nobody waits for those that came.
    pub fn abandon(self) {
        std::mem::forget(self);
    }

    /// Takes no more connections, asks clients to take further calls elsewhere, and waits for
    /// them to go. Then no more calls are taken, `drain` finishes those under way, and their
    /// answers are sent, until `until` at most.
    pub fn stop(self, until: Instant, drain: impl FnOnce()) {
        self.file.remove();
        let mut inside = self.door.close();
        let held = self.load.pause_sending(GOAWAY_LIMIT);
        inside.send_goaway(|connection| held.is_busy(connection));
        if held.busy() > 0 {
            log::debug!(
                "{} clients are slow to take answers: calls of theirs that cross the stop may fail",
                held.busy()
            );
        }
        drop(held);
        let since = Instant::now();
        inside.wait_for_end(|| {
            let is_idle = self.load.calls() == 0 && since.elapsed() >= IDLE_LIMIT;
            is_idle || Instant::now() >= until
        });
        let mut all_answered = pin!(self.grpc.lock().shutdown());
        drain();
        // A client that is connected and says nothing would be waited for, too.
        let idle_until = until.min(Instant::now() + IDLE_LIMIT);
        let is_over = wait(&mut all_answered, idle_until) || self.load.calls() == 0 || wait(&mut all_answered, until);
        if !is_over {
            log::warn!("some answers could not be sent before the stop");
        }
    }
}

/// Whether `future` was ready before `until`.
fn wait<F: Future>(future: &mut Pin<&mut F>, until: Instant) -> bool {
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
        let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
        thread::park_timeout(left);
    }
}
