//! `cvmfs-snapshotter doctor`: checks the node, the daemon, the repositories and containerd, and prints for each fault what
//! it means and what to change. It changes nothing.
//!
//! Names of checks are stable, because scripts rely on them. Text is printed finding by finding, so that a check that hangs
//! holds back no other result. What cannot be checked is a finding too, and never ends the run.
#![forbid(unsafe_code)]

mod config;
mod containerd;
mod images;
mod node;
mod probe;
mod rules;
mod service;
mod systemd;

use std::fmt::Write as _;
use std::io::{self, Write};

use nix::unistd::geteuid;
use serde_json::json;

pub use self::probe::probe;
use crate::admin::table::Progress;
use crate::cli::{self, Arguments};
use crate::model::printable;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Good,
    /// There is nothing to do.
    Note,
    /// Something works worse than it could, or could not be checked.
    Warning,
    /// Pulls or containers suffer.
    Problem,
}

impl Severity {
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
    /// The stable name.
    pub check: &'static str,
    pub severity: Severity,
    pub message: String,
    /// What to change, for a warning or a problem.
    pub remedy: Option<String>,
}

impl Finding {
    pub fn good(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, severity: Severity::Good, message: message.into(), remedy: None }
    }

    pub fn note(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, severity: Severity::Note, message: message.into(), remedy: None }
    }

    pub fn warning(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, severity: Severity::Warning, message: message.into(), remedy: Some(remedy.into()) }
    }

    pub fn problem(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, severity: Severity::Problem, message: message.into(), remedy: Some(remedy.into()) }
    }

    fn to_text(&self) -> String {
        const INDENT: usize = 9;
        let Self { check, severity, message, remedy } = self;
        let mut text = format!("{:<INDENT$}{check:<26}{}\n", severity.as_str(), printable(message));
        for line in remedy.iter().flat_map(|remedy| remedy.lines()) {
            // Writing into memory cannot fail.
            let _ = writeln!(text, "{:INDENT$}  | {}", "", printable(line));
        }
        text
    }
}

/// Names the first few of many things.
fn list(mut names: impl ExactSizeIterator<Item = String>) -> String {
    const MAX_NAMED: usize = 5;
    let first: Vec<String> = names.by_ref().take(MAX_NAMED).collect();
    let rest = if names.len() > 0 { format!("; and {} more", names.len()) } else { String::new() };
    format!("{}{rest}", first.join("; "))
}

/// Monitoring systems take this exit code for "unknown": nothing could be checked, or the report not be written.
pub const UNKNOWN: u8 = 3;

/// Writes the report. The result is the exit code: 0 is good, 1 a warning, 2 a problem, as monitoring systems have it.
pub fn run(arguments: &Arguments, options: &cli::Doctor, out: &mut dyn Write) -> io::Result<u8> {
    let progress = Progress::new();
    let mut report =
        Report { is_json: options.json, progress: &progress, out, findings: Vec::new(), write_error: None };
    if !geteuid().is_root() {
        let remedy = "run it as root: sudo cvmfs-snapshotter doctor";
        report.push(Finding::warning("node.user", "not run by root: nothing can be checked", remedy));
        return report.finish().map(|_| UNKNOWN);
    }
    progress.set_message("asking the daemon");
    let daemon = service::connect(arguments);
    let arguments = &service::effective_arguments(arguments, &daemon);
    progress.set_message("checking the node");
    let config = node::check(arguments, daemon.is_ok(), &mut report);
    progress.set_message("asking the repositories");
    let daemon = service::check(arguments, config.as_ref(), daemon, &mut report);
    progress.set_message("asking containerd");
    containerd::check(arguments, options, daemon.as_ref(), &progress, &mut report);
    report.finish().map(|worst| match worst {
        Severity::Good | Severity::Note => 0,
        Severity::Warning => 1,
        Severity::Problem => 2,
    })
}

/// The findings so far. Text is written at once, JSON at the end.
struct Report<'w> {
    findings: Vec<Finding>,
    is_json: bool,
    progress: &'w Progress,
    out: &'w mut dyn Write,
    /// The first failure; nothing is written after it, and the checks go on.
    write_error: Option<io::Error>,
}

impl Report<'_> {
    fn push(&mut self, finding: Finding) {
        if !self.is_json {
            self.write(&finding.to_text());
        }
        self.findings.push(finding);
    }

    /// The worst severity, if all was written or the reader has closed the pipe.
    fn finish(mut self) -> io::Result<Severity> {
        let worst = self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Good);
        let text = if self.is_json { to_json(&self.findings, worst) } else { summary(&self.findings) };
        self.write(&text);
        match self.write_error {
            Some(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e),
            Some(_) | None => Ok(worst),
        }
    }

    fn write(&mut self, text: &str) {
        if self.write_error.is_none() {
            self.progress.set_message("");
            self.write_error = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).err();
        }
    }
}

impl Extend<Finding> for Report<'_> {
    fn extend<I: IntoIterator<Item = Finding>>(&mut self, findings: I) {
        findings.into_iter().for_each(|finding| self.push(finding));
    }
}

fn to_json(findings: &[Finding], worst: Severity) -> String {
    let findings: Vec<serde_json::Value> = findings
        .iter()
        .map(|one| json!({"check": one.check, "state": one.severity.as_str(), "what": one.message, "remedy": one.remedy}))
        .collect();
    format!("{:#}\n", json!({"state": worst.as_str(), "findings": findings}))
}

fn summary(findings: &[Finding]) -> String {
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let plural = |count| if count == 1 { "" } else { "s" };
    let (problems, warnings) = (count(Severity::Problem), count(Severity::Warning));
    let good = count(Severity::Good);
    format!("{problems} problem{}, {warnings} warning{}; good: {good}\n", plural(problems), plural(warnings))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn report_shows_each_finding_with_its_remedy_and_a_summary() {
        let (progress, mut out) = (Progress::new(), Vec::new());
        let mut report =
            Report { is_json: false, progress: &progress, out: &mut out, findings: Vec::new(), write_error: None };
        report.push(Finding::good("node.disk", "x"));
        report.push(Finding::problem("node.disk", "a\x1b[2Jb", "first\nsecond"));
        assert_eq!(report.finish().unwrap(), Severity::Problem);
        let text = "good     node.disk                 x\n\
                    problem  node.disk                 a?[2Jb\n           | first\n           | second\n\
                    1 problem, 0 warnings; good: 1\n";
        assert_eq!(String::from_utf8(out).unwrap(), text);
        let names = |count: usize| list((0..count).map(|n| n.to_string()));
        assert_eq!((names(2), names(7)), ("0; 1".to_owned(), "0; 1; 2; 3; 4; and 2 more".to_owned()));
    }

    #[test]
    fn the_documentation_explains_every_check_and_no_other() {
        let sources = [
            include_str!("doctor.rs").split("#[cfg(test)]").next().unwrap(),
            include_str!("doctor/containerd.rs"),
            include_str!("doctor/images.rs"),
            include_str!("doctor/node.rs"),
            include_str!("doctor/rules.rs"),
            include_str!("doctor/service.rs"),
            include_str!("doctor/systemd.rs"),
        ];
        let areas = ["node", "config", "daemon", "repository", "state", "containerd", "images", "pulls"];
        let is_check = |text: &&str| {
            let word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
            text.split_once('.').is_some_and(|(area, name)| areas.contains(&area) && word(name))
        };
        let checks: BTreeSet<&str> = sources.iter().flat_map(|source| source.split('"')).filter(is_check).collect();
        let rows =
            include_str!("../docs/admin.md").lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        assert_eq!(checks, rows.collect());
    }
}
