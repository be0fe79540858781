//! The containerds on this node, asked over their sockets, beside what their configurations say.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use grpcio::{Marshaller, Method, MethodType, pb_de, pb_ser};
use protobuf::well_known_types::empty::Empty;

use super::configuration;
use super::judge::{Place, Version, judge};
use super::{Finding, images};
use crate::admin::{Error, Peer};
use crate::cli::{Arguments, CONTAINERD_CONFIGURATIONS as CONFIGURATIONS, CONTAINERD_SOCKETS as SOCKETS, Doctor};
use crate::proto::admin::DescribeResponse;
use crate::proto::containerd::{
    InfoRequest, InfoResponse, ListImagesRequest, ListImagesResponse, Plugin, PluginsRequest, PluginsResponse,
    VersionResponse,
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
    "containerd.services.images.v1.Images"
    IMAGES Unary "List" ListImagesRequest => ListImagesResponse;
}

methods! {
    "containerd.services.content.v1.Content"
    CONTENT Unary "Info" InfoRequest => InfoResponse;
}

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
    all.filter(|node| node.socket.exists() || node.file.exists()).collect()
}

pub fn look(
    arguments: &Arguments,
    wanted: &Doctor,
    daemon: Option<&DescribeResponse>,
    progress: &Progress,
    findings: &mut Vec<Finding>,
) {
    let nodes = nodes(wanted);
    if nodes.is_empty() {
        findings.push(Finding::warning(
            "containerd.running",
            "there is no containerd at its usual places",
            "say where it is: --containerd SOCKET --containerd-config FILE",
        ));
    }
    for node in nodes {
        look_at(&node, arguments, daemon, progress, findings);
    }
}

fn look_at(
    node: &Node,
    arguments: &Arguments,
    daemon: Option<&DescribeResponse>,
    progress: &Progress,
    findings: &mut Vec<Finding>,
) {
    let asked = Peer::connect(&node.socket).and_then(|peer| {
        let version = peer.call(&VERSION, &Empty::new())?.version;
        let plugins = peer.call(&PLUGINS, &PluginsRequest::new())?.plugins;
        Ok((peer, version, plugins))
    });
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
    let place = Place { address: &address, root: &root };
    let file = edited(&node.file);
    let configuration = match configuration::read(&node.file) {
        Ok(configuration) => Some(configuration),
        Err(configuration::Error::Unreadable { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
            findings.push(Finding::note(
                "containerd.config",
                format!("{} is not there: containerd's defaults hold", node.file.display()),
            ));
            Some(configuration::Configuration::default())
        }
        Err(e) => {
            findings.push(Finding::problem(
                "containerd.config",
                e.to_string(),
                "correct that file; containerd does not start with it either",
            ));
            None
        }
    };
    if let Some(configuration) = &configuration {
        // Without its version: by the rules of those that are most in use.
        findings.append(&mut judge(version.unwrap_or(Version(1, 7, 24)), configuration, &place, &file));
    }
    let Ok((peer, _, plugins)) = asked else { return };
    let configured = configuration
        .as_ref()
        .is_some_and(|all| all.proxies.iter().any(|proxy| proxy.name == NAME && proxy.address == address));
    let loaded = plugins.iter().any(|plugin| plugin.type_ == "io.containerd.snapshotter.v1" && plugin.id == NAME);
    if configured && !loaded {
        findings.push(Finding::problem(
            "containerd.restarted",
            format!("{file} names {NAME}, and the containerd that runs does not know it"),
            "systemctl restart containerd; containers run on",
        ));
    }
    findings.extend(daemon.and_then(|daemon| mount_namespace(&peer, daemon)));
    if loaded && daemon.is_some() {
        let content = content_store(&plugins);
        findings.append(&mut images::look(&peer, content.as_deref(), configuration.as_ref(), progress));
    }
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
