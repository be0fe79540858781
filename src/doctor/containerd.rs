//! The containerds on this node. Each is asked over its socket what it is and which plugins it has, and its program is
//! asked, with `config dump`, what it makes of its configuration. Files are not interpreted here: what containerd reads from
//! which format and import is its own business.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::empty::Empty;

use super::config::{ContainerdConfig, Version};
use super::program::{Process, Program};
use super::rules::{self, DaemonEndpoint, PAGE, REGISTRATION, RESTART, RuleContext};
use super::{Finding, Report, Severity, images, safe_fs, subprocess, systemd};
use crate::admin::client::{self, Error, GrpcClient, PeerProcess};
use crate::admin::table::Progress;
use crate::cli::{self, Arguments, CONTAINERD_CONFIGURATIONS, CONTAINERD_SOCKETS, Doctor};
use crate::migration::rebuild::DEFAULT_NAME as NAME;
use crate::model::shell_quote;
use crate::proto::admin::DescribeResponse;
use crate::proto::containerd::{Plugin, PluginsRequest, PluginsResponse, VersionResponse};
use crate::server::service::methods;

methods! {
    "containerd.services.version.v1.Version"
    VERSION Unary "Version" Empty => VersionResponse;
}

methods! {
    "containerd.services.introspection.v1.Introspection"
    PLUGINS Unary "Plugins" PluginsRequest => PluginsResponse;
}

/// The program, and the unit of the first of the usual ones.
const CONTAINERD: &str = "containerd";
/// Time limit of containerd's program, and of its first answer at the socket.
const LIMIT: Duration = Duration::from_secs(10);
/// Plugins without which pulls fail, by the end of `TYPE.ID`.
const NEEDED_PLUGINS: [&str; 4] = ["grpc.v1.cri", "cri.v1.images", "cri.v1.runtime", "transfer.v1.local"];
/// Distributions that start containerd themselves, with a configuration made of a template: name and other unit.
const DISTRIBUTIONS: [(&str, &str, &str); 2] = [("k3s", "k3s", "k3s-agent"), ("rke2", "rke2-server", "rke2-agent")];

struct ContainerdInstance {
    socket: PathBuf,
    /// Its main configuration file.
    file: PathBuf,
    /// The process that listens at the socket.
    process: Option<Process>,
    program: ContainerdProgram,
}

/// The program that runs, or would be started.
struct ContainerdProgram {
    program: Program,
    /// The user who runs it, if that is not root.
    user: Option<PeerProcess>,
}

/// What the program makes of a configuration file.
enum Dump {
    Config(Box<ContainerdConfig>),
    /// It does not start with the file, and says so in this error output.
    Refused(String),
    NoAnswer(io::Error),
}

impl ContainerdProgram {
    fn run(&self, arguments: &[&OsStr]) -> io::Result<subprocess::Output> {
        if let Some(PeerProcess { pid, uid }) = self.user {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("process {pid} is of user {uid}")));
        }
        subprocess::run_as(&self.program, CONTAINERD, arguments, LIMIT)
    }

    fn version(&self) -> Option<Version> {
        let output = self.run(&["--version".as_ref()]).ok()?;
        Version::parse(output.stdout.split_whitespace().nth(2)?)
    }

    fn dump(&self, file: &Path) -> Dump {
        match self.run(&["--config".as_ref(), file.as_os_str(), "config".as_ref(), "dump".as_ref()]) {
            Ok(output) if !output.status.success() => Dump::Refused(output.stderr),
            Ok(output) => match ContainerdConfig::parse(&output.stdout) {
                Ok(config) => Dump::Config(Box::new(config)),
                Err(e) => Dump::NoAnswer(io::Error::other(format!("cannot parse its answer: {}", e.message()))),
            },
            Err(e) => Dump::NoAnswer(e),
        }
    }
}

/// What an instance that runs has said.
struct Running {
    peer: GrpcClient,
    version: String,
    plugins: Vec<Plugin>,
}

struct InstanceReport {
    findings: Vec<Finding>,
    /// Its configuration does not mention this snapshotter.
    is_unrelated: bool,
    config: Option<ContainerdConfig>,
    running: Option<Running>,
    /// The snapshotter can be asked through it.
    has_snapshotter: bool,
}

pub fn check(
    arguments: &Arguments,
    options: &Doctor,
    daemon: Option<&DescribeResponse>,
    progress: &Progress,
    report: &mut Report<'_>,
) {
    let instances = find_instances(options);
    if instances.is_empty() {
        report.push(Finding::warning(
            "containerd.running",
            "there is no containerd at its usual places",
            "say where it is: --containerd SOCKET --containerd-config FILE",
        ));
    }
    let reports: Vec<InstanceReport> = instances.iter().map(|one| one.check(arguments, daemon)).collect();
    // Docker's may stand beside the one of k3s: an unrelated one is no fault if another one uses this snapshotter.
    let one_uses_us = reports.iter().any(|one| one.running.is_some() && !one.is_unrelated);
    for (instance, result) in instances.iter().zip(reports) {
        let socket = instance.socket.display();
        if one_uses_us && result.is_unrelated {
            let message = format!("the containerd at {socket} does not use this snapshotter");
            report.push(Finding::note("containerd.plugin", message));
        } else if one_uses_us && result.running.is_none() && !instance.socket.exists() {
            let message = format!("no containerd runs at {socket}, although {} is there", instance.file.display());
            report.push(Finding::note("containerd.running", message));
        } else {
            report.extend(result.findings.into_iter().map(|finding| instance.with_restart_command(finding)));
            if let Some(running) = result.running.filter(|_| result.has_snapshotter && daemon.is_some()) {
                images::check(&running.peer, result.config.as_ref(), progress, report);
            }
        }
    }
}

/// The instance that an admin names, or those at the usual places.
fn find_instances(options: &Doctor) -> Vec<ContainerdInstance> {
    let usual = || CONTAINERD_SOCKETS.into_iter().zip(CONTAINERD_CONFIGURATIONS);
    match (&options.socket, &options.configuration) {
        (None, None) => {}
        (Some(socket), None) => {
            let file = usual().find(|(usual, _)| Path::new(usual) == socket).map(|(_, file)| file);
            return vec![ContainerdInstance::at(socket.clone(), file.unwrap_or(CONTAINERD_CONFIGURATIONS[0]).into())];
        }
        (socket, Some(file)) => {
            let socket = socket.clone().unwrap_or_else(|| CONTAINERD_SOCKETS[0].into());
            return vec![ContainerdInstance { file: file.clone(), ..ContainerdInstance::at(socket, file.clone()) }];
        }
    }
    let all = usual().map(|(socket, file)| ContainerdInstance::at(socket.into(), file.into()));
    // A path that cannot be inspected is there.
    let is_there = |path: &Path| !safe_fs::inspect(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    all.filter(|one| is_there(&one.socket) || is_there(&one.file)).collect()
}

impl ContainerdInstance {
    /// With the file and the program of the process that listens there, or of the unit that would be started.
    fn at(socket: PathBuf, default_file: PathBuf) -> Self {
        let listener = GrpcClient::connect(&socket).ok().and_then(|peer| peer.listener());
        let of_unit =
            || (socket == Path::new(CONTAINERD_SOCKETS[0])).then(|| systemd::command_line_of(CONTAINERD)).flatten();
        let words =
            listener.map_or_else(of_unit, |listener| subprocess::command_line(listener.pid)).unwrap_or_default();
        let process = listener.and_then(|listener| Process::find(listener.pid));
        let path = words.first().map(PathBuf::from).filter(|path| path.is_absolute());
        let program = process.map(Program::OfProcess).or_else(|| path.map(Program::At));
        Self {
            socket,
            file: config_file_of(&words).unwrap_or(default_file),
            process,
            program: ContainerdProgram {
                program: program.unwrap_or_else(|| Program::Named(CONTAINERD.to_owned())),
                user: listener.filter(|listener| listener.uid != 0),
            },
        }
    }

    fn distribution(&self) -> Option<(&'static str, &'static str)> {
        let is_it = |name: &str| self.file.starts_with(Path::new("/var/lib/rancher").join(name));
        DISTRIBUTIONS.into_iter().find(|(name, ..)| is_it(name)).map(|(_, server, agent)| (server, agent))
    }

    fn with_restart_command(&self, finding: Finding) -> Finding {
        let Some((server, agent)) = self.distribution() else { return finding };
        let restart = format!("systemctl restart {server} (or {agent})");
        Finding { remedy: finding.remedy.map(|remedy| remedy.replace(RESTART, &restart)), ..finding }
    }

    /// The file that an admin edits.
    fn editable_file(&self) -> String {
        let file = self.file.display();
        match self.distribution() {
            Some(_) => format!("{file}'s template (config.toml.tmpl, or config-v3.toml.tmpl)"),
            None => file.to_string(),
        }
    }

    fn dump_command(&self) -> String {
        format!("containerd --config {} config dump", shell_quote(&self.file.to_string_lossy()))
    }

    fn ask(&self) -> client::Result<Running> {
        let peer = GrpcClient::connect(&self.socket)?;
        let version = peer.call_within(LIMIT, "", &VERSION, &Empty::new())?.version;
        let plugins = peer.call(&PLUGINS, &PluginsRequest::new())?.plugins;
        Ok(Running { peer, version, plugins })
    }

    fn check(&self, arguments: &Arguments, daemon: Option<&DescribeResponse>) -> InstanceReport {
        let running = self.ask();
        let mut findings = vec![match &running {
            Ok(Running { version, .. }) => {
                let message = format!("containerd {version} runs, at {}", self.socket.display());
                Finding::good("containerd.running", message)
            }
            Err(e) => not_running(&self.socket, e),
        }];
        let (address, root) = (arguments.address.display().to_string(), arguments.root.display().to_string());
        let endpoint = DaemonEndpoint { address: &address, root: &root };
        let running = running.ok();
        let (config, config_findings) = self.check_config(running.as_ref(), endpoint);
        let is_refused = config.is_none();
        findings.extend(config_findings);
        let is_unrelated = config.as_ref().is_some_and(|config| {
            !config.proxy_plugins.iter().any(|(name, proxy)| name == NAME || proxy.address == address)
        });
        let mut has_snapshotter = false;
        if let Some(running) = &running {
            findings.extend(running.plugins.iter().filter_map(plugin_error));
            let ours = running.plugins.iter().find(|plugin| is_snapshotter(plugin));
            has_snapshotter = ours.is_some_and(|plugin| plugin.init_err.is_none());
            // A restart would end a containerd that refuses its configuration.
            if !is_refused {
                let has =
                    |check: &str, severity| findings.iter().any(|one| one.check == check && one.severity == severity);
                let is_configured =
                    has("containerd.plugin", Severity::Good) && !has("containerd.disabled", Severity::Problem);
                findings.extend(self.not_restarted(is_configured && ours.is_none()));
            }
            findings.extend(daemon.and_then(|daemon| mount_namespace(&running.peer, daemon)));
        }
        InstanceReport { findings, is_unrelated, config, running, has_snapshotter }
    }

    /// What containerd makes of its configuration, and what is wrong with that. Without the former containerd could not be
    /// asked, or refuses its configuration.
    fn check_config(
        &self,
        running: Option<&Running>,
        endpoint: DaemonEndpoint<'_>,
    ) -> (Option<ContainerdConfig>, Vec<Finding>) {
        const CHECK: &str = "containerd.config";
        let mut findings = Vec::new();
        // This refuses pipes and what else would keep containerd.
        let (file_text, dumped_file) = match safe_fs::read_to_string(&self.file) {
            Ok(text) => (text, self.file.as_path()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let message = format!("{} is not there: containerd uses its defaults", self.file.display());
                findings.push(Finding::note(CHECK, message));
                (String::new(), Path::new("/dev/null"))
            }
            Err(e) => {
                let message = format!("cannot read {}: {e}", self.file.display());
                let remedy = format!("make it readable; {} tells when it is good", self.dump_command());
                return (None, vec![Finding::problem(CHECK, message, remedy)]);
            }
        };
        let version = running.and_then(|running| Version::parse(&running.version)).or_else(|| self.program.version());
        let config = match self.program.dump(dumped_file) {
            Dump::Config(config) => *config,
            Dump::Refused(stderr) => {
                let error = error_line(&stderr);
                findings.push(rules::explain_refusal(error, &self.editable_file(), &self.dump_command()));
                return (None, findings);
            }
            Dump::NoAnswer(e) => {
                let message = format!("cannot ask containerd's program what it makes of {}: {e}", self.file.display());
                findings.push(Finding::warning(CHECK, message, self.compare_by_hand(version, endpoint)));
                return (None, findings);
            }
        };
        let file_config = ContainerdConfig::parse(&file_text).ok();
        findings.extend(rules::check(&RuleContext {
            version: version.unwrap_or_else(|| config.assumed_version()),
            config: &config,
            file_table: file_config.and_then(|config| config.table_that_names_us()),
            endpoint,
            has_registration: safe_fs::inspect(Path::new(REGISTRATION)).is_ok(),
            file: &self.editable_file(),
        }));
        (Some(config), findings)
    }

    /// What an admin does where containerd cannot be asked.
    fn compare_by_hand(&self, version: Option<Version>, endpoint: DaemonEndpoint<'_>) -> String {
        let dump_command = self.dump_command();
        let compare = format!("compare what \"{dump_command}\" prints, run as its user, with {PAGE}");
        let Some(version) = version else { return compare };
        let snippet = match version {
            version if version.major < 2 => include_str!("../../docs/containerd/client-1.toml"),
            version if version.has_transfer() => include_str!("../../docs/containerd/transfer.toml"),
            _ => include_str!("../../docs/containerd/client-2.toml"),
        };
        let snippet = snippet.replace(cli::DEFAULT_ADDRESS, endpoint.address).replace(cli::DEFAULT_ROOT, endpoint.root);
        format!("{compare}; this version needs:\n{}", snippet.trim_end())
    }

    /// The process does not use what its configuration says now.
    fn not_restarted(&self, is_missing: bool) -> Option<Finding> {
        const CHECK: &str = "containerd.restarted";
        let remedy = format!("{RESTART}; containers run on");
        if is_missing {
            let message = format!(
                "the containerd that runs does not know {NAME}: it has not been restarted since its configuration names it"
            );
            return Some(Finding::problem(CHECK, message, remedy));
        }
        let start = start_time(self.process?)?;
        (safe_fs::change_time(&self.file)? > start).then(|| {
            let message = format!("{} was changed after containerd had read it", self.file.display());
            Finding::warning(CHECK, message, remedy)
        })
    }
}

/// The file that a command line of containerd names, with an absolute path.
fn config_file_of(words: &[OsString]) -> Option<PathBuf> {
    let mut words = words.iter().skip(1).map(|word| word.to_string_lossy());
    let file = loop {
        let word = words.next()?;
        let (flag, value) = word.split_once('=').map_or((&*word, None), |(flag, value)| (flag, Some(value)));
        if ["-c", "-config", "--config"].contains(&flag) {
            break value.map(str::to_owned).or_else(|| words.next().map(Cow::into_owned))?;
        }
    };
    Some(PathBuf::from(file)).filter(|file| file.is_absolute())
}

/// When a process started, rounded up: the kernel counts from the second in which it booted.
fn start_time(process: Process) -> Option<SystemTime> {
    // The kernel's USER_HZ is the same on every architecture.
    const TICKS_PER_SECOND: u64 = 100;
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let boot: u64 = stat.lines().find_map(|line| line.strip_prefix("btime "))?.parse().ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(boot + process.start / TICKS_PER_SECOND + 2))
}

/// The line of a Go program's error output that names the reason.
fn error_line(stderr: &str) -> &str {
    let lines = || stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    let is_reason = |line: &&str| line.starts_with("containerd: ") || line.starts_with("panic: ");
    lines().find(is_reason).or_else(|| lines().next_back()).unwrap_or("it does not say why")
}

fn is_snapshotter(plugin: &Plugin) -> bool {
    plugin.type_ == "io.containerd.snapshotter.v1" && plugin.id == NAME
}

/// A plugin that matters here and did not start.
fn plugin_error(plugin: &Plugin) -> Option<Finding> {
    let id = format!("{}.{}", plugin.type_, plugin.id);
    let error = &plugin.init_err.as_ref()?.message;
    (is_snapshotter(plugin) || NEEDED_PLUGINS.iter().any(|end| id.ends_with(end))).then(|| {
        Finding::problem(
            "containerd.parts",
            format!("{id} of containerd did not start: {error}"),
            format!("correct what it complains about in containerd's configuration, then {RESTART}"),
        )
    })
}

fn not_running(socket: &Path, e: &Error) -> Finding {
    let socket = socket.display();
    let message = match e {
        Error::NotRunning { cause, .. } => format!("containerd does not answer at {socket}: {cause}"),
        Error::NotOurs { .. } => format!("what listens at {socket} is no containerd, or one older than 1.0"),
        Error::Silent { .. } | Error::Call { .. } => format!("cannot ask containerd at {socket}: {e}"),
    };
    let remedy = "systemctl status containerd; or say where it is: --containerd SOCKET";
    Finding::problem("containerd.running", message, remedy)
}

/// containerd must see what the daemon mounts; with symlinks the daemon mounts nothing.
fn mount_namespace(containerd: &GrpcClient, daemon: &DescribeResponse) -> Option<Finding> {
    const CHECK: &str = "daemon.namespace";
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    if namespace(containerd.listener()?.pid)? == namespace(daemon.pid)? {
        return None;
    }
    let message = "the daemon has a mount namespace of its own";
    if daemon.attach != "bind" {
        return Some(Finding::note(CHECK, format!("{message}, which does no harm with attach = \"symlink\"")));
    }
    Some(Finding::problem(
        CHECK,
        format!("{message}: containerd does not see the layers that it binds"),
        "remove the line that makes it (PrivateTmp, ProtectSystem, …: systemctl cat cvmfs-snapshotter), or set attach = \
         \"symlink\"; see docs/privileges.md",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_file_is_found_in_a_command_line() {
        for (line, file) in [
            ("/usr/bin/containerd", None),
            ("containerd --config /etc/k0s/containerd.toml", Some("/etc/k0s/containerd.toml")),
            ("containerd --log-level debug -c=/a.toml --root /r", Some("/a.toml")),
            ("containerd -c /a.toml -a /s", Some("/a.toml")),
            ("containerd --config", None),
            ("containerd --config relative.toml", None),
        ] {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(config_file_of(&words), file.map(PathBuf::from), "{line}");
        }
    }
}
