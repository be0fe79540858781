//! The process that serves a CernVM-FS repository, and the place of its cache.
//!
//! With the cache on the file system of the state root a node can hang: overlayfs holds that file system's lock for renames
//! while it asks the repository, and the client may need that lock to answer.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::FQRN_XATTR;
use crate::system::Sys;

/// The directory of the client's configuration.
pub const CONFIGURATION: &str = "/etc/cvmfs";
/// The cache of a client whose configuration does not name one.
const CACHE_BASE: &str = "/var/lib/cvmfs";
/// The extended attribute of a CernVM-FS mount's root that holds the client's process id.
const PID_XATTR: &str = "user.pid";
/// The size of a command line or a configuration file, which is far smaller in practice.
const MAX_BYTES: u64 = 1 << 20;
/// Entries of `default.d` that are read.
const MAX_FILES: usize = 1024;

/// The directory of a cache, and its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheDirectory {
    pub path: PathBuf,
    pub device: u64,
}

/// The cache of the client that serves the repository at `path`. None: there is no CernVM-FS client, or its cache cannot be
/// found. This asks the repository.
pub fn find_cache(sys: &dyn Sys, path: &Path, configuration: &Path) -> Option<CacheDirectory> {
    let name = attribute(sys, path, FQRN_XATTR)?;
    let pid = pid(sys, path, &name)?;
    // The client's working directory is its cache.
    let cwd = PathBuf::from(format!("/proc/{pid}/cwd"));
    match sys.read_link(&cwd) {
        Ok(path) => Some(CacheDirectory { path, device: sys.stat(&cwd).ok()?.device }),
        // The kernel requires CAP_SYS_PTRACE for this, which our unit does not grant.
        Err(e) if matches!(e.errno, Errno::EACCES | Errno::EPERM) => configured_cache(sys, configuration, &name),
        Err(_) => None,
    }
}

/// The user that a client runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientUser {
    Uid(u32),
    /// The client's process cannot be seen from here.
    Hidden,
    /// No CernVM-FS client serves the repository.
    NoClient,
}

/// The user that the client of the repository at `path` runs as. This asks the repository.
pub fn client_user(sys: &dyn Sys, path: &Path) -> ClientUser {
    let Some(name) = attribute(sys, path, FQRN_XATTR) else { return ClientUser::NoClient };
    let uid = pid(sys, path, &name).and_then(|pid| {
        let status = sys.read_file(Path::new(&format!("/proc/{pid}/status")), MAX_BYTES).ok()?;
        let status = String::from_utf8_lossy(&status);
        // The second number is the effective user.
        status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
    });
    uid.map_or(ClientUser::Hidden, ClientUser::Uid)
}

/// The text of an extended attribute of the client. Some clients end it with a line break.
pub(super) fn attribute(sys: &dyn Sys, path: &Path, name: &str) -> Option<String> {
    let value = String::from_utf8(sys.attribute(path, name).ok()??).ok()?;
    Some(value.trim().to_owned())
}

/// The id of the process that serves repository `name` at `path`.
fn pid(sys: &dyn Sys, path: &Path, name: &str) -> Option<u32> {
    let pid: u32 = attribute(sys, path, PID_XATTR)?.parse().ok()?;
    // A client in a container has another id here, and the id may be that of another process.
    let command_line = sys.read_file(Path::new(&format!("/proc/{pid}/cmdline")), MAX_BYTES).ok()?;
    let mut words = command_line.split(|byte| *byte == 0);
    words.any(|word| word == name.as_bytes() || OsStr::from_bytes(word) == path).then_some(pid)
}

/// The cache that the client's configuration names. An alien cache is not considered.
fn configured_cache(sys: &dyn Sys, configuration: &Path, name: &str) -> Option<CacheDirectory> {
    let mut base = CACHE_BASE.to_owned();
    let mut directory = None;
    for file in configuration_files(sys, configuration, name) {
        let text = match sys.read_file(&file, MAX_BYTES) {
            Ok(text) => text,
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR) => continue,
            // A file that cannot be read may name another cache.
            Err(_) => return None,
        };
        for (key, value) in String::from_utf8_lossy(&text).lines().filter_map(parse_assignment) {
            match key {
                "CVMFS_CACHE_BASE" => value.clone_into(&mut base),
                "CVMFS_CACHE_DIR" => directory = Some(value.to_owned()),
                _ => {}
            }
        }
    }
    let in_base = ["shared", name, ""].map(|name| Path::new(&base).join(name));
    let paths = directory.into_iter().map(PathBuf::from).chain(in_base);
    // A value such as $HOME/cache is not expanded, so it names no directory and is skipped.
    paths
        .filter(|path| path.is_absolute())
        .find_map(|path| Some(CacheDirectory { device: sys.stat(&path).ok()?.device, path }))
}

/// The configuration files in the order in which the client reads them, in which later ones win. Those of a configuration
/// repository are missing.
fn configuration_files(sys: &dyn Sys, configuration: &Path, name: &str) -> Vec<PathBuf> {
    let defaults = configuration.join("default.d");
    let names = sys.first_entries(&defaults, MAX_FILES).unwrap_or_default();
    let mut defaults: Vec<PathBuf> = names.into_iter().map(|name| defaults.join(name)).collect();
    defaults.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    defaults.sort();
    let mut files = vec![configuration.join("default.conf")];
    files.append(&mut defaults);
    let domain = name.split_once('.').map_or("", |(_, domain)| domain);
    files.push(configuration.join("default.local"));
    for (folder, name) in [("domain.d", domain), ("config.d", name)] {
        files.extend(["conf", "local"].map(|extension| configuration.join(folder).join(format!("{name}.{extension}"))));
    }
    files
}

/// Parses `KEY=value`, as a shell does.
fn parse_assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start();
    let (key, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
    let value = match value.chars().next()? {
        quote @ ('"' | '\'') => value[1..].split(quote).next()?,
        _ => value.split(|c: char| c.is_whitespace() || c == ';' || c == '#').next()?,
    };
    Some((key.trim(), value))
}

#[cfg(test)]
pub(super) mod tests;
