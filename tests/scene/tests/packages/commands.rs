//! Runs each command that the documentation shows, on a node that begins with the Go snapshotter, or names in
//! `ELSEWHERE` who runs it. A command is a line of a block `console` that begins with `# ` or `$ `, and any line of a
//! block of a shell. Some whole commands in prose are run as well; nothing checks that these are all.

use std::fs;
use std::path::{Path, PathBuf};

use scene::e2e_fixture::names;
use scene::machine::{HOST, SERVICE, STATE};
use scene::process::{eventually, tool};
use scene::release::read;

use crate::node::{CONFIG, Node};
use crate::{DEB, RPM, find_package, folder, go, next};

/// The place that runs a command which is not run here.
enum By {
    /// `.ci/run`.
    Ci,
    /// A person, who goes by docs/releasing.md.
    Release,
    /// A file that has these words.
    File(&'static str, &'static str),
}

/// The page, the command, the place that runs it, and why it is not run here.
const ELSEWHERE: &[(&str, &str, By, &str)] = &[
    ("README.md", "make demo", By::Release, "it ends with a table that somebody has to look at"),
    ("README.md", "make test", By::Ci, "this is a part of it"),
    (
        "README.md",
        "cargo build --release",
        By::File("Makefile", "\ncargo build --release"),
        "it compiles the C core of gRPC once more: make bench",
    ),
    ("docs/install.md", "make package", By::Release, "it compiles the C core of gRPC twice"),
    ("docs/install.md", "make test-packages", By::Release, "this is a part of it"),
];

struct Command {
    page: String,
    /// The position of the command among those of all pages.
    block: usize,
    text: String,
    done: bool,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The Markdown files in a directory, and if `deep` in those below it, with the names that `read` of the harness takes.
fn pages(folder: &str, deep: bool, found: &mut Vec<String>) {
    for name in names(&root().join(folder)) {
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        if Path::new(&path).extension().is_some_and(|end| end == "md") {
            found.push(path);
        } else if deep && root().join(&path).is_dir() {
            pages(&path, deep, found);
        }
    }
}

/// The command without a trailing comment.
fn without_comment(line: &str) -> String {
    line.split("  #").next().unwrap_or_default().trim().to_owned()
}

/// The commands that the documentation shows, page by page.
fn commands() -> Vec<Command> {
    let mut files = Vec::new();
    pages("", false, &mut files);
    for folder in ["docs", "packaging"] {
        pages(folder, true, &mut files);
    }
    let (mut commands, mut block) = (Vec::new(), 0);
    for page in files {
        let mut language: Option<String> = None;
        for line in read(&page).lines().map(str::trim) {
            let command = match (&language, line.strip_prefix("```")) {
                (None, Some(name)) => {
                    // A block of another name would hide commands.
                    let known = ["console", "sh", "bash", "ini", "promql", "text", "toml", "yaml"];
                    assert!(known.contains(&name), "{page}: a block of {name:?}, which is none of {known:?}");
                    block += 1;
                    language = Some(name.to_owned());
                    None
                }
                (Some(_), Some(_)) => {
                    language = None;
                    None
                }
                (Some(name), None) if name == "console" => line.strip_prefix("# ").or(line.strip_prefix("$ ")),
                (Some(name), None) if name == "sh" || name == "bash" => Some(line).filter(|l| !l.starts_with('#')),
                _ => None,
            };
            let text = command.map(without_comment).filter(|text| !text.is_empty());
            if let Some(text) = text {
                assert!(!text.ends_with('\\'), "{page}: a command has one line here: {text}");
                commands.push(Command { page: page.clone(), block, text, done: false });
            }
        }
        assert!(language.is_none(), "{page}: a block does not end");
    }
    commands
}

/// Runs the commands on a node.
struct Reader<'a> {
    node: &'a Node,
    commands: Vec<Command>,
    /// Placeholders of the pages, and the texts that replace them.
    substitutions: Vec<(String, String)>,
    /// The commands that did not do what their page says.
    wrong: Vec<String>,
}

impl Reader<'_> {
    /// Runs the next command of a page and checks its exit status. The result is its output.
    #[track_caller]
    fn run(&mut self, page: &str, text: &str, code: i32) -> String {
        let found = self.commands.iter().position(|c| c.page == page && c.text == text && !c.done);
        let at = found.unwrap_or_else(|| panic!("{page} does not have this command (any more): {text}"));
        let block = self.commands[at].block;
        let later = self.commands[at + 1..].iter().find(|c| c.block == block && c.done);
        assert!(later.is_none(), "{page}: {text} stands before {:?}", later.map(|c| &c.text));
        self.commands[at].done = true;
        self.type_it(page, text, code)
    }

    /// Runs a command that a page has in its prose.
    #[track_caller]
    fn run_of_prose(&mut self, page: &str, text: &str) -> String {
        let prose = read(page).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(prose.contains(&format!("`{text}`")), "{page} does not have this command (any more): {text}");
        self.type_it(page, text, 0)
    }

    fn type_it(&mut self, page: &str, text: &str, code: i32) -> String {
        let typed = self.substitutions.iter().fold(text.to_owned(), |line, (from, to)| line.replace(from, to));
        let output = self.node.shell(&format!("cd /root && ( {typed} ) </dev/null"));
        if output.status.code() != Some(code) {
            self.is_wrong(format!("{page}: {typed}: {}\n{}", output.status, output.stdout));
        }
        output.stdout
    }

    /// Runs a command that must succeed and print these words.
    #[track_caller]
    fn run_and_see(&mut self, page: &str, text: &str, words: &[&str]) {
        let said = self.run(page, text, 0);
        for word in words.iter().filter(|word| !said.contains(**word)) {
            self.is_wrong(format!("{page}: {text}: no {word:?} in\n{said}"));
        }
    }

    /// Records a failure, so that the other commands still run and all failures are reported at once.
    fn is_wrong(&mut self, what: String) {
        println!("{what}");
        self.wrong.push(what);
    }

    fn substitute(&mut self, more: &[(&str, &str)]) {
        self.substitutions.extend(more.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())));
    }

    /// Replaces the packages that stand for those of the pages.
    fn take_packages(&mut self, folder: &Path) {
        let packages = [("_0.1.0-1", DEB), ("-0.1.0-1", RPM)].map(|(version, end)| {
            let given = self.node.give(&find_package(folder, end));
            (format!("cvmfs-snapshotter{version}{end}"), given.trim_start_matches("/root/").to_owned())
        });
        self.substitutions.retain(|(from, _)| packages.iter().all(|(shown, _)| shown != from));
        self.substitutions.extend(packages);
    }
}

/// Every command has somebody who runs it, and the table has no command that the pages do not show.
fn missing(commands: &[Command]) -> Vec<String> {
    let elsewhere = |c: &Command| ELSEWHERE.iter().any(|(page, text, ..)| c.page == *page && c.text == *text);
    let missing = commands.iter().filter(|c| !c.done && !elsewhere(c));
    missing.map(|c| format!("{}: {}", c.page, c.text)).collect()
}

#[test]
fn every_command_listed_as_run_elsewhere_is_run_there() {
    let commands = commands();
    for (page, text, by, why) in ELSEWHERE {
        assert!(commands.iter().any(|c| c.page == *page && c.text == *text), "{page} has no command {text} any more");
        assert!(!why.is_empty(), "{text}: no reason");
        let (file, words) = match by {
            By::Ci => (".ci/run", format!("\n{text}\n")),
            By::Release => ("docs/releasing.md", format!("{text}`")),
            By::File(file, words) => (*file, (*words).to_owned()),
        };
        // The indentation does not matter.
        let lines: Vec<String> = read(file).lines().map(|line| line.trim().to_owned()).collect();
        assert!(format!("\n{}\n", lines.join("\n")).contains(&words), "{file} has no {words:?}");
        if let Some(target) = text.strip_prefix("make ") {
            assert!(read("Makefile").contains(&format!("\n{target}:")), "make {target}");
        }
    }
}

/// Debian's rpm has no database of Debian's packages, which provide what our package requires.
fn provide_rpm(node: &Node) {
    let libraries = format!("{HOST}/lib/x86_64-linux-gnu");
    let script = format!(
        "#!/bin/sh
case $1 in --upgrade | --erase | --verify) set -- \"$@\" --nodeps ;; esac
export RPM_CONFIGDIR={HOST}/lib/rpm
exec {libraries}/ld-linux-x86-64.so.2 --library-path {libraries} {HOST}/bin/rpm --dbpath=/var/lib/rpm \"$@\"
"
    );
    node.machine.write("/usr/bin/rpm", &script);
    node.shell("chmod 755 /usr/bin/rpm").ok();
}

const README: &str = "README.md";
const ADMIN: &str = "docs/admin.md";
const INSTALL: &str = "docs/install.md";
const PRIVILEGES: &str = "docs/privileges.md";
const TAKEOVER: &str = "docs/takeover.md";
const CACHE: &str = "/var/lib/cvmfs";
const TROUBLE: &str = "docs/troubleshooting.md";

/// The life of a node: the Go snapshotter, then ours installed by hand, as a DEB, as an RPM, and as a DEB again, while a
/// container runs and loses nothing.
#[test]
fn root_every_documented_command_does_what_its_page_says() {
    let Some(node) = go::boot_node_or_skip("commands", "/etc/systemd/system") else { return };
    let machine = &node.machine;
    let running = node.run_container();
    let mut docs = Reader { node: &node, commands: commands(), substitutions: Vec::new(), wrong: Vec::new() };
    docs.take_packages(&folder());

    let kill = "systemctl kill --signal=SIGKILL cvmfs-snapshotter; systemctl disable --now cvmfs-snapshotter";
    docs.run(TAKEOVER, kill, 0);
    assert_eq!(["MainPID", "UnitFileState"].map(|name| machine.property(SERVICE, name)), ["0", "disabled"]);
    let away = "mv /etc/systemd/system/cvmfs-snapshotter.service /root/cvmfs-snapshotter.service.go-saved";
    docs.run(TAKEOVER, away, 0);
    node.assert_counts();

    run_manual_installation(&mut docs);

    docs.run(README, &format!("dpkg --install cvmfs-snapshotter_0.1.0-1{DEB}"), 0);
    node.assert_serves();
    node.configure("");
    machine.restart(SERVICE);
    machine.restart("containerd.service");
    node.assert_nothing_is_lost(&running);

    node.shell(&format!("mkdir {CACHE}")).ok();
    let two = format!("df --output=target,source {CACHE} {STATE}");
    docs.run_and_see(INSTALL, &two, &[STATE]);

    run_everyday_commands(&mut docs, running.image());

    // The upgrade installs a version that is not older.
    docs.take_packages(&next(&node.sandbox));
    docs.run(INSTALL, &format!("dpkg --install cvmfs-snapshotter_0.1.0-1{DEB}"), 0);
    node.assert_serves();
    docs.run(INSTALL, "dpkg --remove cvmfs-snapshotter", 0);
    assert!(machine.path(CONFIG).exists());
    docs.run(INSTALL, "dpkg --purge cvmfs-snapshotter", 0);
    assert!(!machine.path(CONFIG).exists());
    docs.run_of_prose(INSTALL, &format!("apt-get install ./cvmfs-snapshotter_0.1.0-1{DEB}"));
    node.assert_serves();
    node.dpkg("--purge cvmfs-snapshotter");
    node.assert_counts();

    provide_rpm(&node);
    docs.take_packages(&folder());
    let package = format!("cvmfs-snapshotter-0.1.0-1{RPM}");
    docs.run(README, &format!("rpm --upgrade {package}"), 0);
    node.assert_serves();
    docs.take_packages(&node.sandbox.path("next"));
    docs.run(INSTALL, &format!("rpm --upgrade {package}"), 0);
    node.assert_serves();
    let look = format!("rpm --query --package --requires --scripts {package}");
    docs.run_and_see(INSTALL, &look, &["postinstall scriptlet", "systemd"]);
    let package = format!("cvmfs-snapshotter_0.1.0-1{DEB}");
    docs.run_and_see(INSTALL, &format!("dpkg-deb --info {package}"), &[" Package: cvmfs-snapshotter\n", "postinst"]);
    docs.run_and_see(INSTALL, &format!("dpkg-deb --contents {package}"), &["./usr/bin/cvmfs-snapshotter\n"]);
    assert_eq!(docs.run(INSTALL, "rpm --verify cvmfs-snapshotter", 0), "");
    docs.run(INSTALL, "rpm --erase cvmfs-snapshotter", 0);
    assert!(!machine.path("/usr/bin/cvmfs-snapshotter").exists());
    node.assert_counts();

    machine.write(CONFIG, go::CONFIGURATION);
    docs.run(INSTALL, &format!("dpkg --force-confold --install {package}"), 0);
    assert_eq!(fs::read_to_string(machine.path(CONFIG)).expect("it is there"), go::CONFIGURATION);
    let verified = docs.run(INSTALL, "dpkg --verify cvmfs-snapshotter", 0);
    assert!(verified.lines().count() == 1 && verified.contains(CONFIG), "{verified}");
    docs.run(INSTALL, go::ANY_BY_HAND, 0);
    docs.run(INSTALL, go::BY_HAND, 0);
    node.assert_serves();
    node.assert_nothing_is_lost(&running);

    assert!(docs.wrong.is_empty(), "{} commands do not do what their pages say: see above", docs.wrong.len());
    assert_eq!(missing(&docs.commands), Vec::<String>::new(), "commands that nobody runs");
}

/// The commands of the readme for an installation without a package.
fn run_manual_installation(docs: &mut Reader) {
    let node = docs.node;
    // The build leaves its program there.
    let program =
        "dpkg-deb --extract /root/*.deb /root/unpacked && install -D /root/unpacked/usr/bin/cvmfs-snapshotter";
    node.shell(&format!("{program} /root/target/release/cvmfs-snapshotter")).ok();
    for file in ["config.toml", "cvmfs-snapshotter.service", "cvmfs-snapshotter.socket"] {
        node.machine.write(&format!("/root/packaging/{file}"), &read(&format!("packaging/{file}")));
    }
    for command in [
        "install target/release/cvmfs-snapshotter /usr/bin/",
        "install -D -m 644 packaging/config.toml /etc/containerd-cvmfs-grpc/config.toml",
        "cvmfs-snapshotter --check-config",
        "install -m 644 packaging/cvmfs-snapshotter.service packaging/cvmfs-snapshotter.socket \
         /usr/lib/systemd/system/",
        "systemctl daemon-reload",
        "systemctl enable --now cvmfs-snapshotter",
    ] {
        docs.run(README, command, 0);
    }
    node.assert_serves();
    let journal = node.machine.journal(SERVICE);
    assert!(journal.contains("takeover_finished") && journal.contains(r#""lost_files":"0""#), "{journal}");
}

/// The commands for a daemon that serves, through which `image` was pulled.
fn run_everyday_commands(docs: &mut Reader, image: &str) {
    let node = docs.node;
    for page in [README, ADMIN] {
        docs.run_and_see(page, "cvmfs-snapshotter doctor", &["good     daemon.running", "good     repository.answers"]);
        docs.run_and_see(page, "cvmfs-snapshotter status", &["REPOSITORY", "scene.test", image]);
    }
    docs.run(ADMIN, "cvmfs-snapshotter gc --dry-run", 0);
    docs.run(ADMIN, "cvmfs-snapshotter gc", 0);
    for (command, level) in [
        ("systemctl kill --signal=SIGUSR1 cvmfs-snapshotter", "DEBUG"),
        ("systemctl kill --signal=SIGUSR2 cvmfs-snapshotter", "INFO"),
        ("systemctl reload cvmfs-snapshotter", "INFO"),
    ] {
        let line = format!("\"log_level\":\"{level}\"");
        let said = || node.machine.journal(SERVICE).matches(&line).count();
        let before = said();
        docs.run(ADMIN, command, 0);
        eventually(&line, || said() > before);
    }
    node.shell("ln -s /opt/debian/bin/ctr /usr/bin/ctr").ok();
    docs.substitute(&[("help COMMAND", "help gc"), ("NAMESPACE", "k8s.io")]);
    for (page, command) in [
        (ADMIN, "cvmfs-snapshotter help COMMAND"),
        (ADMIN, "cvmfs-snapshotter --check-config"),
        (ADMIN, "journalctl -u cvmfs-snapshotter -o cat"),
        (INSTALL, "systemctl restart cvmfs-snapshotter"),
        (INSTALL, "systemctl status cvmfs-snapshotter"),
        (TAKEOVER, "ctr -n NAMESPACE images ls"),
        (TROUBLE, "ctr -n k8s.io snapshots --snapshotter cvmfs-snapshotter ls"),
        (TROUBLE, "cvmfs-snapshotter doctor --json"),
        (TROUBLE, "cvmfs-snapshotter status --json"),
        (TROUBLE, "cvmfs-snapshotter --version"),
    ] {
        docs.run_of_prose(page, command);
    }
    docs.run_and_see(PRIVILEGES, "systemd-analyze security cvmfs-snapshotter", &["4.7 OK"]);
    docs.run_and_see(PRIVILEGES, "systemctl show -p CapabilityBoundingSet cvmfs-snapshotter", &["cap_sys_admin"]);
    let status = "grep -E 'Cap|Seccomp|NoNewPrivs' /proc/$(systemctl show --value -p MainPID cvmfs-snapshotter)/status";
    docs.run_and_see(PRIVILEGES, status, &["CapEff:\t", "Seccomp:\t2\n", "NoNewPrivs:\t1\n"]);

    let nerdctl = node.give(&tool("nerdctl"));
    node.shell(&format!("ln -s {nerdctl} /usr/bin/nerdctl")).ok();
    docs.substitute(&[("IMAGE", image), ("COMMAND", "/bin/cat /data/name")]);
    docs.run_and_see(README, "nerdctl run --snapshotter cvmfs-snapshotter --net none IMAGE COMMAND", &["mixed"]);
    assert!(!names(&node.machine.path(&format!("{STATE}/snapshotter/snapshots"))).is_empty());
}
