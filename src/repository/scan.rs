//! Finds what a published layer holds besides files of the image: the markers.
//!
//! A publisher unpacks the layer's tar as it is, so deletions stay in the form of the OCI
//! image format: `.wh.<name>` deletes `<name>` of the layers below, `.wh..wh..opq` empties
//! its directory of them. Kernel overlayfs knows neither, and no container may see them.
//! `.cvmfscatalog` and `.cvmfsautocatalog` are the publisher's. The rules for odd cases are
//! those of containerd's own unpacking, because its result is what a container is promised
//! to see.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::sys::{FileType, Result, Sys};

/// Mark the root of a nested catalog of CernVM-FS; the second one where the publisher
/// decided by itself to make one.
pub const CATALOG_MARKERS: [&str; 2] = [".cvmfscatalog", ".cvmfsautocatalog"];
/// Counts up whenever the rules below find something else in the same layer: what was kept
/// under older rules is then found anew.
pub const RULES: u32 = 1;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// At the top of a layer, names with this prefix are records of AUFS and mean nothing.
const META_PREFIX: &[u8] = b".wh..wh.";

/// The directories of a layer that hold markers, and their parents; a directory stands
/// after its parent, and the first is the top of the layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub directories: Vec<Directory>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Relative to the top of the layer, empty for the top itself.
    pub path: PathBuf,
    /// Names that the layer deletes from the layers below.
    pub deleted: Vec<OsString>,
    /// Nothing of this directory shows from the layers below.
    pub opaque: bool,
    /// Names in the layer that no container may see.
    pub hidden: Vec<OsString>,
}

/// Walks the directories of the layer at `top`. What is found is a matter of names only:
/// owners and modes look different through another mount of the same repository.
pub fn scan(sys: &dyn Sys, top: &Path) -> Result<Scan> {
    let mut marked: BTreeMap<PathBuf, Directory> = BTreeMap::new();
    marked.insert(PathBuf::new(), Directory::default());
    let mut unread = vec![PathBuf::new()];
    while let Some(path) = unread.pop() {
        let entries = sys.read_dir(&top.join(&path))?;
        let directory = read_markers(&path, &entries);
        for (name, file_type) in &entries {
            if *file_type == FileType::Directory && !is_marker(name) {
                unread.push(path.join(name));
            }
        }
        if directory.opaque || !directory.hidden.is_empty() {
            for parent in path.ancestors().skip(1) {
                marked.entry(parent.to_owned()).or_insert_with(|| Directory::at(parent));
            }
            marked.insert(path, directory);
        }
    }
    Ok(Scan { directories: marked.into_values().collect() })
}

impl Directory {
    fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }
}

fn is_marker(name: &OsStr) -> bool {
    name.as_bytes().starts_with(WHITEOUT_PREFIX)
}

fn read_markers(path: &Path, entries: &[(OsString, FileType)]) -> Directory {
    let is_top = path.as_os_str().is_empty();
    let mut directory = Directory::at(path);
    let mut deleted = Vec::new();
    for (name, file_type) in entries {
        let bytes = name.as_bytes();
        if CATALOG_MARKERS.iter().any(|marker| name == marker) && *file_type == FileType::Other {
            directory.hidden.push(name.clone());
        } else if let Some(target) = bytes.strip_prefix(WHITEOUT_PREFIX) {
            directory.hidden.push(name.clone());
            if is_top && bytes.starts_with(META_PREFIX) {
                // containerd passes over these, an opaque marker among them.
            } else if bytes == OPAQUE_MARKER {
                directory.opaque = true;
            } else if !matches!(target, b"" | b"." | b"..") {
                deleted.push(OsStr::from_bytes(target));
            }
        }
    }
    if !deleted.is_empty() {
        // A name that the layer both deletes and has is simply there: a file hides what is
        // below, and a directory is merged with it, for unpacking it removes the whiteout.
        let present: HashSet<&OsStr> = entries.iter().map(|(name, _)| name.as_os_str()).collect();
        deleted.retain(|name| !present.contains(name));
        directory.deleted = deleted.into_iter().map(OsStr::to_owned).collect();
    }
    directory.hidden.sort();
    directory.deleted.sort();
    directory
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Host;
    use std::fs;

    fn layer(directories: &[&str], files: &[&str]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for directory in directories {
            fs::create_dir_all(top.path().join(directory)).unwrap();
        }
        for file in files {
            fs::write(top.path().join(file), "").unwrap();
        }
        top
    }

    /// `path: -deleted … !hidden … =opaque`, one line a directory.
    fn shown(top: &tempfile::TempDir) -> Vec<String> {
        let scan = scan(&Host, top.path()).unwrap();
        scan.directories
            .iter()
            .map(|d| {
                let mut line = format!("{}:", d.path.display());
                for name in &d.deleted {
                    line = format!("{line} -{}", name.display());
                }
                for name in &d.hidden {
                    line = format!("{line} !{}", name.display());
                }
                line + if d.opaque { " =opaque" } else { "" }
            })
            .collect()
    }

    #[test]
    fn markers_are_found_with_their_parents() {
        let top = layer(
            &["a/b/c", "x/y"],
            &[".cvmfscatalog", "x/.cvmfsautocatalog", "a/b/c/.wh.gone", "a/b/c/kept", "x/y/.wh..wh..opq", "x/f"],
        );
        assert_eq!(
            shown(&top),
            [
                ": !.cvmfscatalog",
                "a:",
                "a/b:",
                "a/b/c: -gone !.wh.gone",
                "x: !.cvmfsautocatalog",
                "x/y: !.wh..wh..opq =opaque"
            ]
        );
    }

    #[test]
    fn a_layer_without_markers_has_only_its_top() {
        assert_eq!(shown(&layer(&["a/b"], &["a/f"])), [":"]);
    }

    #[test]
    fn a_name_that_is_there_is_not_deleted() {
        let top = layer(&["d", "d/dir"], &["d/.wh.file", "d/file", "d/.wh.dir", "d/.wh.gone"]);
        assert_eq!(shown(&top), [":", "d: -gone !.wh.dir !.wh.file !.wh.gone"]);
    }

    #[test]
    fn records_of_aufs_at_the_top_are_hidden_and_mean_nothing() {
        let top = layer(&[".wh..wh.plnk/inner"], &[".wh..wh..opq", ".wh..wh.aufs"]);
        assert_eq!(shown(&top), [": !.wh..wh..opq !.wh..wh.aufs !.wh..wh.plnk"]);
    }

    #[test]
    fn markers_that_name_no_entry_are_only_hidden() {
        let top = layer(&["d"], &["d/.wh.", "d/.wh..", "d/.wh..."]);
        assert_eq!(shown(&top), [":", "d: !.wh. !.wh.. !.wh..."]);
    }

    #[test]
    fn odd_names_are_found() {
        let long = format!("d/.wh.{}", "n".repeat(251));
        let top = layer(&["d"], &["d/.wh.two words", "d/.wh.line\nbreak", &long]);
        let scan = scan(&Host, top.path()).unwrap();
        let deleted: Vec<usize> = scan.directories[1].deleted.iter().map(|n| n.len()).collect();
        assert_eq!(deleted, [10, 251, 9]);
    }

    #[test]
    fn a_directory_named_like_the_catalog_marker_is_the_images_own() {
        assert_eq!(shown(&layer(&[".cvmfscatalog"], &[])), [":"]);
    }
}
