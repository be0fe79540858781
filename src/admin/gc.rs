//! `cvmfs-snapshotter gc`: shows or removes at once what removed snapshots left. containerd asks the daemon for the same
//! after each of its own garbage collections.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::admin::client::{self, AdminClient};
use crate::admin::table::{self, Progress};
use crate::cli::Gc;
use crate::proto::admin::leftover::What;
use crate::system::{Host, Sys};

/// A directory that nothing needs.
struct Leftover {
    path: PathBuf,
    kind: &'static str,
    /// Size on disk. None if it has no files of its own, or cannot be measured.
    bytes: Option<u64>,
    /// Whether the cleanup has removed it. None if no cleanup ran.
    removed: Option<bool>,
}

/// Collects or removes leftovers, and returns the report.
pub fn run(address: &Path, options: Gc) -> client::Result<String> {
    let daemon = AdminClient::connect(address)?;
    let mut leftovers = collect_leftovers(&daemon)?;
    if !options.dry_run {
        daemon.clean_up()?;
        let remaining: HashSet<PathBuf> =
            daemon.leftovers()?.into_iter().map(|leftover| PathBuf::from(leftover.path)).collect();
        for leftover in &mut leftovers {
            leftover.removed = Some(!remaining.contains(&leftover.path));
        }
    }
    Ok(if options.json { as_json(&leftovers, options.dry_run) } else { as_table(&leftovers, options.dry_run) })
}

fn collect_leftovers(daemon: &AdminClient) -> client::Result<Vec<Leftover>> {
    let progress = Progress::new();
    let leftovers = daemon.leftovers()?;
    let count = leftovers.len();
    let measure = |(n, leftover): (usize, crate::proto::admin::Leftover)| {
        progress.set_message(&format!("measuring {} of {count}", n + 1));
        let path = PathBuf::from(leftover.path);
        let (kind, bytes) = match leftover.what.enum_value_or_default() {
            What::DETACHED => ("unused layer", None),
            What::REMOVED => ("removed snapshot", Host.disk_usage(&path, &|| false).ok().map(|usage| usage.bytes)),
            What::UNKNOWN => ("unknown", None),
        };
        Leftover { path, kind, bytes, removed: None }
    };
    // A leftover without a directory is only an id on the cleanup list.
    let on_disk =
        leftovers.into_iter().enumerate().map(measure).filter(|leftover| leftover.path.symlink_metadata().is_ok());
    Ok(on_disk.collect())
}

/// The leftovers that were removed, or would be.
fn removable(leftovers: &[Leftover]) -> impl Iterator<Item = &Leftover> {
    leftovers.iter().filter(|leftover| leftover.removed != Some(false))
}

fn as_json(leftovers: &[Leftover], dry_run: bool) -> String {
    let rows = leftovers.iter().map(|Leftover { path, kind, bytes, removed }| {
        json!({"path": path, "what": kind, "bytes": bytes, "removed": removed})
    });
    let bytes: u64 = removable(leftovers).filter_map(|leftover| leftover.bytes).sum();
    let report = json!({"dry_run": dry_run, "bytes": bytes, "leftovers": rows.collect::<Vec<_>>()});
    format!("{report:#}\n")
}

fn as_table(leftovers: &[Leftover], dry_run: bool) -> String {
    let rows = leftovers.iter().map(|leftover| {
        let bytes = leftover.bytes.map_or_else(|| "-".to_owned(), table::size);
        let note = if leftover.removed == Some(false) { "in use, or failed (see the log)" } else { "" };
        [leftover.path.display().to_string(), leftover.kind.to_owned(), bytes, note.to_owned()]
    });
    let mut text = if leftovers.is_empty() { String::new() } else { table::table(["PATH", "WHAT", "SIZE", ""], rows) };
    let count = removable(leftovers).count();
    let bytes = removable(leftovers).filter_map(|leftover| leftover.bytes).sum();
    let verb = if dry_run { "would be removed" } else { "were removed" };
    // Writing into memory cannot fail.
    let _ = writeln!(text, "{count} directories with {} {verb}", table::size(bytes));
    text
}
