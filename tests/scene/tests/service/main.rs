//! The daemon as a systemd service with the units of `packaging/`: the unit grants what the work needs, every part of
//! that is needed, and everything else is refused.

mod lifecycle;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use cvmfs_snapshotter::proto::mount::Mount;
use scene::client::{CallResult, Client};
use scene::compare::compare;
use scene::containerd::{NAMESPACE, Writable};
use scene::cri::Cri;
use scene::e2e_fixture::names;
use scene::image::{Builder, Image};
use scene::machine::{Machine, SERVICE, STATE, configure};
use scene::process::eventually;
use scene::publisher::{Repository, Settings};
use scene::registry::Registry;
use scene::sandbox::Sandbox;
use scene::snapshotter_fixture::digest;

/// The numbers of the capabilities that the unit names and docs/privileges.md explains.
const CAPABILITIES: [(&str, u32); 7] = [
    ("CAP_CHOWN", 0),
    ("CAP_DAC_OVERRIDE", 1),
    ("CAP_FOWNER", 3),
    ("CAP_FSETID", 4),
    ("CAP_SYS_ADMIN", 21),
    ("CAP_MKNOD", 27),
    ("CAP_SETFCAP", 31),
];
/// `cap_net_raw+ep`, as a file system keeps it.
const CAP_NET_RAW: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// The layers have deletions in a directory with another owner, the setgid bit, another group and attributes; and an
/// opaque directory.
fn image(builder: &Builder, name: &str) -> Image {
    let lower = builder.layer(|l| {
        l.file("team/secret", "secret").file("team/kept", "kept").file("opaque/old", "old");
        l.file("bin/tool", "#!").mode("bin/tool", 0o4755).dir("gone/deep").file("gone/deep/file", "x");
        l.file("locked/file", "x").mode("locked", 0).owner("locked", 1000, 1000);
    });
    let upper = builder.layer(|l| {
        l.delete("team/secret").file("team/new", name).mode("team", 0o2775).owner("team", 1000, 1001);
        l.xattr("team", "user.note", b"ours").delete("gone");
        l.dir("opaque").opaque("opaque").file("opaque/new", "new").mode("opaque", 0o3771).owner("opaque", 5, 6);
    });
    builder.image(name, &[builder.shell_layer(), lower, upper], &[])
}

/// The owners and attributes of layers are published, so that the service has to copy them.
fn with_much_to_copy(sandbox: &Sandbox) -> Repository {
    Repository::mounted_with(&sandbox.path("cvmfs"), Settings::without_losses())
}

/// The lines of the service's journal that report an error.
fn complaints(machine: &Machine) -> Vec<String> {
    let journal = machine.journal(SERVICE);
    let wrong = ["\"level\":\"error\"", "\"level\":\"warn", "EPERM", "ENOSYS", "not permitted", "not implemented"];
    journal.lines().filter(|line| wrong.iter().any(|word| line.contains(word))).map(str::to_owned).collect()
}

#[test]
fn root_service_works_under_its_systemd_unit() {
    let sandbox = Sandbox::enter("service");
    let builder = Builder::new(&sandbox.path("images"));
    let registry = Registry::start(&sandbox.path("registry"));
    let repository = with_much_to_copy(&sandbox);
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    machine.restart("containerd.service");
    check_what_it_runs_with(&machine);
    for attach in ["bind", "symlink"] {
        configure(&machine.path(""), &format!("attach = \"{attach}\""));
        machine.restart(SERVICE);
        let published = image(&builder, &format!("published-{attach}:1"));
        repository.publish(&published);
        check_image(&machine, &registry, &published, 0);
        // Only its lowest layer is published: containerd unpacks the rest into our directories.
        let mixed = image(&builder, &format!("mixed-{attach}:1"));
        repository.publish_layers(&mixed.layers[..1]);
        check_image(&machine, &registry, &mixed, 2);
    }
    assert_eq!(complaints(&machine), Vec::<String>::new());
}

fn check_what_it_runs_with(machine: &Machine) {
    let status = machine.status(SERVICE);
    let mask: u64 = CAPABILITIES.iter().map(|(_, number)| 1 << number).sum();
    for set in ["CapBnd", "CapPrm", "CapEff"] {
        assert_eq!(status(set), format!("{mask:016x}"), "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status(set), "0000000000000000", "{set}");
    }
    assert_eq!([status("NoNewPrivs"), status("Seccomp")], ["1", "2"]);
    let pid = machine.property(SERVICE, "MainPID");
    let limits = fs::read_to_string(machine.path(&format!("/proc/{pid}/limits"))).expect("it has limits");
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size"));
    let core: Vec<&str> = core.unwrap_or_default().split_whitespace().take(2).collect();
    assert_eq!(core, ["0", "0"], "what it knows of images and users lands in no core file");
    for name in ["mnt", "net"] {
        let of = |pid: &str| fs::read_link(machine.path(&format!("/proc/{pid}/ns/{name}"))).expect("it has one");
        assert_eq!(of(&pid), of("1"), "a service with namespaces of its own does not see repositories that come");
    }
    assert!(machine.property(SERVICE, "StatusText").contains("snapshots, from /cvmfs/scene.test"));
    // The only complaints are about settings for a newer or an older systemd, which the unit explains.
    let units = [SERVICE, "cvmfs-snapshotter.socket"];
    let verified = machine.run(&[&["systemd-analyze", "verify", "--man=no"], &units[..]].concat());
    let others = ["RestartSteps", "RestartMaxDelaySec", "MemoryLimit"];
    let complaints = verified.stderr.lines().filter(|line| line.contains("cvmfs-snapshotter."));
    let unknown: Vec<&str> = complaints.filter(|line| !others.iter().any(|key| line.contains(key))).collect();
    assert_eq!(unknown, Vec::<&str>::new());
    machine.run(&["systemctl", "reload", SERVICE]).ok();
    eventually("the service has read its configuration again", || {
        machine.journal(SERVICE).contains("\"log_level\":\"INFO\"")
    });
    let security = machine.run(&["systemd-analyze", "security", "--no-pager", SERVICE]).ok();
    eprintln!("{}", security.lines().last().unwrap_or_default());
}

/// Pulls, runs and removes an image of which `fetched` layers are not published.
fn check_image(machine: &Machine, registry: &Registry, image: &Image, fetched: usize) {
    let reference = registry.push(image);
    let before = registry.fetched();
    let cri = Cri::connect(&machine.path(CONTAINERD));
    cri.pull(&reference);
    assert_eq!(registry.fetched().since(&before).layers_of(image), fetched);
    let ctr = |arguments: &[&str]| machine.ctr(&[&["--namespace", NAMESPACE], arguments].concat());
    let ours = "--snapshotter=cvmfs-snapshotter";
    // A view and a container show the same files as a normal pull.
    let normally = ["--namespace", "normal", "images", "pull", "--plain-http", "--snapshotter=overlayfs", &reference];
    machine.ctr(&normally).ok();
    for writable in [Writable::No, Writable::Yes] {
        let normal = Root::mount(machine, "normal", "overlayfs", image, writable);
        let ours = Root::mount(machine, NAMESPACE, "cvmfs-snapshotter", image, writable);
        let comparison = compare(&normal.path(), &ours.path());
        assert!(comparison.entries > 15 && comparison.differences.is_empty(), "{:#?}", comparison.differences);
        normal.end();
        ours.end();
    }
    // The container leaves a directory of another owner, which only that owner may enter.
    let program = "cat /team/new; ls /team; mkdir -p /tmp/a/b/c; cat /bin/busybox >/tmp/a/b/c/big; \
                   chown -R 1000:1001 /tmp/a; chmod 0 /tmp/a/b/c /tmp/a/b /tmp/a; sleep 1000";
    ctr(&["run", "--detach", ours, &reference, "c", "/bin/sh", "-c", program]).ok();
    let client = machine.client();
    let found = client.list(&["kind==active"]).expect("a good filter").into_iter().find(|s| s.name.ends_with("/c"));
    let key = found.expect("the container has a snapshot").name;
    eventually("Usage counts what a container wrote", || {
        client.usage(&key).expect("everything can be measured").0 > 500_000
    });
    // The container keeps running, whatever happens to the service.
    for how in [&["restart"][..], &["kill", "--signal=SIGKILL"]] {
        let pid = machine.property(SERVICE, "MainPID");
        machine.run(&[&["systemctl"], how, &[SERVICE]].concat()).ok();
        eventually("the service is there again", || {
            machine.property(SERVICE, "MainPID") != pid && machine.property(SERVICE, "ActiveState") == "active"
        });
    }
    let tasks = ctr(&["tasks", "ls"]).ok();
    assert!(tasks.contains("RUNNING"), "{tasks}");
    // containerd does not repeat a collection that fails because it has not connected again.
    eventually("containerd has connected again", || {
        ctr(&["run", "--rm", ours, &reference, "again", "/bin/true"]).status.success()
    });
    ctr(&["tasks", "kill", "--signal", "SIGKILL", "c"]).ok();
    eventually("the task is gone", || ctr(&["tasks", "rm", "--force", "c"]).status.success());
    let client = machine.client();
    ctr(&["containers", "rm", "c"]).ok();
    cri.remove(&reference);
    eventually("nothing is left of the image and its container", || {
        // This makes containerd collect garbage once more.
        ctr(&["leases", "create", "--id", "gc"]);
        ctr(&["leases", "rm", "--sync", "gc"]);
        client.list(&[]).is_ok_and(|all| all.is_empty()) && snapshot_dirs(machine).is_empty()
    });
}

/// A root file system that is mounted in the machine, as a snapshot that containerd keeps.
struct Root<'m> {
    machine: &'m Machine,
    containerd: Client,
    key: String,
    at: String,
}

impl<'m> Root<'m> {
    fn mount(
        machine: &'m Machine,
        namespace: &'static str,
        snapshotter: &'static str,
        image: &Image,
        writable: Writable,
    ) -> Self {
        let containerd = Client::connect_to_containerd(&machine.path(CONTAINERD), namespace, snapshotter);
        let (key, at) = (format!("look {writable:?}"), format!("/mnt/{snapshotter}"));
        let parent = image.chain_ids.last().expect("an image has layers");
        // Without the label containerd would collect it at once.
        let with = [("containerd.io/gc.root", "scene")];
        let mounts = match writable {
            Writable::Yes => containerd.prepare(&key, parent, &with),
            Writable::No => containerd.view(&key, parent, &with),
        };
        let mounts = mounts.unwrap_or_else(|status| panic!("no snapshot of {}: {}", image.name, status.message()));
        let [mount] = &mounts[..] else { panic!("one mount describes a snapshot: {mounts:?}") };
        machine.run(&["mkdir", "-p", &at]).ok();
        machine.run(&["mount", "-t", &mount.type_, "-o", &mount.options.join(","), &mount.source, &at]).ok();
        Self { machine, containerd, key, at }
    }

    fn path(&self) -> PathBuf {
        self.machine.path(&self.at)
    }

    fn end(self) {
        self.machine.run(&["umount", &self.at]).ok();
        self.containerd.remove(&self.key).unwrap_or_else(|status| panic!("{}", status.message()));
    }
}

fn snapshot_dirs(machine: &Machine) -> Vec<String> {
    names(&machine.path(&format!("{STATE}/snapshotter/snapshots")))
}

/// Each capability of the unit is needed by some work, as far as this kernel checks it.
#[test]
fn root_service_fails_without_any_one_of_its_capabilities() {
    let sandbox = Sandbox::enter("capabilities");
    let repository = with_much_to_copy(&sandbox);
    publish_odd_layers(&repository);
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    configure(&machine.path(""), "attach = \"bind\"");
    machine.restart(SERVICE);
    assert_eq!(exercise_daemon(&machine), Vec::<String>::new(), "with all of them");
    remove_leftovers(&machine);
    for (name, parts) in [
        ("CAP_SYS_ADMIN", &["cannot bind mount on", "(EPERM)"][..]),
        ("CAP_CHOWN", &["cannot change the owner of", "(EPERM)"]),
        ("CAP_FOWNER", &["cannot set the attributes of", "(EPERM)"]),
        ("CAP_SETFCAP", &["cannot set the attributes of", "(EPERM)"]),
        ("CAP_FSETID", &["a mask has mode 0755"]),
        ("CAP_DAC_OVERRIDE", &["cannot set the attributes of", "(EACCES)", "cannot measure", "a writer's files stay"]),
        // Since Linux 5.8 any process can make a whiteout.
        ("CAP_MKNOD", &[]),
    ] {
        machine.drop_in(SERVICE, "without", &format!("[Service]\nCapabilityBoundingSet=~{name}\n"));
        machine.restart(SERVICE);
        let failures = exercise_daemon(&machine);
        eprintln!("without {name}: {failures:?}");
        assert_eq!(failures.is_empty(), parts.is_empty(), "without {name}");
        for part in parts {
            assert!(failures.iter().any(|why| why.contains(part)), "without {name}: no {part} in {failures:?}");
        }
        machine.drop_in(SERVICE, "without", "");
        machine.restart(SERVICE);
        remove_leftovers(&machine);
    }
}

/// Removes what a daemon without a capability could not remove.
fn remove_leftovers(machine: &Machine) {
    let client = machine.client();
    for snapshot in client.list(&["kind!=committed"]).expect("a good filter") {
        client.remove(&snapshot.name).expect("anything can be removed");
    }
    eventually("what was left is removed", || {
        client.cleanup().expect("a cleanup is possible");
        snapshot_dirs(machine).is_empty()
    });
}

/// Publishes two layers. The upper one deletes from a directory that has another owner, the setgid bit, a capability
/// and an attribute.
fn publish_odd_layers(repository: &Repository) {
    let top = |n| repository.layer_dir(&digest(n)).join("layerfs");
    fs::create_dir_all(top(1).join("team")).expect("a layer can be made");
    fs::write(top(1).join("team/secret"), "").expect("a layer can be filled");
    let team = top(2).join("team");
    fs::create_dir_all(&team).expect("a layer can be made");
    fs::write(team.join(".wh.secret"), "").expect("a layer can be filled");
    chown(&team, Some(1000), Some(1001)).expect("an owner can be set");
    fs::set_permissions(&team, fs::Permissions::from_mode(0o2755)).expect("a mode can be set");
    xattr::set(&team, "user.note", b"ours").expect("an attribute can be set");
    xattr::set(&team, "security.capability", CAP_NET_RAW).expect("an attribute can be set");
    repository.commit();
}

/// Does everything once that the daemon does. The result is what failed.
fn exercise_daemon(machine: &Machine) -> Vec<String> {
    let mut failures = Vec::new();
    let client = machine.client();
    let lower = client.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    let upper = client.pull_remote("extract-2", &lower, "sha256:c2", &digest(2));
    let mut done = |result: CallResult<()>| failures.extend(result.err().map(|status| status.message().to_owned()));
    // A container on published layers.
    let below = client.prepare("container", &upper, &[]);
    let masks: Vec<PathBuf> = below.iter().flat_map(|mounts| directories(mounts)).map(|d| machine.path(&d)).collect();
    done(below.map(drop));
    // A container without layers has made a directory that only its owner may enter.
    let own = client.prepare("writer", "", &[]).expect("a directory can be made");
    let locked = machine.path(&own[0].source).join("locked");
    fs::create_dir_all(locked.join("inner")).expect("a directory can be made");
    fs::write(locked.join("inner/file"), "x").expect("a file can be made");
    for directory in [locked.join("inner"), locked] {
        chown(&directory, Some(1000), Some(1000)).expect("an owner can be set");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o000)).expect("a mode can be set");
    }
    done(client.usage("writer").map(|usage| assert_eq!(usage.1, 4, "inodes")));
    done(client.remove("writer"));
    done(client.cleanup());
    if machine.path(&own[0].source).exists() {
        failures.push("a writer's files stay".to_owned());
    }
    // The lower layer itself is skipped, because its directory has another mode.
    for team in masks.iter().map(|dir| dir.join("team")).filter(|team| !team.join("secret").is_file()) {
        let mode = fs::metadata(&team).map_or(0o2755, |found| found.permissions().mode() & 0o7777);
        if mode != 0o2755 {
            failures.push(format!("a mask has mode {mode:04o}"));
        }
    }
    failures
}

/// The path of a program that was built with this one.
fn beside(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("this program knows where it is");
    let found = own.ancestors().map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is built first: cargo build --workspace"))
}

/// The directories of an overlay.
fn directories(mounts: &[Mount]) -> Vec<String> {
    mounts
        .iter()
        .flat_map(|mount| &mount.options)
        .flat_map(|option| option.split(['=', ':']))
        .map(str::to_owned)
        .collect()
}

/// The packaged unit with another program in it, compared with a unit without restrictions.
#[test]
fn root_systemd_unit_denies_everything_it_does_not_grant() {
    let sandbox = Sandbox::enter("refused");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    let unit = fs::read_to_string(machine.path("/usr/lib/systemd/system/cvmfs-snapshotter.service"));
    let unit = unit.expect("the unit is installed");
    fs::copy(beside("attempts"), machine.path("/usr/bin/attempts")).expect("a program can be installed");
    let try_under = |name: &str, settings: &str| -> BTreeMap<String, String> {
        let dir = format!("{STATE}/{name}");
        fs::create_dir(machine.path(&dir)).expect("a directory can be made");
        let program = format!("/usr/bin/attempts {dir}");
        let text = format!("[Service]\n{settings}\nType=oneshot\nExecStart={program}\nRestart=no\n");
        machine.write(&format!("/etc/systemd/system/{name}.service"), &text);
        machine.run(&["systemctl", "daemon-reload"]).ok();
        machine.restart(&format!("{name}.service"));
        let lines = machine.journal(&format!("{name}.service"));
        lines.lines().filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    };
    let (_, settings) = unit.split_once("[Service]\n").expect("a unit has a section");
    let (settings, _) = settings.split_once("[Install]").expect("a unit has a section");
    let settings = settings.replace("ExecStart=", "#");
    let (free, bound) = (try_under("free", ""), try_under("bound", &settings));
    for what in ["bind", "whiteout", "skeleton", "opaque", "listen", "datagram"] {
        assert_eq!([&free[what], &bound[what]], ["ok", "ok"], "{what}");
    }
    for (what, errno) in [
        ("disk", "EPERM"),
        ("fuse", "EPERM"),
        ("internet", "EAFNOSUPPORT"),
        ("internet-6", "EAFNOSUPPORT"),
        ("netlink", "EAFNOSUPPORT"),
        ("packet", "EAFNOSUPPORT"),
        ("hostname", "ENOSYS"),
        ("personality", "ENOSYS"),
        ("trace", "ENOSYS"),
        ("host-name-namespace", "ENOSYS"),
        ("mount-namespace", "ENOSYS"),
        ("chroot", "ENOSYS"),
        ("program", "ENOSYS"),
        ("group", "ENOSYS"),
        ("user", "ENOSYS"),
    ] {
        assert_eq!([&free[what], &bound[what]], ["ok", errno], "{what}");
    }
}
