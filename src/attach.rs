//! Brings what is published under `snapshots/<id>/` and takes it away again.
//!
//! Attaching is lazy, idempotent and safe from many threads: each snapshot has a slot with a
//! lock, and whoever is about to use what is attached holds a pin on it until the store
//! knows. Knows directories and mounts, not chains and not containerd. Presence is
//! completeness: a skeleton is built beside its place and renamed into it. `attach` asks the
//! repository, so it runs on the repository's threads; `release` never does, not even where
//! a mount of it hangs.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use parking_lot::{Mutex, MutexGuard};

use crate::overlay::{Form, Mask, Places};
use crate::repository::lane::{LOOK_UP, Pulse, alive};
use crate::repository::scan::{CATALOG_MARKERS, Directory, Scan};
use crate::sys::{Attributes, Error, FileType, Result, Status, Sys, Unmount};
use crate::types::SnapshotId;

/// How a layer's files come under `snapshots/<id>/fs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A read-only bind mount.
    Bind,
    /// A symbolic link: no mount at all.
    Symlink,
}

/// What is to be attached, and as what.
pub struct Attach<'a> {
    pub id: SnapshotId,
    pub form: Form,
    pub source: &'a Path,
    pub scan: &'a Scan,
    /// Whether its mask, if it needs one, will be used: that of a layer above may do.
    pub masked: bool,
}

/// So long a release waits for a thread that is attaching the same layer right now. One that
/// takes longer may hang in the repository, and a cleanup must not.
const RELEASE_WAIT: Duration = Duration::from_millis(50);
/// And so long one thread that attaches waits for another that does not get on.
const ATTACH_WAIT: Duration = Duration::from_secs(2);
/// A skeleton that is taken away between looking and building is looked at again so many times.
const TRIES: usize = 8;
/// Bytes of a file that a mask shows otherwise than the repository.
pub const MOST_COPIED: u64 = 1 << 20;

/// More mounts than this on one directory are not ours to untangle.
const STACKED_MOUNTS: usize = 16;

pub struct Attacher {
    places: Places,
    mode: Mode,
    sys: Arc<dyn Sys>,
    slots: Mutex<HashMap<SnapshotId, Arc<Slot>>>,
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
    /// It was attached just now.
    pub fresh: bool,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.slot.pins.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is at the place where a layer is to be attached.
enum Found {
    Nothing,
    Link,
    /// The layer, read-only.
    Attached,
    /// The bare mount point, or a mount that is not the layer, or not any more: the server
    /// died, was mounted anew, the layer was published anew, or a crash came between binding
    /// and making read-only.
    Other,
}

/// A skeleton that is to be built, as far as the repository has a say in it.
enum Plan<'a> {
    NotNeeded,
    IsThere,
    Build(Vec<Planned<'a>>),
}

struct Planned<'a> {
    directory: &'a Directory,
    attributes: Attributes,
    copies: Vec<Copied<'a>>,
}

struct Copied<'a> {
    name: &'a OsStr,
    content: Vec<u8>,
    attributes: Attributes,
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
        Self { places, mode, sys, slots: Mutex::default() }
    }

    /// Attaches what `wanted` says, unless it is attached already.
    pub fn attach(&self, wanted: &Attach<'_>) -> Result<Pin> {
        let Attach { id, form, source, scan, masked } = *wanted;
        let (home, place) = (self.places.home(id), self.places.root(id, form));
        let mask = self.places.mask(id, form);
        let hide = (form == Form::Layer).then(|| self.places.hide(id));
        let has_mask = scan.has_mask();
        let needs_hide = hide.is_some() && scan.hides();
        for _ in 0..TRIES {
            // What the repository has to say is asked before the slot is locked: whoever hangs
            // there must not keep the slot.
            let of = self.source_of(&place)?;
            let is_same_source = of.as_deref() == Some(source);
            // Skeletons of another source go with it, and the mask comes anew whether this
            // chain uses it or not: another one may be about to be mounted with it.
            let is_exchanged = of.is_some() && !is_same_source;
            let needs_mask = has_mask && (masked || is_exchanged);
            // After a reboot it is all that tells a bind mount's place from a directory of files.
            let needs_note = needs_mask || needs_hide || self.mode == Mode::Bind;
            let (mut mask_plan, mut hide_plan) = (Plan::NotNeeded, Plan::NotNeeded);
            if needs_mask {
                mask_plan = self.plan(&mask, is_same_source, source, scan, Directory::has_mask)?;
            }
            if let Some(hide) = hide.as_ref().filter(|_| needs_hide) {
                hide_plan = self.plan(hide, is_same_source, source, scan, Directory::hides)?;
            }
            let there = match self.mode {
                Mode::Bind => Some(self.sys.stat(source)?),
                Mode::Symlink => None,
            };
            let slot = Arc::clone(self.slots.lock().entry(id).or_default());
            let Some(_turn) = slot.take() else {
                self.replace(id, &slot);
                continue;
            };
            self.ensure_directory(&home, 0o700)?;
            if is_exchanged || (needs_note && !is_same_source) {
                self.put_aside(&place, source, [Some(&mask), hide.as_ref()])?;
            }
            let is_built = self.build(&mask, &mask_plan, &slot.pulse, Self::build_mask)?
                && hide
                    .as_ref()
                    .map_or(Ok(true), |hide| self.build(hide, &hide_plan, &slot.pulse, Self::build_hide))?;
            if !is_built {
                // It was there when we looked, and was taken away meanwhile.
                continue;
            }
            let fresh = match there {
                Some(there) => self.ensure_bound(&home, &place, source, there)?,
                None => self.ensure_linked(&place, source)?,
            };
            slot.pins.fetch_add(1, Ordering::SeqCst);
            return Ok(Pin { slot: Arc::clone(&slot), fresh });
        }
        Err(Error { call: "settle", path: home, errno: Errno::EAGAIN })
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

    /// Of which source the skeletons beside `place` were built. None: there are none.
    fn source_of(&self, place: &Path) -> Result<Option<PathBuf>> {
        match self.sys.read_link(&place.with_extension("of")) {
            Ok(of) => Ok(Some(of)),
            Err(e) if e.errno == Errno::ENOENT => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// What was built for another source, a layer of another repository say, is put aside:
    /// whoever uses it keeps it, and it goes with the snapshot's directory.
    fn put_aside(&self, place: &Path, source: &Path, skeletons: [Option<&PathBuf>; 2]) -> Result<()> {
        if self.source_of(place)?.as_deref() == Some(source) {
            // Another thread was faster.
            return Ok(());
        }
        for skeleton in skeletons.into_iter().flatten() {
            if self.lstat(skeleton)?.is_none() {
                continue;
            }
            let aside = (0..).map(|n| skeleton.with_extension(format!("old-{n}")));
            for aside in aside {
                if self.lstat(&aside)?.is_none() {
                    self.sys.rename(skeleton, &aside)?;
                    break;
                }
            }
        }
        self.put_link(&place.with_extension("of"), source)
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
            for form in [Form::Layer, Form::Flat] {
                self.unmount_all(&self.places.root(id, form))?;
            }
            self.sys.remove_tree(&self.places.home(id))?;
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

    /// Whether it had to be bound.
    fn ensure_bound(&self, home: &Path, place: &Path, source: &Path, wanted: Status) -> Result<bool> {
        for _ in 0..STACKED_MOUNTS {
            match self.found(home, place, wanted)? {
                Found::Attached => return Ok(false),
                Found::Nothing => self.sys.create_dir(place, 0o755)?,
                Found::Link => self.sys.remove_file(place)?,
                Found::Other => {
                    if self.unmount_one(place)? {
                        continue;
                    }
                    if let Err(e) = self.sys.bind_read_only(source, place) {
                        // The mount may be there and writable: that must not stay.
                        let _ = self.unmount_all(place);
                        return Err(e);
                    }
                    return Ok(true);
                }
            }
        }
        Err(tangled(place))
    }

    fn found(&self, home: &Path, place: &Path, wanted: Status) -> Result<Found> {
        // Of a mount of something else nothing is asked: its server may hang.
        if self.sys.mounted(place)?.is_some_and(|device| device != wanted.device) {
            return Ok(Found::Other);
        }
        let there = match self.sys.lstat(place) {
            Ok(there) => there,
            Err(e) if e.errno == Errno::ENOENT => return Ok(Found::Nothing),
            Err(e) if e.is_dead() => return Ok(Found::Other),
            Err(e) => return Err(e),
        };
        if there.file_type == FileType::Symlink {
            return Ok(Found::Link);
        }
        let Ok(file_system) = self.sys.statfs(place) else { return Ok(Found::Other) };
        let home = self.sys.lstat(home)?;
        // The same directory, by its inode. CernVM-FS gives new ones with every catalog, but a
        // layer that it publishes never changes, so there the device says enough.
        let is_wanted = there.device == wanted.device
            && (there.inode == wanted.inode || (file_system.fuse && there.device != home.device));
        Ok(if is_wanted && file_system.read_only { Found::Attached } else { Found::Other })
    }

    /// Whether the link had to be made.
    fn ensure_linked(&self, place: &Path, source: &Path) -> Result<bool> {
        match self.sys.read_link(place) {
            Ok(target) if target == source => return Ok(false),
            Ok(_) => {}
            Err(e) if e.errno == Errno::ENOENT => {}
            // No link, but from a time when layers were bound.
            Err(e) if e.errno == Errno::EINVAL => {
                self.unmount_all(place)?;
                self.sys.remove_dir(place)?;
            }
            Err(e) => return Err(e),
        }
        self.put_link(place, source)?;
        Ok(true)
    }

    fn put_link(&self, link: &Path, target: &Path) -> Result<()> {
        match self.sys.symlink(target, link) {
            Err(e) if e.errno == Errno::EEXIST => {}
            result => return result,
        }
        let new = beside(link);
        match self.sys.remove_file(&new) {
            Err(e) if e.errno != Errno::ENOENT => return Err(e),
            _ => {}
        }
        self.sys.symlink(target, &new)?;
        self.sys.rename(&new, link)
    }

    fn unmount_all(&self, target: &Path) -> Result<()> {
        for _ in 0..STACKED_MOUNTS {
            if !self.unmount_one(target)? {
                return Ok(());
            }
        }
        Err(tangled(target))
    }

    /// Whether something was mounted there. Asks the mount table and no file system. Somebody may have a file open in it: that one
    /// keeps what it has, and nobody else gets it.
    fn unmount_one(&self, target: &Path) -> Result<bool> {
        match self.sys.unmount(target, Unmount::Plain) {
            Ok(()) => Ok(true),
            // Not a mount point (any more), or not there at all.
            Err(e) if matches!(e.errno, Errno::EINVAL | Errno::ENOENT) => Ok(false),
            Err(e) if e.errno == Errno::EBUSY => self.sys.unmount(target, Unmount::Detach).map(|()| true),
            Err(e) => Err(e),
        }
    }

    /// Reads what a skeleton at `place`, which is needed, is built of, unless it is there.
    fn plan<'a>(
        &self,
        place: &Path,
        is_same_source: bool,
        source: &Path,
        scan: &'a Scan,
        wanted: impl Fn(&Directory) -> bool,
    ) -> Result<Plan<'a>> {
        let with_parents: HashSet<&Path> =
            scan.directories.iter().filter(|d| wanted(d)).flat_map(|d| d.path.ancestors()).collect();
        if is_same_source && self.lstat(place)?.is_some() {
            return Ok(Plan::IsThere);
        }
        let needed = scan.directories.iter().filter(|d| with_parents.contains(d.path.as_path()));
        let planned = needed.map(|directory| {
            alive();
            let like = directory.like.as_deref().map_or_else(|| source.join(&directory.path), Path::to_owned);
            let mut attributes = self.sys.attributes(&like)?;
            if directory.path.as_os_str().is_empty() {
                // containerd passes over what a layer says of its top.
                attributes = Attributes { mode: 0o755, mtime: attributes.mtime, ..Attributes::default() };
            }
            let copies = directory.copies.iter().map(|(name, from)| {
                let content = self.sys.read_file(from, MOST_COPIED)?;
                Ok(Copied { name, content, attributes: self.sys.attributes(from)? })
            });
            Ok(Planned { directory, attributes, copies: copies.collect::<Result<_>>()? })
        });
        Ok(Plan::Build(planned.collect::<Result<_>>()?))
    }

    /// Builds what was planned, unless it is there. False: it is needed, was there when the plan
    /// was made, and is not any more.
    fn build(
        &self,
        place: &Path,
        plan: &Plan<'_>,
        pulse: &Pulse,
        fill: impl Fn(&Self, &Path, &Directory, &Pulse) -> Result<()>,
    ) -> Result<bool> {
        let planned = match plan {
            Plan::NotNeeded => return Ok(true),
            _ if self.lstat(place)?.is_some() => return Ok(true),
            Plan::IsThere => return Ok(false),
            Plan::Build(planned) => planned,
        };
        let new = beside(place);
        self.sys.remove_tree(&new)?;
        for Planned { directory, copies, .. } in planned {
            let path = new.join(&directory.path);
            self.sys.create_dir(&path, 0o755)?;
            fill(self, &path, directory, pulse)?;
            for copied in copies {
                let at = path.join(copied.name);
                self.sys.write_file(&at, &copied.content)?;
                self.sys.set_attributes(&at, &copied.attributes)?;
            }
        }
        // Children first: making an entry changes the time of its directory.
        for Planned { directory, attributes, .. } in planned.iter().rev() {
            pulse.beat();
            self.sys.set_attributes(&new.join(&directory.path), attributes)?;
        }
        self.sys.rename(&new, place)?;
        Ok(true)
    }

    fn build_mask(&self, path: &Path, directory: &Directory, pulse: &Pulse) -> Result<()> {
        self.create_whiteouts(path, &directory.hidden, pulse)
    }

    fn build_hide(&self, path: &Path, directory: &Directory, pulse: &Pulse) -> Result<()> {
        if directory.opaque {
            self.sys.make_opaque(path)?;
        }
        self.create_whiteouts(path, &directory.deleted, pulse)
    }

    fn create_whiteouts(&self, path: &Path, names: &[OsString], pulse: &Pulse) -> Result<()> {
        pulse.beat();
        names.iter().try_for_each(|name| {
            pulse.beat();
            // The thread is not stuck in the repository either.
            alive();
            self.sys.create_whiteout(&path.join(name))
        })
    }
}

/// What the skeletons of a layer are for: what its mask hides, and whether it hides
/// anything of the layers below.
pub fn skeletons(scan: &Scan) -> (Mask, bool) {
    let mut mask = Mask::default();
    for directory in &scan.directories {
        let is_top = directory.path.as_os_str().is_empty();
        for name in &directory.hidden {
            match CATALOG_MARKERS.iter().position(|marker| is_top && name == marker) {
                Some(n) => mask.top_catalogs |= 1 << n,
                None => mask.others = true,
            }
        }
    }
    (mask, scan.hides())
}

fn tangled(path: &Path) -> Error {
    Error { call: "untangle the mounts on", path: path.to_owned(), errno: Errno::ELOOP }
}

/// Where a thing is built before it is renamed to `place`.
fn beside(place: &Path) -> PathBuf {
    place.with_extension("new")
}
