//! Receives and decodes requests. A request with too many fields is refused before it is decoded.
//!
//! It must not know what a request means. Its invariant: no request is decoded that would take many times the memory of
//! its bytes.
#![forbid(unsafe_code)]

use std::io::Read;

use futures_util::StreamExt;
use grpcio::{Deadline, Marshaller, MessageReader, Method, RequestStream, RpcContext, RpcStatus, RpcStatusCode};
use protobuf::Message;

use super::field_count::{self, FIELD_BYTES, MAX_FIELDS};
use super::listener::ConnectionId;
use crate::metrics::METRICS;

/// The result of decoding a request.
pub enum DecodedRequest<Q> {
    /// `bytes` is about what the decoded request takes in memory.
    Request { request: Q, bytes: usize },
    /// The request has more than `MAX_FIELDS` fields and was not decoded.
    TooManyFields,
}

/// A call that has begun. Its one message may be still on its way.
///
/// All methods are registered as if clients sent streams. For other methods gRPC occupies one of a fixed number of
/// slots, which all clients share, until the message has come.
pub struct IncomingCall<Q> {
    /// gRPC cancels a call if this is dropped before the response was sent.
    messages: RequestStream<DecodedRequest<Q>>,
    /// `None`: gRPC does not name the connection.
    pub connection: Option<ConnectionId>,
    pub deadline: Deadline,
}

impl<Q> IncomingCall<Q> {
    pub fn new(context: &RpcContext<'_>, messages: RequestStream<DecodedRequest<Q>>) -> Self {
        Self { messages, connection: ConnectionId::from_peer(&context.peer()), deadline: context.deadline() }
    }

    /// Waits for the message. The error is the status to answer with.
    pub async fn receive(&mut self) -> Result<DecodedRequest<Q>, RpcStatus> {
        let failed = |text| Err(RpcStatus::with_message(RpcStatusCode::INTERNAL, text));
        match self.messages.next().await {
            Some(Ok(request)) => Ok(request),
            Some(Err(e)) => failed(format!("cannot read the request: {e}")),
            None => failed("the call has no request".to_owned()),
        }
    }
}

/// The same method with a decoder that refuses requests with too many fields.
pub fn limit_fields<Q: Message, R>(method: &Method<Q, R>) -> Method<DecodedRequest<Q>, R> {
    Method {
        ty: method.ty,
        name: method.name,
        req_mar: Marshaller { ser: refuse_to_encode, de: decode_or_count_failure },
        resp_mar: Marshaller { ser: method.resp_mar.ser, de: method.resp_mar.de },
    }
}

/// grpcio wants an encoder, but a server sends no requests.
fn refuse_to_encode<Q>(_: &DecodedRequest<Q>, _: &mut grpcio::GrpcSlice) -> grpcio::Result<()> {
    Err(grpcio::Error::Codec("a server sends no requests".into()))
}

/// A request that cannot be decoded reaches no handler, so the metrics count it here.
fn decode_or_count_failure<Q: Message>(reader: MessageReader) -> grpcio::Result<DecodedRequest<Q>> {
    decode(reader).inspect_err(|e| {
        log::debug!("cannot decode a request: {e}");
        METRICS.record_unreadable();
    })
}

fn decode<Q: Message>(mut reader: MessageReader) -> grpcio::Result<DecodedRequest<Q>> {
    let mut encoded = Vec::new();
    reader.read_to_end(&mut encoded).map_err(|e| grpcio::Error::Codec(e.into()))?;
    drop(reader);
    let fields = field_count::count::<Q>(&encoded)?;
    if fields > MAX_FIELDS {
        return Ok(DecodedRequest::TooManyFields);
    }
    Ok(DecodedRequest::Request { request: Q::parse_from_bytes(&encoded)?, bytes: encoded.len() + fields * FIELD_BYTES })
}
