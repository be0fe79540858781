//! How the values of the tables are written: protobuf messages of `proto/record.proto`,
//! so that fields can be added without a new schema version.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, PathBuf};

use protobuf::{EnumOrUnknown, Message, MessageField};

use super::{Error, Result};
use crate::proto::record::{
    LayerScan, RemoteLayer, ScannedDirectory, SnapshotRecord, Usage as UsageRecord, snapshot_record::Kind as KindRecord,
};
use crate::repository::scan::{Directory, SCAN_FORMAT_VERSION, Scan};
use crate::types::{Digest, Key, Kind, Layer, Snapshot, SnapshotId, Timestamp, Usage};

/// Encoding into memory cannot fail: no field of ours is required.
pub fn encode(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().unwrap_or_default()
}

pub fn encode_snapshot(snapshot: &Snapshot) -> Vec<u8> {
    encode(&to_record(snapshot))
}

pub fn to_record(snapshot: &Snapshot) -> SnapshotRecord {
    let kind = match snapshot.kind {
        Kind::View => KindRecord::VIEW,
        Kind::Active => KindRecord::ACTIVE,
        Kind::Committed => KindRecord::COMMITTED,
    };
    SnapshotRecord {
        id: snapshot.id.0,
        kind: EnumOrUnknown::new(kind),
        parent: snapshot.parent.as_ref().map_or_else(String::new, |p| p.as_str().to_owned()),
        created: snapshot.created.0,
        updated: snapshot.updated.0,
        labels: snapshot.labels.clone().into_iter().collect(),
        layer: MessageField::from_option(snapshot.layer.as_ref().map(|layer| RemoteLayer {
            digest: layer.digest.as_str().to_owned(),
            repository: layer.repository.clone(),
            ..RemoteLayer::default()
        })),
        usage: MessageField::from_option(snapshot.usage.map(|usage| UsageRecord {
            size: usage.size,
            inodes: usage.inodes,
            ..UsageRecord::default()
        })),
        ..SnapshotRecord::default()
    }
}

pub fn decode_snapshot(key: &str, bytes: &[u8]) -> Result<Snapshot> {
    let record = SnapshotRecord::parse_from_bytes(bytes);
    from_record(key, record.map_err(|_| Error::BadRow { table: "snapshots", key: key.to_owned() })?)
}

pub fn from_record(key: &str, record: SnapshotRecord) -> Result<Snapshot> {
    let damaged = || Error::BadRow { table: "snapshots", key: key.to_owned() };
    let kind = match record.kind.enum_value() {
        Ok(KindRecord::VIEW) => Kind::View,
        Ok(KindRecord::ACTIVE) => Kind::Active,
        Ok(KindRecord::COMMITTED) => Kind::Committed,
        Ok(KindRecord::UNKNOWN) | Err(_) => return Err(damaged()),
    };
    let layer = record
        .layer
        .into_option()
        .map(|layer| {
            let digest = Digest::parse(&layer.digest).map_err(|_| damaged())?;
            Ok(Layer { digest, repository: layer.repository })
        })
        .transpose()?;
    Ok(Snapshot {
        id: SnapshotId(record.id),
        key: Key::parse(key).map_err(|_| damaged())?,
        parent: Key::parse_optional(&record.parent).map_err(|_| damaged())?,
        kind,
        created: Timestamp(record.created),
        updated: Timestamp(record.updated),
        labels: record.labels.into_iter().collect(),
        layer,
        usage: record.usage.into_option().map(|u| Usage { size: u.size, inodes: u.inodes }),
    })
}

fn to_bytes(names: &[OsString]) -> Vec<Vec<u8>> {
    names.iter().map(|n| n.as_bytes().to_vec()).collect()
}

/// None: one of them is no name of an entry.
fn to_names(names: Vec<Vec<u8>>) -> Option<Vec<OsString>> {
    let name = |bytes| to_path(bytes).filter(|name| name.components().count() == 1).map(PathBuf::into_os_string);
    names.into_iter().map(name).collect()
}

/// None: it may lead out of the directory that it is to be below. Whiteouts are made under these.
fn to_path(bytes: Vec<u8>) -> Option<PathBuf> {
    let path = PathBuf::from(OsString::from_vec(bytes));
    let names: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    (names.as_os_str() == path.as_os_str() && !path.as_os_str().as_bytes().contains(&0)).then_some(path)
}

pub fn encode_scan(scan: &Scan) -> Vec<u8> {
    let directories = scan.directories.iter().map(|d| ScannedDirectory {
        path: d.path.as_os_str().as_bytes().to_vec(),
        deleted: to_bytes(&d.deleted),
        opaque: d.opaque,
        hidden: to_bytes(&d.hidden),
        ..ScannedDirectory::default()
    });
    encode(&LayerScan { directories: directories.collect(), rules: SCAN_FORMAT_VERSION, ..LayerScan::default() })
}

/// None: made by other rules than today's.
pub fn decode_scan(key: &str, bytes: &[u8]) -> Result<Option<Scan>> {
    let damaged = || Error::BadRow { table: "scans", key: key.to_owned() };
    let record = LayerScan::parse_from_bytes(bytes).map_err(|_| damaged())?;
    if record.rules != SCAN_FORMAT_VERSION {
        return Ok(None);
    }
    let directories = record.directories.into_iter().map(|d| {
        Some(Directory {
            path: to_path(d.path)?,
            deleted: to_names(d.deleted)?,
            opaque: d.opaque,
            hidden: to_names(d.hidden)?,
        })
    });
    let directories = directories.collect::<Option<_>>().ok_or_else(damaged)?;
    Ok(Some(Scan { directories }))
}
