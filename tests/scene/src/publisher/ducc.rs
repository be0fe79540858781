//! The part of the publisher that stands for DUCC: it unpacks layers by ingest, and writes records of layers and images
//! in transactions as root.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use cvmfs_testbed::ingest::MARKER;
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Repository, Unpacking, flat};
use crate::image::{Blob, Image};

/// The path at which DUCC puts the manifest of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManifestPlace<'a> {
    /// `.metadata/<reference>`: every image until the middle of 2025, later those that no index lists.
    Reference,
    /// `.metadata/.multiarch/<architecture>/<reference>`: since then, an image that an index lists.
    Architecture(&'a str),
}

impl Repository {
    fn in_store(&self, store: &str, digest: &str) -> PathBuf {
        self.tree.join(path_in(store, digest))
    }

    pub fn layer_dir(&self, digest: &str) -> PathBuf {
        self.in_store(".layers", digest)
    }

    /// The directory of the whole root file system of the image with this configuration.
    pub fn flat_dir(&self, config: &str) -> PathBuf {
        self.in_store(".flat", config)
    }

    pub fn manifest_dir(&self, reference: &str, place: ManifestPlace) -> PathBuf {
        let metadata = self.tree.join(".metadata");
        match place {
            ManifestPlace::Reference => metadata.join(reference),
            ManifestPlace::Architecture(name) => metadata.join(".multiarch").join(name).join(reference),
        }
    }

    /// Publishes the image's layers.
    pub fn publish(&self, image: &Image) {
        self.unpack_layers(&image.layers);
        self.commit();
    }

    pub fn publish_layers(&self, layers: &[Blob]) {
        self.unpack_layers(layers);
        self.commit();
    }

    /// Publishes the image's layers, the record of the image they belong to, and its manifest.
    pub fn publish_image(&self, image: &Image, reference: &str, place: ManifestPlace) {
        self.unpack_layers(&image.layers);
        self.record_origin(image);
        let dir = self.manifest_dir(reference, place);
        fs::create_dir_all(&dir).expect("a manifest's directory can be made");
        fs::write(dir.join("manifest.json"), go_manifest(image)).expect("a manifest can be written");
        self.commit();
    }

    /// Publishes the image's whole root file system, and a symlink to it with the image's name.
    pub fn publish_flat(&self, image: &Image, reference: &str) {
        let top = self.flat_dir(&image.config.digest);
        if !top.exists() {
            fs::create_dir_all(&top).expect("a root's directory can be made");
            mark(&top);
            flat::build(&image.layers, &self.tree.with_extension("scratch"), &top);
        }
        let link = self.tree.join(reference);
        let up = "../".repeat(Path::new(reference).components().count() - 1);
        fs::create_dir_all(link.parent().expect("a reference has a registry")).expect("a directory can be made");
        symlink(Path::new(&up).join(path_in(".flat", &image.config.digest)), link).expect("an image has one link");
        self.commit();
    }

    fn unpack_layers(&self, layers: &[Blob]) {
        for layer in layers {
            let dir = self.layer_dir(&layer.digest);
            if dir.exists() {
                continue;
            }
            let mut tar = Vec::new();
            let file = File::open(&layer.path).expect("a layer can be read");
            GzDecoder::new(file).read_to_end(&mut tar).expect("a layer is compressed by gzip");
            match self.unpacking {
                Unpacking::Ingest => {
                    let layerfs = path_in(".layers", &layer.digest).join("layerfs");
                    self.ingest.unpack(tar.as_slice(), &self.tree, &layerfs);
                }
                Unpacking::Transaction => extract(layer, &dir.join("layerfs")),
            }
            mark(dir.parent().expect("a layer lies in a directory"));
            fs::create_dir(dir.join(".metadata")).expect("a directory can be made");
            fs::write(dir.join(".metadata/layers.json"), podman_record(layer, &tar)).expect("a file can be written");
        }
    }

    /// Adds the image to the record of each of its layers.
    fn record_origin(&self, image: &Image) {
        let mut layers: Vec<&str> = image.layers.iter().map(|layer| layer.digest.as_str()).collect();
        layers.sort_unstable();
        layers.dedup();
        for digest in layers {
            let path = self.layer_dir(digest).join(".metadata/origin.json");
            let known = fs::read(&path).map_or(Value::Null, |text| serde_json::from_slice(&text).expect("it is JSON"));
            let mut origin = known["origin"].as_array().cloned().unwrap_or_default();
            origin.push(image.config.digest.clone().into());
            fs::write(path, json!({ "origin": origin }).to_string()).expect("a file can be written");
        }
    }
}

/// Unpacks a layer with all properties in its tar, and gives it a catalog.
fn extract(layer: &Blob, top: &Path) {
    fs::create_dir_all(top).expect("a layer's directory can be made");
    mark(top);
    let status = Command::new("tar")
        .args(["--extract", "--gzip", "--preserve-permissions", "--same-owner", "--numeric-owner"])
        .args(["--xattrs", "--xattrs-include=*", "--delay-directory-restore"])
        .arg("--file")
        .arg(&layer.path)
        .arg("--directory")
        .arg(top)
        .status()
        .expect("tar runs");
    assert!(status.success(), "tar failed");
}

/// Gives a directory of DUCC a catalog.
pub fn mark(dir: &Path) {
    fs::write(dir.join(MARKER), "").expect("a catalog marker can be written");
}

/// `<store>/<first two hex digits>/<hex digits>`
fn path_in(store: &str, digest: &str) -> PathBuf {
    let hex = digest.trim_start_matches("sha256:");
    Path::new(store).join(&hex[..2]).join(hex)
}

/// A manifest with the field names that DUCC, a Go program, writes.
fn go_manifest(image: &Image) -> String {
    let descriptor = |blob: &Blob| {
        format!(r#"{{"MediaType":"{}","Size":{},"Digest":"{}"}}"#, blob.media_type, blob.size, blob.digest)
    };
    let layers: Vec<String> = image.layers.iter().map(descriptor).collect();
    format!(
        r#"{{"SchemaVersion":2,"MediaType":"{}","Config":{},"Layers":[{}]}}"#,
        image.manifest.media_type,
        descriptor(&image.config),
        layers.join(",")
    )
}

/// The record that DUCC keeps beside a layer for Podman.
fn podman_record(layer: &Blob, tar: &[u8]) -> String {
    let diff_id = format!("{:x}", Sha256::digest(tar));
    let layers = json!([{
        "id": diff_id,
        "created": "2026-11-29T19:47:20.856800976Z",
        "compressed-diff-digest": layer.digest,
        "diff-digest": format!("sha256:{diff_id}"),
        "diff-size": tar.len(),
    }]);
    layers.to_string()
}
