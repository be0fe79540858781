//! A control group that limits the memory of a server.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A control group of version 1 or 2, whichever has the memory controller. It is removed on drop, so it must be dropped
/// after the server in it.
pub struct MemoryCgroup {
    dir: PathBuf,
}

impl MemoryCgroup {
    /// The processes of the group can use `bytes` of memory, caches of the kernel included, and no swap.
    pub fn create(name: &str, bytes: u64) -> Self {
        let top = Path::new("/sys/fs/cgroup");
        let is_version_1 = top.join("memory/memory.limit_in_bytes").exists();
        let parent = if is_version_1 { top.join("memory") } else { top.to_owned() };
        if !is_version_1 {
            // The file is opened without O_CREAT, because it does not exist where version 2 is not mounted.
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

    /// The beginning of a command line whose rest runs in the group.
    pub fn command(&self) -> [String; 4] {
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", self.dir.display());
        ["sh".to_owned(), "-c".to_owned(), enter, "sh".to_owned()]
    }

    /// How many processes of the group the kernel has killed because memory ran out.
    pub fn oom_kills(&self) -> u64 {
        // The first name is that of version 1, the second that of version 2.
        let files = ["memory.oom_control", "memory.events"].map(|file| fs::read_to_string(self.dir.join(file)));
        let text = files.into_iter().find_map(Result::ok).expect("a control group counts its events");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        count.expect("Linux counts these since 4.13")
    }

    /// The most memory that the group has used at a time, in bytes. Version 2 counts it since Linux 5.19.
    pub fn peak(&self) -> Option<u64> {
        let files = ["memory.max_usage_in_bytes", "memory.peak"].map(|file| fs::read_to_string(self.dir.join(file)));
        files.into_iter().find_map(Result::ok)?.trim_end().parse().ok()
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // A group can be removed only after the kernel has reaped its last process.
        let until = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
