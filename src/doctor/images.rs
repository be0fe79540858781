//! Images of containerd that are not usable as they should be: those pulled with another snapshotter, whose containers get a
//! copy of every layer, and those pulled with this one, which has lost their snapshots.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap, HashSet};

use grpcio::RpcStatusCode;

use super::config::ContainerdConfig;
use super::repull::{KUBERNETES, repull_command};
use super::{Finding, MAX_NAMED, Report};
use crate::admin::client::{Error, GrpcClient, Result};
use crate::admin::table::Progress;
use crate::migration::rebuild::DEFAULT_NAME as NAME;
use crate::proto::containerd::{
    InfoRequest, InfoResponse, ListImagesRequest, ListImagesResponse, ListNamespacesRequest, ListNamespacesResponse,
};
use crate::proto::snapshots::StatSnapshotRequest;
use crate::server::service::{STAT, methods};

methods! {
    "containerd.services.namespaces.v1.Namespaces"
    NAMESPACES Unary "List" ListNamespacesRequest => ListNamespacesResponse;
}

methods! {
    "containerd.services.images.v1.Images"
    IMAGES Unary "List" ListImagesRequest => ListImagesResponse;
}

methods! {
    "containerd.services.content.v1.Content"
    CONTENT Unary "Info" InfoRequest => InfoResponse;
}

/// Labels that containerd's garbage collector follows: from the configuration of an image to the chain that a snapshotter
/// has of it, from a manifest to the configuration, from an index to its manifests.
const SNAPSHOT_LABEL: &str = "containerd.io/gc.ref.snapshot.";
const CONFIG_LABEL: &str = "containerd.io/gc.ref.content.config";
const MANIFEST_LABEL: &str = "containerd.io/gc.ref.content.m.";
/// Blobs that are asked for in one image. An index lists an image for each platform, and few do for many.
const MAX_BLOBS: usize = 256;

const OTHER: &str = "images.other-snapshotter";
const GONE: &str = "images.gone";

struct Image {
    namespace: String,
    /// The name that people use for it.
    name: String,
    /// The chain that each snapshotter has of it, by the snapshotter's name.
    chains: BTreeMap<String, String>,
    /// This snapshotter has unpacked it, and does not have the snapshot any more.
    is_gone: bool,
}

impl Image {
    fn is_of_kubernetes(&self) -> bool {
        self.namespace == KUBERNETES
    }
}

fn repull_images(images: &[&Image]) -> String {
    repull_command(images.iter().map(|image| (image.namespace.as_str(), image.name.as_str())))
}

pub fn check(peer: &GrpcClient, config: Option<&ContainerdConfig>, progress: &Progress, report: &mut Report<'_>) {
    let images = match list_images(peer, progress) {
        Ok(images) => images,
        Err(e) => {
            let message = format!("cannot list containerd's images: {e}");
            report.push(Finding::warning(OTHER, message, "see containerd's log: journalctl -u containerd -n 50"));
            return;
        }
    };
    let gone: Vec<&Image> = images.iter().filter(|image| image.is_gone).collect();
    report.extend(gone_findings(&gone));
    // Which snapshotter is meant in other namespaces is unknown.
    let Some(config) = config.filter(|config| config.snapshotter() == Some(NAME)) else { return };
    let of_kubernetes: Vec<&Image> = images.iter().filter(|image| image.is_of_kubernetes()).collect();
    let count = of_kubernetes.len();
    let is_other = |image: &&Image| !image.chains.is_empty() && !image.chains.contains_key(NAME);
    let others: Vec<&Image> = of_kubernetes.into_iter().filter(is_other).collect();
    report.extend(other_snapshotter_findings(&others, config.pause_image()));
    if others.is_empty() && !gone.iter().any(|image| image.is_of_kubernetes()) {
        report.push(Finding::good(OTHER, format!("all {count} images of Kubernetes are there for {NAME}")));
    }
}

fn other_snapshotter_findings(images: &[&Image], pause: Option<&str>) -> Vec<Finding> {
    let snapshotters = |image: &Image| image.chains.keys().map(String::as_str).collect::<Vec<_>>().join(" and ");
    let (pauses, others): (Vec<&Image>, Vec<&Image>) =
        images.iter().partition(|image| Some(image.name.as_str()) == pause);
    let mut findings = Vec::new();
    for image in pauses {
        let message = format!(
            "the pause image {} is there for {} only: containerd unpacks it for each first pod, or no pod starts",
            image.name,
            snapshotters(image)
        );
        findings.push(Finding::warning("images.pause", message, repull_images(&[image])));
    }
    for image in others.iter().take(MAX_NAMED) {
        let message = format!(
            "{} was pulled with {}, and Kubernetes uses {NAME} now: its next container copies every layer, or does not \
             start if containerd has discarded the blobs",
            image.name,
            snapshotters(image)
        );
        let remedy = format!("once no container uses it: {}", repull_images(&[image]));
        findings.push(Finding::warning(OTHER, message, remedy));
    }
    findings.extend(remaining(&others).map(|message| Finding::warning(OTHER, message, "as above")));
    findings
}

fn gone_findings(images: &[&Image]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (n, image) in images.iter().take(MAX_NAMED).enumerate() {
        let message = format!(
            "{} (namespace {}) was pulled with {NAME}, which has no snapshot of it: the state root was emptied or replaced; \
             its containers do not start, and a new pull alone does not help",
            image.name, image.namespace
        );
        let remedy = match (n, images.len()) {
            (0, 1) => {
                format!("put the old state root back; or remove its containers, then {}", repull_images(images))
            }
            (0, count) => format!(
                "put the old state root back; or remove the containers of all {count} of {GONE}, then {}",
                repull_images(images)
            ),
            _ => format!("with the first one of {GONE}"),
        };
        findings.push(Finding::problem(GONE, message, remedy));
    }
    findings.extend(remaining(images).map(|message| Finding::problem(GONE, message, "as above")));
    findings
}

/// The names of the images that get no finding of their own.
fn remaining(images: &[&Image]) -> Option<String> {
    let names: Vec<&str> = images.iter().skip(MAX_NAMED).map(|image| image.name.as_str()).collect();
    (!names.is_empty()).then(|| format!("and {} more: {}", names.len(), names.join(" ")))
}

fn list_images(peer: &GrpcClient, progress: &Progress) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for namespace in peer.call(&NAMESPACES, &ListNamespacesRequest::new())?.namespaces {
        let namespace = namespace.name;
        // The CRI gives an image more names: its digest, and the name with the digest.
        let mut names: BTreeMap<String, String> = BTreeMap::new();
        let rank = |name: &str| (name.starts_with("sha256:"), name.contains("@sha256:"));
        for image in peer.call_in(&namespace, &IMAGES, &ListImagesRequest::new())?.images {
            let Some(target) = image.target.into_option() else { continue };
            let name = names.entry(target.digest).or_insert_with(|| image.name.clone());
            if rank(&image.name) < rank(name) {
                *name = image.name;
            }
        }
        let count = names.len();
        for (n, (target, name)) in names.into_iter().enumerate() {
            progress.set_message(&format!("image {} of {count} in {namespace}", n + 1));
            let chains = unpacked_chains(target, |digest| labels(peer, &namespace, digest))?;
            let is_gone = chains.get(NAME).map(|chain| is_gone(peer, &namespace, chain)).transpose()?.unwrap_or(false);
            images.push(Image { namespace: namespace.clone(), name, chains, is_gone });
        }
    }
    images.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    Ok(images)
}

/// This snapshotter does not have the chain, which it should have.
fn is_gone(peer: &GrpcClient, namespace: &str, chain: &str) -> Result<bool> {
    let request = StatSnapshotRequest { snapshotter: NAME.to_owned(), key: chain.to_owned(), ..Default::default() };
    match peer.call_in(namespace, &STAT, &request) {
        Err(e) if is_timeout(&e) => Err(e),
        answer => Ok(matches!(answer, Err(Error::Call { code: RpcStatusCode::NOT_FOUND, .. }))),
    }
}

/// The labels of a blob; none if containerd does not have it.
fn labels(peer: &GrpcClient, namespace: &str, digest: &str) -> Result<HashMap<String, String>> {
    let request = InfoRequest { digest: digest.to_owned(), ..InfoRequest::default() };
    match peer.call_in(namespace, &CONTENT, &request) {
        Ok(answer) => Ok(answer.info.into_option().unwrap_or_default().labels),
        Err(e) if is_timeout(&e) => Err(e),
        Err(_) => Ok(HashMap::new()),
    }
}

/// A server that has not answered is asked nothing more, because each question would take the whole time limit.
fn is_timeout(e: &Error) -> bool {
    matches!(e, Error::Call { code: RpcStatusCode::DEADLINE_EXCEEDED, .. })
}

/// The chains of the first image below `target` that a snapshotter has.
fn unpacked_chains(
    target: String,
    labels: impl Fn(&str) -> Result<HashMap<String, String>>,
) -> Result<BTreeMap<String, String>> {
    let mut seen = HashSet::from([target.clone()]);
    let mut pending = vec![target];
    while let Some(digest) = pending.pop() {
        let labels = labels(&digest)?;
        let chain =
            |(label, chain): (&String, &String)| Some((label.strip_prefix(SNAPSHOT_LABEL)?.into(), chain.into()));
        let chains: BTreeMap<String, String> = labels.iter().filter_map(chain).collect();
        if !chains.is_empty() {
            return Ok(chains);
        }
        for (label, child) in labels {
            let is_reference = label == CONFIG_LABEL || label.starts_with(MANIFEST_LABEL);
            if is_reference && seen.len() < MAX_BLOBS && seen.insert(child.clone()) {
                pending.push(child);
            }
        }
    }
    Ok(BTreeMap::new())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn chains_are_found_through_indexes_and_manifests_and_each_blob_is_asked_for_once() {
        let asked = Cell::new(0);
        let labels = |digest: &str| {
            asked.set(asked.get() + 1);
            let list: Vec<(String, String)> = match digest {
                "index" => {
                    vec![(format!("{MANIFEST_LABEL}0"), "other".into()), (format!("{MANIFEST_LABEL}1"), "m".into())]
                }
                "m" => vec![(CONFIG_LABEL.into(), "config".into())],
                "config" => vec![(format!("{SNAPSHOT_LABEL}overlayfs"), "chain".into())],
                // An image's author can make indexes list each other many times.
                "many" => (0..10_000).map(|n| (format!("{MANIFEST_LABEL}{n}"), format!("many{}", n % 1000))).collect(),
                digest if digest.starts_with("many") => vec![(format!("{MANIFEST_LABEL}0"), "many".into())],
                _ => Vec::new(),
            };
            Ok(list.into_iter().collect())
        };
        let expected = BTreeMap::from([("overlayfs".to_owned(), "chain".to_owned())]);
        for target in ["index", "m", "config"] {
            assert_eq!(unpacked_chains(target.into(), labels).unwrap(), expected, "{target}");
        }
        asked.set(0);
        assert_eq!(unpacked_chains("many".into(), labels).unwrap(), BTreeMap::new());
        assert_eq!(asked.get(), MAX_BLOBS);
    }

    /// When remedies were followed one after the other, the second pull found layers that the third image still held.
    #[test]
    fn missing_images_are_all_removed_before_one_is_pulled() {
        let image = |name: &str| Image {
            namespace: KUBERNETES.to_owned(),
            name: name.to_owned(),
            chains: BTreeMap::new(),
            is_gone: true,
        };
        let images = ["a:1", "b:1"].map(image);
        let remedies = |images: &[&Image]| -> Vec<String> {
            gone_findings(images).into_iter().filter_map(|finding| finding.remedy).collect()
        };
        let [first, second] = &remedies(&[&images[0], &images[1]])[..] else { panic!("one for each") };
        assert!(first.ends_with("then crictl rmi a:1 b:1 && crictl pull a:1 && crictl pull b:1"), "{first}");
        assert_eq!(second, "with the first one of images.gone");
        assert!(remedies(&[&images[0]])[0].ends_with("remove its containers, then crictl rmi a:1 && crictl pull a:1"));
    }
}
