//! Clients and publishers that mean no good, from the inside: every path that the system is asked
//! about is looked at afterwards.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Component, PathBuf};
use std::time::Duration;

use nix::sys::stat::{Mode as FileMode, SFlag, mknod};
use parking_lot::Mutex;

use super::super::*;
use super::{list_all, lower};
use crate::model::LABEL_IMAGE_REF;
use crate::repository::Unavailable;
use crate::repository::executor::ThreadBudget;
use crate::repository::manifest::ImageRef;
use crate::repository::scan::{self, Progress};
use crate::system::{Attributes, DirHandle, DiskUsage, FileSystem, FileType, Host, Status, Unmount};

/// What no path may have in it.
const EVIL: &str = "evil";

/// The host, with a record of every path that it was asked about or that it changed, and with
/// entries in directories that no kernel would let through.
#[derive(Default)]
struct Watched {
    asked: Mutex<Vec<(&'static str, PathBuf)>>,
    changed: Mutex<Vec<(&'static str, PathBuf)>>,
    entries: Mutex<HashMap<PathBuf, Vec<(OsString, FileType)>>>,
}

macro_rules! watch {
    ($($record:ident $name:ident($($arg:ident: $type:ty),*) -> $result:ty, $($path:ident)+;)*) => {
        $(fn $name(&self, $($arg: $type),*) -> system::Result<$result> {
            $(self.$record.lock().push((stringify!($name), $path.to_owned()));)+
            Host.$name($($arg),*)
        })*
    };
}

impl Sys for Watched {
    watch! {
        changed create_dir(path: &Path, mode: u32) -> (), path;
        changed chown(path: &Path, uid: u32, gid: u32) -> (), path;
        changed set_attributes(path: &Path, attributes: &Attributes) -> (), path;
        changed create_whiteout(path: &Path) -> (), path;
        changed write_file(path: &Path, content: &[u8]) -> (), path;
        changed make_opaque(path: &Path) -> (), path;
        changed symlink(target: &Path, link: &Path) -> (), link;
        changed rename(from: &Path, to: &Path) -> (), from to;
        changed remove_file(path: &Path) -> (), path;
        changed remove_dir(path: &Path) -> (), path;
        changed remove_tree(path: &Path, cancelled: &dyn Fn() -> bool) -> (), path;
        changed bind_read_only(source: &DirHandle, target: &Path) -> (), target;
        changed unmount(target: &Path, how: Unmount) -> (), target;
        asked stat(path: &Path) -> Status, path;
        asked lstat(path: &Path) -> Status, path;
        asked read_link(path: &Path) -> PathBuf, path;
        asked read_file(path: &Path, limit: u64) -> Vec<u8>, path;
        asked attribute(path: &Path, name: &str) -> Option<Vec<u8>>, path;
        asked attribute_names(path: &Path) -> Vec<OsString>, path;
        asked open_dir(path: &Path) -> DirHandle, path;
        asked statfs(path: &Path) -> FileSystem, path;
        asked disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> DiskUsage, path;
        asked mounted_fuse(path: &Path) -> Option<u64>, path;
        asked mounted(path: &Path) -> Option<u64>, path;
        asked mounts_below(path: &Path) -> Vec<PathBuf>, path;
    }

    fn open_below(&self, dir: &DirHandle, below: &Path) -> system::Result<DirHandle> {
        self.asked.lock().push(("open_below", dir.path().join(below)));
        Host.open_below(dir, below)
    }

    fn dir_status(&self, dir: &DirHandle) -> system::Result<Status> {
        Host.dir_status(dir)
    }

    fn dir_statfs(&self, dir: &DirHandle) -> system::Result<FileSystem> {
        Host.dir_statfs(dir)
    }

    fn dir_attribute_names(&self, dir: &DirHandle) -> system::Result<Vec<OsString>> {
        Host.dir_attribute_names(dir)
    }

    fn attributes_below(&self, dir: &DirHandle, below: &Path, ignored: &[OsString]) -> system::Result<Attributes> {
        self.asked.lock().push(("attributes_below", dir.path().join(below)));
        Host.attributes_below(dir, below, ignored)
    }

    fn for_each_entry_below(
        &self,
        dir: &DirHandle,
        below: &Path,
        each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> system::Result<Status> {
        let path = dir.path().join(below);
        self.asked.lock().push(("for_each_entry_below", path.clone()));
        if let Some(entries) = self.entries.lock().get(&path) {
            for (name, file_type) in entries {
                let _ = each(name, *file_type);
            }
        }
        Host.for_each_entry_below(dir, below, each)
    }

    fn for_each_entry(
        &self,
        path: &Path,
        each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> system::Result<()> {
        self.asked.lock().push(("for_each_entry", path.to_owned()));
        if let Some(entries) = self.entries.lock().get(path) {
            for (name, file_type) in entries {
                if each(name, *file_type).is_break() {
                    return Ok(());
                }
            }
        }
        Host.for_each_entry(path, each)
    }
}

/// A state root and a repository; layers are linked, so that nothing is mounted.
struct Place {
    dir: tempfile::TempDir,
    sys: Arc<Watched>,
}

fn digest(n: u8) -> Digest {
    Digest::parse(&format!("sha256:{}", format!("{n:02x}").repeat(32))).unwrap()
}

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

fn wanted(name: &str, parent: &str, labels: &[(&str, &str)]) -> CreateRequest {
    CreateRequest {
        key: key(name),
        parent: Key::parse_optional(parent).unwrap(),
        labels: labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
    }
}

const IMAGE: &str = "good.org/image:1";

impl Place {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "needs root: run make test as root");
        let place = Self { dir: tempfile::tempdir().unwrap(), sys: Arc::default() };
        fs::create_dir(place.snapshots()).unwrap();
        fs::create_dir_all(place.repository().join(".layers")).unwrap();
        place
    }

    fn repository(&self) -> PathBuf {
        self.dir.path().join("cvmfs")
    }

    fn snapshots(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    fn layer(&self, n: u8) -> PathBuf {
        let hex = digest(n).hex().to_owned();
        self.repository().join(".layers").join(&hex[..2]).join(hex).join("layerfs")
    }

    fn manifest(&self) -> PathBuf {
        self.repository().join(".metadata").join(IMAGE).join("manifest.json")
    }

    /// The manifest of an image with these layers.
    fn publish_manifest(&self, layers: &[u8]) {
        let descriptor = |n: u8| serde_json::json!({ "Digest": digest(n).as_str() });
        let layers: Vec<_> = layers.iter().map(|n| descriptor(*n)).collect();
        fs::create_dir_all(self.manifest().parent().unwrap()).unwrap();
        fs::write(self.manifest(), serde_json::json!({ "Config": descriptor(9), "Layers": layers }).to_string())
            .unwrap();
    }

    fn open(&self) -> Snapshotter {
        let store = Store::open(&self.dir.path().join("metadata.sqlite"), None).unwrap();
        let sys: Arc<dyn Sys> = Arc::<Watched>::clone(&self.sys);
        let repository = Repository::new("r".into(), self.repository(), Duration::from_secs(10), Arc::clone(&sys));
        let ways = SnapshotterOptions { attach: AttachMode::Symlink, overlay_options: Vec::new() };
        Snapshotter::new(store, vec![repository], sys, &self.snapshots(), ways)
    }

    /// Only what has a place there was changed, and only what is published was asked for.
    #[track_caller]
    fn check_paths(&self) {
        let changed = self.sys.changed.lock();
        for (call, path) in changed.iter() {
            let below = path.strip_prefix(self.snapshots());
            let below = below.unwrap_or_else(|_| panic!("{call} outside of the snapshots: {path:?}"));
            check_snapshot(call, below);
        }
        for (call, path) in self.sys.asked.lock().iter() {
            if let Ok(below) = path.strip_prefix(self.snapshots()) {
                check_snapshot(call, below);
            } else if let Ok(below) = path.strip_prefix("/proc/self/fd") {
                // An entry of a directory that was opened before.
                check_names(call, below);
                assert_eq!(below.iter().count(), 2, "{call} of {path:?}");
            } else {
                let below = path.strip_prefix(self.repository());
                check_published(call, below.unwrap_or_else(|_| panic!("{call} of {path:?}")));
            }
        }
    }
}

fn check_snapshot(call: &str, below: &Path) {
    check_names(call, below);
    let mut names = below.iter().map(|name| name.to_str().unwrap_or("not UTF-8"));
    let Some(id) = names.next() else { return };
    assert!(SnapshotId::from_directory_name(id).is_some(), "{call} of {below:?} in the snapshots");
    let place = names.next().unwrap_or("fs");
    let stem = place.trim_end_matches(".new").trim_end_matches(".of").trim_end_matches(".new");
    let stem = stem.trim_end_matches(|c: char| c.is_ascii_digit());
    assert!(["fs", "work", "record", "m", "h", "bound"].contains(&stem), "{call} of {below:?} in the snapshots");
}

fn check_published(call: &str, below: &Path) {
    check_names(call, below);
    let names: Vec<&str> = below.iter().map(|name| name.to_str().unwrap_or("not UTF-8")).collect();
    let is_hex = |name: &str| name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    match names[..] {
        [] | [".layers"] => {}
        [".layers", two, ref rest @ ..] => {
            assert!(two.len() == 2 && is_hex(two), "{call} of {below:?}");
            assert!(rest.first().is_none_or(|hex| hex.len() == 64 && is_hex(hex)), "{call} of {below:?}");
        }
        _ => panic!("{call} of {below:?} in the repository"),
    }
}

fn check_names(call: &str, below: &Path) {
    let rebuilt: PathBuf = below.components().filter(|c| matches!(c, Component::Normal(_))).collect();
    assert_eq!(rebuilt.as_os_str(), below.as_os_str(), "{call}");
    let bytes = below.as_os_str().as_bytes();
    assert!(!bytes.contains(&0), "{call} of {below:?}");
    assert!(!bytes.windows(EVIL.len()).any(|part| part == EVIL.as_bytes()), "{call} of {below:?}");
}

/// Every text that a client can send, in every place where it can: none becomes part of a path, but
/// for digests and references of images that were parsed.
#[test]
fn root_no_client_string_reaches_a_path() {
    let texts = [
        "evil",
        "../evil",
        "../../../../etc/evil",
        "/etc/evil",
        "evil\0evil",
        "evil\nevil",
        "1/fs/../../evil",
        ".wh.evil",
        ".wh..wh..opq/evil",
        "sha256:../evil",
        &format!("sha256:{}/../evil", "0".repeat(57)),
        "good.org/../evil:1",
        "good.org/evil:../1",
        "good.org/image:1/../evil",
        "../evil/image:1@sha256:evil",
        "labels.evil",
        &"evil/".repeat(2_000),
    ];
    let place = Place::new();
    for n in [1, 2] {
        fs::create_dir_all(place.layer(n)).unwrap();
        fs::write(place.layer(n).join(".wh.gone"), "").unwrap();
    }
    let s = place.open();
    let mut done = BTreeMap::<&str, usize>::new();
    let mut count = |call, ok: bool| *done.entry(call).or_default() += usize::from(ok);
    let good = digest(1);
    for (n, text) in texts.into_iter().enumerate() {
        let other = texts[(n + 5) % texts.len()];
        // A pull with each label in turn being odd; then with none.
        // (The reference of its image, each chain keeps.)
        let chain = format!("sha256:chain-{n}");
        for odd in 0..4 {
            let labels = [
                (LABEL_SNAPSHOT_REF, [text, "sha256:chain", &chain, "sha256:chain"][odd]),
                (LABEL_LAYER_DIGEST, if odd == 1 { text } else { good.as_str() }),
                (LABEL_IMAGE_REF, if odd == 2 { text } else { IMAGE }),
                (text, other),
            ];
            let pulled = s.prepare(wanted(&format!("{text}{odd}"), "", &labels));
            count("pull", matches!(pulled, Err(Error::RemoteCommitted { .. })));
        }
        for parent in ["", "cvmfs/0/sha256:chain", &format!("cvmfs/0/{text}"), &format!("cvmfs/0/{chain}")] {
            let labels = [(text, other), (LABEL_IMAGE_REF, other), (LABEL_UID_MAPPING, "0:0:1")];
            let name = format!("{text} on {parent}");
            count("prepare", s.prepare(wanted(&name, parent, &labels)).is_ok());
            count("view", s.view(wanted(&format!("{name} view"), parent, &labels)).is_ok());
            count("mounts", s.mounts(&key(&name)).is_ok());
            count("usage", s.usage(&key(&name), &|| false).is_ok());
            count("commit", s.commit(&key(&format!("{name} committed")), &key(&name), Labels::new(), None).is_ok());
            let change = LabelChange::Each(vec![(text.to_owned(), Some(other.to_owned()))]);
            count("update", s.update(&key(&format!("{name} committed")), &change).is_ok());
            count("stat", s.stat(&key(&format!("{name} committed"))).is_ok());
        }
        count("list", s.list(Some((text, other)), |_| true).is_ok());
        assert!(s.prepare(wanted("mapped", "", &[(LABEL_UID_MAPPING, text)])).is_err());
    }
    let all: Vec<Key> = list_all(&s).into_iter().map(|found| found.key).collect();
    while all.iter().any(|key| s.remove(key).is_ok()) {}
    count("remove", list_all(&s).is_empty());
    count("cleanup", s.cleanup(&|| false).unwrap().left == 0);
    assert_eq!(done.len(), 11, "{done:?}");
    for (call, count) in &done {
        assert!(*count >= if matches!(*call, "remove" | "cleanup") { 1 } else { texts.len() }, "{call}: {done:?}");
    }
    drop(s);
    place.check_paths();
    assert!(place.sys.changed.lock().len() > 200 && place.sys.asked.lock().len() > 1_000);
    assert_eq!(fs::read_dir(place.snapshots()).unwrap().count(), 0);
}

fn device(path: &Path, kind: SFlag) {
    mknod(path, kind, FileMode::from_bits_truncate(0o644), nix::sys::stat::makedev(1, 5)).unwrap();
}

/// A layer whose names and types are as odd as a file system allows. All that it does is to hide
/// names, in its own snapshot.
#[test]
fn root_a_layer_of_odd_names_and_links_stays_in_its_snapshot() {
    let place = Place::new();
    let outside = place.dir.path().join("evil");
    fs::create_dir_all(outside.join("inner")).unwrap();
    fs::write(outside.join(".wh.evil"), "").unwrap();
    let top = place.layer(2);
    fs::create_dir_all(place.layer(1)).unwrap();
    fs::create_dir_all(top.join("d/.wh.directory/inner")).unwrap();
    fs::create_dir_all(top.join(".wh..wh.plnk/inner")).unwrap();
    // Links in place of directories, with markers behind them.
    for (link, target) in [
        ("absolute", outside.as_path()),
        ("relative", Path::new("../../../../../evil")),
        ("d/up", Path::new("..")),
        ("d/self", Path::new(".")),
        ("d/.wh.link", outside.as_path()),
    ] {
        symlink(target, top.join(link)).unwrap();
    }
    for name in
        ["d/.wh.", "d/.wh..", "d/.wh...", "d/.wh..wh.", "d/.wh..wh..wh.x", "d/.wh..wh.plnk", "d/.wh.\n", ".wh.x"]
    {
        fs::write(top.join(name), "").unwrap();
    }
    for name in [&b".wh.\xff\xfe"[..], &[b".wh.", &[b'n'; 251][..]].concat(), &[b'l'; 255]] {
        fs::write(top.join("d").join(OsStr::from_bytes(name)), "").unwrap();
    }
    device(&top.join("d/.wh.device"), SFlag::S_IFCHR);
    device(&top.join("d/.wh.fifo"), SFlag::S_IFIFO);
    let s = place.open();
    let chain = pull(&s, 1, "");
    let upper = pull(&s, 2, &chain);
    let mounts = s.prepare(wanted("container", &upper, &[])).unwrap();
    let [mask, _, hide, ..] = lower(&mounts)[..] else { panic!("{mounts:?}") };
    let names = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(mask), [".wh..wh.plnk", ".wh.x", "d"]);
    // Each marker is hidden, and deletes a name where it has one that is not there (`.wh.` is).
    assert_eq!(names(&mask.join("d")).len(), 13);
    let deleted = names(&hide.join("d"));
    let expected: Vec<OsString> = [&b"\n"[..], b".wh..wh.x", b".wh.plnk", b"device", b"directory", b"fifo", b"link"]
        .into_iter()
        .map(|name| OsStr::from_bytes(name).to_owned())
        .chain([OsString::from("n".repeat(251)), OsStr::from_bytes(b"\xff\xfe").to_owned()])
        .collect();
    assert_eq!(deleted, expected);
    assert_eq!(names(hide), ["d", "x"]);
    drop(s);
    place.check_paths();
}

/// Pulls layer `n` of the image onto `parent`; the result is the name of its snapshot.
fn pull(s: &Snapshotter, n: u8, parent: &str) -> String {
    let (reference, digest) = (format!("sha256:chain-{n}"), digest(n));
    let labels =
        [(LABEL_SNAPSHOT_REF, reference.as_str()), (LABEL_LAYER_DIGEST, digest.as_str()), (LABEL_IMAGE_REF, IMAGE)];
    assert!(matches!(s.prepare(wanted("extract", parent, &labels)), Err(Error::RemoteCommitted { .. })));
    let parent = if parent.is_empty() { 0 } else { s.stat(&key(parent)).unwrap().id.0 };
    format!("cvmfs/{parent}/{reference}")
}

/// No kernel hands out such names. Should one: nothing is looked for, or made, where they lead.
#[test]
fn root_names_that_lead_elsewhere_make_a_layer_unavailable() {
    for name in ["..", ".", "", "../../evil", "/etc/evil", "a/evil", ".wh.a/evil", ".wh.../evil", ".wh./evil"] {
        for file_type in [FileType::Directory, FileType::Other, FileType::Symlink] {
            for below in ["", "d"] {
                let place = Place::new();
                fs::create_dir_all(place.layer(1)).unwrap();
                fs::create_dir_all(place.layer(2).join("d")).unwrap();
                let entries = vec![(OsString::from(name), file_type)];
                place.sys.entries.lock().insert(place.layer(2).join(below), entries);
                let s = place.open();
                let chain = pull(&s, 1, "");
                let upper = pull(&s, 2, &chain);
                let Err(Error::LayerUnavailable { why: Unavailable::Unreadable(e), .. }) =
                    s.prepare(wanted("container", &upper, &[]))
                else {
                    panic!("{name:?} was taken for a name")
                };
                assert_eq!((e.call, e.errno), ("read directory", Errno::EIO));
                // Another layer is as it was.
                s.prepare(wanted("other", &chain, &[])).unwrap();
                drop(s);
                place.check_paths();
            }
        }
    }
}

/// Links anywhere on the way to a layer: the pull downloads, and nothing behind them is asked for.
#[test]
fn root_a_link_on_the_way_to_a_layer_is_not_followed() {
    for depth in 0..4 {
        let place = Place::new();
        let elsewhere = place.dir.path().join("evil");
        fs::create_dir_all(place.layer(1).join("d")).unwrap();
        let link = place.layer(1).ancestors().nth(depth).unwrap().to_owned();
        fs::rename(&link, &elsewhere).unwrap();
        symlink(&elsewhere, &link).unwrap();
        let s = place.open();
        let asked = wanted("extract", "", &[(LABEL_SNAPSHOT_REF, "c"), (LABEL_LAYER_DIGEST, digest(1).as_str())]);
        let mounts = s.prepare(asked).unwrap();
        assert_eq!(mounts[0].kind, crate::model::MountKind::Bind, "an ordinary snapshot, to be unpacked into");
        drop(s);
        place.check_paths();
        // The call that resolves a path names what it was to find.
        let is_behind = |call: &str, path: &Path| call != "open_below" && path.starts_with(&link) && *path != link;
        let behind = place.sys.asked.lock().iter().any(|(call, path)| is_behind(call, path));
        assert!(!behind, "something behind {link:?} was asked for");
    }
}

/// What can stand in the place of a manifest.
#[test]
fn root_a_file_that_is_no_manifest_is_passed_over() {
    type Make = fn(&Path);
    let cases: [(&str, Make); 12] = [
        ("a fifo", |at| device(at, SFlag::S_IFIFO)),
        ("/dev/zero", |at| device(at, SFlag::S_IFCHR)),
        ("a socket", |at| device(at, SFlag::S_IFSOCK)),
        ("a link to /dev/zero", |at| symlink("/dev/zero", at).unwrap()),
        ("a link to a file of the host", |at| symlink("/proc/self/environ", at).unwrap()),
        ("a directory", |at| fs::create_dir(at).unwrap()),
        ("4 GiB of nothing", |at| fs::File::create(at).unwrap().set_len(4 << 30).unwrap()),
        ("250 KiB of brackets", |at| fs::write(at, "[".repeat(250 << 10)).unwrap()),
        ("250 KB of objects", |at| fs::write(at, "{\"Config\":".repeat(25_000)).unwrap()),
        ("wrong types", |at| fs::write(at, r#"{"Config":[],"Layers":{"0":null}}"#).unwrap()),
        ("keys that stand twice", |at| {
            let text = fs::read_to_string(at.with_extension("good")).unwrap();
            fs::write(at, text.replacen('{', r#"{"Layers":[],"config":{"Digest":"sha256:../evil"},"#, 1)).unwrap();
        }),
        ("bytes that are no text", |at| fs::write(at, [0xff; 1_000]).unwrap()),
    ];
    let place = Place::new();
    fs::create_dir_all(place.layer(1)).unwrap();
    place.publish_manifest(&[1]);
    let good = place.manifest().with_extension("good");
    fs::rename(place.manifest(), &good).unwrap();
    let repository = Repository::new("r".into(), place.repository(), Duration::from_secs(10), Arc::new(Host));
    for (what, make) in cases {
        make(&place.manifest());
        let manifest = repository.generation().manifest(&ImageRef::parse(IMAGE).unwrap()).unwrap();
        assert_eq!(manifest, None, "{what}");
        let at = place.manifest();
        if at.is_dir() && !at.is_symlink() { fs::remove_dir(at).unwrap() } else { fs::remove_file(at).unwrap() }
    }
}

/// Names for ever, one at a time, as a directory without an end has them.
struct Names {
    count: usize,
    file_type: FileType,
    name: fn(usize) -> String,
}

#[test]
fn a_million_entries_are_walked_and_a_million_markers_are_too_many() {
    let plain = Names { count: 1_000_000, file_type: FileType::Other, name: |n| format!("file-{n}") };
    let few = Names { count: 70_000, file_type: FileType::Other, name: |n| format!(".wh.{n}") };
    let many = Names { count: 1_000_000, file_type: FileType::Other, name: |n| format!(".wh.{n}") };
    for (names, expected) in [(plain, Some(0)), (few, Some(70_000)), (many, None)] {
        let dir = tempfile::tempdir().unwrap();
        let sys = Watched::default();
        let entries = (0..names.count).map(|n| ((names.name)(n).into(), names.file_type)).collect();
        sys.entries.lock().insert(dir.path().to_owned(), entries);
        let found =
            scan::scan(&sys, &Host.open_dir(dir.path()).unwrap(), &Progress::default(), &ThreadBudget::new(3, 0));
        match expected {
            Some(markers) => assert_eq!(found.unwrap().directories[0].hidden.len(), markers),
            None => assert_eq!(found, Err(scan::Error::Exceeds(scan::Limit::Memory))),
        }
    }
}

/// Deeper than a path can name. It was an error of the repository: each start failed, and a new pull published the
/// layer again. As one that exceeds a bound it is remembered, and downloaded.
#[test]
fn a_tree_that_is_deeper_than_paths_are_long_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut at = nix::fcntl::open(dir.path(), nix::fcntl::OFlag::O_DIRECTORY, FileMode::empty()).unwrap();
    let name = CString::new("deep-".repeat(10)).unwrap();
    for _ in 0..2_000 {
        nix::sys::stat::mkdirat(&at, name.as_c_str(), FileMode::S_IRWXU).unwrap();
        at = nix::fcntl::openat(&at, name.as_c_str(), nix::fcntl::OFlag::O_DIRECTORY, FileMode::empty()).unwrap();
    }
    let found = scan::scan(&Host, &Host.open_dir(dir.path()).unwrap(), &Progress::default(), &ThreadBudget::new(3, 0));
    assert_eq!(found, Err(scan::Error::Exceeds(scan::Limit::Path)));
    drop(at);
    Host.remove_tree(&dir.path().join(name.to_str().unwrap()), &|| false).unwrap();
}

/// The scan of a layer is kept for ever. A publisher that put a link in the place of a scanned directory
/// later had its mask show mode, owner and attributes of a directory of the host.
#[test]
fn root_a_directory_that_became_a_link_lends_no_attributes_of_the_host() {
    let place = Place::new();
    fs::create_dir_all(place.layer(1).join("a/b")).unwrap();
    fs::write(place.layer(1).join("a/b/.cvmfscatalog"), "").unwrap();
    let s = place.open();
    let chain = pull(&s, 1, "");
    s.prepare(wanted("first", &chain, &[])).unwrap();
    s.remove(&key("first")).unwrap();
    s.cleanup(&|| false).unwrap();
    let outside = place.dir.path().join("evil");
    fs::create_dir_all(outside.join("b")).unwrap();
    fs::set_permissions(outside.join("b"), fs::Permissions::from_mode(0o712)).unwrap();
    fs::rename(place.layer(1).join("a"), place.dir.path().join("before")).unwrap();
    symlink(&outside, place.layer(1).join("a")).unwrap();
    let second = s.prepare(wanted("second", &chain, &[]));
    assert!(matches!(second, Err(Error::LayerUnavailable { .. })), "{second:?}");
    let mask = place.snapshots().join("1/m/a/b");
    assert!(fs::metadata(mask).map_or(true, |status| status.mode() & 0o777 != 0o712));
}

/// A layer of 228,000 directories with 120 markers took 1.8 GiB, and left 1 GiB in the metadata.
#[test]
fn root_a_layer_that_exceeds_a_bound_is_refused_once_and_then_downloaded() {
    let place = Place::new();
    let path = place.layer(1).join("d/".repeat(1_800));
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join(".wh.gone"), "").unwrap();
    let s = place.open();
    let chain = pull(&s, 1, "");
    for name in ["first", "second"] {
        place.sys.asked.lock().clear();
        let Err(Error::LayerUnavailable { why, .. }) = s.prepare(wanted(name, &chain, &[])) else {
            panic!("a container stands on it")
        };
        assert_eq!(why, Unavailable::ScanFailed(scan::Error::Exceeds(scan::Limit::Path)));
        let is_scanned = place.sys.asked.lock().iter().any(|(call, _)| *call == "for_each_entry_below");
        assert!(name == "first" || !is_scanned, "the refusal is remembered");
    }
    s.remove(&key(&chain)).unwrap();
    let digest = digest(1);
    let labels = [(LABEL_SNAPSHOT_REF, "sha256:chain-1"), (LABEL_LAYER_DIGEST, digest.as_str())];
    let mounts = s.prepare(wanted("extract", "", &labels)).unwrap();
    assert_eq!(mounts[0].kind, crate::model::MountKind::Bind, "an ordinary snapshot, to be unpacked into");
    drop(s);
    assert!(fs::metadata(place.dir.path().join("metadata.sqlite")).unwrap().len() < 4 << 20);
}
