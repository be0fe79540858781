//! The repositories of `tests/data/real-repositories`, which the real publisher made.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::listing::Listing;

/// The repository that root owns.
pub const ROOT: &str = "root.fixture.example";
/// The repository that uid 995 owns, with markers of automatic catalogs.
pub const LOST: &str = "lost.fixture.example";

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/real-repositories").join(name)
}

/// Unpacks what a web server serves of the repository `fqrn` below `dir`; returns the directory to serve.
pub fn unpack_repository(fqrn: &str, dir: &Path) -> PathBuf {
    unpack(&format!("{fqrn}.tar.xz"), dir);
    dir.join(fqrn)
}

/// Unpacks the images below `dir`; returns the directory of their OCI layout.
pub fn unpack_images(dir: &Path) -> PathBuf {
    unpack("images.oci.tar.xz", dir);
    dir.join("oci")
}

fn unpack(archive: &str, dir: &Path) {
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--xz", "--no-same-owner", "--file"]).arg(path(archive)).arg("--directory").arg(dir);
    let status = tar.status().expect("the program tar is there (Debian package tar)");
    assert!(status.success(), "tar cannot unpack {archive}; it needs xz (Debian package xz-utils)");
}

/// The listing of the repository `fqrn` in a mount of the real client.
pub fn listing(fqrn: &str) -> Listing {
    let name = fqrn.split('.').next().expect("a name has a first part");
    read(&format!("{name}.listing.json.xz"))
}

/// The listing of a normal pull of the image.
pub fn expected(image: &str) -> Listing {
    read(&format!("{image}.expected.json.xz"))
}

fn read(name: &str) -> Listing {
    let xz = Command::new("xz").args(["--decompress", "--stdout"]).arg(path(name)).output();
    let xz = xz.expect("the program xz is there (Debian package xz-utils)");
    assert!(xz.status.success(), "xz cannot read {name}: {}", String::from_utf8_lossy(&xz.stderr));
    Listing::parse(&xz.stdout)
}
