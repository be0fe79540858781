//! The publisher and our own reader against each other and against the source tree, on a real
//! mount.

#![forbid(unsafe_code)]

mod fixture;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::thread;
use std::time::Instant;

use cvmfs_testbed::publisher::Settings;
use fixture::{Detail, RepositoryFixture, assert_equal, assert_same, list_tree, noise, odd_tree, plain_tree, write};
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

#[test]
fn root_mounted_repository_equals_its_source() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    odd_tree(&stage.source());
    assert_eq!(stage.publish(), 1);
    let mount = stage.mount("mount", &[]);
    assert_same(&stage.source(), mount.mountpoint(), Detail::Everything);
    let links = mount.mountpoint().join("links/z").metadata().expect("a linked file is there").nlink();
    assert_eq!(links, 3);
    // A second look comes from the kernel's caches and from ours.
    assert_same(&stage.source(), mount.mountpoint(), Detail::Everything);
}

#[test]
fn root_mount_attributes_equal_those_of_the_real_client() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let mount = stage.mount("mount", &["--name-length", "0"]);
    let root = mount.mountpoint();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("a thread sees its mounts");
    let line = mounts.lines().find(|line| line.contains(root.to_str().expect("the path is ASCII")));
    let line = line.expect("the mount is visible in this thread's namespace");
    for part in [" ro,nosuid,nodev,", " fuse cvmfs2 ", "default_permissions,allow_other"] {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
    assert_eq!(statvfs(root).expect("statfs is answered").name_max(), 0);
    let attribute = |name| xattr::get(root, name).expect("the root answers");
    assert_eq!(attribute("user.fqrn").as_deref(), Some(fixture::FQRN.as_bytes()));
    assert_eq!(attribute("user.revision").as_deref(), Some(&b"1"[..]));
    // The crate xattr turns ENODATA, and only that, into None.
    assert_eq!(attribute("user.unknown"), None);
}

#[test]
fn root_four_concurrent_cold_readers_see_the_source() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    odd_tree(&stage.source());
    stage.publish();
    let expected = list_tree(&stage.source(), Detail::Everything);
    for _ in 0..3 {
        let mount = stage.mount("mount", &[]);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_equal(&expected, &list_tree(mount.mountpoint(), Detail::Everything)));
            }
        });
    }
}

#[test]
fn root_publisher_omits_hard_links_xattrs_and_nanoseconds_by_default() {
    let mut stage = RepositoryFixture::with(Settings::default());
    plain_tree(&stage.source());
    odd_tree(&stage.source());
    stage.publish();
    let mount = stage.mount("mount", &[]);
    let mut expected = list_tree(&stage.source(), Detail::Everything);
    assert!(expected.entries.values().any(|entry| entry.contains_key("links") && entry["nanoseconds"] != "0"));
    assert!(expected.entries.values().any(|entry| entry.contains_key("xattrs")));
    expected.leave_out("links");
    expected.leave_out("xattrs");
    expected.entries.values_mut().for_each(|entry| drop(entry.insert("nanoseconds", "0".to_owned())));
    assert_equal(&expected, &list_tree(mount.mountpoint(), Detail::Everything));
}

#[test]
fn root_reload_shows_additions_changes_and_removals_of_a_revision() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    odd_tree(&stage.source());
    stage.publish();
    let mut mount = stage.mount("mount", &[]);
    let (source, root) = (stage.source(), mount.mountpoint().to_owned());
    assert_same(&source, &root, Detail::Everything);
    let inode = root.join("hello").metadata().expect("the file is there").ino();
    let open = fs::File::open(root.join("layers/two/dir0/file0")).expect("the file opens");

    fs::remove_dir_all(source.join("layers/two")).expect("a directory can be removed");
    fs::remove_file(source.join("links/a")).expect("a link can be removed");
    fs::remove_file(source.join("empty")).expect("a file can be removed");
    symlink("hello", source.join("empty")).expect("a link can be made");
    write(&source.join("hello"), "another text");
    write(&source.join("layers/three/.cvmfscatalog"), "");
    write(&source.join("layers/three/new"), noise(99, 100_000));
    assert_eq!(mount.command("reload"), "ok 1", "nothing is published yet");
    assert_eq!(stage.publish(), 2);
    assert_eq!(fs::read(root.join("hello")).expect("the old revision is served until reload"), b"hello\n");
    assert_eq!(mount.command("reload"), "ok 2");
    assert_same(&source, &root, Detail::Everything);
    assert_eq!(root.join("hello").metadata().expect("the file is there").ino(), inode);
    assert_eq!(open.metadata().map_err(|error| error.raw_os_error()).err(), Some(Some(Errno::ENOENT as i32)));
    assert_eq!(xattr::get(&root, "user.revision").expect("the root answers").as_deref(), Some(&b"2"[..]));
}

#[test]
fn root_further_revision_writes_only_changed_objects() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let mut mount = stage.mount("mount", &[]);
    assert_same(&stage.source(), mount.mountpoint(), Detail::Everything);
    write(&stage.source().join("hello"), "another text");
    stage.publish();
    let before = stage.web.requests();
    assert_eq!(mount.command("reload"), "ok 2");
    assert_same(&stage.source(), mount.mountpoint(), Detail::Everything);
    // Manifest, root catalog and one file.
    assert_eq!(stage.web.requests() - before, 3);
}

/// They say how the publisher's disk is stacked, and would hide files below another overlay.
#[test]
fn root_overlayfs_attributes_are_not_published() {
    let mut stage = RepositoryFixture::new();
    let dir = stage.source().join("dir");
    write(&dir.join("file"), "text");
    for (name, value) in [("trusted.overlay.opaque", &b"y"[..]), ("user.kept", b"yes")] {
        xattr::set(&dir, name, value).expect("the temporary directory keeps attributes");
    }
    stage.publish();
    let mount = stage.mount("mount", &[]);
    let names = xattr::list(mount.mountpoint().join("dir")).expect("the directory answers");
    assert_eq!(names.collect::<Vec<_>>(), ["user.kept"]);
}

#[test]
fn root_nested_catalogs_are_fetched_on_demand() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let mount = stage.mount("mount", &[]);
    let before = stage.web.requests();
    mount.mountpoint().join("layers/one").metadata().expect("the directory of a nested catalog is there");
    assert_eq!(stage.web.requests(), before);
    mount.mountpoint().join("layers/one/inner/dir0").metadata().expect("a directory in it is there");
    assert_eq!(stage.web.requests(), before + 2);
}

/// Many requests for one object: one download.
#[test]
fn root_object_is_fetched_once() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let mount = stage.mount("mount", &[]);
    let before = stage.web.requests();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| fs::read(mount.mountpoint().join("large")).expect("the file can be read"));
        }
    });
    assert_eq!(stage.web.requests(), before + 1);
}

#[test]
fn root_dead_server_fails_only_uncached_reads() {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    stage.publish();
    let mount = stage.mount("mount", &[]);
    let read = |path: &str| fs::read(mount.mountpoint().join(path)).map_err(|error| error.raw_os_error());
    assert_eq!(read("hello"), Ok(b"hello\n".to_vec()));
    let port = stage.web.port();
    drop(stage.web);
    let begin = Instant::now();
    assert_eq!(read("home/user/file"), Err(Some(Errno::EIO as i32)));
    assert_eq!(read("hello"), Ok(b"hello\n".to_vec()));
    assert!(begin.elapsed().as_secs() < 5, "the answer took {:?}", begin.elapsed());
    let _web = cvmfs_testbed::web::Web::start_at(stage.publisher.dir(), port);
    assert_eq!(read("home/user/file"), Ok(b"mine".to_vec()));
}

/// Bytes that do not have their name are not handed out.
#[test]
fn root_forged_object_is_refused() {
    let mut stage = RepositoryFixture::new();
    write(&stage.source().join("file"), "true");
    stage.publish();
    let data = stage.publisher.dir().join("data");
    let objects = fs::read_dir(data).expect("there is a store").flat_map(|bucket| {
        fs::read_dir(bucket.expect("the store can be listed").path()).expect("a bucket can be listed")
    });
    for object in objects {
        let path = object.expect("a bucket can be listed").path();
        if path.to_str().is_some_and(|path| !path.ends_with(['C', 'H', 'X'])) {
            fs::write(path, "forged").expect("an object can be overwritten");
        }
    }
    let mount = stage.mount("mount", &[]);
    let error = fs::read(mount.mountpoint().join("file")).expect_err("a forged object cannot be read");
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
}
