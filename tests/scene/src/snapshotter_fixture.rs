//! A snapshotter alone, without a containerd, with a repository that has three layers.

use std::fs;
use std::path::Path;

use cvmfs_snapshotter::model::{Digest, Key, Kind, Labels, Layer, Snapshot, SnapshotId, Timestamp};
use cvmfs_snapshotter::proto::mount::Mount;
use cvmfs_snapshotter::store::Store;
use grpcio::RpcStatusCode;

use crate::client::{Answer, Client};
use crate::publisher::Repository;
use crate::sandbox::Sandbox;
use crate::snapshotter::Snapshotter;

/// Fields are dropped in order: the client before the server, the sandbox last.
pub struct Alone {
    pub client: Client,
    pub snapshotter: Snapshotter,
    pub repository: Repository,
    pub sandbox: Sandbox,
}

impl Alone {
    /// `config` is added to the snapshotter's configuration.
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

/// Before the first start at `root`: so many pulled layers, each with a label of 1,000 bytes.
pub fn crowd(root: &Path, count: u64) {
    let snapshot = |n: u64| Snapshot {
        id: SnapshotId(n),
        key: Key::parse(&format!("crowd-{n}")).expect("a short text is a key"),
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

/// Fills a directory with so many directories of so many names each, which takes long to walk.
/// The names in one directory are links to one file: making those is quick.
pub fn fill(top: &Path, directories: usize, names: usize) {
    for directory in 0..directories {
        let directory = top.join(directory.to_string());
        fs::create_dir(&directory).expect("a directory can be made");
        fs::write(directory.join("0"), "").expect("a file can be made");
        for name in 1..names {
            fs::hard_link(directory.join("0"), directory.join(name.to_string())).expect("a link can be made");
        }
    }
}

/// The message of a call that must be refused with `code`.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: RpcStatusCode) -> String {
    let status = answer.expect_err("the call is refused");
    assert_eq!(status.code(), code, "{}", status.message());
    status.message().to_owned()
}

pub fn options(mounts: &[Mount]) -> &[String] {
    let [mount] = mounts else { panic!("one mount describes a snapshot") };
    &mount.options
}

/// A chain of the three layers of an `Alone`; the result is the name of the uppermost.
pub fn pull_chain(client: &Client) -> String {
    let mut parent = String::new();
    for n in 1..=3 {
        parent = client.pull_remote(&format!("extract-{n}"), &parent, &format!("sha256:c{n}"), &digest(n));
    }
    parent
}

/// The message of a call on a layer that cannot be had.
#[track_caller]
pub fn unavailable<T: std::fmt::Debug>(answer: Answer<T>) -> String {
    let message = refused(answer, RpcStatusCode::UNAVAILABLE);
    for part in ["layer sha256:", "scene.test", "is not available"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    message
}

/// The same, of a layer whose repository is to be looked at: with a scan that is not finished, or a
/// repository that is slow, nobody has to do anything.
#[track_caller]
pub fn unavailable_with_advice<T: std::fmt::Debug>(answer: Answer<T>) -> String {
    let message = unavailable(answer);
    for part in ["cvmfs-snapshotter doctor", "pull it anew"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    message
}
