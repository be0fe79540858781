//! The containerds on this node. Each is asked over its socket what it is and which plugins it has, and its program is
//! asked, with `config dump`, what it makes of its configuration. Files are not interpreted here: what containerd reads from
//! which format and import is its own business.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ffi::OsString;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::empty::Empty;

use super::config::{ContainerdConfig, Version};
use super::probe::{Process, Program};
use super::rules::{self, PAGE, RESTART, RuleContext};
use super::systemd::Unit;
use super::{Finding, Report, images, probe, service};
use crate::admin::client::{self, GrpcClient};
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
/// Plugins without which pulls fail, by the end of `TYPE.ID`.
const NEEDED_PLUGINS: [&str; 4] = ["grpc.v1.cri", "cri.v1.images", "cri.v1.runtime", "transfer.v1.local"];
/// Distributions that start containerd themselves, with a configuration made of a template, and their units.
const DISTRIBUTIONS: [(&str, &str); 2] =
    [("/var/lib/rancher/k3s", "k3s (or k3s-agent)"), ("/var/lib/rancher/rke2", "rke2-server (or rke2-agent)")];

struct ContainerdInstance {
    socket: PathBuf,
    /// Its main configuration file.
    file: PathBuf,
    /// The process that listens at the socket.
    process: Option<Process>,
    /// The user that made the socket listen, as the kernel recorded it. No later program of that process changes it.
    uid: Option<u32>,
    /// The program that is run to ask it.
    program: Program,
}

/// What an instance that runs has said.
struct Running {
    peer: GrpcClient,
    version: String,
    plugins: Vec<Plugin>,
}

struct InstanceReport {
    findings: Vec<Finding>,
    /// None: containerd could not be asked, or refuses its configuration.
    config: Option<ContainerdConfig>,
    running: Option<Running>,
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
        let remedy = "say where it is: --containerd SOCKET --containerd-config FILE";
        report.push(Finding::warning("containerd.running", "there is no containerd at its usual places", remedy));
    }
    let reports: Vec<InstanceReport> = instances.iter().map(|one| one.check(arguments, daemon)).collect();
    // Docker's may stand beside the one of k3s: an unrelated one is no fault if another one uses this snapshotter.
    let is_unrelated =
        |one: &InstanceReport| one.config.as_ref().is_some_and(|config| !config.mentions(&arguments.address));
    let one_uses_us = reports.iter().any(|one| one.running.is_some() && !is_unrelated(one));
    for (instance, result) in instances.iter().zip(reports) {
        if one_uses_us && (is_unrelated(&result) || result.running.is_none() && !instance.socket.exists()) {
            let message =
                format!("the containerd of {} does not run, or does not use this snapshotter", instance.file.display());
            report.push(Finding::note("containerd.plugin", message));
            continue;
        }
        report.extend(result.findings.into_iter().map(|finding| instance.with_restart_command(finding)));
        let has_snapshotter =
            |one: &Running| one.plugins.iter().any(|plugin| is_ours(plugin) && plugin.init_err.is_none());
        if let Some(running) = result.running.filter(|one| has_snapshotter(one) && daemon.is_some()) {
            images::check(&running.peer, result.config.as_ref(), progress, report);
        }
    }
}

/// The instance that an admin names, or those at the usual places.
fn find_instances(options: &Doctor) -> Vec<ContainerdInstance> {
    let usual = || CONTAINERD_SOCKETS.map(PathBuf::from).into_iter().zip(CONTAINERD_CONFIGURATIONS.map(PathBuf::from));
    if options.socket.is_some() || options.configuration.is_some() {
        let socket = options.socket.clone().unwrap_or_else(|| CONTAINERD_SOCKETS[0].into());
        let file = usual().find(|(usual, _)| *usual == socket).map(|(_, file)| file);
        let found = ContainerdInstance::find(socket, file.unwrap_or_else(|| CONTAINERD_CONFIGURATIONS[0].into()));
        return vec![ContainerdInstance { file: options.configuration.clone().unwrap_or(found.file), ..found }];
    }
    let all = usual().map(|(socket, file)| ContainerdInstance::find(socket, file));
    // A path that cannot be inspected is there.
    let is_there = |path: &Path| !probe::inspect(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    all.filter(|one| is_there(&one.socket) || is_there(&one.file)).collect()
}

impl ContainerdInstance {
    /// With the file and the program of the process that listens there, or of the unit that would be started.
    fn find(socket: PathBuf, default_file: PathBuf) -> Self {
        let listener = GrpcClient::connect(&socket).ok().and_then(|peer| peer.listener());
        let process = listener.and_then(|listener| Process::of(listener.pid));
        let is_usual = socket == Path::new(CONTAINERD_SOCKETS[0]);
        let of_unit = || is_usual.then(|| Unit::show(CONTAINERD).command_line()).flatten();
        let words = process.map_or_else(of_unit, |process| service::command_line(process.pid)).unwrap_or_default();
        let of_unit = words.first().filter(|path| Path::new(path).is_absolute()).cloned();
        let program = process.map(Program::OfProcess).or(of_unit.map(Program::Path));
        let file = config_file_of(&words).unwrap_or(default_file);
        let program = program.unwrap_or_else(|| Program::Path(CONTAINERD.into()));
        Self { socket, file, process, uid: listener.map(|listener| listener.uid), program }
    }

    fn distribution(&self) -> Option<&'static str> {
        DISTRIBUTIONS.into_iter().find(|(directory, _)| self.file.starts_with(directory)).map(|(_, units)| units)
    }

    fn with_restart_command(&self, finding: Finding) -> Finding {
        let Some(units) = self.distribution() else { return finding };
        let restart = format!("systemctl restart {units}");
        Finding { remedy: finding.remedy.map(|remedy| remedy.replace(RESTART, &restart)), ..finding }
    }

    /// The file that an admin edits.
    fn editable_file(&self) -> String {
        let template = self.distribution().map_or("", |_| "'s template (config.toml.tmpl, or config-v3.toml.tmpl)");
        format!("{}{template}", self.file.display())
    }

    fn dump_command(&self) -> String {
        format!("\"containerd --config {} config dump\"", shell_quote(&self.file.to_string_lossy()))
    }

    fn run(&self, words: &[&str]) -> io::Result<probe::Output> {
        if let (Some(Process { pid, .. }), Some(uid)) = (self.process, self.uid.filter(|uid| *uid != 0)) {
            return Err(io::Error::other(format!("process {pid} is of user {uid}")));
        }
        probe::run_as(&self.program, CONTAINERD, words.iter().map(OsString::from).collect())
    }

    fn ask(&self) -> client::Result<Running> {
        let peer = GrpcClient::connect(&self.socket)?;
        let version = peer.call_within(probe::LIMIT, "", &VERSION, &Empty::new())?.version;
        let plugins = peer.call(&PLUGINS, &PluginsRequest::new())?.plugins;
        Ok(Running { peer, version, plugins })
    }

    fn check(&self, arguments: &Arguments, daemon: Option<&DescribeResponse>) -> InstanceReport {
        let socket = self.socket.display();
        let running = self.ask();
        let mut findings = vec![match &running {
            Ok(running) => {
                Finding::good("containerd.running", format!("containerd {} runs, at {socket}", running.version))
            }
            Err(e) => {
                // The errors of the client speak of our daemon.
                let cause =
                    if let client::Error::NotRunning { cause, .. } = e { cause.to_string() } else { e.to_string() };
                let message = format!("containerd does not answer at {socket}: {cause}");
                let remedy = "systemctl status containerd; or say where it is: --containerd SOCKET";
                Finding::problem("containerd.running", message, remedy)
            }
        }];
        let running = running.ok();
        let (config, of_config) = match self.check_config(running.as_ref(), arguments) {
            Ok((config, findings)) => (Some(config), findings),
            Err(finding) => (None, vec![finding]),
        };
        findings.extend(of_config);
        if let Some(Running { peer, plugins, .. }) = &running {
            findings.extend(plugins.iter().filter_map(plugin_error));
            // A restart would end a containerd that refuses its configuration.
            if config.is_some() {
                let is_fault = |one: &Finding| {
                    ["containerd.plugin", "containerd.disabled"].contains(&one.check) && one.remedy.is_some()
                };
                let is_missing = !findings.iter().any(is_fault) && !plugins.iter().any(is_ours);
                findings.extend(self.not_restarted(is_missing, config.as_ref()));
            }
            findings.extend(daemon.and_then(|daemon| mount_namespace(peer, daemon)));
        }
        InstanceReport { findings, config, running }
    }

    /// What containerd makes of its configuration, and what is wrong with that. An error is why that is unknown.
    fn check_config(
        &self,
        running: Option<&Running>,
        arguments: &Arguments,
    ) -> Result<(ContainerdConfig, Vec<Finding>), Finding> {
        const CHECK: &str = "containerd.config";
        let (file, dump_command) = (self.file.display(), self.dump_command());
        // This refuses pipes and what else would keep containerd.
        let text = match probe::read_to_string(&self.file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Finding::problem(
                    CHECK,
                    format!("cannot read {file}: {e}"),
                    format!("make it readable for {dump_command}"),
                ));
            }
            text => text.ok(),
        };
        let missing =
            text.is_none().then(|| Finding::note(CHECK, format!("{file} is not there: containerd uses its defaults")));
        let dumped_file = if text.is_some() { &*self.file.to_string_lossy() } else { "/dev/null" };
        let of_program = || self.run(&["--version"]).ok()?.stdout.split_whitespace().nth(2).and_then(Version::parse);
        let version = running.and_then(|running| Version::parse(&running.version)).or_else(of_program);
        let (address, root) = (arguments.address.display().to_string(), arguments.root.display().to_string());
        let dump = self.run(&["--config", dumped_file, "config", "dump"]).and_then(|output| {
            let config = ContainerdConfig::parse(&output.stdout).map_err(io::Error::other);
            if output.status.success() { config.map(Ok) } else { Ok(Err(output.stderr)) }
        });
        let (config, version) = match (dump, version) {
            (Ok(Ok(config)), Some(version)) => (config, version),
            (Ok(Err(stderr)), _) => {
                return Err(rules::explain_refusal(error_line(&stderr), &self.editable_file(), &dump_command));
            }
            (dump, version) => {
                let reason = dump.err().map_or_else(|| "its version is unknown".to_owned(), |e| e.to_string());
                let message = format!("cannot ask containerd's program what it makes of {file}: {reason}");
                let snippet = version
                    .map_or("", example_of)
                    .replace(cli::DEFAULT_ADDRESS, &address)
                    .replace(cli::DEFAULT_ROOT, &root);
                let remedy =
                    format!("compare what {dump_command} prints, run as its user, with {PAGE}\n{}", snippet.trim_end());
                return Err(Finding::warning(CHECK, message, remedy));
            }
        };
        let of_file = text.and_then(|text| ContainerdConfig::parse(&text).ok());
        let findings = rules::check(&RuleContext {
            version,
            config: &config,
            file_table: of_file.and_then(|config| config.table_that_names_us()),
            address: &address,
            root: &root,
            file: &self.editable_file(),
        });
        Ok((config, missing.into_iter().chain(findings).collect()))
    }

    /// The process does not use what its configuration says now.
    fn not_restarted(&self, is_missing: bool, config: Option<&ContainerdConfig>) -> Option<Finding> {
        const CHECK: &str = "containerd.restarted";
        let remedy = format!("{RESTART}; containers run on");
        if is_missing {
            let message = format!("the containerd that runs does not know {NAME}, which its configuration names");
            return Some(Finding::problem(CHECK, message, remedy));
        }
        let start = start_time(self.process?)?;
        // The dump lists the files that were read. A pattern that is still there is no file.
        let files = iter::once(&self.file).chain(config.iter().flat_map(|config| &config.imports));
        let is_newer = |file: &&PathBuf| probe::inspect(file).is_ok_and(|status| status.changed > start);
        let changed = files.into_iter().find(is_newer)?;
        let message = format!("{} was changed after containerd had read it", changed.display());
        Some(Finding::warning(CHECK, message, remedy))
    }
}

/// The whole file for a version.
fn example_of(version: Version) -> &'static str {
    match version {
        version if version.major < 2 => include_str!("../../docs/containerd/client-1.toml"),
        version if version.has_transfer() => include_str!("../../docs/containerd/transfer.toml"),
        _ => include_str!("../../docs/containerd/client-2.toml"),
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
    let is_reason = |line: &&str| line.starts_with("containerd: ") || line.starts_with("panic: ");
    stderr.lines().find(is_reason).or(stderr.trim().lines().last()).unwrap_or("it does not say why")
}

fn is_ours(plugin: &Plugin) -> bool {
    plugin.type_ == "io.containerd.snapshotter.v1" && plugin.id == NAME
}

/// A plugin that matters here and did not start.
fn plugin_error(plugin: &Plugin) -> Option<Finding> {
    let id = format!("{}.{}", plugin.type_, plugin.id);
    let error = &plugin.init_err.as_ref()?.message;
    (is_ours(plugin) || NEEDED_PLUGINS.iter().any(|end| id.ends_with(end))).then(|| {
        let message = format!("{id} of containerd did not start: {error}");
        Finding::problem("containerd.parts", message, format!("correct what it complains about, then {RESTART}"))
    })
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
