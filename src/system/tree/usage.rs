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
mod tests {
    use super::super::tests::make_chain;
    use super::*;
    use std::cell::Cell;
    use std::fs;
    use std::ops::Range;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn usage(path: &Path) -> DiskUsage {
        disk_usage(path, &|| false).unwrap()
    }

    /// Makes a file of a block for each number, in a directory that is made as well.
    fn make_files(directory: &Path, numbers: Range<usize>) {
        fs::create_dir_all(directory).unwrap();
        for n in numbers {
            fs::write(directory.join(n.to_string()), "x").unwrap();
        }
    }

    /// Calls `act` with the number of each question whether the walk is to go on: before a directory is opened.
    fn acting(act: impl Fn(usize)) -> impl Fn() -> bool {
        let asked = Cell::new(0);
        move || {
            act(asked.replace(asked.get() + 1));
            false
        }
    }

    #[test]
    fn tree_of_any_depth_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        make_chain(dir.path(), 3_000);
        let usage = usage(dir.path());
        assert_eq!((usage.inodes, usage.is_stable), (3_001, true));
        assert_eq!(disk_usage(dir.path(), &|| true), Err(Errno::ECANCELED));
        super::super::remove(&dir.path().join("d"), &|| false).unwrap();
    }

    /// The walk goes up again and again from below the directories that it keeps open.
    #[test]
    fn each_entry_of_a_wide_and_deep_tree_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut at = dir.path().to_owned();
        for level in 0..3 * OPEN {
            make_files(&at, 0..40);
            for n in 0..20 {
                make_files(&at.join(format!("{level}-{n}/a/b")), 0..2);
            }
            at.push("deeper");
        }
        let usage = usage(dir.path());
        let levels = 3 * OPEN as u64;
        assert_eq!(usage.inodes, levels * (1 + 40 + 20 * (3 + 2)));
        assert!(usage.is_stable);
    }

    #[test]
    fn links_are_counted_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (top, other) = (dir.path().join("top"), dir.path().join("other"));
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("precious"), vec![1; 100_000]).unwrap();
        symlink(&other, top.join("a/b/link")).unwrap();
        symlink(&other, top.join("link")).unwrap();
        let usage = usage(&top);
        assert!(usage.bytes < 100_000 && usage.inodes == 5, "{usage:?}");
        assert_eq!(disk_usage(&top.join("link"), &|| false), Err(Errno::ENOTDIR));
    }

    #[test]
    fn file_with_several_names_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        make_files(&dir.path().join("a"), 0..300);
        fs::create_dir(dir.path().join("b")).unwrap();
        for n in 0..300 {
            fs::hard_link(dir.path().join(format!("a/{n}")), dir.path().join(format!("b/{n}"))).unwrap();
        }
        assert_eq!(usage(dir.path()).inodes, 3 + 300);
    }

    #[test]
    fn inodes_beyond_what_is_remembered_are_counted_by_name() {
        let mut linked = LinkedInodes::default();
        let (neighbours, far) = (0..1_000_000, (0..MAX_LINK_GROUPS as u64 + 1_000).map(|n| n * 64));
        assert!(neighbours.clone().all(|inode| linked.insert(inode)), "each is new");
        assert!(neighbours.into_iter().all(|inode| !linked.insert(inode)), "each is known");
        let grown = far.map(|inode| linked.insert(inode)).filter(|is_new| *is_new).count();
        assert!(grown > 1_000);
        assert_eq!(linked.groups.len(), MAX_LINK_GROUPS);
        assert_eq!(linked.groups.capacity(), MAX_LINK_GROUPS, "the table is as full as it gets before it grows");
        let beyond = 64 * (MAX_LINK_GROUPS as u64 + 500);
        assert!(linked.insert(beyond) && linked.insert(beyond));
    }

    /// A container moved a directory to and fro: the walk found no way back from it and answered what it had
    /// come to by then, a fifth of all or less. Whoever wants to use more than the kubelet allows did that.
    #[test]
    fn nothing_is_missing_while_another_thread_moves_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        // Below the directories that are kept open, so that the way up leads through `..`.
        let deep: PathBuf = (0..2 * OPEN).map(|n| n.to_string()).collect();
        for n in 0..50 {
            make_files(&top.join(format!("stays-{n}/in/place")), 0..20);
        }
        let (here, there) = (top.join("x/y/a"), top.join("x/y/b"));
        // Whatever order the file system reads them in, some come after the directory in which the walk was.
        for numbers in [0..50, 50..100] {
            for way in [&top.join("x"), &top.join("x/y"), &here, &there] {
                make_files(way, numbers.clone());
            }
            make_files(&here.join("moving").join(&deep), 0..50);
        }
        let stays = 1 + 50 * (3 + 20) + 4 * 101;
        assert_eq!(usage(&top).inodes, stays + 1 + 2 * OPEN as u64 + 50);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    fs::rename(here.join("moving"), there.join("moving")).unwrap();
                    fs::rename(there.join("moving"), here.join("moving")).unwrap();
                }
            });
            let mut disturbed = 0;
            while disturbed < 20 {
                let usage = usage(&top);
                is_over.store(usage.inodes < stays, Ordering::Relaxed);
                assert!(usage.inodes >= stays, "{} of {stays} inodes that stay in their place", usage.inodes);
                disturbed += usize::from(!usage.is_stable);
            }
            is_over.store(true, Ordering::Relaxed);
        });
    }

    /// What moves away before the walk comes to it, to where the walk has been, was in no sum.
    #[test]
    fn directory_that_is_moved_past_the_walk_is_counted_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        for n in 0..20 {
            fs::create_dir_all(top.join(n.to_string())).unwrap();
        }
        // In the order of the walk: the question with number n is asked before the directory with number n.
        let order: Vec<PathBuf> = fs::read_dir(&top).unwrap().map(|entry| entry.unwrap().path()).collect();
        let (first, last) = (order[0].join("moving"), order[19].join("moving"));
        make_files(&last, 0..100);
        let move_once = acting(|n| {
            if n == 10 {
                fs::rename(&last, &first).unwrap();
            }
        });
        let usage = disk_usage(&top, &move_once).unwrap();
        assert_eq!(usage, DiskUsage { inodes: 1 + 20 + 1 + 100, is_stable: true, ..usage });
        let keep_moving = acting(|n| {
            let [from, to] = if n % 2 == 0 { [&first, &last] } else { [&last, &first] };
            fs::rename(from, to).unwrap();
        });
        let disturbed = disk_usage(&top, &keep_moving).unwrap();
        assert!(!disturbed.is_stable && disturbed.inodes > 20, "{disturbed:?}");
    }

    /// Of the way back from a directory that was moved, a part was moved as well.
    #[test]
    fn walk_goes_on_where_the_tree_stayed_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        let level = |n: usize| (0..n).fold(top.clone(), |path, n| path.join(format!("level-{n}")));
        let depth = 3 * OPEN;
        for (n, numbers) in (0..depth).map(|n| (n, 0..50)).chain((0..depth).map(|n| (n, 50..100))) {
            make_files(&level(n), numbers);
            make_files(&level(n).join("dir"), 0..1);
        }
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let is_moved = Cell::new(false);
        // When the walk is in the deepest directory, two of those above it leave their paths.
        let act = acting(|_| {
            let mut open = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|fd| fs::read_link(fd.path()));
            if !is_moved.get() && open.any(|path| path.is_ok_and(|path| path == level(depth - 1))) {
                fs::rename(level(6), elsewhere.join("6")).unwrap();
                fs::rename(elsewhere.join("6/level-6/level-7"), elsewhere.join("8")).unwrap();
                is_moved.set(true);
            }
        });
        let mut walk = UsageWalk::begin(&top, &act).unwrap();
        assert_eq!(walk.run(), Ok(true));
        assert!(is_moved.get() && !walk.usage.is_stable);
        // All but the rest of these two: what is below them was counted by then.
        let others = (depth as u64 - 2) * (1 + 100 + 2);
        assert!(walk.usage.inodes >= others, "{:?}", walk.usage);
    }

    #[test]
    fn tree_is_too_deep_where_its_levels_are_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("1/2/3/4/5/6/7/8/9/10/11")).unwrap();
        let go_on = || false;
        let mut walk = UsageWalk::begin(dir.path(), &go_on).unwrap();
        walk.closed = vec![Position { inode: 0, offset: 0 }; MAX_LEVELS - 2];
        assert_eq!(walk.run(), Ok(false));
        let whole = usage_of_file_system(dir.path()).unwrap();
        assert!(whole.bytes > usage(dir.path()).bytes && !whole.is_stable);
    }
}
