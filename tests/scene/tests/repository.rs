//! Repositories that hang, die, return, are late, or lose layers, with a real FUSE mount below a real containerd, in
//! both attach modes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use scene::automounter::Automounter;
use scene::client::{CallResult, Client, LAYER_DIGEST, REF};
use scene::e2e_fixture::{E2eFixture, names};
use scene::metrics::{sample, scrape};
use scene::process::eventually;
use scene::publisher::{NAME, Repository};
use scene::rootfs::Mounted;
use scene::sandbox::{Sandbox, mounts_below};
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::{
    SnapshotterFixture, assert_unavailable, assert_unavailable_with_advice, digest, pull_chain,
};

/// The timeout is long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(4);
const MODES: [&str; 2] = ["attach = \"bind\"\nrepository-timeout = 4", "attach = \"symlink\"\nrepository-timeout = 4"];

const UP: &str = "repository_up{repository=\"scene.test\"}";

/// A path for a configuration's `metrics-address`.
fn metrics_socket(name: &str) -> PathBuf {
    PathBuf::from(format!("/run/scene-{name}-{}.sock", std::process::id()))
}

/// Makes every kind of call that needs no repository. The result is the longest duration.
fn unrelated_calls(client: &Client, round: usize, local: &str, remote: &str) -> Duration {
    let (key, name) = (format!("active-{round}"), format!("name-{round}"));
    let mut longest = Duration::ZERO;
    let mut timed = |what: &str, call: &dyn Fn() -> CallResult<()>| {
        let begun = Instant::now();
        call().unwrap_or_else(|status| panic!("{what}: {}", status.message()));
        longest = longest.max(begun.elapsed());
    };
    timed("stat", &|| client.stat(remote).map(drop));
    timed("list", &|| client.list(&[]).map(drop));
    timed("prepare", &|| client.prepare(&key, local, &[]).map(drop));
    timed("mounts", &|| client.mounts(&key).map(drop));
    timed("usage", &|| client.usage(&key).map(drop));
    timed("usage of a remote one", &|| client.usage(remote).map(drop));
    timed("update", &|| client.update(client.stat(remote)?, &["labels"]).map(drop));
    timed("commit", &|| client.commit(&name, &key, &[]));
    timed("view", &|| client.view(&key, &name, &[]).map(drop));
    timed("remove", &|| client.remove(&key));
    timed("remove", &|| client.remove(&name));
    timed("cleanup", &|| client.cleanup());
    longest
}

/// Continues the client and ends the threads on drop. Otherwise a failed assertion beside them would wait for both and
/// never be reported.
struct Stopped<'a> {
    repository: &'a Repository,
    over: &'a AtomicBool,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.repository.with_client(|mount| mount.signal(Signal::SIGCONT));
    }
}

/// Continues stopped clients on drop.
struct Resumed<'a>(&'a Repository);

impl Drop for Resumed<'_> {
    fn drop(&mut self) {
        self.0.resume_clients();
    }
}

#[test]
fn root_hung_repository_delays_only_calls_that_need_it() {
    for config in MODES {
        let d = SnapshotterFixture::start("hangs", config);
        let c = &d.client;
        let chain = pull_chain(c);
        c.prepare("running", &chain, &[]).expect("the repository answers");
        for key in ["removed-1", "removed-2"] {
            c.prepare(key, &chain, &[]).expect("the repository answers");
        }
        c.prepare("local-key", "", &[]).expect("a local snapshot needs no repository");
        c.commit("local", "local-key", &[]).expect("a local snapshot needs no repository");

        d.repository.with_client(|mount| mount.signal(Signal::SIGSTOP));
        let over = AtomicBool::new(false);
        let longest = std::thread::scope(|scope| {
            let stopped = Stopped { repository: &d.repository, over: &over };
            let others = scope.spawn(|| {
                let c = d.snapshotter.client();
                let (mut round, mut longest) = (0, Duration::ZERO);
                while !over.load(Ordering::Relaxed) || round < 3 {
                    longest = longest.max(unrelated_calls(&c, round, "local", &chain));
                    round += 1;
                }
                longest
            });
            // These are more calls than there are workers.
            let begun = Instant::now();
            std::thread::scope(|starts| {
                for n in 0..12 {
                    let (c, chain) = (d.snapshotter.client(), &chain);
                    starts.spawn(move || assert_unavailable(c.prepare(&format!("start-{n}"), chain, &[])));
                }
            });
            assert!(begun.elapsed() < TIMEOUT * 3, "container starts took {:?}", begun.elapsed());
            // From now on the repository is known to hang.
            let begun = Instant::now();
            let message = assert_unavailable_with_advice(c.mounts("running"));
            assert!(message.contains("it has not answered for"), "{message}");
            assert_unavailable(c.view("view", &chain, &[]));
            assert!(begun.elapsed() < TIMEOUT, "it is asked in vain again: {:?}", begun.elapsed());
            let pulled = c.prepare("extract-9 sha256:c9", &chain, &[(REF, "sha256:c9"), (LAYER_DIGEST, &digest(2))]);
            assert_unavailable(pulled);
            let pulled = c.prepare("extract-8 sha256:c8", "", &[(REF, "sha256:c8"), (LAYER_DIGEST, &digest(2))]);
            assert_eq!(pulled.expect("it is downloaded").len(), 1);
            // Snapshots that containers left can be removed nevertheless.
            for key in ["removed-1", "removed-2", "running"] {
                c.remove(key).expect("a removal needs no repository");
            }
            c.cleanup().expect("a cleanup needs no repository");
            over.store(true, Ordering::Relaxed);
            let longest = others.join().expect("no call fails");
            drop(stopped);
            longest
        });
        println!("{config:?}: the longest unrelated call while the repository hung took {longest:?}");
        assert!(longest < TIMEOUT / 2, "an unrelated call took {longest:?}");

        eventually("the repository is found to answer again", || c.prepare("after", &chain, &[]).is_ok());
        let mounted =
            Mounted::new(&c.mounts("after").expect("it answers"), &d.sandbox.path("mnt")).expect("an overlay");
        assert_eq!(names(&mounted.path().join("dir")), ["file-1", "file-2", "file-3"]);
        drop(mounted);
        let log = d.snapshotter.log();
        for (line, times) in [("repository_down", 1), ("repository_up", 1)] {
            assert_eq!(log.matches(line).count(), times, "{line}");
        }
        // The threads that hung have ended and left nothing behind.
        c.remove("after").expect("it is there");
        eventually("everything is detached", || {
            c.cleanup().expect("a cleanup succeeds");
            mounts_below(&d.snapshotter.snapshots()).is_empty()
        });
    }
}

#[test]
fn root_repository_that_answers_only_statfs_is_reported_down() {
    for config in MODES {
        let d = SnapshotterFixture::start("half-dead", config);
        let chain = pull_chain(&d.client);
        d.repository.command("hang tree");
        assert_unavailable(d.client.prepare("first", &chain, &[]));
        let begun = Instant::now();
        for n in 0..4 {
            assert_unavailable(d.client.prepare(&format!("next-{n}"), &chain, &[]));
        }
        assert!(begun.elapsed() < TIMEOUT, "it is waited for again and again: {:?}", begun.elapsed());
        d.repository.command("normal");
        eventually("it answers again", || d.client.prepare("after", &chain, &[]).is_ok());
    }
}

/// The client hangs for ever, and an administrator mounts the repository again over it. Threads, probes, scans and
/// locks that hung in the old mount were taken for those of the new one.
#[test]
fn root_hung_mount_does_not_affect_its_replacement() {
    let socket = metrics_socket("in-its-place");
    for attach in ["bind", "symlink"] {
        let config = format!("attach = \"{attach}\"\nrepository-timeout = 1\nmetrics-address = {socket:?}");
        let d = SnapshotterFixture::start("in-its-place", &config);
        let _resumed = Resumed(&d.repository);
        let c = &d.client;
        let chain = pull_chain(c);
        c.prepare("running", &chain, &[]).expect("the repository answers");
        // This layer was not scanned before.
        let top = d.repository.layer_dir(&digest(7)).join("layerfs/dir");
        fs::create_dir_all(&top).expect("a layer can be made");
        d.repository.commit();
        let mut n = 0;
        for round in 0..2 {
            d.repository.with_client(|mount| mount.signal(Signal::SIGSTOP));
            let until = Instant::now() + Duration::from_secs(6);
            // This call starts a probe that hangs.
            c.is_serving(NAME);
            while Instant::now() < until {
                n += 1;
                assert!(c.prepare(&format!("hangs-{n}"), &chain, &[]).is_err());
            }
            d.repository.mount_beside();
            let begun = Instant::now();
            eventually("the new mount serves", || {
                n += 1;
                c.prepare(&format!("after-{n}"), &chain, &[]).is_ok()
            });
            assert!(begun.elapsed() < Duration::from_secs(10), "round {round}: {:?}", begun.elapsed());
            // The probe that hung in the old mount reported the repository as down for as long as it hung.
            eventually("health is that of the new mount", || c.is_serving(NAME) && sample(&scrape(&socket), UP) == 1);
        }
        let new = c.pull_remote("extract-7", &chain, "sha256:c7", &digest(7));
        c.prepare("new", &new, &[]).expect("a layer that was never scanned is scanned now");
        // The second mount dies as well, and is replaced by a third.
        d.repository.with_client(scene::publisher::Mount::kill);
        assert_unavailable(c.prepare("dead", &new, &[]));
        d.repository.mount();
        eventually("the next one serves", || {
            n += 1;
            c.prepare(&format!("last-{n}"), &new, &[]).is_ok()
        });
        assert!(d.snapshotter.log().contains("repository_remounted"));
        for info in c.list(&["kind==active"]).expect("a good filter") {
            c.remove(&info.name).expect("it is there");
        }
        eventually("everything is detached", || {
            c.cleanup().expect("a cleanup succeeds");
            names(&d.snapshotter.snapshots()).is_empty()
        });
    }
}

/// A new mount was searched for at exactly the repository's path and never noticed elsewhere: no container started
/// until the client that hung was killed.
#[test]
fn root_remount_is_noticed_through_subdirectory_and_symlink() {
    for attach in ["bind", "symlink"] {
        for place in ["cvmfs/compat", "link"] {
            let sandbox = Sandbox::enter("below");
            let repository = Repository::mounted(&sandbox.path("cvmfs"));
            let top = repository.layer_dir(&digest(1)).join("layerfs/dir");
            fs::create_dir_all(&top).expect("a layer can be made");
            let compat = repository.tree().join("compat");
            fs::create_dir(&compat).expect("a directory can be made");
            fs::rename(repository.tree().join(".layers"), compat.join(".layers")).expect("it can be moved");
            repository.commit();
            symlink("cvmfs/compat", sandbox.path("link")).expect("a link can be made");
            let config = format!("attach = \"{attach}\"\nrepository-timeout = 1");
            let snapshotter = Snapshotter::start(&sandbox.path("s"), &sandbox.path(place), &config);
            let c = snapshotter.client();
            let _resumed = Resumed(&repository);
            let layer = c.pull_remote("extract-1", "", "sha256:c1", &digest(1));
            c.prepare("before", &layer, &[]).expect("the repository answers");
            repository.with_client(|mount| mount.signal(Signal::SIGSTOP));
            let mut n = 0;
            // By then the greatest possible number of probes hangs.
            let until = Instant::now() + Duration::from_secs(8);
            while Instant::now() < until {
                n += 1;
                assert_unavailable(c.prepare(&format!("hangs-{n}"), &layer, &[]));
            }
            repository.mount_beside();
            eventually("the new mount serves", || {
                n += 1;
                c.prepare(&format!("after-{n}"), &layer, &[]).is_ok()
            });
            let answer = c.mounts(&format!("after-{n}")).expect("it is there");
            let mounted = Mounted::new(&answer, &sandbox.path("mnt")).expect("an overlay");
            assert_eq!(names(mounted.path()), ["dir"], "{attach}, {place}");
            drop(mounted);
            assert!(snapshotter.log().contains("repository_remounted"), "{attach}, {place}");
        }
    }
}

/// A process that is killed while a thread hangs in a repository cannot end, and its successor reported that another
/// daemon was running, which could not be stopped.
#[test]
fn root_start_beside_unkillable_predecessor_explains_remedy() {
    let mut d = SnapshotterFixture::start("held", "repository-timeout = 1");
    let chain = pull_chain(&d.client);
    d.repository.command("hang tree");
    assert_unavailable(d.client.prepare("hangs", &chain, &[]));
    d.snapshotter.server().signal(Signal::SIGKILL);
    let output = d.snapshotter.command().output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let pid = d.snapshotter.server().pid().to_string();
    for part in [pid.as_str(), "was killed and still holds the state root", "hangs in a repository", "start again"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    d.repository.command("normal");
    d.snapshotter.server().wait_for_end();
    d.snapshotter.start_again();
    d.snapshotter.client().prepare("after", &chain, &[]).expect("the repository answers");
}

#[test]
fn root_calls_wait_for_slow_repository() {
    for config in MODES {
        let d = SnapshotterFixture::start("slow", config);
        let chain = pull_chain(&d.client);
        d.repository.command("slow 100");
        d.client.prepare("container", &chain, &[]).expect("slow is not dead");
        d.repository.command("normal");
        assert!(!d.snapshotter.log().contains("repository_down"));
    }
}

/// A crash of the client as a site sees it: the mount hangs, is dead for two seconds, becomes an empty directory, and is
/// mounted again.
#[test]
fn root_repository_that_died_and_returned_serves_the_next_container() {
    for config in MODES {
        let stage = E2eFixture::start("died", config);
        let published = stage.shell_image("died:1", "x");
        let reference = stage.publish_and_push(&published);
        let local = stage.registry.push(&stage.shell_image("local:1", "y"));
        stage.ours.pull(&reference);
        stage.ours.pull(&local);
        stage.ours.run(&reference, "before", &["/bin/true"]).ok();
        let program =
            "n=0; while true; do n=$((n+1)); cat /data/text > /dev/null || exit 1; echo $n > /count; sleep 0.05; done";
        stage.ours.start_container(&local, "writer", &["/bin/sh", "-c", program]);
        stage.ours.start_container(&reference, "idle", &["/bin/sleep", "1000"]);
        let inside = stage.ours.root_of("writer");
        let count = || fs::read_to_string(inside.join("count")).unwrap_or_default().trim().parse().unwrap_or(0_u64);

        let mut pulls = 0;
        let mut pull_downloads = |why: &str| {
            pulls += 1;
            let other = stage.shell_image(&format!("other:{pulls}"), &pulls.to_string());
            // The layer is published, but that cannot be known while the repository is down.
            let reference = stage.registry.push(&other);
            let begun = Instant::now();
            stage.ours.pull(&reference);
            assert!(begun.elapsed() < TIMEOUT * 3, "a pull took {:?}", begun.elapsed());
            assert_eq!(stage.registry.fetched().layers_of(&other), 3, "{why}");
            assert_eq!(
                stage.ours.run(&reference, &format!("other-{pulls}"), &["/bin/cat", "/data/top"]).ok(),
                pulls.to_string()
            );
        };
        let fails = |id: &str, why: &str| {
            let failed = stage.ours.run(&reference, id, &["/bin/true"]);
            assert!(!failed.status.success());
            for part in ["is not available", &published.layers[2].digest, "scene.test", why] {
                assert!(failed.stderr.contains(part), "{part} is missing in: {}", failed.stderr);
            }
        };
        stage.repository.with_client(|mount| mount.signal(Signal::SIGSTOP));
        let begun = Instant::now();
        fails("hangs", "did not answer within 4 s");
        assert!(begun.elapsed() < TIMEOUT * 3, "a start took {:?}", begun.elapsed());
        pull_downloads("the repository hangs");
        stage.repository.with_client(scene::publisher::Mount::kill);
        fails("dead", "ENOTCONN");
        pull_downloads("the repository is dead");
        stage.repository.unmount();
        fails("gone", "no repository is mounted");
        pull_downloads("no repository is mounted");
        let written = count();
        stage.repository.mount();
        let output = stage.ours.run(&reference, "after", &["/bin/sh", "-c", "cat /data/text; ls /data"]);
        assert_eq!(output.ok(), "xtext\ntop\n", "the first start after it came back");
        eventually("the container of the local image writes on", || count() > written + 3);
        for id in ["writer", "idle"] {
            stage.ours.end_container(id);
        }
        stage.ours.remove(&reference);
        eventually("everything is detached", || {
            stage.ours.collect_garbage();
            mounts_below(&stage.snapshotter.snapshots()).is_empty()
        });
    }
}

#[test]
fn root_missing_repository_is_logged_once_and_used_when_it_appears() {
    for config in MODES {
        let sandbox = Sandbox::enter("late");
        let repository = Repository::mounted(&sandbox.path("cvmfs"));
        fs::create_dir_all(repository.layer_dir(&digest(1)).join("layerfs/dir")).expect("a layer can be made");
        repository.commit();
        repository.unmount();
        let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
        let c = snapshotter.client();
        eventually("it is logged", || {
            let log = snapshotter.log();
            log.contains("repository_unavailable") && log.contains("no repository is mounted")
        });
        for n in 0..3 {
            let answer =
                c.prepare(&format!("extract-{n} sha256:c"), "", &[(REF, "sha256:c"), (LAYER_DIGEST, &digest(1))]);
            assert_eq!(answer.expect("it is downloaded").len(), 1);
        }
        assert_eq!(snapshotter.log().matches("repository_unavailable").count(), 1);
        repository.mount();
        let name = c.pull_remote("extract-9", "", "sha256:c", &digest(1));
        c.prepare("container", &name, &[]).expect("it has appeared");
    }
}

/// Sites mount `/cvmfs` with the kernel's autofs and an automounter, which mounts a repository on access.
#[test]
fn root_access_makes_autofs_mount_the_repository() {
    for config in MODES {
        let sandbox = Sandbox::enter("autofs");
        let repository = Repository::mounted(&sandbox.path("real"));
        fs::create_dir_all(repository.layer_dir(&digest(1)).join("layerfs/dir")).expect("a layer can be made");
        repository.commit();
        let Some(automounter) = Automounter::start_or_skip(&sandbox, repository.dir()) else { return };
        let path = automounter.dir.join("scene.test");
        let snapshotter = Snapshotter::start(&sandbox.path("s"), &path, config);
        let c = snapshotter.client();
        eventually("it is logged", || snapshotter.log().contains("repository_unavailable"));
        let answer = c.prepare("extract-1 sha256:c", "", &[(REF, "sha256:c"), (LAYER_DIGEST, &digest(1))]);
        assert_eq!(answer.expect("it is downloaded").len(), 1);
        assert!(!mounts_below(&automounter.dir).contains(&path));
        fs::write(&automounter.ready, "").expect("a file can be made");
        // The automounter caches for a second that the repository was missing.
        eventually("the layer is found", || {
            let key = "extract until it is found";
            match c.prepare(key, "", &[(REF, "sha256:c"), (LAYER_DIGEST, &digest(1))]) {
                // The layer is not found yet, so a snapshot was made into which it can be unpacked.
                Ok(_) => {
                    c.remove(key).expect("the snapshot was just made");
                    false
                }
                Err(status) => status.code() == Code::ALREADY_EXISTS,
            }
        });
        assert!(mounts_below(&automounter.dir).contains(&path), "the question has mounted it");
        let name = c.pull_remote("extract-9", "", "sha256:c", &digest(1));
        c.prepare("container", &name, &[]).expect("it is mounted");
        // After the automounter has unmounted the unused repository, the next access mounts it again.
        c.remove("container").expect("it is there");
        c.cleanup().expect("a cleanup succeeds");
        scene::process::run("umount", [&path]).ok();
        c.prepare("again", &name, &[]).expect("it is mounted again");
    }
}

#[test]
fn root_withdrawn_layer_affects_only_its_files_and_new_containers_until_republished() {
    for config in MODES {
        let stage = E2eFixture::start("withdrawn", config);
        let published = stage.shell_image("withdrawn:1", "x");
        let reference = stage.publish_and_push(&published);
        stage.ours.pull(&reference);
        stage.ours.start_container(&reference, "running", &["/bin/sleep", "1000"]);
        let inside = stage.ours.root_of("running");
        let text = inside.join("data/text");
        stage.repository.withdraw(&published.layers[1].digest);
        let is_lost = || fs::read(&text).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
        eventually("the container has lost what the layer had", is_lost);
        for n in 0..2 {
            let failed = stage.ours.run(&reference, &format!("new-{n}"), &["/bin/true"]);
            for part in ["is not available", &published.layers[1].digest, "scene.test", "does not have it"] {
                assert!(failed.stderr.contains(part), "{part} is missing in: {}", failed.stderr);
            }
        }
        // The container was not affected.
        assert!(inside.join("bin/busybox").exists());
        fs::write(inside.join("written"), "x").expect("the container can write");
        stage.ours.end_container("running");
        // docs/repository.md gives this remedy.
        stage.repository.publish(&published);
        eventually("a new container has it again", || {
            stage.ours.run(&reference, "again", &["/bin/cat", "/data/text"]).stdout == "x"
        });
        stage.ours.remove(&reference);
        eventually("everything is given back", || {
            stage.ours.collect_garbage();
            stage.snapshot_dirs().is_empty()
        });
    }
}
