//! What containerd is told not to start, or not to start without: `disabled_plugins`, `required_plugins`.
//! What happens was seen with 1.6, 1.7, 2.1 and 2.3.
#![forbid(unsafe_code)]

use super::remedy::remedy;
use super::{Case, Version};
use crate::doctor::Finding;
use crate::doctor::configuration::{CRI_PARTS, DISABLED, PluginList, TRANSFER_TABLE};
use crate::migration::rebuild::DEFAULT_NAME as NAME;

/// Names of version 1 of the format, and what containerd 2 makes of them (`v1Migrate`).
const KINDS: [(&str, &str); 16] = [
    ("cri", "io.containerd.grpc.v1"),
    ("cgroups", "io.containerd.monitor.v1"),
    ("linux", "io.containerd.runtime.v1"),
    ("scheduler", "io.containerd.gc.v1"),
    ("bolt", "io.containerd.metadata.v1"),
    ("task", "io.containerd.runtime.v2"),
    ("opt", "io.containerd.internal.v1"),
    ("restart", "io.containerd.internal.v1"),
    ("tracing", "io.containerd.internal.v1"),
    ("otlp", "io.containerd.tracing.processor.v1"),
    ("aufs", "io.containerd.snapshotter.v1"),
    ("btrfs", "io.containerd.snapshotter.v1"),
    ("devmapper", "io.containerd.snapshotter.v1"),
    ("native", "io.containerd.snapshotter.v1"),
    ("overlayfs", "io.containerd.snapshotter.v1"),
    ("zfs", "io.containerd.snapshotter.v1"),
];

/// Version 2 of the format and later want all names long, and end containerd otherwise.
fn is_short(name: &str) -> bool {
    name.split('.').count() < 4
}

fn long(name: &str) -> Option<String> {
    if !is_short(name) {
        return Some(name.to_owned());
    }
    KINDS.iter().find(|(short, _)| *short == name).map(|(short, kind)| format!("{kind}.{short}"))
}

/// In a file of version 1 containerd 1 passes over long names.
fn takes_short_names(case: &Case<'_>) -> bool {
    case.version < Version(2, 0, 0) && case.format() < 2
}

fn disables_cri(case: &Case<'_>, list: &PluginList) -> bool {
    let parts = if takes_short_names(case) { &CRI_PARTS[3..] } else { &CRI_PARTS };
    list.key == DISABLED && list.names.iter().any(|name| parts.contains(&name.as_str()))
}

/// The list without what keeps the CRI away.
fn with_cri(list: &PluginList) -> impl Iterator<Item = &String> {
    let goes = |name: &str| list.key == DISABLED && (CRI_PARTS.contains(&name) || is_ours(name));
    list.names.iter().filter(move |name| !goes(name))
}

fn is_ours(name: &str) -> bool {
    name == NAME || name.strip_suffix(NAME) == Some("io.containerd.snapshotter.v1.")
}

/// What becomes of containerd without a part that this snapshotter cannot do without.
fn loss(case: &Case<'_>, name: &str) -> Option<&'static str> {
    if is_ours(name) && takes_short_names(case) == is_short(name) {
        Some("containerd does not load this snapshotter")
    } else if name == TRANSFER_TABLE && case.version.has_transfer() {
        Some("without its transfer service the CRI of containerd does not start, and \"ctr images pull\" fails")
    } else {
        None
    }
}

/// Parts without which nobody can use us, in the list of what containerd is not to start.
pub fn needed(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for list in case.found.written.plugins.iter().filter(|list| list.key == DISABLED) {
        let Some((name, loss)) = list.names.iter().find_map(|name| Some((name, loss(case, name)?))) else { continue };
        // Also what another finding takes away, so that neither brings back what the other one removed.
        let goes = |name: &str| self::loss(case, name).is_some() || names_us(case) && CRI_PARTS.contains(&name);
        let rest: Vec<&String> = list.names.iter().filter(|name| !goes(name)).collect();
        let what = format!("{DISABLED} has {name:?}: {loss}");
        let step = case.list(list.file, list.key, &rest);
        findings.push(Finding::problem("containerd.disabled", what, remedy(&[step])));
    }
}

/// Kubernetes is to use us, as the file has it.
fn names_us(case: &Case<'_>) -> bool {
    let is_named = |name: &Option<String>| name.as_deref() == Some(NAME);
    is_named(&case.found.snapshotter) || is_named(&case.found.written.snapshotter)
}

/// Short names, as the file would have to say them in version 2.
pub struct Renamed {
    /// As they are written now.
    pub keys: Vec<&'static str>,
    pub steps: Vec<String>,
    /// Of these nobody knows the long name here, and they are left out.
    pub strange: Vec<String>,
}

impl Renamed {
    /// What is to be said of those.
    pub fn loss(&self) -> String {
        if self.strange.is_empty() {
            return String::new();
        }
        let lists = self.keys.join(" and ");
        let names = self.strange.join(", ");
        format!("; {lists} will lack {names}: add TYPE.ID as \"ctr plugins ls\" has them, if you need that")
    }
}

pub fn renamed(case: &Case<'_>) -> Renamed {
    let mut all = Renamed { keys: Vec::new(), steps: Vec::new(), strange: Vec::new() };
    for list in case.found.written.plugins.iter().filter(|list| list.names.iter().any(|name| is_short(name))) {
        let names: Vec<String> = with_cri(list).filter_map(|name| long(name)).collect();
        all.steps.push(case.list(list.file, list.key, &names));
        all.strange.extend(list.names.iter().filter(|name| long(name).is_none()).cloned());
        if !all.keys.contains(&list.key) {
            all.keys.push(list.key);
        }
    }
    all
}

/// Whether containerd has a CRI: without one nothing is to be said of Kubernetes.
pub fn has_cri(case: &Case<'_>, findings: &mut Vec<Finding>) -> bool {
    const CHECK: &str = "containerd.parts";
    let mut lists: Vec<&PluginList> =
        case.found.written.plugins.iter().filter(|list| disables_cri(case, list)).collect();
    if lists.is_empty() {
        return true;
    }
    // Said already, with the same step.
    lists.retain(|list| !list.names.iter().any(|name| loss(case, name).is_some()));
    let steps: Vec<String> =
        lists.iter().map(|list| case.list(list.file, list.key, &with_cri(list).collect::<Vec<_>>())).collect();
    if steps.is_empty() {
        return false;
    }
    findings.push(if names_us(case) {
        let what = "the CRI of containerd is disabled, although its snapshotter is named: Kubernetes cannot use this containerd";
        Finding::warning(CHECK, what, remedy(&steps))
    } else {
        let what = format!(
            "the CRI of containerd is disabled: only who names {NAME} gets it (nerdctl --snapshotter). To change that, {}",
            steps.join("\n")
        );
        Finding::note(CHECK, what)
    });
    false
}
