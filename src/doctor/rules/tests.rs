//! Configurations with something wrong, and the checks that find it.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::cli;
use crate::doctor::Severity::{self, Problem, Warning};

const ADDRESS: &str = "/run/s.sock";
const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]\ntype = \"snapshot\"\naddress = \"/run/s.sock\"\n";
const EXPORTS: &str = "[proxy_plugins.cvmfs-snapshotter.exports]\nroot = \"/var/lib/s\"\n";
const REMOTE: &str = "enable_remote_snapshot_annotations = \"true\"\n";
const CRI_1: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"cvmfs-snapshotter\"\n";
const CRI_2: &str = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"cvmfs-snapshotter\"\n";
const CLIENT: &str = "disable_snapshot_annotations = false\n";
const UNPACK: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux\"\n\
                      snapshotter = \"cvmfs-snapshotter\"\n";

/// What is found where containerd makes `dump` of `file`.
fn check_both(version: &str, [address, root]: [&str; 2], dump: &str, file: &str) -> Vec<Finding> {
    let (config, file) = (ContainerdConfig::parse(dump).unwrap(), ContainerdConfig::parse(file).unwrap());
    let (version, file_table) = (Version::parse(version).unwrap(), file.table_that_names_us());
    check(&RuleContext { version, config: &config, file_table, address, root, file: "c" })
}

/// The faults, the worst first.
fn faults(findings: &[Finding]) -> Vec<(Severity, &'static str)> {
    let faults = findings.iter().filter(|one| one.remedy.is_some());
    let mut faults: Vec<_> = faults.map(|one| (one.severity, one.check)).collect();
    faults.sort_by(|a, b| b.cmp(a));
    faults
}

fn check_parts(version: &str, parts: &[&str]) -> Vec<Finding> {
    check_both(version, [ADDRESS, "/var/lib/s"], &parts.concat(), &parts.concat())
}

#[test]
fn configurations_of_the_documentation_have_no_faults() {
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
        let findings = check_both(version, [cli::DEFAULT_ADDRESS, cli::DEFAULT_ROOT], file, file);
        assert_eq!(faults(&findings), [], "{version}");
        for check in ["containerd.plugin", "containerd.snapshotter", "containerd.annotations"] {
            assert!(
                findings.iter().any(|one| one.check == check && one.severity == Severity::Good),
                "{version} {check}"
            );
        }
    }
}

#[test]
fn faults_are_found_under_their_names() {
    const PLUGIN: (Severity, &str) = (Problem, "containerd.plugin");
    const ANNOTATIONS: (Severity, &str) = (Problem, "containerd.annotations");
    const CAPABILITIES: (Severity, &str) = (Problem, "containerd.capabilities");
    const DISABLED: (Severity, &str) = (Problem, "containerd.disabled");
    const PLATFORM: (Severity, &str) = (Problem, "containerd.platform");
    const EXPORT: (Severity, &str) = (Warning, "containerd.exports");
    const PARTS: (Severity, &str) = (Warning, "containerd.parts");
    let client_1: &str = &[CRI_1, CLIENT].concat();
    let registered: &str = &[PROXY, EXPORTS].concat();
    let told: &str = &[PROXY, EXPORTS, REMOTE].concat();
    let with_scheme: &str = &registered.replace("/run", "unix:///run");
    let rebase: &str = &registered.replacen("type", "capabilities = [\"rebase\"]\ntype", 1);
    let arm: &str =
        &UNPACK.replace("linux", if cfg!(target_arch = "aarch64") { "linux/amd64" } else { "linux/arm64/v8" });
    let no_platform: &str = &UNPACK.replace("platform = \"linux\"\n", "");
    let mirrors = "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.\"docker.io\"]\n";
    let kata = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\nsnapshotter = \"devmapper\"\n";
    let disable = |id: &str| format!("disabled_plugins = [\"io.containerd.{id}\"]\n");
    let (no_cri, no_images): (&str, &str) = (&disable("grpc.v1.cri"), &disable("cri.v1.images"));
    let (no_transfer, no_snapshotter): (&str, &str) =
        (&disable("transfer.v1.local"), &disable("snapshotter.v1.cvmfs-snapshotter"));
    for (version, parts, expected) in [
        ("1.7.24", &[client_1][..], &[PLUGIN][..]),
        ("1.7.24", &[client_1, &registered.replace("cvmfs-snapshotter", "cvmfs")], &[PLUGIN]),
        ("1.7.24", &[client_1, &PROXY.replace("s.sock", "other.sock")], &[PLUGIN, EXPORT]),
        ("1.7.24", &[client_1, &registered.replace("/run", "/var/run")], &[]),
        ("1.6.33", &[client_1, with_scheme], &[]),
        ("1.7.24", &[client_1, &registered.replace("snapshot\"", "content\"")], &[(Problem, "containerd.type")]),
        ("1.6.20", &[client_1, PROXY], &[]),
        ("1.7.24", &[client_1, PROXY], &[EXPORT]),
        ("1.7.24", &[client_1, &registered.replace("/s\"", "/other\"")], &[EXPORT]),
        ("1.7.24", &[client_1, &rebase.replace("rebase", "remap-ids")], &[CAPABILITIES]),
        ("2.2.9", &[CRI_2, CLIENT, rebase], &[CAPABILITIES]),
        ("1.7.24", &[CRI_1, registered], &[ANNOTATIONS]),
        ("1.7.24", &[client_1, kata, registered], &[(Warning, "containerd.runtimes")]),
        ("1.7.24", &[no_cri, client_1, registered], &[PARTS]),
        ("1.7.24", &[no_cri, registered], &[]),
        ("2.3.6", &[no_images, CRI_2, UNPACK, told], &[PARTS]),
        ("2.1.9", &[no_transfer, CRI_2, CLIENT, registered], &[DISABLED]),
        ("2.0.7", &[no_transfer, CRI_2, CLIENT, registered], &[]),
        ("1.7.24", &[no_snapshotter, client_1, registered], &[DISABLED]),
        ("2.0.7", &[CRI_2, registered], &[ANNOTATIONS]),
        ("2.3.6", &[CRI_2, UNPACK, registered], &[ANNOTATIONS]),
        ("2.3.6", &[CRI_2, told], &[ANNOTATIONS]),
        ("2.3.6", &[registered], &[(Warning, "containerd.annotations")]),
        ("2.3.6", &[CRI_2, arm, told], &[PLATFORM]),
        ("2.1.9", &[CRI_2, no_platform, told], &[PLATFORM]),
        ("2.0.7", &[CRI_2, CLIENT, arm, registered], &[]),
        ("2.3.6", &[CRI_2, &UNPACK.replace("linux", architecture()), told], &[]),
        ("2.3.6", &[CRI_2, &UNPACK.replace("linux", "Linux(6.1)"), told], &[]),
        ("2.3.6", &[CRI_2, "use_local_image_pull = true\n", UNPACK, told], &[ANNOTATIONS]),
        ("2.1.9", &[CRI_2, "max_concurrent_downloads = 4\n", UNPACK, told], &[ANNOTATIONS]),
        ("2.1.9", &[CRI_2, "max_concurrent_downloads = 3\n", UNPACK, told], &[]),
        ("2.1.9", &[CRI_2, "max_concurrent_downloads = 4\n", CLIENT, registered], &[]),
        ("2.1.9", &[CRI_2, mirrors, UNPACK, told], &[ANNOTATIONS]),
    ] {
        assert_eq!(faults(&check_parts(version, parts)), expected, "{version} {parts:?}");
    }
}

#[test]
fn table_that_containerd_ignores_is_found_by_comparing_the_file_with_the_dump() {
    let rest = [CLIENT, UNPACK, PROXY, EXPORTS, REMOTE].concat();
    let table_1 = "version = 2  # above all tables\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n";
    for (version, file, dump, lines) in [
        ("1.7.24", CRI_1, CRI_1, table_1),
        ("1.6.20", CRI_2, CRI_1, table_1),
        ("2.1.9", CRI_1, CRI_2, "[plugins.'io.containerd.cri.v1.images']\n"),
    ] {
        let dump = dump.replace("cvmfs-snapshotter", "overlayfs") + &rest;
        let findings = check_both(version, [ADDRESS, "/var/lib/s"], &dump, &format!("{file}{rest}"));
        assert_eq!(faults(&findings), [(Problem, "containerd.snapshotter")], "{version}: {findings:?}");
        let remedy = findings.iter().find_map(|one| one.remedy.as_deref()).unwrap();
        assert!(remedy.starts_with(&format!("set in c:\n{lines}")), "{remedy}");
    }
    // containerd 2 takes the table from an older file if runtimes stand beside it: there the line counts.
    let (dump, file) = ([CRI_2, PROXY, EXPORTS].concat(), [CRI_1, PROXY, EXPORTS].concat());
    let findings = check_both("2.0.7", [ADDRESS, "/var/lib/s"], &dump, &file);
    assert!(
        findings.iter().any(|one| one.remedy.as_ref().is_some_and(|remedy| remedy.contains(CRI_TABLE_1))),
        "{findings:?}"
    );
}

#[test]
fn remedy_names_tables_and_lines() {
    let remedy =
        |version: &str, parts: &[&str]| check_parts(version, parts).into_iter().find_map(|one| one.remedy).unwrap();
    let exports = remedy("1.7.24", &[CRI_1, CLIENT, PROXY]);
    assert_eq!(exports, format!("set in c:\n{EXPORTS_TABLE}\n  root = \"/var/lib/s\"\nthen {RESTART}"));
    let whole = remedy("2.3.6", &[CRI_2, UNPACK]);
    for line in [TYPE_LINE, "address = \"/run/s.sock\"", "root = \"/var/lib/s\"", ANNOTATIONS_LINE] {
        assert!(whole.contains(line), "{whole}");
    }
    assert!(!remedy("1.6.20", &[CRI_1, CLIENT]).contains("exports"), "1.6.20 has no exports");
    let unpack = |parts: &[&str]| remedy("2.3.6", parts).matches("unpack_config]]").count();
    assert_eq!(unpack(&[CRI_2, PROXY, EXPORTS, REMOTE]), 2, "an entry replaces the default list");
    let overlayfs = UNPACK.replace("cvmfs-snapshotter", "overlayfs");
    assert_eq!(unpack(&[CRI_2, &overlayfs, PROXY, EXPORTS, REMOTE]), 1);
    let two = "disabled_plugins = [\"io.containerd.snapshotter.v1.zfs\", \"cvmfs-snapshotter\"]\n";
    let disabled = remedy("1.7.24", &[two, CRI_1, CLIENT, PROXY, EXPORTS]);
    assert!(disabled.contains("\ndisabled_plugins = [\"io.containerd.snapshotter.v1.zfs\"]  #"), "{disabled}");
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
