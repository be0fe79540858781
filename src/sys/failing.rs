//! The host, but one step of many fails, or something happens in the world between two.

use std::sync::Arc;

use super::{Attributes, Errno, Error, FileSystem, FileType, Host, OsStr, Path, PathBuf, Result, Status, Sys, Unmount};
use crate::faults::{Fault, Kind, Steps, Verdict};

/// Passes every call to the host and records it.
pub struct Failing {
    host: Host,
    steps: Arc<Steps>,
    meanwhile: Option<Meanwhile>,
    /// So many directories are in each directory.
    endless: Option<usize>,
}

/// What happens in the world just before a question is asked, and whether it is answered.
type Meanwhile = Box<dyn Fn(&str, &Path) -> Option<Errno> + Send + Sync>;

impl Failing {
    pub fn with(steps: Arc<Steps>) -> Self {
        Self { host: Host, steps, meanwhile: None, endless: None }
    }

    /// Fails nothing, but lets something happen before each question.
    pub fn meanwhile(happens: impl Fn(&str, &Path) + Send + Sync + 'static) -> Self {
        let happens = move |call: &str, path: &Path| {
            happens(call, path);
            None
        };
        Self { meanwhile: Some(Box::new(happens)), ..Self::never() }
    }

    /// Fails every question about `path`.
    pub fn refusing(path: PathBuf, errno: Errno) -> Self {
        let refuse = move |_: &str, asked: &Path| (asked == path).then_some(errno);
        Self { meanwhile: Some(Box::new(refuse)), ..Self::never() }
    }

    /// Every directory has so many directories with long names in it.
    pub fn endless(entries: usize) -> Self {
        Self { endless: Some(entries), ..Self::never() }
    }

    fn never() -> Self {
        Self::with(Arc::new(Steps::with(Fault::None)))
    }

    /// Whether the call is to be made, or half of it.
    fn take(&self, call: &'static str, path: &Path, kind: Kind) -> Result<Amount> {
        let asked = self.meanwhile.as_ref().filter(|_| kind == Kind::Question);
        if let Some(errno) = asked.and_then(|happens| happens(call, path)) {
            return Err(Error::new(call, path, errno));
        }
        match self.steps.take(call, path, kind) {
            Verdict::Done => Ok(Amount::All),
            Verdict::HalfDone => Ok(Amount::Half),
            Verdict::Failed(errno) => Err(Error::new(call, path, errno)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Amount {
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
                Amount::All => self.host.$name($($arg),*),
                Amount::Half => {
                    $($half;)?
                    Err(died(CALL, $path))
                }
            }
        })*
    };
}

impl Sys for Failing {
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
        Change remove_tree(path: &Path) -> (), at path, half remove_something(path);
        Change unmount(target: &Path, how: Unmount) -> (), at target;
        Change symlink(target: &Path, link: &Path) -> (), at link;
        Change bind_read_only(source: &Path, target: &Path) -> (), at target, half bind_writable(source, target);
        Question stat(path: &Path) -> Status, at path;
        Question lstat(path: &Path) -> Status, at path;
        Question attributes(path: &Path) -> Attributes, at path;
        Question read_link(path: &Path) -> PathBuf, at path;
        Question read_file(path: &Path, limit: u64) -> Vec<u8>, at path;
        Question attribute(path: &Path, name: &str) -> Option<Vec<u8>>, at path;
        Question statfs(path: &Path) -> FileSystem, at path;
        Question disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> (u64, u64), at path;
        Question mounted_fuse(path: &Path) -> Option<u64>, at path;
        Question mounted(path: &Path) -> Option<u64>, at path;
        Question mounts_below(path: &Path) -> Vec<PathBuf>, at path;
    }

    fn for_each_entry(&self, path: &Path, each: &mut dyn FnMut(&OsStr, FileType)) -> Result<()> {
        self.take("for_each_entry", path, Kind::Question)?;
        let Some(entries) = self.endless else { return self.host.for_each_entry(path, each) };
        for n in 0..entries {
            each(OsStr::new(&format!("{n:0200}")), FileType::Directory);
        }
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
fn bind_writable(source: &Path, target: &Path) {
    const NOTHING: Option<&str> = None;
    let _ = nix::mount::mount(Some(source), target, NOTHING, nix::mount::MsFlags::MS_BIND, NOTHING);
}
