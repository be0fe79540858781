//! The connections that read. Their number is bounded, because each has file descriptors and a cache.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};
use rusqlite::{Connection, OpenFlags};

use super::file::{READER_CACHE_KIB, open};
use super::{Error, Result};

/// Maximum number of concurrent reads. Others wait, which is short because no read takes long.
const MAX_READERS: usize = 8;

#[derive(Default)]
pub(super) struct Readers {
    slots: [Mutex<Slot>; MAX_READERS],
    /// Number of reads that found no free slot. It distributes the waiting reads over the slots.
    waits: AtomicUsize,
    is_closed: AtomicBool,
}

/// Holds a connection, which is opened when it is needed.
#[derive(Default)]
pub(super) struct Slot {
    connection: Option<Connection>,
    /// Whether it was used since the last `close_unused`.
    was_used: bool,
}

impl Slot {
    pub(super) fn connection(&mut self, path: &Path) -> Result<&Connection> {
        self.was_used = true;
        // A connection whose last read could not be ended would show an old state for ever.
        let connection = match self.connection.take().filter(Connection::is_autocommit) {
            Some(connection) => connection,
            None => open(path, OpenFlags::empty(), READER_CACHE_KIB)?,
        };
        Ok(self.connection.insert(connection))
    }
}

impl Readers {
    /// Locks a slot for one read. It is the first free one, so that few connections are opened.
    pub(super) fn lock(&self) -> Result<MutexGuard<'_, Slot>> {
        let wait = || self.slots[self.waits.fetch_add(1, Ordering::Relaxed) % MAX_READERS].lock();
        let slot = self.slots.iter().find_map(Mutex::try_lock).unwrap_or_else(wait);
        if self.is_closed.load(Ordering::SeqCst) { Err(Error::Closed) } else { Ok(slot) }
    }

    /// Closes the connections that were not used since the last call, except the first.
    pub(super) fn close_unused(&self) {
        for mut slot in self.slots[1..].iter().filter_map(Mutex::try_lock) {
            if !std::mem::take(&mut slot.was_used) {
                slot.connection = None;
            }
        }
    }

    /// Waits for the running reads and closes all connections. Later reads fail.
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

    /// Each connection has a cache of its own, whose memory was not freed after many concurrent reads.
    #[test]
    fn unused_connections_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.sqlite");
        Store::create(&path, None, &[], &[]).unwrap();
        let readers = Readers::default();
        let read_concurrently = |count: usize| {
            let mut slots: Vec<_> = (0..count).map(|_| readers.lock().unwrap()).collect();
            for slot in &mut slots {
                slot.connection(&path).unwrap();
            }
        };
        let open = || readers.slots.iter().filter(|slot| slot.lock().connection.is_some()).count();
        read_concurrently(4);
        readers.close_unused();
        assert_eq!(open(), 4, "they were needed since the last call");
        read_concurrently(2);
        readers.close_unused();
        assert_eq!(open(), 2);
        readers.close_unused();
        assert_eq!(open(), 1);
        readers.close();
        assert_eq!(open(), 0);
        assert!(matches!(readers.lock(), Err(Error::Closed)));
    }
}
