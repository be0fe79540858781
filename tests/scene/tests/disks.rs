//! Disks that are full, that fail, or that are of the wrong kind.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use scene::disk::Disk;
use scene::process::SetOnDrop;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::assert_refused;

#[test]
fn root_full_disk_loses_nothing_and_recovers() {
    let sandbox = Sandbox::enter("full");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    for (name, make) in [
        ("tmpfs", (|at: &Path| Disk::tmpfs(at, 8)) as fn(&Path) -> Disk),
        ("ext4", |at| Disk::ext4(at, 16, &[])),
        // This disk has space and no inodes.
        ("inodes", |at| Disk::ext4(at, 64, &["-N", "200"])),
    ] {
        let dir = sandbox.path(name);
        let disk = make(&dir.join("root"));
        let mut snapshotter = Snapshotter::start(&dir, repository.dir(), "");
        let c = snapshotter.client();
        let source = PathBuf::from(&c.prepare("before", "", &[("kept", "yes")]).unwrap()[0].source);
        fs::write(source.join("file"), "content").unwrap();
        for n in 0..3 {
            c.prepare(&format!("removed-{n}"), "", &[]).unwrap();
        }
        if name != "inodes" {
            disk.fill();
        }
        let (mut made, mut failed) = (Vec::new(), 0);
        for n in 0..3000 {
            let key = format!("key-{n}");
            match c.prepare(&key, "", &[("big", &"x".repeat(8000))]) {
                Ok(_) => made.push(key),
                Err(status) => {
                    assert_eq!(status.code(), Code::INTERNAL, "{name}: {}", status.message());
                    assert!(status.message().contains("o space left"), "{name}: {}", status.message());
                    failed += 1;
                    if failed > 20 {
                        break;
                    }
                }
            }
            // Calls that only read succeed.
            assert_eq!(c.stat("before").unwrap().name, "before", "{name}");
            assert_eq!(c.list(&["kind==active"]).unwrap().len(), made.len() + 4, "{name}");
            c.mounts("before").unwrap();
        }
        assert!(failed > 20, "{name}: the disk never got full");
        // The calls with which containerd frees space succeed, and so does a start.
        c.remove("removed-0").unwrap();
        c.cleanup().unwrap();
        snapshotter.end(Signal::SIGKILL);
        snapshotter.start_again();
        let c = snapshotter.client();
        c.remove("removed-1").unwrap();
        c.remove("removed-2").unwrap();
        c.cleanup().unwrap();
        if name != "inodes" {
            disk.make_room();
        }
        c.prepare("after", "", &[]).unwrap();
        for restart in [false, true] {
            if restart {
                snapshotter.end(Signal::SIGKILL);
                snapshotter.start_again();
            }
            let c = snapshotter.client();
            let names: HashSet<String> = c.list(&[]).unwrap().into_iter().map(|i| i.name).collect();
            assert_eq!(names.len(), made.len() + 2, "{name}");
            assert!(made.iter().all(|key| names.contains(key)), "{name}");
            assert_eq!(c.stat("before").unwrap().labels.get("kept").map(String::as_str), Some("yes"));
            assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "content");
        }
    }
}

/// Another process takes at once whatever a removal frees. A log that only grows would fill up.
#[test]
fn root_snapshots_can_be_removed_from_a_full_disk() {
    const SNAPSHOTS: usize = 600;
    let sandbox = Sandbox::enter("stays-full");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    for (name, make) in [
        ("tmpfs", (|at: &Path| Disk::tmpfs(at, 16)) as fn(&Path) -> Disk),
        ("ext4", |at| Disk::ext4(at, 32, &["-N", "4000"])),
        // Access to a mapped file without an allocated block ended the process with SIGBUS.
        ("ext4 with small blocks", |at| Disk::ext4(at, 32, &["-N", "4000", "-b", "1024"])),
    ] {
        let dir = sandbox.path(name);
        let disk = make(&dir.join("root"));
        let mut snapshotter = Snapshotter::start(&dir, repository.dir(), "");
        let c = snapshotter.client();
        for n in 0..SNAPSHOTS {
            c.prepare(&format!("removed-{n}"), "", &[("big", &"x".repeat(1000))]).unwrap();
        }
        disk.fill();
        assert!(c.prepare("too-many", "", &[("big", &"x".repeat(100_000))]).is_err(), "{name}: the disk is not full");
        for n in 0..SNAPSHOTS / 2 {
            c.remove(&format!("removed-{n}")).unwrap();
            disk.fill();
        }
        c.cleanup().unwrap();
        disk.fill();
        snapshotter.end(Signal::SIGKILL);
        snapshotter.start_again();
        let c = snapshotter.client();
        for n in SNAPSHOTS / 2..SNAPSHOTS {
            c.remove(&format!("removed-{n}")).unwrap();
            disk.fill();
        }
        c.cleanup().unwrap();
        assert!(c.list(&[]).unwrap().is_empty(), "{name}");
        assert!(fs::read_dir(dir.join("root/snapshotter/snapshots")).unwrap().next().is_none(), "{name}");
    }
}

/// The log was created anew at each start, when the process that filled the disk had taken its blocks.
#[test]
fn root_removals_succeed_while_a_container_keeps_the_disk_full() {
    const SNAPSHOTS: usize = 300;
    let sandbox = Sandbox::enter("filler");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let dir = sandbox.path("s");
    let disk = Disk::ext4(&dir.join("root"), 32, &["-N", "4000"]);
    let mut snapshotter = Snapshotter::start(&dir, repository.dir(), "");
    let c = snapshotter.client();
    for n in 0..SNAPSHOTS {
        c.prepare(&format!("removed-{n}"), "", &[]).unwrap();
    }
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        snapshotter.end(signal);
        snapshotter.start_again();
    }
    let c = snapshotter.client();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = SetOnDrop(&is_over);
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                disk.fill();
            }
        });
        while nix::sys::statvfs::statvfs(&dir.join("root")).unwrap().blocks_available() > 0 {
            std::thread::yield_now();
        }
        for n in 0..SNAPSHOTS {
            c.remove(&format!("removed-{n}")).unwrap();
        }
        c.cleanup().unwrap();
    });
    assert!(c.list(&[]).unwrap().is_empty());
}

/// The damaged file was moved away before there was a new one, although the message said that nothing was changed.
#[test]
fn root_rebuild_failing_on_full_disk_changes_nothing() {
    let sandbox = Sandbox::enter("rebuild");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let dir = sandbox.path("s");
    let disk = Disk::ext4(&dir.join("root"), 16, &[]);
    let mut snapshotter = Snapshotter::start(&dir, repository.dir(), "");
    let c = snapshotter.client();
    for n in 0..300 {
        c.prepare(&format!("key-{n}"), "", &[]).unwrap();
    }
    snapshotter.end(Signal::SIGTERM);
    let home = dir.join("root/snapshotter");
    let file = home.join("metadata.sqlite");
    let mut damaged = fs::read(&file).unwrap();
    damaged[8192..].fill(0xff);
    fs::write(&file, &damaged).unwrap();
    fs::remove_file(home.join("metadata.reserve")).unwrap();
    disk.fill();
    let before = scene::e2e_fixture::names(&home);
    let rebuild = |snapshotter: &Snapshotter| {
        let mut command = snapshotter.command();
        command.args(["--rebuild-metadata", "--containerd-metadata", "none"]).output().unwrap()
    };
    let failed = rebuild(&snapshotter);
    let message = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{message}");
    assert!(message.contains("ENOSPC") && message.contains("nothing was changed"), "{message}");
    assert_eq!(scene::e2e_fixture::names(&home), before);
    assert!(fs::read(&file).unwrap() == damaged);
    disk.make_room();
    assert!(rebuild(&snapshotter).status.success());
    snapshotter.start_again();
    assert_eq!(snapshotter.client().list(&[]).unwrap().len(), 300);
}

/// After the first failed write List and Mounts failed as well: the metadata was closed, and opening it needed a write.
#[test]
fn root_read_only_disk_still_serves_reads() {
    let sandbox = Sandbox::enter("read-only");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let disk = Disk::ext4(&sandbox.path("s/root"), 32, &[]);
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    let c = snapshotter.client();
    let source = PathBuf::from(&c.prepare("key", "", &[("l", "v")]).unwrap()[0].source);
    fs::write(source.join("file"), "content").unwrap();
    c.prepare("other", "", &[]).unwrap();
    c.prepare("extract", "", &[]).unwrap();
    c.commit("committed", "extract", &[]).unwrap();
    let mounts = c.mounts("key").unwrap();
    // Without this, ext4 would write the changes only after a while.
    run_sync();
    disk.find_error();
    for _ in 0..3 {
        let answers = [
            c.prepare("new", "", &[]).map(drop),
            c.commit("name", "key", &[]),
            c.remove("other"),
            c.update(c.stat("key").unwrap(), &["labels"]).map(drop),
        ];
        for answer in answers {
            let message = assert_refused(answer, Code::INTERNAL);
            assert!(message.contains("ead-only file system") || message.contains("(EROFS)"), "{message}");
        }
        assert_eq!(c.mounts("key").unwrap(), mounts);
        assert_eq!(c.list(&[]).unwrap().len(), 3);
        assert_eq!(c.stat("key").unwrap().labels.len(), 1);
        assert!(c.usage("key").unwrap().0 > 0);
        // The usage is measured, and cannot be stored.
        c.usage("committed").unwrap();
    }
    // A start must write, and reports what prevents it.
    snapshotter.end(Signal::SIGKILL);
    let output = snapshotter.command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("state directory") && message.contains("ead-only file system"), "{message}");
    disk.repair();
    snapshotter.start_again();
    let c = snapshotter.client();
    assert_eq!(c.list(&[]).unwrap().len(), 3);
    assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "content");
    c.commit("name", "key", &[]).unwrap();
    c.remove("other").unwrap();
    c.remove("name").unwrap();
    c.remove("committed").unwrap();
    c.cleanup().unwrap();
    assert_eq!(scene::e2e_fixture::names(&snapshotter.snapshots()), Vec::<String>::new());
}

fn run_sync() {
    scene::process::run("sync", [] as [&str; 0]).ok();
}

#[test]
fn root_start_refuses_disk_that_overlayfs_cannot_use() {
    let sandbox = Sandbox::enter("types");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    snapshotter.end(Signal::SIGTERM);
    fs::remove_dir_all(sandbox.path("s/root")).unwrap();
    let _disk = Disk::ext4(&sandbox.path("s/root"), 16, &["-O", "^filetype"]);
    let output = snapshotter.command().output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("d_type") && message.contains("-O filetype") && message.contains("s/root"), "{message}");
    assert!(!sandbox.path("s/root/snapshotter/metadata.sqlite").exists());
}
