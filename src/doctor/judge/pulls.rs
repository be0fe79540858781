//! What Kubernetes pulls with, and whether containerd then says which layers: by its client, or from
//! 2.1 on by its transfer service.
#![forbid(unsafe_code)]

use std::env::consts::ARCH;

use super::plugin::{ANNOTATIONS, EXPORTS, annotations_line};
use super::remedy::{heading, remedy};
use super::{Case, Version, parts};
use crate::doctor::Finding;
use crate::doctor::configuration::{CRI_TABLES, Proxy, TRANSFER_TABLE, UNPACK_TABLE, Unpack};
use crate::migration::rebuild::DEFAULT_NAME as NAME;

const TRANSFER: [&str; 2] = ["plugins", TRANSFER_TABLE];
const SAYS: &str = "disable_snapshot_annotations = false";
/// What containerd says where it is to unpack for nobody.
const NOWHERE: &str = "\"no unpack platforms defined\"";

impl Case<'_> {
    /// The version of the format that the file has, as this containerd takes it.
    pub fn format(&self) -> i64 {
        self.found.written.version.unwrap_or(1)
    }

    /// What a file must begin with in which nothing stands so far: containerd 1 takes one without a version for one of
    /// version 1, and passes over what else it is told here.
    pub fn first_line(&self) -> Option<String> {
        let written = &self.found.written;
        let is_empty = written.version.is_none() && written.tables.is_empty() && written.plugins.is_empty();
        let highest = self.version.format();
        (is_empty && self.version < Version(2, 0, 0))
            .then(|| format!("as the first line of {}: version = {highest}", self.file))
    }

    /// The CRI's table of images in which a key counts.
    fn images(&self) -> Vec<&'static str> {
        let old = if self.format() < 2 && self.found.home(&["plugins", "cri"]).is_some() {
            vec!["plugins", "cri", "containerd"]
        } else {
            vec!["plugins", CRI_TABLES[0], "containerd"]
        };
        // The tables of older formats win over the new one, if runtimes stand beside them; up to 2.2 not
        // those of files without a version.
        let oldest = if self.version < Version(2, 3, 0) { 2 } else { 0 };
        let is_migrated = (oldest..self.version.format()).contains(&self.format()) && self.found.written.has_runtimes;
        if self.version < Version(2, 0, 0) || is_migrated && self.found.stands(&old) {
            old
        } else {
            vec!["plugins", CRI_TABLES[1]]
        }
    }

    fn snapshotter_line() -> String {
        format!("snapshotter = \"{NAME}\"")
    }

    /// The file names us, and containerd uses another one.
    fn is_passed_over(&self) -> bool {
        let found = self.found;
        found.written.snapshotter.as_deref() == Some(NAME)
            && (found.snapshotter.as_deref() != Some(NAME) || found.is_of_version_1 && self.version >= Version(2, 0, 0))
    }
}

/// The `version` at the head of the file. False: nothing else can be said before that is right.
pub fn format(case: &Case<'_>, findings: &mut Vec<Finding>) -> bool {
    const CHECK: &str = "containerd.format";
    let highest = case.version.format();
    let written = case.found.written.version;
    let line = |version: i64| format!("version = {version}");
    let renamed = parts::renamed(case);
    let loss = renamed.loss();
    match written {
        // 1.6 does not look at the number.
        Some(version) if version > highest && case.version >= Version(1, 7, 0) => {
            findings.push(Finding::problem(
                CHECK,
                format!("version = {version} is newer than this containerd, which does not start with it"),
                remedy(&[format!("in {}: {} instead of {}", case.file, line(highest), line(version))]),
            ));
            false
        }
        None | Some(..=1) if case.version < Version(2, 0, 0) && case.is_passed_over() => {
            let what = "containerd 1 takes the file for one of version 1, passes over the tables of its plugins, and \
                        Kubernetes does not use this snapshotter";
            let mut steps = vec![match written {
                None => format!("as the first line of {}: {}", case.file, line(highest)),
                Some(version) => format!("in {}: {} instead of {}", case.file, line(highest), line(version)),
            }];
            steps.extend(renamed.steps);
            findings.push(Finding::problem(CHECK, format!("{what}{loss}"), remedy(&steps)));
            false
        }
        Some(2..) if !renamed.steps.is_empty() => {
            let keys = renamed.keys.join(" and ");
            let what =
                format!("{keys} has short names, with which containerd does not start from version 2 of its file on");
            findings.push(Finding::problem(CHECK, format!("{what}{loss}"), remedy(&renamed.steps)));
            false
        }
        _ => true,
    }
}

/// Whether Kubernetes' containers use us, or will when what is found is mended.
pub fn snapshotter(case: &Case<'_>, findings: &mut Vec<Finding>) -> bool {
    const CHECK: &str = "containerd.snapshotter";
    let used = case.found.snapshotter.as_deref();
    let table = case.images();
    if case.is_passed_over() {
        let mut lines = vec![Case::snapshotter_line()];
        if case.found.written.disable_annotations == Some(false) {
            lines.push(SAYS.to_owned());
        }
        let other = used.filter(|name| *name != NAME).unwrap_or("overlayfs");
        findings.push(Finding::problem(
            CHECK,
            format!(
                "{NAME} is named in a table that this containerd passes over, and Kubernetes uses {other}; \
                 docs/containerd.md has whole files for each version"
            ),
            remedy(&[case.set(&table, &lines)]),
        ));
        return true;
    }
    if used == Some(NAME) {
        findings.push(Finding::good(CHECK, format!("Kubernetes' containers use {NAME}")));
        return true;
    }
    let other = used.unwrap_or("containerd's own");
    findings.push(Finding::note(
        CHECK,
        format!(
            "Kubernetes' containers use {other} as snapshotter; only who names {NAME} gets it (nerdctl --snapshotter). \
             To change that, {}",
            case.set(&table, &[Case::snapshotter_line()])
        ),
    ));
    false
}

/// Who uses us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum User {
    Kubernetes,
    /// Who names us.
    Others,
}

/// Whether containerd says which layers it pulls.
pub fn annotations(case: &Case<'_>, proxy: &Proxy, user: User, findings: &mut Vec<Finding>) {
    const CHECK: &str = "containerd.annotations";
    let says = |written: Option<bool>| written == Some(false);
    let by_client =
        says(case.found.disable_annotations) || case.is_passed_over() && says(case.found.written.disable_annotations);
    let say = || remedy(&[case.set(&case.images(), &[SAYS.to_owned()])]);
    if !case.version.has_transfer() {
        if by_client {
            findings.push(Finding::good(CHECK, "containerd says which layers Kubernetes pulls"));
        } else if user == User::Kubernetes {
            let what = "containerd does not say which layers Kubernetes pulls: every layer is downloaded";
            findings.push(Finding::problem(CHECK, what, say()));
        }
        return;
    }
    if let (User::Kubernetes, false, Some(reason)) = (user, by_client, case.found.by_client.values().next()) {
        let what = format!(
            "{reason} makes containerd pull by its client, which does not say which layers Kubernetes pulls: every layer \
             is downloaded"
        );
        findings.push(Finding::problem(CHECK, what, say()));
        return;
    }
    let is_told = proxy.exports.get(ANNOTATIONS).map(String::as_str) == Some("true");
    let unpacks = case.found.unpack.iter().flatten().any(|one| one.snapshotter == NAME);
    let suffer = match (is_told, unpacks) {
        (true, true) => {
            findings.push(Finding::good(CHECK, "containerd's transfer service says which layers are pulled"));
            return;
        }
        (false, true) => "download every layer".to_owned(),
        (_, false) => format!("stop with {NOWHERE}"),
    };
    let mut steps = Vec::new();
    if !is_told {
        steps.push(case.set(&EXPORTS, &[annotations_line()]));
    }
    if !unpacks {
        steps.push(unpack_for_us(case));
    }
    let others = "\"ctr images pull\" and nerdctl 2.3 and later";
    findings.push(match user {
        User::Kubernetes if by_client => Finding::note(
            CHECK,
            format!(
                "containerd says which layers Kubernetes pulls, by its client; {others}, which use the transfer service, {suffer}"
            ),
        ),
        User::Kubernetes if unpacks => Finding::problem(
            CHECK,
            "containerd's transfer service does not say which layers are pulled: every layer is downloaded",
            remedy(&steps),
        ),
        User::Kubernetes => Finding::problem(
            CHECK,
            format!("containerd's transfer service is not told to unpack for {NAME}: every pull of Kubernetes fails with {NOWHERE}"),
            remedy(&steps),
        ),
        User::Others => Finding::warning(
            CHECK,
            format!("the transfer service is not set up for this snapshotter: {others} {suffer}"),
            remedy(&steps),
        ),
    });
}

fn unpack_for_us(case: &Case<'_>) -> String {
    // The first entry replaces the default list.
    let names = if case.found.unpack.is_none() { &[NAME, "overlayfs"][..] } else { &[NAME] };
    if case.found.written.unpack_is_inline {
        return format!(
            "in {}, add to the list unpack_config of {}: {{ platform = \"linux\", snapshotter = \"{NAME}\" }}",
            case.home(&TRANSFER),
            heading(&TRANSFER)
        );
    }
    let entry =
        |name: &&str| format!("[{}]\n  platform = \"linux\"\n  snapshotter = \"{name}\"", heading(&UNPACK_TABLE));
    case.add(&TRANSFER, &names.iter().map(entry).collect::<Vec<_>>().join("\n"))
}

/// An entry for another machine than this one keeps containerd from unpacking for us.
pub fn platforms(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if !case.version.has_transfer() {
        return;
    }
    for one in case.found.unpack.iter().flatten().filter(|one| one.snapshotter == NAME && !fits(&one.platform)) {
        findings.push(unfit(case, one));
    }
}

fn unfit(case: &Case<'_>, one: &Unpack) -> Finding {
    let platform =
        if one.platform.is_empty() { "no platform".to_owned() } else { format!("platform {:?}", one.platform) };
    let effect = if one.is_optional && !one.platform.is_empty() {
        "containerd passes over it"
    } else {
        "containerd's transfer service does not start with it, and so the CRI does not either"
    };
    let step = format!(
        "in {}, in {} with snapshotter = \"{NAME}\": platform = \"linux\"",
        case.home(&TRANSFER),
        format_args!("[{}]", heading(&UNPACK_TABLE)),
    );
    Finding::problem(
        "containerd.platform",
        format!(
            "an unpack_config for {NAME} has {platform}, which this node (linux/{}) is not: {effect}",
            architecture()
        ),
        remedy(&[step]),
    )
}

/// As containerd calls it.
fn architecture() -> &'static str {
    match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `linux`, `linux/amd64` and the like, in the spellings that containerd takes for the same.
fn fits(platform: &str) -> bool {
    let platform = platform.to_ascii_lowercase();
    let (system, rest) = platform.split_once('/').unwrap_or((&platform, ""));
    let system = system.split('(').next().unwrap_or_default();
    let is_ours = |name: &str| match name {
        "x86_64" | "x86-64" => architecture() == "amd64",
        "aarch64" => architecture() == "arm64",
        name => name == architecture(),
    };
    let machine = rest.split('/').next().unwrap_or_default();
    system == "linux" && (rest.is_empty() || is_ours(machine)) || rest.is_empty() && is_ours(system)
}
