//! What systemd says of our units, on a node where it is in charge.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{Finding, child, reach};

const SERVICE: &str = "cvmfs-snapshotter.service";
const SOCKET: &str = "cvmfs-snapshotter.socket";
/// Where units that were made by hand lie, before those of packages.
const BY_HAND: [&str; 2] = ["/etc/systemd/system", "/usr/local/lib/systemd/system"];
const LIMIT: Duration = Duration::from_secs(10);
/// So long a start that fails may take.
const ATTEMPT: Duration = Duration::from_secs(5);

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    child::ask(program, arguments, LIMIT).map(|said| said.stdout.trim().to_owned())
}

fn is_in_charge() -> bool {
    Path::new("/run/systemd/system").exists()
}

/// Of a unit, where systemd is in charge.
fn property(unit: &str, name: &str) -> Option<String> {
    if !is_in_charge() {
        return None;
    }
    // systemd 219 has no --value.
    let said = output("systemctl", &["show", "--property", name, unit])?;
    Some(said.split_once('=')?.1.to_owned())
}

/// What the unit runs, ours or not.
pub fn main_process() -> Option<u32> {
    property(SERVICE, "MainPID")?.parse().ok().filter(|pid| *pid != 0)
}

/// Whoever connects to the socket has the service started.
pub fn waits_for_a_call() -> bool {
    let is = |unit, state: &[&str]| property(unit, "ActiveState").is_some_and(|found| state.contains(&found.as_str()));
    is(SOCKET, &["active"]) && is(SERVICE, &["inactive", "failed"])
}

pub fn look() -> Vec<Finding> {
    unit_by_hand().into_iter().chain(not_enabled()).collect()
}

/// The Go snapshotter has no package: its unit is put there by hand, and wins over ours.
fn unit_by_hand() -> Option<Finding> {
    let (file, text) = BY_HAND.iter().find_map(|folder| {
        let file = format!("{folder}/{SERVICE}");
        reach::read_to_string(Path::new(&file)).ok().map(|text| (file, text))
    })?;
    let program =
        text.lines().filter_map(|line| line.split_once('=')).find(|(key, _)| key.trim() == "ExecStart")?.1.trim();
    Some(Finding::warning(
        "daemon.unit",
        format!("{file} stands before the unit of the package, and starts {program}"),
        format!(
            "if it is the Go snapshotter's, see docs/takeover.md before you stop it; then: rm {file} && systemctl \
             daemon-reload"
        ),
    ))
}

/// Then no container starts after the next boot, or at all.
fn not_enabled() -> Option<Finding> {
    if !is_in_charge() {
        return None;
    }
    let states = [SOCKET, SERVICE].map(|unit| output("systemctl", &["is-enabled", unit]).unwrap_or_default());
    let is = |state: &str| states.iter().any(|one| one == state);
    if is("masked") {
        return Some(Finding::problem(
            "daemon.enabled",
            "the unit is masked: systemd refuses to start it",
            "systemctl unmask cvmfs-snapshotter.service cvmfs-snapshotter.socket && systemctl enable --now cvmfs-snapshotter",
        ));
    }
    is("disabled").then(|| {
        Finding::warning("daemon.enabled", "the service is not started at boot", "systemctl enable cvmfs-snapshotter")
    })
}

/// What our service is started with.
pub fn command_line() -> Option<Vec<OsString>> {
    command_line_of(SERVICE)
}

/// What a service is started with; words with spaces in them are not told from several.
pub fn command_line_of(unit: &str) -> Option<Vec<OsString>> {
    let said = property(unit, "ExecStart")?;
    let words = said.split_once(" argv[]=")?.1.split_once(" ;")?.0;
    Some(words.split(' ').map(OsString::from).collect())
}

/// Why the daemon ended the last time, as it said itself. Whoever asked at its socket may have had it
/// started once more just now: that attempt has to end first, and the journal to know of it.
pub fn last_words() -> Option<String> {
    let until = Instant::now() + ATTEMPT;
    while Instant::now() < until {
        match property(SERVICE, "ActiveState")?.as_str() {
            "failed" => break,
            // It lives, or was told to stop.
            "active" | "inactive" => return None,
            _ => thread::sleep(Duration::from_millis(100)),
        }
    }
    // Older ones do not know it, and write soon enough.
    let _ = output("journalctl", &["--sync"]);
    let lines = output("journalctl", &["--unit", SERVICE, "--output", "cat", "--no-pager", "--lines", "200"])?;
    lines.lines().rev().find_map(|line| line.strip_prefix(child::LAST_WORDS)).map(str::to_owned)
}
