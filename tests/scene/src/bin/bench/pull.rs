//! A pull by a real containerd, as the kubelet asks for it. What a published layer costs in a
//! snapshotter is what remains beside one that does nothing.

use scene::containerd::Containerd;
use scene::e2e_fixture::PAUSE;
use scene::image::{Builder, Image};
use scene::publisher::Repository;
use scene::registry::Registry;
use scene::sandbox::Sandbox;

use crate::contestant::{Contestant, GO, MEMORY, OURS, OVERLAYFS};
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, float, seconds};
use crate::{Say, turns};

const LAYERS: [usize; 3] = [10, 40, 120];
/// The first one, which nobody counts, fills caches.
const ROUNDS: usize = 16;
const FILES: usize = 20;
const FILE: usize = 4096;

pub fn run(sandbox: &Sandbox, _: &Settings, say: &Say) -> Group {
    let columns = [OURS, MEMORY, GO, OVERLAYFS];
    let mut group = Group::new("Pull through the CRI of containerd 1.6, all layers published", &columns);
    group.add_note(format!(
        "{MEMORY} does nothing: the time is containerd's own; overlayfs fetches and unpacks, here tiny layers \
         ({FILES} files of {} KiB) over loopback",
        FILE / 1024
    ));
    say.that("pull: making and publishing images");
    let registry = Registry::start(&sandbox.path("pull-registry"));
    let repository = Repository::mounted(&sandbox.path("pull-cvmfs"));
    let images = images(&Builder::new(&sandbox.path("pull-images")));
    let references: Vec<String> = images.iter().map(|image| registry.push(image)).collect();
    repository.publish(images.last().expect("the largest has all layers"));
    let dir = |name: &str| sandbox.path(&format!("pull-{name}"));
    let behind = [
        Contestant::ours(OURS, &dir("ours"), repository.dir(), ""),
        Contestant::memory(&dir("memory")),
        Contestant::go(&dir("go"), repository.dir()),
    ];
    let pause = registry.reference(PAUSE);
    let mut containerds: Vec<Containerd> = behind
        .iter()
        .map(|c| Containerd::with_snapshotter(&dir(&format!("{}-c", c.name)), &pause, c.socket()))
        .collect();
    containerds.push(Containerd::with_overlayfs(&dir("overlayfs-c"), &pause));
    for (layers, reference) in LAYERS.into_iter().zip(&references) {
        let mut took: [Vec<f64>; 4] = Default::default();
        for round in 0..ROUNDS {
            say.that(&format!("pull of {layers} layers, round {round}"));
            for turn in turns(containerds.len(), round) {
                nix::unistd::sync();
                took[turn].push(seconds(|| containerds[turn].pull(reference)).0);
                containerds[turn].remove(reference);
            }
        }
        for (column, took) in columns.iter().zip(&took) {
            group.put(&format!("{layers} layers"), Unit::Millis, column, Cell::of(&took[1..]));
        }
        let [_, memory, ..] = &took;
        for (column, took) in columns.iter().zip(&took).filter(|(column, _)| **column != MEMORY) {
            let each: Vec<f64> = took.iter().zip(memory).skip(1).map(|(t, m)| (t - m) / float(layers)).collect();
            group.put(&format!("{layers} layers: more than {MEMORY}, a layer"), Unit::Millis, column, Cell::of(&each));
        }
    }
    group
}

/// Images that share their lowest layers.
fn images(builder: &Builder) -> Vec<Image> {
    let most = LAYERS.into_iter().max().unwrap_or_default();
    let layers: Vec<_> = (0..most)
        .map(|n| {
            builder.layer(|l| {
                for file in 0..FILES {
                    l.file(format!("layer-{n}/{file}"), vec![u8::try_from(n).unwrap_or_default(); FILE]);
                }
            })
        })
        .collect();
    LAYERS.iter().map(|&n| builder.image(&format!("layers:{n}"), &layers[..n], &[])).collect()
}
