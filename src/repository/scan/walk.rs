//! The walk over the directories of a layer, by a few threads, within bounds of memory.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};

use super::{
    Directory, Error, Limit, MAX_DIRECTORIES, MAX_MARKED, MAX_MEMORY, MAX_PATH, MAX_RESULT, NO_OWNER, Progress, Result,
    Scan, cost, is_publishers, is_whiteout,
};
use crate::system::{self, CountedMemory, DirHandle, FileType, Sys};

/// Threads that read directories of one tree. The time goes to the FUSE server's round
/// trips, not to our cores: four need half the time of one.
const MAX_SCAN_THREADS: usize = 4;
/// A tree with fewer directories is read by one.
const SINGLE_THREAD_MAX_DIRS: usize = 64;
/// A walk shows life after so many entries of one directory.
const HEARTBEAT_EVERY: usize = 100;

/// Walks the directories of the layer `top`. What is found is a matter of names, and of whether
/// directories have an owner at all: who that is may look different through another mount of the
/// same repository.
pub fn scan(sys: &dyn Sys, top: &DirHandle, progress: &Progress) -> Result<Scan> {
    let walk =
        ScanWalk { sys, top, progress, memory: Arc::default(), state: Mutex::default(), changed: Condvar::new() };
    let node = walk.node(None, OsString::new());
    walk.state.lock().unread.push(node);
    walk.read_until(SINGLE_THREAD_MAX_DIRS);
    if !walk.is_over() {
        thread::scope(|scope| {
            let helper = || thread::Builder::new().name("scan-helper".to_owned());
            for _ in 1..MAX_SCAN_THREADS {
                // The scan does without a thread that cannot be started.
                if helper().spawn_scoped(scope, || walk.read_until(usize::MAX)).is_err() {
                    break;
                }
            }
            walk.read_until(usize::MAX);
        });
    }
    walk.result()
}

/// A directory by its parent and its name, so that a deep tree takes no more memory than a wide one.
/// It is gone with the last directory below it that somebody still has to look at.
struct PathNode {
    parent: Option<Arc<Self>>,
    name: OsString,
    /// It is part of the result, as is everything above it.
    is_marked: AtomicBool,
    memory: Arc<AtomicUsize>,
}

impl PathNode {
    fn path(&self) -> PathBuf {
        let mut names: Vec<&OsStr> = self.ancestors().map(|node| node.name.as_os_str()).collect();
        names.reverse();
        names.into_iter().collect()
    }

    /// This one and those above it, without the top.
    fn ancestors(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |node| node.parent.as_deref()).filter(|node| node.parent.is_some())
    }
}

impl Drop for PathNode {
    fn drop(&mut self) {
        self.memory.fetch_sub(cost(&self.name), Ordering::Relaxed);
    }
}

struct ScanWalk<'a> {
    sys: &'a dyn Sys,
    top: &'a DirHandle,
    progress: &'a Progress,
    /// Bytes that nodes, marked directories and the names that are being read take.
    memory: Arc<AtomicUsize>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    unread: Vec<Arc<PathNode>>,
    /// Walkers that read a directory, and may find more.
    busy: usize,
    /// Directories that were read.
    read: usize,
    found: Vec<(Arc<PathNode>, Directory)>,
    /// Directories of the result so far.
    marked: usize,
    /// Bytes that the result takes so far.
    result: usize,
    failed: Option<Error>,
}

impl State {
    fn is_over(&self) -> bool {
        self.failed.is_some() || (self.unread.is_empty() && self.busy == 0)
    }

    /// Counts what the result takes with `directory` in it, and keeps it.
    fn mark(&mut self, node: &Arc<PathNode>, directory: Directory) -> Result<()> {
        let mut path = 0;
        for above in node.ancestors() {
            path += above.name.len() + 1;
            if !above.is_marked.swap(true, Ordering::Relaxed) {
                self.marked += 1;
                self.result += cost(&above.name);
            }
        }
        self.result += directory.memory();
        let exceeded = [
            (path > MAX_PATH, Limit::Path),
            (self.marked > MAX_MARKED, Limit::Marked),
            (self.result > MAX_RESULT, Limit::Names),
        ];
        if let Some((_, limit)) = exceeded.into_iter().find(|(is_exceeded, _)| *is_exceeded) {
            return Err(Error::Exceeds(limit));
        }
        self.found.push((Arc::clone(node), directory));
        Ok(())
    }
}

impl ScanWalk<'_> {
    fn node(&self, parent: Option<&Arc<PathNode>>, name: OsString) -> Arc<PathNode> {
        self.memory.fetch_add(cost(&name), Ordering::Relaxed);
        let (parent, memory) = (parent.cloned(), Arc::clone(&self.memory));
        Arc::new(PathNode { parent, name, is_marked: AtomicBool::default(), memory })
    }

    fn is_over(&self) -> bool {
        self.state.lock().is_over()
    }

    /// Reads directories until all are, or somebody failed, or this one has read `limit`.
    fn read_until(&self, limit: usize) {
        for _ in 0..limit {
            let next = {
                let mut state = self.state.lock();
                while state.unread.is_empty() && !state.is_over() {
                    self.changed.wait(&mut state);
                }
                if state.is_over() {
                    return;
                }
                state.busy += 1;
                state.unread.pop()
            };
            let Some(next) = next else { return };
            // A panic must not leave the others waiting for this one.
            let mut names = CountedMemory::new(&self.memory);
            let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.read(&next, &mut names)))
                .unwrap_or(Err(Error::Panicked));
            self.progress.directories.fetch_add(1, Ordering::Relaxed);
            self.progress.heartbeat.record();
            let mut state = self.state.lock();
            state.busy -= 1;
            state.read += 1;
            // The names are counted from here on as the nodes and entries that they become.
            drop(names);
            if let Err(e) = found.and_then(|found| self.note(&mut state, &next, found)) {
                state.failed.get_or_insert(e);
            }
            self.changed.notify_all();
        }
    }

    /// Keeps what was found in a directory, and which directories are still to be read.
    fn note(
        &self,
        state: &mut State,
        node: &Arc<PathNode>,
        (directory, below): (Directory, Vec<OsString>),
    ) -> Result<()> {
        state.unread.extend(below.into_iter().map(|name| self.node(Some(node), name)));
        if directory.opaque || directory.has_mask() {
            let names = directory.hidden.iter().chain(&directory.deleted);
            self.memory.fetch_add(names.map(|name| cost(name)).sum(), Ordering::Relaxed);
            state.mark(node, directory)?;
        }
        if self.memory.load(Ordering::Relaxed) > MAX_MEMORY {
            return Err(Error::Exceeds(Limit::Memory));
        }
        if state.read + state.unread.len() > MAX_DIRECTORIES {
            return Err(Error::Exceeds(Limit::Directories));
        }
        Ok(())
    }

    /// The markers of one directory, and the directories in it. `names` counts both while it is read.
    fn read(&self, node: &PathNode, names: &mut CountedMemory) -> Result<(Directory, Vec<OsString>)> {
        let path = node.path();
        let (mut below, mut markers) = (Vec::new(), Vec::new());
        let mut entries = 0_usize;
        let (mut leads_out, mut is_too_much) = (false, false);
        let status = self.sys.for_each_entry_below(self.top, &path, &mut |name, file_type| {
            entries += 1;
            leads_out |= matches!(name.as_bytes(), b"" | b"." | b"..") || name.as_bytes().contains(&b'/');
            // Names come many at a time: a large directory gets on while it is being read.
            if entries.is_multiple_of(HEARTBEAT_EVERY) {
                self.progress.heartbeat.record();
            }
            let kept = match file_type {
                _ if is_whiteout(name) => &mut markers,
                FileType::Other if is_publishers(name) => &mut markers,
                FileType::Directory => &mut below,
                _ => return ControlFlow::Continue(()),
            };
            is_too_much = names.add(cost(name)) > MAX_MEMORY;
            if is_too_much {
                return ControlFlow::Break(());
            }
            kept.push(name.to_owned());
            ControlFlow::Continue(())
        });
        let status = status.map_err(|e| match e.errno {
            Errno::ENAMETOOLONG => Error::Exceeds(Limit::Path),
            _ => e.into(),
        })?;
        if is_too_much {
            return Err(Error::Exceeds(Limit::Memory));
        }
        if leads_out {
            // As the kernel says to a file system that hands out such names.
            let path = self.top.path().join(path);
            return Err(system::Error { call: "read directory", path, errno: Errno::EIO }.into());
        }
        let is_top = node.parent.is_none();
        let mut directory = Directory::with_markers(is_top, markers);
        // The top of a container is root's, whatever a layer says of its own.
        directory.has_no_owner = !is_top && (status.uid == NO_OWNER || status.gid == NO_OWNER);
        if !directory.deleted.is_empty() {
            // A name that the layer both deletes and has is simply there: a file hides what is
            // below, and a directory is merged with it, for unpacking it removes the whiteout.
            let mut absent: HashSet<OsString> = directory.deleted.drain(..).collect();
            self.sys.for_each_entry_below(self.top, &path, &mut |name, _| {
                absent.remove(name);
                ControlFlow::Continue(())
            })?;
            directory.deleted = absent.into_iter().collect();
            directory.deleted.sort();
        }
        Ok((directory, below))
    }

    fn result(self) -> Result<Scan> {
        let State { found, failed, .. } = self.state.into_inner();
        if let Some(e) = failed {
            return Err(e);
        }
        let mut tree = Tree { directories: vec![Directory::default()], paths: HashMap::new() };
        for (node, directory) in found {
            tree.insert(&node, directory);
        }
        Ok(tree.sorted())
    }
}

/// The result while it is put together: directories in the order in which they were found.
struct Tree {
    directories: Vec<Directory>,
    /// The positions of those that have one, by the address of their node.
    paths: HashMap<*const PathNode, usize>,
}

impl Tree {
    fn insert(&mut self, node: &Arc<PathNode>, mut directory: Directory) {
        let mut missing = Vec::new();
        let mut place = 0;
        for above in node.ancestors() {
            if let Some(known) = self.paths.get(&std::ptr::from_ref(above)) {
                place = *known;
                break;
            }
            missing.push(above);
        }
        for above in missing.into_iter().rev() {
            self.directories.push(Directory { parent: place, name: above.name.clone(), ..Directory::default() });
            place = self.directories.len() - 1;
            self.paths.insert(std::ptr::from_ref(above), place);
        }
        let entry = &mut self.directories[place];
        (directory.parent, directory.name) = (entry.parent, std::mem::take(&mut entry.name));
        *entry = directory;
    }

    fn sorted(mut self) -> Scan {
        let mut children: Vec<Vec<usize>> = vec![Vec::new(); self.directories.len()];
        for (n, directory) in self.directories.iter().enumerate().skip(1) {
            children[directory.parent].push(n);
        }
        for some in &mut children {
            some.sort_by(|a, b| self.directories[*b].name.cmp(&self.directories[*a].name));
        }
        let mut sorted: Vec<Directory> = Vec::with_capacity(self.directories.len());
        // With the new positions of their parents.
        let mut next = vec![(0, 0)];
        while let Some((n, parent)) = next.pop() {
            let place = sorted.len();
            next.extend(std::mem::take(&mut children[n]).into_iter().map(|child| (child, place)));
            sorted.push(Directory { parent, ..std::mem::take(&mut self.directories[n]) });
        }
        Scan { directories: sorted }
    }
}
