//! The repository as the kernel sees it. Every request passes the gate; what it needs is then
//! looked up by path, so a new revision is a new answer to the same question.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, Notifier, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyXattr,
};

use crate::attributes;
use crate::backend::{Backend, Content, Entry};
use crate::error_log::ErrorLog;
use crate::gate::{Gate, Refuse, Request, Subject};
use crate::inodes::{Inodes, ROOT};
use crate::magic::MagicAttributes;
use crate::options::Options;
use cvmfs_testbed::format;

pub struct Served {
    pub gate: Gate,
    backend: Box<dyn Backend>,
    pub magic: MagicAttributes,
    log: Arc<ErrorLog>,
    /// To whom everything belongs, if not to whom the repository says.
    claimed_by: Option<(u32, u32)>,
    inodes: Inodes,
    handles: Mutex<HashMap<u64, Handle>>,
    next_handle: AtomicU64,
    name_length: u32,
    ttl: Duration,
    /// Held by each request until it is answered, and alone by the change to another revision: no
    /// answer of the old revision may reach the kernel after its caches were told of the new one.
    revision: RwLock<()>,
}

#[derive(Clone)]
enum Handle {
    File(Arc<dyn Content>),
    /// The entries at the time of the open, with `.` and `..`.
    Directory(Arc<Vec<(Vec<u8>, FileAttr)>>),
}

impl Served {
    pub fn new(backend: Box<dyn Backend>, magic: MagicAttributes, log: Arc<ErrorLog>, options: &Options) -> Self {
        Self {
            gate: Gate::new(Arc::clone(&log)),
            backend,
            magic,
            log,
            claimed_by: options.claimed_by,
            inodes: Inodes::default(),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            name_length: options.name_length,
            ttl: options.ttl,
            revision: RwLock::new(()),
        }
    }

    fn attributes_at(&self, path: &[u8]) -> Result<FileAttr, Errno> {
        let entry = self.backend.lookup(path)?;
        Ok(self.attributes(self.inodes.number(path, &entry), &entry))
    }

    fn attributes(&self, inode: u64, entry: &Entry) -> FileAttr {
        let mut attributes = attributes::of(inode, entry);
        if let Some((uid, gid)) = self.claimed_by {
            (attributes.uid, attributes.gid) = (uid, gid);
        }
        attributes
    }

    /// The present entry of an inode, at one of the paths at which it was seen.
    fn find(&self, inode: u64) -> Result<(Arc<[u8]>, Arc<Entry>), Errno> {
        let mut failure = Errno::ENOENT;
        for path in self.inodes.paths(inode) {
            match self.backend.lookup(&path) {
                Ok(entry) if self.inodes.is(inode, &path, &entry) => return Ok((path, entry)),
                Ok(_) => {}
                Err(errno) => failure = errno,
            }
        }
        Err(failure)
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> Result<FileAttr, Errno> {
        let (path, _) = self.find(parent)?;
        self.attributes_at(&format::join(&path, name))
    }

    fn getattr(&self, inode: u64) -> Result<FileAttr, Errno> {
        self.find(inode).map(|(_, entry)| self.attributes(inode, &entry))
    }

    fn readlink(&self, inode: u64) -> Result<Vec<u8>, Errno> {
        self.find(inode).map(|(_, entry)| entry.target.clone())
    }

    fn open(&self, inode: u64) -> Result<FileHandle, Errno> {
        let (path, entry) = self.find(inode)?;
        Ok(self.keep(Handle::File(self.backend.open(&path, &entry)?)))
    }

    fn read(&self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        match self.handle(handle)? {
            Handle::File(content) => content.read(offset, size.try_into().map_err(|_| Errno::EINVAL)?),
            Handle::Directory(_) => Err(Errno::EISDIR),
        }
    }

    fn opendir(&self, inode: u64) -> Result<FileHandle, Errno> {
        let (path, entry) = self.find(inode)?;
        let above = self.attributes_at(format::parent(&path))?;
        let mut listing = vec![(b".".to_vec(), self.attributes(inode, &entry)), (b"..".to_vec(), above)];
        for (name, entry) in self.backend.list(&path)? {
            let number = self.inodes.number(&format::join(&path, &name), &entry);
            listing.push((name, self.attributes(number, &entry)));
        }
        Ok(self.keep(Handle::Directory(Arc::new(listing))))
    }

    /// Gives `add` what comes at `offset` and later, each with the offset after it, until it says
    /// that its buffer is full.
    fn readdir(
        &self,
        handle: u64,
        offset: u64,
        mut add: impl FnMut(u64, &OsStr, &FileAttr) -> bool,
    ) -> Result<(), Errno> {
        let Handle::Directory(listing) = self.handle(handle)? else { return Err(Errno::ENOTDIR) };
        let skipped = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
        for (next, (name, attributes)) in (offset + 1..).zip(listing.iter().skip(skipped)) {
            if add(next, OsStr::from_bytes(name), attributes) {
                break;
            }
        }
        Ok(())
    }

    fn extended_attribute(&self, inode: u64, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let (path, entry) = self.find(inode)?;
        if let Some(value) = self.magic.value(name, &*self.backend, &path, &entry) {
            return value;
        }
        entry.attributes.iter().find(|(each, _)| each == name).map(|(_, value)| value.clone()).ok_or(Errno::ENODATA)
    }

    fn extended_attributes(&self, inode: u64) -> Result<Vec<u8>, Errno> {
        let (path, entry) = self.find(inode)?;
        let mut names = self.magic.list(&path, &entry);
        names.extend(entry.attributes.iter().flat_map(|(name, _)| [name.as_slice(), b"\0"].concat()));
        Ok(names)
    }

    /// The names in a directory. Other entries have none.
    fn names(&self, path: &[u8], entry: Option<&Entry>) -> HashSet<Vec<u8>> {
        let is_directory = entry.is_some_and(|entry| attributes::kind(entry) == FileType::Directory);
        let listed = if is_directory { self.backend.list(path).unwrap_or_default() } else { Vec::new() };
        listed.into_iter().map(|(name, _)| name).collect()
    }

    fn refuse(&self, reply: impl Refuse, errno: Errno) {
        self.log.count(errno);
        reply.refuse(errno);
    }

    fn keep(&self, handle: Handle) -> FileHandle {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).insert(number, handle);
        FileHandle(number)
    }

    fn handle(&self, number: u64) -> Result<Handle, Errno> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).get(&number).cloned().ok_or(Errno::EBADF)
    }

    fn release(&self, number: u64) {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }

    /// Takes up the newest revision and tells the kernel what it must forget: only what is
    /// different, because to forget a directory's name unmounts what is mounted on it.
    pub fn reload(&self, notifier: &Notifier) -> Result<u64, String> {
        if self.gate.hangs() {
            // A waiting lookup holds its directory's lock, for which forgetting would wait.
            return Err("reload: requests are made to hang; send `normal` first".to_owned());
        }
        let alone = self.revision.write().unwrap_or_else(PoisonError::into_inner);
        let old_revision = self.backend.revision();
        let before: Vec<_> = self
            .inodes
            .known()
            .into_iter()
            .map(|(path, inode)| {
                let old = self.backend.lookup(&path).ok();
                (self.names(&path, old.as_deref()), old, path, inode)
            })
            .collect();
        let revision = self.backend.reload()?;
        drop(alone);
        if revision == old_revision {
            return Ok(revision);
        }
        for (names, old, path, inode) in before {
            let new = self.backend.lookup(&path).ok();
            for name in self.names(&path, new.as_deref()).difference(&names) {
                // The kernel may remember that there was none; that it does not is no error.
                let _ = notifier.inval_entry(INodeNo(inode), OsStr::from_bytes(name));
            }
            if old == new {
                continue;
            }
            let same = new.is_some_and(|entry| self.inodes.is(inode, &path, &entry));
            forget(&path, inode, same, self.inodes.current(format::parent(&path)), notifier)
                .map_err(|error| format!("reload: make the kernel forget {:?}: {error}", OsStr::from_bytes(&path)))?;
        }
        Ok(revision)
    }
}

fn forget(path: &[u8], inode: u64, same: bool, above: Option<u64>, notifier: &Notifier) -> io::Result<()> {
    if !same && let Some(above) = above {
        notifier.inval_entry(INodeNo(above), OsStr::from_bytes(format::name(path)))?;
    }
    notifier.inval_inode(INodeNo(inode), 0, 0)
}

/// The file system that `fuser` calls.
pub struct FileSystem(Arc<Served>);

impl FileSystem {
    pub fn new(served: Arc<Served>) -> Self {
        Self(served)
    }

    fn pass<R: Refuse>(
        &self,
        request: Request,
        inode: INodeNo,
        reply: R,
        answer: impl FnOnce(&Served, R) + Send + 'static,
    ) {
        // A lookup is about what it looks for.
        let subject = if inode.0 == ROOT && request != Request::Lookup { Subject::Root } else { Subject::Other };
        let served = Arc::clone(&self.0);
        self.0.gate.pass(request, subject, reply, move |reply| {
            let _turn = served.revision.read().unwrap_or_else(PoisonError::into_inner);
            answer(&served, reply);
        });
    }
}

fn attribute_reply(served: &Served, reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Err(errno) => served.refuse(reply, errno),
        Ok(value) => match u32::try_from(value.len()) {
            Ok(length) if size == 0 => reply.size(length),
            Ok(length) if length <= size => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        },
    }
}

impl Filesystem for FileSystem {
    fn init(&mut self, _: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        // The root is inode 1 because nothing was numbered before it.
        self.0.attributes_at(b"").map_err(|errno| io::Error::from_raw_os_error(errno.code()))?;
        for wanted in
            [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DO_READDIRPLUS, InitFlags::FUSE_READDIRPLUS_AUTO]
        {
            // A kernel without it is slower, no more.
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.pass(Request::Lookup, parent, reply, move |served, reply| match served.lookup(parent.0, &name) {
            Ok(attributes) => reply.entry(&served.ttl, &attributes, Generation(0)),
            // The real client answers so that the kernel caches the absence.
            Err(errno) if errno.code() == Errno::ENOENT.code() => {
                reply.entry(&served.ttl, &attributes::of_nothing(), Generation(0));
            }
            Err(errno) => served.refuse(reply, errno),
        });
    }

    fn getattr(&self, _: &fuser::Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.pass(Request::Getattr, inode, reply, move |served, reply| match served.getattr(inode.0) {
            Ok(attributes) => reply.attr(&served.ttl, &attributes),
            Err(errno) => served.refuse(reply, errno),
        });
    }

    fn readlink(&self, _: &fuser::Request, inode: INodeNo, reply: ReplyData) {
        self.pass(Request::Readlink, inode, reply, move |served, reply| match served.readlink(inode.0) {
            Ok(target) => reply.data(&target),
            Err(errno) => served.refuse(reply, errno),
        });
    }

    fn open(&self, _: &fuser::Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.pass(Request::Open, inode, reply, move |served, reply| match served.open(inode.0) {
            Ok(handle) => reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE),
            Err(errno) => served.refuse(reply, errno),
        });
    }

    fn read(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.pass(Request::Read, inode, reply, move |served, reply| match served.read(handle.0, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => served.refuse(reply, errno),
        });
    }

    fn flush(&self, _: &fuser::Request, inode: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.pass(Request::Flush, inode, reply, |_, reply| reply.ok());
    }

    fn release(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.pass(Request::Release, inode, reply, move |served, reply| {
            served.release(handle.0);
            reply.ok();
        });
    }

    fn opendir(&self, _: &fuser::Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.pass(Request::Opendir, inode, reply, move |served, reply| match served.opendir(inode.0) {
            Ok(handle) => reply.opened(handle, FopenFlags::empty()),
            Err(errno) => served.refuse(reply, errno),
        });
    }

    fn readdir(&self, _: &fuser::Request, inode: INodeNo, handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.pass(Request::Readdir, inode, reply, move |served, mut reply| {
            let add = |next, name: &OsStr, each: &FileAttr| reply.add(each.ino, next, each.kind, name);
            match served.readdir(handle.0, offset, add) {
                Ok(()) => reply.ok(),
                Err(errno) => served.refuse(reply, errno),
            }
        });
    }

    fn readdirplus(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.pass(Request::Readdir, inode, reply, move |served, mut reply| {
            let add =
                |next, name: &OsStr, each: &FileAttr| reply.add(each.ino, next, name, &served.ttl, each, Generation(0));
            match served.readdir(handle.0, offset, add) {
                Ok(()) => reply.ok(),
                Err(errno) => served.refuse(reply, errno),
            }
        });
    }

    fn releasedir(&self, _: &fuser::Request, inode: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.pass(Request::Releasedir, inode, reply, move |served, reply| {
            served.release(handle.0);
            reply.ok();
        });
    }

    fn statfs(&self, _: &fuser::Request, inode: INodeNo, reply: ReplyStatfs) {
        self.pass(Request::Statfs, inode, reply, |served, reply| {
            reply.statfs(1 << 20, 1 << 19, 1 << 19, 0, 0, 4096, served.name_length, 4096);
        });
    }

    fn getxattr(&self, _: &fuser::Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        self.pass(Request::Getxattr, inode, reply, move |served, reply| {
            attribute_reply(served, reply, size, served.extended_attribute(inode.0, &name));
        });
    }

    fn listxattr(&self, _: &fuser::Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        self.pass(Request::Listxattr, inode, reply, move |served, reply| {
            attribute_reply(served, reply, size, served.extended_attributes(inode.0));
        });
    }
}
