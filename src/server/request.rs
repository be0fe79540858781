//! Requests as the server reads them: decoded, with what they take in memory, or refused before they are decoded.
#![forbid(unsafe_code)]

use std::io::Read;

use grpcio::{Marshaller, MessageReader, Method};
use protobuf::Message;

use super::fields::{self, FIELD_BYTES, FIELDS};
use crate::metrics::METRICS;

/// A request as it came in.
pub enum Incoming<Q> {
    /// It takes about so many bytes.
    Request { request: Q, memory: usize },
    /// It has more than `FIELDS`.
    TooManyFields,
}

/// The same method, of which requests with too many fields are not decoded.
pub fn limit_fields<Q: Message, R>(method: &Method<Q, R>) -> Method<Incoming<Q>, R> {
    Method {
        ty: method.ty,
        name: method.name,
        req_mar: Marshaller { ser: send_nothing, de: read },
        resp_mar: Marshaller { ser: method.resp_mar.ser, de: method.resp_mar.de },
    }
}

/// A server sends no requests.
fn send_nothing<Q>(_: &Incoming<Q>, _: &mut grpcio::GrpcSlice) -> grpcio::Result<()> {
    Err(grpcio::Error::Codec("a server sends no requests".into()))
}

/// grpcio answers a request that cannot be read by itself, so it is counted here.
fn read<Q: Message>(reader: MessageReader) -> grpcio::Result<Incoming<Q>> {
    decode(reader).inspect_err(|e| {
        log::debug!("a request cannot be read: {e}");
        METRICS.unreadable();
    })
}

fn decode<Q: Message>(mut reader: MessageReader) -> grpcio::Result<Incoming<Q>> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).map_err(|e| grpcio::Error::Codec(e.into()))?;
    drop(reader);
    let count = fields::count::<Q>(&bytes)?;
    if count > FIELDS {
        return Ok(Incoming::TooManyFields);
    }
    Ok(Incoming::Request { request: Q::parse_from_bytes(&bytes)?, memory: bytes.len() + count * FIELD_BYTES })
}
