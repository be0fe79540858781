//! What SQLite knows of the operating system and its Rust interface does not say.

use nix::errno::Errno;
use rusqlite::Connection;

/// The error of the system call that the last operation of `connection` failed at, if it did.
#[allow(unsafe_code)]
pub fn sqlite_errno(connection: &Connection) -> Option<Errno> {
    // SAFETY: the handle is that of an open connection, which outlives the call, and the call only reads a number.
    let number = unsafe { rusqlite::ffi::sqlite3_system_errno(connection.handle()) };
    (number != 0).then(|| Errno::from_raw(number))
}
