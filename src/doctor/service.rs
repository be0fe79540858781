//! Our daemon, and what it says of its repositories and snapshots.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::anew::{KUBERNETES, pull_anew};
use super::{Finding, Findings, NAMED, child, node, reach, repositories, systemd};
use crate::admin::client::{self, AdminClient, Error};
use crate::admin::status::{Image, Report};
use crate::cli::{self, Arguments};
use crate::config::Config;
use crate::metrics::endpoint;
use crate::model::{MetricsAddress, Timestamp, printable, shell_quote};
use crate::proto::admin::snapshot::Kind;
use crate::proto::admin::{DescribeResponse, Repository, Snapshot};
use crate::repository::owners::Owners;
use crate::repository::{HIDE_ATTRIBUTES, own_attributes};
use crate::server::convert;

/// What replaces a Go snapshotter without a normal stop; the packages say it as well.
const REPLACE: &str = "/usr/libexec/cvmfs-snapshotter/replace-go-unit && systemctl start cvmfs-snapshotter.socket \
                       cvmfs-snapshotter.service";

/// The daemon and what it said of itself.
pub type Asked = client::Result<(AdminClient, DescribeResponse)>;

pub fn ask(arguments: &Arguments) -> Asked {
    let address = &arguments.address;
    // systemd would try in vain, and give up the socket as well.
    if systemd::waits_for_a_call() && node::load(&as_written(arguments, systemd::command_line())).is_err() {
        let cause = io::Error::other("it is stopped, and its configuration keeps it from starting");
        return Err(Error::NotRunning { address: address.clone(), cause });
    }
    let daemon = AdminClient::connect(address)?;
    let described = daemon.describe()?;
    Ok((daemon, described))
}

/// Where this command line does not say it, that of the daemon counts, or of the unit that would start
/// it: a drop-in may have changed it.
pub fn as_started(arguments: &Arguments, asked: &Asked) -> Arguments {
    let words = match asked {
        Ok((_, daemon)) => child::command_line(daemon.pid),
        Err(_) => systemd::command_line(),
    };
    as_written(arguments, words)
}

fn as_written(arguments: &Arguments, command_line: Option<Vec<OsString>>) -> Arguments {
    let mut arguments = arguments.clone();
    let Some(started) = command_line.and_then(|words| cli::parse(words).ok()) else { return arguments };
    if arguments.root == Path::new(cli::DEFAULT_ROOT) {
        arguments.root = started.root;
    }
    arguments.config = arguments.config.or(started.config);
    arguments
}

/// What the daemon said of itself, if it did.
pub fn look(
    arguments: &Arguments,
    config: Option<&Config>,
    asked: Asked,
    findings: &mut Findings<'_>,
) -> Option<DescribeResponse> {
    findings.extend(systemd::look());
    let (daemon, described) = match asked {
        Ok(asked) => asked,
        Err(e) => {
            findings.push(not_running(&e));
            for at in config.map_or(&[][..], |config| &config.repositories) {
                let one = repositories::look(at);
                findings.extend(repository(&one, arguments));
                findings.extend(cache(&one, arguments));
            }
            return None;
        }
    };
    findings.push(running(&described, &arguments.root));
    // A restart with a file that is wrong would end it.
    if config.is_some() {
        findings.extend(not_restarted(arguments, &described));
    }
    let moved = moved(&described);
    let is_in_place = moved.is_none();
    findings.extend(moved);
    for one in &described.repositories {
        findings.extend(repository(one, arguments));
        findings.extend(cache(one, arguments));
    }
    // Of a state root that is elsewhere everything seems to be gone, and nothing is.
    if is_in_place {
        findings.extend(snapshots(&daemon, &described));
    }
    findings.extend(pulls(&described));
    findings.extend(config.and_then(|config| config.metrics.as_ref()).and_then(metrics));
    Some(described)
}

fn not_running(e: &Error) -> Finding {
    const CHECK: &str = "daemon.running";
    let last_words = || systemd::last_words().map_or_else(String::new, |words| format!(". Its last words: {words}"));
    if let Some(pid) = systemd::main_process().filter(|pid| !is_ours(*pid)) {
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
            format!("{e}{}", last_words()),
            "systemctl enable --now cvmfs-snapshotter; if it runs and only its socket is gone: systemctl restart \
             cvmfs-snapshotter.socket; what keeps it from starting: journalctl -u cvmfs-snapshotter -n 20",
        ),
        Error::Silent { .. } | Error::Call { .. } => Finding::problem(
            CHECK,
            format!("{e}{}", last_words()),
            "mend what its last words name, if there are any; see its log: journalctl -u cvmfs-snapshotter -n 50. A restart \
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

/// The configuration was changed after it was read.
fn not_restarted(arguments: &Arguments, described: &DescribeResponse) -> Option<Finding> {
    let file = arguments.config_file();
    let changed = reach::changed(file)?;
    let started = UNIX_EPOCH + Duration::from_nanos(u64::try_from(described.started).ok()?);
    (changed > started).then(|| {
        Finding::warning(
            "config.in-use",
            format!("{} was changed after the daemon had read it", file.display()),
            "systemctl restart cvmfs-snapshotter; containers run on",
        )
    })
}

/// What the lock of its state root is called, and the descriptor that holds it.
fn lock_of(pid: u32) -> Option<(PathBuf, PathBuf)> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    // Of these only: others may lead into a repository that hangs.
    let is_lock = |path: &PathBuf| path.to_string_lossy().trim_end_matches(" (deleted)").ends_with("/snapshotter/lock");
    open.map(|entry| entry.path()).find_map(|fd| Some((fs::read_link(&fd).ok().filter(is_lock)?, fd)))
}

/// This very program, or one with the lock that only ours take: an upgrade has replaced the file.
fn is_ours(pid: u32) -> bool {
    let program = |process: &str| fs::read_link(format!("/proc/{process}/exe")).ok();
    program(&pid.to_string()).is_some_and(|found| Some(found) == program("self")) || lock_of(pid).is_some()
}

/// Where the daemon's path leads is another directory than the one it works in: what it has open tells.
fn moved(described: &DescribeResponse) -> Option<Finding> {
    let lock = Path::new(&described.snapshots).with_file_name("lock");
    let (works_in, fd) = lock_of(described.pid)?;
    // Said already.
    if reach::touch(&lock).is_err_and(|e| e.kind() == io::ErrorKind::TimedOut) {
        return None;
    }
    let identity = |path: &Path| fs::metadata(path).ok().map(|status| (status.dev(), status.ino()));
    if identity(&lock) == identity(&fd) {
        return None;
    }
    let (root, home) = (lock.ancestors().nth(2)?.display(), works_in.ancestors().nth(2)?.display());
    Some(Finding::problem(
        "state.root",
        format!(
            "the daemon works in {home}, and what is at {root} by now is another directory, or none: it was moved, removed or mounted over"
        ),
        format!(
            "bring it back to {root}, or unmount what is mounted there, before anything else: a daemon that starts now begins \
             with an empty one. Then systemctl restart cvmfs-snapshotter"
        ),
    ))
}

/// What to do where a client cannot reach its server.
fn reach_server(name: &str) -> String {
    format!(
        "cvmfs_talk -i {name} host info and proxy info say whom the client asks, cvmfs_config stat -v {name} whether it \
         is online. Is the proxy up, and the stratum 1? Does a firewall of this node let the client reach them? If only one \
         file cannot be read, it is damaged there: tell who runs them. Nothing has to be restarted when it is back; see \
         docs/troubleshooting.md, \"input/output error\""
    )
}

fn repository(one: &Repository, arguments: &Arguments) -> Vec<Finding> {
    const CHECK: &str = "repository.answers";
    const SERVER: &str = "repository.server";
    let (name, path) = (&one.name, &one.path);
    if one.server_outage.is_some() {
        let what = format!("repository {name} at {path}: {}", one.trouble);
        return vec![Finding::problem(SERVER, what, reach_server(name))];
    }
    if !one.trouble.is_empty() {
        return vec![Finding::problem(
            CHECK,
            format!("repository {name} at {path} cannot be used: {}", one.trouble),
            format!(
                "is it mounted and alive? ls {}; cvmfs_config probe {name}; cvmfs_config stat -v {name}. If its name or \
                 place is another one: repository and absolute-mountpoint in {}. Nothing has to be restarted when it is back",
                shell_quote(path),
                arguments.config_file().display()
            ),
        )];
    }
    let mut findings = vec![Finding::good(CHECK, format!("repository {name} answers, at {path}"))];
    if let Some(errors) = one.io_errors.as_ref() {
        let (host, proxy) = (printable(&errors.host), printable(&errors.proxy));
        let ago = (Timestamp::now().0 - errors.last) / 1_000_000_000;
        let what = format!(
            "the client of repository {name} answered with an input/output error {ago} s ago, {} in all since it began: \
             the repository's server cannot be reached, or could not (host {host}, proxy {proxy})",
            errors.count
        );
        findings.push(Finding::warning(SERVER, what, reach_server(name)));
    }
    findings.push(owners(one));
    if one.lists_own_attributes {
        findings.push(Finding::problem("repository.attributes", own_attributes(name), HIDE_ATTRIBUTES));
    }
    findings
}

/// Whether containers see the owners of the images.
fn owners(one: &Repository) -> Finding {
    const CHECK: &str = "repository.owners";
    let owners = convert::owners(one);
    let what = owners.describe(&one.name);
    match owners.remedy(&one.name) {
        Some(remedy) if owners.is_usual() => Finding::note(CHECK, format!("{what}; {remedy}")),
        Some(remedy) => Finding::warning(CHECK, what, remedy),
        None if owners == Owners::Kept => Finding::good(CHECK, what),
        None => Finding::note(CHECK, what),
    }
}

/// Whether the client's cache and the state root are on one file system.
fn cache(one: &Repository, arguments: &Arguments) -> Option<Finding> {
    const CHECK: &str = "repository.cache-device";
    if !one.trouble.is_empty() {
        return None;
    }
    let cache = repositories::cache(Path::new(&one.path))?;
    let (name, root, place) = (&one.name, arguments.root.display(), cache.path.display());
    if device(&arguments.root)? != cache.device {
        let what =
            format!("the cache of repository {name}'s client, {place}, and the state root are on two file systems");
        return Some(Finding::good(CHECK, what));
    }
    Some(Finding::warning(
        CHECK,
        format!(
            "the cache of repository {name}'s client, {place}, is on the file system of the state root, {root}: starting \
             containers can make every rename on it hang, for all programs of this node"
        ),
        "put one of them on another file system: the cache with CVMFS_CACHE_BASE=/another/disk in /etc/cvmfs/default.local, or \
         the state root with --root; see docs/install.md, \"Two file systems\"",
    ))
}

/// That of a directory, or of the one that it will be made in.
fn device(path: &Path) -> Option<u64> {
    let is_there = |path: &&Path| !reach::touch(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    let there = path.ancestors().find(is_there)?;
    reach::touch(there).ok()?;
    fs::metadata(there).ok().map(|status| status.dev())
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
            let report = Report::new(described, &snapshots, &HashMap::new(), 0);
            findings.extend(broken_images(&report.images, &described.repositories));
            if findings.iter().all(|one| one.check != CHECK) {
                findings
                    .push(Finding::good(CHECK, format!("the files of all {} images can be had", report.images.len())));
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
    let is_away = |image: &Image| {
        let of = |name: &String| {
            let is_unusable = |one: &Repository| !one.trouble.is_empty() || one.lists_own_attributes;
            repositories.iter().any(|one| one.name == *name && is_unusable(one))
        };
        !image.refused && image.broken_in.as_ref().is_some_and(of)
    };
    let broken: Vec<&Image> = images.iter().filter(|image| image.broken.is_some()).collect();
    let lost: Vec<(&str, &str)> = broken
        .iter()
        .filter(|image| !is_away(image))
        .filter_map(|image| Some((image.namespace.as_deref().unwrap_or(KUBERNETES), image.reference.as_deref()?)))
        .collect();
    let mut is_said = false;
    let mut remedy = |image: &Image| {
        let again = match &image.broken_in {
            _ if is_away(image) => {
                return "bring the repository back (see repository.answers and repository.attributes): nothing has to be pulled \
                        again"
                    .to_owned();
            }
            // Nobody can make it fit.
            _ if image.refused => "",
            Some(_) => "make it available again (any repository in \"repositories\" that has it will do), or ",
            None => "",
        };
        let download = if image.refused { ": the layer is downloaded then" } else { "" };
        if image.reference.is_none() {
            return format!("{again}remove the image that uses it, and its containers, and pull it anew{download}");
        }
        // Images that share what is lost have to go together.
        if std::mem::replace(&mut is_said, true) {
            return format!("{again}with the first one of {CHECK}");
        }
        let containers = if lost.len() == 1 { "its containers" } else { "the containers of all these images" };
        format!("{again}remove {containers}, then {}{download}", pull_anew(lost.iter().copied()))
    };
    let mut findings: Vec<Finding> = broken
        .iter()
        .take(NAMED)
        .map(|image| {
            let name = image.reference.as_deref().unwrap_or(&image.key);
            let why = image.broken.as_deref().unwrap_or_default();
            Finding::problem(CHECK, format!("no container can start on {name}: {why}"), remedy(image))
        })
        .collect();
    if broken.len() > NAMED {
        findings.push(Finding::problem(
            CHECK,
            format!("and {} more images", broken.len() - NAMED),
            "cvmfs-snapshotter status lists them",
        ));
    }
    findings
}

/// Containers that lost what they wrote.
fn containers(snapshots: &[Snapshot]) -> Vec<Finding> {
    const CHECK: &str = "state.containers";
    let is_broken = |one: &&Snapshot| one.kind.enum_value() == Ok(Kind::ACTIVE) && !one.trouble.is_empty();
    let broken: Vec<&Snapshot> = snapshots.iter().filter(is_broken).collect();
    let mut findings: Vec<Finding> = broken
        .iter()
        .take(NAMED)
        .map(|one| {
            Finding::problem(
                CHECK,
                format!("what was written in the container of snapshot {} cannot be had: {}", one.key, one.trouble),
                "its directory was removed by hand, or a copy of the state root was put back that is older: remove that container and \
                 start it anew",
            )
        })
        .collect();
    if broken.len() > NAMED {
        findings.push(Finding::problem(CHECK, format!("and of {} more", broken.len() - NAMED), "as above"));
    }
    findings
}

/// The daemon serves containers without.
fn metrics(address: &MetricsAddress) -> Option<Finding> {
    let at = address.to_string();
    let why = endpoint::ask(address).err()?;
    Some(Finding::warning(
        "config.metrics",
        format!("no metrics are served at {at}: {why}"),
        "journalctl -u cvmfs-snapshotter says why. For an IP address the unit needs a line more: systemctl edit \
         cvmfs-snapshotter, [Service] RestrictAddressFamilies=AF_INET AF_INET6, and under symlink-only.conf PrivateNetwork=no as \
         well; then systemctl restart cvmfs-snapshotter",
    ))
}

/// Pulls that did not say what they want.
fn pulls(described: &DescribeResponse) -> Option<Finding> {
    let pulls = &described.pulls;
    let hours = (Timestamp::now().0 - described.started) / 1_000_000_000 / 3600;
    (pulls.unnamed > 0).then(|| {
        Finding::problem(
            "pulls.annotations",
            format!("{} layers were downloaded in {hours} h because containerd did not say which layers they are", pulls.unnamed),
            "the checks of containerd below name the line to change. \"ctr images pull\" of containerd 1.x never says it: use \
             crictl pull or nerdctl pull. The count begins anew when the daemon does: systemctl restart cvmfs-snapshotter",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::status::ImageOrigin;

    #[test]
    fn what_mends_an_image_depends_on_where_the_lost_layer_came_from() {
        let image = |name: &str, namespace: Option<&str>, broken_in: Option<&str>| Image {
            reference: Some(name.to_owned()),
            key: format!("key of {name}"),
            layers: 1,
            published: 0,
            source: ImageOrigin::Mixed,
            broken: Some("it is lost".to_owned()),
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

        // A layer that is refused is downloaded, and how its repository is does not matter.
        let refused = Image { refused: true, ..image("c:1", None, Some("away")) };
        let [finding] = &broken_images(&[refused], &repositories)[..] else { panic!("one for the image") };
        let remedy = "remove its containers, then crictl rmi c:1 && crictl pull c:1: the layer is downloaded then";
        assert_eq!(finding.remedy.as_deref(), Some(remedy));
    }
}
