//! Images of containerd that are not usable as they should be: those pulled with another snapshotter, whose containers get a
//! copy of every layer, and those pulled with this one, which has lost their snapshots.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use grpcio::RpcStatusCode;

use super::config::ContainerdConfig;
use super::{Finding, Report, list};
use crate::admin::client::{Error, GrpcClient, Result};
use crate::admin::table::Progress;
use crate::migration::rebuild::DEFAULT_NAME as NAME;
use crate::model::{shell_quote, shell_quote_all};
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
/// Blobs below an index or a manifest that are asked for: one for each platform, or the configuration.
const MAX_CHILDREN: usize = 64;
/// From an index over a manifest to the configuration.
const MAX_DEPTH: usize = 2;

/// The namespace that Kubernetes uses in containerd.
pub const KUBERNETES: &str = "k8s.io";
const OTHER: &str = "images.other-snapshotter";

struct Image {
    namespace: String,
    /// The name that people use for it.
    name: String,
    /// The snapshotters that have it, unless this one does.
    others: String,
    /// This snapshotter has unpacked it, and does not have the snapshot any more.
    is_gone: bool,
}

pub fn check(peer: &GrpcClient, config: Option<&ContainerdConfig>, progress: &Progress, report: &mut Report<'_>) {
    match list_images(peer, progress) {
        Ok(images) => report.extend(findings(&images, config)),
        Err(e) => {
            let message = format!("cannot list containerd's images: {e}");
            report.push(Finding::warning(OTHER, message, "see containerd's log: journalctl -u containerd -n 50"));
        }
    }
}

fn findings(images: &[Image], config: Option<&ContainerdConfig>) -> Vec<Finding> {
    let repull =
        |images: &[&Image]| repull_command(images.iter().map(|one| (one.namespace.as_str(), one.name.as_str())));
    let mut findings = Vec::new();
    let gone: Vec<&Image> = images.iter().filter(|image| image.is_gone).collect();
    if !gone.is_empty() {
        let names = list(gone.iter().map(|one| format!("{} (namespace {})", one.name, one.namespace)));
        findings.push(Finding::problem(
            "images.gone",
            format!(
                "{NAME} has no snapshot of images that were pulled with it: {names}. The state root was emptied or replaced; their \
                 containers do not start, and a new pull alone does not help"
            ),
            // An image that stays keeps the layers it shares.
            format!("put the old state root back; or remove the containers of all these images, then {}", repull(&gone)),
        ));
    }
    // Which snapshotter is meant in other namespaces is unknown.
    let Some(config) = config.filter(|config| config.snapshotter() == Some(NAME)) else { return findings };
    let (of_kubernetes, is_pause) = (
        |image: &&Image| image.namespace == KUBERNETES,
        |image: &&Image| Some(image.name.as_str()) == config.pause_image(),
    );
    let others = images.iter().filter(of_kubernetes).filter(|image| !image.others.is_empty());
    let (pause, others): (Vec<&Image>, Vec<&Image>) = others.partition(is_pause);
    if let [Image { name, others, .. }] = pause[..] {
        let message = format!(
            "the pause image {name} is there for {others} only: containerd unpacks it for each first pod, or no pod starts"
        );
        findings.push(Finding::warning("images.pause", message, repull(&pause)));
    }
    if !others.is_empty() {
        let names = list(others.iter().map(|image| format!("{} was pulled with {}", image.name, image.others)));
        let message =
            format!("{names}, and Kubernetes uses {NAME} now: their next containers copy every layer, or do not start");
        let remedy =
            format!("once no container uses them, {}; see docs/containerd.md, \"Kubernetes\"", repull(&others));
        findings.push(Finding::warning(OTHER, message, remedy));
    } else if pause.is_empty() && !gone.iter().any(of_kubernetes) {
        let count = images.iter().filter(of_kubernetes).count();
        findings.push(Finding::good(OTHER, format!("all {count} images of Kubernetes are there for {NAME}")));
    }
    findings
}

/// One line for a shell, which removes these images, pairs of a namespace of containerd and a reference in it, and pulls them
/// again. All are removed before one is pulled: an image that stays keeps the layers it shares, and with them what is wrong.
pub fn repull_command<'i>(images: impl Iterator<Item = (&'i str, &'i str)>) -> String {
    let mut by_namespace: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (namespace, reference) in images {
        by_namespace.entry(namespace).or_default().push(reference);
    }
    let mut commands = Vec::new();
    for (namespace, references) in by_namespace {
        let program = if namespace == KUBERNETES {
            "crictl".to_owned()
        } else {
            format!("nerdctl --namespace {} --snapshotter {NAME}", shell_quote(namespace))
        };
        commands.push(format!("{program} rmi {}", shell_quote_all(references.iter().copied())));
        commands.extend(references.iter().map(|one| format!("{program} pull {}", shell_quote_all([*one]))));
    }
    commands.join(" && ")
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
            let chains = unpacked_chains(&target, MAX_DEPTH, &|digest| labels(peer, &namespace, digest))?;
            let (ours, others) = (chains.get(NAME), chains.keys().cloned().collect::<Vec<_>>().join(" and "));
            images.push(Image {
                name,
                others: if ours.is_none() { others } else { String::new() },
                is_gone: ours.map(|chain| is_gone(peer, &namespace, chain)).transpose()?.unwrap_or(false),
                namespace: namespace.clone(),
            });
        }
    }
    images.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    Ok(images)
}

/// This snapshotter does not have the chain, which it should have.
fn is_gone(peer: &GrpcClient, namespace: &str, chain: &str) -> Result<bool> {
    let request = StatSnapshotRequest { snapshotter: NAME.to_owned(), key: chain.to_owned(), ..Default::default() };
    peer.call_in(namespace, &STAT, &request).map(|_| false).or_else(not_found(true))
}

/// The labels of a blob; none if containerd does not have it.
fn labels(peer: &GrpcClient, namespace: &str, digest: &str) -> Result<Labels> {
    let request = InfoRequest { digest: digest.to_owned(), ..InfoRequest::default() };
    let info = peer.call_in(namespace, &CONTENT, &request).map(|answer| answer.info.into_option().unwrap_or_default());
    info.map(|info| info.labels.into_iter().collect()).or_else(not_found(Labels::new()))
}

/// Turns the error that says that something is not there into an answer.
fn not_found<T>(answer: T) -> impl FnOnce(Error) -> Result<T> {
    |e| if matches!(e, Error::Call { code: RpcStatusCode::NOT_FOUND, .. }) { Ok(answer) } else { Err(e) }
}

type Labels = BTreeMap<String, String>;

/// The chains, by the name of the snapshotter, of the first image at or below this blob that a snapshotter has.
fn unpacked_chains(digest: &str, depth: usize, labels: &dyn Fn(&str) -> Result<Labels>) -> Result<Labels> {
    let labels_here = labels(digest)?;
    let chain =
        |(label, chain): (&String, &String)| Some((label.strip_prefix(SNAPSHOT_LABEL)?.to_owned(), chain.clone()));
    let mut chains: Labels = labels_here.iter().filter_map(chain).collect();
    let is_child = |label: &str| label == CONFIG_LABEL || label.starts_with(MANIFEST_LABEL);
    for (_, child) in labels_here.iter().filter(|(label, _)| depth > 0 && is_child(label)).take(MAX_CHILDREN) {
        if chains.is_empty() {
            chains = unpacked_chains(child, depth - 1, labels)?;
        }
    }
    Ok(chains)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn chains_are_found_through_indexes_and_manifests_and_few_blobs_are_asked_for() {
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
                "many" => (0..10_000).map(|n| (format!("{MANIFEST_LABEL}{n}"), "many".into())).collect(),
                _ => Vec::new(),
            };
            Ok(list.into_iter().collect())
        };
        for target in ["index", "m", "config"] {
            let expected = [("overlayfs".to_owned(), "chain".to_owned())].into();
            assert_eq!(unpacked_chains(target, MAX_DEPTH, &labels).unwrap(), expected, "{target}");
        }
        asked.set(0);
        assert_eq!(unpacked_chains("many", MAX_DEPTH, &labels).unwrap(), Labels::new());
        assert_eq!(asked.get(), 1 + MAX_CHILDREN + MAX_CHILDREN * MAX_CHILDREN);
    }

    /// Whoever tags an image chooses its name. One that begins with a dash is no option.
    #[test]
    fn all_images_of_a_namespace_are_removed_before_one_is_pulled() {
        let images = [(KUBERNETES, "r/a:1"), ("my space", "r/b:1"), (KUBERNETES, "r/it's"), (KUBERNETES, "--all")];
        let expected = r"crictl rmi -- r/a:1 'r/it'\''s' --all && crictl pull r/a:1 && crictl pull 'r/it'\''s' && crictl pull -- --all && nerdctl --namespace 'my space' --snapshotter cvmfs-snapshotter rmi r/b:1 && nerdctl --namespace 'my space' --snapshotter cvmfs-snapshotter pull r/b:1";
        assert_eq!(repull_command(images.into_iter()), expected);
    }
}
