//! Which mounts describe a snapshot. Pure: names paths and touches none.
//!
//! Every lower directory lies below `<root>/snapshotter/snapshots`, so that containerd can shorten the option string:
//! mount data is cut at one page. The uppermost directory of an overlay is always a local one, for two reasons. It is
//! the top of what a container sees, which belongs to root whatever a layer says about its own top. And an overlay of
//! CernVM-FS directories alone cannot be used, because CernVM-FS reports a maximum name length of 0 and overlayfs takes
//! the largest of its layers.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::model::{Digest, Mount, MountKind, SnapshotId};

/// The paths of everything below `snapshots/`. [docs/format.md](../docs/format.md) lists them.
#[derive(Clone, Debug)]
pub struct SnapshotPaths {
    snapshots: PathBuf,
}

/// The directory in `snapshots/<id>` that holds the bind mounts of the layer.
pub const BIND_MOUNTS_DIR: &str = "bound";

impl SnapshotPaths {
    pub fn new(snapshots: PathBuf) -> Self {
        Self { snapshots }
    }

    /// The directory of all snapshots.
    pub fn snapshots_dir(&self) -> &Path {
        &self.snapshots
    }

    /// The directory of one snapshot.
    pub fn snapshot_dir(&self, id: SnapshotId) -> PathBuf {
        self.snapshots.join(id.to_string())
    }

    /// The files of a local snapshot.
    pub fn fs(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join("fs")
    }

    /// The work directory that overlayfs needs for an active snapshot.
    pub fn work(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join("work")
    }

    /// The file from which the row of a local snapshot is rebuilt if the store is lost.
    pub fn sidecar(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join("record")
    }

    /// The link to the attached layer, or to its bind mount.
    pub fn attached_root(&self, id: SnapshotId, variant: SourceVariant) -> PathBuf {
        self.snapshot_dir(id).join(variant.suffixed("fs"))
    }

    pub fn bind_mounts_dir(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join(BIND_MOUNTS_DIR)
    }

    /// The mask: a directory above the layer, with whiteouts for names in the layer that no container may see. The name
    /// is short, because up to 127 masks share one page of mount options.
    pub fn mask(&self, id: SnapshotId, variant: SourceVariant) -> PathBuf {
        self.snapshot_dir(id).join(variant.suffixed("m"))
    }

    /// The hide: a directory below the layer, with whiteouts for what the layer deletes from the layers below.
    pub fn hide(&self, id: SnapshotId, variant: SourceVariant) -> PathBuf {
        self.snapshot_dir(id).join(variant.suffixed("h"))
    }
}

/// Counts the source directories that a layer was attached from. A layer attached from a different source, for example
/// from another repository, is a new variant with its own paths, so that mounts already returned to containerd keep
/// pointing at the variant they were built from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceVariant(pub u32);

impl SourceVariant {
    /// The first variant is the only one of nearly every layer, and has no suffix.
    fn suffixed(self, name: &str) -> String {
        if self.0 == 0 { name.to_owned() } else { format!("{name}{}", self.0) }
    }
}

/// The names that the mask of a layer covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaskContents {
    /// The publisher's catalog markers at the top of the layer, one bit for each name. Nearly every layer has one marker
    /// there and nothing else to hide. One mask then serves all remote layers below it, down to the next local one.
    pub top_catalogs: u8,
    /// Whether the mask hides anything else.
    pub others: bool,
}

/// The directories of whiteouts that a layer needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SkeletonNeeds {
    pub mask: MaskContents,
    /// Whether the layer deletes anything, and so needs a hide where layers lie below it.
    pub hide: bool,
}

/// One committed snapshot of a chain, as overlayfs is to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChainEntry {
    Local(SnapshotId),
    Remote { id: SnapshotId, variant: SourceVariant, digest: Digest, mask: MaskContents, needs_hide: bool },
}

/// How a snapshot of a chain appears among the lower directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerUse {
    WithMask,
    WithoutMask,
    /// The snapshot is left out, because an equal layer stands above it.
    Omitted,
}

/// The use of each snapshot of `chain`, uppermost first.
pub fn layer_uses(chain: &[ChainEntry]) -> Vec<LayerUse> {
    let mut masked_catalogs = 0;
    let mut digests = HashSet::new();
    let mut uses = Vec::with_capacity(chain.len());
    for entry in chain {
        uses.push(match entry {
            ChainEntry::Local(_) => {
                masked_catalogs = 0;
                LayerUse::WithoutMask
            }
            // Overlayfs refuses the same directory twice, and the upper one of two equal layers provides and hides
            // everything that the lower one does.
            ChainEntry::Remote { digest, .. } if !digests.insert(digest) => LayerUse::Omitted,
            ChainEntry::Remote { mask, .. } if mask.others || mask.top_catalogs & !masked_catalogs != 0 => {
                masked_catalogs |= mask.top_catalogs;
                LayerUse::WithMask
            }
            ChainEntry::Remote { .. } => LayerUse::WithoutMask,
        });
    }
    uses
}

/// The lower directories of a chain, as overlayfs takes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LowerDirectories {
    /// The paths, uppermost first, separated by colons.
    joined: String,
    count: usize,
    /// Whether the uppermost directory is a published one, so that a local one is needed above it.
    is_published: bool,
}

impl LowerDirectories {
    /// The directories of `chain`, uppermost snapshot first.
    pub fn of_chain(paths: &SnapshotPaths, chain: &[ChainEntry]) -> Self {
        let uses = layer_uses(chain);
        let mut directories: Vec<String> = Vec::new();
        let mut add = |path: PathBuf| directories.push(path.display().to_string());
        for (entry, layer_use) in chain.iter().zip(&uses) {
            match entry {
                ChainEntry::Local(id) => add(paths.fs(*id)),
                ChainEntry::Remote { .. } if *layer_use == LayerUse::Omitted => {}
                ChainEntry::Remote { id, variant, needs_hide, .. } => {
                    if *layer_use == LayerUse::WithMask {
                        add(paths.mask(*id, *variant));
                    }
                    add(paths.attached_root(*id, *variant));
                    if *needs_hide {
                        add(paths.hide(*id, *variant));
                    }
                }
            }
        }
        let is_published = matches!(chain.first(), Some(ChainEntry::Remote { .. }))
            && uses.first().is_some_and(|first| *first == LayerUse::WithoutMask);
        Self { joined: directories.join(":"), count: directories.len(), is_published }
    }

    /// The mount option. `uppermost`, if given, stands above all directories of the chain.
    fn option(&self, uppermost: Option<&Path>) -> String {
        match uppermost {
            Some(uppermost) => format!("lowerdir={}:{}", uppermost.display(), self.joined),
            None => format!("lowerdir={}", self.joined),
        }
    }
}

/// The mounts of the active snapshot `id` on `lower`. `options` are added to every overlay.
///
/// `uidmap=` and `gidmap=` are never among the options: FUSE file systems cannot be id-mapped, and containerd has
/// shifted the owners already, unless it was configured not to.
pub fn active(paths: &SnapshotPaths, id: SnapshotId, lower: &LowerDirectories, options: &[String]) -> Vec<Mount> {
    if lower.count == 0 {
        return bind(&paths.fs(id), "rw");
    }
    let own = [
        format!("workdir={}", paths.work(id).display()),
        format!("upperdir={}", paths.fs(id).display()),
        lower.option(None),
    ];
    overlay(&own, options)
}

/// The mounts of the view `id` on `lower`. `options` are added to every overlay.
pub fn view(paths: &SnapshotPaths, id: SnapshotId, lower: &LowerDirectories, options: &[String]) -> Vec<Mount> {
    let own = paths.fs(id);
    match lower.count {
        0 => bind(&own, "ro"),
        1 if !lower.is_published => bind(Path::new(&lower.joined), "ro"),
        _ => overlay(&[lower.option(lower.is_published.then_some(&own))], options),
    }
}

fn bind(source: &Path, access: &str) -> Vec<Mount> {
    let options = vec![access.to_owned(), "rbind".to_owned()];
    vec![Mount { kind: MountKind::Bind, source: source.display().to_string(), options }]
}

fn overlay(own: &[String], options: &[String]) -> Vec<Mount> {
    vec![Mount { kind: MountKind::Overlay, source: "overlay".to_owned(), options: [own, options].concat() }]
}

#[cfg(test)]
mod tests;
