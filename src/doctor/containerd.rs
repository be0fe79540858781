//! The containerds on this node, asked over their sockets, beside what their configurations say.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::empty::Empty;

use super::configuration::{self, Configuration};
use super::judge::{Place, REGISTRATION, RESTART, Version, judge};
use super::{Finding, Findings, State, child, images, reach};
use crate::admin::{Error, Peer};
use crate::cli::{Arguments, CONTAINERD_CONFIGURATIONS as CONFIGURATIONS, CONTAINERD_SOCKETS as SOCKETS, Doctor};
use crate::proto::admin::DescribeResponse;
use crate::proto::containerd::{
    InfoRequest, InfoResponse, ListImagesRequest, ListImagesResponse, ListNamespacesRequest, ListNamespacesResponse,
    Plugin, PluginsRequest, PluginsResponse, VersionResponse,
};
use crate::rebuild::DEFAULT_NAME as NAME;
use crate::server::service::methods;
use crate::table::Progress;

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
}

/// Those that an admin names, or else those that are there.
fn nodes(wanted: &Doctor) -> Vec<Node> {
    if wanted.socket.is_some() || wanted.configuration.is_some() {
        let or_default = |path: &Option<PathBuf>, default: &str| path.clone().unwrap_or_else(|| PathBuf::from(default));
        return vec![Node {
            socket: or_default(&wanted.socket, SOCKETS[0]),
            file: or_default(&wanted.configuration, CONFIGURATIONS[0]),
        }];
    }
    let all = SOCKETS.into_iter().zip(CONFIGURATIONS).map(|(s, f)| Node { socket: s.into(), file: f.into() });
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
    // Docker's beside k3s's: one that has nothing to do with us is no problem if another one has.
    let all_strange = of_each.iter().all(Looked::is_strange);
    for (node, looked) in nodes.iter().zip(of_each) {
        if looked.is_strange() && !all_strange {
            let what = format!("the containerd at {} does not use this snapshotter", node.socket.display());
            findings.push(Finding::note("containerd.plugin", what));
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
    configuration: Option<Configuration>,
    /// It has the snapshotter, so its images can be looked at; and where their blobs lie.
    with_images: Option<(Peer, Option<PathBuf>)>,
}

impl Looked {
    fn is_strange(&self) -> bool {
        self.findings.iter().any(|one| one.check == "containerd.plugin" && one.state > State::Good)
    }
}

impl Node {
    fn is_of_k3s(&self) -> bool {
        self.file == Path::new(CONFIGURATIONS[1])
    }

    /// k3s starts its containerd itself.
    fn as_it_is_restarted(&self, finding: Finding) -> Finding {
        if !self.is_of_k3s() {
            return finding;
        }
        let remedy = finding.remedy.map(|remedy| remedy.replace(RESTART, "systemctl restart k3s (or k3s-agent)"));
        Finding { remedy, ..finding }
    }
}

fn look_at(node: &Node, arguments: &Arguments, daemon: Option<&DescribeResponse>) -> Looked {
    let mut findings = Vec::new();
    let connected = Peer::connect(&node.socket);
    let process = connected.as_ref().ok().and_then(Peer::process);
    let asked = connected.and_then(|peer| {
        let version = peer.call_within(LIMIT, "", &VERSION, &Empty::new())?.version;
        let plugins = peer.call(&PLUGINS, &PluginsRequest::new())?.plugins;
        Ok((peer, version, plugins))
    });
    // The program that runs, or the one that would be started.
    let program = process.map_or_else(|| "containerd".into(), |pid| OsString::from(format!("/proc/{pid}/exe")));
    let version = match &asked {
        Ok((_, text, _)) => {
            findings.push(Finding::good(
                "containerd.running",
                format!("containerd {text} runs, at {}", node.socket.display()),
            ));
            Version::parse(text)
        }
        Err(e) => {
            findings.push(not_running(&node.socket, e));
            None
        }
    };
    let address = arguments.address.display().to_string();
    let root = arguments.root.display().to_string();
    let place = Place { address: &address, root: &root, registration: REGISTRATION };
    let file = edited(&node.file);
    let (configuration, about_file) = read(node, &program, &file);
    let is_refused = about_file.as_ref().is_some_and(|one| one.state == State::Problem);
    let judged = configuration.as_ref().map(|configuration| {
        let version = version.or_else(|| version_of(&program)).unwrap_or_else(|| configuration.suggests());
        judge(version, configuration, &place, &file)
    });
    let mut judged = judged.unwrap_or_default();
    // Said once, with the line to change where that is known.
    let is_explained = judged.iter().any(|one| EXPLAINED.contains(&one.check) && one.state > State::Good);
    findings.extend(about_file.filter(|_| !is_explained));
    findings.append(&mut judged);
    let Ok((peer, _, plugins)) = asked else { return Looked { findings, configuration, with_images: None } };
    findings.append(&mut in_error(&plugins));
    // With a file that it refuses it would not come back.
    if !is_refused {
        findings.extend(process.and_then(|process| not_restarted(process, node, configuration.as_ref())));
    }
    findings.extend(daemon.and_then(|daemon| mount_namespace(&peer, daemon)));
    let loaded = plugins.iter().any(|plugin| is_ours(plugin) && plugin.init_err.is_none());
    let with_images = (loaded && daemon.is_some()).then(|| (peer, content_store(&plugins)));
    Looked { findings, configuration, with_images }
}

/// As a program says it of itself.
fn version_of(program: &OsStr) -> Option<Version> {
    let said = child::ask(program, &["--version"], DUMP_LIMIT)?;
    Version::parse(said.stdout.split_whitespace().nth(2)?)
}

/// What the file says, and what containerd makes of it: older formats, imports and keys that it
/// passes over are its own business, so it is asked. And what is to be said of the file itself: a problem,
/// if containerd refuses it.
fn read(node: &Node, program: &OsStr, file: &str) -> (Option<Configuration>, Option<Finding>) {
    const CHECK: &str = "containerd.config";
    let said = match configuration::read(&node.file) {
        Ok(said) => said,
        Err(configuration::Error::Unreadable { path, cause })
            if cause.kind() == io::ErrorKind::NotFound && path == node.file =>
        {
            let note = Finding::note(CHECK, format!("{} is not there: containerd's defaults hold", path.display()));
            return (Some(Configuration::default()), Some(note));
        }
        Err(e) => {
            let remedy = "correct that file; containerd does not start with it either";
            return (None, Some(Finding::problem(CHECK, e.to_string(), remedy)));
        }
    };
    let arguments = ["--config".as_ref(), node.file.as_os_str(), "config".as_ref(), "dump".as_ref()];
    let Some(dump) = child::ask(program, &arguments, DUMP_LIMIT) else { return (Some(said), None) };
    if dump.success {
        return (Some(Configuration::of_dump(&dump.stdout, &said).unwrap_or(said)), None);
    }
    let refusal = Finding::problem(
        CHECK,
        format!("containerd refuses its configuration: {}", complaint(&dump.stderr)),
        format!("correct {file}; containerd --config {} config dump tells when it is good", node.file.display()),
    );
    // What is wrong with it otherwise may be the reason.
    (Some(said), Some(refusal))
}

/// When a process began, and a little later: the kernel counts from the second in which it booted.
fn began(process: u32) -> Option<SystemTime> {
    // What the kernel tells programs, on every architecture.
    const TICKS: u64 = 100;
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in brackets may hold anything; the time is the 20th behind it.
    let ticks: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    let all = std::fs::read_to_string("/proc/stat").ok()?;
    let booted: u64 = all.lines().find_map(|line| line.strip_prefix("btime "))?.parse().ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(booted + ticks / TICKS + 2))
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
fn not_restarted(process: u32, node: &Node, configuration: Option<&Configuration>) -> Option<Finding> {
    let changed = |path: &Path| std::fs::metadata(path).and_then(|status| status.modified()).ok();
    let started = began(process)?;
    let files = configuration.map_or_else(|| vec![node.file.clone()], |one| one.files.clone());
    let newer = files.into_iter().find(|file| changed(file).is_some_and(|changed| changed > started))?;
    Some(Finding::problem(
        "containerd.restarted",
        format!("{} was changed after containerd had read it", newer.display()),
        format!("{RESTART}; containers run on"),
    ))
}

/// The file that an admin changes: k3s makes its own anew from a template.
fn edited(file: &Path) -> String {
    if file == Path::new(CONFIGURATIONS[1]) {
        format!("{}'s template (config.toml.tmpl, or config-v3.toml.tmpl)", file.display())
    } else {
        file.display().to_string()
    }
}

fn not_running(socket: &Path, e: &Error) -> Finding {
    const CHECK: &str = "containerd.running";
    let what = match e {
        Error::NotRunning { cause, .. } => format!("containerd does not answer at {}: {cause}", socket.display()),
        e => format!("containerd at {} cannot be asked: {e}", socket.display()),
    };
    Finding::problem(CHECK, what, "systemctl status containerd; or say where it is: --containerd SOCKET")
}

/// What the daemon mounts must be seen by containerd; with links it mounts nothing.
fn mount_namespace(containerd: &Peer, daemon: &DescribeResponse) -> Option<Finding> {
    const CHECK: &str = "daemon.namespace";
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    if namespace(containerd.process()?)? == namespace(daemon.pid)? {
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
