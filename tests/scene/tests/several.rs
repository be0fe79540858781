//! Several repositories: they are tried in their order, each has its own health, and each can replace another.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use scene::e2e_fixture::names;
use scene::process::eventually;
use scene::publisher::Repository;
use scene::rootfs::Mounted;
use scene::sandbox::Sandbox;
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::{assert_refused, digest};

/// The timeout is long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(4);

#[test]
fn root_repositories_are_tried_in_configured_order_and_replace_each_other() {
    for mode in ["bind", "symlink"] {
        let sandbox = Sandbox::enter("several");
        let (one, two) = (Repository::mounted(&sandbox.path("one")), Repository::mounted(&sandbox.path("two")));
        let fill = |repository: &Repository, n: u8, text: &str, marker: bool| {
            let top = repository.layer_dir(&digest(n)).join("layerfs");
            fs::create_dir_all(top.join("dir")).expect("a layer can be made");
            fs::write(top.join(format!("dir/{n}")), text).expect("a layer can be filled");
            if marker {
                fs::write(top.join("dir/.cvmfscatalog"), "").expect("a layer can be marked");
            }
        };
        // Layer 1 is in both, layer 2 only in the second; each publisher has its own catalogs.
        fill(&one, 1, "of one", false);
        fill(&two, 1, "of two", true);
        fill(&two, 2, "of two", true);
        one.commit();
        two.commit();
        let paths =
            format!("repositories = [\"{}\"]\nattach = \"{mode}\"\nrepository-timeout = 4", two.dir().display());
        let snapshotter = Snapshotter::start(&sandbox.path("s"), one.dir(), &paths);
        let c = snapshotter.client();
        c.prepare("base", "", &[]).expect("a local snapshot");
        c.commit("local", "base", &[]).expect("a local snapshot");
        let first = c.pull_remote("extract-1", "local", "sha256:c1", &digest(1));
        let second = c.pull_remote("extract-2", &first, "sha256:c2", &digest(2));
        let at = sandbox.path("mnt");
        let text = |key: &str, n: u8| {
            let mounted = Mounted::new(&c.mounts(key).expect("it is there"), &at).expect("an overlay");
            assert_eq!(names(&mounted.path().join("dir")), ["1", "2"], "no marker of either publisher shows");
            fs::read_to_string(mounted.path().join(format!("dir/{n}"))).expect("a file")
        };
        c.prepare("a", &second, &[]).expect("both are there");
        assert_eq!((text("a", 1), text("a", 2)), ("of one".to_owned(), "of two".to_owned()));
        let running = Mounted::new(&c.mounts("a").expect("it is there"), &sandbox.path("running")).expect("an overlay");
        // Container starts that wait for the second repository, more than it has threads, do not delay one that needs
        // the first.
        two.with_client(|mount| mount.signal(Signal::SIGSTOP));
        std::thread::scope(|scope| {
            for n in 0..20 {
                let (c, second) = (snapshotter.client(), &second);
                scope.spawn(move || assert_refused(c.prepare(&format!("waits-{n}"), second, &[]), Code::UNAVAILABLE));
            }
            std::thread::sleep(Duration::from_millis(500));
            let begun = Instant::now();
            c.prepare("needs-one", &first, &[]).expect("the first one answers");
            assert!(begun.elapsed() < TIMEOUT / 2, "{:?}", begun.elapsed());
            c.remove("needs-one").expect("it is there");
        });
        two.with_client(|mount| mount.signal(Signal::SIGCONT));
        eventually("the second one is found to answer again", || {
            c.prepare("answers", &second, &[]).is_ok() && c.remove("answers").is_ok()
        });
        // When the first repository dies the second replaces it, and running containers keep their files.
        one.with_client(|mount| mount.signal(Signal::SIGSTOP));
        let begun = Instant::now();
        c.prepare("b", &second, &[]).expect("the second one has both");
        assert!(begun.elapsed() < TIMEOUT * 3, "{:?}", begun.elapsed());
        assert_eq!(text("b", 1), "of two");
        one.with_client(|mount| mount.signal(Signal::SIGCONT));
        assert_eq!(names(&running.path().join("dir")), ["1", "2"]);
        drop(running);
        // Only the second repository has layer 2, and the record names it.
        two.unmount();
        let message = assert_refused(c.prepare("c", &second, &[]), Code::UNAVAILABLE);
        assert!(message.contains(&digest(2)) && message.contains(two.dir().to_str().expect("a path")), "{message}");
        eventually("the first one is found to answer again", || c.prepare("d", &first, &[]).is_ok());
        for key in ["a", "b", "d"] {
            c.remove(key).expect("it is there");
        }
        eventually("everything is detached", || {
            c.cleanup().expect("a cleanup succeeds");
            names(&snapshotter.snapshots()).len() == 1
        });
        assert!(Path::new(one.dir()).join(".layers").exists(), "the repositories are as they were");
    }
}
