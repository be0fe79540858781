//! Clients of a real containerd, which pull, run and remove, and retry what failed because the snapshotter was down.

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{fs, thread};

use scene::containerd::Containerd;
use scene::e2e_fixture::E2eFixture;
use scene::image::{Blob, Image, Layer};
use scene::process::{Output, eventually};
use scene::random::Random;

use super::load_generator::Storm;

/// An image that is in the registry, and what its files say.
pub struct Pushed {
    pub reference: String,
    name: String,
    text: String,
}

/// Images on common layers; of each the first `published` layers are in the repository.
pub fn push_images(stage: &E2eFixture, names: &[(&str, usize)]) -> Vec<Pushed> {
    let base = stage.base_layer();
    let mut layers: Vec<Blob> = Vec::new();
    let images: Vec<(Image, String)> = names
        .iter()
        .map(|&(name, published)| {
            let text = format!("the text of {name}");
            let layer = |fill: &dyn Fn(&scene::image::LayerDir)| stage.builder.layer(fill);
            let own: [Layer; 2] = [
                layer(&|l| {
                    l.file("data/text", &text).file("data/secret", "secret");
                }),
                layer(&|l| {
                    l.delete("data/secret").file("data/top", &text);
                }),
            ];
            let image = stage.builder.image(name, &[[base.clone()].as_slice(), &own].concat(), &[]);
            layers.extend_from_slice(&image.layers[..published]);
            (image, text)
        })
        .collect();
    stage.repository.publish_layers(&layers);
    let push = |(image, text): (Image, String)| {
        let reference = stage.registry.push(&image);
        Pushed { reference, name: image.name, text }
    };
    images.into_iter().map(push).collect()
}

pub struct ContainerdClient<'s> {
    storm: &'s Storm,
    ours: &'s Containerd,
    images: Vec<Pushed>,
    name: String,
    random: Random,
    number: usize,
    /// The number of the image that is pulled.
    pulled: Option<usize>,
}

/// Whether a message of containerd or its clients says that the snapshotter is down.
fn is_outage(message: &str) -> bool {
    let signs = [
        "connection closed: unavailable",
        "connection refused",
        "error reading from server",
        "transport is closing",
        "connection reset",
        "failed to write client preface",
    ];
    signs.iter().any(|sign| message.contains(sign)) || (message.contains("s.sock") && message.contains("no such file"))
}

/// The warnings and errors about snapshots in containerd's log, without those about a snapshotter that is down.
pub fn complaints(log: &str) -> Vec<&str> {
    let is_complaint = |line: &&str| line.contains("level=warning") || line.contains("level=error");
    log.lines().filter(is_complaint).filter(|line| line.contains("snapshot") && !is_outage(line)).collect()
}

fn output_or_error(output: Output) -> Result<String, String> {
    if output.status.success() { Ok(output.stdout) } else { Err(format!("{}{}", output.stdout, output.stderr)) }
}

impl<'s> ContainerdClient<'s> {
    pub fn new(storm: &'s Storm, ours: &'s Containerd, number: u64, images: Vec<Pushed>) -> Self {
        let (name, random) = (format!("p{number}"), Random::new(storm.seed, number));
        Self { storm, ours, images, name, random, number: 0, pulled: None }
    }

    /// Retries an operation until it succeeds. It may fail only because the snapshotter is down.
    fn retry<T>(&mut self, what: &str, mut attempt: impl FnMut(&mut Self) -> Result<T, String>) -> T {
        let until = Instant::now() + Duration::from_mins(1);
        loop {
            match attempt(self) {
                Ok(value) => {
                    Storm::count(&self.storm.done);
                    return value;
                }
                Err(message) => {
                    assert!(is_outage(&message), "{what}: {message}");
                    assert!(Instant::now() < until, "{what} does not work again: {message}");
                    Storm::count(&self.storm.lost);
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    pub fn step(&mut self) {
        let Some(number) = self.pulled else {
            let number = self.random.below(self.images.len());
            let reference = self.images[number].reference.clone();
            self.retry("pull", |p| p.ours.cri().try_pull(&reference).map_err(|s| s.message().to_owned()));
            self.pulled = Some(number);
            return;
        };
        let reference = self.images[number].reference.clone();
        match self.random.below(4) {
            0 => {
                self.retry("remove", |p| p.ours.cri().try_remove(&reference).map_err(|s| s.message().to_owned()));
                self.pulled = None;
            }
            1 => {
                // The removal of a lease makes containerd collect garbage in the snapshotter.
                let lease = self.new_id("lease");
                self.retry("lease", |p| output_or_error(p.ours.ctr(&["leases", "create", "--id", &lease])));
                self.retry("collection", |p| output_or_error(p.ours.ctr(&["leases", "rm", "--sync", &lease])));
            }
            _ => self.run(&reference, number),
        }
    }

    fn new_id(&mut self, what: &str) -> String {
        self.number += 1;
        format!("{}-{what}-{}", self.name, self.number)
    }

    fn run(&mut self, reference: &str, number: usize) {
        // ctr 1.6 may lose the output of a container right before its end, hence the sleep.
        let script = "cat /data/text /data/top; ls /data; echo new > /data/new; cat /data/new; sleep 0.3";
        let output = self.retry("run", |p| {
            let id = p.new_id("run");
            output_or_error(p.ours.run(reference, &id, &["/bin/sh", "-c", script]))
        });
        let text = &self.images[number].text;
        assert_eq!(output, format!("{text}{text}text\ntop\nnew\n"));
        Storm::count(&self.storm.compared);
    }

    /// Removes the image that is pulled. No kill may happen meanwhile.
    pub fn remove_all(&mut self) {
        if let Some(number) = self.pulled.take() {
            self.ours.cri().remove(&self.images[number].reference);
        }
    }
}

/// A container that counts in a file, and reads the files of its image all the time.
pub struct Counter {
    id: String,
    root: PathBuf,
    last: u64,
}

impl Counter {
    pub fn start(ours: &Containerd, image: &Pushed) -> Self {
        ours.pull(&image.reference);
        let id = image.name.replace(':', "-");
        let program = format!(
            "n=0; while true; do n=$((n+1)); echo $n >> /data/log; echo $n > /data/count; \
             [ \"$(cat /data/text)\" = '{0}' ] && [ \"$(cat /data/top)\" = '{0}' ] && [ ! -e /data/secret ] || \
             echo $n >> /data/odd; sleep 0.05; done",
            image.text
        );
        ours.start_container(&image.reference, &id, &["/bin/sh", "-c", &program]);
        Self { root: ours.root_of(&id), id, last: 0 }
    }

    /// Checks that the container has counted since the last check, and that its files are complete.
    pub fn check(&mut self) {
        let data = self.root.join("data");
        eventually("a container counts on", || {
            let count = fs::read_to_string(data.join("count")).unwrap_or_default().trim().parse().unwrap_or(0);
            count > self.last + 2 && {
                self.last = count;
                true
            }
        });
        assert!(!data.join("odd").exists(), "{} missed a file of its image", self.id);
        let log = fs::read_to_string(data.join("log")).unwrap();
        // The last line may be half written.
        let lines: Vec<u64> = log.split_inclusive('\n').filter_map(|l| l.strip_suffix('\n')?.parse().ok()).collect();
        assert!(lines.iter().zip(1..).all(|(line, n)| *line == n), "{} lost a line", self.id);
        assert!(lines.len() as u64 + 1 >= self.last, "{} lost its last lines", self.id);
    }

    pub fn end(self, ours: &Containerd, image: &Pushed) {
        ours.end_container(&self.id);
        ours.cri().remove(&image.reference);
    }
}
