//! List, in pages. Each page is one short read transaction, and between two pages nothing is open.
//!
//! The walk goes by ids, because no snapshot ever changes its id and no id is used twice. What is there from the first
//! page to the last is found exactly once, even if a commit gives it another name meanwhile. Ids above the highest one at
//! the beginning are left out, so that the walk ends.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{Result, Snapshotter};
use crate::model::{Snapshot, SnapshotId};
use crate::store::ReadTxn;

/// Maximum size of the snapshots that are read for one page, in bytes. A single larger snapshot is a page by itself.
pub const MAX_PAGE_BYTES: usize = 1 << 20;
/// Maximum number of snapshots that are read for one page.
const MAX_PAGE: usize = 1_000;
/// Maximum time that is spent on one page, because filters may be slow and the worker has other calls to serve.
const MAX_PAGE_TIME: Duration = Duration::from_millis(20);

/// A part of a List.
#[derive(Debug)]
pub struct Page {
    /// The snapshots that match, in no order.
    pub snapshots: Vec<Snapshot>,
    /// Size of `snapshots` in memory.
    pub bytes: usize,
    /// Where the next page begins. None if this is the last page.
    pub cursor: Option<Cursor>,
}

/// The ids that a List has not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub next: SnapshotId,
    pub last: SnapshotId,
}

impl Snapshotter {
    /// The first page of the snapshots that match. `hint` is a (reference, parent) that all of them have, if the caller
    /// knows one; then usually no other snapshots are read.
    pub fn list(&self, hint: Option<(&str, &str)>, matches: impl Fn(&Snapshot) -> bool) -> Result<Page> {
        self.first_page(hint, MAX_PAGE, &matches)
    }

    /// The page at `cursor` of a List with the same `matches`.
    pub fn next_page(&self, cursor: Cursor, matches: impl Fn(&Snapshot) -> bool) -> Result<Page> {
        self.page_at(cursor, MAX_PAGE, &matches)
    }

    fn first_page(
        &self,
        hint: Option<(&str, &str)>,
        page_size: usize,
        matches: &dyn Fn(&Snapshot) -> bool,
    ) -> Result<Page> {
        self.store.read(|tx| {
            if let Some((reference, parent)) = hint {
                let mut builder = PageBuilder::new(matches);
                let mut remaining = page_size;
                let is_complete = tx.visit_by_ref(reference, parent, |snapshot| {
                    remaining = remaining.saturating_sub(1);
                    builder.push(snapshot) && remaining > 0
                })?;
                // If they are more than one page, all ids are walked: references and parents may change between two
                // pages.
                if is_complete {
                    return Ok(builder.build(None));
                }
            }
            match tx.last_id()? {
                None => Ok(PageBuilder::new(matches).build(None)),
                Some(last) => read_page(tx, Cursor { next: SnapshotId(0), last }, page_size, matches),
            }
        })
    }

    fn page_at(&self, cursor: Cursor, page_size: usize, matches: &dyn Fn(&Snapshot) -> bool) -> Result<Page> {
        self.store.read(|tx| read_page(tx, cursor, page_size, matches))
    }
}

fn read_page(
    tx: &ReadTxn,
    Cursor { next, last }: Cursor,
    page_size: usize,
    matches: &dyn Fn(&Snapshot) -> bool,
) -> Result<Page> {
    let mut builder = PageBuilder::new(matches);
    let next = tx.visit_range(next..=last, page_size, |snapshot| builder.push(snapshot))?;
    Ok(builder.build(next.map(|next| Cursor { next, last })))
}

/// Collects the snapshots of a page within its limits.
struct PageBuilder<'m> {
    matches: &'m dyn Fn(&Snapshot) -> bool,
    deadline: Instant,
    bytes_read: usize,
    snapshots: Vec<Snapshot>,
    bytes: usize,
}

impl<'m> PageBuilder<'m> {
    fn new(matches: &'m dyn Fn(&Snapshot) -> bool) -> Self {
        Self { matches, deadline: Instant::now() + MAX_PAGE_TIME, bytes_read: 0, snapshots: Vec::new(), bytes: 0 }
    }

    /// Returns false if the snapshot belongs to the next page. The first snapshot is always accepted, so that every page
    /// gets further.
    fn push(&mut self, snapshot: Snapshot) -> bool {
        let bytes = snapshot.approximate_size();
        if self.bytes_read > 0 && (self.bytes_read + bytes > MAX_PAGE_BYTES || Instant::now() >= self.deadline) {
            return false;
        }
        self.bytes_read += bytes;
        if (self.matches)(&snapshot) {
            self.bytes += bytes;
            self.snapshots.push(snapshot);
        }
        true
    }

    fn build(self, cursor: Option<Cursor>) -> Page {
        Page { snapshots: self.snapshots, bytes: self.bytes, cursor }
    }
}

#[cfg(test)]
mod tests;
