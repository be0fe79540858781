//! Serves the methods that are answered with one message. `serve` is the path of every such call.
//!
//! It must not know any method: what a method does is a function in its `UnaryMethod`. Its invariants:
//! - No thread of gRPC waits, neither for a worker nor for a client.
//! - The memory of an admitted call stays reserved until its response was sent.
//! - A connection is marked as busy while the result of a job is sent on it. Marking may wait, so responses that a
//!   thread of gRPC may send are not marked: those to calls that were not admitted or came before the daemon was ready,
//!   and errors of a pool.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use grpcio::{ClientStreamingSink, ClientStreamingSinkResult, Method, ServiceBuilder};
use protobuf::Message;

use super::dispatch::{CallJob, Execute, FindDependency};
use super::handlers::{CallResult, Handlers};
use super::listener::ConnectionId;
use super::memory_budget::MemoryReservation;
use super::outcome;
use super::request::{IncomingCall, limit_fields};
use super::send_gate::{SendGate, SendGuard};
use super::status::CallError;
use crate::metrics::METRICS;

/// A method that is answered with one message.
pub struct UnaryMethod<Q: 'static, R: 'static> {
    method: &'static Method<Q, R>,
    execute: Execute<Q, R>,
    find_dependency: Option<FindDependency<Q>>,
    response_before_ready: Option<fn() -> R>,
}

impl<Q: 'static, R: 'static> UnaryMethod<Q, R> {
    pub fn new(method: &'static Method<Q, R>, execute: Execute<Q, R>) -> Self {
        Self { method, execute, find_dependency: None, response_before_ready: None }
    }

    /// Declares that a call may have to wait for repositories.
    pub fn may_wait_for(self, find_dependency: FindDependency<Q>) -> Self {
        Self { find_dependency: Some(find_dependency), ..self }
    }

    /// Declares the response to calls that come before the start of the daemon is over. Without it, such calls wait in
    /// the queue of the workers.
    pub fn answer_before_ready(self, response: fn() -> R) -> Self {
        Self { response_before_ready: Some(response), ..self }
    }
}

impl Handlers {
    pub(super) fn add_unary<Q: Message, R: Message>(
        &self,
        service: ServiceBuilder,
        method: UnaryMethod<Q, R>,
    ) -> ServiceBuilder {
        METRICS.init_method(method.method.name);
        let (handlers, definition) = (self.clone(), limit_fields(method.method));
        let method = Arc::new(method);
        service.add_client_streaming_handler(&definition, move |context, messages, sink| {
            let call = IncomingCall::new(&context, messages);
            context.spawn(serve(handlers.clone(), Arc::clone(&method), call, sink));
        })
    }
}

/// Serves one call, on a thread of gRPC except for the work itself.
async fn serve<Q: Message, R: Message>(
    handlers: Handlers,
    method: Arc<UnaryMethod<Q, R>>,
    mut call: IncomingCall<Q>,
    sink: ClientStreamingSink<R>,
) {
    let request = match call.receive().await {
        Ok(request) => request,
        Err(status) => return drop(sink.fail(status).await),
    };
    let sender = ResponseSender { method: method.method.name, received: Instant::now(), sink };
    let (request, reservation) = match handlers.admit(request) {
        Ok(admitted) => admitted,
        Err(error) => return sender.send(Err(error)).finish().await,
    };
    if let Some(response) = method.response_before_ready
        && handlers.snapshotter.get().is_none()
    {
        return sender.send(Ok(response())).finish().await;
    }
    let job = CallJob {
        snapshotter: Arc::clone(&handlers.snapshotter),
        process_start: handlers.process_start,
        deadline: call.deadline,
        find_dependency: method.find_dependency,
        execute: method.execute,
    };
    let (gate, connection) = (Arc::clone(&handlers.send_gate), call.connection);
    let (send_began_sender, send_began) = oneshot::channel();
    handlers.dispatch(job, request, move |result| {
        let sending = sender.send_result(&gate, connection, reservation, result);
        drop(send_began_sender.send(sending));
    });
    // The worker begins to send, which saves a change of threads, but does not wait for a slow client. We wait here for
    // the end, because dropping the future cancels the call.
    if let Ok(sending) = send_began.await {
        sending.finish().await;
    }
}

/// Answers one call.
struct ResponseSender<R> {
    method: &'static str,
    received: Instant,
    sink: ClientStreamingSink<R>,
}

impl<R: Message> ResponseSender<R> {
    /// Begins to send the result of a job. Waits while the gate is paused, unless the result is an error of a pool.
    fn send_result(
        self,
        gate: &Arc<SendGate>,
        connection: Option<ConnectionId>,
        mut reservation: MemoryReservation,
        result: CallResult<R>,
    ) -> SendingResponse {
        // A pool that is full or stopping reports that on the submitting thread, which may be one of gRPC and must not
        // wait for the gate. The other errors of a pool come from a worker and are treated alike.
        let is_refused = matches!(result, Err(CallError::Pool(_)));
        let send_guard = (!is_refused).then(|| gate.begin_send(connection));
        let result = result.and_then(|response| {
            reservation.reserve_response(response.compute_size())?;
            Ok(response)
        });
        let sending = self.send(result);
        SendingResponse { _reservation: Some(reservation), _send_guard: send_guard, ..sending }
    }

    /// Begins to send a response. A failure is counted and logged.
    fn send(self, result: CallResult<R>) -> SendingResponse {
        let Self { method, received, sink } = self;
        let success_after = result.is_ok().then(|| received.elapsed());
        let completion = match result {
            Ok(response) => sink.success(response),
            Err(error) => sink.fail(outcome::record_failure(method, received.elapsed(), &error)),
        };
        SendingResponse { method, success_after, completion, _send_guard: None, _reservation: None }
    }
}

/// A response that is being sent.
struct SendingResponse {
    method: &'static str,
    /// The duration of a successful call, which is counted when its response was sent.
    success_after: Option<Duration>,
    completion: ClientStreamingSinkResult,
    _send_guard: Option<SendGuard>,
    _reservation: Option<MemoryReservation>,
}

impl SendingResponse {
    /// Waits until the response was sent, and counts a successful call.
    async fn finish(self) {
        let is_sent = self.completion.await.is_ok();
        match self.success_after {
            Some(elapsed) if is_sent => outcome::record_success(self.method, elapsed),
            Some(elapsed) => outcome::record_cancelled(self.method, elapsed),
            None => {}
        }
    }
}
