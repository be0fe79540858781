//! The two places where a file descriptor is only a number, so that the compiler cannot see who owns it.
//!
//! For the sockets of systemd, the crate `sd-notify` (0.5) would save the parsing of two variables; it also returns numbers,
//! so what needs care here would stay.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The first descriptor that systemd passes on, `SD_LISTEN_FDS_START` of `sd_listen_fds`(3).
const FIRST_DESCRIPTOR: i32 = 3;

/// The first socket that systemd passed to this process, and the number of all that it passed. Only the first call gets the
/// socket.
pub fn inherited_sockets() -> Option<(OwnedFd, u32)> {
    static IS_TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    let count = number("LISTEN_FDS").filter(|count| *count > 0)?;
    // The variables may be left from a parent process that they were meant for.
    if number("LISTEN_PID") != Some(std::process::id()) || IS_TAKEN.swap(true, Ordering::SeqCst) {
        return None;
    }
    // SAFETY: whoever started this process and named it in LISTEN_PID put an open descriptor there for it to own. It was
    // there before this process could open anything under that number, and `IS_TAKEN` keeps anybody from getting it twice.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST_DESCRIPTOR) };
    // EBADF means that the variables were wrong: there is no descriptor to own, and none to close.
    if fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_err() {
        let _ = socket.into_raw_fd();
        return None;
    }
    Some((socket, count))
}

/// Gives a connection to gRPC, which closes it. The connection must be non-blocking.
pub fn into_grpc_fd(server: &mut grpcio::Server, connection: UnixStream) {
    // SAFETY: the descriptor is a connected stream socket, and `into_raw_fd` gives up this program's only right to read,
    // write or close it under this number. (The listener keeps a duplicate, which has a number of its own.)
    unsafe { server.add_channel_from_fd(connection.into_raw_fd()) };
}
