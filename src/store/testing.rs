//! A disk for tests of the store: a FUSE file system in memory that can fail at any step and lose power. It is mounted, so
//! SQLite uses it like a real disk.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fastrand::Rng;
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};
use nix::mount::{MntFlags, umount2};
use parking_lot::Mutex;

use crate::testing::{Fault, Kind, Steps, Verdict};

/// Number of bytes that a disk writes atomically.
const SECTOR: usize = 512;
/// How long the kernel may cache metadata, which only changes through it.
const TTL: Duration = Duration::from_secs(3600);
const ROOT: u64 = 1;

/// What is left on the disk when the process or the machine dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerLoss {
    /// Everything that was written, because only the process died.
    Written,
    /// What was synced, and a part of the rest that this seed selects, because power was lost.
    Synced(u64),
}

/// The disk. It is mounted as long as this exists.
pub struct FaultyDisk {
    shared: Arc<Mutex<Shared>>,
    _session: BackgroundSession,
    mountpoint: tempfile::TempDir,
}

struct Shared {
    steps: Arc<Steps>,
    names: BTreeMap<OsString, u64>,
    files: BTreeMap<u64, File>,
    open_files: usize,
    /// Whether the kernel passes on every read instead of using its cache.
    is_uncached: bool,
}

#[derive(Clone, Default)]
struct File {
    /// Whether its writes and reads are steps.
    is_counted: bool,
    /// The content that processes see.
    current: Vec<u8>,
    /// The content that survives a loss of power,
    synced: Vec<u8>,
    /// and the later writes, each of which survives by chance.
    unsynced: Vec<UnsyncedWrite>,
}

#[derive(Clone)]
enum UnsyncedWrite {
    Length(usize),
    Write(usize, Vec<u8>),
}

impl UnsyncedWrite {
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

impl File {
    fn named(name: &OsStr) -> Self {
        let is_counted = name.as_bytes().starts_with(b"metadata.sqlite");
        Self { is_counted, ..Self::default() }
    }

    fn change(&mut self, change: UnsyncedWrite) {
        change.apply(&mut self.current);
        self.unsynced.push(change);
    }

    fn after(&self, loss: PowerLoss) -> Self {
        let bytes = match loss {
            PowerLoss::Written => self.current.clone(),
            PowerLoss::Synced(seed) => self.after_power_loss(&mut Rng::with_seed(seed)),
        };
        Self { is_counted: self.is_counted, synced: bytes.clone(), current: bytes, unsynced: Vec::new() }
    }

    fn after_power_loss(&self, random: &mut Rng) -> Vec<u8> {
        let mut bytes = self.synced.clone();
        for write in &self.unsynced {
            match write {
                UnsyncedWrite::Length(_) if random.bool() => write.apply(&mut bytes),
                UnsyncedWrite::Length(_) => {}
                UnsyncedWrite::Write(offset, data) => {
                    for (n, sector) in data.chunks(SECTOR).enumerate().filter(|_| random.bool()) {
                        UnsyncedWrite::Write(offset + n * SECTOR, sector.to_owned()).apply(&mut bytes);
                    }
                }
            }
        }
        bytes
    }
}

impl Default for FaultyDisk {
    fn default() -> Self {
        Self::with(BTreeMap::new(), BTreeMap::new())
    }
}

impl FaultyDisk {
    fn with(names: BTreeMap<OsString, u64>, files: BTreeMap<u64, File>) -> Self {
        let mountpoint = tempfile::tempdir().unwrap();
        let steps = Arc::new(Steps::with(Fault::None));
        let shared = Arc::new(Mutex::new(Shared { steps, names, files, open_files: 0, is_uncached: false }));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("disk".to_owned()), MountOption::DefaultPermissions];
        let session = Session::new(DiskFilesystem(Arc::clone(&shared)), mountpoint.path(), &config).unwrap();
        let session = session.spawn().unwrap();
        Self { shared, _session: session, mountpoint }
    }

    /// The path of the metadata on it.
    pub fn metadata(&self) -> PathBuf {
        self.mountpoint.path().join("metadata.sqlite")
    }

    /// Makes each read of the files that are opened later a step.
    pub fn without_cache(&self) {
        self.shared.lock().is_uncached = true;
    }

    /// Counts the following calls as these steps. Waits until the previous store has closed its files.
    pub fn count(&self, steps: &Arc<Steps>) {
        while self.shared.lock().open_files > 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
        self.shared.lock().steps = Arc::clone(steps);
    }

    /// A new disk with what is left, for another process.
    #[must_use]
    pub fn after(&self, loss: PowerLoss) -> Self {
        let shared = self.shared.lock();
        let files = shared.files.iter().map(|(inode, file)| (*inode, file.after(loss))).collect();
        Self::with(shared.names.clone(), files)
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        // A background thread may drop the store after the test, and a plain unmount fails while a file is open.
        let _ = umount2(self.mountpoint.path(), MntFlags::MNT_DETACH);
    }
}

impl Shared {
    fn next_step(&self, inode: u64, call: &'static str, kind: Kind) -> Result<Verdict, Errno> {
        if !self.files.get(&inode).ok_or(Errno::ENOENT)?.is_counted {
            return Ok(Verdict::Done);
        }
        match self.steps.next(call, Path::new("metadata"), kind) {
            Verdict::Failed(errno) => Err(Errno::from_i32(errno as i32)),
            verdict => Ok(verdict),
        }
    }

    fn file(&mut self, inode: u64) -> &mut File {
        self.files.get_mut(&inode).unwrap()
    }

    fn attributes(&self, inode: u64) -> Result<FileAttr, Errno> {
        if inode == ROOT {
            return Ok(attributes(ROOT, FileType::Directory, 0));
        }
        let file = self.files.get(&inode).ok_or(Errno::ENOENT)?;
        Ok(attributes(inode, FileType::RegularFile, file.current.len() as u64))
    }

    fn write(&mut self, inode: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let verdict = self.next_step(inode, "write", Kind::Change)?;
        let length = if verdict == Verdict::Done { data.len() } else { data.len() / 2 };
        let change = UnsyncedWrite::Write(usize::try_from(offset).unwrap(), data[..length].to_owned());
        self.file(inode).change(change);
        if verdict == Verdict::Done { Ok(u32::try_from(length).unwrap()) } else { Err(Errno::EIO) }
    }

    fn set_length(&mut self, inode: u64, length: u64) -> Result<(), Errno> {
        if self.next_step(inode, "set_len", Kind::Change)? != Verdict::Done {
            return Err(Errno::EIO);
        }
        self.file(inode).change(UnsyncedWrite::Length(usize::try_from(length).unwrap()));
        Ok(())
    }

    fn sync(&mut self, inode: u64) -> Result<(), Errno> {
        if self.next_step(inode, "sync", Kind::Change)? != Verdict::Done {
            return Err(Errno::EIO);
        }
        let file = self.file(inode);
        file.synced.clone_from(&file.current);
        file.unsynced.clear();
        Ok(())
    }
}

fn attributes(inode: u64, kind: FileType, size: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(inode),
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The file system as `fuser` calls it.
struct DiskFilesystem(Arc<Mutex<Shared>>);

impl Filesystem for DiskFilesystem {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let shared = self.0.lock();
        match shared.names.get(name).ok_or(Errno::ENOENT).and_then(|inode| shared.attributes(*inode)) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.lock().attributes(inode.0) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut shared = self.0.lock();
        let set = size.map_or(Ok(()), |size| shared.set_length(inode.0, size));
        match set.and_then(|()| shared.attributes(inode.0)) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.0.lock().names.remove(name) {
            Some(_) => reply.ok(),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut shared = self.0.lock();
        let Some(inode) = shared.names.remove(name) else { return reply.error(Errno::ENOENT) };
        shared.names.insert(new_name.to_owned(), inode);
        shared.file(inode).is_counted = File::named(new_name).is_counted;
        reply.ok();
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let mut shared = self.0.lock();
        shared.open_files += 1;
        let flags = if shared.is_uncached { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::FOPEN_KEEP_CACHE };
        reply.opened(FileHandle(0), flags);
    }

    fn create(&self, _: &Request, _: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let mut shared = self.0.lock();
        let inode = shared.files.keys().max().unwrap_or(&ROOT) + 1;
        shared.names.insert(name.to_owned(), inode);
        shared.files.insert(inode, File::named(name));
        shared.open_files += 1;
        let attributes = attributes(inode, FileType::RegularFile, 0);
        reply.created(&TTL, &attributes, Generation(0), FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.lock().open_files -= 1;
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut shared = self.0.lock();
        if let Err(errno) = shared.next_step(inode.0, "read", Kind::Question) {
            return reply.error(errno);
        }
        let bytes = &shared.file(inode.0).current;
        let start = usize::try_from(offset).unwrap().min(bytes.len());
        let end = start.saturating_add(size as usize).min(bytes.len());
        reply.data(&bytes[start..end]);
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.lock().write(inode.0, offset, data) {
            Ok(length) => reply.written(length),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.0.lock().sync(inode.0) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
