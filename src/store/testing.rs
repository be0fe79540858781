//! A disk under the store, for tests: a file system in memory that can fail at any step, and lose power. It is mounted,
//! so what SQLite meets is what it meets on a real disk.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};
use nix::mount::{MntFlags, umount2};
use parking_lot::Mutex;

use crate::testing::{Fault, Kind, Steps, Verdict};

/// What a disk writes at once.
const SECTOR: usize = 512;
/// How long the kernel may believe an answer. Nothing changes behind its back.
const TTL: Duration = Duration::from_secs(3600);
const ROOT: u64 = 1;

/// What a process, or a machine, that died leaves on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerLoss {
    /// Everything that was written: only the process died.
    Written,
    /// What was synced, and a part of the rest that this number chooses: power was lost.
    Synced(u64),
}

/// What the disk holds, mounted as long as this lives.
pub struct FaultyDisk {
    shared: Arc<Mutex<Shared>>,
    _session: BackgroundSession,
    mountpoint: tempfile::TempDir,
}

struct Shared {
    steps: Arc<Steps>,
    names: BTreeMap<OsString, u64>,
    files: BTreeMap<u64, File>,
    opened: usize,
    /// Every read of the store is asked here, and not answered by the kernel's memory.
    is_uncached: bool,
}

#[derive(Clone, Default)]
struct File {
    is_counted: bool,
    /// As every process sees it.
    now: Vec<u8>,
    /// What a loss of power leaves for certain,
    synced: Vec<u8>,
    /// and what it leaves, or does not, of what was written since.
    pending: Vec<UnsyncedWrite>,
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
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    fn after(&self, left: PowerLoss) -> Self {
        let mut bytes = self.now.clone();
        if let PowerLoss::Synced(seed) = left {
            let mut random = seed;
            let mut is_lucky = || {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                random >> 63 == 0
            };
            bytes.clone_from(&self.synced);
            for pending in &self.pending {
                match pending {
                    UnsyncedWrite::Length(_) if is_lucky() => pending.apply(&mut bytes),
                    UnsyncedWrite::Length(_) => {}
                    UnsyncedWrite::Write(offset, data) => {
                        for (n, sector) in data.chunks(SECTOR).enumerate().filter(|_| is_lucky()) {
                            UnsyncedWrite::Write(offset + n * SECTOR, sector.to_owned()).apply(&mut bytes);
                        }
                    }
                }
            }
        }
        Self { is_counted: self.is_counted, synced: bytes.clone(), now: bytes, pending: Vec::new() }
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
        let shared = Arc::new(Mutex::new(Shared { steps, names, files, opened: 0, is_uncached: false }));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("disk".to_owned()), MountOption::DefaultPermissions];
        let session = Session::new(Mounted(Arc::clone(&shared)), mountpoint.path(), &config).unwrap();
        let session = session.spawn().unwrap();
        Self { shared, _session: session, mountpoint }
    }

    /// Where the metadata is on it.
    pub fn metadata(&self) -> PathBuf {
        self.mountpoint.path().join("metadata.sqlite")
    }

    /// For files that are opened from here on, each read is a step of its own.
    pub fn without_cache(&self) {
        self.shared.lock().is_uncached = true;
    }

    /// What happens from here on are these steps. Waits until the process before has closed its files.
    pub fn count(&self, steps: &Arc<Steps>) {
        while self.shared.lock().opened > 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
        self.shared.lock().steps = Arc::clone(steps);
    }

    /// A copy of what is left, for another process.
    #[must_use]
    pub fn after(&self, left: PowerLoss) -> Self {
        let shared = self.shared.lock();
        let files = shared.files.iter().map(|(inode, file)| (*inode, file.after(left))).collect();
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
    fn take(&self, inode: u64, call: &'static str, kind: Kind) -> Result<Verdict, Errno> {
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
        Ok(attributes(inode, FileType::RegularFile, file.now.len() as u64))
    }

    fn write(&mut self, inode: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let verdict = self.take(inode, "write", Kind::Change)?;
        let length = if verdict == Verdict::Done { data.len() } else { data.len() / 2 };
        let change = UnsyncedWrite::Write(usize::try_from(offset).unwrap(), data[..length].to_owned());
        self.file(inode).change(change);
        if verdict == Verdict::Done { Ok(u32::try_from(length).unwrap()) } else { Err(Errno::EIO) }
    }

    fn set_length(&mut self, inode: u64, length: u64) -> Result<(), Errno> {
        if self.take(inode, "set_len", Kind::Change)? != Verdict::Done {
            return Err(Errno::EIO);
        }
        self.file(inode).change(UnsyncedWrite::Length(usize::try_from(length).unwrap()));
        Ok(())
    }

    fn sync(&mut self, inode: u64) -> Result<(), Errno> {
        if self.take(inode, "sync", Kind::Change)? != Verdict::Done {
            return Err(Errno::EIO);
        }
        let file = self.file(inode);
        file.synced.clone_from(&file.now);
        file.pending.clear();
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

/// What `fuser` calls.
struct Mounted(Arc<Mutex<Shared>>);

impl Filesystem for Mounted {
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
        shared.opened += 1;
        let flags = if shared.is_uncached { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::FOPEN_KEEP_CACHE };
        reply.opened(FileHandle(0), flags);
    }

    fn create(&self, _: &Request, _: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let mut shared = self.0.lock();
        let inode = shared.files.keys().max().unwrap_or(&ROOT) + 1;
        shared.names.insert(name.to_owned(), inode);
        shared.files.insert(inode, File::named(name));
        shared.opened += 1;
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
        self.0.lock().opened -= 1;
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
        if let Err(errno) = shared.take(inode.0, "read", Kind::Question) {
            return reply.error(errno);
        }
        let bytes = &shared.file(inode.0).now;
        let from = usize::try_from(offset).unwrap().min(bytes.len());
        let to = from.saturating_add(size as usize).min(bytes.len());
        reply.data(&bytes[from..to]);
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
