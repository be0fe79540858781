//! The host, but one step of many fails, or something happens in the world between two.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{
    Attributes, ControlFlow, DirHandle, DiskUsage, Errno, Error, FileSystem, FileType, Host, OsStr, OsString, Path,
    PathBuf, Result, Status, Sys, Unmount,
};
use crate::testing::{Fault, Kind, Steps, Verdict};

/// Passes every call to the host and records it.
pub struct FaultySys {
    host: Host,
    steps: Arc<Steps>,
    before_call: Option<BeforeCall>,
    /// So many directories are in each directory.
    endless: Option<usize>,
    /// Of these, names that somebody has read.
    names_read: AtomicUsize,
    /// A directory whose owner has no number here.
    without_owner: Option<PathBuf>,
}

/// Called just before each call; fails the call with the error that it returns.
type BeforeCall = Box<dyn Fn(&str, &Path, Kind) -> Option<Errno> + Send + Sync>;

impl FaultySys {
    pub fn with(steps: Arc<Steps>) -> Self {
        let names_read = AtomicUsize::default();
        Self { host: Host, steps, before_call: None, endless: None, names_read, without_owner: None }
    }

    /// Fails nothing, but lets something happen before each call.
    pub fn before_call(happens: impl Fn(&str, &Path) + Send + Sync + 'static) -> Self {
        let happens = move |call: &str, path: &Path, _: Kind| {
            happens(call, path);
            None
        };
        Self { before_call: Some(Box::new(happens)), ..Self::never() }
    }

    /// Fails every question about `path`.
    pub fn refusing(path: PathBuf, errno: Errno) -> Self {
        let refuse =
            move |_: &str, asked: &Path, kind: Kind| (asked == path && kind == Kind::Question).then_some(errno);
        Self { before_call: Some(Box::new(refuse)), ..Self::never() }
    }

    /// Fails this question about `path`.
    pub fn refusing_call(call: &'static str, path: PathBuf, errno: Errno) -> Self {
        let refuse = move |asked: &str, at: &Path, _: Kind| (asked == call && at == path).then_some(errno);
        Self { before_call: Some(Box::new(refuse)), ..Self::never() }
    }

    /// Every directory has so many directories with long names in it.
    pub fn endless(entries: usize) -> Self {
        Self { endless: Some(entries), ..Self::never() }
    }

    pub fn names_read(&self) -> usize {
        self.names_read.load(Ordering::SeqCst)
    }

    /// The directory at `path` belongs to nobody.
    pub fn without_owner(path: PathBuf) -> Self {
        Self { without_owner: Some(path), ..Self::never() }
    }

    fn never() -> Self {
        Self::with(Arc::new(Steps::with(Fault::None)))
    }

    fn read_endless(&self, entries: usize, each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) {
        for n in 0..entries {
            self.names_read.fetch_add(1, Ordering::SeqCst);
            if each(OsStr::new(&format!("{n:0200}")), FileType::Directory).is_break() {
                break;
            }
        }
    }

    /// Whether the call is to be made, or half of it.
    fn take(&self, call: &'static str, path: &Path, kind: Kind) -> Result<Budget> {
        if let Some(errno) = self.before_call.as_ref().and_then(|before| before(call, path, kind)) {
            return Err(Error::new(call, path, errno));
        }
        match self.steps.take(call, path, kind) {
            Verdict::Done => Ok(Budget::All),
            Verdict::HalfDone => Ok(Budget::Half),
            Verdict::Failed(errno) => Err(Error::new(call, path, errno)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Budget {
    All,
    Half,
}

/// What the process would have heard if it had lived.
fn died(call: &'static str, path: &Path) -> Error {
    Error::new(call, path, Errno::EIO)
}

macro_rules! pass_on {
    ($($kind:ident $name:ident($($arg:ident: $type:ty),*) -> $result:ty, at $path:ident $(, half $half:expr)?;)*) => {
        $(fn $name(&self, $($arg: $type),*) -> Result<$result> {
            const CALL: &str = stringify!($name);
            match self.take(CALL, $path, Kind::$kind)? {
                Budget::All => self.host.$name($($arg),*),
                Budget::Half => {
                    $($half;)?
                    Err(died(CALL, $path))
                }
            }
        })*
    };
}

impl Sys for FaultySys {
    pass_on! {
        Change create_dir(path: &Path, mode: u32) -> (), at path, half drop(std::fs::create_dir(path));
        Change chown(path: &Path, uid: u32, gid: u32) -> (), at path;
        Change set_attributes(path: &Path, attributes: &Attributes) -> (), at path,
            half drop(Host.chown(path, attributes.uid, attributes.gid));
        Change create_whiteout(path: &Path) -> (), at path;
        Change write_file(path: &Path, content: &[u8]) -> (), at path,
            half drop(Host.write_file(path, &content[..content.len() / 2]));
        Change make_opaque(path: &Path) -> (), at path;
        Change rename(from: &Path, to: &Path) -> (), at to;
        Change remove_file(path: &Path) -> (), at path;
        Change remove_dir(path: &Path) -> (), at path;
        Change remove_tree(path: &Path, cancelled: &dyn Fn() -> bool) -> (), at path, half remove_something(path);
        Change unmount(target: &Path, how: Unmount) -> (), at target;
        Change symlink(target: &Path, link: &Path) -> (), at link;
        Change bind_read_only(source: &DirHandle, target: &Path) -> (), at target, half bind_writable(source, target);
        Question stat(path: &Path) -> Status, at path;
        Question lstat(path: &Path) -> Status, at path;
        Question read_link(path: &Path) -> PathBuf, at path;
        Question read_file(path: &Path, limit: u64) -> Vec<u8>, at path;
        Question attribute(path: &Path, name: &str) -> Option<Vec<u8>>, at path;
        Question attribute_names(path: &Path) -> Vec<OsString>, at path;
        Question open_dir(path: &Path) -> DirHandle, at path;
        Question statfs(path: &Path) -> FileSystem, at path;
        Question disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> DiskUsage, at path;
        Question mounted_fuse(path: &Path) -> Option<u64>, at path;
        Question mounted(path: &Path) -> Option<u64>, at path;
        Question mounts_below(path: &Path) -> Vec<PathBuf>, at path;
    }

    fn open_below(&self, dir: &DirHandle, below: &Path) -> Result<DirHandle> {
        self.take("open_below", &dir.path().join(below), Kind::Question)?;
        self.host.open_below(dir, below)
    }

    fn dir_status(&self, dir: &DirHandle) -> Result<Status> {
        self.take("dir_status", dir.path(), Kind::Question)?;
        self.host.dir_status(dir)
    }

    fn dir_statfs(&self, dir: &DirHandle) -> Result<FileSystem> {
        self.take("statfs", dir.path(), Kind::Question)?;
        self.host.dir_statfs(dir)
    }

    fn dir_attribute_names(&self, dir: &DirHandle) -> Result<Vec<OsString>> {
        self.take("attribute_names", dir.path(), Kind::Question)?;
        self.host.dir_attribute_names(dir)
    }

    fn attributes_below(&self, dir: &DirHandle, below: &Path, ignored: &[OsString]) -> Result<Attributes> {
        self.take("attributes", &dir.path().join(below), Kind::Question)?;
        self.host.attributes_below(dir, below, ignored)
    }

    fn for_each_entry_below(
        &self,
        dir: &DirHandle,
        below: &Path,
        each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> Result<Status> {
        let path = dir.path().join(below);
        self.take("for_each_entry", &path, Kind::Question)?;
        let mut status = match self.endless {
            None => self.host.for_each_entry_below(dir, below, each)?,
            Some(entries) => {
                self.read_endless(entries, each);
                self.host.dir_status(dir)?
            }
        };
        if self.without_owner.as_ref() == Some(&path) {
            status.uid = 65_534;
        }
        Ok(status)
    }

    fn for_each_entry(&self, path: &Path, each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>) -> Result<()> {
        self.take("for_each_entry", path, Kind::Question)?;
        let Some(entries) = self.endless else { return self.host.for_each_entry(path, each) };
        self.read_endless(entries, each);
        Ok(())
    }
}

/// A removal that was cut short has taken some entries.
fn remove_something(path: &Path) {
    if let Some(Ok(entry)) = std::fs::read_dir(path).ok().and_then(|mut entries| entries.next()) {
        let _ = std::fs::remove_file(entry.path()).or_else(|_| std::fs::remove_dir_all(entry.path()));
    }
}

/// The mount is made, and not read-only yet.
fn bind_writable(source: &DirHandle, target: &Path) {
    const NOTHING: Option<&str> = None;
    let _ = nix::mount::mount(Some(&source.proc_path()), target, NOTHING, nix::mount::MsFlags::MS_BIND, NOTHING);
}
