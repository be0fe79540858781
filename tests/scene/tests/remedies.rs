//! What the doctor says about containerd's configuration, beside what the real containerd does with it. A file has
//! something wrong; containerd does what the doctor claims, and with the tables and lines that the doctor names it pulls
//! lazily and the doctor finds no fault. `CONTAINERD_VERSIONS` chooses the versions, see `make test-matrix`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use scene::containerd::{Containerd, PLUGIN_NAME};
use scene::doctor::{Finding, findings};
use scene::e2e_fixture::{E2eFixture, PAUSE};
use scene::process::Server;
use scene::publisher::Repository;
use scene::release::{ConfigVariant, Configuration, Release};
use scene::report;
use toml::{Table, Value};

const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]";
const UNPACK: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]";
const CLIENT_LINE: &str = "disable_snapshot_annotations = false";
const TRANSFER_LINE: &str = "enable_remote_snapshot_annotations = \"true\"";
const CRI_1: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]";
const CRI_2: &str = "[plugins.'io.containerd.cri.v1.images']";
const SNAPSHOTTER_LINE: &str = "snapshotter = \"cvmfs-snapshotter\"";
const TYPE_LINE: &str = "type = \"snapshot\"";
/// Each keeps containerd 2.1 and later from pulling by the transfer service. Lines of the CRI's table, or a table.
const CLIENT_PULL_SETTINGS: [&str; 7] = [
    "use_local_image_pull = true",
    "discard_unpacked_layers = true",
    "image_pull_with_sync_fs = true",
    "max_concurrent_downloads = 10",
    "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.'scene.test']\n  endpoint = [\"http://127.0.0.1:1\"]",
    "[plugins.'io.containerd.cri.v1.images'.registry.configs.'scene.test'.auth]\n  username = \"u\"",
    "[plugins.'io.containerd.cri.v1.images'.registry.auths.'http://scene.test']\n  username = \"u\"",
];

macro_rules! remedies {
    ($($module:ident $release:ident;)*) => {
        $(mod $module {
            use scene::release::Release;

            const RELEASE: Release = Release::$release;

            #[test]
            fn root_lines_that_the_doctor_names_make_a_bare_file_good() {
                super::on(RELEASE, "bare", super::complete_bare_file);
            }

            #[test]
            fn root_containerd_does_what_the_doctor_claims_until_its_lines_are_set() {
                super::on(RELEASE, "effects", super::check_effects);
            }
        })*
    };
}

scene::for_each_release!(remedies);

fn on(release: Release, name: &str, check: impl Fn(&E2eFixture, Release)) {
    if !release.is_selected() {
        return;
    }
    let start = Instant::now();
    let stage = E2eFixture::start_with_containerd(name, "", release, release.best_config_variant(), Repository::plain);
    check(&stage, release);
    let seconds = start.elapsed().as_secs_f64();
    report::print(format_args!("containerd {}, {name}: {seconds:.1} s", release.version()));
}

/// Nothing but the version and the snapshotter of Kubernetes: the doctor says all the rest.
fn complete_bare_file(stage: &E2eFixture, release: Release) {
    let (version, cri) = if release.has_transfer() { (3, CRI_2) } else { (2, CRI_1) };
    let text = format!("version = {version}\n{cri}\n{SNAPSHOTTER_LINE}\n");
    let subject = Subject::start(stage, release, "bare", &text);
    let found = subject.findings();
    assert_found(&found, "containerd.plugin", "problem", &[PROXY, TYPE_LINE], &text);
    subject.assert_mended(found);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// containerd ends at its start, with these words.
    Ends(&'static str),
    NoCri,
    /// A pull of Kubernetes fails, with these words.
    Fails(&'static str),
    Downloads,
    Overlayfs,
}

/// A file with something wrong, and what the doctor says of it.
struct Case {
    text: String,
    effect: Effect,
    check: &'static str,
    /// Tables, keys and values that its message and remedy name.
    words: &'static [&'static str],
}

impl Case {
    fn new(text: String, effect: Effect, check: &'static str, words: &'static [&'static str]) -> Self {
        Self { text, effect, check, words }
    }
}

fn without(text: &str, line: &str) -> String {
    assert!(text.contains(line), "{line} is not in {text}");
    text.replacen(line, "", 1)
}

/// Without indentation, comments and empty lines.
fn bare(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.flat_map(|line| [line, "\n"]).collect()
}

fn cases(release: Release, stage: &E2eFixture) -> Vec<Case> {
    let file =
        |way: ConfigVariant| bare(&way.configuration(&stage.snapshotter.socket(), &stage.snapshotter.root()).main);
    let best = file(release.best_config_variant());
    let (version, rest) = best.split_once('\n').expect("a file has lines");
    let with_head = |line: &str| format!("{version}\n{line}\n{rest}");
    let no_type = Effect::Ends("plugin: no type");
    let typed = &[PROXY, TYPE_LINE];
    let mut all = vec![
        Case::new(without(&best, TYPE_LINE), no_type, "containerd.type", typed),
        Case::new(best.replace(TYPE_LINE, "type = \"snapshots\""), no_type, "containerd.type", typed),
        Case::new(
            with_head("disabled_plugins = [\"zfs\"]"),
            Effect::Ends("invalid disabled plugin URI"),
            "containerd.format",
            &["disabled_plugins"],
        ),
        Case::new(
            with_head(if release < Release::V2_1 {
                "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]"
            } else {
                "disabled_plugins = [\"io.containerd.cri.v1.images\"]"
            }),
            Effect::NoCri,
            "containerd.parts",
            &["disabled_plugins = []"],
        ),
    ];
    if release != Release::V1_6 {
        let text = format!("version = 7\n{rest}");
        all.push(Case::new(text, Effect::Ends("version"), "containerd.format", &["version"]));
    }
    if release.has_transfer() {
        all.extend(transfer_cases(&best, &file(ConfigVariant::Client1), &file(ConfigVariant::Client2)));
        return all;
    }
    let docker = format!("disabled_plugins = [\"cri\"]\n{rest}");
    all.extend([
        Case::new(without(&best, CLIENT_LINE), Effect::Downloads, "containerd.annotations", &[CRI_1, CLIENT_LINE]),
        Case::new(docker, Effect::NoCri, "containerd.parts", &["disabled_plugins = []"]),
        Case::new(without(&best, version), Effect::Overlayfs, "containerd.snapshotter", &["version = 2", CRI_1]),
        Case::new(
            best.replace(CRI_1, CRI_2),
            Effect::Overlayfs,
            "containerd.snapshotter",
            &[CRI_2, CRI_1, SNAPSHOTTER_LINE],
        ),
    ]);
    all
}

fn transfer_cases(transfer: &str, client_1: &str, client_2: &str) -> Vec<Case> {
    const ANNOTATIONS: &str = "containerd.annotations";
    let (version, rest) = transfer.split_once('\n').expect("a file has lines");
    let disabled = format!("{version}\ndisabled_plugins = [\"io.containerd.transfer.v1.local\"]\n{rest}");
    let entry = format!("{UNPACK}\nplatform = \"linux\"\n{SNAPSHOTTER_LINE}\n");
    let with_platform = |line: &str| transfer.replace(&entry, &entry.replace("platform = \"linux\"", line));
    let other = if cfg!(target_arch = "aarch64") { "linux/amd64" } else { "linux/arm64" };
    let fails = Effect::Fails("no unpack platforms defined");
    let mut all = vec![
        Case::new(disabled, Effect::NoCri, "containerd.disabled", &["disabled_plugins = []"]),
        Case::new(without(client_2, CLIENT_LINE), fails, ANNOTATIONS, &[UNPACK, TRANSFER_LINE]),
        Case::new(without(transfer, &entry), fails, ANNOTATIONS, &[UNPACK]),
        Case::new(without(transfer, TRANSFER_LINE), Effect::Downloads, ANNOTATIONS, &[TRANSFER_LINE]),
        Case::new(with_platform(&format!("platform = \"{other}\"")), Effect::NoCri, "containerd.platform", &[UNPACK]),
        Case::new(with_platform(""), Effect::NoCri, "containerd.platform", &[UNPACK]),
        Case::new(client_1.to_owned(), Effect::Overlayfs, "containerd.snapshotter", &[CRI_1, CRI_2, SNAPSHOTTER_LINE]),
    ];
    for setting in CLIENT_PULL_SETTINGS {
        let text = if setting.starts_with('[') {
            format!("{transfer}{setting}\n")
        } else {
            transfer.replace(CRI_2, &format!("{CRI_2}\n{setting}"))
        };
        all.push(Case::new(text, Effect::Downloads, ANNOTATIONS, &[CRI_2, CLIENT_LINE]));
    }
    all
}

fn check_effects(stage: &E2eFixture, release: Release) {
    for (n, case) in cases(release, stage).iter().enumerate() {
        match case.effect {
            Effect::Ends(words) => check_end(stage, release, &format!("c{n}"), case, words),
            _ => check_pull(stage, release, &format!("c{n}"), case),
        }
    }
}

/// Without what is said of the process that runs.
fn of_configuration(mut found: Vec<Finding>) -> Vec<Finding> {
    // Parts that did not start are a problem; those that are disabled are a warning or a note.
    let is_of_process = |one: &Finding| match one.check.as_str() {
        "containerd.running" | "containerd.restarted" => true,
        "containerd.parts" => one.state == "problem",
        _ => false,
    };
    found.retain(|one| one.check.starts_with("containerd.") && !is_of_process(one));
    found
}

#[track_caller]
fn assert_found(found: &[Finding], check: &str, least: &str, words: &[&str], text: &str) {
    let is_it = |one: &Finding| {
        let says = format!("{} {}", one.what, one.remedy.as_deref().unwrap_or_default());
        one.check == check && one.is_fault() && words.iter().all(|word| says.contains(word))
    };
    let one = found.iter().find(|one| is_it(one));
    let one = one.unwrap_or_else(|| panic!("no {check} that names {words:?} in {found:#?}\n{text}"));
    assert!(least == "warning" || one.state == "problem", "{one:?}");
}

/// The disabled CRI is a warning: others can use this snapshotter.
fn severity(check: &str) -> &'static str {
    if check == "containerd.parts" { "warning" } else { "problem" }
}

fn check_end(stage: &E2eFixture, release: Release, name: &str, case: &Case, words: &str) {
    let dir = stage.sandbox.make_dir(name);
    let file = dir.join("config.toml");
    let (root, state, socket) = (dir.join("root"), dir.join("state"), dir.join("c.sock"));
    let text = format!("root = {root:?}\nstate = {state:?}\n{}[grpc]\naddress = {socket:?}\n", case.text);
    fs::write(&file, &text).expect("a file can be written");
    let found = of_configuration(findings(&stage.snapshotter, &stage.ours.socket(), &file));
    assert_found(&found, case.check, severity(case.check), case.words, &text);
    assert_eq!(found.iter().filter(|one| one.is_fault()).count(), 1, "nothing else is guessed: {found:#?}");
    let mut command = Command::new(release.program("containerd"));
    command.arg("--config").arg(&file);
    let mut server = Server::start_on(&release.search_path(), &mut command, &dir.join("log"));
    assert!(!server.wait_for_end().success());
    assert!(server.log().contains(words), "no {words:?} in {}", server.log());
}

fn check_pull(stage: &E2eFixture, release: Release, name: &str, case: &Case) {
    let Case { text, effect, check, words } = case;
    let subject = Subject::start(stage, release, name, text);
    let found = subject.findings();
    assert_found(&found, check, severity(check), words, text);
    match (effect, subject.pull("before")) {
        (Effect::NoCri, Err(error)) => assert!(error.contains("unknown service"), "{error}"),
        (Effect::Fails(words), Err(error)) => assert!(error.contains(words), "{error}"),
        (Effect::Downloads, Ok(2)) => {}
        (Effect::Overlayfs, Ok(2)) => {
            let paths = subject.containerd.cri().image_file_systems();
            assert!(paths.iter().all(|path| path.ends_with(".overlayfs")), "{paths:?}");
        }
        (effect, pulled) => panic!("{effect:?}, not {pulled:?}:\n{text}\n{}", subject.containerd.log()),
    }
    // A line of an entry that is there already cannot be merged.
    if *check != "containerd.platform" {
        subject.assert_mended(found);
    }
}

/// A containerd with a file that the doctor looks at.
struct Subject<'t> {
    stage: &'t E2eFixture,
    name: String,
    containerd: Containerd,
}

impl<'t> Subject<'t> {
    fn start(stage: &'t E2eFixture, release: Release, name: &str, text: &str) -> Self {
        let configuration = Configuration { main: text.to_owned(), conf_d: None };
        let pause = stage.registry.reference(PAUSE);
        let containerd = Containerd::configured(&stage.sandbox.make_dir(name), release, &pause, configuration);
        Self { stage, name: name.to_owned(), containerd }
    }

    fn findings(&self) -> Vec<Finding> {
        let (socket, file) = (self.containerd.socket(), self.containerd.configuration());
        of_configuration(findings(&self.stage.snapshotter, &socket, &file))
    }

    /// How many layers of a new image are fetched, all of which are published; or why it is not pulled.
    fn pull(&self, tag: &str) -> Result<usize, String> {
        let (stage, name) = (self.stage, &self.name);
        let layers = [1, 2].map(|n| {
            stage.builder.layer(|l| {
                l.file(format!("data/{n}"), format!("{name} {tag} {n}"));
            })
        });
        let image = stage.builder.image(&format!("{name}:{tag}"), &layers, &[]);
        let reference = stage.publish_and_push(&image);
        let before = stage.registry.fetched();
        self.containerd.cri().try_pull(&reference).map_err(|status| status.message().to_owned())?;
        Ok(stage.registry.fetched().since(&before).layers_of(&image))
    }

    /// With the lines that the doctor names containerd pulls lazily, and the doctor finds no fault.
    fn assert_mended(mut self, first: Vec<Finding>) {
        const MAX_ROUNDS: usize = 4;
        let file = self.containerd.configuration();
        let mut found = first;
        for _ in 0..MAX_ROUNDS {
            for finding in found.iter().filter(|one| one.is_fault()) {
                set(&file, finding);
            }
            self.containerd.end();
            self.containerd.start_again();
            found = self.findings();
            if !found.iter().any(Finding::is_fault) {
                break;
            }
        }
        let text = fs::read_to_string(&file).expect("a file can be read");
        assert!(!found.iter().any(Finding::is_fault), "{}: {found:#?}\n{text}", self.name);
        let is_used = |one: &Finding| {
            one.check == "containerd.snapshotter" && one.state == "good" && one.what.contains(PLUGIN_NAME)
        };
        assert!(found.iter().any(is_used), "{found:#?}");
        let pulled = self.pull("after");
        assert!(matches!(pulled, Ok(0)), "{}: {pulled:?}\n{text}\n{}", self.name, self.containerd.log());
    }
}

/// Sets the tables and lines that a remedy names: what stands between its first line and the restart is TOML.
#[track_caller]
fn set(file: &Path, finding: &Finding) {
    let remedy = finding.remedy.as_deref().expect("a fault has a remedy");
    let lines = remedy.split_once(":\n").and_then(|(_, rest)| rest.rsplit_once("\nthen systemctl restart containerd"));
    let (lines, _) = lines.unwrap_or_else(|| panic!("no lines to set in {finding:?}"));
    let parse = |text: &str| text.parse::<Table>().unwrap_or_else(|e| panic!("{e}: {text}"));
    let mut all = parse(&fs::read_to_string(file).expect("a file can be read"));
    merge(&mut all, parse(lines));
    fs::write(file, all.to_string()).expect("a file can be written");
}

/// Keys replace those that are there, and tables are added to a list of tables.
fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (Some(Value::Array(old)), Value::Array(new)) if new.first().is_some_and(Value::is_table) => old.extend(new),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}
