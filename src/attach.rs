//! Brings published layers under `snapshots/<id>/` and takes them away again.
//!
//! Attaching is lazy, idempotent and safe from many threads. It has two halves. `survey` asks the
//! repository, so it runs on one of the repository's threads, and changes nothing but that it may
//! mount. `attach` works on the local disk only, under the lock of the snapshot. Whoever attaches
//! holds a pin from before the survey until the store knows the user, and nothing that is pinned is
//! taken away. Nothing that somebody was told to mount is exchanged: the same layer from another
//! source is another edition. Knows directories and mounts, not chains and not containerd. Presence
//! is completeness: whatever is made is made beside its place and renamed into it. `release` never
//! asks a repository, not even where a mount of it hangs.
#![forbid(unsafe_code)]

mod place;
mod skeleton;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use parking_lot::Mutex;

use self::place::Retired;
pub use self::skeleton::skeletons;
use self::skeleton::{Part, Plan};
use crate::overlay::{Edition, Places};
use crate::repository::lane::without_repository;
use crate::repository::scan::Scan;
use crate::sys::{DirHandle, Error, FileType, Result, Sys};
use crate::types::SnapshotId;

/// Where `snapshots/<id>/fs` of a published layer leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To a read-only bind mount of it.
    Bind,
    /// To the layer itself: no mount at all.
    Symlink,
}

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
    fn needs(&self, part: Part) -> bool {
        match part {
            Part::Mask => self.masked && self.scan.has_mask(),
            Part::Hide => !self.is_lowest && self.scan.hides(),
        }
    }
}

/// What the repository said about a layer that is to be attached.
pub struct Survey {
    edition: Edition,
    /// The inode of the layer's directory in the repository.
    inode: u64,
    /// Something of this edition is on disk.
    pub is_begun: bool,
    mask: Plan,
    hide: Plan,
    /// With `Mode::Bind`, the mount point below the snapshot's directory that shows the layer; a new
    /// one, if it was mounted for this survey.
    point: Option<Point>,
}

struct Point {
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
const RELEASE_WAIT: Duration = Duration::from_millis(50);

pub struct Attacher {
    places: Places,
    mode: Mode,
    sys: Arc<dyn Sys>,
    slots: Mutex<HashMap<SnapshotId, Arc<Slot>>>,
    retired: Mutex<Vec<Retired>>,
    /// Never used for two mounts, not even by two processes: whoever takes an old one away must
    /// not find a new one there.
    next_point: AtomicU64,
    /// Bytes that plans of skeletons take.
    planned: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Slot {
    /// Held while something is built or taken away, which is work on the local disk only.
    lock: Mutex<()>,
    /// Users that the store does not know yet. Counted up with the lock held.
    pins: AtomicUsize,
}

/// Keeps a layer attached while it lives.
pub struct Pin {
    slot: Arc<Slot>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.slot.pins.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How an attach ended.
pub enum Attachment {
    /// The layer, a directory with this inode, is in its place; `fresh`: since just now.
    Done { edition: Edition, inode: u64, fresh: bool },
    /// Another thread was faster with another source: the layer has to be surveyed again.
    SurveyAgain,
    /// Another thread works on the layer's directory, and did not end in time.
    Busy,
}

/// What a caller of `release` wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Somebody needs it.
    Keep,
    /// Nobody does: detach the layer, if there is one, and remove all that is left on disk.
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    Done,
    /// Pinned, or being attached: ask again later.
    NotYet,
}

impl Attacher {
    pub fn new(places: Places, mode: Mode, sys: Arc<dyn Sys>) -> Self {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let next_point = AtomicU64::new(u64::try_from(since_1970.as_micros()).unwrap_or(0));
        Self {
            places,
            mode,
            sys,
            slots: Mutex::default(),
            retired: Mutex::default(),
            next_point,
            planned: Arc::default(),
        }
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What `id` has on disk is not taken away while the pin lives. Waits for an attach or a release that is
    /// under way; None: until `until` in vain.
    pub fn pin(&self, id: SnapshotId, until: Instant) -> Option<Pin> {
        loop {
            let slot = Arc::clone(self.slots.lock().entry(id).or_default());
            let guard = slot.lock.try_lock_until(until)?;
            // A release that ended meanwhile may have taken the slot off the map.
            if self.slots.lock().get(&id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
                slot.pins.fetch_add(1, Ordering::SeqCst);
                drop(guard);
                return Some(Pin { slot });
            }
        }
    }

    /// Asks the repository for what an attach needs. `layer` is the open `request.source`, and
    /// `ignored` names extended attributes that are not the layer's. The caller holds a pin.
    pub fn survey(&self, request: &AttachRequest, layer: &DirHandle, ignored: &[OsString]) -> Result<Survey> {
        let id = request.id;
        let (edition, is_begun) = without_repository(|| self.edition_of(id, &request.source))?;
        let plan = |part, place: PathBuf| self.plan(request, part, &place, is_begun, layer, ignored);
        let mask = plan(Part::Mask, self.places.mask(id, edition))?;
        let hide = plan(Part::Hide, self.places.hide(id, edition))?;
        let point = match self.mode {
            Mode::Bind => Some(self.point(id, edition, layer)?),
            Mode::Symlink => None,
        };
        let inode = self.sys.dir_status(layer)?.inode;
        Ok(Survey { edition, inode, is_begun, mask, hide, point })
    }

    /// Attaches a layer that was surveyed under `pin`, unless it is attached already. Waits `until` then at most
    /// for another thread that works on it.
    pub fn attach(
        &self,
        pin: &Pin,
        request: &AttachRequest,
        survey: Survey,
        until: Instant,
    ) -> AttachResult<Attachment> {
        let attached = self.try_to_attach(pin, request, &survey, until);
        if !matches!(attached, Ok(Attachment::Done { .. })) {
            self.discard(request.id, survey);
        }
        attached
    }

    fn try_to_attach(
        &self,
        pin: &Pin,
        request: &AttachRequest,
        survey: &Survey,
        until: Instant,
    ) -> AttachResult<Attachment> {
        let AttachRequest { id, ref source, .. } = *request;
        let Survey { edition, inode, ref mask, ref hide, ref point, .. } = *survey;
        let home = self.places.home(id);
        let Some(_guard) = pin.slot.lock.try_lock_until(until) else { return Ok(Attachment::Busy) };
        let place = self.places.root(id, edition);
        let recorded = self.source_of(&place)?;
        if recorded.as_deref().is_some_and(|recorded| recorded != source) {
            return Ok(Attachment::SurveyAgain);
        }
        self.ensure_directory(&home, 0o700)?;
        let has_skeletons = request.needs(Part::Mask) || request.needs(Part::Hide);
        // A link to the layer itself tells as much; one to a mount does not.
        if self.mode == Mode::Bind || (recorded.is_none() && has_skeletons) {
            self.note_source(&place, source)?;
        }
        self.build(&request.scan, Part::Mask, &self.places.mask(id, edition), mask)?;
        self.build(&request.scan, Part::Hide, &self.places.hide(id, edition), hide)?;
        let fresh = self.ensure_leads(&home, &place, source, point.as_ref())?;
        Ok(Attachment::Done { edition, inode, fresh })
    }

    /// Whether an error is of our own disk, and not of a repository.
    pub fn is_local(&self, error: &Error) -> bool {
        error.path.starts_with(self.places.all()) && !error.is_dead()
    }

    /// Takes away what a survey mounted, when nobody waits for it any more.
    pub fn discard(&self, id: SnapshotId, survey: Survey) {
        if let Some(point) = survey.point.filter(|point| point.is_new)
            && let Err(e) = self.unbind(&self.places.home(id).join(&point.name))
        {
            log::warn!("a mount of a layer stays until the layer is detached: {e}");
        }
    }

    /// The edition that is of `source`, or else the next one; and whether it is there. There are
    /// no more than repositories have the layer.
    fn edition_of(&self, id: SnapshotId, source: &Path) -> Result<(Edition, bool)> {
        let mut edition = Edition(0);
        loop {
            match self.source_of(&self.places.root(id, edition))? {
                None => return Ok((edition, false)),
                Some(of) if of == source => return Ok((edition, true)),
                Some(_) => edition.0 += 1,
            }
        }
    }

    /// Of which source the edition at `place` is: there is a note beside it, written before anything
    /// else of it, or else it leads there. None: there is nothing of it.
    fn source_of(&self, place: &Path) -> Result<Option<PathBuf>> {
        if let Some(noted) = self.link_at(&note(place))? {
            return Ok(Some(noted));
        }
        match self.link_at(place) {
            Ok(leads_to) => Ok(leads_to.filter(|target| target.is_absolute())),
            // A directory: the Go snapshotter's.
            Err(e) if e.errno == Errno::EINVAL => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn note_source(&self, place: &Path, source: &Path) -> Result<()> {
        match self.link_at(&note(place))? {
            Some(_) => Ok(()),
            None => self.put_link(&note(place), source),
        }
    }

    /// Takes away what snapshot `id` has on disk, if `decide` says so. `decide` is asked while
    /// nobody attaches the layer or holds a pin on it, and nobody can until this returns. ECANCELED if
    /// `cancelled` says so.
    pub fn release<E: From<Error>>(
        &self,
        id: SnapshotId,
        cancelled: &dyn Fn() -> bool,
        decide: impl FnOnce() -> std::result::Result<Release, E>,
    ) -> std::result::Result<Released, E> {
        let slot = Arc::clone(self.slots.lock().entry(id).or_default());
        let Some(_guard) = slot.lock.try_lock_for(RELEASE_WAIT) else { return Ok(Released::NotYet) };
        if slot.pins.load(Ordering::SeqCst) > 0 {
            return Ok(Released::NotYet);
        }
        let released = decide().and_then(|decision| {
            if decision == Release::Remove {
                let home = self.places.home(id);
                self.unmount_home(&home)?;
                self.sys.remove_tree(&home, cancelled)?;
            }
            Ok(Released::Done)
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

fn note(place: &Path) -> PathBuf {
    place.with_extension("of")
}

/// Where a thing is built before it is renamed to `place`.
fn beside(place: &Path) -> PathBuf {
    place.with_extension("new")
}
