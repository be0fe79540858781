//! Snapshotters that take part: those that the benchmark starts, and those of somebody else.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use grpcio::RpcStatus;
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use scene::client::{Client, REF};
use scene::process::{Server, tool};
use scene::resource_usage::ResourceUsage;
use scene::snapshotter::Snapshotter;

use crate::host::processor_seconds;
use crate::settings::Settings;

pub const OURS: &str = "cvmfs-snapshotter";
pub const OVERLAYFS: &str = "overlayfs";
pub const GO: &str = "go";
pub const MEMORY: &str = "memory";
pub const NAMES: [&str; 4] = [OURS, OVERLAYFS, GO, MEMORY];

/// Why something could not be measured.
pub type Failure = String;

// `map_err` passes the status by value.
#[allow(clippy::needless_pass_by_value)]
pub fn failure(status: RpcStatus) -> Failure {
    format!("{:?}: {}", status.code(), status.message())
}

/// The prefix of all names that the benchmark makes.
pub fn prefix() -> String {
    format!("cvmfs-bench-{}/", std::process::id())
}

enum Process {
    /// Started by us. `make` describes it, anew for each start.
    Own { make: Box<dyn Fn() -> Command>, log: PathBuf, server: Option<Server> },
    /// Was there before. None: nobody knows who listens.
    Foreign(Option<Pid>),
}

pub struct Contestant {
    pub name: String,
    socket: PathBuf,
    process: Process,
}

impl Contestant {
    pub fn ours(name: &str, dir: &Path, repository: &Path, more: &str) -> Self {
        let snapshotter = Snapshotter::configured(dir, repository, more);
        let socket = snapshotter.socket();
        Self::own(name, dir, socket, move || snapshotter.command_that_logs("info"))
    }

    /// containerd's own plugin, alone behind a socket.
    pub fn overlayfs(dir: &Path) -> Self {
        let (root, socket) = (dir.join("root"), dir.join("s.sock"));
        Self::own(OVERLAYFS, dir, socket.clone(), move || {
            let mut command = Command::new(tool("gostate"));
            command.arg("serve").arg(&root).arg(&socket);
            command
        })
    }

    /// The engine of the Go snapshotter.
    pub fn go(dir: &Path, repository: &Path) -> Self {
        let (root, socket, repository) = (dir.join("root"), dir.join("s.sock"), repository.to_owned());
        Self::own(GO, dir, socket.clone(), move || {
            let mut command = Command::new(tool("gopeer"));
            command.arg("bind").arg(&repository).arg(&root).arg(&socket);
            command
        })
    }

    /// What costs containerd alone.
    pub fn memory(dir: &Path) -> Self {
        let socket = dir.join("s.sock");
        Self::own(MEMORY, dir, socket.clone(), move || {
            let mut command = Command::new(tool("gopeer"));
            command.arg("memory").arg(&socket);
            command
        })
    }

    fn own(name: &str, dir: &Path, socket: PathBuf, make: impl Fn() -> Command + 'static) -> Self {
        fs::create_dir_all(dir.join("root")).expect("a contestant's directory can be made");
        let process = Process::Own { make: Box::new(make), log: dir.join("log"), server: None };
        let mut contestant = Self { name: name.to_owned(), socket, process };
        if let Err(why) = contestant.start() {
            panic!("{name}: {why}");
        }
        contestant
    }

    /// Snapshotters that run already.
    pub fn foreign(settings: &Settings) -> impl Iterator<Item = Self> {
        settings.peers.iter().map(|(name, socket)| {
            let stream = UnixStream::connect(socket);
            let stream = stream.unwrap_or_else(|e| panic!("nobody listens on {} any more: {e}", socket.display()));
            let pid = getsockopt(&stream, PeerCredentials).ok().map(|peer| Pid::from_raw(peer.pid()));
            // systemd holds sockets for others.
            let pid = pid.filter(|pid| pid.as_raw() > 1);
            Self { name: name.clone(), socket: socket.clone(), process: Process::Foreign(pid) }
        })
    }

    /// Starts what `stop` has ended; the result is how long it took to the first answer.
    pub fn start(&mut self) -> Result<Duration, Failure> {
        let Process::Own { make, log, server } = &mut self.process else {
            return Err("somebody else has to start it".to_owned());
        };
        // A Go server does not remove it.
        let _ = fs::remove_file(&self.socket);
        let begun = Instant::now();
        let mut started = Server::start(make().stdin(Stdio::null()), log);
        while UnixStream::connect(&self.socket).is_err() {
            if !started.is_running() {
                let log = started.log();
                return Err(format!("it ended at its start: {}", log.lines().next_back().unwrap_or_default()));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        *server = Some(started);
        // It is not there; but it answers that.
        let _ = self.client().stat(&format!("{}nothing", prefix()));
        Ok(begun.elapsed())
    }

    pub fn stop(&mut self) {
        if let Process::Own { server: Some(server), .. } = &mut self.process {
            server.end(Signal::SIGTERM);
        }
    }

    pub fn is_foreign(&self) -> bool {
        matches!(self.process, Process::Foreign(_))
    }

    pub fn pid(&self) -> Option<Pid> {
        match &self.process {
            Process::Own { server, .. } => server.as_ref().map(Server::pid),
            Process::Foreign(pid) => *pid,
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// With a connection of its own.
    pub fn client(&self) -> Client {
        Client::connect(&self.socket)
    }

    pub fn usage(&self) -> Option<ResourceUsage> {
        self.pid().map(ResourceUsage::read)
    }

    /// Waits until it has nothing to do any more, a minute at most.
    pub fn settle(&self) {
        let Some(pid) = self.pid() else { return };
        let until = Instant::now() + Duration::from_mins(1);
        let mut before = processor_seconds(pid);
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(200));
            let now = processor_seconds(pid);
            if now - before < 0.015 {
                return;
            }
            before = now;
        }
    }

    /// Removes what the benchmark made, from the top.
    fn tidy(&self) -> Result<(), Failure> {
        let client = self.client();
        let prefix = prefix();
        let mut parents: HashMap<String, String> = HashMap::new();
        for info in client.list(&[]).map_err(failure)? {
            let pulled = info.labels.get(REF).is_some_and(|reference| reference.starts_with(&prefix));
            if pulled || info.name.starts_with(&prefix) {
                parents.insert(info.name, info.parent);
            }
        }
        while !parents.is_empty() {
            let below: HashSet<&String> = parents.values().collect();
            let top: Vec<String> = parents.keys().filter(|name| !below.contains(name)).cloned().collect();
            run_concurrently(&vec![client.clone(); 8], top.len(), |client, n| client.remove(&top[n]).map_err(failure))?;
            for name in &top {
                parents.remove(name);
            }
        }
        client.cleanup().map_err(failure)
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        if self.is_foreign()
            && let Err(why) = self.tidy()
        {
            eprintln!("{}: what begins with {:?} could not be removed: {why}", self.name, prefix());
        }
    }
}

/// Connects `number` clients, and makes a call with each.
pub fn clients(of: &Contestant, number: usize) -> Vec<Client> {
    let clients: Vec<Client> = (0..number).map(|_| of.client()).collect();
    for client in &clients {
        let _ = client.stat(&format!("{}nothing", prefix()));
    }
    clients
}

/// Has each client, on a thread of its own, take up pieces of work until all are done, or until
/// the first failure.
pub fn run_concurrently(
    clients: &[Client],
    pieces: usize,
    work: impl Fn(&Client, usize) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for client in clients {
            scope.spawn(|| {
                loop {
                    let piece = next.fetch_add(1, Ordering::Relaxed);
                    if piece >= pieces {
                        return;
                    }
                    if let Err(error) = work(client, piece) {
                        next.store(pieces, Ordering::Relaxed);
                        *failed.lock().expect("no thread panics with it") = Some(error);
                    }
                }
            });
        }
    });
    failed.into_inner().expect("no thread panics with it").map_or(Ok(()), Err)
}
