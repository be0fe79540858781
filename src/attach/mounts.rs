//! The paths where something published is attached: links, which lead to the published
//! directory itself or, with `AttachMode::Bind`, to a read-only bind mount of it below `bound/`. To lead a
//! place somewhere else is one rename, so a container that is mounted right then finds the one
//! or the other, whole.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{AttachMode, Attacher, MountPoint, staging_path};
use crate::model::SnapshotId;
use crate::overlay::{BIND_MOUNTS_DIR, SourceVariant};
use crate::repository::executor::without_repository;
use crate::system::{DirHandle, Error, FileType, Result, Status, Unmount};

/// More mounts than this on one directory are not ours to untangle.
const MAX_STACKED_MOUNTS: usize = 16;
/// Whoever followed a link before it was exchanged has arrived where it led by then. Without that
/// time, a mount(2) under way found the bare mount point, or nothing, within a second of trying.
const UNMOUNT_GRACE: Duration = Duration::from_secs(1);

/// A mount point that no link leads to any more.
pub(super) struct SupersededMount {
    since: Instant,
    point: PathBuf,
}

impl Attacher {
    /// Makes `place` in `home` lead to `source`, or to the mount of it at `point`. Whether there was
    /// anything to do.
    pub(super) fn ensure_link(
        &self,
        home: &Path,
        place: &Path,
        source: &Path,
        point: Option<&MountPoint>,
    ) -> Result<bool> {
        let old = match self.link_at(place) {
            // A directory: where the Go snapshotter had bound it.
            Err(e) if e.errno == Errno::EINVAL => {
                self.unmount_all(place)?;
                self.sys.remove_dir(place)?;
                None
            }
            old => old?,
        };
        let target = match point {
            None => source,
            // Whoever leads it elsewhere by now has looked at the layer as late as this survey.
            Some(point) if old.is_some() && (!point.is_new || old != point.before) => {
                if point.is_new {
                    self.unbind(&home.join(&point.name))?;
                }
                return Ok(false);
            }
            Some(point) => &point.name,
        };
        if old.as_deref() == Some(target) {
            return Ok(false);
        }
        self.put_link(place, target)?;
        if let Some(old) = old.filter(|old| old.starts_with(BIND_MOUNTS_DIR)) {
            self.superseded.lock().push(SupersededMount { since: Instant::now(), point: home.join(old) });
            self.unmount_superseded();
        }
        Ok(true)
    }

    /// The mount point in the directory of `id` that shows the open `layer`: the one that is led to, if
    /// that does, or else a new one.
    pub(super) fn find_mount_point(
        &self,
        id: SnapshotId,
        variant: SourceVariant,
        layer: &DirHandle,
    ) -> Result<MountPoint> {
        let home = self.paths.snapshot_dir(id);
        let led_to = without_repository(|| match self.link_at(&self.paths.attached_root(id, variant)) {
            Err(e) if e.errno == Errno::EINVAL => Ok(None),
            led_to => led_to,
        })?;
        if let Some(name) = led_to.as_ref().filter(|target| target.starts_with(BIND_MOUNTS_DIR))
            && self.is_bound(&home.join(name), self.sys.dir_status(layer)?)?
        {
            return Ok(MountPoint { name: name.clone(), is_new: false, before: None });
        }
        let name = without_repository(|| self.create_mount_point(&home))?;
        let point = home.join(&name);
        if let Err(e) = self.sys.bind_read_only(layer, &point) {
            // The mount may be there and writable: that must not stay.
            if let Err(undo) = self.unbind(&point) {
                log::error!("{} may be writable: {undo}", point.display());
            }
            return Err(e);
        }
        Ok(MountPoint { name, is_new: true, before: led_to })
    }

    /// Whether a place that was led to a layer still shows it. What can change without us is a mount: somebody may take
    /// it away, and then an empty directory is there. `device` is that of the layer; `inode` is asked for, if it is
    /// given, which may hang.
    pub fn is_in_place(&self, id: SnapshotId, variant: SourceVariant, device: u64, inode: Option<u64>) -> bool {
        if self.mode == AttachMode::Symlink {
            return true;
        }
        let Ok(Some(leads_to)) = self.link_at(&self.paths.attached_root(id, variant)) else { return false };
        let point = self.paths.snapshot_dir(id).join(leads_to);
        let is_mounted = self.sys.mounted(&point).is_ok_and(|mounted| mounted == Some(device));
        is_mounted && inode.is_none_or(|inode| self.sys.lstat(&point).is_ok_and(|there| there.inode == inode))
    }

    /// A directory where nothing was ever mounted; the result is where in `home` it is.
    fn create_mount_point(&self, home: &Path) -> Result<PathBuf> {
        self.ensure_directory(home, 0o700)?;
        self.ensure_directory(&home.join(BIND_MOUNTS_DIR), 0o700)?;
        loop {
            let name = Path::new(BIND_MOUNTS_DIR).join(self.next_point.fetch_add(1, Ordering::Relaxed).to_string());
            match self.sys.create_dir(&home.join(&name), 0o755) {
                // An earlier process's.
                Err(e) if e.errno == Errno::EEXIST => {}
                result => return result.map(|()| name),
            }
        }
    }

    /// Whether the layer is mounted there, read-only. It is not if its server died, if it was mounted
    /// or published anew, or if a crash came before it was read-only.
    fn is_bound(&self, point: &Path, wanted: Status) -> Result<bool> {
        // Of a mount of something else nothing is asked: its server may hang.
        if self.sys.mounted(point)? != Some(wanted.device) {
            return Ok(false);
        }
        let there = match self.sys.lstat(point) {
            Ok(there) => there,
            Err(e) if e.is_dead() => return Ok(false),
            Err(e) => return Err(e),
        };
        let Ok(file_system) = self.sys.statfs(point) else { return Ok(false) };
        // The same directory, by its inode. CernVM-FS gives new ones with every catalog, but a
        // layer that it publishes never changes, so there the device says enough.
        Ok(file_system.read_only && (there.inode == wanted.inode || file_system.fuse))
    }

    /// Remembers what in `home` nobody is led to, to be taken away in a while.
    pub fn schedule_unmount(&self, home: &Path) {
        if let Err(e) = self.try_schedule_unmount(home) {
            log::warn!("mounts in {} stay until its layer is detached: {e}", home.display());
        }
    }

    fn try_schedule_unmount(&self, home: &Path) -> Result<()> {
        let bound = home.join(BIND_MOUNTS_DIR);
        let points = self.entries(&bound)?;
        if points.is_empty() {
            return Ok(());
        }
        let led_to = self.link_target(home)?;
        let mut superseded = self.superseded.lock();
        for point in points.into_iter().map(|(name, _)| bound.join(name)) {
            if !led_to.contains(&point) && superseded.iter().all(|one| one.point != point) {
                superseded.push(SupersededMount { since: Instant::now(), point });
            }
        }
        Ok(())
    }

    /// All that links in `home` lead to.
    fn link_target(&self, home: &Path) -> Result<HashSet<PathBuf>> {
        let mut led_to = HashSet::new();
        for (name, _) in self.entries(home)?.into_iter().filter(|(_, file_type)| *file_type == FileType::Symlink) {
            led_to.extend(self.link_at(&home.join(name))?.map(|target| home.join(target)));
        }
        Ok(led_to)
    }

    /// Takes away mounts that no link has led to for a while.
    pub fn unmount_superseded(&self) {
        let (due, left) = std::mem::take(&mut *self.superseded.lock())
            .into_iter()
            .partition::<Vec<_>, _>(|superseded| superseded.since.elapsed() >= UNMOUNT_GRACE);
        self.superseded.lock().extend(left);
        for superseded in due {
            if let Err(e) = self.unbind_superseded(&superseded.point) {
                log::warn!("{} stays until the next cleanup: {e}", superseded.point.display());
                self.superseded.lock().push(superseded);
            }
        }
    }

    fn unbind_superseded(&self, point: &Path) -> Result<()> {
        let home = point.parent().and_then(Path::parent).unwrap_or(point);
        // A thread that was thought to hang may have got on, and led somebody there after all.
        if self.link_target(home)?.contains(point) { Ok(()) } else { self.unbind(point) }
    }

    pub(super) fn unbind(&self, point: &Path) -> Result<()> {
        self.unmount_all(point)?;
        match self.sys.remove_dir(point) {
            Err(e) if e.errno != Errno::ENOENT => Err(e),
            _ => Ok(()),
        }
    }

    /// Detaches all that is mounted in `home`: what the Go snapshotter had bound at its `fs`, and
    /// what we have.
    pub(super) fn unmount_all_below(&self, home: &Path) -> Result<()> {
        self.unmount_all(&home.join("fs"))?;
        let bound = home.join(BIND_MOUNTS_DIR);
        self.entries(&bound)?.iter().try_for_each(|(name, _)| self.unmount_all(&bound.join(name)))
    }

    /// The entries of a directory of ours, in which nobody else writes; none if it is not there.
    fn entries(&self, path: &Path) -> Result<Vec<(OsString, FileType)>> {
        let mut entries = Vec::new();
        let read = self.sys.for_each_entry(path, &mut |name, file_type| {
            entries.push((name.to_owned(), file_type));
            ControlFlow::Continue(())
        });
        match read {
            Err(e) if e.errno != Errno::ENOENT => Err(e),
            _ => Ok(entries),
        }
    }

    fn unmount_all(&self, target: &Path) -> Result<()> {
        for _ in 0..MAX_STACKED_MOUNTS {
            if !self.unmount_one(target)? {
                return Ok(());
            }
        }
        Err(too_many_mounts(target))
    }

    /// Whether something was mounted there. Asks the mount table and no file system. Somebody may
    /// have a file open in it: that one keeps what it has, and nobody else gets it.
    fn unmount_one(&self, target: &Path) -> Result<bool> {
        match self.sys.unmount(target, Unmount::Plain) {
            Ok(()) => Ok(true),
            // Not a mount point (any more), or not there at all.
            Err(e) if matches!(e.errno, Errno::EINVAL | Errno::ENOENT) => Ok(false),
            Err(e) if e.errno == Errno::EBUSY => self.sys.unmount(target, Unmount::Detach).map(|()| true),
            Err(e) => Err(e),
        }
    }

    /// Where a link leads, if there is one.
    pub(super) fn link_at(&self, path: &Path) -> Result<Option<PathBuf>> {
        match self.sys.read_link(path) {
            Ok(target) => Ok(Some(target)),
            Err(e) if e.errno == Errno::ENOENT => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// In one step, whatever link was there.
    pub(super) fn put_link(&self, link: &Path, target: &Path) -> Result<()> {
        match self.sys.symlink(target, link) {
            Err(e) if e.errno == Errno::EEXIST => {}
            result => return result,
        }
        let new = staging_path(link);
        match self.sys.remove_file(&new) {
            Err(e) if e.errno != Errno::ENOENT => return Err(e),
            _ => {}
        }
        self.sys.symlink(target, &new)?;
        self.sys.rename(&new, link)
    }
}

fn too_many_mounts(path: &Path) -> Error {
    Error { call: "untangle the mounts on", path: path.to_owned(), errno: Errno::ELOOP }
}
