//! Tells the service manager how far we are, as `sd_notify(3)` describes: datagrams to the socket
//! that `NOTIFY_SOCKET` names. Without that variable nobody wants to know. Nothing here ever
//! stops the daemon: a manager that cannot be told is worth a line in the log.
#![forbid(unsafe_code)]

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

const VARIABLE: &str = "NOTIFY_SOCKET";
/// A message waits so long for room in the manager's queue.
const LIMIT: Duration = Duration::from_secs(5);

/// The daemon serves. `status` is what `systemctl status` shows.
pub fn ready(status: &str) {
    notify(&format!("READY=1\nSTATUS={status}"));
}

/// The daemon was told to stop, and finishes what is under way.
pub fn stopping() {
    notify("STOPPING=1\nSTATUS=finishing the calls under way");
}

/// The daemon works. To be told within each `watchdog_interval`.
pub fn watchdog_ping() {
    notify("WATCHDOG=1");
}

/// So long the manager waits for a sign of life before it kills the daemon. None: it does not.
pub fn watchdog_interval() -> Option<Duration> {
    interval(env::var("WATCHDOG_USEC").ok()?.as_str(), env::var("WATCHDOG_PID").ok().as_deref())
}

fn interval(microseconds: &str, pid: Option<&str>) -> Option<Duration> {
    let is_for_us = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let interval = Duration::from_micros(microseconds.parse().ok()?);
    (is_for_us && !interval.is_zero()).then_some(interval)
}

fn notify(state: &str) {
    let Some(address) = env::var_os(VARIABLE) else { return };
    if let Err(e) = send(&address, state) {
        log::warn!("cannot tell the service manager at {}: {e}", address.display());
    }
}

fn send(address: &OsStr, state: &str) -> io::Result<()> {
    // A name that begins with @ is one without a file; only Linux has these.
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A manager may be busy, at boot above all, but must not keep us for ever.
    socket.set_write_timeout(Some(LIMIT))?;
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
    fn a_manager_is_told_by_path_and_by_abstract_name() {
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
    fn a_watchdog_is_of_one_process() {
        let own = std::process::id().to_string();
        assert_eq!(interval("1500000", None), Some(Duration::from_millis(1500)));
        assert_eq!(interval("1", Some(&own)), Some(Duration::from_micros(1)));
        for (microseconds, pid) in [("1", Some("1")), ("0", None), ("", None), ("soon", Some(own.as_str()))] {
            assert_eq!(interval(microseconds, pid), None, "{microseconds:?} {pid:?}");
        }
    }

    #[test]
    fn a_manager_that_is_gone_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let gone = send(dir.path().join("notify").as_os_str(), "READY=1").unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }
}
