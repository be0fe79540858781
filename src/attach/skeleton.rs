//! Skeletons: the two directories of whiteouts that an attached layer may need, its mask and its hide.
//!
//! A skeleton repeats those directories of the layer that whiteouts belong into, with their attributes, because overlayfs
//! shows a directory with the attributes of its uppermost copy.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::{AttachError, AttachResult, Attacher, RefusedAttributes, staging_path};
use crate::overlay::SkeletonNeeds;
use crate::repository::executor::record_progress;
use crate::repository::scan::{CATALOG_MARKERS, Directory, Scan};
use crate::system::{Attributes, CountedMemory, DirHandle, Error, Result};

/// Maximum size of the extended attributes of all directories of one skeleton, in bytes. A directory of an image has
/// about a hundred.
const MAX_ATTRIBUTES: usize = 8 << 20;
/// Maximum size of the plans of all skeletons that are being built, in bytes.
const MAX_PLANNED: usize = 64 << 20;
/// With this many bytes free, a file system is not full: ENOSPC then means that it does not take the attributes of one
/// directory.
const MIN_FREE: u64 = 1 << 20;

/// The two skeletons of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SkeletonKind {
    /// The directory of whiteouts above the layer. It hides names in the layer that no container may see, such as the
    /// markers of deletions, and shows another owner for directories that have none.
    Mask,
    /// The directory of whiteouts below the layer. It hides what the layer deletes from the layers below.
    Hide,
}

impl SkeletonKind {
    fn includes(self, directory: &Directory) -> bool {
        match self {
            Self::Mask => directory.has_mask(),
            Self::Hide => directory.hides(),
        }
    }

    /// The names in `directory` that get a whiteout.
    fn whiteouts(self, directory: &Directory) -> &[OsString] {
        match self {
            Self::Mask => &directory.hidden,
            Self::Hide => &directory.deleted,
        }
    }
}

/// The work that a skeleton needs.
pub(super) enum SkeletonPlan {
    Nothing,
    Build { directories: Vec<PlannedDirectory>, _memory: CountedMemory },
}

/// A directory of the layer that the skeleton repeats.
pub(super) struct PlannedDirectory {
    /// The index of the directory in the scan.
    index: usize,
    attributes: Attributes,
}

impl Attacher {
    /// Reads the attributes of the directories that a skeleton of the open `layer` repeats.
    pub(super) fn plan_skeleton(
        &self,
        scan: &Scan,
        kind: SkeletonKind,
        layer: &DirHandle,
        ignored: &[OsString],
    ) -> Result<SkeletonPlan> {
        let mut bytes = 0;
        let mut directories = Vec::new();
        let mut memory = CountedMemory::new(&self.planned);
        for index in scan.with_parents(|directory| kind.includes(directory)) {
            let path = scan.path(index);
            let mut attributes = self.sys.attributes_below(layer, &path, ignored)?;
            record_progress();
            if index == 0 {
                // containerd ignores what a layer says about its own top.
                attributes = Attributes { mode: 0o755, mtime: attributes.mtime, ..Attributes::default() };
            }
            let xattrs = xattrs_size(&attributes);
            bytes += xattrs;
            let exceeded = |call, errno| Err(Error { call, path: layer.path().join(&path), errno });
            if memory.add(size_of::<PlannedDirectory>() + xattrs) > MAX_PLANNED {
                return exceeded("hold the attributes of more directories at one time (64 MiB), at", Errno::ENOMEM);
            }
            if bytes > MAX_ATTRIBUTES {
                return exceeded("hold more than 8 MiB of attributes of directories, at", Errno::E2BIG);
            }
            directories.push(PlannedDirectory { index, attributes });
        }
        Ok(SkeletonPlan::Build { directories, _memory: memory })
    }

    /// Builds a planned skeleton at `path`, unless another thread has done so since it was planned.
    pub(super) fn build_skeleton(
        &self,
        scan: &Scan,
        kind: SkeletonKind,
        path: &Path,
        plan: &SkeletonPlan,
    ) -> AttachResult<()> {
        let SkeletonPlan::Build { directories, .. } = plan else { return Ok(()) };
        if self.exists(path)? {
            return Ok(());
        }
        let staging = staging_path(path);
        self.sys.remove_tree(&staging, &|| false)?;
        for planned in directories {
            let directory = &scan.directories[planned.index];
            let copy = staging.join(scan.path(planned.index));
            self.sys.create_dir(&copy, 0o755)?;
            if kind == SkeletonKind::Hide && directory.opaque {
                self.sys.make_opaque(&copy)?;
            }
            for name in kind.whiteouts(directory) {
                self.sys.create_whiteout(&copy.join(name))?;
            }
        }
        // Children come first, because making an entry changes the time of its directory.
        for planned in directories.iter().rev() {
            let directory = scan.path(planned.index);
            if let Err(e) = self.sys.set_attributes(&staging.join(&directory), &planned.attributes) {
                return Err(self.attributes_error(e, directory, &planned.attributes));
            }
        }
        Ok(self.sys.rename(&staging, path)?)
    }

    /// The error for a `directory` that cannot have its attributes. ext4 reports ENOSPC where the attributes of one
    /// directory do not fit into a block.
    fn attributes_error(&self, error: Error, directory: PathBuf, attributes: &Attributes) -> AttachError {
        let is_refused = match error.errno {
            Errno::E2BIG | Errno::ERANGE | Errno::EOPNOTSUPP => true,
            Errno::ENOSPC => self.sys.statfs(self.paths.snapshots_dir()).is_ok_and(|status| status.free >= MIN_FREE),
            _ => false,
        };
        match attributes.xattrs.iter().max_by_key(|(_, value)| value.len()) {
            Some((name, value)) if is_refused => AttachError::Attributes(RefusedAttributes {
                directory,
                bytes: xattrs_size(attributes),
                largest: (name.clone(), value.len()),
                errno: error.errno,
            }),
            _ => AttachError::System(error),
        }
    }
}

/// Size of all extended attributes with their names, in bytes.
fn xattrs_size(attributes: &Attributes) -> usize {
    attributes.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum()
}

/// The skeletons that a layer with this scan needs.
pub fn skeleton_needs(scan: &Scan) -> SkeletonNeeds {
    let mut needs = SkeletonNeeds { hide: scan.needs_hide(), ..SkeletonNeeds::default() };
    for (index, directory) in scan.directories.iter().enumerate() {
        let is_top = index == 0;
        needs.mask.others |= directory.has_no_owner;
        for name in &directory.hidden {
            match CATALOG_MARKERS.iter().position(|marker| is_top && name == marker) {
                Some(bit) => needs.mask.top_catalogs |= 1 << bit,
                None => needs.mask.others = true,
            }
        }
    }
    needs
}
