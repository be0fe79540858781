//! The node without anybody's help: kernel, state root, our configuration.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::service::Asked;
use super::{Finding, Findings, State, reach};
use crate::admin::table::size;
use crate::cli::Arguments;
use crate::config::{self, Config, LoadedConfig};
use crate::model::shell_quote;
use crate::system;

/// A state root with less room than one part in so many is told.
const LITTLE_ROOM: u64 = 20;
/// Keys of containerd's own configuration, which old documentation had in this file.
const CONTAINERDS: [&str; 5] = ["version", "plugins", "proxy_plugins", "root", "state"];

/// The result is the configuration, if there is one that can be used.
pub fn look(arguments: &Arguments, asked: &Asked, findings: &mut Findings<'_>) -> Option<Config> {
    findings.push(overlayfs());
    let of_root = state_root(&arguments.root);
    // A daemon that runs has one: where it is by now is found out later.
    findings.extend(of_root.into_iter().filter(|one| asked.is_err() || one.state != State::Note));
    let (about_file, config) = configuration(arguments);
    findings.extend(about_file);
    config
}

fn overlayfs() -> Finding {
    const CHECK: &str = "node.overlayfs";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let is_loaded =
        fs::read_to_string("/proc/filesystems").is_ok_and(|all| all.lines().any(|line| line.ends_with("\toverlay")));
    let module = format!("/lib/modules/{release}/kernel/fs/overlayfs");
    if is_loaded {
        Finding::good(CHECK, format!("the kernel, {release}, has overlayfs"))
    } else if Path::new(&module).exists() {
        Finding::note(
            CHECK,
            format!("overlayfs is a module of the kernel, {release}, that the first container will load"),
        )
    } else {
        Finding::problem(
            CHECK,
            format!("the kernel, {release}, does not know overlayfs, and {module} is missing"),
            "modprobe overlay; if that fails, boot the kernel whose modules are installed",
        )
    }
}

fn state_root(root: &Path) -> Vec<Finding> {
    const CHECK: &str = "node.state-root";
    let shown = root.display();
    let real = match reach::touch(root).and_then(|_| root.canonicalize()) {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let what = format!("the state root {shown} is not there yet: the first start makes it");
            return vec![Finding::note(CHECK, what)];
        }
        Err(e) => {
            return vec![Finding::problem(
                CHECK,
                format!("the state root {shown} cannot be looked at: {e}"),
                "see what is mounted there (findmnt) and why it does not answer (dmesg); no container starts before it does",
            )];
        }
    };
    let mut findings = Vec::new();
    if let Ok(found) = statfs(&real) {
        let bad =
            [(NFS_SUPER_MAGIC, "NFS"), (OVERLAYFS_SUPER_MAGIC, "an overlay"), (FUSE_SUPER_MAGIC, "a FUSE file system")];
        let kind = |(magic, name): (FsType, &'static str)| (found.filesystem_type() == magic).then_some(name);
        if let Some(name) = bad.into_iter().find_map(kind) {
            findings.push(Finding::problem(
                CHECK,
                format!("the state root {shown} is on {name}: overlayfs cannot write there"),
                "put the state root on a local disk (--root)",
            ));
        }
    }
    let is_empty = fs::read_dir(&real).is_ok_and(|mut entries| entries.next().is_none());
    if !is_empty && matches!(system::supports_d_type(&real), Ok(false)) {
        findings.push(Finding::problem(
            CHECK,
            format!("the file system of {shown} does not tell the types of directory entries (d_type)"),
            "put the state root on another one, or make it anew: XFS with -n ftype=1, ext4 with -O filetype",
        ));
    }
    if let Ok(found) = statvfs(&real) {
        if found.flags().contains(FsFlags::ST_RDONLY) {
            findings.push(Finding::problem(
                CHECK,
                format!("the file system of the state root {shown} is read-only: nothing can be pulled or started"),
                format!(
                    "see why (dmesg: a disk with errors is often mounted so), then mount -o remount,rw {}",
                    mount_point(&real)
                ),
            ));
        }
        let flags = [(FsFlags::ST_NOEXEC, "noexec"), (FsFlags::ST_NOSUID, "nosuid"), (FsFlags::ST_NODEV, "nodev")];
        let set: Vec<&str> =
            flags.into_iter().filter(|(flag, _)| found.flags().contains(*flag)).map(|(_, name)| name).collect();
        if !set.is_empty() {
            findings.push(Finding::warning(
                CHECK,
                format!("the state root {shown} is mounted {}: so is what containers install and make", set.join(", ")),
                format!("mount it without: mount -o remount,exec,suid,dev {}", mount_point(&real)),
            ));
        }
        findings.push(room(&real, &found));
    }
    findings
}

fn room(root: &Path, found: &nix::sys::statvfs::Statvfs) -> Finding {
    const CHECK: &str = "node.disk";
    let (free, all) = (found.blocks_available() * found.fragment_size(), found.blocks() * found.fragment_size());
    let (free_files, files) = (found.files_available(), found.files());
    let is_full = free < all / LITTLE_ROOM || (files > 0 && free_files < files / LITTLE_ROOM);
    let said =
        format!("{} of {} and {free_files} of {files} inodes are free for {}", size(free), size(all), root.display());
    let remedy = "see what takes it: cvmfs-snapshotter status; remove images and containers, then cvmfs-snapshotter gc";
    if free == 0 || (files > 0 && free_files == 0) {
        Finding::problem(CHECK, format!("{said}: nothing can be pulled or started"), remedy)
    } else if is_full {
        Finding::warning(CHECK, said, remedy)
    } else {
        Finding::good(CHECK, said)
    }
}

/// That of a real path, as the shell takes it.
fn mount_point(path: &Path) -> String {
    shell_quote(&system::mount_point_of(path).unwrap_or_else(|| path.to_owned()).to_string_lossy())
}

/// As the daemon reads it, but for a file that hangs.
pub fn load(arguments: &Arguments) -> Result<LoadedConfig, config::Error> {
    let path = arguments.config_file();
    match reach::touch(path) {
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
            let what = match e {
                config::Error::Unreadable { .. } => "see to it that it can be read",
                config::Error::Syntax { .. } | config::Error::Value { .. } => "correct that line",
            };
            let named = match &arguments.config {
                Some(file) => format!(" --config {}", shell_quote(&file.to_string_lossy())),
                None => String::new(),
            };
            let remedy = format!("{what}; cvmfs-snapshotter{named} --check-config tells when it is good");
            return (vec![Finding::problem(CHECK, e.to_string(), remedy)], None);
        }
    };
    let mut findings: Vec<Finding> = unknown
        .iter()
        .map(|unknown| {
            let remedy = if CONTAINERDS.contains(&unknown.key.as_str()) {
                "it is one of containerd's: move it to /etc/containerd/config.toml"
            } else {
                "remove it or correct its spelling"
            };
            Finding::warning(CHECK, format!("{file}, {unknown}"), remedy)
        })
        .collect();
    if findings.is_empty() {
        let is_there = if path.exists() { "is good" } else { "is not there: the defaults hold" };
        findings.push(Finding::good(CHECK, format!("{file} {is_there}")));
    }
    (findings, Some(config))
}
