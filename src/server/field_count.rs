//! How many fields a request has, found without decoding it.
//!
//! A field that takes two bytes on the wire, an empty filter or a label without a value, takes a hundred times as much
//! when it is decoded, and one that nobody knows is kept as well. So fields are counted before. Pure.
#![forbid(unsafe_code)]

use protobuf::rt::{WireType, skip_field_for_tag};
use protobuf::{CodedInputStream, Message};

/// Fields of one request: labels, filters, paths of a mask and all others. No client sends more than some dozens.
pub const MAX_FIELDS: usize = 1024;
/// What one takes at most when it is decoded, besides its bytes: its place in a map that has just grown, and two
/// allocations.
pub const FIELD_BYTES: usize = 256;

/// The numbers of the fields that are messages themselves, and of theirs. Entries of a map are none: what a request
/// has in them besides key and value is not kept.
#[derive(Clone, Copy)]
struct Messages(&'static [(u32, Messages)]);

const NONE: Messages = Messages(&[]);
const INFO: Messages = Messages(&[(4, NONE), (5, NONE)]);
const UPDATE: Messages = Messages(&[(2, INFO), (3, NONE)]);

fn find_messages_in(request: &str) -> Messages {
    if request == "UpdateSnapshotRequest" { UPDATE } else { NONE }
}

/// The number of fields of a request in its wire form. Where there are more than `MAX_FIELDS`, it is some number above.
pub fn count<Q: Message>(bytes: &[u8]) -> protobuf::Result<usize> {
    let mut counted = 0;
    count_in(&mut CodedInputStream::from_bytes(bytes), find_messages_in(Q::NAME), &mut counted)?;
    Ok(counted)
}

fn count_in(input: &mut CodedInputStream<'_>, messages: Messages, counted: &mut usize) -> protobuf::Result<()> {
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        *counted += 1;
        if *counted > MAX_FIELDS {
            break;
        }
        let message = messages.0.iter().find(|(field, _)| *field << 3 | WireType::LengthDelimited as u32 == tag);
        match message {
            None => skip_field_for_tag(tag, input)?,
            Some((_, inner)) => {
                let length = input.read_raw_varint32()?;
                let before = input.push_limit(u64::from(length))?;
                count_in(input, *inner, counted)?;
                if *counted > MAX_FIELDS {
                    return Ok(());
                }
                input.pop_limit(before);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use protobuf::reflect::{MessageDescriptor, RuntimeFieldType, RuntimeType};
    use protobuf::well_known_types::field_mask::FieldMask;
    use protobuf::well_known_types::timestamp::Timestamp;
    use protobuf::{MessageField, MessageFull};

    use super::*;
    use crate::proto::admin::{DescribeRequest, LeftoversRequest, SnapshotsRequest};
    use crate::proto::health::HealthCheckRequest;
    use crate::proto::snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
        RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest,
    };

    /// The messages in a message are those that are looked into.
    fn check(descriptor: &MessageDescriptor, messages: Messages) {
        let mut found = Vec::new();
        for field in descriptor.fields() {
            let number = u32::try_from(field.number()).unwrap();
            let inner = messages.0.iter().find(|(field, _)| *field == number);
            match field.runtime_field_type() {
                RuntimeFieldType::Singular(RuntimeType::Message(message))
                | RuntimeFieldType::Repeated(RuntimeType::Message(message)) => {
                    let (_, inner) = inner.unwrap_or_else(|| panic!("{} has {number}", descriptor.name()));
                    check(&message, *inner);
                    found.push(number);
                }
                _ => assert!(inner.is_none(), "{} has {number}, which is no message", descriptor.name()),
            }
        }
        assert_eq!(found.len(), messages.0.len(), "{}", descriptor.name());
    }

    #[test]
    fn every_message_in_a_request_is_looked_into() {
        macro_rules! check_all {
            ($($request:ty)*) => { $(check(&<$request>::descriptor(), find_messages_in(<$request>::NAME));)* };
        }
        check_all! {
            PrepareSnapshotRequest ViewSnapshotRequest MountsRequest CommitSnapshotRequest RemoveSnapshotRequest
            StatSnapshotRequest UpdateSnapshotRequest ListSnapshotsRequest UsageRequest CleanupRequest DescribeRequest
            SnapshotsRequest LeftoversRequest HealthCheckRequest
        }
    }

    #[test]
    fn labels_filters_paths_and_unknown_fields_are_counted() {
        let labels = (0..10).map(|n| (n.to_string(), String::new())).collect();
        let prepare = PrepareSnapshotRequest { key: "k".into(), labels, ..PrepareSnapshotRequest::default() };
        assert_eq!(count::<PrepareSnapshotRequest>(&prepare.write_to_bytes().unwrap()).unwrap(), 11);
        let list = ListSnapshotsRequest { filters: vec![String::new(); 7], ..ListSnapshotsRequest::default() };
        assert_eq!(count::<ListSnapshotsRequest>(&list.write_to_bytes().unwrap()).unwrap(), 7);
        let mut created = Timestamp { seconds: 1, ..Timestamp::default() };
        created.special_fields.mut_unknown_fields().add_varint(99, 1);
        let info = Info {
            name: "k".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            created_at: MessageField::some(created),
            ..Info::default()
        };
        let update_mask = FieldMask { paths: vec!["x".into(); 3], ..FieldMask::default() };
        let update = UpdateSnapshotRequest {
            info: MessageField::some(info),
            update_mask: MessageField::some(update_mask),
            ..UpdateSnapshotRequest::default()
        };
        // Two messages; name, a label, a message with two numbers; three paths.
        assert_eq!(count::<UpdateSnapshotRequest>(&update.write_to_bytes().unwrap()).unwrap(), 2 + 5 + 3);
    }

    #[test]
    fn counting_ends_soon_after_the_limit_and_refuses_what_is_no_message() {
        assert_eq!(count::<ListSnapshotsRequest>(&[0x12, 0].repeat(5_000_000)).unwrap(), MAX_FIELDS + 1);
        for wrong in [&[0x12, 5, 1][..], &[0xff], &[0x12], &[0x0c], &[0x1a, 2, 0x0a, 9]] {
            assert!(count::<UpdateSnapshotRequest>(wrong).is_err(), "{wrong:?}");
        }
    }
}
