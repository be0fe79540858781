//! The unix socket: nobody but root may connect, a live one is never taken away from the
//! process that serves it, a dead one is replaced.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

/// Longest path of a unix socket, in bytes; the kernel's `sun_path` has room for one more.
const PATH_BYTES: usize = 107;

#[derive(Debug)]
pub enum Error {
    NotAbsolute {
        address: PathBuf,
    },
    TooLong {
        address: PathBuf,
    },
    /// gRPC takes addresses as URIs, in which some characters mean something else.
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
    Transport(grpcio::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAbsolute { address } => {
                write!(f, "the socket address {} must be an absolute path", address.display())
            }
            Self::TooLong { address } => {
                write!(f, "the socket address {} is longer than {PATH_BYTES} bytes", address.display())
            }
            Self::InUse { address } => write!(
                f,
                "another process serves the socket {}: stop it first, or choose another --address",
                address.display()
            ),
            Self::NotASocket { address } => {
                write!(f, "{} exists and is no socket: remove it, or choose another --address", address.display())
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
            Self::Transport(cause) => write!(f, "cannot start the gRPC server: {cause}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// A socket that this process listens on.
pub struct Bound {
    address: PathBuf,
    inode: u64,
}

/// Whether `address` can be one; the result is the socket's directory.
pub fn check(address: &Path) -> Result<&Path> {
    let named = || address.to_owned();
    if !address.is_absolute() {
        return Err(Error::NotAbsolute { address: named() });
    }
    if address.as_os_str().len() > PATH_BYTES {
        return Err(Error::TooLong { address: named() });
    }
    match (address.parent(), address.to_str()) {
        (Some(parent), Some(text)) if !text.contains(['%', '#', '?']) && !text.ends_with('/') => Ok(parent),
        _ => Err(Error::OddCharacter { address: named() }),
    }
}

/// Makes `listen` listen on `address`; it gets the address as gRPC writes it.
pub fn bind(address: &Path, listen: impl FnOnce(String) -> grpcio::Result<()>) -> Result<Bound> {
    let parent = check(address)?;
    let directory_error = |cause| Error::Directory { directory: parent.to_owned(), cause };
    if !parent.is_dir() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(directory_error)?;
    }
    let status = fs::metadata(parent).map_err(directory_error)?;
    let mode = status.mode() & 0o7777;
    // A sticky directory (/tmp) lets nobody but the owner replace a file.
    let trusted_owner = status.uid() == 0 || status.uid() == geteuid().as_raw();
    if !trusted_owner || (mode & 0o022 != 0 && mode & 0o1000 == 0) {
        return Err(Error::OpenDirectory { directory: parent.to_owned(), mode, owner: status.uid() });
    }
    // Two starts at once must not both find the socket dead.
    let directory = File::open(parent).map_err(directory_error)?;
    let _turn = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, e)| directory_error(e.into()))?;
    clear(address)?;
    let socket_error = |cause| Error::Socket { address: address.to_owned(), cause };
    // No moment in which others could connect: the socket is born with its mode.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listening = listen(format!("unix:{}", address.display()));
    umask(before);
    listening.map_err(Error::Transport)?;
    fs::set_permissions(address, fs::Permissions::from_mode(0o600)).map_err(socket_error)?;
    let inode = fs::symlink_metadata(address).map_err(socket_error)?.ino();
    Ok(Bound { address: address.to_owned(), inode })
}

/// Removes what a process that is gone left at `address`.
fn clear(address: &Path) -> Result<()> {
    let socket_error = |cause| Error::Socket { address: address.to_owned(), cause };
    match fs::symlink_metadata(address) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(socket_error(e)),
        Ok(status) if !status.file_type().is_socket() => {
            return Err(Error::NotASocket { address: address.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(address) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(address).map_err(socket_error),
        // Served, or too busy to answer: either way somebody's.
        Ok(_) => Err(Error::InUse { address: address.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::InUse { address: address.to_owned() }),
        Err(e) => Err(socket_error(e)),
    }
}

impl Bound {
    /// Takes the socket's file away, unless another process has put its own there.
    pub fn remove(&self) {
        let ours = fs::symlink_metadata(&self.address).is_ok_and(|status| status.ino() == self.inode);
        if ours && let Err(e) = fs::remove_file(&self.address) {
            log::warn!("cannot remove the socket {}: {e}", self.address.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)]
    fn listen(uri: String) -> grpcio::Result<()> {
        UnixListener::bind(uri.strip_prefix("unix:").unwrap()).unwrap();
        Ok(())
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("new/s.sock");
        let bound = bind(&address, listen).unwrap();
        assert_eq!(fs::metadata(address.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        // `listen` has closed it again, so it is stale now.
        let again = bind(&address, listen).unwrap();
        assert_eq!(fs::metadata(&address).unwrap().mode() & 0o777, 0o600);
        fs::remove_file(&address).unwrap();
        let live = UnixListener::bind(&address).unwrap();
        let refused = bind(&address, |_| panic!("it must not listen"));
        assert!(matches!(refused, Err(Error::InUse { .. })));
        if bound.inode != fs::metadata(&address).unwrap().ino() && again.inode != fs::metadata(&address).unwrap().ino()
        {
            again.remove();
            assert!(address.exists(), "the socket of another process was removed");
        }
        drop(live);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("file");
        fs::write(&address, "precious").unwrap();
        assert!(matches!(bind(&address, listen), Err(Error::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&address).unwrap(), "precious");
    }

    #[test]
    fn an_address_that_cannot_be_safe_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(bind(Path::new("s.sock"), listen), Err(Error::NotAbsolute { .. })));
        let long = dir.path().join("s".repeat(120));
        assert!(matches!(bind(&long, listen), Err(Error::TooLong { .. })));
        for odd in ["/", "/tmp/a%41", "/tmp/a#b", "/tmp/a?b", "/tmp/a/"] {
            assert!(matches!(bind(Path::new(odd), listen), Err(Error::OddCharacter { .. })), "{odd}");
        }
        let theirs = dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(65_534), None).unwrap();
        assert!(matches!(bind(&theirs.join("s"), listen), Err(Error::OpenDirectory { owner: 65_534, .. })));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(bind(&dir.path().join("s"), listen), Err(Error::OpenDirectory { .. })));
    }
}
