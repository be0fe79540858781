//! Images that containerd has, and this snapshotter has not: pulled before the switch, or with another
//! one, so that their next containers copy every layer, published or not; or pulled with this one, whose
//! snapshots are gone since.
#![forbid(unsafe_code)]

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::Path;

use grpcio::RpcStatusCode;
use serde::Deserialize;

use super::anew::{KUBERNETES, pull_anew};
use super::configuration::Configuration;
use super::containerd::{CONTENT, IMAGES, NAMESPACES};
use super::{Finding, Findings, NAMED, reach};
use crate::admin::client::{Error, GrpcClient, Result};
use crate::admin::table::Progress;
use crate::config::file;
use crate::migration::rebuild::DEFAULT_NAME as NAME;
use crate::model::Digest;
use crate::proto::containerd::{InfoRequest, ListImagesRequest, ListNamespacesRequest};
use crate::proto::snapshots::StatSnapshotRequest;
use crate::server::service::STAT;

/// On the configuration of an image: the chain that a snapshotter has of it.
const UNPACKED: &str = "containerd.io/gc.ref.snapshot.";
/// So many blobs are looked at for one image: an index lists an image for each platform, and few do for many.
const MOST_LISTED: usize = 256;

const OTHER: &str = "images.other-snapshotter";
const GONE: &str = "images.gone";

/// An image, by the name that people use, and what snapshotters have of it: names and chains.
struct Image {
    namespace: String,
    name: String,
    unpacked: BTreeMap<String, String>,
}

impl Image {
    fn is_of_kubernetes(&self) -> bool {
        self.namespace == KUBERNETES
    }

    fn pull_anew(&self) -> String {
        all_anew(&[self])
    }
}

fn all_anew(images: &[&Image]) -> String {
    pull_anew(images.iter().map(|image| (image.namespace.as_str(), image.name.as_str())))
}

pub fn look(
    peer: &GrpcClient,
    content: Option<&Path>,
    configuration: Option<&Configuration>,
    progress: &Progress,
    findings: &mut Findings<'_>,
) {
    let Some(content) = content else { return };
    let cannot = |why: String| {
        let what = format!("containerd's images in {} cannot be looked at: {why}", content.display());
        Finding::warning(OTHER, what, "see containerd's log: journalctl -u containerd -n 50")
    };
    let reached = match reach::touch(content) {
        // Made by the first pull.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        reached => reached.map(drop).map_err(|e| e.to_string()),
    };
    let images = match reached.and_then(|()| all_images(peer, content, progress).map_err(|e| e.to_string())) {
        Ok(images) => images,
        Err(why) => return findings.push(cannot(why)),
    };
    let gone = match gone(peer, &images, progress) {
        Ok(gone) => gone,
        Err(e) => return findings.push(cannot(e.to_string())),
    };
    findings.extend(about_gone(&gone));
    // Of other namespaces nobody knows which snapshotter is meant.
    if configuration.is_none_or(|one| one.snapshotter.as_deref() != Some(NAME)) {
        return;
    }
    let count = images.iter().filter(|image| image.is_of_kubernetes()).count();
    let is_other = |image: &&Image| !image.unpacked.is_empty() && !image.unpacked.contains_key(NAME);
    let others: Vec<&Image> = images.iter().filter(|image| image.is_of_kubernetes()).filter(is_other).collect();
    let pause = configuration.and_then(|one| one.pause_image.as_deref());
    findings.extend(about_others(&others, pause));
    if others.is_empty() && !gone.iter().any(|image| image.is_of_kubernetes()) {
        findings.push(Finding::good(OTHER, format!("all {count} images of Kubernetes are there for {NAME}")));
    }
}

fn about_others(others: &[&Image], pause: Option<&str>) -> Vec<Finding> {
    let shown = |image: &Image| image.unpacked.keys().map(String::as_str).collect::<Vec<_>>().join(" and ");
    let (pauses, others): (Vec<&Image>, Vec<&Image>) =
        others.iter().partition(|image| Some(image.name.as_str()) == pause);
    let about_pause = pauses.into_iter().map(|image| {
        Finding::warning(
            "images.pause",
            format!(
                "the pause image {} is there for {} only: containerd unpacks it for each first pod, or no pod starts",
                image.name,
                shown(image)
            ),
            image.pull_anew(),
        )
    });
    let about_others = others.iter().take(NAMED).map(|image| {
        Finding::warning(
            OTHER,
            format!(
                "{} was pulled with {}, and Kubernetes uses {NAME} now: its next container makes a whole copy of every \
                 layer, or does not start if containerd has discarded the blobs",
                image.name,
                shown(image)
            ),
            format!("once no container uses it: {}", image.pull_anew()),
        )
    });
    let rest = rest_of(&others).map(|what| Finding::warning(OTHER, what, "as above"));
    about_pause.chain(about_others).chain(rest).collect()
}

fn about_gone(gone: &[&Image]) -> Vec<Finding> {
    let named = gone.iter().take(NAMED).enumerate().map(|(n, image)| {
        Finding::problem(
            GONE,
            format!(
                "{} (namespace {}) was pulled with {NAME}, which has no snapshot of it: the state root was emptied, or is another \
                 one than then; its containers do not start, and a new pull alone mends nothing",
                image.name, image.namespace
            ),
            match (n, gone.len()) {
                (0, 1) => format!("put the old state root back; or remove its containers, then {}", all_anew(gone)),
                (0, count) => format!(
                    "put the old state root back; or remove the containers of all {count} of {GONE}, then {}",
                    all_anew(gone)
                ),
                (_, _) => format!("with the first one of {GONE}"),
            },
        )
    });
    named.chain(rest_of(gone).map(|what| Finding::problem(GONE, what, "as above"))).collect()
}

/// Those that are not told one by one.
fn rest_of(images: &[&Image]) -> Option<String> {
    let names: Vec<&str> = images.iter().skip(NAMED).map(|image| image.name.as_str()).collect();
    (!names.is_empty()).then(|| format!("and {} more: {}", names.len(), names.join(" ")))
}

fn all_images(peer: &GrpcClient, content: &Path, progress: &Progress) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for namespace in peer.call(&NAMESPACES, &ListNamespacesRequest::new())?.namespaces {
        let namespace = namespace.name;
        let listed = peer.call_in(&namespace, &IMAGES, &ListImagesRequest::new())?.images;
        // One that was pulled by name has others: its digest, and the name with the digest.
        let mut names: BTreeMap<String, String> = BTreeMap::new();
        let rank = |name: &str| (name.starts_with("sha256:"), name.contains("@sha256:"));
        for image in listed {
            let Some(target) = image.target.into_option() else { continue };
            let name = names.entry(target.digest).or_insert_with(|| image.name.clone());
            if rank(&image.name) < rank(name) {
                *name = image.name;
            }
        }
        let count = names.len();
        for (n, (target, name)) in names.into_iter().enumerate() {
            progress.set_message(&format!("image {} of {count} in {namespace}", n + 1));
            let unpacked = unpacked(peer, &namespace, content, &target)?.unwrap_or_default();
            images.push(Image { namespace: namespace.clone(), name, unpacked });
        }
    }
    images.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    Ok(images)
}

/// Those that this snapshotter should have, and has not.
fn gone<'i>(peer: &GrpcClient, images: &'i [Image], progress: &Progress) -> Result<Vec<&'i Image>> {
    let mut known: HashMap<(&str, &str), bool> = HashMap::new();
    let mut gone = Vec::new();
    for image in images {
        let Some(chain) = image.unpacked.get(NAME) else { continue };
        let is_gone = match known.entry((&image.namespace, chain)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(place) => {
                progress.set_message(&format!("snapshot {chain}"));
                *place.insert(is_unknown(peer, &image.namespace, chain)?)
            }
        };
        if is_gone {
            gone.push(image);
        }
    }
    Ok(gone)
}

fn is_unknown(peer: &GrpcClient, namespace: &str, chain: &str) -> Result<bool> {
    let request = StatSnapshotRequest { snapshotter: NAME.to_owned(), key: chain.to_owned(), ..Default::default() };
    match peer.call_in(namespace, &STAT, &request) {
        Err(e) if is_silence(&e) => Err(e),
        answer => Ok(matches!(answer, Err(Error::Call { code: RpcStatusCode::NOT_FOUND, .. }))),
    }
}

/// Which snapshotters have the image, and under which chains. None: that cannot be told.
fn unpacked(
    peer: &GrpcClient,
    namespace: &str,
    content: &Path,
    target: &str,
) -> Result<Option<BTreeMap<String, String>>> {
    let Some(configuration) = configuration_of(content, target) else { return Ok(None) };
    let request = InfoRequest { digest: configuration, ..InfoRequest::default() };
    let info = match peer.call_in(namespace, &CONTENT, &request) {
        Ok(answer) => answer.info.into_option(),
        Err(e) if is_silence(&e) => return Err(e),
        Err(_) => None,
    };
    let chain = |(label, chain): (String, String)| Some((label.strip_prefix(UNPACKED)?.to_owned(), chain));
    Ok(info.map(|info| info.labels.into_iter().filter_map(chain).collect()))
}

/// Who has just not answered is not asked about the next image: each time is the whole limit.
fn is_silence(e: &Error) -> bool {
    matches!(e, Error::Call { code: RpcStatusCode::DEADLINE_EXCEEDED, .. })
}

/// A manifest, or an index of such: what is of interest here.
#[derive(Deserialize)]
struct Manifest {
    config: Option<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
}

/// The digest of the configuration that a manifest names, or the first that is there of those
/// that an index lists.
fn configuration_of(content: &Path, target: &str) -> Option<String> {
    let mut known: HashSet<Digest> = Digest::parse(target).into_iter().collect();
    let mut next: Vec<Digest> = known.iter().cloned().collect();
    while let Some(digest) = next.pop() {
        let Some(manifest) = read_manifest(&content.join("blobs/sha256").join(digest.hex())) else { continue };
        if let Some(configuration) = manifest.config {
            return Some(configuration.digest);
        }
        // Each is looked at once, whatever lists it. The first of a list is the next.
        let listed = manifest.manifests.iter().filter_map(|one| Digest::parse(&one.digest).ok());
        let fresh: Vec<Digest> = listed
            .take(MOST_LISTED)
            .filter(|digest| known.len() < MOST_LISTED && known.insert(digest.clone()))
            .collect();
        next.extend(fresh.into_iter().rev());
    }
    None
}

fn read_manifest(path: &Path) -> Option<Manifest> {
    serde_json::from_slice(&file::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Puts a blob there; the result is its digest, which is no digest of it.
    fn put(content: &Path, n: usize, text: &str) -> String {
        let hex = format!("{n:064x}");
        fs::write(content.join("blobs/sha256").join(&hex), text).unwrap();
        format!("sha256:{hex}")
    }

    fn list(digests: impl Iterator<Item = String>) -> String {
        let descriptors: Vec<String> = digests.map(|digest| format!(r#"{{"digest":"{digest}"}}"#)).collect();
        format!(r#"{{"manifests":[{}]}}"#, descriptors.join(","))
    }

    fn store() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        dir
    }

    #[test]
    fn the_configuration_is_that_of_the_first_manifest_of_an_index_that_is_there() {
        let dir = store();
        let content = dir.path();
        let missing = format!("sha256:{:064x}", 99);
        let [first, second] =
            [(1, "a"), (2, "b")].map(|(n, name)| put(content, n, &format!(r#"{{"config":{{"digest":"{name}"}}}}"#)));
        let inner = put(content, 3, &list([missing, first.clone(), second].into_iter()));
        let outer = put(content, 4, &list([inner.clone()].into_iter()));
        for target in [&first, &inner, &outer] {
            assert_eq!(configuration_of(content, target).as_deref(), Some("a"), "{target}");
        }
        assert_eq!(configuration_of(content, "sha256:..").as_deref(), None);
    }

    /// An image's author made each doctor read for hours: every index lists the next one many times.
    #[test]
    fn an_index_that_lists_the_same_again_and_again_is_read_once() {
        let dir = store();
        let content = dir.path();
        let digest = |n: usize| format!("sha256:{n:064x}");
        let top = put(content, 1, &list((0..10_000).map(|_| digest(2))));
        put(content, 2, &list((0..10_000).map(|_| digest(3))));
        put(content, 3, &list((0..10_000).map(|n| digest(n % 3 + 1))));
        assert_eq!(configuration_of(content, &top), None);
        // Nor are many different ones read.
        let good = put(content, 90_000, r#"{"config":{"digest":"late"}}"#);
        let many = put(content, 4, &list((10..5000).map(digest).chain([good])));
        assert_eq!(configuration_of(content, &many), None);
    }

    /// Followed one after the other, the second pull found layers that the third image still held.
    #[test]
    fn images_that_are_gone_are_all_removed_before_one_is_pulled() {
        let image =
            |name: &str| Image { namespace: KUBERNETES.to_owned(), name: name.to_owned(), unpacked: BTreeMap::new() };
        let images = ["a:1", "b:1"].map(image);
        let remedies = |images: &[&Image]| -> Vec<String> {
            about_gone(images).into_iter().filter_map(|finding| finding.remedy).collect()
        };
        let [first, second] = &remedies(&[&images[0], &images[1]])[..] else { panic!("one for each") };
        assert!(first.ends_with("then crictl rmi a:1 b:1 && crictl pull a:1 && crictl pull b:1"), "{first}");
        assert_eq!(second, "with the first one of images.gone");
        assert!(remedies(&[&images[0]])[0].ends_with("remove its containers, then crictl rmi a:1 && crictl pull a:1"));
    }
}
