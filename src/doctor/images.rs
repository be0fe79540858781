//! Images that containerd has, and not for this snapshotter: pulled before the switch, or with
//! another one. Their next containers copy every layer, published or not.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::configuration::Configuration;
use super::containerd::{CONTENT, IMAGES};
use super::{Finding, NAMED};
use crate::admin::Peer;
use crate::proto::containerd::{InfoRequest, ListImagesRequest};
use crate::rebuild::DEFAULT_NAME as NAME;
use crate::table::Progress;
use crate::types::Digest;

/// containerd's namespace of Kubernetes.
const NAMESPACE: &str = "k8s.io";
/// On the configuration of an image: the chain that a snapshotter has of it.
const UNPACKED: &str = "containerd.io/gc.ref.snapshot.";
/// No manifest is larger.
const MANIFEST_BYTES: u64 = 16 << 20;

pub fn look(
    peer: &Peer,
    content: Option<&Path>,
    configuration: Option<&Configuration>,
    progress: &Progress,
) -> Vec<Finding> {
    const CHECK: &str = "images.other-snapshotter";
    // Of other namespaces nobody knows which snapshotter is meant.
    let is_of_cri = configuration.is_some_and(|one| one.snapshotter.as_deref() == Some(NAME));
    let (Some(content), true) = (content, is_of_cri) else { return Vec::new() };
    let all = match peer.call_in(NAMESPACE, &IMAGES, &ListImagesRequest::new()) {
        Ok(listed) => listed.images,
        Err(e) => {
            return vec![Finding::warning(
                CHECK,
                format!("containerd's images cannot be looked at: {e}"),
                "run this as root",
            )];
        }
    };
    let count = all.len();
    // An image has several names; by the digest alone it is told last.
    let mut others: Vec<(String, String)> = Vec::new();
    for (n, image) in all.iter().enumerate() {
        progress.say(&format!("image {} of {count}", n + 1));
        let is_alias = image.name.starts_with("sha256:") || image.name.contains("@sha256:");
        if let Some(other) = image.target.as_ref().and_then(|target| other_snapshotters(peer, content, &target.digest))
            && !is_alias
        {
            others.push((image.name.clone(), other));
        }
    }
    let mut findings = Vec::new();
    let pause = configuration.and_then(|one| one.pause_image.as_deref());
    if let Some((name, other)) = others.iter().find(|(name, _)| Some(name.as_str()) == pause) {
        findings.push(Finding::warning(
            "images.pause",
            format!("the pause image {name} is there for {other} only: containerd unpacks it for each first pod, or no pod starts"),
            format!("crictl rmi {name} && crictl pull {name}"),
        ));
    }
    others.retain(|(name, _)| Some(name.as_str()) != pause);
    for (name, other) in others.iter().take(NAMED) {
        findings.push(Finding::warning(
            CHECK,
            format!(
                "{name} was pulled with {other}, and Kubernetes uses {NAME} now: its next container makes a whole copy of every \
                 layer, or does not start if containerd has discarded the blobs"
            ),
            format!("once no container uses it: crictl rmi {name} && crictl pull {name}"),
        ));
    }
    if others.len() > NAMED {
        let names: Vec<&str> = others.iter().skip(NAMED).map(|(name, _)| name.as_str()).collect();
        findings.push(Finding::warning(CHECK, format!("and {} more: {}", names.len(), names.join(" ")), "as above"));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, format!("all {count} images of Kubernetes are there for {NAME}")));
    }
    findings
}

/// Which other snapshotters have the image, if ours does not. None: ours has it, or nobody, or
/// that cannot be told.
fn other_snapshotters(peer: &Peer, content: &Path, target: &str) -> Option<String> {
    let configuration = configuration_of(content, target, 0)?;
    let request = InfoRequest { digest: configuration, ..InfoRequest::default() };
    let labels = peer.call_in(NAMESPACE, &CONTENT, &request).ok()?.info.into_option()?.labels;
    let mut others: Vec<&str> = labels.keys().filter_map(|label| label.strip_prefix(UNPACKED)).collect();
    others.sort_unstable();
    (!others.is_empty() && !others.contains(&NAME)).then(|| others.join(" and "))
}

/// The digest of the configuration that a manifest names, or the first that is there of those
/// that an index lists.
fn configuration_of(content: &Path, digest: &str, depth: usize) -> Option<String> {
    const DEPTH: usize = 2;
    let digest = Digest::parse(digest).ok()?;
    let path = content.join("blobs/sha256").join(digest.hex());
    if depth > DEPTH || fs::metadata(&path).ok()?.len() > MANIFEST_BYTES {
        return None;
    }
    let blob: Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    if let Some(configuration) = blob["config"]["digest"].as_str() {
        return Some(configuration.to_owned());
    }
    blob["manifests"].as_array()?.iter().find_map(|one| configuration_of(content, one["digest"].as_str()?, depth + 1))
}
