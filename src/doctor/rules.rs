//! What is wrong with containerd's configuration for this snapshotter, by the version of containerd. Pure.
//! `tests/scene/tests/remedies.rs` writes the tables and lines that it names into files of the real containerd.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::env::consts::ARCH;
use std::path::Path;

use super::Finding;
use super::config::{CRI_TABLE_1, ContainerdConfig, Proxy, Version};
use crate::migration::rebuild::DEFAULT_NAME as NAME;

/// What makes containerd read its configuration.
pub const RESTART: &str = "systemctl restart containerd";
/// The page that has whole files and what else is known.
pub const PAGE: &str = "docs/containerd.md";

const PROXY_TABLE: &str = "[proxy_plugins.cvmfs-snapshotter]";
const EXPORTS_TABLE: &str = "[proxy_plugins.cvmfs-snapshotter.exports]";
const UNPACK_TABLE: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]";
const TYPE_LINE: &str = "type = \"snapshot\"";
const SNAPSHOTTER_LINE: &str = "snapshotter = \"cvmfs-snapshotter\"";
const CLIENT_LINE: &str = "disable_snapshot_annotations = false";
/// The export that makes the transfer service tell a snapshotter which layers it pulls. Its value is a text.
const ANNOTATIONS_KEY: &str = "enable_remote_snapshot_annotations";
const ANNOTATIONS_LINE: &str = "enable_remote_snapshot_annotations = \"true\"";
/// The `type` of a snapshotter, in both spellings that containerd knows.
const SNAPSHOTTER_TYPES: [&str; 2] = ["snapshot", "io.containerd.snapshotter.v1"];
const OUR_IDS: [&str; 2] = [NAME, "io.containerd.snapshotter.v1.cvmfs-snapshotter"];
/// From 2.2 on the first makes containerd record layers without their parents; FUSE file systems cannot be id-mapped.
const HARMFUL_CAPABILITIES: [&str; 3] = ["rebase", "remap-ids", "only-remap-ids"];
const TRANSFER_ID: &str = "io.containerd.transfer.v1.local";
/// Without one of these there is no CRI; `cri` is its name in version 1 of the format.
const CRI_IDS: [&str; 4] =
    ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"];

pub struct RuleContext<'a> {
    pub version: Version,
    /// What containerd uses.
    pub config: &'a ContainerdConfig,
    /// The table of the main file that names us for Kubernetes, whether containerd reads that table or not.
    pub file_table: Option<&'static str>,
    /// Where the daemon is, and its state root.
    pub address: &'a str,
    pub root: &'a str,
    /// The file that an admin edits.
    pub file: &'a str,
}

/// Something that can be wrong, and the tables and lines to set then, in TOML.
struct Rule {
    is_broken: bool,
    finding: Finding,
}

fn problem(check: &'static str, is_broken: bool, message: String, lines: String) -> Rule {
    Rule { is_broken, finding: Finding::problem(check, message, lines) }
}

fn warning(check: &'static str, is_broken: bool, message: String, lines: String) -> Rule {
    Rule { is_broken, finding: Finding::warning(check, message, lines) }
}

pub fn check(context: &RuleContext<'_>) -> Vec<Finding> {
    let rules = context.registration_rules().into_iter().chain(context.plugin_rules()).chain(context.pull_rules());
    let with_place = |lines: String| format!("set in {}:\n{lines}\nthen {RESTART}", context.file);
    let broken = rules.filter(|rule| rule.is_broken).map(|rule| rule.finding);
    let mut findings: Vec<Finding> = broken.map(|one| Finding { remedy: one.remedy.map(with_place), ..one }).collect();
    findings.extend(context.other_uses());
    for (check, is_met, message) in [
        ("containerd.plugin", true, format!("{NAME} is a proxy plugin of containerd")),
        ("containerd.snapshotter", context.has_cri(), format!("Kubernetes' containers use {NAME}")),
        ("containerd.annotations", context.says_layers(), "containerd says which layers are pulled".to_owned()),
    ] {
        if is_met && findings.iter().all(|one| one.check != check) {
            findings.push(Finding::good(check, message));
        }
    }
    findings
}

/// What keeps containerd from printing its configuration, told by the last line of its error output.
pub fn explain_refusal(error: &str, file: &str, dump_command: &str) -> Finding {
    let remedies = [
        (
            "plugin: no type",
            "containerd.type",
            format!(
                "every table of proxy_plugins needs a type: remove rests of a renamed one, and set in {file}:\n{PROXY_TABLE}\n  {TYPE_LINE}"
            ),
        ),
        (
            "config version",
            "containerd.format",
            format!("set version, the first line of {file}, to one that is supported"),
        ),
        (
            "plugin URI",
            "containerd.format",
            format!(
                "in {file}, write the names in disabled_plugins and required_plugins out, as TYPE.ID of \"ctr plugins ls\", or remove them"
            ),
        ),
        ("", "containerd.config", format!("correct {file} until {dump_command} has no error")),
    ];
    let found = remedies.into_iter().find(|(words, ..)| error.contains(words));
    let (_, check, remedy) = found.expect("the last one fits");
    let message = format!("containerd refuses its configuration and does not start with it: {error}");
    Finding::problem(check, message, format!("{remedy}\nthen {RESTART}"))
}

/// `/var/run` is a link to `/run`.
fn without_var_run(path: &str) -> &str {
    path.strip_prefix("/var").filter(|rest| rest.starts_with("/run/")).unwrap_or(path)
}

fn string_list<'s>(names: impl Iterator<Item = &'s String>) -> String {
    format!("[{}]", names.map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", "))
}

fn unpack_entry(snapshotter: &str) -> String {
    format!("{UNPACK_TABLE}\n  platform = \"linux\"\n  snapshotter = \"{snapshotter}\"")
}

/// Whether containerd takes `platform` for this node's: `linux`, `linux/amd64`, `amd64`, `linux(6.1)/arm64/v8` and the like.
fn is_our_platform(platform: &str) -> bool {
    let platform = platform.to_ascii_lowercase();
    let (system, rest) = platform.split_once('/').unwrap_or((&platform, ""));
    let system = system.split('(').next().unwrap_or_default();
    let is_our_machine = |name: &str| [ARCH, &ARCH.replace('_', "-"), architecture()].contains(&name);
    let machine = rest.split('/').next().unwrap_or_default();
    system == "linux" && (rest.is_empty() || is_our_machine(machine)) || rest.is_empty() && is_our_machine(system)
}

/// containerd's name for it.
fn architecture() -> &'static str {
    match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl RuleContext<'_> {
    fn proxy(&self) -> Option<&Proxy> {
        self.config.proxy_plugins.get(NAME)
    }

    /// Without a CRI nothing is said of Kubernetes.
    fn has_cri(&self) -> bool {
        !self.config.disabled_plugins.iter().any(|name| CRI_IDS.contains(&name.as_str()))
    }

    /// Kubernetes uses this snapshotter.
    fn is_used(&self) -> bool {
        self.config.snapshotter() == Some(NAME)
    }

    /// Kubernetes shall use it.
    fn is_wanted(&self) -> bool {
        self.has_cri() && (self.is_used() || self.file_table.is_some())
    }

    /// The table in which a key of the CRI counts: containerd 2 also reads the one of containerd 1, in files of an older
    /// format that have runtimes beside it.
    fn cri_table(&self) -> &'static str {
        let is_old = self.is_used() && self.file_table == Some(CRI_TABLE_1);
        if is_old { CRI_TABLE_1 } else { self.version.cri_table() }
    }

    /// Keys of the CRI. containerd 1 reads their table only in a file of version 2.
    fn cri_lines(&self, lines: &str) -> String {
        let is_ignored = self.version.major < 2 && !self.is_used();
        let version = if is_ignored { "version = 2  # above all tables\n" } else { "" };
        format!("{version}{}\n  {lines}", self.cri_table())
    }

    fn registration_rules(&self) -> Vec<Rule> {
        const MISSING: &str = "containerd.plugin";
        let &Self { address, root, version, .. } = self;
        let address_line = format!("{PROXY_TABLE}\n  address = \"{address}\"");
        let Some(proxy) = self.proxy() else {
            let others = self.config.proxy_plugins.keys().map(|name| format!(", but [proxy_plugins.{name}]"));
            let message = format!(
                "containerd does not know this snapshotter: it has no {PROXY_TABLE}{}",
                others.collect::<String>()
            );
            let exports =
                if version.has_exports() { format!("\n{EXPORTS_TABLE}\n  root = \"{root}\"") } else { String::new() };
            let annotations = if version.has_transfer() { format!("\n  {ANNOTATIONS_LINE}") } else { String::new() };
            let lines = format!("{address_line}\n  {TYPE_LINE}{exports}{annotations}");
            return vec![problem(MISSING, true, message, lines)];
        };
        let without_scheme = proxy.address.strip_prefix("unix://").unwrap_or(&proxy.address);
        let exported = proxy.exports.get("root");
        let is_harmful = |name: &&String| HARMFUL_CAPABILITIES.contains(&name.as_str());
        let (harmful, rest): (Vec<&String>, Vec<&String>) = proxy.capabilities.iter().partition(is_harmful);
        let is_exported = exported.map(Path::new) == Some(Path::new(root));
        vec![
            problem(
                MISSING,
                without_var_run(without_scheme) != without_var_run(address),
                format!("containerd looks for {NAME} at {:?}, and the daemon is at {address}", proxy.address),
                address_line,
            ),
            problem(
                "containerd.type",
                !SNAPSHOTTER_TYPES.contains(&proxy.kind.as_str()),
                format!("{PROXY_TABLE} has the type {:?}: containerd does not take it for a snapshotter", proxy.kind),
                format!("{PROXY_TABLE}\n  {TYPE_LINE}"),
            ),
            warning(
                "containerd.exports",
                version.has_exports() && !is_exported,
                format!("snapshots are in {root}, and kubelet is told {exported:?}: it does not watch that disk"),
                format!("{EXPORTS_TABLE}\n  root = \"{root}\""),
            ),
            problem(
                "containerd.capabilities",
                !harmful.is_empty(),
                format!("{NAME} is declared to have {harmful:?}, which breaks images or pods here: see {PAGE}"),
                format!("{PROXY_TABLE}\n  capabilities = {}", string_list(rest.into_iter())),
            ),
        ]
    }

    fn plugin_rules(&self) -> Vec<Rule> {
        let is_needed =
            |name: &&String| OUR_IDS.contains(&name.as_str()) || *name == TRANSFER_ID && self.version.has_transfer();
        let is_of_cri = |name: &&String| CRI_IDS.contains(&name.as_str());
        let disabled = &self.config.disabled_plugins;
        let needed: Vec<&String> = disabled.iter().filter(is_needed).collect();
        let rest = disabled.iter().filter(|name| !is_needed(name) && !is_of_cri(name));
        let lines = format!("disabled_plugins = {}  # above all tables", string_list(rest));
        let unpacks = self.config.unpack_config().unwrap_or_default().iter();
        let platform = unpacks.filter(|one| one.snapshotter == NAME).find(|one| !is_our_platform(&one.platform));
        let consequence = if platform.is_some_and(|one| one.optional && !one.platform.is_empty()) {
            "containerd ignores it"
        } else {
            "the transfer service of containerd does not start with it, and so the CRI does not either"
        };
        let platform = platform.map(|one| one.platform.as_str());
        vec![
            problem(
                "containerd.disabled",
                !needed.is_empty(),
                format!("disabled_plugins has {needed:?}: this snapshotter, or the CRI, does not work without"),
                lines.clone(),
            ),
            warning(
                "containerd.parts",
                !self.has_cri() && self.file_table.is_some(),
                "the CRI is disabled, although its snapshotter is named: Kubernetes cannot use this containerd"
                    .to_owned(),
                lines,
            ),
            problem(
                "containerd.platform",
                self.version.has_transfer() && platform.is_some(),
                format!(
                    "an unpack_config for {NAME} has the platform {:?}, and this node is linux/{}: {consequence}",
                    platform.unwrap_or_default(),
                    architecture()
                ),
                format!("{}  # instead of that entry", unpack_entry(NAME)),
            ),
        ]
    }

    fn unpacks(&self) -> bool {
        self.config.unpack_config().is_some_and(|all| all.iter().any(|one| one.snapshotter == NAME))
    }

    /// The transfer service tells this snapshotter which layers it pulls. A registration that is missing comes with the line.
    fn is_told(&self) -> bool {
        self.proxy().is_none_or(|proxy| proxy.exports.get(ANNOTATIONS_KEY).is_some_and(|value| value == "true"))
    }

    fn says_layers(&self) -> bool {
        self.is_wanted() && self.config.has_client_annotations()
            || self.version.has_transfer() && self.unpacks() && self.is_told()
    }

    /// What Kubernetes pulls with, and whether containerd then says which layers it pulls: by the CRI's client, or from 2.1 on
    /// by its transfer service.
    fn pull_rules(&self) -> Vec<Rule> {
        const CHECK: &str = "containerd.annotations";
        let (is_wanted, has_transfer) = (self.is_wanted(), self.version.has_transfer());
        let setting = self.config.client_pull_setting().filter(|_| has_transfer);
        let is_by_client = is_wanted && (!has_transfer || setting.is_some());
        let snapshotter_lines =
            if has_transfer { SNAPSHOTTER_LINE.to_owned() } else { format!("{SNAPSHOTTER_LINE}\n  {CLIENT_LINE}") };
        let mut lines = Vec::new();
        if !self.is_told() {
            lines.push(format!("{EXPORTS_TABLE}\n  {ANNOTATIONS_LINE}"));
        }
        if !self.unpacks() {
            // The first entry replaces containerd's default list.
            let default = self.config.unpack_config().is_none().then_some("overlayfs");
            lines.extend([NAME].into_iter().chain(default).map(unpack_entry));
        }
        let consequence =
            if self.unpacks() { "downloads every layer" } else { "fails with \"no unpack platforms defined\"" };
        let because = setting.map(|setting| format!(" because of {setting}")).unwrap_or_default();
        let ignored = self.file_table.unwrap_or_default();
        let used = self.config.snapshotter().unwrap_or_default();
        let severity = if is_wanted { problem } else { warning };
        vec![
            problem(
                "containerd.snapshotter",
                is_wanted && !self.is_used(),
                format!(
                    "containerd ignores table {ignored} of {}, and Kubernetes uses {used:?}; see {PAGE}",
                    self.file
                ),
                self.cri_lines(&snapshotter_lines),
            ),
            problem(
                CHECK,
                // The lines of containerd.snapshotter have this one.
                is_by_client && !self.config.has_client_annotations() && (self.is_used() || has_transfer),
                format!(
                    "Kubernetes pulls by containerd's client{because}, which does not say which layers: all are downloaded"
                ),
                self.cri_lines(CLIENT_LINE),
            ),
            severity(
                CHECK,
                has_transfer && !is_by_client && !self.says_layers(),
                format!("containerd's transfer service is not set up for {NAME}: what pulls by it {consequence}"),
                lines.join("\n"),
            ),
        ]
    }

    /// Other snapshotters beside this one.
    fn other_uses(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        if !self.has_cri() && self.file_table.is_none() {
            findings.push(Finding::note("containerd.parts", "the CRI of containerd is disabled (disabled_plugins)"));
        } else if !self.is_wanted() && self.has_cri() {
            let other = self.config.snapshotter().unwrap_or_default();
            let message = format!(
                "Kubernetes' containers use {other}; only clients that name {NAME} get it (nerdctl --snapshotter). To change \
                 that, see {PAGE}: {SNAPSHOTTER_LINE} in table {} of {}",
                self.cri_table(),
                self.file
            );
            findings.push(Finding::note("containerd.snapshotter", message));
        }
        let runtimes = self.config.runtime_snapshotters().into_iter();
        let others = runtimes.filter(|(_, other)| self.is_wanted() != (*other == NAME));
        let others: Vec<String> = others.map(|(runtime, other)| format!("{runtime}: {other}")).collect();
        if self.has_cri() && !others.is_empty() {
            findings.push(Finding::warning(
                "containerd.runtimes",
                format!("runtimes with a snapshotter of their own: {}", others.join(", ")),
                "containerd mixes up images of different snapshotters: use one on a node, or pull the pause image and each \
                 image with the one that its runtime uses",
            ));
        }
        findings
    }
}
