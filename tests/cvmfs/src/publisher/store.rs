//! The content-addressed store below `data/`: every object is zlib-compressed and named by the
//! SHA-1 of its compressed bytes. Remembers which content of the source it has seen, so that a
//! further revision reads only what changed.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use crate::format::{Digest, Kind};

/// Changes whenever a file's content can have changed (the rule of backup programs): device,
/// inode, size, and the nanoseconds of mtime and ctime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContentKey {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    pub modified: i128,
    pub changed: i128,
}

#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    known: HashMap<ContentKey, Digest>,
}

impl Store {
    pub fn create(dir: &Path) -> Self {
        for byte in 0..=255_u8 {
            let bucket = dir.join(format!("data/{byte:02x}"));
            fs::create_dir_all(&bucket).unwrap_or_else(|error| panic!("create {bucket:?}: {error}"));
        }
        Self { dir: dir.to_owned(), known: HashMap::new() }
    }

    /// The object of a file that [`put_files`](Self::put_files) took.
    pub fn digest(&self, key: &ContentKey) -> Digest {
        self.known[key]
    }

    pub fn put(&mut self, bytes: &[u8], kind: Kind) -> Digest {
        put(&self.dir, bytes, kind)
    }

    /// Stores the files whose content is not known yet, on as many threads as there are cores.
    pub fn put_files(&mut self, files: &HashMap<ContentKey, PathBuf>) {
        let new: Vec<_> = files.iter().filter(|(key, _)| !self.known.contains_key(key)).collect();
        let next = AtomicUsize::new(0);
        let stored = Mutex::new(Vec::with_capacity(new.len()));
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
                scope.spawn(|| {
                    while let Some((key, path)) = new.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let bytes = fs::read(path).unwrap_or_else(|error| panic!("read {path:?}: {error}"));
                        let digest = put(&self.dir, &bytes, Kind::File);
                        stored.lock().expect("no publishing thread panicked").push((**key, digest));
                    }
                });
            }
        });
        self.known.extend(stored.into_inner().expect("no publishing thread panicked"));
    }
}

fn put(dir: &Path, bytes: &[u8], kind: Kind) -> Digest {
    let mut encoder = ZlibEncoder::new(Vec::with_capacity(bytes.len() / 2), Compression::fast());
    encoder.write_all(bytes).expect("memory takes what is compressed");
    let compressed = encoder.finish().expect("memory takes what is compressed");
    let digest = Digest::of(&compressed);
    let path = dir.join(digest.object_path(kind));
    if !path.exists() {
        write_atomically(&path, &compressed);
    }
    digest
}

/// A reader sees the old file or the new one. Two threads may write the same object at once.
pub fn write_atomically(path: &Path, bytes: &[u8]) {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let temporary = path.with_file_name(format!(".new{}", SERIAL.fetch_add(1, Ordering::Relaxed)));
    fs::write(&temporary, bytes).unwrap_or_else(|error| panic!("write {temporary:?}: {error}"));
    fs::rename(&temporary, path).unwrap_or_else(|error| panic!("rename {temporary:?} to {path:?}: {error}"));
}
