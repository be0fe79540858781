//! A containerd with its own root, state and socket, and its clients: ctr, nerdctl, the CRI and the snapshots service.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::client::Client;
use crate::cri::Cri;
use crate::image::Image;
use crate::machine::STATE;
use crate::process::{Output, Server, run, run_on, tool};
use crate::release::{ConfigVariant, Configuration, Release};
use crate::rootfs::Mounted;
use crate::snapshotter::Snapshotter;

/// The namespace of the CRI.
pub const NAMESPACE: &str = "k8s.io";
/// The name under which containerd knows our snapshotter.
pub const PLUGIN_NAME: &str = "cvmfs-snapshotter";

pub struct Containerd {
    dir: PathBuf,
    release: Release,
    snapshotter: &'static str,
    server: Server,
}

impl Containerd {
    /// Starts containerd 1.6 with its own overlayfs as the snapshotter of the CRI.
    pub fn with_overlayfs(dir: &Path, pause_image: &str) -> Self {
        Self::normal(dir, Release::V1_6, pause_image)
    }

    /// Starts a containerd of any version that uses overlayfs.
    pub fn normal(dir: &Path, release: Release, pause_image: &str) -> Self {
        let main = if release < Release::V2_1 { "version = 2\n" } else { "version = 3\n" };
        let configuration = Configuration { main: main.to_owned(), conf_d: None };
        Self::start(dir, release, "overlayfs", pause_image, configuration)
    }

    /// Starts containerd 1.6 with our snapshotter, which listens at `socket`.
    pub fn with_snapshotter(dir: &Path, pause_image: &str, socket: &Path) -> Self {
        let configuration = ConfigVariant::Client1.configuration(socket, Path::new(STATE));
        Self::start(dir, Release::V1_6, PLUGIN_NAME, pause_image, configuration)
    }

    /// Starts containerd with our snapshotter, configured as the documentation says.
    pub fn with_config_variant(
        dir: &Path,
        release: Release,
        variant: ConfigVariant,
        pause_image: &str,
        snapshotter: &Snapshotter,
    ) -> Self {
        let configuration = variant.configuration(&snapshotter.socket(), &snapshotter.root());
        Self::start(dir, release, PLUGIN_NAME, pause_image, configuration)
    }

    /// Starts containerd with our snapshotter and any configuration.
    pub fn configured(dir: &Path, release: Release, pause_image: &str, configuration: Configuration) -> Self {
        Self::start(dir, release, PLUGIN_NAME, pause_image, configuration)
    }

    fn start(
        dir: &Path,
        release: Release,
        snapshotter: &'static str,
        pause_image: &str,
        configuration: Configuration,
    ) -> Self {
        fs::create_dir_all(dir.join("conf.d")).expect("containerd's directory can be made");
        let imports = match configuration.conf_d {
            None => String::new(),
            Some(text) => {
                fs::write(dir.join("conf.d/ours.toml"), text).expect("a file can be written");
                format!("imports = [{:?}]\n", dir.join("conf.d/*.toml"))
            }
        };
        let disabled = "disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \
                        \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\"]\n";
        let disabled = if configuration.main.contains("disabled_plugins") { "" } else { disabled };
        // The file of a user gets keys before its first table, and tables of ours after it.
        let config = format!(
            "root = {root:?}
state = {state:?}
oom_score = 0
{disabled}{imports}{main}
[grpc]
  address = {socket:?}
[plugins.\"io.containerd.internal.v1.opt\"]
  path = {opt:?}
{cri}",
            root = dir.join("root"),
            state = dir.join("state"),
            main = configuration.main,
            socket = dir.join("c.sock"),
            opt = dir.join("opt"),
            cri = cri_tables(configuration.main.contains("version = 2"), pause_image),
        );
        fs::write(dir.join("config.toml"), config).expect("containerd's configuration can be written");
        Self { dir: dir.to_owned(), release, snapshotter, server: serve(dir, release) }
    }

    /// Stops the daemon; its containers keep running.
    pub fn end(&mut self) {
        self.server.end(Signal::SIGTERM);
    }

    pub fn signal(&self, signal: Signal) {
        self.server.signal(signal);
    }

    pub fn start_again(&mut self) {
        self.server = serve(&self.dir, self.release);
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    pub fn configuration(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// The directory of the content store and the snapshots.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    pub fn log(&self) -> String {
        self.server.log()
    }

    pub fn snapshotter(&self) -> &'static str {
        self.snapshotter
    }

    pub fn ctr(&self, arguments: &[&str]) -> Output {
        let socket = self.socket().display().to_string();
        let first = ["--address", &socket, "--namespace", NAMESPACE];
        run_on(&self.release.search_path(), self.release.program("ctr"), first.iter().chain(arguments))
    }

    /// Runs nerdctl with its state in this containerd's directory.
    pub fn nerdctl(&self, arguments: &[&str]) -> Output {
        let (socket, data) = (self.socket().display().to_string(), self.dir.join("nerdctl").display().to_string());
        let first = ["--address", &socket, "--data-root", &data, "--cgroup-manager", "cgroupfs", "--insecure-registry"];
        run(tool("nerdctl"), first.iter().chain(&["--snapshotter", self.snapshotter]).chain(arguments))
    }

    pub fn cri(&self) -> Cri {
        Cri::connect(&self.socket())
    }

    /// Pulls as the kubelet does.
    #[track_caller]
    pub fn pull(&self, reference: &str) {
        self.cri().pull(reference);
    }

    /// Removes the image and waits until its content and snapshots are collected.
    #[track_caller]
    pub fn remove(&self, reference: &str) {
        self.cri().remove(reference);
        self.collect_garbage();
    }

    /// Makes containerd collect garbage now, which it does otherwise in the background: a synchronous removal of an image
    /// or a lease waits for a collection.
    pub fn collect_garbage(&self) {
        let import = "gc.scene/nothing:1";
        let any = self.ctr(&["images", "ls", "-q"]).ok();
        if let Some(image) = any.lines().find(|l| !l.starts_with("sha256:")) {
            self.ctr(&["images", "tag", image, import]).ok();
            self.ctr(&["images", "rm", "--sync", import]).ok();
        } else {
            let key = "scene-gc";
            self.ctr(&["leases", "create", "--id", key]).ok();
            self.ctr(&["leases", "rm", "--sync", key]).ok();
        }
    }

    /// A client of containerd's snapshots service, in the namespace of the CRI.
    pub fn snapshots(&self) -> Client {
        Client::connect_to_containerd(&self.socket(), NAMESPACE, self.snapshotter)
    }

    /// Mounts a root file system of the image, from a new snapshot with the name `key`.
    #[track_caller]
    pub fn mount_image(&self, image: &Image, key: &str, at: &Path, writable: Writable) -> Mounted {
        let parent = image.chain_ids.last().expect("an image has layers");
        // Without the label containerd's garbage collector would remove the snapshot at once.
        let with = [("containerd.io/gc.root", "scene")];
        let mounts = match writable {
            Writable::Yes => self.snapshots().prepare(key, parent, &with),
            Writable::No => self.snapshots().view(key, parent, &with),
        };
        let mounts = mounts.unwrap_or_else(|status| panic!("no snapshot of {}: {}", image.name, status.message()));
        Mounted::new(&mounts, at).unwrap_or_else(|e| panic!("cannot mount {}: {e}\n{mounts:?}", image.name))
    }

    /// A name that no other test uses, because the containers of all tests share runc's directory.
    fn unique(&self, id: &str) -> String {
        let sandbox = self.dir.parent().and_then(Path::file_name).expect("containerd lives in a sandbox");
        format!("{}-{id}", sandbox.display())
    }

    /// Runs a program in a container until it ends.
    pub fn run(&self, reference: &str, id: &str, program: &[&str]) -> Output {
        let id = self.unique(id);
        let mut arguments = vec!["run", "--rm", "--snapshotter", self.snapshotter, reference, &id];
        arguments.extend(program);
        self.ctr(&arguments)
    }

    /// Starts a container that runs until `end_container`.
    pub fn start_container(&self, reference: &str, id: &str, program: &[&str]) {
        let id = self.unique(id);
        let mut arguments = vec!["run", "--detach", "--snapshotter", self.snapshotter, reference, &id];
        arguments.extend(program);
        self.ctr(&arguments).ok();
    }

    /// The root file system as the container's first process sees it.
    pub fn root_of(&self, id: &str) -> PathBuf {
        let id = self.unique(id);
        let tasks = self.ctr(&["tasks", "ls"]).ok();
        let task = tasks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|words| words[0] == id);
        PathBuf::from(format!("/proc/{}/root", task.expect("the container runs")[1]))
    }

    /// Runs a program in a running container. ctr 1.6 may lose the end of its output.
    pub fn exec(&self, id: &str, program: &[&str]) -> Output {
        let id = self.unique(id);
        let mut arguments = vec!["tasks", "exec", "--exec-id", "scene", &id];
        arguments.extend(program);
        self.ctr(&arguments)
    }

    pub fn end_container(&self, id: &str) {
        let id = self.unique(id);
        self.end_task(NAMESPACE, &id);
        self.ctr(&["containers", "rm", &id]).ok();
    }

    fn end_task(&self, namespace: &str, id: &str) {
        let in_namespace = |arguments: &[&str]| self.ctr(&[&["--namespace", namespace], arguments].concat());
        in_namespace(&["tasks", "kill", "--signal", "SIGKILL", id]);
        crate::process::eventually("the task is gone", || {
            in_namespace(&["tasks", "rm", "--force", id]).status.success()
        });
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Containers keep running without containerd, so they are ended first.
        for namespace in self.ctr(&["namespaces", "ls", "-q"]).stdout.lines() {
            for task in self.ctr(&["--namespace", namespace, "tasks", "ls", "-q"]).stdout.lines() {
                self.end_task(namespace, task);
            }
        }
    }
}

/// Settings of the CRI that tests need beside those of a user.
fn cri_tables(version_2: bool, pause_image: &str) -> String {
    if version_2 {
        return format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]
  sandbox_image = \"{pause_image}\"
  restrict_oom_score_adj = true
[plugins.\"io.containerd.nri.v1.nri\"]
  disable = true
"
        );
    }
    // All instances of containerd on a machine would share the socket of NRI.
    format!(
        "[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = \"{pause_image}\"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.nri.v1.nri']
  disable = true
"
    )
}

fn serve(dir: &Path, release: Release) -> Server {
    let (mut command, path) = (Command::new(release.program("containerd")), release.search_path());
    command.arg("--config").arg(dir.join("config.toml"));
    let mut server = Server::start_on(&path, &mut command, &dir.join("log"));
    let (ctr, socket) = (release.program("ctr"), dir.join("c.sock"));
    server.wait_until("answer", || {
        socket.exists() && run(&ctr, ["--address", &socket.display().to_string(), "version"]).status.success()
    });
    server
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writable {
    Yes,
    No,
}
