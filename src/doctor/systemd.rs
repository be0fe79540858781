//! What systemd says of our units, on a node that runs systemd.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{Finding, safe_fs, subprocess};

const SERVICE: &str = "cvmfs-snapshotter.service";
const SOCKET: &str = "cvmfs-snapshotter.socket";
/// Directories of units that an admin made, which win over those of packages.
const LOCAL_UNIT_DIRS: [&str; 2] = ["/etc/systemd/system", "/usr/local/lib/systemd/system"];
const LIMIT: Duration = Duration::from_secs(10);
/// Longest time that a start takes to fail.
const MAX_START: Duration = Duration::from_secs(5);

fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    subprocess::run(program, arguments, LIMIT).ok().map(|output| output.stdout.trim().to_owned())
}

fn is_running() -> bool {
    Path::new("/run/systemd/system").exists()
}

fn property(unit: &str, name: &str) -> Option<String> {
    if !is_running() {
        return None;
    }
    // systemd 219 has no --value.
    let line = output_of("systemctl", &["show", "--property", name, unit])?;
    Some(line.split_once('=')?.1.to_owned())
}

/// The process of our unit, whatever program it runs.
pub fn main_process() -> Option<u32> {
    property(SERVICE, "MainPID")?.parse().ok().filter(|pid| *pid != 0)
}

/// The service does not run, and the first connection to the socket starts it.
pub fn is_socket_activated_idle() -> bool {
    let is_in = |unit, states: &[&str]| property(unit, "ActiveState").is_some_and(|state| states.contains(&&*state));
    is_in(SOCKET, &["active"]) && is_in(SERVICE, &["inactive", "failed"])
}

pub fn check() -> Vec<Finding> {
    overriding_unit().into_iter().chain(not_enabled()).collect()
}

/// The Go snapshotter has no package: its unit is made by hand, and wins over ours.
fn overriding_unit() -> Option<Finding> {
    let (file, text) = LOCAL_UNIT_DIRS.iter().find_map(|directory| {
        let file = format!("{directory}/{SERVICE}");
        safe_fs::read_to_string(Path::new(&file)).ok().map(|text| (file, text))
    })?;
    let mut settings = text.lines().filter_map(|line| line.split_once('='));
    let program = settings.find(|(key, _)| key.trim() == "ExecStart")?.1.trim();
    Some(Finding::warning(
        "daemon.unit",
        format!("{file} overrides the unit of the package, and starts {program}"),
        format!(
            "if it is the Go snapshotter's, see docs/takeover.md before you stop it; then: rm {file} && systemctl \
             daemon-reload"
        ),
    ))
}

fn not_enabled() -> Option<Finding> {
    const CHECK: &str = "daemon.enabled";
    if !is_running() {
        return None;
    }
    let states = [SOCKET, SERVICE].map(|unit| output_of("systemctl", &["is-enabled", unit]).unwrap_or_default());
    let is_any = |state: &str| states.iter().any(|one| one == state);
    if is_any("masked") {
        let message = "the unit is masked: systemd refuses to start it";
        let remedy = "systemctl unmask cvmfs-snapshotter.service cvmfs-snapshotter.socket && systemctl enable --now \
                      cvmfs-snapshotter";
        return Some(Finding::problem(CHECK, message, remedy));
    }
    let message = "the service is not started at boot";
    is_any("disabled").then(|| Finding::warning(CHECK, message, "systemctl enable cvmfs-snapshotter"))
}

/// The command line of our unit.
pub fn command_line() -> Option<Vec<OsString>> {
    command_line_of(SERVICE)
}

/// The command line of a unit. A word with spaces in it comes as several.
pub fn command_line_of(unit: &str) -> Option<Vec<OsString>> {
    let setting = property(unit, "ExecStart")?;
    let words = setting.split_once(" argv[]=")?.1.split_once(" ;")?.0;
    Some(words.split(' ').map(OsString::from).collect())
}

/// The error with which the daemon ended. A connection to its socket may have started it once more just now: that attempt
/// has to end first, and the journal has to know of it.
pub fn last_error() -> Option<String> {
    let deadline = Instant::now() + MAX_START;
    while Instant::now() < deadline {
        match property(SERVICE, "ActiveState")?.as_str() {
            "failed" => break,
            // It runs, or was told to stop.
            "active" | "inactive" => return None,
            _ => thread::sleep(Duration::from_millis(100)),
        }
    }
    // Older versions do not know the option, and write soon enough.
    let _ = output_of("journalctl", &["--sync"]);
    let lines = output_of("journalctl", &["--unit", SERVICE, "--output", "cat", "--no-pager", "--lines", "200"])?;
    lines.lines().rev().find_map(|line| line.strip_prefix(subprocess::ERROR_PREFIX)).map(str::to_owned)
}
