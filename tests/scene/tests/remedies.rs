//! What the doctor says about containerd's configuration is right to the letter, for each version of
//! containerd: good files get slips, each remedy is followed as it stands there, and in the end the
//! real containerd takes the file and the doctor has nothing to say. What it says will happen
//! does. `CONTAINERD_VERSIONS` chooses, see `make test-matrix`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use scene::containerd::{Containerd, PLUGIN_NAME};
use scene::doctor::{Finding, findings};
use scene::e2e_fixture::{E2eFixture, PAUSE};
use scene::process::{Output, Server, run};
use scene::publisher::Repository;
use scene::release::{ConfigVariant, Configuration, Release};
use scene::remedy::follow;
use scene::report;
use scene::slip::{BY_CLIENT, CRI_1, CRI_2, OF_CRI, PROXY, SAYS, Slip, TOLD, UNPACK, bare, other_platform, slips};

macro_rules! remedies {
    ($($module:ident $release:ident;)*) => {
        $(mod $module {
            use scene::release::Release;

            const RELEASE: Release = Release::$release;

            #[test]
            fn root_every_remedy_followed_to_the_letter_mends_the_file() {
                super::on(RELEASE, "remedies", super::mend);
            }

            #[test]
            fn root_what_the_doctor_says_will_happen_does() {
                super::on(RELEASE, "effects", super::happen);
            }
        })*
    };
}

scene::for_each_release!(remedies);

fn on(release: Release, what: &str, check: impl Fn(&E2eFixture, Release) -> usize) {
    if !release.is_selected() {
        return;
    }
    let start = Instant::now();
    let stage = E2eFixture::start_with_containerd(what, "", release, release.best_config_variant(), Repository::plain);
    let count = check(&stage, release);
    let seconds = start.elapsed().as_secs_f64();
    report::print(format_args!("containerd {}, {what}: {count} files, {seconds:.1} s", release.version()));
}

/// What an admin edits: the main file, and one that it may import.
struct Files {
    main: PathBuf,
    imported: PathBuf,
}

fn mend(stage: &E2eFixture, release: Release) -> usize {
    let files = Files {
        main: stage.sandbox.path("edited.toml"),
        imported: stage.sandbox.make_dir("edited.d").join("ours.toml"),
    };
    let all = slips(release, stage);
    // Each that fails has said why.
    let is_mended = |slip: &&Slip| {
        let patient = Patient { stage, release, files: &files, slip };
        catch_unwind(AssertUnwindSafe(|| patient.is_found_and_mended())).is_ok()
    };
    let failed: Vec<&str> = all.iter().filter(|slip| !is_mended(slip)).map(|slip| slip.name.as_str()).collect();
    assert!(failed.is_empty(), "{} of {} were not mended: {failed:#?}", failed.len(), all.len());
    all.len()
}

/// Without what is said of the process that runs.
fn of_configuration(mut all: Vec<Finding>) -> Vec<Finding> {
    // Parts that did not start are a problem; those that are disabled are not.
    let is_of_process = |one: &Finding| match one.check.as_str() {
        "containerd.running" | "containerd.restarted" => true,
        "containerd.parts" => one.state == "problem",
        _ => false,
    };
    all.retain(|one| one.check.starts_with("containerd.") && !is_of_process(one));
    all
}

/// How remedies are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    AllAtOnce,
    LastFirst,
    OneByOne,
}

struct Patient<'t> {
    stage: &'t E2eFixture,
    release: Release,
    files: &'t Files,
    slip: &'t Slip,
}

impl Patient<'_> {
    fn is_found_and_mended(&self) {
        self.write();
        let first = self.ask();
        if let Some(check) = self.slip.check {
            let is_it = |one: &Finding| one.check == check && one.state != "good";
            assert!(first.iter().any(is_it), "{}: no {check} in {first:#?}\n{}", self.slip.name, self.text());
        }
        self.mend(first.clone(), Pace::AllAtOnce);
        if first.iter().filter(|one| one.is_fault()).count() > 1 {
            for pace in [Pace::OneByOne, Pace::LastFirst] {
                self.write();
                self.mend(first.clone(), pace);
            }
        }
    }

    fn write(&self) {
        let Configuration { main, conf_d } = &self.slip.configuration;
        let mut main = main.clone();
        if let Some(text) = conf_d {
            fs::write(&self.files.imported, text).expect("a file can be written");
            // containerd looks for a star in a folder's name as well.
            let all = self.files.main.with_file_name("edited.*").join("*.toml");
            main = format!("imports = [{all:?}]\n{main}");
        }
        fs::write(&self.files.main, main).expect("a file can be written");
    }

    fn text(&self) -> String {
        let read = |path: &Path| fs::read_to_string(path).expect("a file can be read");
        let conf_d = self.slip.configuration.conf_d.as_ref().map(|_| read(&self.files.imported)).unwrap_or_default();
        format!("{}{conf_d}", read(&self.files.main))
    }

    /// What the doctor has to say of the file.
    fn ask(&self) -> Vec<Finding> {
        of_configuration(findings(&self.stage.snapshotter, &self.stage.ours.socket(), &self.files.main))
    }

    fn dump(&self) -> Output {
        let main = self.files.main.as_os_str();
        run(self.release.program("containerd"), ["--config".as_ref(), main, "config".as_ref(), "dump".as_ref()])
    }

    fn follow(&self, remedy: &str) {
        let before = self.text();
        follow(remedy, &[&self.files.main, &self.files.imported]);
        assert_ne!(self.text(), before, "{}: this changed nothing: {remedy}", self.slip.name);
    }

    /// Until there is nothing left to follow.
    fn mend(&self, first: Vec<Finding>, pace: Pace) {
        const ROUNDS: usize = 8;
        let name = &self.slip.name;
        let mut found = first;
        for _ in 0..ROUNDS {
            let mut remedies: Vec<&str> = found
                .iter()
                .filter(|one| one.check != "containerd.config")
                .filter_map(|one| one.remedy.as_deref())
                .collect();
            match pace {
                Pace::AllAtOnce => {}
                Pace::LastFirst => remedies.reverse(),
                Pace::OneByOne => remedies.truncate(1),
            }
            let hint = found.iter().find_map(|one| one.what.split_once("To change that, "));
            match (remedies.is_empty(), hint) {
                (false, _) => remedies.into_iter().for_each(|remedy| self.follow(remedy)),
                (true, _) if found.iter().any(Finding::is_fault) => {
                    // No line can be named: containerd cannot read it either.
                    assert!(found.iter().all(|one| one.check == "containerd.config"), "{name}: {found:#?}");
                    assert!(!self.dump().status.success(), "{name}: containerd reads it\n{}", self.text());
                    return;
                }
                (true, Some((_, hint))) => self.follow(&format!("{hint}, then systemctl restart containerd")),
                (true, None) => return self.assert_used(),
            }
            found = self.ask();
        }
        panic!("{name} ({pace:?}) comes to no end: {found:#?}\n{}", self.text());
    }

    /// containerd takes the file, and uses us.
    fn assert_used(&self) {
        let dump = self.dump();
        let text = self.text();
        assert!(dump.status.success(), "{}: {}\n{text}", self.slip.name, dump.stderr);
        let lines: Vec<&str> = dump.stdout.lines().map(str::trim).collect();
        let is_used = ["\"", "'"].iter().any(|quote| {
            let line = format!("snapshotter = {quote}{PLUGIN_NAME}{quote}");
            lines.iter().any(|one| *one == line)
        });
        let is_off = |part: &str| lines.iter().any(|line| line.starts_with("disabled_plugins") && line.contains(part));
        let has_cri = !["cri", PLUGIN_NAME, "transfer"].into_iter().any(is_off);
        assert!(is_used && has_cri && lines.contains(&PROXY), "{}: {text}\n{}", self.slip.name, dump.stdout);
    }
}

/// What becomes of containerd, or of a pull of Kubernetes, with a slip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// It ends at its start, with these words.
    Ends(&'static str),
    NoCri,
    /// The pull does, with these words.
    Fails(&'static str),
    Downloads,
    Overlayfs,
}

/// A file, what becomes of it, and the words in which the doctor says so.
type Case = (String, Effect, &'static str);

fn effects(release: Release, stage: &E2eFixture) -> Vec<Case> {
    const NOWHERE: &str = "no unpack platforms defined";
    let file =
        |way: ConfigVariant| bare(&way.configuration(&stage.snapshotter.socket(), &stage.snapshotter.root()).main);
    let best = file(release.best_config_variant());
    let without = |text: &str, line: &str| {
        assert!(text.contains(line), "{line} is not in {text}");
        text.replacen(line, "", 1)
    };
    let kind = "type = \"snapshot\"";
    let mut all: Vec<Case> = vec![
        (without(&best, kind), Effect::Ends("plugin: no type"), "panics at its start"),
        (best.replace(kind, "type = \"snapshots\""), Effect::Ends("plugin: no type"), "panics at its start"),
    ];
    let (version, others) = best.split_once('\n').expect("a file has lines");
    if release != Release::V1_6 {
        all.push((format!("version = 7\n{others}"), Effect::Ends("version"), "does not start with it"));
    }
    let cri = if release < Release::V2_1 { "grpc.v1.cri" } else { "cri.v1.images" };
    let disabled = format!("{version}\ndisabled_plugins = [\"io.containerd.{cri}\"]\n{others}");
    all.push((disabled, Effect::NoCri, "Kubernetes cannot use this containerd"));
    let short = format!("{version}\ndisabled_plugins = [\"zfs\"]\n{others}");
    all.push((short, Effect::Ends("invalid disabled plugin URI"), "does not start from version 2"));
    if release < Release::V2_1 {
        all.push((without(&best, SAYS), Effect::Downloads, "every layer is downloaded"));
        let docker = format!("disabled_plugins = [\"cri\"]\n{others}");
        all.push((docker, Effect::NoCri, "Kubernetes does not use this snapshotter"));
        all.push((without(&best, version), Effect::Overlayfs, "Kubernetes does not use this snapshotter"));
        all.push((best.replace(CRI_1, CRI_2), Effect::Overlayfs, "Kubernetes uses overlayfs"));
        return all;
    }
    let transfer = format!("{version}\ndisabled_plugins = [\"io.containerd.transfer.v1.local\"]\n{others}");
    all.push((transfer, Effect::NoCri, "the CRI of containerd does not start"));
    let ours = format!("{UNPACK}\nplatform = \"linux\"\n{OF_CRI}\n");
    let with = |platform: &str| best.replace(&ours, &ours.replace("platform = \"linux\"", platform));
    all.extend([
        (without(&file(ConfigVariant::Client2), SAYS), Effect::Fails(NOWHERE), "every pull of Kubernetes fails"),
        (without(&best, &ours), Effect::Fails(NOWHERE), "every pull of Kubernetes fails"),
        (without(&best, TOLD), Effect::Downloads, "every layer is downloaded"),
        (with(&format!("platform = \"{}\"", other_platform())), Effect::NoCri, "the CRI does not either"),
        (with(""), Effect::NoCri, "the CRI does not either"),
        (file(ConfigVariant::Client1), Effect::Overlayfs, "Kubernetes uses overlayfs"),
    ]);
    for key in BY_CLIENT {
        let text = if key.starts_with('[') {
            format!("{best}{key}\n")
        } else {
            best.replace(CRI_2, &format!("{CRI_2}\n{key}"))
        };
        all.push((text, Effect::Downloads, "makes containerd pull by its client"));
    }
    all
}

fn happen(stage: &E2eFixture, release: Release) -> usize {
    let cases = effects(release, stage);
    for (n, (text, effect, claim)) in cases.iter().enumerate() {
        let dir = stage.sandbox.make_dir(&format!("c{n}"));
        match effect {
            Effect::Ends(words) => ends(stage, release, &dir, text, (words, claim)),
            effect => pulls(stage, release, &dir, text, (*effect, claim)),
        }
    }
    cases.len()
}

/// The claim is among what the doctor finds.
#[track_caller]
fn assert_says(found: &[Finding], claim: &str, text: &str) {
    let says = |one: &Finding| one.is_fault() && one.what.contains(claim);
    assert!(found.iter().any(says), "nobody says {claim:?}: {found:#?}\n{text}");
}

fn ends(stage: &E2eFixture, release: Release, dir: &Path, text: &str, (words, claim): (&str, &str)) {
    let file = dir.join("config.toml");
    let (root, state, socket) = (dir.join("root"), dir.join("state"), dir.join("c.sock"));
    let text = format!("root = {root:?}\nstate = {state:?}\n{text}[grpc]\naddress = {socket:?}\n");
    fs::write(&file, &text).expect("a file can be written");
    assert_says(&findings(&stage.snapshotter, &stage.ours.socket(), &file), claim, &text);
    let mut command = Command::new(release.program("containerd"));
    command.arg("--config").arg(&file);
    let mut server = Server::start_on(&release.search_path(), &mut command, &dir.join("log"));
    assert!(!server.wait_for_end().success());
    assert!(server.log().contains(words), "no {words:?} in {}", server.log());
}

fn pulls(stage: &E2eFixture, release: Release, dir: &Path, text: &str, (effect, claim): (Effect, &str)) {
    let configuration = Configuration { main: text.to_owned(), conf_d: None };
    let mut containerd = Containerd::configured(dir, release, &stage.registry.reference(PAUSE), configuration);
    let ask = |containerd: &Containerd| {
        of_configuration(findings(&stage.snapshotter, &containerd.socket(), &containerd.configuration()))
    };
    let name = dir.file_name().expect("it has a name").display().to_string();
    // What is fetched of a new image, all of which is published; or why it is not pulled.
    let pull = |containerd: &Containerd, tag: &str| {
        let layer = |n: usize| {
            stage.builder.layer(|l| {
                l.file(format!("data/{n}"), format!("{name} {tag} {n}"));
            })
        };
        let image = stage.builder.image(&format!("{name}:{tag}"), &[layer(1), layer(2)], &[]);
        let reference = stage.publish_and_push(&image);
        let before = stage.registry.fetched();
        let pulled = containerd.cri().try_pull(&reference);
        pulled.map(|()| stage.registry.fetched().since(&before).layers_of(&image))
    };
    let mut found = ask(&containerd);
    assert_says(&found, claim, text);
    let pulled = pull(&containerd, "before");
    match (effect, pulled) {
        (Effect::NoCri, Err(status)) => assert!(status.message().contains("unknown service"), "{}", status.message()),
        (Effect::Fails(words), Err(status)) => assert!(status.message().contains(words), "{}", status.message()),
        (Effect::Downloads, Ok(2)) => {}
        (Effect::Overlayfs, Ok(2)) => {
            let places = containerd.cri().image_file_systems();
            assert!(places.iter().all(|place| place.ends_with(".overlayfs")), "{places:?}");
        }
        (effect, pulled) => panic!("{effect:?}, not {pulled:?}:\n{text}\n{}", containerd.log()),
    }
    // Somebody follows the doctor.
    for _ in 0..4 {
        for remedy in found.iter().filter_map(|one| one.remedy.as_deref()) {
            follow(remedy, &[&containerd.configuration()]);
        }
        containerd.end();
        containerd.start_again();
        found = ask(&containerd);
        if !found.iter().any(Finding::is_fault) {
            break;
        }
    }
    assert!(!found.iter().any(Finding::is_fault), "{found:#?}\n{text}");
    let pulled = pull(&containerd, "after");
    assert!(matches!(pulled, Ok(0)), "{pulled:?} after {effect:?}\n{text}\n{}", containerd.log());
}
