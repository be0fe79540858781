//! The metadata of a disk that takes no writes (full, or turned read-only): what is in the file
//! can be read, and what the engine wants to write while it opens it stays in memory.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use parking_lot::Mutex;
use redb::StorageBackend;

const BLOCK: u64 = 4096;

#[derive(Debug)]
pub struct Frozen {
    file: File,
    changed: Mutex<Changed>,
}

#[derive(Debug)]
struct Changed {
    length: u64,
    /// What of the file still counts: a shorter length was asked for in between.
    of_file: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Frozen {
    pub fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, changed: Mutex::new(Changed { length, of_file: length, blocks: BTreeMap::new() }) })
    }

    /// Block `number` as it is now.
    fn block(&self, changed: &Changed, number: u64) -> io::Result<Vec<u8>> {
        if let Some(block) = changed.blocks.get(&number) {
            return Ok(block.clone());
        }
        let mut block = vec![0; 4096];
        let start = number * BLOCK;
        let in_file = usize::try_from(changed.of_file.saturating_sub(start).min(BLOCK)).unwrap_or(0);
        self.file.read_exact_at(&mut block[..in_file], start)?;
        Ok(block)
    }

    /// Calls `each` with the number of a block, and which bytes of it and of `bytes` bytes meet.
    fn pieces(
        offset: u64,
        bytes: usize,
        mut each: impl FnMut(u64, std::ops::Range<usize>, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < bytes {
            let at = offset + done as u64;
            let within = usize::try_from(at % BLOCK).unwrap_or(0);
            let length = (4096 - within).min(bytes - done);
            each(at / BLOCK, within..within + length, done..done + length)?;
            done += length;
        }
        Ok(())
    }
}

impl StorageBackend for Frozen {
    fn len(&self) -> io::Result<u64> {
        Ok(self.changed.lock().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let changed = self.changed.lock();
        if offset.saturating_add(out.len() as u64) > changed.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Self::pieces(offset, out.len(), |number, of_block, of_out| {
            out[of_out].copy_from_slice(&self.block(&changed, number)?[of_block]);
            Ok(())
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut changed = self.changed.lock();
        if length < changed.length {
            changed.of_file = changed.of_file.min(length);
            changed.blocks.split_off(&length.div_ceil(BLOCK));
            let within = usize::try_from(length % BLOCK).unwrap_or(0);
            if let Some(last) = changed.blocks.get_mut(&(length / BLOCK)) {
                last[within..].fill(0);
            }
        }
        changed.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut changed = self.changed.lock();
        Self::pieces(offset, data.len(), |number, of_block, of_data| {
            let mut block = self.block(&changed, number)?;
            block[of_block].copy_from_slice(&data[of_data]);
            changed.blocks.insert(number, block);
            Ok(())
        })?;
        changed.length = changed.length.max(offset + data.len() as u64);
        Ok(())
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
        let frozen = Frozen::new(File::open(&path).unwrap()).unwrap();
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
                    frozen.set_len(length as u64).unwrap();
                }
                1 | 2 => {
                    let offset = below(plain.len() + 1);
                    let data = vec![round.to_string().as_bytes()[0]; below(9000)];
                    plain.resize(plain.len().max(offset + data.len()), 0);
                    plain[offset..offset + data.len()].copy_from_slice(&data);
                    frozen.write(offset as u64, &data).unwrap();
                }
                _ => {
                    let offset = below(plain.len() + 1);
                    let mut out = vec![1; below(plain.len() - offset + 1)];
                    frozen.read(offset as u64, &mut out).unwrap();
                    assert_eq!(out, plain[offset..offset + out.len()], "round {round}");
                }
            }
            assert_eq!(frozen.len().unwrap(), plain.len() as u64);
        }
        assert!(frozen.read(plain.len() as u64, &mut [0]).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), original);
    }
}
