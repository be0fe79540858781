//! The result of a rebuild, as a table or as JSON.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fmt::Write;
use std::path::PathBuf;

use serde_json::json;

use super::containerd::{self, ContainerdSnapshot, Repair};
use crate::migration::chain_validation::{Accepted, Counts, Rejected};
use crate::model::{printable, shell_quote, shell_quote_all};

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub metadata: PathBuf,
    /// The name of this snapshotter in containerd's configuration.
    pub snapshotter: String,
    pub counts: Counts,
    /// Number of restored snapshots that containerd does not know.
    pub unknown: usize,
    pub rejected: Vec<Rejected>,
    pub repairs: Vec<Repair>,
    /// The new name of the old file.
    pub old: Option<PathBuf>,
    /// None: containerd's metadata was not read.
    pub containerd: Option<PathBuf>,
}

impl Report {
    pub(super) fn new(containerd: Option<PathBuf>, accepted: &Accepted, known: &[ContainerdSnapshot]) -> Self {
        let names: HashSet<&str> = known.iter().map(|snapshot| snapshot.name.as_str()).collect();
        let keys: HashSet<&str> = accepted.snapshots.iter().map(|snapshot| snapshot.key.as_str()).collect();
        Self {
            counts: accepted.counts(),
            unknown: if containerd.is_some() { keys.difference(&names).count() } else { 0 },
            rejected: accepted.rejected.clone(),
            repairs: containerd::repairs(known, &|name| keys.contains(name)),
            containerd,
            ..Self::default()
        }
    }

    pub fn text(&self, json: bool) -> String {
        if json { self.json() } else { self.table() }
    }

    fn json(&self) -> String {
        let rejected = self.rejected.iter();
        let rejected = rejected.map(|one| json!({"name": one.name, "reason": one.reason.to_string()}));
        let repairs = self.repairs.iter().map(|repair| match repair {
            Repair::Image { namespace, reference } => json!({"namespace": namespace, "image": reference}),
            Repair::Snapshot { namespace, key } => json!({"namespace": namespace, "snapshot": key}),
        });
        let report = json!({
            "metadata": self.metadata,
            "old": self.old,
            "containerd": self.containerd,
            "rebuilt": {
                "published": self.counts.published,
                "committed": self.counts.committed,
                "active": self.counts.active,
                "views": self.counts.views,
            },
            "unknown_to_containerd": self.unknown,
            "left_out": rejected.collect::<Vec<_>>(),
            "repairs": repairs.collect::<Vec<_>>(),
        });
        format!("{report:#}\n")
    }

    fn table(&self) -> String {
        let mut text = format!("rebuilt {}\n", self.metadata.display());
        // Writing to a string cannot fail.
        for (name, count) in [
            ("published layers", self.counts.published),
            ("other committed snapshots", self.counts.committed),
            ("active snapshots", self.counts.active),
            ("views", self.counts.views),
            ("left out", self.rejected.len()),
        ] {
            let _ = writeln!(text, "  {name:<26} {count:>6}");
        }
        if self.containerd.is_none() {
            text.push_str(
                "without containerd's metadata: published layers are not restored; remove those images and pull them again\n",
            );
        }
        if self.unknown > 0 {
            let _ = writeln!(
                text,
                "containerd does not know {} of them: its next garbage collection removes them",
                self.unknown
            );
        }
        if !self.rejected.is_empty() {
            text.push_str("left out (their directories were not touched):\n");
        }
        for rejected in &self.rejected {
            let _ = writeln!(text, "  {}: {}", printable(&rejected.name), printable(&rejected.reason.to_string()));
        }
        if !self.repairs.is_empty() {
            text.push_str(
                "to repair when containerd runs (first remove the containers; pull the images again afterwards):\n",
            );
        }
        for repair in &self.repairs {
            let _ = writeln!(text, "  {}", printable(&self.repair_command(repair)));
        }
        if let Some(old) = &self.old {
            let _ = writeln!(text, "the old file is kept as {}", old.display());
        }
        text
    }

    fn repair_command(&self, repair: &Repair) -> String {
        match repair {
            Repair::Image { namespace, reference } => {
                let reference = shell_quote_all([reference.as_str()]);
                format!("ctr -n {} images rm --sync {reference}", shell_quote(namespace))
            }
            Repair::Snapshot { namespace, key } => {
                let (namespace, snapshotter) = (shell_quote(namespace), shell_quote(&self.snapshotter));
                let key = shell_quote_all([key.as_str()]);
                format!("ctr -n {namespace} snapshots --snapshotter {snapshotter} rm {key}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::chain_validation::RejectReason;
    use crate::model::Key;

    #[test]
    fn names_of_clients_are_printed_without_control_characters_and_not_as_options() {
        let text = |name: &str| name.to_owned();
        let report = Report {
            rejected: vec![Rejected {
                name: text("k8s.io/1/\x1b[2J"),
                reason: RejectReason::ParentMissing(Key::parse("parent\r").unwrap()),
            }],
            repairs: vec![
                Repair::Image { namespace: text("k8s.io"), reference: text("--all") },
                Repair::Snapshot { namespace: text("k8s.io"), key: text("a\x1b]0;x\x07b") },
            ],
            snapshotter: text("cvmfs-snapshotter"),
            ..Report::default()
        };
        let shown = report.text(false);
        assert!(shown.chars().all(|c| !c.is_control() || c == '\n'), "{shown:?}");
        assert!(shown.contains("  ctr -n k8s.io images rm --sync -- --all\n"), "{shown}");
    }
}
