//! Whole root file systems: when one is used, that it shows what the layers show, and what
//! happens when it goes away.

use std::fs;
use std::path::Path;

use scene::containerd::Writable;
use scene::image::{Image, Layer, Stage as LayerStage};
use scene::stage::Stage;

fn image(stage: &Stage, name: &str, more: Vec<Layer>) -> Image {
    let mut layers = lower(stage, name);
    layers.extend(more);
    stage.builder.image(name, &layers, &[])
}

fn lower(stage: &Stage, name: &str) -> Vec<Layer> {
    let b = &stage.builder;
    vec![
        stage.base_layer(),
        b.layer(|l| {
            l.file("data/text", name).file("data/secret", "secret").file("opt/old/x", "x").file("was/dir", "x");
            l.file("etc/hosts", "127.0.0.1 image").mode("etc/hosts", 0o600).owner("etc/hosts", 3, 4);
            l.file("usr/lib/a", "a").file("usr/lib/b", "b").hard_link("usr/lib/b", "usr/lib/c");
        }),
        b.layer(|l| {
            l.delete("data/secret").opaque("opt/old").file("opt/old/y", "y").delete("was").file("was", "a file now");
            l.file("setuid", "x").mode("setuid", 0o4755).owner("setuid", 12, 34).symlink("/etc", "abs");
        }),
    ]
}

/// Publishes, pushes and pulls on both sides; the result is the reference.
fn pull(stage: &Stage, image: &Image) -> String {
    let reference = stage.registry.push(image);
    stage.repository.publish(image);
    stage.repository.publish_flat(image, &reference, &["usr", "usr/lib"]);
    stage.normal.pull(&reference);
    stage.ours.pull(&reference);
    reference
}

/// The number of lower directories below a container on the image.
fn lower_directories(stage: &Stage, image: &Image) -> usize {
    let parent = image.chain_ids.last().expect("an image has layers");
    let snapshots = stage.ours.snapshots();
    let mounts = snapshots.prepare("count", parent, &[("containerd.io/gc.root", "scene")]).expect("a container starts");
    snapshots.remove("count").expect("a snapshot can be removed");
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).expect("an overlay");
    lower.split(':').count()
}

#[track_caller]
fn assert_same(stage: &Stage, image: &Image) {
    for writable in [Writable::No, Writable::Yes] {
        let comparison = stage.compare(image, writable);
        assert!(comparison.entries > 20);
        assert_eq!(comparison.differences, Vec::<String>::new(), "{writable:?}");
    }
}

#[test]
fn root_a_published_root_is_the_only_lower_directory_and_shows_what_the_layers_show() {
    for (config, lower) in [("", 2), ("rootfs = \"flat\"\nattach = \"symlink\"", 2), ("rootfs = \"layers\"", 5)] {
        let stage = Stage::set("flat", config);
        let image = image(&stage, "flat:1", Vec::new());
        let reference = pull(&stage, &image);
        assert_eq!(lower_directories(&stage, &image), lower, "{config}");
        assert_same(&stage, &image);
        let output = stage.ours.run(&reference, "c", &["/bin/sh", "-c", "cat /data/text; ls -a /"]).ok();
        assert!(
            output.starts_with("flat:1") && !output.contains("singularity") && !output.contains("cvmfs"),
            "{output}"
        );
        assert_eq!(stage.registry.fetched().layers_of(&image), 3, "only the normal pull fetched layers");
        // The choice is kept, and everything can be given back.
        stage.ours.remove(&reference);
        scene::process::eventually("all directories are gone", || {
            stage.ours.collect_garbage();
            stage.snapshot_dirs().is_empty()
        });
    }
}

#[test]
fn root_a_root_that_is_not_certainly_the_images_is_not_used() {
    let stage = Stage::set("not-flat", "rootfs = \"flat\"");
    let own = |l: &LayerStage| {
        l.file("environment", "of the image").symlink("bin/sh", "singularity");
    };
    // The image has names that the publisher knows too, and they are as the image has them.
    let with_own = image(&stage, "own:1", vec![stage.builder.layer(own)]);
    let reference = pull(&stage, &with_own);
    assert_eq!(lower_directories(&stage, &with_own), 2);
    assert_same(&stage, &with_own);
    assert_eq!(stage.ours.run(&reference, "c", &["/bin/cat", "/environment"]).ok(), "of the image");
    // Deleted again by the image: what stands there is the publisher's.
    let deleted = |l: &LayerStage| {
        l.delete("environment");
    };
    let with_deleted = image(&stage, "deleted:1", vec![stage.builder.layer(own), stage.builder.layer(deleted)]);
    pull(&stage, &with_deleted);
    assert_eq!(lower_directories(&stage, &with_deleted), 2);
    assert_same(&stage, &with_deleted);

    let layers = |name: &str, why: &str, spoil: &dyn Fn(&Image, &str)| {
        let image = image(&stage, name, vec![stage.builder.layer(own)]);
        let reference = stage.registry.push(&image);
        stage.repository.publish(&image);
        stage.repository.publish_flat(&image, &reference, &[]);
        spoil(&image, &reference);
        stage.repository.commit();
        stage.normal.pull(&reference);
        stage.ours.pull(&reference);
        assert!(lower_directories(&stage, &image) > 2, "{name}");
        assert_same(&stage, &image);
        let log = stage.snapshotter.log();
        let lines = log.lines().filter(|line| line.contains("warning") && line.contains(&image.layers[3].digest));
        let lines: Vec<&str> = lines.collect();
        assert!(lines.len() == 1 && lines[0].contains(why), "{name}: {lines:?}");
    };
    layers("overwritten:1", "another /environment than the image", &|image, _| {
        let at = stage.repository.flat_dir(&image.config.digest).join("environment");
        fs::write(at, "of the publisher, and longer").expect("a file can be replaced");
    });
    for (name, spoiled) in [("hard:1", "opt/hosts"), ("soft:1", "etc/resolv.conf")] {
        let own = |l: &LayerStage| {
            l.file("etc/hosts", "x").dir("opt");
            if name == "hard:1" {
                l.hard_link("etc/hosts", spoiled);
            } else {
                l.file("etc/target", "x").symlink("target", spoiled);
            }
        };
        let with_links = image(&stage, name, vec![stage.builder.layer(own)]);
        pull(&stage, &with_links);
        assert!(lower_directories(&stage, &with_links) > 2, "the publisher emptied {spoiled} as well");
        assert_same(&stage, &with_links);
    }
    layers("linked:1", "another /etc/hosts than the image", &|image, _| {
        let etc = stage.repository.flat_dir(&image.config.digest).join("etc");
        fs::remove_dir_all(&etc).expect("it was published");
        std::os::unix::fs::symlink("/etc", &etc).expect("a link can be made");
    });
    layers("no-manifest:1", "no manifest of the image", &|_, reference| {
        fs::remove_dir_all(stage.repository.manifest_dir(reference)).expect("it was published");
    });
    layers("broken-manifest:1", "no manifest of the image", &|_, reference| {
        let at = stage.repository.manifest_dir(reference).join("manifest.json");
        fs::write(at, "{\"Layers\": 7").expect("it was published");
    });
    layers("other-layers:1", "lists other layers", &|_, reference| {
        stage.repository.publish_manifest(&with_own, reference);
    });
    layers("no-root:1", "no root file system of the image", &|image, _| {
        stage.repository.withdraw_flat(&image.config.digest);
    });
    assert!(stage.snapshotter.log().contains("manifest.json is passed over: it is not JSON"));
}

#[test]
fn root_an_image_of_docker_hub_is_found_under_the_names_that_publishers_use() {
    use cvmfs_snapshotter::repository::manifest::ImageRef;
    let stage = Stage::set("hub", "");
    let image = image(&stage, "library/hub:1", Vec::new());
    stage.repository.publish(&image);
    stage.repository.publish_flat(&image, "registry.hub.docker.com/library/hub:1", &[]);
    // As containerd pulls it: by its own socket, with the labels of docker.io.
    let client = stage.snapshotter.client();
    let parent = client.pull_image(&image, "docker.io/library/hub:1");
    let mounts = client.prepare("container", &parent, &[]).expect("a container starts");
    assert!(mounts[0].options.iter().any(|o| o.ends_with("/flat")), "{mounts:?}");
    assert!(ImageRef::parse("docker.io/library/hub:1").is_some());
}

#[test]
fn root_a_root_that_is_withdrawn_is_replaced_by_the_layers_and_back() {
    let mut stage = Stage::set("withdrawn", "");
    let image = image(&stage, "withdrawn:1", Vec::new());
    let reference = pull(&stage, &image);
    assert_eq!(lower_directories(&stage, &image), 2);
    stage.ours.start_container(&reference, "running", &["/bin/sleep", "1000"]);
    let away = stage.sandbox.path("away");
    let flat = stage.repository.flat_dir(&image.config.digest);
    fs::rename(&flat, &away).expect("a root can be withdrawn");
    stage.repository.commit();
    assert_eq!(lower_directories(&stage, &image), 5, "the layers are there");
    assert_same(&stage, &image);
    // The new choice is kept over a restart, and made again when the layers go.
    stage.snapshotter.end(nix::sys::signal::Signal::SIGTERM);
    stage.snapshotter.start_again();
    fs::rename(&away, &flat).expect("a root can be published again");
    stage.repository.commit();
    scene::process::eventually("containerd has connected again", || {
        stage.ours.run(&reference, "again", &["/bin/true"]).status.success()
    });
    assert_eq!(lower_directories(&stage, &image), 5);
    for layer in &image.layers {
        stage.repository.withdraw(&layer.digest);
    }
    // The root alone is not enough: what of it is the publisher's, only the layers can tell.
    stage.repository.withdraw_flat(&image.config.digest);
    let failed = stage.ours.run(&reference, "none", &["/bin/true"]);
    for part in ["is not available", &image.layers[2].digest, "scene.test", "does not have it"] {
        assert!(failed.stderr.contains(part), "{part} is missing in: {}", failed.stderr);
    }
    stage.ours.end_container("running");
    stage.ours.remove(&reference);
    scene::process::eventually("all directories are gone", || {
        stage.ours.collect_garbage();
        stage.snapshot_dirs().is_empty()
    });
}

#[test]
fn root_part_of_an_image_has_its_own_layers() {
    let stage = Stage::set("part", "");
    let mut layers = lower(&stage, "part");
    let part = stage.builder.image("part:1", &layers, &[]);
    layers.push(stage.builder.layer(|l| {
        l.file("more", "x");
    }));
    let whole = stage.builder.image("part:2", &layers, &[]);
    assert_eq!(part.chain_ids[2], whole.chain_ids[2], "one image is the lower part of the other");
    let reference = pull(&stage, &whole);
    let lower = stage.registry.push(&part);
    stage.repository.publish_flat(&part, &lower, &[]);
    stage.ours.pull(&lower);
    // Its chain came with the pull of the whole, so the manifest that is looked for is that one's.
    assert_eq!(lower_directories(&stage, &part), 5);
    assert_eq!(lower_directories(&stage, &whole), 2);
    assert_eq!(stage.ours.run(&lower, "part", &["/bin/ls", "/"]).ok().lines().filter(|l| *l == "more").count(), 0);
    assert_eq!(stage.ours.run(&reference, "whole", &["/bin/cat", "/more"]).ok(), "x");
    assert!(Path::new(&stage.repository.flat_dir(&part.config.digest)).exists());
}
