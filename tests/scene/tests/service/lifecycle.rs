//! systemd starts, restarts and watches the service, and the doctor explains why it does not run.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use scene::background_calls::BackgroundCalls;
use scene::client::Client;
use scene::containerd::NAMESPACE;
use scene::machine::{Machine, SERVICE, SOCKET, configure};
use scene::process::eventually;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;

use super::CONTAINERD;

/// An upgrade restarts the service, which containerd must not notice, because systemd holds the socket. A kill fails
/// only the calls under way.
#[test]
fn root_no_call_fails_while_systemd_restarts_the_service() {
    const RESTARTS: usize = 20;
    const KILLS: usize = 3;
    const CLIENTS: usize = 4;
    let sandbox = Sandbox::enter("restarts");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    machine.restart("containerd.service");
    let containerd = Client::connect_to_containerd(&machine.path(CONTAINERD), NAMESPACE, "cvmfs-snapshotter");
    // A call starts the stopped service.
    machine.run(&["systemctl", "stop", SERVICE]).ok();
    containerd.prepare("first", "", &[("containerd.io/gc.root", "scene")]).expect("the socket starts the service");
    let client = || Client::connect_to_containerd(&machine.path(CONTAINERD), NAMESPACE, "cvmfs-snapshotter");
    let clients: Vec<Client> = (0..CLIENTS).map(|_| client()).collect();
    let calls = BackgroundCalls::run_during(&clients, |calls| {
        let pid = || machine.property(SERVICE, "MainPID");
        for _ in 0..RESTARTS {
            let before = pid();
            machine.restart(SERVICE);
            assert_ne!(pid(), before, "it was not restarted");
            calls.wait_for_more(20);
        }
        let (made, failed) = (calls.made(), calls.drain_failures());
        scene::report::print(format_args!("under systemd: {RESTARTS} restarts, {made} calls, {} failed", failed.len()));
        assert_eq!(failed, Vec::<String>::new());
        for _ in 0..KILLS {
            let before = pid();
            machine.run(&["systemctl", "kill", "--signal=SIGKILL", SERVICE]).ok();
            eventually("systemd starts it again", || ![before.as_str(), "0"].contains(&pid().as_str()));
            calls.wait_for_more(20);
        }
        println!("{} at most", machine.status(SERVICE)("VmHWM"));
    });
    let failed = calls.drain_failures();
    println!("{KILLS} kills, {} calls failed: {failed:#?}", failed.len());
    // The failures are calls under way at a kill, and later calls for the same key. There may be more if systemd takes
    // longer than the second that containerd gives a new connection.
    let of_others = |line: &&String| !["UNAVAILABLE", "NOT_FOUND", "ALREADY_EXISTS"].iter().any(|c| line.contains(c));
    assert_eq!(failed.iter().find(of_others), None);
    assert_eq!(machine.property("cvmfs-snapshotter.socket", "NAccepted"), "0", "systemd accepts nothing itself");
}

/// Calls start the service, so a configuration that it refuses must not be tried for ever, and must leave nothing to
/// repair but the configuration.
#[test]
fn root_service_is_not_restarted_on_invalid_configuration_and_starts_once_corrected() {
    let sandbox = Sandbox::enter("wrong");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    machine.client().prepare("before", "", &[]).expect("it serves");
    configure(&machine.path(""), "workers = 0");
    let socket = "cvmfs-snapshotter.socket";
    let state = |unit: &str| (machine.property(unit, "ActiveState"), machine.property(unit, "Result"));
    assert!(!machine.run(&["systemctl", "restart", SERVICE]).status.success());
    let failed = |why: &str| ("failed".to_owned(), why.to_owned());
    assert_eq!(state(SERVICE), failed("exit-code"), "it is not tried again");
    let waiting = UnixStream::connect(machine.path(SOCKET));
    eventually("the socket is given up", || state(socket) == failed("trigger-limit-hit"));
    drop(waiting);
    let tried = machine.journal(SERVICE).matches("status=78").count();
    assert!((2..50).contains(&tried), "{tried}");
    configure(&machine.path(""), "");
    machine.restart(SERVICE);
    machine.client().stat("before").expect("it serves again");
}

/// A daemon that runs and does nothing is worse than none.
#[test]
fn root_watchdog_restarts_hung_service_and_spares_idle_one() {
    const WATCHDOG: Duration = Duration::from_secs(2);
    let sandbox = Sandbox::enter("watchdog");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    assert_ne!(machine.property(SERVICE, "WatchdogUSec"), "0", "the unit has a watchdog");
    machine.drop_in(
        SERVICE,
        "watchdog",
        &format!("[Service]\nWatchdogSec={0}\nTimeoutStopSec={0}\n", WATCHDOG.as_secs()),
    );
    machine.restart(SERVICE);
    let pid = || machine.property(SERVICE, "MainPID");
    let first = pid();
    thread::sleep(2 * WATCHDOG + Duration::from_secs(1));
    assert_eq!(pid(), first, "an idle daemon is not restarted");
    machine.run(&["systemctl", "kill", "--signal=SIGSTOP", SERVICE]).ok();
    eventually("systemd starts it again", || ![first.as_str(), "0"].contains(&pid().as_str()));
    let journal = machine.journal(SERVICE);
    assert!(journal.contains("Watchdog timeout"), "{journal}");
    machine.client().stat("key").expect_err("it answers: there is no such snapshot");
}

/// The doctor's lines about a check, and its exit code.
fn diagnosis(machine: &Machine, check: &str) -> (String, Option<i32>) {
    let output = machine.run(&["/usr/bin/cvmfs-snapshotter", "doctor"]);
    let of_check = |line: &&str| line.split_whitespace().nth(1) == Some(check);
    let found: Vec<&str> = output.stdout.lines().filter(of_check).collect();
    assert!(!found.is_empty() || check.is_empty(), "no {check} in {}{}", output.stdout, output.stderr);
    (if check.is_empty() { output.stdout } else { found.join("\n") }, output.status.code())
}

#[test]
fn root_doctor_explains_why_the_service_does_not_run() {
    const CONTAINERD: &str = "containerd.service";
    let sandbox = Sandbox::enter("doctor");
    let repository = Repository::mounted(&sandbox.path("cvmfs"));
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    machine.restart("containerd.service");
    let (all, code) = diagnosis(&machine, "");
    assert_eq!(code, Some(0), "a node as the packages leave it is good:\n{all}");
    scene::report::print(format_args!("the doctor of a good node:\n{all}"));

    // The file that the unit names is checked for a containerd that does not run.
    let start = machine.property(CONTAINERD, "ExecStart");
    let program = start.split("path=").nth(1).and_then(|rest| rest.split(' ').next()).expect("it starts a program");
    let good = fs::read_to_string(machine.path("/etc/containerd/config.toml")).expect("it is there");
    machine.write("/etc/containerd/site.toml", &good.replace("type = \"snapshot\"", ""));
    let start = format!("[Service]\nExecStart=\nExecStart={program} --config /etc/containerd/site.toml\n");
    machine.drop_in(CONTAINERD, "site", &start);
    machine.run(&["systemctl", "stop", CONTAINERD]).ok();
    let all = machine.run(&["/usr/bin/cvmfs-snapshotter", "doctor"]).stdout;
    for words in [
        "containerd.type",
        "set in /etc/containerd/site.toml:\n",
        "| [proxy_plugins.cvmfs-snapshotter]\n",
        "type = \"snapshot\"",
    ] {
        assert!(all.contains(words), "no {words:?} in {all}");
    }
    machine.drop_in(CONTAINERD, "site", "");
    machine.restart(CONTAINERD);

    machine.run(&["systemctl", "disable", "--quiet", "cvmfs-snapshotter.socket"]).ok();
    let (said, code) = diagnosis(&machine, "daemon.enabled");
    assert!(said.starts_with("warning") && code == Some(1), "{said}");
    machine.run(&["systemctl", "enable", "--quiet", SERVICE]).ok();

    machine.write("/etc/systemd/system/cvmfs-snapshotter.service", "[Service]\nExecStart=/opt/go/cvmfs_snapshotter\n");
    assert!(diagnosis(&machine, "daemon.unit").0.contains("/opt/go/cvmfs_snapshotter"));
    fs::remove_file(machine.path("/etc/systemd/system/cvmfs-snapshotter.service")).expect("it can be removed");

    configure(&machine.path("/"), "attach = 3");
    machine.run(&["systemctl", "daemon-reload"]).ok();
    machine.run(&["systemctl", "stop", "cvmfs-snapshotter.socket", SERVICE]).ok();
    assert!(!machine.run(&["systemctl", "start", SERVICE]).status.success());
    let (said, code) = diagnosis(&machine, "daemon.running");
    assert!(said.contains("Last error: ") && said.contains("invalid value 3 for attach"), "{said}");
    assert_eq!(code, Some(2));
    // A call at the socket would start the service again and again, until systemd gave up the socket as well.
    machine.run(&["systemctl", "restart", "cvmfs-snapshotter.socket"]).ok();
    diagnosis(&machine, "daemon.running");
    assert_eq!(machine.property("cvmfs-snapshotter.socket", "ActiveState"), "active", "it changes nothing");
    assert!(diagnosis(&machine, "config.file").0.contains("invalid value 3 for attach"));

    // The file that the unit names is checked although the daemon cannot be asked.
    machine.write("/etc/other.toml", "workers = 0\n");
    let start = "[Service]\nExecStart=\nExecStart=/usr/bin/cvmfs-snapshotter --config /etc/other.toml\n";
    machine.drop_in(SERVICE, "other", start);
    let (said, _) = diagnosis(&machine, "config.file");
    assert!(said.contains("/etc/other.toml, line 1: invalid value 0 for workers"), "{said}");

    // The doctor must not advise to restart a unit that runs another program: the Go snapshotter would lose everything.
    let start = "[Service]\nType=simple\nExecStart=\nExecStart=/bin/sleep 1000\n";
    machine.drop_in(SERVICE, "other", start);
    machine.run(&["systemctl", "start", SERVICE]).ok();
    fs::remove_file(machine.path(SOCKET)).expect("the socket can be removed");
    let all = machine.run(&["/usr/bin/cvmfs-snapshotter", "doctor"]).stdout;
    assert!(all.contains("is not ours") && all.contains("| do not stop or restart it"), "{all}");
    assert!(all.contains("/usr/libexec/cvmfs-snapshotter/replace-go-unit && systemctl start"), "{all}");
    assert!(!all.contains("systemctl restart cvmfs-snapshotter"), "{all}");
}

#[test]
fn root_metrics_are_served_under_the_unit_on_socket_and_address() {
    let sandbox = Sandbox::enter("metrics");
    let repository = Repository::plain(&sandbox.path("cvmfs"));
    let Some(machine) = Machine::boot_or_skip(&sandbox, repository.dir()) else { return };
    let scrape = |mut stream: Box<dyn ReadWrite>| {
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("metrics can be asked for");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("metrics are text");
        assert!(answer.contains("\ncvmfs_snapshotter_build_info"), "{answer}");
    };
    let root = machine.path("/");
    configure(&root, "metrics-address = \"/run/cvmfs-snapshotter-metrics.sock\"");
    machine.restart(SERVICE);
    let socket = machine.path("/run/cvmfs-snapshotter-metrics.sock");
    scrape(Box::new(UnixStream::connect(socket).expect("the socket is served")));

    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port is free");
    configure(&root, &format!("metrics-address = \"{free}\""));
    machine.restart(SERVICE);
    let journal = machine.journal(SERVICE);
    assert!(journal.contains("RestrictAddressFamilies=AF_INET AF_INET6"), "the log has the remedy: {journal}");
    machine.client().stat("key").expect_err("it serves containerd all the same");
    // docs/metrics.md shows these lines.
    let lines = "[Service]\nRestrictAddressFamilies=AF_INET AF_INET6\nIPAddressDeny=any\nIPAddressAllow=localhost\n";
    machine.drop_in(SERVICE, "metrics", lines);
    machine.restart(SERVICE);
    scrape(Box::new(TcpStream::connect(free).expect("the address is served")));
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}
