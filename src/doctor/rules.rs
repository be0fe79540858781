//! What is wrong with containerd's configuration for this snapshotter, by the version of containerd. Pure.
//! `tests/scene/tests/remedies.rs` writes the tables and lines that it names into files of the real containerd.
#![forbid(unsafe_code)]

mod pulls;
#[cfg(test)]
mod tests;

use std::path::Path;

use super::Finding;
use super::config::{CRI_TABLE_1, ContainerdConfig, Proxy, Version};
use crate::migration::rebuild::DEFAULT_NAME as NAME;

/// What makes containerd read its configuration.
pub const RESTART: &str = "systemctl restart containerd";
/// What our package installs for containerd to import.
pub const REGISTRATION: &str = "/etc/containerd/conf.d/cvmfs-snapshotter.toml";
/// The page that has whole files and what else is known.
pub const PAGE: &str = "docs/containerd.md";

const PROXY_TABLE: &str = "[proxy_plugins.cvmfs-snapshotter]";
const EXPORTS_TABLE: &str = "[proxy_plugins.cvmfs-snapshotter.exports]";
/// The `type` of a snapshotter, in both spellings that containerd knows.
const SNAPSHOTTER_TYPES: [&str; 2] = ["snapshot", "io.containerd.snapshotter.v1"];
const SNAPSHOTTER_ID: &str = "io.containerd.snapshotter.v1.cvmfs-snapshotter";
const TRANSFER_ID: &str = "io.containerd.transfer.v1.local";
/// Without one of these there is no CRI; `cri` is its name in version 1 of the format.
const CRI_IDS: [&str; 4] =
    ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"];

/// What containerd has to be told about the daemon.
#[derive(Clone, Copy, Debug)]
pub struct DaemonEndpoint<'a> {
    pub address: &'a str,
    pub root: &'a str,
}

pub struct RuleContext<'a> {
    pub version: Version,
    /// What containerd uses.
    pub config: &'a ContainerdConfig,
    /// The table of the main file that names us for Kubernetes, whether containerd reads that table or not.
    pub file_table: Option<&'static str>,
    pub endpoint: DaemonEndpoint<'a>,
    /// The package's registration is there to be imported.
    pub has_registration: bool,
    /// The file that an admin edits.
    pub file: &'a str,
}

/// Who uses this snapshotter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Consumer {
    Kubernetes,
    /// Clients that name it, as nerdctl does.
    Others,
}

pub fn check(context: &RuleContext<'_>) -> Vec<Finding> {
    let config = context.config;
    let mut findings = Vec::new();
    let proxy = context.find_registration(&mut findings);
    if let Some(proxy) = proxy {
        context.check_type(proxy, &mut findings);
        context.check_exports(proxy, &mut findings);
        context.check_capabilities(proxy, &mut findings);
    }
    context.check_disabled(&mut findings);
    if !context.has_cri(&mut findings) {
        context.check_annotations(proxy, Consumer::Others, &mut findings);
        context.check_platforms(&mut findings);
        return findings;
    }
    let consumer = context.check_snapshotter(&mut findings);
    context.check_annotations(proxy, consumer, &mut findings);
    context.check_platforms(&mut findings);
    let is_other = |other: &str| (consumer == Consumer::Kubernetes) != (other == NAME);
    let runtimes: Vec<String> = config
        .runtime_snapshotters()
        .into_iter()
        .filter(|(_, other)| is_other(other))
        .map(|(runtime, other)| format!("{runtime}: {other}"))
        .collect();
    if !runtimes.is_empty() {
        findings.push(Finding::warning(
            "containerd.runtimes",
            format!("runtimes with a snapshotter of their own: {}", runtimes.join(", ")),
            "containerd mixes up the images of different snapshotters: use one snapshotter on a node; if you need both, pull \
             the pause image and each image with the one that its runtime uses",
        ));
    }
    findings
}

/// What keeps containerd from printing its configuration, told by the last line of its error output.
pub fn explain_refusal(error: &str, file: &str, dump_command: &str) -> Finding {
    let (check, remedy) = if error.contains("plugin: no type") {
        (
            "containerd.type",
            format!(
                "every table of proxy_plugins needs a type: remove those that are rests of a renamed one, and set in \
                 {file}:\n{PROXY_TABLE}\n  type = \"snapshot\"\nthen {RESTART}"
            ),
        )
    } else if error.contains("config version") {
        (
            "containerd.format",
            format!("set version, the first line of {file}, to one that is supported, then {RESTART}"),
        )
    } else if error.contains("plugin URI") {
        (
            "containerd.format",
            format!(
                "in {file}, write the names in disabled_plugins and required_plugins out, as TYPE.ID of \"ctr plugins ls\" \
                 (\"cri\" is \"io.containerd.grpc.v1.cri\"), or remove them, then {RESTART}"
            ),
        )
    } else {
        ("containerd.config", format!("correct {file}; {dump_command} tells when it is good"))
    };
    Finding::problem(check, format!("containerd refuses its configuration and does not start with it: {error}"), remedy)
}

/// Lines to set in one table.
struct Setting {
    /// The heading; empty for keys above all tables.
    table: String,
    lines: Vec<String>,
}

impl Setting {
    fn new(table: &str, lines: &[&str]) -> Self {
        Self { table: table.to_owned(), lines: lines.iter().map(|&line| line.to_owned()).collect() }
    }
}

/// `/var/run` is a link to `/run`.
fn without_var_run(path: &str) -> &str {
    path.strip_prefix("/var").filter(|rest| rest.starts_with("/run/")).unwrap_or(path)
}

fn string_list<'s>(names: impl Iterator<Item = &'s String>) -> String {
    format!("[{}]", names.map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", "))
}

impl RuleContext<'_> {
    /// The tables and lines to set, in TOML, and what makes them count.
    fn remedy(&self, settings: &[Setting]) -> String {
        let mut text = vec![format!("set in {}:", self.file)];
        for Setting { table, lines } in settings {
            if table.is_empty() {
                text.extend(lines.iter().map(|line| format!("{line}  # above all tables")));
            } else {
                text.push(table.clone());
                text.extend(lines.iter().map(|line| format!("  {line}")));
            }
        }
        text.push(format!("then {RESTART}"));
        text.join("\n")
    }

    /// As `remedy`, for keys of the CRI. containerd 1 reads their table only in a file of version 2.
    fn cri_remedy(&self, lines: &[&str]) -> String {
        let is_ignored = self.version.major < 2 && self.config.snapshotter() != Some(NAME);
        let version = is_ignored.then(|| Setting::new("", &["version = 2"]));
        let settings: Vec<Setting> = version.into_iter().chain([Setting::new(self.cri_table(), lines)]).collect();
        self.remedy(&settings)
    }

    /// The table in which a key of the CRI counts: containerd 2 also reads the one of containerd 1, in files of an older
    /// format that have runtimes beside it.
    fn cri_table(&self) -> &'static str {
        if self.config.snapshotter() == Some(NAME) && self.file_table == Some(CRI_TABLE_1) {
            return CRI_TABLE_1;
        }
        self.version.cri_table()
    }

    fn is_our_address(&self, address: &str) -> bool {
        // 1.7 cannot use an address with a scheme, the versions before and after it can (tested).
        let is_1_7 = (self.version.major, self.version.minor) == (1, 7);
        let bare = address.strip_prefix("unix://").filter(|_| !is_1_7);
        without_var_run(bare.unwrap_or(address)) == without_var_run(self.endpoint.address)
    }

    fn find_registration(&self, findings: &mut Vec<Finding>) -> Option<&Proxy> {
        const CHECK: &str = "containerd.plugin";
        let address_line = format!("address = \"{}\"", self.endpoint.address);
        let proxies = &self.config.proxy_plugins;
        let Some(proxy) = proxies.get(NAME) else {
            let namesake = proxies.iter().find(|(_, proxy)| self.is_our_address(&proxy.address));
            findings.push(match namesake {
                Some((name, _)) => Finding::problem(
                    CHECK,
                    format!("the proxy plugin is called {name:?}: nerdctl, and every page but its own, know it as {NAME}"),
                    format!(
                        "in {}, rename [proxy_plugins.{name}] and the tables below it to {PROXY_TABLE}, and {name:?} to \
                         \"{NAME}\" where a table names it as snapshotter, then {RESTART}",
                        self.file
                    ),
                ),
                None => Finding::problem(CHECK, "containerd does not know this snapshotter", self.registration()),
            });
            return None;
        };
        if self.is_our_address(&proxy.address) {
            findings.push(Finding::good(CHECK, format!("{NAME} is a proxy plugin of containerd")));
        } else {
            let message = format!(
                "containerd looks for {NAME} at {:?}, and the daemon is at {}",
                proxy.address, self.endpoint.address
            );
            let setting = Setting::new(PROXY_TABLE, &[&address_line]);
            findings.push(Finding::problem(CHECK, message, self.remedy(&[setting])));
        }
        Some(proxy)
    }

    fn registration(&self) -> String {
        if self.has_registration {
            let pattern = Path::new(REGISTRATION).with_file_name("*.toml");
            return self
                .remedy(&[Setting::new("", &[&format!("imports = [{pattern:?}]  # beside what the list has,")])]);
        }
        let (address, root) = (self.endpoint.address, self.endpoint.root);
        let mut settings =
            vec![Setting::new(PROXY_TABLE, &["type = \"snapshot\"", &format!("address = \"{address}\"")])];
        let exports = [format!("root = \"{root}\""), pulls::ANNOTATIONS_LINE.to_owned()];
        let count = usize::from(self.version.has_exports()) + usize::from(self.version.has_transfer());
        if count > 0 {
            settings.push(Setting { table: EXPORTS_TABLE.to_owned(), lines: exports[..count].to_vec() });
        }
        self.remedy(&settings)
    }

    fn check_type(&self, proxy: &Proxy, findings: &mut Vec<Finding>) {
        if !SNAPSHOTTER_TYPES.contains(&proxy.kind.as_str()) {
            findings.push(Finding::problem(
                "containerd.type",
                format!("{PROXY_TABLE} has the type {:?}: containerd does not take it for a snapshotter", proxy.kind),
                self.remedy(&[Setting::new(PROXY_TABLE, &["type = \"snapshot\""])]),
            ));
        }
    }

    fn check_exports(&self, proxy: &Proxy, findings: &mut Vec<Finding>) {
        const CHECK: &str = "containerd.exports";
        let root = self.endpoint.root;
        if !self.version.has_exports() {
            return;
        }
        let message = match proxy.exports.get("root") {
            Some(exported) if Path::new(exported) == Path::new(root) => {
                findings.push(Finding::good(CHECK, "kubelet sees the disk of the snapshots"));
                return;
            }
            Some(exported) => format!("kubelet is told that snapshots are in {exported:?}, and they are in {root}"),
            None => "kubelet is not told where snapshots are: it reports \"invalid capacity 0 on image filesystem\" and does \
                     not watch that disk"
                .to_owned(),
        };
        let setting = Setting::new(EXPORTS_TABLE, &[&format!("root = \"{root}\"")]);
        findings.push(Finding::warning(CHECK, message, self.remedy(&[setting])));
    }

    fn check_capabilities(&self, proxy: &Proxy, findings: &mut Vec<Finding>) {
        const MAPPED: &str = "files of CernVM-FS cannot be id-mapped, and pods with user namespaces would not start";
        let refused = |name: &str| match name {
            "rebase" if self.version >= Version::new(2, 2, 0) => Some("layers would be recorded without their parents"),
            "remap-ids" | "only-remap-ids" => Some(MAPPED),
            _ => None,
        };
        let rest = string_list(proxy.capabilities.iter().filter(|name| refused(name).is_none()));
        for name in &proxy.capabilities {
            if let Some(reason) = refused(name) {
                let setting = Setting::new(PROXY_TABLE, &[&format!("capabilities = {rest}")]);
                let message = format!("the capability {name:?} is declared for {NAME}: {reason}");
                findings.push(Finding::problem("containerd.capabilities", message, self.remedy(&[setting])));
            }
        }
    }

    /// A remedy that removes plugins from the list of those that containerd does not start.
    fn enable(&self, is_removed: impl Fn(&str) -> bool) -> String {
        let rest = string_list(self.config.disabled_plugins.iter().filter(|name| !is_removed(name)));
        self.remedy(&[Setting::new("", &[&format!("disabled_plugins = {rest}")])])
    }

    /// What happens without a plugin that this snapshotter cannot do without.
    fn consequence_of_disabling(&self, name: &str) -> Option<&'static str> {
        match name {
            NAME | SNAPSHOTTER_ID => Some("containerd does not load this snapshotter"),
            TRANSFER_ID if self.version.has_transfer() => {
                Some("without its transfer service the CRI of containerd does not start, and \"ctr images pull\" fails")
            }
            _ => None,
        }
    }

    fn check_disabled(&self, findings: &mut Vec<Finding>) {
        let mut disabled = self.config.disabled_plugins.iter();
        if let Some((name, consequence)) = disabled.find_map(|name| Some((name, self.consequence_of_disabling(name)?)))
        {
            let message = format!("disabled_plugins has {name:?}: {consequence}");
            let remedy = self.enable(|name| self.consequence_of_disabling(name).is_some());
            findings.push(Finding::problem("containerd.disabled", message, remedy));
        }
    }

    /// Whether containerd has a CRI. Without one nothing is said of Kubernetes.
    fn has_cri(&self, findings: &mut Vec<Finding>) -> bool {
        const CHECK: &str = "containerd.parts";
        let is_cri = |name: &str| CRI_IDS.contains(&name);
        if !self.config.disabled_plugins.iter().any(|name| is_cri(name)) {
            return true;
        }
        findings.push(if self.file_table.is_some() {
            Finding::warning(
                CHECK,
                "the CRI of containerd is disabled, although its snapshotter is named: Kubernetes cannot use this containerd",
                self.enable(|name| is_cri(name) || self.consequence_of_disabling(name).is_some()),
            )
        } else {
            let message = format!(
                "the CRI of containerd is disabled (disabled_plugins): only clients that name {NAME} get it (nerdctl --snapshotter)"
            );
            Finding::note(CHECK, message)
        });
        false
    }
}
