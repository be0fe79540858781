//! Skeletons: the directories that stand above and below an attached layer, with whiteouts for
//! what nobody may see and for what the layer deletes. Each is built beside its place and renamed
//! into it.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::{AttachError, AttachRequest, AttachResult, Attacher, RefusedAttributes, staging_path};
use crate::overlay::MaskContents;
use crate::repository::executor::{record_progress, without_repository};
use crate::repository::scan::{CATALOG_MARKERS, Directory, Scan};
use crate::system::{Attributes, CountedMemory, DirHandle, Error, Result};

/// Extended attributes of the directories of one skeleton, in bytes. A directory of an image has a
/// hundred.
const MAX_ATTRIBUTES: usize = 8 << 20;
/// What is planned for all skeletons that are being made, in bytes.
const MAX_PLANNED: usize = 64 << 20;
/// With so many bytes free, a file system is not full: it does not take the attributes of one directory.
const MIN_FREE: u64 = 1 << 20;

/// One of the two skeletons of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SkeletonKind {
    Mask,
    Hide,
}

impl SkeletonKind {
    fn is_for(self, directory: &Directory) -> bool {
        match self {
            Self::Mask => directory.has_mask(),
            Self::Hide => directory.hides(),
        }
    }
}

/// What is to be done for a skeleton.
pub(super) enum SkeletonPlan {
    Nothing,
    /// To build it of the scan's directories at these indexes, each with these attributes.
    Build {
        directories: Vec<(usize, Attributes)>,
        _memory: CountedMemory,
    },
}

impl Attacher {
    /// Reads what a skeleton at `place` is built of, unless it is there or not needed. A variant that
    /// `is_begun` may have its skeletons.
    pub(super) fn plan(
        &self,
        request: &AttachRequest,
        part: SkeletonKind,
        place: &Path,
        is_begun: bool,
        layer: &DirHandle,
        ignored: &[OsString],
    ) -> Result<SkeletonPlan> {
        if !request.attributes_of_mask(part) || (is_begun && without_repository(|| self.lstat(place))?.is_some()) {
            return Ok(SkeletonPlan::Nothing);
        }
        let scan = &request.scan;
        let mut bytes = 0;
        let mut planned = Vec::new();
        let mut memory = CountedMemory::new(&self.planned);
        for directory in scan.with_parents(|directory| part.is_for(directory)) {
            let path = scan.path(directory);
            let mut attributes = self.sys.attributes_below(layer, &path, ignored)?;
            record_progress();
            if directory == 0 {
                // containerd passes over what a layer says of its top.
                attributes = Attributes { mode: 0o755, mtime: attributes.mtime, ..Attributes::default() };
            }
            let xattrs = size_of_xattrs(&attributes);
            bytes += xattrs;
            if memory.add(size_of::<(usize, Attributes)>() + xattrs) > MAX_PLANNED {
                let call = "hold the attributes of more directories at one time (64 MiB), at";
                return Err(Error { call, path: layer.path().join(path), errno: Errno::ENOMEM });
            }
            if bytes > MAX_ATTRIBUTES {
                return Err(Error {
                    call: "hold more than 8 MiB of attributes of directories, at",
                    path: layer.path().join(path),
                    errno: Errno::E2BIG,
                });
            }
            planned.push((directory, attributes));
        }
        Ok(SkeletonPlan::Build { directories: planned, _memory: memory })
    }

    /// Builds what was planned, unless another thread has done so.
    pub(super) fn build(&self, scan: &Scan, part: SkeletonKind, place: &Path, plan: &SkeletonPlan) -> AttachResult<()> {
        let SkeletonPlan::Build { directories: planned, .. } = plan else { return Ok(()) };
        if self.lstat(place)?.is_some() {
            return Ok(());
        }
        let new = staging_path(place);
        self.sys.remove_tree(&new, &|| false)?;
        for (directory, _) in planned {
            let path = new.join(scan.path(*directory));
            self.sys.create_dir(&path, 0o755)?;
            let directory = &scan.directories[*directory];
            let names = match part {
                SkeletonKind::Mask => &directory.hidden,
                SkeletonKind::Hide => &directory.deleted,
            };
            if part == SkeletonKind::Hide && directory.opaque {
                self.sys.make_opaque(&path)?;
            }
            names.iter().try_for_each(|name| self.sys.create_whiteout(&path.join(name)))?;
        }
        // Children first: making an entry changes the time of its directory.
        for (directory, attributes) in planned.iter().rev() {
            let path = scan.path(*directory);
            self.sys
                .set_attributes(&new.join(&path), attributes)
                .map_err(|e| self.attributes_error(e, path, attributes))?;
        }
        Ok(self.sys.rename(&new, place)?)
    }

    /// Why `directory` cannot have its attributes. ext4 says that no space is left where those of one
    /// directory do not fit into a block.
    fn attributes_error(&self, error: Error, directory: PathBuf, attributes: &Attributes) -> AttachError {
        let is_refused = match error.errno {
            Errno::E2BIG | Errno::ERANGE | Errno::EOPNOTSUPP => true,
            Errno::ENOSPC => self.sys.statfs(self.paths.snapshots_dir()).is_ok_and(|found| found.free >= MIN_FREE),
            _ => false,
        };
        match attributes.xattrs.iter().max_by_key(|(_, value)| value.len()) {
            Some((name, value)) if is_refused => AttachError::Attributes(RefusedAttributes {
                directory,
                bytes: size_of_xattrs(attributes),
                largest: (name.clone(), value.len()),
                errno: error.errno,
            }),
            _ => AttachError::System(error),
        }
    }
}

fn size_of_xattrs(attributes: &Attributes) -> usize {
    attributes.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum()
}

/// What the skeletons of a layer are for: what its mask hides, and whether it hides
/// anything of the layers below.
pub fn skeletons_needed(scan: &Scan) -> (MaskContents, bool) {
    let mut mask = MaskContents::default();
    for (place, directory) in scan.directories.iter().enumerate() {
        let is_top = place == 0;
        mask.others |= directory.has_no_owner;
        for name in &directory.hidden {
            match CATALOG_MARKERS.iter().position(|marker| is_top && name == marker) {
                Some(n) => mask.top_catalogs |= 1 << n,
                None => mask.others = true,
            }
        }
    }
    (mask, scan.needs_hide())
}
