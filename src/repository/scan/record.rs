//! Scans as the store keeps them: messages `LayerScan` of `proto/record.proto`.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use protobuf::{EnumOrUnknown, Message};

use super::{Directory, Limit, SCAN_FORMAT_VERSION, Scan};
use crate::proto::record::layer_scan::Refusal;
use crate::proto::record::{LayerScan, ScannedDirectory};
use crate::system::is_entry_name;

fn to_bytes(names: &[OsString]) -> Vec<Vec<u8>> {
    names.iter().map(|n| n.as_bytes().to_vec()).collect()
}

/// None: one of them is not the name of an entry.
fn to_names(names: Vec<Vec<u8>>) -> Option<Vec<OsString>> {
    names.into_iter().map(to_name).collect()
}

/// None: it is not the name of an entry, and may lead out of the directory.
fn to_name(bytes: Vec<u8>) -> Option<OsString> {
    let name = OsString::from_vec(bytes);
    (is_entry_name(&name) && !name.as_bytes().contains(&0)).then_some(name)
}

/// The stored result of a scan: the markers, or the limit that the layer exceeds.
pub type StoredScan = Result<Scan, Limit>;

const REFUSALS: [(Limit, Refusal); 5] = [
    (Limit::Memory, Refusal::MEMORY),
    (Limit::Directories, Refusal::DIRECTORIES),
    (Limit::Marked, Refusal::MARKED),
    (Limit::Names, Refusal::NAMES),
    (Limit::Path, Refusal::PATH),
];

pub fn encode(scan: Result<&Scan, Limit>) -> Vec<u8> {
    let mut record = LayerScan { version: SCAN_FORMAT_VERSION, ..LayerScan::default() };
    match scan {
        Ok(scan) => record.directories = scan.directories.iter().map(encode_directory).collect(),
        Err(limit) => {
            let refusal =
                REFUSALS.iter().find(|(stored, _)| *stored == limit).map_or(Refusal::NONE, |(_, refusal)| *refusal);
            record.refusal = EnumOrUnknown::new(refusal);
        }
    }
    // Writing into memory does not fail, because no field of the message is required.
    record.write_to_bytes().unwrap_or_default()
}

fn encode_directory(d: &Directory) -> ScannedDirectory {
    ScannedDirectory {
        // A scan has fewer directories than that.
        parent: u32::try_from(d.parent).unwrap_or(0),
        name: d.name.as_bytes().to_vec(),
        deleted: to_bytes(&d.deleted),
        opaque: d.opaque,
        hidden: to_bytes(&d.hidden),
        has_no_owner: d.has_no_owner,
        ..ScannedDirectory::default()
    }
}

/// The bytes are not a record of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRecord;

/// None: the record was made by another version of the rules.
pub fn decode(bytes: &[u8]) -> Result<Option<StoredScan>, BadRecord> {
    let record = LayerScan::parse_from_bytes(bytes).map_err(|_| BadRecord)?;
    if record.version != SCAN_FORMAT_VERSION {
        return Ok(None);
    }
    match record.refusal.enum_value() {
        Ok(Refusal::NONE) => {}
        Ok(refusal) => return Ok(REFUSALS.iter().find(|(_, stored)| *stored == refusal).map(|(limit, _)| Err(*limit))),
        Err(_) => return Err(BadRecord),
    }
    let directories = record.directories.into_iter().enumerate().map(|(index, d)| decode_directory(index, d));
    let directories =
        directories.collect::<Option<Vec<_>>>().filter(|directories| !directories.is_empty()).ok_or(BadRecord)?;
    Ok(Some(Ok(Scan { directories })))
}

/// None: no scan has such a result, and whiteouts would be made under its names.
fn decode_directory(index: usize, d: ScannedDirectory) -> Option<Directory> {
    let parent = usize::try_from(d.parent).ok()?;
    let name = if index == 0 { d.name.is_empty().then(OsString::new)? } else { to_name(d.name)? };
    let follows_parent = if index == 0 { parent == 0 } else { parent < index };
    follows_parent.then_some(Directory {
        parent,
        name,
        deleted: to_names(d.deleted)?,
        opaque: d.opaque,
        hidden: to_names(d.hidden)?,
        has_no_owner: d.has_no_owner,
    })
}
