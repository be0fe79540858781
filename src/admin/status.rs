//! `cvmfs-snapshotter status`: shows the images on this node, where their files come from, who uses them and how much disk
//! they take, and the health of the repositories. All of it is asked from the running daemon.
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

/// Asks the daemon, and returns the report.
pub fn run(address: &Path, options: Status) -> client::Result<String> {
    let report = collect(address, options)?;
    Ok(if options.json { report.json() } else { report.text() })
}

fn collect(address: &Path, options: Status) -> client::Result<Report> {
    let progress = Progress::new();
    progress.set_message("asking the daemon");
    let daemon = AdminClient::connect(address)?;
    let described = daemon.describe()?;
    let snapshots = daemon.snapshots(true, |count| progress.set_message(&format!("{count} snapshots")))?;
    let leftovers = daemon.leftovers()?.len();
    let usages = disk_usages(&daemon, &snapshots, options, &progress)?;
    Ok(Report::new(&described, &snapshots, &usages, leftovers))
}

/// The bytes on disk of snapshots with files of their own, by id. Most committed snapshots were measured before; those that
/// containers write to are measured now.
fn disk_usages(
    daemon: &AdminClient,
    snapshots: &[Snapshot],
    options: Status,
    progress: &Progress,
) -> client::Result<HashMap<u64, u64>> {
    let is_measured =
        |snapshot: &&Snapshot| snapshot.digest.is_empty() && (report::is_committed(snapshot) || !options.quick);
    let local: Vec<&Snapshot> = snapshots.iter().filter(is_measured).collect();
    let mut usages = HashMap::new();
    for (n, snapshot) in local.iter().enumerate() {
        progress.set_message(&format!("measuring {} of {}", n + 1, local.len()));
        if let Some(bytes) = daemon.usage(&snapshot.key)? {
            usages.insert(snapshot.id, bytes);
        }
    }
    Ok(usages)
}
