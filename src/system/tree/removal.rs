//! Removes a tree. Entries are removed as they are read, so a process that is killed has made progress.
#![forbid(unsafe_code)]

use std::ffi::{CStr, CString};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, renameat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::fs::{DirEntry, FileType};

use super::Directory;

/// Removes the tree at `path`. If an entry cannot be removed, such as a mount point (EBUSY), it stays with the directories
/// above it, and everything else is removed. `cancelled` is called before each entry, so it also shows the progress; if
/// it returns true, the error is ECANCELED.
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
        let first_error = removal.remove_entries(&mut top)?;
        let has_progress = removal.done > before;
        match first_error {
            Some(error) if !has_progress => return Err(error),
            Some(_) => {}
            None => match unlinkat(AT_FDCWD, path, UnlinkatFlags::RemoveDir) {
                // The removal of an entry can make the file system skip another one, and a container can add one.
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
    /// Number of directories that were moved to the top. It makes their names unique.
    moved: u64,
    /// Number of entries that were removed or moved to the top.
    done: u64,
}

impl Removal<'_> {
    /// Removes the entries of `top`. Returns the first error; entries that fail are passed over.
    fn remove_entries(&mut self, top: &mut Directory) -> Result<Option<Errno>, Errno> {
        let mut first_error = None;
        while let Some(entry) = top.next_entry()? {
            match self.remove_entry(top, &entry) {
                Err(Errno::ECANCELED) => return Err(Errno::ECANCELED),
                result => first_error = first_error.or(result.err()),
            }
        }
        Ok(first_error)
    }

    /// Removes an entry of `top`. Directories in it are first moved up into `top`, where they are read later, so that a
    /// deep tree needs neither memory nor descriptors for its levels.
    fn remove_entry(&mut self, top: &Directory, entry: &DirEntry) -> Result<(), Errno> {
        if self.unlink_or_rmdir(top, entry)? {
            return Ok(());
        }
        let name = entry.file_name();
        // The kernel has answered ENOTEMPTY instead of EBUSY, so nothing is mounted here.
        let mut directory = top.open_entry(name)?;
        if directory.status()?.st_dev != top.status()?.st_dev {
            return Err(Errno::EBUSY);
        }
        let mut first_error = None;
        while let Some(entry) = directory.next_entry()? {
            let result = match self.unlink_or_rmdir(&directory, &entry) {
                Ok(false) => self.move_to_top(&directory, entry.file_name(), top),
                result => result.map(drop),
            };
            match result {
                Err(Errno::ECANCELED) => return Err(Errno::ECANCELED),
                result => first_error = first_error.or(result.err()),
            }
        }
        unlinkat(top.fd()?, name, UnlinkatFlags::RemoveDir).map_err(|e| first_error.unwrap_or(e))?;
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
        // The type may have changed since the entry was read, and not every file system stores it.
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
            // This is no progress: a damaged directory can list an entry for ever that does not exist.
            Err(Errno::ENOENT) => {}
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => return Ok(false),
            Err(e) => return Err(e),
        }
        Ok(true)
    }

    /// Moves the directory `name` up into `top`.
    fn move_to_top(&mut self, directory: &Directory, name: &CStr, top: &Directory) -> Result<(), Errno> {
        while !(self.cancelled)() {
            let new_name = CString::new(format!(".hoisted-{}", self.moved)).unwrap_or_default();
            self.moved += 1;
            match renameat(directory.fd()?, name, top.fd()?, new_name.as_c_str()) {
                // The container made an entry of this name, or a killed removal left it.
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
