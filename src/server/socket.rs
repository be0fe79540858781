//! The unix socket: our own, or one that systemd holds for us. A live one is never taken away
//! from the process that serves it, a dead one is replaced.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

use crate::model::MAX_SOCKET_PATH;

#[derive(Debug)]
pub enum Error {
    NotAbsolute {
        address: PathBuf,
    },
    TooLong {
        address: PathBuf,
    },
    /// containerd takes addresses as URIs, in which some characters mean something else.
    OddCharacter {
        address: PathBuf,
    },
    /// Another process answers there.
    InUse {
        address: PathBuf,
    },
    /// Something that is not a socket stands there.
    NotASocket {
        address: PathBuf,
    },
    /// Anybody could put another socket in its place.
    OpenDirectory {
        directory: PathBuf,
        mode: u32,
        owner: u32,
    },
    Directory {
        directory: PathBuf,
        cause: io::Error,
    },
    Socket {
        address: PathBuf,
        cause: io::Error,
    },
    /// What systemd passed on cannot be served on.
    Inherited {
        why: String,
    },
    Transport(grpcio::Error),
    Threads(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAbsolute { address } => {
                write!(f, "the socket address {} must be an absolute path", address.display())
            }
            Self::TooLong { address } => {
                write!(f, "the socket address {} is longer than {MAX_SOCKET_PATH} bytes", address.display())
            }
            Self::InUse { address } => write!(
                f,
                "another process serves the socket {}: stop it first, or choose another path",
                address.display()
            ),
            Self::NotASocket { address } => {
                write!(
                    f,
                    "{} exists and is no socket: nothing was changed: choose another path, or move it away",
                    address.display()
                )
            }
            Self::OddCharacter { address } => write!(
                f,
                "the socket address {} must be UTF-8 without %, # and ?, and must not end in a slash",
                address.display()
            ),
            Self::OpenDirectory { directory, mode, owner } => write!(
                f,
                "the socket directory {} has mode {mode:04o} and owner {owner}, and others could replace the socket: \
                 make it root's and chmod go-w it",
                directory.display()
            ),
            Self::Directory { directory, cause } => {
                write!(f, "cannot use the socket directory {}: {cause}", directory.display())
            }
            Self::Socket { address, cause } => write!(f, "cannot listen on {}: {cause}", address.display()),
            Self::Inherited { why } => write!(
                f,
                "the socket that this process was started with (LISTEN_FDS) cannot be used: {why}; the socket unit \
                 needs one ListenStream= with a path"
            ),
            Self::Transport(cause) => write!(f, "cannot start the gRPC server: {cause}"),
            Self::Threads(cause) => write!(f, "cannot accept connections: {cause}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// A socket that this process listens on.
pub struct ListeningSocket {
    pub listener: UnixListener,
    pub file: SocketFile,
}

/// What stands for a socket in the file system.
pub struct SocketFile {
    address: PathBuf,
    /// The file itself. While it is held, the file system gives its inode number to no other file. None: it
    /// was there before us and outlives us, systemd's for example.
    held: Option<File>,
}

/// Who may reach the socket's file. The door asks each one who comes who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketAccess {
    Root,
    Everybody,
}

impl SocketAccess {
    fn socket_mode(self) -> u32 {
        match self {
            Self::Root => 0o600,
            Self::Everybody => 0o666,
        }
    }

    fn directory_mode(self) -> u32 {
        match self {
            Self::Root => 0o700,
            Self::Everybody => 0o711,
        }
    }
}

/// Whether `address` can be one; the result is the socket's directory.
pub fn check_path(address: &Path) -> Result<&Path> {
    let named = || address.to_owned();
    if !address.is_absolute() {
        return Err(Error::NotAbsolute { address: named() });
    }
    if address.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(Error::TooLong { address: named() });
    }
    match (address.parent(), address.to_str()) {
        (Some(parent), Some(text)) if !text.contains(['%', '#', '?']) && !text.ends_with('/') => Ok(parent),
        _ => Err(Error::OddCharacter { address: named() }),
    }
}

/// Takes over a socket that somebody else listens with, for good.
pub fn adopt(socket: OwnedFd) -> Result<ListeningSocket> {
    let refuse = |why: String| Err(Error::Inherited { why });
    let failed = |e: nix::Error| Error::Inherited { why: e.desc().to_owned() };
    let name: SockaddrStorage = getsockname(socket.as_raw_fd()).map_err(failed)?;
    if name.family() != Some(AddressFamily::Unix) {
        return refuse("it is no unix socket".to_owned());
    }
    let kind = getsockopt(&socket, sockopt::SockType).map_err(failed)?;
    if kind != SockType::Stream || !getsockopt(&socket, sockopt::AcceptConn).map_err(failed)? {
        return refuse("it is no stream socket that listens".to_owned());
    }
    match name.as_unix_addr().and_then(|name| name.path()) {
        Some(path) => {
            let file = SocketFile { address: path.to_owned(), held: None };
            Ok(ListeningSocket { listener: UnixListener::from(socket), file })
        }
        None => refuse("it has no path".to_owned()),
    }
}

/// Listens on `address`.
pub fn bind(address: &Path, reach: SocketAccess) -> Result<ListeningSocket> {
    let parent = check_path(address)?;
    let directory_error = |cause| Error::Directory { directory: parent.to_owned(), cause };
    if !parent.is_dir() {
        DirBuilder::new().recursive(true).mode(reach.directory_mode()).create(parent).map_err(directory_error)?;
    }
    let status = fs::metadata(parent).map_err(directory_error)?;
    // It may be somebody's who wants it so; or an earlier start made it, for root only.
    if reach == SocketAccess::Everybody && status.mode() & 0o001 == 0 {
        let shown = parent.display();
        log::warn!("only its owner gets to the socket {}: \"chmod o+x {shown}\" lets all in", address.display());
    }
    let mode = status.mode() & 0o7777;
    // A sticky directory (/tmp) lets nobody but the owner replace a file.
    let trusted_owner = status.uid() == 0 || status.uid() == geteuid().as_raw();
    if !trusted_owner || (mode & 0o022 != 0 && mode & 0o1000 == 0) {
        return Err(Error::OpenDirectory { directory: parent.to_owned(), mode, owner: status.uid() });
    }
    // Two starts at once must not both find the socket dead.
    let directory = File::open(parent).map_err(directory_error)?;
    let _turn = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, e)| directory_error(e.into()))?;
    remove_stale(address)?;
    let socket_error = |cause| Error::Socket { address: address.to_owned(), cause };
    // No moment in which others could connect: the socket is born with its mode.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listening = UnixListener::bind(address);
    umask(before);
    let listener = listening.map_err(socket_error)?;
    fs::set_permissions(address, fs::Permissions::from_mode(reach.socket_mode())).map_err(socket_error)?;
    let held = hold(address).map_err(socket_error)?;
    Ok(ListeningSocket { listener, file: SocketFile { address: address.to_owned(), held: Some(held) } })
}

/// Opens what is at `address` without connecting to it and without following a link.
fn hold(address: &Path) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    File::options().read(true).custom_flags(flags.bits()).open(address)
}

/// Removes what a process that is gone left at `address`.
fn remove_stale(address: &Path) -> Result<()> {
    let socket_error = |cause| Error::Socket { address: address.to_owned(), cause };
    match fs::symlink_metadata(address) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(socket_error(e)),
        Ok(status) if !status.file_type().is_socket() => {
            return Err(Error::NotASocket { address: address.to_owned() });
        }
        Ok(_) => {}
    }
    match connect(address) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(address).map_err(socket_error),
        // Served, or too busy to answer: either way somebody's.
        Ok(_) => Err(Error::InUse { address: address.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::InUse { address: address.to_owned() }),
        Err(e) => Err(socket_error(e)),
    }
}

/// Waits for nobody: with `WouldBlock` it fails where more connections wait than there is room for.
pub fn connect(address: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = UnixStream::from(socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?);
    socket::connect(stream.as_raw_fd(), &UnixAddr::new(address)?)?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

impl SocketFile {
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Takes the socket's file away, unless it is, or has become, somebody else's.
    pub fn remove(&self) {
        let Some(held) = &self.held else { return };
        let identity = |status: fs::Metadata| (status.dev(), status.ino());
        let is_ours = match (held.metadata(), fs::symlink_metadata(&self.address)) {
            (Ok(ours), Ok(now)) => identity(ours) == identity(now),
            (Err(_), _) | (_, Err(_)) => false,
        };
        if is_ours && let Err(e) = fs::remove_file(&self.address) {
            log::warn!("cannot remove the socket {}: {e}", self.address.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use nix::sys::socket::Backlog;

    use super::*;

    /// A start, and an admin's question, waited for ever.
    #[test]
    fn a_socket_whose_server_hangs_keeps_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("s.sock");
        let hung = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        socket::bind(hung.as_raw_fd(), &UnixAddr::new(&address).unwrap()).unwrap();
        socket::listen(&hung, Backlog::new(1).unwrap()).unwrap();
        let mut waiting = Vec::new();
        let refused = loop {
            match connect(&address) {
                Ok(stream) => waiting.push(stream),
                Err(e) => break e,
            }
        };
        assert_eq!((waiting.len(), refused.kind()), (2, io::ErrorKind::WouldBlock));
        assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::InUse { .. })));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("new/s.sock");
        let stale = bind(&address, SocketAccess::Root).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(address.parent().unwrap()), 0o700);
        drop(stale.listener);
        let live = bind(&address, SocketAccess::Root).unwrap();
        assert_eq!(mode(&address), 0o600);
        assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::InUse { .. })));
        stale.file.remove();
        assert!(address.exists(), "another process's socket was removed");
        drop(live.listener);
        let open = bind(&address, SocketAccess::Everybody).unwrap();
        assert_eq!(mode(&address), 0o666, "who comes is asked at the door");
        open.file.remove();
        assert!(!address.exists());
    }

    /// A file system gives the number of a file that is gone to the next one. Because of that, a daemon that
    /// ended late took away the socket of the next one.
    #[test]
    fn socket_of_another_process_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("s.sock");
        let old = bind(&address, SocketAccess::Root).unwrap();
        for _ in 0..100 {
            fs::remove_file(&address).unwrap();
            let new = bind(&address, SocketAccess::Root).unwrap();
            old.file.remove();
            assert!(address.exists(), "the socket of another process was removed");
            drop(new);
        }
        let last = bind(&address, SocketAccess::Root).unwrap();
        last.file.remove();
        assert!(!address.exists());
    }

    #[test]
    fn only_a_listening_unix_socket_with_a_path_is_inherited() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("s");
        let bound = adopt(UnixListener::bind(&address).unwrap().into()).unwrap();
        assert_eq!(bound.file.address(), address);
        bound.file.remove();
        assert!(address.exists(), "it is not ours to remove");
        let file = File::open(dir.path()).unwrap();
        let datagram = UnixDatagram::bind(dir.path().join("d")).unwrap();
        let (connected, _other) = UnixStream::pair().unwrap();
        let inet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for wrong in [OwnedFd::from(file), datagram.into(), connected.into(), inet.into()] {
            assert!(matches!(adopt(wrong), Err(Error::Inherited { .. })));
        }
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("file");
        fs::write(&address, "precious").unwrap();
        assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&address).unwrap(), "precious");
    }

    #[test]
    fn an_address_that_cannot_be_safe_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(bind(Path::new("s.sock"), SocketAccess::Root), Err(Error::NotAbsolute { .. })));
        let long = dir.path().join("s".repeat(120));
        assert!(matches!(bind(&long, SocketAccess::Root), Err(Error::TooLong { .. })));
        for odd in ["/", "/tmp/a%41", "/tmp/a#b", "/tmp/a?b", "/tmp/a/"] {
            assert!(matches!(bind(Path::new(odd), SocketAccess::Root), Err(Error::OddCharacter { .. })), "{odd}");
        }
        let theirs = dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(65_534), None).unwrap();
        assert!(matches!(bind(&theirs.join("s"), SocketAccess::Root), Err(Error::OpenDirectory { owner: 65_534, .. })));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(bind(&dir.path().join("s"), SocketAccess::Root), Err(Error::OpenDirectory { .. })));
    }
}
