//! What `cvmfs-snapshotter doctor` says of good nodes and of broken ones, with the real containerd,
//! registry and FUSE mounts. Lines that it names for containerd's configuration are set in remedies.rs.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use cvmfs_testbed::client::Mount;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use scene::containerd::PLUGIN_NAME;
use scene::doctor::{Finding, read};
use scene::e2e_fixture::{E2eFixture, PAUSE};
use scene::process::{Output, Server, eventually, run, tool};
use scene::publisher::Repository;
use scene::sandbox::{Sandbox, mount_tmpfs};
use scene::snapshotter::binary;

/// What names the containerd of the stage.
fn containerd(stage: &E2eFixture) -> [String; 4] {
    let (socket, file) = (stage.ours.socket().display().to_string(), stage.ours.configuration().display().to_string());
    ["--containerd".to_owned(), socket, "--containerd-config".to_owned(), file]
}

fn doctor(stage: &E2eFixture, more: &[&str]) -> Output {
    let containerd = containerd(stage);
    let words = containerd.iter().map(String::as_str);
    stage.snapshotter.admin(&["doctor"].into_iter().chain(words).chain(more.iter().copied()).collect::<Vec<_>>())
}

/// With `SCENE_SHOW`, what a person sees of it.
fn show(stage: &E2eFixture) {
    if std::env::var_os("SCENE_SHOW").is_some() {
        let output = doctor(stage, &[]);
        let code = output.status.code().unwrap_or(-1);
        scene::report::print(format_args!(
            "# cvmfs-snapshotter doctor\n{}{}exit code {code}\n",
            output.stdout, output.stderr
        ));
    }
}

/// The doctor's findings of this check, and the exit code.
fn findings(stage: &E2eFixture, check: &str) -> (Vec<Finding>, i32) {
    let output = doctor(stage, &["--json"]);
    let code = output.status.code().expect("the doctor ends by itself");
    let all = read(&output);
    let found: Vec<Finding> = all.iter().filter(|one| one.check == check).cloned().collect();
    assert!(!found.is_empty() || check.is_empty(), "no {check} in {all:#?}");
    (if check.is_empty() { all } else { found }, code)
}

fn said_by(output: std::process::Output) -> Output {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Output { status: output.status, stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[track_caller]
fn assert_says_nothing_of(stage: &E2eFixture, check: &str) {
    let all = read(&doctor(stage, &["--json"]));
    assert!(all.iter().all(|one| one.check != check), "{all:#?}");
}

#[track_caller]
fn assert_finds(stage: &E2eFixture, check: &str, state: &str, words: &str) {
    let (found, code) = findings(stage, check);
    let is_it = |one: &Finding| {
        let text = format!("{} {}", one.what, one.remedy.as_deref().unwrap_or_default());
        one.state == state && words.split('|').all(|word| text.contains(word))
    };
    assert!(found.iter().any(is_it), "no {state} with {words:?} in {found:#?}");
    let expected = match state {
        "problem" => 2,
        "warning" => 1,
        _ => 0,
    };
    assert!(code >= expected, "{code} for a {state}");
}

#[test]
fn root_good_node_has_no_faults() {
    let stage = E2eFixture::start_with_repository("good", "", Repository::mounted_with_own_cache_disk);
    let image = stage.shell_image("good:1", "a");
    let reference = stage.publish_and_push(&image);
    // The client of the tests is root's, as everything in the layers is, and passes for one that claims it.
    let top = stage.repository.layer_dir(&image.layers[0].digest).join("layerfs");
    let entry = fs::read_dir(&top).expect("the layer is published").next().expect("it is not empty");
    std::os::unix::fs::lchown(entry.expect("it can be read").path(), Some(5), Some(5)).expect("it can be given away");
    stage.repository.commit();
    stage.ours.pull(&reference);
    let (all, code) = findings(&stage, "");
    let faults: Vec<&Finding> = all.iter().filter(|one| one.is_fault()).collect();
    assert!(faults.is_empty() && code == 0, "{code}: {faults:#?}");
    show(&stage);
    let checks: Vec<&str> = all.iter().map(|one| one.check.as_str()).collect();
    for check in [
        "node.overlayfs",
        "node.disk",
        "config.file",
        "daemon.running",
        "repository.answers",
        "repository.cache-device",
        "state.images",
        "containerd.running",
        "containerd.plugin",
        "containerd.snapshotter",
        "containerd.annotations",
        "images.other-snapshotter",
    ] {
        assert!(checks.contains(&check), "{check} is missing in {checks:?}");
    }
}

#[test]
fn root_faults_of_containerds_configuration_come_with_table_and_line() {
    let stage = E2eFixture::start_with_repository("sick", "", Repository::plain);
    let file = stage.ours.configuration();
    let good = fs::read_to_string(&file).expect("containerd's configuration can be read");
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} is not in {good}");
        fs::write(&file, good.replace(from, to)).expect("containerd's configuration can be written");
    };
    with("disable_snapshot_annotations = false", "");
    assert_finds(
        &stage,
        "containerd.annotations",
        "problem",
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd]|disable_snapshot_annotations = false",
    );
    show(&stage);
    // The table of exports that is left has no type.
    with("[proxy_plugins.cvmfs-snapshotter]", "[proxy_plugins.cvmfs]");
    assert_finds(&stage, "containerd.type", "problem", "[proxy_plugins.cvmfs-snapshotter]|type = \"snapshot\"");
    with("proxy_plugins.cvmfs-snapshotter", "proxy_plugins.stargz");
    assert_finds(&stage, "containerd.plugin", "problem", "[proxy_plugins.stargz]|[proxy_plugins.cvmfs-snapshotter]");
    show(&stage);
    with("/run/s.sock", "/run/other.sock");
    let socket = stage.snapshotter.socket().display().to_string();
    let words = format!("other.sock|[proxy_plugins.cvmfs-snapshotter]|address = \"{socket}\"");
    assert_finds(&stage, "containerd.plugin", "problem", &words);
    with("version = 2", "version = = 2");
    assert_finds(&stage, "containerd.config", "problem", "multiple equals|config dump");
    with("snapshotter = \"cvmfs-snapshotter\"", "snapshotter = \"overlayfs\"");
    assert_finds(&stage, "containerd.snapshotter", "note", "use overlayfs");
    fs::write(&file, &good).expect("containerd's configuration can be written");

    // The pull that went wrong because of it.
    let refused = stage.snapshotter.client().prepare("extract-1 x", "", &[("containerd.io/snapshot.ref", "sha256:1")]);
    refused.expect("it is an ordinary snapshot");
    assert_finds(&stage, "pulls.annotations", "problem", "1 layers were downloaded|ctr images pull");
}

#[test]
fn root_images_that_were_pulled_before_the_switch_are_found() {
    let stage = E2eFixture::start_with_repository("before", "", Repository::plain);
    let (image, pause) = (stage.shell_image("before:1", "a"), stage.shell_image(PAUSE, "p"));
    let (reference, pause) = (stage.publish_and_push(&image), stage.publish_and_push(&pause));
    for one in [&reference, &pause] {
        stage.ours.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", one]).ok();
    }
    assert_finds(
        &stage,
        "images.other-snapshotter",
        "warning",
        &format!("{reference} was pulled with overlayfs|crictl pull"),
    );
    assert_finds(&stage, "images.pause", "warning", &format!("{pause} is there for overlayfs only"));
    show(&stage);
    stage.ours.remove(&reference);
    stage.ours.remove(&pause);
    stage.ours.pull(&reference);
    stage.ours.pull(&pause);
    assert_finds(&stage, "images.other-snapshotter", "good", "all");
}

#[test]
fn root_dead_repository_stopped_daemon_and_bad_configuration_are_told_apart() {
    let mut stage = E2eFixture::start("apart", "");
    let image = stage.shell_image("apart:1", "a");
    let reference = stage.publish_and_push(&image);
    stage.ours.pull(&reference);
    stage.repository.withdraw(&image.layers[1].digest);
    assert_finds(
        &stage,
        "state.images",
        "problem",
        &format!("no container can start on {reference}|does not have it|crictl pull"),
    );

    let config = stage.sandbox.path("s/config.toml");
    let good = fs::read_to_string(&config).expect("the configuration can be read");
    fs::write(&config, format!("{good}version = 2\nattahc = \"bind\"\n")).expect("the configuration can be written");
    assert_finds(&stage, "config.in-use", "warning", "restart");
    assert_finds(&stage, "config.file", "warning", "version|/etc/containerd/config.toml");
    assert_finds(&stage, "config.file", "warning", "attahc|spelling");
    fs::write(&config, format!("{good}attach = 3\n")).expect("the configuration can be written");
    assert_finds(&stage, "config.file", "problem", "attach|--check-config");
    fs::write(&config, &good).expect("the configuration can be written");

    stage.repository.with_client(Mount::kill);
    assert_finds(&stage, "repository.answers", "problem", "cvmfs_config probe");
    assert_finds(&stage, "daemon.running", "good", "runs as process");
    show(&stage);
    // Nobody asks a daemon that is not there.
    stage.snapshotter.end(Signal::SIGTERM);
    assert_finds(&stage, "daemon.running", "problem", "systemctl enable --now cvmfs-snapshotter");
    show(&stage);
    assert_finds(&stage, "repository.answers", "problem", "cvmfs_config probe");
    for command in ["status", "gc"] {
        let output = stage.snapshotter.admin(&[command]);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            output.stderr.contains("no daemon serves") && output.stderr.contains("systemctl start"),
            "{}",
            output.stderr
        );
    }
}

/// Nobody knows when, and if, what hangs goes on.
#[test]
fn root_paths_that_hang_or_never_end_do_not_keep_the_doctor() {
    let stage = E2eFixture::start("hangs", "repository-timeout = 2");
    stage.repository.command("hang all");
    assert_finds(&stage, "repository.answers", "problem", "did not answer within 2 s");
    // As if there were no daemon to ask, and everything were on the mount that hangs.
    let path = |name: &str| stage.repository.dir().join(name).display().to_string();
    let config = stage.sandbox.path("s/config.toml").display().to_string();
    let socket = stage.ours.socket().display().to_string();
    let begun = Instant::now();
    let words = ["doctor", "--json", "--address", "/nobody/there.sock", "--config", &config, "--root", &path("root")];
    let more = ["--containerd", &socket, "--containerd-config", &path("config.toml")];
    let alone = run(binary(), words.iter().chain(&more));
    let took = begun.elapsed();
    stage.repository.command("normal");
    assert_eq!(alone.status.code(), Some(2), "{}{}", alone.stdout, alone.stderr);
    let all = read(&alone);
    for (check, words) in [
        ("repository.answers", "did not answer within"),
        ("node.state-root", "did not answer within"),
        ("containerd.config", "did not answer within"),
    ] {
        let is_it = |one: &Finding| one.check == check && one.what.contains(words);
        assert!(all.iter().any(is_it), "no {check} with {words:?} in {all:#?}");
    }
    assert!(took < Duration::from_mins(2), "{took:?}");

    // What nobody writes into, and what has no end.
    let pipe = stage.sandbox.path("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).expect("a pipe can be made");
    for path in [pipe.as_path(), Path::new("/dev/zero"), stage.sandbox.dir()] {
        let path = path.display().to_string();
        let both = ["--config", &path, "--containerd", &socket, "--containerd-config", &path];
        let all = read(&run(binary(), ["doctor", "--json"].iter().chain(&both)));
        for check in ["config.file", "containerd.config"] {
            let is_it = |one: &Finding| one.check == check && one.state == "problem";
            assert!(all.iter().any(is_it), "{path}: no {check} in {all:#?}");
        }
    }
}

/// A program whose first page is to be read from a mount that hangs keeps whoever starts it.
#[test]
fn root_containerd_program_on_a_hung_mount_does_not_keep_the_doctor() {
    let stage = E2eFixture::start("hung-program", "repository-timeout = 2");
    let image = stage.shell_image("hung:1", "a");
    stage.publish_and_push(&image);
    let digest = &image.layers[0].digest;
    let layer = stage.repository.dir().join(".layers").join(&digest[7..9]).join(&digest[7..]).join("layerfs");
    let busybox = layer.join("bin/busybox");
    let (socket, file) = (stage.sandbox.path("hung.sock"), stage.sandbox.path("containerd.toml"));
    fs::write(&file, "version = 2\n").expect("a file can be written");
    // What listens becomes that program.
    let script = "use Socket; $^F = 99; socket(S, AF_UNIX, SOCK_STREAM, 0) or die; \
                  bind(S, pack_sockaddr_un($ARGV[0])) or die; listen(S, 5) or die; exec $ARGV[1], 'sleep', '1000' or die;";
    let mut command = Command::new("perl");
    command.args(["-e", script]).arg(&socket).arg(&busybox);
    let mut server = Server::start(&mut command, &stage.sandbox.path("hung.log"));
    let link = format!("/proc/{}/exe", server.pid());
    server.wait_until("run from the repository", || fs::read_link(&link).is_ok_and(|program| program == busybox));
    stage.repository.command("hang all");
    let begun = Instant::now();
    let [socket, file] = [&socket, &file].map(|path| path.display().to_string());
    let output = stage.snapshotter.admin(&["doctor", "--json", "--containerd", &socket, "--containerd-config", &file]);
    stage.repository.command("normal");
    assert!(begun.elapsed() < Duration::from_mins(2), "{:?}", begun.elapsed());
    let all = read(&output);
    assert!(all.iter().any(|one| one.check == "containerd.running" && one.state == "problem"), "{all:#?}");
}

/// The doctor ran, as root, whatever program listened at the socket that it was told.
#[test]
fn root_programs_that_are_not_roots_alone_are_not_run() {
    let sandbox = Sandbox::enter("stranger");
    fs::set_permissions(sandbox.dir(), fs::Permissions::from_mode(0o777)).expect("a mode can be set");
    let file = sandbox.path("containerd.toml");
    fs::write(&file, "version = 2\n").expect("a file can be written");
    for (n, (runs_as, owner, mode, before, refused)) in [
        (65534, 65534, 0o755, &[][..], "process PID is of user 65534"),
        (0, 65534, 0o755, &[], "is not root's alone (owner 65534, mode 0755)"),
        (0, 0, 0o775, &[], "is not root's alone (owner 0, mode 0775)"),
        (0, 0, 0o755, &["unshare", "--mount"], "process PID has a mount namespace of its own"),
        (0, 0, 0o755, &[], ""),
    ]
    .into_iter()
    .enumerate()
    {
        let [program, socket, log] = ["program", "socket", "log"].map(|name| sandbox.path(&format!("{name}{n}")));
        fs::copy(env!("CARGO_BIN_EXE_stranger"), &program).expect("a program can be copied");
        chown(&program, Some(owner), Some(owner)).expect("an owner can be set");
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).expect("a mode can be set");
        let mut command = Command::new(before.first().map_or(program.as_os_str(), |first| first.as_ref()));
        command.args(before.iter().skip(1)).args(before.first().map(|_| &program)).arg(&socket).uid(runs_as);
        let mut server = Server::start(&mut command, &log);
        server.wait_until("listen", || UnixStream::connect(&socket).is_ok());

        let output = Command::new(binary())
            .args(["doctor", "--json", "--address", "/nobody/there.sock", "--containerd"])
            .arg(&socket)
            .arg("--containerd-config")
            .arg(&file)
            .env("SCENE_OF_AN_ADMIN", "1")
            .output()
            .expect("the doctor can be started");
        let ran = fs::read_to_string(program.with_extension("ran")).ok();
        assert_eq!(ran.is_none(), !refused.is_empty(), "case {n}: {ran:?}");
        let all = read(&said_by(output));
        let refused = refused.replace("PID", &server.pid().to_string());
        let is_said = |one: &Finding| one.check == "containerd.config" && one.state == "warning";
        let said: Vec<&Finding> = all.iter().filter(|one| is_said(one)).collect();
        match ran {
            None => {
                assert!(said.len() == 1 && said[0].what.contains(&refused), "case {n}: {all:#?}");
                let remedy = said[0].remedy.as_deref().unwrap_or_default();
                assert!(remedy.contains("docs/containerd.md"), "what to compare with: {remedy}");
            }
            Some(ran) => {
                // This program has no version, and none is guessed.
                assert!(said.iter().all(|one| one.what.ends_with("its version is unknown")), "{all:#?}");
                assert!(ran.starts_with("0 [\"containerd\", "), "{ran}");
                assert!(ran.contains("PATH") && !ran.contains("SCENE_OF_AN_ADMIN"), "{ran}");
            }
        }
    }
}

/// The state root was emptied under containerd, which still believes in what was there.
#[test]
fn root_images_whose_snapshots_went_with_the_state_root_are_found() {
    let mut stage = E2eFixture::start_with_repository("emptied", "", Repository::plain);
    let image = stage.shell_image("emptied:1", "a");
    let reference = stage.publish_and_push(&image);
    let other = stage.publish_and_push(&stage.shell_image("other:1", "b"));
    stage.ours.pull(&reference);
    stage
        .ours
        .ctr(&["--namespace", "default", "images", "pull", "--plain-http", "--snapshotter", PLUGIN_NAME, &other])
        .ok();
    assert_finds(&stage, "images.other-snapshotter", "good", "all 1 images");
    assert_says_nothing_of(&stage, "images.gone");
    stage.snapshotter.end(Signal::SIGTERM);
    fs::remove_dir_all(stage.snapshotter.root()).expect("the state root can be removed");
    stage.snapshotter.start_again();
    for (reference, namespace) in [(&reference, "k8s.io"), (&other, "default")] {
        assert_finds(&stage, "images.gone", "problem", &format!("{reference} (namespace {namespace})"));
    }
    let pulls = format!("crictl pull {reference}|nerdctl --namespace default --snapshotter {PLUGIN_NAME} pull {other}");
    assert_finds(&stage, "images.gone", "problem", &pulls);
    assert_says_nothing_of(&stage, "images.other-snapshotter");
    show(&stage);
    // It says what helps, and what does not.
    let runs = |stage: &E2eFixture, name: &str| stage.ours.run(&reference, name, &["/bin/true"]).status.success();
    let _ = stage.ours.cri().try_pull(&reference);
    assert!(!runs(&stage, "a"), "a new pull alone mends nothing");
    stage.ours.remove(&reference);
    stage.ours.pull(&reference);
    assert!(runs(&stage, "b"), "removed and pulled again it is there");
    stage.ours.ctr(&["--namespace", "default", "images", "rm", "--sync", &other]).ok();
    assert_says_nothing_of(&stage, "images.gone");
}

#[test]
fn root_state_root_and_configuration_are_those_of_the_daemon_and_a_moved_root_is_found() {
    let stage = E2eFixture::start_with_repository("moved", "", Repository::plain);
    let (root, config) = (stage.snapshotter.root(), stage.sandbox.path("s/config.toml"));
    // Nobody says them, as on a node whose unit has a drop-in.
    let socket = stage.snapshotter.socket().display().to_string();
    let words = ["doctor", "--json", "--address", &socket].map(str::to_owned);
    let all = read(&run(binary(), words.iter().chain(&containerd(&stage))));
    for (check, words) in
        [("daemon.running", root.display()), ("node.disk", root.display()), ("config.file", config.display())]
    {
        let is_it = |one: &Finding| one.check == check && one.what.contains(&words.to_string());
        assert!(all.iter().any(is_it), "no {check} with {words} in {all:#?}");
    }

    assert_says_nothing_of(&stage, "state.root");
    let away = stage.sandbox.path("away");
    fs::rename(&root, &away).expect("a directory can be moved");
    assert_finds(
        &stage,
        "state.root",
        "problem",
        &format!("works in {}|bring it back to {}", away.display(), root.display()),
    );
    // That it seems empty, or not to be there, is no news of its own, and nothing to be mended.
    for check in ["state.images", "state.containers", "node.state-root"] {
        assert_says_nothing_of(&stage, check);
    }
    fs::create_dir(&root).expect("a directory can be made");
    assert_finds(&stage, "state.root", "problem", "another directory");
    fs::remove_dir(&root).expect("a directory can be removed");
    fs::rename(&away, &root).expect("a directory can be moved");
    assert_says_nothing_of(&stage, "state.root");
    // A mount of the same file system: what is to be remounted is this one, and not the one below.
    for words in [&["--bind"][..], &["-o", "remount,bind,ro"]] {
        let path = root.display().to_string();
        let from = if words.len() == 1 { vec![path.as_str()] } else { Vec::new() };
        run("mount", words.iter().copied().chain(from).chain([path.as_str()])).ok();
    }
    assert_finds(&stage, "node.state-root", "problem", &format!("is read-only|mount -o remount,rw {}", root.display()));
    umount2(&root, MntFlags::empty()).expect("it can be unmounted");
    mount_tmpfs(&root, "size=1m");
    assert_finds(&stage, "state.root", "problem", "mounted over");
    umount2(&root, MntFlags::empty()).expect("it can be unmounted");
    assert_says_nothing_of(&stage, "state.root");
}

#[test]
fn root_containers_whose_files_are_gone_are_found() {
    let stage = E2eFixture::start_with_repository("lost", "", Repository::plain);
    let client = stage.snapshotter.client();
    client.prepare("container", "", &[]).expect("a snapshot can be made");
    assert_says_nothing_of(&stage, "state.containers");
    let directory = stage.snapshotter.snapshots().join(&stage.snapshot_dirs()[0]);
    fs::remove_dir_all(directory).expect("a directory can be removed");
    assert_finds(&stage, "state.containers", "problem", "snapshot container|remove that container");
}

#[test]
fn root_metrics_of_another_program_are_a_warning() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it has an address");
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let _ = client.read(&mut [0; 1000]).and_then(|_| client.write_all(b"HTTP/1.1 200 OK\r\n\r\nup 1\n"));
        }
    });
    let stage =
        E2eFixture::start_with_repository("others", &format!("metrics-address = \"{address}\""), Repository::plain);
    assert_finds(&stage, "config.metrics", "warning", &format!("at {address}|another program answers"));
}

/// Whatever reads the exit code must not take silence for a good report.
#[test]
fn root_report_that_cannot_be_written_has_its_own_exit_code() {
    let stage = E2eFixture::start_with_repository("full", "", Repository::plain);
    let [flag, socket, other_flag, file] = containerd(&stage);
    for json in [&[][..], &["--json"]] {
        let full = fs::File::options().write(true).open("/dev/full").expect("a full disk is there");
        let address = stage.snapshotter.socket();
        let output = Command::new(binary())
            .args(["doctor", "--address", &address.display().to_string(), &flag, &socket, &other_flag, &file])
            .args(json)
            .stdout(full)
            .output()
            .expect("the doctor can be started");
        assert_eq!(output.status.code(), Some(3), "{json:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write the report"), "{output:?}");
    }
}

#[test]
fn root_containerd_that_does_not_run_is_checked_with_its_program() {
    let mut stage = E2eFixture::start_with_repository("silent", "", Repository::plain);
    let file = stage.ours.configuration();
    let good = fs::read_to_string(&file).expect("containerd's configuration can be read");
    fs::write(&file, good.replace("disable_snapshot_annotations = false", "")).expect("it can be written");
    let table = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]";
    let lacks = format!("{table}|disable_snapshot_annotations = false");
    // Where containerd's own archives put it, and nobody but root can.
    mount_tmpfs(Path::new("/usr/local/bin"), "mode=755");
    fs::copy(tool("containerd"), "/usr/local/bin/containerd").expect("a program can be installed");
    stage.ours.signal(Signal::SIGSTOP);
    let (found, _) = findings(&stage, "containerd.running");
    stage.ours.signal(Signal::SIGCONT);
    assert_eq!(found[0].state, "problem", "{found:#?}");
    stage.ours.end();
    assert_finds(&stage, "containerd.running", "problem", "does not answer");
    assert_finds(&stage, "containerd.annotations", "problem", &lacks);
    assert_says_nothing_of(&stage, "containerd.exports");
}

/// The times of files tell nothing: packages and `cp -p` keep those of what they copy.
#[test]
fn root_containerd_that_was_not_restarted_is_found_by_the_plugins_it_has() {
    let mut stage = E2eFixture::start_with_repository("unread", "", Repository::plain);
    let file = stage.ours.configuration();
    let good = fs::read_to_string(&file).expect("containerd's configuration can be read");
    stage.ours.end();
    fs::write(&file, good.replace("proxy_plugins.cvmfs-snapshotter", "proxy_plugins.other"))
        .expect("it can be written");
    stage.ours.start_again();
    fs::write(&file, &good).expect("it can be written");
    let old = SystemTime::now() - Duration::from_hours(48);
    fs::File::open(&file).and_then(|file| file.set_modified(old)).expect("a time can be set");
    assert_finds(
        &stage,
        "containerd.restarted",
        "problem",
        "does not know cvmfs-snapshotter|systemctl restart containerd",
    );
    // Its file is the one that it was started with, if nobody names another one.
    let (address, socket) =
        (stage.snapshotter.socket().display().to_string(), stage.ours.socket().display().to_string());
    let all = read(&run(binary(), ["doctor", "--json", "--address", &address, "--containerd", &socket]));
    assert!(all.iter().any(|one| one.check == "containerd.plugin" && one.state == "good"), "{all:#?}");
    stage.ours.end();
    stage.ours.start_again();
    assert_finds(&stage, "containerd.plugin", "good", "proxy plugin");
    assert!(
        read(&doctor(&stage, &["--json"]))
            .iter()
            .all(|one| one.check != "containerd.restarted" || one.state != "problem")
    );
}

/// It would not come back.
#[test]
fn root_containerd_that_refuses_its_file_is_not_to_be_restarted() {
    let stage = E2eFixture::start_with_repository("refused", "", Repository::plain);
    let file = stage.ours.configuration();
    let good = fs::read_to_string(&file).expect("containerd's configuration can be read");
    // A process counts as begun a little later than it did.
    eventually("a change is later than the start", || {
        fs::write(&file, &good).expect("it can be written");
        read(&doctor(&stage, &["--json"])).iter().any(|one| one.check == "containerd.restarted")
    });
    fs::write(&file, good.replace("oom_score = 0", "oom_score = \"x\"")).expect("it can be written");
    assert_finds(&stage, "containerd.config", "problem", "refuses its configuration|config dump");
    assert_says_nothing_of(&stage, "containerd.restarted");
}
