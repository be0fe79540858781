//! Part `start`: Prepare and Mounts, the calls by which a container starts, on an image of many layers. The mount itself
//! is made by containerd.

use std::sync::Barrier;
use std::time::Instant;

use scene::client::Client;
use scene::image::{Builder, Image};
use scene::process::eventually;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;

use crate::contestant::{Contestant, Failure, GO, OVERLAYFS, clients, failure, prefix};
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, quantile, seconds};
use crate::{Say, turns};

const LAYERS: usize = 40;
const ROUNDS: usize = 5;
const FIRST: usize = 8;
const LATER: usize = 30;
const AT_ONCE: usize = 100;
const REFERENCE: &str = "registry.example.org/bench/start:1";
/// Ours, as it can be configured. The first is the default of packages.
const WAYS: [(&str, &str); 2] = [("ours, symlinks", "attach = \"symlink\""), ("ours, binds", "attach = \"bind\"")];

pub fn run(sandbox: &Sandbox, settings: &Settings, say: &Say) -> Group {
    say.that(&format!("start: making and publishing an image of {LAYERS} layers"));
    let builder = Builder::new(&sandbox.path("start-images"));
    let image = image(&builder);
    let repository = Repository::mounted(&sandbox.path("start-cvmfs"));
    repository.publish(&image);
    let dir = |name: &str| sandbox.path(&format!("start-{name}"));
    let mut contestants: Vec<Contestant> = WAYS
        .iter()
        .enumerate()
        .map(|(n, (name, config))| Contestant::ours(name, &dir(&n.to_string()), repository.dir(), config))
        .collect();
    contestants.extend([Contestant::go(&dir(GO), repository.dir()), Contestant::overlayfs(&dir(OVERLAYFS))]);
    contestants.extend(Contestant::foreign(settings));
    let names: Vec<&str> = contestants.iter().map(|c| c.name.as_str()).collect();
    let mut group = Group::new(&format!("Prepare and Mounts of a container on {LAYERS} layers"), &names);
    group.add_note(format!(
        "the repository is a FUSE mount; {GO} binds layers at the pull and has no first use; overlayfs and others \
         have {LAYERS} local layers"
    ));
    let chains: Vec<Option<String>> = contestants
        .iter()
        .map(|contestant| {
            pull(contestant, &image).map_err(|why| group.add_note(format!("{}: {why}", contestant.name))).ok()
        })
        .collect();
    let mut all: Vec<Round> = contestants.iter().map(|_| Round::default()).collect();
    for round in 0..ROUNDS {
        say.that(&format!("start of containers, round {}", round + 1));
        for turn in turns(contestants.len(), round) {
            let Some(chain) = &chains[turn] else { continue };
            nix::unistd::sync();
            if let Err(why) = starts(&contestants[turn], chain, &mut all[turn]) {
                group.add_note(format!("{}: {why}", contestants[turn].name));
            }
        }
    }
    for (contestant, all) in contestants.iter().zip(all) {
        let mut put = |name: &str, samples: &[f64]| {
            group.put(name, Unit::Millis, &contestant.name, Cell::of(samples));
        };
        put("the first use", &all.first);
        put("further uses", &all.later);
        for (when, crowds) in [("in use", &all.in_use), ("not yet in use", &all.not_yet)] {
            let of = |which: fn(&Crowd) -> f64| crowds.iter().map(which).collect::<Vec<_>>();
            put(&format!("{AT_ONCE} at once, {when}: all"), &of(|c| c.all));
            put(&format!("{AT_ONCE} at once, {when}: p50"), &of(|c| quantile(&c.each, 0.5)));
            put(&format!("{AT_ONCE} at once, {when}: p99"), &of(|c| quantile(&c.each, 0.99)));
        }
    }
    group
}

#[derive(Default)]
struct Round {
    first: Vec<f64>,
    later: Vec<f64>,
    in_use: Vec<Crowd>,
    not_yet: Vec<Crowd>,
}

struct Crowd {
    all: f64,
    /// Sorted.
    each: Vec<f64>,
}

fn image(builder: &Builder) -> Image {
    let layer = |n: usize| {
        builder.layer(|l| {
            l.file(format!("dir/{n}"), n.to_string());
        })
    };
    builder.image("start:1", &(0..LAYERS).map(layer).collect::<Vec<_>>(), &[])
}

/// The result is the snapshot that containers stand on.
fn pull(contestant: &Contestant, image: &Image) -> Result<String, Failure> {
    let client = contestant.client();
    if WAYS.iter().any(|(name, _)| *name == contestant.name) || contestant.name == GO {
        let chain = client.pull_image(image, REFERENCE);
        // The prefetch must have ended.
        eventually("the layers were scanned", || {
            client.prepare("ahead", &chain, &[]).is_ok() && client.remove("ahead").is_ok() && client.cleanup().is_ok()
        });
        return Ok(chain);
    }
    let mut chain = String::new();
    for n in 0..LAYERS {
        let name = format!("{}start-{n}", prefix());
        let key = format!("{name} extract");
        client.prepare(&key, &chain, &[]).map_err(failure)?;
        client.commit(&name, &key, &[]).map_err(failure)?;
        chain = name;
    }
    Ok(chain)
}

fn start(client: &Client, key: &str, chain: &str) -> Result<f64, Failure> {
    let (took, result) = seconds(|| client.prepare(key, chain, &[]).and_then(|_| client.mounts(key)));
    result.map_err(failure).map(|_| took)
}

fn starts(contestant: &Contestant, chain: &str, all: &mut Round) -> Result<(), Failure> {
    let clients = clients(contestant, AT_ONCE);
    let client = &clients[0];
    let key = format!("{}container", prefix());
    for _ in 0..FIRST {
        all.first.push(start(client, &key, chain)?);
        client.remove(&key).map_err(failure)?;
        client.cleanup().map_err(failure)?;
    }
    let holds = format!("{key} that holds");
    start(client, &holds, chain)?;
    for _ in 0..LATER {
        all.later.push(start(client, &key, chain)?);
        client.remove(&key).map_err(failure)?;
    }
    client.cleanup().map_err(failure)?;
    all.in_use.push(at_once(&clients, &key, chain)?);
    client.remove(&holds).map_err(failure)?;
    client.cleanup().map_err(failure)?;
    all.not_yet.push(at_once(&clients, &key, chain)?);
    client.cleanup().map_err(failure)
}

fn at_once(clients: &[Client], key: &str, chain: &str) -> Result<Crowd, Failure> {
    let barrier = Barrier::new(clients.len() + 1);
    let (all, each) = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter()
            .enumerate()
            .map(|(n, client)| {
                let (barrier, key) = (&barrier, format!("{key} {n}"));
                scope.spawn(move || {
                    barrier.wait();
                    start(client, &key, chain)
                })
            })
            .collect();
        let begun = Instant::now();
        barrier.wait();
        let each: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("a client does not panic")).collect();
        (begun.elapsed().as_secs_f64(), each)
    });
    let mut each = each.into_iter().collect::<Result<Vec<_>, _>>()?;
    each.sort_by(f64::total_cmp);
    for n in 0..clients.len() {
        clients[0].remove(&format!("{key} {n}")).map_err(failure)?;
    }
    Ok(Crowd { all, each })
}
