//! What systemd says of a unit, on a node that runs systemd.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{Finding, probe};

pub const SERVICE: &str = "cvmfs-snapshotter.service";
const SOCKET: &str = "cvmfs-snapshotter.socket";
/// Directories of units that an admin made, which win over those of packages.
const LOCAL_UNIT_DIRS: [&str; 2] = ["/etc/systemd/system", "/usr/local/lib/systemd/system"];
/// Longest time that a start takes to fail.
const MAX_START: Duration = Duration::from_secs(5);

/// The properties of a unit. They are empty where there is no systemd.
pub struct Unit(HashMap<String, String>);

impl Unit {
    pub fn show(name: &str) -> Self {
        let is_running = Path::new("/run/systemd/system").exists();
        let output = is_running.then(|| probe::run("systemctl", &["show", name]).ok()).flatten();
        let lines = output.iter().flat_map(|output| output.stdout.lines()).filter_map(|line| line.split_once('='));
        Self(lines.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    fn property(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// The process of the unit, whatever program it runs.
    pub fn main_process(&self) -> Option<u32> {
        self.property("MainPID").parse().ok().filter(|pid| *pid != 0)
    }

    /// A word with spaces in it comes as several.
    pub fn command_line(&self) -> Option<Vec<OsString>> {
        let words = self.property("ExecStart").split_once(" argv[]=")?.1.split_once(" ;")?.0;
        Some(words.split(' ').map(OsString::from).collect())
    }
}

/// The service does not run, and the first connection to the socket starts it.
pub fn is_socket_activated_idle() -> bool {
    let state = |unit| Unit::show(unit).property("ActiveState").to_owned();
    state(SOCKET) == "active" && ["inactive", "failed"].contains(&state(SERVICE).as_str())
}

pub fn check() -> Vec<Finding> {
    overriding_unit().into_iter().chain(not_enabled()).collect()
}

/// The Go snapshotter has no package: its unit is made by hand, and wins over ours.
fn overriding_unit() -> Option<Finding> {
    let files = LOCAL_UNIT_DIRS.map(|directory| format!("{directory}/{SERVICE}"));
    let (file, text) = files.iter().find_map(|file| Some((file, probe::read_to_string(Path::new(file)).ok()?)))?;
    let program = text.lines().find_map(|line| line.trim().strip_prefix("ExecStart="))?;
    Some(Finding::warning(
        "daemon.unit",
        format!("{file} overrides the unit of the package, and starts {program}"),
        format!(
            "if it is the Go snapshotter's, see docs/takeover.md before you stop it; then: rm {file} && systemctl daemon-reload"
        ),
    ))
}

fn not_enabled() -> Option<Finding> {
    const CHECK: &str = "daemon.enabled";
    let units = [SOCKET, SERVICE].map(Unit::show);
    let is_any = |state: &str| units.iter().any(|unit| unit.property("UnitFileState") == state);
    if is_any("masked") {
        let message = "the unit is masked: systemd refuses to start it";
        let remedy = format!("systemctl unmask {SERVICE} {SOCKET} && systemctl enable --now cvmfs-snapshotter");
        return Some(Finding::problem(CHECK, message, remedy));
    }
    let message = "the service is not started at boot";
    is_any("disabled").then(|| Finding::warning(CHECK, message, "systemctl enable cvmfs-snapshotter"))
}

/// The error with which the daemon ended. A connection to its socket may have started it once more just now: that attempt
/// has to end first, and the journal has to know of it.
pub fn last_error() -> Option<String> {
    let deadline = Instant::now() + MAX_START;
    while Instant::now() < deadline {
        match Unit::show(SERVICE).property("ActiveState") {
            "failed" => break,
            // There is no systemd, or the service runs, or was told to stop.
            "" | "active" | "inactive" => return None,
            _ => thread::sleep(Duration::from_millis(100)),
        }
    }
    // Older versions do not know the option, and write soon enough.
    let _ = probe::run("journalctl", &["--sync"]);
    let log = probe::run("journalctl", &["--unit", SERVICE, "--output", "cat", "--no-pager", "--lines", "200"]).ok()?;
    log.stdout.lines().rev().find_map(|line| line.strip_prefix("cvmfs-snapshotter: ")).map(str::to_owned)
}
