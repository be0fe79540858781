//! What the command line asks of a rebuild.
#![forbid(unsafe_code)]

use std::path::PathBuf;

pub const DEFAULT_CONTAINERD: &str = "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db";
pub const DEFAULT_NAME: &str = "cvmfs-snapshotter";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuildOptions {
    pub containerd: ContainerdDb,
    /// The name of this snapshotter in containerd's configuration.
    pub snapshotter: String,
    pub json: bool,
}

/// Which metadata of containerd is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerdDb {
    /// The file at `DEFAULT_CONTAINERD`.
    Default,
    Path(PathBuf),
    Ignore,
}

impl ContainerdDb {
    pub fn from_argument(path: Option<PathBuf>) -> Self {
        match path {
            None => Self::Default,
            Some(path) if path.as_os_str() == "none" => Self::Ignore,
            Some(path) => Self::Path(path),
        }
    }
}
