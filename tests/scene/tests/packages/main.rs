//! The packages that `packaging/build.sh` made: what is in them, and what their installation does to
//! a node that works. `CVMFS_SNAPSHOTTER_PACKAGES` is the folder that they are in.

mod commands;
mod contents;
mod deb;
mod go;
mod node;
mod rpm;
mod strangers;
mod symlink_only;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use scene::process::{cache, run};
use scene::sandbox::Sandbox;

/// Where this program, and all others, were built.
fn target() -> PathBuf {
    let own = std::env::current_exe().expect("this program knows where it is");
    own.ancestors().nth(3).expect("it lies in a folder of a profile").to_owned()
}

fn folder() -> PathBuf {
    std::env::var_os("CVMFS_SNAPSHOTTER_PACKAGES").map_or_else(|| target().join("packages-dev"), PathBuf::from)
}

/// All packages in a folder whose names end so.
fn all(folder: &Path, end: &str) -> Vec<PathBuf> {
    let found = fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}: packages are made by make test, or make package", folder.display()));
    let paths = found.map(|entry| entry.expect("a folder can be read").path());
    paths.filter(|path| path.to_string_lossy().ends_with(end)).collect()
}

/// The package in a folder that is for this machine.
#[track_caller]
fn one(folder: &Path, end: &str) -> PathBuf {
    let mut found = all(folder, end);
    assert_eq!(found.len(), 1, "{end} in {}: {found:?}", folder.display());
    found.remove(0)
}

const DEB: &str = "_amd64.deb";
const RPM: &str = ".x86_64.rpm";

/// Packages of the same program with the next number; the result is their folder.
fn next(sandbox: &Sandbox) -> PathBuf {
    let unpacked = sandbox.path("unpacked");
    run("dpkg-deb", [Path::new("--extract"), &one(&folder(), DEB), &unpacked]).ok();
    let folder = sandbox.make_dir("next");
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/build.sh"))
        .env("PACKAGE_BINARY", unpacked.join("usr/bin/cvmfs-snapshotter"))
        .env("PACKAGE_RELEASE", "2")
        .env("PACKAGE_FOLDER", &folder)
        .env("CARGO_TARGET_DIR", target())
        .env("CVMFS_SNAPSHOTTER_CACHE", cache())
        .output()
        .expect("packages can be made");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder
}
