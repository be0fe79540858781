//! A node on which the Go snapshotter runs, installed by hand: a package takes its place.
//!
//! Its engine is the real one, and as the real daemon it empties its snapshots on SIGTERM; so a
//! scriptlet that stopped it would be seen.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::sys::signal::Signal;
use scene::client::Client;
use scene::machine::{PROXY, SERVICE, SOCKET, STATE};
use scene::process::{Server, eventually, tool};
use scene::sandbox::Sandbox;
use scene::stage::names;

use crate::node::{CONFIG, Node};
use crate::{DEB, RPM, folder, next, one};

/// As it is on such a node.
pub const CONFIGURATION: &str = "repository = \"scene.test\"\n";
/// What replaces it once the configuration is right, as docs/install.md has it.
pub const BY_HAND: &str = "/usr/libexec/cvmfs-snapshotter/replace-go-unit && \
                           systemctl start cvmfs-snapshotter.socket cvmfs-snapshotter.service";
const PROGRAM: &str = "/usr/bin/cvmfs_snapshotter";

/// A node that runs the Go snapshotter, whose unit lies in `folder`.
pub fn node(name: &str, folder: &str) -> Option<Node> {
    let node = Node::start(name)?;
    let machine = &node.machine;
    let program = machine.path(PROGRAM);
    fs::copy(tool("gopeer"), &program).expect("a program can be installed");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a mode can be set");
    machine.write(
        &format!("{folder}/{SERVICE}"),
        &format!(
            "[Unit]
Description=CVMFS Snapshotter
After=network.target
Before=containerd.service
[Service]
Type=simple
ExecStartPre=/bin/mkdir -p {STATE}/snapshotter /run/containerd-cvmfs-grpc
ExecStart={PROGRAM} bind /cvmfs/scene.test {STATE}/snapshotter {SOCKET}
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
"
        ),
    );
    machine.write(CONFIG, CONFIGURATION);
    machine.write("/etc/containerd/conf.d/by-hand.toml", &format!("version = 2\n{PROXY}"));
    node.shell(&format!("systemctl daemon-reload; systemctl enable --now {SERVICE}")).ok();
    eventually("the Go snapshotter serves", || machine.path(SOCKET).exists());
    machine.restart("containerd.service");
    Some(node)
}

/// With a wrong configuration the Go snapshotter serves on, whatever is done with the package; corrected, the
/// very command that was said replaces it. A restart, which was said once, would have emptied its snapshots.
#[track_caller]
fn assert_replaced_by_what_is_said(
    node: &Node,
    install: impl Fn() -> String,
    upgrade: impl FnOnce() -> String,
    remove: impl FnOnce() -> String,
) {
    let machine = &node.machine;
    let running = node.run_container();
    let pid = machine.property(SERVICE, "MainPID");
    let serves_on = |said: &str, lost: &str| {
        assert!(said.contains(&format!("process {pid}, which is not ours, serves on")), "{said}");
        assert!(!said.contains("systemctl restart"), "{said}");
        assert_eq!(machine.property(SERVICE, "MainPID"), pid, "{lost}: {said}");
        node.assert_nothing_is_lost(&running);
    };
    let wrong = format!("{CONFIGURATION}workers = 0\n");
    machine.write(CONFIG, &wrong);
    serves_on(&install(), "it ended at the installation");
    serves_on(&remove(), "it ended at the removal");
    // rpm puts it aside.
    machine.write(CONFIG, &wrong);
    let said = install();
    serves_on(&said, "it ended at the second installation");
    // Nobody asked an upgrade to replace it.
    machine.write(CONFIG, CONFIGURATION);
    let upgraded = upgrade();
    serves_on(&upgraded, "it ended at an upgrade");
    for said in [said, upgraded] {
        assert!(said.lines().any(|line| line.ends_with(&format!(": {BY_HAND}"))), "{said}");
    }
    let output = node.shell(&format!("( {BY_HAND} )")).ok();
    assert_replaced(node, &pid, &output);
    node.assert_nothing_is_lost(&running);
}

/// What is true after the package took its place, and said `said`.
#[track_caller]
fn assert_replaced(node: &Node, pid: &str, said: &str) {
    let machine = &node.machine;
    assert!(said.contains(&format!("killing process {pid}")), "{said}");
    node.assert_serves();
    assert_eq!(fs::read_to_string(machine.path(CONFIG)).expect("it is there"), CONFIGURATION);
    assert!(machine.property(SERVICE, "FragmentPath").ends_with(&format!("/lib/systemd/system/{SERVICE}")));
    let journal = machine.journal(SERVICE);
    assert!(journal.contains("took over") && journal.contains("0 have lost their files"), "{journal}");
    assert_eq!(node.shell("cat /proc/[0-9]*/comm | grep cvmfs_ || true").stdout, "");
}

/// What the other tests would see if a scriptlet stopped it.
#[test]
fn root_the_go_snapshotter_empties_its_snapshots_when_it_is_stopped_normally() {
    for (signal, left) in [(Signal::SIGKILL, 1), (Signal::SIGTERM, 0)] {
        let sandbox = Sandbox::enter("go");
        let [repository, root] = ["repository", "root"].map(|name| sandbox.make_dir(name));
        let socket = sandbox.path("socket");
        let mut server = Server::start(
            Command::new(tool("gopeer")).arg("bind").args([&repository, &root, &socket]),
            &sandbox.path("log"),
        );
        // The socket is there a moment before anybody listens on it.
        let made = || socket.exists() && Client::connect(&socket).prepare("container", "", &[]).is_ok();
        server.wait_until("make a snapshot", made);
        server.end(signal);
        assert_eq!(names(&root.join("snapshots")).len(), left, "{signal}");
    }
}

#[test]
fn root_a_deb_takes_the_place_of_a_go_snapshotter_whose_unit_lies_in_etc() {
    let Some(node) = node("go-deb", "/etc/systemd/system") else { return };
    let running = node.run_container();
    let pid = node.machine.property(SERVICE, "MainPID");
    // Else dpkg asks whether the file that somebody wrote stays.
    let said = node.dpkg(&format!("--force-confold --install {}", node.give(&one(&folder(), DEB))));
    assert!(said.contains(&format!("/etc/systemd/system/{SERVICE}.go-saved")), "{said}");
    assert!(node.machine.path(&format!("/etc/systemd/system/{SERVICE}.go-saved")).exists());
    assert_replaced(&node, &pid, &said);
    node.assert_nothing_is_lost(&running);
}

#[test]
fn root_an_rpm_takes_the_place_of_a_go_snapshotter_whose_unit_it_overwrites() {
    let Some(node) = node("go-rpm", "/usr/lib/systemd/system") else { return };
    let running = node.run_container();
    let pid = node.machine.property(SERVICE, "MainPID");
    let said = node.rpm(&format!("--install --nodeps {}", node.give(&one(&folder(), RPM))));
    assert_replaced(&node, &pid, &said);
    node.assert_nothing_is_lost(&running);
}

#[test]
fn root_a_deb_with_a_wrong_configuration_says_what_replaces_the_go_snapshotter() {
    let Some(node) = node("go-deb-wrong", "/etc/systemd/system") else { return };
    let install = format!("--force-confold --install {}", node.give(&one(&folder(), DEB)));
    let again = || node.dpkg(&install);
    assert_replaced_by_what_is_said(&node, again, again, || node.dpkg("--remove cvmfs-snapshotter"));
}

#[test]
fn root_an_rpm_with_a_wrong_configuration_says_what_replaces_the_go_snapshotter() {
    let Some(node) = node("go-rpm-wrong", "/usr/lib/systemd/system") else { return };
    let rpm = node.give(&one(&folder(), RPM));
    let next = node.give(&one(&next(&node.sandbox), RPM));
    assert_replaced_by_what_is_said(
        &node,
        || node.rpm(&format!("--install --nodeps {rpm}")),
        || node.rpm(&format!("--upgrade --nodeps {next}")),
        || node.rpm("--erase cvmfs-snapshotter"),
    );
}
