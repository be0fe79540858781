//! What lies below a container: the layers of its chain, or the whole root file system that
//! the repository has of the image. Decided once per chain, and kept.
//!
//! The whole root is taken only where it is certain to show what the layers show: the
//! published manifest of the image lists exactly the chain's layers, and of the names that a
//! publisher is known to add, each is the publisher's alone and hidden, or the image's own.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;

use super::layers::{Attached, Piece, Sources, Trouble, unavailable};
use super::{Error, Result};
use crate::overlay::{Form, Lower};
use crate::repository::lane::Turn;
use crate::repository::manifest::ImageRef;
use crate::repository::scan::{Extent, Subject};
use crate::repository::{Missing, Repository, Top};
use crate::store::Lookup;
use crate::sys::{FileType, Status, Sys};
use crate::types::{Digest, Flat, Key, LABEL_IMAGE_REF, Layer, Rootfs, RootfsMode, Snapshot, SnapshotId};

/// What Singularity and Apptainer need in a root file system; a publisher adds it for them.
const ADDED: [&str; 7] = [".singularity.d", ".exec", ".run", ".shell", ".test", "environment", "singularity"];

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
        let Some(remote) = self.may_be_flat(chain) else { return self.attach_layers(chain) };
        let id = chain[0].id;
        let decided = self.store.read(|tx| tx.rootfs(id).map_err(Error::from))?;
        match decided {
            Some(Rootfs::Layers) => {}
            Some(Rootfs::Flat(flat)) => match self.attach_flat(id, &flat) {
                Err(Trouble::Missing(why)) if is_over(&why) => {
                    log::warn!(
                        "the root file system {} of repository {} cannot be used any more: {why}",
                        flat.config,
                        flat.repository
                    );
                    if let Some(below) = self.decide_and_attach(chain, &remote)? {
                        return Ok(below);
                    }
                }
                // Another repository may have the layers. What was decided stays.
                Err(Trouble::Missing(why)) if self.repositories.len() > 1 => {
                    return self.attach_layers(chain).map_err(|_| unavailable(remote[0], why));
                }
                result => return finish(result, &remote),
            },
            None => {
                if let Some(below) = self.decide_and_attach(chain, &remote)? {
                    return Ok(below);
                }
            }
        }
        match self.attach_layers(chain) {
            // They were decided for, and are gone: the image may have a root by now.
            Err(Error::LayerUnavailable { digest, repository, why }) if why.is_gone() => {
                let below = self.decide_and_attach(chain, &remote)?;
                below.ok_or(Error::LayerUnavailable { digest, repository, why })
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

    /// None: it has to be the layers.
    fn decide_and_attach(self: &Arc<Self>, chain: &[Snapshot], remote: &[&Layer]) -> Result<Option<Below>> {
        match self.decide(chain, remote)? {
            Rootfs::Layers => Ok(None),
            Rootfs::Flat(flat) => match self.attach_flat(chain[0].id, &flat) {
                Err(Trouble::Missing(why)) if is_over(&why) => Ok(None),
                result => finish(result, remote).map(Some),
            },
        }
    }

    /// Decides and keeps it, unless it can be otherwise in a moment.
    fn decide(self: &Arc<Self>, chain: &[Snapshot], remote: &[&Layer]) -> Result<Rootfs> {
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
        Ok(rootfs)
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
            match repository.ask(job).unwrap_or_else(|missing| Err(NoFlat::Unknown(missing))) {
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
        let repository = self.named(&flat.repository).ok_or(Missing::NotConfigured)?;
        let subject = flat_subject(flat);
        let scan = self.scans.known(&subject).map_err(Trouble::Own)?;
        let piece = Piece { id, form: Form::Flat, subject, added: flat.added.clone(), scan };
        let attached = self.attach(&piece, repository)?;
        let masked = attached.scan.directories.iter().any(|directory| !directory.hidden.is_empty());
        Ok(vec![(Lower::Flat { id, masked }, Some(attached))])
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
                    return Ok(());
                }
                // The layers above are still to come.
                Err(NoFlat::Partly) => return Ok(()),
                Err(_) => {}
            }
        }
        let Some(repository) = self.named(&layer.repository) else { return Ok(()) };
        let subject = super::layers::layer_subject(snapshot, layer, repository);
        if self.scans.known(&subject)?.is_some() {
            return Ok(());
        }
        let (asked, digest) = (Arc::clone(repository), layer.digest.clone());
        let top = repository.ask(move || asked.layer(&digest)).and_then(|top| top);
        top.and_then(|top| self.scans.start(&subject, repository, top.path, Turn::Last))
            .map(drop)
            .map_err(|why| unavailable(layer, why))
    }

    /// The configurations whose root file systems chains use.
    pub fn flat_configs(&self, records: &[Snapshot]) -> Result<HashSet<String>> {
        self.store.read(|tx| {
            let mut configs = HashSet::new();
            for snapshot in records.iter().filter(|snapshot| snapshot.layer.is_some()) {
                if let Some(Rootfs::Flat(flat)) = tx.rootfs(snapshot.id)? {
                    configs.insert(flat.config.as_str().to_owned());
                }
            }
            Ok::<_, Error>(configs)
        })
    }

    fn decide_ahead(self: &Arc<Self>, id: SnapshotId, flat: &Flat) -> Result<()> {
        self.store.write(|tx| {
            if tx.exists(id)? && tx.rootfs(id)?.is_none() {
                tx.put_rootfs(id, &Rootfs::Flat(flat.clone()))?;
            }
            Ok::<_, Error>(())
        })?;
        let subject = flat_subject(flat);
        let Some(repository) = self.named(&flat.repository) else { return Ok(()) };
        if self.scans.known(&subject)?.is_some() {
            return Ok(());
        }
        let (asked, config) = (Arc::clone(repository), flat.config.clone());
        let top = repository.ask(move || asked.flat(&config)).and_then(|top| top);
        if let Err(why) = top.and_then(|top| self.scans.start(&subject, repository, top.path, Turn::Last)) {
            log::debug!("the root file system {} will be looked through when it is needed: {why}", flat.config);
        }
        Ok(())
    }
}

fn flat_subject(flat: &Flat) -> Subject {
    Subject { extent: Extent::Flat, digest: flat.config.clone(), repository: flat.repository.clone() }
}

/// It will not be there in a moment either.
fn is_over(why: &Missing) -> bool {
    why.is_gone() || matches!(why, Missing::Unscannable(_) | Missing::NotADirectory { .. })
}

fn finish(result: std::result::Result<Below, Trouble>, remote: &[&Layer]) -> Result<Below> {
    result.map_err(|trouble| match trouble {
        Trouble::Missing(why) => unavailable(remote[0], why),
        Trouble::Own(e) => e,
    })
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
        Missing::NotPublished | Missing::NotADirectory { .. } => NoFlat::NotPublished,
        why => NoFlat::Unknown(why),
    })?;
    if is_partly {
        return Err(NoFlat::Partly);
    }
    let added = added(sys, repository, &top, layers)?;
    Ok(Flat { config: manifest.config, repository: repository.name().to_owned(), added })
}

/// The names that only the publisher put there.
fn added(
    sys: &dyn Sys,
    repository: &Repository,
    top: &Top,
    layers: &[Digest],
) -> std::result::Result<Vec<OsString>, NoFlat> {
    let look = |path: &std::path::Path| match sys.lstat(path) {
        Ok(status) => Ok(Some(status)),
        Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(e) => Err(NoFlat::Unknown(repository.unreadable(e))),
    };
    let mut suspects = Vec::new();
    for name in ADDED {
        if let Some(status) = look(&top.path.join(name))? {
            suspects.push((name, status));
        }
    }
    let mut added = Vec::new();
    if suspects.is_empty() {
        return Ok(added);
    }
    let tops: Vec<Top> = layers
        .iter()
        .rev()
        .map(|digest| repository.layer(digest))
        .collect::<std::result::Result<_, _>>()
        .map_err(NoFlat::Unknown)?;
    for (name, shown) in suspects {
        let mut own = None;
        for layer in &tops {
            if let Some(status) = look(&layer.path.join(name))? {
                own = Some((layer.path.join(name), status));
                break;
            }
            if look(&layer.path.join(format!(".wh.{name}")))?.is_some() {
                break;
            }
        }
        match own {
            None => added.push(OsString::from(name)),
            Some((path, status)) if is_same(sys, (&top.path.join(name), shown), (&path, status)) => {}
            Some(_) => return Err(NoFlat::Overwritten(name)),
        }
    }
    Ok(added)
}

/// Of directories nobody can tell without reading them.
fn is_same(sys: &dyn Sys, a: (&std::path::Path, Status), b: (&std::path::Path, Status)) -> bool {
    let looks = |status: Status| (status.file_type, status.mode, status.size, status.mtime.0);
    looks(a.1) == looks(b.1)
        && match a.1.file_type {
            FileType::Directory => false,
            FileType::Symlink => matches!((sys.read_link(a.0), sys.read_link(b.0)), (Ok(a), Ok(b)) if a == b),
            FileType::Other => true,
        }
}
