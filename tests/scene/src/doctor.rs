//! The findings of `cvmfs-snapshotter doctor --json`.

use std::path::Path;

use serde_json::Value;

use crate::process::Output;
use crate::snapshotter::Snapshotter;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub check: String,
    /// `good`, `note`, `warning` or `problem`.
    pub state: String,
    pub what: String,
    pub remedy: Option<String>,
}

impl Finding {
    pub fn is_fault(&self) -> bool {
        ["warning", "problem"].contains(&self.state.as_str())
    }
}

/// The doctor's findings about our daemon and the containerd at `socket` with the configuration `file`.
#[track_caller]
pub fn findings(snapshotter: &Snapshotter, socket: &Path, file: &Path) -> Vec<Finding> {
    let (socket, file) = (socket.display().to_string(), file.display().to_string());
    read(&snapshotter.admin(&["doctor", "--json", "--containerd", &socket, "--containerd-config", &file]))
}

/// The findings in the JSON that a doctor printed.
#[track_caller]
pub fn read(output: &Output) -> Vec<Finding> {
    let text = &output.stdout;
    let report: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}{}", output.stderr));
    let all = report["findings"].as_array().expect("findings are a list");
    all.iter().map(finding).collect()
}

#[track_caller]
fn finding(value: &Value) -> Finding {
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let said = |key: &str| text(key).unwrap_or_else(|| panic!("{key} is a text in {value}"));
    let found = Finding { check: said("check"), state: said("state"), what: said("what"), remedy: text("remedy") };
    // Every fault comes with a remedy.
    assert_eq!(found.is_fault(), found.remedy.is_some(), "{found:?}");
    found
}
