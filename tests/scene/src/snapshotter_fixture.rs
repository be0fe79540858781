//! A snapshotter without a containerd, with a repository that has three layers, for tests that call its socket
//! directly; and assertions on the results of such calls.

use std::fs;
use std::path::Path;

use cvmfs_snapshotter::model::{Digest, Key, Kind, Labels, Layer, Snapshot, SnapshotId, Timestamp};
use cvmfs_snapshotter::proto::mount::Mount;
use cvmfs_snapshotter::store::Store;
use grpcio::RpcStatusCode;

use crate::client::{CallResult, Client};
use crate::publisher::Repository;
use crate::sandbox::Sandbox;
use crate::snapshotter::Snapshotter;

/// Rust drops fields in their order: the client goes before the server, and the sandbox last.
pub struct SnapshotterFixture {
    pub client: Client,
    pub snapshotter: Snapshotter,
    pub repository: Repository,
    pub sandbox: Sandbox,
}

impl SnapshotterFixture {
    /// Starts the snapshotter; `config` is appended to its configuration.
    pub fn start(name: &str, config: &str) -> Self {
        Self::start_on(name, config, |_, _| ())
    }

    /// `before` is called with the state root and the repository before the snapshotter starts.
    pub fn start_on(name: &str, config: &str, before: impl FnOnce(&Path, &Repository)) -> Self {
        let sandbox = Sandbox::enter(name);
        let repository = Repository::mounted(&sandbox.path("cvmfs"));
        for n in 1..=3 {
            let top = repository.layer_dir(&digest(n)).join("layerfs");
            fs::create_dir_all(top.join("dir")).expect("a layer can be made");
            fs::write(top.join(format!("dir/file-{n}")), n.to_string()).expect("a layer can be filled");
            fs::write(top.join(".cvmfscatalog"), "").expect("a layer can be marked");
        }
        repository.commit();
        before(&sandbox.make_dir("s/root"), &repository);
        let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
        Self { client: snapshotter.client(), snapshotter, repository, sandbox }
    }
}

/// The digest of layer 1, 2 or 3, or of one that is not published.
pub fn digest(n: u8) -> String {
    format!("sha256:{}", format!("{n:02x}").repeat(32))
}

/// Writes metadata with `count` pulled layers, each with a label of 1,000 bytes, before the first start at `root`.
pub fn create_pulled_snapshots(root: &Path, count: u64) {
    let snapshot = |n: u64| Snapshot {
        id: SnapshotId(n),
        key: Key::parse(&format!("pulled-{n}")).expect("a short text is a key"),
        parent: None,
        kind: Kind::Committed,
        created: Timestamp(0),
        updated: Timestamp(0),
        labels: Labels::from([("label".to_owned(), "x".repeat(1_000))]),
        layer: Some(Layer {
            digest: Digest::parse(&digest(1)).expect("it is a digest"),
            repository: "scene.test".to_owned(),
        }),
        usage: None,
    };
    let snapshots: Vec<Snapshot> = (1..=count).map(snapshot).collect();
    let home = root.join("snapshotter");
    fs::create_dir_all(&home).expect("the state root can be made");
    Store::create(&home.join("metadata.sqlite"), Some(SnapshotId(count)), &snapshots, &[])
        .expect("the metadata can be made");
}

/// Makes `directories` directories of `names` names each, a tree that takes long to walk. The names in one directory are
/// hard links to one file, because links are made quickly.
pub fn create_wide_tree(top: &Path, directories: usize, names: usize) {
    for directory in 0..directories {
        let directory = top.join(directory.to_string());
        fs::create_dir(&directory).expect("a directory can be made");
        fs::write(directory.join("0"), "").expect("a file can be made");
        for name in 1..names {
            fs::hard_link(directory.join("0"), directory.join(name.to_string())).expect("a link can be made");
        }
    }
}

/// Asserts that a call was refused with `code`. The result is the message.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(answer: CallResult<T>, code: RpcStatusCode) -> String {
    let status = answer.expect_err("the call must be refused");
    assert_eq!(status.code(), code, "{}", status.message());
    status.message().to_owned()
}

/// The options of the one mount that describes a snapshot.
pub fn options(mounts: &[Mount]) -> &[String] {
    let [mount] = mounts else { panic!("one mount describes a snapshot") };
    &mount.options
}

/// Pulls the three layers of a `SnapshotterFixture` as a chain. The result is the name of the uppermost snapshot.
pub fn pull_chain(client: &Client) -> String {
    let mut parent = String::new();
    for n in 1..=3 {
        parent = client.pull_remote(&format!("extract-{n}"), &parent, &format!("sha256:c{n}"), &digest(n));
    }
    parent
}

/// Asserts that a call failed because a layer of the repository is not available. The result is the message.
#[track_caller]
pub fn assert_unavailable<T: std::fmt::Debug>(answer: CallResult<T>) -> String {
    let message = assert_refused(answer, RpcStatusCode::UNAVAILABLE);
    for part in ["layer sha256:", "scene.test", "is not available"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    message
}

/// Asserts what `assert_unavailable` does, and that the message says what an administrator must do. A scan that is
/// not finished and a repository that is slow need no action.
#[track_caller]
pub fn assert_unavailable_with_advice<T: std::fmt::Debug>(answer: CallResult<T>) -> String {
    let message = assert_unavailable(answer);
    for part in ["cvmfs-snapshotter doctor", "pull it anew"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    message
}
