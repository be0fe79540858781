use super::*;
use crate::repository::executor::ThreadBudget;
use crate::system::{Host, Sys};
use std::fs;
use std::path::Path;

fn layer(directories: &[&str], files: &[&str]) -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    for directory in directories {
        fs::create_dir_all(top.path().join(directory)).unwrap();
    }
    for file in files {
        fs::write(top.path().join(file), "").unwrap();
    }
    top
}

fn find(sys: &dyn Sys, top: &Path) -> Result<Scan> {
    scan(sys, &Host.open_dir(top).unwrap(), &Progress::default(), &ThreadBudget::new(3, 0))
}

/// `path: -deleted … !hidden … =opaque`, one line a directory.
fn shown(top: &tempfile::TempDir) -> Vec<String> {
    let scan = find(&Host, top.path()).unwrap();
    scan.directories
        .iter()
        .enumerate()
        .map(|(place, d)| {
            let mut line = format!("{}:", scan.path(place).display());
            for name in &d.deleted {
                line = format!("{line} -{}", name.display());
            }
            for name in &d.hidden {
                line = format!("{line} !{}", name.display());
            }
            line + if d.opaque { " =opaque" } else { "" }
        })
        .collect()
}

#[test]
fn markers_are_found_with_the_directories_above_them() {
    let top = layer(
        &["a/b/c", "x/y"],
        &[".cvmfscatalog", "x/.cvmfsautocatalog", "a/b/c/.wh.gone", "a/b/c/kept", "x/y/.wh..wh..opq", "x/f"],
    );
    assert_eq!(
        shown(&top),
        [
            ": !.cvmfscatalog",
            "a:",
            "a/b:",
            "a/b/c: -gone !.wh.gone",
            "x: !.cvmfsautocatalog",
            "x/y: !.wh..wh..opq =opaque"
        ]
    );
}

#[test]
fn layer_without_markers_has_only_its_top() {
    assert_eq!(shown(&layer(&["a/b"], &["a/f"])), [":"]);
}

#[test]
fn name_that_is_there_is_not_deleted() {
    let top = layer(&["d", "d/dir"], &["d/.wh.file", "d/file", "d/.wh.dir", "d/.wh.gone"]);
    assert_eq!(shown(&top), [":", "d: -gone !.wh.dir !.wh.file !.wh.gone"]);
}

#[test]
fn records_of_aufs_at_the_top_are_hidden_and_delete_nothing() {
    let top = layer(&[".wh..wh.plnk/inner"], &[".wh..wh..opq", ".wh..wh.aufs"]);
    assert_eq!(shown(&top), [": !.wh..wh..opq !.wh..wh.aufs !.wh..wh.plnk"]);
}

#[test]
fn markers_that_name_no_entry_are_only_hidden() {
    let top = layer(&["d"], &["d/.wh.", "d/.wh..", "d/.wh..."]);
    assert_eq!(shown(&top), [":", "d: !.wh. !.wh.. !.wh..."]);
}

#[test]
fn markers_with_unusual_names_are_found() {
    let long = format!("d/.wh.{}", "n".repeat(251));
    let top = layer(&["d"], &["d/.wh.two words", "d/.wh.line\nbreak", &long]);
    let scan = find(&Host, top.path()).unwrap();
    let deleted: Vec<usize> = scan.directories[1].deleted.iter().map(|n| n.len()).collect();
    assert_eq!(deleted, [10, 251, 9]);
}

#[test]
fn directory_named_like_a_catalog_marker_belongs_to_the_image() {
    assert_eq!(shown(&layer(&[".cvmfscatalog"], &[])), [":"]);
}

#[test]
fn files_of_the_publisher_are_hidden_in_every_directory() {
    let names = [".cvmfsautocatalog", ".cvmfsbundle-python", ".cvmfscatalog", ".cvmfsdirtab"];
    let files: Vec<String> = names.iter().flat_map(|n| [(*n).to_owned(), format!("a/b/{n}")]).collect();
    let top = layer(&["a/b"], &files.iter().map(String::as_str).collect::<Vec<_>>());
    let hidden = names.map(|name| format!(" !{name}")).concat();
    assert_eq!(shown(&top), [format!(":{hidden}"), "a:".to_owned(), format!("a/b:{hidden}")]);
}

#[test]
fn names_that_only_resemble_the_publishers_belong_to_the_image() {
    assert_eq!(shown(&layer(&["a"], &[".cvmfs", "a/.cvmfscatalog.old", "a/.cvmfsbundle", "a/cvmfsdirtab"])), [":"]);
}

#[test]
fn several_threads_find_what_one_finds() {
    let names: Vec<String> = (0..400).map(|n| format!("{}/{}/{n}", n % 7, n % 31)).collect();
    let directories: Vec<&str> = names.iter().map(String::as_str).collect();
    let marked: Vec<String> = names.iter().map(|name| format!("{name}/.wh.gone")).collect();
    let files: Vec<&str> = marked.iter().map(String::as_str).collect();
    let top = layer(&directories, &files);
    let scan = find(&Host, top.path()).unwrap();
    let found = scan.directories.iter().filter(|d| d.deleted == ["gone"]).count();
    let parents = 1 + 7 + 7 * 31;
    assert_eq!((found, scan.directories.len()), (400, 400 + parents));
    assert!((0..scan.directories.len()).is_sorted_by_key(|place| scan.path(place)));
}

/// An unreadable directory must not pass for one without deletions.
#[test]
fn directory_that_cannot_be_read_is_an_error() {
    let names: Vec<String> = (0..300).map(|n| format!("d/{n}")).collect();
    let top = layer(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    for unreadable in ["", "d", "d/0", "d/150", "d/299"] {
        let at = top.path().join(unreadable);
        let sys = crate::system::testing::FaultySys::refusing(at.clone(), nix::errno::Errno::EIO);
        let Err(Error::System(e)) = find(&sys, top.path()) else { panic!("{unreadable} was read") };
        assert_eq!((e.path, e.errno), (at, nix::errno::Errno::EIO));
    }
}

/// A layer with 65,600 directories of nobody and no marker was reported to have too many markers.
#[test]
fn message_of_a_limit_for_directories_of_nobody_names_them() {
    for limit in [Limit::Marked, Limit::Names, Limit::Path] {
        assert!(limit.to_string().contains("of nobody (uid or gid 65534)"), "{limit}");
    }
}

#[test]
fn endless_directory_takes_bounded_memory() {
    let top = tempfile::tempdir().unwrap();
    let sys = crate::system::testing::FaultySys::endless(MAX_MEMORY / 200);
    let read = Progress::default();
    let handle = sys.open_dir(top.path()).unwrap();
    assert_eq!(scan(&sys, &handle, &read, &ThreadBudget::new(3, 0)), Err(Error::Exceeds(Limit::Memory)));
    assert!(read.directories.into_inner() < 100);
}

/// Each marker was stored with the whole path of every directory above it, twice: 200 deep directories took 1.7 GiB.
#[test]
fn deep_directories_take_the_memory_of_their_names_and_are_bounded() {
    let deep = |chains: usize, depth: usize| {
        // The directories are made in memory, because a disk takes minutes for so many.
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        for chain in 0..chains {
            let path: PathBuf = std::iter::once(chain.to_string()).chain(vec!["d".to_owned(); depth]).collect();
            fs::create_dir_all(top.path().join(&path)).unwrap();
            fs::write(top.path().join(path).join(".wh.gone"), "").unwrap();
        }
        top
    };
    let scan = find(&Host, deep(20, 1_000).path()).unwrap();
    assert_eq!(scan.directories.len(), 1 + 20 * 1_001);
    let bytes: usize = scan.directories.iter().map(|d| size_of::<Directory>() + d.name.len()).sum();
    assert!(bytes < 4 << 20, "{bytes} bytes");
    assert_eq!(find(&Host, deep(70, 1_000).path()), Err(Error::Exceeds(Limit::Marked)));
    assert_eq!(find(&Host, deep(1, 1_800).path()), Err(Error::Exceeds(Limit::Path)));
}

#[test]
fn names_of_markers_are_bounded() {
    let top = tempfile::tempdir().unwrap();
    for n in 0..MAX_RESULT_BYTES / 500 {
        fs::write(top.path().join(format!(".wh.{n:0250}")), "").unwrap();
    }
    assert_eq!(find(&Host, top.path()), Err(Error::Exceeds(Limit::Names)));
}

#[test]
fn directories_without_an_owner_are_found_except_for_the_top() {
    let top = layer(&["a/b/c", "d"], &[]);
    let found = |path: &str| {
        let sys = crate::system::testing::FaultySys::without_owner(top.path().join(path));
        let scan = find(&sys, top.path()).unwrap();
        let unowned = (0..scan.directories.len()).filter(|place| scan.directories[*place].has_no_owner);
        unowned.map(|place| scan.path(place).display().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(found("a/b"), ["a/b"]);
    assert_eq!(found("d"), ["d"]);
    assert_eq!(found(""), Vec::<String>::new());
}
