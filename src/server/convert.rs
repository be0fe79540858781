//! Converts between the generated types of the wire and ours, in both directions. Pure: it checks the form of what it
//! converts, and decides nothing.
#![forbid(unsafe_code)]

use protobuf::well_known_types::timestamp::Timestamp as WireTimestamp;
use protobuf::{EnumOrUnknown, MessageField};

use crate::model::{Key, Kind, Labels, Mount, Owner, Snapshot, Timestamp};
use crate::proto::admin::repository::Owners as WireOwners;
use crate::proto::admin::{Owner as WireOwner, Repository};
use crate::proto::mount::Mount as WireMount;
use crate::proto::snapshots::{Info, Kind as WireKind, UpdateSnapshotRequest};
use crate::repository::owners::{OwnerSample, Owners};
use crate::snapshotter::{CreateRequest, Error, LabelChange, Result};

pub fn create_request(
    key: &str,
    parent: &str,
    labels: impl IntoIterator<Item = (String, String)>,
) -> Result<CreateRequest> {
    Ok(CreateRequest {
        key: Key::parse(key)?,
        parent: Key::parse_optional(parent)?,
        labels: labels.into_iter().collect(),
    })
}

pub fn mounts(mounts: Vec<Mount>) -> Vec<WireMount> {
    mounts
        .into_iter()
        .map(|mount| WireMount {
            type_: mount.kind.as_str().to_owned(),
            source: mount.source,
            options: mount.options,
            ..WireMount::default()
        })
        .collect()
}

/// The fields of a repository that tell what a sample of its layers showed. The other fields are empty.
pub fn sampled_owners(sample: Option<OwnerSample>) -> Repository {
    let Some(OwnerSample { owners, lists_own_attributes }) = sample else { return Repository::default() };
    let (state, owner) = match owners {
        Owners::Unknown => (WireOwners::UNKNOWN, None),
        Owners::Kept => (WireOwners::KEPT, None),
        Owners::Claimed(owner) => (WireOwners::CLAIMED, Some(owner)),
        Owners::Lost(owner) => (WireOwners::LOST, Some(owner)),
        Owners::Undecided(owner) => (WireOwners::UNDECIDED, Some(owner)),
    };
    Repository {
        owners: EnumOrUnknown::new(state),
        owner: owner.map(|Owner { uid, gid }| WireOwner { uid, gid, ..WireOwner::default() }).into(),
        lists_own_attributes,
        ..Repository::default()
    }
}

/// The inverse of `sampled_owners`, for clients. The daemon that answered may have another version.
pub fn owners(repository: &Repository) -> Owners {
    let owner = repository.owner.as_ref().map(|owner| Owner { uid: owner.uid, gid: owner.gid });
    match (repository.owners.enum_value(), owner) {
        (Ok(WireOwners::KEPT), _) => Owners::Kept,
        (Ok(WireOwners::CLAIMED), Some(owner)) => Owners::Claimed(owner),
        (Ok(WireOwners::LOST), Some(owner)) => Owners::Lost(owner),
        (Ok(WireOwners::UNDECIDED), Some(owner)) => Owners::Undecided(owner),
        (Ok(WireOwners::UNKNOWN | WireOwners::CLAIMED | WireOwners::LOST | WireOwners::UNDECIDED) | Err(_), _) => {
            Owners::Unknown
        }
    }
}

pub fn info(snapshot: Snapshot) -> Info {
    let kind = match snapshot.kind {
        Kind::View => WireKind::VIEW,
        Kind::Active => WireKind::ACTIVE,
        Kind::Committed => WireKind::COMMITTED,
    };
    Info {
        name: snapshot.key.as_str().to_owned(),
        parent: snapshot.parent.map_or_else(String::new, |parent| parent.as_str().to_owned()),
        kind: EnumOrUnknown::new(kind),
        created_at: MessageField::some(timestamp(snapshot.created)),
        updated_at: MessageField::some(timestamp(snapshot.updated)),
        labels: snapshot.labels.into_iter().collect(),
        ..Info::default()
    }
}

fn timestamp(time: Timestamp) -> WireTimestamp {
    const NANOS: i64 = 1_000_000_000;
    WireTimestamp {
        seconds: time.0.div_euclid(NANOS),
        nanos: i32::try_from(time.0.rem_euclid(NANOS)).unwrap_or(0),
        ..WireTimestamp::default()
    }
}

/// The snapshot that an Update names and the change of its labels. Without a mask all labels are replaced. A mask that
/// names an immutable field is refused; immutable fields that no mask names are ignored.
pub fn update(request: UpdateSnapshotRequest) -> Result<(Key, LabelChange)> {
    let info = request.info.unwrap_or_default();
    let key = Key::parse(&info.name)?;
    let mut labels: Labels = info.labels.into_iter().collect();
    let paths = request.update_mask.unwrap_or_default().paths;
    if paths.is_empty() {
        return Ok((key, LabelChange::Replace(labels)));
    }
    let mut changes = Vec::new();
    let mut replaces_all = false;
    for path in paths {
        match path.strip_prefix("labels.") {
            Some(label) => changes.push((label.to_owned(), labels.get(label).cloned())),
            None if path == "labels" => replaces_all = true,
            None => return Err(Error::ImmutableField(path)),
        }
    }
    if replaces_all {
        labels.extend(changes.into_iter().filter_map(|(label, value)| value.map(|value| (label, value))));
        return Ok((key, LabelChange::Replace(labels)));
    }
    Ok((key, LabelChange::Each(changes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::field_mask::FieldMask;

    fn request(labels: &[(&str, &str)], paths: &[&str]) -> UpdateSnapshotRequest {
        let labels = labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        UpdateSnapshotRequest {
            info: MessageField::some(Info { name: "k".into(), labels, ..Info::default() }),
            update_mask: MessageField::some(FieldMask {
                paths: paths.iter().map(|&p| p.to_owned()).collect(),
                ..FieldMask::default()
            }),
            ..UpdateSnapshotRequest::default()
        }
    }

    #[test]
    fn update_mask_selects_the_labels_that_change() {
        let change = |labels: &[_], paths: &[_]| update(request(labels, paths)).unwrap().1;
        let all = LabelChange::Replace([("a".to_owned(), "1".to_owned())].into());
        assert_eq!(change(&[("a", "1")], &[]), all);
        assert_eq!(change(&[("a", "1")], &["labels"]), all);
        assert_eq!(change(&[("a", "1")], &["labels.a", "labels"]), all);
        assert_eq!(
            change(&[("a.b/c", "1"), ("x", "2")], &["labels.a.b/c", "labels.gone"]),
            LabelChange::Each(vec![("a.b/c".into(), Some("1".into())), ("gone".into(), None)])
        );
        for path in ["parent", "name", "kind", "label", "labelsx", ""] {
            let refused = update(request(&[("a", "1")], &["labels.a", path]));
            assert!(matches!(refused, Err(Error::ImmutableField(named)) if named == path), "{path:?}");
        }
    }

    #[test]
    fn timestamps_keep_their_nanoseconds() {
        let wire = timestamp(Timestamp(1_700_000_000_123_456_789));
        assert_eq!((wire.seconds, wire.nanos), (1_700_000_000, 123_456_789));
        let before = timestamp(Timestamp(-1));
        assert_eq!((before.seconds, before.nanos), (-1, 999_999_999));
    }
}
