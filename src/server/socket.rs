//! Unix sockets: listening on a path, taking over a socket that systemd holds, and connecting without waiting.
//!
//! It must not know what is served on a socket. Its invariants:
//! - A socket that another process serves is never removed. A stale one, whose process is gone, is replaced.
//! - A socket is never reachable by more users than `SocketAccess` allows, not even for a moment.
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
    /// containerd takes addresses as URIs, in which some characters have a meaning.
    InvalidCharacter {
        address: PathBuf,
    },
    /// Another process serves this socket.
    InUse {
        address: PathBuf,
    },
    /// The path is that of another kind of file.
    NotASocket {
        address: PathBuf,
    },
    /// Other users could put another socket in its place.
    InsecureDirectory {
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
    /// The socket that systemd passed cannot be used.
    Inherited {
        reason: String,
    },
    Transport(grpcio::Error),
    Threads(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAbsolute { address } => {
                write!(f, "socket address {} is not an absolute path", address.display())
            }
            Self::TooLong { address } => {
                write!(f, "socket address {} is longer than {MAX_SOCKET_PATH} bytes", address.display())
            }
            Self::InUse { address } => write!(
                f,
                "another process serves the socket {}; stop it first, or choose another path",
                address.display()
            ),
            Self::NotASocket { address } => {
                write!(
                    f,
                    "{} exists and is not a socket; choose another path, or move the file away",
                    address.display()
                )
            }
            Self::InvalidCharacter { address } => write!(
                f,
                "invalid socket address {}: expected UTF-8 without %, # and ?, and no slash at the end",
                address.display()
            ),
            Self::InsecureDirectory { directory, mode, owner } => write!(
                f,
                "socket directory {} is not secure: with mode {mode:04o} and owner {owner} other users could replace the \
                 socket; run \"chown root\" and \"chmod go-w\" on it",
                directory.display()
            ),
            Self::Directory { directory, cause } => {
                write!(f, "cannot use socket directory {}: {cause}", directory.display())
            }
            Self::Socket { address, cause } => write!(f, "cannot listen on {}: {cause}", address.display()),
            Self::Inherited { reason } => write!(
                f,
                "cannot use the socket that systemd passed (LISTEN_FDS): {reason}; the socket unit needs one \
                 ListenStream= with a path"
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

/// The file of a socket.
pub struct SocketFile {
    address: PathBuf,
    /// A descriptor of the file. While it is open, the file system gives the inode number to no other file. `None`:
    /// the file is not ours to remove, because systemd made it.
    pinned_file: Option<File>,
}

/// Which users may connect, by the mode of the file. (`listener` also checks the user of each connection.)
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

/// Checks whether `address` can be that of a socket. The result is its directory.
pub fn check_path(address: &Path) -> Result<&Path> {
    let owned = || address.to_owned();
    if !address.is_absolute() {
        return Err(Error::NotAbsolute { address: owned() });
    }
    if address.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(Error::TooLong { address: owned() });
    }
    match (address.parent(), address.to_str()) {
        (Some(parent), Some(text)) if !text.contains(['%', '#', '?']) && !text.ends_with('/') => Ok(parent),
        _ => Err(Error::InvalidCharacter { address: owned() }),
    }
}

/// Takes over a listening socket that systemd passed.
pub fn adopt(socket: OwnedFd) -> Result<ListeningSocket> {
    let refuse = |reason: &str| Err(Error::Inherited { reason: reason.to_owned() });
    let failed = |e: nix::Error| Error::Inherited { reason: e.desc().to_owned() };
    let name: SockaddrStorage = getsockname(socket.as_raw_fd()).map_err(failed)?;
    if name.family() != Some(AddressFamily::Unix) {
        return refuse("it is not a unix socket");
    }
    let kind = getsockopt(&socket, sockopt::SockType).map_err(failed)?;
    if kind != SockType::Stream || !getsockopt(&socket, sockopt::AcceptConn).map_err(failed)? {
        return refuse("it is not a listening stream socket");
    }
    match name.as_unix_addr().and_then(|name| name.path()) {
        Some(path) => {
            let file = SocketFile { address: path.to_owned(), pinned_file: None };
            Ok(ListeningSocket { listener: UnixListener::from(socket), file })
        }
        None => refuse("it has no path"),
    }
}

/// Listens on `address`.
pub fn bind(address: &Path, access: SocketAccess) -> Result<ListeningSocket> {
    let parent = check_path(address)?;
    let directory_error = |cause| Error::Directory { directory: parent.to_owned(), cause };
    if !parent.is_dir() {
        DirBuilder::new().recursive(true).mode(access.directory_mode()).create(parent).map_err(directory_error)?;
    }
    let status = fs::metadata(parent).map_err(directory_error)?;
    // The administrator may want it so, or an earlier start made the directory for root only.
    if access == SocketAccess::Everybody && status.mode() & 0o001 == 0 {
        let directory = parent.display();
        log::warn!(
            event = "socket_directory_not_accessible", directory:%;
            "other users cannot reach the socket {}; run \"chmod o+x {directory}\" to let them",
            address.display()
        );
    }
    let mode = status.mode() & 0o7777;
    // In a sticky directory such as /tmp only the owner of a file can replace it.
    let trusted_owner = status.uid() == 0 || status.uid() == geteuid().as_raw();
    if !trusted_owner || (mode & 0o022 != 0 && mode & 0o1000 == 0) {
        return Err(Error::InsecureDirectory { directory: parent.to_owned(), mode, owner: status.uid() });
    }
    // Without this lock, two starts at the same time could both find the socket stale and replace it.
    let directory = File::open(parent).map_err(directory_error)?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, e)| directory_error(e.into()))?;
    remove_stale(address)?;
    let socket_error = |cause| Error::Socket { address: address.to_owned(), cause };
    // The socket is made with its mode, so there is no moment in which others could connect.
    let previous_umask = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(address);
    umask(previous_umask);
    let listener = bound.map_err(socket_error)?;
    fs::set_permissions(address, fs::Permissions::from_mode(access.socket_mode())).map_err(socket_error)?;
    let pinned_file = open_path(address).map_err(socket_error)?;
    Ok(ListeningSocket { listener, file: SocketFile { address: address.to_owned(), pinned_file: Some(pinned_file) } })
}

/// Opens the file at `address` without connecting to it and without following a link.
fn open_path(address: &Path) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    File::options().read(true).custom_flags(flags.bits()).open(address)
}

/// Removes the socket of a process that is gone.
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
        // A process serves it, or would if it were less busy.
        Ok(_) => Err(Error::InUse { address: address.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::InUse { address: address.to_owned() }),
        Err(e) => Err(socket_error(e)),
    }
}

/// Connects without waiting. It fails with `WouldBlock` if the backlog of the socket is full.
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

    /// Removes the file, unless it belongs to systemd or to another process by now.
    pub fn remove(&self) {
        let Some(pinned_file) = &self.pinned_file else { return };
        let identity = |status: fs::Metadata| (status.dev(), status.ino());
        let is_ours = match (pinned_file.metadata(), fs::symlink_metadata(&self.address)) {
            (Ok(ours), Ok(current)) => identity(ours) == identity(current),
            (Err(_), _) | (_, Err(_)) => false,
        };
        if is_ours && let Err(e) = fs::remove_file(&self.address) {
            let address = self.address.display();
            log::warn!(event = "socket_not_removed", address:%; "cannot remove the socket {address}: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use nix::sys::socket::Backlog;

    use super::*;

    /// Earlier, a start and a command of the administrator waited for ever.
    #[test]
    fn connecting_to_a_hanging_server_fails_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("s.sock");
        let hung = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        socket::bind(hung.as_raw_fd(), &UnixAddr::new(&address).unwrap()).unwrap();
        socket::listen(&hung, Backlog::new(1).unwrap()).unwrap();
        let mut queued = Vec::new();
        let refused = loop {
            match connect(&address) {
                Ok(stream) => queued.push(stream),
                Err(e) => break e,
            }
        };
        assert_eq!((queued.len(), refused.kind()), (2, io::ErrorKind::WouldBlock));
        assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::InUse { .. })));
    }

    #[test]
    fn stale_socket_is_replaced_and_live_one_is_not() {
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
        assert!(address.exists(), "the socket of another process was removed");
        drop(live.listener);
        let open = bind(&address, SocketAccess::Everybody).unwrap();
        assert_eq!(mode(&address), 0o666, "the listener checks users");
        open.file.remove();
        assert!(!address.exists());
    }

    /// A file system may give the inode number of a removed file to the next file. A daemon that ended late once
    /// removed the socket of the next daemon because of that.
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
    fn only_a_listening_unix_socket_with_a_path_is_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("s");
        let bound = adopt(UnixListener::bind(&address).unwrap().into()).unwrap();
        assert_eq!(bound.file.address(), address);
        bound.file.remove();
        assert!(address.exists(), "the socket of systemd was removed");
        let file = File::open(dir.path()).unwrap();
        let datagram = UnixDatagram::bind(dir.path().join("d")).unwrap();
        let (connected, _other) = UnixStream::pair().unwrap();
        let inet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for wrong in [OwnedFd::from(file), datagram.into(), connected.into(), inet.into()] {
            assert!(matches!(adopt(wrong), Err(Error::Inherited { .. })));
        }
    }

    #[test]
    fn file_that_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("file");
        fs::write(&address, "precious").unwrap();
        assert!(matches!(bind(&address, SocketAccess::Root), Err(Error::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&address).unwrap(), "precious");
    }

    #[test]
    fn invalid_address_and_insecure_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(bind(Path::new("s.sock"), SocketAccess::Root), Err(Error::NotAbsolute { .. })));
        let long = dir.path().join("s".repeat(120));
        assert!(matches!(bind(&long, SocketAccess::Root), Err(Error::TooLong { .. })));
        for invalid in ["/", "/tmp/a%41", "/tmp/a#b", "/tmp/a?b", "/tmp/a/"] {
            assert!(
                matches!(bind(Path::new(invalid), SocketAccess::Root), Err(Error::InvalidCharacter { .. })),
                "{invalid}"
            );
        }
        let foreign = dir.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        std::os::unix::fs::chown(&foreign, Some(65_534), None).unwrap();
        assert!(matches!(
            bind(&foreign.join("s"), SocketAccess::Root),
            Err(Error::InsecureDirectory { owner: 65_534, .. })
        ));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(bind(&dir.path().join("s"), SocketAccess::Root), Err(Error::InsecureDirectory { .. })));
    }
}
