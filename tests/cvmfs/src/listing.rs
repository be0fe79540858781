//! The properties of a file tree as text that can be compared. They are read from a directory, or from a JSON file of
//! `tests/data/real-repositories`, whose README describes it.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display, Formatter};
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// The properties of one entry by their names. A property that an entry does not have is left out.
pub type Properties = BTreeMap<&'static str, String>;

/// A file tree: the properties of each entry by its path. The top directory is `.`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    pub entries: BTreeMap<PathBuf, Properties>,
}

/// A property in which two trees differ. An entry that only one of them has differs in its type.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    pub path: PathBuf,
    pub property: &'static str,
    pub expected: Option<String>,
    pub found: Option<String>,
}

impl Display for Difference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { path, property, expected, found } = self;
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
        write!(f, "{path:?}: {property}: expected {}, found {}", text(expected), text(found))
    }
}

impl Listing {
    /// Reads the tree below `top` with the content of every file. A file that cannot be read has the
    /// error for its content.
    pub fn read(top: &Path) -> Self {
        let mut listing = Self::default();
        let mut links: HashMap<(u64, u64), Vec<PathBuf>> = HashMap::new();
        let mut unread = vec![PathBuf::new()];
        while let Some(directory) = unread.pop() {
            let entries = fs::read_dir(top.join(&directory))
                .unwrap_or_else(|error| panic!("list {:?}: {error}", top.join(&directory)));
            for entry in entries {
                let name = entry.unwrap_or_else(|error| panic!("list {directory:?}: {error}")).file_name();
                let path = directory.join(name);
                let found = match top.join(&path).symlink_metadata() {
                    Ok(found) => found,
                    // A whiteout over nothing: overlayfs lists its name and has no such entry.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => panic!("look at {:?}: {error}", top.join(&path)),
                };
                if found.is_dir() {
                    unread.push(path.clone());
                } else {
                    links.entry((found.dev(), found.ino())).or_default().push(path.clone());
                }
                listing.entries.insert(path.clone(), properties(&top.join(&path), &found));
            }
        }
        let found = top.symlink_metadata().unwrap_or_else(|error| panic!("look at {top:?}: {error}"));
        listing.entries.insert(PathBuf::from("."), properties(top, &found));
        for mut group in links.into_values().filter(|group| group.len() > 1) {
            group.sort();
            let text = format!("{group:?}");
            for path in group {
                listing.entries.entry(path).and_modify(|entry| drop(entry.insert("links", text.clone())));
            }
        }
        listing
    }

    /// Reads a listing in JSON. It knows no parts of seconds.
    pub fn parse(json: &[u8]) -> Self {
        let parsed: BTreeMap<PathBuf, Value> = serde_json::from_slice(json).expect("a listing maps paths to objects");
        Self { entries: parsed.into_iter().map(|(path, entry)| (path, parse_properties(&entry))).collect() }
    }

    /// Drops a property of every entry, because one side of a comparison does not know it.
    pub fn leave_out(&mut self, property: &str) {
        self.entries.values_mut().for_each(|entry| drop(entry.remove(property)));
    }

    /// The bytes in its files.
    pub fn bytes(&self) -> u64 {
        self.entries.values().filter_map(|entry| entry.get("size")?.parse::<u64>().ok()).sum()
    }

    /// The differences of `found` from this tree, in the order of the paths.
    pub fn compare(&self, found: &Self) -> Vec<Difference> {
        let none = Properties::new();
        let mut differences = Vec::new();
        let only_found = found.entries.keys().filter(|path| !self.entries.contains_key(*path));
        for path in self.entries.keys().chain(only_found) {
            let (x, y) = (self.entries.get(path), found.entries.get(path));
            let on_one_side = x.is_none() || y.is_none();
            let (x, y) = (x.unwrap_or(&none), y.unwrap_or(&none));
            let properties = x.keys().chain(y.keys().filter(|property| !x.contains_key(*property)));
            for &property in properties.filter(|property| !on_one_side || **property == "type") {
                let (expected, found) = (x.get(property).cloned(), y.get(property).cloned());
                if expected != found {
                    differences.push(Difference { path: path.clone(), property, expected, found });
                }
            }
        }
        differences.sort();
        differences
    }
}

fn properties(path: &Path, found: &Metadata) -> Properties {
    let kind = found.file_type();
    let mut entry = Properties::new();
    let kind_name = if kind.is_dir() {
        "directory"
    } else if kind.is_file() {
        "file"
    } else if kind.is_symlink() {
        "symlink"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_char_device() {
        "char"
    } else {
        "block"
    };
    entry.insert("type", kind_name.to_owned());
    entry.insert("mode", format!("{:04o}", found.mode() & 0o7777));
    entry.insert("owner", format!("{}:{}", found.uid(), found.gid()));
    entry.insert("mtime", found.mtime().to_string());
    entry.insert("nanoseconds", found.mtime_nsec().to_string());
    if kind.is_symlink() {
        let target = fs::read_link(path).unwrap_or_else(|error| panic!("read the link {path:?}: {error}"));
        entry.insert("target", target.as_os_str().as_bytes().escape_ascii().to_string());
    }
    if kind.is_char_device() || kind.is_block_device() {
        entry.insert("device", format!("{}:{}", major(found.rdev()), minor(found.rdev())));
    }
    if kind.is_file() {
        entry.insert("size", found.len().to_string());
        entry.insert("content", hash(path).unwrap_or_else(|error| format!("unreadable: {error}")));
    }
    let names = xattr::list(path).unwrap_or_else(|error| panic!("list the attributes of {path:?}: {error}"));
    // The kernel lists more names than it hands out the values of, for instance on links.
    let attributes = names.map(|name| {
        let value = xattr::get(path, &name).ok().flatten().unwrap_or_default();
        (name.as_bytes().to_vec(), value)
    });
    insert_attributes(&mut entry, &attributes.collect());
    entry
}

fn hash(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(format!("{:x}", hash.finalize()))
}

fn parse_properties(found: &Value) -> Properties {
    let text = |name: &str| match &found[name] {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let mut entry = Properties::new();
    for (property, name) in
        [("type", "type"), ("mode", "mode"), ("mtime", "mtime"), ("size", "size"), ("content", "sha256")]
    {
        entry.extend(text(name).map(|text| (property, text)));
    }
    entry.extend(text("uid").zip(text("gid")).map(|(uid, gid)| ("owner", format!("{uid}:{gid}"))));
    entry.extend(text("target").map(|target| ("target", target.as_bytes().escape_ascii().to_string())));
    if let [Value::Number(major), Value::Number(minor)] = found["device"].as_array().map_or(&[][..], Vec::as_slice) {
        entry.insert("device", format!("{major}:{minor}"));
    }
    if let Some(links) = found["links"].as_array() {
        let links: Vec<&str> = links.iter().filter_map(Value::as_str).collect();
        entry.insert("links", format!("{links:?}"));
    }
    let attributes = found["xattrs"].as_object().into_iter().flatten();
    let attributes = attributes
        .map(|(name, value)| (name.clone().into_bytes(), value.as_str().unwrap_or_default().as_bytes().to_vec()));
    insert_attributes(&mut entry, &attributes.collect());
    entry
}

fn insert_attributes(entry: &mut Properties, attributes: &BTreeMap<Vec<u8>, Vec<u8>>) {
    if attributes.is_empty() {
        return;
    }
    let attributes: Vec<_> = attributes
        .iter()
        .map(|(name, value)| format!("{}={:?}", name.escape_ascii(), value.escape_ascii().to_string()))
        .collect();
    entry.insert("xattrs", attributes.join(" "));
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree(top: &Path) -> Listing {
        fs::create_dir_all(top.join("dir")).expect("a directory can be made");
        fs::write(top.join("dir/file"), "text").expect("a file can be written");
        fs::hard_link(top.join("dir/file"), top.join("same")).expect("a file can be linked");
        symlink("dir", top.join("link")).expect("a link can be made");
        xattr::set(top.join("dir/file"), "user.note", b"a\0b").expect("an attribute can be set");
        Listing::read(top)
    }

    #[test]
    fn listing_reads_tree_with_properties_of_json_listing() {
        let dir = tempfile::tempdir().expect("the temporary directory takes a tree");
        let mut listing = tree(dir.path());
        let file = &listing.entries[Path::new("dir/file")];
        let (mtime, owner) = (file["mtime"].clone(), file["owner"].clone());
        let (uid, gid) = owner.split_once(':').expect("an owner has two numbers");
        let json = format!(
            r#"{{"dir/file": {{"type": "file", "mode": "0644", "uid": {uid}, "gid": {gid}, "mtime": {mtime}, "size": 4,
                "sha256": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1",
                "links": ["dir/file", "same"], "xattrs": {{"user.note": "a\u0000b"}}}}}}"#
        );
        listing.leave_out("nanoseconds");
        assert_eq!(
            listing.entries[Path::new("dir/file")],
            Listing::parse(json.as_bytes()).entries[Path::new("dir/file")]
        );
        assert_eq!(listing.entries[Path::new("link")]["target"], "dir");
        assert_eq!(listing.bytes(), 8);
        assert_eq!(
            listing.entries.keys().map(|path| path.to_str().unwrap()).collect::<Vec<_>>(),
            [".", "dir", "dir/file", "link", "same"]
        );
    }

    #[test]
    fn comparison_names_each_differing_property_and_entry() {
        let dir = tempfile::tempdir().expect("the temporary directory takes a tree");
        let expected = tree(dir.path());
        assert_eq!(expected.compare(&expected), []);
        let mut found = expected.clone();
        found.entries.remove(Path::new("link"));
        found.entries.insert("new".into(), expected.entries[Path::new("dir")].clone());
        let file = found.entries.get_mut(Path::new("dir/file")).expect("the file is there");
        file.insert("content", "another".to_owned());
        file.remove("xattrs");
        let differences: Vec<_> = expected.compare(&found).iter().map(ToString::to_string).collect();
        assert_eq!(
            differences,
            [
                "\"dir/file\": content: expected 982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1, found another",
                "\"dir/file\": xattrs: expected user.note=\"a\\\\x00b\", found nothing",
                "\"link\": type: expected symlink, found nothing",
                "\"new\": type: expected nothing, found directory",
            ]
        );
    }
}
