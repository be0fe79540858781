//! A machine that a systemd has booted, in a container: the daemon stands there as a package
//! would put it, with the units of `packaging/`; or it has none, for tests of the packages.
//!
//! Its processes share our network, so a registry on loopback is the same one. Its files and
//! sockets are reached through `/proc/<its first process>/root`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::prerequisite;
use crate::process::{Output, Server, cache, eventually, run, tool};
use crate::sandbox::Sandbox;
use crate::snapshotter::binary;

/// The unit of the daemon.
pub const SERVICE: &str = "cvmfs-snapshotter.service";
/// Where a machine sees the repository.
pub const REPOSITORY: &str = "/cvmfs/scene.test";
/// The state root, and the daemon's socket, as they are by default.
pub const STATE: &str = "/var/lib/containerd-cvmfs-grpc";
pub const SOCKET: &str = "/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock";
/// Debian's containerd and runc.
const PROGRAMS: &str = "/opt/debian";
/// A machine without the daemon has this host's programs here: both are the same Debian.
pub const HOST: &str = "/opt/host";
const UNITS: &str = "/etc/systemd/system";
/// As `SOCKET`.
pub const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]
  type = \"snapshot\"
  address = \"/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock\"
";

/// Dropped, it is switched off.
pub struct Machine {
    init: Pid,
    nspawn: Server,
    /// The groups that it lives in, one for each hierarchy of this host.
    groups: Vec<PathBuf>,
}

impl Machine {
    /// Boots a machine with `repository` mounted. The result is None if this host cannot boot one and skips are
    /// allowed.
    pub fn boot_or_skip(sandbox: &Sandbox, repository: &Path) -> Option<Self> {
        let machine = Self::boot_with(sandbox, repository, &[], |root| {
            furnish(root);
            furnish_containerd(root, "", PROXY);
        })?;
        // As the installation of a package ends.
        machine.run(&["systemctl", "enable", "--now", "--quiet", SERVICE]).ok();
        Some(machine)
    }

    /// Boots a machine that has a containerd, which reads `conf.d`, and no daemon yet.
    pub fn boot_without_daemon_or_skip(sandbox: &Sandbox, repository: &Path) -> Option<Self> {
        let imports = "imports = [\"/etc/containerd/conf.d/*.toml\"]";
        Self::boot_with(sandbox, repository, &[("/usr", HOST)], |root| furnish_containerd(root, imports, ""))
    }

    /// `shown` are folders of this host that it can read.
    fn boot_with(
        sandbox: &Sandbox,
        repository: &Path,
        shown: &[(&str, &str)],
        furnish: impl FnOnce(&Path),
    ) -> Option<Self> {
        if !prerequisite::is_met(missing_prerequisite()) {
            return None;
        }
        let [root, upper, work] = ["machine", "machine.upper", "machine.work"].map(|name| sandbox.make_dir(name));
        let stacked = format!("lowerdir={},upperdir={},workdir={}", tree().display(), upper.display(), work.display());
        run("mount", [Path::new("-t"), "overlay".as_ref(), "machine".as_ref(), "-o".as_ref(), stacked.as_ref(), &root])
            .ok();
        furnish(&root);
        let mut bound = vec![(repository.to_owned(), REPOSITORY), (programs(), PROGRAMS)];
        // An overlay cannot stand on an overlay.
        for state in [STATE, "/var/lib/containerd"] {
            let name = state.rsplit_once('/').map_or(state, |(_, name)| name);
            bound.push((sandbox.make_dir(&format!("state/{name}")), state));
        }
        let name = sandbox.dir().file_name().expect("a sandbox has a name").to_string_lossy().into_owned();
        let groups = make_groups(&name);
        let mut command = Command::new("sh");
        // The first process of a container sees the groups that it was born into as the whole.
        command.arg("-c").arg("for g in $GROUPS_OF; do echo $$ >$g/cgroup.procs || exit 1; done; exec \"$@\"").arg("-");
        command.env("GROUPS_OF", groups.iter().map(|g| g.display().to_string()).collect::<Vec<_>>().join(" "));
        command.args(["systemd-nspawn", "--boot", "--console=pipe", "--register=no", "--keep-unit", "--quiet"]);
        command.args(["--capability=all", "--system-call-filter=@mount @keyring bpf", "--link-journal=no"]);
        command.arg(format!("--machine={name}")).arg("--directory").arg(&root);
        command.args(bound.iter().map(|(from, to)| format!("--bind={}:{to}", from.display())));
        command.args(shown.iter().map(|(from, to)| format!("--bind-ro={from}:{to}")));
        let mut nspawn = Server::start(&mut command, &sandbox.path("machine.log"));
        let (pid, mut init) = (nspawn.pid(), None);
        nspawn.wait_until("start a first process", || {
            init = first_process(pid);
            init.is_some()
        });
        let machine = Self { init: init.expect("it was waited for"), nspawn, groups };
        eventually("the machine has booted", || {
            let state = machine.run(&["systemctl", "is-system-running"]).stdout;
            ["running", "degraded"].contains(&state.trim())
        });
        // Else neither containers in it nor services can be given limits. A systemd that begins
        // anew sees that it may now.
        let writable = "for g in /sys/fs/cgroup/*/; do mount -o remount,rw,bind $g; done; systemctl daemon-reexec";
        machine.run(&["sh", "-c", writable]).ok();
        Some(machine)
    }

    /// Runs a program in the machine to its end.
    pub fn run(&self, program: &[&str]) -> Output {
        let init = self.init.to_string();
        run("nsenter", ["-t", &init, "-m", "-p", "-u", "-i", "--"].iter().chain(program))
    }

    /// Where we find what the machine has at `path`.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a directory can be made");
        fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    }

    /// Starts a unit, or starts it again.
    #[track_caller]
    pub fn restart(&self, unit: &str) {
        let output = self.run(&["systemctl", "restart", unit]);
        assert!(output.status.success(), "{unit} does not start: {}{}", output.stderr, self.journal(unit));
    }

    /// Lines that change a unit, under a name; they hold from its next start.
    pub fn drop_in(&self, unit: &str, name: &str, text: &str) {
        self.write(&format!("{UNITS}/{unit}.d/{name}.conf"), text);
        self.run(&["systemctl", "daemon-reload"]).ok();
    }

    pub fn journal(&self, unit: &str) -> String {
        self.run(&["journalctl", "--sync"]);
        self.run(&["journalctl", "--no-pager", "--output", "cat", "--unit", unit]).stdout
    }

    /// A client of the daemon, without a containerd between.
    pub fn client(&self) -> Client {
        Client::connect(&self.path(SOCKET))
    }

    /// A property of a unit, as `systemctl show` has it.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.run(&["systemctl", "show", "--value", "--property", name, unit]).ok().trim().to_owned()
    }

    /// The main process of a unit: what its `/proc/<pid>/status` says, by name.
    pub fn status(&self, unit: &str) -> impl Fn(&str) -> String + use<> {
        let pid = self.property(unit, "MainPID");
        let text = fs::read_to_string(self.path(&format!("/proc/{pid}/status"))).expect("the process is there");
        move |name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
        }
    }

    pub fn ctr(&self, arguments: &[&str]) -> Output {
        let ctr = format!("{PROGRAMS}/bin/ctr");
        self.run(&[&[ctr.as_str()], arguments].concat())
    }
}

/// The folder that has Debian's containerd in its `bin`.
fn programs() -> PathBuf {
    tool("containerd").ancestors().nth(2).expect("a program lies in a folder of a folder").to_owned()
}

/// What this host lacks to boot a machine.
fn missing_prerequisite() -> Option<String> {
    if !run("sh", ["-c", "command -v systemd-nspawn"]).status.success() {
        return Some("no machine can be booted without systemd-nspawn: tests/setup.sh test installs it".to_owned());
    }
    if !tree().exists() {
        return Some(format!("no machine can be booted without {}: tests/setup.sh test makes it", tree().display()));
    }
    let trial = run("unshare", ["--mount", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "true"]);
    (!trial.status.success()).then(|| format!("no machine can be booted without namespaces: {}", trial.stderr.trim()))
}

/// A Debian with systemd. It is never changed: each machine is an overlay on it.
fn tree() -> PathBuf {
    cache().join("machine/bookworm")
}

/// Where something can be put.
fn place(root: &Path, path: &str) -> PathBuf {
    let path = root.join(path.trim_start_matches('/'));
    fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a directory can be made");
    path
}

/// What a package puts into a machine.
fn furnish(root: &Path) {
    fs::copy(binary(), place(root, "/usr/bin/cvmfs-snapshotter")).expect("the daemon can be installed");
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    for unit in [SERVICE, "cvmfs-snapshotter.socket"] {
        let to = place(root, &format!("/usr/lib/systemd/system/{unit}"));
        fs::copy(packaging.join(unit), &to).expect("a unit can be installed");
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644)).expect("a mode can be set");
    }
    configure(root, "");
}

/// Debian's containerd. `imports` is of its configuration, and so is `proxy`, which tells it of the daemon.
fn furnish_containerd(root: &Path, imports: &str, proxy: &str) {
    let write = |path: &str, text: &str| fs::write(place(root, path), text).expect("a file can be written");
    write(
        "/etc/containerd/config.toml",
        &format!(
            "version = 2
{imports}
disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\"]
[plugins.\"io.containerd.grpc.v1.cri\".containerd]
  snapshotter = \"cvmfs-snapshotter\"
  disable_snapshot_annotations = false
{proxy}"
        ),
    );
    // As Debian's, from another folder.
    write(
        &format!("{UNITS}/containerd.service"),
        &format!(
            "[Service]
Type=notify
Environment=PATH={PROGRAMS}/bin:{PROGRAMS}/sbin:/usr/bin:/usr/sbin
ExecStart={PROGRAMS}/bin/containerd
Delegate=yes
KillMode=process
"
        ),
    );
}

/// The configuration of the daemon in the machine whose files are at `root`.
pub fn configure(root: &Path, more: &str) {
    let path = root.join("etc/containerd-cvmfs-grpc/config.toml");
    fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a directory can be made");
    fs::write(path, format!("repository = \"scene.test\"\n{more}\n")).expect("the configuration can be written");
}

/// A group of this name in each hierarchy.
fn make_groups(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let version_1 = fs::read_dir(top).expect("control groups are mounted").flatten().map(|entry| entry.path());
    let hierarchies: Vec<PathBuf> = if top.join("cgroup.procs").exists() {
        vec![top.to_owned()]
    } else {
        version_1.filter(|dir| dir.join("cgroup.procs").exists() && !dir.is_symlink()).collect()
    };
    let make = |hierarchy: &PathBuf| {
        let group = hierarchy.join(name);
        fs::create_dir(&group).expect("a control group can be made");
        // These begin empty, and let nobody in.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if hierarchy.join("cgroup.clone_children").exists()
                && let Ok(all) = fs::read(hierarchy.join(file))
            {
                fs::write(group.join(file), all).expect("a control group can be given processors");
            }
        }
        group
    };
    hierarchies.iter().map(make).collect()
}

/// With all groups in it; whether that was possible.
fn remove_groups(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_groups(&entry.path());
    }
    fs::remove_dir(group).is_ok()
}

/// The process that is the first of its own name space, and its parent's second.
fn first_process(nspawn: Pid) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{nspawn}/task/{nspawn}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let status = fs::read_to_string(format!("/proc/{child}/status")).ok()?;
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        (ids.split_whitespace().count() == 2).then(|| child.parse().ok().map(Pid::from_raw))?
    })
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The end of the first process is the end of all.
        let _ = kill(self.init, Signal::SIGKILL);
        let _ = self.nspawn.wait_for_end();
        for group in &self.groups {
            // Not empty before the last process is gone.
            let until = Instant::now() + Duration::from_secs(10);
            while !remove_groups(group) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
