//! The second reader of the format, which we did not write, on what our publisher writes.

#![forbid(unsafe_code)]
#![cfg(feature = "cvmfs-crate")]

mod fixture;

use std::fs;
use std::io::ErrorKind;
use std::thread;

use fixture::{Detail, RepositoryFixture, assert_equal, assert_same, list_tree, plain_tree, write};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const CRATE: [&str; 2] = ["--backend", "crate"];

#[test]
fn root_cvmfs_crate_reads_our_repositories() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let mount = stage.mount("mount", &CRATE);
    assert_same(&stage.source(), mount.mountpoint(), Detail::Plain);
    let attribute = |name| xattr::get(mount.mountpoint(), name).expect("the root answers");
    assert_eq!(attribute("user.fqrn").as_deref(), Some(fixture::FQRN.as_bytes()));
    assert_eq!(attribute("user.unknown"), None);
    for missing in ["missing", "layers/one/inner/missing"] {
        let error = mount.mountpoint().join(missing).metadata().expect_err("nobody published that");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{missing}");
    }
}

#[test]
fn root_cvmfs_crate_mount_works_as_lower_layer() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source().join("top"));
    write(&stage.source().join("bottom/home/user/other"), "seen through");
    stage.publish();
    let lower = stage.mount("mount", &["--backend", "crate", "--name-length", "0"]);
    let dir = stage.dir.path();
    for name in ["upper", "work", "merged"] {
        fs::create_dir(dir.join(name)).expect("a directory can be made");
    }
    let (root, dir) = (lower.mountpoint().display(), dir.display());
    let options = format!("lowerdir={root}/top:{root}/bottom,upperdir={dir}/upper,workdir={dir}/work");
    let merged = stage.dir.path().join("merged");
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .expect("the mount is good enough for overlayfs");
    assert_eq!(fs::read(merged.join("hello")).expect("the upper layer shows"), b"hello\n");
    assert_eq!(fs::read(merged.join("home/user/other")).expect("the lower layer shows"), b"seen through");
    fs::write(merged.join("hello"), "copied up").expect("a file can be written");
    assert!(!merged.join("missing").exists());
    umount2(&merged, MntFlags::MNT_DETACH).expect("the overlay can be unmounted");
}

#[test]
fn root_cvmfs_crate_serves_four_concurrent_cold_readers_twenty_times() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let expected = list_tree(&stage.source(), Detail::Plain);
    for _ in 0..20 {
        let mount = stage.mount("mount", &CRATE);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_equal(&expected, &list_tree(mount.mountpoint(), Detail::Plain)));
            }
        });
    }
}

#[test]
fn root_reopened_cvmfs_crate_sees_new_revision() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let mut mount = stage.mount("mount", &CRATE);
    assert_same(&stage.source(), mount.mountpoint(), Detail::Plain);
    write(&stage.source().join("hello"), "another text");
    write(&stage.source().join("layers/one/new"), "a new file");
    stage.publish();
    assert_eq!(mount.command("reload"), "ok 2");
    assert_same(&stage.source(), mount.mountpoint(), Detail::Plain);
}
