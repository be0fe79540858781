//! The life of containers and images: they are pulled, run, kept through a stop of the snapshotter, and removed, with
//! the real containerd, runc and registry.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use scene::client::Client;
use scene::containerd::Writable;
use scene::e2e_fixture::{E2eFixture, PAUSE, names};
use scene::image::Blob;
use scene::process::eventually;
use scene::publisher::{Repository, Settings};
use scene::sandbox::mounts_below;

fn committed(client: &Client) -> usize {
    client.list(&["kind==committed"]).expect("snapshots can be listed").len()
}

#[test]
fn root_pull_of_published_image_writes_only_records() {
    for publisher in [Repository::mounted, Repository::plain] {
        check_that_a_pull_writes_only_records(&E2eFixture::start_with_repository("records", "", publisher));
    }
}

fn check_that_a_pull_writes_only_records(stage: &E2eFixture) {
    let image = stage.shell_image("records:1", "x");
    let reference = stage.publish_and_push(&image);
    stage.ours.pull(&reference);
    assert_eq!(stage.registry.fetched().layers_of(&image), 0, "layers were fetched");
    assert_eq!(committed(&stage.snapshotter.client()), 3);
    assert_eq!(stage.snapshot_dirs(), Vec::<String>::new(), "a pull makes no directories");
    assert_eq!(mounts_below(&stage.snapshotter.root()), Vec::<std::path::PathBuf>::new(), "a pull mounts nothing");
    let output = stage.ours.run(&reference, "first", &["/bin/sh", "-c", "cat /data/text; ls /data"]).ok();
    assert_eq!(output, "xtext\ntop\n");
    let log = stage.snapshotter.log();
    // Lines about the repository itself have no digest; lines about a layer have one.
    let is_of_repository = |line: &str| line.contains("\"repository\":") && !line.contains("\"digest\":");
    let is_of_call = |line: &&str| !line.contains("\"level\":\"debug\"") && !is_of_repository(line);
    let lines: Vec<&str> = log.lines().filter(is_of_call).collect();
    assert_eq!(lines.len(), 2, "healthy calls say nothing at info, only the start does: {lines:?}");
    // The log has the format of the Go snapshotter.
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of the log is JSON");
        let field = |name: &str| line[name].as_str().unwrap_or_else(|| panic!("no {name} in {line}"));
        let is_usual = ["debug", "info"].contains(&field("level")) || is_of_repository(&line.to_string());
        assert!(is_usual && !field("msg").is_empty(), "{line}");
        let time = field("time");
        assert!(time.len() == "2026-11-24T12:00:00.000000000Z".len() && time.ends_with('Z'), "{time}");
    }
}

/// Containers started on the layers of the repository, with 40 attributes on every file that no image has.
#[test]
fn root_container_shows_no_magic_attributes_of_a_client_that_lists_them() {
    let client = &["--magic-xattrs", "always"];
    let stage = E2eFixture::start_with_repository("listed", "", |dir| {
        Repository::mounted_with(dir, Settings::with_client(client))
    });
    let image = stage.shell_image("listed:1", "x");
    let reference = stage.publish_and_push(&image);
    let listed = xattr::list(stage.repository.dir().join(".layers"));
    assert!(
        listed.is_ok_and(|mut names| names.any(|name| name == "user.fqrn")),
        "the client lists its own at the root"
    );
    for containerd in [&stage.normal, &stage.ours] {
        containerd.pull(&reference);
    }
    for writable in [Writable::No, Writable::Yes] {
        let comparison = stage.compare(&image, &image, writable);
        assert!(comparison.entries > 1, "nothing was compared");
        assert!(comparison.differences.is_empty(), "{writable:?}: {:?}", comparison.differences);
    }
    let changed = ["/bin/sh", "-c", "echo y >> /data/text && cat /data/text"];
    assert_eq!(stage.ours.run(&reference, "first", &changed).ok(), "xy\n");
    let log = stage.snapshotter.log();
    assert!(log.contains("layer_download") && log.contains("lists attributes of its own"), "{log}");
}

#[test]
fn root_reordered_and_repulled_layers_are_not_fetched() {
    let stage = E2eFixture::start("order", "");
    let b = &stage.builder;
    let base = stage.base_layer();
    let others: Vec<_> = (0..3)
        .map(|n| {
            b.layer(|l| {
                l.file(format!("layer/{n}"), n.to_string());
            })
        })
        .collect();
    let first = b.image("first:1", &[base.clone(), others[0].clone(), others[1].clone(), others[2].clone()], &[]);
    let second = b.image("second:1", &[others[2].clone(), others[0].clone(), base, others[1].clone()], &[]);
    for image in [&first, &second] {
        let reference = stage.publish_and_push(image);
        for round in 0..2 {
            stage.ours.pull(&reference);
            assert_eq!(stage.registry.fetched().layers_of(image), 0, "{} in round {round}", image.name);
            let id = format!("c-{round}");
            let output = stage.ours.run(&reference, &id, &["/bin/sh", "-c", "cat /layer/0 /layer/1 /layer/2"]).ok();
            assert_eq!(output, "012");
            if round == 0 {
                stage.ours.remove(&reference);
                eventually("the removed image's snapshots are gone", || {
                    stage.ours.collect_garbage();
                    committed(&stage.snapshotter.client()) == if image.name == "first:1" { 0 } else { 4 }
                });
            }
        }
    }
}

#[test]
fn root_removed_images_and_containers_leave_nothing_behind() {
    for config in ["attach = \"bind\"", "attach = \"symlink\""] {
        let stage = E2eFixture::start("removed", config);
        let image = stage.shell_image("removed:1", "x");
        let unpublished = stage.shell_image("local:1", "y");
        stage.repository.publish_layers(&unpublished.layers[..1]);
        let reference = stage.publish_and_push(&image);
        let local = stage.registry.push(&unpublished);
        for reference in [&reference, &local] {
            stage.ours.pull(reference);
            stage.ours.start_container(reference, "c", &["/bin/sleep", "1000"]);
            assert!(!stage.snapshot_dirs().is_empty());
            stage.ours.end_container("c");
        }
        for reference in [&reference, &local] {
            stage.ours.remove(reference);
        }
        eventually("all directories are gone", || {
            stage.ours.collect_garbage();
            stage.snapshot_dirs().is_empty()
        });
        assert_eq!(mounts_below(&stage.snapshotter.root()), Vec::<std::path::PathBuf>::new());
        assert_eq!(stage.snapshotter.client().list(&[]).expect("snapshots can be listed").len(), 0);
        // The repository is only read.
        for layer in &image.layers {
            assert!(stage.repository.layer_dir(&layer.digest).join("layerfs/.cvmfscatalog").exists());
        }
    }
}

#[test]
fn root_layers_are_detached_when_no_container_uses_them() {
    let stage = E2eFixture::start("detached", "attach = \"bind\"");
    let image = stage.shell_image("detached:1", "x");
    let reference = stage.publish_and_push(&image);
    stage.ours.pull(&reference);
    for id in ["one", "two"] {
        stage.ours.start_container(&reference, id, &["/bin/sleep", "1000"]);
    }
    assert_eq!(mounts_below(&stage.snapshotter.snapshots()).len(), 3);
    stage.ours.end_container("one");
    stage.ours.collect_garbage();
    assert_eq!(mounts_below(&stage.snapshotter.snapshots()).len(), 3, "another container stands on them");
    let inside = stage.ours.root_of("two").join("data/text");
    assert_eq!(fs::read_to_string(inside).expect("the other container has its files"), "x");
    stage.ours.end_container("two");
    eventually("the layers are detached", || {
        stage.ours.collect_garbage();
        mounts_below(&stage.snapshotter.snapshots()).is_empty()
    });
    assert_eq!(committed(&stage.snapshotter.client()), 3, "the image is still there");
    assert_eq!(stage.ours.run(&reference, "three", &["/bin/cat", "/data/text"]).ok(), "x");
}

/// The Go snapshotter empties its state on SIGTERM: `ls /` in a running container then prints nothing, and no image of
/// the node starts any more.
#[test]
fn root_container_survives_every_way_of_stopping_the_snapshotter() {
    for config in ["attach = \"bind\"", "attach = \"symlink\""] {
        let mut stage = E2eFixture::start("stopping", config);
        let image = stage.shell_image("stopping:1", "x");
        let reference = stage.publish_and_push(&image);
        stage.ours.pull(&reference);
        let program = "n=0; while true; do n=$((n+1)); echo $n > /data/count; echo $n >> /data/log; sleep 0.05; done";
        stage.ours.start_container(&reference, "writer", &["/bin/sh", "-c", program]);
        let inside = stage.ours.root_of("writer");
        let read = |name: &str| fs::read_to_string(inside.join("data").join(name)).unwrap_or_default();
        let count = || -> u64 { read("count").trim().parse().unwrap_or(0) };
        eventually("the container writes", || count() > 0);
        let settled = stage.snapshot_dirs();
        for (round, signal) in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGINT].into_iter().enumerate() {
            // containerd removes the snapshots of other containers at a time of its choice, which must not be taken for
            // an effect of the stop.
            eventually("what other containers left is taken away", || {
                stage.ours.collect_garbage();
                stage.snapshot_dirs() == settled
            });
            let before = (stage.snapshot_dirs(), mounts_below(&stage.snapshotter.snapshots()));
            let status = stage.snapshotter.end(signal);
            assert_eq!(status.success(), signal != Signal::SIGKILL, "{signal}: {status}");
            assert_eq!((stage.snapshot_dirs(), mounts_below(&stage.snapshotter.snapshots())), before, "{signal}");
            let written = count();
            eventually("the container writes on", || count() > written + 3);
            assert_eq!(names(&inside.join("data")), ["count", "log", "text", "top"]);
            stage.ours.exec("writer", &["/bin/true"]).ok();
            stage.snapshotter.start_again();
            assert_eq!(read("text"), "x");
            let id = format!("after-{round}");
            // containerd connects again after a pause.
            eventually("new containers start", || {
                let output = stage.ours.run(&reference, &id, &["/bin/cat", "/data/top"]);
                output.status.success() && output.stdout == "x"
            });
        }
        let lines = read("log");
        // The last line may be half written.
        let numbers: Vec<u64> =
            lines.split_inclusive('\n').filter_map(|l| l.strip_suffix('\n')?.parse().ok()).collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "a line is missing");
        stage.ours.end_container("writer");
    }
}

#[test]
fn root_kubernetes_runs_a_pod_from_published_layers() {
    let stage = E2eFixture::start("pod", "");
    let base = stage.base_layer();
    let pause = stage.builder.image_that_runs(PAUSE, &[base], &[], &["/bin/sleep", "1000"]);
    let image = stage.shell_image("pod:1", "x");
    stage.publish_and_push(&pause);
    let reference = stage.publish_and_push(&image);
    let cri = stage.ours.cri();
    cri.pull(&reference);
    let name = stage.sandbox.dir().file_name().expect("a sandbox has a name").display().to_string();
    let pod = cri.run_pod(&name, &reference, &["/bin/sleep", "1000"]);
    assert_eq!(cri.exec(&pod, &["/bin/sh", "-c", "cat /data/text; ls /data; echo new > /data/new"]), "xtext\ntop\n");
    // The pod keeps running without the snapshotter.
    let mut stage = stage;
    stage.snapshotter.end(Signal::SIGKILL);
    assert_eq!(cri.exec(&pod, &["/bin/cat", "/data/new"]), "new\n");
    stage.snapshotter.start_again();
    // containerd does not repeat a collection that fails because it has not connected again.
    eventually("containerd has connected again", || {
        stage.ours.run(&reference, "again", &["/bin/true"]).status.success()
    });
    assert_eq!(stage.registry.fetched().layers_of(&image) + stage.registry.fetched().layers_of(&pause), 0);
    cri.remove_pod(&pod);
    eventually("the layers are detached", || {
        stage.ours.collect_garbage();
        mounts_below(&stage.snapshotter.snapshots()).is_empty()
    });
}

#[test]
fn root_nerdctl_pulls_and_runs() {
    let stage = E2eFixture::start("nerdctl", "");
    let image = stage.shell_image("nerdctl:1", "x");
    let reference = stage.publish_and_push(&image);
    stage.ours.nerdctl(&["pull", &reference]).ok();
    assert_eq!(stage.registry.fetched().layers_of(&image), 0, "nerdctl fetched layers");
    let output =
        stage.ours.nerdctl(&["run", "--net", "none", "--rm", &reference, "/bin/sh", "-c", "cat /data/text; ls /data"]);
    assert_eq!(output.ok(), "xtext\ntop\n");
    // nerdctl run pulls an image that is missing.
    let other = stage.shell_image("nerdctl:2", "y");
    let reference = stage.publish_and_push(&other);
    let output = stage.ours.nerdctl(&["run", "--net", "none", "--rm", &reference, "/bin/cat", "/data/top"]);
    assert_eq!(output.ok(), "y");
    assert_eq!(stage.registry.fetched().layers_of(&other), 0, "nerdctl fetched layers");
}

#[test]
fn root_ctr_pulls_an_image_normally_and_lists_it() {
    let stage = E2eFixture::start("ctr", "");
    let image = stage.shell_image("ctr:1", "x");
    let reference = stage.publish_and_push(&image);
    // ctr 1.6 never asks for remote layers.
    stage.ours.ctr(&["images", "pull", "--plain-http", "--snapshotter", "cvmfs-snapshotter", &reference]).ok();
    assert_eq!(stage.registry.fetched().layers_of(&image), 3);
    assert_eq!(stage.ours.run(&reference, "c", &["/bin/cat", "/data/text"]).ok(), "x");
    let list = stage.ours.ctr(&["snapshots", "--snapshotter", "cvmfs-snapshotter", "ls"]).ok();
    for chain_id in &image.chain_ids {
        assert!(list.lines().any(|line| line.starts_with(chain_id.as_str()) && line.contains("Committed")), "{list}");
    }
}

#[test]
fn root_two_namespaces_pull_the_same_image_on_different_parents() {
    let stage = E2eFixture::start("namespaces", "");
    let image = stage.shell_image("namespaces:1", "x");
    // The lowest layer is not published, so each namespace has its own local one.
    stage.repository.publish_layers(&image.layers[1..]);
    let reference = stage.registry.push(&image);
    for namespace in ["k8s.io", "other"] {
        let socket = stage.ours.socket().display().to_string();
        let run = |arguments: &[&str]| {
            let first =
                ["--address", &socket, "--namespace", namespace, "--insecure-registry", "--cgroup-manager", "cgroupfs"];
            let data = stage.sandbox.path("nerdctl").display().to_string();
            let state = ["--data-root", &data, "--snapshotter", "cvmfs-snapshotter"];
            scene::process::run(scene::process::tool("nerdctl"), first.iter().chain(&state).chain(arguments))
        };
        run(&["pull", &reference]).ok();
        assert_eq!(
            run(&["run", "--net", "none", "--rm", &reference, "/bin/cat", "/data/top"]).ok(),
            "x",
            "{namespace}"
        );
    }
    let remote = stage.snapshotter.client().list(&["labels.\"containerd.io/snapshot/remote\""]).expect("a good filter");
    assert_eq!(remote.len(), 4, "two published layers over each of two parents");
}

#[test]
fn root_missing_repository_affects_only_containers_that_need_it() {
    let stage = E2eFixture::start("goes-away", "");
    let image = stage.shell_image("away:1", "x");
    let reference = stage.publish_and_push(&image);
    stage.ours.pull(&reference);
    stage.repository.unmount();
    let failed = stage.ours.run(&reference, "c", &["/bin/true"]);
    assert!(!failed.status.success());
    for part in ["is not available", &image.layers[2].digest, "scene.test", "no repository is mounted"] {
        assert!(failed.stderr.contains(part), "{part} is missing in: {}", failed.stderr);
    }
    // A pull downloads the layers.
    let local = stage.shell_image("local:1", "y");
    let pulled = stage.registry.push(&local);
    stage.ours.pull(&pulled);
    assert_eq!(stage.ours.run(&pulled, "d", &["/bin/cat", "/data/text"]).ok(), "y");
    // A call may have been under way when the repository was unmounted.
    let log = stage.snapshotter.log();
    let downloaded = log.lines().filter(|line| line.contains("layer_download"));
    assert_eq!(downloaded.filter(|line| line.contains("no repository is mounted")).count(), 3, "{log}");
    stage.repository.mount();
    assert_eq!(stage.ours.run(&reference, "e", &["/bin/cat", "/data/text"]).ok(), "x");
}

#[test]
fn root_bind_mounted_layers_are_read_only() {
    let stage = E2eFixture::start("read-only", "attach = \"bind\"");
    let image = stage.shell_image("ro:1", "x");
    let reference = stage.publish_and_push(&image);
    stage.ours.pull(&reference);
    stage.ours.start_container(&reference, "c", &["/bin/sleep", "1000"]);
    let mounts = mounts_below(&stage.snapshotter.snapshots());
    assert_eq!(mounts.len(), 3);
    for mount in &mounts {
        assert!(fs::write(mount.join("new"), "").is_err(), "{} is writable", mount.display());
    }
    stage.ours.exec("c", &["/bin/sh", "-c", "rm -r /data && mkdir /data && touch /bin/new"]).ok();
    let all: Vec<&Blob> = image.layers.iter().collect();
    for layer in all {
        let top = stage.repository.layer_dir(&layer.digest).join("layerfs");
        assert!(names(&top).iter().all(|name| {
            ["bin", "data", "dev", "etc", "proc", "run", "sys", "tmp", ".cvmfscatalog"].contains(&name.as_str())
        }));
        assert!(!Path::new(&top).join("bin/new").exists());
    }
    stage.ours.end_container("c");
}
