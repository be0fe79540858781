//! Containers on the repositories that the real publisher made, beside a normal pull of the same images. What
//! is different is listed here one by one, and all of it is the publisher's doing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use cvmfs_testbed::listing::{Difference, Listing};
use cvmfs_testbed::real;
use scene::containerd::{Containerd, Writable};
use scene::e2e_fixture::E2eFixture;
use scene::image::Image;
use scene::oci_layout::OciLayout;
use scene::publisher::Repository;

/// A known difference: a property of a path that a container shows differently from a normal pull.
struct Known {
    path: &'static str,
    property: &'static str,
    normal: Option<&'static str>,
    ours: Option<&'static str>,
    reason: &'static str,
}

/// Ingest without `--keep-ownership` gives everything to the repository's owner.
const OWNER: &str = "owners are lost";
/// Ingest makes separate files of them, all with the time of the file that the links are to.
const LINK: &str = "hard links become files";
const ATTRIBUTE: &str = "ingest publishes no attributes";
/// The tar of a layer names a file and not the directories above it. Ingest invents those with mode 0755;
/// a normal pull takes them from the layer below.
const INVENTED: &str = "directories that the tar does not name are invented";

const fn known(
    path: &'static str,
    property: &'static str,
    normal: &'static str,
    ours: &'static str,
    reason: &'static str,
) -> Known {
    Known { path, property, normal: Some(normal), ours: Some(ours), reason }
}

const fn lost(path: &'static str, property: &'static str, normal: &'static str, reason: &'static str) -> Known {
    Known { path, property, normal: Some(normal), ours: None, reason }
}

const BOTH_NAMES: &str = "[\"bin/hard\", \"bin/tool\"]";

/// In both images, from both repositories.
const IN_ALL: &[Known] = &[
    lost("bin/hard", "links", BOTH_NAMES, LINK),
    lost("bin/tool", "links", BOTH_NAMES, LINK),
    known("bin/hard", "mtime", "1500019000", "1500016000", LINK),
    known("bin/tool", "mtime", "1500019000", "1500016000", LINK),
    lost("etc/attr", "xattrs", "user.note=\"kept\"", ATTRIBUTE),
];

/// In `odd`, whose fourth layer names no directories. `order` does not have that layer.
const IN_ODD: &[Known] = &[
    known("home/user", "mode", "0700", "0755", INVENTED),
    known("private", "mode", "0700", "0755", INVENTED),
    known("tmp", "mode", "1777", "0755", INVENTED),
];

/// From the repository that root owns. The other one is compared by rule.
const OWNERS_IN_ALL: &[Known] = &[
    known("bin/sgid", "owner", "0:42", "0:0", OWNER),
    known("etc/shadow", "owner", "0:42", "0:0", OWNER),
    known("home/user", "owner", "1000:1000", "0:0", OWNER),
    known("home/user/.profile", "owner", "1000:1000", "0:0", OWNER),
    known("home/user/notes", "owner", "1000:1000", "0:0", OWNER),
    known("sgid", "owner", "0:50", "0:0", OWNER),
];

const OWNERS_IN_ODD: &[Known] = &[
    known("home/user/deep/er", "owner", "1000:1000", "0:0", OWNER),
    known("var/lib/data/file", "owner", "33:33", "0:0", OWNER),
];

/// The last layer with something in them does not name them. A normal pull gives them the time of the pull,
/// and ingest its own.
const DATED_IN_ODD: &[&str] =
    &["etc", "home", "home/user", "home/user/deep", "private", "tmp", "var", "var/lib", "var/lib/data"];
const OF_THE_PULL: &str = "of the pull";
const OF_THE_INGEST: &str = "of the ingest";

/// Every time in the images is earlier, and the ingest was later.
const LATEST_TIME_IN_A_LAYER: u64 = 1_700_000_000;
/// The fraction of a second that every time in the images has. Ingest publishes whole seconds.
const QUARTER: &str = "250000000";
const SECONDS: &str = "parts of seconds are lost";

fn dated(image: &str) -> &'static [&'static str] {
    if image == "odd" { DATED_IN_ODD } else { &[] }
}

fn difference(path: &Path, property: &'static str, normal: Option<&str>, ours: Option<&str>) -> Difference {
    let [expected, found] = [normal, ours].map(|value| value.map(str::to_owned));
    Difference { path: path.to_owned(), property, expected, found }
}

/// All differences of a container from the normal pull, each with the reason.
fn known_differences(fqrn: &str, image: &str, normal: &Listing) -> BTreeMap<Difference, &'static str> {
    let mut lists = vec![IN_ALL];
    if image == "odd" {
        lists.push(IN_ODD);
    }
    if fqrn == real::ROOT {
        lists.push(OWNERS_IN_ALL);
        if image == "odd" {
            lists.push(OWNERS_IN_ODD);
        }
    }
    let listed = lists.into_iter().flatten();
    let mut known: BTreeMap<Difference, &str> = listed
        .map(|known| (difference(Path::new(known.path), known.property, known.normal, known.ours), known.reason))
        .collect();
    let dated = dated(image);
    for path in dated {
        known.insert(difference(Path::new(path), "mtime", Some(OF_THE_PULL), Some(OF_THE_INGEST)), INVENTED);
    }
    // Two rules for all entries but the top, which is not the publisher's.
    for (path, entry) in normal.entries.iter().filter(|(path, _)| *path != Path::new(".")) {
        if !dated.iter().any(|dated| path == Path::new(dated)) {
            known.insert(difference(path, "nanoseconds", Some(QUARTER), Some("0")), SECONDS);
        }
        if fqrn == real::LOST {
            known.insert(difference(path, "owner", Some(&entry["owner"]), Some("995:994")), OWNER);
        }
    }
    known
}

fn stage(fqrn: &str) -> E2eFixture {
    E2eFixture::start_with_repository("real", "", |dir| {
        let sandbox = dir.parent().expect("a repository lies in a sandbox");
        Repository::published_by_others(dir, &real::unpack_repository(fqrn, sandbox))
    })
}

/// Pushes the images `odd` and `order`, and `odd` again as what `multi` lists for this machine; returns them
/// with their references.
fn push(stage: &E2eFixture) -> Vec<(&'static str, Image, String)> {
    let layout = OciLayout::open(&real::unpack_images(stage.sandbox.dir()));
    let mut images = Vec::new();
    for name in ["odd", "order"] {
        let image = layout.image(layout.find_named(name), &format!("fixture/{name}:1"));
        let reference = stage.registry.push(&image);
        images.push((name, image, reference));
    }
    let index = layout.find_named("multi");
    let mut listed = layout.images_of_index(&index, "fixture/multi:1");
    let reference = stage.registry.push_index(&index, &listed, "fixture/multi:1");
    images.push(("odd", listed.swap_remove(0), reference));
    images
}

/// The listing of a container of the image, or of a view. Times that the pull or the ingest set are replaced by words.
fn list_root(stage: &E2eFixture, side: &Containerd, image: &Image, writable: Writable) -> Listing {
    let key = format!("show {} {writable:?}", image.name);
    let mounted = side.mount_image(image, &key, &stage.sandbox.path("mnt"), writable);
    let mut listing = Listing::read(mounted.path());
    drop(mounted);
    side.snapshots().remove(&key).unwrap_or_else(|status| panic!("{}", status.message()));
    // It is nobody's: it has the time of the pull, or of the container's start.
    leave_out_time(&mut listing, ".");
    listing
}

fn leave_out_time(listing: &mut Listing, path: &str) {
    let entry = listing.entries.get_mut(Path::new(path)).unwrap_or_else(|| panic!("{path} is not there"));
    entry.remove("mtime");
    entry.remove("nanoseconds");
}

/// Puts `word` in the place of the times of these directories.
#[track_caller]
fn name_times(listing: &mut Listing, directories: &[&str], word: &str, earliest: u64) {
    for path in directories {
        let time = &listing.entries[Path::new(path)]["mtime"];
        assert!(time.parse::<u64>().is_ok_and(|time| time >= earliest), "{path} has the time {time}, not one {word}");
        leave_out_time(listing, path);
        listing.entries.entry(PathBuf::from(path)).or_default().insert("mtime", word.to_owned());
    }
}

/// The normal pull shows what it showed when the real repositories were made.
#[track_caller]
fn assert_as_recorded(image: &str, normal: &Listing) {
    let (mut recorded, mut normal) = (real::expected(image), normal.clone());
    leave_out_time(&mut recorded, ".");
    name_times(&mut recorded, dated(image), OF_THE_PULL, LATEST_TIME_IN_A_LAYER);
    normal.leave_out("nanoseconds");
    let differences: Vec<_> = recorded.compare(&normal).iter().map(ToString::to_string).collect();
    assert_eq!(differences, Vec::<String>::new(), "{image}");
}

/// Fails for each difference that is not listed, and for each that is listed and does not occur.
#[track_caller]
fn assert_differences(fqrn: &str, image: &str, normal: &Listing, ours: &Listing) {
    let known = known_differences(fqrn, image, normal);
    let differences = normal.compare(ours);
    let unknown = differences.iter().filter(|difference| !known.contains_key(difference));
    let unknown: Vec<_> = unknown.map(ToString::to_string).collect();
    let gone = known.iter().filter(|(difference, _)| !differences.contains(difference));
    let gone: Vec<_> = gone.map(|(difference, reason)| format!("{difference} ({reason})")).collect();
    assert!(unknown.is_empty(), "{fqrn}, {image}: not in the list of the publisher's differences: {unknown:#?}");
    assert!(gone.is_empty(), "{fqrn}, {image}: in the list, and not there any more: {gone:#?}");
}

#[test]
fn root_containers_on_real_repositories_differ_from_normal_pull_only_by_publisher_losses() {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
    for fqrn in [real::ROOT, real::LOST] {
        let stage = stage(fqrn);
        let images = push(&stage);
        for (_, image, reference) in &images {
            stage.ours.pull(reference);
            assert_eq!(stage.registry.fetched().layers_of(image), 0, "layers of {reference} were fetched");
        }
        for (name, image, reference) in &images {
            stage.normal.pull(reference);
            for writable in [Writable::No, Writable::Yes] {
                let mut normal = list_root(&stage, &stage.normal, image, writable);
                name_times(&mut normal, dated(name), OF_THE_PULL, started);
                assert_as_recorded(name, &normal);
                let mut ours = list_root(&stage, &stage.ours, image, writable);
                name_times(&mut ours, dated(name), OF_THE_INGEST, LATEST_TIME_IN_A_LAYER);
                assert_differences(fqrn, name, &normal, &ours);
            }
        }
    }
}
