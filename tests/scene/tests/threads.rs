//! The daemon in a control group in which it cannot start threads.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use scene::process::eventually;
use scene::snapshotter_fixture::{SnapshotterFixture, digest};

/// A control group that limits the number of processes and threads in it.
struct PidsGroup(PathBuf);

impl PidsGroup {
    /// Moves process `pid` into a new group.
    fn around(pid: Pid) -> Self {
        let all = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new).into_iter();
        let group = all.filter(|all| all.exists()).map(|all| all.join(format!("scene-threads-{pid}")));
        let group = group.into_iter().next().expect("cgroups are mounted");
        fs::create_dir(&group).expect("a control group can be made");
        fs::write(group.join("cgroup.procs"), pid.to_string()).expect("a process can be moved into it");
        assert!(group.join("pids.max").exists(), "the controller pids is needed for {}", group.display());
        Self(group)
    }

    /// Allows at most `count` threads more than there are.
    fn allow_more(&self, count: usize) {
        let current: usize = fs::read_to_string(self.0.join("pids.current")).unwrap().trim().parse().unwrap();
        fs::write(self.0.join("pids.max"), (current + count).to_string()).unwrap();
    }
}

impl Drop for PidsGroup {
    fn drop(&mut self) {
        // The kernel frees the group a moment after its last process has ended.
        eventually("the control group can be removed", || fs::remove_dir(&self.0).is_ok());
    }
}

/// A scan whose helper threads could not be started panicked and never finished: containers on the layer waited for
/// `repository-timeout`, and then its healthy repository was reported as down.
#[test]
fn root_scan_succeeds_without_additional_threads() {
    let mut d = SnapshotterFixture::start("threads", "repository-timeout = 4");
    let top = d.repository.layer_dir(&digest(1)).join("layerfs");
    for n in 0..500 {
        fs::create_dir(top.join(n.to_string())).unwrap();
    }
    fs::write(top.join("499/.wh.gone"), "").unwrap();
    d.repository.commit();
    let group = PidsGroup::around(d.snapshotter.server().pid());
    // The two threads are one that queries the repository, and one that scans.
    group.allow_more(2);
    let layer = d.client.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    d.client.prepare("container", &layer, &[]).expect("a container starts");
    assert!(!d.snapshotter.log().contains("repository_down"), "{}", d.snapshotter.log());
    drop(d);
    drop(group);
}
