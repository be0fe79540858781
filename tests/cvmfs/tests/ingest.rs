//! The tree that ingest makes of a tar. `tests/scene/tests/publisher.rs` compares whole images with those of the real
//! publisher; these tests have the cases that do not occur there.

#![forbid(unsafe_code)]

mod fixture;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use cvmfs_testbed::ingest::{Ingest, Ownership};
use cvmfs_testbed::publisher::Settings;
use fixture::RepositoryFixture;
use tar::{Builder, EntryType, Header};

const BASE: &str = ".layers/ab/abcd/layerfs";

/// A tar of `(path, type, mode, owner, link target)`.
fn tar(entries: &[(&str, EntryType, u32, u32, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (path, kind, mode, owner, target) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_uid((*owner).into());
        header.set_gid((*owner + 1).into());
        header.set_mtime(1_500_000_000);
        header.set_size(0);
        if target.is_empty() {
            builder.append_data(&mut header, path, &b""[..])
        } else {
            builder.append_link(&mut header, path, target)
        }
        .expect("a tar can be written");
    }
    builder.into_inner().expect("a tar can be written")
}

fn layer() -> Vec<u8> {
    tar(&[
        ("./named/", EntryType::Directory, 0o2750, 1000, ""),
        ("./named/setuid", EntryType::Regular, 0o4755, 1000, ""),
        ("./named/link", EntryType::Symlink, 0o777, 1000, "/nowhere"),
        ("./un/named/same", EntryType::Link, 0o644, 7, "./named/setuid"),
        // Only now its parent is named.
        ("./late/file", EntryType::Regular, 0o600, 7, ""),
        ("./late/", EntryType::Directory, 0o1777, 7, ""),
    ])
}

/// Type and mode, owner, and whether the time is that of the tar.
fn mode_owner_and_time(layer: &Path, path: &str) -> (u32, (u32, u32), bool) {
    let found = layer.join(path).symlink_metadata().unwrap_or_else(|error| panic!("look at {path}: {error}"));
    (found.mode(), (found.uid(), found.gid()), found.mtime() == 1_500_000_000)
}

#[test]
fn root_ingest_keeping_owners_gives_implicit_directories_to_uid_minus_one() {
    let mut stage = RepositoryFixture::with(Settings::default());
    let ingest = Ingest { owner: (991, 990), ownership: Ownership::Kept, auto_catalogs: None };
    ingest.unpack(layer().as_slice(), &stage.source(), Path::new(BASE));
    stage.publish();
    let mount = stage.mount("mount", &[]);
    let layer = mount.mountpoint().join(BASE);
    // The kernel shows the owner -1, which no file can have, as this number.
    let overflow = fs::read_to_string("/proc/sys/kernel/overflowuid").expect("the kernel has a number for that");
    let nobody = overflow.trim().parse().map(|id| (id, id)).expect("the kernel's number is one");
    assert_eq!(mode_owner_and_time(&layer, "named/setuid"), (0o104_755, (1000, 1001), true));
    assert_eq!(mode_owner_and_time(&layer, "named/link"), (0o120_777, (1000, 1001), true));
    assert_eq!(mode_owner_and_time(&layer, "un/named/same"), (0o104_755, (1000, 1001), true));
    assert_eq!(mode_owner_and_time(&layer, "named"), (0o042_750, (991, 990), true));
    assert_eq!(mode_owner_and_time(&layer, "late"), (0o041_777, (991, 990), true));
    assert_eq!(mode_owner_and_time(&layer, ".cvmfscatalog"), (0o100_664, (991, 990), false));
    for invented in ["un", "un/named", "", "../../../ab"] {
        assert_eq!(mode_owner_and_time(&layer, invented), (0o040_755, nobody, false), "{invented}");
    }
}

#[test]
fn root_ingest_takes_top_directory_from_tar_that_names_it() {
    let stage = RepositoryFixture::new();
    let entries = [("./", EntryType::Directory, 0o711, 7, ""), ("./file", EntryType::Regular, 0o644, 7, "")];
    let ingest = Ingest { owner: (991, 990), ..Ingest::default() };
    ingest.unpack(tar(&entries).as_slice(), &stage.source(), Path::new(BASE));
    let layer = stage.source().join(BASE);
    assert_eq!(mode_owner_and_time(&layer, ""), (0o040_711, (991, 990), true));
    assert_eq!(mode_owner_and_time(&layer, "file"), (0o100_644, (991, 990), true));
    assert_eq!(mode_owner_and_time(&layer, ".."), (0o040_755, (991, 990), false));
}

#[test]
#[should_panic(expected = "its target \".layers/ab/abcd/layerfs/other\" is not in the same layer")]
fn root_ingest_fails_on_hard_link_into_another_layer() {
    let stage = RepositoryFixture::new();
    let entries = [("link", EntryType::Link, 0o644, 0, "other")];
    Ingest::default().unpack(tar(&entries).as_slice(), &stage.source(), Path::new(BASE));
}

#[test]
fn root_ingest_of_empty_layer_makes_directory_with_marker() {
    let stage = RepositoryFixture::new();
    Ingest::default().unpack(tar(&[]).as_slice(), &stage.source(), Path::new(BASE));
    let names: Vec<_> = fs::read_dir(stage.source().join(BASE)).expect("the layer is there").flatten().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(names[0].file_name(), ".cvmfscatalog");
}
