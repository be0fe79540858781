//! Reads the directories of a layer with a few threads and bounded memory.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};

use super::{
    Directory, Error, Limit, MAX_DIRECTORIES, MAX_MARKED, MAX_MEMORY, MAX_PATH, MAX_RESULT_BYTES, NO_OWNER, Progress,
    Result, Scan, cost, is_publishers, is_whiteout,
};
use crate::repository::executor::ThreadBudget;
use crate::system::{self, CountedMemory, DirHandle, FileType, Sys, is_entry_name};

/// Threads that read the directories of one layer. The time goes to the round trips of the FUSE server and not to our
/// processor cores: four threads need half the time of one.
const MAX_SCAN_THREADS: usize = 4;
/// A layer with fewer directories is read by one thread.
const SINGLE_THREAD_MAX_DIRS: usize = 64;
/// A scan records progress after this number of entries of one directory.
const HEARTBEAT_EVERY: usize = 100;

/// Scans the layer `top`, with helper threads as far as `threads` allows. The result depends on names, and on whether
/// directories have an owner; who that is may look different through another mount of the same repository.
pub fn scan(sys: &dyn Sys, top: &DirHandle, progress: &Progress, threads: &ThreadBudget) -> Result<Scan> {
    let walk =
        ScanWalk { sys, top, progress, memory: Arc::default(), state: Mutex::default(), changed: Condvar::new() };
    let node = walk.node(None, OsString::new());
    walk.state.lock().unread.push(node);
    walk.read_until(SINGLE_THREAD_MAX_DIRS);
    if !walk.is_over() {
        thread::scope(|scope| {
            for _ in 1..MAX_SCAN_THREADS {
                // A scan can do without helpers.
                let Some(permit) = threads.acquire() else { break };
                let walk = &walk;
                let help = move || {
                    walk.read_until(usize::MAX);
                    drop(permit);
                };
                if thread::Builder::new().name("scan-helper".to_owned()).spawn_scoped(scope, help).is_err() {
                    break;
                }
            }
            walk.read_until(usize::MAX);
        });
    }
    walk.result()
}

/// A directory, by its parent and its name: so a deep tree takes no more memory than a wide one. It is dropped with the
/// last directory below it that is still to be read.
struct PathNode {
    parent: Option<Arc<Self>>,
    name: OsString,
    /// Whether it is part of the result, and so are the directories above it.
    is_marked: AtomicBool,
    memory: Arc<AtomicUsize>,
}

impl PathNode {
    fn path(&self) -> PathBuf {
        let mut names: Vec<&OsStr> = self.ancestors().map(|node| node.name.as_os_str()).collect();
        names.reverse();
        names.into_iter().collect()
    }

    /// This directory and those above it, without the top.
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
    /// Bytes used by nodes, by directories of the result, and by the names of directories that are being read.
    memory: Arc<AtomicUsize>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    unread: Vec<Arc<PathNode>>,
    /// Threads that read a directory, in which they may find more.
    busy: usize,
    /// Directories that were read.
    read: usize,
    marked_directories: Vec<(Arc<PathNode>, Directory)>,
    /// Directories of the result so far, with those above them.
    marked: usize,
    /// Bytes that the result takes so far.
    result_bytes: usize,
    failed: Option<Error>,
}

struct DirectoryContents {
    /// The directory with its markers.
    directory: Directory,
    subdirectories: Vec<OsString>,
}

impl State {
    fn is_over(&self) -> bool {
        self.failed.is_some() || (self.unread.is_empty() && self.busy == 0)
    }

    /// Adds `directory` to the result, within the limits.
    fn mark(&mut self, node: &Arc<PathNode>, directory: Directory) -> Result<()> {
        let mut path_bytes = 0;
        for ancestor in node.ancestors() {
            path_bytes += ancestor.name.len() + 1;
            if !ancestor.is_marked.swap(true, Ordering::Relaxed) {
                self.marked += 1;
                self.result_bytes += cost(&ancestor.name);
            }
        }
        self.result_bytes += directory.memory();
        let exceeded = [
            (path_bytes > MAX_PATH, Limit::Path),
            (self.marked > MAX_MARKED, Limit::Marked),
            (self.result_bytes > MAX_RESULT_BYTES, Limit::Names),
        ];
        if let Some((_, limit)) = exceeded.into_iter().find(|(is_exceeded, _)| *is_exceeded) {
            return Err(Error::Exceeds(limit));
        }
        self.marked_directories.push((Arc::clone(node), directory));
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

    /// Reads directories until all are read, or a thread has failed, or this thread has read `limit` of them.
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
            // A panic must not leave the other threads waiting for this one.
            let mut names = CountedMemory::new(&self.memory);
            let contents = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.read(&next, &mut names)))
                .unwrap_or(Err(Error::Panicked));
            self.progress.directories.fetch_add(1, Ordering::Relaxed);
            self.progress.heartbeat.record();
            let mut state = self.state.lock();
            state.busy -= 1;
            state.read += 1;
            // From here on the names are counted as the nodes and directories that they become.
            drop(names);
            if let Err(e) = contents.and_then(|contents| self.add(&mut state, &next, contents)) {
                state.failed.get_or_insert(e);
            }
            self.changed.notify_all();
        }
    }

    /// Adds the markers of a directory to the result, and its subdirectories to those that are still to be read.
    fn add(&self, state: &mut State, node: &Arc<PathNode>, contents: DirectoryContents) -> Result<()> {
        let DirectoryContents { directory, subdirectories } = contents;
        state.unread.extend(subdirectories.into_iter().map(|name| self.node(Some(node), name)));
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

    /// Reads one directory. `names` counts the memory of the names meanwhile.
    fn read(&self, node: &PathNode, names: &mut CountedMemory) -> Result<DirectoryContents> {
        let path = node.path();
        let (mut subdirectories, mut markers) = (Vec::new(), Vec::new());
        let mut entries = 0_usize;
        let (mut leads_out, mut exceeds_memory) = (false, false);
        let status = self.sys.for_each_entry_below(self.top, &path, &mut |name, file_type| {
            entries += 1;
            leads_out |= !is_entry_name(name);
            // A large directory comes in many answers, each of which is progress.
            if entries.is_multiple_of(HEARTBEAT_EVERY) {
                self.progress.heartbeat.record();
            }
            let list = match file_type {
                _ if is_whiteout(name) => &mut markers,
                FileType::Other if is_publishers(name) => &mut markers,
                FileType::Directory => &mut subdirectories,
                _ => return ControlFlow::Continue(()),
            };
            exceeds_memory = names.add(cost(name)) > MAX_MEMORY;
            if exceeds_memory {
                return ControlFlow::Break(());
            }
            list.push(name.to_owned());
            ControlFlow::Continue(())
        });
        let status = status.map_err(|e| match e.errno {
            Errno::ENAMETOOLONG => Error::Exceeds(Limit::Path),
            _ => e.into(),
        })?;
        if exceeds_memory {
            return Err(Error::Exceeds(Limit::Memory));
        }
        if leads_out {
            // The kernel fails with the same error for a file system that returns such names.
            let path = self.top.path().join(path);
            return Err(system::Error { call: "read directory", path, errno: Errno::EIO }.into());
        }
        let is_top = node.parent.is_none();
        let mut directory = Directory::with_markers(is_top, markers);
        // The top directory of a container belongs to root, whoever owns that of a layer.
        directory.has_no_owner = !is_top && (status.uid == NO_OWNER || status.gid == NO_OWNER);
        self.drop_names_that_are_there(&mut directory, &path)?;
        Ok(DirectoryContents { directory, subdirectories })
    }

    /// A name that the layer both deletes and has is not deleted: a file hides what is below anyway, and a directory is
    /// merged with it, because unpacking it removes the whiteout.
    fn drop_names_that_are_there(&self, directory: &mut Directory, path: &Path) -> Result<()> {
        if directory.deleted.is_empty() {
            return Ok(());
        }
        let mut absent: HashSet<OsString> = directory.deleted.drain(..).collect();
        self.sys.for_each_entry_below(self.top, path, &mut |name, _| {
            absent.remove(name);
            ControlFlow::Continue(())
        })?;
        directory.deleted = absent.into_iter().collect();
        directory.deleted.sort();
        Ok(())
    }

    fn result(self) -> Result<Scan> {
        let State { marked_directories, failed, .. } = self.state.into_inner();
        if let Some(e) = failed {
            return Err(e);
        }
        let mut tree = Tree { directories: vec![Directory::default()], indices: HashMap::new() };
        for (node, directory) in marked_directories {
            tree.insert(&node, directory);
        }
        Ok(tree.sorted())
    }
}

/// The result while it is put together: directories in the order in which they were read.
struct Tree {
    directories: Vec<Directory>,
    /// The index of each directory, by the address of its node.
    indices: HashMap<*const PathNode, usize>,
}

impl Tree {
    fn insert(&mut self, node: &Arc<PathNode>, mut directory: Directory) {
        let mut missing = Vec::new();
        let mut index = 0;
        for ancestor in node.ancestors() {
            if let Some(known) = self.indices.get(&std::ptr::from_ref(ancestor)) {
                index = *known;
                break;
            }
            missing.push(ancestor);
        }
        for ancestor in missing.into_iter().rev() {
            self.directories.push(Directory { parent: index, name: ancestor.name.clone(), ..Directory::default() });
            index = self.directories.len() - 1;
            self.indices.insert(std::ptr::from_ref(ancestor), index);
        }
        let entry = &mut self.directories[index];
        (directory.parent, directory.name) = (entry.parent, std::mem::take(&mut entry.name));
        *entry = directory;
    }

    /// The directories, each after its parent, and siblings by name.
    fn sorted(mut self) -> Scan {
        let mut children: Vec<Vec<usize>> = vec![Vec::new(); self.directories.len()];
        for (index, directory) in self.directories.iter().enumerate().skip(1) {
            children[directory.parent].push(index);
        }
        for siblings in &mut children {
            siblings.sort_by(|a, b| self.directories[*b].name.cmp(&self.directories[*a].name));
        }
        let mut sorted: Vec<Directory> = Vec::with_capacity(self.directories.len());
        let mut stack = vec![Unsorted { index: 0, new_parent: 0 }];
        while let Some(Unsorted { index, new_parent: parent }) = stack.pop() {
            let new_parent = sorted.len();
            let children = std::mem::take(&mut children[index]);
            stack.extend(children.into_iter().map(|index| Unsorted { index, new_parent }));
            sorted.push(Directory { parent, ..std::mem::take(&mut self.directories[index]) });
        }
        Scan { directories: sorted }
    }
}

/// A directory that is still to be sorted, whose parent has its new index already.
struct Unsorted {
    index: usize,
    new_parent: usize,
}
