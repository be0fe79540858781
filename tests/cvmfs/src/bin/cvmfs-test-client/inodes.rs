//! Inode numbers: one for each path and file type, the same for the life of the mount; the links
//! of one group share that of the group's first path. A path that becomes another type of file in
//! a later revision gets a new number, since the kernel never lets an inode change its type.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::backend::Entry;

pub const ROOT: u64 = 1;

type Path = Arc<[u8]>;

#[derive(Default)]
pub struct Inodes(RwLock<State>);

#[derive(Default)]
struct State {
    numbers: HashMap<(Path, u32), u64>,
    /// The paths under which each inode was seen; the one numbered 1 comes first.
    paths: Vec<Vec<Path>>,
    /// The inode that the kernel was last told for each path.
    current: HashMap<Path, u64>,
}

impl Inodes {
    /// The number of what lies at `path`; remembers that the kernel knows it.
    pub fn number(&self, path: &[u8], entry: &Entry) -> u64 {
        let first: Path = entry.first_link.clone().unwrap_or_else(|| path.into());
        let key = (first, entry.kind());
        {
            let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(&number) = state.numbers.get(&key)
                && state.current.get(path) == Some(&number)
            {
                return number;
            }
        }
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        let number = *state.numbers.entry(key).or_insert_with(|| {
            state.paths.push(Vec::new());
            state.paths.len() as u64
        });
        let path: Path = path.into();
        state.current.insert(Arc::clone(&path), number);
        let paths = &mut state.paths[index(number)];
        if !paths.contains(&path) {
            paths.push(path);
        }
        number
    }

    /// The paths under which an inode was seen.
    pub fn paths(&self, number: u64) -> Vec<Path> {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        state.paths.get(index(number)).cloned().unwrap_or_default()
    }

    /// Whether `entry` at `path` is the inode `number`.
    pub fn is(&self, number: u64, path: &Path, entry: &Entry) -> bool {
        let first = entry.first_link.clone().unwrap_or_else(|| Arc::clone(path));
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        state.numbers.get(&(first, entry.kind())) == Some(&number)
    }

    /// Every path that the kernel was told, with the inode it was told.
    pub fn known(&self) -> Vec<(Path, u64)> {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        state.current.iter().map(|(path, number)| (Arc::clone(path), *number)).collect()
    }

    /// The inode that the kernel was last told for `path`.
    pub fn current(&self, path: &[u8]) -> Option<u64> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).current.get(path).copied()
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("inode numbers count what is in memory") - 1
}
