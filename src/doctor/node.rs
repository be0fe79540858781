//! The node itself: kernel, state root and our configuration.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, Statvfs, statvfs};

use super::{Finding, Report, Severity, probe};
use crate::admin::table::size;
use crate::cli::Arguments;
use crate::config::{self, Config, LoadedConfig};
use crate::model::shell_quote;
use crate::system;

/// Below this share of free space or inodes there is a warning.
const LOW_SPACE_PERCENT: u64 = 5;
/// Keys of containerd's own configuration, which old documentation had in this file.
const CONTAINERD_KEYS: [&str; 5] = ["version", "plugins", "proxy_plugins", "root", "state"];

/// The result is the configuration, if it can be used.
pub fn check(arguments: &Arguments, is_daemon_running: bool, report: &mut Report<'_>) -> Option<Config> {
    report.push(overlayfs());
    let state_root = state_root(&arguments.root).into_iter();
    // A state root that is missing below a running daemon was moved, which another check tells.
    report.extend(state_root.filter(|one| !is_daemon_running || one.severity != Severity::Note));
    let (findings, config) = configuration(arguments);
    report.extend(findings);
    config
}

fn overlayfs() -> Finding {
    const CHECK: &str = "node.overlayfs";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let module = format!("/lib/modules/{release}/kernel/fs/overlayfs");
    if filesystems.lines().any(|line| line.ends_with("\toverlay")) {
        Finding::good(CHECK, format!("the kernel, {release}, has overlayfs"))
    } else if Path::new(&module).exists() {
        Finding::note(CHECK, format!("overlayfs is a module of the kernel, {release}: the first container loads it"))
    } else {
        Finding::problem(
            CHECK,
            format!("the kernel, {release}, does not have overlayfs, and {module} is missing"),
            "modprobe overlay; if that fails, boot the kernel whose modules are installed",
        )
    }
}

fn state_root(root: &Path) -> Vec<Finding> {
    const CHECK: &str = "node.state-root";
    let shown = root.display();
    let real = match probe::inspect(root).and_then(|_| root.canonicalize()) {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let message = format!("the state root {shown} does not exist yet: the first start makes it");
            return vec![Finding::note(CHECK, message)];
        }
        Err(e) => {
            let message = format!("cannot inspect the state root {shown}: {e}");
            let remedy = "see what is mounted there (findmnt) and why it does not answer (dmesg)";
            return vec![Finding::problem(CHECK, message, remedy)];
        }
    };
    let file_system = match statfs(&real).map(|status| status.filesystem_type()) {
        Ok(NFS_SUPER_MAGIC) => Some("NFS"),
        Ok(OVERLAYFS_SUPER_MAGIC) => Some("an overlay"),
        Ok(FUSE_SUPER_MAGIC) => Some("a FUSE file system"),
        Ok(_) | Err(_) => None,
    };
    let Ok(status) = statvfs(&real) else { return Vec::new() };
    let is_empty = fs::read_dir(&real).is_ok_and(|mut entries| entries.next().is_none());
    let lacks_d_type = !is_empty && matches!(system::supports_d_type(&real), Ok(false));
    let options = [(FsFlags::ST_NOEXEC, "noexec"), (FsFlags::ST_NOSUID, "nosuid"), (FsFlags::ST_NODEV, "nodev")];
    let options = options.into_iter().filter(|(flag, _)| status.flags().contains(*flag)).map(|(_, name)| name);
    let options = options.collect::<Vec<_>>().join(", ");
    let mount_point = system::mount_point_of(&real).unwrap_or_else(|| real.clone());
    let mount_point = shell_quote(&mount_point.to_string_lossy());
    let faults = [
        file_system.map(|name| {
            let message = format!("the state root {shown} is on {name}: overlayfs cannot write there");
            Finding::problem(CHECK, message, "put the state root on a local disk (--root)")
        }),
        lacks_d_type.then(|| {
            let message = format!("the file system of {shown} does not tell the types of directory entries (d_type)");
            let remedy = "move the state root to another file system, or reformat this one: XFS with -n ftype=1, ext4 with \
                          -O filetype";
            Finding::problem(CHECK, message, remedy)
        }),
        status.flags().contains(FsFlags::ST_RDONLY).then(|| {
            let message = format!("the file system of the state root {shown} is read-only: nothing can be pulled or started");
            let remedy = format!("see why (dmesg: a disk with errors?), then mount -o remount,rw {mount_point}");
            Finding::problem(CHECK, message, remedy)
        }),
        (!options.is_empty()).then(|| {
            let message = format!("the state root {shown} is mounted {options}: containers cannot use such files that they make");
            Finding::warning(CHECK, message, format!("mount it without: mount -o remount,exec,suid,dev {mount_point}"))
        }),
    ];
    faults.into_iter().flatten().chain([free_space(&real, &status)]).collect()
}

fn free_space(root: &Path, status: &Statvfs) -> Finding {
    const CHECK: &str = "node.disk";
    let (free, total) = (status.blocks_available() * status.fragment_size(), status.blocks() * status.fragment_size());
    let (free_inodes, inodes) = (status.files_available(), status.files());
    let message = format!(
        "{} of {} and {free_inodes} of {inodes} inodes are free for {}",
        size(free),
        size(total),
        root.display()
    );
    let remedy = "see what takes it: cvmfs-snapshotter status; remove images and containers, then cvmfs-snapshotter gc";
    // Some file systems do not count inodes.
    let is_low = |free: u64, total: u64| total > 0 && free < total / 100 * LOW_SPACE_PERCENT;
    if free == 0 || (inodes > 0 && free_inodes == 0) {
        Finding::problem(CHECK, format!("{message}: nothing can be pulled or started"), remedy)
    } else if is_low(free, total) || is_low(free_inodes, inodes) {
        Finding::warning(CHECK, message, remedy)
    } else {
        Finding::good(CHECK, message)
    }
}

/// Loads our configuration as the daemon does, but fails if the file system does not answer.
pub fn load(arguments: &Arguments) -> Result<LoadedConfig, config::Error> {
    let path = arguments.config_file();
    match probe::inspect(path) {
        Err(cause) if cause.kind() == io::ErrorKind::TimedOut => {
            Err(config::Error::Unreadable { path: path.to_owned(), cause: config::file::Error::Unreadable(cause) })
        }
        Ok(_) | Err(_) => config::load(arguments.config.as_deref()),
    }
}

fn configuration(arguments: &Arguments) -> (Vec<Finding>, Option<Config>) {
    const CHECK: &str = "config.file";
    let path = arguments.config_file();
    let file = path.display();
    let LoadedConfig { config, unknown } = match load(arguments) {
        Ok(loaded) => loaded,
        Err(e) => {
            let file = shell_quote(&path.to_string_lossy());
            let remedy = format!("correct it; cvmfs-snapshotter --config {file} --check-config tells when it is good");
            return (vec![Finding::problem(CHECK, e.to_string(), remedy)], None);
        }
    };
    let warning = |unknown: &config::UnknownKey| {
        let remedy = if CONTAINERD_KEYS.contains(&unknown.key.as_str()) {
            "it is one of containerd's: move it to /etc/containerd/config.toml"
        } else {
            "remove it or correct its spelling"
        };
        Finding::warning(CHECK, format!("{file}, {unknown}"), remedy)
    };
    let mut findings: Vec<Finding> = unknown.iter().map(warning).collect();
    if findings.is_empty() {
        let state = if path.exists() { "is good" } else { "is not there: the defaults hold" };
        findings.push(Finding::good(CHECK, format!("{file} {state}")));
    }
    (findings, Some(config))
}
