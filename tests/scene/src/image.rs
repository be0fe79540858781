//! Images that are made from directories. GNU tar packs each directory into a layer, so links, devices, owners, times and
//! extended attributes are like those of real layers. A deletion is an empty file `.wh.<name>`, which builders write.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::process::tool;

/// A file that is named by the digest of its content.
#[derive(Clone, Debug)]
pub struct Blob {
    pub media_type: String,
    /// `sha256:…`
    pub digest: String,
    pub size: u64,
    pub path: PathBuf,
}

/// A layer: the compressed tar, and the digest of the tar itself.
#[derive(Clone, Debug)]
pub struct Layer {
    pub blob: Blob,
    pub diff_id: String,
}

#[derive(Clone, Debug)]
pub struct Image {
    /// `repository:tag`
    pub name: String,
    pub config: Blob,
    pub manifest: Blob,
    pub layers: Vec<Blob>,
    pub chain_ids: Vec<String>,
}

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

impl Image {
    /// The digest of each uncompressed layer, from the configuration.
    pub fn diff_ids(&self) -> Vec<String> {
        let config = fs::read(&self.config.path).expect("a configuration can be read");
        let config: serde_json::Value = serde_json::from_slice(&config).expect("a configuration is JSON");
        serde_json::from_value(config["rootfs"]["diff_ids"].clone()).expect("a configuration has diff ids")
    }
}

/// Makes layers and images, whose blobs lie in its directory.
pub struct Builder {
    dir: PathBuf,
    layer_count: std::cell::Cell<usize>,
}

impl Builder {
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs")).expect("the builder's directory can be made");
        Self { dir: dir.to_owned(), layer_count: 0.into() }
    }

    /// A layer with the entries that `fill` makes in an empty directory.
    pub fn layer(&self, fill: impl FnOnce(&LayerDir)) -> Layer {
        let number = self.layer_count.get();
        self.layer_count.set(number + 1);
        let dir = LayerDir { top: self.dir.join(format!("layer-{number}")) };
        fs::create_dir(&dir.top).expect("the layer's directory is new");
        fill(&dir);
        let layer = self.pack(&dir.top);
        fs::remove_dir_all(&dir.top).expect("the layer's directory can be removed");
        layer
    }

    /// A layer that can run a shell.
    pub fn shell_layer(&self) -> Layer {
        self.layer(|l| {
            l.file("bin/busybox", fs::read(tool("busybox")).expect("busybox can be read")).mode("bin/busybox", 0o755);
            for name in ["sh", "ls", "cat", "mkdir", "true", "chmod", "chown", "sleep"] {
                l.symlink("busybox", &format!("bin/{name}"));
            }
            l.dir("tmp").dir("etc").dir("proc").dir("sys").dir("dev").dir("run");
        })
    }

    /// A layer with the tree below `top`.
    pub fn pack(&self, top: &Path) -> Layer {
        self.pack_without(top, &[])
    }

    /// Packs like `pack`, without the files of these names.
    pub fn pack_without(&self, top: &Path, names: &[&str]) -> Layer {
        let tar = self.dir.join("layer.tar");
        let status = Command::new("tar")
            .args(["--create", "--format=pax", "--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*"])
            .arg("--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime")
            .args(names.iter().map(|name| format!("--exclude={name}")))
            .arg("--file")
            .arg(&tar)
            .arg("--directory")
            .arg(top)
            .arg(".")
            .status()
            .expect("tar runs");
        assert!(status.success(), "tar failed");
        let diff_id = sha256(&tar);
        let packed = self.dir.join("layer.tar.gz");
        let out = fs::File::create(&packed).expect("a layer can be written");
        let status = Command::new("gzip").arg("-1nc").arg(&tar).stdout(Stdio::from(out)).status().expect("gzip runs");
        assert!(status.success(), "gzip failed");
        fs::remove_file(&tar).expect("the plain tar can be removed");
        Layer { blob: self.store(&packed, LAYER), diff_id }
    }

    pub fn image(&self, name: &str, layers: &[Layer], environment: &[&str]) -> Image {
        self.image_that_runs(name, layers, environment, &["/bin/sh"])
    }

    pub fn image_that_runs(&self, name: &str, layers: &[Layer], environment: &[&str], command: &[&str]) -> Image {
        let diff_ids: Vec<&str> = layers.iter().map(|l| l.diff_id.as_str()).collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Env": environment, "Cmd": command },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": layers.iter().map(|_| json!({ "created_by": "scene" })).collect::<Vec<_>>(),
        });
        let config = self.write("config", &config.to_string(), CONFIG);
        let layers: Vec<Blob> = layers.iter().map(|l| l.blob.clone()).collect();
        let descriptor = |b: &Blob| json!({ "mediaType": b.media_type, "digest": b.digest, "size": b.size });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(&config),
            "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
        });
        let manifest = self.write("manifest", &manifest.to_string(), MANIFEST);
        Image { name: name.to_owned(), config, manifest, layers, chain_ids: chain_ids(&diff_ids) }
    }

    fn write(&self, name: &str, text: &str, media_type: &str) -> Blob {
        let path = self.dir.join(name);
        fs::write(&path, text).expect("a blob can be written");
        self.store(&path, media_type)
    }

    fn store(&self, path: &Path, media_type: &str) -> Blob {
        let digest = sha256(path);
        let stored = self.dir.join("blobs").join(digest.trim_start_matches("sha256:"));
        fs::rename(path, &stored).expect("a blob can be moved");
        let size = fs::metadata(&stored).expect("a blob has a size").len();
        Blob { media_type: media_type.to_owned(), digest, size, path: stored }
    }
}

/// The OCI chain IDs. Each is a digest of the layer and of all layers below it.
pub fn chain_ids<S: AsRef<str>>(diff_ids: &[S]) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    for diff_id in diff_ids.iter().map(AsRef::as_ref) {
        ids.push(match ids.last() {
            None => diff_id.to_owned(),
            Some(below) => format!("sha256:{}", hex(&Sha256::digest(format!("{below} {diff_id}")))),
        });
    }
    ids
}

fn sha256(path: &Path) -> String {
    let mut hash = Sha256::new();
    let mut file = fs::File::open(path).expect("a blob can be read");
    std::io::copy(&mut file, &mut hash).expect("a blob can be read");
    format!("sha256:{}", hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, b| format!("{text}{b:02x}"))
}

/// A directory that becomes a layer.
pub struct LayerDir {
    top: PathBuf,
}

impl LayerDir {
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.top.join(path)
    }

    /// Makes a directory and its parents.
    pub fn dir(&self, path: impl AsRef<Path>) -> &Self {
        fs::create_dir_all(self.path(path)).expect("a directory can be made");
        self
    }

    /// Makes a file and its parent directories.
    pub fn file(&self, path: impl AsRef<Path>, text: impl AsRef<[u8]>) -> &Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a directory can be made");
        fs::write(path, text).expect("a file can be written");
        self
    }

    pub fn symlink(&self, target: &str, path: &str) -> &Self {
        symlink(target, self.path(path)).expect("a link can be made");
        self
    }

    pub fn hard_link(&self, existing: &str, path: &str) -> &Self {
        fs::hard_link(self.path(existing), self.path(path)).expect("a hard link can be made");
        self
    }

    pub fn mode(&self, path: &str, mode: u32) -> &Self {
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).expect("a mode can be set");
        self
    }

    pub fn owner(&self, path: &str, uid: u32, gid: u32) -> &Self {
        chown(self.path(path), Some(uid), Some(gid)).expect("an owner can be set");
        self
    }

    pub fn xattr(&self, path: &str, name: &str, value: &[u8]) -> &Self {
        xattr::set(self.path(path), name, value).expect("an attribute can be set");
        self
    }

    pub fn node(&self, path: &str, kind: nix::sys::stat::SFlag, device: u64) -> &Self {
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o640);
        nix::sys::stat::mknod(&self.path(path), kind, mode, device).expect("a node can be made");
        self
    }

    /// Gives every entry the same time, without a fraction of a second.
    pub fn whole_seconds(&self) -> &Self {
        let touch = ["-exec", "touch", "--no-dereference", "--date=@1600000000", "{}", "+"].map(Path::new);
        crate::process::run("find", [self.top.as_path()].iter().chain(&touch)).ok();
        self
    }

    /// Makes the layer delete `path` of the layers below.
    pub fn delete(&self, path: impl AsRef<Path>) -> &Self {
        let path = path.as_ref();
        let mut name = std::ffi::OsString::from(".wh.");
        name.push(path.file_name().expect("a deletion names an entry"));
        self.file(path.with_file_name(name), "")
    }

    /// Makes the directory `path` hide its entries in the layers below.
    pub fn opaque(&self, path: &str) -> &Self {
        self.file(Path::new(path).join(".wh..wh..opq"), "")
    }
}
