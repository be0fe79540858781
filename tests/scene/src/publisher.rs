//! A repository of unpacked images in the layout of DUCC: layers, and where a test needs them, manifests and whole root
//! file systems. It is a signed CernVM-FS repository that is served over HTTP and mounted by a FUSE client, or a plain
//! directory.
//!
//! This publisher loses the same properties of an image as the real one; `tests/publisher.rs` compares the two.

mod ducc;
mod flat;

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cvmfs_testbed::client;
pub use cvmfs_testbed::client::Mount;
use cvmfs_testbed::ingest;
pub use cvmfs_testbed::ingest::{AutoCatalogs, Ingest, NO_OWNER, Ownership};
use cvmfs_testbed::publisher;
use cvmfs_testbed::publisher::Publisher;
use cvmfs_testbed::web::Web;
pub use ducc::ManifestPlace;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use crate::image::{Blob, Builder, Image, Layer};
use crate::sandbox::mount_tmpfs;

/// Its fully qualified name.
pub const NAME: &str = "scene.test";
/// The name length that the real client reports in statfs, so that the tests prove that overlayfs works with it.
const NAME_LENGTH: &str = "0";

pub struct Repository {
    /// The directory at which a snapshotter finds the repository.
    dir: PathBuf,
    ingest: Ingest,
    unpacking: Unpacking,
    /// The tree that the next `commit` publishes.
    tree: PathBuf,
    /// None for a plain directory, whose `dir` is `tree`.
    real: Option<Mutex<Real>>,
}

/// Rust drops fields in their order: the client goes before its server.
struct Real {
    mount: Option<Mount>,
    /// Earlier clients that hang, and whose mounts are detached.
    old: Vec<Mount>,
    web: Web,
    /// None for a repository that was published elsewhere.
    publisher: Option<Publisher>,
    cache: PathBuf,
    options: Vec<String>,
}

/// How layers become directories of the repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unpacking {
    /// By `cvmfs_server ingest`, which DUCC calls.
    #[default]
    Ingest,
    /// By tar in a transaction, with which a site without DUCC loses nothing.
    Transaction,
}

/// How a repository is published and mounted. The default is that of the real programs with root as the repository's
/// owner, by which the owners of files are lost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings<'a> {
    pub ingest: Ingest,
    pub unpacking: Unpacking,
    /// The properties of files that are published.
    pub publisher: publisher::Settings,
    /// Options of the client.
    pub client: &'a [&'a str],
}

impl<'a> Settings<'a> {
    /// The default settings with these options of the client.
    pub fn with_client(client: &'a [&'a str]) -> Self {
        Self { client, ..Self::default() }
    }

    /// Settings that keep owners, hard links, extended attributes and fractions of seconds.
    pub fn without_losses() -> Self {
        Self { unpacking: Unpacking::Transaction, publisher: publisher::Settings::EVERYTHING, ..Self::default() }
    }
}

impl Repository {
    /// Makes a repository and mounts it on `dir`.
    pub fn mounted(dir: &Path) -> Self {
        Self::mounted_with(dir, Settings::default())
    }

    pub fn mounted_with(dir: &Path, settings: Settings) -> Self {
        let beside = |name: &str| dir.with_extension(name);
        let (tree, served) = (beside("tree"), beside("web"));
        make_stores(&tree, &settings.ingest);
        fs::create_dir_all(dir).expect("the mount point can be made");
        fs::create_dir_all(&served).expect("the served directory can be made");
        let mut publisher = Publisher::create(&served, NAME, settings.publisher);
        publisher.publish(&tree);
        let web = Web::start(&served);
        Self::start(dir, tree, Some(publisher), web, settings)
    }

    /// Mounts a repository like `mounted`, with the client's cache on its own file system, as it should be on a node.
    pub fn mounted_with_own_cache_disk(dir: &Path) -> Self {
        let cache = dir.with_extension("cache");
        fs::create_dir_all(&cache).expect("the cache's directory can be made");
        mount_tmpfs(&cache, "mode=700");
        Self::mounted(dir)
    }

    /// Mounts a repository that was published elsewhere on `dir`. `served` holds the files of its web server.
    pub fn published_by_others(dir: &Path, served: &Path) -> Self {
        fs::create_dir_all(dir).expect("the mount point can be made");
        Self::start(dir, served.to_owned(), None, Web::start(served), Settings::default())
    }

    fn start(dir: &Path, tree: PathBuf, publisher: Option<Publisher>, web: Web, settings: Settings) -> Self {
        let cache = dir.with_extension("cache");
        let options = ["--name-length", NAME_LENGTH].iter().chain(settings.client).map(|&o| o.to_owned()).collect();
        let real = Real { mount: None, old: Vec::new(), web, publisher, cache, options };
        let Settings { ingest, unpacking, .. } = settings;
        let repository = Self { dir: dir.to_owned(), ingest, unpacking, tree, real: Some(Mutex::new(real)) };
        repository.mount();
        repository
    }

    pub fn plain(dir: &Path) -> Self {
        let ingest = Ingest::default();
        make_stores(dir, &ingest);
        Self { dir: dir.to_owned(), ingest, unpacking: Unpacking::Ingest, tree: dir.to_owned(), real: None }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tree of the next revision.
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    fn real(&self) -> MutexGuard<'_, Real> {
        let real = self.real.as_ref().expect("the repository is not a plain directory");
        real.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts the repository again, after a lazy unmount of an earlier mount.
    pub fn mount(&self) {
        let mut real = self.real();
        real.mount = None;
        let options: Vec<&str> = real.options.iter().map(String::as_str).collect();
        let mount = Mount::start(&client::program(), &real.web.url(), &self.dir, &real.cache, &options);
        real.mount = Some(mount);
    }

    /// Mounts the repository again, while the earlier client keeps running in its present state, which may be a hang.
    pub fn mount_beside(&self) {
        // Within the condition the lock would be held until the end of the block.
        let old = self.real().mount.take();
        if let Some(old) = old {
            umount2(&self.dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).expect("a mount can be detached");
            self.real().old.push(old);
        }
        self.mount();
    }

    /// Continues clients that a test has stopped, because a daemon that hangs in one of them could not end.
    pub fn resume_clients(&self) {
        let real = &mut *self.real();
        for mount in real.mount.iter_mut().chain(&mut real.old) {
            if mount.is_running() {
                mount.signal(Signal::SIGCONT);
            }
        }
    }

    /// Mounts the repository again with empty caches.
    pub fn mount_cold(&self) {
        self.unmount();
        let cache = self.real().cache.clone();
        fs::remove_dir_all(&cache).expect("a cache can be emptied");
        self.mount();
    }

    /// Kills the client and removes its mount, which leaves an empty directory.
    pub fn unmount(&self) {
        self.real().mount = None;
    }

    /// Stops the web server while the client keeps running. The client's option `--retry-delay` sets how long it retries.
    pub fn stop_server(&self) {
        self.real().web.stop_answering();
    }

    pub fn start_server(&self) {
        self.real().web.answer();
    }

    /// Calls `with` with the client that is mounted.
    pub fn with_client<T>(&self, with: impl FnOnce(&mut Mount) -> T) -> T {
        with(self.real().mount.as_mut().expect("the repository is mounted"))
    }

    /// Sends the test client a command; its `--help` lists them.
    #[track_caller]
    pub fn command(&self, command: &str) -> String {
        let answer = self.with_client(|mount| mount.command(command));
        answer.strip_prefix("ok").unwrap_or_else(|| panic!("{command}: {answer}")).trim().to_owned()
    }

    /// Publishes the tree as the next revision, and makes the client load it.
    pub fn commit(&self) {
        if self.real.is_none() {
            return;
        }
        self.real().publisher.as_mut().expect("the repository is ours").publish(&self.tree);
        if self.real().mount.is_some() {
            self.command("reload");
        }
    }

    /// The image with each published layer packed again from the repository. A normal pull of it shows what a container
    /// through us must show, because we cannot restore what the publisher loses. `tests/real_repositories.rs` lists that.
    pub fn as_published(&self, builder: &Builder, image: &Image) -> Image {
        if self.unpacking == Unpacking::Transaction {
            return image.clone();
        }
        let pack = |(blob, diff_id): (&Blob, String)| {
            let published = self.layer_dir(&blob.digest).join("layerfs");
            if published.exists() {
                builder.pack_without(&published, &ingest::MARKERS)
            } else {
                Layer { blob: blob.clone(), diff_id }
            }
        };
        let layers: Vec<Layer> = image.layers.iter().zip(image.diff_ids()).map(pack).collect();
        builder.image(&format!("as-published/{}", image.name), &layers, &[])
    }

    pub fn withdraw(&self, digest: &str) {
        fs::remove_dir_all(self.layer_dir(digest)).expect("a published layer can be removed");
        self.commit();
    }
}

/// Makes the directories with which DUCC begins, each with a catalog.
fn make_stores(tree: &Path, ingest: &Ingest) {
    for store in [".layers", ".flat"] {
        fs::create_dir_all(tree.join(store)).expect("the repository's tree can be made");
        ducc::mark(&tree.join(store));
    }
    let (uid, gid) = ingest.owner;
    chown(tree, Some(uid), Some(gid)).expect("the repository can be given to its owner");
}
