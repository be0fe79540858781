//! The client against the repositories that the real publisher made.

#![forbid(unsafe_code)]

mod fixture;

use std::fs;
use std::path::Path;

use cvmfs_testbed::client::Mount;
use cvmfs_testbed::listing::Listing;
use cvmfs_testbed::real;
use cvmfs_testbed::web::Web;
use fixture::private_namespace;

/// Files whose objects were taken out of the repositories: listed, but not to be read.
fn is_without_object(path: &Path) -> bool {
    let below_singularity = || path.components().any(|part| part.as_os_str() == ".singularity.d");
    path == Path::new("new_repository") || (path.starts_with(".flat") && below_singularity())
}

#[test]
fn root_test_client_shows_real_repositories_like_the_real_client() {
    private_namespace();
    let dir = tempfile::tempdir().expect("the temporary directory takes two repositories");
    for fqrn in [real::ROOT, real::LOST] {
        let web = Web::start(&real::unpack_repository(fqrn, dir.path()));
        let (mountpoint, cache) = (dir.path().join("mount"), dir.path().join(format!("{fqrn}.cache")));
        fs::create_dir_all(&mountpoint).expect("a mountpoint can be made");
        let program = Path::new(env!("CARGO_BIN_EXE_cvmfs-test-client"));
        let mount = Mount::start(program, &web.url(), &mountpoint, &cache, &[]);
        let mut shown = Listing::read(mount.mountpoint());
        let expected = real::listing(fqrn);
        // The real listing has no parts of seconds, and no repository has any.
        assert!(shown.entries.values().all(|entry| entry["nanoseconds"] == "0"));
        shown.leave_out("nanoseconds");
        // The real listing was made without attributes. The client makes up those of the root.
        shown.entries.get_mut(Path::new(".")).expect("a tree has a top").remove("xattrs");
        for (path, entry) in &mut shown.entries {
            if entry["type"] == "file" && is_without_object(path) {
                assert_eq!(entry["content"], "unreadable: Input/output error (os error 5)", "{path:?}");
                let content = expected.entries.get(path).expect("the file is in the real listing")["content"].clone();
                entry.insert("content", content);
            }
        }
        let differences: Vec<_> = expected.compare(&shown).iter().map(ToString::to_string).collect();
        assert_eq!(differences, Vec::<String>::new(), "{fqrn}");
        assert!(expected.entries.len() > 1500, "{}", expected.entries.len());
    }
}
