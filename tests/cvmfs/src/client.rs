//! Starts the binary `cvmfs-test-client` and talks to it.
//!
//! The client is a process of its own so that a test can stop and kill it as an operator would.
//! It inherits the mount namespace of the thread that starts it, so the mount is visible there.

#![forbid(unsafe_code)]

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

const MOUNT_DEADLINE: Duration = Duration::from_secs(30);
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// A running client and its mount. Dropped, it is killed and the mountpoint is lazily unmounted.
#[derive(Debug)]
pub struct Mount {
    child: Child,
    /// `None` once the client was told to end.
    input: Option<ChildStdin>,
    /// In a mutex for one reason: threads of a test may share a mount.
    answers: Mutex<Receiver<String>>,
    complaints: Arc<Mutex<String>>,
    mountpoint: PathBuf,
}

impl Mount {
    /// Mounts the repository at `url` on the existing directory `mountpoint`; `cache` is created.
    /// `options` are further words of the client's command line. Panics with the client's stderr
    /// if there is no mount after 30 s.
    pub fn start(program: &Path, url: &str, mountpoint: &Path, cache: &Path, options: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(["--url", url, "--mountpoint"])
            .arg(mountpoint)
            .arg("--cache")
            .arg(cache)
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("start {program:?}: {error}; build it with `cargo build -p cvmfs-testbed`"));
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("the output is a pipe"));
        let mut errors = child.stderr.take().expect("the error output is a pipe");
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let complaints = Arc::new(Mutex::new(String::new()));
        thread::spawn({
            let complaints = Arc::clone(&complaints);
            move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = errors.read(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..count]);
                    complaints.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
                }
            }
        });
        // From here on a panic kills the child and unmounts.
        let mut mount =
            Self { child, input, answers: Mutex::new(answers), complaints, mountpoint: mountpoint.to_owned() };
        match mount.answer(MOUNT_DEADLINE) {
            Ok(line) if line == "mounted" => mount,
            other => panic!("the client did not mount ({other:?}): {}", mount.complaints()),
        }
    }

    /// Sends one command and waits for its acknowledgement: a line that begins with `ok` or with
    /// `error`.
    pub fn command(&mut self, line: &str) -> String {
        let input = self.input.as_mut().expect("a client that was told to end takes no commands");
        writeln!(input, "{line}")
            .unwrap_or_else(|error| panic!("send {line:?} to the client: {error}; it said: {}", self.complaints()));
        self.answer(COMMAND_DEADLINE)
            .unwrap_or_else(|error| panic!("the client does not acknowledge {line:?} ({error}): {}", self.complaints()))
    }

    fn answer(&mut self, deadline: Duration) -> Result<String, RecvTimeoutError> {
        self.answers.get_mut().unwrap_or_else(PoisonError::into_inner).recv_timeout(deadline)
    }

    /// Sends a signal to the client, for instance SIGSTOP and SIGCONT. After SIGSTOP no thread of it
    /// answers any more.
    pub fn signal(&self, signal: Signal) {
        signal::kill(self.pid(), signal).expect("a client that was not waited for takes signals");
        // A signal stops the threads of a process one after the other.
        while signal == Signal::SIGSTOP && !self.is_stopped() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_stopped(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("a process has tasks");
        tasks.flatten().all(|task| {
            let status = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // The name in brackets may hold anything.
            status.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
        })
    }

    /// Kills the client and waits for its end. The mount stays, dead: it answers ENOTCONN.
    pub fn kill(&mut self) {
        // Killed twice is killed.
        let _ = self.child.kill();
        self.child.wait().expect("a child can be waited for");
    }

    /// Lets the client unmount and end as it does when an operator unmounts; panics if it does not
    /// within 30 s.
    pub fn finish(&mut self) {
        self.input = None;
        let begin = Instant::now();
        while self.is_running() {
            assert!(begin.elapsed() < MOUNT_DEADLINE, "the client does not end: {}", self.complaints());
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("a process id fits an i32"))
    }

    /// The output of the client on standard error so far.
    pub fn complaints(&self) -> String {
        let mut text = self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if text.is_empty() {
            let _ = write!(text, "(nothing on stderr)");
        }
        text
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.is_running() {
            // SIGKILL ends a stopped process too, but what waits for it wakes only with it.
            let _ = signal::kill(self.pid(), Signal::SIGCONT);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // EINVAL says that nothing is mounted there any more. Never MNT_FORCE: it would abort the
        // connection for bind mounts in other namespaces too.
        while umount2(&self.mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    }
}

/// The client's binary: `CVMFS_TEST_CLIENT` if that is set, else `cvmfs-test-client` in the target
/// directory of the running test. Tests of another package must have it built before.
pub fn program() -> PathBuf {
    if let Some(program) = env::var_os("CVMFS_TEST_CLIENT") {
        return program.into();
    }
    let own = env::current_exe().expect("a running program has a path");
    own.ancestors()
        .skip(1)
        .map(|dir| dir.join("cvmfs-test-client"))
        .find(|program| program.is_file())
        .unwrap_or_else(|| panic!("find cvmfs-test-client above {own:?}; build it with `cargo build -p cvmfs-testbed`"))
}
