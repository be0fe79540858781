//! The kernel's autofs with Debian's automounter, which is how sites mount `/cvmfs`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::prerequisite;
use crate::process::{Server, cache, run, tool};
use crate::sandbox::{Sandbox, mounts_below};

/// Debian's automounter with one key, which it mounts once the file `ready` exists.
pub struct Automounter {
    /// The directory below which the automounter mounts.
    pub dir: PathBuf,
    /// The automounter finds the repository from the moment at which this file exists.
    pub ready: PathBuf,
    _server: Server,
}

impl Automounter {
    /// The result is None if this kernel has no autofs and skips are allowed.
    pub fn start_or_skip(sandbox: &Sandbox, repository: &Path) -> Option<Self> {
        let file_systems = fs::read_to_string("/proc/filesystems").expect("the kernel lists its file systems");
        let is_missing = !file_systems.contains("\tautofs\n");
        if !prerequisite::is_met(is_missing.then(|| "this kernel has no autofs: modprobe autofs4".to_owned())) {
            return None;
        }
        let program = tool("automount");
        // The automounter loads its modules only from the directory that it was built for. The overlay that shows them
        // there is visible in the sandbox alone.
        let libraries = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        let own = cache().join("tools/debian").join(&libraries);
        let stacked = format!("lowerdir={}:/{libraries}", own.display());
        run("mount", ["-t", "overlay", "overlay", "-o", &stacked, &format!("/{libraries}")]).ok();
        let (dir, ready, map) = (sandbox.make_dir("auto"), sandbox.path("ready"), sandbox.path("map"));
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = scene.test ] && [ -e {} ] && echo '-fstype=bind :{}'\n",
            ready.display(),
            repository.display()
        );
        fs::write(&map, script).expect("a map can be written");
        fs::set_permissions(&map, fs::Permissions::from_mode(0o755)).expect("a map can be run");
        let master = sandbox.path("master");
        let line = format!("{} program:{} --timeout=600 --negative-timeout=1\n", dir.display(), map.display());
        fs::write(&master, line).expect("a master map can be written");
        let mut command = Command::new(program);
        command.args(["--foreground", "--dont-check-daemon", "--pid-file"]).arg(sandbox.path("pid")).arg(&master);
        // Autofs lets the automounter's own process group pass without mounting.
        command.process_group(0);
        let mut server = Server::start(&mut command, &sandbox.path("automount.log"));
        server.wait_until("be mounted", || mounts_below(&dir).contains(&dir));
        Some(Self { dir, ready, _server: server })
    }
}
