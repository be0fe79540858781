//! The life of the RPM on a node. Debian's systemd stands for EL's: what scriptlets ask of it is old.

use std::fs;

use scene::machine::{SERVICE, STATE};

use crate::node::{CONFIG, Node, SOCKET_UNIT};
use crate::{RPM, find_package, folder, next};

#[test]
fn root_rpm_install_upgrade_and_erase_keep_running_container_intact() {
    let Some(node) = Node::boot_or_skip("rpm") else { return };
    let machine = &node.machine;
    let rpm = node.give(&find_package(&folder(), RPM));
    node.rpm(&format!("--install --nodeps {rpm}"));
    node.assert_serves();
    node.configure("");
    machine.restart(SERVICE);
    machine.restart("containerd.service");
    let running = node.run_container();

    let configured = fs::read_to_string(machine.path(CONFIG)).expect("it is there");
    let next = node.give(&find_package(&next(&node.sandbox), RPM));
    let (socket, service) = (node.since(SOCKET_UNIT), node.since(SERVICE));
    let (calls, failed) = node.calls_during(|| {
        node.rpm(&format!("--upgrade --nodeps {next}"));
    });
    scene::report::print(format_args!("RPM: {calls} calls around an upgrade, {} failed", failed.len()));
    assert_eq!(failed, Vec::<String>::new());
    assert!(node.rpm("--query cvmfs-snapshotter").contains("-2."), "the upgrade did nothing");
    assert_eq!(node.since(SOCKET_UNIT), socket, "calls wait in the socket, so it must stay");
    assert_ne!(node.since(SERVICE), service, "the new program must be the one that runs");
    assert_eq!(fs::read_to_string(machine.path(CONFIG)).expect("it is there"), configured);
    node.assert_serves();
    node.assert_nothing_is_lost(&running);
    // The start fails because of the changed configuration, and must name nothing else.
    let verified = node.rpm("--verify --nodeps cvmfs-snapshotter || true");
    assert!(verified.lines().count() == 1 && verified.contains(CONFIG), "{verified}");

    // The package reports the invalid configuration, and its installation succeeds.
    node.configure("workers = 0");
    let serving = node.since(SERVICE);
    let said = node.rpm(&format!("--upgrade --nodeps --oldpackage {rpm}"));
    assert!(said.contains("nothing was started or stopped"), "{said}");
    assert!(said.contains(&format!("then: systemctl restart {SERVICE}\n")), "ours serves: {said}");
    assert_eq!(node.since(SERVICE), serving, "the old daemon was ended for one that cannot start");
    assert!(node.rpm("--query cvmfs-snapshotter").contains("-1."));
    fs::write(machine.path(CONFIG), &configured).expect("it can be mended");
    machine.restart(SERVICE);

    let state = node.state();
    let said = node.rpm("--erase cvmfs-snapshotter");
    assert!(said.contains(&format!("{STATE} stays")), "{said}");
    for unit in [SERVICE, SOCKET_UNIT] {
        assert_eq!(machine.property(unit, "ActiveState"), "inactive", "{unit}");
    }
    assert!(!state.is_empty() && node.state() == state, "removal changed the state");
    let left = node.shell("find /etc/systemd /usr -xdev -name '*cvmfs-snapshotter*'");
    assert_eq!(left.ok(), "", "what an erasure left");
    node.assert_counts();

    node.rpm(&format!("--install --nodeps {rpm}"));
    // rpm keeps a changed file under another name, and installs the default.
    node.shell(&format!("mv {CONFIG}.rpmsave {CONFIG}")).ok();
    machine.restart(SERVICE);
    node.assert_serves();
    node.assert_nothing_is_lost(&running);
}

#[test]
fn root_rpm_installs_without_running_systemd() {
    let Some(node) = Node::boot_or_skip("rpm-image") else { return };
    let rpm = node.give(&find_package(&folder(), RPM));
    node.assert_installs_without_systemd(|| node.rpm(&format!("--install --nodeps {rpm}")));
}
