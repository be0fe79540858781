//! What an admin's commands ask the daemon over its socket, and how they say that it is not there.
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

/// The daemon waits for repositories longer than this only if they answer, slowly.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// The daemon says how it is at once, even during its start, unless it hangs.
const HEALTH_LIMIT: Duration = Duration::from_secs(15);
/// To get a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Deleting and measuring take as long as they take.
const LONG_CALL_LIMIT: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug)]
pub enum Error {
    /// Nobody listens.
    NotRunning {
        address: PathBuf,
        cause: io::Error,
    },
    /// Somebody else does, or an older version of us.
    NotOurs {
        address: PathBuf,
    },
    /// It took the call.
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
                write!(f, "only root may ask the daemon at {}: {cause}", address.display())
            }
            Self::NotRunning { address, cause } => write!(
                f,
                "no daemon serves {}: {cause}; start it with \"systemctl start cvmfs-snapshotter\", or say where it is \
                 with --address",
                address.display()
            ),
            Self::NotOurs { address } => write!(
                f,
                "what serves {} does not know this question: it is the Go snapshotter, or an older version of this one \
                 that was not restarted",
                address.display()
            ),
            Self::Silent { address } => write!(
                f,
                "the daemon at {} takes calls and does not answer within {} s, it is very busy or hangs: see its log, and restart \
                 it if that lasts",
                address.display(),
                HEALTH_LIMIT.as_secs()
            ),
            Self::Call { method, code, message } => write!(f, "no answer to {method}: {code}: {message}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// A gRPC server behind a unix socket: our daemon, or a containerd.
pub struct GrpcClient {
    client: Client,
    address: PathBuf,
    listener: Option<PeerProcess>,
}

/// The process that listens, as the kernel says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerProcess {
    pub pid: u32,
    pub uid: u32,
}

/// Waits a while where many wait.
fn connect(address: &Path) -> io::Result<UnixStream> {
    let until = Instant::now() + CONNECT_LIMIT;
    loop {
        match unix_socket::connect(address) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it takes no connections: it hangs"));
            }
            result => return result,
        }
    }
}

impl GrpcClient {
    pub fn connect(address: &Path) -> Result<Self> {
        // gRPC would try for long, and say little.
        let there = connect(address).map_err(|cause| Error::NotRunning { address: address.to_owned(), cause })?;
        let credentials = getsockopt(&there, PeerCredentials).ok();
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

    /// As `call`, in a namespace of containerd.
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
            // containerd allows names of letters, digits and a few signs.
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

/// Our daemon.
pub struct AdminClient(GrpcClient);

impl AdminClient {
    /// Fails soon if the daemon hangs: what is asked later may take long.
    pub fn connect(address: &Path) -> Result<Self> {
        let peer = GrpcClient::connect(address)?;
        match peer.call_within(HEALTH_LIMIT, "", &service::HEALTH_CHECK, &HealthCheckRequest::new()) {
            Err(Error::Call { code: RpcStatusCode::DEADLINE_EXCEEDED, .. }) => {
                Err(Error::Silent { address: address.to_owned() })
            }
            // Others tell later what is wrong with what they were asked.
            Ok(_) | Err(_) => Ok(Self(peer)),
        }
    }

    pub fn describe(&self) -> Result<DescribeResponse> {
        self.0.call(&service::DESCRIBE, &DescribeRequest::new())
    }

    /// All snapshots. `progress` hears how many there are so far.
    pub fn snapshots(&self, ask_repositories: bool, mut progress: impl FnMut(usize)) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        let mut request = SnapshotsRequest { ask_repositories, ..SnapshotsRequest::default() };
        loop {
            let mut answer = self.0.call(&service::SNAPSHOTS, &request)?;
            all.append(&mut answer.snapshots);
            progress(all.len());
            if answer.next == 0 {
                return Ok(all);
            }
            (request.next, request.last) = (answer.next, answer.last);
        }
    }

    pub fn leftovers(&self) -> Result<Vec<Leftover>> {
        let mut all = Vec::new();
        let mut request = LeftoversRequest::new();
        loop {
            let mut answer = self.0.call(&service::LEFTOVERS, &request)?;
            all.append(&mut answer.leftovers);
            if answer.next == 0 {
                return Ok(all);
            }
            request.next = answer.next;
        }
    }

    pub fn clean_up(&self) -> Result<()> {
        self.0.call_within(LONG_CALL_LIMIT, "", &service::CLEANUP, &CleanupRequest::new()).map(drop)
    }

    /// Bytes on disk. None: it is gone by now.
    pub fn usage(&self, key: &str) -> Result<Option<u64>> {
        let request = UsageRequest { key: key.to_owned(), ..UsageRequest::default() };
        match self.0.call_within(LONG_CALL_LIMIT, "", &service::USAGE, &request) {
            Ok(usage) => Ok(u64::try_from(usage.size).ok()),
            Err(Error::Call { code: RpcStatusCode::NOT_FOUND | RpcStatusCode::UNAVAILABLE, .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }
}
