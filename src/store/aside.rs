//! A file of metadata that is read and never written: what the engine writes stays in memory. It
//! writes when it opens a file, even one that it then refuses; so this is how a file is looked
//! at before it is trusted, and how one on a disk that takes no writes can still be read.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Bound;

use parking_lot::Mutex;
use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend, StorageError};

const BLOCK: usize = 4096;

/// Whether the file is locked as long as it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locks {
    Taken,
    /// It takes a file that is open for writing.
    Left,
}

#[derive(Debug)]
pub struct Aside {
    file: FileBackend,
    locks: Locks,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    length: u64,
    /// The file counts up to here: it may have been cut and made longer again.
    of_file: u64,
    blocks: HashMap<u64, Box<[u8]>>,
}

impl Aside {
    pub fn new(file: File, locks: Locks) -> std::result::Result<Self, DatabaseError> {
        let file = FileBackend::new(file)?;
        let length = file.len().map_err(StorageError::Io)?;
        Ok(Self { file, locks, written: Mutex::new(Written { length, of_file: length, blocks: HashMap::new() }) })
    }

    fn lockable(&self) -> std::result::Result<&FileBackend, BackendError> {
        if self.locks == Locks::Taken { Ok(&self.file) } else { Err(BackendError::Unsupported) }
    }

    /// The parts of a range in blocks: number, first byte, length.
    fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = offset + done as u64;
            // Less than a block.
            let within = usize::try_from(at % BLOCK as u64).unwrap_or_default();
            let part = (BLOCK - within).min(length - done);
            done += part;
            (part > 0).then_some((at / BLOCK as u64, within, part))
        })
    }

    fn block(&self, written: &Written, number: u64) -> io::Result<Box<[u8]>> {
        if let Some(block) = written.blocks.get(&number) {
            return Ok(block.clone());
        }
        let mut block = vec![0; BLOCK].into_boxed_slice();
        let from = number * BLOCK as u64;
        let there = written.of_file.saturating_sub(from).min(BLOCK as u64);
        if let Ok(there @ 1..) = usize::try_from(there) {
            self.file.read(from, &mut block[..there])?;
        }
        Ok(block)
    }
}

impl StorageBackend for Aside {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written.lock().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written.lock();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.length) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before a page that it names"));
        }
        let mut out = out;
        for (number, within, part) in Self::parts(offset, out.len()) {
            let (now, rest) = out.split_at_mut(part);
            now.copy_from_slice(&self.block(&written, number)?[within..within + part]);
            out = rest;
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut written = self.written.lock();
        if length < written.length {
            written.of_file = written.of_file.min(length);
            written.blocks.retain(|number, block| {
                let kept = length.saturating_sub(number * BLOCK as u64);
                if let Some(cut) = usize::try_from(kept).ok().and_then(|kept| block.get_mut(kept..)) {
                    cut.fill(0);
                }
                kept > 0
            });
        }
        written.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written.lock();
        let (end, mut rest) = (offset + data.len() as u64, data);
        for (number, within, part) in Self::parts(offset, data.len()) {
            let (now, left) = rest.split_at(part);
            let mut block = self.block(&written, number)?;
            block[within..within + part].copy_from_slice(now);
            written.blocks.insert(number, block);
            rest = left;
        }
        written.length = written.length.max(end);
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.lockable()?.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.lockable()?.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.lockable()?.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.lockable()?.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.lockable()?.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.lockable()?.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random changes, next to a plain vector of bytes.
    #[test]
    fn what_is_written_is_read_and_the_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let original: Vec<u8> = (0..20_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        std::fs::write(&path, &original).unwrap();
        let aside = Aside::new(File::open(&path).unwrap(), Locks::Left).unwrap();
        let mut plain = original.clone();
        let mut random = 7_usize;
        let mut below = |limit: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % limit
        };
        for round in 0..2000 {
            match below(4) {
                0 => {
                    let length = below(40_000);
                    plain.resize(length, 0);
                    aside.set_len(length as u64).unwrap();
                }
                1 | 2 => {
                    let offset = below(plain.len() + 1);
                    let data = vec![round.to_string().as_bytes()[0]; below(9000)];
                    plain.resize(plain.len().max(offset + data.len()), 0);
                    plain[offset..offset + data.len()].copy_from_slice(&data);
                    aside.write(offset as u64, &data).unwrap();
                }
                _ => {
                    let offset = below(plain.len() + 1);
                    let mut out = vec![1; below(plain.len() - offset + 1)];
                    aside.read(offset as u64, &mut out).unwrap();
                    assert_eq!(out, plain[offset..offset + out.len()], "round {round}");
                }
            }
            assert_eq!(aside.len().unwrap(), plain.len() as u64);
        }
        assert!(aside.read(plain.len() as u64, &mut [0]).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), original);
    }
}
