//! The owners of the files in a repository, as its publisher stored them and as its client shows them, and the
//! attributes that a client adds.

use std::fs;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use nix::sys::signal::Signal;
use scene::client::Client;
use scene::disk::Disk;
use scene::doctor::{Finding, read};
use scene::e2e_fixture::names;
use scene::process::eventually;
use scene::publisher::{NAME, NO_OWNER, Repository, Settings};
use scene::rootfs::Mounted;
use scene::sandbox::{Sandbox, mount_tmpfs};
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::{assert_refused, digest};

const MODES: [&str; 2] = ["attach = \"bind\"", "attach = \"symlink\""];
/// The id that the kernel reports for an owner without a mapping.
const NOBODY: u32 = 65_534;

fn mounted(sandbox: &Sandbox, client: &[&str]) -> Repository {
    Repository::mounted_with(&sandbox.path("cvmfs"), Settings::with_client(client))
}

fn make_layer(repository: &Repository, n: u8, files: &[&str]) -> PathBuf {
    let top = repository.layer_dir(&digest(n)).join("layerfs");
    for file in files {
        let path = top.join(file);
        fs::create_dir_all(path.parent().expect("a file has a parent")).expect("a layer can be made");
        fs::write(path, "content").expect("a layer can be filled");
    }
    top
}

fn give(path: &Path, uid: u32, gid: u32) {
    lchown(path, Some(uid), Some(gid)).unwrap_or_else(|e| panic!("give {} to {uid}:{gid}: {e}", path.display()));
}

/// Changes the owner of a directory and of everything in it.
fn give_all(path: &Path, uid: u32, gid: u32) {
    give(path, uid, gid);
    for name in names(path) {
        let path = path.join(name);
        if path.is_dir() { give_all(&path, uid, gid) } else { give(&path, uid, gid) }
    }
}

/// Pulls layers 1 and 2; the result is a chain.
fn pull_two(client: &Client) -> String {
    let first = client.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    client.pull_remote("extract-2", &first, "sha256:c2", &digest(2))
}

fn diagnosed(snapshotter: &Snapshotter, check: &str) -> Vec<Finding> {
    let all = read(&snapshotter.admin(&["doctor", "--json"]));
    all.into_iter().filter(|one| one.check == check).collect()
}

fn status(snapshotter: &Snapshotter) -> (serde_json::Value, String) {
    let ask = |form: &[&str]| snapshotter.admin(&[&["status"], form].concat()).ok();
    let json: serde_json::Value = serde_json::from_str(&ask(&["--json"])).expect("it is JSON");
    (json["repositories"][0].clone(), ask(&[]))
}

struct Case {
    name: &'static str,
    client: &'static [&'static str],
    /// The owner of all files but one, and the owner of that one.
    owners: [(u32, u32); 2],
    /// The state that status reports, and the owner with it.
    state: &'static str,
    owner: Option<(u32, u32)>,
    /// The state of the doctor's finding.
    finding: &'static str,
    /// The settings that the remedy must name, and those that it must not name.
    settings: &'static [&'static str],
    others: &'static [&'static str],
}

const CASES: [Case; 4] = [
    Case {
        name: "kept",
        client: &[],
        owners: [(991, 990), (0, 0)],
        state: "kept",
        owner: None,
        finding: "good",
        settings: &[],
        others: &["CVMFS_"],
    },
    Case {
        name: "lost",
        client: &[],
        owners: [(991, 990); 2],
        state: "lost",
        owner: Some((991, 990)),
        finding: "warning",
        settings: &["CVMFS_UID_MAP", "\"991 0\"", "CVMFS_GID_MAP", "\"990 0\""],
        others: &["CVMFS_CLAIM_OWNERSHIP"],
    },
    // An earlier version advised to map 993, which is the client's own user.
    Case {
        name: "claimed",
        client: &["--claim-ownership", "993:992"],
        owners: [(991, 990), (0, 0)],
        state: "claimed",
        owner: Some((993, 992)),
        finding: "warning",
        settings: &["CVMFS_CLAIM_OWNERSHIP=no", "/etc/cvmfs/default.local", "cvmfs_config reload"],
        others: &[],
    },
    // An earlier version reported that all owners were root by loss, and that nothing had to be done.
    Case {
        name: "root",
        client: &["--claim-ownership", "0:0"],
        owners: [(991, 990), (5, 5)],
        state: "claimed",
        owner: Some((0, 0)),
        finding: "warning",
        settings: &["CVMFS_CLAIM_OWNERSHIP=no", "/etc/cvmfs/default.local", "cvmfs_config reload"],
        others: &["_MAP"],
    },
];

#[test]
fn root_log_status_and_doctor_report_owners_of_repository_files() {
    for case in &CASES {
        let sandbox = Sandbox::enter(case.name);
        let repository = mounted(&sandbox, case.client);
        let files: Vec<String> = (0..12).map(|n| format!("usr/lib/{n}")).collect();
        let top = make_layer(&repository, 1, &files.iter().map(String::as_str).collect::<Vec<_>>());
        let [(uid, gid), (other_uid, other_gid)] = case.owners;
        give_all(&top, uid, gid);
        // The file lies below the top directory, which was all that an earlier version checked.
        give(&top.join("usr/lib/7"), other_uid, other_gid);
        repository.commit();
        let mut snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
        let said = |log: &str| -> Vec<String> {
            log.lines()
                .filter(|line| line.contains("owners are") || line.contains("belongs to root"))
                .map(str::to_owned)
                .collect()
        };
        eventually("the log says it", || !said(&snapshotter.log()).is_empty());
        let (json, text) = status(&snapshotter);
        assert_eq!(json["owners"]["state"], case.state, "{}: {json}", case.name);
        let number = |key: &str| json["owners"][key].as_u64().map(|id| u32::try_from(id).expect("an id has 32 bits"));
        assert_eq!(number("uid").zip(number("gid")), case.owner, "{}", case.name);

        let running = diagnosed(&snapshotter, "repository.owners");
        let c = snapshotter.client();
        let chain = c.pull_remote("extract-1", "", "sha256:c1", &digest(1));
        c.prepare("container", &chain, &[]).expect("it starts");
        let lines = said(&snapshotter.log());
        assert_eq!(lines.len(), 1, "{}: it is said once for each mount: {lines:?}", case.name);
        snapshotter.end(Signal::SIGTERM);
        for found in [running, diagnosed(&snapshotter, "repository.owners")] {
            let [one] = &found[..] else { panic!("{}: {found:#?}", case.name) };
            assert_eq!(one.state, case.finding, "{}: {one:?}", case.name);
            let remedy = one.remedy.as_deref().unwrap_or_default();
            // The line of the log is JSON, so quotes are escaped.
            for said in [lines[0].replace("\\\"", "\""), text.clone(), format!("{} {remedy}", one.what)] {
                let ids =
                    case.owner.filter(|owner| *owner != (0, 0)).map(|(uid, gid)| [uid.to_string(), gid.to_string()]);
                for word in case.settings.iter().map(|&word| word.to_owned()).chain(ids.into_iter().flatten()) {
                    assert!(said.contains(&word), "{}: no {word} in {said}", case.name);
                }
                for word in case.others {
                    assert!(!said.contains(word), "{}: {word} in {said}", case.name);
                }
            }
        }
    }
}

/// A publisher that keeps owners gives directories which the tar of a layer does not name to uid -1, and overlayfs
/// cannot make a directory of that owner on the local disk.
#[test]
fn root_container_can_write_below_directory_without_valid_owner() {
    for config in MODES {
        let sandbox = Sandbox::enter("nobody");
        let repository = mounted(&sandbox, &[]);
        make_layer(&repository, 1, &["plain/old", "marked/old", "marked/gone"]);
        let top = make_layer(&repository, 2, &["plain/sub/new", "marked/sub/new", "marked/.wh.gone"]);
        for directory in ["plain", "marked", "plain/sub", "marked/sub"] {
            give(&top.join(directory), NO_OWNER, NO_OWNER);
        }
        repository.commit();
        let shown = repository.dir().join(top.strip_prefix(repository.tree()).expect("a layer is in the tree"));
        let owner = fs::metadata(shown.join("plain")).map(|found| (found.uid(), found.gid()));
        assert_eq!(owner.expect("the directory is published"), (NOBODY, NOBODY), "the publisher is no real one");

        let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
        let c = snapshotter.client();
        let chain = pull_two(&c);
        let mounts = c.prepare("container", &chain, &[]).expect("it starts");
        let root = Mounted::new(&mounts, &sandbox.path("mnt")).expect("an overlay");
        for directory in ["plain", "marked", "plain/sub", "marked/sub"] {
            let at = root.path().join(directory);
            let found = fs::metadata(&at).expect("it is there");
            assert_eq!((found.uid(), found.gid()), (NOBODY, NOBODY), "{config}: {directory}");
            let failed = |what: &str, e| panic!("{config}: {what} in {directory}: {e}");
            fs::write(at.join("written"), "x").unwrap_or_else(|e| failed("write a file", e));
            fs::create_dir(at.join("made")).unwrap_or_else(|e| failed("make a directory", e));
        }
        for file in ["plain/old", "plain/sub/new", "marked/old", "marked/sub/new"] {
            fs::remove_file(root.path().join(file)).unwrap_or_else(|e| panic!("{config}: delete {file}: {e}"));
        }
        assert_eq!(names(&root.path().join("plain")), ["made", "sub", "written"]);
        assert_eq!(names(&root.path().join("marked/sub")), ["made", "written"]);
        assert_eq!(names(&root.path().join("marked")), ["made", "sub", "written"]);
    }
}

/// The names of the attributes of an entry.
fn attributes(path: &Path) -> Vec<String> {
    let names = xattr::list(path).unwrap_or_else(|e| panic!("list the attributes of {}: {e}", path.display()));
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

/// Containers saw these attributes and could not change a file: overlayfs copies all attributes, and on ext4 they must
/// fit into a block of 4 KiB.
#[test]
fn root_prepare_refuses_layers_whose_client_lists_magic_attributes_on_every_file() {
    for config in MODES {
        let sandbox = Sandbox::enter("listed");
        let repository = mounted(&sandbox, &["--magic-xattrs", "rootonly"]);
        make_layer(&repository, 1, &["masked/.cvmfscatalog", "masked/file", "plain/file", ".cvmfscatalog"]);
        make_layer(&repository, 2, &["masked/.wh.file", "masked/other", ".cvmfscatalog"]);
        repository.commit();
        let size = |name: &str| xattr::get(repository.dir(), name).ok().flatten().map_or(0, |value| value.len());
        let bytes: usize = attributes(repository.dir()).iter().map(|name| name.len() + size(name)).sum();
        assert!(bytes > 4096, "{bytes} bytes of attributes fit into a block");

        let _disk = Disk::ext4(&sandbox.path("s/root"), 64, &["-b", "4096"]);
        let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
        let c = snapshotter.client();
        let chain = pull_two(&c);
        repository.command("magic-xattrs always");
        let setting = "CVMFS_MAGIC_XATTRS_VISIBILITY=rootonly";
        let message = assert_refused(c.prepare("early", &chain, &[]), RpcStatusCode::UNAVAILABLE);
        assert!(message.contains(setting), "{config}: {message}");
        let found = diagnosed(&snapshotter, "repository.attributes");
        let [one] = &found[..] else { panic!("{found:#?}") };
        assert_eq!(one.state, "problem");
        assert!(one.remedy.as_deref().is_some_and(|text| text.contains(setting)));
        assert_eq!(status(&snapshotter).0["lists_own_attributes"], true);
        eventually("the log names the setting", || snapshotter.log().contains(setting));
        eventually("health says that it cannot be used", || !c.is_serving(NAME));

        // The changed setting takes effect without a restart.
        repository.command("magic-xattrs rootonly");
        eventually("health says that it can be used", || c.is_serving(NAME));
        let mounts = c.prepare("container", &chain, &[]).unwrap_or_else(|e| panic!("{config}: {}", e.message()));
        let root = Mounted::new(&mounts, &sandbox.path("mnt")).expect("an overlay");
        for entry in ["", "masked", "masked/other", "plain", "plain/file"] {
            assert_eq!(attributes(&root.path().join(entry)), Vec::<String>::new(), "{config}: {entry:?}");
        }
        fs::write(root.path().join("masked/written"), "x").expect("a masked directory can be written");
        fs::write(root.path().join("plain/file"), "x").expect("a file of a layer can be changed");
    }
}

/// Each container start failed with "No space left on device", which looked like a fault of this program, while most of
/// the disk was free.
#[test]
fn root_error_names_attribute_that_state_root_rejects_and_its_directory() {
    for config in MODES {
        let sandbox = Sandbox::enter("large-attribute");
        // This file system takes larger attributes than ext4.
        mount_tmpfs(&sandbox.make_dir("cvmfs"), "size=8m");
        let repository = Repository::plain(&sandbox.path("cvmfs"));
        let top = make_layer(&repository, 1, &["d/.cvmfscatalog", "d/file"]);
        xattr::set(top.join("d"), "user.big", &[b'x'; 5000]).expect("tmpfs takes attributes of 5,000 bytes");
        let _disk = Disk::ext4(&sandbox.path("s/root"), 64, &["-b", "4096"]);
        let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
        let c = snapshotter.client();
        let chain = c.pull_remote("extract-1", "", "sha256:c1", &digest(1));
        for key in ["first", "second"] {
            let message = assert_refused(c.prepare(key, &chain, &[]), RpcStatusCode::FAILED_PRECONDITION);
            for part in [digest(1).as_str(), "\"d\"", "\"user.big\"", "5000", "file system of the state root"] {
                assert!(message.contains(part), "{config}: {part} is missing in: {message}");
            }
        }
        // The directory is removed with the layer.
        c.remove(&chain).expect("nobody stands on it");
        c.cleanup().expect("a cleanup succeeds");
        assert_eq!(names(&snapshotter.snapshots()), Vec::<String>::new(), "{config}");
    }
}

#[test]
fn root_client_listing_magic_attributes_only_at_the_root_causes_no_warning() {
    let sandbox = Sandbox::enter("unlisted");
    let repository = mounted(&sandbox, &["--magic-xattrs", "rootonly"]);
    make_layer(&repository, 1, &["file"]);
    repository.commit();
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    assert_eq!(diagnosed(&snapshotter, "repository.attributes"), []);
    assert_eq!(status(&snapshotter).0["lists_own_attributes"], false);
}
