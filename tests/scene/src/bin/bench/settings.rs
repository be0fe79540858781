//! The settings from the environment. They are checked before anything is measured, because a run takes a quarter of an
//! hour and should not fail at its end.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{AccessFlags, access};
use scene::process::cache;
use scene::snapshotter::binary;

use crate::PARTS;
use crate::contestant::NAMES;

const VARIABLES: [&str; 6] =
    ["BENCH_PARTS", "BENCH_UP_TO", "BENCH_PEERS_UP_TO", "BENCH_CLEANUP", "BENCH_JSON", "BENCH_PLOT"];
/// The smallest number of snapshots that anything is measured with.
const FEWEST: usize = 100;

pub struct Settings {
    pub parts: Vec<&'static str>,
    pub up_to: usize,
    pub peers_up_to: usize,
    pub cleanup: usize,
    pub json: PathBuf,
    pub plot: Option<PathBuf>,
    /// Names and sockets of snapshotters that run already.
    pub peers: Vec<(String, PathBuf)>,
}

impl Settings {
    pub fn read() -> Result<Self, String> {
        let set: Vec<String> = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
        check_names(set.iter().map(String::as_str))?;
        check_daemon(&binary())?;
        Self::from(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root: snapshotters mount, and so does what they are measured with".to_owned());
        }
        let dir = std::env::temp_dir();
        if !dir.is_dir() || access(&dir, AccessFlags::W_OK).is_err() {
            return Err(format!("TMPDIR: {} is no directory that can be written to", dir.display()));
        }
        let number = |name: &str, otherwise| number(name, variable(name), otherwise);
        let parts = parts(variable("BENCH_PARTS").as_deref())?;
        let json = variable("BENCH_JSON").map_or_else(|| cache().join("bench.json"), PathBuf::from);
        let plot = variable("BENCH_PLOT").map(PathBuf::from);
        writable("BENCH_JSON", &json)?;
        if let Some(plot) = &plot {
            writable("BENCH_PLOT", plot)?;
            if !parts.contains(&"growth") {
                return Err("BENCH_PLOT: only the part growth is drawn, and BENCH_PARTS leaves it out".to_owned());
            }
        }
        let up_to = number("BENCH_UP_TO", 100_000)?;
        Ok(Self {
            parts,
            up_to,
            peers_up_to: number("BENCH_PEERS_UP_TO", 10_000)?.min(up_to),
            cleanup: number("BENCH_CLEANUP", 3_000)?,
            json,
            plot,
            peers: peers(variable("PEER_SOCKET").as_deref().unwrap_or_default())?,
        })
    }
}

/// A slip in a name would go unnoticed.
fn check_names<'a>(mut set: impl Iterator<Item = &'a str>) -> Result<(), String> {
    match set.find(|name| name.starts_with("BENCH_") && !VARIABLES.contains(name)) {
        Some(unknown) => Err(format!("{unknown}: there is no such variable; there are {}", VARIABLES.join(", "))),
        None => Ok(()),
    }
}

fn check_daemon(path: &Path) -> Result<(), String> {
    let said = Command::new(path).arg("--version").output();
    let said = said.map_err(|e| format!("CVMFS_SNAPSHOTTER_BINARY: cannot run {}: {e}", path.display()))?;
    if String::from_utf8_lossy(&said.stdout).starts_with("cvmfs-snapshotter ") {
        Ok(())
    } else {
        Err(format!("CVMFS_SNAPSHOTTER_BINARY: {} is no cvmfs-snapshotter", path.display()))
    }
}

fn parts(wanted: Option<&str>) -> Result<Vec<&'static str>, String> {
    let Some(wanted) = wanted else {
        return Ok(PARTS.iter().filter(|(.., by_default)| *by_default).map(|(name, ..)| *name).collect());
    };
    let wanted: Vec<&str> = wanted.split(',').map(str::trim).collect();
    if let Some(unknown) = wanted.iter().find(|&&part| PARTS.iter().all(|(name, ..)| *name != part)) {
        let known = PARTS.map(|(name, ..)| name).join(", ");
        return Err(format!("BENCH_PARTS: there is no part {unknown:?}; there are {known}, separated by commas"));
    }
    Ok(PARTS.iter().map(|(name, ..)| *name).filter(|name| wanted.contains(name)).collect())
}

fn number(name: &str, value: Option<String>, otherwise: usize) -> Result<usize, String> {
    let Some(value) = value else { return Ok(otherwise) };
    let number = value.trim().parse().ok().filter(|number| *number >= FEWEST);
    number.ok_or_else(|| format!("{name}: {value:?} is no number of snapshots; it is {FEWEST} or more"))
}

/// Checks that a file can be written. An existing file is kept until its replacement is written.
fn writable(name: &str, path: &Path) -> Result<(), String> {
    let is_new = !path.exists();
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|e| format!("{name}: cannot write {}: {e}", path.display()))?;
    if is_new {
        let _ = fs::remove_file(path);
    }
    Ok(())
}

fn peers(named: &str) -> Result<Vec<(String, PathBuf)>, String> {
    let mut peers: Vec<(String, PathBuf)> = Vec::new();
    for one in named.split(',').map(str::trim).filter(|one| !one.is_empty()) {
        let (name, path) = one
            .split_once('=')
            .filter(|(name, path)| !name.is_empty() && !path.is_empty())
            .ok_or_else(|| format!("PEER_SOCKET: {one:?} is not name=path, with more after commas"))?;
        if NAMES.contains(&name) || peers.iter().any(|(other, _)| other == name) {
            return Err(format!("PEER_SOCKET: {name:?} is taken, another contestant has that name"));
        }
        let is_socket = fs::metadata(path).is_ok_and(|there| there.file_type().is_socket());
        if !is_socket || std::os::unix::net::UnixStream::connect(path).is_err() {
            return Err(format!("PEER_SOCKET: nobody listens on {path}: start {name} first"));
        }
        peers.push((name.to_owned(), path.into()));
    }
    Ok(peers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(set: &[(&str, &str)]) -> Result<Settings, String> {
        // Without a value the JSON would go to the cache of the user who runs this test.
        let given = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Settings::from(&|name| given(name).or_else(|| (name == "BENCH_JSON").then(|| "/dev/null".to_owned())))
    }

    #[test]
    fn root_invalid_settings_are_refused_before_any_measurement() {
        let refused = |name, value| read(&[(name, value)]).err().unwrap_or_else(|| panic!("{name}={value} is taken"));
        for (name, value, told) in [
            ("BENCH_PARTS", "cycles,nonsense", "there is no part \"nonsense\"; there are cycles, making,"),
            ("BENCH_UP_TO", "x", "\"x\" is no number of snapshots"),
            ("BENCH_PEERS_UP_TO", "-5", "100 or more"),
            ("BENCH_CLEANUP", "0", "100 or more"),
            ("BENCH_JSON", "/nonexistent/b.json", "cannot write /nonexistent/b.json: No such file"),
            ("BENCH_PLOT", "/nonexistent/b.svg", "cannot write /nonexistent/b.svg: No such file"),
            ("PEER_SOCKET", "foo", "\"foo\" is not name=path"),
            ("PEER_SOCKET", "go=/run/x.sock", "\"go\" is taken"),
            ("PEER_SOCKET", "peer=/dev/null", "nobody listens on /dev/null: start peer first"),
        ] {
            let message = refused(name, value);
            assert!(message.starts_with(&format!("{name}: ")) && message.contains(told), "{message}");
        }
        let misspelt = check_names(["PATH", "BENCH_CLEANUP", "BENCH_CLENAUP"].into_iter());
        assert!(misspelt.is_err_and(|message| message.starts_with("BENCH_CLENAUP: there is no such variable")));
        for (path, told) in [("/nonexistent", "cannot run /nonexistent"), ("/bin/echo", "is no cvmfs-snapshotter")] {
            assert!(check_daemon(Path::new(path)).is_err_and(|message| message.contains(told)), "{path}");
        }
        let both = [("BENCH_PARTS", "cycles"), ("BENCH_PLOT", "/dev/null")];
        assert!(read(&both).err().is_some_and(|message| message.starts_with("BENCH_PLOT: ")));
    }

    #[test]
    fn root_default_settings_measure_no_peer_with_more_snapshots_than_ours() {
        let all = read(&[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((all.up_to, all.peers_up_to, all.cleanup), (100_000, 10_000, 3_000));
        assert!(all.parts.contains(&"cycles") && !all.parts.contains(&"scan"));
        let some = read(&[("BENCH_PARTS", "size, cycles"), ("BENCH_UP_TO", "1000")]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((some.parts.as_slice(), some.peers_up_to), (["cycles", "size"].as_slice(), 1_000));
    }
}
