//! `make bench`: our daemon beside other snapshotters, in one run on one machine. Contestants take
//! turns within each round, so that the noise of the machine hits all of them.

mod cleanup;
mod contestant;
mod cycles;
mod growth;
mod host;
mod making;
mod plot;
mod pull;
mod report;
mod scan;
mod settings;
mod size;
mod start;
mod stats;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use serde_json::json;

use contestant::{Contestant, OURS};
use report::Group;
use settings::Settings;

type Part = fn(&Sandbox, &Settings, &Say) -> Group;

/// The parts that `BENCH_PARTS` can name, and whether they run by default.
const PARTS: [(&str, Part, bool); 8] = [
    ("cycles", cycles::run, true),
    ("making", making::run, true),
    ("growth", growth::run, true),
    ("cleanup", cleanup::run, true),
    ("pull", pull::run, true),
    ("start", start::run, true),
    ("scan", scan::run, false),
    ("size", size::run, true),
];

/// Tells how far it is.
pub struct Say(Instant);

impl Say {
    pub fn that(&self, text: &str) {
        eprintln!("[{:6.1} s] {text}", self.0.elapsed().as_secs_f64());
    }
}

fn main() -> ExitCode {
    match Settings::read() {
        Ok(settings) => measure(&settings),
        Err(why) => {
            eprintln!("bench: {why}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn measure(settings: &Settings) {
    let say = Say(Instant::now());
    let sandbox = Sandbox::enter("bench");
    let facts = host::describe(sandbox.dir());
    println!("{}", host::format_facts(&facts));
    if facts["state roots"].as_str().is_some_and(|fs| fs.starts_with("tmpfs")) {
        println!("  !! nothing is durable on tmpfs: set TMPDIR to a directory on a disk\n");
    }
    println!("  median [lowest..highest of a few samples, or quartiles of many] (× how many times ours)\n");
    let mut groups = Vec::new();
    for (name, run, _) in PARTS.into_iter().filter(|(name, ..)| settings.parts.contains(name)) {
        let group = run(&sandbox, settings, &say);
        println!("{}", group.table());
        if let Some(path) = settings.plot.as_ref().filter(|_| name == "growth") {
            let drawing = plot::svg("What a call costs as the store grows", &growth::series(&group));
            fs::write(path, drawing).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
        }
        groups.push(group.json());
    }
    let path = &settings.json;
    let all =
        serde_json::to_string_pretty(&json!({ "machine": facts, "groups": groups })).expect("JSON can be written");
    fs::write(path, all + "\n").unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    say.that(&format!("all numbers are in {}; removing what was measured with", path.display()));
    drop(sandbox);
    say.that("done");
}

/// All that take part in calls on the socket, ours first, each with a state of its own. Without a
/// repository they have an empty one.
pub fn contestants(sandbox: &Sandbox, settings: &Settings, part: &str, repository: Option<&Path>) -> Vec<Contestant> {
    let dir = |name: &str| sandbox.path(&format!("{part}-{name}"));
    let empty = Repository::plain(&sandbox.path("nothing-published"));
    let repository = repository.unwrap_or(empty.dir());
    let mut all = vec![
        Contestant::ours(OURS, &dir("ours"), repository, ""),
        Contestant::overlayfs(&dir("overlayfs")),
        Contestant::go(&dir("go"), repository),
    ];
    all.extend(Contestant::foreign(settings));
    all
}

/// In which order so many take their turns in a round: nobody is always the first.
pub fn turns(number: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..number).map(move |n| (n + round) % number)
}
