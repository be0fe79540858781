//! This module knows the layout of a repository: it finds the directory of a layer by its digest.
//!
//! A layer lies in `<repository>/.layers/<first 2 hex>/<64 hex>/layerfs`, named by the digest of the compressed blob. Any
//! directory in that layout will do. The roots of whole images that a publisher unpacks below `.flat` are not read: they
//! differ from the images. Everything here is read only, and may hang: it runs on the threads of the generation.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::Unavailable;
use super::executor::record_progress;
use super::generation::MountGeneration;
use super::manifest::{self, ImageRef, Manifest};
use crate::model::Digest;
use crate::system::{self, DirHandle, FileType, NOT_REGULAR, Sys};

pub(super) const LAYERS: &str = ".layers";
pub(super) const LAYER_ROOT: &str = "layerfs";
/// The extended attribute of a CernVM-FS mount's root that holds the name of the repository.
pub(super) const FQRN_XATTR: &str = "user.fqrn";
/// The extended attribute of the root that holds the hash of the root catalog, which changes with each publication.
const ROOT_HASH_XATTR: &str = "user.root_hash";

/// What a repository shows at some time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryState {
    /// The device of the file system with the layers.
    pub device: u64,
    /// The hash of the root catalog. None: no CernVM-FS client serves the directory.
    root_hash: Option<Vec<u8>>,
}

impl RepositoryState {
    /// Whether an equal state means that the same layers are shown. A plain directory changes without a sign.
    pub fn tells_changes(&self) -> bool {
        self.root_hash.is_some()
    }
}

impl MountGeneration {
    /// Opens an unpacked layer.
    pub fn layer(&self, digest: &Digest) -> Result<DirHandle, Unavailable> {
        self.layer_since(digest, Instant::now())
    }

    /// Opens an unpacked layer. Does not check again that the mount can be used if a call that was begun after `since`
    /// has shown it: one check is enough for all layers of a container.
    pub fn layer_since(&self, digest: &Digest, since: Instant) -> Result<DirHandle, Unavailable> {
        let path = layer_path(digest);
        let layer = if let Some(layer) = self.open(&path)? {
            layer
        } else {
            check_mounted(self.sys(), self.path()).map_err(|why| self.report(why))?;
            // The repository may have been mounted after the first attempt.
            self.open(&path)?.ok_or(Unavailable::NotPublished)?
        };
        self.require_usable(&layer, false, since)?;
        Ok(layer)
    }

    /// What the repository shows now. `since` is that of `layer_since`.
    pub fn state(&self, since: Instant) -> Result<RepositoryState, Unavailable> {
        let report = |e| self.report_failed_call(e);
        let layers = self.open(Path::new(LAYERS))?.ok_or(Unavailable::NotPublished)?;
        // On a plain directory the attribute may have any meaning.
        let is_client = !self.client_attributes()?.is_empty();
        let root_hash = is_client.then(|| self.sys().attribute(self.path(), ROOT_HASH_XATTR).map_err(report));
        let root_hash = root_hash.transpose()?.flatten();
        record_progress();
        // A client that answered this is alive.
        self.require_usable(&layers, root_hash.is_some(), since)?;
        let device = self.sys().dir_status(&layers).map_err(report)?.device;
        Ok(RepositoryState { device, root_hash })
    }

    /// The inode of each of these layers.
    pub fn inodes(&self, layers: &[Digest]) -> Result<Vec<u64>, Unavailable> {
        let directory = self.open(Path::new(LAYERS))?.ok_or(Unavailable::NotPublished)?;
        let inode = |digest| {
            let layer = self.sys().open_below(&directory, &path_below_layers(digest))?;
            self.sys().dir_status(&layer).inspect(|_| record_progress()).map(|status| status.inode)
        };
        layers.iter().map(|digest| inode(digest).map_err(|e| self.report_failed_call(e))).collect()
    }

    /// The names of the extended attributes that the client makes up. It shows them on every file in some of its
    /// settings, and on its root in all of them. They are read once for each mount.
    pub fn client_attributes(&self) -> Result<Arc<Vec<OsString>>, Unavailable> {
        if let Some(known) = self.client_attributes.get() {
            return Ok(Arc::clone(known));
        }
        let mut names = self.sys().attribute_names(self.path()).map_err(|e| self.report_failed_call(e))?;
        record_progress();
        // The attributes of a directory on a disk are its own.
        if !names.iter().any(|name| name == FQRN_XATTR) {
            names.clear();
        }
        let names = Arc::new(names);
        Ok(Arc::clone(self.client_attributes.get_or_init(|| names)))
    }

    /// The manifest of an image. None: there is none that can be used.
    pub fn manifest(&self, image: &ImageRef) -> Result<Option<Manifest>, Unavailable> {
        for path in image.manifests() {
            let full_path = self.path().join(&path);
            let text = match self.read_manifest(&path) {
                Ok(None) => continue,
                Ok(Some(text)) => text,
                Err(Unavailable::LeadsOut { .. } | Unavailable::NotADirectory { .. }) => {
                    Err(system::Error { call: "read", path: full_path.clone(), errno: NOT_REGULAR })
                }
                Err(why) => return Err(why),
            };
            let why = match text {
                Ok(text) => match Manifest::parse(&text) {
                    Ok(manifest) => return Ok(Some(manifest)),
                    Err(why) => why.to_string(),
                },
                Err(e) if is_no_file(e.errno) => e.to_string(),
                Err(e) => return Err(self.report_failed_call(e)),
            };
            log::warn!(event = "manifest_ignored", repository = self.name();
                "cannot use the manifest {}: {why}", full_path.display());
        }
        check_mounted(self.sys(), self.path()).map_err(|why| self.report(why))?;
        Ok(None)
    }

    /// None: the directory of the manifest is missing.
    fn read_manifest(&self, path: &Path) -> Result<Option<system::Result<Vec<u8>>>, Unavailable> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
        let Some(directory) = self.open(directory)? else { return Ok(None) };
        let text = self.sys().read_file(&directory.entry(name), manifest::MAX_BYTES);
        record_progress();
        Ok(Some(text.map_err(|e| system::Error { path: self.path().join(path), ..e })))
    }

    /// Opens a directory of the repository. Follows no link, because it may lead to files of the host.
    fn open(&self, path: &Path) -> Result<Option<DirHandle>, Unavailable> {
        let opened = self.sys().open_dir(self.path()).and_then(|root| {
            record_progress();
            self.sys().open_below(&root, path)
        });
        record_progress();
        match opened {
            Ok(directory) => Ok(Some(directory)),
            // The reference of an image may be longer than a file name can be.
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENAMETOOLONG) => Ok(None),
            Err(e) if matches!(e.errno, Errno::ELOOP | Errno::ENOTDIR) => Err(self.find_obstacle(path)),
            Err(e) => Err(self.report_failed_call(e)),
        }
    }

    /// The first part of `path` that is not a directory.
    fn find_obstacle(&self, path: &Path) -> Unavailable {
        let mut prefix = self.path().to_owned();
        for name in path {
            prefix.push(name);
            match self.sys().lstat(&prefix).map(|status| status.file_type) {
                Ok(FileType::Directory) => record_progress(),
                Ok(FileType::Symlink) => return Unavailable::LeadsOut { path: prefix },
                Ok(FileType::Other) | Err(_) => break,
            }
        }
        Unavailable::NotADirectory { path: prefix }
    }

    /// Fails if the client adds attributes to the files of layers, or is dead, which is not checked if `is_alive`.
    /// `directory` is any directory of the repository.
    fn require_usable(&self, directory: &DirHandle, is_alive: bool, since: Instant) -> Result<(), Unavailable> {
        if self.shown_usable_at.lock().is_some_and(|checked| checked >= since) {
            return Ok(());
        }
        let checked = Instant::now();
        if !is_alive {
            // The kernel answers `lstat` from its caches long after a FUSE server has died, and `statfs` never.
            self.sys().dir_statfs(directory).map_err(|e| self.report_failed_call(e))?;
            record_progress();
        }
        if lists_own_attributes(self.sys(), self.path()).map_err(|e| self.report_failed_call(e))? {
            return Err(Unavailable::OwnAttributes);
        }
        *self.shown_usable_at.lock() = Some(checked);
        Ok(())
    }

    /// Checks that the repository is mounted and that its layers can be used.
    pub(super) fn check_layers_directory(&self) -> Result<(), Unavailable> {
        probe(self.sys(), self.path())?;
        match lists_own_attributes(self.sys(), self.path()) {
            Ok(false) => Ok(()),
            Ok(true) => Err(Unavailable::OwnAttributes),
            Err(e) => Err(Unavailable::Unreadable(e)),
        }
    }
}

/// The path of a layer below the root of a repository.
pub(super) fn layer_path(digest: &Digest) -> PathBuf {
    Path::new(LAYERS).join(path_below_layers(digest))
}

fn path_below_layers(digest: &Digest) -> PathBuf {
    [&digest.hex()[..2], digest.hex(), LAYER_ROOT].iter().collect()
}

/// Whether there is no file, or one that is no manifest. That does not change in a moment.
fn is_no_file(errno: Errno) -> bool {
    matches!(errno, Errno::ENOENT | Errno::ENOTDIR | NOT_REGULAR | Errno::EFBIG)
}

/// Fails unless a repository is mounted at `path`, or a directory with its layout is there.
fn check_mounted(sys: &dyn Sys, path: &Path) -> Result<(), Unavailable> {
    let layers = path.join(LAYERS);
    match sys.stat(&layers) {
        Ok(_) => sys.statfs(&layers).map(drop).map_err(Unavailable::Unreadable),
        // A repository that is new has no layers yet.
        Err(e) if e.errno == Errno::ENOENT => match sys.attribute(path, FQRN_XATTR) {
            Ok(Some(_)) => Ok(()),
            Err(e) if e.is_dead() => Err(Unavailable::Unreadable(e)),
            Ok(None) | Err(_) => Err(Unavailable::NotMounted { repository: path.to_owned() }),
        },
        Err(e) => Err(Unavailable::Unreadable(e)),
    }
}

/// Whether the client lists the attributes that it makes up on every file, and not only on its root. A publisher cannot
/// give `.layers` any.
pub(super) fn lists_own_attributes(sys: &dyn Sys, path: &Path) -> system::Result<bool> {
    let root = sys.open_dir(path)?;
    record_progress();
    let names = match sys.open_below(&root, Path::new(LAYERS)) {
        Ok(layers) => sys.dir_attribute_names(&layers)?,
        Err(e) if e.errno == Errno::ENOENT => Vec::new(),
        Err(e) => return Err(e),
    };
    record_progress();
    Ok(names.iter().any(|name| name == FQRN_XATTR))
}

/// Reads the directory `below_root` of the repository at `path` as far as its first entry.
pub(super) fn list_first_entry(sys: &dyn Sys, path: &Path, below_root: &Path) -> system::Result<()> {
    let root = sys.open_dir(path)?;
    sys.for_each_entry_below(&root, below_root, &mut |_, _| ControlFlow::Break(())).map(drop)
}

/// Asks what the kernel cannot answer from its caches.
pub(super) fn probe(sys: &dyn Sys, path: &Path) -> Result<(), Unavailable> {
    sys.statfs(path).map_err(Unavailable::Unreadable)?;
    check_mounted(sys, path)?;
    // Reading the first names is a question to the server as well.
    sys.for_each_entry(path, &mut |_, _| ControlFlow::Break(())).map_err(Unavailable::Unreadable)
}
