//! A container in which systemd boots, as a stand-in for a whole machine. The daemon is installed in it as a package would
//! do it, with the units of `packaging/`; for tests of the packages it has no daemon.
//!
//! The machine shares the network of the test, so both reach the same registry on loopback. Its files and sockets are
//! reached through `/proc/<its first process>/root`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::log::{self, Entry};
use crate::prerequisite;
use crate::process::{Output, Server, cache, eventually, run, tool};
use crate::resource_usage::find_status_field;
use crate::sandbox::Sandbox;
use crate::snapshotter::binary;

/// The unit of the daemon.
pub const SERVICE: &str = "cvmfs-snapshotter.service";
/// Where a machine sees the repository.
pub const REPOSITORY: &str = "/cvmfs/scene.test";
/// The default paths of the state root and of the daemon's socket.
pub const STATE: &str = "/var/lib/containerd-cvmfs-grpc";
pub const SOCKET: &str = "/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock";
/// The directory in which a machine sees Debian's containerd and runc.
const PROGRAMS: &str = "/opt/debian";
/// The directory in which a machine without the daemon sees this host's `/usr`. Both are the same Debian.
pub const HOST: &str = "/opt/host";
const UNITS: &str = "/etc/systemd/system";
/// The registration of the daemon in containerd's configuration, with the path of `SOCKET`.
pub const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]
  type = \"snapshot\"
  address = \"/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock\"
";

/// A booted machine. It is switched off on drop.
pub struct Machine {
    init: Pid,
    nspawn: Server,
    /// The control groups that it runs in, one for each hierarchy of this host.
    groups: Vec<PathBuf>,
}

impl Machine {
    /// Boots a machine with `repository` mounted. The result is None if this host cannot boot one and skips are
    /// allowed.
    pub fn boot_or_skip(sandbox: &Sandbox, repository: &Path) -> Option<Self> {
        let machine = Self::boot_with(sandbox, repository, &[], |root| {
            install_daemon(root);
            install_containerd(root, "", PROXY);
        })?;
        // The installation of a package ends with this command.
        machine.run(&["systemctl", "enable", "--now", "--quiet", SERVICE]).ok();
        Some(machine)
    }

    /// Boots like `boot_or_skip` a machine without the daemon, whose containerd reads `conf.d`.
    pub fn boot_without_daemon_or_skip(sandbox: &Sandbox, repository: &Path) -> Option<Self> {
        let imports = "imports = [\"/etc/containerd/conf.d/*.toml\"]";
        Self::boot_with(sandbox, repository, &[("/usr", HOST)], |root| install_containerd(root, imports, ""))
    }

    /// `shown` are directories of this host that the machine can read, with their paths in it.
    fn boot_with(
        sandbox: &Sandbox,
        repository: &Path,
        shown: &[(&str, &str)],
        install_daemon: impl FnOnce(&Path),
    ) -> Option<Self> {
        if !prerequisite::is_met(missing_prerequisite()) {
            return None;
        }
        let [root, upper, work] = ["machine", "machine.upper", "machine.work"].map(|name| sandbox.make_dir(name));
        let stacked = format!("lowerdir={},upperdir={},workdir={}", tree().display(), upper.display(), work.display());
        run("mount", [Path::new("-t"), "overlay".as_ref(), "machine".as_ref(), "-o".as_ref(), stacked.as_ref(), &root])
            .ok();
        install_daemon(&root);
        let mut bound = vec![(repository.to_owned(), REPOSITORY), (programs(), PROGRAMS)];
        // The upper directory of an overlay cannot lie on an overlay, so these are bound from the sandbox.
        for state in [STATE, "/var/lib/containerd"] {
            let name = state.rsplit_once('/').map_or(state, |(_, name)| name);
            bound.push((sandbox.make_dir(&format!("state/{name}")), state));
        }
        let name = sandbox.dir().file_name().expect("a sandbox has a name").to_string_lossy().into_owned();
        let groups = make_groups(&name);
        let mut command = Command::new("sh");
        // The first process of a container sees the groups in which it was started as the root of the hierarchy.
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
        // Without writable control groups neither containers nor services in the machine could have limits. systemd
        // notices that they are writable when it executes itself anew.
        let writable = "for g in /sys/fs/cgroup/*/; do mount -o remount,rw,bind $g; done; systemctl daemon-reexec";
        machine.run(&["sh", "-c", writable]).ok();
        Some(machine)
    }

    /// Runs a program in the machine until it ends.
    pub fn run(&self, program: &[&str]) -> Output {
        let init = self.init.to_string();
        run("nsenter", ["-t", &init, "-m", "-p", "-u", "-i", "--"].iter().chain(program))
    }

    /// The path at which this host sees `path` of the machine.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a directory can be made");
        fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    }

    /// Restarts a unit, or starts it if it does not run.
    #[track_caller]
    pub fn restart(&self, unit: &str) {
        let output = self.run(&["systemctl", "restart", unit]);
        assert!(output.status.success(), "{unit} does not start: {}{}", output.stderr, self.journal(unit));
    }

    /// Writes a drop-in that changes a unit from its next start on.
    pub fn drop_in(&self, unit: &str, name: &str, text: &str) {
        self.write(&format!("{UNITS}/{unit}.d/{name}.conf"), text);
        self.run(&["systemctl", "daemon-reload"]).ok();
    }

    pub fn journal(&self, unit: &str) -> String {
        self.run(&["journalctl", "--sync"]);
        self.run(&["journalctl", "--no-pager", "--output", "cat", "--unit", unit]).stdout
    }

    /// The entries that the daemon's journal has for an event.
    pub fn events(&self, event: &str) -> Vec<Entry> {
        log::events(&self.journal(SERVICE), event)
    }

    /// A client that calls the daemon directly.
    pub fn client(&self) -> Client {
        Client::connect(&self.path(SOCKET))
    }

    /// A property of a unit, as `systemctl show` prints it.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.run(&["systemctl", "show", "--value", "--property", name, unit]).ok().trim().to_owned()
    }

    /// A function from the names to the values in `/proc/<pid>/status` of a unit's main process.
    pub fn status(&self, unit: &str) -> impl Fn(&str) -> String + use<> {
        let pid = self.property(unit, "MainPID");
        let text = fs::read_to_string(self.path(&format!("/proc/{pid}/status"))).expect("the process is there");
        move |name| {
            let value = find_status_field(&text, name);
            value.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
        }
    }

    pub fn ctr(&self, arguments: &[&str]) -> Output {
        let ctr = format!("{PROGRAMS}/bin/ctr");
        self.run(&[&[ctr.as_str()], arguments].concat())
    }
}

/// The directory whose `bin` has Debian's containerd.
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

/// The tree of a Debian with systemd. It is never changed, because each machine is an overlay on it.
fn tree() -> PathBuf {
    cache().join("machine/bookworm")
}

/// The path of a file in the machine, whose directory is made.
fn create_parent(root: &Path, path: &str) -> PathBuf {
    let path = root.join(path.trim_start_matches('/'));
    fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a directory can be made");
    path
}

/// Installs what a package installs.
fn install_daemon(root: &Path) {
    fs::copy(binary(), create_parent(root, "/usr/bin/cvmfs-snapshotter")).expect("the daemon can be installed");
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    for unit in [SERVICE, "cvmfs-snapshotter.socket"] {
        let to = create_parent(root, &format!("/usr/lib/systemd/system/{unit}"));
        fs::copy(packaging.join(unit), &to).expect("a unit can be installed");
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644)).expect("a mode can be set");
    }
    configure(root, "");
}

/// Installs Debian's containerd. `imports` and `proxy`, the registration of the daemon, are parts of its configuration.
fn install_containerd(root: &Path, imports: &str, proxy: &str) {
    let write = |path: &str, text: &str| fs::write(create_parent(root, path), text).expect("a file can be written");
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
    // This is Debian's unit with another path of the program.
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

/// Writes the daemon's configuration into the machine whose root directory is `root`.
pub fn configure(root: &Path, more: &str) {
    let path = root.join("etc/containerd-cvmfs-grpc/config.toml");
    fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a directory can be made");
    fs::write(path, format!("repository = \"scene.test\"\n{more}\n")).expect("the configuration can be written");
}

/// Makes a control group of this name in each hierarchy.
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
        // In version 1 these files of a new group are empty, and no process can enter a group without processors.
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

/// Removes a group and all groups in it. The result is whether that was possible.
fn remove_groups(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_groups(&entry.path());
    }
    fs::remove_dir(group).is_ok()
}

/// The child of nspawn that is the first process of its own PID namespace.
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
        // The kernel ends all processes of a PID namespace with the first one.
        let _ = kill(self.init, Signal::SIGKILL);
        let _ = self.nspawn.wait_for_end();
        for group in &self.groups {
            // A group can be removed only after the kernel has reaped its last process.
            let until = Instant::now() + Duration::from_secs(10);
            while !remove_groups(group) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
