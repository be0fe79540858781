//! What is wrong with containerd's configuration for this snapshotter, by the version of containerd.
//! Pure. `tests/scene/tests/remedies.rs` follows each remedy to the letter, with the real containerd.
#![forbid(unsafe_code)]

mod parts;
mod plugin;
mod pulls;
mod remedy;
#[cfg(test)]
mod tests;

use self::pulls::User;
pub use self::remedy::RESTART;
use super::Finding;
use super::configuration::Configuration;
use crate::migration::rebuild::DEFAULT_NAME as NAME;

/// Of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// Knows the capability `rebase`, from here on.
    const REBASE: Self = Self(2, 2, 0);

    /// `1.6.20~ds1`, `v2.2.9` and the like.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim_start_matches('v').splitn(3, '.').map(|part| {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse().ok()
        });
        Some(Self(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }

    /// The highest version of the format of its file.
    pub fn format(self) -> i64 {
        match self {
            Self(..2, ..) => 2,
            Self(2, ..3, _) => 3,
            Self(..) => 4,
        }
    }

    /// Knows `exports` of a proxy plugin.
    fn has_exports(self) -> bool {
        match self {
            Self(1, 6, patch) => patch >= 32,
            Self(1, 7, patch) => patch >= 16,
            Self(major, ..) => major >= 2,
        }
    }

    /// Can pull by its transfer service for remote snapshotters.
    fn has_transfer(self) -> bool {
        self >= Self(2, 1, 0)
    }
}

/// What our package installs for containerd to import.
pub const REGISTRATION: &str = "/etc/containerd/conf.d/cvmfs-snapshotter.toml";

/// Where we are, as containerd has to be told.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    pub address: &'a str,
    pub root: &'a str,
    /// The file that registers us, where there is one.
    pub registration: Option<&'a str>,
}

/// What is judged.
struct Case<'a> {
    version: Version,
    found: &'a Configuration,
    place: &'a Place<'a>,
    /// What the admin would edit, where the main file has to be changed.
    file: &'a str,
}

/// `file` is what the admin would edit.
pub fn judge(version: Version, found: &Configuration, place: &Place<'_>, file: &str) -> Vec<Finding> {
    let case = Case { version, found, place, file };
    let mut findings = Vec::new();
    let is_read = pulls::format(&case, &mut findings);
    plugin::rests(&case, &mut findings);
    let Some(proxy) = plugin::look(&case, &mut findings) else { return findings };
    plugin::exports(&case, &proxy, &mut findings);
    plugin::capabilities(&case, &proxy, &mut findings);
    if !is_read {
        return findings;
    }
    parts::needed(&case, &mut findings);
    if !parts::has_cri(&case, &mut findings) {
        pulls::annotations(&case, &proxy, User::Others, &mut findings);
        pulls::platforms(&case, &mut findings);
        return findings;
    }
    let is_of_cri = pulls::snapshotter(&case, &mut findings);
    let user = if is_of_cri { User::Kubernetes } else { User::Others };
    pulls::annotations(&case, &proxy, user, &mut findings);
    pulls::platforms(&case, &mut findings);
    let strangers: Vec<String> = found
        .of_runtimes
        .iter()
        .filter(|(_, other)| is_of_cri != (other == NAME))
        .map(|(runtime, other)| format!("{runtime}: {other}"))
        .collect();
    if !strangers.is_empty() {
        findings.push(Finding::warning(
            "containerd.runtimes",
            format!("runtimes with a snapshotter of their own: {}", strangers.join(", ")),
            "containerd mixes up the images of different snapshotters: one snapshotter on a node is what works everywhere; \
             if you need both, pull the pause image and each image with the one that its runtime uses",
        ));
    }
    findings
}
