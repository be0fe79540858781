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

/// Makes a directory with a file of one block for each number.
fn make_files(directory: &Path, numbers: Range<usize>) {
    fs::create_dir_all(directory).unwrap();
    for n in numbers {
        fs::write(directory.join(n.to_string()), "x").unwrap();
    }
}

/// A `cancelled` that runs `act` with the number of the call. It is called before a directory is opened.
fn acting(act: impl Fn(usize)) -> impl Fn() -> bool {
    let calls = Cell::new(0);
    move || {
        act(calls.replace(calls.get() + 1));
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

/// The walk goes up many times from below the directories that it keeps open.
#[test]
fn each_entry_of_a_wide_and_deep_tree_is_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut at = dir.path().to_owned();
    for level in 0..3 * MAX_OPEN {
        make_files(&at, 0..40);
        for n in 0..20 {
            make_files(&at.join(format!("{level}-{n}/a/b")), 0..2);
        }
        at.push("deeper");
    }
    let usage = usage(dir.path());
    let levels = 3 * MAX_OPEN as u64;
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

/// A container moved a directory between two places. The walk did not find the way back from it and returned what it had
/// counted by then, a fifth of the tree or less, so a container could hide disk usage from the kubelet.
#[test]
fn nothing_is_missing_while_another_thread_moves_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    // It is deeper than the directories that are kept open, so that the walk goes up through `..`.
    let deep: PathBuf = (0..2 * MAX_OPEN).map(|n| n.to_string()).collect();
    for n in 0..50 {
        make_files(&top.join(format!("stays-{n}/in/place")), 0..20);
    }
    let (here, there) = (top.join("x/y/a"), top.join("x/y/b"));
    // In whatever order the file system lists them, some entries come after the directory of the walk.
    for numbers in [0..50, 50..100] {
        for directory in [&top.join("x"), &top.join("x/y"), &here, &there] {
            make_files(directory, numbers.clone());
        }
        make_files(&here.join("moving").join(&deep), 0..50);
    }
    let stays = 1 + 50 * (3 + 20) + 4 * 101;
    assert_eq!(usage(&top).inodes, stays + 1 + 2 * MAX_OPEN as u64 + 50);
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

/// A directory that moved from a place that the walk had not read to one that it had was counted in neither.
#[test]
fn directory_that_is_moved_past_the_walk_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    for n in 0..20 {
        fs::create_dir_all(top.join(n.to_string())).unwrap();
    }
    // The directories in the order of the walk: call number n is made before directory number n is opened.
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

/// The walk looks for the parent of a moved directory, and a part of the parent's path was moved as well.
#[test]
fn walk_continues_in_the_deepest_directory_that_was_not_moved() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    let level = |n: usize| (0..n).fold(top.clone(), |path, n| path.join(format!("level-{n}")));
    let depth = 3 * MAX_OPEN;
    for (n, numbers) in (0..depth).map(|n| (n, 0..50)).chain((0..depth).map(|n| (n, 50..100))) {
        make_files(&level(n), numbers);
        make_files(&level(n).join("dir"), 0..1);
    }
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let is_moved = Cell::new(false);
    // When the walk is in the deepest directory, two of those above it are moved.
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
    // The entries below the two moved directories were counted before, and only the rest of these two is missing.
    let others = (depth as u64 - 2) * (1 + 100 + 2);
    assert!(walk.usage.inodes >= others, "{:?}", walk.usage);
}

#[test]
fn tree_with_more_levels_than_are_remembered_is_too_deep() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("1/2/3/4/5/6/7/8/9/10/11")).unwrap();
    let go_on = || false;
    let mut walk = UsageWalk::begin(dir.path(), &go_on).unwrap();
    walk.closed = vec![Position { inode: 0, offset: 0 }; MAX_CLOSED - 2];
    assert_eq!(walk.run(), Ok(false));
    let whole = usage_of_file_system(dir.path()).unwrap();
    assert!(whole.bytes > usage(dir.path()).bytes && !whole.is_stable);
}
