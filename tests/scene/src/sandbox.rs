//! The sandbox of one test: a directory, and a private mount namespace. Its end removes both.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

static NUMBER: AtomicUsize = AtomicUsize::new(0);

/// The thread that enters a sandbox, and every process that it starts, stays in its mount namespace.
pub struct Sandbox {
    dir: PathBuf,
}

impl Sandbox {
    /// Must be called on a thread before it starts any server or client.
    pub fn enter(name: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "{name} needs root: run make test as root");
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace can be made");
        private(Path::new("/"), MsFlags::MS_REC);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // The name is short, because the path of a unix socket has at most 107 bytes.
        let dir = std::env::temp_dir().join(format!("scene-{}-{number}", std::process::id()));
        fs::create_dir(&dir).expect("the sandbox's directory is new");
        Self { dir }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn make_dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a directory in the sandbox can be made");
        path
    }
}

fn private(path: &Path, more: MsFlags) {
    mount(None::<&str>, path, None::<&str>, MsFlags::MS_PRIVATE | more, None::<&str>)
        .expect("mounts can be made private");
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        for point in mounts_below(&self.dir).iter().rev() {
            let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        if std::env::var_os("SCENE_KEEP").is_some() {
            eprintln!("kept: {}", self.dir.display());
        } else if let Err(e) = fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {e}", self.dir.display());
        }
    }
}

/// Mount points at or below `path` in this thread's namespace, in the order they were made.
pub fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("the mount table can be read");
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(path)).collect()
}

pub fn mount_tmpfs(path: &Path, options: &str) {
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("a tmpfs can be mounted");
}
