//! Shared by the tests: a state root with a repository, requests as containerd sends them, and checks of what is left.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::model::AttachMode;
use crate::model::{
    Digest, Key, Kind, LABEL_IMAGE_REF, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF, Labels, Mount, Snapshot, SnapshotId,
    Timestamp,
};
use crate::repository::Repository;
use crate::snapshotter::{CreateRequest, Error, Snapshotter, SnapshotterOptions};
use crate::store::Store;
use crate::system::{Host, Sys, Unmount};

/// The directory where the tests build. Every Linux has it, and nobody else uses it in the mount namespace of a test.
const TEST_ROOT: &str = "/mnt";

/// A state root and a repository.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub mode: AttachMode,
}

impl Fixture {
    /// The repository has two layers: the second deletes a file and replaces a directory of the first.
    pub fn new(mode: AttachMode) -> Self {
        let fixture = Self::without_layers(mode);
        for (n, files) in
            [(1, &["gone", "dir/old", ".cvmfscatalog"][..]), (2, &[".wh.gone", "dir/.wh..wh..opq", "dir/new"])]
        {
            let top = fixture.layer(n);
            for file in files {
                fs::create_dir_all(top.join(file).parent().unwrap()).unwrap();
                fs::write(top.join(file), "").unwrap();
            }
        }
        fixture
    }

    pub fn without_layers(mode: AttachMode) -> Self {
        // Nobody else sees what is mounted here, and it goes with the thread of the test.
        thread_local! {
            static HAS_NAMESPACE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
        }
        if !HAS_NAMESPACE.replace(true) {
            unshare(CloneFlags::CLONE_NEWNS).expect("needs root: run make test as root");
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
            // Thousands of files are made and removed, which is slow on ext4.
            mount(Some("tmpfs"), TEST_ROOT, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        }
        let fixture = Self { dir: tempfile::tempdir_in(TEST_ROOT).unwrap(), mode };
        fs::create_dir(fixture.snapshots()).unwrap();
        fs::create_dir_all(fixture.repository().join(".layers")).unwrap();
        fixture
    }

    pub fn repository(&self) -> PathBuf {
        self.dir.path().join("cvmfs")
    }

    /// The path of layer `n` in the repository.
    pub fn layer(&self, n: u8) -> PathBuf {
        self.layer_of("cvmfs", n)
    }

    /// The path of layer `n` in the repository whose directory is `repository`.
    pub fn layer_of(&self, repository: &str, n: u8) -> PathBuf {
        let hex = digest(n).hex().to_owned();
        self.dir.path().join(repository).join(".layers").join(&hex[..2]).join(hex).join("layerfs")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    pub fn snapshot_dir(&self, id: SnapshotId) -> PathBuf {
        self.snapshots().join(id.to_string())
    }

    pub fn metadata(&self) -> PathBuf {
        self.dir.path().join("metadata.sqlite")
    }

    /// A snapshotter of a process that was just started, before its recovery.
    pub fn open(&self, sys: Arc<dyn Sys>) -> Snapshotter {
        self.open_with_store(Store::open(&self.metadata(), None).unwrap(), sys)
    }

    pub fn open_with_store(&self, store: Store, sys: Arc<dyn Sys>) -> Snapshotter {
        self.open_with_repositories(&[("r", "cvmfs")], store, sys)
    }

    /// `repositories` are names with directories.
    pub fn open_with_repositories(
        &self,
        repositories: &[(&str, &str)],
        store: Store,
        sys: Arc<dyn Sys>,
    ) -> Snapshotter {
        let repository = |&(name, dir): &(&str, &str)| {
            Repository::new(name.into(), self.dir.path().join(dir), Duration::from_secs(10), Arc::clone(&sys))
        };
        let repositories = repositories.iter().map(repository).collect();
        let options = SnapshotterOptions { attach: self.mode, overlay_options: Vec::new() };
        Snapshotter::new(store, repositories, sys, &self.snapshots(), options)
    }

    /// A snapshotter of a process that has recovered what another one left.
    pub fn restart(&self) -> Snapshotter {
        let snapshotter = self.open(Arc::new(Host));
        assert_eq!(snapshotter.recover().unwrap().broken, []);
        snapshotter.cleanup(&|| false).unwrap();
        snapshotter
    }

    /// The names of the directories of snapshots.
    pub fn on_disk(&self) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(self.snapshots()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The number of mounts.
    pub fn mounts(&self) -> usize {
        Host.mounts_below(self.dir.path()).unwrap().len()
    }

    /// Removes all snapshots, children first. Whatever state they are in, nothing may be left.
    pub fn remove_all(&self, s: &Snapshotter) {
        loop {
            let mut remaining = list_all(s);
            if remaining.is_empty() {
                break;
            }
            let before = remaining.len();
            remaining.retain(|snapshot| s.remove(&snapshot.key).is_err());
            assert!(remaining.len() < before, "something cannot be removed");
        }
        s.cleanup(&|| false).unwrap();
        assert_eq!((self.on_disk(), self.mounts()), (Vec::<String>::new(), 0));
    }

    /// Checks the lower directories of a container on both layers: a layer whose attachment was interrupted must not
    /// pass for an empty one.
    pub fn check_files(&self, mounts: &[Mount]) {
        let all = lower_dirs(mounts);
        assert_eq!(all.len(), 5, "{all:?}");
        let whiteout = |path: PathBuf| {
            let status = fs::symlink_metadata(path).unwrap();
            assert_eq!((status.rdev(), status.mode() & 0o170_000), (0, 0o020_000));
        };
        let [mask2, layer2, hide2, mask1, layer1] = all[..] else { unreachable!() };
        whiteout(mask2.join(".wh.gone"));
        whiteout(mask2.join("dir/.wh..wh..opq"));
        assert!(layer2.join("dir/new").exists());
        whiteout(hide2.join("gone"));
        assert_eq!(xattr::get(hide2.join("dir"), "trusted.overlay.opaque").unwrap().as_deref(), Some(&b"y"[..]));
        whiteout(mask1.join(".cvmfscatalog"));
        assert!(layer1.join("gone").exists());
        let status = |path: PathBuf| fs::metadata(path).map(|m| (m.mode(), m.mtime(), m.mtime_nsec())).unwrap();
        assert_eq!(status(mask2.join("dir")), status(self.layer(2).join("dir")), "a mask looks like the layer");
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for mount in Host.mounts_below(self.dir.path()).unwrap_or_default() {
            let _ = Host.unmount(&mount, Unmount::Detach);
        }
    }
}

/// The digest of layer `n`.
pub fn digest(n: u8) -> Digest {
    Digest::parse(&format!("sha256:{}", format!("{n:02x}").repeat(32))).unwrap()
}

pub fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

/// A request on the snapshot `parent`. An empty `parent` is none.
pub fn request(name: &str, parent: &str, labels: &[(&str, &str)]) -> CreateRequest {
    CreateRequest {
        key: key(name),
        parent: Key::parse_optional(parent).unwrap(),
        labels: labels.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
    }
}

/// The request with which containerd pulls layer `n` onto `parent`.
pub fn pull_request(n: u8, parent: &str) -> CreateRequest {
    let (reference, digest) = (format!("sha256:chain-{n}"), digest(n));
    let labels = [
        (LABEL_SNAPSHOT_REF, reference.as_str()),
        (LABEL_LAYER_DIGEST, digest.as_str()),
        (LABEL_IMAGE_REF, "example.org/image:1"),
    ];
    request("extract", parent, &labels)
}

/// Pulls layer `n` onto `parent`, and returns the name of its snapshot.
pub fn pull(s: &Snapshotter, n: u8, parent: &str) -> String {
    assert!(matches!(s.prepare(pull_request(n, parent)), Err(Error::RemoteCommitted { .. })));
    let parent_id = if parent.is_empty() { 0 } else { s.stat(&key(parent)).unwrap().id.0 };
    format!("cvmfs/{parent_id}/sha256:chain-{n}")
}

/// A new local snapshot, to be inserted into the store as another process may have left it.
pub fn snapshot(s: &Snapshotter, name: &str, parent: Option<&str>, kind: Kind, labels: &Labels) -> Snapshot {
    Snapshot {
        id: s.store.reserve_id().unwrap(),
        key: key(name),
        parent: parent.map(key),
        kind,
        created: Timestamp(0),
        updated: Timestamp(0),
        labels: labels.clone(),
        layer: None,
        usage: None,
    }
}

pub fn list_all(s: &Snapshotter) -> Vec<Snapshot> {
    let mut page = s.list(None, |_| true).unwrap();
    let mut all = std::mem::take(&mut page.snapshots);
    while let Some(cursor) = page.cursor {
        page = s.next_page(cursor, |_| true).unwrap();
        all.append(&mut page.snapshots);
    }
    all
}

/// The lower directories of the only mount.
pub fn lower_dirs(mounts: &[Mount]) -> Vec<&Path> {
    let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
    lower.split(':').map(Path::new).collect()
}
