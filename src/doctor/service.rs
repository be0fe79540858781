//! Our daemon, and what it says about its repositories and snapshots.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::repull::{KUBERNETES, repull_command};
use super::{Finding, MAX_NAMED, Report, node, repositories, safe_fs, subprocess, systemd};
use crate::admin::client::{self, AdminClient, Error};
use crate::admin::status::{Image, Report as StatusReport};
use crate::cli::{self, Arguments};
use crate::config::Config;
use crate::metrics::endpoint;
use crate::model::{MetricsAddress, Timestamp, printable, shell_quote};
use crate::proto::admin::snapshot::Kind;
use crate::proto::admin::{DescribeResponse, Repository, Snapshot};
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
        && node::load(&with_command_line(arguments, systemd::command_line())).is_err()
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
        Ok((_, described)) => subprocess::command_line(described.pid),
        Err(_) => systemd::command_line(),
    };
    with_command_line(arguments, words)
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
                report.extend(check_repository(&repositories::describe(repository), arguments));
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
        report.extend(check_repository(repository, arguments));
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
    const CHECK: &str = "daemon.running";
    let last_error = || systemd::last_error().map_or_else(String::new, |error| format!(". Last error: {error}"));
    if let Some(pid) = systemd::main_process().filter(|pid| !is_our_process(*pid)) {
        return Finding::problem(
            CHECK,
            format!("{e}. Process {pid}, which the unit runs, is not ours: the Go snapshotter?"),
            format!("do not stop or restart it, that empties a Go snapshotter's snapshots; to replace it: {REPLACE}"),
        );
    }
    match e {
        Error::NotOurs { .. } => Finding::problem(
            CHECK,
            e.to_string(),
            format!(
                "an older version: systemctl restart cvmfs-snapshotter. The Go one: do not stop it as usual, that empties \
                 its snapshots. Kill the process that serves there with SIGKILL, and disable what starts it (docs/takeover.md); \
                 under the unit cvmfs-snapshotter this does it: {REPLACE}"
            ),
        ),
        Error::NotRunning { .. } => Finding::problem(
            CHECK,
            format!("{e}{}", last_error()),
            "systemctl enable --now cvmfs-snapshotter; if it runs and only its socket is gone: systemctl restart \
             cvmfs-snapshotter.socket; what keeps it from starting: journalctl -u cvmfs-snapshotter -n 20",
        ),
        Error::Silent { .. } | Error::Call { .. } => Finding::problem(
            CHECK,
            format!("{e}{}", last_error()),
            "correct what its last error names, if there is one; see its log: journalctl -u cvmfs-snapshotter -n 50. A restart \
             harms nothing: systemctl restart cvmfs-snapshotter",
        ),
    }
}

fn running(described: &DescribeResponse, root: &Path) -> Finding {
    const CHECK: &str = "daemon.running";
    let own = env!("CARGO_PKG_VERSION");
    if described.version == own {
        let (pid, root) = (described.pid, root.display());
        return Finding::good(CHECK, format!("version {own} runs as process {pid}, with the state root {root}"));
    }
    Finding::warning(
        CHECK,
        format!("version {} runs, and {own} is installed", described.version),
        "systemctl restart cvmfs-snapshotter",
    )
}

/// The configuration was changed after the daemon had read it.
fn not_restarted(arguments: &Arguments, described: &DescribeResponse) -> Option<Finding> {
    let file = arguments.config_file();
    let changed = safe_fs::change_time(file)?;
    let started = UNIX_EPOCH + Duration::from_nanos(u64::try_from(described.started).ok()?);
    (changed > started).then(|| {
        Finding::warning(
            "config.in-use",
            format!("{} was changed after the daemon had read it", file.display()),
            "systemctl restart cvmfs-snapshotter; containers run on",
        )
    })
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
    // Another check tells when it does not answer.
    if safe_fs::inspect(&lock).is_err_and(|e| e.kind() == io::ErrorKind::TimedOut) {
        return None;
    }
    let identity = |path: &Path| fs::metadata(path).ok().map(|status| (status.dev(), status.ino()));
    if identity(&lock) == identity(&fd) {
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

/// The remedy when the client of a repository cannot reach its server.
fn unreachable_server_remedy(name: &str) -> String {
    format!(
        "cvmfs_talk -i {name} host info and proxy info say whom the client asks, cvmfs_config stat -v {name} whether it \
         is online. Is the proxy up, and the stratum 1? Does a firewall of this node let the client reach them? If only one \
         file cannot be read, it is damaged there: tell who runs them. Nothing has to be restarted when it is back; see \
         docs/troubleshooting.md, \"input/output error\""
    )
}

fn check_repository(repository: &Repository, arguments: &Arguments) -> Vec<Finding> {
    const CHECK: &str = "repository.answers";
    const SERVER: &str = "repository.server";
    let Repository { name, path, trouble, .. } = repository;
    if repository.server_outage.is_some() {
        let message = format!("repository {name} at {path}: {trouble}");
        return vec![Finding::problem(SERVER, message, unreachable_server_remedy(name))];
    }
    if !trouble.is_empty() {
        return vec![Finding::problem(
            CHECK,
            format!("repository {name} at {path} cannot be used: {trouble}"),
            format!(
                "is it mounted and alive? ls {}; cvmfs_config probe {name}; cvmfs_config stat -v {name}. If its name or \
                 path is another one: repository and absolute-mountpoint in {}. Nothing has to be restarted when it is back",
                shell_quote(path),
                arguments.config_file().display()
            ),
        )];
    }
    let mut findings = vec![Finding::good(CHECK, format!("repository {name} answers, at {path}"))];
    if let Some(errors) = repository.io_errors.as_ref() {
        let (host, proxy) = (printable(&errors.host), printable(&errors.proxy));
        let ago = (Timestamp::now().0 - errors.last) / 1_000_000_000;
        let message = format!(
            "the client of repository {name} answered with an input/output error {ago} s ago, {} in all since it began: \
             the repository's server cannot be reached, or could not (host {host}, proxy {proxy})",
            errors.count
        );
        findings.push(Finding::warning(SERVER, message, unreachable_server_remedy(name)));
    }
    findings.push(owners(repository));
    if repository.lists_own_attributes {
        findings.push(Finding::problem("repository.attributes", own_attributes(name), HIDE_ATTRIBUTES));
    }
    findings.extend(client_cache(repository, arguments));
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
fn client_cache(repository: &Repository, arguments: &Arguments) -> Option<Finding> {
    const CHECK: &str = "repository.cache-device";
    let cache = repositories::cache(Path::new(&repository.path))?;
    let (name, root, path) = (&repository.name, arguments.root.display(), cache.path.display());
    if device(&arguments.root)? != cache.device {
        let message =
            format!("the cache of repository {name}'s client, {path}, and the state root are on two file systems");
        return Some(Finding::good(CHECK, message));
    }
    Some(Finding::warning(
        CHECK,
        format!(
            "the cache of repository {name}'s client, {path}, is on the file system of the state root, {root}: starting \
             containers can make every rename on it hang, for all programs of this node"
        ),
        "put one of them on another file system: the cache with CVMFS_CACHE_BASE=/another/disk in /etc/cvmfs/default.local, or \
         the state root with --root; see docs/install.md, \"Two file systems\"",
    ))
}

/// The device of a directory, or of the nearest one above it that exists.
fn device(path: &Path) -> Option<u64> {
    let exists = |path: &&Path| !safe_fs::inspect(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    let path = path.ancestors().find(exists)?;
    safe_fs::inspect(path).ok()?;
    fs::metadata(path).ok().map(|status| status.dev())
}

fn snapshots(daemon: &AdminClient, described: &DescribeResponse) -> Vec<Finding> {
    const CHECK: &str = "state.images";
    let mut findings = Vec::new();
    match daemon.snapshots(true, |_| {}) {
        Err(e) => {
            findings.push(Finding::problem(CHECK, e.to_string(), "see its log: journalctl -u cvmfs-snapshotter -n 50"));
        }
        Ok(snapshots) => {
            findings.extend(containers(&snapshots));
            let report = StatusReport::new(described, &snapshots, &HashMap::new(), 0);
            findings.extend(broken_images(&report.images, &described.repositories));
            if findings.iter().all(|one| one.check != CHECK) {
                findings.push(Finding::good(
                    CHECK,
                    format!("the files of all {} images are available", report.images.len()),
                ));
            }
        }
    }
    let found = &described.found;
    if found.unknown > 0 {
        findings.push(Finding::warning(
            "state.unknown-files",
            format!("{} directories in {} hold files that the metadata does not know", found.unknown, described.snapshots),
            "an older copy of the metadata was put back, or it was damaged: journalctl -u cvmfs-snapshotter names them; remove them once nothing needs them",
        ));
    }
    if found.foreign > 0 {
        findings.push(Finding::note(
            "state.foreign",
            format!(
                "{} entries in {} are of another snapshotter, and are left alone",
                found.foreign, described.snapshots
            ),
        ));
    }
    findings
}

/// Images on which no container can start.
fn broken_images(images: &[Image], repositories: &[Repository]) -> Vec<Finding> {
    const CHECK: &str = "state.images";
    let is_unusable = |name: &String| {
        let is_it = |one: &&Repository| one.name == *name && (!one.trouble.is_empty() || one.lists_own_attributes);
        repositories.iter().find(is_it).is_some()
    };
    // A refused layer is downloaded by the next pull, whatever its repository does.
    let waits_for_repository = |image: &Image| !image.refused && image.broken_in.as_ref().is_some_and(is_unusable);
    let broken: Vec<&Image> = images.iter().filter(|image| image.broken.is_some()).collect();
    let lost: Vec<(&str, &str)> = broken
        .iter()
        .filter(|image| !waits_for_repository(image))
        .filter_map(|image| Some((image.namespace.as_deref().unwrap_or(KUBERNETES), image.reference.as_deref()?)))
        .collect();
    let mut is_command_printed = false;
    let mut remedy = |image: &Image| {
        if waits_for_repository(image) {
            return "bring the repository back (see repository.answers and repository.attributes): nothing has to be pulled again"
                .to_owned();
        }
        let publish = if image.broken_in.is_some() && !image.refused {
            "make it available again (in any of \"repositories\"), or "
        } else {
            ""
        };
        let download = if image.refused { ": the layer is downloaded then" } else { "" };
        if image.reference.is_none() {
            return format!("{publish}remove the image that uses it, and its containers, and pull it again{download}");
        }
        // Images that share a lost layer have to be removed together.
        if std::mem::replace(&mut is_command_printed, true) {
            return format!("{publish}with the first one of {CHECK}");
        }
        let containers = if lost.len() == 1 { "its containers" } else { "the containers of all these images" };
        format!("{publish}remove {containers}, then {}{download}", repull_command(lost.iter().copied()))
    };
    let mut findings = Vec::new();
    for image in broken.iter().take(MAX_NAMED) {
        let name = image.reference.as_deref().unwrap_or(&image.key);
        let reason = image.broken.as_deref().unwrap_or_default();
        findings.push(Finding::problem(CHECK, format!("no container can start on {name}: {reason}"), remedy(image)));
    }
    if let Some(count @ 1..) = broken.len().checked_sub(MAX_NAMED) {
        let message = format!("and {count} more images");
        findings.push(Finding::problem(CHECK, message, "cvmfs-snapshotter status lists them"));
    }
    findings
}

/// Containers that lost what they wrote.
fn containers(snapshots: &[Snapshot]) -> Vec<Finding> {
    const CHECK: &str = "state.containers";
    let is_broken = |one: &&Snapshot| one.kind.enum_value() == Ok(Kind::ACTIVE) && !one.trouble.is_empty();
    let broken: Vec<&Snapshot> = snapshots.iter().filter(is_broken).collect();
    let mut findings = Vec::new();
    for Snapshot { key, trouble, .. } in broken.iter().take(MAX_NAMED) {
        findings.push(Finding::problem(
            CHECK,
            format!("the files that the container of snapshot {key} wrote are not available: {trouble}"),
            "its directory was removed by hand, or an older copy of the state root was put back: remove that container and \
             start it again",
        ));
    }
    if let Some(count @ 1..) = broken.len().checked_sub(MAX_NAMED) {
        findings.push(Finding::problem(CHECK, format!("and those of {count} more"), "as above"));
    }
    findings
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
        let image = |name: &str, namespace: Option<&str>, broken_in: Option<&str>| Image {
            reference: Some(name.to_owned()),
            key: format!("key of {name}"),
            layers: 1,
            published: 0,
            source: ImageOrigin::Mixed,
            broken: Some("lost".to_owned()),
            broken_in: broken_in.map(str::to_owned),
            refused: false,
            namespace: namespace.map(str::to_owned),
            users: Vec::new(),
            bytes: 0,
            created: 0,
        };
        let repository = |name: &str, trouble: &str| Repository {
            name: name.to_owned(),
            trouble: trouble.to_owned(),
            ..Repository::default()
        };
        let repositories = [repository("well", ""), repository("away", "not mounted")];
        let images = [
            image("a:1", Some("default"), None),
            image("b:1", Some(KUBERNETES), None),
            image("c:1", None, Some("well")),
            image("d:1", None, Some("away")),
            Image { reference: None, ..image("", None, None) },
        ];
        let remedies: Vec<String> =
            broken_images(&images, &repositories).into_iter().filter_map(|finding| finding.remedy).collect();
        let nerdctl = "nerdctl --namespace default --snapshotter cvmfs-snapshotter";
        let all = format!(
            "remove the containers of all these images, then {nerdctl} rmi a:1 && {nerdctl} pull a:1 && \
             crictl rmi b:1 c:1 && crictl pull b:1 && crictl pull c:1"
        );
        assert_eq!(remedies[0], all);
        assert_eq!(remedies[1], "with the first one of state.images");
        assert!(remedies[2].starts_with("make it available again") && remedies[2].ends_with(&remedies[1]));
        assert!(remedies[3].starts_with("bring the repository back"), "{}", remedies[3]);
        assert!(remedies[4].starts_with("remove the image that uses it"), "{}", remedies[4]);

        let refused = Image { refused: true, ..image("c:1", None, Some("away")) };
        let [finding] = &broken_images(&[refused], &repositories)[..] else { panic!("one for the image") };
        let remedy = "remove its containers, then crictl rmi c:1 && crictl pull c:1: the layer is downloaded then";
        assert_eq!(finding.remedy.as_deref(), Some(remedy));
    }
}
