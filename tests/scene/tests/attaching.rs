//! Attaching and detaching of layers below containers: in both modes, concurrently, after a reboot, after failures, and
//! after a scan.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use scene::client::Client;
use scene::doctor::read;
use scene::e2e_fixture::names;
use scene::process::{eventually, run};
use scene::publisher::Repository;
use scene::rootfs::Mounted;
use scene::sandbox::{Sandbox, mount_tmpfs, mounts_below};
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::{
    SnapshotterFixture, assert_refused, assert_unavailable, assert_unavailable_with_advice, digest, options, pull_chain,
};
use serde_json::Value;

const MODES: [&str; 2] = ["attach = \"bind\"\nrepository-timeout = 4", "attach = \"symlink\"\nrepository-timeout = 4"];

#[test]
fn root_changing_attach_mode_works_with_existing_snapshots() {
    let mut d = SnapshotterFixture::start("modes", "attach = \"bind\"");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let before = d.client.prepare("container", &name, &[]).unwrap();
    for (config, mounts) in [("attach = \"symlink\"", 0), ("attach = \"bind\"", 1)] {
        d.snapshotter.end(Signal::SIGTERM);
        drop(std::mem::replace(
            &mut d.snapshotter,
            Snapshotter::start(&d.sandbox.path("s"), d.repository.dir(), config),
        ));
        let c = d.snapshotter.client();
        assert_eq!(c.mounts("container").unwrap(), before);
        eventually("mounts that nobody is led to go", || {
            c.cleanup().unwrap();
            mounts_below(&d.snapshotter.snapshots()).len() == mounts
        });
        let at = d.sandbox.path("mnt");
        let mounted = Mounted::new(&before, &at).unwrap();
        assert_eq!(fs::read_to_string(at.join("dir/file-1")).unwrap(), "1");
        drop(mounted);
    }
    let c = d.snapshotter.client();
    c.remove("container").unwrap();
    c.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
}

#[test]
fn root_attachments_lost_in_reboot_are_restored() {
    let mut d = SnapshotterFixture::start("reboot", "attach = \"bind\"");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let before = d.client.prepare("container", &name, &[]).unwrap();
    d.snapshotter.end(Signal::SIGKILL);
    for mount in mounts_below(&d.snapshotter.snapshots()) {
        run("umount", [mount]).ok();
    }
    d.snapshotter.start_again();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0, "nothing is mounted until it is needed");
    let c = d.snapshotter.client();
    assert_eq!(c.mounts("container").unwrap(), before);
    let [mount] = &mounts_below(&d.snapshotter.snapshots())[..] else { panic!("the layer is attached again") };
    assert_eq!(fs::read_to_string(mount.join("dir/file-1")).unwrap(), "1");
}

#[test]
fn root_stale_attachment_is_replaced() {
    let d = SnapshotterFixture::start("stale", "attach = \"bind\"");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    d.client.prepare("container", &name, &[]).unwrap();
    let layer = || match &mounts_below(&d.snapshotter.snapshots())[..] {
        [layer] => layer.clone(),
        mounts => panic!("the layer is attached once: {mounts:?}"),
    };
    let fine = |what: &str| {
        let mounts = d.client.mounts("container").unwrap();
        let lower = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap();
        let lower = Path::new(lower.split(':').next_back().unwrap());
        assert_eq!(fs::read_to_string(lower.join("dir/file-1")).unwrap(), "1", "{what}");
        assert!(fs::write(lower.join("new"), "").is_err(), "{what}: the layer is writable");
        eventually(&format!("{what}: what was mounted before goes"), || {
            d.client.cleanup().unwrap();
            mounts_below(&d.snapshotter.snapshots()) == [lower.canonicalize().unwrap()]
        });
    };
    run("mount", ["-o".as_ref(), "remount,bind,rw".as_ref(), layer().as_os_str()]).ok();
    fine("a crash came before read-only");
    mount_tmpfs(&layer(), "size=1m");
    fine("something else is mounted there");
    let busy = layer();
    mount_tmpfs(&busy, "size=1m");
    let open = fs::File::create(busy.join("in-use")).unwrap();
    fine("something else is mounted there and busy");
    drop(open);
    run("umount", [layer()]).ok();
    fine("nothing is mounted there");
    d.client.remove("container").unwrap();
    // The mount may be busy for a moment, because the thread of another test is just forking a process.
    eventually("the layer is detached", || {
        d.client.cleanup().unwrap();
        mounts_below(&d.snapshotter.snapshots()).is_empty()
    });
}

#[test]
fn root_failed_container_start_leaves_no_layer_attached() {
    let d = SnapshotterFixture::start("half-way", "attach = \"bind\"");
    let first = d.client.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    let second = d.client.pull_remote("extract-2", &first, "sha256:c2", &digest(2));
    d.repository.withdraw(&digest(1));
    let message = assert_refused(d.client.prepare("container", &second, &[]), Code::UNAVAILABLE);
    assert!(
        message.contains(&digest(1)) && message.contains("scene.test") && message.contains("pull it anew"),
        "{message}"
    );
    d.client.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
    assert_eq!(scene::e2e_fixture::names(&d.snapshotter.snapshots()), Vec::<String>::new());
    // The image can still be removed.
    d.client.remove(&second).unwrap();
    d.client.remove(&first).unwrap();
}

#[test]
fn root_next_container_sees_republished_layer() {
    let sandbox = Sandbox::enter("anew");
    // The repository is on its own device, as a mounted repository is.
    mount_tmpfs(&sandbox.make_dir("cvmfs"), "size=8m");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let top = repository.layer_dir(&digest(1)).join("layerfs");
    let publish = |text: &str| {
        fs::create_dir_all(top.join("dir")).unwrap();
        fs::write(top.join("dir/file"), text).unwrap();
        fs::write(top.join("dir/.wh.gone"), "").unwrap();
        fs::write(top.join(".cvmfscatalog"), "").unwrap();
        fs::write(top.join(".cvmfsautocatalog"), "").unwrap();
    };
    publish("first");
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    let c = snapshotter.client();
    let name = c.pull_remote("extract-1", "", "sha256:c", &digest(1));
    let at = sandbox.path("mnt");
    let seen = |key: &str| {
        let mounted = Mounted::new(&c.prepare(key, &name, &[]).unwrap(), &at).unwrap();
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(at.join("dir")).unwrap());
        let names = scene::e2e_fixture::names(mounted.path());
        (fs::read_to_string(at.join("dir/file")).unwrap(), owner, names)
    };
    assert_eq!(seen("one"), ("first".to_owned(), 0, vec!["dir".to_owned()]), "no marker of the publisher shows");
    fs::remove_dir_all(&top).unwrap();
    publish("second");
    assert_eq!(seen("two").0, "second");
    // Another mount of the repository may show other owners.
    std::os::unix::fs::chown(top.join("dir"), Some(1234), None).unwrap();
    for key in ["one", "two"] {
        c.remove(key).unwrap();
    }
    scene::process::eventually("the layer is detached", || {
        c.cleanup().unwrap();
        mounts_below(&snapshotter.snapshots()).is_empty()
    });
    assert_eq!(seen("three").1, 1234);
}

#[test]
fn root_open_file_in_detached_layer_stays_readable_without_its_mount() {
    let d = SnapshotterFixture::start("open-file", "attach = \"bind\"");
    let name = d.client.pull_remote("extract-1", "", "sha256:c", &digest(1));
    d.client.prepare("container", &name, &[]).unwrap();
    let [layer] = &mounts_below(&d.snapshotter.snapshots())[..] else { panic!("the layer is attached") };
    let mut open = fs::File::open(layer.join("dir/file-1")).unwrap();
    d.client.remove("container").unwrap();
    d.client.cleanup().unwrap();
    assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut open, &mut text).unwrap();
    assert_eq!(text, "1");
}

/// CernVM-FS reports a name length of 0. Overlayfs takes the largest name length of its layers, so without a local
/// layer every lookup fails.
#[test]
fn root_view_of_layers_without_markers_is_readable() {
    let sandbox = Sandbox::enter("names");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    for n in 1..=2 {
        let top = repository.layer_dir(&digest(n)).join("layerfs/dir");
        fs::create_dir_all(&top).expect("a layer can be made");
        fs::write(top.join(n.to_string()), "x").expect("a layer can be filled");
    }
    repository.commit();
    for config in MODES {
        let snapshotter =
            Snapshotter::start(&sandbox.path(&config[10..12].replace('"', "x")), repository.dir(), config);
        let c = snapshotter.client();
        let first = c.pull_remote("extract-1", "", "sha256:c1", &digest(1));
        let second = c.pull_remote("extract-2", &first, "sha256:c2", &digest(2));
        let view = c.view("view", &second, &[]).expect("a view");
        let lower = options(&view)[0].clone();
        let at = sandbox.path("mnt");
        let mounted = Mounted::new(&view, &at).expect("an overlay");
        assert_eq!(names(&at.join("dir")), ["1", "2"]);
        drop(mounted);
        // This proves that the test can fail: without our directory the lookup does not work.
        let mut without = view.clone();
        let directories: Vec<&str> = lower.trim_start_matches("lowerdir=").split(':').collect();
        assert_eq!(directories.len(), 3, "{lower}");
        without[0].options[0] = format!("lowerdir={}:{}", directories[1], directories[2]);
        let mounted = Mounted::new(&without, &at).expect("an overlay");
        let error = fs::metadata(at.join("dir")).expect_err("names have 0 bytes");
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENAMETOOLONG));
        drop(mounted);
    }
}

#[test]
fn root_concurrent_first_uses_attach_each_layer_once() {
    for (config, mounts) in MODES.into_iter().zip([3, 0]) {
        let d = SnapshotterFixture::start("hundred", config);
        let chain = pull_chain(&d.client);
        std::thread::scope(|scope| {
            for n in 0..100 {
                let (c, chain) = (d.snapshotter.client(), &chain);
                scope.spawn(move || c.prepare(&n.to_string(), chain, &[]).expect("a container starts"));
            }
        });
        assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), mounts);
        let mounted =
            Mounted::new(&d.client.mounts("73").expect("it is there"), &d.sandbox.path("mnt")).expect("an overlay");
        assert_eq!(names(&mounted.path().join("dir")), ["file-1", "file-2", "file-3"]);
    }
}

#[test]
fn root_failed_attach_is_undone_and_can_be_retried() {
    for config in MODES {
        let d = SnapshotterFixture::start("undone", config);
        let chain = pull_chain(&d.client);
        let nothing_is_left = |what: &str| {
            assert_eq!(names(&d.snapshotter.snapshots()), Vec::<String>::new(), "{what}");
            assert_eq!(mounts_below(&d.snapshotter.snapshots()).len(), 0, "{what}");
        };
        d.repository.command("fail EIO");
        let message = assert_unavailable_with_advice(d.client.prepare("container", &chain, &[]));
        assert!(message.contains("EIO"), "{message}");
        nothing_is_left("every question failed");
        d.repository.command("normal");
        // The second of the three layers is missing.
        d.repository.withdraw(&digest(2));
        let message = assert_unavailable_with_advice(d.client.prepare("container", &chain, &[]));
        assert!(message.contains(&digest(2)) && message.contains("does not have it"), "{message}");
        nothing_is_left("a layer is missing");
        let top = d.repository.layer_dir(&digest(2)).join("layerfs/dir");
        fs::create_dir_all(&top).expect("a layer can be made");
        d.repository.commit();
        d.client.prepare("container", &chain, &[]).expect("everything is there");
    }
}

#[test]
fn root_incomplete_scan_is_not_taken_for_a_layer_without_deletions() {
    let sandbox = Sandbox::enter("unreadable");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    let top = |n| repository.layer_dir(&digest(n)).join("layerfs");
    fs::create_dir_all(top(1).join("dir")).expect("a layer can be made");
    fs::write(top(1).join("dir/secret"), "x").expect("a layer can be filled");
    std::os::unix::fs::chown(top(1).join("dir/secret"), Some(5), None).expect("a file can be given to somebody");
    fs::create_dir_all(top(2).join("dir")).expect("a layer can be made");
    fs::write(top(2).join("dir/.wh.secret"), "").expect("a layer can be filled");
    repository.commit();
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "repository-timeout = 4");
    let c = snapshotter.client();
    let first = c.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    repository.command("slow 400");
    let second = c.pull_remote("extract-2", &first, "sha256:c2", &digest(2));
    repository.command("fail EIO");
    assert_unavailable(c.prepare("container", &second, &[]));
    repository.command("normal");
    let seen = |c: &Client, key: &str| {
        let mounted = Mounted::new(&c.prepare(key, &second, &[]).expect("it can be read"), &sandbox.path("mnt"));
        names(&mounted.expect("an overlay").path().join("dir"))
    };
    assert_eq!(seen(&c, "one"), Vec::<String>::new(), "the deletion counts");
    // The result of the scan is stored: after a restart the layer is not read again.
    c.remove("one").expect("it is there");
    c.cleanup().expect("a cleanup succeeds");
    snapshotter.end(Signal::SIGKILL);
    snapshotter.start_again();
    let c = snapshotter.client();
    // The start reads a sample of the layers.
    let is_sampled =
        |log: String| log.rsplit("repository_available").next().is_some_and(|rest| rest.contains("owners are kept"));
    eventually("it is looked at", || {
        let log = snapshotter.log();
        log.matches("repository_available").count() == 2 && is_sampled(log)
    });
    let reads = || {
        let counted = repository.command("requests");
        let count = counted.split(' ').find_map(|word| word.strip_prefix("opendir=")).expect("they are counted");
        count.parse::<u64>().expect("a number")
    };
    let before = reads();
    c.prepare("two", &second, &[]).expect("it can be read");
    assert_eq!(reads(), before, "no directory was read");
}

/// The refusal of a layer is stored, yet `status` and the doctor called its image good, and the message of each start
/// gave useless advice.
#[test]
fn root_image_on_refused_layer_fails_until_pulled_again() {
    let sandbox = Sandbox::enter("refused");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    // The path is longer than a directory of a mask may be.
    let deep: PathBuf = vec!["d".repeat(250); 15].iter().collect();
    let marked = repository.layer_dir(&digest(1)).join("layerfs").join(deep);
    fs::create_dir_all(&marked).expect("a layer can be made");
    fs::write(marked.join(".wh.gone"), "").expect("a layer can be marked");
    repository.commit();
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    let c = snapshotter.client();
    let digest = digest(1);
    let labels = [
        ("containerd.io/snapshot.ref", "sha256:c1"),
        ("containerd.io/snapshot/cri.layer-digest", digest.as_str()),
        ("containerd.io/snapshot/cri.image-ref", "r.test/deep:1"),
    ];
    assert_refused(c.prepare("k8s.io/1/extract-1 sha256:c1", "", &labels), Code::ALREADY_EXISTS);
    let chain = c.list(&[]).expect("snapshots can be listed").swap_remove(0).name;
    let message = assert_unavailable(c.prepare("container", &chain, &[]));
    assert!(
        message.ends_with("; remove every image with this layer and pull it anew: the layer is downloaded then"),
        "{message}"
    );
    for other in ["retry", "doctor", "mounted"] {
        assert!(!message.contains(other), "{other} does not help: {message}");
    }

    let image = || {
        let status: Value = serde_json::from_str(&snapshotter.admin(&["status", "--json"]).ok()).expect("it is JSON");
        status["images"][0].clone()
    };
    let diagnosed = || {
        let findings = read(&snapshotter.admin(&["doctor", "--json"]));
        findings.into_iter().find(|one| one.check == "state.images").expect("images are looked at")
    };
    let broken = image();
    assert_eq!(broken["image"], "r.test/deep:1");
    assert!(broken["broken"].as_str().is_some_and(|why| why.contains(&digest)), "{broken}");
    assert!(broken["remedy"].as_str().is_some_and(|what| what.contains("downloaded")), "{broken}");
    let line = snapshotter.admin(&["status"]).ok();
    let line = line.lines().find(|line| line.starts_with("broken: r.test/deep:1: ")).expect("the image is broken");
    assert!(line.ends_with("the layer is downloaded then"), "{line}");
    let found = diagnosed();
    assert_eq!(found.state, "problem", "{found:?}");
    let remedy = found.remedy.expect("a problem has a remedy");
    assert!(remedy.contains("rmi r.test/deep:1") && remedy.contains("downloaded"), "{remedy}");

    c.remove(&chain).expect("nobody stands on it");
    c.prepare("k8s.io/2/extract-1 sha256:c1", "", &labels).expect("the layer is downloaded");
    c.commit("unpacked", "k8s.io/2/extract-1 sha256:c1", &labels).expect("it can be committed");
    assert_eq!(image()["broken"], Value::Null);
    assert_eq!(diagnosed().state, "good");
}

/// The first container on a very large layer must not wait for ever, and must not blame the repository. A later
/// container finds the finished scan.
#[test]
fn root_wait_for_slow_scan_is_limited_and_scan_continues() {
    let sandbox = Sandbox::enter("long-scan");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    fs::create_dir_all(repository.layer_dir(&digest(1)).join("layerfs/dir")).expect("a layer can be made");
    for layer in 2..=7 {
        let top = repository.layer_dir(&digest(layer)).join("layerfs");
        for n in 0..300 {
            fs::create_dir_all(top.join(n.to_string())).expect("a layer can be made");
        }
        fs::write(top.join("299/.wh.gone"), "").expect("a layer can be marked");
    }
    repository.commit();
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "repository-timeout = 2");
    let c = snapshotter.client();
    let first = c.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    repository.command("slow 200");
    let mut chain = first.clone();
    for n in 2..=7 {
        chain = c.pull_remote(&format!("extract-{n}"), &chain, &format!("sha256:c{n}"), &digest(n));
    }
    let begun = Instant::now();
    let message = assert_unavailable(c.prepare("container", &chain, &[]));
    assert!(message.contains("its scan is not finished") && message.contains("directories so far"), "{message}");
    assert!(message.ends_with("try again"), "nothing else is to be done: {message}");
    // Six scans of four threads run two at a time, so their waits do not add up.
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    // Other images need no scan, and their calls do not blame the repository.
    for n in 0..5 {
        c.prepare(&format!("other-{n}"), &first, &[]).expect("another image starts");
    }
    repository.command("hang all");
    let begun = Instant::now();
    // The error names the first layer that is missing, whose scan may not have begun.
    assert_unavailable(c.prepare("container", &chain, &[]));
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    eventually("the log says who is to blame", || snapshotter.log().contains("repository_down"));
    assert_eq!(snapshotter.log().matches("repository_down").count(), 1, "only once it hung it was to blame");
    repository.command("normal");
    eventually("it goes on and is done", || c.prepare("container", &chain, &[]).is_ok());
}
