//! Debian's containerd with its own root, state and socket, and the ways to talk to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::client::Client;
use crate::cri::Cri;
use crate::image::Image;
use crate::process::{Output, Server, run, tool};
use crate::rootfs::Mounted;

/// The namespace of the CRI.
pub const NAMESPACE: &str = "k8s.io";

pub struct Containerd {
    dir: PathBuf,
    snapshotter: &'static str,
    server: Server,
}

impl Containerd {
    /// With containerd's own overlayfs as the snapshotter of the CRI.
    pub fn with_overlayfs(dir: &Path, pause_image: &str) -> Self {
        Self::start(dir, "overlayfs", pause_image, "")
    }

    /// With ours, behind `socket`.
    pub fn with_snapshotter(dir: &Path, pause_image: &str, socket: &Path) -> Self {
        let proxy = format!("[proxy_plugins.cvmfs-snapshotter]\n  type = \"snapshot\"\n  address = {socket:?}\n");
        Self::start(dir, "cvmfs-snapshotter", pause_image, &proxy)
    }

    fn start(dir: &Path, snapshotter: &'static str, pause_image: &str, proxy: &str) -> Self {
        fs::create_dir_all(dir).expect("containerd's directory can be made");
        let socket = dir.join("c.sock");
        let config = format!(
            "version = 2
root = {root:?}
state = {state:?}
oom_score = 0
disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\"]
[grpc]
  address = {socket:?}
[plugins.\"io.containerd.grpc.v1.cri\"]
  sandbox_image = \"{pause_image}\"
  restrict_oom_score_adj = true
[plugins.\"io.containerd.grpc.v1.cri\".containerd]
  snapshotter = \"{snapshotter}\"
  disable_snapshot_annotations = false
{proxy}",
            root = dir.join("root"),
            state = dir.join("state"),
        );
        fs::write(dir.join("config.toml"), config).expect("containerd's configuration can be written");
        Self { dir: dir.to_owned(), snapshotter, server: serve(dir) }
    }

    /// Ends the daemon; its containers run on.
    pub fn end(&mut self) {
        self.server.end(Signal::SIGTERM);
    }

    pub fn start_again(&mut self) {
        self.server = serve(&self.dir);
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    pub fn configuration(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// Where the content store and the snapshots lie.
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
        run(tool("ctr"), first.iter().chain(arguments))
    }

    /// nerdctl with its state in our directory.
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

    /// containerd collects in the background; removing an image synchronously makes it now.
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
        Client::of_containerd(&self.socket(), NAMESPACE, self.snapshotter)
    }

    /// A root file system of the image, under the name `key`.
    #[track_caller]
    pub fn mount_image(&self, image: &Image, key: &str, at: &Path, writable: Writable) -> Mounted {
        let parent = image.chain_ids.last().expect("an image has layers");
        // Without the label containerd would collect it at once.
        let with = [("containerd.io/gc.root", "scene")];
        let mounts = match writable {
            Writable::Yes => self.snapshots().prepare(key, parent, &with),
            Writable::No => self.snapshots().view(key, parent, &with),
        };
        let mounts = mounts.unwrap_or_else(|status| panic!("no snapshot of {}: {}", image.name, status.message()));
        Mounted::new(&mounts, at).unwrap_or_else(|e| panic!("cannot mount {}: {e}\n{mounts:?}", image.name))
    }

    /// The containers of all tests share one directory of runc's.
    fn unique(&self, id: &str) -> String {
        let stage = self.dir.parent().and_then(Path::file_name).expect("containerd lives in a sandbox");
        format!("{}-{id}", stage.display())
    }

    /// Runs a program in a container to its end.
    pub fn run(&self, reference: &str, id: &str, program: &[&str]) -> Output {
        let id = self.unique(id);
        let mut arguments = vec!["run", "--rm", "--snapshotter", self.snapshotter, reference, &id];
        arguments.extend(program);
        self.ctr(&arguments)
    }

    /// Starts a container that goes on until it is ended.
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

    /// Runs a program in a running container. Of its output ctr 1.6 may lose the end.
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
        // Containers live on without containerd.
        for namespace in self.ctr(&["namespaces", "ls", "-q"]).stdout.lines() {
            for task in self.ctr(&["--namespace", namespace, "tasks", "ls", "-q"]).stdout.lines() {
                self.end_task(namespace, task);
            }
        }
    }
}

fn serve(dir: &Path) -> Server {
    let mut command = Command::new(tool("containerd"));
    let mut server = Server::start(command.arg("--config").arg(dir.join("config.toml")), &dir.join("log"));
    let (ctr, socket) = (tool("ctr"), dir.join("c.sock"));
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
