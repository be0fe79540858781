//! `cvmfs-snapshotter status`: the images on this node, where their files come from, who uses them
//! and what they take; repositories and their health. Asks the running daemon.
#![forbid(unsafe_code)]

mod report;

use std::collections::HashMap;
use std::path::Path;

#[cfg(test)]
pub use self::report::ImageOrigin;
pub use self::report::{Image, Report};
use crate::admin::client::{self, AdminClient};
use crate::admin::table::Progress;
use crate::cli::Status;
use crate::proto::admin::Snapshot;

/// The report.
pub fn run(address: &Path, wanted: Status) -> client::Result<String> {
    let report = collect(address, wanted)?;
    Ok(if wanted.json { report.json() } else { report.text() })
}

fn collect(address: &Path, wanted: Status) -> client::Result<Report> {
    let progress = Progress::new();
    progress.set_message("asking the daemon");
    let daemon = AdminClient::connect(address)?;
    let described = daemon.describe()?;
    let snapshots = daemon.snapshots(true, |count| progress.set_message(&format!("{count} snapshots")))?;
    let leftovers = daemon.leftovers()?.len();
    let usages = disk_usages(&daemon, &snapshots, wanted, &progress)?;
    Ok(Report::new(&described, &snapshots, &usages, leftovers))
}

/// By id. What was committed was measured before, mostly; what containers write is walked.
fn disk_usages(
    daemon: &AdminClient,
    snapshots: &[Snapshot],
    wanted: Status,
    progress: &Progress,
) -> client::Result<HashMap<u64, u64>> {
    let is_wanted = |one: &&Snapshot| one.digest.is_empty() && (report::is_committed(one) || !wanted.quick);
    let local: Vec<&Snapshot> = snapshots.iter().filter(is_wanted).collect();
    let mut usages = HashMap::new();
    for (n, one) in local.iter().enumerate() {
        progress.set_message(&format!("measuring {} of {}", n + 1, local.len()));
        if let Some(bytes) = daemon.usage(&one.key)? {
            usages.insert(one.id, bytes);
        }
    }
    Ok(usages)
}
