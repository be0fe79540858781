//! The snapshotter under test, which runs as a process.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::client::Client;
use crate::log::{self, Entry};
use crate::process::{Output, Server, eventually, run};

/// The path of the snapshotter's program, which by default lies beside this one.
pub fn binary() -> PathBuf {
    std::env::var_os("CVMFS_SNAPSHOTTER_BINARY").map_or_else(
        || {
            let own = std::env::current_exe().expect("this program knows where it is");
            let program = own.ancestors().map(|dir| dir.join("cvmfs-snapshotter")).find(|p| p.is_file());
            program.expect("cvmfs-snapshotter is built first: cargo build")
        },
        PathBuf::from,
    )
}

/// A snapshotter with its socket, state root and configuration in one directory.
pub struct Snapshotter {
    dir: PathBuf,
    /// A socket that outlives the daemon, as systemd holds one for a service.
    listener: Option<UnixListener>,
    server: Option<Server>,
}

impl Snapshotter {
    /// Starts a daemon; `more` is appended to a configuration that only names the repository.
    pub fn start(dir: &Path, repository: &Path, more: &str) -> Self {
        let mut snapshotter = Self::configured(dir, repository, more);
        snapshotter.start_again();
        snapshotter
    }

    /// Starts a daemon on a socket that stays open while the daemon is down.
    pub fn start_behind_socket(dir: &Path, repository: &Path, more: &str) -> Self {
        let mut snapshotter = Self::configured(dir, repository, more);
        let socket = snapshotter.socket();
        fs::create_dir_all(socket.parent().expect("a socket has a directory")).expect("the directory can be made");
        snapshotter.listener = Some(UnixListener::bind(socket).expect("the socket is new"));
        snapshotter.start_again();
        snapshotter
    }

    /// Writes the configuration without starting the daemon.
    pub fn configured(dir: &Path, repository: &Path, more: &str) -> Self {
        fs::create_dir_all(dir).expect("the snapshotter's directory can be made");
        let config =
            format!("repository = \"scene.test\"\nabsolute-mountpoint = \"{}\"\n{more}\n", repository.display());
        fs::write(dir.join("config.toml"), config).expect("the configuration can be written");
        Self { dir: dir.to_owned(), listener: None, server: None }
    }

    pub fn start_again(&mut self) {
        let mut command = self.command();
        if let Some(listener) = &self.listener {
            let mut activated = Command::new("sh");
            activated.args(["-c", "exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"", "sh"]);
            activated.arg(command.get_program()).args(command.get_args());
            let listener = listener.try_clone().expect("a socket can be shared");
            activated.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
            command = activated;
        } else {
            command.stdin(Stdio::null());
        }
        self.start_as(&mut command);
    }

    /// Starts the daemon through another program, such as strace: `wrapper` is the beginning of the command line.
    pub fn start_again_below(&mut self, wrapper: &[&str]) {
        let command = self.command();
        let mut wrapped = Command::new(wrapper[0]);
        wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
        self.start_as(&mut wrapped);
    }

    fn start_as(&mut self, command: &mut Command) {
        let mut server = Server::start(command, &self.dir.join("log"));
        let socket = self.socket();
        server.wait_until("listen", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        self.server = Some(server);
    }

    pub fn command(&self) -> Command {
        self.command_that_logs("debug")
    }

    pub fn command_that_logs(&self, level: &str) -> Command {
        let mut command = Command::new(binary());
        command.arg("--address").arg(self.socket()).arg("--root").arg(self.root());
        command.arg("--config").arg(self.dir.join("config.toml")).args(["--log-level", level]);
        // The packaged unit sets this variable, so the daemon is tested and measured as it is installed.
        command.env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");
        command
    }

    /// Runs one of the commands for administrators.
    pub fn admin(&self, arguments: &[&str]) -> Output {
        let (socket, root, config) = (self.socket(), self.root(), self.dir.join("config.toml"));
        let mut all: Vec<&OsStr> = ["--address".as_ref(), socket.as_ref(), "--root".as_ref(), root.as_ref()].to_vec();
        all.extend::<[&OsStr; 2]>(["--config".as_ref(), config.as_ref()]);
        all.extend(arguments.iter().map(|argument| -> &OsStr { argument.as_ref() }));
        run(binary(), all)
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/s.sock")
    }

    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.root().join("snapshotter/snapshots")
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    pub fn server(&mut self) -> &mut Server {
        self.server.as_mut().expect("the snapshotter is running")
    }

    pub fn log(&self) -> String {
        // The daemon writes its log in a thread of its own, so a line may come after the call that it is about.
        std::thread::sleep(std::time::Duration::from_millis(100));
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The entries that the log has for an event.
    pub fn events(&self, event: &str) -> Vec<Entry> {
        log::events(&self.log(), event)
    }

    pub fn count_event(&self, event: &str) -> usize {
        self.events(event).len()
    }

    /// Waits until the log has an entry for an event. The result is the latest one.
    #[track_caller]
    pub fn wait_for_event(&self, event: &str) -> Entry {
        let mut latest = None;
        eventually(&format!("the event {event} is logged"), || {
            latest = self.events(event).pop();
            latest.is_some()
        });
        latest.expect("it was waited for")
    }

    /// Stops the daemon; it can be started again.
    #[track_caller]
    pub fn end(&mut self, signal: Signal) -> std::process::ExitStatus {
        let status = self.server().end(signal);
        self.server = None;
        status
    }
}
