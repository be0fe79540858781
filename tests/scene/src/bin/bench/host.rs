//! The host and the programs of a run, which must be known to compare two runs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use nix::unistd::Pid;
use scene::process::{run, tool};
use scene::snapshotter::binary;
use serde_json::{Value, json};

/// The seconds of processor time that a process has used.
pub fn processor_seconds(pid: Pid) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in brackets may hold anything.
    let fields = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
    let ticks: u32 = fields.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<u32>().ok()).sum();
    // USER_HZ, which the kernel never changes.
    f64::from(ticks) / 100.0
}

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The file system that holds `path`.
pub fn file_system(path: &Path) -> String {
    let of = |column: &str| run("findmnt", ["-no", column, "-T", &path.display().to_string()]).stdout.trim().to_owned();
    format!("{} on {}", of("FSTYPE"), of("SOURCE"))
}

fn first(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
    line.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

fn run_program(program: &str, arguments: &[&str]) -> String {
    run(program, arguments).stdout.trim().to_owned()
}

pub fn describe(state: &Path) -> Value {
    json!({
        "date": run_program("date", &["--utc", "+%FT%TZ"]),
        "processor": first("/proc/cpuinfo", "model name"),
        "cores": cores(),
        "memory": first("/proc/meminfo", "MemTotal"),
        "kernel": run_program("uname", &["-sr"]),
        "state roots": file_system(state),
        "cvmfs-snapshotter": run_program(&binary().display().to_string(), &["--version"]),
        "binary": binary().display().to_string(),
        "sha256": run_program("sha256sum", &[&binary().display().to_string()]).split(' ').next(),
        "checked out": run_program("git", &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty", "--abbrev=12"]),
        "containerd": run_program(&tool("containerd").display().to_string(), &["--version"]),
        "overlayfs": "containerd 2.2, plugins/snapshots/overlay",
        "go": "stargz-snapshotter 0.12.0, containerd 1.6.12, grpc 1.47.0",
    })
}

/// The facts, one on each line.
pub fn format_facts(facts: &Value) -> String {
    let mut text = String::new();
    for (name, value) in facts.as_object().into_iter().flatten() {
        let _ = writeln!(text, "  {name}: {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    }
    text
}
