//! Published files on their way under a chain: finding them, looking through them, attaching
//! them. All questions go through the repositories' own threads and come back in time.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::scans::{Pending, Scans};
use super::{Error, Result, cleanup};
use crate::attach::{self, Attach, Attacher, Pin, Release, Released};
use crate::overlay::{Form, Lower};
use crate::repository::lane::Turn;
use crate::repository::scan::{Extent, Scan, Subject};
use crate::repository::{Asked, Missing, Repository};
use crate::store::Store;
use crate::sys::{FileType, Sys};
use crate::types::{
    Digest, Flat, InvalidDigest, Key, LABEL_LAYER_DIGEST, Layer, Quoted, RootfsMode, Snapshot, SnapshotId,
};

/// Why the layer of a pull is downloaded after all.
#[derive(Debug)]
pub enum Fallback {
    NoDigest,
    BadDigest {
        digest: String,
        why: InvalidDigest,
    },
    /// What each repository said.
    Missing {
        digest: Digest,
        why: Vec<(String, Missing)>,
    },
    NameTooLong,
    NameTaken {
        name: Key,
    },
}

impl Fallback {
    /// One line for each layer that is downloaded.
    pub fn log(&self, key: &Key, reference: &str) {
        let key = key.to_string();
        match self {
            Self::Missing { digest, why } => {
                let names: Vec<&str> = why.iter().map(|(name, _)| name.as_str()).collect();
                let reasons: Vec<String> = why.iter().map(|(name, why)| format!("{name}: {why}")).collect();
                let (repositories, reasons) = (names.join(" "), reasons.join("; "));
                let is_usual = why.iter().all(|(_, why)| *why == Missing::NotPublished);
                let level = if is_usual { log::Level::Info } else { log::Level::Warn };
                log::log!(level, digest = digest.as_str(), repository = repositories.as_str();
                    "layer {digest} will be downloaded: {reasons}");
            }
            Self::NoDigest => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: the pull of {} came without the label {LABEL_LAYER_DIGEST}; \
                 containerd must be configured to pass image annotations to snapshotters, see the README",
                Quoted(reference)
            ),
            Self::BadDigest { digest, why } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: label {LABEL_LAYER_DIGEST} is {}: {why}", Quoted(digest)
            ),
            Self::NameTooLong => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: the label containerd.io/snapshot.ref is too long"
            ),
            Self::NameTaken { name } => log::warn!(
                key = key.as_str();
                "a layer will be downloaded: a snapshot that is not this layer has the name {name}"
            ),
        }
    }
}

/// What it takes to bring published files under a chain; shared with the repositories' threads.
pub struct Sources {
    pub store: Arc<Store>,
    pub sys: Arc<dyn Sys>,
    pub attacher: Attacher,
    pub scans: Scans,
    /// In the order in which they are asked.
    pub repositories: Vec<Arc<Repository>>,
    pub rootfs: RootfsMode,
}

/// Something published that is wanted as a snapshot.
#[derive(Clone)]
pub struct Piece {
    pub id: SnapshotId,
    pub form: Form,
    pub subject: Subject,
    /// Of a whole root: what else is hidden and changed.
    pub flat: Option<Flat>,
    /// None: not known yet.
    pub scan: Option<Arc<Scan>>,
}

/// A piece in its place. It stays there while this lives.
pub struct Attached {
    _pin: Pin,
    pub scan: Arc<Scan>,
}

/// Why a piece is not in its place.
#[derive(Debug)]
pub enum Trouble {
    /// The repository cannot provide it.
    Missing(Missing),
    /// Our own disk, or our own store.
    Own(Error),
}

impl From<Missing> for Trouble {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

/// When a call waits no longer, however well the repository gets on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For walks; they go on without it.
    pub scans: Instant,
    pub all: Instant,
}

impl Limits {
    /// Of a call that begins now.
    pub fn of(repository: &Repository) -> Self {
        Self { scans: Instant::now() + repository.timeout(), all: repository.give_up_at() }
    }
}

enum Step {
    Attached(Attached),
    /// What is at this place must be looked through first.
    Unscanned(PathBuf),
}

/// How far a piece is. The steps of many pieces are begun together and waited for in turn.
enum Progress {
    Asked(Asked<std::result::Result<Step, Trouble>>),
    Scanning(Pending),
    Over(std::result::Result<Attached, Trouble>),
}

impl Sources {
    /// The first repository that has the layer, or what each of them said.
    pub fn find(&self, digest: &Digest) -> std::result::Result<Arc<Repository>, Vec<(String, Missing)>> {
        let mut reasons = Vec::new();
        for repository in &self.repositories {
            let (asked, wanted) = (Arc::clone(repository), digest.clone());
            match Repository::ask(repository, move || asked.layer(&wanted)).and_then(|top| top) {
                Ok(_) => return Ok(Arc::clone(repository)),
                Err(missing) => reasons.push((repository.name().to_owned(), missing)),
            }
        }
        Err(reasons)
    }

    pub fn named(&self, name: &str) -> Option<&Arc<Repository>> {
        self.repositories.iter().find(|repository| repository.name() == name)
    }

    /// The one that it came from, then the others: a digest names the same files everywhere.
    /// Never empty, as the configuration's list is not.
    pub fn candidates(&self, name: &str) -> Vec<Arc<Repository>> {
        let others = self.repositories.iter().filter(|repository| repository.name() != name);
        self.named(name).into_iter().chain(others).cloned().collect()
    }

    /// Attaches the layers of `chain`, nearest first; None where a snapshot is local.
    pub fn attach_layers(
        self: &Arc<Self>,
        chain: &[Snapshot],
        limits: Limits,
    ) -> Result<Vec<(Lower, Option<Attached>)>> {
        let remote: Vec<(&Snapshot, &Layer)> = chain.iter().filter_map(|s| Some((s, s.layer.as_ref()?))).collect();
        let mut begun = Vec::with_capacity(remote.len());
        for (snapshot, layer) in &remote {
            let first = self.candidates(&layer.repository).swap_remove(0);
            let piece = self.piece(snapshot, layer, &first)?;
            let progress = self.begin(&piece, &first);
            begun.push((first, piece, progress));
        }
        for _ in 0..Progress::STEPS {
            for (first, piece, progress) in &mut begun {
                progress.advance(self, piece, first, limits);
            }
        }
        let mut attached = Vec::with_capacity(remote.len());
        for ((_, _, progress), (snapshot, layer)) in begun.into_iter().zip(&remote) {
            attached.push(match progress.result() {
                Err(Trouble::Missing(why)) => self.attach_from_others(snapshot, layer, why)?,
                Err(Trouble::Own(e)) => return Err(e),
                Ok(attached) => attached,
            });
        }
        let mut attached = attached.into_iter();
        Ok(chain
            .iter()
            .map(|snapshot| match &snapshot.layer {
                None => (Lower::Local(snapshot.id), None),
                Some(layer) => {
                    let attached = attached.next();
                    let (mask, hides) = attached.as_ref().map_or_else(Default::default, |a| attach::skeletons(&a.scan));
                    (Lower::Remote { id: snapshot.id, digest: layer.digest.clone(), mask, hides }, attached)
                }
            })
            .collect())
    }

    fn piece(&self, snapshot: &Snapshot, layer: &Layer, repository: &Repository) -> Result<Piece> {
        let subject = layer_subject(snapshot, layer, repository);
        let scan = self.scans.known(&subject)?;
        Ok(Piece { id: snapshot.id, form: Form::Layer, subject, flat: None, scan })
    }

    /// The repository that the layer came from cannot provide it: another one may.
    fn attach_from_others(self: &Arc<Self>, snapshot: &Snapshot, layer: &Layer, why: Missing) -> Result<Attached> {
        for other in self.candidates(&layer.repository).iter().skip(1) {
            match self.attach(&self.piece(snapshot, layer, other)?, other, Limits::of(other)) {
                Ok(attached) => return Ok(attached),
                Err(Trouble::Own(e)) => return Err(e),
                Err(Trouble::Missing(_)) => {}
            }
        }
        if self.named(&layer.repository).is_some() {
            return Err(unavailable(layer, why));
        }
        let instead = self.repositories.first().map(|first| (first.name().to_owned(), Box::new(why)));
        Err(unavailable(layer, Missing::NotConfigured { instead }))
    }

    /// Attaches one piece, looked through before if need be.
    pub fn attach(
        self: &Arc<Self>,
        piece: &Piece,
        repository: &Arc<Repository>,
        limits: Limits,
    ) -> std::result::Result<Attached, Trouble> {
        let mut progress = self.begin(piece, repository);
        for _ in 0..Progress::STEPS {
            progress.advance(self, piece, repository, limits);
        }
        progress.result()
    }

    fn begin(self: &Arc<Self>, piece: &Piece, repository: &Arc<Repository>) -> Progress {
        let job = {
            let (sources, piece, repository) = (Arc::clone(self), piece.clone(), Arc::clone(repository));
            move || sources.step(&piece, &repository)
        };
        let late = {
            let (sources, id) = (Arc::clone(self), piece.id);
            move |result| {
                if let Ok(Step::Attached(attached)) = result {
                    drop::<Attached>(attached);
                    sources.release_unused(&[id]);
                }
            }
        };
        match Repository::start(repository, job, late) {
            Ok(asked) => Progress::Asked(asked),
            Err(missing) => Progress::Over(Err(missing.into())),
        }
    }

    /// On a thread of the repository.
    fn step(&self, piece: &Piece, repository: &Repository) -> std::result::Result<Step, Trouble> {
        let top = repository.top(&piece.subject)?;
        let Some(scan) = &piece.scan else { return Ok(Step::Unscanned(top)) };
        let scan = match &piece.flat {
            None => Arc::clone(scan),
            Some(flat) => Arc::new(repaired(scan, flat, repository)?),
        };
        let wanted = Attach { id: piece.id, form: piece.form, source: &top, scan: &scan };
        let pin = self.attacher.attach(&wanted).map_err(|e| {
            // Gone while we were at it?
            // Or another thread hangs in it, and keeps this one from attaching.
            let of_repository = e.path.starts_with(repository.path()) || e.is_dead() || e.errno == Errno::EAGAIN;
            if of_repository || repository.top(&piece.subject).is_err() {
                Trouble::Missing(repository.unreadable(e))
            } else {
                Trouble::Own(Error::System(e))
            }
        })?;
        if pin.fresh && piece.subject.extent != Extent::Layer {
            repository.notice_owners(&describe(&piece.subject), &top);
        }
        Ok(Step::Attached(Attached { _pin: pin, scan }))
    }

    /// Takes away what `id` has on disk, unless it is needed.
    pub fn release_one(&self, id: SnapshotId) -> Result<Released> {
        self.attacher.release(id, || {
            let needed = self.store.read(|tx| cleanup::needs_its_directory(tx, id))?;
            Ok::<_, Error>(if needed { Release::Keep } else { Release::Remove })
        })
    }

    /// Takes away what was attached for nobody, now; what is in somebody's hands is looked at
    /// by the next cleanup.
    pub fn release_unused(&self, ids: &[SnapshotId]) {
        let mut left = Vec::new();
        for id in ids {
            if !matches!(self.release_one(*id), Ok(Released::Done)) {
                left.push(*id);
            }
        }
        if left.is_empty() {
            return;
        }
        if let Err(e) = self.store.write(|tx| tx.schedule_cleanup(&left).map_err(Error::from)) {
            log::warn!("layers may stay attached until the next start: {e}");
        }
    }
}

impl Progress {
    /// Asked, looked through, asked again, attached.
    const STEPS: usize = 3;

    fn result(self) -> std::result::Result<Attached, Trouble> {
        match self {
            Self::Over(result) => result,
            Self::Asked(_) | Self::Scanning(_) => unreachable!("a piece takes {} steps", Self::STEPS),
        }
    }

    fn advance(&mut self, sources: &Arc<Sources>, piece: &Piece, repository: &Arc<Repository>, limits: Limits) {
        let now = std::mem::replace(self, Self::Over(Err(Missing::NotPublished.into())));
        *self = match now {
            Self::Asked(asked) => match asked.wait(limits.all) {
                Ok(Ok(Step::Attached(attached))) => Self::Over(Ok(attached)),
                Ok(Ok(Step::Unscanned(top))) => {
                    match sources.scans.start(&piece.subject, repository, top, Turn::Next) {
                        Ok(pending) => Self::Scanning(pending),
                        Err(missing) => Self::Over(Err(missing.into())),
                    }
                }
                Ok(Err(trouble)) => Self::Over(Err(trouble)),
                Err(missing) => Self::Over(Err(missing.into())),
            },
            Self::Scanning(pending) => match pending.wait(limits.scans) {
                Ok(scan) => sources.begin(&Piece { scan: Some(scan), ..piece.clone() }, repository),
                Err(missing) => Self::Over(Err(missing.into())),
            },
            over @ Self::Over(_) => over,
        };
    }
}

pub fn layer_subject(snapshot: &Snapshot, layer: &Layer, repository: &Repository) -> Subject {
    let extent = if snapshot.parent.is_none() { Extent::Bottom } else { Extent::Layer };
    Subject { extent, digest: layer.digest.clone(), repository: repository.name().to_owned() }
}

pub fn unavailable(layer: &Layer, why: Missing) -> Error {
    Error::LayerUnavailable { digest: layer.digest.clone(), repository: layer.repository.clone(), why }
}

fn describe(subject: &Subject) -> String {
    match subject.extent {
        Extent::Layer | Extent::Bottom => format!("layer {}", subject.digest),
        Extent::Flat => format!("root file system {}", subject.digest),
    }
}

/// With what the publisher of a whole root added and changed.
fn repaired(scan: &Scan, flat: &Flat, repository: &Repository) -> std::result::Result<Scan, Missing> {
    let mut scan = scan.clone();
    let split = |path: &Path| {
        (path.parent().unwrap_or(Path::new("")).to_owned(), path.file_name().unwrap_or_default().to_owned())
    };
    for path in &flat.hidden {
        let (above, name) = split(path);
        scan.directory(&above).hidden.push(name);
    }
    for (path, layer) in &flat.repaired {
        // It was no link when this was decided, and may be one now.
        let (own, file_type) = repository.in_layer(layer, path)?;
        if file_type == FileType::Directory {
            scan.directory(path).like = Some(own);
        } else {
            let (above, name) = split(path);
            scan.directory(&above).copies.push((name, own));
        }
    }
    Ok(scan)
}
