//! The client of the daemon for the administrator's commands.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::Duration;

use grpcio::RpcStatusCode;

use super::grpc_client::HEALTH_LIMIT;
pub use super::grpc_client::{Error, GrpcClient, PeerProcess, Result};
use crate::proto::admin::{DescribeRequest, DescribeResponse, Leftover, LeftoversRequest, Snapshot, SnapshotsRequest};
use crate::proto::health::HealthCheckRequest;
use crate::proto::snapshots::{CleanupRequest, UsageRequest};
use crate::server::service;

/// Deadline of calls that remove or measure files, which takes as long as it takes.
const LONG_CALL_LIMIT: Duration = Duration::from_secs(24 * 3600);

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
