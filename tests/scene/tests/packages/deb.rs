//! The life of the DEB on a node.

use std::fs;

use scene::machine::{SERVICE, STATE};

use crate::node::{CONFIG, Node, SOCKET_UNIT};
use crate::{DEB, find_package, folder, next};

/// The highest exposure that `systemd-analyze security` may report for the unit, in tenths.
const EXPOSURE: &str = "47";

#[test]
fn root_deb_install_upgrade_remove_and_purge_keep_running_container_intact() {
    let Some(node) = Node::boot_or_skip("deb") else { return };
    let machine = &node.machine;
    let deb = node.give(&find_package(&folder(), DEB));
    let install = format!("--install {deb}");
    node.dpkg(&install);
    node.assert_serves();
    check_units(&node);
    let version = node.shell("cvmfs_snapshotter --version").ok();
    assert_eq!(version.trim(), format!("cvmfs-snapshotter {}", env!("CARGO_PKG_VERSION")));
    // The repository of this node has another name than the default.
    node.configure("");
    machine.restart(SERVICE);
    machine.restart("containerd.service");
    let running = node.run_container();
    machine.restart(SERVICE);
    node.assert_nothing_is_lost(&running);

    let configured = fs::read_to_string(machine.path(CONFIG)).expect("it is there");
    let upgrade = format!("--install {}", node.give(&find_package(&next(&node.sandbox), DEB)));
    let (socket, service) = (node.since(SOCKET_UNIT), node.since(SERVICE));
    let (calls, failed) = node.calls_during(|| {
        node.dpkg(&upgrade);
    });
    scene::report::print(format_args!("DEB: {calls} calls around an upgrade, {} failed", failed.len()));
    assert_eq!(failed, Vec::<String>::new());
    assert!(node.dpkg("--status cvmfs-snapshotter").contains("-2\n"), "the upgrade did nothing");
    assert_eq!(node.since(SOCKET_UNIT), socket, "calls wait in the socket, so it must stay");
    assert_ne!(node.since(SERVICE), service, "the new program must be the one that runs");
    assert_eq!(fs::read_to_string(machine.path(CONFIG)).expect("it is there"), configured);
    node.assert_serves();
    node.assert_nothing_is_lost(&running);

    // The package reports the invalid configuration, is installed nevertheless, and the running daemon keeps serving.
    node.configure("workers = 0");
    let serving = node.since(SERVICE);
    let said = node.dpkg(&upgrade);
    assert!(said.contains(CONFIG) && said.contains("nothing was started or stopped"), "{said}");
    assert!(said.contains(&format!("then: systemctl restart {SERVICE}\n")), "ours serves: {said}");
    assert_eq!(node.since(SERVICE), serving, "the old daemon was ended for one that cannot start");
    assert!(node.dpkg("--status cvmfs-snapshotter").contains("install ok installed"));
    fs::write(machine.path(CONFIG), &configured).expect("it can be mended");
    machine.restart(SERVICE);
    node.assert_nothing_is_lost(&running);
    // An upgrade does not start units that were stopped by hand.
    node.shell(&format!("systemctl stop {SERVICE} {SOCKET_UNIT}")).ok();
    node.dpkg(&upgrade);
    assert_eq!(machine.property(SERVICE, "ActiveState"), "inactive");

    let state = node.state();
    node.dpkg("--remove cvmfs-snapshotter");
    for unit in [SERVICE, SOCKET_UNIT] {
        assert_eq!(machine.property(unit, "ActiveState"), "inactive", "{unit}");
    }
    assert!(!machine.path("/usr/bin/cvmfs-snapshotter").exists() && machine.path(CONFIG).exists());
    assert!(!state.is_empty() && node.state() == state, "removal changed the state");
    node.assert_counts();

    node.dpkg(&install);
    node.assert_serves();
    node.assert_nothing_is_lost(&running);

    // containerd might still clean up snapshots that were in use until now.
    node.shell(&format!("systemctl stop {SERVICE} {SOCKET_UNIT}")).ok();
    let state = node.state();
    let said = node.dpkg("--purge cvmfs-snapshotter");
    assert!(said.contains(&format!("{STATE} stays")) && said.contains("rm -rf"), "{said}");
    assert!(node.state() == state, "a purge changed the state");
    assert!(!machine.path("/etc/containerd-cvmfs-grpc").exists(), "a purge takes the configuration");
    let left =
        node.shell("find /etc /usr /var/lib/systemd /run -xdev -name '*cvmfs-snapshotter*' -not -path '/run/log/*'");
    assert_eq!(left.ok(), "", "what a purge left");
    node.assert_counts();
}

#[test]
fn root_deb_installs_without_running_systemd() {
    let Some(node) = Node::boot_or_skip("deb-image") else { return };
    let deb = node.give(&find_package(&folder(), DEB));
    node.assert_installs_without_systemd(|| node.dpkg(&format!("--install {deb}")));
}

fn check_units(node: &Node) {
    let units = format!("/usr/lib/systemd/system/{SERVICE} /usr/lib/systemd/system/{SOCKET_UNIT}");
    let verified = node.shell(&format!("systemd-analyze verify --man=no {units}"));
    // The only complaints are about settings for a newer or an older systemd, which the unit explains.
    let others = ["RestartSteps", "RestartMaxDelaySec", "MemoryLimit"];
    let complaints = verified.stdout.lines().filter(|line| line.contains("cvmfs-snapshotter."));
    let unknown: Vec<&str> = complaints.filter(|line| !others.iter().any(|key| line.contains(key))).collect();
    assert_eq!(unknown, Vec::<&str>::new());
    let security = format!(
        "systemd-analyze security --no-pager --offline=yes --threshold={EXPOSURE} /usr/lib/systemd/system/{SERVICE}"
    );
    let security = node.shell(&security);
    let last = security.stdout.lines().last().unwrap_or_default().to_owned();
    assert!(security.status.success(), "{last}");
    println!("{last}");
}
