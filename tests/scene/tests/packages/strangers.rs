//! `replace-go-unit`, which root runs at every installation, must not touch processes that are no snapshotter of this
//! node, and must not trust names that other users choose.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use scene::machine::{Machine, SERVICE, SOCKET};
use scene::process::{Output, eventually};
use scene::sandbox::Sandbox;

use crate::node::SOCKET_UNIT;

const SCRIPT: &str = "/usr/libexec/cvmfs-snapshotter/replace-go-unit";
const PROGRAM: &str = "/usr/bin/cvmfs-snapshotter";
/// A program that listens at a path, under a name, and prints that it listens.
const LISTENER: &str = r#"use Socket;
socket(S, AF_UNIX, SOCK_STREAM, 0) or die;
bind(S, pack_sockaddr_un($ARGV[0])) or die "cannot bind: $!";
listen(S, 5) or die;
$0 = $ARGV[1] if @ARGV > 1;
print "listens\n";
close STDOUT;
sleep;
"#;

/// A machine with the script, our units, and a program that finds every configuration good.
fn boot_machine_or_skip(sandbox: &Sandbox) -> Option<Machine> {
    let machine = Machine::boot_without_daemon_or_skip(sandbox, &sandbox.make_dir("repository"))?;
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let read = |name: &str| fs::read_to_string(packaging.join(name)).expect("a file of ours can be read");
    install(&machine, SCRIPT, &read("replace-go-unit"));
    install(&machine, PROGRAM, "#!/bin/sh\n");
    machine.write("/usr/local/lib/listener", LISTENER);
    for unit in [SERVICE, SOCKET_UNIT] {
        machine.write(&format!("/usr/lib/systemd/system/{unit}"), &read(unit));
    }
    machine.run(&["systemctl", "daemon-reload"]).ok();
    Some(machine)
}

fn install(machine: &Machine, path: &str, text: &str) {
    machine.write(path, text);
    fs::set_permissions(machine.path(path), fs::Permissions::from_mode(0o755)).expect("a mode can be set");
}

fn shell(machine: &Machine, line: &str) -> Output {
    machine.run(&["env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", &format!("{line} 2>&1")])
}

/// Starts a shell command in the background that listens in the end. The result is its PID.
fn start(machine: &Machine, line: &str) -> String {
    let log = "/run/listener.log";
    let pid = shell(machine, &format!("setsid sh -c '{line}' >{log} 2>&1 </dev/null & echo $!")).ok();
    eventually("it listens", || {
        let said = fs::read_to_string(machine.path(log)).expect("there is a log");
        assert!(!said.contains("cannot"), "{said}");
        said.contains("listens\n")
    });
    pid.trim().to_owned()
}

/// The shell command that listens at our socket's path.
fn listen(name: &str) -> String {
    let directory = Path::new(SOCKET).parent().expect("a socket has a directory").display();
    format!("mkdir -p {directory} && exec perl /usr/local/lib/listener {SOCKET} {name}")
}

/// Any user could block the installation of the package: the path of a socket in /proc/net/unix is only a name, which a
/// user with a mount namespace chooses freely.
#[test]
fn root_unprivileged_listener_at_our_socket_path_does_not_block_installation() {
    let sandbox = Sandbox::enter("user-listens");
    let Some(machine) = boot_machine_or_skip(&sandbox) else { return };
    let line = format!(
        "exec setpriv --reuid=65534 --regid=65534 --clear-groups unshare --user --map-root-user --mount \
         sh -c \"mount -t tmpfs none /run && {}\"",
        listen("stranger")
    );
    start(&machine, &line);
    let seen = shell(&machine, &format!("grep -c {SOCKET} /proc/net/unix")).ok();
    assert_ne!(seen, "0\n", "the user's socket is in the list");
    for task in ["", "replace-any", "may-restart"] {
        let output = shell(&machine, &format!("{SCRIPT} {task}"));
        assert_eq!((output.status.code(), output.stdout.contains("listens at")), (Some(0), false), "{output:?}");
    }

    // A process of root in a container on the network of the host is none either.
    let contained = format!("exec unshare --mount sh -c \"mount -t tmpfs none /run && {}\"", listen("contained"));
    start(&machine, &contained);
    let output = shell(&machine, SCRIPT);
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    // A process of root that listens at the path on the host is reported.
    let pid = start(&machine, &listen("real"));
    let output = shell(&machine, SCRIPT);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stdout.contains(&format!("process {pid} (real) listens at {SOCKET}")), "{output:?}");
}

/// With such a name `systemctl show --property=MainPID -Hroot@…` would run ssh as root.
#[test]
fn root_cgroup_named_like_an_option_is_not_passed_to_systemctl() {
    let sandbox = Sandbox::enter("unit-name");
    let Some(machine) = boot_machine_or_skip(&sandbox) else { return };
    install(&machine, "/usr/bin/ssh", "#!/bin/sh\necho \"$@\" >>/run/ssh\n");
    let host = "-Hroot@attacker.example.service";
    let groups = "for d in systemd unified .; do [ -e /sys/fs/cgroup/$d/cgroup.procs ] || continue; \
                  mkdir -p /sys/fs/cgroup/$d/NAME && echo $$ >/sys/fs/cgroup/$d/NAME/cgroup.procs; done";
    let pid = start(&machine, &format!("{}; {}", groups.replace("NAME", host), listen("odd")));
    let in_group = shell(&machine, &format!("grep -c -e '/{host}$' /proc/{pid}/cgroup"));
    assert_ne!(in_group.stdout, "0\n", "the process is in that group");
    let output = shell(&machine, SCRIPT);
    let called = fs::read_to_string(machine.path("/run/ssh")).unwrap_or_default();
    assert_eq!(called, "", "ssh was called: {output:?}");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stdout.contains(&format!("process {pid} (odd) listens at")), "{output:?}");
}

/// The command `replace-any`, which the script recommends, killed any process that had the reported PID by then.
#[test]
fn root_process_with_reused_pid_is_not_killed() {
    let sandbox = Sandbox::enter("number");
    let Some(machine) = boot_machine_or_skip(&sandbox) else { return };
    shell(&machine, "mount -o remount,rw,bind /proc/sys").ok();
    let pid = start(&machine, &listen("old"));
    // The script checks the configuration after it has found the listener and before it kills it.
    install(
        &machine,
        PROGRAM,
        &format!(
            "#!/bin/sh
kill -KILL {pid}
while [ -d /proc/{pid} ]; do sleep 0.1; done
for attempt in $(seq 1000); do
    echo $(({pid} - 1)) >/proc/sys/kernel/ns_last_pid
    sleep 1000 >/dev/null 2>&1 &
    [ $! != {pid} ] || exit 0
    kill $!
done
"
        ),
    );
    let output = shell(&machine, &format!("{SCRIPT} replace-any"));
    let name = fs::read_to_string(machine.path(&format!("/proc/{pid}/comm"))).unwrap_or_default();
    assert_eq!(name, "sleep\n", "another process has the number, and lives: {output:?}");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = format!("process {pid} (old) has ended meanwhile: nothing was killed or started; run this again: ");
    assert!(output.stdout.contains(&said), "{output:?}");
    // Without a reused PID the listener is killed.
    install(&machine, PROGRAM, "#!/bin/sh\n");
    shell(&machine, &format!("rm -f {SOCKET}")).ok();
    let pid = start(&machine, &listen("new"));
    let output = shell(&machine, &format!("{SCRIPT} replace-any"));
    assert!(output.status.success(), "{output:?}");
    assert!(!machine.path(&format!("/proc/{pid}")).exists(), "{output:?}");
}

/// `echo` of a shell would turn escape sequences in a name into control characters on root's terminal.
#[test]
fn root_control_characters_in_process_names_are_escaped() {
    let sandbox = Sandbox::enter("terminal");
    let Some(machine) = boot_machine_or_skip(&sandbox) else { return };
    machine.write("/usr/local/lib/name", "a\\033[2J\x1b[2Jb");
    let pid = start(&machine, &listen("\"$(cat /usr/local/lib/name)\""));
    let output = shell(&machine, SCRIPT);
    assert!(!output.stdout.contains('\x1b'), "{output:?}");
    assert!(output.stdout.contains(&format!("process {pid} (a\\033[2J[2Jb) listens at")), "{output:?}");
}
