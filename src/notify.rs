//! Notifies the service manager as `sd_notify(3)` describes, with datagrams to the socket that `NOTIFY_SOCKET` names.
//! Without that variable nothing is sent. A manager that cannot be reached never stops the daemon, but is worth a line in
//! the log.
//!
//! The crate `sd-notify` (0.5) is not used, because it connects to `@name` as to a file and so does not reach a manager
//! with an abstract socket, and because it waits without a limit for a manager whose queue is full.
#![forbid(unsafe_code)]

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// How long a message waits for room in the manager's queue. At boot a manager may be busy.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// The daemon serves calls. `systemctl status` shows `status`.
pub fn ready(status: &str) {
    notify(&format!("READY=1\nSTATUS={status}"));
}

/// The daemon was told to stop and finishes the calls under way.
pub fn stopping() {
    notify("STOPPING=1\nSTATUS=finishing the calls under way");
}

/// The daemon is not stuck. The manager expects this at least once in each `watchdog_interval`.
pub fn watchdog_ping() {
    notify("WATCHDOG=1");
}

/// How long the manager waits for a ping before it kills the daemon. None: it does not watch this process.
pub fn watchdog_interval() -> Option<Duration> {
    interval(env::var("WATCHDOG_USEC").ok()?.as_str(), env::var("WATCHDOG_PID").ok().as_deref())
}

fn interval(microseconds: &str, pid: Option<&str>) -> Option<Duration> {
    let is_for_this_process = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let interval = Duration::from_micros(microseconds.parse().ok()?);
    (is_for_this_process && !interval.is_zero()).then_some(interval)
}

fn notify(state: &str) {
    let Some(address) = env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(e) = send(&address, state) {
        let address = address.display();
        log::warn!(event = "service_manager_unreachable", address:%; "cannot notify the service manager at {address}: {e}");
    }
}

fn send(address: &OsStr, state: &str) -> io::Result<()> {
    // A leading @ stands for an abstract name, which has no file.
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND_LIMIT))?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn received(manager: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn manager_is_notified_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1\nSTATUS=a b").unwrap();
        assert_eq!(received(&manager), "READY=1\nSTATUS=a b");
        let name = format!("cvmfs-snapshotter-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        send(OsStr::new(&format!("@{name}")), "STOPPING=1").unwrap();
        assert_eq!(received(&manager), "STOPPING=1");
    }

    #[test]
    fn watchdog_of_another_process_is_ignored() {
        let own = std::process::id().to_string();
        assert_eq!(interval("1500000", None), Some(Duration::from_millis(1500)));
        assert_eq!(interval("1", Some(&own)), Some(Duration::from_micros(1)));
        for (microseconds, pid) in [("1", Some("1")), ("0", None), ("", None), ("soon", Some(own.as_str()))] {
            assert_eq!(interval(microseconds, pid), None, "{microseconds:?} {pid:?}");
        }
    }

    #[test]
    fn missing_manager_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = send(dir.path().join("notify").as_os_str(), "READY=1").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
