//! The contents of the packages, which are read without installing them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use scene::process::run;

use crate::{find_packages, folder};

/// The mode in the form of `ls`, and owner and group, by name.
type Files = BTreeMap<String, (String, String)>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Deb,
    Rpm,
}

struct Package {
    kind: Kind,
    path: String,
    files: Files,
}

fn packages() -> Vec<Package> {
    let debs = find_packages(&folder(), ".deb").into_iter().map(|path| {
        // drwxr-xr-x root/root 0 2026-11-26 21:15 ./etc/
        let list = run("dpkg-deb", [Path::new("--contents"), &path]).ok();
        let files = list.lines().map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let name = words[5].trim_start_matches('.').trim_end_matches('/');
            (name.to_owned(), (words[0].to_owned(), words[1].to_owned()))
        });
        (Kind::Deb, path, files.filter(|(name, _)| !name.is_empty()).collect())
    });
    let rpms = find_packages(&folder(), ".rpm").into_iter().map(|path| {
        let format = "[%{FILEMODES:perms} %{FILEUSERNAME}/%{FILEGROUPNAME} %{FILENAMES}\n]";
        let list = run("rpm", [Path::new("-qp"), "--queryformat".as_ref(), format.as_ref(), &path]).ok();
        let files = list.lines().map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words[2].to_owned(), (words[0].to_owned(), words[1].to_owned()))
        });
        (Kind::Rpm, path, files.collect())
    });
    let all: Vec<Package> =
        debs.chain(rpms).map(|(kind, path, files)| Package { kind, path: path.display().to_string(), files }).collect();
    assert!(all.len() >= 2, "no packages in {}", folder().display());
    all
}

#[test]
fn every_packaged_file_belongs_to_root_and_has_a_safe_mode() {
    for Package { path, files, .. } in packages() {
        for (file, (mode, owner)) in &files {
            let program = ["/usr/bin/cvmfs-snapshotter", "/usr/libexec/cvmfs-snapshotter/replace-go-unit"];
            let sane = match &mode[..1] {
                "d" => "drwxr-xr-x",
                "l" => "lrwxrwxrwx",
                _ if program.contains(&file.as_str()) => "-rwxr-xr-x",
                _ => "-rw-r--r--",
            };
            assert_eq!((mode.as_str(), owner.as_str()), (sane, "root/root"), "{file} of {path}");
        }
    }
}

#[test]
fn packages_contain_program_units_configuration_pages_and_licences() {
    for Package { kind, path, files } in packages() {
        let licences = if kind == Kind::Deb { "/usr/share/doc" } else { "/usr/share/licenses" };
        let file_name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let here = |folder: &str, end: &str, to: &str, more: &str| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(folder);
            let names = find_packages(&folder, end).iter().filter_map(|path| file_name(path)).collect::<Vec<_>>();
            names.into_iter().map(|name| format!("{to}/{name}{more}")).collect::<Vec<_>>()
        };
        let mut wanted: Vec<String> = [
            "/usr/bin/cvmfs-snapshotter",
            "/usr/bin/cvmfs_snapshotter",
            "/usr/lib/systemd/system/cvmfs-snapshotter.service",
            "/usr/lib/systemd/system/cvmfs-snapshotter.socket",
            "/etc/containerd-cvmfs-grpc/config.toml",
            "/etc/containerd/conf.d/cvmfs-snapshotter.toml",
            "/usr/share/bash-completion/completions/cvmfs-snapshotter",
            "/usr/share/fish/vendor_completions.d/cvmfs-snapshotter.fish",
            "/usr/share/zsh/site-functions/_cvmfs-snapshotter",
            "/usr/share/doc/cvmfs-snapshotter/README.md",
            "/usr/share/doc/cvmfs-snapshotter/SECURITY.md",
            "/usr/share/doc/cvmfs-snapshotter/symlink-only.conf",
            "/usr/share/doc/cvmfs-snapshotter/packaging/prometheus-alerts.yaml",
            "/usr/share/doc/cvmfs-snapshotter/packaging/grafana-dashboard.json",
        ]
        .map(str::to_owned)
        .into();
        wanted.extend(
            ["third-party-licenses.txt.gz", "rust-library.html.gz"]
                .map(|name| format!("{licences}/cvmfs-snapshotter/{name}")),
        );
        wanted.extend(here("docs", ".8", "/usr/share/man/man8", ".gz"));
        wanted.extend(here("docs", ".md", "/usr/share/doc/cvmfs-snapshotter/docs", ""));
        for file in wanted {
            assert!(files.contains_key(&file), "{file} is missing in {path}");
        }
    }
}

/// An administrator's changes are kept because packages say which files are configuration.
#[test]
fn every_packaged_file_in_etc_is_a_configuration_file() {
    for Package { kind, path, files } in packages() {
        let in_etc = files.iter().filter(|(file, (mode, _))| file.starts_with("/etc/") && mode.starts_with('-'));
        let in_etc: BTreeSet<String> = in_etc.map(|(file, _)| file.clone()).collect();
        let kept = if kind == Kind::Deb {
            run("dpkg-deb", ["--info", &path, "conffiles"]).ok()
        } else {
            // The flags are 1 for configuration and 16 for files that an upgrade does not replace.
            let format = "[%{FILEFLAGS} %{FILENAMES}\n]";
            let list = run("rpm", ["-qp", "--queryformat", format, &path]).ok();
            list.lines().filter_map(|line| line.strip_prefix("17 ")).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(kept.lines().map(str::to_owned).collect::<BTreeSet<_>>(), in_etc, "{path}");
        assert_eq!(in_etc.len(), 2, "{path}");
    }
}

/// EL7 has rpm 4.11 of 2013, which refuses features that it does not know.
#[test]
fn rpm_requires_nothing_that_el7_lacks() {
    for rpm in find_packages(&folder(), ".rpm") {
        let rpm = rpm.display().to_string();
        let query = |what: &str| run("rpm", ["-qp", "--queryformat", what, &rpm]).ok();
        let known = ["CompressedFileNames", "FileDigests", "PayloadFilesHavePrefix", "PayloadIsXz"];
        let requires = run("rpm", ["-qp", "--requires", &rpm]).ok();
        for line in requires.lines().filter_map(|line| line.strip_prefix("rpmlib(")) {
            assert!(known.iter().any(|name| line.starts_with(&format!("{name})"))), "{line}");
        }
        assert_eq!(query("%{PAYLOADCOMPRESSOR} %{PAYLOADFORMAT} %{FILEDIGESTALGO}"), "xz cpio 8");
        let weak = "[%{RECOMMENDNAME}][%{SUGGESTNAME}][%{SUPPLEMENTNAME}][%{ENHANCENAME}]";
        assert_eq!(query(weak), "", "weak dependencies");
    }
}

/// When rpm installs a package together with its dependencies, it orders them by what their scriptlets require, and by
/// nothing else.
#[test]
fn rpm_requires_programs_that_its_scriptlets_run() {
    const TOOLS: [(&str, &[&str]); 6] = [
        ("coreutils", &["cut", "head", "mkdir", "mv", "readlink", "rm", "rmdir", "sleep", "sort", "tail", "tr"]),
        ("findutils", &["find", "xargs"]),
        ("gawk", &["awk"]),
        ("grep", &["grep"]),
        ("sed", &["sed"]),
        ("systemd", &["systemctl"]),
    ];
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let script = std::fs::read_to_string(packaging.join("replace-go-unit")).expect("the script can be read");
    let code = script.lines().filter(|line| !line.trim_start().starts_with('#'));
    let words: BTreeSet<&str> = code
        .flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric()))
        .filter(|word| !word.is_empty())
        .collect();
    for rpm in find_packages(&folder(), ".rpm") {
        let format = "[%{REQUIREFLAGS:deptype} %{REQUIRENAME}\n]";
        let requires = run("rpm", ["-qp", "--queryformat", format, &rpm.display().to_string()]).ok();
        for (package, tools) in TOOLS {
            assert!(tools.iter().all(|tool| words.contains(tool)), "{tools:?} are not all in the script");
            for scriptlet in ["post", "preun"] {
                let is_it = |line: &str| {
                    line.split_once(' ')
                        .is_some_and(|(kinds, name)| name == package && kinds.split(',').any(|kind| kind == scriptlet))
                };
                assert!(requires.lines().any(is_it), "Requires({scriptlet}): {package} is missing in {requires}");
            }
        }
    }
}

/// `packaging/lint-exceptions` has a line for each finding: the program, its name for the finding, and the reason.
#[test]
fn lintian_and_rpmlint_report_only_explained_findings() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/lint-exceptions");
    let text = std::fs::read_to_string(file).expect("the exceptions can be read");
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let explained: BTreeSet<(&str, &str)> = lines
        .map(|line| {
            let mut words = line.splitn(3, ' ');
            let [program, finding] = [(); 2].map(|()| words.next().expect("a program and a finding"));
            assert!(words.next().is_some_and(|why| why.len() > 10), "no reason in: {line}");
            (program, finding)
        })
        .collect();
    let mut found = Vec::new();
    for deb in find_packages(&folder(), ".deb") {
        let said =
            run("lintian", ["--allow-root", "--display-info", "--fail-on=none", &deb.display().to_string()]).ok();
        // E: cvmfs-snapshotter: no-copyright-file
        for line in said.lines().filter(|line| ["E: ", "W: ", "I: "].iter().any(|kind| line.starts_with(kind))) {
            let finding = line.split(' ').nth(2).expect("a finding has a name").to_owned();
            found.push(("lintian", finding, line.to_owned()));
        }
    }
    for rpm in find_packages(&folder(), ".rpm") {
        let said = run("rpmlint", [rpm.display().to_string()]).stdout;
        assert!(said.contains(" specfiles checked"), "rpmlint did not run: {said}");
        // cvmfs-snapshotter.x86_64: W: no-documentation
        for line in said.lines().filter(|line| [": E: ", ": W: "].iter().any(|kind| line.contains(kind))) {
            let finding = line.split(' ').nth(2).expect("a finding has a name").to_owned();
            found.push(("rpmlint", finding, line.to_owned()));
        }
    }
    let unexplained: Vec<&String> = found
        .iter()
        .filter(|(program, finding, _)| !explained.contains(&(*program, finding.as_str())))
        .map(|(.., line)| line)
        .collect();
    assert!(unexplained.is_empty(), "{unexplained:#?}");
}
