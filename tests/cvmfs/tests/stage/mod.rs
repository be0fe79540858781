//! What the tests with mounts share: a mount namespace of their own, a source tree with everything
//! that a file system can hold, and the comparison of two trees.

#![forbid(unsafe_code)]
#![allow(dead_code)] // each test program uses a part

use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use cvmfs_testbed::client::Mount;
use cvmfs_testbed::listing::Listing;
use cvmfs_testbed::publisher::{Publisher, Settings};
use cvmfs_testbed::web::Web;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

pub const FQRN: &str = "test.example.org";

/// Mounts of this test's thread and of its children are seen by nobody else.
pub fn private_namespace() {
    unshare(CloneFlags::CLONE_NEWNS).expect("root may have a mount namespace of its own");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .expect("root may make its mounts private");
}

/// A repository, its server, and places to mount it.
pub struct Stage {
    pub publisher: Publisher,
    pub web: Web,
    pub dir: TempDir,
}

impl Stage {
    pub fn new() -> Self {
        Self::with(Settings::EVERYTHING)
    }

    pub fn with(settings: Settings) -> Self {
        private_namespace();
        let dir = tempfile::tempdir().expect("the temporary directory takes a stage");
        fs::create_dir(dir.path().join("source")).expect("a new directory can be made");
        let publisher = Publisher::create(&dir.path().join("repository"), FQRN, settings);
        let web = Web::start(publisher.dir());
        Self { publisher, web, dir }
    }

    pub fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    pub fn publish(&mut self) -> u64 {
        let source = self.source();
        self.publisher.publish(&source)
    }

    /// Mounts at `name` below the stage's directory, with a cold cache.
    pub fn mount(&self, name: &str, options: &[&str]) -> Mount {
        let (mountpoint, cache) = (self.dir.path().join(name), self.dir.path().join(format!("{name}.cache")));
        fs::create_dir_all(&mountpoint).expect("a mountpoint can be made");
        let _ = fs::remove_dir_all(&cache);
        Mount::start(Path::new(env!("CARGO_BIN_EXE_cvmfs-test-client")), &self.web.url(), &mountpoint, &cache, options)
    }
}

pub fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().expect("a file lies in a directory")).expect("directories can be made");
    fs::write(path, content).expect("a file can be written");
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode can be set");
}

fn time(path: &Path, seconds: u64, nanoseconds: u32) {
    let time = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    File::open(path).and_then(|file| file.set_times(FileTimes::new().set_modified(time))).expect("a time can be set");
}

/// Bytes that compress badly.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// What every reader can show: content, modes, owners, links, deep paths, nested catalogs.
pub fn plain_tree(root: &Path) {
    write(&root.join("hello"), "hello\n");
    write(&root.join("empty"), "");
    write(&root.join("large"), noise(7, 5 << 20));
    write(&root.join("programs/su"), "not really");
    chown(root.join("programs/su"), Some(0), Some(42)).expect("root may give files away");
    mode(&root.join("programs/su"), 0o4755);
    write(&root.join("programs/wall"), "nor this");
    mode(&root.join("programs/wall"), 0o2755);
    fs::create_dir(root.join("tmp")).expect("a directory can be made");
    mode(&root.join("tmp"), 0o1777);
    write(&root.join("home/user/file"), "mine");
    for path in ["home/user", "home/user/file"] {
        chown(root.join(path), Some(1000), Some(1001)).expect("root may give files away");
    }
    mode(&root.join("home/user/file"), 0o600);
    symlink("../hello", root.join("home/link")).expect("a link can be made");
    symlink("/nowhere/at/all", root.join("dangling")).expect("a link can be made");
    lchown(root.join("dangling"), Some(7), Some(8)).expect("root may give links away");
    let deep: PathBuf = (0..40).map(|level| format!("level{level}")).collect();
    write(&root.join(deep).join("bottom"), "deep");
    // Three nested catalogs, one of them in another one, and a directory beside them whose name
    // begins like theirs.
    for nested in ["layers/one", "layers/one/inner", "layers/two"] {
        write(&root.join(nested).join(".cvmfscatalog"), "");
        for number in 0..20 {
            write(&root.join(nested).join(format!("dir{}/file{number}", number % 3)), noise(number, 3000));
        }
    }
    write(&root.join("layers/one-more/file"), "no catalog of its own");
    // More than fits one readdir buffer.
    for number in 0..600 {
        write(&root.join(format!("many/a rather long name for a small file {number}")), number.to_string());
    }
    time(&root.join("hello"), 1_000_000_000, 0);
    time(&root.join("layers/one"), 1_234_567_890, 0);
}

/// What only our own reader shows: devices, odd names, hard links, attributes, nanoseconds.
pub fn odd_tree(root: &Path) {
    let device = |name: &str, kind, number| {
        mknod(&root.join(name), kind, Mode::from_bits_truncate(0o640), number).expect("root may make devices");
    };
    device("null", SFlag::S_IFCHR, makedev(1, 3));
    device("whiteout", SFlag::S_IFCHR, 0);
    device("disk", SFlag::S_IFBLK, makedev(0x7ab, 0x54321));
    device("fifo", SFlag::S_IFIFO, 0);
    device("socket", SFlag::S_IFSOCK, 0);
    let odd = root.join("odd");
    for name in [&b"not utf-8: \xff\xfe"[..], b"line\nbreak", b" ", b"back\\slash \"quoted\"", &[b'n'; 255]] {
        write(&odd.join(OsStr::from_bytes(name)), name);
    }
    symlink(OsStr::from_bytes(b"\xff\nnowhere"), odd.join("link")).expect("a link can be made");
    fs::create_dir(odd.join(OsStr::from_bytes(b"dir \xf0"))).expect("a directory can be made");
    write(&odd.join(OsStr::from_bytes(b"dir \xf0")).join("file"), "below");
    write(&root.join("links/z"), "one of three");
    fs::hard_link(root.join("links/z"), root.join("links/a")).expect("a file can be linked");
    fs::hard_link(root.join("links/z"), root.join("hard")).expect("a file can be linked");
    symlink("z", root.join("links/soft")).expect("a link can be made");
    fs::hard_link(root.join("links/soft"), root.join("links/soft2")).expect("a link can be linked");
    write(&root.join("attributes"), "with some");
    for (name, value) in [("user.text", &b"a value"[..]), ("user.empty", b""), ("trusted.binary", b"\0\xff")] {
        xattr::set(root.join("attributes"), name, value).expect("the temporary directory keeps attributes");
    }
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(root.join("attributes"), "security.capability", &capability).expect("root may set capabilities");
    xattr::set(root.join("odd"), "user.dir", b"on a directory").expect("the temporary directory keeps attributes");
    time(&root.join("hello"), 1_000_000_000, 123_456_789);
    write(&root.join("old"), "");
    time(&root.join("old"), 0, 1);
}

/// What a comparison looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// All that `odd_tree` adds too.
    Everything,
    /// What the crate's reader can show.
    Plain,
}

/// The tree below `root`, without the attributes of the top: there a client adds its own.
pub fn seen(root: &Path, detail: Detail) -> Listing {
    let mut listing = Listing::read(root);
    listing.entries.get_mut(Path::new(".")).expect("a tree has a top").remove("xattrs");
    if detail == Detail::Plain {
        for property in ["xattrs", "nanoseconds", "device", "links"] {
            listing.leave_out(property);
        }
    }
    listing
}

/// Fails with the first few differences.
pub fn assert_same(source: &Path, mounted: &Path, detail: Detail) {
    assert_equal(&seen(source, detail), &seen(mounted, detail));
}

pub fn assert_equal(expected: &Listing, found: &Listing) {
    let differences: Vec<_> = expected.compare(found).iter().map(ToString::to_string).collect();
    let first = differences[..differences.len().min(10)].join("\n");
    assert!(differences.is_empty(), "{} differences:\n{first}", differences.len());
}
