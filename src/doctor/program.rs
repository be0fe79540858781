//! Programs that the doctor runs as root: only such as nobody but root can have put there.
//!
//! They are looked at and started by a process of our own (`run-program`), because what is on a file
//! system that hangs keeps whoever looks at it, and even whoever starts it.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::OFlag;

/// Where programs of the system are, whatever the environment says.
pub const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Where containerd's own archives put it.
const LOCAL: [&str; 2] = ["/usr/local/sbin", "/usr/local/bin"];
/// Exit codes of `run-program` that did not become the program, as shells have them.
pub const REFUSED: u8 = 126;
pub const NOT_FOUND: u8 = 127;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// By its name, in the directories of the system.
    Named(String),
    /// By an absolute path, as a unit of systemd names it.
    At(PathBuf),
    OfProcess(Process),
}

/// A process, and not a later one with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// When it began, as the kernel counts.
    pub start: u64,
}

impl Process {
    /// None: it has ended.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in brackets may hold anything; the time is the 20th behind it.
        let start = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid, start })
    }
}

/// Why a program was not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    NotFound {
        program: OsString,
    },
    Ended {
        pid: u32,
    },
    OfUser {
        pid: u32,
    },
    OfAnotherNamespace {
        pid: u32,
    },
    /// Somebody but root can change it.
    NotOfRoot {
        path: PathBuf,
        uid: u32,
        mode: u32,
    },
    Unusable {
        path: PathBuf,
        why: String,
    },
}

impl Error {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => NOT_FOUND,
            Self::Ended { .. }
            | Self::OfUser { .. }
            | Self::OfAnotherNamespace { .. }
            | Self::NotOfRoot { .. }
            | Self::Unusable { .. } => REFUSED,
        }
    }

    fn unusable(path: &Path, cause: &io::Error) -> Self {
        Self::Unusable { path: path.to_owned(), why: cause.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound { program } => write!(f, "there is no {} in {PATH}", program.display()),
            Self::Ended { pid } => write!(f, "process {pid} has ended"),
            Self::OfUser { pid } => write!(f, "process {pid} is not root's alone"),
            Self::OfAnotherNamespace { pid } => write!(f, "process {pid} has a mount namespace of its own"),
            Self::NotOfRoot { path, uid, mode } => {
                write!(f, "{} is not root's alone (owner {uid}, mode {mode:04o})", path.display())
            }
            Self::Unusable { path, why } => write!(f, "{} cannot be run: {why}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

impl Program {
    /// For `parse`, which another process of ours calls.
    pub fn to_argument(&self) -> OsString {
        match self {
            Self::Named(name) => name.into(),
            Self::At(path) => path.into(),
            Self::OfProcess(Process { pid, start }) => format!("process:{pid}:{start}").into(),
        }
    }

    pub fn parse(argument: &OsStr) -> Self {
        let text = argument.to_string_lossy();
        let process = || {
            let (pid, start) = text.strip_prefix("process:")?.split_once(':')?;
            Some(Process { pid: pid.parse().ok()?, start: start.parse().ok()? })
        };
        match process() {
            Some(process) => Self::OfProcess(process),
            None if argument.as_bytes().first() == Some(&b'/') => Self::At(argument.into()),
            None => Self::Named(text.into_owned()),
        }
    }

    /// Becomes the program, which sees `name` as its own. Returns only if that is not done.
    pub fn exec(&self, name: &OsStr, arguments: &[OsString]) -> Error {
        let exec = |path: &Path| Error::unusable(path, &Command::new(path).arg0(name).args(arguments).exec());
        let failed = match self {
            Self::Named(program) => find(program).map(|path| exec(&path)),
            Self::At(path) => require_path_of_root(path).map(|()| exec(path)),
            Self::OfProcess(process) => {
                open(*process).map(|file| exec(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref()))
            }
        };
        failed.unwrap_or_else(|e| e)
    }
}

/// The program of the system with this name.
fn find(name: &str) -> Result<PathBuf, Error> {
    let local = LOCAL.into_iter().filter(|directory| require_path_of_root(Path::new(directory)).is_ok());
    let path =
        PATH.split(':').chain(local).map(|directory| Path::new(directory).join(name)).find(|path| path.is_file());
    let path = path.ok_or_else(|| Error::NotFound { program: name.into() })?;
    require_path_of_root(&path)?;
    Ok(path)
}

/// Nobody but root can put something else there.
fn require_path_of_root(path: &Path) -> Result<(), Error> {
    let real = path.canonicalize().map_err(|e| Error::unusable(path, &e))?;
    for part in real.ancestors() {
        let status = fs::symlink_metadata(part).map_err(|e| Error::unusable(part, &e))?;
        require_of_root(part, &status)?;
    }
    Ok(())
}

fn require_of_root(path: &Path, status: &Metadata) -> Result<(), Error> {
    let (uid, mode) = (status.uid(), status.mode() & 0o7777);
    if uid == 0 && mode & 0o022 == 0 { Ok(()) } else { Err(Error::NotOfRoot { path: path.to_owned(), uid, mode }) }
}

/// What a process of root on this node runs. It may have been removed from its path meanwhile, by an upgrade.
fn open(process: Process) -> Result<File, Error> {
    let pid = process.pid;
    let link = PathBuf::from(format!("/proc/{pid}/exe"));
    // Not for reading: /proc/self/fd leads to the very file.
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let file = File::options().read(true).custom_flags(flags.bits()).open(&link).map_err(|_| Error::Ended { pid })?;
    let path = fs::read_link(&link).unwrap_or_else(|_| link.clone());
    require_of_root(&path, &file.metadata().map_err(|e| Error::unusable(&path, &e))?)?;
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    // In a container of its own, what belongs to root is as good as a user's.
    if namespace(&pid.to_string()) != namespace("self") {
        return Err(Error::OfAnotherNamespace { pid });
    }
    if !is_of_root(pid) {
        return Err(Error::OfUser { pid });
    }
    // The last question: all answers before were about this process.
    if Process::of(pid) == Some(process) { Ok(file) } else { Err(Error::Ended { pid }) }
}

/// With all of its ids, so it is no program with the setuid bit that a user started.
fn is_of_root(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    ids.is_some_and(|ids| ids.split_whitespace().all(|id| id == "0"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_program_is_the_same_after_its_way_through_an_argument() {
        let process = Process { pid: 12, start: 34 };
        for program in [
            Program::Named("containerd".to_owned()),
            Program::At("/opt/bin/containerd".into()),
            Program::OfProcess(process),
        ] {
            assert_eq!(Program::parse(&program.to_argument()), program);
        }
    }

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_number() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.start > 0);
        let later = Process { start: own.start + 1, ..own };
        // That of a test can be of any user.
        let refused = open(later).unwrap_err();
        assert!(matches!(refused, Error::Ended { .. } | Error::NotOfRoot { .. } | Error::OfUser { .. }), "{refused}");
        assert_eq!(Process::of(u32::MAX), None);
    }

    #[test]
    fn a_program_that_others_than_root_can_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        // It lies in a directory that everybody can write to.
        let refused = require_path_of_root(&program).unwrap_err();
        assert_eq!(refused.exit_code(), REFUSED);
        let status = fs::symlink_metadata(&program).unwrap();
        assert_eq!(require_of_root(&program, &status).is_ok(), status.uid() == 0);
        fs::set_permissions(&program, fs::Permissions::from_mode(0o775)).unwrap();
        let status = fs::symlink_metadata(&program).unwrap();
        let uid = status.uid();
        let expected = Error::NotOfRoot { path: program.clone(), uid, mode: 0o775 };
        assert_eq!(require_of_root(&program, &status), Err(expected));
        assert_eq!(find("no-such-program").unwrap_err().exit_code(), NOT_FOUND);
        assert!(find("sh").is_ok());
    }
}
