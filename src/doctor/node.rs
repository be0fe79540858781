//! The node itself: kernel, state root and our configuration.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, Statvfs, statvfs};

use super::{Finding, Report, Severity, safe_fs};
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
    let real = match safe_fs::inspect(root).and_then(|_| root.canonicalize()) {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return vec![Finding::note(
                CHECK,
                format!("the state root {shown} does not exist yet: the first start makes it"),
            )];
        }
        Err(e) => {
            return vec![Finding::problem(
                CHECK,
                format!("cannot inspect the state root {shown}: {e}"),
                "see what is mounted there (findmnt) and why it does not answer (dmesg); no container starts before it does",
            )];
        }
    };
    let mut findings = Vec::new();
    let unfit = statfs(&real).ok().and_then(|status| match status.filesystem_type() {
        NFS_SUPER_MAGIC => Some("NFS"),
        OVERLAYFS_SUPER_MAGIC => Some("an overlay"),
        FUSE_SUPER_MAGIC => Some("a FUSE file system"),
        _ => None,
    });
    if let Some(name) = unfit {
        let message = format!("the state root {shown} is on {name}: overlayfs cannot write there");
        findings.push(Finding::problem(CHECK, message, "put the state root on a local disk (--root)"));
    }
    let is_empty = fs::read_dir(&real).is_ok_and(|mut entries| entries.next().is_none());
    if !is_empty && matches!(system::supports_d_type(&real), Ok(false)) {
        findings.push(Finding::problem(
            CHECK,
            format!("the file system of {shown} does not tell the types of directory entries (d_type)"),
            "move the state root to another file system, or reformat this one: XFS with -n ftype=1, ext4 with -O filetype",
        ));
    }
    if let Ok(status) = statvfs(&real) {
        findings.extend(mount_options(root, &real, status.flags()));
        findings.push(free_space(&real, &status));
    }
    findings
}

fn mount_options(root: &Path, real: &Path, flags: FsFlags) -> Vec<Finding> {
    const CHECK: &str = "node.state-root";
    let shown = root.display();
    let mount_point = system::mount_point_of(real).unwrap_or_else(|| real.to_owned());
    let mount_point = shell_quote(&mount_point.to_string_lossy());
    let mut findings = Vec::new();
    if flags.contains(FsFlags::ST_RDONLY) {
        findings.push(Finding::problem(
            CHECK,
            format!("the file system of the state root {shown} is read-only: nothing can be pulled or started"),
            format!("see why (dmesg: a disk with errors is often mounted so), then mount -o remount,rw {mount_point}"),
        ));
    }
    let names = [(FsFlags::ST_NOEXEC, "noexec"), (FsFlags::ST_NOSUID, "nosuid"), (FsFlags::ST_NODEV, "nodev")];
    let set: Vec<&str> = names.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| name).collect();
    if !set.is_empty() {
        findings.push(Finding::warning(
            CHECK,
            format!(
                "the state root {shown} is mounted {}: containers cannot use such files that they make",
                set.join(", ")
            ),
            format!("mount it without: mount -o remount,exec,suid,dev {mount_point}"),
        ));
    }
    findings
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
    match safe_fs::inspect(path) {
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
            let action = match e {
                config::Error::Unreadable { .. } => "make it readable",
                config::Error::Syntax { .. } | config::Error::Value { .. } => "correct that line",
            };
            let option =
                arguments.config.as_ref().map(|file| format!(" --config {}", shell_quote(&file.to_string_lossy())));
            let option = option.unwrap_or_default();
            let remedy = format!("{action}; cvmfs-snapshotter{option} --check-config tells when it is good");
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
