//! What lies beside the files of a local snapshot, `snapshots/<id>/record`: enough to make its
//! row again when the store is lost. Written before the row, and not synced: the row counts.
#![forbid(unsafe_code)]

use protobuf::{Message, MessageField};

use super::record::{encode, from_record, to_record};
use crate::proto::record::Sidecar as SidecarRecord;
use crate::types::Snapshot;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// As it was prepared.
    pub made: Snapshot,
    /// As it is if the commit that was begun came to its end.
    pub committed: Option<Snapshot>,
}

impl Sidecar {
    pub fn encode(&self) -> Vec<u8> {
        let name = self.committed.as_ref().map_or_else(String::new, |committed| committed.key.as_str().to_owned());
        encode(&SidecarRecord {
            key: self.made.key.as_str().to_owned(),
            made: MessageField::some(to_record(&self.made)),
            name,
            committed: MessageField::from_option(self.committed.as_ref().map(to_record)),
            ..SidecarRecord::default()
        })
    }

    /// None: not all of one was written.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let record = SidecarRecord::parse_from_bytes(bytes).ok()?;
        let made = from_record(&record.key, record.made.into_option()?).ok()?;
        let committed = match record.committed.into_option() {
            Some(committed) => Some(from_record(&record.name, committed).ok()?),
            None => None,
        };
        Some(Self { made, committed })
    }
}
