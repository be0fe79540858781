//! Files with something wrong, what is said of them, and what to do about it.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::*;
use crate::cli;
use crate::doctor::State;

const PLACE: Place<'_> = Place { address: "/run/s.sock", root: "/var/lib/s", registration: None };
const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]\ntype = \"snapshot\"\naddress = \"/run/s.sock\"\n";
const EXPORTS: &str = "[proxy_plugins.cvmfs-snapshotter.exports]\nroot = \"/var/lib/s\"\n";
const REMOTE: &str = "enable_remote_snapshot_annotations = \"true\"\n";
const CRI_1: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"cvmfs-snapshotter\"\n";
const CRI_2: &str = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"cvmfs-snapshotter\"\n";
const SAYS: &str = "disable_snapshot_annotations = false\n";
const UNPACK: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux\"\n\
                      snapshotter = \"cvmfs-snapshotter\"\n";
const RUNC_1: &str =
    "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n";

fn parse(parts: &[&str]) -> Configuration {
    let mut found = Configuration::default();
    found.add(Path::new("c"), &parts.concat()).unwrap();
    found
}

fn judged(version: &str, found: &Configuration) -> Vec<Finding> {
    let findings = judge(Version::parse(version).unwrap(), found, &PLACE, "c");
    for one in &findings {
        assert_eq!(one.state >= State::Warning, one.remedy.is_some(), "{one:?}");
        let is_restarted = one.remedy.as_ref().is_none_or(|remedy| remedy.ends_with(&format!("then {RESTART}")));
        assert!(is_restarted || one.check == "containerd.runtimes", "{one:?}");
    }
    findings
}

fn worst_first(findings: &[Finding]) -> Vec<(State, &'static str)> {
    let mut faults: Vec<_> =
        findings.iter().filter(|one| one.state >= State::Warning).map(|one| (one.state, one.check)).collect();
    faults.sort_by(|a, b| b.cmp(a));
    faults
}

/// The checks that find fault, with the worst first.
fn faults(version: &str, parts: &[&str]) -> Vec<(State, &'static str)> {
    worst_first(&judged(version, &parse(parts)))
}

/// The remedy of one check.
#[track_caller]
fn remedy_of(version: &str, check: &str, parts: &[&str]) -> String {
    let findings = judged(version, &parse(parts));
    let one = findings.iter().find(|one| one.check == check && one.remedy.is_some());
    one.unwrap_or_else(|| panic!("no {check} in {findings:?}")).remedy.clone().unwrap()
}

#[test]
fn the_configurations_of_the_documentation_are_good() {
    let place = Place { address: cli::DEFAULT_ADDRESS, root: cli::DEFAULT_ROOT, registration: None };
    let client_1 = include_str!("../../../docs/containerd/client-1.toml");
    let client_2 = include_str!("../../../docs/containerd/client-2.toml");
    let transfer = include_str!("../../../docs/containerd/transfer.toml");
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
    let with_scheme = PROXY.replace("/run", "unix:///run");
    let no_type = PROXY.replace("type = \"snapshot\"\n", "");
    let content = PROXY.replace("snapshot\"", "content\"");
    let no_address = PROXY.replace("address = \"/run/s.sock\"\n", "");
    let arm = UNPACK.replace("linux", if cfg!(target_arch = "aarch64") { "linux/amd64" } else { "linux/arm64" });
    let no_platform = UNPACK.replace("platform = \"linux\"\n", "");
    let annotations = [(Problem, "containerd.annotations")];
    let platform = [(Problem, "containerd.platform")];
    let kind = [(Problem, "containerd.type")];
    let format = [(Problem, "containerd.format")];
    for (version, parts, expected) in [
        ("1.7.24", &[CRI_1, SAYS][..], &plugin[..]),
        ("1.7.24", &[CRI_1, SAYS, &wrong_name], &plugin),
        ("1.7.24", &[CRI_1, SAYS, &wrong_address], &[(Problem, "containerd.plugin"), (Warning, "containerd.exports")]),
        ("1.7.24", &[CRI_1, SAYS, &wrong_address, EXPORTS], &plugin),
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
        ("2.1.9", &[CRI_1, SAYS, RUNC_1, PROXY, EXPORTS], &[]),
        ("1.6.20", &[CRI_1, SAYS, &no_type], &kind),
        ("1.7.24", &[CRI_1, SAYS, &no_type, EXPORTS], &kind),
        ("1.7.24", &[CRI_1, SAYS, &content, EXPORTS], &kind),
        ("2.3.6", &[CRI_2, UNPACK, &no_type, EXPORTS, REMOTE], &kind),
        ("1.7.24", &[CRI_1, SAYS, &no_address, EXPORTS], &plugin),
        ("1.6.33", &[CRI_1, SAYS, &with_scheme, EXPORTS], &[]),
        ("1.7.24", &[CRI_1, SAYS, &with_scheme, EXPORTS], &plugin),
        ("2.3.6", &[CRI_2, SAYS, &with_scheme, EXPORTS], &[]),
        ("1.7.24", &[CRI_1, SAYS, EXPORTS], &[(Problem, "containerd.type"), (Problem, "containerd.plugin")]),
        ("1.7.24", &[CRI_1, SAYS, &wrong_name, EXPORTS], &plugin),
        ("1.6.20", &[CRI_1, SAYS, PROXY, &EXPORTS.replace("cvmfs-snapshotter", "cvmfs")], &kind),
        ("2.3.6", &[CRI_2, &arm, PROXY, EXPORTS, REMOTE], &platform),
        ("2.1.9", &[CRI_2, &no_platform, PROXY, EXPORTS, REMOTE], &platform),
        ("2.1.9", &[CRI_2, UNPACK, &arm, PROXY, EXPORTS, REMOTE], &platform),
        ("2.0.7", &[CRI_2, SAYS, &arm, PROXY, EXPORTS], &[]),
        ("2.3.6", &[CRI_2, "use_local_image_pull = true\n", UNPACK, PROXY, EXPORTS, REMOTE], &annotations),
        ("2.1.9", &[CRI_2, "discard_unpacked_layers = true\n", UNPACK, PROXY, EXPORTS, REMOTE], &annotations),
        ("2.1.9", &[CRI_2, "max_concurrent_downloads = 4\n", UNPACK, PROXY, EXPORTS, REMOTE], &annotations),
        ("2.1.9", &[CRI_2, "max_concurrent_downloads = 3\n", UNPACK, PROXY, EXPORTS, REMOTE], &[]),
        ("2.1.9", &[CRI_2, "max_concurrent_downloads = 4\n", SAYS, PROXY, EXPORTS], &[]),
        ("1.7.24", &["version = 3\n", CRI_1, SAYS, PROXY, EXPORTS], &format),
        ("2.2.9", &["version = 4\n", CRI_2, SAYS, PROXY, EXPORTS], &format),
        ("2.3.6", &["version = 4\n", CRI_2, SAYS, PROXY, EXPORTS], &[]),
    ] {
        assert_eq!(faults(version, parts), expected, "{version} {parts:?}");
    }
}

#[test]
fn what_containerd_passes_over_is_told_by_what_it_says_that_it_uses() {
    let dump = |snapshotter: &str| {
        format!("[plugins.'io.containerd.cri.v1.images']\nsnapshotter = '{snapshotter}'\n{PROXY}{EXPORTS}")
    };
    let old = |snapshotter: &str| {
        dump(snapshotter).replace("'io.containerd.cri.v1.images'", "\"io.containerd.grpc.v1.cri\".containerd")
    };
    let check = |version: &str, said: &[&str], dump: &str| {
        let found = Configuration::of_dump(dump, &parse(said)).unwrap();
        let findings = judged(version, &found);
        let remedy = findings.iter().find_map(|one| one.remedy.clone());
        (worst_first(&findings), remedy.unwrap_or_default())
    };
    // 1.x, without the line that says which tables these are.
    let (faults, remedy) = check("1.7.24", &[CRI_1, SAYS, PROXY, EXPORTS], &old("overlayfs"));
    assert_eq!(faults, [(State::Problem, "containerd.format")]);
    assert_eq!(remedy, format!("as the first line of c: version = 2, then {RESTART}"));
    let (_, remedy) = check("1.7.24", &["version = 1\n", CRI_1, SAYS, PROXY, EXPORTS], &old("overlayfs"));
    assert_eq!(remedy, format!("in c: version = 2 instead of version = 1, then {RESTART}"));
    // The tables of containerd 2 for 1.6, which does not look at the number.
    let (faults, remedy) = check("1.6.20", &["version = 3\n", CRI_2, SAYS, PROXY, EXPORTS], &old("overlayfs"));
    assert_eq!(faults, [(State::Problem, "containerd.snapshotter")]);
    assert!(
        remedy.contains("[plugins.\"io.containerd.grpc.v1.cri\".containerd] (add it if it is not there):\n"),
        "{remedy}"
    );
    assert!(remedy.contains(SAYS.trim_end()), "{remedy}");
    // And the other way.
    let (faults, remedy) = check("2.1.9", &["version = 2\n", CRI_1, SAYS, PROXY, EXPORTS], &dump(""));
    assert_eq!(faults, [(State::Problem, "containerd.snapshotter")]);
    assert!(remedy.contains("[plugins.'io.containerd.cri.v1.images'] (add it if it is not there):\n"), "{remedy}");
    assert!(remedy.contains(SAYS.trim_end()), "{remedy}");
}

#[test]
fn a_remedy_says_what_happens_and_which_key_does_it() {
    let what = |version: &str, parts: &[&str]| {
        let findings = judged(version, &parse(parts));
        findings.into_iter().find(|one| one.check == "containerd.annotations").unwrap().what
    };
    let keys = [
        "use_local_image_pull = true",
        "discard_unpacked_layers = true",
        "image_pull_with_sync_fs = true",
        "max_concurrent_downloads = 10",
        "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.\"docker.io\"]",
        "[plugins.'io.containerd.cri.v1.images'.registry.configs.\"docker.io\"]",
        "[plugins.'io.containerd.cri.v1.images'.registry.auths.\"docker.io\"]",
    ];
    for key in keys {
        let found = what("2.3.6", &[CRI_2, key, "\n", UNPACK, PROXY, EXPORTS, REMOTE]);
        let name =
            if key.starts_with('[') { &key[key.find("registry").unwrap()..key.find(".\"").unwrap()] } else { key };
        assert!(found.starts_with(&format!("{name} makes containerd pull by its client")), "{key}: {found}");
    }
    // In a file for containerd 1.
    for (before, key) in [
        ("\"io.containerd.grpc.v1.cri\"", "max_concurrent_downloads = 10"),
        ("\"io.containerd.grpc.v1.cri\".containerd", "discard_unpacked_layers = true"),
    ] {
        let parts = [format!("[plugins.{before}]\n{key}\n"), CRI_2.to_owned(), PROXY.to_owned(), EXPORTS.to_owned()];
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        assert!(what("2.1.9", &parts).starts_with(key), "{key}");
    }
    assert!(what("2.3.6", &[CRI_2, PROXY, EXPORTS, REMOTE]).contains("fails with \"no unpack platforms defined\""));
    assert!(what("2.3.6", &[CRI_2, PROXY, EXPORTS]).contains("fails with"));
    assert!(what("2.3.6", &[CRI_2, UNPACK, PROXY, EXPORTS]).contains("every layer is downloaded"));
    assert!(what("2.3.6", &[UNPACK, PROXY, EXPORTS]).contains("nerdctl 2.3 and later download every layer"));
    assert!(what("2.3.6", &[PROXY, EXPORTS]).contains("nerdctl 2.3 and later stop with"));
}

#[test]
fn a_remedy_speaks_of_what_stands_in_the_file() {
    let says = format!("disable_snapshot_annotations = false, then {RESTART}");
    let old = "table [plugins.\"io.containerd.grpc.v1.cri\".containerd]";
    let new = "table [plugins.'io.containerd.cri.v1.images']";
    // The table that counts, by the format of the file.
    for (version, parts, table) in [
        ("1.7.24", &["version = 2\n", CRI_1, PROXY, EXPORTS][..], old),
        ("2.0.7", &["version = 3\n", CRI_2, PROXY, EXPORTS], new),
        ("2.0.7", &["version = 2\n", CRI_1, RUNC_1, PROXY, EXPORTS], old),
    ] {
        assert_eq!(remedy_of(version, "containerd.annotations", parts), format!("in c, {table}: {says}"));
    }
    let exports = |parts: &[&str]| remedy_of("1.7.24", "containerd.exports", parts);
    let wrong = EXPORTS.replace("/s\"", "/other\"");
    let table = "in c, table [proxy_plugins.cvmfs-snapshotter.exports]";
    let line = format!(": root = \"/var/lib/s\", then {RESTART}");
    assert_eq!(exports(&[CRI_1, SAYS, PROXY, &wrong]), format!("{table}{line}"));
    assert_eq!(exports(&[CRI_1, SAYS, PROXY]), format!("{table} (add it if it is not there){line}"));

    // Each table of a plugin with another name, and who names it.
    let other = |text: &str| text.replace("cvmfs-snapshotter", "cvmfs");
    assert_eq!(
        remedy_of("1.7.24", "containerd.plugin", &[&other(CRI_1), SAYS, &other(PROXY), &other(EXPORTS)]),
        format!(
            "in c: [proxy_plugins.cvmfs-snapshotter] instead of [proxy_plugins.cvmfs], \
             [proxy_plugins.cvmfs-snapshotter.exports] instead of [proxy_plugins.cvmfs.exports], \
             snapshotter = \"cvmfs-snapshotter\" instead of snapshotter = \"cvmfs\", then {RESTART}"
        )
    );
    // Debian's 1.6 knows no exports, and ends at their table all the same.
    let said = parse(&[CRI_1, SAYS, &other(PROXY), &other(EXPORTS)]);
    let used = Configuration::of_dump(&[CRI_1, SAYS, &other(PROXY)].concat(), &said).unwrap();
    assert!(
        judged("1.6.20", &used)
            .iter()
            .any(|one| one.remedy.as_ref().is_some_and(|all| all.contains(".exports] instead of")))
    );
    let rest = [CRI_1, SAYS, PROXY, EXPORTS, &other(EXPORTS)];
    assert_eq!(
        remedy_of("1.6.20", "containerd.type", &rest),
        format!("in c: remove the table [proxy_plugins.cvmfs.exports], then {RESTART}")
    );
    // Nothing but exports is left of ours: the other one's first table is renamed, if that has none.
    let halves = [CRI_1, SAYS, &other(PROXY), EXPORTS];
    assert!(
        remedy_of("1.7.24", "containerd.plugin", &halves)
            .starts_with("in c: [proxy_plugins.cvmfs-snapshotter] instead of")
    );
    assert_eq!(faults("1.7.24", &halves), [(State::Problem, "containerd.plugin")]);
    let both = [CRI_1, SAYS, &other(PROXY), &other(EXPORTS), EXPORTS];
    assert!(remedy_of("1.7.24", "containerd.plugin", &both).contains("[proxy_plugins.cvmfs-snapshotter] (add it if"));

    // A table without a type would end containerd at its start: the whole of it is added.
    let block = remedy_of("2.3.6", "containerd.plugin", &[CRI_2, UNPACK]);
    for line in ["type = \"snapshot\"", "address = \"/run/s.sock\"", "root = \"/var/lib/s\"", REMOTE.trim_end()] {
        assert!(block.contains(line), "{block}");
    }
    assert!(!remedy_of("1.6.20", "containerd.plugin", &[CRI_1, SAYS]).contains("exports"), "1.6.20 knows none");

    // In a file that is not there yet, or says nothing.
    for (version, first) in [("1.6.20", true), ("1.7.24", true), ("2.1.9", false)] {
        let whole = remedy_of(version, "containerd.plugin", &[]);
        assert_eq!(whole.starts_with("as the first line of c: version = 2\nadd to c:\n"), first, "{whole}");
    }

    // A list in brackets takes no further table.
    let inline = "[plugins.'io.containerd.transfer.v1.local']\nunpack_config = [{platform = \"linux\", snapshotter = \"overlayfs\"}]\n";
    let unpack = |parts: &[&str]| remedy_of("2.3.6", "containerd.annotations", parts);
    assert!(unpack(&[CRI_2, inline, PROXY, EXPORTS, REMOTE]).starts_with("in c, add to the list unpack_config"));
    let entries = |parts: &[&str]| unpack(parts).matches("unpack_config]]").count();
    assert_eq!(entries(&[CRI_2, PROXY, EXPORTS, REMOTE]), 2, "an entry replaces the default list");
    let overlayfs = UNPACK.replace("cvmfs-snapshotter", "overlayfs");
    assert_eq!(entries(&[CRI_2, &overlayfs, PROXY, EXPORTS, REMOTE]), 1);
}

#[test]
fn the_file_that_a_package_brought_is_to_be_imported() {
    let place = Place { registration: Some("/etc/ours/ours.toml"), ..PLACE };
    let pattern = "/etc/ours/*.toml";
    for (head, remedy) in [
        ("", format!("as the first line of c: imports = [{pattern:?}], then {RESTART}")),
        ("imports = [\"/other\"]\n", format!("in c, add to the list imports: {pattern:?}, then {RESTART}")),
    ] {
        let findings = judge(Version(2, 3, 6), &parse(&[head, CRI_2, UNPACK]), &place, "c");
        let faults: Vec<_> = findings.iter().filter(|one| one.remedy.is_some()).collect();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert_eq!(faults[0].remedy.as_deref(), Some(remedy.as_str()));
    }
}

#[test]
fn a_remedy_names_the_imported_file_whose_word_counts() {
    let mut found = parse(&["imports = [\"i\"]\n", CRI_1]);
    found.add(Path::new("i"), &[PROXY, &EXPORTS.replace("/s\"", "/other\"")].concat()).unwrap();
    let findings = judged("1.7.24", &found);
    let remedy =
        |check: &str| findings.iter().find(|one| one.check == check).and_then(|one| one.remedy.clone()).unwrap();
    assert!(remedy("containerd.exports").starts_with("in i, table [proxy_plugins"), "{findings:?}");
    assert!(remedy("containerd.annotations").starts_with("in c, table [plugins"), "{findings:?}");
}

#[test]
fn names_of_version_1_are_written_out_where_the_version_becomes_2() {
    let docker = "disabled_plugins = [\"cri\", \"zfs\", \"other\"]\nrequired_plugins = [\"restart\"]\n";
    let lists = "in c, above all tables: disabled_plugins = [\"io.containerd.snapshotter.v1.zfs\"]\n\
                 in c, above all tables: required_plugins = [\"io.containerd.internal.v1.restart\"]\n";
    let check = |used: &Configuration, expected: String| {
        let findings = judged("1.7.24", used);
        assert_eq!(worst_first(&findings), [(State::Problem, "containerd.format")]);
        let one = findings.iter().find(|one| one.check == "containerd.format").unwrap();
        assert_eq!(one.remedy.as_ref(), Some(&expected));
        assert!(one.what.contains("disabled_plugins and required_plugins will lack other: add"), "{}", one.what);
    };
    let said = parse(&[docker, CRI_1, SAYS, PROXY, EXPORTS]);
    let used = CRI_1.replace("cvmfs-snapshotter", "overlayfs");
    let used = Configuration::of_dump(&[docker, &used, PROXY, EXPORTS].concat(), &said).unwrap();
    check(&used, format!("as the first line of c: version = 2\n{lists}then {RESTART}"));
    // It is none to containerd.
    let said = parse(&["version = 0\n", docker, CRI_1, SAYS, PROXY, EXPORTS]);
    let used = Configuration { written: said.written, ..used };
    check(&used, format!("in c: version = 2 instead of version = 0\n{lists}then {RESTART}"));
    // Somebody knew the first half of it.
    check(&parse(&["version = 2\n", docker, CRI_1, SAYS, PROXY, EXPORTS]), format!("{lists}then {RESTART}"));
}

#[test]
fn without_a_cri_nothing_else_is_said_of_kubernetes() {
    let of_kubernetes = ["containerd.snapshotter", "containerd.runtimes"];
    let off = |names: &str| format!("disabled_plugins = [{names}]\n");
    let btrfs = "\"io.containerd.snapshotter.v1.btrfs\"";
    for (version, head, names, tables) in [
        ("1.7.24", "version = 2\n", "\"io.containerd.grpc.v1.cri\"", CRI_1),
        ("2.3.6", "version = 3\n", "\"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\"", CRI_2),
        ("2.3.6", "", "\"cri\"", CRI_1),
    ] {
        let disabled = off(&format!("{names}, {btrfs}"));
        let parts = [head, &disabled, tables, SAYS, PROXY, EXPORTS, REMOTE, UNPACK];
        let findings = judged(version, &parse(&parts));
        assert_eq!(worst_first(&findings), [(State::Warning, "containerd.parts")], "{findings:?}");
        assert!(!findings.iter().any(|one| of_kubernetes.contains(&one.check)), "{findings:?}");
        let step = format!("in c, above all tables: {}", off(btrfs).trim_end());
        assert_eq!(remedy_of(version, "containerd.parts", &parts), format!("{step}, then {RESTART}"));

        let findings = judged(version, &parse(&[head, &disabled, PROXY, EXPORTS, REMOTE, UNPACK]));
        assert_eq!(worst_first(&findings), []);
        assert!(findings.iter().any(|one| one.what.ends_with(&format!("To change that, {step}"))), "{findings:?}");
    }
    let parts = ["version = 2\n", &off(btrfs), CRI_1, SAYS, PROXY, EXPORTS];
    assert_eq!(faults("1.7.24", &parts), []);
    let old = CRI_1.replace("io.containerd.grpc.v1.cri", "cri");
    let parts = [&off("\"io.containerd.grpc.v1.cri\""), &old, SAYS, PROXY, EXPORTS];
    assert!(faults("1.7.24", &parts).iter().all(|(_, check)| *check != "containerd.parts"));
}

#[test]
fn a_part_that_nobody_can_do_without_is_found_in_the_list_of_disabled_ones() {
    let list = |names: &str| format!("disabled_plugins = [{names}]\n");
    let (ours, transfer) =
        ("\"io.containerd.snapshotter.v1.cvmfs-snapshotter\"", "\"io.containerd.transfer.v1.local\"");
    let (btrfs, cri) = ("\"io.containerd.snapshotter.v1.btrfs\"", "\"io.containerd.grpc.v1.cri\"");
    let check = |version: &str, head: &str, names: &str, found: Option<&str>| {
        let tables = if version < "2" { CRI_1 } else { CRI_2 };
        let parts = [head, &list(names), tables, SAYS, PROXY, EXPORTS, REMOTE, UNPACK];
        let expected: Vec<_> = found.iter().map(|_| (State::Problem, "containerd.disabled")).collect();
        assert_eq!(faults(version, &parts), expected, "{version}: {names}");
        if let Some(rest) = found {
            let step = format!("in c, above all tables: {}, then {RESTART}", list(rest).trim_end());
            assert_eq!(remedy_of(version, "containerd.disabled", &parts), step);
        }
    };
    check("2.3.6", "version = 3\n", &format!("{ours}, {btrfs}, {transfer}"), Some(btrfs));
    check("2.1.9", "version = 3\n", transfer, Some(""));
    check("2.0.7", "version = 3\n", transfer, None);
    check("1.7.24", "version = 2\n", &format!("{transfer}, {ours}"), Some(transfer));
    // One step for both.
    check("1.7.24", "version = 2\n", &format!("{ours}, {cri}"), Some(""));
    // What nobody names stays away.
    let parts = ["version = 2\n", &list(&format!("{ours}, {cri}")), PROXY, EXPORTS];
    assert!(remedy_of("1.7.24", "containerd.disabled", &parts).contains(&format!(": {}", list(cri).trim_end())));
}

#[test]
fn who_names_us_is_told_apart_from_kubernetes() {
    let others = ["version = 3\n", "[plugins.'io.containerd.cri.v1.images']\n", SAYS, PROXY, EXPORTS];
    assert_eq!(faults("2.4.2", &others), [(State::Warning, "containerd.annotations")]);
    assert_eq!(faults("2.4.2", &["version = 3\n", CRI_2, SAYS, PROXY, EXPORTS]), []);
}

#[test]
fn names_that_are_no_bare_keys_are_quoted() {
    for (name, quoted) in [("my cvmfs", "'my cvmfs'"), ("cvmfs.a", "'cvmfs.a'"), ("d'or", "\"d'or\""), ("a_-1", "a_-1")]
    {
        let proxy = PROXY.replace("cvmfs-snapshotter", &format!("{name:?}"));
        let remedy = remedy_of("1.7.24", "containerd.plugin", &["version = 2\n", CRI_1, SAYS, &proxy]);
        assert!(remedy.contains(&format!("instead of [proxy_plugins.{quoted}]")), "{remedy}");
    }
}

#[test]
fn keys_without_a_heading_are_named_where_they_stand() {
    let (kind, address) = ("type = \"snapshot\"", "address = \"/run/s.sock\"");
    let root = "root = \"/var/lib/s\"";
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\"]";
    for (check, parts, expected) in [
        (
            "containerd.exports",
            vec![CRI_1, SAYS, &format!("[proxy_plugins]\ncvmfs-snapshotter = {{ {kind}, {address} }}\n")],
            format!("table [proxy_plugins], inside the braces of cvmfs-snapshotter: exports.{root}"),
        ),
        (
            "containerd.exports",
            vec![&format!("proxy_plugins = {{ 'cvmfs-snapshotter' = {{ {kind}, {address}, exports = {{}} }} }}\n")],
            format!("above all tables, inside the braces of proxy_plugins.cvmfs-snapshotter.exports: {root}"),
        ),
        (
            "containerd.exports",
            vec![&format!("proxy_plugins.cvmfs-snapshotter.{kind}\nproxy_plugins.cvmfs-snapshotter.{address}\n")],
            format!("above all tables: proxy_plugins.cvmfs-snapshotter.exports.{root}"),
        ),
        (
            "containerd.exports",
            vec![CRI_1, SAYS, PROXY, "exports.other = \"x\"\n"],
            format!("table [proxy_plugins.cvmfs-snapshotter]: exports.{root}"),
        ),
        (
            "containerd.annotations",
            vec![PROXY, EXPORTS, cri, "\ncontainerd.snapshotter = \"cvmfs-snapshotter\"\n", RUNC_1],
            format!("table {cri}: containerd.{}", SAYS.trim_end()),
        ),
        (
            "containerd.annotations",
            vec![PROXY, EXPORTS, cri, "\ncontainerd = { snapshotter = \"cvmfs-snapshotter\" }\n"],
            format!("table {cri}, inside the braces of containerd: {}", SAYS.trim_end()),
        ),
        // Another quote in the heading.
        (
            "containerd.exports",
            vec!["[\"proxy_plugins\".'cvmfs-snapshotter']\n", kind, "\n", address, "\n"],
            format!("table [proxy_plugins.cvmfs-snapshotter.exports] (add it if it is not there): {root}"),
        ),
    ] {
        assert_eq!(remedy_of("1.7.24", check, &parts), format!("in c, {expected}, then {RESTART}"), "{parts:?}");
    }
    let table = "plugins.'io.containerd.transfer.v1.local'";
    for list in [format!("[{table}]\n\"unpack_config\" = []\n"), format!("{table}.unpack_config = []\n")] {
        let unpack = remedy_of("2.3.6", "containerd.annotations", &[&list, CRI_2, PROXY, EXPORTS, REMOTE]);
        assert!(unpack.starts_with("in c, add to the list unpack_config"), "{unpack}");
    }
}

#[test]
fn an_address_below_the_link_var_run_is_the_same() {
    let linked = |text: &str| text.replace("/run", "/var/run");
    assert_eq!(faults("1.7.24", &[CRI_1, SAYS, &linked(PROXY), EXPORTS]), []);
    let place = Place { address: &linked(PLACE.address), ..PLACE };
    let findings = judge(Version(1, 7, 24), &parse(&[CRI_1, SAYS, PROXY, EXPORTS]), &place, "c");
    assert_eq!(worst_first(&findings), []);
    let elsewhere = PROXY.replace("/run", "/var/running");
    assert_eq!(worst_first(&judged("1.7.24", &parse(&[CRI_1, SAYS, &elsewhere, EXPORTS]))).len(), 1);
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
