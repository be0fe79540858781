use std::fs;
use std::os::unix::fs::lchown;

use super::*;
use crate::repository::FQRN_XATTR;
use crate::repository::client::tests::ServingProcess;
use crate::system::Host;

const OWNER: Owner = Owner { uid: 991, gid: 990 };

/// A layer with `files` files in `/dir`, all of one owner.
fn layer(repository: &Path, digit: char, files: usize, owner: Owner) -> PathBuf {
    let hex = digit.to_string().repeat(64);
    let top = repository.join(format!(".layers/{}/{hex}/layerfs", &hex[..2]));
    fs::create_dir_all(top.join("dir")).unwrap();
    for n in 0..files {
        fs::write(top.join(format!("dir/{n}")), "").unwrap();
        give(&top.join(format!("dir/{n}")), owner);
    }
    give(&top.join("dir"), owner);
    give(&top, owner);
    top
}

fn give(path: &Path, Owner { uid, gid }: Owner) {
    lchown(path, Some(uid), Some(gid)).unwrap();
}

fn owners(repository: &Path) -> Owners {
    sample(&Host, repository).unwrap().owners
}

#[test]
fn root_owners_are_kept_if_any_two_entries_of_a_sample_differ() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(owners(dir.path()), Owners::Unknown);
    // The old rule saw one owner at the top of both.
    layer(dir.path(), 'a', 20, OWNER);
    let top = layer(dir.path(), 'b', 20, OWNER);
    assert_eq!(owners(dir.path()), Owners::Lost(OWNER));
    give(&top.join("dir/7"), Owner { uid: 0, ..OWNER });
    assert_eq!(owners(dir.path()), Owners::Kept);
    give(&top.join("dir/7"), Owner { gid: 0, ..OWNER });
    assert_eq!(owners(dir.path()), Owners::Kept);
}

#[test]
fn root_directories_of_the_repository_owner_do_not_mean_that_owners_are_lost() {
    let dir = tempfile::tempdir().unwrap();
    let top = layer(dir.path(), 'a', 20, Owner { uid: 0, gid: 0 });
    for directory in [&top, &top.join("dir")] {
        give(directory, OWNER);
    }
    assert_eq!(owners(dir.path()), Owners::Kept);
}

#[test]
fn root_repository_in_which_root_owns_everything_is_lost_without_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let root = Owner { uid: 0, gid: 0 };
    layer(dir.path(), 'a', 20, root);
    assert_eq!(owners(dir.path()), Owners::Lost(root));
    assert_eq!(Owners::Lost(root).remedy("r"), None);
    let remedy = Owners::Lost(Owner { uid: 0, gid: 990 }).remedy("r").unwrap();
    assert!(remedy.contains("CVMFS_GID_MAP") && !remedy.contains("CVMFS_UID_MAP"), "{remedy}");
}

#[test]
fn root_owners_are_unknown_from_few_entries_of_the_same_owner() {
    let dir = tempfile::tempdir().unwrap();
    layer(dir.path(), 'a', MIN_ENTRIES - 3, OWNER);
    assert_eq!(owners(dir.path()), Owners::Unknown);
    layer(dir.path(), 'b', 0, OWNER);
    assert_eq!(owners(dir.path()), Owners::Lost(OWNER));
}

/// Admins were advised to map the uid that is seen, which is the client's own here.
#[test]
fn root_owner_is_claimed_if_the_client_runs_as_it_and_undecided_if_the_client_is_hidden() {
    let served = ServingProcess::of_user("a.example.org", OWNER.uid);
    let repository = served.path("repository");
    let top = layer(&repository, 'a', 20, OWNER);
    assert_eq!(owners(&repository), Owners::Claimed(OWNER));
    let other = Owner { uid: 777, gid: 777 };
    for entry in fs::read_dir(top.join("dir")).unwrap() {
        give(&entry.unwrap().path(), other);
    }
    for directory in [&top, &top.join("dir")] {
        give(directory, other);
    }
    assert_eq!(owners(&repository), Owners::Lost(other));
    // A process that does not serve this repository.
    xattr::set(&repository, "user.pid", std::process::id().to_string().as_bytes()).unwrap();
    assert_eq!(owners(&repository), Owners::Undecided(other));
}

/// The client's user was not looked at if root owned everything, so no remedy was given.
#[test]
fn root_files_of_root_are_claimed_if_the_client_runs_as_root_and_undecided_if_it_is_hidden() {
    let root = Owner { uid: 0, gid: 0 };
    let served = |uid| {
        let served = ServingProcess::of_user("a.example.org", uid);
        layer(&served.path("repository"), 'a', 20, root);
        served
    };
    let by_root = served(0);
    let repository = by_root.path("repository");
    assert_eq!(owners(&repository), Owners::Claimed(root));
    // A process that does not serve this repository.
    xattr::set(&repository, "user.pid", std::process::id().to_string().as_bytes()).unwrap();
    assert_eq!(owners(&repository), Owners::Undecided(root));
    let by_another = served(OWNER.uid);
    assert_eq!(owners(&by_another.path("repository")), Owners::Lost(root));
    for owners in [Owners::Claimed(root), Owners::Undecided(root)] {
        let remedy = owners.remedy("r").unwrap();
        assert!(remedy.contains("CVMFS_CLAIM_OWNERSHIP=no") && !remedy.contains("_MAP"), "{remedy}");
    }
}

#[test]
fn root_sample_of_a_layer_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    layer(dir.path(), 'a', MAX_ENTRIES * 2, OWNER);
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::default());
    let counted = std::sync::Arc::clone(&asked);
    let sys = crate::system::testing::FaultySys::before_call(move |call, _| {
        counted.fetch_add(usize::from(call == "lstat"), std::sync::atomic::Ordering::SeqCst);
    });
    assert_eq!(sample(&sys, dir.path()).unwrap().owners, Owners::Lost(OWNER));
    assert!((100..=MAX_ENTRIES).contains(&asked.load(std::sync::atomic::Ordering::SeqCst)), "{asked:?}");
}

#[test]
fn root_client_that_lists_its_own_attributes_on_files_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    layer(dir.path(), 'a', 1, OWNER);
    assert!(!sample(&Host, dir.path()).unwrap().lists_own_attributes);
    xattr::set(dir.path().join(LAYERS), FQRN_XATTR, b"a.example.org").unwrap();
    assert!(sample(&Host, dir.path()).unwrap().lists_own_attributes);
}
