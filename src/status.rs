//! `cvmfs-snapshotter status`: the images on this node, where their files come from, who uses them
//! and what they take; repositories and their health. Asks the running daemon.
#![forbid(unsafe_code)]

mod report;

use std::collections::HashMap;
use std::path::Path;

#[cfg(test)]
pub use self::report::Source;
pub use self::report::{Image, Report};
use crate::admin::{self, Daemon};
use crate::cli::Status;
use crate::proto::admin::Snapshot;
use crate::table::Progress;

/// The report.
pub fn run(address: &Path, wanted: Status) -> admin::Result<String> {
    let report = look(address, wanted)?;
    Ok(if wanted.json { report.json() } else { report.text() })
}

fn look(address: &Path, wanted: Status) -> admin::Result<Report> {
    let progress = Progress::new();
    progress.say("asking the daemon");
    let daemon = Daemon::connect(address)?;
    let described = daemon.describe()?;
    let snapshots = daemon.snapshots(true, |count| progress.say(&format!("{count} snapshots")))?;
    let leftovers = daemon.leftovers()?.len();
    let usages = measure(&daemon, &snapshots, wanted, &progress)?;
    Ok(Report::new(&described, &snapshots, &usages, leftovers))
}

/// By id. What was committed was measured before, mostly; what containers write is walked.
fn measure(
    daemon: &Daemon,
    snapshots: &[Snapshot],
    wanted: Status,
    progress: &Progress,
) -> admin::Result<HashMap<u64, u64>> {
    let is_wanted = |one: &&Snapshot| one.digest.is_empty() && (report::is_committed(one) || !wanted.quick);
    let local: Vec<&Snapshot> = snapshots.iter().filter(is_wanted).collect();
    let mut usages = HashMap::new();
    for (n, one) in local.iter().enumerate() {
        progress.say(&format!("measuring {} of {}", n + 1, local.len()));
        if let Some(bytes) = daemon.usage(&one.key)? {
            usages.insert(one.id, bytes);
        }
    }
    Ok(usages)
}
