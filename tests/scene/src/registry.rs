//! Debian's docker-registry on loopback, to which tests push images.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use crate::image::{Blob, Image};
use crate::process::{Server, tool};

pub struct Registry {
    server: Server,
    address: String,
}

impl Registry {
    pub fn start(dir: &Path) -> Self {
        fs::create_dir_all(dir).expect("the registry's directory can be made");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port is free").port();
        let address = format!("127.0.0.1:{port}");
        let config = dir.join("config.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            dir.join("data").display()
        );
        fs::write(&config, text).expect("the registry's configuration can be written");
        let mut server =
            Server::start(Command::new(tool("docker-registry")).arg("serve").arg(&config), &dir.join("log"));
        let url = format!("http://{address}/v2/");
        server.wait_until("answer", || ureq::get(&url).call().is_ok());
        Self { server, address }
    }

    /// The reference under which clients pull the image of this name.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Uploads an image under its name; blobs that are there already are not sent again.
    pub fn push(&self, image: &Image) -> String {
        let (repository, tag) = image.name.rsplit_once(':').expect("an image has a tag");
        self.push_image(image, repository, tag);
        self.reference(&image.name)
    }

    /// Uploads an index under this name, with the images that it lists.
    pub fn push_index(&self, index: &Blob, images: &[Image], name: &str) -> String {
        let (repository, tag) = name.rsplit_once(':').expect("an image has a tag");
        for image in images {
            self.push_image(image, repository, &image.manifest.digest);
        }
        self.push_manifest(index, repository, tag);
        self.reference(name)
    }

    fn push_image(&self, image: &Image, repository: &str, tag: &str) {
        for blob in image.layers.iter().chain([&image.config]) {
            self.push_blob(repository, blob);
        }
        self.push_manifest(&image.manifest, repository, tag);
    }

    fn push_manifest(&self, manifest: &Blob, repository: &str, tag: &str) {
        ureq::put(format!("http://{}/v2/{repository}/manifests/{tag}", self.address))
            .header("Content-Type", &manifest.media_type)
            .send(fs::read(&manifest.path).expect("a manifest can be read"))
            .expect("a manifest can be pushed");
    }

    fn push_blob(&self, repository: &str, blob: &Blob) {
        let base = format!("http://{}/v2/{repository}/blobs", self.address);
        if ureq::head(format!("{base}/{}", blob.digest)).call().is_ok() {
            return;
        }
        let started = ureq::post(format!("{base}/uploads/")).send_empty().expect("an upload can be started");
        let location = started.headers().get("location").and_then(|l| l.to_str().ok()).expect("an upload has a place");
        let joint = if location.contains('?') { '&' } else { '?' };
        ureq::put(format!("{location}{joint}digest={}", blob.digest))
            .header("Content-Type", "application/octet-stream")
            .send(fs::File::open(&blob.path).expect("a blob can be read"))
            .expect("a blob can be pushed");
    }

    /// The requests and bytes of blobs and manifests that clients fetched so far.
    pub fn fetched(&self) -> Fetched {
        let mut fetched = Fetched::default();
        for line in self.server.log().lines() {
            // 127.0.0.1 - - [time] "GET /v2/demo/blobs/sha256:… HTTP/1.1" 200 1234 "" "agent"
            let Some((_, request)) = line.split_once("\"GET /v2/") else { continue };
            let Some((path, answer)) = request.split_once(" HTTP/1.1\" ") else { continue };
            let mut words = answer.split(' ');
            if words.next() != Some("200") {
                continue;
            }
            let bytes = words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            fetched.bytes += bytes;
            if let Some((_, digest)) = path.split_once("/blobs/") {
                fetched.blobs.push(digest.to_owned());
            }
        }
        fetched
    }
}

#[derive(Clone, Debug, Default)]
pub struct Fetched {
    pub bytes: u64,
    /// Digests, one for each request.
    pub blobs: Vec<String>,
}

impl Fetched {
    /// The part that was fetched after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self { bytes: self.bytes - earlier.bytes, blobs: self.blobs[earlier.blobs.len()..].to_vec() }
    }

    /// How many requests were for layers of `image`.
    pub fn layers_of(&self, image: &Image) -> usize {
        self.blobs.iter().filter(|digest| image.layers.iter().any(|layer| layer.digest == **digest)).count()
    }
}
