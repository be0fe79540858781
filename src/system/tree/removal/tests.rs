use super::super::tests::make_chain;
use super::super::usage::disk_usage;
use super::*;
use std::cell::Cell;
use std::fs;
use std::os::unix::fs::symlink;

fn remove(path: &Path) -> Result<(), Errno> {
    super::remove(path, &|| false)
}

fn inodes(path: &Path) -> u64 {
    disk_usage(path, &|| false).unwrap().inodes
}

/// A container can make a tree this deep. The walk of the standard library recurses once for each level and ran out of
/// stack, at every later start as well.
#[test]
fn tree_of_any_depth_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    fs::create_dir(&top).unwrap();
    make_chain(&top, 20_000);
    fs::create_dir_all(top.join(".hoisted-0/x/y")).unwrap();
    fs::write(top.join(".hoisted-1"), "").unwrap();
    remove(&top).unwrap();
    assert!(!top.exists());
    remove(&top).unwrap();
}

/// All names of a directory were once read before the first was removed, so a killed removal made no progress.
#[test]
fn cancelled_removal_has_removed_what_it_read() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    fs::create_dir_all(top.join("a/b")).unwrap();
    for n in 0..3_000 {
        fs::write(top.join(format!("a/b/{n}")), "").unwrap();
    }
    let mut before = inodes(&top);
    let mut rounds = 0;
    while top.exists() {
        let calls = Cell::new(0);
        let result = super::remove(&top, &|| calls.replace(calls.get() + 1) == 1_000);
        rounds += 1;
        if result == Ok(()) {
            break;
        }
        assert_eq!(result, Err(Errno::ECANCELED));
        let now = inodes(&top);
        assert!(now + 900 < before, "{before} entries before, {now} now");
        before = now;
    }
    assert!(!top.exists());
    assert_eq!(rounds, 4);
}

#[test]
fn entry_that_cannot_be_removed_keeps_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    for n in 0..50 {
        fs::create_dir_all(top.join(format!("{n}/deep"))).unwrap();
        fs::write(top.join(format!("{n}/deep/file")), "").unwrap();
    }
    let immutable = |flag: &str, path: &Path| {
        std::process::Command::new("chattr").arg(flag).arg(path).status().is_ok_and(|status| status.success())
    };
    if !immutable("+i", &top.join("7/deep/file")) {
        let is_skip_allowed = std::env::var_os("ALLOW_SKIP").is_some_and(|value| value == "1");
        assert!(is_skip_allowed, "chattr +i does not work below {}; ALLOW_SKIP=1 skips this test", top.display());
        eprintln!("SKIPPED: chattr +i does not work below {}", top.display());
        return;
    }
    assert_eq!(remove(&top), Err(Errno::EPERM));
    assert_eq!(inodes(&top), 3, "the top, one directory and the file");
    let directory = fs::read_dir(&top).unwrap().next().unwrap().unwrap().path();
    assert!(immutable("-i", &directory.join("file")));
    remove(&top).unwrap();
}

#[test]
fn links_are_removed_and_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (top, other) = (dir.path().join("top"), dir.path().join("other"));
    fs::create_dir_all(top.join("a/b")).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("precious"), "").unwrap();
    symlink(&other, top.join("a/b/link")).unwrap();
    symlink(&other, top.join("link")).unwrap();
    remove(&top).unwrap();
    symlink(&other, &top).unwrap();
    remove(&top).unwrap();
    assert!(other.join("precious").exists());
}
