//! What is written as protobuf messages of `proto/record.proto`: what a scan found, and the record
//! beside the files of a snapshot.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use protobuf::{EnumOrUnknown, Message, MessageField};

use super::{Error, Result};
use crate::proto::record::layer_scan::Refusal;
use crate::proto::record::{
    LayerScan, RemoteLayer, ScannedDirectory, SnapshotRecord, Usage as UsageRecord, snapshot_record::Kind as KindRecord,
};
use crate::repository::scan::{Directory, Limit, SCAN_FORMAT_VERSION, Scan};
use crate::types::{Digest, Key, Kind, Layer, Snapshot, SnapshotId, Timestamp, Usage};

/// Encoding into memory cannot fail: no field of ours is required.
pub fn encode(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().unwrap_or_default()
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
    names.into_iter().map(to_name).collect()
}

/// None: it is no name of an entry, and may lead out of the directory that it is to be in.
fn to_name(bytes: Vec<u8>) -> Option<OsString> {
    let is_name = !matches!(bytes.as_slice(), b"" | b"." | b"..") && !bytes.iter().any(|b| matches!(b, b'/' | 0));
    is_name.then(|| OsString::from_vec(bytes))
}

/// What is stored of a layer: what its scan found, or the bound that it exceeds.
pub type StoredScan = std::result::Result<Scan, Limit>;

/// What the store has of a scan, read only if its record is short.
pub enum ShortScan {
    Absent,
    Short(StoredScan),
    Long,
}

const REFUSALS: [(Limit, Refusal); 5] = [
    (Limit::Memory, Refusal::MEMORY),
    (Limit::Directories, Refusal::DIRECTORIES),
    (Limit::Marked, Refusal::MARKED),
    (Limit::Names, Refusal::NAMES),
    (Limit::Path, Refusal::PATH),
];

pub fn encode_scan(scan: std::result::Result<&Scan, Limit>) -> Vec<u8> {
    let mut record = LayerScan { version: SCAN_FORMAT_VERSION, ..LayerScan::default() };
    match scan {
        Ok(scan) => record.directories = scan.directories.iter().map(encode_directory).collect(),
        Err(limit) => {
            let refusal = REFUSALS.iter().find(|(one, _)| *one == limit).map_or(Refusal::NONE, |(_, refusal)| *refusal);
            record.refusal = EnumOrUnknown::new(refusal);
        }
    }
    encode(&record)
}

fn encode_directory(d: &Directory) -> ScannedDirectory {
    ScannedDirectory {
        // A scan has fewer directories.
        parent: u32::try_from(d.parent).unwrap_or(0),
        name: d.name.as_bytes().to_vec(),
        deleted: to_bytes(&d.deleted),
        opaque: d.opaque,
        hidden: to_bytes(&d.hidden),
        has_no_owner: d.has_no_owner,
        ..ScannedDirectory::default()
    }
}

/// None: made by other rules than today's.
pub fn decode_scan(key: &str, bytes: &[u8]) -> Result<Option<StoredScan>> {
    let damaged = || Error::BadRow { table: "scans", key: key.to_owned() };
    let record = LayerScan::parse_from_bytes(bytes).map_err(|_| damaged())?;
    if record.version != SCAN_FORMAT_VERSION {
        return Ok(None);
    }
    match record.refusal.enum_value() {
        Ok(Refusal::NONE) => {}
        Ok(refusal) => return Ok(REFUSALS.iter().find(|(_, one)| *one == refusal).map(|(limit, _)| Err(*limit))),
        Err(_) => return Err(damaged()),
    }
    let directories = record.directories.into_iter().enumerate().map(|(place, d)| decode_directory(place, d));
    let directories = directories.collect::<Option<Vec<_>>>().filter(|all| !all.is_empty()).ok_or_else(damaged)?;
    Ok(Some(Ok(Scan { directories })))
}

/// None: it is not what a scan finds. Whiteouts are made under these names.
fn decode_directory(place: usize, d: ScannedDirectory) -> Option<Directory> {
    let parent = usize::try_from(d.parent).ok()?;
    let name = if place == 0 { d.name.is_empty().then(OsString::new)? } else { to_name(d.name)? };
    let is_below = if place == 0 { parent == 0 } else { parent < place };
    is_below.then_some(Directory {
        parent,
        name,
        deleted: to_names(d.deleted)?,
        opaque: d.opaque,
        hidden: to_names(d.hidden)?,
        has_no_owner: d.has_no_owner,
    })
}
