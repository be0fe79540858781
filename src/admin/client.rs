//! The gRPC clients: `GrpcClient` for any server behind a unix socket, which the doctor uses for containerd as well, and
//! `AdminClient` for the calls of our daemon.
//!
//! The messages of `Error` speak of our daemon; the doctor has its own for containerd.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use grpcio::{CallOption, ChannelBuilder, Client, EnvBuilder, MetadataBuilder, Method, RpcStatusCode};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::proto::admin::{DescribeRequest, DescribeResponse, Leftover, LeftoversRequest, Snapshot, SnapshotsRequest};
use crate::proto::health::HealthCheckRequest;
use crate::proto::snapshots::{CleanupRequest, UsageRequest};
use crate::server::service;
use crate::unix_socket;

/// Deadline of a call. The daemon waits for a repository longer than this only if the repository answers, but slowly.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// Deadline of calls that remove or measure files, which takes as long as it takes.
const LONG_CALL_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// Deadline of a health check. The daemon answers it at once, even during its start, unless it hangs.
const HEALTH_LIMIT: Duration = Duration::from_secs(15);
/// How long connecting is tried while the server's queue of connections is full.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub enum Error {
    /// Nothing listens on the socket.
    NotRunning {
        address: PathBuf,
        cause: io::Error,
    },
    /// The server does not have the method: it is another program, or an older version of the daemon.
    NotOurs {
        address: PathBuf,
    },
    /// The daemon accepted the health check and did not answer it.
    Silent {
        address: PathBuf,
    },
    Call {
        method: &'static str,
        code: RpcStatusCode,
        message: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRunning { address, cause } if cause.kind() == io::ErrorKind::PermissionDenied => {
                write!(f, "only root may connect to the daemon at {}: {cause}", address.display())
            }
            Self::NotRunning { address, cause } => write!(
                f,
                "no daemon serves {}: {cause}; start it with \"systemctl start cvmfs-snapshotter\", or name its socket \
                 with --address",
                address.display()
            ),
            Self::NotOurs { address } => write!(
                f,
                "the server at {} does not have this method: it is the Go snapshotter, or an older version of this one \
                 that was not restarted",
                address.display()
            ),
            Self::Silent { address } => write!(
                f,
                "the daemon at {} accepts calls but does not answer within {} s: it is very busy or hangs; see its log, \
                 and restart it if that lasts",
                address.display(),
                HEALTH_LIMIT.as_secs()
            ),
            Self::Call { method, code, message } => write!(f, "no answer to {method}: {code}: {message}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// A connection to a gRPC server.
pub struct GrpcClient {
    client: Client,
    address: PathBuf,
    listener: Option<PeerProcess>,
}

/// The process that made the socket listen, as the kernel recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerProcess {
    pub pid: u32,
    pub uid: u32,
}

/// Connects, and tries again for a while if the server's queue of connections is full.
fn connect(address: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    loop {
        match unix_socket::connect(address) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it accepts no connections: it hangs"));
            }
            result => return result,
        }
    }
}

impl GrpcClient {
    pub fn connect(address: &Path) -> Result<Self> {
        // This connection only tells at once whether and who listens. gRPC connects by itself, tries for long, and reports
        // little.
        let probe = connect(address).map_err(|cause| Error::NotRunning { address: address.to_owned(), cause })?;
        let credentials = getsockopt(&probe, PeerCredentials).ok();
        let listener =
            credentials.and_then(|peer| Some(PeerProcess { pid: u32::try_from(peer.pid()).ok()?, uid: peer.uid() }));
        let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
        let channel = ChannelBuilder::new(environment)
            .max_receive_message_len(-1)
            .connect(&format!("unix:{}", address.display()));
        Ok(Self { client: Client::new(channel), address: address.to_owned(), listener })
    }

    pub fn listener(&self) -> Option<PeerProcess> {
        self.listener
    }

    pub fn call<Q: 'static, R: Unpin + 'static>(&self, method: &Method<Q, R>, request: &Q) -> Result<R> {
        self.call_within(CALL_LIMIT, "", method, request)
    }

    /// Does what `call` does, in a containerd namespace.
    pub fn call_in<Q: 'static, R: Unpin + 'static>(
        &self,
        namespace: &str,
        method: &Method<Q, R>,
        request: &Q,
    ) -> Result<R> {
        self.call_within(CALL_LIMIT, namespace, method, request)
    }

    pub fn call_within<Q: 'static, R: Unpin + 'static>(
        &self,
        limit: Duration,
        namespace: &str,
        method: &Method<Q, R>,
        request: &Q,
    ) -> Result<R> {
        let mut headers = MetadataBuilder::new();
        if !namespace.is_empty() {
            // containerd only has namespaces whose names are valid in a header.
            let _ = headers.add_str("containerd-namespace", namespace);
        }
        let option = CallOption::default().timeout(limit).headers(headers.build());
        self.client.unary_call(method, request, option).map_err(|error| match error {
            grpcio::Error::RpcFailure(status) if status.code() == RpcStatusCode::UNIMPLEMENTED => {
                Error::NotOurs { address: self.address.clone() }
            }
            grpcio::Error::RpcFailure(status) => {
                Error::Call { method: method.name, code: status.code(), message: status.message().to_owned() }
            }
            other => Error::Call { method: method.name, code: RpcStatusCode::UNKNOWN, message: other.to_string() },
        })
    }
}

/// A connection to the daemon.
pub struct AdminClient(GrpcClient);

impl AdminClient {
    /// Connects, and fails soon if the daemon hangs. Later calls may take long, so they cannot tell.
    pub fn connect(address: &Path) -> Result<Self> {
        let client = GrpcClient::connect(address)?;
        match client.call_within(HEALTH_LIMIT, "", &service::HEALTH_CHECK, &HealthCheckRequest::new()) {
            Err(Error::Call { code: RpcStatusCode::DEADLINE_EXCEEDED, .. }) => {
                Err(Error::Silent { address: address.to_owned() })
            }
            // Whatever else is wrong, the next call reports it.
            Ok(_) | Err(_) => Ok(Self(client)),
        }
    }

    pub fn describe(&self) -> Result<DescribeResponse> {
        self.0.call(&service::DESCRIBE, &DescribeRequest::new())
    }

    /// All snapshots. `progress` is called with the number of those received so far.
    pub fn snapshots(&self, ask_repositories: bool, mut progress: impl FnMut(usize)) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        let mut request = SnapshotsRequest { ask_repositories, ..SnapshotsRequest::default() };
        loop {
            let mut page = self.0.call(&service::SNAPSHOTS, &request)?;
            all.append(&mut page.snapshots);
            progress(all.len());
            if page.next == 0 {
                return Ok(all);
            }
            (request.next, request.last) = (page.next, page.last);
        }
    }

    pub fn leftovers(&self) -> Result<Vec<Leftover>> {
        let mut all = Vec::new();
        let mut request = LeftoversRequest::new();
        loop {
            let mut page = self.0.call(&service::LEFTOVERS, &request)?;
            all.append(&mut page.leftovers);
            if page.next == 0 {
                return Ok(all);
            }
            request.next = page.next;
        }
    }

    pub fn clean_up(&self) -> Result<()> {
        self.0.call_within(LONG_CALL_LIMIT, "", &service::CLEANUP, &CleanupRequest::new()).map(drop)
    }

    /// The bytes that a snapshot uses on disk, or None if it was removed meanwhile.
    pub fn usage(&self, key: &str) -> Result<Option<u64>> {
        let request = UsageRequest { key: key.to_owned(), ..UsageRequest::default() };
        match self.0.call_within(LONG_CALL_LIMIT, "", &service::USAGE, &request) {
            Ok(usage) => Ok(u64::try_from(usage.size).ok()),
            Err(Error::Call { code: RpcStatusCode::NOT_FOUND | RpcStatusCode::UNAVAILABLE, .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }
}
