//! The two paths where a file descriptor is no more than a number, and the compiler cannot
//! see whose it is.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Where systemd begins to count: `sd_listen_fds`(3).
const FIRST: i32 = 3;

/// The first socket that systemd, or who acts like it, has opened for this process, and how many it has.
pub fn inherited_sockets() -> Option<(OwnedFd, u32)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    // The variables may have been meant for a process above us.
    let count = number("LISTEN_FDS").filter(|count| *count > 0)?;
    if number("LISTEN_PID") != Some(std::process::id()) {
        return None;
    }
    if TAKEN.swap(true, Ordering::SeqCst) {
        return None;
    }
    // SAFETY: whoever started this process and named it in LISTEN_PID has put an open
    // descriptor there for it to own; it was there before anything of ours could be opened
    // under that number; and `TAKEN` sees to it that nobody gets it twice.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    // It says EBADF if the variables lied: then there is nothing to own, and nothing to close.
    if fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_err() {
        let _ = socket.into_raw_fd();
        return None;
    }
    Some((socket, count))
}

/// Gives a connection to gRPC for good. It must not block.
pub fn into_grpc_fd(server: &mut grpcio::Server, connection: UnixStream) {
    // SAFETY: it is a connected stream socket, and `into_raw_fd` gives up the only right of
    // this program to read, write or close it under this number. (The door keeps a duplicate,
    // which has a number of its own.)
    unsafe { server.add_channel_from_fd(connection.into_raw_fd()) };
}
