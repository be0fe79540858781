//! The connections that read. They are bounded, because each has file descriptors and a cache.
#![forbid(unsafe_code)]

use std::ops::Deref;
use std::path::Path;

use parking_lot::{Condvar, Mutex};
use rusqlite::Connection;

use super::file::open_reader;
use super::group::run;
use super::{Error, Result};

/// Reads at once. Others wait, and none takes long.
const MAX_READERS: usize = 8;

#[derive(Default)]
pub(super) struct Readers {
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Default)]
struct State {
    /// The one that was used last is taken first.
    idle: Vec<Connection>,
    /// So many of the idle ones, from the first on, were not taken since `close_unused` was called.
    unused: usize,
    /// Those in use included.
    open: usize,
    is_closed: bool,
}

/// A connection, for one read.
pub(super) struct Reader<'r> {
    readers: &'r Readers,
    /// Always there, until it is given back.
    connection: Option<Connection>,
}

impl Readers {
    pub(super) fn take(&self, path: &Path) -> Result<Reader<'_>> {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return Err(Error::Closed);
            }
            if let Some(connection) = state.idle.pop() {
                state.unused = state.unused.min(state.idle.len());
                return Ok(Reader { readers: self, connection: Some(connection) });
            }
            if state.open < MAX_READERS {
                break;
            }
            self.returned.wait(&mut state);
        }
        state.open += 1;
        drop(state);
        // If the connection cannot be opened, dropping this reader takes it off the count of open ones.
        let mut reader = Reader { readers: self, connection: None };
        reader.connection = Some(open_reader(path)?);
        Ok(reader)
    }

    /// Closes those that nobody needed since the last call, but for one.
    pub(super) fn close_unused(&self) {
        let mut state = self.state.lock();
        let unused = state.unused.saturating_sub(1);
        let closed: Vec<Connection> = state.idle.drain(..unused).collect();
        state.open -= closed.len();
        state.unused = state.idle.len();
        drop(state);
    }

    /// Nothing can be read any more. Those in use are closed when they are given back.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        state.idle.clear();
        state.unused = 0;
        self.returned.notify_all();
    }
}

impl Deref for Reader<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection.as_ref().expect("it is given back at the end only")
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let connection = self.connection.take().filter(|connection| {
            // One whose transaction does not end would show an old state for ever.
            connection.is_autocommit() || run(connection, "ROLLBACK").is_ok() && connection.is_autocommit()
        });
        let mut state = self.readers.state.lock();
        match connection {
            Some(connection) if !state.is_closed => state.idle.push(connection),
            _ => state.open -= 1,
        }
        self.readers.returned.notify_one();
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
        let open = || readers.state.lock().open;
        drop([(); 4].map(|()| readers.take(&path).unwrap()));
        readers.close_unused();
        assert_eq!(open(), 4, "they were needed since the last call");
        drop([(); 2].map(|()| readers.take(&path).unwrap()));
        readers.close_unused();
        assert_eq!(open(), 3, "two were needed at once");
        readers.close_unused();
        assert_eq!(open(), 1);
        readers.close();
        readers.close_unused();
    }
}
