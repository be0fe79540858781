//! The whole stage: a registry, a repository, the snapshotter, one containerd that pulls the
//! normal way and one that pulls through us.

use std::fs;
use std::path::Path;

use crate::compare::{Comparison, compare};
use crate::containerd::{Containerd, Writable};
use crate::image::{Blob, Builder, Image, Layer};
use crate::process::tool;
use crate::publisher::Repository;
use crate::registry::Registry;
use crate::release::{Release, Way};
use crate::sandbox::Sandbox;
use crate::snapshotter::Snapshotter;

/// Fields are dropped in order: clients before servers, the sandbox last.
pub struct Stage {
    pub normal: Containerd,
    pub ours: Containerd,
    pub snapshotter: Snapshotter,
    pub registry: Registry,
    pub repository: Repository,
    pub builder: Builder,
    pub sandbox: Sandbox,
}

/// The image of the container that holds a pod's namespaces; a test that runs pods pushes it.
pub const PAUSE: &str = "pause:1";

impl Stage {
    /// `config` is added to the snapshotter's configuration. The repository is a CernVM-FS mount.
    pub fn set(name: &str, config: &str) -> Self {
        Self::with(name, config, Repository::mounted)
    }

    /// With a repository that `publisher` makes in a directory.
    pub fn with(name: &str, config: &str, publisher: impl FnOnce(&Path) -> Repository) -> Self {
        Self::of(name, config, Release::V1_6, Way::Client1, publisher)
    }

    /// With another version of containerd, configured in this way.
    pub fn of(
        name: &str,
        config: &str,
        release: Release,
        way: Way,
        publisher: impl FnOnce(&Path) -> Repository,
    ) -> Self {
        let sandbox = Sandbox::enter(name);
        let builder = Builder::new(&sandbox.path("images"));
        let registry = Registry::start(&sandbox.path("registry"));
        let repository = publisher(&sandbox.path("cvmfs"));
        let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), config);
        let pause = registry.reference(PAUSE);
        let ours = Containerd::of(&sandbox.path("o"), release, way, &pause, &snapshotter);
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

    /// The result is the reference.
    pub fn publish_and_push(&self, image: &Image) -> String {
        self.repository.publish(image);
        self.registry.push(image)
    }

    /// Pushes and pulls on both sides, then compares what both see, read-only and writable.
    #[track_caller]
    pub fn assert_same(&self, image: &Image, published: &[&Blob]) {
        let published: Vec<Blob> = published.iter().map(|&b| b.clone()).collect();
        self.repository.publish_layers(&published);
        let reference = self.registry.push(image);
        let before = self.registry.fetched();
        self.ours.pull(&reference);
        let fetched = self.registry.fetched().since(&before);
        // From the first layer that is not published, containerd fetches all that follow, at
        // once and before it asks for them.
        let is_published = |blob: &&Blob| published.iter().any(|p| p.digest == blob.digest);
        for blob in image.layers.iter().take_while(is_published) {
            assert!(!fetched.blobs.contains(&blob.digest), "published {} of {} was fetched", blob.digest, image.name);
        }
        self.assert_as_published(image, &[Writable::No, Writable::Yes]);
    }

    /// Compares with a normal pull what those see who pulled the image through us.
    #[track_caller]
    pub fn assert_as_published(&self, image: &Image, how: &[Writable]) {
        let expected = self.repository.as_published(&self.builder, image);
        self.normal.pull(&self.registry.push(&expected));
        for &writable in how {
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

    /// The root file systems of an image that was pulled the normal way, and of one that came through us.
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
