//! Queries and changes for the tests of the snapshotter.
#![forbid(unsafe_code)]

use super::{ReadTxn, Result, WriteTxn};
use crate::model::Digest;

impl ReadTxn<'_> {
    /// Number of stored scans.
    pub fn scans(&self) -> Result<i64> {
        Ok(self.value("SELECT count(*) FROM scans", [])?.unwrap_or_default())
    }
}

impl WriteTxn<'_> {
    pub fn forget_scans_but(&self, digest: &Digest) -> Result<()> {
        self.execute("DELETE FROM scans WHERE digest <> ?1", [digest.as_str()])
    }
}
