//! List: a stream of messages that is read and sent page by page.
//!
//! A worker reads a page. A thread of gRPC sends it as fast as the client takes it, and asks for the next page when
//! all of it was sent. It must not know how pages are found. Its invariants:
//! - A client that does not read holds one page, whose memory is reserved, and no worker.
//! - A stream that has begun is not refused because the daemon is busy.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use futures_channel::oneshot;
use futures_util::SinkExt;
use grpcio::{Deadline, DuplexSink, ServiceBuilder, WriteFlags};
use protobuf::Message;

use super::filters::{self, Filters};
use super::handlers::{CallResult, Handlers};
use super::listener::ConnectionId;
use super::memory_budget::MemoryReservation;
use super::request::{DecodedRequest, IncomingCall, limit_fields};
use super::send_gate::{SendGate, SendGuard};
use super::status::CallError;
use super::{convert, outcome, service};
use crate::metrics::METRICS;
use crate::model::Snapshot;
use crate::proto::snapshots::{ListSnapshotsRequest, ListSnapshotsResponse};
use crate::snapshotter::{self, Cursor, MAX_PAGE_BYTES, Snapshotter};
use crate::worker_pool::JobError;

/// Snapshots in one message.
const MAX_MESSAGE_SNAPSHOTS: usize = 100;
/// No further snapshot is added to a message of this size.
const FULL_MESSAGE_BYTES: u64 = 1 << 20;

const METHOD: &str = service::LIST.name;

type PageSender = oneshot::Sender<CallResult<ListPage>>;
type PageReceiver = oneshot::Receiver<CallResult<ListPage>>;

/// One page, which is to be sent.
struct ListPage {
    snapshots: Vec<Snapshot>,
    send_guard: SendGuard,
    state: ListState,
    /// Where the next page begins. `None`: this is the last page.
    cursor: Option<Cursor>,
}

/// What one List keeps between its pages.
struct ListState {
    filters: Filters,
    filter_bytes: usize,
    /// It covers the request, the filters and one page.
    reservation: MemoryReservation,
    send_gate: Arc<SendGate>,
    connection: Option<ConnectionId>,
}

impl Handlers {
    pub(super) fn add_list(&self, service: ServiceBuilder) -> ServiceBuilder {
        METRICS.init_method(METHOD);
        let handlers = self.clone();
        service.add_duplex_streaming_handler(&limit_fields(&service::LIST), move |context, messages, sink| {
            let call = IncomingCall::new(&context, messages);
            context.spawn(serve(handlers.clone(), call, sink));
        })
    }

    /// Has a worker read the first page.
    fn read_first_page(
        &self,
        connection: Option<ConnectionId>,
        deadline: Deadline,
        request: DecodedRequest<ListSnapshotsRequest>,
    ) -> PageReceiver {
        let (page_sender, page) = oneshot::channel();
        let (request, reservation) = match self.admit(request) {
            Ok(admitted) => admitted,
            Err(error) => {
                drop(page_sender.send(Err(error)));
                return page;
            }
        };
        let (snapshotter, send_gate) = (Arc::clone(&self.snapshotter), Arc::clone(&self.send_gate));
        self.workers.submit(
            move || deadline.exceeded(),
            move || {
                let state = ListState::new(&request.filters, reservation, send_gate, connection)?;
                state.read_page(snapshotter.wait(), None)
            },
            move |result| pass_on(page_sender, result),
        );
        page
    }

    /// Has a worker read the page at `cursor`. The queue is never too full for that.
    fn read_next_page(&self, deadline: Deadline, state: ListState, cursor: Cursor) -> PageReceiver {
        let (page_sender, page) = oneshot::channel();
        let snapshotter = Arc::clone(&self.snapshotter);
        self.workers.submit_continuation(
            move || deadline.exceeded(),
            move || state.read_page(snapshotter.wait(), Some(cursor)),
            move |result| pass_on(page_sender, result),
        );
        page
    }
}

fn pass_on(page_sender: PageSender, result: Result<CallResult<ListPage>, JobError>) {
    // The receiver is gone if the client went away.
    drop(page_sender.send(result.map_err(CallError::from).flatten()));
}

/// Serves one call, on a thread of gRPC except for the reading.
async fn serve(
    handlers: Handlers,
    mut call: IncomingCall<ListSnapshotsRequest>,
    sink: DuplexSink<ListSnapshotsResponse>,
) {
    let request = match call.receive().await {
        Ok(request) => request,
        Err(status) => return drop(sink.fail(status).await),
    };
    let mut stream = ListStream { sink, received: Instant::now(), snapshots_sent: 0 };
    let mut page = handlers.read_first_page(call.connection, call.deadline, request);
    loop {
        let ListPage { snapshots, send_guard, state, cursor } = match page.await {
            Ok(Ok(page)) => page,
            Ok(Err(error)) => return stream.fail(&error).await,
            Err(oneshot::Canceled) => return,
        };
        if stream.send(snapshots).await.is_err() {
            return stream.record_cancelled();
        }
        let Some(cursor) = cursor else { return stream.close().await };
        drop(send_guard);
        // A page may have no match. Then nothing was sent, and only a flush shows whether the client is still there.
        if stream.sink.flush().await.is_err() {
            return stream.record_cancelled();
        }
        page = handlers.read_next_page(call.deadline, state, cursor);
    }
}

/// The messages on their way to the client.
struct ListStream {
    sink: DuplexSink<ListSnapshotsResponse>,
    received: Instant,
    snapshots_sent: usize,
}

impl ListStream {
    async fn send(&mut self, snapshots: Vec<Snapshot>) -> grpcio::Result<()> {
        let mut snapshots = snapshots.into_iter();
        while let Some(message) = next_message(&mut snapshots) {
            self.snapshots_sent += message.info.len();
            self.sink.send((message, WriteFlags::default())).await?;
        }
        Ok(())
    }

    async fn close(mut self) {
        let elapsed = self.received.elapsed();
        match self.sink.close().await {
            Ok(()) => outcome::record_success(METHOD, elapsed),
            Err(_) => self.record_cancelled(),
        }
    }

    async fn fail(self, error: &CallError) {
        let status = outcome::record_failure(METHOD, self.received.elapsed(), error);
        drop(self.sink.fail(status).await);
    }

    fn record_cancelled(self) {
        outcome::record_cancelled(METHOD, self.received.elapsed());
        let snapshots_sent = self.snapshots_sent;
        log::debug!(
            event = "list_cancelled", method = METHOD, snapshots_sent;
            "the client went away after {snapshots_sent} snapshots were sent"
        );
    }
}

fn next_message(snapshots: &mut impl Iterator<Item = Snapshot>) -> Option<ListSnapshotsResponse> {
    let mut message = ListSnapshotsResponse::default();
    let mut bytes = 0;
    while message.info.len() < MAX_MESSAGE_SNAPSHOTS && bytes < FULL_MESSAGE_BYTES {
        let Some(snapshot) = snapshots.next() else { break };
        let info = convert::info(snapshot);
        bytes += info.compute_size();
        message.info.push(info);
    }
    (!message.info.is_empty()).then_some(message)
}

impl ListState {
    fn new(
        filters: &[String],
        mut reservation: MemoryReservation,
        send_gate: Arc<SendGate>,
        connection: Option<ConnectionId>,
    ) -> CallResult<Self> {
        let filter_bytes = filters::estimate_memory(filters);
        reservation.resize_response(filter_bytes)?;
        let filters = Filters::parse(filters)
            .map_err(|error| snapshotter::Error::InvalidFilter { why: error.to_string(), filter: error.filter })?;
        Ok(Self { filters, filter_bytes, reservation, send_gate, connection })
    }

    /// Reads the page at `cursor`, or the first page.
    fn read_page(mut self, snapshotter: &Snapshotter, cursor: Option<Cursor>) -> CallResult<ListPage> {
        // The copy shares the compiled regular expressions. The memory that these need while they search belongs to
        // the copy, and is released with it.
        let filters = self.filters.clone();
        let matches = |snapshot: &Snapshot| filters.matches(snapshot);
        let page = match cursor {
            None => snapshotter.list(filters.reference_and_parent(), matches)?,
            Some(cursor) => snapshotter.next_page(cursor, matches)?,
        };
        // The memory of further pages is reserved with the first one, while the call can still be refused. Later only
        // a snapshot that is larger than a page can be refused.
        let page_bytes = if page.cursor.is_some() { page.bytes.max(MAX_PAGE_BYTES) } else { page.bytes };
        self.reservation.resize_response(page_bytes + self.filter_bytes)?;
        let send_guard = self.send_gate.begin_send(self.connection);
        Ok(ListPage { snapshots: page.snapshots, send_guard, state: self, cursor: page.cursor })
    }
}
