//! Requests as the server reads them: decoded, with what they take in memory, or refused before they are decoded.
#![forbid(unsafe_code)]

use std::io::Read;

use futures_util::StreamExt;
use grpcio::{Deadline, Marshaller, MessageReader, Method, RequestStream, RpcContext, RpcStatus, RpcStatusCode};
use protobuf::Message;

use super::field_count::{self, FIELD_BYTES, MAX_FIELDS};
use super::listener::ConnectionId;
use crate::metrics::METRICS;

/// A request as it came in.
pub enum DecodedRequest<Q> {
    /// It takes about so many bytes.
    Request { request: Q, memory: usize },
    /// It has more than `MAX_FIELDS`.
    TooManyFields,
}

/// A call that has begun; its one message may be still on its way.
///
/// All methods are registered as if clients sent streams: for the others gRPC holds a slot, of which it has a fixed
/// number for all clients, until the message has come.
pub struct IncomingCall<Q> {
    /// gRPC cancels a call whose stream is dropped before its answer was sent.
    messages: RequestStream<DecodedRequest<Q>>,
    /// None: gRPC does not name it.
    pub connection: Option<ConnectionId>,
    pub deadline: Deadline,
}

impl<Q> IncomingCall<Q> {
    pub fn new(context: &RpcContext<'_>, messages: RequestStream<DecodedRequest<Q>>) -> Self {
        Self { messages, connection: ConnectionId::from_peer(&context.peer()), deadline: context.deadline() }
    }

    /// Waits for the message. The error is an answer, if anybody still waits for one.
    pub async fn message(&mut self) -> Result<DecodedRequest<Q>, RpcStatus> {
        let refuse = |why| Err(RpcStatus::with_message(RpcStatusCode::INTERNAL, why));
        match self.messages.next().await {
            Some(Ok(request)) => Ok(request),
            Some(Err(e)) => refuse(format!("the request cannot be read: {e}")),
            None => refuse("the call has no request".to_owned()),
        }
    }
}

/// The same method, of which requests with too many fields are not decoded.
pub fn limit_fields<Q: Message, R>(method: &Method<Q, R>) -> Method<DecodedRequest<Q>, R> {
    Method {
        ty: method.ty,
        name: method.name,
        req_mar: Marshaller { ser: send_nothing, de: read },
        resp_mar: Marshaller { ser: method.resp_mar.ser, de: method.resp_mar.de },
    }
}

/// A server sends no requests.
fn send_nothing<Q>(_: &DecodedRequest<Q>, _: &mut grpcio::GrpcSlice) -> grpcio::Result<()> {
    Err(grpcio::Error::Codec("a server sends no requests".into()))
}

/// What cannot be read is no call of any method's count, so it is counted here.
fn read<Q: Message>(reader: MessageReader) -> grpcio::Result<DecodedRequest<Q>> {
    decode(reader).inspect_err(|e| {
        log::debug!("a request cannot be read: {e}");
        METRICS.record_unreadable();
    })
}

fn decode<Q: Message>(mut reader: MessageReader) -> grpcio::Result<DecodedRequest<Q>> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).map_err(|e| grpcio::Error::Codec(e.into()))?;
    drop(reader);
    let count = field_count::count::<Q>(&bytes)?;
    if count > MAX_FIELDS {
        return Ok(DecodedRequest::TooManyFields);
    }
    Ok(DecodedRequest::Request { request: Q::parse_from_bytes(&bytes)?, memory: bytes.len() + count * FIELD_BYTES })
}
