//! Image references and published manifests: where a repository keeps the manifest of an
//! image, and what one says.
//!
//! Both are input. A reference comes from a client and becomes part of a path only after it
//! was taken apart by the grammar of references, which has no name that leads elsewhere. A
//! manifest comes from a publisher; of it only digests are kept, and reading it takes memory in
//! proportion to its size. Pure.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de};

use crate::model::{Digest, Quoted};

const METADATA: &str = ".metadata";
const MANIFEST: &str = "manifest.json";
/// Manifests of images have a few kilobytes.
pub const MAX_BYTES: u64 = 256 << 10;
/// Docker builds images of 127 layers at most, and overlayfs takes 500 lower directories.
pub const MAX_LAYERS: usize = 1024;

/// Docker Hub has many names. The publisher uses the first, containerd the second.
const DOCKER_HUB: [&str; 4] = ["registry.hub.docker.com", "docker.io", "index.docker.io", "registry-1.docker.io"];
/// The name that is left out: `alpine` is `library/alpine`.
const OFFICIAL: &str = "library/";
const MAX_TAG: usize = 128;
const MAX_NAME: usize = 255;

/// `registry/repository:tag@digest`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRef {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl ImageRef {
    /// None: not a reference of an image.
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

    /// Where the image's manifest may be, below the repository; the likeliest first.
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

/// Lower-case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
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

/// What a published manifest says of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Of the image's configuration: the name of its flat root.
    pub config: Digest,
    /// From the bottom up.
    pub layers: Vec<Digest>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invalid {
    /// No JSON, or not what a manifest has.
    Unreadable(String),
    TooManyLayers(usize),
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // It may repeat what stands in the file.
            Self::Unreadable(why) => write!(f, "it is no manifest: {}", Quoted(why)),
            Self::TooManyLayers(count) => write!(f, "it has {count} layers, the limit is {MAX_LAYERS}"),
        }
    }
}

/// A manifest as it is written: by the publisher with Go's field names, and as the image specification has them.
/// Other fields are passed over.
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
mod tests {
    use super::*;

    fn first(reference: &str) -> String {
        let paths = ImageRef::parse(reference).unwrap_or_else(|| panic!("{reference}")).manifests();
        paths[0].to_str().unwrap().to_owned()
    }

    #[test]
    fn a_reference_says_where_its_manifest_is() {
        let hex = "0".repeat(64);
        for (reference, path) in [
            ("docker.io/library/alpine:3", ".metadata/registry.hub.docker.com/library/alpine:3/manifest.json"),
            ("alpine", ".metadata/registry.hub.docker.com/library/alpine:latest/manifest.json"),
            (
                "docker.io/rootproject/root:6.32",
                ".metadata/registry.hub.docker.com/rootproject/root:6.32/manifest.json",
            ),
            ("gitlab-registry.cern.ch/a/b/c:v1.2", ".metadata/gitlab-registry.cern.ch/a/b/c:v1.2/manifest.json"),
            ("127.0.0.1:5000/demo:1", ".metadata/127.0.0.1:5000/demo:1/manifest.json"),
            ("localhost/x", ".metadata/localhost/x:latest/manifest.json"),
            (&format!("ghcr.io/x/y@sha256:{hex}"), &format!(".metadata/ghcr.io/x/y@sha256:{hex}/manifest.json")),
            (&format!("ghcr.io/x/y:t@sha256:{hex}"), ".metadata/ghcr.io/x/y:t/manifest.json"),
        ] {
            assert_eq!(first(reference), path);
        }
        let hub = ImageRef::parse("docker.io/library/alpine:3").unwrap().manifests();
        assert_eq!(hub.len(), 8);
        assert!(hub.contains(&".metadata/docker.io/alpine:3/manifest.json".into()));
        assert_eq!(ImageRef::parse("ghcr.io/library/alpine:3").unwrap().manifests().len(), 1);
    }

    #[test]
    fn what_is_no_reference_becomes_no_path() {
        for text in [
            "",
            "/",
            "..",
            "a/../b",
            "../../etc/passwd",
            "x.y/..",
            "x.y/a//b",
            "x.y/.a",
            "x.y/a.",
            "x.y/A",
            "x..y/a",
            "-x.y/a",
            "x.y:port/a",
            "x.y/a:",
            "x.y/a:.t",
            "x.y/a:t/../..",
            "x.y/a:t\0",
            "x.y/a:t\n",
            "x.y/a b",
            "x.y/a..b",
            "x.y/a___b",
            "x.y/a@sha256:12",
            "x.y/a@../..",
            &format!("x.y/a:{}", "t".repeat(129)),
            &format!("x.y/{}", "a".repeat(256)),
        ] {
            assert_eq!(ImageRef::parse(text), None, "{text:?}");
        }
        for text in ["x.y/a-b/c--d/e_f/g__h.i:T_1.0-rc", "a1/b2"] {
            assert!(ImageRef::parse(text).is_some(), "{text:?}");
        }
    }

    #[test]
    fn a_manifest_is_read_in_either_spelling() {
        let d = |n: u8| format!("sha256:{}", format!("{n:02x}").repeat(32));
        let ducc = format!(
            r#"{{"SchemaVersion":2,"Config":{{"MediaType":"x","Size":1,"Digest":"{}"}},
                 "Layers":[{{"MediaType":"y","Size":2,"Digest":"{}"}},{{"MediaType":"y","Size":2,"Digest":"{}"}}]}}"#,
            d(1),
            d(2),
            d(3)
        );
        let manifest = Manifest::parse(ducc.as_bytes()).unwrap();
        assert_eq!((manifest.config.as_str(), manifest.layers.len()), (d(1).as_str(), 2));
        let oci = ducc.replace("Config", "config").replace("Layers", "layers").replace("Digest", "digest");
        assert_eq!(Manifest::parse(oci.as_bytes()), Ok(manifest));
    }

    #[test]
    fn a_manifest_that_is_none_is_refused_with_the_reason() {
        let deep = "[".repeat(100_000);
        let long = format!(r#"{{"Config":"{}"}}"#, "x".repeat(100_000));
        for (text, why) in [
            ("", "EOF while parsing"),
            ("{", "EOF while parsing"),
            (deep.as_str(), "it is no manifest"),
            (long.as_str(), "expected struct Descriptor"),
            ("{}", "missing field `config`"),
            (r#"{"Config":{}}"#, "missing field `digest`"),
            (r#"{"Config":{"Digest":"sha256:../../x"},"Layers":[]}"#, "64 hex digits"),
            (r#"{"Config":{"Digest":7},"Layers":[]}"#, "expected a string"),
        ] {
            let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("it is no manifest: ") && error.len() < 300, "{error}");
            assert!(error.contains(why) || text.len() > 1_000, "{error}");
        }
    }

    fn descriptor(n: usize) -> String {
        format!(r#"{{"digest":"sha256:{n:064x}"}}"#)
    }

    fn manifest_of(layers: &[String]) -> String {
        format!(r#"{{"config":{},"layers":[{}]}}"#, descriptor(0), layers.join(","))
    }

    #[test]
    fn a_manifest_has_1024_layers_at_most() {
        let layers: Vec<String> = (0..=MAX_LAYERS).map(descriptor).collect();
        assert_eq!(Manifest::parse(manifest_of(&layers[1..]).as_bytes()).unwrap().layers.len(), MAX_LAYERS);
        assert_eq!(Manifest::parse(manifest_of(&layers).as_bytes()), Err(Invalid::TooManyLayers(MAX_LAYERS + 1)));
    }

    /// In a process of its own, the test below reads only this one of its manifests.
    const CHILD: &str = "CVMFS_SNAPSHOTTER_TEST_MANIFEST";

    /// Manifests that take as much as one can, for their size.
    fn worst_manifests() -> Vec<(&'static str, String)> {
        let most = usize::try_from(MAX_BYTES).unwrap();
        let fill = |each: &str| {
            let count = most / (each.len() + 1) - 50;
            manifest_of(&vec![each.to_owned(); count])
        };
        let unknown = |value: String| format!(r#"{{"x":{value},{}"#, &manifest_of(&[])[1..]);
        vec![
            ("layers", fill(&descriptor(1))),
            ("empty objects", fill(r#"{"":0}"#)),
            ("unknown objects", unknown(format!("[{}0]", r#"{"":0},"#.repeat(most / 7 - 50)))),
            ("unknown keys", unknown(format!("{{{}\"\":0}}", r#""":0,"#.repeat(most / 5 - 50)))),
            ("depth", unknown("[".repeat(most - 500))),
            ("one text", unknown(format!("\"{}\"", "\\n".repeat(most / 2 - 500)))),
        ]
    }

    /// A number of `/proc/self/status`, in KiB.
    fn status(name: &str) -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Parsed into a tree of values, 4 MiB took 390 MiB.
    #[test]
    fn a_manifest_takes_memory_in_proportion_to_its_size() {
        if let Ok(which) = std::env::var(CHILD) {
            let text = worst_manifests().swap_remove(which.parse().unwrap()).1;
            std::fs::write("/proc/self/clear_refs", "5").unwrap();
            let before = status("VmRSS");
            let _ = Manifest::parse(text.as_bytes());
            eprintln!("{}", status("VmHWM").saturating_sub(before));
            return;
        }
        for (n, (name, text)) in worst_manifests().into_iter().enumerate() {
            assert!(text.len() <= usize::try_from(MAX_BYTES).unwrap(), "{name}: {}", text.len());
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            let test = "repository::manifest::tests::a_manifest_takes_memory_in_proportion_to_its_size";
            let output = child.args(["--exact", test, "--nocapture"]).env(CHILD, n.to_string()).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            let kibibytes: usize = said.trim().parse().unwrap_or_else(|_| panic!("{said}"));
            println!("{name}: {} KiB of text, {kibibytes} KiB of memory", text.len() >> 10);
            assert!(kibibytes < 2 << 10, "{name}: {kibibytes} KiB");
        }
    }
}
