//! The drop-in that gives the service a mount namespace of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use scene::machine::{HOST, SERVICE};
use scene::process::eventually;

use crate::node::{CONFIG, Node, SOCKET_UNIT};
use crate::{DEB, find_package, folder};

/// The highest exposure that `systemd-analyze security` may report for the unit with the drop-in, in tenths.
const EXPOSURE: &str = "26";
/// The automounter remembers for this long that it found no repository.
const NEGATIVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Mounts of the host's namespace must appear in that of the service, above all those that the automounter makes because
/// the daemon accesses them. A repository that hangs must not keep the namespace from being made.
#[test]
fn root_service_with_own_mount_namespace_sees_autofs_mounts_and_loses_nothing() {
    let Some(node) = Node::boot_or_skip("symlink-only") else { return };
    let machine = &node.machine;
    node.dpkg(&format!("--install {}", node.give(&find_package(&folder(), DEB))));
    start_automounter(&node);
    node.configure("absolute-mountpoint = \"/auto/scene.test\"");
    // The file says that it is to be installed in this way.
    let to = format!("/etc/systemd/system/{SERVICE}.d/symlink-only.conf");
    node.shell(&format!("install -D -m 644 /usr/share/doc/cvmfs-snapshotter/symlink-only.conf {to}")).ok();
    node.shell("systemctl daemon-reload").ok();
    machine.restart(SERVICE);
    let pid = machine.property(SERVICE, "MainPID");
    let namespace = |pid: &str| fs::read_link(machine.path(&format!("/proc/{pid}/ns/mnt"))).expect("it has one");
    assert_ne!(namespace(&pid), namespace("1"));
    machine.restart("containerd.service");
    machine.write("/root/ready", "");
    thread::sleep(2 * NEGATIVE_TIMEOUT);
    let running = node.run_container();
    node.assert_nothing_is_lost(&running);
    // After another process has unmounted the repository, the next access mounts it again in both namespaces.
    node.shell("umount --lazy /auto/scene.test").ok();
    node.assert_nothing_is_lost(&running);
    node.repository.with_client(|mount| mount.signal(Signal::SIGSTOP));
    machine.restart(SERVICE);
    node.repository.with_client(|mount| mount.signal(Signal::SIGCONT));
    node.assert_nothing_is_lost(&running);
    let analyze = "systemd-analyze security --no-pager";
    let security = node.shell(&format!("{analyze} {SERVICE}")).stdout;
    println!("{}", security.lines().last().unwrap_or_default());
    let exposure = security.split("exposure level for").nth(1).unwrap_or_default().to_owned();
    let tenths: String = exposure.split(' ').nth(2).unwrap_or_default().replace('.', "");
    assert!(tenths.parse::<u32>().is_ok_and(|tenths| tenths <= EXPOSURE.parse().unwrap_or(0)), "{exposure}");
    // containerd would not see bind mounts that the service makes in its namespace.
    let configured = fs::read_to_string(machine.path(CONFIG)).expect("it is there");
    for (line, starts) in [
        ("attach = \"bind\"", false),
        ("\"attach\" = \"bind\"", false),
        ("  'attach'='bind' # \"symlink\"", false),
        ("attach = \"\"\"bind\"\"\"", false),
        ("#attach = \"bind\"", true),
        ("attach = \"symlink\" # and not = \"bind\"", true),
    ] {
        fs::write(machine.path(CONFIG), format!("{configured}{line}\n")).expect("it can be changed");
        let before = machine.journal(SERVICE);
        let started = machine.run(&["systemctl", "restart", SERVICE]).status.success();
        assert_eq!(started, starts, "{line}: {}", machine.journal(SERVICE));
        if !starts {
            // systemd does not restart the service for ever, and the journal has the reason.
            for words in ["is not possible in the mount namespace", "status=78"] {
                let count = || machine.journal(SERVICE).matches(words).count();
                eventually("the journal says why", || count() > before.matches(words).count());
            }
            machine.run(&["systemctl", "reset-failed", SERVICE, SOCKET_UNIT]);
        }
    }
}

/// Starts an automounter in the machine, with which sites mount `/cvmfs`. It finds the repository once the file
/// `/root/ready` exists.
fn start_automounter(node: &Node) {
    let machine = &node.machine;
    let map = "#!/bin/sh\n[ \"$1\" = scene.test ] && [ -e /root/ready ] && echo '-fstype=bind :/cvmfs/scene.test'\n";
    machine.write("/root/map", map);
    fs::set_permissions(machine.path("/root/map"), fs::Permissions::from_mode(0o755)).expect("a mode can be set");
    let negative_timeout = NEGATIVE_TIMEOUT.as_secs();
    let line = format!("/auto program:/root/map --timeout=600 --negative-timeout={negative_timeout}\n");
    machine.write("/root/master", &line);
    let (own, libraries) = ("/opt/debian/lib/x86_64-linux-gnu", format!("{HOST}/lib/x86_64-linux-gnu"));
    // The automounter loads its modules only from the directory that it was built for.
    node.shell(&format!("mkdir /auto && ln -s {own}/autofs /usr/lib/x86_64-linux-gnu/autofs")).ok();
    let program =
        format!("{libraries}/ld-linux-x86-64.so.2 --library-path {own}:{libraries} /opt/debian/sbin/automount");
    let arguments = "--foreground --dont-check-daemon --pid-file /run/automount.pid /root/master";
    node.shell(&format!("systemd-run --unit=automounter {program} {arguments}")).ok();
    eventually("the automounter is there", || node.shell("grep ' /auto autofs ' /proc/mounts").status.success());
}
