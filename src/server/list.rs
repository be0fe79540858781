//! List: a stream of messages, read and sent page by page.
//!
//! A worker reads a page; grpcio's thread sends it as fast as the client takes it, and asks for
//! the next one when all of it was sent. So a client that does not read holds one page, which
//! is counted, and no worker. A stream that has begun is refused nothing that it needs to end.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use futures_channel::oneshot;
use futures_util::SinkExt;
use grpcio::{Deadline, DuplexSink, WriteFlags};
use protobuf::Message;

use super::filters::{self, Filters};
use super::handlers::{CallResult, Handlers, failed};
use super::memory_budget::{MemoryReservation, SendGuard};
use super::request::IncomingCall;
use super::status::{CallError, Code};
use super::{convert, service};
use crate::metrics::METRICS;
use crate::model::Snapshot;
use crate::proto::snapshots::{ListSnapshotsRequest, ListSnapshotsResponse};
use crate::snapshotter::{self, Cursor, MAX_PAGE_BYTES, Snapshotter};

/// Snapshots in one message, and bytes after which one is sent.
const BATCH: usize = 100;
const BATCH_BYTES: u64 = 1 << 20;

/// What one List keeps between its pages.
struct ListState {
    filters: Filters,
    /// What the filters take.
    memory: usize,
    reservation: MemoryReservation,
}

/// A page on its way.
struct ListPage {
    found: Vec<Snapshot>,
    sending: SendGuard,
    listing: ListState,
    rest: Option<Cursor>,
}

type PageReceiver = oneshot::Receiver<CallResult<ListPage>>;

impl Handlers {
    pub(super) async fn list(
        self,
        mut call: IncomingCall<ListSnapshotsRequest>,
        mut sink: DuplexSink<ListSnapshotsResponse>,
    ) {
        let request = match call.message().await {
            Ok(request) => request,
            Err(status) => return drop(sink.fail(status).await),
        };
        let (deadline, since) = (call.deadline, Instant::now());
        let mut answered = self.begin_list(deadline, self.admit(call.connection, request));
        let mut sent = 0;
        loop {
            let ListPage { found, sending, listing, rest } = match answered.await {
                Ok(Ok(part)) => part,
                Ok(Err(failure)) => return drop(sink.fail(failed(service::LIST.name, since, &failure)).await),
                Err(oneshot::Canceled) => return,
            };
            let mut found = found.into_iter();
            while let Some(batch) = next_message(&mut found) {
                sent += batch.info.len();
                if sink.send((batch, WriteFlags::default())).await.is_err() {
                    return abandoned(since, sent);
                }
            }
            let Some(rest) = rest else {
                let took = since.elapsed();
                match sink.close().await {
                    Ok(()) => METRICS.record_call(service::LIST.name, Code::Ok.name(), took),
                    Err(_) => abandoned(since, sent),
                }
                return drop((sending, listing));
            };
            drop(sending);
            // Nothing may have been sent: this asks whether the client is there at all.
            if sink.flush().await.is_err() {
                return abandoned(since, sent);
            }
            answered = self.continue_list(deadline, listing, rest);
        }
    }

    fn begin_list(
        &self,
        deadline: Deadline,
        admitted: CallResult<(ListSnapshotsRequest, MemoryReservation)>,
    ) -> PageReceiver {
        let (answer, answered) = oneshot::channel();
        match admitted {
            Err(failure) => drop(answer.send(Err(failure))),
            Ok((request, reservation)) => {
                let snapshotter = Arc::clone(&self.snapshotter);
                self.pool.submit(
                    move || deadline.exceeded(),
                    move || ListState::begin(&request.filters, reservation)?.read(snapshotter.wait(), None),
                    move |result| drop(answer.send(result.unwrap_or_else(|refusal| Err(CallError::Pool(refusal))))),
                );
            }
        }
        answered
    }

    fn continue_list(&self, deadline: Deadline, listing: ListState, rest: Cursor) -> PageReceiver {
        let (answer, answered) = oneshot::channel();
        let snapshotter = Arc::clone(&self.snapshotter);
        self.pool.submit_continuation(
            move || deadline.exceeded(),
            move || listing.read(snapshotter.wait(), Some(rest)),
            move |result| drop(answer.send(result.unwrap_or_else(|refusal| Err(CallError::Pool(refusal))))),
        );
        answered
    }
}

impl ListState {
    fn begin(texts: &[String], mut reservation: MemoryReservation) -> CallResult<Self> {
        let memory = filters::estimate_memory(texts);
        reservation.resize_answer(memory)?;
        let filters = Filters::parse(texts).map_err(|invalid| snapshotter::Error::InvalidFilter {
            why: invalid.to_string(),
            filter: invalid.filter,
        })?;
        Ok(Self { filters, memory, reservation })
    }

    /// The next page: what is left, or the first one.
    fn read(mut self, snapshotter: &Snapshotter, rest: Option<Cursor>) -> CallResult<ListPage> {
        // A copy shares what was compiled, and takes what regular expressions need while they
        // search along with it.
        let filters = self.filters.clone();
        let matches = |snapshot: &Snapshot| filters.matches(snapshot);
        let page = match rest {
            None => snapshotter.list(filters.reference_and_parent(), matches)?,
            Some(rest) => snapshotter.next_page(rest, matches)?,
        };
        // What further pages take is counted now, while it can be refused: later only a snapshot
        // that is more than a page can be too much.
        let weight = match page.cursor {
            None => page.bytes,
            Some(_) => page.bytes.max(MAX_PAGE_BYTES),
        };
        self.reservation.resize_answer(weight + self.memory)?;
        let sending = self.reservation.begin_send();
        Ok(ListPage { found: page.snapshots, sending, listing: self, rest: page.cursor })
    }
}

fn next_message(found: &mut impl Iterator<Item = Snapshot>) -> Option<ListSnapshotsResponse> {
    let mut batch = ListSnapshotsResponse::default();
    let mut bytes = 0;
    while batch.info.len() < BATCH && bytes < BATCH_BYTES {
        let Some(snapshot) = found.next() else { break };
        let info = convert::info(snapshot);
        bytes += info.compute_size();
        batch.info.push(info);
    }
    (!batch.info.is_empty()).then_some(batch)
}

fn abandoned(since: Instant, sent: usize) {
    METRICS.record_call(service::LIST.name, Code::Cancelled.name(), since.elapsed());
    log::debug!(method = service::LIST.name; "the client went away, {sent} snapshots were sent to it");
}
