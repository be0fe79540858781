//! Whatever may hang for ever is asked by a process of our own, with a time limit: a path, a repository, another program. A
//! thread that hangs in a file system cannot be ended, a process can be left behind.
//!
//! The hidden command `probe` gets a `Request` as JSON. It prints the answer as JSON, or becomes the program that it was asked
//! for. If it fails, it prints the reason as JSON and exits with `FAILED`.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::OFlag;
use nix::sys::statvfs::statvfs;
use protobuf::Message;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{RepositoryConfig, file};
use crate::proto::admin::Repository as Described;
use crate::repository::Repository;
use crate::server::admin::describe_repository;
use crate::system::Host;

/// More than a disk, a repository or a program that answers ever takes.
pub const LIMIT: Duration = Duration::from_secs(10);
/// Exit code of `probe` when it has no answer.
const FAILED: u8 = 126;
/// Far above what any of the programs prints.
const MAX_PROGRAM_OUTPUT_BYTES: u64 = 1 << 20;
/// More than a configuration file of the largest size takes as JSON.
const MAX_ANSWER_BYTES: u64 = 8 << 20;
/// How much later the probe of a repository is given up than the repository itself, so that it can say so.
const REPOSITORY_SLACK: Duration = Duration::from_secs(1);
/// Directories with programs of the system, whatever the environment says.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// The same, and those that containerd's own archives are unpacked to.
const SEARCH_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";

/// The directory of a client's cache, and its device.
pub type ClientCache = (PathBuf, u64);

#[derive(Serialize, Deserialize)]
enum Request {
    Path(OsString),
    Repository(OsString),
    Program { program: Program, name: OsString, arguments: Vec<OsString> },
}

/// A program that the doctor runs as root.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Program {
    /// The name of a program of the system, or an absolute path.
    Path(OsString),
    /// What a process runs. The file may have been removed from its path meanwhile, by an upgrade.
    OfProcess(Process),
}

/// A process, and not a later one with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// When it started, in ticks since the kernel booted.
    pub start: u64,
}

impl Process {
    /// None: it has ended.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in brackets may hold anything; the start time is the 20th field after it.
        let start = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid, start })
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub struct PathStatus {
    pub device: u64,
    pub inode: u64,
    /// When it was last written or put in place; a copy may keep the modification time of its source.
    pub changed: SystemTime,
    /// The text of a regular file, or why it has none.
    pub text: Result<String, String>,
}

#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// The hidden command: what it prints, and its exit code.
pub fn probe(request: &str) -> (String, u8) {
    let answer = serde_json::from_str(request).map_err(io::Error::from).and_then(|request| match request {
        Request::Path(path) => to_json(&inspect_here(path.as_ref())?),
        Request::Repository(path) => to_json(&describe_here(path.as_ref())?),
        Request::Program { program, name, arguments } => Err(become_program(&program, &name, &arguments)?),
    });
    match answer {
        Ok(answer) => (answer, 0),
        Err(e) => (to_json(&(e.raw_os_error(), e.to_string())).unwrap_or_default(), FAILED),
    }
}

fn to_json(answer: &impl Serialize) -> io::Result<String> {
    Ok(serde_json::to_string(answer)?)
}

fn ask(request: &Request) -> io::Result<Output> {
    // The link leads to the program that runs, even when an upgrade has replaced the file.
    let mut command = Command::new("/proc/self/exe");
    command.arg("probe").arg(to_json(request)?);
    let (limit, max_bytes) = match request {
        Request::Path(_) => (LIMIT, MAX_ANSWER_BYTES),
        Request::Repository(_) => (LIMIT + REPOSITORY_SLACK, MAX_ANSWER_BYTES),
        Request::Program { .. } => (LIMIT, MAX_PROGRAM_OUTPUT_BYTES),
    };
    let output = finish(&mut command, limit, max_bytes)?;
    if output.status.code() == Some(FAILED.into())
        && let Ok((errno, reason)) = serde_json::from_str::<(Option<i32>, String)>(&output.stdout)
    {
        return Err(errno.map_or_else(|| io::Error::other(reason), io::Error::from_raw_os_error));
    }
    Ok(output)
}

fn ask_json<T: DeserializeOwned>(request: &Request) -> io::Result<T> {
    let Output { status, stdout, .. } = ask(request)?;
    serde_json::from_str(&stdout)
        .map_err(|_| io::Error::other(format!("the process that inspected it failed: {status}")))
}

/// The status of a path. Fails with `TimedOut` if the file system does not answer.
pub fn inspect(path: &Path) -> io::Result<PathStatus> {
    ask_json(&Request::Path(path.into()))
}

/// Does everything to the path that callers may do afterwards.
fn inspect_here(path: &Path) -> io::Result<PathStatus> {
    let status = fs::metadata(path)?;
    if status.is_dir() {
        fs::read_dir(path)?.next().transpose()?;
        statvfs(path)?;
    }
    let changed = Duration::new(status.ctime().try_into().unwrap_or(0), status.ctime_nsec().try_into().unwrap_or(0));
    // A comment may be in any encoding; whoever has to parse the file complains about the rest.
    let text = file::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(PathStatus {
        device: status.dev(),
        inode: status.ino(),
        changed: status.modified()?.max(UNIX_EPOCH + changed),
        text: text.map_err(|e| e.to_string()),
    })
}

/// The text of a configuration file.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    inspect(path)?.text.map_err(io::Error::other)
}

/// A repository as the daemon would describe it, with the directory of its client's cache and the device of that. The daemon
/// cannot tell the latter: its unit hides these paths from it.
pub fn describe(repository: &RepositoryConfig) -> (Described, Option<ClientCache>) {
    let answer: io::Result<(Vec<u8>, _)> = ask_json(&Request::Repository(repository.path.clone().into()));
    let answer = answer.and_then(|(message, cache)| Ok((Described::parse_from_bytes(&message)?, cache)));
    let (described, cache) =
        answer.unwrap_or_else(|e| (Described { trouble: e.to_string(), ..Described::default() }, None));
    let path = repository.path.display().to_string();
    (Described { name: repository.name.clone(), path, ..described }, cache)
}

fn describe_here(path: &Path) -> io::Result<(Vec<u8>, Option<ClientCache>)> {
    let repository = Repository::new(path.display().to_string(), path.to_owned(), LIMIT, Arc::new(Host));
    let status = repository.status();
    let message = describe_repository(&repository, status.as_ref()).write_to_bytes()?;
    Ok((message, status.ok().and_then(|status| status.cache).map(|cache| (cache.path, cache.device))))
}

/// Runs a program of the system.
pub fn run(name: &str, arguments: &[&str]) -> io::Result<Output> {
    run_as(&Program::Path(name.into()), name, arguments.iter().map(OsString::from).collect())
}

/// Runs a program that sees `name` as its own: k3s is one file with many programs, and chooses by that name. It is run only if
/// nobody but root can have put it there.
pub fn run_as(program: &Program, name: &str, arguments: Vec<OsString>) -> io::Result<Output> {
    ask(&Request::Program { program: program.clone(), name: name.into(), arguments })
}

/// Becomes the program. Returns only if that fails.
fn become_program(program: &Program, name: &OsStr, arguments: &[OsString]) -> io::Result<io::Error> {
    let exec = |path: &Path| Command::new(path).arg0(name).args(arguments).exec();
    Ok(match program {
        Program::Path(program) => exec(&find_program(program.as_ref())?),
        Program::OfProcess(process) => {
            // The file stays open until the exec, so that what was checked is what is run.
            let file = open_program(*process)?;
            exec(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref())
        }
    })
}

/// What a process of root on this node runs.
fn open_program(process: Process) -> io::Result<File> {
    let Process { pid, .. } = process;
    let link = PathBuf::from(format!("/proc/{pid}/exe"));
    // Without reading: /proc/self/fd leads to this very file.
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let file = File::options().read(true).custom_flags(flags.bits()).open(&link)?;
    require_root(&fs::read_link(&link)?, &file.metadata()?)?;
    // In a container of a user, a file of root is as good as the user's.
    if fs::read_link(format!("/proc/{pid}/ns/mnt"))? != fs::read_link("/proc/self/ns/mnt")? {
        return Err(io::Error::other(format!("process {pid} has a mount namespace of its own")));
    }
    // A program with the setuid bit that a user started has other ids as well.
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    if let Some(uid) = ids.split_whitespace().find(|id| *id != "0") {
        return Err(io::Error::other(format!("process {pid} is of user {uid}")));
    }
    // This is compared last, so that everything before was about this process.
    let has_ended = || io::Error::other(format!("process {pid} has ended"));
    (Process::of(pid) == Some(process)).then_some(file).ok_or_else(has_ended)
}

/// The path to execute.
fn find_program(program: &Path) -> io::Result<PathBuf> {
    // An absolute path stays as it is.
    let mut paths = SEARCH_PATH.split(':').map(|directory| Path::new(directory).join(program));
    let path = paths.find(|path| path.is_file());
    let path = path.ok_or_else(|| io::Error::other(format!("there is no {} in {SEARCH_PATH}", program.display())))?;
    require_root_path(&path)?;
    Ok(path)
}

/// Nobody but root can put another file there.
fn require_root_path(path: &Path) -> io::Result<()> {
    path.canonicalize()?.ancestors().try_for_each(|part| require_root(part, &fs::symlink_metadata(part)?))
}

fn require_root(path: &Path, status: &Metadata) -> io::Result<()> {
    let (path, uid, mode) = (path.display(), status.uid(), status.mode() & 0o7777);
    let refused = || io::Error::other(format!("{path} is not root's alone (owner {uid}, mode {mode:04o})"));
    if uid == 0 && mode & 0o022 == 0 { Ok(()) } else { Err(refused()) }
}

/// Waits for the end of a process. The variables of an admin's shell do not concern it.
fn finish(command: &mut Command, limit: Duration, max_bytes: u64) -> io::Result<Output> {
    let deadline = Instant::now() + limit;
    let command = command.env_clear().env("PATH", PATH).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdout, stderr) =
        (read_in_thread(child.stdout.take(), max_bytes), read_in_thread(child.stderr.take(), max_bytes));
    let timed_out =
        || io::Error::new(io::ErrorKind::TimedOut, format!("it did not answer within {} s", limit.as_secs()));
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            None => {
                kill(child);
                return Err(timed_out());
            }
        }
    };
    let receive = |text: mpsc::Receiver<io::Result<String>>| {
        text.recv_timeout(deadline.saturating_duration_since(Instant::now())).map_err(|_| timed_out())?
    };
    Ok(Output { status, stdout: receive(stdout)?, stderr: receive(stderr)? })
}

/// A child that hangs in a file system may outlive its kill, so only a thread of its own waits for its end.
fn kill(mut child: Child) {
    let _ = child.kill();
    thread::spawn(move || child.wait());
}

/// Sends what the pipe holds at its end, or an error if that is more than `max_bytes`. A program that writes on gets a broken
/// pipe.
fn read_in_thread(pipe: Option<impl Read + Send + 'static>, max_bytes: u64) -> mpsc::Receiver<io::Result<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.map(|pipe| pipe.take(max_bytes + 1).read_to_end(&mut bytes));
        sender.send(if bytes.len() as u64 > max_bytes {
            Err(io::Error::other(format!("it printed more than {max_bytes} bytes")))
        } else {
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn text_of_a_path_is_read_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "a = 1").unwrap();
        fs::write(path("binary"), [0xff]).unwrap();
        mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        for (name, text) in [
            ("file", Some("a = 1")),
            ("binary", Some("\u{fffd}")),
            ("/dev/null", Some("")),
            ("pipe", None),
            ("", None),
            ("/dev/zero", None),
        ] {
            assert_eq!(inspect_here(&path(name)).unwrap().text.ok().as_deref(), text, "{name}");
        }
        assert_eq!(inspect_here(&path("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn output_is_complete_and_a_hang_or_endless_output_is_given_up() {
        let shell = |script: &str, limit| finish(Command::new("sh").args(["-c", script]), limit, 300_000);
        let script = "head -c 300000 /dev/zero | tr '\\0' x; echo $CARGO_PKG_NAME why >&2; exit 3";
        let output = shell(script, LIMIT * 3).unwrap();
        assert_eq!((output.status.code(), output.stdout.len(), output.stderr.as_str()), (Some(3), 300_000, "why\n"));
        let start = Instant::now();
        assert_eq!(shell("exec sleep 100", Duration::from_millis(200)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(50));
        for endless in ["exec cat /dev/zero", "exec cat /dev/zero >&2", "head -c 300001 /dev/zero"] {
            let error = shell(endless, LIMIT * 3).unwrap_err();
            assert_eq!(error.to_string(), "it printed more than 300000 bytes", "{endless}");
        }
    }

    #[test]
    fn program_that_others_than_root_can_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "").unwrap();
        for mode in [0o755, 0o775] {
            fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
            let status = fs::symlink_metadata(&program).unwrap();
            assert_eq!(require_root(&program, &status).is_ok(), status.uid() == 0 && mode == 0o755, "{mode:o}");
        }
        // Everybody can write to the directory above it.
        assert!(find_program(&program).is_err());
        assert!(find_program(Path::new("no-such-program")).is_err());
        assert!(find_program(Path::new("sh")).is_ok());
    }
}
