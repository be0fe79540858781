//! `cvmfs-snapshotter doctor`: looks at the node, the daemon, the repositories and containerd, and says
//! for whatever is wrong what it means and what to change. Changes nothing.
//!
//! Each check has a name that stays, for scripts. What cannot be looked at is said, and is no
//! reason to end: a doctor comes when things are broken. A person reads each finding as soon as it
//! is made: what hangs keeps nobody from what is known.
#![forbid(unsafe_code)]

mod anew;
mod child;
pub mod configuration;
mod containerd;
mod images;
mod judge;
mod node;
mod program;
mod reach;
mod repositories;
mod service;
mod systemd;

use std::fmt::Write as _;
use std::io::{self, Write};

use nix::unistd::geteuid;
use serde_json::json;

pub use self::program::Program;
pub use self::reach::probe as probe_path;
pub use self::repositories::probe as probe_repository;
use crate::admin::table::Progress;
use crate::cli::{self, Arguments};
use crate::model::printable;

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    Good,
    /// To know, and nothing to do.
    Note,
    /// It works, and not as it could; or it could not be looked at.
    Warning,
    /// Pulls or containers suffer.
    Problem,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its name, which stays.
    pub check: &'static str,
    pub state: State,
    pub what: String,
    /// What to change.
    pub remedy: Option<String>,
}

impl Finding {
    pub fn good(check: &'static str, what: impl Into<String>) -> Self {
        Self { check, state: State::Good, what: what.into(), remedy: None }
    }

    pub fn note(check: &'static str, what: impl Into<String>) -> Self {
        Self { check, state: State::Note, what: what.into(), remedy: None }
    }

    pub fn warning(check: &'static str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, state: State::Warning, what: what.into(), remedy: Some(remedy.into()) }
    }

    pub fn problem(check: &'static str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, state: State::Problem, what: what.into(), remedy: Some(remedy.into()) }
    }
}

/// So many of something are named, the others counted.
const NAMED: usize = 5;
/// What monitoring systems know as: it could not be looked at, or not be told.
pub const UNKNOWN: u8 = 3;

/// Writes what it finds. The result is the exit code: as monitoring systems have it, 0 is good, 1 a
/// warning, 2 a problem.
pub fn run(arguments: &Arguments, wanted: &cli::Doctor, out: &mut dyn Write) -> io::Result<u8> {
    let progress = Progress::new();
    let mut findings = Findings::new(if wanted.json { Form::Json } else { Form::Text }, &progress, out);
    if !geteuid().is_root() {
        let remedy = "run it as root: sudo cvmfs-snapshotter doctor";
        findings.push(Finding::warning("node.user", "this is not root: nothing can be said of this node", remedy));
        return findings.end().map(|_| UNKNOWN);
    }
    progress.set_message("asking the daemon");
    let asked = service::ask(arguments);
    let arguments = &service::as_started(arguments, &asked);
    progress.set_message("looking at the node");
    let config = node::look(arguments, &asked, &mut findings);
    progress.set_message("asking the repositories");
    let daemon = service::look(arguments, config.as_ref(), asked, &mut findings);
    progress.set_message("asking containerd");
    containerd::look(arguments, wanted, daemon.as_ref(), &progress, &mut findings);
    findings.end().map(|worst| match worst {
        State::Good | State::Note => 0,
        State::Warning => 1,
        State::Problem => 2,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text,
    Json,
}

/// What was found so far. As text it is written at once; JSON at the end.
struct Findings<'w> {
    all: Vec<Finding>,
    form: Form,
    progress: &'w Progress,
    out: &'w mut dyn Write,
    /// Since something could not be written, nothing is; what is looked at goes on.
    failed: Option<io::Error>,
}

impl<'w> Findings<'w> {
    fn new(form: Form, progress: &'w Progress, out: &'w mut dyn Write) -> Self {
        Self { all: Vec::new(), form, progress, out, failed: None }
    }

    fn push(&mut self, one: Finding) {
        if self.form == Form::Text {
            self.write(&as_text(&one));
        }
        self.all.push(one);
    }

    /// The worst of all, if all was written, or nobody listens any more.
    fn end(mut self) -> io::Result<State> {
        let worst = self.all.iter().map(|finding| finding.state).max().unwrap_or(State::Good);
        let text = match self.form {
            Form::Text => counts(&self.all),
            Form::Json => as_json(&self.all, worst),
        };
        self.write(&text);
        match self.failed {
            Some(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e),
            Some(_) | None => Ok(worst),
        }
    }

    fn write(&mut self, text: &str) {
        if self.failed.is_none() {
            self.progress.set_message("");
            self.failed = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).err();
        }
    }
}

impl Extend<Finding> for Findings<'_> {
    fn extend<I: IntoIterator<Item = Finding>>(&mut self, more: I) {
        more.into_iter().for_each(|one| self.push(one));
    }
}

fn as_json(findings: &[Finding], worst: State) -> String {
    let findings = findings
        .iter()
        .map(|one| json!({"check": one.check, "state": one.state.as_str(), "what": one.what, "remedy": one.remedy}));
    let report = json!({"state": worst.as_str(), "findings": findings.collect::<Vec<_>>()});
    format!("{report:#}\n")
}

fn as_text(one: &Finding) -> String {
    const INDENT: usize = 9;
    let mut text = format!("{:<INDENT$}{:<26}{}\n", one.state.as_str(), one.check, printable(&one.what));
    for line in one.remedy.iter().flat_map(|remedy| remedy.lines()) {
        // Writing into memory cannot fail.
        let _ = writeln!(text, "{:INDENT$}  | {}", "", printable(line));
    }
    text
}

fn counts(findings: &[Finding]) -> String {
    let count = |state| findings.iter().filter(|one| one.state == state).count();
    let of = |state: State| {
        let count = count(state);
        format!("{count} {}{}", state.as_str(), if count == 1 { "" } else { "s" })
    };
    format!("{}, {}; good: {}\n", of(State::Problem), of(State::Warning), count(State::Good))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Takes so many bytes, and then fails so.
    struct Full(Vec<u8>, usize, io::ErrorKind);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.len() + bytes.len() > self.1 {
                return Err(self.2.into());
            }
            self.0.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_finding_is_written_when_it_is_made_and_a_report_that_cannot_be_written_is_no_good_one() {
        let progress = Progress::new();
        for (room, kind, expected) in [
            (1 << 20, io::ErrorKind::StorageFull, Ok(State::Problem)),
            (40, io::ErrorKind::BrokenPipe, Ok(State::Problem)),
            (40, io::ErrorKind::StorageFull, Err(io::ErrorKind::StorageFull)),
        ] {
            let mut out = Full(Vec::new(), room, kind);
            let mut findings = Findings::new(Form::Text, &progress, &mut out);
            findings.push(Finding::good("node.disk", "x"));
            findings.push(Finding::problem("node.disk", "a\x1b[2Jb", "first\nsecond"));
            assert_eq!(findings.end().map_err(|e| e.kind()), expected, "{room}");
            let written = String::from_utf8(out.0).unwrap();
            assert!(written.starts_with("good     node.disk                 x\n"), "{written}");
            let whole = "problem  node.disk                 a?[2Jb\n           | first\n           | second\n1 problem, 0 warnings; good: 1\n";
            assert_eq!(written.ends_with(whole), room > 40, "{written}");
        }
    }

    #[test]
    fn the_documentation_explains_every_check_and_no_other() {
        let rooms = [
            include_str!("doctor.rs").split("#[cfg(test)]").next().unwrap(),
            include_str!("doctor/containerd.rs"),
            include_str!("doctor/images.rs"),
            include_str!("doctor/judge.rs"),
            include_str!("doctor/judge/parts.rs"),
            include_str!("doctor/judge/plugin.rs"),
            include_str!("doctor/judge/pulls.rs"),
            include_str!("doctor/node.rs"),
            include_str!("doctor/service.rs"),
            include_str!("doctor/systemd.rs"),
        ];
        let areas = ["node", "config", "daemon", "repository", "state", "containerd", "images", "pulls"];
        let is_check = |text: &&str| {
            let word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
            text.split_once('.').is_some_and(|(area, name)| areas.contains(&area) && word(name))
        };
        let checks: BTreeSet<&str> = rooms.iter().flat_map(|room| room.split('"')).filter(is_check).collect();
        let rows =
            include_str!("../docs/admin.md").lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        assert_eq!(checks, rows.collect());
    }
}
