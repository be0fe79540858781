//! What a repository publishes: from a layer digest to the directory with its files.
//!
//! Only reads. A layer lies in `<repository>/.layers/<first 2 hex>/<64 hex>/layerfs`, keyed
//! by the digest of the compressed blob. Any directory in that layout will do.
#![forbid(unsafe_code)]

pub mod scan;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use crate::sys::{self, FileType, Sys};
use crate::types::Digest;

const LAYERS: &str = ".layers";
const LAYER_ROOT: &str = "layerfs";

/// Why a layer cannot be had from the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The repository is there and does not have the layer.
    NotPublished,
    /// The repository's directory is there, but no repository is in it.
    NotMounted {
        repository: PathBuf,
    },
    Unreadable(sys::Error),
    NotADirectory {
        layer: PathBuf,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPublished => f.write_str("the repository does not have it"),
            Self::NotMounted { repository } => {
                write!(f, "no repository is mounted on {0}: {0}/{LAYERS} is missing", repository.display())
            }
            Self::Unreadable(cause) => cause.fmt(f),
            Self::NotADirectory { layer } => write!(f, "{} is not a directory", layer.display()),
        }
    }
}

pub struct Repository {
    name: String,
    path: PathBuf,
    sys: Arc<dyn Sys>,
}

impl Repository {
    pub fn new(name: String, path: PathBuf, sys: Arc<dyn Sys>) -> Self {
        Self { name, path, sys }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The top of an unpacked layer.
    pub fn layer(&self, digest: &Digest) -> Result<PathBuf, Missing> {
        let hex = digest.hex();
        let layer = self.path.join(LAYERS).join(&hex[..2]).join(hex).join(LAYER_ROOT);
        match self.sys.stat(&layer) {
            Ok(status) if status.file_type == FileType::Directory => {}
            Ok(_) => return Err(Missing::NotADirectory { layer }),
            Err(e) if e.errno == Errno::ENOENT => return Err(self.absent()),
            Err(e) => return Err(Missing::Unreadable(e)),
        }
        // The kernel answers `stat` from its caches long after a FUSE server has died.
        self.sys.statfs(&layer).map_err(Missing::Unreadable)?;
        Ok(layer)
    }

    /// Tells a layer that is not published from a repository that is not mounted.
    fn absent(&self) -> Missing {
        match self.sys.stat(&self.path.join(LAYERS)) {
            Ok(_) => Missing::NotPublished,
            Err(e) if e.errno == Errno::ENOENT => Missing::NotMounted { repository: self.path.clone() },
            Err(e) => Missing::Unreadable(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Host;
    use std::fs;

    fn digest(digit: char) -> Digest {
        Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap()
    }

    #[test]
    fn absent_means_not_published_only_where_a_repository_is() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new("r".into(), dir.path().join("cvmfs"), Arc::new(Host));
        let nowhere = Missing::NotMounted { repository: dir.path().join("cvmfs") };
        assert_eq!(repository.layer(&digest('a')), Err(nowhere.clone()));
        fs::create_dir(dir.path().join("cvmfs")).unwrap();
        assert_eq!(repository.layer(&digest('a')), Err(nowhere));
        fs::create_dir(dir.path().join("cvmfs/.layers")).unwrap();
        assert_eq!(repository.layer(&digest('a')), Err(Missing::NotPublished));
        let layer = dir.path().join(format!("cvmfs/.layers/aa/{}/layerfs", "a".repeat(64)));
        fs::create_dir_all(&layer).unwrap();
        assert_eq!(repository.layer(&digest('a')), Ok(layer));
        let file = dir.path().join(format!("cvmfs/.layers/bb/{}/layerfs", "b".repeat(64)));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        assert_eq!(repository.layer(&digest('b')), Err(Missing::NotADirectory { layer: file }));
    }
}
