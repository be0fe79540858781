//! A repository of unpacked layers in a plain directory, laid out as DUCC publishes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::image::{Blob, Image};

pub struct Repository {
    dir: PathBuf,
}

impl Repository {
    pub fn create(dir: &Path) -> Self {
        fs::create_dir_all(dir.join(".layers")).expect("the repository's directory can be made");
        Self { dir: dir.to_owned() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn layer_dir(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.dir.join(".layers").join(&hex[..2]).join(hex)
    }

    pub fn publish(&self, image: &Image) {
        self.publish_layers(&image.layers);
    }

    /// Unpacks the tars as they are: markers of deletions stay files.
    pub fn publish_layers(&self, layers: &[Blob]) {
        for layer in layers {
            let top = self.layer_dir(&layer.digest).join("layerfs");
            if top.exists() {
                continue;
            }
            fs::create_dir_all(&top).expect("a layer's directory can be made");
            fs::write(top.join(".cvmfscatalog"), "").expect("a catalog marker can be written");
            let status = Command::new("tar")
                .args(["--extract", "--gzip", "--preserve-permissions", "--same-owner", "--numeric-owner"])
                .args(["--xattrs", "--xattrs-include=*", "--delay-directory-restore", "--file"])
                .arg(&layer.path)
                .arg("--directory")
                .arg(&top)
                .status()
                .expect("tar runs");
            assert!(status.success(), "tar failed");
        }
    }

    pub fn withdraw(&self, digest: &str) {
        fs::remove_dir_all(self.layer_dir(digest)).expect("a published layer can be removed");
    }
}
