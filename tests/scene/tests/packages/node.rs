//! A node with containerd, a registry and a repository, on which packages are installed.

use std::fs;
use std::path::{Path, PathBuf};

use scene::background_calls::BackgroundCalls;
use scene::client::Client;
use scene::containerd::NAMESPACE;
use scene::cri::Cri;
use scene::image::Builder;
use scene::machine::{HOST, Machine, SERVICE, STATE};
use scene::process::{Output, eventually};
use scene::publisher::Repository;
use scene::registry::Registry;
use scene::sandbox::Sandbox;

pub const SOCKET_UNIT: &str = "cvmfs-snapshotter.socket";
pub const CONFIG: &str = "/etc/containerd-cvmfs-grpc/config.toml";
const CONTAINERD: &str = "/run/containerd/containerd.sock";
const SNAPSHOTTER: &str = "--snapshotter=cvmfs-snapshotter";

/// Rust drops fields in their order: the machine goes before what it uses, and the sandbox last.
pub struct Node {
    pub machine: Machine,
    pub registry: Registry,
    pub repository: Repository,
    pub builder: Builder,
    pub sandbox: Sandbox,
}

/// A running container that writes, and the snapshots that existed when it started.
pub struct Running {
    /// The references of the image that it runs, of which one layer is published, and of an image that is published
    /// whole.
    references: [String; 2],
    snapshots: String,
}

impl Running {
    /// The image of the container.
    pub fn image(&self) -> &str {
        &self.references[0]
    }
}

impl Node {
    /// The result is None if this host cannot boot a machine and skips are allowed.
    pub fn boot_or_skip(name: &str) -> Option<Self> {
        let sandbox = Sandbox::enter(name);
        let builder = Builder::new(&sandbox.path("images"));
        let registry = Registry::start(&sandbox.path("registry"));
        let repository = Repository::mounted(&sandbox.path("cvmfs"));
        let machine = Machine::boot_without_daemon_or_skip(&sandbox, repository.dir())?;
        Some(Self { machine, registry, repository, builder, sandbox })
    }

    /// Runs a program as an administrator's shell would.
    pub fn shell(&self, line: &str) -> Output {
        let path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
        self.machine.run(&["env", path, "DEBIAN_FRONTEND=noninteractive", "sh", "-c", &format!("{line} 2>&1")])
    }

    /// Copies a file of this host into the machine.
    pub fn give(&self, file: &Path) -> String {
        let to = format!("/root/{}", file.file_name().expect("a file has a name").to_string_lossy());
        fs::copy(file, self.machine.path(&to)).expect("a file can be copied");
        to
    }

    /// Runs dpkg. The result is its output.
    #[track_caller]
    pub fn dpkg(&self, arguments: &str) -> String {
        self.shell(&format!("dpkg {arguments} </dev/null")).ok()
    }

    /// Runs rpm. The result is its output. It is the program of this host: the machine has no rpm, and therefore no rpm
    /// package that ours requires.
    #[track_caller]
    pub fn rpm(&self, arguments: &str) -> String {
        let libraries = format!("{HOST}/lib/x86_64-linux-gnu");
        let rpm = format!(
            "RPM_CONFIGDIR={HOST}/lib/rpm {libraries}/ld-linux-x86-64.so.2 --library-path {libraries} {HOST}/bin/rpm \
             --dbpath=/var/lib/rpm"
        );
        self.shell(&format!("{rpm} {arguments}")).ok()
    }

    /// The configuration that belongs to the machine's repository, as an administrator writes it.
    pub fn configure(&self, more: &str) {
        let path = self.machine.path(CONFIG);
        let text = fs::read_to_string(&path).expect("the configuration is installed");
        fs::write(path, format!("{text}repository = \"scene.test\"\n{more}\n")).expect("it can be changed");
    }

    #[track_caller]
    pub fn assert_serves(&self) {
        for unit in [SERVICE, SOCKET_UNIT] {
            let state = ["ActiveState", "UnitFileState"].map(|name| self.machine.property(unit, name));
            assert_eq!(state, ["active", "enabled"], "{unit}\n{}", self.machine.journal(unit));
        }
        let program = self.machine.path(&format!("/proc/{}/exe", self.machine.property(SERVICE, "MainPID")));
        assert_eq!(fs::read_link(program).expect("it runs"), Path::new("/usr/bin/cvmfs-snapshotter"));
    }

    /// Asserts that an installation without a running systemd, as in the build of an image, enables the units and starts
    /// nothing.
    #[track_caller]
    pub fn assert_installs_without_systemd(&self, install: impl FnOnce() -> String) {
        self.shell("mount -t tmpfs none /run/systemd").ok();
        let said = install();
        self.shell("umount /run/systemd && systemctl daemon-reload").ok();
        for unit in [SERVICE, SOCKET_UNIT] {
            let state = ["ActiveState", "UnitFileState"].map(|name| self.machine.property(unit, name));
            assert_eq!(state, ["inactive", "enabled"], "{unit}: {said}");
        }
    }

    pub fn ctr(&self, arguments: &[&str]) -> Output {
        self.machine.ctr(&[&["--namespace", NAMESPACE], arguments].concat())
    }

    pub fn snapshots(&self) -> String {
        // containerd waits a little before it connects again.
        let mut listed = String::new();
        eventually("snapshots can be listed", || {
            let output = self.ctr(&["snapshots", SNAPSHOTTER, "ls"]);
            listed = output.stdout;
            output.status.success()
        });
        listed
    }

    /// Pulls two images, and starts a container that counts in a file of its own.
    #[track_caller]
    pub fn run_container(&self) -> Running {
        let references = ["mixed", "published"].map(|name| {
            let own = self.builder.layer(|l| {
                l.file("data/name", name);
            });
            let image = self.builder.image(&format!("{name}:1"), &[self.builder.shell_layer(), own], &[]);
            let published = if name == "mixed" { 1 } else { 2 };
            self.repository.publish_layers(&image.layers[..published]);
            let reference = self.registry.push(&image);
            let before = self.registry.fetched();
            Cri::connect(&self.machine.path(CONTAINERD)).pull(&reference);
            let fetched = self.registry.fetched().since(&before).layers_of(&image);
            assert_eq!(fetched, 2 - published, "layers of {name} that were downloaded");
            reference
        });
        let program = "i=0; while true; do i=$((i+1)); echo $i >>/tmp/count; sleep 0.05; done";
        self.ctr(&["run", "--detach", SNAPSHOTTER, &references[0], "counter", "/bin/sh", "-c", program]).ok();
        eventually("the container counts", || self.count() > 0);
        Running { references, snapshots: self.snapshots() }
    }

    /// The number to which the container has counted, after a check that the file has every line.
    #[track_caller]
    fn count(&self) -> usize {
        let tasks = self.ctr(&["tasks", "ls"]).ok();
        let words = tasks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let task = words.into_iter().find(|words| words[0] == "counter").expect("the container runs");
        let file = self.machine.path(&format!("/proc/{}/root/tmp/count", task[1]));
        let counted = fs::read_to_string(file).unwrap_or_default();
        let lost = counted.lines().zip(1..).find(|(line, number)| line.parse() != Ok(*number));
        assert_eq!(lost, None::<(&str, usize)>, "the container lost lines");
        counted.lines().count()
    }

    #[track_caller]
    pub fn assert_counts(&self) {
        let before = self.count();
        eventually("the container counts on", || self.count() > before);
    }

    /// Asserts that the container runs and writes, that every snapshot exists, and that both images still start.
    #[track_caller]
    pub fn assert_nothing_is_lost(&self, running: &Running) {
        self.assert_counts();
        assert_eq!(self.snapshots(), running.snapshots);
        for reference in &running.references {
            let mut said = String::new();
            // ctr 1.6 may lose the output of a container right before its end.
            let program = "cat /data/name; sleep 0.3";
            eventually("a container starts", || {
                let output = self.ctr(&["run", "--rm", SNAPSHOTTER, reference, "again", "/bin/sh", "-c", program]);
                said = output.stdout;
                output.status.success()
            });
            assert!(reference.contains(said.trim()) && !said.is_empty(), "{reference} said {said:?}");
        }
        assert_eq!(self.snapshots(), running.snapshots);
    }

    /// The names and contents below the state root that no start of the daemon changes.
    pub fn state(&self) -> Vec<PathBuf> {
        let home = self.machine.path(&format!("{STATE}/snapshotter/snapshots"));
        let mut found = Vec::new();
        let mut unread = vec![home];
        while let Some(directory) = unread.pop() {
            for entry in fs::read_dir(&directory).expect("a directory can be read") {
                let entry = entry.expect("an entry can be read");
                if entry.file_type().expect("an entry has a type").is_dir() {
                    unread.push(entry.path());
                }
                found.push(entry.path());
            }
        }
        found.sort();
        found
    }

    /// Makes calls as containerd does while `work` runs. The result is their number and the failures.
    pub fn calls_during(&self, work: impl FnOnce()) -> (usize, Vec<String>) {
        let client = Client::connect_to_containerd(&self.machine.path(CONTAINERD), NAMESPACE, "cvmfs-snapshotter");
        let calls = BackgroundCalls::run_during(&[client], |calls| {
            calls.wait_for_more(20);
            work();
            calls.wait_for_more(20);
        });
        (calls.made(), calls.drain_failures())
    }

    /// The start time of the unit, which is the same if it was neither stopped nor started meanwhile.
    pub fn since(&self, unit: &str) -> String {
        self.machine.property(unit, "ActiveEnterTimestampMonotonic")
    }
}
