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

/// Requires that `nested` names exactly the fields that are messages.
fn check(descriptor: &MessageDescriptor, nested: NestedMessages) {
    let mut count = 0;
    for field in descriptor.fields() {
        let number = u32::try_from(field.number()).unwrap();
        let inner = nested.0.iter().find(|(field, _)| *field == number);
        match field.runtime_field_type() {
            RuntimeFieldType::Singular(RuntimeType::Message(message))
            | RuntimeFieldType::Repeated(RuntimeType::Message(message)) => {
                let (_, inner) = inner.unwrap_or_else(|| panic!("{} has the message {number}", descriptor.name()));
                check(&message, *inner);
                count += 1;
            }
            _ => assert!(inner.is_none(), "{} has {number}, which is not a message", descriptor.name()),
        }
    }
    assert_eq!(count, nested.0.len(), "{}", descriptor.name());
}

#[test]
fn nested_messages_of_every_request_are_counted() {
    macro_rules! check_all {
        ($($request:ty)*) => { $(check(&<$request>::descriptor(), nested_messages(<$request>::NAME));)* };
    }
    check_all! {
        PrepareSnapshotRequest ViewSnapshotRequest MountsRequest CommitSnapshotRequest RemoveSnapshotRequest
        StatSnapshotRequest UpdateSnapshotRequest ListSnapshotsRequest UsageRequest CleanupRequest DescribeRequest
        SnapshotsRequest LeftoversRequest HealthCheckRequest
    }
}

#[test]
fn each_label_filter_path_and_unknown_field_counts() {
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
    // The request has two messages: one of a name, a label and a message of two numbers, and one of three paths.
    assert_eq!(count::<UpdateSnapshotRequest>(&update.write_to_bytes().unwrap()).unwrap(), 2 + 5 + 3);
}

#[test]
fn counting_stops_at_the_limit_and_refuses_invalid_messages() {
    assert_eq!(count::<ListSnapshotsRequest>(&[0x12, 0].repeat(5_000_000)).unwrap(), MAX_FIELDS + 1);
    for invalid in [&[0x12, 5, 1][..], &[0xff], &[0x12], &[0x0c], &[0x1a, 2, 0x0a, 9]] {
        assert!(count::<UpdateSnapshotRequest>(invalid).is_err(), "{invalid:?}");
    }
}
