//! Removes a tree, entry by entry as they are read. Each removed entry is progress that a kill does not
//! undo.
#![forbid(unsafe_code)]

use std::ffi::{CStr, CString};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, renameat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::fs::{DirEntry, FileType};

use super::Directory;

/// Removes the tree at `path`. An entry that cannot be removed keeps only itself and those above it; a
/// mount point is one, with EBUSY. ECANCELED if `cancelled` says so. It is asked before each entry, so
/// a caller can also tell others by it that the removal goes on.
pub fn remove(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<(), Errno> {
    let mut top = match Directory::open(path) {
        Ok(top) => top,
        Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::ENOTDIR | Errno::ELOOP) => return unlinkat(AT_FDCWD, path, UnlinkatFlags::NoRemoveDir),
        Err(e) => return Err(e),
    };
    let mut removal = Removal { cancelled, moved: 0, done: 0 };
    loop {
        let before = removal.done;
        let refused = removal.remove_entries(&mut top)?;
        let has_progress = removal.done > before;
        match refused {
            Some(refused) if !has_progress => return Err(refused),
            Some(_) => {}
            None => match unlinkat(AT_FDCWD, path, UnlinkatFlags::RemoveDir) {
                // A removal meanwhile can make the file system pass over an entry, and somebody can
                // add one.
                Err(Errno::ENOTEMPTY | Errno::EEXIST) if has_progress => {}
                Err(Errno::ENOENT) => return Ok(()),
                result => return result,
            },
        }
        top.rewind();
    }
}

struct Removal<'a> {
    cancelled: &'a dyn Fn() -> bool,
    /// The number in the name of the next directory that is moved to the top.
    moved: u64,
    /// Counts entries that were removed or moved to the top.
    done: u64,
}

impl Removal<'_> {
    /// Removes what is in `top`, except what cannot be removed; the result says why the first of these
    /// cannot.
    fn remove_entries(&mut self, top: &mut Directory) -> Result<Option<Errno>, Errno> {
        let mut refused = None;
        while let Some(entry) = top.next_entry()? {
            match self.remove_entry(top, &entry) {
                Err(Errno::ECANCELED) => return Err(Errno::ECANCELED),
                result => refused = refused.or(result.err()),
            }
        }
        Ok(refused)
    }

    /// Removes an entry of `top`. The directories in it are first moved up into `top`, where they
    /// are read later, so that depth costs neither memory nor descriptors.
    fn remove_entry(&mut self, top: &Directory, entry: &DirEntry) -> Result<(), Errno> {
        if self.unlink_or_rmdir(top, entry)? {
            return Ok(());
        }
        let name = entry.file_name();
        // The kernel has just said ENOTEMPTY and not EBUSY: nothing is mounted here.
        let mut directory = top.open_entry(name)?;
        if directory.status()?.st_dev != top.status()?.st_dev {
            return Err(Errno::EBUSY);
        }
        let mut refused = None;
        while let Some(entry) = directory.next_entry()? {
            let result = match self.unlink_or_rmdir(&directory, &entry) {
                Ok(false) => self.move_to_top(&directory, entry.file_name(), top),
                result => result.map(drop),
            };
            match result {
                Err(Errno::ECANCELED) => return Err(Errno::ECANCELED),
                result => refused = refused.or(result.err()),
            }
        }
        unlinkat(top.fd()?, name, UnlinkatFlags::RemoveDir).map_err(|e| refused.unwrap_or(e))?;
        self.done += 1;
        Ok(())
    }

    /// Removes a file or an empty directory; false if it is a directory with entries.
    fn unlink_or_rmdir(&mut self, parent: &Directory, entry: &DirEntry) -> Result<bool, Errno> {
        if (self.cancelled)() {
            return Err(Errno::ECANCELED);
        }
        let parent = parent.fd()?;
        let unlink = |flag| unlinkat(parent, entry.file_name(), flag);
        // The type is that of the time when the entry was read, and not every file system says it.
        let mut result = Err(Errno::EISDIR);
        if entry.file_type() != FileType::Directory {
            result = unlink(UnlinkatFlags::NoRemoveDir);
        }
        if result == Err(Errno::EISDIR) {
            result = unlink(UnlinkatFlags::RemoveDir);
        }
        if result == Err(Errno::ENOTDIR) {
            result = unlink(UnlinkatFlags::NoRemoveDir);
        }
        match result {
            Ok(()) => self.done += 1,
            // It is no progress, because a damaged directory can name for ever what is not there.
            Err(Errno::ENOENT) => {}
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => return Ok(false),
            Err(e) => return Err(e),
        }
        Ok(true)
    }

    /// Moves the directory `name` up into `top`.
    fn move_to_top(&mut self, directory: &Directory, name: &CStr, top: &Directory) -> Result<(), Errno> {
        while !(self.cancelled)() {
            let up = CString::new(format!(".hoisted-{}", self.moved)).unwrap_or_default();
            self.moved += 1;
            match renameat(directory.fd()?, name, top.fd()?, up.as_c_str()) {
                // An entry of that very name is the container's, or a removal left it that was killed.
                Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                result => {
                    self.done += u64::from(result.is_ok());
                    return result;
                }
            }
        }
        Err(Errno::ECANCELED)
    }
}

#[cfg(test)]
mod tests;
