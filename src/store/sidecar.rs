//! What lies beside the files of a local snapshot, `snapshots/<id>/record`: enough to make its
//! row again when the store is lost. Written before the row, and not synced: the row counts.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::types::Snapshot;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// As it was prepared.
    pub made: Snapshot,
    /// As it is if the commit that was begun came to its end.
    pub committed: Option<Snapshot>,
}

impl Sidecar {
    pub fn encode(&self) -> Vec<u8> {
        // Everything in a snapshot has a form in JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// None: not all of one was written.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}
