//! Programs that `tests/setup.sh` has installed: where they are, running one until it ends, and servers that are killed
//! when they are dropped.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::resource_usage::{count_open_files, status_number};

/// The cache folder that `tests/setup.sh` fills.
pub fn cache() -> PathBuf {
    std::env::var_os("CVMFS_SNAPSHOTTER_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/cvmfs-snapshotter"),
        PathBuf::from,
    )
}

/// The path of a program that `tests/setup.sh` installs.
pub fn tool(name: &str) -> PathBuf {
    let tools = cache().join("tools");
    let places = [
        tools.join(name),
        tools.join("debian/usr/bin").join(name),
        tools.join("debian/usr/sbin").join(name),
        tools.join("debian/bin").join(name),
    ];
    places
        .into_iter()
        .find(|p| p.is_file())
        .unwrap_or_else(|| panic!("{name} is missing: run \"make test\" or \"make demo\", which install it"))
}

/// A search path on which containerd finds its shim and runc.
pub fn search_path() -> String {
    let debian = cache().join("tools/debian/usr");
    format!("{0}/bin:{0}/sbin:{1}", debian.display(), std::env::var("PATH").unwrap_or_default())
}

/// The result of a program that has ended.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Asserts that the program succeeded. The result is its standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}\n{}{}", self.status, self.stdout, self.stderr);
        self.stdout
    }
}

pub fn run<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = S>) -> Output {
    run_on(&search_path(), program, arguments)
}

/// Runs a program like `run`, with another search path.
pub fn run_on<S: AsRef<OsStr>>(
    path: &str,
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> Output {
    let program = program.as_ref();
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}", program.display()));
    Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A server that writes its log to a file. It is killed on drop.
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    pub fn start(command: &mut Command, log: &Path) -> Self {
        Self::start_on(&search_path(), command, log)
    }

    /// Starts a process like `start`, with another search path.
    pub fn start_on(path: &str, command: &mut Command, log: &Path) -> Self {
        let file = File::options().create(true).append(true).open(log).expect("a log file can be opened");
        let child = command
            .env("PATH", path)
            .stdout(file.try_clone().expect("a log file can be shared"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        Self { child, log: log.to_owned() }
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid is an i32"))
    }

    /// A number of `/proc/<pid>/status`: `VmRSS` and `VmHWM` in KiB, `Threads`.
    #[track_caller]
    pub fn status(&self, field: &str) -> usize {
        status_number(self.pid(), field)
    }

    /// The names of its threads, sorted; the kernel keeps 15 characters of each.
    pub fn threads(&self) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("the server is there");
        let names = threads.map(|thread| thread.and_then(|thread| fs::read_to_string(thread.path().join("comm"))));
        // A thread may end between the listing and the reading of its name.
        let mut names: Vec<_> = names.flatten().map(|name| name.trim_end().to_owned()).collect();
        names.sort();
        names
    }

    /// The number of its open descriptors.
    pub fn descriptors(&self) -> usize {
        count_open_files(self.pid())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the server is there to be signalled");
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the server is our child").is_none()
    }

    /// Waits until `ready` is true, and fails when the server ends before that.
    #[track_caller]
    pub fn wait_until(&mut self, what: &str, mut ready: impl FnMut() -> bool) {
        let until = Instant::now() + Duration::from_mins(1);
        while !ready() {
            assert!(self.is_running(), "the server ended before {what}:\n{}", self.log());
            assert!(Instant::now() < until, "the server did not come to {what}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends `signal` and waits until the server has ended.
    #[track_caller]
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.wait_for_end()
    }

    #[track_caller]
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.try_wait().expect("the server is our child") {
                return status;
            }
            assert!(Instant::now() < until, "the server does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(8)..];
            eprintln!("---- the end of {}:\n{}", self.log.display(), last.join("\n"));
        }
    }
}

/// Sets a flag on drop, so that threads that run until it is set end also when an assertion beside them fails. Otherwise
/// the scope would wait for them for ever and hide the failure.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Waits up to 30 seconds until `condition` is true. `what` says in the failure what did not happen.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < until, "it did not happen that {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
