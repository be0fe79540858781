//! Brings published layers under `snapshots/<id>/` and takes them away again.
//!
//! Attaching a layer has two halves, so that nobody who hangs in a repository holds a lock:
//!
//! ```text
//! LayerProvider::attach_chain     on the thread that runs the call
//!   Attacher::pin                 from here on no cleanup takes the layer away
//!   Attacher::survey              on a thread of the repository: plan_skeleton, find_mount_point
//!   Attacher::attach              on the thread of the call, local disk only, under the lock of the slot:
//!                                 build_skeleton (mask, hide), ensure_link
//! ```
//!
//! Knows directories and mounts, not chains and not containerd. Invariants: what is pinned is not taken away; a mask or
//! a hide that exists is complete, because it is built beside its path and renamed; the link comes last; paths that
//! were returned to containerd keep their contents, because another source is another variant; `release` never asks a
//! repository.
#![forbid(unsafe_code)]

mod mounts;
#[cfg(all(test, feature = "shuttle"))]
mod schedules;
mod skeleton;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use self::mounts::{MountPoint, SupersededMount};
pub use self::skeleton::skeleton_needs;
use self::skeleton::{SkeletonKind, SkeletonPlan};
use crate::model::{AttachMode, Quoted, SnapshotId, Timestamp};
use crate::overlay::{SnapshotPaths, SourceVariant};
use crate::repository::executor::without_repository;
use crate::repository::scan::Scan;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::system::{DirHandle, Error, Result, Sys};

/// A layer that is to be attached.
#[derive(Clone)]
pub struct AttachRequest {
    pub id: SnapshotId,
    /// The directory of the layer in the repository.
    pub source: PathBuf,
    pub scan: Arc<Scan>,
    /// Whether the chain uses the mask of this layer. If not, the mask of a layer above hides the same names.
    pub uses_mask: bool,
    /// Whether the layer is the lowest of its chain, so that there is nothing that it could delete.
    pub is_lowest: bool,
}

impl AttachRequest {
    fn needs(&self, kind: SkeletonKind) -> bool {
        match kind {
            SkeletonKind::Mask => self.uses_mask && self.scan.needs_mask(),
            SkeletonKind::Hide => !self.is_lowest && self.scan.needs_hide(),
        }
    }
}

/// The answers of the repository about a layer that is to be attached.
pub struct LayerSurvey {
    variant: SourceVariant,
    /// The inode of the layer's directory in the repository.
    inode: u64,
    /// Whether anything of this variant was on disk already.
    pub variant_exists: bool,
    mask: SkeletonPlan,
    hide: SkeletonPlan,
    /// The mount that shows the layer. None with `AttachMode::Symlink`.
    mount_point: Option<MountPoint>,
}

/// Extended attributes of a directory of a layer that the file system of the state root does not take.
#[derive(Debug)]
pub struct RefusedAttributes {
    /// The path of the directory in the layer.
    pub directory: PathBuf,
    /// Size of all attributes of the directory with their names, in bytes.
    pub bytes: usize,
    /// Name of the largest attribute, and size of its value in bytes.
    pub largest: (OsString, usize),
    pub errno: Errno,
}

impl fmt::Display for RefusedAttributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { directory, bytes, largest: (name, size), errno } = self;
        let (directory, name) = (directory.to_string_lossy(), name.to_string_lossy());
        write!(
            f,
            "the file system of the state root does not take the extended attributes of its directory {} ({bytes} bytes, \
             {size} of them in {}, {errno:?}); use another file system for the state root (ext4 without ea_inode takes \
             4 KiB), or have the publisher drop the attribute",
            Quoted(&directory),
            Quoted(&name)
        )
    }
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

/// `release` gives up after this long if another thread attaches or releases the layer.
const RELEASE_LOCK_TIMEOUT: Duration = Duration::from_millis(50);

/// Attaches and releases layers. All calls are idempotent, and safe from many threads at once.
pub struct Attacher {
    paths: SnapshotPaths,
    mode: AttachMode,
    sys: Arc<dyn Sys>,
    slots: Mutex<HashMap<SnapshotId, Arc<LayerSlot>>>,
    superseded: Mutex<Vec<SupersededMount>>,
    /// Name of the next mount point. It begins at the microseconds since 1970, so a later process uses other names,
    /// unless the clock was set back: whoever unmounts an old mount must not find a new one there.
    next_mount_point: AtomicU64,
    /// Bytes that the plans of all skeletons take together.
    planned: Arc<std::sync::atomic::AtomicUsize>,
}

/// Serialises the work on one layer's directory. A slot is
///
/// - *idle* while it is neither locked nor pinned: a release may begin;
/// - *pinned* while `pins` is not 0: a release answers `Busy`, attaches go on;
/// - *locked* while an attach builds or a release removes, which both work on the local disk only: others wait, with a
///   time limit;
/// - *retired* once a release that was not `Busy` has removed it from the map, whatever the release decided: who still
///   waits for its lock takes the slot that is in the map then.
#[derive(Default)]
struct LayerSlot {
    lock: Mutex<()>,
    /// Number of pins: of calls whose snapshots the store does not know yet, and of cached chains. It is increased only
    /// with the lock held.
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
    /// The layer is in its place, and `inode` is that of its directory. `is_new` if it was not there before.
    Attached { variant: SourceVariant, inode: u64, is_new: bool },
    /// Another thread attached another source as the surveyed variant meanwhile. The layer must be surveyed again.
    SurveyOutdated,
    /// Another thread worked on the layer's directory until the time was over.
    Busy,
}

/// Whether `release` removes the directory of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseDecision {
    /// Somebody needs the snapshot's directory.
    Keep,
    /// Nobody does: unmount the layer, if there is one, and remove the directory.
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseOutcome {
    Done,
    /// The layer is pinned, or is being attached: release it again later.
    Busy,
}

impl Attacher {
    pub fn new(paths: SnapshotPaths, mode: AttachMode, sys: Arc<dyn Sys>) -> Self {
        let microseconds = Timestamp::now().0 / 1000;
        let next_mount_point = AtomicU64::new(u64::try_from(microseconds).unwrap_or(0));
        Self {
            paths,
            mode,
            sys,
            slots: Mutex::default(),
            superseded: Mutex::default(),
            next_mount_point,
            planned: Arc::default(),
        }
    }

    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Keeps the directory of `id` from being removed while the pin lives. Waits for an attach or a release that is
    /// under way, and returns None if that has not ended at `deadline`.
    pub fn pin(&self, id: SnapshotId, deadline: Instant) -> Option<LayerPin> {
        loop {
            let slot = Arc::clone(self.slots.lock().entry(id).or_default());
            let guard = slot.lock.try_lock_until(deadline)?;
            // A release that ended meanwhile may have retired the slot.
            if self.slots.lock().get(&id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
                slot.pins.fetch_add(1, Ordering::SeqCst);
                drop(guard);
                return Some(LayerPin { slot });
            }
        }
    }

    /// Reads from the repository what `attach` needs. `layer` is the open `request.source`, and `ignored` names
    /// extended attributes that belong to the repository's client and not to the layer. With `AttachMode::Bind` it may
    /// mount the layer at a new mount point; it changes nothing else. The caller holds a pin.
    pub fn survey(&self, request: &AttachRequest, layer: &DirHandle, ignored: &[OsString]) -> Result<LayerSurvey> {
        let id = request.id;
        let (variant, variant_exists) = without_repository(|| self.find_variant(id, &request.source))?;
        let plan = |kind, path: PathBuf| {
            if !request.needs(kind) || (variant_exists && without_repository(|| self.exists(&path))?) {
                return Ok(SkeletonPlan::Nothing);
            }
            self.plan_skeleton(&request.scan, kind, layer, ignored)
        };
        let mask = plan(SkeletonKind::Mask, self.paths.mask(id, variant))?;
        let hide = plan(SkeletonKind::Hide, self.paths.hide(id, variant))?;
        let mount_point = match self.mode {
            AttachMode::Bind => Some(self.find_mount_point(id, variant, layer)?),
            AttachMode::Symlink => None,
        };
        let inode = self.sys.dir_status(layer)?.inode;
        Ok(LayerSurvey { variant, inode, variant_exists, mask, hide, mount_point })
    }

    /// Attaches a layer that was surveyed under `pin`, unless it is attached already. Waits until `deadline` for another
    /// thread that works on it.
    pub fn attach(
        &self,
        pin: &LayerPin,
        request: &AttachRequest,
        survey: LayerSurvey,
        deadline: Instant,
    ) -> AttachResult<AttachOutcome> {
        let result = self.try_attach(pin, request, &survey, deadline);
        if !matches!(result, Ok(AttachOutcome::Attached { .. })) {
            self.discard_survey(request.id, survey);
        }
        result
    }

    fn try_attach(
        &self,
        pin: &LayerPin,
        request: &AttachRequest,
        survey: &LayerSurvey,
        deadline: Instant,
    ) -> AttachResult<AttachOutcome> {
        let AttachRequest { id, ref source, ref scan, .. } = *request;
        let variant = survey.variant;
        let Some(_guard) = pin.slot.lock.try_lock_until(deadline) else { return Ok(AttachOutcome::Busy) };
        let link = self.paths.attached_root(id, variant);
        let recorded = self.recorded_source(&link)?;
        if recorded.as_deref().is_some_and(|recorded| recorded != source) {
            return Ok(AttachOutcome::SurveyOutdated);
        }
        self.ensure_directory(&self.paths.snapshot_dir(id), 0o700)?;
        let has_skeletons = request.needs(SkeletonKind::Mask) || request.needs(SkeletonKind::Hide);
        // With `AttachMode::Symlink` the link itself names the source, but it is made last.
        if self.mode == AttachMode::Bind || (recorded.is_none() && has_skeletons) {
            self.record_source(&link, source)?;
        }
        self.build_skeleton(scan, SkeletonKind::Mask, &self.paths.mask(id, variant), &survey.mask)?;
        self.build_skeleton(scan, SkeletonKind::Hide, &self.paths.hide(id, variant), &survey.hide)?;
        let is_new = self.ensure_link(id, &link, source, survey.mount_point.as_ref())?;
        Ok(AttachOutcome::Attached { variant, inode: survey.inode, is_new })
    }

    /// Whether the error comes from the disk of the state root, and not from a repository.
    pub fn is_local(&self, error: &Error) -> bool {
        error.path.starts_with(self.paths.snapshots_dir()) && !error.is_dead()
    }

    /// Unmounts what a survey mounted whose caller does not attach the layer.
    pub fn discard_survey(&self, id: SnapshotId, survey: LayerSurvey) {
        let Some(mount_point) = survey.mount_point.filter(|mount_point| mount_point.is_new) else { return };
        let path = self.paths.snapshot_dir(id).join(&mount_point.name);
        if let Err(e) = self.remove_mount_point(&path) {
            log::warn!(event = "unused_mount_kept", path:% = path.display();
                "cannot unmount {}, it stays until the layer is detached: {e}", path.display());
        }
    }

    /// The variant of the layer that was attached from `source`, or else the next free one; and whether anything of it
    /// exists. There are at most as many variants as source directories from which the layer was attached.
    fn find_variant(&self, id: SnapshotId, source: &Path) -> Result<(SourceVariant, bool)> {
        let mut variant = SourceVariant(0);
        loop {
            match self.recorded_source(&self.paths.attached_root(id, variant))? {
                None => return Ok((variant, false)),
                Some(recorded) if recorded == source => return Ok((variant, true)),
                Some(_) => variant.0 += 1,
            }
        }
    }

    /// The source of the variant whose attached root is `link`, or None if there is nothing of the variant. The marker
    /// beside the link names the source and is written first. A variant without a marker consists of an absolute link,
    /// which is the source itself.
    fn recorded_source(&self, link: &Path) -> Result<Option<PathBuf>> {
        if let Some(source) = self.link_target(&source_link(link))? {
            return Ok(Some(source));
        }
        match self.link_target(link) {
            Ok(target) => Ok(target.filter(|target| target.is_absolute())),
            // It is a directory, where the Go snapshotter had bound the layer.
            Err(e) if e.errno == Errno::EINVAL => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn record_source(&self, link: &Path, source: &Path) -> Result<()> {
        match self.link_target(&source_link(link))? {
            Some(_) => Ok(()),
            None => self.replace_link(&source_link(link), source),
        }
    }

    /// Removes the directory of snapshot `id` with everything mounted in it, if `decide` says so. `decide` is called
    /// while nobody attaches the layer or holds a pin on it, and nobody can until `release` returns. The error is
    /// ECANCELED if `cancelled` became true.
    pub fn release<E: From<Error>>(
        &self,
        id: SnapshotId,
        cancelled: &dyn Fn() -> bool,
        decide: impl FnOnce() -> std::result::Result<ReleaseDecision, E>,
    ) -> std::result::Result<ReleaseOutcome, E> {
        let slot = Arc::clone(self.slots.lock().entry(id).or_default());
        let Some(guard) = slot.lock.try_lock_for(RELEASE_LOCK_TIMEOUT) else { return Ok(ReleaseOutcome::Busy) };
        if !self.slots.lock().get(&id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
            // Another release has retired the slot meanwhile. Pins are counted in the slot that is in the map now.
            drop(guard);
            return self.release(id, cancelled, decide);
        }
        if slot.pins.load(Ordering::SeqCst) > 0 {
            return Ok(ReleaseOutcome::Busy);
        }
        let result = decide().and_then(|decision| {
            if decision == ReleaseDecision::Remove {
                let home = self.paths.snapshot_dir(id);
                self.unmount_all_below(&home)?;
                self.sys.remove_tree(&home, cancelled)?;
            }
            Ok(ReleaseOutcome::Done)
        });
        let mut slots = self.slots.lock();
        if slots.get(&id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
            slots.remove(&id);
        }
        result
    }

    /// Whether there is anything at `path`. A dead mount counts as well.
    fn exists(&self, path: &Path) -> Result<bool> {
        match self.sys.lstat(path) {
            Ok(_) => Ok(true),
            Err(e) if e.errno == Errno::ENOENT => Ok(false),
            Err(e) if e.is_dead() => Ok(true),
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

/// The link beside an attached root that names the source of the variant.
fn source_link(attached_root: &Path) -> PathBuf {
    attached_root.with_extension("of")
}

/// The path where something is built before it is renamed to `path`.
fn staging_path(path: &Path) -> PathBuf {
    path.with_extension("new")
}
