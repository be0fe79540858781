//! How this snapshotter is registered: `proxy_plugins`.
#![forbid(unsafe_code)]

use std::path::Path;

use super::remedy::{heading, remedy};
use super::{Case, Version};
use crate::doctor::Finding;
use crate::doctor::configuration::Proxy;
use crate::migration::rebuild::DEFAULT_NAME as NAME;

pub const TABLE: [&str; 2] = ["proxy_plugins", NAME];
pub const EXPORTS: [&str; 3] = ["proxy_plugins", NAME, "exports"];
/// The `type` of a snapshotter, in both spellings that containerd knows.
const KINDS: [&str; 2] = ["snapshot", "io.containerd.snapshotter.v1"];
/// The other kinds of plugins, in both spellings, and since when they are known.
const OTHER_KINDS: [(&str, &str, Version); 3] = [
    ("content", "io.containerd.content.v1", Version(1, 0, 0)),
    ("diff", "io.containerd.differ.v1", Version(1, 7, 0)),
    ("sandbox", "io.containerd.sandbox.controller.v1", Version(2, 0, 0)),
];
/// What containerd lets the transfer service pass on; a text.
pub const ANNOTATIONS: &str = "enable_remote_snapshot_annotations";

pub fn annotations_line() -> String {
    format!("{ANNOTATIONS} = \"true\"")
}

fn kind_line() -> String {
    format!("type = \"{}\"", KINDS[0])
}

/// `/var/run` is a link to `/run`.
fn without_link(path: &str) -> &str {
    path.strip_prefix("/var").filter(|rest| rest.starts_with("/run/")).unwrap_or(path)
}

impl Case<'_> {
    fn address_line(&self) -> String {
        format!("address = \"{}\"", self.place.address)
    }

    fn root_line(&self) -> String {
        format!("root = \"{}\"", self.place.root)
    }

    fn is_here(&self, proxy: &Proxy) -> bool {
        let address = proxy.address.as_str();
        // 1.7 loads no snapshotter at such an address; those before and after it do (tried).
        let bare = if matches!(self.version, Version(1, 7, _)) { None } else { address.strip_prefix("unix://") };
        without_link(bare.unwrap_or(address)) == without_link(self.place.address)
    }
}

/// The registration as it is once the findings about it are mended; None: what else there is to say
/// must wait for that.
pub fn look(case: &Case<'_>, findings: &mut Vec<Finding>) -> Option<Proxy> {
    const CHECK: &str = "containerd.plugin";
    let named = case.found.proxies.iter().find(|proxy| proxy.name == NAME);
    let elsewhere = case.found.proxies.iter().find(|proxy| proxy.name != NAME && case.is_here(proxy));
    let mended = |proxy: &Proxy| Proxy { address: case.place.address.to_owned(), ..proxy.clone() };
    // What is left below our name when only the first table was given another one: exports.
    let is_rest = |proxy: &Proxy| !case.found.stands(&TABLE) && proxy.kind.is_empty() && proxy.address.is_empty();
    let has_more = |proxy: &Proxy| case.found.below(&["proxy_plugins", &proxy.name]).iter().any(|one| one.len() > 2);
    match (named, elsewhere) {
        (Some(proxy), _) if case.is_here(proxy) => {
            findings.push(Finding::good(CHECK, format!("{NAME} is a proxy plugin of containerd")));
            kind(case, proxy, findings);
            Some(proxy.clone())
        }
        (rest, Some(other)) if rest.is_none_or(|rest| is_rest(rest) && !has_more(other)) => {
            findings.push(renamed(case, rest, other));
            None
        }
        (Some(proxy), _) => {
            let what = if proxy.address.is_empty() {
                format!("containerd is not told where {NAME} is: the daemon is at {}", case.place.address)
            } else {
                format!(
                    "containerd looks for {NAME} at {:?}, and the daemon is at {}",
                    proxy.address, case.place.address
                )
            };
            findings.push(Finding::problem(CHECK, what, remedy(&[case.set(&TABLE, &[case.address_line()])])));
            kind(case, proxy, findings);
            Some(mended(proxy))
        }
        (None, _) => {
            findings.push(missing(case));
            let exports = [("root", case.place.root), (ANNOTATIONS, "true")];
            Some(Proxy {
                name: NAME.to_owned(),
                kind: KINDS[0].to_owned(),
                address: case.place.address.to_owned(),
                exports: exports.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
                capabilities: Vec::new(),
            })
        }
    }
}

/// Tables of other plugins that end containerd at its start, and with it us: rests of what was renamed.
pub fn rests(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let is_rest = |proxy: &&Proxy| proxy.name != NAME && proxy.kind.is_empty() && proxy.address.is_empty();
    for proxy in case.found.proxies.iter().filter(is_rest) {
        let table = ["proxy_plugins", proxy.name.as_str()];
        let remove = |one: Vec<&str>| format!("in {}: remove the table {}", case.home(&table), heading(&one));
        let steps: Vec<String> = case.found.below(&table).into_iter().map(remove).collect();
        findings.push(Finding::problem(
            "containerd.type",
            format!(
                "{} has neither type nor address: containerd panics at its start (\"plugin: no type\")",
                heading(&table)
            ),
            remedy(&steps),
        ));
    }
}

/// A table without a `type` that containerd knows ends it at its start, whatever else is there.
fn kind(case: &Case<'_>, proxy: &Proxy, findings: &mut Vec<Finding>) {
    const CHECK: &str = "containerd.type";
    let kind = proxy.kind.as_str();
    let is_other =
        |(short, long, since): &(&str, &str, Version)| (kind == *short || kind == *long) && case.version >= *since;
    if KINDS.contains(&kind) {
        return;
    }
    let table = heading(&TABLE);
    let what = if kind.is_empty() {
        format!("{table} has no type: containerd panics at its start (\"plugin: no type\")")
    } else if OTHER_KINDS.iter().any(is_other) {
        format!("{table} has the type {kind:?}: containerd does not take it for a snapshotter")
    } else {
        format!(
            "{table} has the type {kind:?}, which containerd does not know: it panics at its start (\"plugin: no type\")"
        )
    };
    findings.push(Finding::problem(CHECK, what, remedy(&[case.set(&TABLE, &[kind_line()])])));
}

fn renamed(case: &Case<'_>, rest: Option<&Proxy>, other: &Proxy) -> Finding {
    let table = ["proxy_plugins", &other.name];
    let mut pairs = vec![(heading(&TABLE), heading(&table))];
    for old in case.found.below(&table).into_iter().filter(|old| old.len() > 2) {
        let new = [&TABLE, &old[2..]].concat();
        pairs.push((heading(&new), heading(&old)));
    }
    let names = |name: &str| format!("snapshotter = \"{name}\"");
    let is_meant = |name: &str| name == other.name;
    let is_used = case.found.snapshotter.as_deref().is_some_and(is_meant)
        || case.found.unpack.iter().flatten().any(|one| is_meant(&one.snapshotter));
    if is_used {
        pairs.push((names(NAME), names(&other.name)));
    }
    let panics = match rest {
        Some(_) => format!("; {} has no type, and containerd panics at its start", heading(&TABLE)),
        None => String::new(),
    };
    Finding::problem(
        "containerd.plugin",
        format!(
            "the proxy plugin is called {:?}: nerdctl, and every page but its own, know it as {NAME}{panics}",
            other.name
        ),
        remedy(&[case.replace(&table, &pairs)]),
    )
}

fn missing(case: &Case<'_>) -> Finding {
    let unread = case.place.registration.map(Path::new).filter(|one| !case.found.files.iter().any(|file| file == one));
    // containerd reads what our package installs where its own file imports it.
    let all = unread.map(|file| file.with_file_name("*.toml"));
    let step = match (all, case.found.has_imports) {
        (Some(all), true) => format!("in {}, add to the list imports: {all:?}", case.file),
        (Some(all), false) => format!("as the first line of {}: imports = [{all:?}]", case.file),
        (None, _) => {
            let mut lines = vec![heading(&TABLE), format!("  {}", kind_line()), format!("  {}", case.address_line())];
            if case.version.has_exports() {
                lines.push(format!("  {}", heading(&EXPORTS)));
                lines.push(format!("    {}", case.root_line()));
            }
            if case.version.has_transfer() {
                lines.push(format!("    {}", annotations_line()));
            }
            case.add(&TABLE, &lines.join("\n"))
        }
    };
    let steps: Vec<String> = case.first_line().into_iter().chain([step]).collect();
    Finding::problem("containerd.plugin", "containerd does not know this snapshotter", remedy(&steps))
}

pub fn exports(case: &Case<'_>, proxy: &Proxy, findings: &mut Vec<Finding>) {
    const CHECK: &str = "containerd.exports";
    if !case.version.has_exports() {
        return;
    }
    let remedy = || remedy(&[case.set(&EXPORTS, &[case.root_line()])]);
    match proxy.exports.get("root") {
        Some(root) if Path::new(root) == Path::new(case.place.root) => {
            findings.push(Finding::good(CHECK, "kubelet sees the disk of the snapshots"));
        }
        Some(root) => findings.push(Finding::warning(
            CHECK,
            format!("kubelet is told that snapshots are in {root:?}, and they are in {}", case.place.root),
            remedy(),
        )),
        None => findings.push(Finding::warning(
            CHECK,
            "kubelet is not told where snapshots are: it reports \"invalid capacity 0 on image filesystem\" and does not watch that disk",
            remedy(),
        )),
    }
}

pub fn capabilities(case: &Case<'_>, proxy: &Proxy, findings: &mut Vec<Finding>) {
    let declared = |name: &str| proxy.capabilities.iter().any(|one| one == name);
    let mut refuse = |name: &str, why: &str| {
        let step = format!("in {}: remove \"{name}\" from capabilities of {}", case.home(&TABLE), heading(&TABLE));
        findings.push(Finding::problem(
            "containerd.capabilities",
            format!("the capability {name:?} is declared for {NAME}: {why}"),
            remedy(&[step]),
        ));
    };
    if declared("rebase") && case.version >= Version::REBASE {
        refuse("rebase", "layers would be recorded without their parents");
    }
    for name in ["remap-ids", "only-remap-ids"] {
        if declared(name) {
            refuse(name, "files of CernVM-FS cannot be id-mapped, and pods with user namespaces would not start");
        }
    }
}
