//! The containerds on this node, asked over their sockets, beside what their configurations say.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::empty::Empty;

use super::child::{Said, Silence};
use super::configuration::{self, Configuration};
use super::judge::{Place, REGISTRATION, RESTART, Version, judge};
use super::program::{Process, Program};
use super::{Finding, Findings, State, child, images, reach, systemd};
use crate::admin::client::{Error, GrpcClient, PeerProcess};
use crate::admin::table::Progress;
use crate::cli::{Arguments, CONTAINERD_CONFIGURATIONS as CONFIGURATIONS, CONTAINERD_SOCKETS as SOCKETS, Doctor};
use crate::migration::rebuild::DEFAULT_NAME as NAME;
use crate::model::shell_quote;
use crate::proto::admin::DescribeResponse;
use crate::proto::containerd::{
    InfoRequest, InfoResponse, ListImagesRequest, ListImagesResponse, ListNamespacesRequest, ListNamespacesResponse,
    Plugin, PluginsRequest, PluginsResponse, VersionResponse,
};
use crate::server::service::methods;

methods! {
    "containerd.services.version.v1.Version"
    VERSION Unary "Version" Empty => VersionResponse;
}

methods! {
    "containerd.services.introspection.v1.Introspection"
    PLUGINS Unary "Plugins" PluginsRequest => PluginsResponse;
}

methods! {
    "containerd.services.namespaces.v1.Namespaces"
    NAMESPACES Unary "List" ListNamespacesRequest => ListNamespacesResponse;
}

methods! {
    "containerd.services.images.v1.Images"
    IMAGES Unary "List" ListImagesRequest => ListImagesResponse;
}

methods! {
    "containerd.services.content.v1.Content"
    CONTENT Unary "Info" InfoRequest => InfoResponse;
}

/// The program, and the unit of the first of the usual ones.
const CONTAINERD: &str = "containerd";
/// For containerd to say what it made of its configuration.
const DUMP_LIMIT: Duration = Duration::from_secs(10);
/// For its first answer.
const LIMIT: Duration = Duration::from_secs(10);

/// Checks whose problems are why containerd refuses its configuration.
const EXPLAINED: [&str; 2] = ["containerd.type", "containerd.format"];

/// One containerd: where it listens and what it was told.
struct Node {
    socket: PathBuf,
    file: PathBuf,
    /// What would be started there, if none runs.
    program: Program,
}

/// Those that an admin names, or else those that are there.
fn nodes(wanted: &Doctor) -> Vec<Node> {
    let usual = || SOCKETS.into_iter().zip(CONFIGURATIONS);
    match (&wanted.socket, &wanted.configuration) {
        (None, None) => {}
        (Some(socket), None) => {
            let file =
                usual().find(|(usual, _)| Path::new(usual) == socket).map_or(CONFIGURATIONS[0], |(_, file)| file);
            return vec![Node::at(socket.clone(), file.into())];
        }
        (socket, Some(file)) => {
            let socket = socket.clone().unwrap_or_else(|| SOCKETS[0].into());
            let program = Node::at(socket.clone(), file.clone()).program;
            return vec![Node { socket, file: file.clone(), program }];
        }
    }
    let all = usual().map(|(socket, file)| Node::at(socket.into(), file.into()));
    // One that cannot be looked at is there.
    let is_there = |path: &Path| !reach::touch(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    all.filter(|node| is_there(&node.socket) || is_there(&node.file)).collect()
}

pub fn look(
    arguments: &Arguments,
    wanted: &Doctor,
    daemon: Option<&DescribeResponse>,
    progress: &Progress,
    findings: &mut Findings<'_>,
) {
    let nodes = nodes(wanted);
    if nodes.is_empty() {
        findings.push(Finding::warning(
            "containerd.running",
            "there is no containerd at its usual places",
            "say where it is: --containerd SOCKET --containerd-config FILE",
        ));
    }
    let of_each: Vec<Looked> = nodes.iter().map(|node| look_at(node, arguments, daemon)).collect();
    // Docker's beside k3s's: one that has nothing to do with us, or is not there, is no problem if
    // another one has.
    let uses_us = |looked: &Looked| looked.version.is_some() && !looked.is_strange;
    let one_uses_us = of_each.iter().any(uses_us);
    for (node, looked) in nodes.iter().zip(of_each) {
        let socket = node.socket.display();
        if one_uses_us && looked.is_strange {
            let what = format!("the containerd at {socket} does not use this snapshotter");
            findings.push(Finding::note("containerd.plugin", what));
            continue;
        }
        if one_uses_us && looked.version.is_none() && !node.socket.exists() {
            let what = format!("no containerd runs at {socket}, although {} is there", node.file.display());
            findings.push(Finding::note("containerd.running", what));
            continue;
        }
        findings.extend(looked.findings.into_iter().map(|one| node.as_it_is_restarted(one)));
        if let Some((peer, content)) = looked.with_images {
            images::look(&peer, content.as_deref(), looked.configuration.as_ref(), progress, findings);
        }
    }
}

/// What was found about a containerd, without its images: that may be many.
struct Looked {
    findings: Vec<Finding>,
    /// Nobody has named us in its configuration.
    is_strange: bool,
    /// It runs, and said it.
    version: Option<String>,
    configuration: Option<Configuration>,
    /// It has the snapshotter, so its images can be looked at; and where their blobs lie.
    with_images: Option<(GrpcClient, Option<PathBuf>)>,
}

impl Node {
    /// With the file that the process has which listens there, or what its unit would start; else with this one.
    fn at(socket: PathBuf, file: PathBuf) -> Self {
        let process = GrpcClient::connect(&socket).ok().and_then(|peer| peer.listener()).map(|listener| listener.pid);
        let of_unit = || (socket == Path::new(SOCKETS[0])).then(|| systemd::command_line_of(CONTAINERD)).flatten();
        let words = process.map_or_else(of_unit, child::command_line).unwrap_or_default();
        let program = words.first().filter(|program| Path::new(program).is_absolute());
        Self {
            socket,
            file: configuration_of(&words).unwrap_or(file),
            program: program.map_or_else(|| Program::Named(CONTAINERD.to_owned()), |path| Program::At(path.into())),
        }
    }

    /// What starts its containerd itself, from a template: its name and its other one.
    fn distribution(&self) -> Option<(&'static str, &'static str)> {
        let all = [("k3s", ("k3s", "k3s-agent")), ("rke2", ("rke2-server", "rke2-agent"))];
        let is_it = |name: &str| self.file.starts_with(Path::new("/var/lib/rancher").join(name));
        all.into_iter().find(|(name, _)| is_it(name)).map(|(_, units)| units)
    }

    fn as_it_is_restarted(&self, finding: Finding) -> Finding {
        let Some((server, agent)) = self.distribution() else { return finding };
        let restart = format!("systemctl restart {server} (or {agent})");
        Finding { remedy: finding.remedy.map(|remedy| remedy.replace(RESTART, &restart)), ..finding }
    }

    /// The file that an admin changes: k3s makes its own anew from a template.
    fn edited(&self) -> String {
        if self.distribution().is_some() {
            format!("{}'s template (config.toml.tmpl, or config-v3.toml.tmpl)", self.file.display())
        } else {
            self.file.display().to_string()
        }
    }
}

/// The file that a command line of containerd names, with an absolute path.
fn configuration_of(words: &[OsString]) -> Option<PathBuf> {
    let mut words = words.iter().skip(1).map(|word| word.to_string_lossy());
    let file = loop {
        let word = words.next()?;
        let (flag, value) = word.split_once('=').map_or((&*word, None), |(flag, value)| (flag, Some(value)));
        if ["-c", "-config", "--config"].contains(&flag) {
            break value.map_or_else(|| words.next().map(Cow::into_owned), |value| Some(value.to_owned()))?;
        }
    };
    Some(PathBuf::from(file)).filter(|file| file.is_absolute())
}

fn look_at(node: &Node, arguments: &Arguments, daemon: Option<&DescribeResponse>) -> Looked {
    let mut findings = Vec::new();
    let connected = GrpcClient::connect(&node.socket);
    let listener = connected.as_ref().ok().and_then(GrpcClient::listener);
    let process = listener.and_then(|listener| Process::of(listener.pid));
    let asked = connected.and_then(|peer| {
        let version = peer.call_within(LIMIT, "", &VERSION, &Empty::new())?.version;
        let plugins = peer.call(&PLUGINS, &PluginsRequest::new())?.plugins;
        Ok((peer, version, plugins))
    });
    // The program that runs, or the one that would be started.
    let program = process.map_or_else(|| node.program.clone(), Program::OfProcess);
    let ask = |arguments: &[&OsStr]| match listener {
        Some(PeerProcess { pid, uid }) if uid != 0 => Err(Silence::Refused(format!("process {pid} is of user {uid}"))),
        Some(_) | None => child::ask_containerd(&program, arguments, DUMP_LIMIT),
    };
    let said = asked.as_ref().ok().map(|(_, text, _)| text.clone());
    findings.push(match &asked {
        Ok((_, text, _)) => {
            Finding::good("containerd.running", format!("containerd {text} runs, at {}", node.socket.display()))
        }
        Err(e) => not_running(&node.socket, e),
    });
    let address = arguments.address.display().to_string();
    let root = arguments.root.display().to_string();
    let registration = reach::touch(Path::new(REGISTRATION)).is_ok().then_some(REGISTRATION);
    let place = Place { address: &address, root: &root, registration };
    let file = node.edited();
    let (configuration, about_file) = read(node, &ask, &file);
    let is_refused = about_file.as_ref().is_some_and(|one| one.state == State::Problem);
    let judged = configuration.as_ref().map(|configuration| {
        // A file for a later one is not meant for a program that was only found by its name.
        let is_meant = !matches!(program, Program::Named(_));
        let fits = |version: &Version| {
            is_meant || configuration.written.version.is_none_or(|format| format <= version.format())
        };
        let version = said.as_deref().and_then(Version::parse).or_else(|| version_of(&ask).filter(fits));
        let version = version.unwrap_or_else(|| configuration.suggests());
        judge(version, configuration, &place, &file)
    });
    let mut judged = judged.unwrap_or_default();
    // Said once, with the line to change where that is known.
    let is_explained = judged.iter().any(|one| EXPLAINED.contains(&one.check) && one.state > State::Good);
    findings.extend(about_file.filter(|_| !is_explained));
    findings.append(&mut judged);
    let is = |check: &str, state: State| findings.iter().any(|one| one.check == check && one.state == state);
    let is_registered = is("containerd.plugin", State::Good) && !is("containerd.disabled", State::Problem);
    let proxies = configuration.iter().flat_map(|one| &one.proxies);
    let is_strange =
        configuration.is_some() && !proxies.into_iter().any(|proxy| proxy.name == NAME || proxy.address == address);
    let mut looked = Looked { findings, is_strange, version: said, configuration, with_images: None };
    let Ok((peer, _, plugins)) = asked else { return looked };
    looked.findings.append(&mut in_error(&plugins));
    let loaded = plugins.iter().find(|plugin| is_ours(plugin)).map(|plugin| plugin.init_err.is_none());
    // With a file that it refuses it would not come back.
    if !is_refused {
        let newer = process.and_then(|process| not_restarted(process, node, looked.configuration.as_ref()));
        let missing = (is_registered && loaded.is_none()).then(not_loaded);
        looked.findings.extend(missing.or(newer));
    }
    looked.findings.extend(daemon.and_then(|daemon| mount_namespace(&peer, daemon)));
    if loaded == Some(true) && daemon.is_some() {
        looked.with_images = Some((peer, content_store(&plugins)));
    }
    looked
}

/// Its file names us, and it has not read that.
fn not_loaded() -> Finding {
    let what = format!(
        "the containerd that runs does not know {NAME}: it has not been restarted since its configuration names it"
    );
    Finding::problem("containerd.restarted", what, format!("{RESTART}; containers run on"))
}

/// Asks containerd's program.
type Ask<'a> = dyn Fn(&[&OsStr]) -> Result<Said, Silence> + 'a;

/// As a program says it of itself.
fn version_of(ask: &Ask<'_>) -> Option<Version> {
    let said = ask(&["--version".as_ref()]).ok()?;
    Version::parse(said.stdout.split_whitespace().nth(2)?)
}

/// What the file says, and what containerd makes of it: older formats, imports and keys that it
/// passes over are its own business, so it is asked. And what is to be said of the file itself: a problem,
/// if containerd refuses it.
fn read(node: &Node, ask: &Ask<'_>, file: &str) -> (Option<Configuration>, Option<Finding>) {
    const CHECK: &str = "containerd.config";
    let dump = || ask(&["--config".as_ref(), node.file.as_os_str(), "config".as_ref(), "dump".as_ref()]);
    let said = match configuration::read(&node.file) {
        Ok(said) => said,
        Err(configuration::Error::Unreadable { path, cause })
            if cause.kind() == io::ErrorKind::NotFound && path == node.file =>
        {
            let note = Finding::note(CHECK, format!("{} is not there: containerd's defaults hold", path.display()));
            return (Some(Configuration::default()), Some(note));
        }
        Err(e) if dump().is_ok_and(|dump| dump.success) => {
            let remedy =
                "look yourself: docs/containerd.md; or put a regular file of at most 1 MiB on a local disk there";
            let what = format!("{e}, although containerd can: what is in it was not looked at");
            return (None, Some(Finding::warning(CHECK, what, remedy)));
        }
        Err(e) => {
            let mends = match &e {
                configuration::Error::Unreadable { path, .. } if *path != node.file => {
                    format!("see to it that {} can be read, or take it out of imports", path.display())
                }
                configuration::Error::Unreadable { .. } => "see to it that it can be read".to_owned(),
                configuration::Error::Syntax { .. } => "correct that line".to_owned(),
            };
            let remedy = format!("{mends}; {} tells when it is good", dump_command(&node.file));
            return (None, Some(Finding::problem(CHECK, e.to_string(), remedy)));
        }
    };
    let dump = match dump() {
        Ok(dump) => dump,
        Err(Silence::NoAnswer) => return (Some(said), None),
        Err(Silence::Refused(why)) => {
            let what =
                format!("{why}: containerd's program was not run, only the files of its configuration were read");
            let remedy = format!("ask it yourself what it makes of them, as its user: {}", dump_command(&node.file));
            return (Some(said), Some(Finding::warning(CHECK, what, remedy)));
        }
    };
    if dump.success {
        return (Some(Configuration::of_dump(&dump.stdout, &said).unwrap_or(said)), None);
    }
    let refusal = Finding::problem(
        CHECK,
        format!("containerd refuses its configuration: {}", complaint(&dump.stderr)),
        format!("correct {file}; {} tells when it is good", dump_command(&node.file)),
    );
    // What is wrong with it otherwise may be the reason.
    (Some(said), Some(refusal))
}

fn dump_command(file: &Path) -> String {
    format!("containerd --config {} config dump", shell_quote(&file.to_string_lossy()))
}

/// When a process began, and a little later: the kernel counts from the second in which it booted.
fn began(process: Process) -> Option<SystemTime> {
    // What the kernel tells programs, on every architecture.
    const TICKS: u64 = 100;
    let all = std::fs::read_to_string("/proc/stat").ok()?;
    let booted: u64 = all.lines().find_map(|line| line.strip_prefix("btime "))?.parse().ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(booted + process.start / TICKS + 2))
}

/// The line of what a Go program says at its end that names the reason.
fn complaint(stderr: &str) -> &str {
    let lines = || stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    let names_it = |line: &&str| line.starts_with("containerd: ") || line.starts_with("panic: ");
    lines().find(names_it).or_else(|| lines().next_back()).unwrap_or("it does not say why")
}

fn is_ours(plugin: &Plugin) -> bool {
    plugin.type_ == "io.containerd.snapshotter.v1" && plugin.id == NAME
}

/// Parts of containerd that did not start, of those that matter here.
fn in_error(plugins: &[Plugin]) -> Vec<Finding> {
    let matters = |plugin: &&Plugin| {
        let kind = format!("{}.{}", plugin.type_, plugin.id);
        is_ours(plugin)
            || ["grpc.v1.cri", "cri.v1.images", "cri.v1.runtime", "transfer.v1.local"]
                .iter()
                .any(|end| kind.ends_with(end))
    };
    let fault = |plugin: &Plugin| {
        let why = &plugin.init_err.as_ref()?.message;
        Some(Finding::problem(
            "containerd.parts",
            format!("{}.{} of containerd did not start: {why}", plugin.type_, plugin.id),
            format!("correct what it complains about in containerd's configuration, then {RESTART}"),
        ))
    };
    plugins.iter().filter(matters).filter_map(fault).collect()
}

/// Its configuration was changed after it had been read.
fn not_restarted(process: Process, node: &Node, configuration: Option<&Configuration>) -> Option<Finding> {
    let started = began(process)?;
    let files = configuration.map_or_else(|| vec![node.file.clone()], |one| one.files.clone());
    let newer = files.into_iter().find(|file| changed(file).is_some_and(|changed| changed > started))?;
    Some(Finding::warning(
        "containerd.restarted",
        format!("{} was changed after containerd had read it", newer.display()),
        format!("{RESTART}; containers run on"),
    ))
}

/// What our package brings is put there anew by each of its upgrades, and containerd is asked whether it knows us.
fn changed(file: &Path) -> Option<SystemTime> {
    if file == Path::new(REGISTRATION) {
        return std::fs::metadata(file).ok()?.modified().ok();
    }
    reach::changed(file)
}

fn not_running(socket: &Path, e: &Error) -> Finding {
    const CHECK: &str = "containerd.running";
    let what = match e {
        Error::NotRunning { cause, .. } => format!("containerd does not answer at {}: {cause}", socket.display()),
        Error::NotOurs { .. } => format!("what listens at {} is no containerd, or one of before 1.0", socket.display()),
        e @ (Error::Silent { .. } | Error::Call { .. }) => {
            format!("containerd at {} cannot be asked: {e}", socket.display())
        }
    };
    Finding::problem(CHECK, what, "systemctl status containerd; or say where it is: --containerd SOCKET")
}

/// What the daemon mounts must be seen by containerd; with links it mounts nothing.
fn mount_namespace(containerd: &GrpcClient, daemon: &DescribeResponse) -> Option<Finding> {
    const CHECK: &str = "daemon.namespace";
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    if namespace(containerd.listener()?.pid)? == namespace(daemon.pid)? {
        return None;
    }
    let what = "the daemon has a mount namespace of its own";
    Some(if daemon.attach == "bind" {
        Finding::problem(
            CHECK,
            format!("{what}: containerd does not see the layers that it binds"),
            "remove the line that makes it (PrivateTmp, ProtectSystem, …: systemctl cat cvmfs-snapshotter), or set attach = \
             \"symlink\"; see docs/privileges.md",
        )
    } else {
        Finding::note(CHECK, format!("{what}, which does no harm with attach = \"symlink\""))
    })
}

/// Where blobs lie, if containerd says it.
fn content_store(plugins: &[Plugin]) -> Option<PathBuf> {
    let plugin = plugins.iter().find(|plugin| plugin.type_ == "io.containerd.content.v1" && plugin.id == "content")?;
    plugin.exports.get("root").map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_that_a_command_line_names_is_found() {
        for (line, file) in [
            ("/usr/bin/containerd", None),
            ("containerd --config /etc/k0s/containerd.toml", Some("/etc/k0s/containerd.toml")),
            ("containerd --log-level debug -c=/a.toml --root /r", Some("/a.toml")),
            ("containerd -c /a.toml -a /s", Some("/a.toml")),
            ("containerd --config", None),
            ("containerd --config relative.toml", None),
        ] {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(configuration_of(&words), file.map(PathBuf::from), "{line}");
        }
    }
}
