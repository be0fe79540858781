//! Promise 1, the right files: what a container sees through us equals what it sees after a
//! normal pull, for layers that are published, not published, and mixed.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::stat::SFlag;
use scene::e2e_fixture::E2eFixture;
use scene::image::{Blob, Image, Layer, LayerDir};
use scene::publisher::{Ingest, Ownership, Repository, Settings};

/// Ends a chain of calls that fill a layer, so that closures return nothing.
fn finish(_: &LayerDir) {}

fn all_layers(image: &Image) -> Vec<&Blob> {
    image.layers.iter().collect()
}

/// Directories and files that the layers above delete and replace.
fn lower(l: &LayerDir) {
    for dir in ["data", "opaque", "opaque/inner", "gone", "gone/deep", "swapped", "etc/app", "odd", "kept"] {
        l.dir(dir);
    }
    for file in [
        "data/secret",
        "data/visible",
        "opaque/old",
        "opaque/inner/old",
        "gone/deep/file",
        "swapped/file",
        "etc/app/a",
        "etc/app/b",
        "again",
        "both",
        "as-dir",
        "kept/x",
    ] {
        l.file(file, format!("lower {file}"));
    }
    for name in odd_names() {
        l.file(std::path::Path::new("odd").join(std::ffi::OsStr::from_bytes(&name)), "odd");
    }
    l.mode("opaque", 0o750).owner("opaque", 12, 34).mode("data", 0o711).owner("gone", 5, 6);
}

/// Names with spaces, with a line break, without UTF-8, and the longest name that a marker can have.
fn odd_names() -> Vec<Vec<u8>> {
    vec![
        b"two words".to_vec(),
        b"line\nbreak".to_vec(),
        b"\xff\xfe".to_vec(),
        b"colon:comma,back\\slash".to_vec(),
        vec![b'n'; 251],
    ]
}

fn upper(l: &LayerDir) {
    l.delete("data/secret").file("data/new", "upper");
    l.dir("opaque").opaque("opaque").file("opaque/new", "upper").mode("opaque", 0o701).owner("opaque", 78, 90);
    l.delete("gone");
    l.delete("swapped").file("etc/app/a", "replaced").mode("etc/app/a", 0o4755);
    // The entry is deleted and created in the same layer.
    l.delete("both").file("both", "made anew");
    l.file("as-dir/now", "a directory where a file was");
    for name in odd_names() {
        l.delete(std::path::Path::new("odd").join(std::ffi::OsStr::from_bytes(&name)));
    }
    // The entry is in a directory that only this layer has.
    l.dir("own").delete("own/never").file("own/file", "x");
}

/// Makes the entries of images that are not plain files.
fn add_special_entries(l: &LayerDir) {
    l.file("s/setuid", "#!").mode("s/setuid", 0o4711).owner("s/setuid", 0, 7);
    l.file("s/hard", "linked").hard_link("s/hard", "s/hard2").hard_link("s/hard", "s/\u{e9}hard3");
    l.symlink("../nowhere", "s/dangling").symlink("/etc", "s/absolute");
    l.file("s/attr", "x").xattr("s/attr", "user.note", b"a\0b").xattr("s/attr", "security.capability", CAP_NET_RAW);
    l.dir("s/dir").mode("s/dir", 0o2775).owner("s/dir", 1000, 1001).xattr("s/dir", "user.on", b"dir");
    l.node("s/fifo", SFlag::S_IFIFO, 0).node("s/null", SFlag::S_IFCHR, 0x103).node("s/loop", SFlag::S_IFBLK, 0x700);
    l.file("s/empty", "").file("s/big", vec![7; 3 << 20]).mode("s/empty", 0);
}

const CAP_NET_RAW: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An image of everything above.
fn everything(stage: &E2eFixture) -> Image {
    let b = &stage.builder;
    let layers = [stage.base_layer(), b.layer(lower), b.layer(add_special_entries), b.layer(upper)];
    b.image("all:1", &layers, &[])
}

/// Ingest kept the owners of files.
fn with_owners(dir: &Path) -> Repository {
    let ingest = Ingest { ownership: Ownership::Kept, ..Ingest::default() };
    Repository::mounted_with(dir, Settings { ingest, ..Settings::default() })
}

#[test]
fn root_published_layers_equal_a_normal_pull() {
    let without_losses: fn(&Path) -> Repository = |dir| Repository::mounted_with(dir, Settings::without_losses());
    let [mounted, plain]: [fn(&Path) -> Repository; 2] = [Repository::mounted, Repository::plain];
    for (attach, publishers) in [("bind", [mounted, without_losses]), ("symlink", [with_owners, plain])] {
        for publisher in publishers {
            let stage = E2eFixture::start_with_repository("published", &format!("attach = \"{attach}\""), publisher);
            let image = everything(&stage);
            stage.assert_same(&image, &all_layers(&image));
            assert!(!stage.snapshotter.log().contains("error"), "{}", stage.snapshotter.log());
            assert!(!stage.snapshotter.log().contains("owners are lost"), "{}", stage.snapshotter.log());
        }
    }
}

/// The publisher gives all files to one user. The snapshotter cannot restore owners, but must tell the administrator of
/// the site.
#[test]
fn root_lost_owners_are_logged_once() {
    let ingest = Ingest { owner: (991, 990), ..Ingest::default() };
    let lost = |dir: &Path| Repository::mounted_with(dir, Settings { ingest, ..Settings::default() });
    let stage = E2eFixture::start_with_repository("owners", "", lost);
    for n in 0..2 {
        let b = &stage.builder;
        let mark = |l: &LayerDir| finish(l.file("n", n.to_string()).file("etc/n", "x"));
        let image = b.image(
            &format!("all:{n}"),
            &[b.layer(mark), b.layer(lower), b.layer(add_special_entries), b.layer(upper)],
            &[],
        );
        stage.assert_same(&image, &all_layers(&image));
    }
    let log = stage.snapshotter.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("owners are lost")).collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    for part in ["scene.test", "991", "990", "CVMFS_UID_MAP", "CVMFS_GID_MAP"] {
        assert!(lines[0].contains(part), "{part} is missing in {}", lines[0]);
    }
}

/// The crate `cvmfs` reads the repository. What it cannot show is left out of the image:
/// devices, attributes, hard links, names that are not UTF-8, parts of seconds.
#[test]
fn root_independent_cvmfs_client_shows_the_same_files() {
    let theirs = |dir: &Path| Repository::mounted_with(dir, Settings::with_client(&["--backend", "crate"]));
    let stage = E2eFixture::start_with_repository("theirs", "", theirs);
    let b = &stage.builder;
    let layers = [
        b.layer(|l| {
            l.file("data/secret", "x").file("data/visible", "x").file("opaque/old", "x").file("was/dir/file", "x");
            l.file("owned", "x").owner("owned", 12, 34).mode("owned", 0o4755).symlink("nowhere", "link");
            finish(l.file("big", vec![7; 3 << 20]).dir("sticky").mode("sticky", 0o1777).whole_seconds());
        }),
        b.layer(|l| {
            l.delete("data/secret").dir("opaque").opaque("opaque").file("opaque/new", "x").delete("was");
            finish(l.file("was", "a file").file("data/more", "x").whole_seconds());
        }),
    ];
    let image = b.image("theirs:1", &layers, &[]);
    stage.registry.push(&image);
    stage.repository.publish(&image);
    // This client does not load new revisions.
    stage.repository.mount();
    stage.assert_same(&image, &all_layers(&image));
    let log = stage.snapshotter.log();
    // A start may log warnings about the client; no call may.
    let is_of_client = |line: &&str| line.contains("\"repository\":") && !line.contains("\"digest\":");
    let odd: Vec<&str> = log.lines().filter(|line| line.contains("warning") || line.contains("error")).collect();
    assert!(odd.iter().all(is_of_client), "{odd:?}");
}

#[test]
fn root_whiteouts_apply_across_local_and_published_layers() {
    let stage = E2eFixture::start("mixed", "");
    let b = &stage.builder;
    // Every subset of the three upper layers is published once.
    for subset in 0..8_usize {
        let mark = |l: &LayerDir| {
            l.file("subset", subset.to_string());
        };
        let layers = [
            b.layer(|l| {
                mark(l);
                lower(l);
            }),
            b.layer(|l| {
                mark(l);
                add_special_entries(l);
                l.file("data/secret2", "x").file("opaque/middle", "x");
            }),
            b.layer(|l| {
                mark(l);
                upper(l);
                l.delete("s/hard2").delete("data/secret2");
            }),
        ];
        let image = b.image(&format!("mixed:{subset}"), &layers, &[]);
        let published: Vec<&Blob> =
            image.layers.iter().enumerate().filter(|(n, _)| subset & (1 << n) != 0).map(|(_, l)| l).collect();
        stage.assert_same(&image, &published);
    }
}

#[test]
fn root_unusual_layer_contents_equal_a_normal_pull() {
    let stage = E2eFixture::start("odd", "");
    let b = &stage.builder;
    let base = || b.layer(lower);
    let cases: Vec<(&str, Vec<Layer>)> = vec![
        ("opaque-root:1", vec![base(), b.layer(|l| finish(l.opaque("").file("new", "x")))]),
        ("whiteout-and-file:1", vec![base(), b.layer(|l| finish(l.delete("again").file("again", "new")))]),
        ("whiteout-and-dir:1", vec![base(), b.layer(|l| finish(l.delete("data").file("data/other", "new")))]),
        ("whiteout-of-nothing:1", vec![base(), b.layer(|l| finish(l.delete("never").dir("d").delete("d/never")))]),
        ("file-over-dir:1", vec![base(), b.layer(|l| finish(l.file("gone", "a file now")))]),
        (
            "nested-opaque:1",
            vec![
                base(),
                b.layer(|l| {
                    finish(l.opaque("opaque").dir("opaque/inner").opaque("opaque/inner").file("opaque/inner/n", "x"));
                }),
            ],
        ),
        (
            "top-of-its-own:1",
            vec![
                base(),
                b.layer(|l| finish(l.file("x", "x").mode("", 0o711).owner("", 1, 2).xattr("", "user.odd", b"x"))),
            ],
        ),
        ("opaque-only:1", vec![base(), b.layer(|l| finish(l.opaque("opaque")))]),
        (
            "deleted-twice:1",
            vec![
                base(),
                b.layer(|l| finish(l.delete("data"))),
                b.layer(|l| finish(l.delete("data"))),
                b.layer(|l| finish(l.file("data/back", "x"))),
            ],
        ),
        (
            "aufs-records:1",
            vec![base(), b.layer(|l| finish(l.file(".wh..wh.aufs", "").dir(".wh..wh.plnk").file("f", "x")))],
        ),
        (
            "marker-of-our-own:1",
            vec![base(), b.layer(|l| finish(l.file("mask", "x").file("hide", "x").file("fs", "x").file("work", "x")))],
        ),
    ];
    let mut wrong = Vec::new();
    for (name, layers) in cases {
        let image = b.image(name, &layers, &[]);
        let check =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stage.assert_same(&image, &all_layers(&image))));
        if check.is_err() {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "these images are wrong: {wrong:?}");
}

#[test]
fn root_image_may_contain_a_layer_three_times() {
    let stage = E2eFixture::start("repeated", "");
    let b = &stage.builder;
    let (base, repeated) =
        (b.layer(lower), b.layer(|l| finish(l.file("again", "again").delete("data/secret").opaque("opaque"))));
    let between = b.layer(|l| finish(l.file("data/secret", "back").file("opaque/back", "x").file("again", "between")));
    let layers = [base, repeated.clone(), between.clone(), repeated.clone(), between, repeated];
    let image = b.image("repeated:1", &layers, &[]);
    stage.assert_same(&image, &all_layers(&image));
}

#[test]
fn root_chain_of_127_layers_works() {
    let stage = E2eFixture::start("long", "");
    let b = &stage.builder;
    let mut layers = vec![b.layer(lower)];
    layers.extend((1..127).map(|n| {
        b.layer(|l| {
            l.file(format!("n/{n}"), "x");
            if n % 3 == 0 {
                l.delete(format!("n/{}", n - 1));
            }
        })
    }));
    let image = b.image("long:1", &layers, &[]);
    stage.assert_same(&image, &all_layers(&image));
}
