//! Our daemon, and what it says of its repositories and snapshots.
#![forbid(unsafe_code)]

use std::fs;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use super::{Finding, NAMED, repositories, systemd};
use crate::admin::{self, Daemon, Error};
use crate::cli::Arguments;
use crate::config::{self, Config, MetricsAddress};
use crate::proto::admin::{DescribeResponse, Repository};
use crate::status::Report;
use crate::types::{Timestamp, shell};

/// What the daemon said of itself, if it did.
pub fn look(arguments: &Arguments, config: Option<&Config>, findings: &mut Vec<Finding>) -> Option<DescribeResponse> {
    let asked = Daemon::connect(&arguments.address).and_then(|daemon| Ok((daemon.describe()?, daemon)));
    findings.append(&mut systemd::look());
    let (described, daemon) = match asked {
        Ok(asked) => asked,
        Err(e) => {
            findings.push(not_running(&e));
            for at in config.map_or(&[][..], |config| &config.repositories) {
                findings.append(&mut repository(&repositories::look(at)));
            }
            return None;
        }
    };
    findings.push(running(&described));
    // A restart with a file that is wrong would end it.
    if config.is_some() {
        findings.extend(not_restarted(arguments, &described));
    }
    for one in &described.repositories {
        findings.append(&mut repository(one));
    }
    findings.append(&mut snapshots(&daemon, &described));
    findings.extend(pulls(&described));
    findings.extend(config.and_then(|config| config.metrics.as_ref()).and_then(metrics));
    Some(described)
}

fn not_running(e: &Error) -> Finding {
    const CHECK: &str = "daemon.running";
    let last_words = || systemd::last_words().map_or_else(String::new, |words| format!(". Its last words: {words}"));
    match e {
        Error::NotOurs { .. } => Finding::problem(
            CHECK,
            e.to_string(),
            "an older version: systemctl restart cvmfs-snapshotter. The Go one: do not stop it as usual, that destroys \
             its snapshots; docs/takeover.md says how to replace it",
        ),
        Error::NotRunning { .. } => Finding::problem(
            CHECK,
            format!("{e}{}", last_words()),
            "systemctl enable --now cvmfs-snapshotter; if it runs and only its socket is gone: systemctl restart \
             cvmfs-snapshotter.socket; what keeps it from starting: journalctl -u cvmfs-snapshotter -n 20",
        ),
        Error::Call { .. } => Finding::problem(
            CHECK,
            format!("{e}{}", last_words()),
            "see its log: journalctl -u cvmfs-snapshotter -n 50; a restart harms nothing: systemctl restart cvmfs-snapshotter",
        ),
    }
}

fn running(described: &DescribeResponse) -> Finding {
    const CHECK: &str = "daemon.running";
    let own = env!("CARGO_PKG_VERSION");
    if described.version == own {
        return Finding::good(CHECK, format!("version {own} runs as process {}", described.pid));
    }
    Finding::warning(
        CHECK,
        format!("version {} runs, and {own} is installed", described.version),
        "systemctl restart cvmfs-snapshotter",
    )
}

/// The configuration was changed after it was read.
fn not_restarted(arguments: &Arguments, described: &DescribeResponse) -> Option<Finding> {
    let file = arguments.config.as_deref().unwrap_or(Path::new(config::DEFAULT_PATH));
    let changed = fs::metadata(file).and_then(|status| status.modified()).ok()?;
    let started = UNIX_EPOCH + Duration::from_nanos(u64::try_from(described.started).ok()?);
    (changed > started).then(|| {
        Finding::warning(
            "config.in-use",
            format!("{} was changed after the daemon had read it", file.display()),
            "systemctl restart cvmfs-snapshotter; containers run on",
        )
    })
}

fn repository(one: &Repository) -> Vec<Finding> {
    const CHECK: &str = "repository.answers";
    let (name, path) = (&one.name, &one.path);
    if !one.trouble.is_empty() {
        return vec![Finding::problem(
            CHECK,
            format!("repository {name} at {path} cannot be used: {}", one.trouble),
            format!(
                "is it mounted and alive? ls {path}; cvmfs_config probe {name}; cvmfs_config stat -v {name}. If its name or \
                 place is another one: repository and absolute-mountpoint in {}. Nothing has to be restarted when it is back",
                config::DEFAULT_PATH
            ),
        )];
    }
    let mut findings = vec![Finding::good(CHECK, format!("repository {name} answers, at {path}"))];
    if let Some(owner) = one.owner.as_ref() {
        let (uid, gid) = (owner.uid, owner.gid);
        findings.push(Finding::warning(
            "repository.owners",
            format!("everything in repository {name} belongs to uid {uid}, gid {gid}: containers see that instead of the owners of the image"),
            format!(
                "in /etc/cvmfs/config.d/{name}.local: CVMFS_CLAIM_OWNERSHIP=no if the client claims it; else the publisher dropped \
                 the owners, and a map brings root back: CVMFS_UID_MAP and CVMFS_GID_MAP name files that say \"{uid} 0\" and \
                 \"{gid} 0\". Then cvmfs_config reload {name}; see docs/repository.md"
            ),
        ));
    }
    findings
}

fn snapshots(daemon: &Daemon, described: &DescribeResponse) -> Vec<Finding> {
    const CHECK: &str = "state.images";
    let mut findings = Vec::new();
    let look = || -> admin::Result<Report> {
        let snapshots = daemon.snapshots(true, |_| {})?;
        Ok(Report::new(described, &snapshots, &std::collections::HashMap::new(), 0))
    };
    match look() {
        Err(e) => {
            findings.push(Finding::problem(CHECK, e.to_string(), "see its log: journalctl -u cvmfs-snapshotter -n 50"));
        }
        Ok(report) => {
            let is_away = described.repositories.iter().any(|one| !one.trouble.is_empty());
            let broken: Vec<_> =
                report.images.iter().filter_map(|image| Some((image, image.broken.as_ref()?))).collect();
            for (image, why) in broken.iter().take(NAMED) {
                let name = image.reference.as_deref().unwrap_or(&image.key);
                let anew = match &image.reference {
                    _ if is_away => "bring the repository back (see repository.answers): nothing has to be pulled again".to_owned(),
                    Some(reference) => format!(
                        "make it available again (any repository in \"repositories\" that has it will do), or remove the image and \
                         pull it anew: crictl rmi {0} && crictl pull {0}",
                        shell(reference)
                    ),
                    None => "make it available again (any repository in \"repositories\" that has it will do), or remove the image \
                             that uses it and pull it anew"
                        .to_owned(),
                };
                findings.push(Finding::problem(CHECK, format!("no container can start on {name}: {why}"), anew));
            }
            if broken.len() > NAMED {
                findings.push(Finding::problem(
                    CHECK,
                    format!("and {} more images", broken.len() - NAMED),
                    "cvmfs-snapshotter status lists them",
                ));
            }
            if broken.is_empty() {
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

/// The daemon serves containers without.
fn metrics(address: &MetricsAddress) -> Option<Finding> {
    let (at, answers) = match address {
        MetricsAddress::Tcp(at) => (at.to_string(), TcpStream::connect_timeout(at, Duration::from_secs(2)).map(drop)),
        MetricsAddress::Unix(at) => (at.display().to_string(), UnixStream::connect(at).map(drop)),
    };
    let why = answers.err()?;
    Some(Finding::warning(
        "config.metrics",
        format!("no metrics are served at {at}: {why}"),
        "journalctl -u cvmfs-snapshotter says why. For an IP address the unit needs a line more: systemctl edit \
         cvmfs-snapshotter, [Service] RestrictAddressFamilies=AF_INET AF_INET6; then systemctl restart cvmfs-snapshotter",
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
