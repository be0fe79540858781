//! Everything that an end-to-end test needs: a registry, a repository, the snapshotter, a containerd that pulls through
//! it, and a containerd that pulls normally, for comparison.

use std::fs;
use std::path::Path;

use crate::compare::{Comparison, compare};
use crate::containerd::{Containerd, Writable};
use crate::image::{Blob, Builder, Image, Layer};
use crate::process::tool;
use crate::publisher::Repository;
use crate::registry::Registry;
use crate::release::{ConfigVariant, Release};
use crate::sandbox::Sandbox;
use crate::snapshotter::Snapshotter;

/// Rust drops fields in their order: clients go before servers, and the sandbox last.
pub struct E2eFixture {
    pub normal: Containerd,
    pub ours: Containerd,
    pub snapshotter: Snapshotter,
    pub registry: Registry,
    pub repository: Repository,
    pub builder: Builder,
    pub sandbox: Sandbox,
}

/// The image of the container that holds a pod's namespaces. A test that runs pods must push it.
pub const PAUSE: &str = "pause:1";

impl E2eFixture {
    /// Starts everything, with a mounted CernVM-FS repository. `config` is appended to the snapshotter's configuration.
    pub fn start(name: &str, config: &str) -> Self {
        Self::start_with_repository(name, config, Repository::mounted)
    }

    /// Starts a fixture like `start`, with a repository that `make_repository` makes in a directory.
    pub fn start_with_repository(name: &str, config: &str, make_repository: impl FnOnce(&Path) -> Repository) -> Self {
        Self::start_with_containerd(name, config, Release::V1_6, ConfigVariant::Client1, make_repository)
    }

    /// Starts a fixture like `start_with_repository`, with any version of containerd and any variant of its configuration.
    pub fn start_with_containerd(
        name: &str,
        config: &str,
        release: Release,
        variant: ConfigVariant,
        make_repository: impl FnOnce(&Path) -> Repository,
    ) -> Self {
        let sandbox = Sandbox::enter(name);
        let builder = Builder::new(&sandbox.path("images"));
        let registry = Registry::start(&sandbox.path("registry"));
        let repository = make_repository(&sandbox.path("cvmfs"));
        let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
        let pause = registry.reference(PAUSE);
        let ours = Containerd::with_config_variant(&sandbox.path("o"), release, variant, &pause, &snapshotter);
        let normal = Containerd::normal(&sandbox.path("n"), release, &pause);
        Self { normal, ours, snapshotter, registry, repository, builder, sandbox }
    }

    /// A layer that can run a shell and a few programs.
    pub fn base_layer(&self) -> Layer {
        self.builder.layer(|l| {
            let busybox = fs::read(tool("busybox")).expect("busybox can be read");
            l.file("bin/busybox", busybox).mode("bin/busybox", 0o755);
            for name in ["sh", "ls", "cat", "sleep", "mkdir", "rm", "date", "stat", "touch", "true"] {
                l.symlink("busybox", &format!("bin/{name}"));
            }
            l.dir("tmp").mode("tmp", 0o1777).dir("etc").dir("proc").dir("sys").dir("dev").dir("run");
        })
    }

    /// An image of three layers that can run a shell; `text` makes it unlike others.
    pub fn shell_image(&self, name: &str, text: &str) -> Image {
        let b = &self.builder;
        let layers = [
            self.base_layer(),
            b.layer(|l| {
                l.file("data/text", text).file("data/secret", "secret");
            }),
            b.layer(|l| {
                l.delete("data/secret").file("data/top", text);
            }),
        ];
        b.image(name, &layers, &[])
    }

    /// Publishes the layers of an image and pushes it. The result is its reference.
    pub fn publish_and_push(&self, image: &Image) -> String {
        self.repository.publish(image);
        self.registry.push(image)
    }

    /// Publishes some layers of an image, pulls it through us and normally, and asserts that the root file systems are
    /// equal, read-only and writable, and that no published layer was fetched.
    #[track_caller]
    pub fn assert_same(&self, image: &Image, published: &[&Blob]) {
        let published: Vec<Blob> = published.iter().map(|&b| b.clone()).collect();
        self.repository.publish_layers(&published);
        let reference = self.registry.push(image);
        let before = self.registry.fetched();
        self.ours.pull(&reference);
        let fetched = self.registry.fetched().since(&before);
        // Once a layer is not published, containerd fetches all layers above it before it asks the snapshotter for them.
        let is_published = |blob: &&Blob| published.iter().any(|p| p.digest == blob.digest);
        for blob in image.layers.iter().take_while(is_published) {
            assert!(!fetched.blobs.contains(&blob.digest), "published {} of {} was fetched", blob.digest, image.name);
        }
        self.assert_as_published(image, &[Writable::No, Writable::Yes]);
    }

    /// Asserts that an image that was pulled through us equals a normal pull of what is published of it.
    #[track_caller]
    pub fn assert_as_published(&self, image: &Image, modes: &[Writable]) {
        let expected = self.repository.as_published(&self.builder, image);
        self.normal.pull(&self.registry.push(&expected));
        for &writable in modes {
            let comparison = self.compare(&expected, image, writable);
            assert!(comparison.entries > 1, "nothing was compared");
            let differences: Vec<_> = comparison.differences.iter().map(ToString::to_string).collect();
            assert!(
                differences.is_empty(),
                "{} ({writable:?}): {} differences\n{}",
                image.name,
                differences.len(),
                differences.join("\n")
            );
        }
    }

    /// Compares the root file systems of an image that was pulled normally and of one that was pulled through us.
    pub fn compare(&self, expected: &Image, image: &Image, writable: Writable) -> Comparison {
        let key = format!("compare {} {writable:?}", image.name);
        let normal = self.normal.mount_image(expected, &key, &self.sandbox.path("mnt/normal"), writable);
        let ours = self.ours.mount_image(image, &key, &self.sandbox.path("mnt/ours"), writable);
        let comparison = compare(normal.path(), ours.path());
        drop((normal, ours));
        for side in [&self.normal, &self.ours] {
            side.snapshots().remove(&key).unwrap_or_else(|status| panic!("{}", status.message()));
        }
        comparison
    }

    pub fn snapshot_dirs(&self) -> Vec<String> {
        names(&self.snapshotter.snapshots())
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("cannot read {}: {e}", dir.display()));
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry can be read").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
