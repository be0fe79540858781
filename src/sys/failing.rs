//! The host, but call N fails: how tests stop an operation between any two steps.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{Attributes, Errno, Error, FileSystem, FileType, Host, OsStr, Path, PathBuf, Result, Status, Sys, Unmount};

/// What happens after the call that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The machine works again: an operation can undo what it did.
    Recovers,
    /// Nothing works any more, as if the process had been killed there.
    Dead,
}

/// Passes every call to the host and counts those that change something.
pub struct Failing {
    host: Host,
    calls: AtomicUsize,
    fail_at: usize,
    errno: Errno,
    after: After,
    recorded: Mutex<Vec<(&'static str, PathBuf)>>,
    meanwhile: Option<Meanwhile>,
    /// So many directories are in each directory.
    endless: Option<usize>,
}

/// What happens in the world just before a question is asked, and whether it is answered.
type Meanwhile = Box<dyn Fn(&str, &Path) -> Option<Errno> + Send + Sync>;

impl Failing {
    /// Fails the change numbered `fail_at`, counted from 0.
    pub fn at(fail_at: usize, errno: Errno, after: After) -> Self {
        Self {
            host: Host,
            calls: AtomicUsize::new(0),
            fail_at,
            errno,
            after,
            recorded: Mutex::default(),
            meanwhile: None,
            endless: None,
        }
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
        Self::at(usize::MAX, Errno::UnknownErrno, After::Recovers)
    }

    /// The calls that changed something, or tried to.
    pub fn recorded(&self) -> Vec<(&'static str, PathBuf)> {
        self.recorded.lock().clone()
    }

    fn change(&self, call: &'static str, path: &Path) -> Result<()> {
        self.recorded.lock().push((call, path.to_owned()));
        let n = self.calls.fetch_add(1, Ordering::SeqCst);
        self.fail_if(n == self.fail_at || (n > self.fail_at && self.after == After::Dead), call, path)
    }

    fn query(&self, call: &'static str, path: &Path) -> Result<()> {
        if let Some(errno) = self.meanwhile.as_ref().and_then(|happens| happens(call, path)) {
            return Err(Error::new(call, path, errno));
        }
        let passed = self.calls.load(Ordering::SeqCst) > self.fail_at;
        self.fail_if(passed && self.after == After::Dead, call, path)
    }

    fn fail_if(&self, fail: bool, call: &'static str, path: &Path) -> Result<()> {
        if fail { Err(Error::new(call, path, self.errno)) } else { Ok(()) }
    }
}

macro_rules! pass_on {
    ($($gate:ident $name:ident($path:ident: &Path $(, $arg:ident: $type:ty)*) -> $result:ty;)*) => {
        $(fn $name(&self, $path: &Path $(, $arg: $type)*) -> Result<$result> {
            self.$gate(stringify!($name), $path)?;
            self.host.$name($path $(, $arg)*)
        })*
    };
}

impl Sys for Failing {
    pass_on! {
        change create_dir(path: &Path, mode: u32) -> ();
        change chown(path: &Path, uid: u32, gid: u32) -> ();
        change set_attributes(path: &Path, attributes: &Attributes) -> ();
        change create_whiteout(path: &Path) -> ();
        change write_file(path: &Path, content: &[u8]) -> ();
        change make_opaque(path: &Path) -> ();
        change rename(path: &Path, to: &Path) -> ();
        change remove_file(path: &Path) -> ();
        change remove_dir(path: &Path) -> ();
        change remove_tree(path: &Path) -> ();
        change unmount(path: &Path, how: Unmount) -> ();
        change symlink(path: &Path, link: &Path) -> ();
        change bind_read_only(path: &Path, target: &Path) -> ();
        query stat(path: &Path) -> Status;
        query lstat(path: &Path) -> Status;
        query attributes(path: &Path) -> Attributes;
        query read_link(path: &Path) -> PathBuf;
        query read_file(path: &Path, limit: u64) -> Vec<u8>;
        query attribute(path: &Path, name: &str) -> Option<Vec<u8>>;
        query statfs(path: &Path) -> FileSystem;
        query disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> (u64, u64);
        query mounted_fuse(path: &Path) -> Option<u64>;
        query mounts_below(path: &Path) -> Vec<PathBuf>;
    }

    fn for_each_entry(&self, path: &Path, each: &mut dyn FnMut(&OsStr, FileType)) -> Result<()> {
        self.query("for_each_entry", path)?;
        let Some(entries) = self.endless else { return self.host.for_each_entry(path, each) };
        for n in 0..entries {
            each(OsStr::new(&format!("{n:0200}")), FileType::Directory);
        }
        Ok(())
    }
}
