//! What a rebuild tells the admin, as a table or as JSON.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::path::PathBuf;

use serde_json::json;

use super::containerd::Repair;
use crate::model::{printable, shell_quote, shell_quote_all};

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub metadata: PathBuf,
    /// What containerd calls us.
    pub snapshotter: String,
    pub published: usize,
    pub committed: usize,
    pub active: usize,
    pub views: usize,
    /// Of all these, those that containerd does not know.
    pub unknown: usize,
    /// Name and reason.
    pub left_out: Vec<(String, String)>,
    pub repairs: Vec<Repair>,
    /// Where the old file is now.
    pub old: Option<PathBuf>,
    /// None: it was gone without.
    pub containerd: Option<PathBuf>,
}

impl Report {
    pub fn text(&self, json: bool) -> String {
        if json { self.json() } else { self.table() }
    }

    fn json(&self) -> String {
        let left_out: Vec<_> = self.left_out.iter().map(|(name, why)| json!({"name": name, "reason": why})).collect();
        let repairs = self.repairs.iter().map(|repair| match repair {
            Repair::Image { namespace, reference } => json!({"namespace": namespace, "image": reference}),
            Repair::Snapshot { namespace, key } => json!({"namespace": namespace, "snapshot": key}),
        });
        let report = json!({
            "metadata": self.metadata,
            "old": self.old,
            "containerd": self.containerd,
            "rebuilt": {
                "published": self.published,
                "committed": self.committed,
                "active": self.active,
                "views": self.views,
            },
            "unknown_to_containerd": self.unknown,
            "left_out": left_out,
            "repairs": repairs.collect::<Vec<_>>(),
        });
        format!("{report:#}\n")
    }

    fn table(&self) -> String {
        let mut text = format!("rebuilt {}\n", self.metadata.display());
        // Writing into memory cannot fail.
        for (what, count) in [
            ("published layers", self.published),
            ("other committed snapshots", self.committed),
            ("active snapshots", self.active),
            ("views", self.views),
            ("left out", self.left_out.len()),
        ] {
            let _ = writeln!(text, "  {what:<26} {count:>6}");
        }
        match &self.containerd {
            Some(_) if self.unknown > 0 => {
                let _ = writeln!(
                    text,
                    "{} of them containerd does not know: its next garbage collection removes them",
                    self.unknown
                );
            }
            Some(_) => {}
            None => text.push_str(
                "without containerd's metadata: published layers do not come back, remove those images and pull them again\n",
            ),
        }
        if !self.left_out.is_empty() {
            text.push_str("left out, with directories left alone:\n");
        }
        for (name, why) in &self.left_out {
            let _ = writeln!(text, "  {}: {}", printable(name), printable(why));
        }
        if !self.repairs.is_empty() {
            text.push_str(
                "to repair, once containerd runs (remove containers first, and pull images again after it):\n",
            );
        }
        for repair in &self.repairs {
            let command = match repair {
                Repair::Image { namespace, reference } => {
                    format!(
                        "ctr -n {} images rm --sync {}",
                        shell_quote(namespace),
                        shell_quote_all([reference.as_str()])
                    )
                }
                Repair::Snapshot { namespace, key } => {
                    let (namespace, snapshotter) = (shell_quote(namespace), shell_quote(&self.snapshotter));
                    let key = shell_quote_all([key.as_str()]);
                    format!("ctr -n {namespace} snapshots --snapshotter {snapshotter} rm {key}")
                }
            };
            let _ = writeln!(text, "  {}", printable(&command));
        }
        if let Some(old) = &self.old {
            let _ = writeln!(text, "the old file is kept as {}", old.display());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_clients_chose_send_a_terminal_nothing_and_are_no_options() {
        let text = |name: &str| name.to_owned();
        let report = Report {
            left_out: vec![(text("k8s.io/1/\x1b[2J"), text("why\r"))],
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
