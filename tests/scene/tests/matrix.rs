//! Every version of containerd, configured as docs/containerd.md says, by the clients that people
//! use: Kubernetes, ctr and nerdctl. `CONTAINERD_VERSIONS` says which of them, see `make test-matrix`.

use std::fs;
use std::time::Instant;

use scene::containerd::{Containerd, PLUGIN_NAME, Writable};
use scene::e2e_fixture::{E2eFixture, PAUSE};
use scene::image::{Image, Layer};
use scene::process::{eventually, run};
use scene::publisher::Repository;
use scene::registry::Fetched;
use scene::release::{ConfigVariant, Release, read};
use scene::report;
use scene::sandbox::{Sandbox, mounts_below};

macro_rules! matrix {
    ($($module:ident $release:ident;)*) => {
        $(mod $module {
            use scene::release::{Release, ConfigVariant};

            const RELEASE: Release = Release::$release;

            #[test]
            fn root_kubernetes_pulls_runs_and_removes_in_every_way_that_is_documented() {
                super::on(RELEASE, "Kubernetes", &RELEASE.config_variants(), super::kubernetes);
            }

            #[test]
            fn root_ctr_pulls_runs_and_removes() {
                super::on(RELEASE, "ctr", &[RELEASE.best_config_variant()], super::ctr);
            }

            #[test]
            fn root_nerdctl_pulls_runs_commits_and_removes() {
                let drop_in = RELEASE.has_conf_d().then_some(ConfigVariant::ConfD);
                let ways: Vec<ConfigVariant> = [RELEASE.best_config_variant()].into_iter().chain(drop_in).collect();
                super::on(RELEASE, "nerdctl", &ways, super::nerdctl);
            }

            #[test]
            fn root_pulls_at_the_same_time_of_images_that_share_layers_come_out_right() {
                let way = if RELEASE.has_conf_d() { ConfigVariant::ManyUnpacks } else { RELEASE.best_config_variant() };
                super::on(RELEASE, "pulls at the same time", &[way], super::at_the_same_time);
            }

            #[test]
            fn root_an_image_that_was_pulled_before_the_switch_runs_after_it() {
                super::on(RELEASE, "the switch", &RELEASE.config_variants()[..1], super::switch);
            }
        })*
    };
}

scene::for_each_release!(matrix);

fn on(release: Release, what: &str, ways: &[ConfigVariant], check: impl Fn(&mut E2eFixture, Release, ConfigVariant)) {
    if !release.is_selected() {
        return;
    }
    for &way in ways {
        let start = Instant::now();
        let mut stage = E2eFixture::start_with_containerd(what, "", release, way, Repository::mounted);
        check(&mut stage, release, way);
        assert_all_is_given_back(&stage);
        let seconds = start.elapsed().as_secs_f64();
        report::print(format_args!("containerd {} ({way:?}), {what}: {seconds:.1} s", release.version()));
    }
}

/// No image and no container is left, so nothing of them may be.
#[track_caller]
fn assert_all_is_given_back(stage: &E2eFixture) {
    let client = stage.snapshotter.client();
    let left = || -> Vec<String> {
        client.list(&[]).expect("snapshots can be listed").into_iter().map(|info| info.name).collect()
    };
    eventually("every snapshot and its directory are gone", || {
        stage.ours.collect_garbage();
        left().is_empty() && stage.snapshot_dirs().is_empty()
    });
    assert_eq!(mounts_below(&stage.snapshotter.root()), Vec::<std::path::PathBuf>::new());
}

/// Pushes an image of which so many layers are published; the result is its reference.
fn push(stage: &E2eFixture, image: &Image, published: usize) -> String {
    stage.repository.publish_layers(&image.layers[..published]);
    stage.registry.push(image)
}

/// The layers of `image` that were fetched since `before`.
fn fetched(stage: &E2eFixture, before: &Fetched, image: &Image) -> usize {
    stage.registry.fetched().since(before).layers_of(image)
}

/// Reads, sees what is deleted as deleted, and writes.
const PROGRAM: &str = "cat /data/text; ls /data; echo new > /data/new; cat /data/new";

fn said(text: &str) -> String {
    format!("{text}text\ntop\nnew\n")
}

fn kubernetes(stage: &mut E2eFixture, release: Release, way: ConfigVariant) {
    // What differs between the ways is who asks for a layer.
    let thorough = way == release.best_config_variant();
    let pause = stage.builder.image_that_runs(PAUSE, &[stage.base_layer()], &[], &["/bin/sleep", "1000"]);
    let mut references = vec![stage.publish_and_push(&pause)];
    let cri = stage.ours.cri();
    let unique = stage.sandbox.dir().file_name().expect("a sandbox has a name").display().to_string();
    let images = [("published", 3), ("partly", 1), ("unpublished", 0)];
    for (name, published) in images.into_iter().take(if thorough { 3 } else { 2 }) {
        let image = stage.shell_image(&format!("{name}:1"), name);
        let reference = push(stage, &image, published);
        let before = stage.registry.fetched();
        cri.pull(&reference);
        assert_eq!(fetched(stage, &before, &image), 3 - published, "layers of the {name} image that were fetched");
        let pod = cri.run_pod(&format!("{unique}-{name}"), &reference, &["/bin/sleep", "1000"]);
        assert_eq!(cri.exec(&pod, &["/bin/sh", "-c", PROGRAM]), said(name));
        cri.remove_pod(&pod);
        if thorough {
            stage.assert_as_published(&image, &[Writable::No, Writable::Yes]);
        }
        references.push(reference);
    }
    assert_eq!(stage.registry.fetched().layers_of(&pause), 0, "the image of the pod itself is published too");
    let place = if release.has_exports() {
        stage.snapshotter.root()
    } else {
        // A guess of containerd's, where nothing is.
        stage.ours.root().join("io.containerd.snapshotter.v1.cvmfs-snapshotter")
    };
    assert_eq!(cri.image_file_systems(), [place.display().to_string()], "where the kubelet looks for the size");
    for reference in references {
        cri.remove(&reference);
    }
}

/// The kubelet does not pull an image again that containerd has; containerd itself makes the
/// snapshots that the new snapshotter lacks, when a container is to start.
fn switch(stage: &mut E2eFixture, release: Release, way: ConfigVariant) {
    let pause = stage.builder.image_that_runs(PAUSE, &[stage.base_layer()], &[], &["/bin/sleep", "1000"]);
    let pause = stage.publish_and_push(&pause);
    let image = stage.shell_image("before:1", "before");
    let reference = stage.publish_and_push(&image);
    stage.normal.pull(&reference);
    stage.normal.end();
    stage.ours = Containerd::with_config_variant(&stage.sandbox.path("n"), release, way, &pause, &stage.snapshotter);
    let cri = stage.ours.cri();
    let unique = stage.sandbox.dir().file_name().expect("a sandbox has a name").display().to_string();
    let pod = cri.run_pod(&unique, &reference, &["/bin/sleep", "1000"]);
    assert_eq!(cri.exec(&pod, &["/bin/sh", "-c", PROGRAM]), said("before"));
    let remote = ["labels.\"containerd.io/snapshot/remote\""];
    let remote = stage.snapshotter.client().list(&remote).expect("a good filter");
    let is_ours = |name: &str| image.chain_ids.iter().any(|id| name.ends_with(id));
    let of_image = remote.iter().filter(|info| is_ours(&info.name)).count();
    // From 2.2 on containerd asks for layers even then, if it pulls by its client.
    assert_eq!(of_image, if release.has_conf_d() { 3 } else { 0 }, "layers that were not copied");
    cri.remove_pod(&pod);
    for reference in [reference, pause] {
        cri.remove(&reference);
    }
}

fn ctr(stage: &mut E2eFixture, release: Release, _: ConfigVariant) {
    // In the namespace of Kubernetes the CRI gives an image more names, and those stay.
    let ctr = |arguments: &[&str]| stage.ours.ctr(&[&["--namespace", "default"], arguments].concat());
    let unique = stage.sandbox.dir().file_name().expect("a sandbox has a name").display().to_string();
    for (name, published) in [("published", 3), ("partly", 1), ("unpublished", 0)] {
        let image = stage.shell_image(&format!("{name}:1"), name);
        let reference = push(stage, &image, published);
        let before = stage.registry.fetched();
        ctr(&["images", "pull", "--plain-http", "--snapshotter", PLUGIN_NAME, &reference]).ok();
        // Before there was the transfer service, ctr never asked for layers that need not be fetched.
        let expected = if release.has_transfer() { 3 - published } else { 3 };
        assert_eq!(fetched(stage, &before, &image), expected, "layers of the {name} image that were fetched");
        let id = format!("{unique}-{name}");
        let run = ["run", "--rm", "--snapshotter", PLUGIN_NAME, &reference, &id, "/bin/sh", "-c", PROGRAM];
        assert_eq!(ctr(&run).ok(), said(name));
        let list = ctr(&["snapshots", "--snapshotter", PLUGIN_NAME, "ls"]).ok();
        assert_eq!(list.lines().filter(|line| line.contains("Committed")).count(), 3, "{list}");
        ctr(&["images", "rm", "--sync", &reference]).ok();
        assert_all_is_given_back(stage);
    }
}

fn nerdctl(stage: &mut E2eFixture, _: Release, _: ConfigVariant) {
    let nerdctl = |arguments: &[&str]| stage.ours.nerdctl(arguments);
    for (name, published) in [("published", 3), ("partly", 1)] {
        let image = stage.shell_image(&format!("{name}:1"), name);
        let reference = push(stage, &image, published);
        let before = stage.registry.fetched();
        nerdctl(&["pull", &reference]).ok();
        assert_eq!(fetched(stage, &before, &image), 3 - published, "layers of the {name} image that were fetched");
        let run = ["run", "--net", "none", "--rm", &reference, "/bin/sh", "-c", PROGRAM];
        assert_eq!(nerdctl(&run).ok(), said(name));
        let program = format!("{PROGRAM}; rm /data/top; sleep 1000");
        nerdctl(&["run", "--net", "none", "--detach", "--name", name, &reference, "/bin/sh", "-c", &program]).ok();
        eventually("the container has written", || {
            !nerdctl(&["exec", name, "/bin/ls", "/data"]).stdout.contains("top")
        });
        let committed = format!("committed-{name}:1");
        nerdctl(&["commit", name, &committed]).ok();
        nerdctl(&["rm", "--force", name]).ok();
        let run = ["run", "--net", "none", "--rm", &committed, "/bin/sh", "-c", "cat /data/text /data/new; ls /data"];
        assert_eq!(nerdctl(&run).ok(), format!("{name}new\nnew\ntext\n"));
        assert_eq!(fetched(stage, &before, &image), 3 - published, "a commit fetches nothing");
        nerdctl(&["rmi", &committed, &reference]).ok();
        assert_all_is_given_back(stage);
    }
}

fn at_the_same_time(stage: &mut E2eFixture, release: Release, _: ConfigVariant) {
    let layer = |name: String| {
        stage.builder.layer(|l| {
            for file in 0..200 {
                l.file(format!("shared/{file}"), &name).file(format!("{name}/{file}"), &name);
            }
        })
    };
    for published in [0, 2] {
        let base = stage.base_layer();
        let [first, second, third] = ["a", "b", "c"].map(|name| layer(format!("{name}{published}")));
        let stacks: [&[&Layer]; 4] = [
            &[&base, &first, &second, &third],
            &[&base, &first, &second],
            &[&base, &first, &third, &second],
            &[&base, &second, &first],
        ];
        let images: Vec<(Image, String)> = stacks
            .iter()
            .enumerate()
            .map(|(n, stack)| {
                let stack: Vec<Layer> = stack.iter().map(|&l| l.clone()).collect();
                let image = stage.builder.image(&format!("together-{published}-{n}:1"), &stack, &[]);
                let reference = push(stage, &image, published);
                (image, reference)
            })
            .collect();
        std::thread::scope(|scope| {
            for (_, reference) in &images {
                let cri = stage.ours.cri();
                scope.spawn(move || cri.pull(reference));
            }
        });
        for (image, _) in &images {
            stage.assert_as_published(image, &[Writable::No]);
        }
        let cri = stage.ours.cri();
        for (_, reference) in &images {
            cri.remove(reference);
        }
        assert_all_is_given_back(stage);
    }
    let one_by_one = stage.ours.log().contains("unpacking will be sequential");
    assert_eq!(one_by_one, release.has_conf_d(), "2.2 and later could do otherwise, and say that they do not");
}

/// A node whose main file came from `containerd config default` reads the file of our packages;
/// another one reads it if its main file says so.
#[test]
fn root_from_2_2_on_the_default_configuration_includes_the_folder_of_our_packages_file() {
    let sandbox = Sandbox::enter("conf.d");
    let [upper, work] = ["upper", "work"].map(|name| sandbox.make_dir(name).display().to_string());
    let stacked = format!("lowerdir=/etc,upperdir={upper},workdir={work}");
    // Ours alone, as is this mount namespace.
    run("mount", ["-t", "overlay", "etc", "-o", &stacked, "/etc"]).ok();
    fs::create_dir_all("/etc/containerd/conf.d").expect("a directory can be made");
    let file = read("packaging/containerd-conf.d.toml");
    fs::write("/etc/containerd/conf.d/cvmfs-snapshotter.toml", file).expect("a file can be written");
    for release in [Release::V1_6, Release::V1_7, Release::V2_1, Release::V2_2, Release::V2_3, Release::V2_4] {
        if !release.is_selected() {
            continue;
        }
        let containerd = release.program("containerd");
        let default = run(&containerd, ["config", "default"]).ok();
        let imports = "imports = [\"/etc/containerd/conf.d/*.toml\"]\n";
        let mut mains = vec![(default, release.has_conf_d()), ("version = 2\n".to_owned(), false)];
        if release.has_conf_d() {
            let old = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"of:2\"\n";
            let new = "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = \"of:3\"\n";
            mains.extend([old, new].map(|main| (format!("{imports}{main}"), true)));
        }
        for (main, includes) in mains {
            fs::write("/etc/containerd/config.toml", &main).expect("a file can be written");
            let dump = run(&containerd, ["config", "dump"]).ok();
            assert_eq!(dump.contains("[proxy_plugins.cvmfs-snapshotter]"), includes, "{}:\n{main}", release.version());
            // The main file counts as it did before.
            for image in ["of:2", "of:3"].into_iter().filter(|image| main.contains(image)) {
                assert!(dump.contains(image), "{}: no {image} in\n{dump}", release.version());
            }
        }
    }
}

/// nerdctl's own page on this snapshotter registers it as `cvmfs`, and calls it by another name.
#[test]
fn root_registered_under_the_name_of_nerdctls_page_it_is_not_found_or_everything_is_downloaded() {
    let stage = E2eFixture::start_with_containerd(
        "other name",
        "",
        Release::V1_6,
        ConfigVariant::OtherName,
        Repository::mounted,
    );
    let image = stage.shell_image("named:1", "x");
    let reference = push(&stage, &image, 3);
    let refused = stage.ours.nerdctl(&["pull", &reference]);
    assert!(!refused.status.success() && refused.stderr.contains("cvmfs-snapshotter"), "{}", refused.stderr);
    let before = stage.registry.fetched();
    stage.ours.nerdctl(&["--snapshotter", "cvmfs", "pull", &reference]).ok();
    assert_eq!(fetched(&stage, &before, &image), 3);
}
