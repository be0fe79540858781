//! A disk under the store, for tests: it can fail at any step, and lose power.
#![forbid(unsafe_code)]

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::{Builder, Database, DatabaseError, StorageBackend};

use super::Open;
use crate::faults::{Kind, Steps, Verdict};

/// What the disk holds, from one process to the next.
#[derive(Debug, Default)]
pub struct Disk(Arc<Mutex<Content>>);

#[derive(Clone, Debug, Default)]
struct Content {
    /// A process has it open.
    in_use: bool,
    /// As every process sees it.
    now: Vec<u8>,
    /// What a loss of power leaves for certain,
    synced: Vec<u8>,
    /// and what it leaves, or does not, of what was written since.
    pending: Vec<Pending>,
}

#[derive(Clone, Debug)]
enum Pending {
    Length(usize),
    Write(usize, Vec<u8>),
}

impl Pending {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Length(length) => bytes.resize(*length, 0),
            Self::Write(offset, data) => {
                let end = offset + data.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*offset..end].copy_from_slice(data);
            }
        }
    }
}

/// What a process, or a machine, that died leaves on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Everything that was written: only the process died.
    Written,
    /// What was synced, and a part of the rest that this number chooses: power was lost.
    Synced(u64),
}

impl Disk {
    /// Opens the store on it, with the steps counted.
    pub fn opener(&self, steps: &Arc<Steps>) -> Open {
        let (content, steps) = (Arc::clone(&self.0), Arc::clone(steps));
        Box::new(move |builder: &Builder| -> Result<Database, DatabaseError> {
            if std::mem::replace(&mut content.lock().in_use, true) {
                return Err(DatabaseError::DatabaseAlreadyOpen);
            }
            builder.create_with_backend(Backend { content: Arc::clone(&content), steps: Arc::clone(&steps) })
        })
    }

    /// A copy of what is left, for another process.
    #[must_use]
    pub fn after(&self, left: Left) -> Self {
        let mut content = self.0.lock().clone();
        if let Left::Synced(seed) = left {
            /// What a disk writes at once.
            const SECTOR: usize = 512;
            let mut random = seed;
            let mut is_lucky = || {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                random >> 63 == 0
            };
            let mut bytes = std::mem::take(&mut content.synced);
            for pending in &content.pending {
                match pending {
                    Pending::Length(_) => pending.apply(&mut bytes),
                    Pending::Write(offset, data) => {
                        for (n, sector) in data.chunks(SECTOR).enumerate().filter(|_| is_lucky()) {
                            Pending::Write(offset + n * SECTOR, sector.to_owned()).apply(&mut bytes);
                        }
                    }
                }
            }
            content.now = bytes;
        }
        content.pending.clear();
        content.synced.clone_from(&content.now);
        content.in_use = false;
        Self(Arc::new(Mutex::new(content)))
    }
}

struct Backend {
    content: Arc<Mutex<Content>>,
    steps: Arc<Steps>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.content.lock().in_use = false;
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a disk of a test")
    }
}

impl Backend {
    fn take(&self, call: &'static str, kind: Kind) -> io::Result<Verdict> {
        match self.steps.take(call, Path::new("metadata"), kind) {
            Verdict::Failed(errno) => Err(errno.into()),
            verdict => Ok(verdict),
        }
    }

    fn change(&self, call: &'static str, whole: Pending, half: Option<Pending>) -> io::Result<()> {
        let verdict = self.take(call, Kind::Change)?;
        let Some(change) = (if verdict == Verdict::Done { Some(whole) } else { half }) else {
            return Err(nix::errno::Errno::EIO.into());
        };
        let mut content = self.content.lock();
        change.apply(&mut content.now);
        content.pending.push(change);
        if verdict == Verdict::Done { Ok(()) } else { Err(nix::errno::Errno::EIO.into()) }
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.take("read", Kind::Question)?;
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let content = self.content.lock();
        let bytes = content.now.get(offset..).and_then(|bytes| bytes.get(..out.len()));
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change("set_len", Pending::Length(usize::try_from(len).unwrap_or(usize::MAX)), None)
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.take("sync", Kind::Change)? == Verdict::Done {
            let mut content = self.content.lock();
            content.synced = content.now.clone();
            content.pending.clear();
            return Ok(());
        }
        Err(nix::errno::Errno::EIO.into())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let half = Pending::Write(offset, data[..data.len() / 2].to_owned());
        self.change("write", Pending::Write(offset, data.to_owned()), Some(half))
    }
}
