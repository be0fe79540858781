//! Image references and published manifests.
//!
//! Both are untrusted input. A reference comes from a client; it becomes part of a path only after it was parsed by the
//! grammar of references, in which no name leads elsewhere. A manifest comes from a publisher; only its digests are kept,
//! and parsing takes memory in proportion to its size. Nothing here has effects.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de};

use crate::model::{Digest, Quoted};

const METADATA: &str = ".metadata";
const MANIFEST: &str = "manifest.json";
/// The size of a manifest, which is a few kilobytes in practice.
pub const MAX_BYTES: u64 = 256 << 10;
/// Layers of an image. Docker builds images of at most 127 layers, and overlayfs accepts 500 lower directories.
pub const MAX_LAYERS: usize = 1024;

/// The names of Docker Hub. The publisher uses the first, and containerd the second.
const DOCKER_HUB: [&str; 4] = ["registry.hub.docker.com", "docker.io", "index.docker.io", "registry-1.docker.io"];
/// The prefix of a name that may be left out: `alpine` is `library/alpine`.
const OFFICIAL: &str = "library/";
const MAX_TAG: usize = 128;
const MAX_NAME: usize = 255;

/// The parts of `registry/repository:tag@digest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRef {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl ImageRef {
    /// None: it is not the reference of an image.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(Digest::parse(digest).ok()?)),
            None => (text, None),
        };
        let (name, tag) = match name.rsplit_once(':') {
            // A colon before a slash belongs to a port.
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
            _ => ("docker.io", name),
        };
        let valid = is_registry(registry)
            && repository.len() <= MAX_NAME
            && repository.split('/').all(is_component)
            && tag.is_none_or(is_tag);
        let tag = tag.or_else(|| digest.is_none().then_some("latest"));
        valid.then(|| Self {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    /// The paths at which the image's manifest may be, from the repository's root; the likeliest is the first.
    pub fn manifests(&self) -> Vec<PathBuf> {
        let is_hub = DOCKER_HUB.contains(&self.registry.as_str());
        let registries = if is_hub { &DOCKER_HUB[..] } else { &[self.registry.as_str()][..] };
        let mut names = vec![self.repository.clone()];
        if is_hub {
            match self.repository.strip_prefix(OFFICIAL) {
                Some(short) => names.push(short.to_owned()),
                None if !self.repository.contains('/') => names.insert(0, format!("{OFFICIAL}{}", self.repository)),
                None => {}
            }
        }
        let mut ends = Vec::new();
        if let Some(tag) = &self.tag {
            ends.push(format!(":{tag}"));
        }
        if let Some(digest) = &self.digest {
            ends.push(format!("@{digest}"));
            if let Some(tag) = &self.tag {
                ends.push(format!(":{tag}@{digest}"));
            }
        }
        let mut paths = Vec::new();
        for registry in registries {
            for name in &names {
                for end in &ends {
                    paths.push([METADATA, registry, &format!("{name}{end}"), MANIFEST].iter().collect());
                }
            }
        }
        paths
    }
}

fn is_registry(text: &str) -> bool {
    let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
    let is_label = |label: &str| {
        let inner = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        inner && !label.is_empty() && !label.starts_with('-') && !label.ends_with('-')
    };
    host.len() <= MAX_NAME
        && host.split('.').all(is_label)
        && port.is_none_or(|port| !port.is_empty() && port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()))
}

/// A component consists of lower-case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let joints = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let ends = text.bytes().next().is_some_and(is_word) && text.bytes().last().is_some_and(is_word);
    ends && joints.into_iter().all(|joint| matches!(joint, "" | "." | "_" | "__") || joint.bytes().all(|b| b == b'-'))
}

fn is_tag(text: &str) -> bool {
    let good = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    good && !text.is_empty() && text.len() <= MAX_TAG && !text.starts_with(['.', '-'])
}

/// What is needed of a published manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The digest of the image's configuration, which is the name of its flat root.
    pub config: Digest,
    /// The digests of the layers, beginning with the lowest.
    pub layers: Vec<Digest>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invalid {
    /// It is not JSON, or lacks a field of a manifest.
    Unreadable(String),
    TooManyLayers(usize),
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The message may repeat text of the file.
            Self::Unreadable(why) => write!(f, "it is no manifest: {}", Quoted(why)),
            Self::TooManyLayers(count) => write!(f, "it has {count} layers, the limit is {MAX_LAYERS}"),
        }
    }
}

/// A manifest as it is written. The publisher writes Go's field names, and the image specification has those in lower case.
/// Other fields are ignored.
#[derive(Deserialize)]
struct JsonManifest {
    #[serde(alias = "Config")]
    config: Descriptor,
    #[serde(alias = "Layers")]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(alias = "Digest", deserialize_with = "read_digest")]
    digest: Digest,
}

fn read_digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
    Digest::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

impl Manifest {
    pub fn parse(text: &[u8]) -> Result<Self, Invalid> {
        let written: JsonManifest = serde_json::from_slice(text).map_err(|e| Invalid::Unreadable(e.to_string()))?;
        match written.layers.len() {
            ..=MAX_LAYERS => {}
            count => return Err(Invalid::TooManyLayers(count)),
        }
        let layers = written.layers.into_iter().map(|layer| layer.digest).collect();
        Ok(Self { config: written.config.digest, layers })
    }
}

#[cfg(test)]
mod tests;
