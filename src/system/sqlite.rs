//! A call of SQLite that rusqlite does not have.

use nix::errno::Errno;
use rusqlite::Connection;

/// The error of the system call that made the last operation of `connection` fail. None: no system call failed.
#[allow(unsafe_code)]
pub fn sqlite_errno(connection: &Connection) -> Option<Errno> {
    // SAFETY: the handle belongs to an open connection, which outlives the call, and the call only reads a number.
    let number = unsafe { rusqlite::ffi::sqlite3_system_errno(connection.handle()) };
    (number != 0).then(|| Errno::from_raw(number))
}
