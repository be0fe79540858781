//! Tests of the packages that `packaging/build.sh` made: their contents, and the effects of an installation on a node
//! that works. They lie in the directory `CVMFS_SNAPSHOTTER_PACKAGES`.

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

/// The directory in which this program and all others were built.
fn target() -> PathBuf {
    let own = std::env::current_exe().expect("this program knows where it is");
    own.ancestors().nth(3).expect("it lies in a folder of a profile").to_owned()
}

fn folder() -> PathBuf {
    std::env::var_os("CVMFS_SNAPSHOTTER_PACKAGES").map_or_else(|| target().join("packages-dev"), PathBuf::from)
}

/// All packages in a directory whose names have this end.
fn find_packages(folder: &Path, end: &str) -> Vec<PathBuf> {
    let found = fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}: packages are made by make test, or make package", folder.display()));
    let paths = found.map(|entry| entry.expect("a folder can be read").path());
    paths.filter(|path| path.to_string_lossy().ends_with(end)).collect()
}

/// The package in a directory that is for this architecture.
#[track_caller]
fn find_package(folder: &Path, end: &str) -> PathBuf {
    let mut found = find_packages(folder, end);
    assert_eq!(found.len(), 1, "{end} in {}: {found:?}", folder.display());
    found.remove(0)
}

const DEB: &str = "_amd64.deb";
const RPM: &str = ".x86_64.rpm";

/// Builds packages of the same program with the next version. The result is their directory.
fn next(sandbox: &Sandbox) -> PathBuf {
    let unpacked = sandbox.path("unpacked");
    run("dpkg-deb", [Path::new("--extract"), &find_package(&folder(), DEB), &unpacked]).ok();
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
