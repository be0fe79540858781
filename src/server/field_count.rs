//! Counts the fields of an encoded request without decoding it. Pure.
//!
//! A field of two bytes on the wire, such as an empty filter or a label without a value, takes a hundred times as much
//! when it is decoded, and unknown fields are kept as well. Invariant: every field that decoding keeps is counted.
#![forbid(unsafe_code)]

use protobuf::rt::{WireType, skip_field_for_tag};
use protobuf::{CodedInputStream, Message};

/// Fields of one request: labels, filters, paths of a mask and all others. No client sends more than some dozens.
pub const MAX_FIELDS: usize = 1024;
/// What a field takes at most when it is decoded, besides its bytes: its place in a map that has just grown, and two
/// allocations.
pub const FIELD_BYTES: usize = 256;

/// The numbers of the fields that are messages, each with its own nested messages. Entries of a map are left out: of
/// those, decoding keeps only key and value.
#[derive(Clone, Copy)]
struct NestedMessages(&'static [(u32, NestedMessages)]);

const NONE: NestedMessages = NestedMessages(&[]);
const INFO: NestedMessages = NestedMessages(&[(4, NONE), (5, NONE)]);
const UPDATE: NestedMessages = NestedMessages(&[(2, INFO), (3, NONE)]);

fn nested_messages(request_name: &str) -> NestedMessages {
    if request_name == "UpdateSnapshotRequest" { UPDATE } else { NONE }
}

/// The number of fields of an encoded request. If there are more than `MAX_FIELDS`, it is some number above.
pub fn count<Q: Message>(encoded: &[u8]) -> protobuf::Result<usize> {
    let mut count = 0;
    add_fields(&mut CodedInputStream::from_bytes(encoded), nested_messages(Q::NAME), &mut count)?;
    Ok(count)
}

fn add_fields(input: &mut CodedInputStream<'_>, nested: NestedMessages, count: &mut usize) -> protobuf::Result<()> {
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        *count += 1;
        if *count > MAX_FIELDS {
            break;
        }
        let message = nested.0.iter().find(|(field, _)| *field << 3 | WireType::LengthDelimited as u32 == tag);
        match message {
            None => skip_field_for_tag(tag, input)?,
            Some((_, nested)) => {
                let length = input.read_raw_varint32()?;
                let outer_limit = input.push_limit(u64::from(length))?;
                add_fields(input, *nested, count)?;
                if *count > MAX_FIELDS {
                    return Ok(());
                }
                input.pop_limit(outer_limit);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
