//! The publisher that all tests stand on, against what the real one made of the same images.

use std::fs;
use std::path::{Path, PathBuf};

use cvmfs_testbed::listing::Listing;
use cvmfs_testbed::real;
use scene::image::Image;
use scene::oci_layout::OciLayout;
use scene::publisher::{AutoCatalogs, Ingest, ManifestPlace, Ownership, Repository, Settings};
use scene::sandbox::Sandbox;

/// The name of the registry from which the real publisher pulled.
const REGISTRY: &str = "127.0.0.1:5000/fixture";

/// The images that the real publisher was given, in its order, by their names. Of an index it takes the
/// image of its own architecture.
fn images(sandbox: &Sandbox) -> Vec<(&'static str, Image)> {
    let layout = OciLayout::open(&real::unpack_images(sandbox.dir()));
    let named = |name: &'static str| (name, layout.image(layout.find_named(name), name));
    let of_index = layout.images_of_index(&layout.find_named("multi"), "multi").swap_remove(0);
    vec![named("odd"), named("order"), ("multi", of_index)]
}

/// Makes equal what cannot be equal.
fn normalize(listing: &mut Listing) {
    // Nothing that any reader of ours looks for: DUCC's roots of parts of images, which newer ones do not
    // write and remove, and the file that every new repository has.
    let is_left_out =
        |path: &Path| [".chains", ".dirty-chains", "new_repository"].iter().any(|top| path.starts_with(top));
    listing.entries.retain(|path, _| !is_left_out(path));
    for (path, entry) in &mut listing.entries {
        // Every time in the images is before 2018. Later is when something was published.
        if entry["mtime"].parse::<u64>().is_ok_and(|time| time > 1_700_000_000) {
            entry.insert("mtime", "of the publication".to_owned());
        }
        // The client makes up attributes of the root, which the real listing was made without.
        if path == Path::new(".") {
            entry.remove("xattrs");
        }
        // It has the time at which the layer was published in it.
        let is_dated = path.ends_with(".metadata/layers.json");
        // Singularity's scripts; the data has their names only.
        let is_script = path.components().any(|part| part.as_os_str() == ".singularity.d");
        if entry["type"] == "file" && (is_dated || is_script) {
            entry.insert("content", "not compared".to_owned());
            entry.insert("size", "not compared".to_owned());
        }
    }
    listing.leave_out("nanoseconds");
}

#[track_caller]
fn assert_equal(fqrn: &str, repository: &Repository) {
    let mut expected = real::listing(fqrn);
    let mut found = Listing::read(repository.dir());
    assert!(found.entries.values().all(|entry| entry["nanoseconds"] == "0"), "the client shows parts of seconds");
    normalize(&mut expected);
    normalize(&mut found);
    assert!(expected.entries.len() > 700, "{} entries are compared", expected.entries.len());
    let differences: Vec<_> = expected.compare(&found).iter().map(ToString::to_string).collect();
    assert_eq!(differences, Vec::<String>::new(), "{fqrn}");
}

#[test]
fn root_test_publisher_reproduces_real_publisher_output() {
    let sandbox = Sandbox::enter("publisher");
    let images = images(&sandbox);
    let of_root = Repository::mounted(&sandbox.path("root"));
    for (name, image) in &images {
        let reference = format!("{REGISTRY}/{name}:1");
        of_root.publish_image(image, &reference, ManifestPlace::Reference);
        of_root.publish_flat(image, &reference);
    }
    assert_equal(real::ROOT, &of_root);

    // The real weights are not known. All from 113 to 153 choose these directories.
    let auto_catalogs = Some(AutoCatalogs { max_weight: 130, min_weight: 10 });
    let ingest = Ingest { owner: (995, 994), ownership: Ownership::Lost, auto_catalogs };
    let of_user = Repository::mounted_with(&sandbox.path("lost"), Settings { ingest, ..Settings::default() });
    for (name, image) in &images {
        of_user.publish_image(image, &format!("{REGISTRY}/{name}:1"), ManifestPlace::Reference);
    }
    assert_equal(real::LOST, &of_user);
}

/// Newer than the real data.
#[test]
fn root_manifest_of_multi_architecture_image_is_stored_below_its_architecture() {
    let sandbox = Sandbox::enter("architecture");
    let (_, image) = images(&sandbox).swap_remove(2);
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let reference = format!("{REGISTRY}/multi:1");
    repository.publish_image(&image, &reference, ManifestPlace::Architecture("amd64"));
    let path = repository.dir().join(".metadata/.multiarch/amd64").join(&reference).join("manifest.json");
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(path).expect("a manifest")).expect("it is JSON");
    assert_eq!(manifest["Config"]["Digest"], image.config.digest);
    assert!(!repository.dir().join(PathBuf::from(".metadata").join(&reference)).exists());
}
