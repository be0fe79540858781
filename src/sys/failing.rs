//! The host, but call N fails: how tests stop an operation between any two steps.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{
    Attributes, Errno, Error, FileSystem, FileType, Host, OsString, Path, PathBuf, Result, Status, Sys, Unmount,
};

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
}

/// What happens in the world just before a question is asked.
type Meanwhile = Box<dyn Fn(&str, &Path) + Send + Sync>;

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
        }
    }

    /// Fails nothing, but lets something happen before each question.
    pub fn meanwhile(happens: impl Fn(&str, &Path) + Send + Sync + 'static) -> Self {
        let never = Self::at(usize::MAX, Errno::UnknownErrno, After::Recovers);
        Self { meanwhile: Some(Box::new(happens)), ..never }
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
        if let Some(happens) = &self.meanwhile {
            happens(call, path);
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
        query read_dir(path: &Path) -> Vec<(OsString, FileType)>;
        query statfs(path: &Path) -> FileSystem;
        query disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> (u64, u64);
        query mounts_below(path: &Path) -> Vec<PathBuf>;
    }
}
