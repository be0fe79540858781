//! Measures what a tree takes on disk, while containers may change it.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, SFlag, fstatat};
use nix::sys::statvfs::statvfs;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use super::Directory;

/// Maximum number of times that a tree is measured if it changes.
const MAX_WALKS: usize = 3;
/// Number of directories that are open: the deepest on the path to the current one.
const MAX_OPEN: usize = 8;
/// Maximum number of directories above the open ones. An inode number and a position are kept for each, which makes
/// 4 MiB. A path can name 2048 levels.
const MAX_CLOSED: usize = 1 << 18;
/// Maximum number of groups of 64 inode numbers. A table of 2^18 places, 4.5 MiB, takes this many before it grows.
const MAX_LINK_GROUPS: usize = 7 << 15;
/// Number of entries between two calls of `cancelled`.
const CANCEL_INTERVAL: u64 = 256;

/// What a tree takes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Allocated bytes.
    pub bytes: u64,
    pub inodes: u64,
    /// Whether no directory of the tree was changed while it was measured.
    pub is_stable: bool,
}

/// Allocated bytes and distinct inodes of the tree at `path`, itself included, as `du` counts them. If `cancelled` returns
/// true, the error is ECANCELED.
///
/// Everything that stays at its path during the walk is counted, whatever else happens in the tree, and each bound on
/// memory makes the result larger, never smaller:
///
/// - Entries that are created or removed during the walk may be counted or not. An entry that is moved may be counted
///   twice; or not at all, if it moves from a directory that was not read yet to one that was. The change time of that
///   directory shows it, and the tree is measured again, at most three times in all. The result is that of a walk that
///   nothing disturbed, or else the largest one. (An entry that is moved at the right moment in each walk is hidden.)
/// - Inodes with more than one name are remembered in 229,376 groups of 64 neighbours. An inode that finds no room there
///   is counted once for each of its names.
/// - If the tree is deeper than 262,152 directories, the result is what the whole file system has in use.
pub fn disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<DiskUsage, Errno> {
    let mut largest = DiskUsage::default();
    for _ in 0..MAX_WALKS {
        let mut walk = UsageWalk::begin(path, cancelled)?;
        let is_whole = walk.run()?;
        let usage = if is_whole { walk.usage } else { usage_of_file_system(path)? };
        if usage.is_stable {
            return Ok(usage);
        }
        largest.bytes = largest.bytes.max(usage.bytes);
        largest.inodes = largest.inodes.max(usage.inodes);
        if !is_whole {
            break;
        }
        // A change in the same tick of this clock as the beginning of a walk looks like one during that walk.
        let now = change_clock()?;
        while change_clock()? == now {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(largest)
}

/// The clock with which file systems stamp changes. It ticks 100 to 1000 times in a second.
fn change_clock() -> Result<TimeSpec, Errno> {
    clock_gettime(ClockId::CLOCK_REALTIME_COARSE)
}

fn usage_of_file_system(path: &Path) -> Result<DiskUsage, Errno> {
    let status = statvfs(path)?;
    let blocks = status.blocks().saturating_sub(status.blocks_free());
    let bytes = blocks.saturating_mul(status.fragment_size());
    Ok(DiskUsage { bytes, inodes: status.files().saturating_sub(status.files_free()), is_stable: false })
}

/// The position of the walk in a directory.
#[derive(Clone, Copy)]
struct Position {
    inode: u64,
    /// Offset of the entry after which the walk continues, in the file system's numbering. 0: it begins.
    offset: i64,
}

struct OpenDirectory {
    directory: Directory,
    position: Position,
}

impl OpenDirectory {
    /// Continues in a directory at the position of the walk.
    fn resume(mut directory: Directory, position: Position) -> Result<Self, Errno> {
        directory.seek(position.offset)?;
        Ok(Self { directory, position })
    }
}

struct UsageWalk<'a> {
    top: &'a Path,
    cancelled: &'a dyn Fn() -> bool,
    device: u64,
    /// When the walk began. A change during the walk has this time or a later one.
    start: TimeSpec,
    /// The path from the top to the current directory: first the directories that are not open any more,
    closed: Vec<Position>,
    /// then the deepest ones, which are open.
    open: VecDeque<OpenDirectory>,
    linked: LinkedInodes,
    usage: DiskUsage,
    entries: u64,
}

impl<'a> UsageWalk<'a> {
    fn begin(top: &'a Path, cancelled: &'a dyn Fn() -> bool) -> Result<Self, Errno> {
        let start = change_clock()?;
        let directory = Directory::open(top)?;
        let status = directory.status()?;
        let mut walk = Self {
            top,
            cancelled,
            device: status.st_dev,
            start,
            closed: Vec::new(),
            open: VecDeque::with_capacity(MAX_OPEN),
            linked: LinkedInodes::default(),
            usage: DiskUsage { is_stable: true, ..DiskUsage::default() },
            entries: 0,
        };
        walk.count(&status);
        walk.open.push_back(OpenDirectory { directory, position: Position { inode: status.st_ino, offset: 0 } });
        Ok(walk)
    }

    /// Walks over the whole tree. Returns false if it is too deep.
    fn run(&mut self) -> Result<bool, Errno> {
        while let Some(current) = self.open.back_mut() {
            let Some(entry) = current.directory.next_entry()? else {
                self.leave()?;
                continue;
            };
            current.position.offset = entry.offset();
            let name = entry.file_name();
            let status = match fstatat(current.directory.fd()?, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(status) => status,
                Err(Errno::ENOENT) => continue,
                Err(e) => return Err(e),
            };
            if status.st_dev != self.device {
                continue;
            }
            if is_directory(&status) {
                self.count(&status);
                if !self.enter(name)? {
                    return Ok(false);
                }
            } else if status.st_nlink < 2 || self.linked.insert(status.st_ino) {
                self.count(&status);
            }
            self.entries += 1;
            if self.entries.is_multiple_of(CANCEL_INTERVAL) {
                self.check_cancelled()?;
            }
        }
        Ok(true)
    }

    fn count(&mut self, status: &FileStat) {
        let allocated = u64::try_from(status.st_blocks).unwrap_or(0).saturating_mul(512);
        self.usage.bytes = self.usage.bytes.saturating_add(allocated);
        self.usage.inodes += 1;
    }

    fn check_cancelled(&self) -> Result<(), Errno> {
        if (self.cancelled)() { Err(Errno::ECANCELED) } else { Ok(()) }
    }

    /// Goes down into a directory. Returns false if it is too deep.
    fn enter(&mut self, name: &CStr) -> Result<bool, Errno> {
        self.check_cancelled()?;
        let Some(current) = self.open.back() else { return Ok(true) };
        let directory = match current.directory.open_entry(name) {
            Ok(directory) => directory,
            // It was removed or replaced since its entry was read.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(true),
            Err(e) => return Err(e),
        };
        let status = directory.status()?;
        if status.st_dev != self.device {
            return Ok(true);
        }
        if self.open.len() == MAX_OPEN
            && let Some(uppermost) = self.open.pop_front()
        {
            if self.closed.len() == MAX_CLOSED {
                return Ok(false);
            }
            self.closed.push(uppermost.position);
        }
        self.open.push_back(OpenDirectory { directory, position: Position { inode: status.st_ino, offset: 0 } });
        Ok(true)
    }

    /// Goes up from a directory that was read completely.
    fn leave(&mut self) -> Result<(), Errno> {
        let Some(OpenDirectory { directory: finished, .. }) = self.open.pop_back() else { return Ok(()) };
        self.usage.is_stable &= !self.was_changed(&finished.status()?)?;
        if self.open.is_empty()
            && let Some(position) = self.closed.pop()
        {
            let parent = match self.same_directory(finished.open_entry(c".."), position.inode)? {
                Some(directory) => OpenDirectory::resume(directory, position)?,
                // The directory was moved during the walk. Its entries are counted.
                None => self.find_parent(position)?,
            };
            self.open.push_back(parent);
        }
        Ok(())
    }

    /// Whether the directory was changed during the walk.
    fn was_changed(&self, status: &FileStat) -> Result<bool, Errno> {
        let changed = TimeSpec::new(status.st_ctime, status.st_ctime_nsec);
        // A time in the future was stamped before the clock was set back.
        Ok(changed >= self.start && changed <= clock_gettime(ClockId::CLOCK_REALTIME)?)
    }

    /// Returns the directory if it could be opened and has this inode.
    fn same_directory(&self, opened: Result<Directory, Errno>, inode: u64) -> Result<Option<Directory>, Errno> {
        match opened {
            Ok(directory) => {
                let status = directory.status()?;
                Ok((status.st_ino == inode && status.st_dev == self.device).then_some(directory))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Finds the parent directory again by the inodes on its path, from the top. If a directory on that path was moved, the
    /// walk continues in the one above it.
    fn find_parent(&mut self, parent: Position) -> Result<OpenDirectory, Errno> {
        self.closed.push(parent);
        let mut directory = Directory::open(self.top)?;
        let mut depth = 1;
        while let Some(level) = self.closed.get(depth)
            && let Some(below) = self.find_entry(&mut directory, level.inode)?
        {
            directory = below;
            depth += 1;
        }
        self.usage.is_stable = false;
        self.closed.truncate(depth);
        let position = self.closed.pop().unwrap_or(parent);
        OpenDirectory::resume(directory, position)
    }

    /// Finds the directory with this inode among the entries of another one.
    fn find_entry(&self, directory: &mut Directory, inode: u64) -> Result<Option<Directory>, Errno> {
        self.check_cancelled()?;
        while let Some(entry) = directory.next_entry()? {
            if entry.ino() == inode
                && let Some(child) = self.same_directory(directory.open_entry(entry.file_name()), inode)?
            {
                return Ok(Some(child));
            }
        }
        Ok(None)
    }
}

fn is_directory(status: &FileStat) -> bool {
    status.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits()
}

/// The inodes with more than one name that were counted. File systems give neighbouring numbers to files that are made
/// one after the other, so a group of 64 numbers takes one entry.
#[derive(Default)]
struct LinkedInodes {
    groups: HashMap<u64, u64>,
}

impl LinkedInodes {
    /// Whether to count the inode: it was not inserted before, or there is no room to remember it.
    fn insert(&mut self, inode: u64) -> bool {
        let (group, bit) = (inode / 64, 1 << (inode % 64));
        if let Some(seen) = self.groups.get_mut(&group) {
            let is_new = *seen & bit == 0;
            *seen |= bit;
            return is_new;
        }
        if self.groups.len() < MAX_LINK_GROUPS {
            self.groups.insert(group, bit);
        }
        true
    }
}

#[cfg(test)]
mod tests;
