//! What lies below a container: the layers of its chain, or the whole root file system that
//! the repository has of the image. Decided once per chain, and kept.
//!
//! The whole root is taken only where it is certain to show what the layers show: the
//! published manifest of the image lists exactly the chain's layers, and of the names that a
//! publisher is known to add or to change, each is the publisher's alone and hidden, or the
//! image's own, or shown as a layer has it.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::layers::{Attached, Limits, Piece, Sources, Trouble, Walking, layer_subject, unavailable};
use super::{Error, Result};
use crate::attach::MOST_COPIED;
use crate::overlay::{Form, Lower};
use crate::repository::lane::{Turn, alive};
use crate::repository::manifest::ImageRef;
use crate::repository::scan::{Extent, Subject};
use crate::repository::{Missing, Repository};
use crate::store::Lookup;
use crate::sys::{FileType, Status, Sys};
use crate::types::{Digest, Flat, Key, LABEL_IMAGE_REF, Layer, Rootfs, RootfsMode, Snapshot, SnapshotId};

/// Of Singularity's, and its own in every root that has it.
const SINGULARITY: &str = ".singularity.d";
/// What Singularity and Apptainer need in a root file system, and a publisher adds or, where
/// there was none, makes; it empties the two files in `etc`. A directory stands before what is
/// in it.
const ADDED: [&str; 18] = [
    SINGULARITY,
    ".exec",
    ".run",
    ".shell",
    ".test",
    "environment",
    "singularity",
    "dev",
    "proc",
    "root",
    "var",
    "var/tmp",
    "tmp",
    "etc",
    "etc/hosts",
    "etc/resolv.conf",
    "sys",
    "home",
];
/// Why a chain has no published root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
enum NoFlat {
    NoReference,
    NoManifest,
    OtherLayers,
    /// The chain is the lower part of an image that has one.
    Partly,
    NotPublished,
    /// The publisher put its own file over one of the image.
    Overwritten(&'static str),
    /// For now: the repository could not be asked.
    Unknown(Missing),
}

impl fmt::Display for NoFlat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoReference => write!(f, "the pull came without a usable label {LABEL_IMAGE_REF}"),
            Self::NoManifest => f.write_str("the repository has no manifest of the image"),
            Self::OtherLayers | Self::Partly => f.write_str("the published manifest of the image lists other layers"),
            Self::NotPublished => f.write_str("the repository has no root file system of the image"),
            Self::Overwritten(name) => write!(f, "the published root file system has another /{name} than the image"),
            Self::Unknown(missing) => missing.fmt(f),
        }
    }
}

/// Under a chain of published layers.
pub type Below = Vec<(Lower, Option<Attached>)>;

impl Sources {
    /// What lies below a container on `chain`, attached; nearest first.
    pub fn attach_below(self: &Arc<Self>, chain: &[Snapshot]) -> Result<Below> {
        // All repositories have the same limits.
        let limits = Limits::of(&self.repositories[0]);
        let Some(remote) = self.may_be_flat(chain) else { return self.attach_layers(chain, limits) };
        let id = chain[0].id;
        let decided = self.store.read(|tx| tx.rootfs(id).map_err(Error::from))?;
        let flat = match decided {
            Some(Rootfs::Layers) => None,
            Some(Rootfs::Flat(flat)) => Some(flat),
            None => self.decide(chain, &remote)?,
        };
        if let Some(flat) = flat {
            match self.attach_flat(id, &flat) {
                // It is being looked through for the first time: the layers may be ready.
                Err(Trouble::Missing(Missing::BeingScanned { .. })) => return self.attach_layers(chain, limits),
                Err(Trouble::Missing(why)) if is_over(&why) => {
                    log::warn!(
                        "the root file system {} of repository {} cannot be used any more: {why}",
                        flat.config,
                        flat.repository
                    );
                    // Another one, or none.
                    if let Some(other) = self.decide(chain, &remote)?.filter(|other| *other != flat) {
                        return finish(self.attach_flat(id, &other), &remote);
                    }
                }
                // Another repository may have the layers. What was decided stays.
                Err(Trouble::Missing(why)) if self.repositories.len() > 1 => {
                    return self.attach_layers(chain, limits).map_err(|_| unavailable(remote[0], why));
                }
                result => return finish(result, &remote),
            }
        }
        match self.attach_layers(chain, limits) {
            // They were decided for, and are gone: the image may have a root by now.
            Err(Error::LayerUnavailable { digest, repository, why }) if why.is_gone() => {
                match self.decide(chain, &remote)? {
                    Some(flat) => finish(self.attach_flat(id, &flat), &remote),
                    None => Err(Error::LayerUnavailable { digest, repository, why }),
                }
            }
            result => result,
        }
    }

    /// The layers of a chain that is published from top to bottom, nearest first.
    fn may_be_flat<'c>(&self, chain: &'c [Snapshot]) -> Option<Vec<&'c Layer>> {
        if self.rootfs == RootfsMode::Layers || chain.is_empty() {
            return None;
        }
        chain.iter().map(|snapshot| snapshot.layer.as_ref()).collect()
    }

    /// Decides and keeps it, unless it can be otherwise in a moment. None: the layers.
    fn decide(self: &Arc<Self>, chain: &[Snapshot], remote: &[&Layer]) -> Result<Option<Flat>> {
        let id = chain[0].id;
        let (rootfs, is_certain) = match self.look_for_flat(&chain[0], remote) {
            Ok(flat) => (Rootfs::Flat(flat), true),
            Err(why) => {
                let is_certain = !matches!(why, NoFlat::Unknown(_));
                let level = if self.rootfs == RootfsMode::Flat { log::Level::Warn } else { log::Level::Debug };
                log::log!(level, "the layers are used of the chain of layer {}: {why}", remote[0].digest);
                (Rootfs::Layers, is_certain)
            }
        };
        if is_certain {
            self.store.write(
                |tx| {
                    if tx.exists(id)? { tx.put_rootfs(id, &rootfs).map_err(Error::from) } else { Ok(()) }
                },
            )?;
        }
        Ok(match rootfs {
            Rootfs::Layers => None,
            Rootfs::Flat(flat) => Some(flat),
        })
    }

    fn look_for_flat(self: &Arc<Self>, uppermost: &Snapshot, remote: &[&Layer]) -> std::result::Result<Flat, NoFlat> {
        let reference = uppermost.labels.get(LABEL_IMAGE_REF).and_then(|text| ImageRef::parse(text));
        let reference = reference.ok_or(NoFlat::NoReference)?;
        let layers: Vec<Digest> = remote.iter().rev().map(|layer| layer.digest.clone()).collect();
        let mut reason = NoFlat::NoManifest;
        for repository in self.candidates(&remote[0].repository) {
            let job = {
                let (sys, repository) = (Arc::clone(&self.sys), Arc::clone(&repository));
                let (reference, layers) = (reference.clone(), layers.clone());
                move || find(sys.as_ref(), &repository, &reference, &layers)
            };
            match Repository::ask(&repository, job).unwrap_or_else(|missing| Err(NoFlat::Unknown(missing))) {
                Ok(flat) => return Ok(flat),
                // What may change weighs more than what is certain.
                Err(_) if matches!(reason, NoFlat::Unknown(_)) => {}
                Err(NoFlat::NoManifest) => {}
                Err(why) => reason = why,
            }
        }
        Err(reason)
    }

    fn attach_flat(self: &Arc<Self>, id: SnapshotId, flat: &Flat) -> std::result::Result<Below, Trouble> {
        let repository = self.named(&flat.repository).ok_or(Missing::NotConfigured { instead: None })?;
        let subject = flat_subject(flat);
        let piece = Piece { id, form: Form::Flat, subject, flat: Some(flat.clone()), masked: true };
        // The layers can be had at once, so a first walk is not waited for as long as it may take.
        let limits = Limits { scans: Instant::now() + repository.timeout() / 4, ..Limits::of(repository) };
        let attached = self.attach(&piece, repository, limits)?;
        let (edition, masked) = (attached.pin.edition, attached.scan.has_mask());
        Ok(vec![(Lower::Flat { id, edition, masked }, Some(attached))])
    }

    /// Does ahead what the first container would wait for, as far as it is clear after this
    /// layer of a pull: decides, and looks for markers where it will matter.
    pub fn prepare(self: &Arc<Self>, key: &Key) -> Result<()> {
        let chain = self.store.read(|tx| tx.chain(key).map_err(Error::from))?;
        let Some((snapshot, layer)) = chain.first().and_then(|s| Some((s, s.layer.as_ref()?))) else { return Ok(()) };
        if let Some(remote) = self.may_be_flat(&chain) {
            match self.look_for_flat(snapshot, &remote) {
                Ok(flat) => {
                    self.decide_ahead(snapshot.id, &flat)?;
                    return self.scan_ahead(&flat_subject(&flat), layer);
                }
                // The layers above are still to come.
                Err(NoFlat::Partly) => return Ok(()),
                Err(_) => {}
            }
        }
        let Some(repository) = self.named(&layer.repository) else { return Ok(()) };
        self.scan_ahead(&layer_subject(snapshot, layer, repository), layer)
    }

    /// Unless it was decided before.
    fn decide_ahead(&self, id: SnapshotId, flat: &Flat) -> Result<()> {
        self.store.write(|tx| {
            if tx.exists(id)? && tx.rootfs(id)?.is_none() {
                tx.put_rootfs(id, &Rootfs::Flat(flat.clone()))?;
            }
            Ok(())
        })
    }

    /// For the pull of `layer`.
    fn scan_ahead(&self, subject: &Subject, layer: &Layer) -> Result<()> {
        let Some(repository) = self.named(&subject.repository) else { return Ok(()) };
        let looking = self.look(subject, repository)?;
        match looking.walk(self, subject, repository, Limits::of(repository), Turn::Last) {
            Walking::Known(_) => Ok(()),
            Walking::Begun(begun) => begun.map(drop).map_err(|why| unavailable(layer, why)),
        }
    }
}

pub fn flat_subject(flat: &Flat) -> Subject {
    Subject { extent: Extent::Flat, digest: flat.config.clone(), repository: flat.repository.clone() }
}

/// It will not be there in a moment either.
fn is_over(why: &Missing) -> bool {
    why.is_gone() || matches!(why, Missing::Unscannable(_) | Missing::NotADirectory { .. } | Missing::LeadsOut { .. })
}

fn finish(result: std::result::Result<Below, Trouble>, remote: &[&Layer]) -> Result<Below> {
    result.map_err(|trouble| trouble.of(remote[0]))
}

/// On a thread of the repository. `layers` from the bottom up.
fn find(
    sys: &dyn Sys,
    repository: &Repository,
    reference: &ImageRef,
    layers: &[Digest],
) -> std::result::Result<Flat, NoFlat> {
    let manifest = repository.manifest(reference).map_err(NoFlat::Unknown)?.ok_or(NoFlat::NoManifest)?;
    let is_partly = manifest.layers.len() > layers.len() && manifest.layers.starts_with(layers);
    if manifest.layers != layers && !is_partly {
        return Err(NoFlat::OtherLayers);
    }
    let top = repository.flat(&manifest.config).map_err(|why| match why {
        Missing::NotPublished | Missing::NotADirectory { .. } | Missing::LeadsOut { .. } => NoFlat::NotPublished,
        why => NoFlat::Unknown(why),
    })?;
    if is_partly {
        return Err(NoFlat::Partly);
    }
    let Changes { hidden, repaired } = changes(sys, repository, &top, layers)?;
    Ok(Flat { config: manifest.config, repository: repository.name().to_owned(), hidden, repaired })
}

/// What the publisher changed in a root, against the layers: names to be hidden, and entries to
/// be shown as a layer has them.
#[derive(Default)]
struct Changes {
    hidden: Vec<PathBuf>,
    repaired: Vec<(PathBuf, Digest)>,
}

impl Changes {
    fn repair(&mut self, path: &Path, layer: &Digest) {
        if !self.repaired.iter().any(|(repaired, _)| repaired == path) {
            self.repaired.push((path.to_owned(), layer.clone()));
        }
    }
}

fn changes(
    sys: &dyn Sys,
    repository: &Repository,
    top: &Path,
    layers: &[Digest],
) -> std::result::Result<Changes, NoFlat> {
    let look = |path: &Path| {
        alive();
        match sys.lstat(path) {
            Ok(status) => Ok(Some(status)),
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(e) => Err(NoFlat::Unknown(repository.unreadable(e))),
        }
    };
    let mut suspects = Vec::new();
    for name in ADDED {
        let path = top.join(name);
        // Below a link, the publisher has changed something that is elsewhere.
        if Path::new(name).components().count() > 1
            && look(path.parent().unwrap_or(top))?.is_some_and(|above| above.file_type != FileType::Directory)
        {
            return Err(NoFlat::Overwritten(name));
        }
        if let Some(status) = look(&path)? {
            suspects.push((name, status));
        }
    }
    let mut changes = Changes::default();
    if suspects.is_empty() {
        return Ok(changes);
    }
    let find = |digest: &Digest| Ok((digest.clone(), repository.layer(digest).map_err(NoFlat::Unknown)?));
    let tops = layers.iter().rev().map(find).collect::<std::result::Result<Vec<_>, _>>()?;
    for (name, shown) in suspects {
        let path = Path::new(name);
        // What is in a directory that is hidden is hidden with it.
        if changes.hidden.iter().any(|above| path.starts_with(above)) {
            continue;
        }
        let Some((layer, own_path)) = own(&tops, path, &look)? else {
            changes.hidden.push(path.to_owned());
            // Its directory got another time when it was made.
            if let Some(above) = path.parent().filter(|above| !above.as_os_str().is_empty())
                && let Some((layer, _)) = own(&tops, above, &look)?
            {
                changes.repair(above, &layer);
            }
            continue;
        };
        // Through a link, the publisher has emptied another file.
        let is_link = shown.file_type == FileType::Symlink && path.parent() == Some(Path::new("etc"));
        if !is_link && is_same(sys, &top.join(name), &own_path) {
            continue;
        }
        let is = look(&own_path)?.map(|status| (status.file_type, status.size, status.links));
        match (shown.file_type, is) {
            (FileType::Directory, Some((FileType::Directory, ..))) if name != SINGULARITY => {
                changes.repair(path, &layer);
            }
            // With other names it was emptied under those as well.
            (FileType::Other, Some((FileType::Other, ..=MOST_COPIED, 1))) if path.starts_with("etc") => {
                changes.repair(path, &layer);
            }
            _ => return Err(NoFlat::Overwritten(name)),
        }
    }
    Ok(changes)
}

/// Where the image itself has `name`: in the uppermost layer that does, unless one above it, or a
/// layer on the way, deletes it.
fn own(
    tops: &[(Digest, PathBuf)],
    name: &Path,
    look: &impl Fn(&Path) -> std::result::Result<Option<Status>, NoFlat>,
) -> std::result::Result<Option<(Digest, PathBuf)>, NoFlat> {
    for (digest, layer) in tops {
        let path = layer.join(name);
        // A link or a file in place of its directory hides what is below, and leads elsewhere.
        let above = name.parent().filter(|above| !above.as_os_str().is_empty());
        if let Some(above) = above
            && look(&layer.join(above))?.is_some_and(|above| above.file_type != FileType::Directory)
        {
            return Ok(None);
        }
        if look(&path)?.is_some() {
            return Ok(Some((digest.clone(), path)));
        }
        for part in name.ancestors().filter(|part| !part.as_os_str().is_empty()) {
            let marker = part.file_name().map(|file| format!(".wh.{}", file.display()));
            let deleted = marker.map(|marker| layer.join(part).with_file_name(marker));
            let opaque = part.parent().filter(|above| !above.as_os_str().is_empty());
            let opaque = opaque.map(|above| layer.join(above).join(".wh..wh..opq"));
            for marker in deleted.into_iter().chain(opaque) {
                if look(&marker)?.is_some() {
                    return Ok(None);
                }
            }
        }
    }
    Ok(None)
}

/// Whether two entries cannot be told apart; of directories, by themselves.
fn is_same(sys: &dyn Sys, a: &Path, b: &Path) -> bool {
    alive();
    let (Ok(one), Ok(other)) = (sys.lstat(a), sys.lstat(b)) else { return false };
    let is_dir = one.file_type == FileType::Directory;
    let differs = one.file_type != other.file_type || (one.size != other.size && !is_dir);
    if differs || sys.attributes(a).ok() != sys.attributes(b).ok() {
        return false;
    }
    match one.file_type {
        FileType::Directory => !a.ends_with(SINGULARITY),
        FileType::Symlink => matches!((sys.read_link(a), sys.read_link(b)), (Ok(a), Ok(b)) if a == b),
        FileType::Other => {
            matches!((sys.read_file(a, MOST_COPIED), sys.read_file(b, MOST_COPIED)), (Ok(a), Ok(b)) if a == b)
        }
    }
}
