//! Unix stream sockets with a path: listening on one, adopting one that systemd holds, and connecting to one.
//!
//! This room knows nothing of what is served over a socket. Its invariants: a socket that a live process serves is
//! never taken away from that process, a socket that a dead process left is replaced, and no call here waits for the
//! process on the other side.
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
    ForbiddenCharacter {
        address: PathBuf,
    },
    /// Another process listens on the socket.
    InUse {
        address: PathBuf,
    },
    /// The path is taken by something that is not a socket.
    NotASocket {
        address: PathBuf,
    },
    /// Other users could replace the socket.
    UntrustedDirectory {
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
    /// The descriptor that systemd passed on is not a socket that can be served.
    Inherited {
        reason: String,
    },
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
                    "{} exists and is not a socket; nothing was changed: choose another path, or move it away",
                    address.display()
                )
            }
            Self::ForbiddenCharacter { address } => write!(
                f,
                "the socket address {} must be UTF-8 without %, # and ?, and must not end in a slash",
                address.display()
            ),
            Self::UntrustedDirectory { directory, mode, owner } => write!(
                f,
                "the socket directory {} has mode {mode:04o} and owner {owner}, and others could replace the socket: \
                 make it root's and chmod go-w it",
                directory.display()
            ),
            Self::Directory { directory, cause } => {
                write!(f, "cannot use the socket directory {}: {cause}", directory.display())
            }
            Self::Socket { address, cause } => write!(f, "cannot listen on {}: {cause}", address.display()),
            Self::Inherited { reason } => write!(
                f,
                "cannot use the socket that this process was started with (LISTEN_FDS): {reason}; the socket unit \
                 needs one ListenStream= with a path"
            ),
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

/// The file that stands for a socket in the file system.
pub struct SocketFile {
    address: PathBuf,
    /// A descriptor of the socket's file. While it is open, the file system gives the file's inode number to no other
    /// file, so device and inode tell whether the file is still ours. It is None for a socket that somebody else
    /// made and that outlives this process, such as systemd's.
    handle: Option<File>,
}

/// Which users may open the socket's file. Whether a user is served is decided when the connection is accepted.
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

/// Checks that a socket can be bound to `address`, and returns the socket's directory.
pub fn check_path(address: &Path) -> Result<&Path> {
    if !address.is_absolute() {
        return Err(Error::NotAbsolute { address: address.to_owned() });
    }
    if address.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(Error::TooLong { address: address.to_owned() });
    }
    match (address.parent(), address.to_str()) {
        (Some(parent), Some(text)) if !text.contains(['%', '#', '?']) && !text.ends_with('/') => Ok(parent),
        _ => Err(Error::ForbiddenCharacter { address: address.to_owned() }),
    }
}

/// Makes a listening socket of a descriptor that this process was started with.
pub fn adopt(socket: OwnedFd) -> Result<ListeningSocket> {
    let refuse = |reason: &str| Err(Error::Inherited { reason: reason.to_owned() });
    let failed = |e: nix::Error| Error::Inherited { reason: e.desc().to_owned() };
    let name: SockaddrStorage = getsockname(socket.as_raw_fd()).map_err(failed)?;
    if name.family() != Some(AddressFamily::Unix) {
        return refuse("not a unix socket");
    }
    let kind = getsockopt(&socket, sockopt::SockType).map_err(failed)?;
    if kind != SockType::Stream || !getsockopt(&socket, sockopt::AcceptConn).map_err(failed)? {
        return refuse("not a listening stream socket");
    }
    match name.as_unix_addr().and_then(|name| name.path()) {
        Some(path) => {
            let file = SocketFile { address: path.to_owned(), handle: None };
            Ok(ListeningSocket { listener: UnixListener::from(socket), file })
        }
        None => refuse("no path"),
    }
}

/// Listens on `address`. A missing directory is made, and a stale socket is replaced.
pub fn bind(address: &Path, access: SocketAccess) -> Result<ListeningSocket> {
    let parent = check_path(address)?;
    let directory_error = |cause| Error::Directory { directory: parent.to_owned(), cause };
    if !parent.is_dir() {
        DirBuilder::new().recursive(true).mode(access.directory_mode()).create(parent).map_err(directory_error)?;
    }
    check_directory(parent, address, access)?;
    // Two processes that start at once must not both find the socket stale.
    let directory = File::open(parent).map_err(directory_error)?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, e)| directory_error(e.into()))?;
    remove_stale(address)?;
    let socket_error = |cause| Error::Socket { address: address.to_owned(), cause };
    // The socket is created with mode 0600, so that there is no moment in which others could connect.
    let previous_mask = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(address);
    umask(previous_mask);
    let listener = listener.map_err(socket_error)?;
    fs::set_permissions(address, fs::Permissions::from_mode(access.socket_mode())).map_err(socket_error)?;
    let handle = open_file(address).map_err(socket_error)?;
    Ok(ListeningSocket { listener, file: SocketFile { address: address.to_owned(), handle: Some(handle) } })
}

/// Refuses a directory in which other users could replace the socket.
fn check_directory(directory: &Path, address: &Path, access: SocketAccess) -> Result<()> {
    let status =
        fs::metadata(directory).map_err(|cause| Error::Directory { directory: directory.to_owned(), cause })?;
    // The directory is not opened here: an administrator may want it closed, or an earlier start made it for root only.
    if access == SocketAccess::Everybody && status.mode() & 0o001 == 0 {
        log::warn!(
            event = "socket_directory_closed", path:% = directory.display();
            "other users cannot reach the socket {}: run \"chmod o+x {}\"", address.display(), directory.display()
        );
    }
    let mode = status.mode() & 0o7777;
    // In a sticky directory such as /tmp only the owner of a file can replace it.
    let has_trusted_owner = status.uid() == 0 || status.uid() == geteuid().as_raw();
    if !has_trusted_owner || (mode & 0o022 != 0 && mode & 0o1000 == 0) {
        return Err(Error::UntrustedDirectory { directory: directory.to_owned(), mode, owner: status.uid() });
    }
    Ok(())
}

/// Opens the file at `address` without connecting to the socket and without following a link.
fn open_file(address: &Path) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    File::options().read(true).custom_flags(flags.bits()).open(address)
}

/// Removes the socket that a dead process left at `address`.
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
        // A process whose queue of connections is full is alive as well.
        Ok(_) => Err(Error::InUse { address: address.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::InUse { address: address.to_owned() }),
        Err(e) => Err(socket_error(e)),
    }
}

/// Connects without waiting: if the listener's queue is full, the error is `WouldBlock`.
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

    /// Removes the socket's file, unless another process made it or has replaced it.
    pub fn remove(&self) {
        let Some(handle) = &self.handle else { return };
        let identity = |status: fs::Metadata| (status.dev(), status.ino());
        let is_ours = match (handle.metadata(), fs::symlink_metadata(&self.address)) {
            (Ok(ours), Ok(current)) => identity(ours) == identity(current),
            (Err(_), _) | (_, Err(_)) => false,
        };
        if is_ours && let Err(e) = fs::remove_file(&self.address) {
            log::warn!(
                event = "socket_not_removed", path:% = self.address.display();
                "cannot remove the socket {}: {e}", self.address.display()
            );
        }
    }
}

#[cfg(test)]
mod tests;
