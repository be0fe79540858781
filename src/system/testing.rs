//! A double of the host, in which a chosen call fails, or something happens before each call.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::{Attributes, DirHandle, DiskUsage, Error, FileSystem, FileType, Host, Result, Status, Sys, Unmount};
use crate::testing::{Fault, Kind, Steps, Verdict};

/// Passes every call to the host and records it.
pub struct FaultySys {
    host: Host,
    steps: Arc<Steps>,
    before_call: Option<BeforeCall>,
    /// Number of directories that each directory pretends to contain.
    fake_entries: Option<usize>,
    /// Number of pretended entries that were read.
    names_read: AtomicUsize,
    /// A directory whose owner is shown as nobody.
    without_owner: Option<PathBuf>,
}

/// Called just before each call; fails the call with the error that it returns.
type BeforeCall = Box<dyn Fn(&str, &Path, Kind) -> Option<Errno> + Send + Sync>;

impl FaultySys {
    pub fn with(steps: Arc<Steps>) -> Self {
        let names_read = AtomicUsize::default();
        Self { host: Host, steps, before_call: None, fake_entries: None, names_read, without_owner: None }
    }

    /// Fails nothing, and runs `action` before each call.
    pub fn before_call(action: impl Fn(&str, &Path) + Send + Sync + 'static) -> Self {
        let action = move |call: &str, path: &Path, _: Kind| {
            action(call, path);
            None
        };
        Self { before_call: Some(Box::new(action)), ..Self::faultless() }
    }

    /// Fails every call that only reads `path`.
    pub fn refusing(path: PathBuf, errno: Errno) -> Self {
        let refuse =
            move |_: &str, argument: &Path, kind: Kind| (argument == path && kind == Kind::Question).then_some(errno);
        Self { before_call: Some(Box::new(refuse)), ..Self::faultless() }
    }

    /// Fails this call on `path`.
    pub fn refusing_call(call: &'static str, path: PathBuf, errno: Errno) -> Self {
        let refuse = move |name: &str, argument: &Path, _: Kind| (name == call && argument == path).then_some(errno);
        Self { before_call: Some(Box::new(refuse)), ..Self::faultless() }
    }

    /// Every directory pretends to contain this number of directories with long names.
    pub fn endless(entries: usize) -> Self {
        Self { fake_entries: Some(entries), ..Self::faultless() }
    }

    pub fn names_read(&self) -> usize {
        self.names_read.load(Ordering::SeqCst)
    }

    /// The directory at `path` is shown as owned by nobody.
    pub fn without_owner(path: PathBuf) -> Self {
        Self { without_owner: Some(path), ..Self::faultless() }
    }

    fn faultless() -> Self {
        Self::with(Arc::new(Steps::with(Fault::None)))
    }

    fn visit_fake_entries(&self, entries: usize, visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) {
        for n in 0..entries {
            self.names_read.fetch_add(1, Ordering::SeqCst);
            if visitor(OsStr::new(&format!("{n:0200}")), FileType::Directory).is_break() {
                break;
            }
        }
    }

    /// Records the call, and says how much of it is to be done.
    fn next_step(&self, call: &'static str, path: &Path, kind: Kind) -> Result<Extent> {
        if let Some(errno) = self.before_call.as_ref().and_then(|before| before(call, path, kind)) {
            return Err(Error::new(call, path, errno));
        }
        match self.steps.next(call, path, kind) {
            Verdict::Done => Ok(Extent::All),
            Verdict::HalfDone => Ok(Extent::Half),
            Verdict::Failed(errno) => Err(Error::new(call, path, errno)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    All,
    Half,
}

/// The error of a call at which the process died. Nobody sees it.
fn died(call: &'static str, path: &Path) -> Error {
    Error::new(call, path, Errno::EIO)
}

macro_rules! delegate {
    ($($kind:ident $name:ident($($arg:ident: $type:ty),*) -> $result:ty, path $path:ident $(, half $half:expr)?;)*) => {
        $(fn $name(&self, $($arg: $type),*) -> Result<$result> {
            const CALL: &str = stringify!($name);
            match self.next_step(CALL, $path, Kind::$kind)? {
                Extent::All => self.host.$name($($arg),*),
                Extent::Half => {
                    $($half;)?
                    Err(died(CALL, $path))
                }
            }
        })*
    };
}

impl Sys for FaultySys {
    delegate! {
        Change create_dir(path: &Path, mode: u32) -> (), path path, half drop(std::fs::create_dir(path));
        Change chown(path: &Path, uid: u32, gid: u32) -> (), path path;
        Change set_attributes(path: &Path, attributes: &Attributes) -> (), path path,
            half drop(Host.chown(path, attributes.uid, attributes.gid));
        Change create_whiteout(path: &Path) -> (), path path;
        Change write_file(path: &Path, content: &[u8]) -> (), path path,
            half drop(Host.write_file(path, &content[..content.len() / 2]));
        Change make_opaque(path: &Path) -> (), path path;
        Change rename(from: &Path, to: &Path) -> (), path to;
        Change remove_file(path: &Path) -> (), path path;
        Change remove_dir(path: &Path) -> (), path path;
        Change remove_tree(path: &Path, cancelled: &dyn Fn() -> bool) -> (), path path, half remove_one_entry(path);
        Change unmount(target: &Path, how: Unmount) -> (), path target;
        Change symlink(target: &Path, link: &Path) -> (), path link;
        Change bind_read_only(source: &DirHandle, target: &Path) -> (), path target, half bind_writable(source, target);
        Question stat(path: &Path) -> Status, path path;
        Question lstat(path: &Path) -> Status, path path;
        Question read_link(path: &Path) -> PathBuf, path path;
        Question read_file(path: &Path, limit: u64) -> Vec<u8>, path path;
        Question attribute(path: &Path, name: &str) -> Option<Vec<u8>>, path path;
        Question attribute_names(path: &Path) -> Vec<OsString>, path path;
        Question open_dir(path: &Path) -> DirHandle, path path;
        Question statfs(path: &Path) -> FileSystem, path path;
        Question disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> DiskUsage, path path;
        Question mounted_fuse(path: &Path) -> Option<u64>, path path;
        Question mounted(path: &Path) -> Option<u64>, path path;
        Question mounts_below(path: &Path) -> Vec<PathBuf>, path path;
    }

    fn open_below(&self, dir: &DirHandle, below: &Path) -> Result<DirHandle> {
        self.next_step("open_below", &dir.path().join(below), Kind::Question)?;
        self.host.open_below(dir, below)
    }

    fn dir_status(&self, dir: &DirHandle) -> Result<Status> {
        self.next_step("dir_status", dir.path(), Kind::Question)?;
        self.host.dir_status(dir)
    }

    fn dir_statfs(&self, dir: &DirHandle) -> Result<FileSystem> {
        self.next_step("statfs", dir.path(), Kind::Question)?;
        self.host.dir_statfs(dir)
    }

    fn dir_attribute_names(&self, dir: &DirHandle) -> Result<Vec<OsString>> {
        self.next_step("attribute_names", dir.path(), Kind::Question)?;
        self.host.dir_attribute_names(dir)
    }

    fn attributes_below(&self, dir: &DirHandle, below: &Path, ignored: &[OsString]) -> Result<Attributes> {
        self.next_step("attributes", &dir.path().join(below), Kind::Question)?;
        self.host.attributes_below(dir, below, ignored)
    }

    fn for_each_entry_below(
        &self,
        dir: &DirHandle,
        below: &Path,
        visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> Result<Status> {
        let path = dir.path().join(below);
        self.next_step("for_each_entry", &path, Kind::Question)?;
        let mut status = match self.fake_entries {
            None => self.host.for_each_entry_below(dir, below, visitor)?,
            Some(entries) => {
                self.visit_fake_entries(entries, visitor);
                self.host.dir_status(dir)?
            }
        };
        if self.without_owner.as_ref() == Some(&path) {
            status.uid = 65_534;
        }
        Ok(status)
    }

    fn for_each_entry(&self, path: &Path, visitor: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) -> Result<()> {
        self.next_step("for_each_entry", path, Kind::Question)?;
        let Some(entries) = self.fake_entries else { return self.host.for_each_entry(path, visitor) };
        self.visit_fake_entries(entries, visitor);
        Ok(())
    }
}

/// Removes a part of a tree.
fn remove_one_entry(path: &Path) {
    if let Some(Ok(entry)) = std::fs::read_dir(path).ok().and_then(|mut entries| entries.next()) {
        let _ = std::fs::remove_file(entry.path()).or_else(|_| std::fs::remove_dir_all(entry.path()));
    }
}

/// Does the first half of a read-only bind mount, after which it is still writable.
fn bind_writable(source: &DirHandle, target: &Path) {
    const NONE: Option<&str> = None;
    let _ = mount(Some(&source.proc_path()), target, NONE, MsFlags::MS_BIND, NONE);
}
