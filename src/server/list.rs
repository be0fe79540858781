//! List: a stream of messages, read and sent chunk by chunk.
//!
//! A worker reads a chunk; grpcio's thread sends it as fast as the client takes it, and asks for
//! the next one when all of it was sent. So a client that does not read holds one chunk, which
//! is counted, and no worker. A stream that has begun is refused nothing that it needs to end.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use futures_channel::oneshot;
use futures_util::SinkExt;
use grpcio::{Deadline, DuplexSink, WriteFlags};
use protobuf::Message;

use super::filters::{self, Filters};
use super::handlers::{Handlers, Outcome, failed};
use super::load::{Burden, Sending};
use super::request::Begun;
use super::status::{Code, Failure};
use super::{convert, service};
use crate::metrics::METRICS;
use crate::proto::snapshots::{ListSnapshotsRequest, ListSnapshotsResponse};
use crate::snapshotter::{self, CHUNK_BYTES, Rest, Snapshotter};
use crate::types::Snapshot;

/// Snapshots in one message, and bytes after which one is sent.
const BATCH: usize = 100;
const BATCH_BYTES: u64 = 1 << 20;

/// What one List keeps between its chunks.
struct Listing {
    filters: Filters,
    /// What the filters take.
    memory: usize,
    burden: Burden,
}

/// A chunk on its way.
struct Part {
    found: Vec<Snapshot>,
    sending: Sending,
    listing: Listing,
    rest: Option<Rest>,
}

type Answered = oneshot::Receiver<Outcome<Part>>;

impl Handlers {
    pub(super) async fn list(self, mut call: Begun<ListSnapshotsRequest>, mut sink: DuplexSink<ListSnapshotsResponse>) {
        let request = match call.message().await {
            Ok(request) => request,
            Err(status) => return drop(sink.fail(status).await),
        };
        let (deadline, since) = (call.deadline, Instant::now());
        let mut answered = self.begin_list(deadline, self.admit(call.connection, request));
        let mut sent = 0;
        loop {
            let Part { found, sending, listing, rest } = match answered.await {
                Ok(Ok(part)) => part,
                Ok(Err(failure)) => return drop(sink.fail(failed(service::LIST.name, since, &failure)).await),
                Err(oneshot::Canceled) => return,
            };
            let mut found = found.into_iter();
            while let Some(batch) = next_batch(&mut found) {
                sent += batch.info.len();
                if sink.send((batch, WriteFlags::default())).await.is_err() {
                    return abandoned(since, sent);
                }
            }
            let Some(rest) = rest else {
                let took = since.elapsed();
                match sink.close().await {
                    Ok(()) => METRICS.called(service::LIST.name, Code::Ok.name(), took),
                    Err(_) => abandoned(since, sent),
                }
                return drop((sending, listing));
            };
            drop(sending);
            // Nothing may have been sent: this asks whether the client is there at all.
            if sink.flush().await.is_err() {
                return abandoned(since, sent);
            }
            answered = self.go_on_with_list(deadline, listing, rest);
        }
    }

    fn begin_list(&self, deadline: Deadline, admitted: Outcome<(ListSnapshotsRequest, Burden)>) -> Answered {
        let (answer, answered) = oneshot::channel();
        match admitted {
            Err(failure) => drop(answer.send(Err(failure))),
            Ok((request, burden)) => {
                let snapshotter = Arc::clone(&self.snapshotter);
                self.pool.submit(
                    move || deadline.exceeded(),
                    move || Listing::begin(&request.filters, burden)?.read(snapshotter.wait(), None),
                    move |result| drop(answer.send(result.unwrap_or_else(|refusal| Err(Failure::Pool(refusal))))),
                );
            }
        }
        answered
    }

    fn go_on_with_list(&self, deadline: Deadline, listing: Listing, rest: Rest) -> Answered {
        let (answer, answered) = oneshot::channel();
        let snapshotter = Arc::clone(&self.snapshotter);
        self.pool.go_on(
            move || deadline.exceeded(),
            move || listing.read(snapshotter.wait(), Some(rest)),
            move |result| drop(answer.send(result.unwrap_or_else(|refusal| Err(Failure::Pool(refusal))))),
        );
        answered
    }
}

impl Listing {
    fn begin(texts: &[String], mut burden: Burden) -> Outcome<Self> {
        let memory = filters::estimate_memory(texts);
        burden.hold(memory)?;
        let filters = Filters::parse(texts).map_err(|invalid| snapshotter::Error::InvalidFilter {
            why: invalid.to_string(),
            filter: invalid.filter,
        })?;
        Ok(Self { filters, memory, burden })
    }

    /// The next chunk: what is left, or the first one.
    fn read(mut self, snapshotter: &Snapshotter, rest: Option<Rest>) -> Outcome<Part> {
        // A copy shares what was compiled, and takes what regular expressions need while they
        // search along with it.
        let filters = self.filters.clone();
        let matches = |snapshot: &Snapshot| filters.matches(snapshot);
        let chunk = match rest {
            None => snapshotter.list(filters.reference_and_parent(), matches)?,
            Some(rest) => snapshotter.list_rest(rest, matches)?,
        };
        // What further chunks take is counted now, while it can be refused: later only a snapshot
        // that is more than a chunk can be too much.
        let weight = match chunk.rest {
            None => chunk.bytes,
            Some(_) => chunk.bytes.max(CHUNK_BYTES),
        };
        self.burden.hold(weight + self.memory)?;
        let sending = self.burden.answer();
        Ok(Part { found: chunk.found, sending, listing: self, rest: chunk.rest })
    }
}

fn next_batch(found: &mut impl Iterator<Item = Snapshot>) -> Option<ListSnapshotsResponse> {
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
    METRICS.called(service::LIST.name, Code::Cancelled.name(), since.elapsed());
    log::debug!(method = service::LIST.name; "the client went away, {sent} snapshots were sent to it");
}
