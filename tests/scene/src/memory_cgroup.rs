//! A control group that bounds the memory of a server.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A control group of version 1 or 2, whichever of them has the memory controller. Dropped, it is
/// removed, after the server in it.
pub struct MemoryGroup {
    dir: PathBuf,
}

impl MemoryGroup {
    /// What is in the group can use `bytes`, caches of the kernel included, and nothing is swapped out.
    pub fn make(name: &str, bytes: u64) -> Self {
        let top = Path::new("/sys/fs/cgroup");
        let is_version_1 = top.join("memory/memory.limit_in_bytes").exists();
        let parent = if is_version_1 { top.join("memory") } else { top.to_owned() };
        if !is_version_1 {
            // Without O_CREAT: where there is no version 2 there is no such file.
            let control = fs::File::options().write(true).open(top.join("cgroup.subtree_control"));
            control
                .and_then(|mut control| control.write_all(b"+memory"))
                .expect("this test needs the memory controller of control groups");
        }
        let group = Self { dir: parent.join(format!("{name}-{}", std::process::id())) };
        fs::create_dir(&group.dir).expect("a control group can be made");
        let (limit, swap, swap_limit) = if is_version_1 {
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", bytes)
        } else {
            ("memory.max", "memory.swap.max", 0)
        };
        fs::write(group.dir.join(limit), bytes.to_string()).expect("a control group can be given a limit");
        // A kernel that does not account for swap has no such file.
        if group.dir.join(swap).exists() {
            fs::write(group.dir.join(swap), swap_limit.to_string()).expect("a control group can go without swap");
        }
        group
    }

    /// The beginning of a command: the rest of it is run in the group.
    pub fn command(&self) -> [String; 4] {
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", self.dir.display());
        ["sh".to_owned(), "-c".to_owned(), enter, "sh".to_owned()]
    }

    /// How many processes of the group the kernel has killed for want of memory.
    pub fn killed(&self) -> u64 {
        // Versions 1 and 2.
        let files = ["memory.oom_control", "memory.events"].map(|file| fs::read_to_string(self.dir.join(file)));
        let text = files.into_iter().find_map(Result::ok).expect("a control group counts its events");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        count.expect("Linux counts these since 4.13")
    }

    /// The most that the group has used at a time, in bytes. Before Linux 5.19 version 2 does not say it.
    pub fn peak(&self) -> Option<u64> {
        let files = ["memory.max_usage_in_bytes", "memory.peak"].map(|file| fs::read_to_string(self.dir.join(file)));
        files.into_iter().find_map(Result::ok)?.trim_end().parse().ok()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // It is not empty before its last process is gone.
        let until = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
