//! Walks over trees that a container made: as deep and as odd as it likes, and changing
//! under our hands. Both walks hold a fixed number of descriptors, never follow a link,
//! name entries relative to an open directory, and never enter another file system.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Removes the tree at `path`. A mount point in it ends the removal with EBUSY.
pub fn remove(path: &Path) -> Result<(), Errno> {
    let mut top = match Dir::open(path, DIRECTORY, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::ENOTDIR | Errno::ELOOP) => return unlinkat(AT_FDCWD, path, UnlinkatFlags::NoRemoveDir),
        Err(e) => return Err(e),
    };
    let mut hoisted = 0_u64;
    loop {
        // One entry that cannot be removed must not keep all the others.
        let mut refused = None;
        let mut left = entries(&mut top)?;
        let (before, found) = (hoisted, left.len());
        left.retain(|entry| match remove_entry(&top, entry, &mut hoisted) {
            Ok(()) => false,
            Err(e) => {
                refused.get_or_insert(e);
                true
            }
        });
        match refused {
            Some(e) if left.len() == found && hoisted == before => return Err(e),
            None if hoisted == before => match unlinkat(AT_FDCWD, path, UnlinkatFlags::RemoveDir) {
                // Somebody has added something meanwhile.
                Err(Errno::ENOTEMPTY | Errno::EEXIST) if found > 0 => {}
                result => return result,
            },
            _ => {}
        }
    }
}

/// Removes an entry of `top`. The directories in it are first moved up into `top`, for a
/// later round, so that depth costs neither stack nor descriptors.
fn remove_entry(top: &Dir, entry: &Entry, hoisted: &mut u64) -> Result<(), Errno> {
    if !remove_flat(top, entry)? {
        return Ok(());
    }
    let name = entry.name.as_c_str();
    // The kernel has just said ENOTEMPTY and not EBUSY: nothing is mounted here.
    let mut directory = Dir::openat(top, name, DIRECTORY, Mode::empty())?;
    if fstat(&directory)?.st_dev != fstat(top)?.st_dev {
        return Err(Errno::EBUSY);
    }
    let mut refused = None;
    for entry in entries(&mut directory)? {
        if let Err(e) = remove_flat(&directory, &entry)
            .and_then(|is_full| if is_full { hoist(&directory, &entry.name, top, hoisted) } else { Ok(()) })
        {
            refused.get_or_insert(e);
        }
    }
    unlinkat(top, name, UnlinkatFlags::RemoveDir).map_err(|e| refused.unwrap_or(e))
}

/// Moves the directory `name` up into `top`.
fn hoist(directory: &Dir, name: &CStr, top: &Dir, hoisted: &mut u64) -> Result<(), Errno> {
    loop {
        let up = CString::new(format!(".hoisted-{hoisted}")).unwrap_or_default();
        match renameat(directory, name, top, up.as_c_str()) {
            Ok(()) => {
                *hoisted += 1;
                return Ok(());
            }
            // The container has an entry of that very name; the next number may be free.
            Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => *hoisted += 1,
            Err(e) => return Err(e),
        }
    }
}

/// Removes a file or an empty directory; true if it is a directory with entries.
fn remove_flat(parent: &Dir, entry: &Entry) -> Result<bool, Errno> {
    let unlink = |flag| match unlinkat(parent, entry.name.as_c_str(), flag) {
        Ok(()) | Err(Errno::ENOENT) => Ok(false),
        Err(e) => Err(e),
    };
    if !entry.seems_directory {
        match unlink(UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {}
            result => return result,
        }
    }
    match unlink(UnlinkatFlags::RemoveDir) {
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(true),
        // It was a directory when the names were read.
        Err(Errno::ENOTDIR) => unlink(UnlinkatFlags::NoRemoveDir),
        result => result,
    }
}

/// Allocated bytes and distinct inodes of the tree at `path`, itself included, as `du`
/// counts them. What vanishes meanwhile is not counted. ECANCELED if `cancelled` says so.
pub fn disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<(u64, u64), Errno> {
    /// A directory that is being read: who it is, and what is still to be looked at.
    struct Level {
        identity: (u64, u64),
        entries: Vec<Entry>,
    }
    let mut current = Dir::open(path, DIRECTORY, Mode::empty())?;
    let status = fstat(&current)?;
    let device = status.st_dev;
    let mut seen = HashSet::from([identity(&status)]);
    let mut bytes = allocated(&status);
    let mut levels = vec![Level { identity: identity(&status), entries: entries(&mut current)? }];
    while let Some(level) = levels.last_mut() {
        let Some(Entry { name, .. }) = level.entries.pop() else {
            levels.pop();
            if let Some(above) = levels.last() {
                current = Dir::openat(&current, c"..", DIRECTORY, Mode::empty())?;
                if identity(&fstat(&current)?) != above.identity {
                    // Moved away while we were in it: there is no way back to the rest.
                    break;
                }
            }
            continue;
        };
        let status = match fstatat(&current, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(status) => status,
            Err(Errno::ENOENT) => continue,
            Err(e) => return Err(e),
        };
        if status.st_dev != device {
            continue;
        }
        if seen.insert(identity(&status)) {
            bytes = bytes.saturating_add(allocated(&status));
        }
        if status.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits() {
            if cancelled() {
                return Err(Errno::ECANCELED);
            }
            match Dir::openat(&current, name.as_c_str(), DIRECTORY, Mode::empty()) {
                Ok(mut directory) => {
                    let identity = identity(&fstat(&directory)?);
                    levels.push(Level { identity, entries: entries(&mut directory)? });
                    current = directory;
                }
                // Removed, or made something else, since.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok((bytes, seen.len() as u64))
}

/// Whether the file system says of what type the entries of a directory are. overlayfs needs
/// that to hide its whiteouts. Asks about the entries of `path`, of which there must be one.
pub fn tells_types(path: &Path) -> Result<bool, Errno> {
    let mut reader = Dir::open(path, DIRECTORY, Mode::empty())?;
    for entry in reader.iter() {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            return Ok(entry.file_type().is_some());
        }
    }
    Ok(true)
}

fn identity(status: &FileStat) -> (u64, u64) {
    (status.st_dev, status.st_ino)
}

fn allocated(status: &FileStat) -> u64 {
    u64::try_from(status.st_blocks).unwrap_or(0).saturating_mul(512)
}

struct Entry {
    name: CString,
    /// As the directory has it, or had it. Not every file system says so.
    seems_directory: bool,
}

/// The entries of an open directory, from its beginning, without `.` and `..`.
fn entries(directory: &mut Dir) -> Result<Vec<Entry>, Errno> {
    let mut entries = Vec::new();
    for entry in directory.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            let seems_directory = entry.file_type() == Some(Type::Directory);
            entries.push(Entry { name: name.to_owned(), seems_directory });
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{open, openat};
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A chain of directories deeper than any path can name.
    fn deep(top: &Path, levels: usize) {
        let mut current = open(top, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..levels {
            nix::sys::stat::mkdirat(&current, c"d", Mode::from_bits_truncate(0o755)).unwrap();
            current = openat(&current, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
    }

    /// A container can make a tree this deep. The walk of the standard library recurses once
    /// for each level: it ran out of stack, and so did every start after that.
    #[test]
    fn a_tree_of_any_depth_is_measured_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        deep(&top, 20_000);
        fs::create_dir_all(top.join(".hoisted-0/x/y")).unwrap();
        fs::write(top.join(".hoisted-1"), "").unwrap();
        let (_, inodes) = disk_usage(&top, &|| false).unwrap();
        assert_eq!(inodes, 20_001 + 4);
        assert_eq!(disk_usage(&top, &|| true), Err(Errno::ECANCELED));
        remove(&top).unwrap();
        assert!(!top.exists());
        remove(&top).unwrap();
    }

    #[test]
    fn one_entry_that_cannot_be_removed_keeps_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        for n in 0..50 {
            fs::create_dir_all(top.join(format!("{n}/deep"))).unwrap();
            fs::write(top.join(format!("{n}/deep/file")), "").unwrap();
        }
        let immutable = |flag: &str, path: &Path| {
            std::process::Command::new("chattr").arg(flag).arg(path).status().is_ok_and(|status| status.success())
        };
        if !immutable("+i", &top.join("7/deep/file")) {
            assert!(std::env::var_os("CI").is_none(), "chattr does not work here");
            eprintln!("SKIPPED: chattr +i does not work on the file system of {}", top.display());
            return;
        }
        assert_eq!(remove(&top), Err(Errno::EPERM));
        let (_, inodes) = disk_usage(&top, &|| false).unwrap();
        assert_eq!(inodes, 3, "the top, one directory and the file");
        let directory = fs::read_dir(&top).unwrap().next().unwrap().unwrap().path();
        assert!(immutable("-i", &directory.join("file")));
        remove(&top).unwrap();
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (top, other) = (dir.path().join("top"), dir.path().join("other"));
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("precious"), vec![1; 100_000]).unwrap();
        symlink(&other, top.join("a/b/link")).unwrap();
        symlink(&other, top.join("link")).unwrap();
        let (bytes, inodes) = disk_usage(&top, &|| false).unwrap();
        assert!(bytes < 100_000 && inodes == 5, "{bytes} {inodes}");
        remove(&top).unwrap();
        symlink(&other, &top).unwrap();
        remove(&top).unwrap();
        assert!(other.join("precious").exists());
    }
}
