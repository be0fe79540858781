//! Images of an OCI layout, which is a directory with an index and with blobs that are named by their digests.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::image::{Blob, Image, chain_ids};

pub struct OciLayout {
    dir: PathBuf,
    index: Value,
}

impl OciLayout {
    pub fn open(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), index: read(&dir.join("index.json")) }
    }

    /// The manifest, or the index of several manifests, that has this name.
    pub fn find_named(&self, name: &str) -> Blob {
        let named = |entry: &&Value| entry["annotations"]["org.opencontainers.image.ref.name"] == name;
        let entries = self.index["manifests"].as_array().expect("a layout lists what it has");
        self.blob(entries.iter().find(named).unwrap_or_else(|| panic!("the layout has no {name}")))
    }

    /// The images that an index lists.
    pub fn images_of_index(&self, index: &Blob, name: &str) -> Vec<Image> {
        let listed = read(&index.path);
        let manifests = listed["manifests"].as_array().expect("an index lists manifests");
        manifests.iter().map(|manifest| self.image(self.blob(manifest), name)).collect()
    }

    /// The image of a manifest. `name` is the name that clients pull.
    pub fn image(&self, manifest: Blob, name: &str) -> Image {
        let described = read(&manifest.path);
        let config = self.blob(&described["config"]);
        let layers = described["layers"].as_array().expect("a manifest has layers");
        let layers = layers.iter().map(|layer| self.blob(layer)).collect();
        let mut image = Image { name: name.to_owned(), config, manifest, layers, chain_ids: Vec::new() };
        image.chain_ids = chain_ids(&image.diff_ids());
        image
    }

    fn blob(&self, descriptor: &Value) -> Blob {
        let text = |name: &str| descriptor[name].as_str().unwrap_or_else(|| panic!("no {name}: {descriptor}"));
        let digest = text("digest").to_owned();
        let path = self.dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
        let size = descriptor["size"].as_u64().expect("a blob has a size");
        Blob { media_type: text("mediaType").to_owned(), digest, size, path }
    }
}

fn read(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{} is not JSON: {error}", path.display()))
}
