//! What is wrong with containerd's configuration for this snapshotter, by the version of containerd.
//! Pure.
#![forbid(unsafe_code)]

use std::path::Path;

use super::Finding;
use super::configuration::{Configuration, Proxy};
use crate::rebuild::DEFAULT_NAME as NAME;

/// Of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// `1.6.20~ds1`, `v2.2.9` and the like.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim_start_matches('v').splitn(3, '.').map(|part| {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse().ok()
        });
        Some(Self(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
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

    /// Knows the capability `rebase`.
    fn has_rebase(self) -> bool {
        self >= Self(2, 2, 0)
    }
}

/// What our package installs; containerd reads it where its own file imports it.
const REGISTRATION: &str = "/etc/containerd/conf.d/cvmfs-snapshotter.toml";

/// What makes containerd read its configuration.
pub const RESTART: &str = "systemctl restart containerd";

/// Where we are, as containerd has to be told.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    pub address: &'a str,
    pub root: &'a str,
}

/// `file` is what the admin would edit.
pub fn judge(version: Version, found: &Configuration, place: &Place<'_>, file: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(proxy) = plugin(found, place, file, &mut findings) else { return findings };
    exports(version, proxy, place, file, &mut findings);
    capabilities(version, proxy, file, &mut findings);
    let is_of_cri = found.snapshotter.as_deref() == Some(NAME);
    if is_of_cri && found.is_of_version_1 && version >= Version(2, 0, 0) {
        findings.push(Finding::problem(
            "containerd.snapshotter",
            format!(
                "containerd 2 passes over {} unless runtimes stand beside it, and Kubernetes uses overlayfs",
                table(Version(1, 0, 0))
            ),
            format!(
                "in {file}: version = 3, and [plugins.{}] instead; docs/containerd.md has the whole file",
                table(version)
            ),
        ));
    } else if is_of_cri {
        findings.push(Finding::good("containerd.snapshotter", format!("Kubernetes' containers use {NAME}")));
    } else {
        let other = found.snapshotter.as_deref().unwrap_or("containerd's own");
        findings.push(Finding::note(
            "containerd.snapshotter",
            format!(
                "Kubernetes' containers use {other} as snapshotter; only who names {NAME} gets it (nerdctl --snapshotter). \
                 To change that, in {file}, table [plugins.{}]: snapshotter = \"{NAME}\"",
                table(version)
            ),
        ));
    }
    annotations(version, found, proxy, is_of_cri, file, &mut findings);
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

/// The table of the CRI's images, as it is written.
fn table(version: Version) -> &'static str {
    if version < Version(2, 0, 0) {
        "\"io.containerd.grpc.v1.cri\".containerd"
    } else {
        "'io.containerd.cri.v1.images'"
    }
}

fn plugin<'c>(
    found: &'c Configuration,
    place: &Place<'_>,
    file: &str,
    findings: &mut Vec<Finding>,
) -> Option<&'c Proxy> {
    const CHECK: &str = "containerd.plugin";
    let block = format!("[proxy_plugins.{NAME}]\n  type = \"snapshot\"\n  address = \"{}\"", place.address);
    // Half of a table that was given another name says nothing.
    let named = found.proxies.iter().find(|proxy| proxy.name == NAME && !proxy.address.is_empty());
    // containerd 2 takes it for an address as well.
    let is_here = |proxy: &Proxy| proxy.address.trim_start_matches("unix://") == place.address;
    let ours = found.proxies.iter().find(|proxy| is_here(proxy));
    match (named, ours) {
        (Some(proxy), _) if is_here(proxy) => {
            findings.push(Finding::good(CHECK, format!("{NAME} is a proxy plugin of containerd")));
            Some(proxy)
        }
        (Some(proxy), _) => {
            findings.push(Finding::problem(
                CHECK,
                format!("containerd looks for {NAME} at {:?}, and the daemon is at {}", proxy.address, place.address),
                format!(
                    "in {file}, table [proxy_plugins.{NAME}]: address = \"{}\", then systemctl restart containerd",
                    place.address
                ),
            ));
            None
        }
        (None, Some(proxy)) => {
            findings.push(Finding::problem(
                CHECK,
                format!("the proxy plugin is called {:?}: nerdctl, and every page but its own, know it as {NAME}", proxy.name),
                format!("in {file}: [proxy_plugins.{NAME}] instead of [proxy_plugins.{}], then systemctl restart containerd", proxy.name),
            ));
            None
        }
        (None, None) => {
            let is_installed =
                Path::new(REGISTRATION).exists() && !found.files.iter().any(|file| file == Path::new(REGISTRATION));
            let lines = match (is_installed, found.has_imports) {
                (true, true) => format!(
                    "add \"/etc/containerd/conf.d/*.toml\" to the list of imports in {file}, for {REGISTRATION} to be read"
                ),
                (true, false) => format!(
                    "as the first line of {file}, for {REGISTRATION} to be read: imports = [\"/etc/containerd/conf.d/*.toml\"]"
                ),
                (false, _) => format!("add to {file}:\n{block}"),
            };
            findings.push(Finding::problem(
                CHECK,
                "containerd does not know this snapshotter",
                format!("{lines}\nthen systemctl restart containerd"),
            ));
            None
        }
    }
}

fn exports(version: Version, proxy: &Proxy, place: &Place<'_>, file: &str, findings: &mut Vec<Finding>) {
    const CHECK: &str = "containerd.exports";
    if !version.has_exports() {
        return;
    }
    let remedy = format!(
        "in {file}, table [proxy_plugins.{NAME}.exports]: root = \"{}\", then systemctl restart containerd",
        place.root
    );
    match proxy.exports.get("root") {
        Some(root) if Path::new(root) == Path::new(place.root) => findings.push(Finding::good(CHECK, "kubelet sees the disk of the snapshots")),
        Some(root) => findings.push(Finding::warning(
            CHECK,
            format!("kubelet is told that snapshots are in {root:?}, and they are in {}", place.root),
            remedy,
        )),
        None => findings.push(Finding::warning(
            CHECK,
            "kubelet is not told where snapshots are: it reports \"invalid capacity 0 on image filesystem\" and does not watch that disk",
            remedy,
        )),
    }
}

fn capabilities(version: Version, proxy: &Proxy, file: &str, findings: &mut Vec<Finding>) {
    const CHECK: &str = "containerd.capabilities";
    let declared = |name: &str| proxy.capabilities.iter().any(|one| one == name);
    let mut refuse = |name: &str, why: &str| {
        findings.push(Finding::problem(
            CHECK,
            format!("the capability {name:?} is declared for {NAME}: {why}"),
            format!(
                "in {file}: remove it from capabilities of [proxy_plugins.{NAME}], then systemctl restart containerd"
            ),
        ));
    };
    if declared("rebase") && version.has_rebase() {
        refuse("rebase", "layers would be recorded without their parents");
    }
    for name in ["remap-ids", "only-remap-ids"] {
        if declared(name) {
            refuse(name, "files of CernVM-FS cannot be id-mapped, and pods with user namespaces would not start");
        }
    }
}

/// Whether containerd says which layers it pulls.
fn annotations(
    version: Version,
    found: &Configuration,
    proxy: &Proxy,
    is_of_cri: bool,
    file: &str,
    findings: &mut Vec<Finding>,
) {
    const CHECK: &str = "containerd.annotations";
    let by_client = found.disable_annotations == Some(false);
    if !version.has_transfer() {
        if by_client {
            findings.push(Finding::good(CHECK, "containerd says which layers Kubernetes pulls"));
        } else if is_of_cri {
            findings.push(Finding::problem(
                CHECK,
                "containerd does not say which layers Kubernetes pulls: every layer is downloaded",
                format!(
                    "in {file}, table [plugins.{}]: disable_snapshot_annotations = false, then systemctl restart containerd",
                    table(version)
                ),
            ));
        }
        return;
    }
    let mut missing = Vec::new();
    if proxy.exports.get("enable_remote_snapshot_annotations").map(String::as_str) != Some("true") {
        // A table must not be written twice.
        let table = format!("[proxy_plugins.{NAME}.exports]");
        let line = "enable_remote_snapshot_annotations = \"true\"";
        missing.push(if proxy.exports.is_empty() {
            format!("{table}\n  {line}")
        } else {
            format!("inside the table {table} that is there:\n  {line}")
        });
    }
    let unpacks = found.unpack.as_ref().is_some_and(|all| all.iter().any(|one| one == NAME));
    if !unpacks {
        let entry = |name: &str| {
            format!(
                "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = \"linux\"\n  snapshotter = \"{name}\""
            )
        };
        missing.push(entry(NAME));
        if found.unpack.is_none() {
            // Any entry replaces the default list.
            missing.push(entry("overlayfs"));
        }
    }
    let lines = format!("add to {file}, then systemctl restart containerd:\n{}", missing.join("\n"));
    match (by_client, missing.is_empty()) {
        (_, true) => findings.push(Finding::good(CHECK, "containerd's transfer service says which layers are pulled")),
        (true, false) => findings.push(Finding::note(
            CHECK,
            "containerd says which layers Kubernetes pulls, by its client; \"ctr images pull\" and nerdctl 2.3 and later, which use \
             the transfer service, download every layer, or stop with \"no unpack platforms defined\"",
        )),
        (false, false) => findings.push(if is_of_cri {
            Finding::problem(CHECK, "containerd does not say which layers are pulled: every layer is downloaded", lines)
        } else {
            Finding::warning(
                CHECK,
                "the transfer service is not set up for this snapshotter: \"ctr images pull\" and nerdctl 2.3 and later download every \
                 layer, or stop with \"no unpack platforms defined\"",
                lines,
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;
    use crate::doctor::State;

    const PLACE: Place<'_> = Place { address: "/run/s.sock", root: "/var/lib/s" };
    const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]\naddress = \"/run/s.sock\"\n";
    const EXPORTS: &str = "[proxy_plugins.cvmfs-snapshotter.exports]\nroot = \"/var/lib/s\"\n";
    const REMOTE: &str = "enable_remote_snapshot_annotations = \"true\"\n";
    const CRI_1: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"cvmfs-snapshotter\"\n";
    const CRI_2: &str = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"cvmfs-snapshotter\"\n";
    const SAYS: &str = "disable_snapshot_annotations = false\n";
    const UNPACK: &str =
        "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nsnapshotter = \"cvmfs-snapshotter\"\n";

    /// The checks that find fault, with the worst first.
    fn faults(version: &str, parts: &[&str]) -> Vec<(State, &'static str)> {
        let mut found = Configuration::default();
        found.add(Path::new("c"), &parts.concat()).unwrap();
        let findings = judge(Version::parse(version).unwrap(), &found, &PLACE, "c");
        let mut faults: Vec<_> =
            findings.iter().filter(|one| one.state >= State::Warning).map(|one| (one.state, one.check)).collect();
        assert!(findings.iter().all(|one| (one.state >= State::Warning) == one.remedy.is_some()), "{findings:?}");
        faults.sort_by(|a, b| b.cmp(a));
        faults
    }

    #[test]
    fn the_configurations_of_the_documentation_are_good() {
        let place = Place { address: cli::DEFAULT_ADDRESS, root: cli::DEFAULT_ROOT };
        let client_1 = include_str!("../../docs/containerd/client-1.toml");
        let client_2 = include_str!("../../docs/containerd/client-2.toml");
        let transfer = include_str!("../../docs/containerd/transfer.toml");
        for (version, file) in [
            ("1.6.20~ds1", client_1),
            ("1.7.24", client_1),
            ("2.0.7", client_2),
            ("v2.1.9", client_2),
            ("2.1.9", transfer),
            ("2.3.6", transfer),
            ("2.4.2", transfer),
        ] {
            let mut found = Configuration::default();
            found.add(Path::new("c"), file).unwrap();
            let findings = judge(Version::parse(version).unwrap(), &found, &place, "c");
            let faults: Vec<_> = findings.iter().filter(|one| one.state >= State::Warning).collect();
            assert!(faults.is_empty(), "{version}: {faults:?}");
        }
    }

    #[test]
    fn each_slip_is_found_under_its_name() {
        use State::{Problem, Warning};
        let wrong_name = PROXY.replace("cvmfs-snapshotter", "cvmfs");
        let wrong_address = PROXY.replace("s.sock", "other.sock");
        let wrong_root = EXPORTS.replace("/s\"", "/other\"");
        let rebase = format!("{PROXY}capabilities = [\"rebase\"]\n");
        let remap = format!("{PROXY}capabilities = [\"remap-ids\"]\n");
        let kata = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\nsnapshotter = \"devmapper\"\n";
        let plugin = [(Problem, "containerd.plugin")];
        let runc = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n";
        for (version, parts, expected) in [
            ("1.7.24", &[CRI_1, SAYS][..], &plugin[..]),
            ("1.7.24", &[CRI_1, SAYS, &wrong_name], &plugin),
            ("1.7.24", &[CRI_1, SAYS, &wrong_address], &plugin),
            ("1.7.24", &[CRI_1, SAYS, PROXY], &[(Warning, "containerd.exports")]),
            ("1.7.24", &[CRI_1, SAYS, PROXY, &wrong_root], &[(Warning, "containerd.exports")]),
            ("1.7.24", &[CRI_1, PROXY, EXPORTS], &[(Problem, "containerd.annotations")]),
            ("1.7.24", &[CRI_1, SAYS, kata, PROXY, EXPORTS], &[(Warning, "containerd.runtimes")]),
            ("2.0.7", &[CRI_2, PROXY, EXPORTS], &[(Problem, "containerd.annotations")]),
            ("2.3.6", &[CRI_2, PROXY, EXPORTS], &[(Problem, "containerd.annotations")]),
            ("2.3.6", &[CRI_2, UNPACK, PROXY, EXPORTS], &[(Problem, "containerd.annotations")]),
            ("2.3.6", &[CRI_2, PROXY, EXPORTS, REMOTE], &[(Problem, "containerd.annotations")]),
            ("2.3.6", &[PROXY, EXPORTS], &[(Warning, "containerd.annotations")]),
            ("2.2.9", &[CRI_2, SAYS, &rebase, EXPORTS], &[(Problem, "containerd.capabilities")]),
            ("1.7.24", &[CRI_1, SAYS, &remap, EXPORTS], &[(Problem, "containerd.capabilities")]),
            ("2.1.9", &[CRI_1, SAYS, PROXY, EXPORTS], &[(Problem, "containerd.snapshotter")]),
            ("2.1.9", &[CRI_1, SAYS, runc, PROXY, EXPORTS], &[]),
        ] {
            assert_eq!(faults(version, parts), expected, "{version} {parts:?}");
        }
    }

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (text, version) in [
            ("1.6.20~ds1", Some(Version(1, 6, 20))),
            ("v2.2.9", Some(Version(2, 2, 9))),
            ("2.4.0-beta.0", Some(Version(2, 4, 0))),
            ("2.1", Some(Version(2, 1, 0))),
            ("1.7.23-k3s2", Some(Version(1, 7, 23))),
            ("unknown", None),
            ("", None),
        ] {
            assert_eq!(Version::parse(text), version, "{text}");
        }
    }
}
