//! A repository of unpacked images, laid out as DUCC publishes them: the layers, and where a
//! test wants it, manifests and whole root file systems. It is a signed CernVM-FS repository,
//! served over HTTP and mounted by a FUSE client, or a plain directory.

use std::ffi::OsStr;
use std::fs::{self, FileTimes};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cvmfs_testbed::client;
pub use cvmfs_testbed::client::Mount;
pub use cvmfs_testbed::publisher::Owners;
use cvmfs_testbed::publisher::Publisher;
use cvmfs_testbed::web::Web;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::image::{Blob, Image};
use crate::sandbox::mount_tmpfs;

/// Its fully qualified name.
pub const NAME: &str = "scene.test";
/// As the real client answers: overlayfs must live with it.
const NAME_LENGTH: &str = "0";

pub struct Repository {
    /// Where a snapshotter finds it.
    dir: PathBuf,
    /// What is published, at the next `commit`.
    tree: PathBuf,
    /// None: a plain directory, and `dir` is `tree`.
    real: Option<Mutex<Real>>,
}

/// Fields are dropped in order: the client before its server.
struct Real {
    mount: Option<Mount>,
    /// Clients that hang beside it, without a mount point.
    old: Vec<Mount>,
    web: Web,
    publisher: Publisher,
    cache: PathBuf,
    options: Vec<String>,
}

/// What a publisher adds to a root file system for Singularity, as links into `.singularity.d`.
pub const SINGULARITY: [(&str, &str); 6] = [
    (".exec", ".singularity.d/actions/exec"),
    (".run", ".singularity.d/actions/run"),
    (".shell", ".singularity.d/actions/shell"),
    (".test", ".singularity.d/actions/test"),
    ("environment", ".singularity.d/env/90-environment.sh"),
    ("singularity", ".singularity.d/runscript"),
];
const CATALOG: &str = ".cvmfscatalog";

impl Repository {
    /// A repository that is mounted on `dir`.
    pub fn mounted(dir: &Path) -> Self {
        Self::mounted_with(dir, Owners::Kept, &[])
    }

    /// `options` go to the client.
    pub fn mounted_with(dir: &Path, owners: Owners, options: &[&str]) -> Self {
        let beside = |name: &str| dir.with_extension(name);
        let (tree, served) = (beside("tree"), beside("web"));
        fs::create_dir_all(tree.join(".layers")).expect("the repository's tree can be made");
        fs::create_dir_all(dir).expect("the mount point can be made");
        fs::create_dir_all(&served).expect("the served directory can be made");
        let mut publisher = Publisher::create(&served, NAME, owners);
        publisher.publish(&tree);
        let web = Web::start(&served);
        let options = ["--name-length", NAME_LENGTH].iter().chain(options).map(|&o| o.to_owned()).collect();
        let real = Real { mount: None, old: Vec::new(), web, publisher, cache: beside("cache"), options };
        let repository = Self { dir: dir.to_owned(), tree, real: Some(Mutex::new(real)) };
        repository.mount();
        repository
    }

    /// As `mounted`, with the client's cache on a file system of its own, as it should be on a node.
    pub fn mounted_apart(dir: &Path) -> Self {
        let cache = dir.with_extension("cache");
        fs::create_dir_all(&cache).expect("the cache's directory can be made");
        mount_tmpfs(&cache, "mode=700");
        Self::mounted(dir)
    }

    pub fn plain(dir: &Path) -> Self {
        fs::create_dir_all(dir.join(".layers")).expect("the repository's directory can be made");
        Self { dir: dir.to_owned(), tree: dir.to_owned(), real: None }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the next revision is made ready.
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    fn real(&self) -> MutexGuard<'_, Real> {
        let real = self.real.as_ref().expect("the repository is not a plain directory");
        real.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts it anew; whatever was mounted before is let go of, lazily.
    pub fn mount(&self) {
        let mut real = self.real();
        real.mount = None;
        let options: Vec<&str> = real.options.iter().map(String::as_str).collect();
        let mount = Mount::start(&client::program(), &real.web.url(), &self.dir, &real.cache, &options);
        real.mount = Some(mount);
    }

    /// Mounts it anew, while the client that was there goes on as it is, hanging perhaps.
    pub fn mount_beside(&self) {
        // Not in the condition: there the lock would be held to the end of the block.
        let old = self.real().mount.take();
        if let Some(old) = old {
            umount2(&self.dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).expect("a mount can be detached");
            self.real().old.push(old);
        }
        self.mount();
    }

    /// Clients that a test has stopped go on: a daemon that hangs in one of them could not end.
    pub fn resume_clients(&self) {
        let real = &mut *self.real();
        for mount in real.mount.iter_mut().chain(&mut real.old) {
            if mount.is_running() {
                mount.signal(Signal::SIGCONT);
            }
        }
    }

    /// As `mount`, with nothing in any cache.
    pub fn mount_cold(&self) {
        self.unmount();
        let cache = self.real().cache.clone();
        fs::remove_dir_all(&cache).expect("a cache can be emptied");
        self.mount();
    }

    /// Kills the client and lets go of its mount: an empty directory stays.
    pub fn unmount(&self) {
        self.real().mount = None;
    }

    /// The web server answers nothing any more, while the client goes on. The client's option
    /// `--retry-delay` says how long it then tries.
    pub fn stop_server(&self) {
        self.real().web.stop_answering();
    }

    pub fn start_server(&self) {
        self.real().web.answer();
    }

    /// Talks to the client that is mounted.
    pub fn with_client<T>(&self, with: impl FnOnce(&mut Mount) -> T) -> T {
        with(self.real().mount.as_mut().expect("the repository is mounted"))
    }

    /// Has the client do `command`, see its manual.
    #[track_caller]
    pub fn command(&self, command: &str) -> String {
        let answer = self.with_client(|mount| mount.command(command));
        answer.strip_prefix("ok").unwrap_or_else(|| panic!("{command}: {answer}")).trim().to_owned()
    }

    /// What the tree holds becomes the next revision, and the client takes it up.
    pub fn commit(&self) {
        if self.real.is_none() {
            return;
        }
        self.real().publisher.publish(&self.tree);
        if self.real().mount.is_some() {
            self.command("reload");
        }
    }

    fn in_store(&self, store: &str, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.tree.join(store).join(&hex[..2]).join(hex)
    }

    pub fn layer_dir(&self, digest: &str) -> PathBuf {
        self.in_store(".layers", digest)
    }

    /// The whole root file system of the image with this configuration.
    pub fn flat_dir(&self, config: &str) -> PathBuf {
        self.in_store(".flat", config)
    }

    pub fn publish(&self, image: &Image) {
        self.publish_layers(&image.layers);
    }

    /// Unpacks the tars as they are: markers of deletions stay files.
    pub fn publish_layers(&self, layers: &[Blob]) {
        for layer in layers {
            let top = self.layer_dir(&layer.digest).join("layerfs");
            if top.exists() {
                continue;
            }
            fs::create_dir_all(&top).expect("a layer's directory can be made");
            fs::write(top.join(CATALOG), "").expect("a catalog marker can be written");
            extract(layer, &top, &[]);
        }
        self.commit();
    }

    /// The image's manifest under `reference`, and its root file system with all layers
    /// applied, what Singularity needs, and a catalog in each of `catalogs`.
    pub fn publish_flat(&self, image: &Image, reference: &str, catalogs: &[&str]) {
        self.write_manifest(image, reference);
        let top = self.flat_dir(&image.config.digest);
        fs::create_dir_all(&top).expect("a root's directory can be made");
        for layer in &image.layers {
            let from = self.layer_dir(&layer.digest).join("layerfs");
            make_room(&from, &top);
            extract(layer, &top, &["--exclude=.wh.*"]);
        }
        // As DUCC does for Singularity: what is missing is made, two files are emptied.
        for directory in ["dev", "proc", "root", "var/tmp", "tmp", "etc", "sys", "home"] {
            fs::create_dir_all(top.join(directory)).expect("a directory can be made");
        }
        for file in ["etc/hosts", "etc/resolv.conf"] {
            fs::write(top.join(file), "").expect("a file can be emptied");
            let mode = fs::Permissions::from_mode(0o644);
            fs::set_permissions(top.join(file), mode).expect("a mode can be set");
        }
        fs::create_dir_all(top.join(".singularity.d/env")).expect("a directory can be made");
        fs::write(top.join(".singularity.d/runscript"), "#!/bin/sh\n").expect("a file can be written");
        for (name, target) in SINGULARITY {
            if fs::symlink_metadata(top.join(name)).is_err() {
                symlink(target, top.join(name)).expect("a link can be made");
            }
        }
        for directory in catalogs.iter().chain(&[""]) {
            let directory = top.join(directory);
            let before = fs::metadata(&directory).and_then(|m| m.modified()).expect("a catalog's directory is there");
            fs::write(directory.join(CATALOG), "").expect("a catalog marker can be written");
            let opened = fs::File::open(&directory).expect("a directory can be opened");
            opened.set_times(FileTimes::new().set_modified(before)).expect("a time can be set");
        }
        self.commit();
    }

    pub fn publish_manifest(&self, image: &Image, reference: &str) {
        self.write_manifest(image, reference);
        self.commit();
    }

    /// As Go writes it: with its own names of fields.
    fn write_manifest(&self, image: &Image, reference: &str) {
        let descriptor = |b: &Blob| json!({ "MediaType": b.media_type, "Size": b.size, "Digest": b.digest });
        let manifest = json!({
            "SchemaVersion": 2,
            "MediaType": image.manifest.media_type,
            "Config": descriptor(&image.config),
            "Layers": image.layers.iter().map(descriptor).collect::<Vec<_>>(),
        });
        let dir = self.manifest_dir(reference);
        fs::create_dir_all(&dir).expect("a manifest's directory can be made");
        fs::write(dir.join("manifest.json"), manifest.to_string()).expect("a manifest can be written");
    }

    pub fn manifest_dir(&self, reference: &str) -> PathBuf {
        self.tree.join(".metadata").join(reference)
    }

    pub fn withdraw(&self, digest: &str) {
        fs::remove_dir_all(self.layer_dir(digest)).expect("a published layer can be removed");
        self.commit();
    }

    pub fn withdraw_flat(&self, config: &str) {
        fs::remove_dir_all(self.flat_dir(config)).expect("a published root can be removed");
        self.commit();
    }
}

fn extract(layer: &Blob, top: &Path, more: &[&str]) {
    let status = Command::new("tar")
        .args(["--extract", "--gzip", "--preserve-permissions", "--same-owner", "--numeric-owner"])
        .args(["--xattrs", "--xattrs-include=*", "--delay-directory-restore"])
        .args(more)
        .arg("--file")
        .arg(&layer.path)
        .arg("--directory")
        .arg(top)
        .status()
        .expect("tar runs");
    assert!(status.success(), "tar failed");
}

/// Removes from `root` what the layer at `from` deletes, or replaces by something of another type.
fn make_room(from: &Path, root: &Path) {
    let entries = fs::read_dir(from).unwrap_or_else(|e| panic!("cannot read {}: {e}", from.display()));
    for entry in entries {
        let entry = entry.expect("an entry can be read");
        let name = entry.file_name();
        let is_dir = entry.file_type().expect("an entry has a type").is_dir();
        match name.as_bytes().strip_prefix(b".wh.") {
            Some(b".wh..opq") => {
                for old in fs::read_dir(root).into_iter().flatten().flatten() {
                    remove(&old.path());
                }
            }
            Some(target) => remove(&root.join(OsStr::from_bytes(target))),
            None => {
                let there = root.join(&name);
                match fs::symlink_metadata(&there) {
                    Ok(old) if old.is_dir() && is_dir => make_room(&entry.path(), &there),
                    Ok(old) if old.is_dir() != is_dir => remove(&there),
                    _ => {}
                }
            }
        }
    }
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(status) if status.is_dir() => fs::remove_dir_all(path).expect("a directory can be removed"),
        Ok(_) => fs::remove_file(path).expect("a file can be removed"),
        Err(_) => {}
    }
}
