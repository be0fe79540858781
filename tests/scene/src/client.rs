//! A client of the snapshots service, on the snapshotter's own socket or on containerd's.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cvmfs_snapshotter::proto::health::HealthCheckRequest;
use cvmfs_snapshotter::proto::health::health_check_response::ServingStatus;
use cvmfs_snapshotter::proto::mount::Mount;
use cvmfs_snapshotter::proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest,
    ViewSnapshotRequest,
};
use cvmfs_snapshotter::server::service;
use futures_util::StreamExt;
use grpcio::{
    CallOption, Channel, ChannelBuilder, ClientSStreamReceiver, EnvBuilder, MetadataBuilder, Method, RpcStatus,
    RpcStatusCode,
};
use protobuf::well_known_types::field_mask::FieldMask;

use crate::image::Image;

pub const REF: &str = "containerd.io/snapshot.ref";
pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
pub const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";

pub type CallResult<T> = Result<T, RpcStatus>;

#[derive(Clone)]
pub struct Client {
    grpc: grpcio::Client,
    channel: Channel,
    timeout: Duration,
    /// The namespace of containerd, for a client of containerd's own service.
    namespace: Option<&'static str>,
    snapshotter: &'static str,
}

pub fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

pub fn connect(socket: &Path) -> Channel {
    connect_with(socket, |channel| channel)
}

/// Connects like `connect`, with a channel that `configure` has changed.
pub fn connect_with(socket: &Path, configure: impl FnOnce(ChannelBuilder) -> ChannelBuilder) -> Channel {
    let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
    let channel = ChannelBuilder::new(environment)
        // Subchannels are shared by default, and with them the pause before the next attempt to connect: a new client
        // would wait because an old one could not connect.
        .use_local_subchannel_pool(true)
        .max_receive_message_len(-1)
        .max_send_message_len(-1);
    configure(channel).connect(&format!("unix:{}", socket.display()))
}

pub fn call<Q: 'static, R: Unpin + 'static>(
    grpc: &grpcio::Client,
    method: &Method<Q, R>,
    request: &Q,
    option: CallOption,
) -> CallResult<R> {
    grpc.unary_call(method, request, option).map_err(status)
}

fn status(error: grpcio::Error) -> RpcStatus {
    match error {
        grpcio::Error::RpcFailure(status) => status,
        other => RpcStatus::with_message(RpcStatusCode::UNKNOWN, format!("no status: {other:?}")),
    }
}

/// The stream of a List call. Each item is the snapshots of one message.
pub struct ListStream {
    stream: ClientSStreamReceiver<ListSnapshotsResponse>,
    /// The stream ends when its channel is dropped.
    _channel: Channel,
}

impl Iterator for ListStream {
    type Item = CallResult<Vec<Info>>;

    fn next(&mut self) -> Option<Self::Item> {
        futures_executor::block_on(self.stream.next()).map(|message| message.map(|m| m.info).map_err(status))
    }
}

impl Client {
    pub fn connect(socket: &Path) -> Self {
        Self::from_channel(connect(socket))
    }

    /// Connects with a fixed flow-control window: gRPC then buffers 64 KiB of an unread stream, not 5 MiB.
    pub fn connect_with_small_window(socket: &Path) -> Self {
        Self::from_channel(connect_with(socket, |channel| channel.http2_bdp_probe(false)))
    }

    fn from_channel(channel: Channel) -> Self {
        let grpc = grpcio::Client::new(channel.clone());
        Self { grpc, channel, timeout: Duration::from_mins(1), namespace: None, snapshotter: "" }
    }

    /// Connects to containerd's own snapshots service, which forwards calls to `snapshotter`.
    pub fn connect_to_containerd(socket: &Path, namespace: &'static str, snapshotter: &'static str) -> Self {
        Self { namespace: Some(namespace), snapshotter, ..Self::connect(socket) }
    }

    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    fn option(&self) -> CallOption {
        let mut headers = MetadataBuilder::new();
        if let Some(namespace) = self.namespace {
            headers.add_str("containerd-namespace", namespace).expect("a namespace is a header value");
        }
        CallOption::default().timeout(self.timeout).headers(headers.build())
    }

    pub fn call<Q: 'static, R: Unpin + 'static>(&self, method: &Method<Q, R>, request: &Q) -> CallResult<R> {
        call(&self.grpc, method, request, self.option())
    }

    pub fn prepare(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> CallResult<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
            ..PrepareSnapshotRequest::default()
        };
        self.call(&service::PREPARE, &request).map(|answer| answer.mounts)
    }

    pub fn view(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> CallResult<Vec<Mount>> {
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
            ..ViewSnapshotRequest::default()
        };
        self.call(&service::VIEW, &request).map(|answer| answer.mounts)
    }

    pub fn mounts(&self, key: &str) -> CallResult<Vec<Mount>> {
        let request =
            MountsRequest { snapshotter: self.snapshotter.to_owned(), key: key.to_owned(), ..MountsRequest::default() };
        self.call(&service::MOUNTS, &request).map(|answer| answer.mounts)
    }

    pub fn commit(&self, name: &str, key: &str, with: &[(&str, &str)]) -> CallResult<()> {
        self.commit_on(name, key, "", with)
    }

    pub fn commit_on(&self, name: &str, key: &str, parent: &str, with: &[(&str, &str)]) -> CallResult<()> {
        let request = CommitSnapshotRequest {
            name: name.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
            ..CommitSnapshotRequest::default()
        };
        self.call(&service::COMMIT, &request).map(drop)
    }

    pub fn remove(&self, key: &str) -> CallResult<()> {
        let request = RemoveSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            ..RemoveSnapshotRequest::default()
        };
        self.call(&service::REMOVE, &request).map(drop)
    }

    pub fn stat(&self, key: &str) -> CallResult<Info> {
        let request = StatSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            ..StatSnapshotRequest::default()
        };
        self.call(&service::STAT, &request).map(|answer| answer.info.unwrap_or_default())
    }

    pub fn update(&self, info: Info, paths: &[&str]) -> CallResult<Info> {
        let mask = FieldMask { paths: paths.iter().map(|&p| p.to_owned()).collect(), ..FieldMask::default() };
        let request = UpdateSnapshotRequest {
            info: Some(info).into(),
            update_mask: Some(mask).into(),
            ..UpdateSnapshotRequest::default()
        };
        self.call(&service::UPDATE, &request).map(|answer| answer.info.unwrap_or_default())
    }

    pub fn usage(&self, key: &str) -> CallResult<(i64, i64)> {
        let request =
            UsageRequest { snapshotter: self.snapshotter.to_owned(), key: key.to_owned(), ..UsageRequest::default() };
        self.call(&service::USAGE, &request).map(|answer| (answer.size, answer.inodes))
    }

    pub fn cleanup(&self) -> CallResult<()> {
        self.call(&service::CLEANUP, &CleanupRequest::default()).map(drop)
    }

    /// Whether the daemon's health service reports `service`, which may be a repository, as serving.
    pub fn is_serving(&self, service: &str) -> bool {
        let request = HealthCheckRequest { service: service.to_owned(), ..HealthCheckRequest::default() };
        let answer = self.call(&service::HEALTH_CHECK, &request).expect("health is answered");
        answer.status.enum_value_or_default() == ServingStatus::SERVING
    }

    /// Starts a List whose messages are read one at a time.
    pub fn open_list(&self, filters: &[&str]) -> CallResult<ListStream> {
        let request = ListSnapshotsRequest {
            snapshotter: self.snapshotter.to_owned(),
            filters: filters.iter().map(|&f| f.to_owned()).collect(),
            ..ListSnapshotsRequest::default()
        };
        let stream = self.grpc.server_streaming(&service::LIST, &request, self.option()).map_err(status)?;
        Ok(ListStream { stream, _channel: self.channel.clone() })
    }

    /// All messages of a List, each with its snapshots.
    pub fn list_batches(&self, filters: &[&str]) -> CallResult<Vec<Vec<Info>>> {
        self.open_list(filters)?.collect()
    }

    pub fn list(&self, filters: &[&str]) -> CallResult<Vec<Info>> {
        Ok(self.list_batches(filters)?.into_iter().flatten().collect())
    }

    /// Pulls a published layer as containerd does: it calls Prepare, gets AlreadyExists, and looks up the snapshot that
    /// stands for the layer. The result is the name of that snapshot.
    #[track_caller]
    pub fn pull_remote(&self, key: &str, parent: &str, reference: &str, digest: &str) -> String {
        self.pull_remote_with_labels(key, parent, reference, digest, &[])
    }

    #[track_caller]
    fn pull_remote_with_labels(
        &self,
        key: &str,
        parent: &str,
        reference: &str,
        digest: &str,
        more: &[(&str, &str)],
    ) -> String {
        let result = self.prepare(key, parent, &[&[(REF, reference), (LAYER_DIGEST, digest)], more].concat());
        let status = result.expect_err("a published layer is not unpacked");
        assert_eq!(status.code(), RpcStatusCode::ALREADY_EXISTS, "{}", status.message());
        let filter = format!("labels.\"{REF}\"=={reference},parent=={parent:?},kind==committed");
        let snapshots = self.list(&[&filter]).expect("the filter is containerd's own");
        assert_eq!(snapshots.len(), 1, "one snapshot stands for (ref, parent)");
        snapshots[0].name.clone()
    }

    /// Pulls each layer of a published image as `pull_remote` does, with the image's reference as a label.
    #[track_caller]
    pub fn pull_image(&self, image: &Image, reference: &str) -> String {
        image.chain_ids.iter().zip(&image.layers).fold(String::new(), |parent, (chain_id, layer)| {
            let key = format!("extract {chain_id}");
            self.pull_remote_with_labels(&key, &parent, chain_id, &layer.digest, &[(IMAGE_REF, reference)])
        })
    }
}
