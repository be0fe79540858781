//! The mount as a lower layer of overlayfs, which is what the repository is mounted for.

#![forbid(unsafe_code)]

mod fixture;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use cvmfs_testbed::client::Mount;
use fixture::{RepositoryFixture, odd_tree, plain_tree, write};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

struct Overlay<'a>(&'a Path);

impl<'a> Overlay<'a> {
    fn mount(at: &'a Path, options: &str) -> Self {
        fs::create_dir_all(at).expect("a mountpoint can be made");
        mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(options))
            .unwrap_or_else(|error| panic!("mount an overlay with {options}: {error}"));
        Self(at)
    }
}

impl Drop for Overlay<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("list {dir:?}: {error}"));
    entries.map(|entry| entry.expect("a listing ends").file_name().to_string_lossy().into_owned()).collect()
}

fn two_layers(options: &[&str]) -> (RepositoryFixture, Mount) {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source().join("top"));
    odd_tree(&stage.source().join("top"));
    write(&stage.source().join("bottom/hello"), "hidden by the layer above");
    write(&stage.source().join("bottom/home/user/other"), "seen through");
    stage.publish();
    let mount = stage.mount("mount", options);
    (stage, mount)
}

#[test]
fn root_container_can_write_on_overlay_over_the_mount() {
    let (stage, mount) = two_layers(&["--name-length", "0"]);
    let dir = stage.dir.path();
    for name in ["upper", "work"] {
        fs::create_dir(dir.join(name)).expect("a directory can be made");
    }
    let root = mount.mountpoint().display().to_string();
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    let options = format!("lowerdir={root}/top:{root}/bottom,upperdir={},workdir={}", upper.display(), work.display());
    let merged = dir.join("merged");
    let overlay = Overlay::mount(&merged, &options);
    let read = |path: &str| fs::read(merged.join(path)).unwrap_or_else(|error| panic!("read {path}: {error}"));
    assert_eq!(read("hello"), b"hello\n");
    assert_eq!(read("home/user/other"), b"seen through");
    assert_eq!(names(&merged.join("home/user")), ["file", "other"].map(str::to_owned).into());
    assert_eq!(names(&merged.join("many")).len(), 600);
    assert_eq!(fs::read(merged.join("missing")).map_err(|error| error.raw_os_error()), Err(Some(Errno::ENOENT as i32)));
    // The 0:0 device of the source is a whiteout here; it is not listed as anything else.
    assert!(!merged.join("whiteout").exists());

    // Copied up, with its attributes.
    let mut file = OpenOptions::new().append(true).open(merged.join("attributes")).expect("a file can be opened");
    file.write_all(b" more").expect("a file can be written");
    drop(file);
    assert_eq!(read("attributes"), b"with some more");
    assert_eq!(
        xattr::get(upper.join("attributes"), "user.text").expect("the copy answers").as_deref(),
        Some(&b"a value"[..])
    );
    fs::remove_file(merged.join("large")).expect("a file can be removed");
    assert!(!merged.join("large").exists());
    fs::rename(merged.join("home/user/file"), merged.join("moved")).expect("a file can be moved");
    assert_eq!(read("moved"), b"mine");
    drop(overlay);
}

/// Overlayfs takes the greatest name length of its layers. With the real client's 0 on every one
/// it lists and then refuses every name; one local directory mends that.
#[test]
fn root_view_of_two_layers_needs_local_third_layer_when_name_length_is_0() {
    let (stage, mount) = two_layers(&["--name-length", "0"]);
    let root = mount.mountpoint().display().to_string();
    let merged = stage.dir.path().join("merged");
    let overlay = Overlay::mount(&merged, &format!("lowerdir={root}/top:{root}/bottom"));
    assert!(names(&merged).contains("hello"));
    let error = fs::read(merged.join("hello")).expect_err("a name is too long for 0 bytes");
    assert_eq!(error.raw_os_error(), Some(Errno::ENAMETOOLONG as i32));
    drop(overlay);

    let local = stage.dir.path().join("local");
    fs::create_dir(&local).expect("a directory can be made");
    let _overlay = Overlay::mount(&merged, &format!("lowerdir={root}/top:{root}/bottom:{}", local.display()));
    assert_eq!(fs::read(merged.join("hello")).expect("the upper layer wins"), b"hello\n");
    assert_eq!(fs::read(merged.join("home/user/other")).expect("the lower layer shows"), b"seen through");
    assert_eq!(names(&merged.join("home/user")), ["file", "other"].map(str::to_owned).into());
}

#[test]
fn root_view_of_two_layers_works_with_usual_name_length() {
    let (stage, mount) = two_layers(&[]);
    let root = mount.mountpoint().display().to_string();
    let merged = stage.dir.path().join("merged");
    let _overlay = Overlay::mount(&merged, &format!("lowerdir={root}/top:{root}/bottom"));
    assert_eq!(fs::read(merged.join("hello")).expect("the upper layer wins"), b"hello\n");
}
