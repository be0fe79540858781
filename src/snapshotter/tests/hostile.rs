//! Malicious clients and publishers: every path that the system is asked about, or that is changed, is checked afterwards.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::ops::{ControlFlow, Deref};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::{Mode as FileMode, SFlag, mknod};
use parking_lot::Mutex;

use super::fixture::{Fixture, digest, key, list_all, lower_dirs, pull, request};
use crate::model::AttachMode;
use crate::model::{
    Key, LABEL_IMAGE_REF, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF, LABEL_UID_MAPPING, Labels, MountKind, SnapshotId,
};
use crate::repository::executor::ThreadBudget;
use crate::repository::manifest::ImageRef;
use crate::repository::scan::{self, Progress};
use crate::repository::{Repository, Unavailable};
use crate::snapshotter::{Error, LabelChange, Snapshotter};
use crate::system::{self, Attributes, DirHandle, DiskUsage, FileSystem, FileType, Host, Status, Sys, Unmount};

/// The string that no path may contain.
const EVIL: &str = "evil";

/// The host, with a record of every path that was read or changed. Directories can be given additional entries, even such
/// that no kernel returns.
#[derive(Default)]
struct RecordingSys {
    read: Mutex<Vec<(&'static str, PathBuf)>>,
    changed: Mutex<Vec<(&'static str, PathBuf)>>,
    entries: Mutex<HashMap<PathBuf, Vec<(OsString, FileType)>>>,
}

macro_rules! record {
    ($($log:ident $name:ident($($arg:ident: $type:ty),*) -> $result:ty, $($path:ident)+;)*) => {
        $(fn $name(&self, $($arg: $type),*) -> system::Result<$result> {
            $(self.$log.lock().push((stringify!($name), $path.to_owned()));)+
            Host.$name($($arg),*)
        })*
    };
}

impl Sys for RecordingSys {
    record! {
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
        read stat(path: &Path) -> Status, path;
        read lstat(path: &Path) -> Status, path;
        read read_link(path: &Path) -> PathBuf, path;
        read read_file(path: &Path, limit: u64) -> Vec<u8>, path;
        read attribute(path: &Path, name: &str) -> Option<Vec<u8>>, path;
        read attribute_names(path: &Path) -> Vec<OsString>, path;
        read open_dir(path: &Path) -> DirHandle, path;
        read statfs(path: &Path) -> FileSystem, path;
        read disk_usage(path: &Path, cancelled: &dyn Fn() -> bool) -> DiskUsage, path;
        read mounted_fuse(path: &Path) -> Option<u64>, path;
        read mounted(path: &Path) -> Option<u64>, path;
        read mounts_below(path: &Path) -> Vec<PathBuf>, path;
    }

    fn open_below(&self, dir: &DirHandle, below: &Path) -> system::Result<DirHandle> {
        self.read.lock().push(("open_below", dir.path().join(below)));
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
        self.read.lock().push(("attributes_below", dir.path().join(below)));
        Host.attributes_below(dir, below, ignored)
    }

    fn for_each_entry_below(
        &self,
        dir: &DirHandle,
        below: &Path,
        each: &mut dyn FnMut(&OsStr, FileType) -> ControlFlow<()>,
    ) -> system::Result<Status> {
        let path = dir.path().join(below);
        self.read.lock().push(("for_each_entry_below", path.clone()));
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
        self.read.lock().push(("for_each_entry", path.to_owned()));
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

const IMAGE: &str = "good.org/image:1";

/// A state root and a repository whose use is recorded. Layers are attached as links, so that nothing is mounted.
struct RecordedFixture {
    fixture: Fixture,
    sys: Arc<RecordingSys>,
}

impl Deref for RecordedFixture {
    type Target = Fixture;

    fn deref(&self) -> &Fixture {
        &self.fixture
    }
}

impl RecordedFixture {
    fn new() -> Self {
        Self { fixture: Fixture::without_layers(AttachMode::Symlink), sys: Arc::default() }
    }

    fn open(&self) -> Snapshotter {
        self.fixture.open(Arc::<RecordingSys>::clone(&self.sys))
    }

    fn manifest(&self) -> PathBuf {
        self.repository().join(".metadata").join(IMAGE).join("manifest.json")
    }

    /// Publishes the manifest of an image with these layers.
    fn publish_manifest(&self, layers: &[u8]) {
        let descriptor = |n: u8| serde_json::json!({ "Digest": digest(n).as_str() });
        let layers: Vec<_> = layers.iter().map(|n| descriptor(*n)).collect();
        fs::create_dir_all(self.manifest().parent().unwrap()).unwrap();
        fs::write(self.manifest(), serde_json::json!({ "Config": descriptor(9), "Layers": layers }).to_string())
            .unwrap();
    }

    /// Checks that only known names in the state root were changed, and only those of published files read.
    #[track_caller]
    fn check_paths(&self) {
        let changed = self.sys.changed.lock();
        for (call, path) in changed.iter() {
            let below = path.strip_prefix(self.snapshots());
            let below = below.unwrap_or_else(|_| panic!("{call} outside of the snapshots: {path:?}"));
            check_snapshot(call, below);
        }
        for (call, path) in self.sys.read.lock().iter() {
            if let Ok(below) = path.strip_prefix(self.snapshots()) {
                check_snapshot(call, below);
            } else if let Ok(below) = path.strip_prefix("/proc/self/fd") {
                // This is an entry of a directory that was opened before.
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
    let entry = names.next().unwrap_or("fs");
    let stem = entry.trim_end_matches(".new").trim_end_matches(".of").trim_end_matches(".new");
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

/// Texts that would lead a path elsewhere, or add a line or a name to it.
fn malicious_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
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
        "good.org/../evil:1",
        "good.org/evil:../1",
        "good.org/image:1/../evil",
        "../evil/image:1@sha256:evil",
        "labels.evil",
    ]
    .map(str::to_owned)
    .into();
    texts.push(format!("sha256:{}/../evil", "0".repeat(57)));
    texts.push("evil/".repeat(2_000));
    texts
}

/// Counts for each call how often it succeeded, which shows that the texts were not just refused.
#[derive(Default)]
struct SuccessCount(BTreeMap<&'static str, usize>);

impl SuccessCount {
    fn count(&mut self, call: &'static str, has_succeeded: bool) {
        *self.0.entry(call).or_default() += usize::from(has_succeeded);
    }
}

/// Pulls: one of the labels is malicious, or none is.
fn pull_with_texts(s: &Snapshotter, chain: &str, text: &str, other: &str, successes: &mut SuccessCount) {
    let good = digest(1);
    for malicious in 0..4 {
        let labels = [
            (LABEL_SNAPSHOT_REF, [text, "sha256:chain", chain, "sha256:chain"][malicious]),
            (LABEL_LAYER_DIGEST, if malicious == 1 { text } else { good.as_str() }),
            (LABEL_IMAGE_REF, if malicious == 2 { text } else { IMAGE }),
            (text, other),
        ];
        let pulled = s.prepare(request(&format!("{text}{malicious}"), "", &labels));
        successes.count("pull", matches!(pulled, Err(Error::RemoteCommitted { .. })));
    }
}

/// Malicious texts in every field of every request. Only digests and references of images become part of a path, and only
/// after they were parsed.
#[test]
fn root_no_client_string_reaches_a_path() {
    let texts = malicious_texts();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let fixture = RecordedFixture::new();
    for n in [1, 2] {
        fs::create_dir_all(fixture.layer(n)).unwrap();
        fs::write(fixture.layer(n).join(".wh.gone"), "").unwrap();
    }
    let s = fixture.open();
    let mut successes = SuccessCount::default();
    for (n, &text) in texts.iter().enumerate() {
        let other = texts[(n + 5) % texts.len()];
        let chain = format!("sha256:chain-{n}");
        pull_with_texts(&s, &chain, text, other, &mut successes);
        let mut count = |call, has_succeeded| successes.count(call, has_succeeded);
        for parent in ["", "cvmfs/0/sha256:chain", &format!("cvmfs/0/{text}"), &format!("cvmfs/0/{chain}")] {
            let labels = [(text, other), (LABEL_IMAGE_REF, other), (LABEL_UID_MAPPING, "0:0:1")];
            let name = format!("{text} on {parent}");
            count("prepare", s.prepare(request(&name, parent, &labels)).is_ok());
            count("view", s.view(request(&format!("{name} view"), parent, &labels)).is_ok());
            count("mounts", s.mounts(&key(&name)).is_ok());
            count("usage", s.usage(&key(&name), &|| false).is_ok());
            count("commit", s.commit(&key(&format!("{name} committed")), &key(&name), Labels::new(), None).is_ok());
            let change = LabelChange::Each(vec![(text.to_owned(), Some(other.to_owned()))]);
            count("update", s.update(&key(&format!("{name} committed")), &change).is_ok());
            count("stat", s.stat(&key(&format!("{name} committed"))).is_ok());
        }
        count("list", s.list(Some((text, other)), |_| true).is_ok());
        assert!(s.prepare(request("mapped", "", &[(LABEL_UID_MAPPING, text)])).is_err());
    }
    let all: Vec<Key> = list_all(&s).into_iter().map(|snapshot| snapshot.key).collect();
    while all.iter().any(|key| s.remove(key).is_ok()) {}
    successes.count("remove", list_all(&s).is_empty());
    successes.count("cleanup", s.cleanup(&|| false).unwrap().remaining == 0);
    let SuccessCount(successes) = successes;
    assert_eq!(successes.len(), 11, "{successes:?}");
    for (call, count) in &successes {
        assert!(*count >= if matches!(*call, "remove" | "cleanup") { 1 } else { texts.len() }, "{call}: {successes:?}");
    }
    drop(s);
    fixture.check_paths();
    assert!(fixture.sys.changed.lock().len() > 200 && fixture.sys.read.lock().len() > 1_000);
    assert_eq!(fs::read_dir(fixture.snapshots()).unwrap().count(), 0);
}

fn device(path: &Path, kind: SFlag) {
    mknod(path, kind, FileMode::from_bits_truncate(0o644), nix::sys::stat::makedev(1, 5)).unwrap();
}

/// The layer has names and file types that are as odd as a file system allows.
#[test]
fn root_layer_with_odd_names_and_links_only_hides_names_in_its_own_snapshot() {
    let fixture = RecordedFixture::new();
    let outside = fixture.dir.path().join("evil");
    fs::create_dir_all(outside.join("inner")).unwrap();
    fs::write(outside.join(".wh.evil"), "").unwrap();
    let top = fixture.layer(2);
    fs::create_dir_all(fixture.layer(1)).unwrap();
    fs::create_dir_all(top.join("d/.wh.directory/inner")).unwrap();
    fs::create_dir_all(top.join(".wh..wh.plnk/inner")).unwrap();
    // These links stand where directories could be, and lead to markers.
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
    let s = fixture.open();
    let chain = pull(&s, 1, "");
    let upper = pull(&s, 2, &chain);
    let mounts = s.prepare(request("container", &upper, &[])).unwrap();
    let [mask, _, hide, ..] = lower_dirs(&mounts)[..] else { panic!("{mounts:?}") };
    let names = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(mask), [".wh..wh.plnk", ".wh.x", "d"]);
    // Each marker is hidden. It deletes the name in it, unless that is invalid or the layer has an entry of that name.
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
    fixture.check_paths();
}

/// No kernel returns such names. If one did, nothing may be read or made at the paths that they would lead to.
#[test]
fn root_impossible_entry_names_make_a_layer_unavailable() {
    for name in ["..", ".", "", "../../evil", "/etc/evil", "a/evil", ".wh.a/evil", ".wh.../evil", ".wh./evil"] {
        for file_type in [FileType::Directory, FileType::Other, FileType::Symlink] {
            for below in ["", "d"] {
                let fixture = RecordedFixture::new();
                fs::create_dir_all(fixture.layer(1)).unwrap();
                fs::create_dir_all(fixture.layer(2).join("d")).unwrap();
                let entries = vec![(OsString::from(name), file_type)];
                fixture.sys.entries.lock().insert(fixture.layer(2).join(below), entries);
                let s = fixture.open();
                let chain = pull(&s, 1, "");
                let upper = pull(&s, 2, &chain);
                let Err(Error::LayerUnavailable { why: Unavailable::Unreadable(e), .. }) =
                    s.prepare(request("container", &upper, &[]))
                else {
                    panic!("{name:?} passed for a valid name")
                };
                assert_eq!((e.call, e.errno), ("read directory", Errno::EIO));
                // Other layers are not affected.
                s.prepare(request("other", &chain, &[])).unwrap();
                drop(s);
                fixture.check_paths();
            }
        }
    }
}

/// A link in place of any directory on the path: the pull downloads the layer, and nothing behind the link is read.
#[test]
fn root_link_on_the_path_to_a_layer_is_not_followed() {
    for depth in 0..4 {
        let fixture = RecordedFixture::new();
        let elsewhere = fixture.dir.path().join("evil");
        fs::create_dir_all(fixture.layer(1).join("d")).unwrap();
        let link = fixture.layer(1).ancestors().nth(depth).unwrap().to_owned();
        fs::rename(&link, &elsewhere).unwrap();
        symlink(&elsewhere, &link).unwrap();
        let s = fixture.open();
        let asked = request("extract", "", &[(LABEL_SNAPSHOT_REF, "c"), (LABEL_LAYER_DIGEST, digest(1).as_str())]);
        let mounts = s.prepare(asked).unwrap();
        assert_eq!(mounts[0].kind, MountKind::Bind, "the layer is downloaded into an ordinary snapshot");
        drop(s);
        fixture.check_paths();
        // `open_below` records the whole path, of which it may have resolved a part only.
        let is_behind = |call: &str, path: &Path| call != "open_below" && path.starts_with(&link) && *path != link;
        let behind = fixture.sys.read.lock().iter().any(|(call, path)| is_behind(call, path));
        assert!(!behind, "something behind {link:?} was read");
    }
}

/// Everything that can stand in place of a manifest.
#[test]
fn root_file_that_is_no_manifest_is_ignored() {
    type SetUp = fn(&Path);
    let cases: [(&str, SetUp); 12] = [
        ("a fifo", |path| device(path, SFlag::S_IFIFO)),
        ("/dev/zero", |path| device(path, SFlag::S_IFCHR)),
        ("a socket", |path| device(path, SFlag::S_IFSOCK)),
        ("a link to /dev/zero", |path| symlink("/dev/zero", path).unwrap()),
        ("a link to a file of the host", |path| symlink("/proc/self/environ", path).unwrap()),
        ("a directory", |path| fs::create_dir(path).unwrap()),
        ("4 GiB of nothing", |path| fs::File::create(path).unwrap().set_len(4 << 30).unwrap()),
        ("250 KiB of brackets", |path| fs::write(path, "[".repeat(250 << 10)).unwrap()),
        ("250 KB of objects", |path| fs::write(path, "{\"Config\":".repeat(25_000)).unwrap()),
        ("wrong types", |path| fs::write(path, r#"{"Config":[],"Layers":{"0":null}}"#).unwrap()),
        ("keys that stand twice", |path| {
            let text = fs::read_to_string(path.with_extension("good")).unwrap();
            fs::write(path, text.replacen('{', r#"{"Layers":[],"config":{"Digest":"sha256:../evil"},"#, 1)).unwrap();
        }),
        ("bytes that are no text", |path| fs::write(path, [0xff; 1_000]).unwrap()),
    ];
    let fixture = RecordedFixture::new();
    fs::create_dir_all(fixture.layer(1)).unwrap();
    fixture.publish_manifest(&[1]);
    let good = fixture.manifest().with_extension("good");
    fs::rename(fixture.manifest(), &good).unwrap();
    let repository = Repository::new("r".into(), fixture.repository(), Duration::from_secs(10), Arc::new(Host));
    for (case, set_up) in cases {
        set_up(&fixture.manifest());
        let manifest = repository.generation().manifest(&ImageRef::parse(IMAGE).unwrap()).unwrap();
        assert_eq!(manifest, None, "{case}");
        let path = fixture.manifest();
        if path.is_dir() && !path.is_symlink() { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
}

/// The entries of a huge directory.
struct Entries {
    count: usize,
    file_type: FileType,
    name: fn(usize) -> String,
}

#[test]
fn scan_reads_a_million_entries_and_refuses_a_million_markers() {
    let plain = Entries { count: 1_000_000, file_type: FileType::Other, name: |n| format!("file-{n}") };
    let few = Entries { count: 70_000, file_type: FileType::Other, name: |n| format!(".wh.{n}") };
    let many = Entries { count: 1_000_000, file_type: FileType::Other, name: |n| format!(".wh.{n}") };
    for (entries, expected) in [(plain, Some(0)), (few, Some(70_000)), (many, None)] {
        let dir = tempfile::tempdir().unwrap();
        let sys = RecordingSys::default();
        let entries = (0..entries.count).map(|n| ((entries.name)(n).into(), entries.file_type)).collect();
        sys.entries.lock().insert(dir.path().to_owned(), entries);
        let result =
            scan::scan(&sys, &Host.open_dir(dir.path()).unwrap(), &Progress::default(), &ThreadBudget::new(3, 0));
        match expected {
            Some(markers) => assert_eq!(result.unwrap().directories[0].hidden.len(), markers),
            None => assert_eq!(result, Err(scan::Error::Exceeds(scan::Limit::Memory))),
        }
    }
}

/// This was reported as an error of the repository: each start failed, and a new pull took the published layer again. A
/// layer that exceeds a limit is remembered, and downloaded.
#[test]
fn scan_refuses_a_tree_that_is_deeper_than_paths_are_long() {
    let dir = tempfile::tempdir().unwrap();
    let mut directory = nix::fcntl::open(dir.path(), nix::fcntl::OFlag::O_DIRECTORY, FileMode::empty()).unwrap();
    let name = CString::new("deep-".repeat(10)).unwrap();
    for _ in 0..2_000 {
        nix::sys::stat::mkdirat(&directory, name.as_c_str(), FileMode::S_IRWXU).unwrap();
        directory =
            nix::fcntl::openat(&directory, name.as_c_str(), nix::fcntl::OFlag::O_DIRECTORY, FileMode::empty()).unwrap();
    }
    let result = scan::scan(&Host, &Host.open_dir(dir.path()).unwrap(), &Progress::default(), &ThreadBudget::new(3, 0));
    assert_eq!(result, Err(scan::Error::Exceeds(scan::Limit::Path)));
    drop(directory);
    Host.remove_tree(&dir.path().join(name.to_str().unwrap()), &|| false).unwrap();
}

/// The scan of a layer is stored for good. When a publisher put a link in place of a scanned directory later, the mask
/// showed mode, owner and attributes of a directory of the host.
#[test]
fn root_scanned_directory_replaced_by_a_link_shows_no_attributes_of_the_host() {
    let fixture = RecordedFixture::new();
    fs::create_dir_all(fixture.layer(1).join("a/b")).unwrap();
    fs::write(fixture.layer(1).join("a/b/.cvmfscatalog"), "").unwrap();
    let s = fixture.open();
    let chain = pull(&s, 1, "");
    s.prepare(request("first", &chain, &[])).unwrap();
    s.remove(&key("first")).unwrap();
    s.cleanup(&|| false).unwrap();
    let outside = fixture.dir.path().join("evil");
    fs::create_dir_all(outside.join("b")).unwrap();
    fs::set_permissions(outside.join("b"), fs::Permissions::from_mode(0o712)).unwrap();
    fs::rename(fixture.layer(1).join("a"), fixture.dir.path().join("before")).unwrap();
    symlink(&outside, fixture.layer(1).join("a")).unwrap();
    let second = s.prepare(request("second", &chain, &[]));
    assert!(matches!(second, Err(Error::LayerUnavailable { .. })), "{second:?}");
    let mask = fixture.snapshots().join("1/m/a/b");
    assert!(fs::metadata(mask).map_or(true, |status| status.mode() & 0o777 != 0o712));
}

/// A layer of 228,000 directories with 120 markers took 1.8 GiB, and left 1 GiB in the metadata.
#[test]
fn root_layer_that_exceeds_a_limit_is_refused_once_and_then_downloaded() {
    let fixture = RecordedFixture::new();
    let path = fixture.layer(1).join("d/".repeat(1_800));
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join(".wh.gone"), "").unwrap();
    let s = fixture.open();
    let chain = pull(&s, 1, "");
    for name in ["first", "second"] {
        fixture.sys.read.lock().clear();
        let Err(Error::LayerUnavailable { why, .. }) = s.prepare(request(name, &chain, &[])) else {
            panic!("a container stands on it")
        };
        assert_eq!(why, Unavailable::ScanFailed(scan::Error::Exceeds(scan::Limit::Path)));
        let is_scanned = fixture.sys.read.lock().iter().any(|(call, _)| *call == "for_each_entry_below");
        assert!(name == "first" || !is_scanned, "the refusal is remembered");
    }
    s.remove(&key(&chain)).unwrap();
    let digest = digest(1);
    let labels = [(LABEL_SNAPSHOT_REF, "sha256:chain-1"), (LABEL_LAYER_DIGEST, digest.as_str())];
    let mounts = s.prepare(request("extract", "", &labels)).unwrap();
    assert_eq!(mounts[0].kind, MountKind::Bind, "the layer is downloaded into an ordinary snapshot");
    drop(s);
    assert!(fs::metadata(fixture.metadata()).unwrap().len() < 4 << 20);
}
