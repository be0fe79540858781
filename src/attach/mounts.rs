//! The links through which an attached layer is reached, and with `AttachMode::Bind` the mounts that they lead to.
//!
//! A link leads to the published directory, or to a read-only bind mount of it below `bound/`. It is exchanged by a
//! rename, so a container that is mounted at that moment finds the old layer or the new one, and never half of one. A
//! mount that no link leads to any more is *superseded*, and is unmounted after `UNMOUNT_GRACE`.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Attacher, staging_path};
use crate::model::{AttachMode, SnapshotId};
use crate::overlay::{BIND_MOUNTS_DIR, SourceVariant};
use crate::repository::executor::without_repository;
use crate::system::{DirHandle, Error, FileType, Result, Status, Unmount};

/// Maximum number of mounts on one directory that are unmounted. More are not ours.
const MAX_STACKED_MOUNTS: usize = 16;
/// After this long, a process that followed a link before it was exchanged has finished its mount(2). Without the wait,
/// a mount(2) under way found the bare mount point, or nothing, within a second of trying.
const UNMOUNT_GRACE: Duration = Duration::from_secs(1);

/// A mount that shows a surveyed layer.
pub(super) struct MountPoint {
    /// The path in the snapshot's directory.
    pub name: PathBuf,
    /// Whether the survey mounted it.
    pub is_new: bool,
    /// The target of the link at the time of the survey.
    old_target: Option<PathBuf>,
}

/// A mount that no link leads to any more.
pub(super) struct SupersededMount {
    since: Instant,
    path: PathBuf,
}

impl Attacher {
    /// Makes `link` lead to `source`, or to its mount. Returns whether the link was changed.
    pub(super) fn ensure_link(
        &self,
        id: SnapshotId,
        link: &Path,
        source: &Path,
        mount_point: Option<&MountPoint>,
    ) -> Result<bool> {
        let home = self.paths.snapshot_dir(id);
        let old_target = match self.link_target(link) {
            // It is a directory, where the Go snapshotter had bound the layer.
            Err(e) if e.errno == Errno::EINVAL => {
                self.unmount_all(link)?;
                self.sys.remove_dir(link)?;
                None
            }
            old_target => old_target?,
        };
        let target = match mount_point {
            None => source,
            // If another thread has changed the link since our survey, its survey was not older than ours.
            Some(mount_point)
                if old_target.is_some() && (!mount_point.is_new || old_target != mount_point.old_target) =>
            {
                if mount_point.is_new {
                    self.remove_mount_point(&home.join(&mount_point.name))?;
                }
                return Ok(false);
            }
            Some(mount_point) => &mount_point.name,
        };
        if old_target.as_deref() == Some(target) {
            return Ok(false);
        }
        self.replace_link(link, target)?;
        if let Some(old_target) = old_target.filter(|old_target| old_target.starts_with(BIND_MOUNTS_DIR)) {
            self.superseded.lock().push(SupersededMount { since: Instant::now(), path: home.join(old_target) });
            self.unmount_superseded();
        }
        Ok(true)
    }

    /// The mount that shows the open `layer`: the one that the link leads to, if it does, or else a new one.
    pub(super) fn find_mount_point(
        &self,
        id: SnapshotId,
        variant: SourceVariant,
        layer: &DirHandle,
    ) -> Result<MountPoint> {
        let home = self.paths.snapshot_dir(id);
        let old_target = without_repository(|| match self.link_target(&self.paths.attached_root(id, variant)) {
            Err(e) if e.errno == Errno::EINVAL => Ok(None),
            target => target,
        })?;
        if let Some(name) = old_target.as_ref().filter(|target| target.starts_with(BIND_MOUNTS_DIR))
            && self.is_bound(&home.join(name), self.sys.dir_status(layer)?)?
        {
            return Ok(MountPoint { name: name.clone(), is_new: false, old_target: None });
        }
        let name = without_repository(|| self.create_mount_point(id))?;
        let path = home.join(&name);
        if let Err(e) = self.sys.bind_read_only(layer, &path) {
            // The mount may exist and still be writable, so it must go.
            if let Err(rollback) = self.remove_mount_point(&path) {
                log::error!(event = "bind_mount_maybe_writable", path:% = path.display();
                    "cannot unmount {}, which may be writable: {rollback}", path.display());
            }
            return Err(e);
        }
        Ok(MountPoint { name, is_new: true, old_target })
    }

    /// Whether an attached layer is still shown at its attached root. Only a mount can change without us: somebody may
    /// unmount it, which leaves an empty directory. `device` is that of the layer. `inode`, if given, is compared as
    /// well, which may hang.
    pub fn is_in_place(&self, id: SnapshotId, variant: SourceVariant, device: u64, inode: Option<u64>) -> bool {
        if self.mode == AttachMode::Symlink {
            return true;
        }
        let Ok(Some(target)) = self.link_target(&self.paths.attached_root(id, variant)) else { return false };
        let path = self.paths.snapshot_dir(id).join(target);
        let is_mounted = self.sys.mounted(&path).is_ok_and(|mounted| mounted == Some(device));
        is_mounted && inode.is_none_or(|inode| self.sys.lstat(&path).is_ok_and(|status| status.inode == inode))
    }

    /// Creates a directory where nothing was ever mounted, and returns its path in the snapshot's directory.
    fn create_mount_point(&self, id: SnapshotId) -> Result<PathBuf> {
        let home = self.paths.snapshot_dir(id);
        self.ensure_directory(&home, 0o700)?;
        self.ensure_directory(&self.paths.bind_mounts_dir(id), 0o700)?;
        loop {
            let number = self.next_mount_point.fetch_add(1, Ordering::Relaxed);
            let name = Path::new(BIND_MOUNTS_DIR).join(number.to_string());
            match self.sys.create_dir(&home.join(&name), 0o755) {
                // An earlier process has used the number.
                Err(e) if e.errno == Errno::EEXIST => {}
                result => return result.map(|()| name),
            }
        }
    }

    /// Whether the layer is mounted at `path`, read-only. It is not if its server died, if it was mounted or published
    /// again since, or if the process died before the mount was made read-only.
    fn is_bound(&self, path: &Path, layer: Status) -> Result<bool> {
        // The mount table is asked first: if something else is mounted, its server may hang, so it is asked nothing.
        if self.sys.mounted(path)? != Some(layer.device) {
            return Ok(false);
        }
        let status = match self.sys.lstat(path) {
            Ok(status) => status,
            Err(e) if e.is_dead() => return Ok(false),
            Err(e) => return Err(e),
        };
        let Ok(file_system) = self.sys.statfs(path) else { return Ok(false) };
        // The same inode is the same directory. CernVM-FS gives new inodes with every catalog, but it never changes a
        // published layer, so there the device is enough.
        Ok(file_system.read_only && (status.inode == layer.inode || file_system.fuse))
    }

    /// Schedules the mounts in `home` that no link leads to for unmounting. A process that died leaves such mounts.
    pub fn schedule_unmount(&self, home: &Path) {
        if let Err(e) = self.try_schedule_unmount(home) {
            log::warn!(event = "mount_cleanup_failed", path:% = home.display();
                "cannot look for unused mounts in {}, they stay until the layer is detached: {e}", home.display());
        }
    }

    fn try_schedule_unmount(&self, home: &Path) -> Result<()> {
        let bind_mounts = home.join(BIND_MOUNTS_DIR);
        let entries = self.entries(&bind_mounts)?;
        if entries.is_empty() {
            return Ok(());
        }
        let targets = self.link_targets(home)?;
        let mut superseded = self.superseded.lock();
        for (name, _) in entries {
            let path = bind_mounts.join(name);
            if !targets.contains(&path) && superseded.iter().all(|mount| mount.path != path) {
                superseded.push(SupersededMount { since: Instant::now(), path });
            }
        }
        Ok(())
    }

    /// The targets of all links in `home`.
    fn link_targets(&self, home: &Path) -> Result<HashSet<PathBuf>> {
        let mut targets = HashSet::new();
        for (name, file_type) in self.entries(home)? {
            if file_type == FileType::Symlink
                && let Some(target) = self.link_target(&home.join(name))?
            {
                targets.insert(home.join(target));
            }
        }
        Ok(targets)
    }

    /// Unmounts what was superseded longer than `UNMOUNT_GRACE` ago.
    pub fn unmount_superseded(&self) {
        let (due, waiting) = std::mem::take(&mut *self.superseded.lock())
            .into_iter()
            .partition::<Vec<_>, _>(|mount| mount.since.elapsed() >= UNMOUNT_GRACE);
        self.superseded.lock().extend(waiting);
        for mount in due {
            if let Err(e) = self.remove_unless_linked(&mount.path) {
                log::warn!(event = "superseded_mount_kept", path:% = mount.path.display();
                    "cannot unmount {}, the next cleanup tries again: {e}", mount.path.display());
                self.superseded.lock().push(mount);
            }
        }
    }

    fn remove_unless_linked(&self, mount_point: &Path) -> Result<()> {
        let home = mount_point.parent().and_then(Path::parent).unwrap_or(mount_point);
        // Another thread may have made a link to the mount after it was superseded.
        if self.link_targets(home)?.contains(mount_point) { Ok(()) } else { self.remove_mount_point(mount_point) }
    }

    /// Unmounts everything on `path` and removes the directory.
    pub(super) fn remove_mount_point(&self, path: &Path) -> Result<()> {
        self.unmount_all(path)?;
        match self.sys.remove_dir(path) {
            Err(e) if e.errno != Errno::ENOENT => Err(e),
            _ => Ok(()),
        }
    }

    /// Unmounts everything in `home`: what the Go snapshotter had bound at its `fs`, and our own mounts.
    pub(super) fn unmount_all_below(&self, home: &Path) -> Result<()> {
        self.unmount_all(&home.join("fs"))?;
        let bind_mounts = home.join(BIND_MOUNTS_DIR);
        self.entries(&bind_mounts)?.iter().try_for_each(|(name, _)| self.unmount_all(&bind_mounts.join(name)))
    }

    /// The entries of a directory in which nobody else writes. There are none if it does not exist.
    fn entries(&self, path: &Path) -> Result<Vec<(OsString, FileType)>> {
        let mut entries = Vec::new();
        let result = self.sys.for_each_entry(path, &mut |name, file_type| {
            entries.push((name.to_owned(), file_type));
            ControlFlow::Continue(())
        });
        match result {
            Err(e) if e.errno != Errno::ENOENT => Err(e),
            _ => Ok(entries),
        }
    }

    fn unmount_all(&self, path: &Path) -> Result<()> {
        for _ in 0..MAX_STACKED_MOUNTS {
            if !self.unmount_one(path)? {
                return Ok(());
            }
        }
        Err(Error { call: "unmount all of the many mounts on", path: path.to_owned(), errno: Errno::ELOOP })
    }

    /// Unmounts the uppermost mount on `path`, and returns false if there was none. Asks no file system. A process that
    /// has a file of the mount open keeps it, and nobody else reaches the mount any more.
    fn unmount_one(&self, path: &Path) -> Result<bool> {
        match self.sys.unmount(path, Unmount::Plain) {
            Ok(()) => Ok(true),
            // The path is no mount point, or does not exist.
            Err(e) if matches!(e.errno, Errno::EINVAL | Errno::ENOENT) => Ok(false),
            Err(e) if e.errno == Errno::EBUSY => self.sys.unmount(path, Unmount::Detach).map(|()| true),
            Err(e) => Err(e),
        }
    }

    /// The target of a link, or None if there is nothing at `path`.
    pub(super) fn link_target(&self, path: &Path) -> Result<Option<PathBuf>> {
        match self.sys.read_link(path) {
            Ok(target) => Ok(Some(target)),
            Err(e) if e.errno == Errno::ENOENT => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes a link, or atomically exchanges the one that is there.
    pub(super) fn replace_link(&self, link: &Path, target: &Path) -> Result<()> {
        match self.sys.symlink(target, link) {
            Err(e) if e.errno == Errno::EEXIST => {}
            result => return result,
        }
        let staging = staging_path(link);
        match self.sys.remove_file(&staging) {
            Err(e) if e.errno != Errno::ENOENT => return Err(e),
            _ => {}
        }
        self.sys.symlink(target, &staging)?;
        self.sys.rename(&staging, link)
    }
}
