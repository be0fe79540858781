//! What systemd says of our units, on a node where it is in charge.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Finding;

const SERVICE: &str = "cvmfs-snapshotter.service";
const SOCKET: &str = "cvmfs-snapshotter.socket";
/// Where a unit that was made by hand lies, before those of packages.
const UNIT_BY_HAND: &str = "/etc/systemd/system/cvmfs-snapshotter.service";
/// How a program that cannot go on begins its last line.
const LAST_WORDS: &str = "cvmfs-snapshotter: ";

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn is_in_charge() -> bool {
    Path::new("/run/systemd/system").exists()
}

pub fn look() -> Vec<Finding> {
    unit_by_hand().into_iter().chain(not_enabled()).collect()
}

/// The Go snapshotter has no package: its unit is put there by hand, and wins over ours.
fn unit_by_hand() -> Option<Finding> {
    let text = fs::read_to_string(UNIT_BY_HAND).ok()?;
    let program = text.lines().find_map(|line| line.strip_prefix("ExecStart="))?.trim();
    Some(Finding::warning(
        "daemon.unit",
        format!("{UNIT_BY_HAND} stands before the unit of the package, and starts {program}"),
        format!(
            "if it is the Go snapshotter's, see docs/takeover.md before you stop it; then: rm {UNIT_BY_HAND} && systemctl \
             daemon-reload"
        ),
    ))
}

/// Then no container starts after the next boot.
fn not_enabled() -> Option<Finding> {
    if !is_in_charge() || output("systemctl", &["is-enabled", SOCKET])? != "disabled" {
        return None;
    }
    Some(Finding::warning("daemon.enabled", "the service is not started at boot", "systemctl enable cvmfs-snapshotter"))
}

/// Why the daemon ended, as it said itself.
pub fn last_words() -> Option<String> {
    if !is_in_charge() {
        return None;
    }
    let lines = output("journalctl", &["--unit", SERVICE, "--output", "cat", "--no-pager", "--lines", "200"])?;
    lines.lines().rev().find_map(|line| line.strip_prefix(LAST_WORDS)).map(str::to_owned)
}
