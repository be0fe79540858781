//! Skeletons: the directories that stand above and below an attached layer, with whiteouts for
//! what nobody may see and for what the layer deletes. Each is built beside its place and renamed
//! into it.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::Path;

use super::{Attacher, beside};
use crate::overlay::Mask;
use crate::repository::lane::{Pulse, alive};
use crate::repository::scan::{CATALOG_MARKERS, Directory, Scan};
use crate::sys::{Attributes, Result};

/// A skeleton that is to be built, as far as the repository has a say in it.
pub(super) enum Plan<'a> {
    NotNeeded,
    IsThere,
    Build(Vec<Planned<'a>>),
}

pub(super) struct Planned<'a> {
    directory: &'a Directory,
    attributes: Attributes,
}

impl Attacher {
    /// Reads what a skeleton at `place`, which is needed, is built of, unless it is there.
    pub(super) fn plan<'a>(
        &self,
        place: &Path,
        is_begun: bool,
        source: &Path,
        scan: &'a Scan,
        wanted: impl Fn(&Directory) -> bool,
    ) -> Result<Plan<'a>> {
        let with_parents: HashSet<&Path> =
            scan.directories.iter().filter(|d| wanted(d)).flat_map(|d| d.path.ancestors()).collect();
        if is_begun && self.lstat(place)?.is_some() {
            return Ok(Plan::IsThere);
        }
        let needed = scan.directories.iter().filter(|d| with_parents.contains(d.path.as_path()));
        let planned = needed.map(|directory| {
            alive();
            let mut attributes = self.sys.attributes(&source.join(&directory.path))?;
            if directory.path.as_os_str().is_empty() {
                // containerd passes over what a layer says of its top.
                attributes = Attributes { mode: 0o755, mtime: attributes.mtime, ..Attributes::default() };
            }
            Ok(Planned { directory, attributes })
        });
        Ok(Plan::Build(planned.collect::<Result<_>>()?))
    }

    /// Builds what was planned, unless it is there. False: it is needed, was there when the plan
    /// was made, and is not any more.
    pub(super) fn build(
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
        for Planned { directory, .. } in planned {
            let path = new.join(&directory.path);
            self.sys.create_dir(&path, 0o755)?;
            fill(self, &path, directory, pulse)?;
        }
        // Children first: making an entry changes the time of its directory.
        for Planned { directory, attributes } in planned.iter().rev() {
            pulse.beat();
            self.sys.set_attributes(&new.join(&directory.path), attributes)?;
        }
        self.sys.rename(&new, place)?;
        Ok(true)
    }

    pub(super) fn build_mask(&self, path: &Path, directory: &Directory, pulse: &Pulse) -> Result<()> {
        self.create_whiteouts(path, &directory.hidden, pulse)
    }

    pub(super) fn build_hide(&self, path: &Path, directory: &Directory, pulse: &Pulse) -> Result<()> {
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
