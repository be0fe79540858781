//! Which mounts describe a snapshot. Pure: it names paths, it touches none.
//!
//! Every lower directory lies below `<root>/snapshotter/snapshots`, so that containerd can
//! shorten the option string: mount data is cut at one page. The uppermost directory of an overlay
//! is always a local one. It is the top of what a container sees, which is root's, whatever a layer
//! says of its own top; and an overlay of CernVM-FS alone cannot be used, because its maximum name
//! length is 0 and overlayfs takes the largest of its layers.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::model::{Digest, Mount, MountKind, SnapshotId};

/// The directories of a snapshot, `snapshots/<id>/…`.
#[derive(Clone, Debug)]
pub struct SnapshotPaths {
    snapshots: PathBuf,
}

/// Holds the bind mounts that paths lead to: in `snapshots/<id>`, where there are any.
pub const BIND_MOUNTS_DIR: &str = "bound";

impl SnapshotPaths {
    pub fn new(snapshots: PathBuf) -> Self {
        Self { snapshots }
    }

    pub fn snapshots_dir(&self) -> &Path {
        &self.snapshots
    }

    pub fn snapshot_dir(&self, id: SnapshotId) -> PathBuf {
        self.snapshots.join(id.to_string())
    }

    /// The files: a local snapshot's own, or where a published layer is attached.
    pub fn fs(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join("fs")
    }

    /// Overlayfs's scratch directory, of an active snapshot.
    pub fn work(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join("work")
    }

    /// What makes the row of a local snapshot again, should the store be lost.
    pub fn record(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join("record")
    }

    /// Where a published layer is attached.
    pub fn attached_root(&self, id: SnapshotId, variant: SourceVariant) -> PathBuf {
        self.snapshot_dir(id).join(variant.suffixed("fs"))
    }

    pub fn bind_mounts_dir(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_dir(id).join(BIND_MOUNTS_DIR)
    }

    /// The skeleton above it: whiteouts for names nobody may see. Its name is short because up to
    /// 127 of them share one page of mount options.
    pub fn mask(&self, id: SnapshotId, variant: SourceVariant) -> PathBuf {
        self.snapshot_dir(id).join(variant.suffixed("m"))
    }

    /// The skeleton below an attached layer: what the layer deletes from those below.
    pub fn hide(&self, id: SnapshotId, variant: SourceVariant) -> PathBuf {
        self.snapshot_dir(id).join(variant.suffixed("h"))
    }
}

/// The same layer from another source, another repository say, is another variant, with paths
/// of its own: what somebody was told to mount stays as it was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceVariant(pub u32);

impl SourceVariant {
    /// Of `name`. The first one, which is the only one of nearly every layer, has no number.
    fn suffixed(self, name: &str) -> String {
        if self.0 == 0 { name.to_owned() } else { format!("{name}{}", self.0) }
    }
}

/// What the mask of a layer hides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaskContents {
    /// Of the publisher's catalog markers, those at the top of the layer: one bit each.
    /// Nearly every layer has one there and nothing else; one mask then does for all remote
    /// layers below it, down to the next local one.
    pub top_catalogs: u8,
    /// Anything else, anywhere.
    pub others: bool,
}

/// One committed snapshot of a chain, as overlayfs is to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChainEntry {
    Local(SnapshotId),
    Remote { id: SnapshotId, variant: SourceVariant, digest: Digest, mask: MaskContents, hides: bool },
}

/// What of one snapshot stands among the lower directories of its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerUse {
    Masked,
    Unmasked,
    /// Nothing: an equal layer stands above.
    Not,
}

/// What of each snapshot is shown in a chain, uppermost first.
pub fn layer_uses(chain: &[ChainEntry]) -> Vec<LayerUse> {
    let mut masked_catalogs = 0;
    let mut named = HashSet::new();
    let one = |lower| match lower {
        &ChainEntry::Local(_) => {
            masked_catalogs = 0;
            LayerUse::Unmasked
        }
        // Overlayfs refuses the same directory twice, and the upper of two equal layers
        // already provides, and hides, everything that the lower one does.
        ChainEntry::Remote { digest, .. } if !named.insert(digest) => LayerUse::Not,
        ChainEntry::Remote { mask, .. } if mask.others || mask.top_catalogs & !masked_catalogs != 0 => {
            masked_catalogs |= mask.top_catalogs;
            LayerUse::Masked
        }
        ChainEntry::Remote { .. } => LayerUse::Unmasked,
    };
    chain.iter().map(one).collect()
}

/// The lower directories of a chain, as overlayfs takes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LowerDirectories {
    /// Uppermost first, with colons between them.
    joined: String,
    count: usize,
    /// The uppermost is a published one.
    is_published: bool,
}

impl LowerDirectories {
    /// The option that names them, `uppermost` above all others if there is one.
    fn option(&self, uppermost: Option<&Path>) -> String {
        match uppermost {
            Some(uppermost) => format!("lowerdir={}:{}", uppermost.display(), self.joined),
            None => format!("lowerdir={}", self.joined),
        }
    }
}

/// Names the lower directories of `chain`, whose uppermost snapshot is the first.
pub fn lower_directories(paths: &SnapshotPaths, chain: &[ChainEntry]) -> LowerDirectories {
    let mut directories = Vec::new();
    let uses = layer_uses(chain);
    for (lower, layer_use) in chain.iter().zip(&uses) {
        let (id, variant, hides) = match lower {
            ChainEntry::Local(id) => (*id, SourceVariant::default(), false),
            ChainEntry::Remote { id, variant, hides, .. } => (*id, *variant, *hides),
        };
        if *layer_use == LayerUse::Not {
            continue;
        }
        if *layer_use == LayerUse::Masked {
            directories.push(paths.mask(id, variant));
        }
        directories.push(paths.attached_root(id, variant));
        if hides {
            directories.push(paths.hide(id, variant));
        }
    }
    let is_published =
        matches!((chain.first(), uses.first()), (Some(ChainEntry::Remote { .. }), Some(LayerUse::Unmasked)));
    let directories: Vec<String> =
        directories.iter().map(|directory: &PathBuf| directory.display().to_string()).collect();
    LowerDirectories { joined: directories.join(":"), count: directories.len(), is_published }
}

/// The mounts of an active snapshot `id` over `lower`; `options` go to every overlay.
///
/// `uidmap=` and `gidmap=` are never among them: FUSE file systems cannot be mapped, and
/// containerd has shifted the owners already where it was not told otherwise.
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

/// The mounts of a view `id` of `lower`.
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
mod tests {
    use super::*;

    fn remote(id: u64, digit: char, mask: MaskContents, hides: bool) -> ChainEntry {
        let digest = Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap();
        ChainEntry::Remote { id: SnapshotId(id), variant: SourceVariant(0), digest, mask, hides }
    }

    fn local(id: u64) -> ChainEntry {
        ChainEntry::Local(SnapshotId(id))
    }

    const PLAIN: MaskContents = MaskContents { top_catalogs: 0, others: false };
    const TOP: MaskContents = MaskContents { top_catalogs: 1, others: false };
    const AUTO: MaskContents = MaskContents { top_catalogs: 3, others: false };
    const FULL: MaskContents = MaskContents { top_catalogs: 1, others: true };
    const MARKERS: MaskContents = MaskContents { top_catalogs: 0, others: true };

    fn paths() -> SnapshotPaths {
        SnapshotPaths::new("/s".into())
    }

    fn lower(chain: &[ChainEntry]) -> String {
        lower_directories(&paths(), chain).joined.replace("/s/", "")
    }

    #[test]
    fn the_lower_directories_of_a_chain() {
        for (chain, expected) in [
            (vec![local(2), local(1)], "2/fs:1/fs"),
            (vec![remote(2, 'b', PLAIN, false), remote(1, 'a', PLAIN, false)], "2/fs:1/fs"),
            (vec![remote(2, 'b', TOP, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/fs"),
            (vec![remote(2, 'b', TOP, false), local(1)], "2/m:2/fs:1/fs"),
            (vec![remote(3, 'c', TOP, true), remote(2, 'b', FULL, true)], "3/m:3/fs:3/h:2/m:2/fs:2/h"),
            (vec![remote(2, 'b', TOP, false), remote(1, 'a', AUTO, false)], "2/m:2/fs:1/m:1/fs"),
            (vec![remote(2, 'b', AUTO, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/fs"),
            (vec![remote(2, 'b', MARKERS, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/m:1/fs"),
            (vec![remote(2, 'b', FULL, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/fs"),
            (vec![remote(3, 'c', TOP, false), local(2), remote(1, 'a', TOP, false)], "3/m:3/fs:2/fs:1/m:1/fs"),
            (
                vec![remote(4, 'a', TOP, false), remote(3, 'b', TOP, false), remote(2, 'a', TOP, false), local(1)],
                "4/m:4/fs:3/fs:1/fs",
            ),
        ] {
            assert_eq!(lower(&chain), expected);
        }
    }

    fn text(mounts: &[Mount]) -> String {
        let [mount] = mounts else { panic!("one mount describes a snapshot") };
        format!("{} {} {}", mount.kind.as_str(), mount.source, mount.options.join(","))
    }

    #[test]
    fn mounts_follow_the_table_of_the_contract() {
        let (paths, id) = (paths(), SnapshotId(9));
        let options = ["index=off".to_owned()];
        let none = lower_directories(&paths, &[]);
        let one = lower_directories(&paths, &[local(1)]);
        let two = lower_directories(&paths, &[local(2), local(1)]);
        for (mounts, expected) in [
            (active(&paths, id, &none, &options), "bind /s/9/fs rw,rbind"),
            (view(&paths, id, &none, &options), "bind /s/9/fs ro,rbind"),
            (view(&paths, id, &one, &options), "bind /s/1/fs ro,rbind"),
            (view(&paths, id, &two, &options), "overlay overlay lowerdir=/s/2/fs:/s/1/fs,index=off"),
            (
                active(&paths, id, &one, &options),
                "overlay overlay workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/1/fs,index=off",
            ),
        ] {
            assert_eq!(text(&mounts), expected);
        }
    }

    #[test]
    fn the_longest_chain_fits_into_a_page() {
        let chain: Vec<ChainEntry> = (0..127)
            .map(|n| {
                let digest = Digest::parse(&format!("sha256:{n:064x}")).unwrap();
                ChainEntry::Remote {
                    id: SnapshotId(999_000 + n),
                    variant: SourceVariant(0),
                    digest,
                    mask: FULL,
                    hides: true,
                }
            })
            .collect();
        // As containerd shortens it: relative to the directory of all snapshots.
        let paths = SnapshotPaths::new("/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots".into());
        let mounts = active(&paths, SnapshotId(999_999), &lower_directories(&paths, &chain), &["index=off".to_owned()]);
        let shortened = text(&mounts)
            .replace("/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots/999999", "UPPER")
            .replace("/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots/", "")
            .replace("UPPER", "/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots/999999");
        assert!(shortened.len() < 4000, "{}", shortened.len());
    }

    #[test]
    fn the_uppermost_directory_of_a_view_is_always_local() {
        let view =
            |chain: &[ChainEntry]| text(&view(&paths(), SnapshotId(9), &lower_directories(&paths(), chain), &[]));
        let plain = [remote(2, 'b', PLAIN, false), remote(1, 'a', PLAIN, false)];
        assert_eq!(view(&plain), "overlay overlay lowerdir=/s/9/fs:/s/2/fs:/s/1/fs");
        assert_eq!(view(&plain[..1]), "overlay overlay lowerdir=/s/9/fs:/s/2/fs");
        assert_eq!(view(&[remote(2, 'b', PLAIN, false), local(1)]), "overlay overlay lowerdir=/s/9/fs:/s/2/fs:/s/1/fs");
        assert_eq!(view(&[remote(2, 'b', TOP, false)]), "overlay overlay lowerdir=/s/2/m:/s/2/fs");
        // Equal layers leave one directory.
        let equal = [remote(2, 'b', PLAIN, false), remote(1, 'b', PLAIN, false)];
        assert_eq!(view(&equal), "overlay overlay lowerdir=/s/9/fs:/s/2/fs");
    }
}
