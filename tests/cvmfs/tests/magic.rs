//! Magic attributes, owners and counters of an unreachable server, which the client presents as the real one does.

#![forbid(unsafe_code)]

mod fixture;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cvmfs_testbed::client::Mount;
use fixture::{RepositoryFixture, odd_tree, plain_tree};
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

fn stage() -> RepositoryFixture {
    let mut stage = RepositoryFixture::new();
    plain_tree(&stage.source());
    odd_tree(&stage.source());
    stage.publish();
    stage
}

fn names(path: &Path) -> BTreeSet<String> {
    let names = xattr::list(path).unwrap_or_else(|error| panic!("list the attributes of {path:?}: {error}"));
    names.map(|name| name.into_string().expect("the name is ASCII")).collect()
}

fn value(mount: &Mount, path: &str, name: &str) -> Option<String> {
    let value =
        xattr::get(mount.mountpoint().join(path), name).unwrap_or_else(|error| panic!("{path} {name}: {error}"));
    value.map(|value| String::from_utf8(value).expect("the value is text"))
}

fn number(mount: &Mount, name: &str) -> u64 {
    let value = value(mount, "", name).unwrap_or_else(|| panic!("the root has no {name}"));
    value.parse().unwrap_or_else(|_| panic!("{name} is no number: {value}"))
}

#[test]
fn root_magic_attributes_are_listed_on_the_root_alone_and_answered_everywhere() {
    let stage = stage();
    let mount = stage.mount("mount", &[]);
    let root = mount.mountpoint();
    assert_eq!(names(root).len(), 36);
    for path in ["hello", "home", "layers/one"] {
        assert_eq!(names(&root.join(path)), BTreeSet::new(), "{path}");
        assert_eq!(value(&mount, path, "user.fqrn").as_deref(), Some(fixture::FQRN), "{path}");
    }
    assert_eq!(names(&root.join("odd")), BTreeSet::from(["user.dir".to_owned()]));
    assert_eq!(value(&mount, "hello", "user.compression").as_deref(), Some("zlib"));
    for (path, name) in [("home", "user.hash"), ("home", "user.chunks"), ("hello", "user.rawlink"), ("", "user.authz")]
    {
        assert_eq!(value(&mount, path, name), None, "{path} {name}");
    }
}

#[test]
fn root_magic_attributes_can_be_listed_on_every_inode() {
    let stage = stage();
    let mount = stage.mount("mount", &["--magic-xattrs", "always"]);
    let root = mount.mountpoint();
    let on_root = names(root);
    assert_eq!(on_root.len(), 36);
    assert_eq!(names(&root.join("home")), on_root);
    // Some exist only on files or links, so the root does not list them.
    let only_on_files: BTreeSet<_> = names(&root.join("hello")).difference(&on_root).cloned().collect();
    let expected = ["chunk_list", "chunks", "compression", "direct_io", "external_file", "hash", "lhash"]
        .map(|n| format!("user.{n}"));
    assert_eq!(only_on_files, BTreeSet::from(expected));
    let only_on_links: BTreeSet<_> = names(&root.join("dangling")).difference(&on_root).cloned().collect();
    assert_eq!(only_on_links, BTreeSet::from(["user.rawlink", "xfsroot.rawlink"].map(str::to_owned)));
    // The attributes that the publisher stored are listed with them.
    assert_eq!(names(&root.join("odd")), on_root.iter().cloned().chain(["user.dir".to_owned()]).collect());
    for name in &on_root {
        assert!(value(&mount, "home", name).is_some(), "{name} has no value");
    }
}

#[test]
fn root_magic_attributes_have_correct_values() {
    let stage = stage();
    let mount = stage.mount("mount", &[]);
    let of_root = |name| value(&mount, "", name).unwrap_or_default();
    assert_eq!(of_root("user.pid"), mount.pid().to_string());
    let cache = fs::read_link(format!("/proc/{}/cwd", mount.pid())).expect("the client runs");
    assert_eq!(cache, stage.dir.path().join("mount.cache"));
    assert_eq!(of_root("user.host"), stage.web.url());
    assert_eq!(of_root("user.host_list"), stage.web.url());
    assert_eq!((of_root("user.proxy"), of_root("user.timeout")), ("DIRECT".to_owned(), "5".to_owned()));
    assert_eq!(of_root("user.revision"), "1");
    assert!(of_root("user.logbuffer").len() >= 3 << 10, "{}", of_root("user.logbuffer").len());
    assert!(of_root("user.pubkeys").len() >= 2 << 10, "{}", of_root("user.pubkeys").len());
    let counters = of_root("user.catalog_counters");
    let start = format!("catalog_hash: {}\ncatalog_mountpoint: \n", of_root("user.root_hash"));
    assert!(counters.starts_with(&start) && counters.contains("\nself_nested,2\n"), "{counters}");
    // A file belongs to the catalog that lists it, the root of a nested catalog to that one.
    assert_eq!(value(&mount, "hello", "user.catalog_counters"), Some(counters));
    let nested = value(&mount, "layers/one", "user.catalog_counters").expect("a directory has a catalog");
    assert!(nested.contains("\ncatalog_mountpoint: /layers/one\n"), "{nested}");
    assert!(!nested.contains(&of_root("user.root_hash")), "{nested}");
    assert_eq!(value(&mount, "layers/one/dir0", "user.catalog_counters"), Some(nested));
}

#[test]
fn root_client_option_claims_ownership_for_one_user() {
    let stage = stage();
    let mount = stage.mount("mount", &["--claim-ownership", "993:992"]);
    for path in ["", "programs/su", "home/user", "dangling", "null", "layers/one/inner/dir0"] {
        let found = mount.mountpoint().join(path).symlink_metadata().expect("what was published is there");
        assert_eq!((found.uid(), found.gid()), (993, 992), "{path}");
    }
    let su = mount.mountpoint().join("programs/su").metadata().expect("the program is there");
    assert_eq!(su.mode() & 0o7777, 0o4755);
}

#[test]
fn root_client_counters_show_unreachable_server() {
    let delay = Duration::from_millis(700);
    let stage = stage();
    let mount = stage.mount("mount", &["--ttl", "0", "--retry-delay", "700"]);
    let root = mount.mountpoint();
    fs::read(root.join("hello")).expect("the server answers");
    assert_eq!((number(&mount, "user.nioerr"), number(&mount, "user.timestamp_last_ioerr")), (0, 0));

    stage.web.stop_answering();
    let begin = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
    // A file whose object is not cached, and a name in a catalog that is not.
    for path in ["home/user/file", "layers/one/dir0"] {
        let (before, asked) = (number(&mount, "user.nioerr"), Instant::now());
        let error = fs::File::open(root.join(path)).expect_err("what is not cached cannot be had");
        assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32), "{path}");
        assert!(asked.elapsed() >= delay, "{path}: answered after {:?}", asked.elapsed());
        assert!(number(&mount, "user.nioerr") > before, "{path}");
    }
    assert!(number(&mount, "user.timestamp_last_ioerr") >= begin);
    let log = value(&mount, "", "user.logbuffer").unwrap_or_default();
    assert!(log.contains(&stage.web.url()), "{log}");
    // Cached files, the root and statfs still work.
    fs::read(root.join("hello")).expect("a cached file can be read");
    assert!(fs::read_dir(root).expect("the root can be listed").count() > 5);
    statvfs(root).expect("statfs is answered");

    stage.web.answer();
    let errors = number(&mount, "user.nioerr");
    assert_eq!(fs::read(root.join("home/user/file")).expect("the server answers again"), b"mine");
    fs::metadata(root.join("layers/one/dir0")).expect("the server answers again");
    assert_eq!(number(&mount, "user.nioerr"), errors);
}

/// Tests can have the counters of an unreachable server without one.
#[test]
fn root_injected_failures_are_counted_as_io_errors() {
    let stage = stage();
    let mut mount = stage.mount("mount", &["--ttl", "0"]);
    let root = mount.mountpoint().to_owned();
    for (command, counted) in [("fail ESTALE", false), ("fail EIO", true)] {
        let before = number(&mount, "user.nioerr");
        assert_eq!(mount.command(command), "ok");
        fs::read(root.join("hello")).expect_err("everything but the root fails");
        assert_eq!(number(&mount, "user.nioerr") > before, counted, "{command}");
    }
}
