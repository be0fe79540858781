//! `cvmfs-snapshotter doctor`: looks at the node, the daemon, the repositories and containerd, and says
//! for whatever is wrong what it means and what to change. Changes nothing.
//!
//! Each check has a name that stays, for scripts. What cannot be looked at is said, and is no
//! reason to end: a doctor comes when things are broken.
#![forbid(unsafe_code)]

mod child;
pub mod configuration;
mod containerd;
mod images;
mod judge;
mod node;
mod repositories;
mod service;
mod systemd;

use std::fmt::Write;

use nix::unistd::geteuid;
use serde_json::json;

pub use self::repositories::probe;
use crate::cli::{self, Arguments};
use crate::table::{Progress, printable};

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
/// What monitoring systems know as: it could not be looked at.
const UNKNOWN: u8 = 3;

/// What was found, and the exit code: as monitoring systems have it, 0 is good, 1 a warning, 2 a
/// problem.
pub fn run(arguments: &Arguments, wanted: &cli::Doctor) -> (String, u8) {
    if !geteuid().is_root() {
        let remedy = "run it as root: sudo cvmfs-snapshotter doctor";
        let findings = [Finding::warning("node.user", "this is not root: nothing can be said of this node", remedy)];
        return (if wanted.json { as_json(&findings, State::Warning) } else { as_text(&findings) }, UNKNOWN);
    }
    let progress = Progress::new();
    progress.say("looking at the node");
    let (mut findings, config) = node::look(arguments);
    progress.say("asking the daemon and the repositories");
    let daemon = service::look(arguments, config.as_ref(), &mut findings);
    progress.say("asking containerd");
    containerd::look(arguments, wanted, daemon.as_ref(), &progress, &mut findings);
    drop(progress);
    let worst = findings.iter().map(|finding| finding.state).max().unwrap_or(State::Good);
    let text = if wanted.json { as_json(&findings, worst) } else { as_text(&findings) };
    let code = match worst {
        State::Good | State::Note => 0,
        State::Warning => 1,
        State::Problem => 2,
    };
    (text, code)
}

fn as_json(findings: &[Finding], worst: State) -> String {
    let findings = findings
        .iter()
        .map(|one| json!({"check": one.check, "state": one.state.as_str(), "what": one.what, "remedy": one.remedy}));
    let report = json!({"state": worst.as_str(), "findings": findings.collect::<Vec<_>>()});
    format!("{report:#}\n")
}

fn as_text(findings: &[Finding]) -> String {
    const INDENT: usize = 9;
    let mut text = String::new();
    // Writing into memory cannot fail.
    for one in findings {
        let _ = writeln!(text, "{:<INDENT$}{:<26}{}", one.state.as_str(), one.check, printable(&one.what));
        for line in one.remedy.iter().flat_map(|remedy| remedy.lines()) {
            let _ = writeln!(text, "{:INDENT$}  | {}", "", printable(line));
        }
    }
    let count = |state| findings.iter().filter(|one| one.state == state).count();
    let _ = writeln!(
        text,
        "{} problems, {} warnings, {} checks are good",
        count(State::Problem),
        count(State::Warning),
        count(State::Good)
    );
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn the_documentation_explains_every_check_and_no_other() {
        let rooms = [
            include_str!("doctor.rs").split("#[cfg(test)]").next().unwrap(),
            include_str!("doctor/containerd.rs"),
            include_str!("doctor/images.rs"),
            include_str!("doctor/judge.rs").split("#[cfg(test)]").next().unwrap(),
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
