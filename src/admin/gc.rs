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
}

/// Collects or removes leftovers, and returns the report.
pub fn run(address: &Path, options: Gc) -> client::Result<String> {
    let daemon = AdminClient::connect(address)?;
    let leftovers = collect_leftovers(&daemon)?;
    let remaining: Option<HashSet<PathBuf>> = if options.dry_run {
        None
    } else {
        daemon.clean_up()?;
        Some(daemon.leftovers()?.into_iter().map(|leftover| PathBuf::from(leftover.path)).collect())
    };
    Ok(if options.json { as_json(&leftovers, remaining.as_ref()) } else { as_table(&leftovers, remaining.as_ref()) })
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
        Leftover { path, kind, bytes }
    };
    // A leftover without a directory is only an id on the cleanup list.
    let on_disk =
        leftovers.into_iter().enumerate().map(measure).filter(|leftover| leftover.path.symlink_metadata().is_ok());
    Ok(on_disk.collect())
}

/// Whether a cleanup ran and did not remove the leftover. `remaining` is None if no cleanup ran.
fn is_present(leftover: &Leftover, remaining: Option<&HashSet<PathBuf>>) -> bool {
    remaining.is_some_and(|remaining| remaining.contains(&leftover.path))
}

fn as_json(leftovers: &[Leftover], remaining: Option<&HashSet<PathBuf>>) -> String {
    let rows = leftovers.iter().map(|leftover| {
        let removed = remaining.map(|_| !is_present(leftover, remaining));
        json!({"path": leftover.path, "what": leftover.kind, "bytes": leftover.bytes, "removed": removed})
    });
    let bytes: u64 = leftovers
        .iter()
        .filter(|leftover| !is_present(leftover, remaining))
        .filter_map(|leftover| leftover.bytes)
        .sum();
    let report = json!({"dry_run": remaining.is_none(), "bytes": bytes, "leftovers": rows.collect::<Vec<_>>()});
    format!("{report:#}\n")
}

fn as_table(leftovers: &[Leftover], remaining: Option<&HashSet<PathBuf>>) -> String {
    let rows = leftovers.iter().map(|leftover| {
        let bytes = leftover.bytes.map_or_else(|| "-".to_owned(), table::size);
        let note = if is_present(leftover, remaining) { "in use, or failed (see the log)" } else { "" };
        [leftover.path.display().to_string(), leftover.kind.to_owned(), bytes, note.to_owned()]
    });
    let mut text = if leftovers.is_empty() { String::new() } else { table::table(["PATH", "WHAT", "SIZE", ""], rows) };
    let (count, bytes) = leftovers
        .iter()
        .filter(|leftover| !is_present(leftover, remaining))
        .fold((0, 0), |(count, bytes), leftover| (count + 1, bytes + leftover.bytes.unwrap_or(0)));
    let verb = if remaining.is_some() { "were removed" } else { "would be removed" };
    // Writing into memory cannot fail.
    let _ = writeln!(text, "{count} directories with {} {verb}", table::size(bytes));
    text
}
