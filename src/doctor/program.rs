//! Programs that the doctor runs as root: only those that nobody but root can have put there.
//!
//! A process of our own (`run-program`) checks and becomes the program, because a file system that hangs keeps whoever
//! opens or executes a file on it.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::OFlag;

/// Directories with programs of the system, whatever the environment says.
pub const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Directories that containerd's own archives are unpacked to.
const LOCAL_DIRECTORIES: [&str; 2] = ["/usr/local/sbin", "/usr/local/bin"];
/// Exit codes of `run-program` when it did not become the program; shells use the same.
pub const REFUSED: u8 = 126;
pub const NOT_FOUND: u8 = 127;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// A name, looked up in the directories of the system.
    Named(String),
    /// An absolute path, from a command line.
    At(PathBuf),
    /// What a process runs, even if an upgrade has removed the file.
    OfProcess(Process),
}

/// A process, told from a later one with the same number by its start time in clock ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub start: u64,
}

impl Process {
    /// None: it has ended.
    pub fn find(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in brackets may hold anything; the start time is the 20th field after it.
        let start = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid, start })
    }
}

/// Why a program was not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    NotFound { program: OsString },
    ProcessEnded { pid: u32 },
    ProcessOfUser { pid: u32 },
    OtherMountNamespace { pid: u32 },
    Writable { path: PathBuf, uid: u32, mode: u32 },
    Unusable { path: PathBuf, cause: String },
}

impl Error {
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::NotFound { .. }) { NOT_FOUND } else { REFUSED }
    }

    fn unusable(path: &Path, cause: impl fmt::Display) -> Self {
        Self::Unusable { path: path.to_owned(), cause: cause.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound { program } => write!(f, "there is no {} in {PATH}", program.display()),
            Self::ProcessEnded { pid } => write!(f, "process {pid} has ended"),
            Self::ProcessOfUser { pid } => write!(f, "process {pid} is not root's alone"),
            Self::OtherMountNamespace { pid } => write!(f, "process {pid} has a mount namespace of its own"),
            Self::Writable { path, uid, mode } => {
                write!(f, "{} is not root's alone (owner {uid}, mode {mode:04o})", path.display())
            }
            Self::Unusable { path, cause } => write!(f, "cannot run {}: {cause}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

impl Program {
    /// The form in which another process of ours gets it.
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
            None if argument.as_bytes().starts_with(b"/") => Self::At(argument.into()),
            None => Self::Named(text.into_owned()),
        }
    }

    /// Becomes the program, which sees `name` as its own. Returns only if that fails.
    pub fn exec(&self, name: &OsStr, arguments: &[OsString]) -> Error {
        let exec = |path: &Path| Error::unusable(path, Command::new(path).arg0(name).args(arguments).exec());
        let result = match self {
            Self::Named(program) => find(program).map(|path| exec(&path)),
            Self::At(path) => require_root_path(path).map(|()| exec(path)),
            Self::OfProcess(process) => {
                open(*process).map(|file| exec(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref()))
            }
        };
        result.unwrap_or_else(|e| e)
    }
}

fn find(name: &str) -> Result<PathBuf, Error> {
    let local = LOCAL_DIRECTORIES.into_iter().filter(|directory| require_root_path(Path::new(directory)).is_ok());
    let mut paths = PATH.split(':').chain(local).map(|directory| Path::new(directory).join(name));
    let path = paths.find(|path| path.is_file()).ok_or_else(|| Error::NotFound { program: name.into() })?;
    require_root_path(&path)?;
    Ok(path)
}

/// Nobody but root can put another file there.
fn require_root_path(path: &Path) -> Result<(), Error> {
    let real = path.canonicalize().map_err(|e| Error::unusable(path, e))?;
    real.ancestors()
        .try_for_each(|part| require_root(part, &fs::symlink_metadata(part).map_err(|e| Error::unusable(part, e))?))
}

fn require_root(path: &Path, status: &Metadata) -> Result<(), Error> {
    let (uid, mode) = (status.uid(), status.mode() & 0o7777);
    if uid == 0 && mode & 0o022 == 0 { Ok(()) } else { Err(Error::Writable { path: path.to_owned(), uid, mode }) }
}

/// What a process of root on this node runs.
fn open(process: Process) -> Result<File, Error> {
    let pid = process.pid;
    let link = PathBuf::from(format!("/proc/{pid}/exe"));
    // The descriptor only names the file: /proc/self/fd leads to the very same one.
    let flags = (OFlag::O_PATH | OFlag::O_CLOEXEC).bits();
    let file = File::options().read(true).custom_flags(flags).open(&link).map_err(|_| Error::ProcessEnded { pid })?;
    let path = fs::read_link(&link).unwrap_or_else(|_| link.clone());
    require_root(&path, &file.metadata().map_err(|e| Error::unusable(&path, e))?)?;
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    // In a container of a user, a file of root is as good as the user's.
    if namespace(&pid.to_string()) != namespace("self") {
        return Err(Error::OtherMountNamespace { pid });
    }
    // All ids must be root's: with the setuid bit a user may have started it.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    if !uids.is_some_and(|uids| uids.split_whitespace().all(|uid| uid == "0")) {
        return Err(Error::ProcessOfUser { pid });
    }
    // This comes last: all answers above were about this process only if it is still there.
    if Process::find(pid) == Some(process) { Ok(file) } else { Err(Error::ProcessEnded { pid }) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn program_survives_the_round_trip_through_an_argument() {
        let process = Program::OfProcess(Process { pid: 12, start: 34 });
        for program in [Program::Named("containerd".to_owned()), Program::At("/opt/containerd".into()), process] {
            assert_eq!(Program::parse(&program.to_argument()), program);
        }
    }

    #[test]
    fn process_is_told_from_a_later_one_with_its_number() {
        let own = Process::find(std::process::id()).unwrap();
        let refused = open(Process { start: own.start + 1, ..own }).unwrap_err();
        // The user of a test may be anybody.
        assert!(!matches!(refused, Error::NotFound { .. } | Error::Unusable { .. }), "{refused}");
        assert_eq!(Process::find(u32::MAX), None);
    }

    #[test]
    fn program_that_others_than_root_can_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        // Everybody can write to the directory above it.
        assert_eq!(require_root_path(&program).unwrap_err().exit_code(), REFUSED);
        let status = fs::symlink_metadata(&program).unwrap();
        assert_eq!(require_root(&program, &status).is_ok(), status.uid() == 0);
        fs::set_permissions(&program, fs::Permissions::from_mode(0o775)).unwrap();
        let status = fs::symlink_metadata(&program).unwrap();
        let expected = Error::Writable { path: program.clone(), uid: status.uid(), mode: 0o775 };
        assert_eq!(require_root(&program, &status), Err(expected));
        assert_eq!(find("no-such-program").unwrap_err().exit_code(), NOT_FOUND);
        assert!(find("sh").is_ok());
    }
}
