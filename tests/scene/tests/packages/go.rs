//! A node on which the Go snapshotter runs, installed by hand: a package takes its place.
//!
//! It uses the engine of the real Go snapshotter, and empties its snapshots on SIGTERM like the real daemon, so a
//! scriptlet that stopped it would be noticed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::sys::signal::Signal;
use scene::client::Client;
use scene::e2e_fixture::names;
use scene::machine::{PROXY, SERVICE, SOCKET, STATE};
use scene::process::{Server, eventually, tool};
use scene::sandbox::Sandbox;

use crate::node::{CONFIG, Node, SOCKET_UNIT};
use crate::{DEB, RPM, find_package, folder, next};

/// The configuration on a node with the Go snapshotter.
pub const CONFIGURATION: &str = "repository = \"scene.test\"\n";
/// The command of docs/install.md that replaces the Go snapshotter once the configuration is valid.
pub const BY_HAND: &str = "/usr/libexec/cvmfs-snapshotter/replace-go-unit && \
                           systemctl start cvmfs-snapshotter.socket cvmfs-snapshotter.service";
const PROGRAM: &str = "/usr/bin/cvmfs_snapshotter";
/// The command that replaces a Go snapshotter of another unit.
pub const ANY_BY_HAND: &str = "/usr/libexec/cvmfs-snapshotter/replace-go-unit replace-any && \
                               systemctl start cvmfs-snapshotter.socket cvmfs-snapshotter.service";
/// The arguments of the test program that runs the Go snapshotter's engine.
const ARGUMENTS: &str = "bind /cvmfs/scene.test /var/lib/containerd-cvmfs-grpc/snapshotter \
                         /run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock";

/// The directory of the units that an administrator writes.
const UNITS: &str = "/etc/systemd/system";

/// A node that runs the Go snapshotter, whose unit lies in `folder`.
pub fn boot_node_or_skip(name: &str, folder: &str) -> Option<Node> {
    let node = Node::boot_or_skip(name)?;
    install(&node, PROGRAM, &format!("{folder}/{SERVICE}"));
    serve(&node, SERVICE);
    Some(node)
}

fn install(node: &Node, program: &str, unit: &str) {
    let machine = &node.machine;
    machine.write(program, "");
    let file = machine.path(program);
    fs::copy(tool("gopeer"), &file).expect("a program can be installed");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("a mode can be set");
    machine.write(
        unit,
        &format!(
            "[Unit]
Description=CVMFS Snapshotter
After=network.target
Before=containerd.service
[Service]
Type=simple
ExecStartPre=/bin/mkdir -p {STATE}/snapshotter /run/containerd-cvmfs-grpc
ExecStart={program} {ARGUMENTS}
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
"
        ),
    );
}

fn serve(node: &Node, unit: &str) {
    let machine = &node.machine;
    machine.write(CONFIG, CONFIGURATION);
    machine.write("/etc/containerd/conf.d/by-hand.toml", &format!("version = 2\n{PROXY}"));
    node.shell(&format!("systemctl daemon-reload; systemctl enable --now {unit}")).ok();
    eventually("the Go snapshotter serves", || machine.path(SOCKET).exists());
    machine.restart("containerd.service");
}

/// With an invalid configuration the Go snapshotter keeps serving, whatever is done with the package. After a
/// correction the command that the package printed replaces it. An earlier version advised a restart, which would have
/// emptied the snapshots.
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
    // rpm renames the changed file.
    machine.write(CONFIG, &wrong);
    let said = install();
    serves_on(&said, "it ended at the second installation");
    // An upgrade must not replace it unasked.
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

/// Asserts that the package has replaced it. `said` is the output of the installation.
#[track_caller]
fn assert_replaced(node: &Node, pid: &str, said: &str) {
    let machine = &node.machine;
    assert!(said.contains(&format!("killing process {pid}")), "{said}");
    node.assert_serves();
    assert_eq!(fs::read_to_string(machine.path(CONFIG)).expect("it is there"), CONFIGURATION);
    assert!(machine.property(SERVICE, "FragmentPath").ends_with(&format!("/lib/systemd/system/{SERVICE}")));
    let journal = machine.journal(SERVICE);
    assert!(journal.contains("takeover_finished") && journal.contains(r#""lost_files":"0""#), "{journal}");
    assert_eq!(node.shell("cat /proc/[0-9]*/comm | grep cvmfs_ || true").stdout, "");
}

/// Shows what the other tests would find if a scriptlet stopped the Go snapshotter.
#[test]
fn root_go_snapshotter_empties_its_snapshots_on_normal_stop() {
    for (signal, left) in [(Signal::SIGKILL, 1), (Signal::SIGTERM, 0)] {
        let sandbox = Sandbox::enter("go");
        let [repository, root] = ["repository", "root"].map(|name| sandbox.make_dir(name));
        let socket = sandbox.path("socket");
        let mut server = Server::start(
            Command::new(tool("gopeer")).arg("bind").args([&repository, &root, &socket]),
            &sandbox.path("log"),
        );
        // The socket exists a moment before the daemon listens on it.
        let made = || socket.exists() && Client::connect(&socket).prepare("container", "", &[]).is_ok();
        server.wait_until("make a snapshot", made);
        server.end(signal);
        assert_eq!(names(&root.join("snapshots")).len(), left, "{signal}");
    }
}

#[test]
fn root_deb_replaces_go_snapshotter_whose_unit_is_in_etc() {
    let Some(node) = boot_node_or_skip("go-deb", "/etc/systemd/system") else { return };
    let running = node.run_container();
    let pid = node.machine.property(SERVICE, "MainPID");
    // Without the option dpkg asks whether to keep the file that an administrator wrote.
    let said = node.dpkg(&format!("--force-confold --install {}", node.give(&find_package(&folder(), DEB))));
    assert!(said.contains(&format!("/etc/systemd/system/{SERVICE}.go-saved")), "{said}");
    assert!(node.machine.path(&format!("/etc/systemd/system/{SERVICE}.go-saved")).exists());
    assert_replaced(&node, &pid, &said);
    node.assert_nothing_is_lost(&running);
}

#[test]
fn root_rpm_replaces_go_snapshotter_whose_unit_it_overwrites() {
    let Some(node) = boot_node_or_skip("go-rpm", "/usr/lib/systemd/system") else { return };
    let running = node.run_container();
    let pid = node.machine.property(SERVICE, "MainPID");
    let said = node.rpm(&format!("--install --nodeps {}", node.give(&find_package(&folder(), RPM))));
    assert_replaced(&node, &pid, &said);
    node.assert_nothing_is_lost(&running);
}

#[test]
fn root_deb_with_invalid_configuration_explains_how_to_replace_go_snapshotter() {
    let Some(node) = boot_node_or_skip("go-deb-wrong", "/etc/systemd/system") else { return };
    let install = format!("--force-confold --install {}", node.give(&find_package(&folder(), DEB)));
    let again = || node.dpkg(&install);
    assert_replaced_by_what_is_said(&node, again, again, || node.dpkg("--remove cvmfs-snapshotter"));
}

#[test]
fn root_rpm_with_invalid_configuration_explains_how_to_replace_go_snapshotter() {
    let Some(node) = boot_node_or_skip("go-rpm-wrong", "/usr/lib/systemd/system") else { return };
    let rpm = node.give(&find_package(&folder(), RPM));
    let next = node.give(&find_package(&next(&node.sandbox), RPM));
    assert_replaced_by_what_is_said(
        &node,
        || node.rpm(&format!("--install --nodeps {rpm}")),
        || node.rpm(&format!("--upgrade --nodeps {next}")),
        || node.rpm("--erase cvmfs-snapshotter"),
    );
}

/// A drop-in for the Go snapshotter made our unit start that program: it never reported readiness, so systemd stopped
/// it normally, and it emptied its snapshots.
#[test]
fn root_installation_moves_aside_or_refuses_drop_ins_that_start_the_go_snapshotter() {
    let Some(node) = Node::boot_or_skip("go-drop-in") else { return };
    let machine = &node.machine;
    let elsewhere = "/usr/local/bin/cvmfs_snapshotter";
    let unit = format!("{UNITS}/{SERVICE}");
    install(&node, elsewhere, &unit);
    let text = format!("[Service]\nExecStart=\nExecStart=-{elsewhere} {ARGUMENTS}\n");
    let drop_in = format!("{unit}.d/override.conf");
    machine.write(&drop_in, &text);
    // A drop-in for all units whose names begin with `cvmfs-`, which only systemd resolves.
    let hidden = format!("{UNITS}/cvmfs-.service.d/override.conf");
    machine.write(&hidden, &text);
    serve(&node, SERVICE);
    let running = node.run_container();
    let pid = machine.property(SERVICE, "MainPID");
    let deb = node.give(&find_package(&folder(), DEB));
    let said = node.dpkg(&format!("--force-confold --install {deb}"));
    let refused = format!("{SERVICE} would start {elsewhere} and not /usr/bin/cvmfs-snapshotter");
    assert!(
        said.contains(&refused) && said.contains(&format!("process {pid}, which is not ours, serves on")),
        "{said}"
    );
    assert_eq!(machine.property(SERVICE, "MainPID"), pid, "{said}");
    assert!([&unit, &drop_in].iter().all(|file| machine.path(file).exists()), "it must start as before: {said}");
    node.assert_nothing_is_lost(&running);

    fs::remove_file(machine.path(&hidden)).expect("it can be corrected");
    assert!(said.lines().any(|line| line.ends_with(&format!("then: {BY_HAND}"))), "{said}");
    let said = node.shell(&format!("( {BY_HAND} )")).ok();
    assert!(said.contains(&format!("is now {drop_in}.go-saved")), "{said}");
    assert_eq!(fs::read_to_string(machine.path(&format!("{drop_in}.go-saved"))).expect("it lies aside"), text);
    assert_replaced(&node, &pid, &said);
    node.assert_nothing_is_lost(&running);

    // A drop-in that was added later is not applied by an upgrade either.
    let pid = machine.property(SERVICE, "MainPID");
    machine.write(&drop_in, &text);
    let said = node.dpkg(&format!("--install {deb}"));
    assert!(said.contains(&refused) && said.contains(&format!("then: systemctl restart {SERVICE}\n")), "{said}");
    assert_eq!(machine.property(SERVICE, "MainPID"), pid, "{said}");
    node.assert_nothing_is_lost(&running);
}

/// Our socket unit took over the path of the Go snapshotter's socket.
#[test]
fn root_installation_leaves_go_snapshotter_of_another_unit_running_until_replaced() {
    const OTHER: &str = "containerd-cvmfs-grpc.service";
    let Some(node) = Node::boot_or_skip("go-other") else { return };
    let machine = &node.machine;
    install(&node, "/usr/bin/go_cvmfs", &format!("{UNITS}/{OTHER}"));
    serve(&node, OTHER);
    let running = node.run_container();
    let pid = machine.property(OTHER, "MainPID");
    let (deb, rpm) = (node.give(&find_package(&folder(), DEB)), node.give(&find_package(&folder(), RPM)));
    let nothing_changes = |said: &str| {
        assert!(said.contains(&format!("process {pid} (go_cvmfs, of {OTHER}) listens at {SOCKET}")), "{said}");
        assert!(
            said.lines().any(|line| line.ends_with(&format!("to replace it, which disables {OTHER}: {ANY_BY_HAND}"))),
            "{said}"
        );
        assert_eq!(machine.property(OTHER, "MainPID"), pid, "{said}");
        for unit in [SERVICE, SOCKET_UNIT] {
            let state = ["ActiveState", "UnitFileState"].map(|name| machine.property(unit, name));
            assert_eq!(state, ["inactive", "disabled"], "{unit}: {said}");
        }
        // A new connection is made to the path, because an old one would still lead to the old daemon.
        machine.restart("containerd.service");
        node.assert_nothing_is_lost(&running);
    };
    nothing_changes(&node.rpm(&format!("--install --nodeps {rpm}")));
    node.rpm("--erase cvmfs-snapshotter");
    machine.write(CONFIG, CONFIGURATION);
    let install = format!("--force-confold --install {deb}");
    nothing_changes(&node.dpkg(&install));
    // An upgrade.
    nothing_changes(&node.dpkg(&install));

    let said = node.shell(&format!("( {ANY_BY_HAND} )")).ok();
    assert!(said.contains(&format!("killing process {pid}")), "{said}");
    assert_replaced(&node, &pid, &said);
    assert_eq!(["MainPID", "UnitFileState"].map(|name| machine.property(OTHER, name)), ["0", "disabled"]);
    node.assert_nothing_is_lost(&running);
}

/// All programs of the supervisor were killed with it, and the supervisor was disabled.
#[test]
fn root_replacing_go_snapshotter_under_a_supervisor_spares_other_programs() {
    const OTHER: &str = "supervisor.service";
    let Some(node) = Node::boot_or_skip("go-supervised") else { return };
    let machine = &node.machine;
    let program = "/usr/bin/go_cvmfs";
    let unit = format!("{UNITS}/{OTHER}");
    install(&node, program, &unit);
    let text = fs::read_to_string(machine.path(&unit)).expect("it was written");
    let alone = format!("ExecStart={program} {ARGUMENTS}");
    assert!(text.contains(&alone), "{text}");
    let among = format!("ExecStart=/bin/sh -c '{program} {ARGUMENTS} & sleep infinity & wait'");
    machine.write(&unit, &text.replace(&alone, &among));
    serve(&node, OTHER);
    let running = node.run_container();
    node.dpkg(&format!("--force-confold --install {}", node.give(&find_package(&folder(), DEB))));

    let processes = || node.shell(&format!("grep -l '/{OTHER}$' /proc/[0-9]*/cgroup 2>/dev/null || true")).ok();
    let before = processes();
    let said = node.shell(&format!("( {ANY_BY_HAND} ) 2>&1 || true")).ok();
    assert!(said.contains(&format!("{OTHER} runs others too")), "{said}");
    assert_eq!(processes(), before, "{said}");
    assert_eq!(machine.property(OTHER, "UnitFileState"), "enabled", "{said}");
    node.assert_nothing_is_lost(&running);

    let (_, by_hand) = said.trim_end().rsplit_once("then: ").expect("it says what to do");
    let said = node.shell(&format!("( {by_hand} ) 2>&1")).ok();
    node.assert_serves();
    node.assert_nothing_is_lost(&running);
    let left: Vec<String> = processes().lines().map(str::to_owned).collect();
    assert_eq!((left.len(), machine.property(OTHER, "ActiveState").as_str()), (2, "active"), "{said}");
}
