//! Brings what is published under `snapshots/<id>/` and takes it away again.
//!
//! Attaching is lazy, idempotent and safe from many threads: each snapshot has a slot with a
//! lock, and whoever is about to use what is attached holds a pin on it until the store
//! knows. Nothing that somebody was told to mount is exchanged: the same layer from another
//! source is another edition. Knows directories and mounts, not chains and not containerd. Presence is
//! completeness: whatever is made is made beside its place and renamed into it. `attach` asks the
//! repository, so it runs on the repository's threads; `release` never does, not even where
//! a mount of it hangs.
#![forbid(unsafe_code)]

mod place;
mod skeleton;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use parking_lot::{Mutex, MutexGuard};

use self::place::Retired;
use self::skeleton::Plan;
pub use self::skeleton::skeletons;
use crate::overlay::{Edition, Places};
use crate::repository::lane::{LOOK_UP, Pulse, alive};
use crate::repository::scan::{Directory, Scan};
use crate::sys::{Error, FileType, Result, Sys};
use crate::types::SnapshotId;

/// Where `snapshots/<id>/fs` of a published layer leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To a read-only bind mount of it.
    Bind,
    /// To the layer itself: no mount at all.
    Symlink,
}

/// What is to be attached, and as what.
pub struct Attach<'a> {
    pub id: SnapshotId,
    pub source: &'a Path,
    pub scan: &'a Scan,
    /// Whether its mask, if it needs one, will be used: that of a layer above may do.
    pub masked: bool,
    /// No layer lies below it, so there is nothing that it could delete.
    pub is_lowest: bool,
}

/// So long a release waits for a thread that is attaching the same layer right now. One that
/// takes longer may hang in the repository, and a cleanup must not.
const RELEASE_WAIT: Duration = Duration::from_millis(50);
/// And so long one thread that attaches waits for another that does not get on.
const ATTACH_WAIT: Duration = Duration::from_secs(2);
/// A skeleton that is taken away between looking and building is looked at again so many times.
const TRIES: usize = 8;

pub struct Attacher {
    places: Places,
    mode: Mode,
    sys: Arc<dyn Sys>,
    slots: Mutex<HashMap<SnapshotId, Arc<Slot>>>,
    retired: Mutex<Vec<Retired>>,
    /// Never used for two mounts, not even by two processes: whoever takes an old one away must
    /// not find a new one there.
    next_point: AtomicU64,
}

#[derive(Default)]
struct Slot {
    turn: Mutex<()>,
    /// Users that the store does not know yet. Counted up with the lock held; counted down
    /// without it, because its holder may hang.
    pins: AtomicUsize,
    /// Of whoever holds the lock.
    pulse: Pulse,
}

impl Slot {
    /// None: its holder hangs. One that builds a large skeleton does not.
    fn take(&self) -> Option<MutexGuard<'_, ()>> {
        loop {
            // Waiting here is no sign that the repository hangs.
            alive();
            if let Some(turn) = self.turn.try_lock_for(LOOK_UP) {
                self.pulse.beat();
                return Some(turn);
            }
            if self.pulse.silence() > ATTACH_WAIT {
                return None;
            }
        }
    }
}

/// Keeps a layer attached while it lives.
pub struct Pin {
    slot: Arc<Slot>,
    pub edition: Edition,
    /// It was attached just now.
    pub fresh: bool,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.slot.pins.fetch_sub(1, Ordering::SeqCst);
    }
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
        Self { places, mode, sys, slots: Mutex::default(), retired: Mutex::default(), next_point }
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Attaches what `wanted` says, unless it is attached already.
    pub fn attach(&self, wanted: &Attach<'_>) -> Result<Pin> {
        let Attach { id, source, scan, masked, is_lowest } = *wanted;
        let home = self.places.home(id);
        let needs_mask = masked && scan.has_mask();
        let needs_hide = !is_lowest && scan.hides();
        for _ in 0..TRIES {
            // What the repository has to say is asked before the slot is locked: whoever hangs
            // there must not keep the slot.
            let (edition, is_begun) = self.edition_of(id, source)?;
            let place = self.places.root(id, edition);
            let (mask, hide) = (self.places.mask(id, edition), self.places.hide(id, edition));
            let (mut mask_plan, mut hide_plan) = (Plan::NotNeeded, Plan::NotNeeded);
            if needs_mask {
                mask_plan = self.plan(&mask, is_begun, source, scan, Directory::has_mask)?;
            }
            if needs_hide {
                hide_plan = self.plan(&hide, is_begun, source, scan, Directory::hides)?;
            }
            let bound = match self.mode {
                Mode::Bind => Some(self.sys.stat(source)?),
                Mode::Symlink => None,
            };
            let slot = Arc::clone(self.slots.lock().entry(id).or_default());
            let Some(_turn) = slot.take() else {
                self.replace(id, &slot);
                continue;
            };
            let of = self.source_of(&place)?;
            if of.as_deref().is_some_and(|of| of != source) {
                // Another thread was faster, with another source.
                continue;
            }
            self.ensure_directory(&home, 0o700)?;
            // A link to the layer itself tells as much; one to a mount does not.
            if self.mode == Mode::Bind || (of.is_none() && (needs_mask || needs_hide)) {
                self.note_source(&place, source)?;
            }
            if !self.build(&mask, &mask_plan, &slot.pulse, Self::build_mask)?
                || !self.build(&hide, &hide_plan, &slot.pulse, Self::build_hide)?
            {
                // It was there when we looked, and was taken away meanwhile.
                continue;
            }
            let fresh = self.ensure_leads(&home, &place, source, bound)?;
            slot.pins.fetch_add(1, Ordering::SeqCst);
            return Ok(Pin { slot: Arc::clone(&slot), edition, fresh });
        }
        Err(Error { call: "settle", path: home, errno: Errno::EAGAIN })
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

    /// A thread that holds the slot hangs, in a bind mount of an old mount say: the next one gets
    /// another slot. Should the first one wake up, what it does is found and put right when the
    /// layer is next attached.
    fn replace(&self, id: SnapshotId, slot: &Arc<Slot>) {
        let mut slots = self.slots.lock();
        if slots.get(&id).is_some_and(|current| Arc::ptr_eq(current, slot)) {
            slots.insert(id, Arc::default());
        }
    }

    /// Takes away what snapshot `id` has on disk, if `decide` says so. `decide` is asked
    /// while nobody can attach the layer or begin to use it.
    pub fn release<E: From<Error>>(
        &self,
        id: SnapshotId,
        decide: impl FnOnce() -> std::result::Result<Release, E>,
    ) -> std::result::Result<Released, E> {
        let slot = Arc::clone(self.slots.lock().entry(id).or_default());
        let Some(_turn) = slot.turn.try_lock_for(RELEASE_WAIT) else { return Ok(Released::NotYet) };
        if slot.pins.load(Ordering::SeqCst) > 0 {
            return Ok(Released::NotYet);
        }
        if decide()? == Release::Remove {
            let home = self.places.home(id);
            self.unmount_home(&home)?;
            self.sys.remove_tree(&home)?;
        }
        // Only we and the map hold the slot, and under the map's lock nobody else can begin
        // to: two threads never work on one layer in two slots.
        let mut slots = self.slots.lock();
        if Arc::strong_count(&slot) == 2 {
            slots.remove(&id);
        }
        Ok(Released::Done)
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
