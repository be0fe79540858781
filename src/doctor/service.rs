//! Our daemon, and what it says about its repositories and snapshots.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::images::{KUBERNETES, repull_command};
use super::systemd::{self, Unit};
use super::{Finding, Report, list, node, probe};
use crate::admin::client::{self, AdminClient, Error};
use crate::admin::status::{Image, Report as StatusReport};
use crate::cli::{self, Arguments};
use crate::config::{Config, RepositoryConfig};
use crate::metrics::endpoint;
use crate::model::{MetricsAddress, Timestamp, shell_quote};
use crate::proto::admin::snapshot::Kind;
use crate::proto::admin::{DescribeResponse, IoErrors, Repository, Snapshot};
use crate::repository::owners::Owners;
use crate::repository::{HIDE_ATTRIBUTES, own_attributes};
use crate::server::convert;

/// Replaces a Go snapshotter without a normal stop, which would remove its snapshots. The packages print the same.
const REPLACE: &str = "/usr/libexec/cvmfs-snapshotter/replace-go-unit && systemctl start cvmfs-snapshotter.socket \
                       cvmfs-snapshotter.service";

/// The daemon, and how it describes itself.
pub type DaemonHandle = client::Result<(AdminClient, DescribeResponse)>;

pub fn connect(arguments: &Arguments) -> DaemonHandle {
    let address = &arguments.address;
    // With a bad configuration systemd would start the daemon in vain, and then give up the socket as well.
    if systemd::is_socket_activated_idle()
        && node::load(&with_command_line(arguments, Unit::show(systemd::SERVICE).command_line())).is_err()
    {
        let cause = io::Error::other("it is stopped, and its configuration keeps it from starting");
        return Err(Error::NotRunning { address: address.clone(), cause });
    }
    let daemon = AdminClient::connect(address)?;
    let described = daemon.describe()?;
    Ok((daemon, described))
}

/// These arguments, with those of the running daemon, or of the unit that would start it, where they are defaults: a drop-in
/// may have changed them.
pub fn effective_arguments(arguments: &Arguments, daemon: &DaemonHandle) -> Arguments {
    let words = match daemon {
        Ok((_, described)) => command_line(described.pid),
        Err(_) => Unit::show(systemd::SERVICE).command_line(),
    };
    with_command_line(arguments, words)
}

/// The command line that a process was started with.
pub fn command_line(pid: u32) -> Option<Vec<OsString>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(bytes.strip_suffix(&[0])?.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

fn with_command_line(arguments: &Arguments, command_line: Option<Vec<OsString>>) -> Arguments {
    let mut arguments = arguments.clone();
    let Some(started) = command_line.and_then(|words| cli::parse(words).ok()) else { return arguments };
    if arguments.root == Path::new(cli::DEFAULT_ROOT) {
        arguments.root = started.root;
    }
    arguments.config = arguments.config.or(started.config);
    arguments
}

/// The result is how the daemon describes itself, if it answers.
pub fn check(
    arguments: &Arguments,
    config: Option<&Config>,
    daemon: DaemonHandle,
    report: &mut Report<'_>,
) -> Option<DescribeResponse> {
    report.extend(systemd::check());
    let (daemon, described) = match daemon {
        Ok(daemon) => daemon,
        Err(e) => {
            report.push(not_running(&e));
            for repository in config.map_or(&[][..], |config| &config.repositories) {
                let (described, cache) = probe::describe(repository);
                report.extend(check_repository(&described, cache, arguments));
            }
            return None;
        }
    };
    report.push(running(&described, &arguments.root));
    // A restart with a bad configuration would end the daemon.
    if config.is_some() {
        report.extend(not_restarted(arguments, &described));
    }
    let moved = state_root_moved(&described);
    let is_in_place = moved.is_none();
    report.extend(moved);
    for repository in &described.repositories {
        let config = RepositoryConfig { name: repository.name.clone(), path: repository.path.clone().into() };
        let cache = repository.trouble.is_empty().then(|| probe::describe(&config).1).flatten();
        report.extend(check_repository(repository, cache, arguments));
    }
    // When the state root is elsewhere, everything seems to be gone although nothing is.
    if is_in_place {
        report.extend(snapshots(&daemon, &described));
    }
    report.extend(pulls(&described));
    report.extend(config.and_then(|config| config.metrics.as_ref()).and_then(metrics));
    Some(described)
}

fn not_running(e: &Error) -> Finding {
    let main_process = Unit::show(systemd::SERVICE).main_process();
    let foreign = main_process.filter(|pid| !is_our_process(*pid));
    let last_error = || systemd::last_error().map_or_else(String::new, |error| format!(". Last error: {error}"));
    let (message, remedy) = match (foreign, e) {
        (Some(pid), _) => (
            format!("{e}. Process {pid}, which the unit runs, is not ours: the Go snapshotter?"),
            format!("do not stop or restart it, that empties a Go snapshotter's snapshots; to replace it: {REPLACE}"),
        ),
        (None, Error::NotOurs { .. }) => (
            e.to_string(),
            format!(
                "an older version: systemctl restart cvmfs-snapshotter. The Go one: do not stop it as usual, that empties its \
                 snapshots, but see docs/takeover.md; under the unit cvmfs-snapshotter: {REPLACE}"
            ),
        ),
        (None, Error::NotRunning { .. } | Error::Silent { .. } | Error::Call { .. }) => (
            format!("{e}{}", last_error()),
            "correct what its last error names (journalctl -u cvmfs-snapshotter -n 50), then systemctl enable --now \
             cvmfs-snapshotter. If it runs: systemctl restart cvmfs-snapshotter.socket cvmfs-snapshotter, which harms no container"
                .to_owned(),
        ),
    };
    Finding::problem("daemon.running", message, remedy)
}

fn running(described: &DescribeResponse, root: &Path) -> Finding {
    const CHECK: &str = "daemon.running";
    let (own, version) = (env!("CARGO_PKG_VERSION"), &described.version);
    if version != own {
        let message = format!("version {version} runs, and {own} is installed");
        return Finding::warning(CHECK, message, "systemctl restart cvmfs-snapshotter");
    }
    let (pid, root) = (described.pid, root.display());
    Finding::good(CHECK, format!("version {own} runs as process {pid}, with the state root {root}"))
}

/// The configuration was changed after the daemon had read it.
fn not_restarted(arguments: &Arguments, described: &DescribeResponse) -> Option<Finding> {
    let file = arguments.config_file();
    let started = UNIX_EPOCH + Duration::from_nanos(u64::try_from(described.started).ok()?);
    let message = format!("{} was changed after the daemon had read it", file.display());
    let remedy = "systemctl restart cvmfs-snapshotter; containers run on";
    (probe::inspect(file).ok()?.changed > started).then(|| Finding::warning("config.in-use", message, remedy))
}

/// The path of the lock in the state root of a process, and the descriptor that holds it.
fn lock_file_of(pid: u32) -> Option<(PathBuf, PathBuf)> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    // Other descriptors may lead into a repository that hangs, and are only read as links.
    let is_lock = |path: &PathBuf| path.to_string_lossy().trim_end_matches(" (deleted)").ends_with("/snapshotter/lock");
    descriptors.map(|entry| entry.path()).find_map(|fd| Some((fs::read_link(&fd).ok().filter(is_lock)?, fd)))
}

/// It runs this very program, or holds the lock that only our daemon takes: an upgrade may have replaced the file.
fn is_our_process(pid: u32) -> bool {
    let program = |process: &str| fs::read_link(format!("/proc/{process}/exe")).ok();
    program(&pid.to_string()).is_some_and(|path| Some(path) == program("self")) || lock_file_of(pid).is_some()
}

/// The path of the state root leads to another directory than the one that the daemon has open.
fn state_root_moved(described: &DescribeResponse) -> Option<Finding> {
    let lock = Path::new(&described.snapshots).with_file_name("lock");
    let (open_lock, fd) = lock_file_of(described.pid)?;
    let at_path = match probe::inspect(&lock) {
        // Another check tells it.
        Err(e) if e.kind() == io::ErrorKind::TimedOut => return None,
        status => status.ok().map(|status| (status.device, status.inode)),
    };
    if at_path == fs::metadata(&fd).ok().map(|status| (status.dev(), status.ino())) {
        return None;
    }
    let (root, used) = (lock.ancestors().nth(2)?.display(), open_lock.ancestors().nth(2)?.display());
    Some(Finding::problem(
        "state.root",
        format!(
            "the daemon works in {used}, and {root} is another directory now, or none: it was moved, removed or mounted over"
        ),
        format!(
            "bring it back to {root}, or unmount what is mounted there, before anything else: a daemon that starts now begins \
             with an empty one. Then systemctl restart cvmfs-snapshotter"
        ),
    ))
}

fn check_repository(repository: &Repository, cache: Option<probe::ClientCache>, arguments: &Arguments) -> Vec<Finding> {
    const CHECK: &str = "repository.answers";
    const SERVER: &str = "repository.server";
    let Repository { name, path, trouble, .. } = repository;
    let server_remedy = format!(
        "do its proxy and its stratum 1 answer, and does a firewall let this node reach them? cvmfs_talk -i {name} host info \
         and proxy info say which they are. Nothing has to be restarted; see docs/troubleshooting.md, \"input/output error\""
    );
    if repository.server_outage.is_some() {
        return vec![Finding::problem(SERVER, format!("repository {name} at {path}: {trouble}"), server_remedy)];
    }
    if !trouble.is_empty() {
        let (path, file) = (shell_quote(path), arguments.config_file().display());
        let message = format!("repository {name} at {path} cannot be used: {trouble}");
        let remedy = format!(
            "is it mounted and alive? ls {path}; cvmfs_config probe {name}. If its name or path is another one: repository and \
             absolute-mountpoint in {file}. Nothing has to be restarted when it is back"
        );
        return vec![Finding::problem(CHECK, message, remedy)];
    }
    let mut findings = vec![Finding::good(CHECK, format!("repository {name} answers, at {path}"))];
    if let Some(IoErrors { count, last, host, proxy, .. }) = repository.io_errors.as_ref() {
        let ago = (Timestamp::now().0 - last) / 1_000_000_000;
        let message = format!(
            "the client of repository {name} answered with an input/output error {ago} s ago, {count} in all since it began: \
             the repository's server cannot be reached, or could not (host {host}, proxy {proxy})"
        );
        findings.push(Finding::warning(SERVER, message, server_remedy));
    }
    findings.push(owners(repository));
    if repository.lists_own_attributes {
        findings.push(Finding::problem("repository.attributes", own_attributes(name), HIDE_ATTRIBUTES));
    }
    findings.extend(cache.and_then(|(path, device)| client_cache(name, &path, device, &arguments.root)));
    findings
}

/// Whether containers see the owners of the images.
fn owners(repository: &Repository) -> Finding {
    const CHECK: &str = "repository.owners";
    let owners = convert::owners(repository);
    let message = owners.describe(&repository.name);
    match owners.remedy(&repository.name) {
        Some(remedy) if owners.is_usual() => Finding::note(CHECK, format!("{message}; {remedy}")),
        Some(remedy) => Finding::warning(CHECK, message, remedy),
        None if owners == Owners::Kept => Finding::good(CHECK, message),
        None => Finding::note(CHECK, message),
    }
}

/// Whether the client's cache and the state root are on one file system.
fn client_cache(name: &str, cache: &Path, cache_device: u64, root: &Path) -> Option<Finding> {
    const CHECK: &str = "repository.cache-device";
    // If the state root does not exist yet, it will be made on the device of the nearest directory above it.
    let is_missing = |path: &&Path| probe::inspect(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    let device = probe::inspect(root.ancestors().find(|path| !is_missing(path))?).ok()?.device;
    let (root, cache) = (root.display(), cache.display());
    if device != cache_device {
        let message =
            format!("the cache of repository {name}'s client, {cache}, and the state root are on two file systems");
        return Some(Finding::good(CHECK, message));
    }
    Some(Finding::warning(
        CHECK,
        format!(
            "the cache of repository {name}'s client, {cache}, is on the file system of the state root, {root}: starting \
             containers can make every rename on it hang, for all programs of this node"
        ),
        "put one of them on another file system: the cache with CVMFS_CACHE_BASE=/another/disk in /etc/cvmfs/default.local, or \
         the state root with --root; see docs/install.md, \"Two file systems\"",
    ))
}

fn snapshots(daemon: &AdminClient, described: &DescribeResponse) -> Vec<Finding> {
    const CHECK: &str = "state.images";
    let mut findings = match daemon.snapshots(true, |_| {}) {
        Err(e) => vec![Finding::problem(CHECK, e.to_string(), "see its log: journalctl -u cvmfs-snapshotter -n 50")],
        Ok(snapshots) => {
            let images = StatusReport::new(described, &snapshots, &HashMap::new(), 0).images;
            let broken = broken_images(&images, &described.repositories);
            let message = format!("the files of all {} images are available", images.len());
            let good = broken.is_empty().then(|| Finding::good(CHECK, message));
            containers(&snapshots).into_iter().chain(broken).chain(good).collect()
        }
    };
    let found = &described.found;
    let place = &described.snapshots;
    if found.unknown > 0 {
        let message = format!("{} directories in {place} hold files that the metadata does not know", found.unknown);
        let remedy = "an older copy of the metadata was put back, or it was damaged: journalctl -u cvmfs-snapshotter names \
                      them; remove them once nothing needs them";
        findings.push(Finding::warning("state.unknown-files", message, remedy));
    }
    if found.foreign > 0 {
        let message = format!("{} entries in {place} are of another snapshotter, and are left alone", found.foreign);
        findings.push(Finding::note("state.foreign", message));
    }
    findings
}

/// Images on which no container can start.
fn broken_images(images: &[Image], repositories: &[Repository]) -> Vec<Finding> {
    let is_unusable = |name: &String| {
        let is_it = |one: &Repository| one.name == *name && (!one.trouble.is_empty() || one.lists_own_attributes);
        repositories.iter().any(is_it)
    };
    // A refused layer is downloaded by the next pull, whatever its repository does.
    let is_waiting = |image: &&Image| !image.refused && image.broken_in.as_ref().is_some_and(is_unusable);
    let broken = images.iter().filter(|image| image.broken.is_some());
    let (waiting, lost): (Vec<&Image>, Vec<&Image>) = broken.partition(is_waiting);
    let references = lost.iter().filter_map(|image| Some((image.namespace.as_deref(), image.reference.as_deref()?)));
    let repull = repull_command(references.map(|(namespace, name)| (namespace.unwrap_or(KUBERNETES), name)));
    let repull =
        if repull.is_empty() { "remove the images that use them, and pull them again".to_owned() } else { repull };
    let is_publishable = lost.iter().any(|image| image.broken_in.is_some() && !image.refused);
    let publish = if is_publishable { "make the layers available again (in any of \"repositories\"), or " } else { "" };
    let download = if lost.iter().any(|image| image.refused) { ": refused layers are downloaded then" } else { "" };
    let remedies = [
        "bring the repository back (see repository.answers and repository.attributes): nothing has to be pulled again"
            .to_owned(),
        // Images that share a lost layer have to be removed together.
        format!("{publish}remove the containers of all these images, then {repull}{download}"),
    ];
    let mut findings = Vec::new();
    for (images, remedy) in [waiting, lost].into_iter().zip(remedies).filter(|(images, _)| !images.is_empty()) {
        let name = |image: &Image| image.reference.clone().unwrap_or_else(|| image.key.clone());
        let names =
            list(images.iter().map(|one| format!("{}: {}", name(one), one.broken.as_deref().unwrap_or_default())));
        findings.push(Finding::problem("state.images", format!("no container can start on {names}"), remedy));
    }
    findings
}

/// Containers that lost what they wrote.
fn containers(snapshots: &[Snapshot]) -> Option<Finding> {
    let is_broken = |one: &&Snapshot| one.kind.enum_value() == Ok(Kind::ACTIVE) && !one.trouble.is_empty();
    let broken = snapshots.iter().filter(is_broken).map(|one| format!("snapshot {}: {}", one.key, one.trouble));
    let broken: Vec<String> = broken.collect();
    (!broken.is_empty()).then(|| {
        Finding::problem(
            "state.containers",
            format!("the files that a container wrote are not available: {}", list(broken.into_iter())),
            "its directory was removed by hand, or an older copy of the state root was put back: remove that container and \
             start it again",
        )
    })
}

/// The daemon serves containers even when it cannot serve metrics.
fn metrics(address: &MetricsAddress) -> Option<Finding> {
    let error = endpoint::ask(address).err()?;
    Some(Finding::warning(
        "config.metrics",
        format!("no metrics are served at {address}: {error}"),
        "journalctl -u cvmfs-snapshotter says why. For an IP address the unit needs one more line: systemctl edit \
         cvmfs-snapshotter, [Service] RestrictAddressFamilies=AF_INET AF_INET6, and under symlink-only.conf PrivateNetwork=no as \
         well; then systemctl restart cvmfs-snapshotter",
    ))
}

/// Pulls in which containerd did not say which layers they are.
fn pulls(described: &DescribeResponse) -> Option<Finding> {
    let unnamed = described.pulls.unnamed;
    let hours = (Timestamp::now().0 - described.started) / 1_000_000_000 / 3600;
    (unnamed > 0).then(|| {
        Finding::problem(
            "pulls.annotations",
            format!("{unnamed} layers were downloaded in {hours} h because containerd did not say which layers they are"),
            "the checks of containerd below name the line to change. \"ctr images pull\" of containerd 1.x never says it: use \
             crictl pull or nerdctl pull. The counter is reset when the daemon restarts: systemctl restart cvmfs-snapshotter",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::status::ImageOrigin;

    #[test]
    fn remedy_of_an_image_depends_on_where_the_lost_layer_came_from() {
        let image = |name: &str, broken_in: Option<&str>, refused| Image {
            reference: (!name.is_empty()).then(|| name.to_owned()),
            key: "key".to_owned(),
            layers: 1,
            published: 0,
            source: ImageOrigin::Mixed,
            broken: Some("lost".to_owned()),
            broken_in: broken_in.map(str::to_owned),
            refused,
            namespace: None,
            users: Vec::new(),
            bytes: 0,
            created: 0,
        };
        let away = Repository { name: "away".into(), trouble: "not mounted".into(), ..Repository::default() };
        let repositories = [Repository { name: "well".into(), ..Repository::default() }, away];
        let repull = "remove the containers of all these images, then crictl rmi";
        let lost = image("c:1", Some("well"), false);
        let waiting = image("c:1", Some("away"), false);
        for (images, remedies) in [
            (
                vec![image("a:1", None, false), image("b:1", None, false)],
                vec![format!("{repull} a:1 b:1 && crictl pull a:1 && crictl pull b:1")],
            ),
            (
                vec![waiting, lost],
                vec![
                    "bring the repository back".to_owned(),
                    format!("make the layers available again (in any of \"repositories\"), or {repull} c:1"),
                ],
            ),
            (
                vec![image("c:1", Some("away"), true)],
                vec![format!("{repull} c:1 && crictl pull c:1: refused layers are downloaded then")],
            ),
            (Vec::new(), Vec::new()),
        ] {
            let found = broken_images(&images, &repositories);
            assert_eq!(found.len(), remedies.len(), "{found:?}");
            for (one, expected) in found.iter().zip(remedies) {
                assert!(one.remedy.as_ref().unwrap().starts_with(&expected), "{one:?}");
            }
        }
    }
}
