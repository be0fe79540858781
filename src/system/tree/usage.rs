//! Measures what a tree takes on disk, while others may change it.
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

/// A tree that changes while it is measured is measured so many times.
const MAX_WALKS: usize = 3;
/// So many of the deepest directories on the way to where the walk is are open.
const OPEN: usize = 8;
/// Of so many directories above these, an inode number and a position are kept: 4 MiB. A path can
/// name 2048.
const MAX_LEVELS: usize = 1 << 18;
/// Groups of 64 inode numbers: as many as a table of 2^18 places takes before it grows, 4.5 MiB.
const MAX_LINK_GROUPS: usize = 7 << 15;
/// Names that are read between two questions whether the walk is to go on.
const NAMES_AT_ONCE: u64 = 256;

/// What a tree takes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Allocated bytes.
    pub bytes: u64,
    pub inodes: u64,
    /// Whether no directory of the tree was changed while it was measured.
    pub is_stable: bool,
}

/// Allocated bytes and distinct inodes of the tree at `path`, itself included, as `du` counts them.
/// ECANCELED if `cancelled` says so.
///
/// All that stays in its place meanwhile is counted, whatever else happens in the tree, and each
/// bound on memory makes the answer larger, never smaller:
///
/// - What vanishes or comes meanwhile may be counted or not. What is moved may be counted twice; or not,
///   if it goes from a directory that was not read yet to one that was. Such a directory shows it by its
///   time of change, and then the tree is measured anew, at most three times in all. The answer is that of
///   a walk that nothing disturbed, or else the largest one. (Who moves an entry in every walk, at the very
///   moment, can hide that entry.)
/// - Inodes with more than one name are remembered in groups of 64 neighbours, 229,376 of them. An inode that
///   finds no place there is counted once for each of its names.
/// - Of a tree that is deeper than 262,152 directories, the answer is what the whole file system has in use.
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
        // A change in the tick of this clock in which a walk begins looks as if it came after that.
        let now = change_clock()?;
        while change_clock()? == now {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(largest)
}

/// The clock that file systems stamp changes with; it ticks 100 to 1000 times in a second.
fn change_clock() -> Result<TimeSpec, Errno> {
    clock_gettime(ClockId::CLOCK_REALTIME_COARSE)
}

fn usage_of_file_system(path: &Path) -> Result<DiskUsage, Errno> {
    let status = statvfs(path)?;
    let blocks = status.blocks().saturating_sub(status.blocks_free());
    let bytes = blocks.saturating_mul(status.fragment_size());
    Ok(DiskUsage { bytes, inodes: status.files().saturating_sub(status.files_free()), is_stable: false })
}

/// Where the walk is in a directory.
#[derive(Clone, Copy)]
struct Position {
    inode: u64,
    /// The entry after which it goes on, as the file system says it. 0: at the first one.
    offset: i64,
}

struct OpenDirectory {
    directory: Directory,
    position: Position,
}

impl OpenDirectory {
    /// Goes on in a directory at the position where the walk was in it.
    fn resume(mut directory: Directory, position: Position) -> Result<Self, Errno> {
        directory.seek(position.offset)?;
        Ok(Self { directory, position })
    }
}

struct UsageWalk<'a> {
    top: &'a Path,
    cancelled: &'a dyn Fn() -> bool,
    device: u64,
    /// A change from now on has this time, or a later one.
    begun: TimeSpec,
    /// The way from the top to where the walk is: directories that are not open,
    closed: Vec<Position>,
    /// and the deepest ones, which are.
    open: VecDeque<OpenDirectory>,
    linked: LinkedInodes,
    usage: DiskUsage,
    names: u64,
}

impl<'a> UsageWalk<'a> {
    fn begin(top: &'a Path, cancelled: &'a dyn Fn() -> bool) -> Result<Self, Errno> {
        let begun = change_clock()?;
        let directory = Directory::open(top)?;
        let status = directory.status()?;
        let mut walk = Self {
            top,
            cancelled,
            device: status.st_dev,
            begun,
            closed: Vec::new(),
            open: VecDeque::with_capacity(OPEN),
            linked: LinkedInodes::default(),
            usage: DiskUsage { is_stable: true, ..DiskUsage::default() },
            names: 0,
        };
        walk.count(&status);
        walk.open.push_back(OpenDirectory { directory, position: Position { inode: status.st_ino, offset: 0 } });
        Ok(walk)
    }

    /// Whether it came to the end: false if the tree is too deep.
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
            self.names += 1;
            if self.names.is_multiple_of(NAMES_AT_ONCE) {
                self.ask_to_go_on()?;
            }
        }
        Ok(true)
    }

    fn count(&mut self, status: &FileStat) {
        let allocated = u64::try_from(status.st_blocks).unwrap_or(0).saturating_mul(512);
        self.usage.bytes = self.usage.bytes.saturating_add(allocated);
        self.usage.inodes += 1;
    }

    fn ask_to_go_on(&self) -> Result<(), Errno> {
        if (self.cancelled)() { Err(Errno::ECANCELED) } else { Ok(()) }
    }

    /// Goes down into a directory; false if that is too deep.
    fn enter(&mut self, name: &CStr) -> Result<bool, Errno> {
        self.ask_to_go_on()?;
        let Some(current) = self.open.back() else { return Ok(true) };
        let directory = match current.directory.open_entry(name) {
            Ok(directory) => directory,
            // It was removed, or made something else, since.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(true),
            Err(e) => return Err(e),
        };
        let status = directory.status()?;
        if status.st_dev != self.device {
            return Ok(true);
        }
        if self.open.len() == OPEN
            && let Some(uppermost) = self.open.pop_front()
        {
            if self.closed.len() == MAX_LEVELS {
                return Ok(false);
            }
            self.closed.push(uppermost.position);
        }
        self.open.push_back(OpenDirectory { directory, position: Position { inode: status.st_ino, offset: 0 } });
        Ok(true)
    }

    /// Goes up from a directory that was read to its end.
    fn leave(&mut self) -> Result<(), Errno> {
        let Some(OpenDirectory { directory: done, .. }) = self.open.pop_back() else { return Ok(()) };
        self.usage.is_stable &= !self.was_changed(&done.status()?)?;
        if self.open.is_empty()
            && let Some(position) = self.closed.pop()
        {
            let above = match self.is_at(done.open_entry(c".."), position.inode)? {
                Some(directory) => OpenDirectory::resume(directory, position)?,
                // It was moved while the walk was in it, and all in it is counted.
                None => self.find_again(position)?,
            };
            self.open.push_back(above);
        }
        Ok(())
    }

    /// Whether the directory was changed since the walk has begun.
    fn was_changed(&self, status: &FileStat) -> Result<bool, Errno> {
        let changed = TimeSpec::new(status.st_ctime, status.st_ctime_nsec);
        // A time to come is from before the clock was set back.
        Ok(changed >= self.begun && changed <= clock_gettime(ClockId::CLOCK_REALTIME)?)
    }

    /// The directory, if it could be opened and is the one with this inode.
    fn is_at(&self, opened: Result<Directory, Errno>, inode: u64) -> Result<Option<Directory>, Errno> {
        match opened {
            Ok(directory) => {
                let status = directory.status()?;
                Ok((status.st_ino == inode && status.st_dev == self.device).then_some(directory))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Seeks a directory by the inodes on its way, from the top. If a directory on that way was moved,
    /// the walk goes on in the one above it.
    fn find_again(&mut self, sought: Position) -> Result<OpenDirectory, Errno> {
        self.closed.push(sought);
        let mut directory = Directory::open(self.top)?;
        let mut found = 1;
        while let Some(level) = self.closed.get(found)
            && let Some(below) = self.find_entry(&mut directory, level.inode)?
        {
            directory = below;
            found += 1;
        }
        self.usage.is_stable = false;
        self.closed.truncate(found);
        let position = self.closed.pop().unwrap_or(sought);
        OpenDirectory::resume(directory, position)
    }

    /// The directory with this inode among the entries of another one.
    fn find_entry(&self, directory: &mut Directory, inode: u64) -> Result<Option<Directory>, Errno> {
        self.ask_to_go_on()?;
        while let Some(entry) = directory.next_entry()? {
            if entry.ino() == inode
                && let Some(found) = self.is_at(directory.open_entry(entry.file_name()), inode)?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

fn is_directory(status: &FileStat) -> bool {
    status.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits()
}

/// Inodes that have more than one name, so that each is counted once. File systems give neighbouring
/// numbers to files that are made one after the other: a group of 64 of them takes one entry.
#[derive(Default)]
struct LinkedInodes {
    groups: HashMap<u64, u64>,
}

impl LinkedInodes {
    /// Whether the inode is to be counted: it was not inserted before, or there is no place to remember that.
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
