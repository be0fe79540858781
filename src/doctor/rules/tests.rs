//! Configurations with something wrong, and the checks that find it.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::cli;
use crate::doctor::Severity::{self, Problem, Warning};

const ENDPOINT: DaemonEndpoint<'_> = DaemonEndpoint { address: "/run/s.sock", root: "/var/lib/s" };
const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]\ntype = \"snapshot\"\naddress = \"/run/s.sock\"\n";
const EXPORTS: &str = "[proxy_plugins.cvmfs-snapshotter.exports]\nroot = \"/var/lib/s\"\n";
const REMOTE: &str = "enable_remote_snapshot_annotations = \"true\"\n";
const CRI_1: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"cvmfs-snapshotter\"\n";
const CRI_2: &str = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"cvmfs-snapshotter\"\n";
const CLIENT: &str = "disable_snapshot_annotations = false\n";
const UNPACK: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux\"\n\
                      snapshotter = \"cvmfs-snapshotter\"\n";

/// What is found where containerd makes `dump` of `file`.
fn check_both(version: &str, endpoint: DaemonEndpoint<'_>, dump: &str, file: &str) -> Vec<Finding> {
    let (config, file) = (ContainerdConfig::parse(dump).unwrap(), ContainerdConfig::parse(file).unwrap());
    let findings = check(&RuleContext {
        version: Version::parse(version).unwrap(),
        config: &config,
        file_table: file.table_that_names_us(),
        endpoint,
        has_registration: false,
        file: "c",
    });
    for one in &findings {
        assert_eq!(one.severity >= Warning, one.remedy.is_some(), "{one:?}");
    }
    findings
}

/// The faults, the worst first.
fn faults(findings: &[Finding]) -> Vec<(Severity, &'static str)> {
    let faults = findings.iter().filter(|one| one.severity >= Warning);
    let mut faults: Vec<_> = faults.map(|one| (one.severity, one.check)).collect();
    faults.sort_by(|a, b| b.cmp(a));
    faults
}

fn check_parts(version: &str, parts: &[&str]) -> Vec<Finding> {
    check_both(version, ENDPOINT, &parts.concat(), &parts.concat())
}

#[track_caller]
fn finding(version: &str, check: &str, parts: &[&str]) -> Finding {
    let findings = check_parts(version, parts);
    findings.iter().find(|one| one.check == check).unwrap_or_else(|| panic!("no {check} in {findings:?}")).clone()
}

#[test]
fn configurations_of_the_documentation_have_no_faults() {
    let endpoint = DaemonEndpoint { address: cli::DEFAULT_ADDRESS, root: cli::DEFAULT_ROOT };
    let client_1 = include_str!("../../../docs/containerd/client-1.toml");
    let client_2 = include_str!("../../../docs/containerd/client-2.toml");
    let transfer = include_str!("../../../docs/containerd/transfer.toml");
    for (version, file) in [
        ("1.6.20~ds1", client_1),
        ("1.7.24", client_1),
        ("2.0.7", client_2),
        ("v2.1.9", client_2),
        ("2.1.9", transfer),
        ("2.4.2", transfer),
    ] {
        assert_eq!(faults(&check_both(version, endpoint, file, file)), [], "{version}");
    }
}

const PLUGIN: (Severity, &str) = (Problem, "containerd.plugin");
const ANNOTATIONS: (Severity, &str) = (Problem, "containerd.annotations");

#[track_caller]
fn assert_faults(version: &str, parts: &[&str], expected: &[(Severity, &'static str)]) {
    assert_eq!(faults(&check_parts(version, parts)), expected, "{version} {parts:?}");
}

#[test]
fn faults_of_the_registration_are_found_under_their_names() {
    let exports = (Warning, "containerd.exports");
    let wrong_address: &str = &PROXY.replace("s.sock", "other.sock");
    let with_scheme: &str = &PROXY.replace("/run", "unix:///run");
    let rebase: &str = &format!("{PROXY}capabilities = [\"rebase\"]\n");
    let wrong_name: &str = &PROXY.replace("cvmfs-snapshotter", "cvmfs");
    let linked: &str = &PROXY.replace("/run", "/var/run");
    let content: &str = &PROXY.replace("snapshot\"", "content\"");
    let remap: &str = &rebase.replace("rebase", "remap-ids");
    let wrong_root: &str = &EXPORTS.replace("/s\"", "/other\"");
    for (version, registration, expected) in [
        ("1.7.24", &[][..], &[PLUGIN][..]),
        ("1.7.24", &[wrong_name], &[PLUGIN]),
        ("1.7.24", &[wrong_address], &[PLUGIN, exports]),
        ("1.7.24", &[linked, EXPORTS], &[]),
        ("1.6.33", &[with_scheme, EXPORTS], &[]),
        ("1.7.24", &[with_scheme, EXPORTS], &[PLUGIN]),
        ("2.0.7", &[with_scheme, EXPORTS], &[]),
        ("1.7.24", &[content, EXPORTS], &[(Problem, "containerd.type")]),
        ("1.6.20", &[PROXY], &[]),
        ("1.7.24", &[PROXY], &[exports]),
        ("1.7.24", &[PROXY, wrong_root], &[exports]),
        ("1.7.24", &[remap, EXPORTS], &[(Problem, "containerd.capabilities")]),
        ("2.2.9", &[rebase, EXPORTS], &[(Problem, "containerd.capabilities")]),
        ("2.1.9", &[rebase, EXPORTS], &[]),
    ] {
        let cri = if version < "2" { CRI_1 } else { CRI_2 };
        assert_faults(version, &[&[cri, CLIENT], registration].concat(), expected);
    }
}

#[test]
fn faults_of_the_transfer_service_are_found_under_their_names() {
    let platform = (Problem, "containerd.platform");
    let arm = &UNPACK.replace("linux", if cfg!(target_arch = "aarch64") { "linux/amd64" } else { "linux/arm64" });
    let no_platform = &UNPACK.replace("platform = \"linux\"\n", "");
    let mirrors = "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.\"docker.io\"]\n";
    let downloads = "max_concurrent_downloads = 4\n";
    let told = &[PROXY, EXPORTS, REMOTE].concat();
    for (version, parts, expected) in [
        ("2.0.7", &[CRI_2, PROXY, EXPORTS][..], &[ANNOTATIONS][..]),
        ("2.3.6", &[CRI_2, PROXY, EXPORTS], &[ANNOTATIONS]),
        ("2.3.6", &[CRI_2, UNPACK, PROXY, EXPORTS], &[ANNOTATIONS]),
        ("2.3.6", &[CRI_2, told], &[ANNOTATIONS]),
        ("2.3.6", &[PROXY, EXPORTS], &[(Warning, "containerd.annotations")]),
        ("2.3.6", &[CRI_2, arm, told], &[platform]),
        ("2.1.9", &[CRI_2, no_platform, told], &[platform]),
        ("2.1.9", &[CRI_2, UNPACK, arm, told], &[platform]),
        ("2.0.7", &[CRI_2, CLIENT, arm, PROXY, EXPORTS], &[]),
        ("2.3.6", &[CRI_2, "use_local_image_pull = true\n", UNPACK, told], &[ANNOTATIONS]),
        ("2.1.9", &[CRI_2, "discard_unpacked_layers = true\n", UNPACK, told], &[ANNOTATIONS]),
        ("2.1.9", &[CRI_2, downloads, UNPACK, told], &[ANNOTATIONS]),
        ("2.1.9", &[CRI_2, "max_concurrent_downloads = 3\n", UNPACK, told], &[]),
        ("2.1.9", &[CRI_2, downloads, CLIENT, PROXY, EXPORTS], &[]),
        ("2.1.9", &[CRI_2, mirrors, UNPACK, told], &[ANNOTATIONS]),
    ] {
        assert_faults(version, parts, expected);
    }
}

#[test]
fn faults_of_plugins_and_runtimes_are_found_under_their_names() {
    let disable = |id: &str| format!("disabled_plugins = [\"io.containerd.{id}\"]\n");
    let kata = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\nsnapshotter = \"devmapper\"\n";
    let disabled = (Problem, "containerd.disabled");
    let parts = (Warning, "containerd.parts");
    let no_cri: &str = &disable("grpc.v1.cri");
    let no_images: &str = &disable("cri.v1.images");
    let no_transfer: &str = &disable("transfer.v1.local");
    let no_snapshotter: &str = &disable("snapshotter.v1.cvmfs-snapshotter");
    for (version, text, expected) in [
        ("1.7.24", &[CRI_1, PROXY, EXPORTS][..], &[ANNOTATIONS][..]),
        ("1.7.24", &[CRI_1, CLIENT, kata, PROXY, EXPORTS], &[(Warning, "containerd.runtimes")]),
        ("1.7.24", &[no_cri, CRI_1, CLIENT, PROXY, EXPORTS], &[parts]),
        ("1.7.24", &[no_cri, PROXY, EXPORTS], &[]),
        ("2.3.6", &[no_images, CRI_2, UNPACK, PROXY, EXPORTS, REMOTE], &[parts]),
        ("2.1.9", &[no_transfer, CRI_2, CLIENT, PROXY, EXPORTS], &[disabled]),
        ("2.0.7", &[no_transfer, CRI_2, CLIENT, PROXY, EXPORTS], &[]),
        ("1.7.24", &[no_snapshotter, CRI_1, CLIENT, PROXY, EXPORTS], &[disabled]),
    ] {
        assert_faults(version, text, expected);
    }
}

#[test]
fn table_that_containerd_ignores_is_found_by_comparing_the_file_with_the_dump() {
    let overlayfs = |cri: &str| cri.replace("cvmfs-snapshotter", "overlayfs");
    for (version, file, dump, remedy) in [
        (
            "1.7.24",
            CRI_1,
            CRI_1,
            "version = 2  # above all tables\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n",
        ),
        (
            "1.6.20",
            CRI_2,
            CRI_1,
            "version = 2  # above all tables\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n",
        ),
        ("2.1.9", CRI_1, CRI_2, "[plugins.'io.containerd.cri.v1.images']\n"),
    ] {
        let rest = [CLIENT, UNPACK, PROXY, EXPORTS, REMOTE].concat();
        let findings = check_both(version, ENDPOINT, &format!("{}{rest}", overlayfs(dump)), &format!("{file}{rest}"));
        assert_eq!(faults(&findings), [(Problem, "containerd.snapshotter")], "{version}: {findings:?}");
        let one = findings.iter().find(|one| one.severity == Problem).unwrap();
        assert!(one.remedy.as_ref().unwrap().starts_with(&format!("set in c:\n{remedy}")), "{one:?}");
    }
    // containerd 2 takes the table from an older file if runtimes stand beside it: there the line counts.
    let findings = check_both("2.0.7", ENDPOINT, &[CRI_2, PROXY, EXPORTS].concat(), &[CRI_1, PROXY, EXPORTS].concat());
    let remedy = findings.iter().find_map(|one| one.remedy.as_deref()).unwrap();
    assert!(remedy.contains(CRI_TABLE_1), "{remedy}");
}

#[test]
fn remedy_names_tables_and_lines() {
    let remedy = |version: &str, check: &str, parts: &[&str]| finding(version, check, parts).remedy.unwrap();
    let exports = remedy("1.7.24", "containerd.exports", &[CRI_1, CLIENT, PROXY]);
    assert_eq!(exports, format!("set in c:\n{EXPORTS_TABLE}\n  root = \"/var/lib/s\"\nthen {RESTART}"));
    let whole = remedy("2.3.6", "containerd.plugin", &[CRI_2, UNPACK]);
    for line in ["type = \"snapshot\"", "address = \"/run/s.sock\"", "root = \"/var/lib/s\"", REMOTE.trim_end()] {
        assert!(whole.contains(line), "{whole}");
    }
    assert!(!remedy("1.6.20", "containerd.plugin", &[CRI_1, CLIENT]).contains("exports"), "1.6.20 has no exports");
    let unpack = |parts: &[&str]| remedy("2.3.6", "containerd.annotations", parts).matches("unpack_config]]").count();
    assert_eq!(unpack(&[CRI_2, PROXY, EXPORTS, REMOTE]), 2, "an entry replaces the default list");
    let overlayfs = UNPACK.replace("cvmfs-snapshotter", "overlayfs");
    assert_eq!(unpack(&[CRI_2, &overlayfs, PROXY, EXPORTS, REMOTE]), 1);
    let two = "disabled_plugins = [\"io.containerd.snapshotter.v1.zfs\", \"cvmfs-snapshotter\"]\n";
    let disabled = remedy("1.7.24", "containerd.disabled", &[two, CRI_1, CLIENT, PROXY, EXPORTS]);
    assert!(disabled.contains("\ndisabled_plugins = [\"io.containerd.snapshotter.v1.zfs\"]  #"), "{disabled}");
}

#[test]
fn annotations_advice_differs_for_kubernetes_and_other_clients() {
    let message = |parts: &[&str]| finding("2.3.6", "containerd.annotations", parts).message;
    assert!(message(&[CRI_2, PROXY, EXPORTS, REMOTE]).contains("fails with \"no unpack platforms defined\""));
    assert!(message(&[CRI_2, UNPACK, PROXY, EXPORTS]).contains("every layer is downloaded"));
    assert!(message(&[UNPACK, PROXY, EXPORTS]).contains("nerdctl 2.3 and later download every layer"));
    assert!(message(&[PROXY, EXPORTS]).contains("nerdctl 2.3 and later stop with"));
    let mirrors = "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.\"docker.io\"]\n";
    assert!(
        message(&[CRI_2, mirrors, UNPACK, PROXY, EXPORTS, REMOTE]).starts_with("registry.mirrors makes containerd")
    );
}

#[test]
fn refusal_of_containerd_is_assigned_to_the_check_that_explains_it() {
    for (error, check) in [
        ("panic: plugin: no type", "containerd.type"),
        ("containerd: expected containerd config version equal to or less than `4`, got `7`", "containerd.format"),
        ("containerd: invalid disabled plugin URI \"cri\" expect io.containerd.x.vx", "containerd.format"),
        ("containerd: failed to unmarshal TOML at row 19 column 42", "containerd.config"),
    ] {
        assert_eq!(explain_refusal(error, "c", "dump").check, check, "{error}");
    }
}

#[test]
fn versions_are_parsed_as_distributions_write_them() {
    for (text, version) in [
        ("1.6.20~ds1", Some(Version::new(1, 6, 20))),
        ("v2.2.9", Some(Version::new(2, 2, 9))),
        ("2.4.0-beta.0", Some(Version::new(2, 4, 0))),
        ("2.1", Some(Version::new(2, 1, 0))),
        ("1.7.23-k3s2", Some(Version::new(1, 7, 23))),
        ("2.3.6+unknown", Some(Version::new(2, 3, 6))),
        ("unknown", None),
    ] {
        assert_eq!(Version::parse(text), version, "{text}");
    }
}
