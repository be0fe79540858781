//! `cvmfs-snapshotter gc`: what removed snapshots left, shown or taken away at once. containerd has
//! it done as well, after each of its own garbage collections.
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

/// Something that nothing needs.
struct Leftover {
    path: PathBuf,
    what: &'static str,
    /// None: it holds nothing of its own, or cannot be measured.
    bytes: Option<u64>,
}

/// The report.
pub fn run(address: &Path, wanted: Gc) -> client::Result<String> {
    let daemon = AdminClient::connect(address)?;
    let found = collect_leftovers(&daemon)?;
    let left: Option<HashSet<PathBuf>> = if wanted.dry_run {
        None
    } else {
        daemon.clean_up()?;
        Some(daemon.leftovers()?.into_iter().map(|one| PathBuf::from(one.path)).collect())
    };
    Ok(if wanted.json { as_json(&found, left.as_ref()) } else { as_table(&found, left.as_ref()) })
}

fn collect_leftovers(daemon: &AdminClient) -> client::Result<Vec<Leftover>> {
    let progress = Progress::new();
    let leftovers = daemon.leftovers()?;
    let count = leftovers.len();
    let measure = |(n, one): (usize, crate::proto::admin::Leftover)| {
        progress.set_message(&format!("measuring {} of {count}", n + 1));
        let path = PathBuf::from(one.path);
        let (what, bytes) = match one.what.enum_value_or_default() {
            What::DETACHED => ("layer in no use", None),
            What::REMOVED => ("removed snapshot", Host.disk_usage(&path, &|| false).ok().map(|usage| usage.bytes)),
            What::UNKNOWN => ("unknown", None),
        };
        Leftover { path, what, bytes }
    };
    // What has nothing on disk is only a number on a list.
    let on_disk = leftovers.into_iter().enumerate().map(measure).filter(|one| one.path.symlink_metadata().is_ok());
    Ok(on_disk.collect())
}

/// Whether a cleanup left it. None: there was none.
fn still_present(one: &Leftover, left: Option<&HashSet<PathBuf>>) -> bool {
    left.is_some_and(|left| left.contains(&one.path))
}

fn as_json(found: &[Leftover], left: Option<&HashSet<PathBuf>>) -> String {
    let leftovers = found.iter().map(|one| {
        let removed = left.map(|_| !still_present(one, left));
        json!({"path": one.path, "what": one.what, "bytes": one.bytes, "removed": removed})
    });
    let bytes: u64 = found.iter().filter(|one| !still_present(one, left)).filter_map(|one| one.bytes).sum();
    let report = json!({"dry_run": left.is_none(), "bytes": bytes, "leftovers": leftovers.collect::<Vec<_>>()});
    format!("{report:#}\n")
}

fn as_table(found: &[Leftover], left: Option<&HashSet<PathBuf>>) -> String {
    let mut rows = vec![["PATH", "WHAT", "SIZE", ""].map(str::to_owned).to_vec()];
    rows.extend(found.iter().map(|one| {
        let bytes = one.bytes.map_or_else(|| "-".to_owned(), table::size);
        let note = if still_present(one, left) { "in use, or see the log: next time" } else { "" };
        vec![one.path.display().to_string(), one.what.to_owned(), bytes, note.to_owned()]
    }));
    let mut text = if found.is_empty() { String::new() } else { table::table(&rows) };
    let (gone, bytes) = found
        .iter()
        .filter(|one| !still_present(one, left))
        .fold((0, 0), |(count, bytes), one| (count + 1, bytes + one.bytes.unwrap_or(0)));
    let verb = if left.is_some() { "were removed" } else { "would be removed" };
    // Writing into memory cannot fail.
    let _ = writeln!(text, "{gone} directories with {} {verb}", table::size(bytes));
    text
}
