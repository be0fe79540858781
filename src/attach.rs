//! Brings a published layer under `snapshots/<id>/` and takes it away again.
//!
//! Attaching is lazy, idempotent and safe from many threads: each layer has a slot with a
//! lock, and whoever is about to use a layer holds a pin on it until the store knows.
//! Knows directories and mounts, not chains and not containerd. Presence is completeness:
//! a skeleton is built beside its place and renamed into it.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use parking_lot::Mutex;

use crate::overlay::{Mask, Places};
use crate::repository::scan::{CATALOG_MARKERS, Directory, Scan};
use crate::sys::{Error, FileType, Result, Sys, Unmount};
use crate::types::SnapshotId;

/// How a layer's files come under `snapshots/<id>/fs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A read-only bind mount.
    Bind,
    /// A symbolic link: no mount at all.
    Symlink,
}

/// More mounts than this on one directory are not ours to untangle.
const STACKED_MOUNTS: usize = 16;

pub struct Attacher {
    places: Places,
    mode: Mode,
    sys: Arc<dyn Sys>,
    slots: Mutex<HashMap<SnapshotId, Arc<Mutex<Slot>>>>,
}

#[derive(Default)]
struct Slot {
    /// Users that the store does not know yet.
    pins: usize,
}

/// Keeps a layer attached while it lives.
pub struct Pin(Arc<Mutex<Slot>>);

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.lock().pins -= 1;
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
    /// Pinned, or busy: ask again later.
    NotYet,
}

impl Attacher {
    pub fn new(places: Places, mode: Mode, sys: Arc<dyn Sys>) -> Self {
        Self { places, mode, sys, slots: Mutex::default() }
    }

    /// Attaches the layer at `source` as snapshot `id`, unless it is attached already.
    pub fn attach(&self, id: SnapshotId, source: &Path, scan: &Scan) -> Result<Pin> {
        let slot = Arc::clone(self.slots.lock().entry(id).or_default());
        {
            let mut held = slot.lock();
            self.ensure_directory(&self.places.home(id), 0o700)?;
            self.ensure_skeleton(&self.places.mask(id), source, scan, |d| !d.hidden.is_empty(), Self::build_mask)?;
            self.ensure_skeleton(
                &self.places.hide(id),
                source,
                scan,
                |d| d.opaque || !d.deleted.is_empty(),
                Self::build_hide,
            )?;
            match self.mode {
                Mode::Bind => self.ensure_bound(id, source)?,
                Mode::Symlink => self.ensure_linked(id, source)?,
            }
            held.pins += 1;
        }
        Ok(Pin(slot))
    }

    /// Takes away what snapshot `id` has on disk, if `decide` says so. `decide` is asked
    /// while nobody can attach the layer or begin to use it.
    pub fn release<E: From<Error>>(
        &self,
        id: SnapshotId,
        decide: impl FnOnce() -> std::result::Result<Release, E>,
    ) -> std::result::Result<Released, E> {
        let slot = Arc::clone(self.slots.lock().entry(id).or_default());
        let held = slot.lock();
        if held.pins > 0 {
            return Ok(Released::NotYet);
        }
        let released = match decide()? {
            Release::Keep => Released::Done,
            Release::Remove => match self.detach(id)? {
                Released::Done => self.sys.remove_tree(&self.places.home(id)).map(|()| Released::Done)?,
                Released::NotYet => Released::NotYet,
            },
        };
        // Only we and the map hold the slot, and under the map's lock nobody else can begin
        // to: two threads never work on one layer in two slots.
        let mut slots = self.slots.lock();
        if Arc::strong_count(&slot) == 2 {
            slots.remove(&id);
        }
        Ok(released)
    }

    fn detach(&self, id: SnapshotId) -> Result<Released> {
        let fs = self.places.fs(id);
        if self.lstat(&fs)?.is_some_and(|status| status == FileType::Symlink) {
            self.sys.remove_file(&fs)?;
            return Ok(Released::Done);
        }
        self.unmount_all(&fs)
    }

    /// The type of what is there; a dead mount counts as a directory.
    fn lstat(&self, path: &Path) -> Result<Option<FileType>> {
        match self.sys.lstat(path) {
            Ok(status) => Ok(Some(status.file_type)),
            Err(e) if e.errno == Errno::ENOENT => Ok(None),
            Err(e) if is_dead(&e) => Ok(Some(FileType::Directory)),
            Err(e) => Err(e),
        }
    }

    fn ensure_directory(&self, path: &Path, mode: u32) -> Result<()> {
        match self.sys.create_dir(path, mode) {
            Err(e) if e.errno == Errno::EEXIST => Ok(()),
            result => result,
        }
    }

    fn ensure_bound(&self, id: SnapshotId, source: &Path) -> Result<()> {
        let fs = self.places.fs(id);
        for _ in 0..STACKED_MOUNTS {
            match self.found(id, source)? {
                Found::Attached => return Ok(()),
                Found::Nothing => self.sys.create_dir(&fs, 0o755)?,
                Found::Link => self.sys.remove_file(&fs)?,
                Found::Other => match self.sys.unmount(&fs, Unmount::Plain) {
                    Ok(()) => {}
                    // Somebody still has a file open there. It keeps what it has; nobody
                    // else gets it.
                    Err(e) if e.errno == Errno::EBUSY => self.sys.unmount(&fs, Unmount::Detach)?,
                    // Nothing is mounted.
                    Err(e) if e.errno == Errno::EINVAL => {
                        if let Err(e) = self.sys.bind_read_only(source, &fs) {
                            // The mount may be there and writable: that must not stay.
                            let _ = self.unmount_all(&fs);
                            return Err(e);
                        }
                        return Ok(());
                    }
                    Err(e) => return Err(e),
                },
            }
        }
        Err(Error { call: "untangle the mounts on", path: fs, errno: Errno::ELOOP })
    }

    fn found(&self, id: SnapshotId, source: &Path) -> Result<Found> {
        let fs = self.places.fs(id);
        let there = match self.sys.lstat(&fs) {
            Ok(there) => there,
            Err(e) if e.errno == Errno::ENOENT => return Ok(Found::Nothing),
            Err(e) if is_dead(&e) => return Ok(Found::Other),
            Err(e) => return Err(e),
        };
        if there.file_type == FileType::Symlink {
            return Ok(Found::Link);
        }
        let wanted = self.sys.stat(source)?;
        let Ok(file_system) = self.sys.statfs(&fs) else { return Ok(Found::Other) };
        let home = self.sys.lstat(&self.places.home(id))?;
        // The same directory, by its inode. CernVM-FS gives new ones with every catalog, but a
        // layer that it publishes never changes, so there the device says enough.
        let is_wanted = there.device == wanted.device
            && (there.inode == wanted.inode || (file_system.fuse && there.device != home.device));
        Ok(if is_wanted && file_system.read_only { Found::Attached } else { Found::Other })
    }

    fn ensure_linked(&self, id: SnapshotId, source: &Path) -> Result<()> {
        let fs = self.places.fs(id);
        match self.lstat(&fs)? {
            Some(FileType::Symlink) if self.sys.read_link(&fs)? == source => return Ok(()),
            // From a time when layers were bound.
            Some(FileType::Directory) => {
                if self.unmount_all(&fs)? == Released::NotYet {
                    self.sys.unmount(&fs, Unmount::Detach)?;
                }
                self.sys.remove_dir(&fs)?;
            }
            Some(FileType::Symlink | FileType::Other) | None => {}
        }
        let new = beside(&fs);
        match self.sys.remove_file(&new) {
            Err(e) if e.errno != Errno::ENOENT => return Err(e),
            _ => {}
        }
        self.sys.symlink(source, &new)?;
        self.sys.rename(&new, &fs)
    }

    fn unmount_all(&self, target: &Path) -> Result<Released> {
        for _ in 0..STACKED_MOUNTS {
            match self.sys.unmount(target, Unmount::Plain) {
                Ok(()) => {}
                // Not a mount point (any more), or not there at all.
                Err(e) if matches!(e.errno, Errno::EINVAL | Errno::ENOENT) => return Ok(Released::Done),
                Err(e) if e.errno == Errno::EBUSY => match self.sys.statfs(target) {
                    Err(dead) if is_dead(&dead) => self.sys.unmount(target, Unmount::Detach)?,
                    _ => return Ok(Released::NotYet),
                },
                Err(e) => return Err(e),
            }
        }
        Err(Error { call: "untangle the mounts on", path: target.to_owned(), errno: Errno::ELOOP })
    }

    fn ensure_skeleton(
        &self,
        place: &Path,
        source: &Path,
        scan: &Scan,
        wanted: impl Fn(&Directory) -> bool,
        fill: impl Fn(&Self, &Path, &Directory) -> Result<()>,
    ) -> Result<()> {
        let with_parents: HashSet<&Path> =
            scan.directories.iter().filter(|d| wanted(d)).flat_map(|d| d.path.ancestors()).collect();
        if with_parents.is_empty() || self.lstat(place)?.is_some() {
            return Ok(());
        }
        let new = beside(place);
        self.sys.remove_tree(&new)?;
        let needed: Vec<_> = scan.directories.iter().filter(|d| with_parents.contains(d.path.as_path())).collect();
        for directory in &needed {
            let path = new.join(&directory.path);
            self.sys.create_dir(&path, 0o755)?;
            fill(self, &path, directory)?;
        }
        // Children first: making an entry changes the time of its directory.
        for directory in needed.iter().rev() {
            let attributes = self.sys.attributes(&source.join(&directory.path))?;
            self.sys.set_attributes(&new.join(&directory.path), &attributes)?;
        }
        self.sys.rename(&new, place)
    }

    fn build_mask(&self, path: &Path, directory: &Directory) -> Result<()> {
        directory.hidden.iter().try_for_each(|name| self.sys.create_whiteout(&path.join(name)))
    }

    fn build_hide(&self, path: &Path, directory: &Directory) -> Result<()> {
        if directory.opaque {
            self.sys.make_opaque(path)?;
        }
        directory.deleted.iter().try_for_each(|name| self.sys.create_whiteout(&path.join(name)))
    }
}

/// What the skeletons of a layer are for: what its mask hides, and whether it hides
/// anything of the layers below.
pub fn skeletons(scan: &Scan) -> (Mask, bool) {
    let hides = scan.directories.iter().any(|d| d.opaque || !d.deleted.is_empty());
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
    (mask, hides)
}

/// Where a thing is built before it is renamed to `place`.
fn beside(place: &Path) -> PathBuf {
    place.with_extension("new")
}

/// The server of a FUSE file system has died, or the file system below us is gone.
fn is_dead(error: &Error) -> bool {
    matches!(error.errno, Errno::ENOTCONN | Errno::ESTALE)
}
