//! Brings published layers under `snapshots/<id>/` and takes them away again.
//!
//! Attaching is lazy, idempotent and safe from many threads. It has two halves. `survey` asks the
//! repository, so it runs on one of the repository's threads, and changes nothing but that it may
//! mount. `attach` works on the local disk only, under the lock of the snapshot. Whoever attaches
//! holds a pin from before the survey until the store knows the user, and nothing that is pinned is
//! taken away. Nothing that somebody was told to mount is exchanged: the same layer from another
//! source is another variant. Knows directories and mounts, not chains and not containerd. Presence
//! is completeness: whatever is made is made beside its place and renamed into it. `release` never
//! asks a repository, not even where a mount of it hangs.
#![forbid(unsafe_code)]

mod mounts;
mod skeleton;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use parking_lot::Mutex;

use self::mounts::SupersededMount;
pub use self::skeleton::skeletons_needed;
use self::skeleton::{SkeletonKind, SkeletonPlan};
pub use crate::model::AttachMode;
use crate::model::SnapshotId;
use crate::overlay::{SnapshotPaths, SourceVariant};
use crate::repository::executor::without_repository;
use crate::repository::scan::Scan;
use crate::system::{DirHandle, Error, FileType, Result, Sys};

/// A layer that is to be attached.
#[derive(Clone)]
pub struct AttachRequest {
    pub id: SnapshotId,
    /// Where the repository has it.
    pub source: PathBuf,
    pub scan: Arc<Scan>,
    /// Whether its mask, if it needs one, will be used: that of a layer above may do.
    pub masked: bool,
    /// No layer lies below it, so there is nothing that it could delete.
    pub is_lowest: bool,
}

impl AttachRequest {
    fn attributes_of_mask(&self, part: SkeletonKind) -> bool {
        match part {
            SkeletonKind::Mask => self.masked && self.scan.needs_mask(),
            SkeletonKind::Hide => !self.is_lowest && self.scan.needs_hide(),
        }
    }
}

/// What the repository said about a layer that is to be attached.
pub struct LayerSurvey {
    variant: SourceVariant,
    /// The inode of the layer's directory in the repository.
    inode: u64,
    /// Something of this variant is on disk.
    pub is_begun: bool,
    mask: SkeletonPlan,
    hide: SkeletonPlan,
    /// With `AttachMode::Bind`, the mount point below the snapshot's directory that shows the layer; a new
    /// one, if it was mounted for this survey.
    point: Option<MountPoint>,
}

struct MountPoint {
    /// Below the snapshot's directory.
    name: PathBuf,
    is_new: bool,
    /// Where the link led when this was mounted.
    before: Option<PathBuf>,
}

/// Extended attributes of a directory of a layer that the file system of the state root does not take.
#[derive(Debug)]
pub struct RefusedAttributes {
    /// From the top of the layer.
    pub directory: PathBuf,
    /// Bytes of all attributes of the directory, with their names.
    pub bytes: usize,
    /// The largest attribute, and the bytes of its value.
    pub largest: (OsString, usize),
    pub errno: Errno,
}

/// Why a layer could not be attached.
#[derive(Debug)]
pub enum AttachError {
    System(Error),
    Attributes(RefusedAttributes),
}

impl From<Error> for AttachError {
    fn from(cause: Error) -> Self {
        Self::System(cause)
    }
}

type AttachResult<T> = std::result::Result<T, AttachError>;

/// How long a release waits for a thread that attaches the same layer right now.
const RELEASE_LOCK_TIMEOUT: Duration = Duration::from_millis(50);

pub struct Attacher {
    paths: SnapshotPaths,
    mode: AttachMode,
    sys: Arc<dyn Sys>,
    slots: Mutex<HashMap<SnapshotId, Arc<LayerSlot>>>,
    superseded: Mutex<Vec<SupersededMount>>,
    /// Never used for two mounts, not even by two processes: whoever takes an old one away must
    /// not find a new one there.
    next_point: AtomicU64,
    /// Bytes that plans of skeletons take.
    planned: Arc<AtomicUsize>,
}

#[derive(Default)]
struct LayerSlot {
    /// Held while something is built or taken away, which is work on the local disk only.
    lock: Mutex<()>,
    /// Users that the store does not know yet. Counted up with the lock held.
    pins: AtomicUsize,
}

/// Keeps a layer attached while it lives.
pub struct LayerPin {
    slot: Arc<LayerSlot>,
}

impl Drop for LayerPin {
    fn drop(&mut self) {
        self.slot.pins.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How an attach ended.
pub enum AttachOutcome {
    /// The layer, a directory with this inode, is in its place; `fresh`: since just now.
    Done { variant: SourceVariant, inode: u64, fresh: bool },
    /// Another thread was faster with another source: the layer has to be surveyed again.
    SurveyAgain,
    /// Another thread works on the layer's directory, and did not end in time.
    Busy,
}

/// What a caller of `release` wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseDecision {
    /// Somebody needs it.
    Keep,
    /// Nobody does: detach the layer, if there is one, and remove all that is left on disk.
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseOutcome {
    Done,
    /// Pinned, or being attached: ask again later.
    NotYet,
}

impl Attacher {
    pub fn new(paths: SnapshotPaths, mode: AttachMode, sys: Arc<dyn Sys>) -> Self {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let next_point = AtomicU64::new(u64::try_from(since_1970.as_micros()).unwrap_or(0));
        Self {
            paths,
            mode,
            sys,
            slots: Mutex::default(),
            superseded: Mutex::default(),
            next_point,
            planned: Arc::default(),
        }
    }

    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// What `id` has on disk is not taken away while the pin lives. Waits for an attach or a release that is
    /// under way; None: until `until` in vain.
    pub fn pin(&self, id: SnapshotId, until: Instant) -> Option<LayerPin> {
        loop {
            let slot = Arc::clone(self.slots.lock().entry(id).or_default());
            let guard = slot.lock.try_lock_until(until)?;
            // A release that ended meanwhile may have taken the slot off the map.
            if self.slots.lock().get(&id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
                slot.pins.fetch_add(1, Ordering::SeqCst);
                drop(guard);
                return Some(LayerPin { slot });
            }
        }
    }

    /// Asks the repository for what an attach needs. `layer` is the open `request.source`, and
    /// `ignored` names extended attributes that are not the layer's. The caller holds a pin.
    pub fn survey(&self, request: &AttachRequest, layer: &DirHandle, ignored: &[OsString]) -> Result<LayerSurvey> {
        let id = request.id;
        let (variant, is_begun) = without_repository(|| self.variant_of(id, &request.source))?;
        let plan = |part, place: PathBuf| self.plan(request, part, &place, is_begun, layer, ignored);
        let mask = plan(SkeletonKind::Mask, self.paths.mask(id, variant))?;
        let hide = plan(SkeletonKind::Hide, self.paths.hide(id, variant))?;
        let point = match self.mode {
            AttachMode::Bind => Some(self.find_mount_point(id, variant, layer)?),
            AttachMode::Symlink => None,
        };
        let inode = self.sys.dir_status(layer)?.inode;
        Ok(LayerSurvey { variant, inode, is_begun, mask, hide, point })
    }

    /// Attaches a layer that was surveyed under `pin`, unless it is attached already. Waits `until` then at most
    /// for another thread that works on it.
    pub fn attach(
        &self,
        pin: &LayerPin,
        request: &AttachRequest,
        survey: LayerSurvey,
        until: Instant,
    ) -> AttachResult<AttachOutcome> {
        let attached = self.try_to_attach(pin, request, &survey, until);
        if !matches!(attached, Ok(AttachOutcome::Done { .. })) {
            self.discard(request.id, survey);
        }
        attached
    }

    fn try_to_attach(
        &self,
        pin: &LayerPin,
        request: &AttachRequest,
        survey: &LayerSurvey,
        until: Instant,
    ) -> AttachResult<AttachOutcome> {
        let AttachRequest { id, ref source, .. } = *request;
        let LayerSurvey { variant, inode, ref mask, ref hide, ref point, .. } = *survey;
        let home = self.paths.snapshot_dir(id);
        let Some(_guard) = pin.slot.lock.try_lock_until(until) else { return Ok(AttachOutcome::Busy) };
        let place = self.paths.attached_root(id, variant);
        let recorded = self.recorded_source(&place)?;
        if recorded.as_deref().is_some_and(|recorded| recorded != source) {
            return Ok(AttachOutcome::SurveyAgain);
        }
        self.ensure_directory(&home, 0o700)?;
        let has_skeletons =
            request.attributes_of_mask(SkeletonKind::Mask) || request.attributes_of_mask(SkeletonKind::Hide);
        // A link to the layer itself tells as much; one to a mount does not.
        if self.mode == AttachMode::Bind || (recorded.is_none() && has_skeletons) {
            self.record_source(&place, source)?;
        }
        self.build(&request.scan, SkeletonKind::Mask, &self.paths.mask(id, variant), mask)?;
        self.build(&request.scan, SkeletonKind::Hide, &self.paths.hide(id, variant), hide)?;
        let fresh = self.ensure_link(&home, &place, source, point.as_ref())?;
        Ok(AttachOutcome::Done { variant, inode, fresh })
    }

    /// Whether an error is of our own disk, and not of a repository.
    pub fn is_local(&self, error: &Error) -> bool {
        error.path.starts_with(self.paths.snapshots_dir()) && !error.is_dead()
    }

    /// Takes away what a survey mounted, when nobody waits for it any more.
    pub fn discard(&self, id: SnapshotId, survey: LayerSurvey) {
        if let Some(point) = survey.point.filter(|point| point.is_new)
            && let Err(e) = self.unbind(&self.paths.snapshot_dir(id).join(&point.name))
        {
            log::warn!("a mount of a layer stays until the layer is detached: {e}");
        }
    }

    /// The variant that is of `source`, or else the next one; and whether it is there. There are
    /// no more than repositories have the layer.
    fn variant_of(&self, id: SnapshotId, source: &Path) -> Result<(SourceVariant, bool)> {
        let mut variant = SourceVariant(0);
        loop {
            match self.recorded_source(&self.paths.attached_root(id, variant))? {
                None => return Ok((variant, false)),
                Some(of) if of == source => return Ok((variant, true)),
                Some(_) => variant.0 += 1,
            }
        }
    }

    /// Of which source the variant at `place` is: there is a note beside it, written before anything
    /// else of it, or else it leads there. None: there is nothing of it.
    fn recorded_source(&self, place: &Path) -> Result<Option<PathBuf>> {
        if let Some(noted) = self.link_at(&source_marker(place))? {
            return Ok(Some(noted));
        }
        match self.link_at(place) {
            Ok(leads_to) => Ok(leads_to.filter(|target| target.is_absolute())),
            // A directory: the Go snapshotter's.
            Err(e) if e.errno == Errno::EINVAL => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn record_source(&self, place: &Path, source: &Path) -> Result<()> {
        match self.link_at(&source_marker(place))? {
            Some(_) => Ok(()),
            None => self.put_link(&source_marker(place), source),
        }
    }

    /// Takes away what snapshot `id` has on disk, if `decide` says so. `decide` is asked while
    /// nobody attaches the layer or holds a pin on it, and nobody can until this returns. ECANCELED if
    /// `cancelled` says so.
    pub fn release<E: From<Error>>(
        &self,
        id: SnapshotId,
        cancelled: &dyn Fn() -> bool,
        decide: impl FnOnce() -> std::result::Result<ReleaseDecision, E>,
    ) -> std::result::Result<ReleaseOutcome, E> {
        let slot = Arc::clone(self.slots.lock().entry(id).or_default());
        let Some(_guard) = slot.lock.try_lock_for(RELEASE_LOCK_TIMEOUT) else { return Ok(ReleaseOutcome::NotYet) };
        if slot.pins.load(Ordering::SeqCst) > 0 {
            return Ok(ReleaseOutcome::NotYet);
        }
        let released = decide().and_then(|decision| {
            if decision == ReleaseDecision::Remove {
                let home = self.paths.snapshot_dir(id);
                self.unmount_all_below(&home)?;
                self.sys.remove_tree(&home, cancelled)?;
            }
            Ok(ReleaseOutcome::Done)
        });
        // Whoever waits for this slot finds that it is not on the map any more, and takes the next one.
        let mut slots = self.slots.lock();
        if slots.get(&id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
            slots.remove(&id);
        }
        released
    }

    /// The type of what is there; a dead mount counts as a directory.
    fn lstat(&self, path: &Path) -> Result<Option<FileType>> {
        match self.sys.lstat(path) {
            Ok(status) => Ok(Some(status.file_type)),
            Err(e) if e.errno == Errno::ENOENT => Ok(None),
            Err(e) if e.is_dead() => Ok(Some(FileType::Directory)),
            Err(e) => Err(e),
        }
    }

    fn ensure_directory(&self, path: &Path, mode: u32) -> Result<()> {
        match self.sys.create_dir(path, mode) {
            Err(e) if e.errno == Errno::EEXIST => Ok(()),
            result => result,
        }
    }
}

fn source_marker(place: &Path) -> PathBuf {
    place.with_extension("of")
}

/// Where a thing is built before it is renamed to `place`.
fn staging_path(place: &Path) -> PathBuf {
    place.with_extension("new")
}
