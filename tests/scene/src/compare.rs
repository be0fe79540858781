//! Compares two root file systems in everything a program can see.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// An entry as `lstat` and its friends describe it, in words that can be compared.
type Properties = BTreeMap<&'static str, String>;

pub struct Comparison {
    pub entries: usize,
    pub bytes: u64,
    pub differences: Vec<String>,
}

struct Tree {
    entries: BTreeMap<PathBuf, Properties>,
    files: Vec<PathBuf>,
}

/// Compares the trees below `left` and `right`.
pub fn compare(left: &Path, right: &Path) -> Comparison {
    let (a, b) = (read(left), read(right));
    let mut differences = Vec::new();
    for (path, properties) in &a.entries {
        match b.entries.get(path) {
            None => differences.push(format!("{path:?}: only in {}", left.display())),
            Some(other) => {
                for name in properties.keys().chain(other.keys().filter(|n| !properties.contains_key(*n))) {
                    let (x, y) = (properties.get(name), other.get(name));
                    if x != y {
                        differences.push(format!("{path:?}: {name} {x:?} against {y:?}"));
                    }
                }
            }
        }
    }
    for path in b.entries.keys().filter(|path| !a.entries.contains_key(*path)) {
        differences.push(format!("{path:?}: only in {}", right.display()));
    }
    let mut bytes = 0;
    for path in &a.files {
        if b.files.binary_search(path).is_ok() {
            match same_content(&left.join(path), &right.join(path)) {
                Ok(size) => bytes += size,
                Err(why) => differences.push(format!("{path:?}: content, {why}")),
            }
        }
    }
    Comparison { entries: a.entries.len(), bytes, differences }
}

fn read(top: &Path) -> Tree {
    let mut tree = Tree { entries: BTreeMap::new(), files: Vec::new() };
    let mut links: HashMap<(u64, u64), Vec<PathBuf>> = HashMap::new();
    let mut unread = vec![PathBuf::new()];
    while let Some(directory) = unread.pop() {
        let at = top.join(&directory);
        add(&mut tree, &mut links, &at, &directory);
        let entries = fs::read_dir(&at).unwrap_or_else(|e| panic!("cannot read {}: {e}", at.display()));
        for entry in entries {
            let name = entry.expect("an entry can be read").file_name();
            let path = directory.join(name);
            let at = top.join(&path);
            match fs::symlink_metadata(&at) {
                Ok(status) if status.is_dir() => unread.push(path),
                Ok(_) => add(&mut tree, &mut links, &at, &path),
                // A whiteout over nothing: overlayfs lists its name and has no such entry.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => panic!("cannot look at {}: {e}", at.display()),
            }
        }
    }
    for group in links.values_mut().filter(|group| group.len() > 1) {
        group.sort();
        for path in group.iter() {
            if let Some(properties) = tree.entries.get_mut(path) {
                properties.insert("hard links", format!("{group:?}"));
            }
        }
    }
    tree.files.sort();
    tree
}

fn add(tree: &mut Tree, links: &mut HashMap<(u64, u64), Vec<PathBuf>>, at: &Path, path: &Path) {
    let status = fs::symlink_metadata(at).unwrap_or_else(|e| panic!("cannot look at {}: {e}", at.display()));
    let kind = status.file_type();
    let mut properties = Properties::new();
    let type_name = if kind.is_dir() {
        "directory"
    } else if kind.is_file() {
        "file"
    } else if kind.is_symlink() {
        "link"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_char_device() {
        "character device"
    } else {
        "block device"
    };
    properties.insert("type", type_name.to_owned());
    properties.insert("mode", format!("{:o}", status.mode()));
    properties.insert("owner", format!("{}:{}", status.uid(), status.gid()));
    if !path.as_os_str().is_empty() {
        // At the top it is when containerd unpacked the image, and differs between any two pulls.
        properties.insert("mtime", format!("{}.{:09}", status.mtime(), status.mtime_nsec()));
    }
    if kind.is_symlink() {
        properties.insert("target", format!("{:?}", fs::read_link(at).expect("a link can be read")));
    }
    if kind.is_char_device() || kind.is_block_device() {
        properties.insert("device", status.rdev().to_string());
    }
    if kind.is_file() {
        properties.insert("size", status.len().to_string());
        tree.files.push(path.to_owned());
    }
    if !kind.is_dir() {
        links.entry((status.dev(), status.ino())).or_default().push(path.to_owned());
    }
    let mut attributes = String::new();
    let mut names: Vec<_> = xattr::list(at).map(Iterator::collect).unwrap_or_default();
    names.sort();
    for name in names {
        let value = xattr::get(at, &name).ok().flatten();
        let _ = write!(attributes, "{name:?}={value:?} ");
    }
    properties.insert("xattrs", attributes);
    tree.entries.insert(path.to_owned(), properties);
}

/// The size of both files, if they are the same.
fn same_content(left: &Path, right: &Path) -> Result<u64, String> {
    let open = |path: &Path| File::open(path).map_err(|e| format!("cannot open {}: {e}", path.display()));
    let (mut left_file, mut right_file) = (open(left)?, open(right)?);
    let mut size = 0;
    let (mut x, mut y) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    loop {
        let n = fill(&mut left_file, &mut x).map_err(|e| format!("cannot read {}: {e}", left.display()))?;
        let m = fill(&mut right_file, &mut y).map_err(|e| format!("cannot read {}: {e}", right.display()))?;
        if x[..n] != y[..m] {
            return Err(format!("it differs after byte {size}"));
        }
        if n == 0 {
            return Ok(size);
        }
        size += n as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read(&mut buffer[read..])? {
            0 => break,
            n => read += n,
        }
    }
    Ok(read)
}
