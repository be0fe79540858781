//! The part of containerd's configuration that decides whether this snapshotter is used, and how. The same tables stand in
//! what `containerd config dump` prints and in a file; only the dump says what containerd made of the file. Pure.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::migration::rebuild::DEFAULT_NAME as NAME;

/// The table for images of Kubernetes in containerd 1.
pub const CRI_TABLE_1: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]";
/// The same in containerd 2.
pub const CRI_TABLE_2: &str = "[plugins.'io.containerd.cri.v1.images']";
/// containerd's default of `max_concurrent_downloads`.
const DEFAULT_DOWNLOADS: i64 = 3;

/// A version of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Parses `1.6.20~ds1`, `v2.2.9` and what else distributions print, which is no semantic versioning.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim_start_matches('v').split(['.', '-', '~', '+']).map(|part| part.parse().ok());
        Some(Self::new(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }

    /// containerd passes `exports` of a proxy plugin on.
    pub fn has_exports(self) -> bool {
        match (self.major, self.minor) {
            (1, 6) => self.patch >= 32,
            (1, 7) => self.patch >= 16,
            (major, _) => major >= 2,
        }
    }

    /// The transfer service can pull for remote snapshotters.
    pub fn has_transfer(self) -> bool {
        self >= Self::new(2, 1, 0)
    }

    /// The table for images of Kubernetes.
    pub fn cri_table(self) -> &'static str {
        if self.major < 2 { CRI_TABLE_1 } else { CRI_TABLE_2 }
    }
}

/// A table below `proxy_plugins`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Proxy {
    #[serde(rename = "type")]
    pub kind: String,
    pub address: String,
    pub exports: BTreeMap<String, String>,
    pub capabilities: Vec<String>,
}

/// An `unpack_config` of the transfer service, or a runtime of the CRI.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Unpack {
    pub snapshotter: String,
    pub platform: String,
    /// containerd ignores it where the platform is another one.
    pub optional: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ContainerdConfig {
    pub disabled_plugins: Vec<String>,
    /// The files that containerd has read besides the main one.
    pub imports: Vec<PathBuf>,
    pub proxy_plugins: BTreeMap<String, Proxy>,
    plugins: Plugins,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Plugins {
    #[serde(rename = "io.containerd.grpc.v1.cri")]
    cri: Cri,
    #[serde(rename = "io.containerd.cri.v1.images")]
    images: Option<CriTable>,
    #[serde(rename = "io.containerd.cri.v1.runtime")]
    runtime: Cri,
    #[serde(rename = "io.containerd.transfer.v1.local")]
    transfer: Transfer,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cri {
    containerd: CriTable,
    sandbox_image: Option<String>,
}

/// Keys of the CRI that containerd 1 and 2 keep in different tables.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CriTable {
    snapshotter: Option<String>,
    disable_snapshot_annotations: Option<bool>,
    use_local_image_pull: bool,
    discard_unpacked_layers: bool,
    image_pull_with_sync_fs: bool,
    max_concurrent_downloads: Option<i64>,
    registry: BTreeMap<String, toml::Value>,
    pinned_images: BTreeMap<String, String>,
    runtimes: BTreeMap<String, Unpack>,
    runtime_platforms: BTreeMap<String, Unpack>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Transfer {
    unpack_config: Option<Vec<Unpack>>,
}

impl ContainerdConfig {
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// It has a proxy plugin with our name or address.
    pub fn mentions(&self, address: &Path) -> bool {
        self.proxy_plugins.iter().any(|(name, proxy)| name == NAME || Path::new(&proxy.address) == address)
    }

    fn cri(&self) -> &CriTable {
        self.plugins.images.as_ref().unwrap_or(&self.plugins.cri.containerd)
    }

    /// The snapshotter of Kubernetes' containers.
    pub fn snapshotter(&self) -> Option<&str> {
        self.cri().snapshotter.as_deref()
    }

    /// The table that names us as the snapshotter of Kubernetes.
    pub fn table_that_names_us(&self) -> Option<&'static str> {
        let names_us = |table: &CriTable| table.snapshotter.as_deref() == Some(NAME);
        if self.plugins.images.as_ref().is_some_and(names_us) {
            return Some(CRI_TABLE_2);
        }
        names_us(&self.plugins.cri.containerd).then_some(CRI_TABLE_1)
    }

    /// The CRI's own client tells snapshotters which layers it pulls.
    pub fn has_client_annotations(&self) -> bool {
        self.cri().disable_snapshot_annotations == Some(false)
    }

    pub fn pause_image(&self) -> Option<&str> {
        self.cri().pinned_images.get("sandbox").or(self.plugins.cri.sandbox_image.as_ref()).map(String::as_str)
    }

    /// Runtimes that have a snapshotter of their own, with its name.
    pub fn runtime_snapshotters(&self) -> BTreeMap<&str, &str> {
        let tables = [&self.plugins.cri.containerd.runtimes, &self.plugins.runtime.containerd.runtimes];
        // In containerd 2 this table decides what the images of a runtime are unpacked with.
        let all = tables.into_iter().chain([&self.cri().runtime_platforms]).flatten();
        all.map(|(name, runtime)| (name.as_str(), runtime.snapshotter.as_str()))
            .filter(|(_, name)| !name.is_empty())
            .collect()
    }

    /// What the transfer service unpacks for; None is containerd's default list.
    pub fn unpack_config(&self) -> Option<&[Unpack]> {
        self.plugins.transfer.unpack_config.as_deref()
    }

    /// A setting that keeps the CRI of 2.1 and later from pulling by the transfer service, as containerd's
    /// `CheckLocalImagePullConfigs` has them.
    pub fn client_pull_setting(&self) -> Option<String> {
        let cri = self.cri();
        let flags = [
            (cri.use_local_image_pull, "use_local_image_pull"),
            (cri.discard_unpacked_layers, "discard_unpacked_layers"),
            (cri.image_pull_with_sync_fs, "image_pull_with_sync_fs"),
        ];
        let flag = flags.iter().find(|(is_set, _)| *is_set).map(|(_, key)| format!("{key} = true"));
        let downloads = cri.max_concurrent_downloads.filter(|count| *count != DEFAULT_DOWNLOADS);
        let has_hosts =
            |key: &&&str| matches!(cri.registry.get(**key), Some(toml::Value::Table(hosts)) if !hosts.is_empty());
        flag.or_else(|| downloads.map(|count| format!("max_concurrent_downloads = {count}")))
            .or_else(|| ["mirrors", "configs", "auths"].iter().find(has_hosts).map(|key| format!("registry.{key}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed_as_distributions_write_them() {
        for (text, version) in [
            ("1.6.20~ds1", Some((1, 6, 20))),
            ("v2.2.9", Some((2, 2, 9))),
            ("2.4.0-beta.0", Some((2, 4, 0))),
            ("2.1", Some((2, 1, 0))),
            ("1.7.23-k3s2", Some((1, 7, 23))),
            ("2.3.6+unknown", Some((2, 3, 6))),
            ("unknown", None),
        ] {
            let expected = version.map(|(major, minor, patch)| Version::new(major, minor, patch));
            assert_eq!(Version::parse(text), expected, "{text}");
        }
    }
}
