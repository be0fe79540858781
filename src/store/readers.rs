//! The connections that read. They are bounded, because each has file descriptors and a cache.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};
use rusqlite::Connection;

use super::file::{READER_CACHE_KIB, open};
use super::{Error, Result};

/// Reads at once. Others wait, and none takes long.
const MAX_READERS: usize = 8;

#[derive(Default)]
pub(super) struct Readers {
    slots: [Mutex<Slot>; MAX_READERS],
    /// Counts the reads that found no free slot, so that they wait for different ones.
    blocking_pools: AtomicUsize,
    is_closed: AtomicBool,
}

/// Place of a connection, which is opened when it is needed.
#[derive(Default)]
pub(super) struct Slot {
    connection: Option<Connection>,
    /// Whether somebody read since the last `close_unused`.
    was_used: bool,
}

impl Slot {
    pub(super) fn connection(&mut self, path: &Path) -> Result<&Connection> {
        self.was_used = true;
        // One whose last read did not end would show an old state for ever.
        let connection = match self.connection.take().filter(Connection::is_autocommit) {
            Some(connection) => connection,
            None => open(path, READER_CACHE_KIB)?,
        };
        Ok(self.connection.insert(connection))
    }
}

impl Readers {
    /// A slot for one read: the first that is free, so that few are used.
    pub(super) fn lock(&self) -> Result<MutexGuard<'_, Slot>> {
        let wait = || self.slots[self.blocking_pools.fetch_add(1, Ordering::Relaxed) % MAX_READERS].lock();
        let slot = self.slots.iter().find_map(Mutex::try_lock).unwrap_or_else(wait);
        if self.is_closed.load(Ordering::SeqCst) { Err(Error::Closed) } else { Ok(slot) }
    }

    /// Closes the connections that nobody used since the last call, but for the first.
    pub(super) fn close_unused(&self) {
        for mut slot in self.slots[1..].iter().filter_map(Mutex::try_lock) {
            if !std::mem::take(&mut slot.was_used) {
                slot.connection = None;
            }
        }
    }

    /// Waits for the reads under way. Later ones fail.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        for slot in &self.slots {
            slot.lock().connection = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    /// A connection has a cache of its own: after many reads at once the memory of all stayed.
    #[test]
    fn connections_that_nobody_needs_any_more_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.sqlite");
        Store::create(&path, None, &[], &[]).unwrap();
        let readers = Readers::default();
        let read_at_once = |count: usize| {
            let mut slots: Vec<_> = (0..count).map(|_| readers.lock().unwrap()).collect();
            for slot in &mut slots {
                slot.connection(&path).unwrap();
            }
        };
        let open = || readers.slots.iter().filter(|slot| slot.lock().connection.is_some()).count();
        read_at_once(4);
        readers.close_unused();
        assert_eq!(open(), 4, "they were needed since the last call");
        read_at_once(2);
        readers.close_unused();
        assert_eq!(open(), 2);
        readers.close_unused();
        assert_eq!(open(), 1);
        readers.close();
        assert_eq!(open(), 0);
        assert!(matches!(readers.lock(), Err(Error::Closed)));
    }
}
