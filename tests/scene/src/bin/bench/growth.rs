//! Part `growth`: the duration of single calls, the memory and the duration of a start, with a growing number of
//! snapshots.

use std::fs;
use std::time::Duration;

use scene::client::{Client, IMAGE_REF, LAYER_DIGEST, REF};
use scene::publisher::Repository;
use scene::sandbox::Sandbox;

use crate::contestant::{Contestant, Failure, OURS, clients, failure, prefix, run_concurrently};
use crate::plot::Series;
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, float, sample, seconds};
use crate::{Say, contestants, turns};

const SIZES: [usize; 4] = [100, 1000, 10_000, 100_000];
const ROUNDS: usize = 3;
/// The number of layers of an image.
const DEPTH: usize = 10;
/// One in this many chains consists of published layers.
const PUBLISHED: usize = 3;
const POPULATING: usize = 32;
/// The number of calls of each kind in a round.
const CALLS: usize = 100;
const LIMIT: Duration = Duration::from_secs(1);
const STARTS: usize = 3;
const IMAGE: &str = "registry.example.org/group/project/image:2025-11-26";

/// Snapshots of one contestant, as pulls of many images leave them.
struct Store<'c> {
    contestant: &'c mut Contestant,
    chains: Vec<Chain>,
    /// How many it takes; 0 after a failure.
    up_to: usize,
    samples: Samples,
}

struct Chain {
    published: bool,
    /// From the bottom up.
    names: Vec<String>,
}

#[derive(Default)]
struct Samples {
    calls: Vec<(&'static str, Unit, Vec<f64>)>,
}

impl Samples {
    fn add(&mut self, name: &'static str, unit: Unit, more: Vec<f64>) {
        match self.calls.iter_mut().find(|(known, ..)| *known == name) {
            Some((.., samples)) => samples.extend(more),
            None => self.calls.push((name, unit, more)),
        }
    }
}

/// The calls that the drawing shows.
const DRAWN: [&str; 6] = ["Stat", "List by reference", "Prepare", "Commit", "Remove", "attach of a layer"];

pub fn run(sandbox: &Sandbox, settings: &Settings, say: &Say) -> Group {
    let Settings { up_to, peers_up_to, .. } = *settings;
    say.that("growth: publishing layers in a plain directory");
    let repository = Repository::plain(&sandbox.path("growth-cvmfs"));
    for chain in 0..up_to / DEPTH {
        publish(&repository, chain);
    }
    let mut contestants = contestants(sandbox, settings, "growth", Some(repository.dir()));
    let names: Vec<String> = contestants.iter().map(|c| c.name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut group = Group::new("One call of one client, in a store of so many snapshots", &names);
    group.add_note(format!(
        "chains of {DEPTH}, one in {PUBLISHED} of published layers; overlayfs has all of them as local ones"
    ));
    let mut stores: Vec<Store> = contestants
        .iter_mut()
        .map(|contestant| {
            let up_to = if contestant.name == OURS { up_to } else { peers_up_to };
            Store { contestant, chains: Vec::new(), up_to, samples: Samples::default() }
        })
        .collect();
    for store in &stores {
        record_memory(&mut group, store, None);
    }
    for size in SIZES.into_iter().filter(|&size| size <= up_to) {
        for store in stores.iter_mut().filter(|store| size <= store.up_to) {
            say.that(&format!("growth to {size} snapshots, {}", store.contestant.name));
            if let Err(why) = grow(&mut group, store, size) {
                group.add_note(format!("{} with {size} snapshots: {why}", store.contestant.name));
                store.up_to = 0;
            }
        }
        for round in 0..ROUNDS {
            say.that(&format!("calls with {size} snapshots, round {}", round + 1));
            for turn in turns(stores.len(), round) {
                let store = &mut stores[turn];
                if size > store.up_to {
                    continue;
                }
                nix::unistd::sync();
                if let Err(why) = calls(store, &format!("{size}-{round}")) {
                    group.add_note(format!("{} with {size} snapshots: {why}", store.contestant.name));
                }
            }
        }
        for store in stores.iter_mut().filter(|store| size <= store.up_to) {
            for (name, unit, samples) in std::mem::take(&mut store.samples).calls {
                group.put_at(name, Some(size), unit, &store.contestant.name, Cell::of(&samples));
            }
            record_memory(&mut group, store, Some(size));
            say.that(&format!("starts with {size} snapshots, {}", store.contestant.name));
            if let Err(why) = start(&mut group, store, size) {
                group.add_note(format!("{} with {size} snapshots: {why}", store.contestant.name));
                store.up_to = 0;
            }
        }
    }
    group
}

pub fn series(group: &Group) -> Vec<Series> {
    let ours =
        DRAWN.iter().map(|name| Series { name: (*name).to_owned(), points: group.growth(name, OURS), peer: false });
    let peers = group.columns().iter().filter(|name| *name != OURS).map(|name| Series {
        name: format!("List by reference, {name}"),
        points: group.growth("List by reference", name),
        peer: true,
    });
    ours.chain(peers).filter(|series| !series.points.is_empty()).collect()
}

fn is_published(chain: usize) -> bool {
    chain % PUBLISHED == PUBLISHED - 1
}

fn digest(chain: usize, layer: usize) -> String {
    // The store spreads layers by the first digits.
    let n = chain * DEPTH + layer;
    format!("sha256:{:02x}{n:062x}", n % 256)
}

fn publish(repository: &Repository, chain: usize) {
    for layer in (0..DEPTH).filter(|_| is_published(chain)) {
        let top = repository.layer_dir(&digest(chain, layer)).join("layerfs");
        fs::create_dir_all(&top).expect("a layer can be made");
        fs::write(top.join("file"), "").expect("a layer can be filled");
    }
}

fn grow(group: &mut Group, store: &mut Store, size: usize) -> Result<(), Failure> {
    let clients = clients(store.contestant, POPULATING);
    let (old, new) = (store.chains.len(), size / DEPTH);
    let prefix = prefix();
    let made = std::sync::Mutex::new(Vec::new());
    let (seconds, result) = seconds(|| {
        run_concurrently(&clients, new - old, |client, n| {
            let chain = make(client, &prefix, old + n)?;
            made.lock().expect("no thread panics with it").push(chain);
            Ok(())
        })
    });
    result?;
    store.chains.extend(made.into_inner().expect("no thread panics with it"));
    let per_second = float((new - old) * DEPTH) / seconds;
    group.put_at(
        "pulled to here by 32 clients, layers",
        Some(size),
        Unit::PerSecond,
        &store.contestant.name,
        Cell::one(per_second),
    );
    drop(clients);
    store.contestant.settle();
    Ok(())
}

/// Makes a chain as containerd pulls it: it calls Prepare for each layer, and commits those that are not published.
fn make(client: &Client, prefix: &str, chain: usize) -> Result<Chain, Failure> {
    let published = is_published(chain);
    let mut names: Vec<String> = Vec::new();
    for layer in 0..DEPTH {
        let name = format!("{prefix}{chain}-{layer}/sha256:{:064x}", chain * DEPTH + layer);
        let parent = names.last().cloned().unwrap_or_default();
        let digest = digest(chain, layer);
        let labels = [(IMAGE_REF, IMAGE), (REF, &name), (LAYER_DIGEST, &digest)];
        let labels = if published { &labels[..] } else { &labels[..1] };
        let key = format!("{name} extract");
        match client.prepare(&key, &parent, labels) {
            Ok(_) => client.commit(&name, &key, labels).map_err(failure)?,
            Err(status) if published && status.code() == grpcio::RpcStatusCode::ALREADY_EXISTS => {
                names.push(name_of(client, &name, &parent)?);
                continue;
            }
            Err(status) => return Err(failure(status)),
        }
        names.push(name);
    }
    Ok(Chain { published, names })
}

fn filter(reference: &str, parent: &str) -> String {
    format!("labels.{REF:?}=={reference},parent=={parent:?}")
}

fn name_of(client: &Client, reference: &str, parent: &str) -> Result<String, Failure> {
    // A Go snapshotter calls it by its reference, and would look through everything for it.
    if client.stat(reference).is_ok() {
        return Ok(reference.to_owned());
    }
    let found = client.list(&[&filter(reference, parent)]).map_err(failure)?;
    found.into_iter().next().map(|info| info.name).ok_or_else(|| format!("nothing stands for {reference}"))
}

/// Measures each kind of call once.
fn calls(store: &mut Store, round: &str) -> Result<(), Failure> {
    let client = clients(store.contestant, 1).remove(0);
    let (chains, samples) = (&store.chains, &mut store.samples);
    let prefix = prefix();
    // Somewhere else each time, without chance.
    let chain = |n: usize| &chains[n * 7919 % chains.len()];

    let stat = sample(5 * CALLS, LIMIT, |n| client.stat(&chain(n).names[n % DEPTH]).map(drop).map_err(failure));
    samples.add("Stat", Unit::Micros, stat?);

    let published: Vec<&Chain> = chains.iter().filter(|chain| chain.published).collect();
    let asked: Vec<(String, String)> = (0..CALLS)
        .map(|n| {
            let (chain, layer) = (published[n * 7919 % published.len()], n % DEPTH);
            let info = client.stat(&chain.names[layer]).map_err(failure)?;
            Ok((info.labels.get(REF).cloned().unwrap_or_default(), info.parent))
        })
        .collect::<Result<_, Failure>>()?;
    let by_reference = sample(CALLS, LIMIT, |n| {
        let found = client.list(&[&filter(&asked[n].0, &asked[n].1)]).map_err(failure)?;
        if found.len() == 1 { Ok(()) } else { Err(format!("{} snapshots stand for a reference", found.len())) }
    });
    samples.add("List by reference", Unit::Micros, by_reference?);

    let local: Vec<&Chain> = chains.iter().filter(|chain| !chain.published).collect();
    let name = |n: usize| format!("{prefix}call-{round}-{n}/sha256:{n:064x}");
    let [mut prepare, mut commit, mut remove] = [(); 3].map(|()| Vec::with_capacity(CALLS));
    for n in 0..CALLS {
        let key = format!("{} extract", name(n));
        let parent = local[n * 7919 % local.len()].names.last().expect("a chain has layers");
        let (took, result) = seconds(|| client.prepare(&key, parent, &[(IMAGE_REF, IMAGE)]));
        result.map_err(failure)?;
        prepare.push(took);
        let (took, result) = seconds(|| client.commit(&name(n), &key, &[(IMAGE_REF, IMAGE)]));
        result.map_err(failure)?;
        commit.push(took);
    }
    for n in 0..CALLS {
        let (took, result) = seconds(|| client.remove(&name(n)));
        result.map_err(failure)?;
        remove.push(took);
    }
    samples.add("Prepare", Unit::Micros, prepare);
    samples.add("Commit", Unit::Micros, commit);
    samples.add("Remove", Unit::Micros, remove);
    let (took, result) = seconds(|| client.cleanup());
    result.map_err(failure)?;
    samples.add("Cleanup of 100", Unit::Millis, vec![took]);

    let all = sample(3, 3 * LIMIT, |_| client.list(&[]).map(drop).map_err(failure));
    samples.add("List of everything", Unit::Millis, all?);
    if store.contestant.name == OURS {
        attach(&client, &published, &prefix, samples)?;
    }
    Ok(())
}

/// A container on one published layer that nothing else stands on.
fn attach(client: &Client, published: &[&Chain], prefix: &str, samples: &mut Samples) -> Result<(), Failure> {
    let key = format!("{prefix}container");
    let mut attached = Vec::new();
    for n in 0..CALLS {
        let layer = &published[n * 7919 % published.len()].names[0];
        // That it is scanned once is not what the second container waits for.
        for count in [false, true] {
            let (took, result) = seconds(|| client.prepare(&key, layer, &[]));
            result.map_err(failure)?;
            attached.extend(count.then_some(took));
            client.remove(&key).map_err(failure)?;
            client.cleanup().map_err(failure)?;
        }
    }
    samples.add("attach of a layer", Unit::Micros, attached);
    Ok(())
}

fn record_memory(group: &mut Group, store: &Store, at: Option<usize>) {
    let Some(usage) = store.contestant.usage() else { return };
    let fresh = if at.is_none() { " when fresh" } else { "" };
    let name = &store.contestant.name;
    let mut put = |what: &str, unit, number: usize| {
        group.put_at(&format!("{what}{fresh}"), at, unit, name, Cell::one(float(number)));
    };
    put("memory", Unit::Megabytes, usage.memory * 1024);
    put("threads", Unit::Pieces, usage.threads);
    put("open files", Unit::Pieces, usage.files);
}

fn start(group: &mut Group, store: &mut Store, size: usize) -> Result<(), Failure> {
    let contestant = &mut *store.contestant;
    if contestant.is_foreign() {
        return Ok(());
    }
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        contestant.stop();
        starts.push(contestant.start()?.as_secs_f64());
    }
    contestant.settle();
    group.put_at("start", Some(size), Unit::Millis, &contestant.name, Cell::of(&starts));
    let memory = contestant.usage().and_then(|usage| Cell::one(float(usage.memory * 1024)));
    group.put_at("memory after a start", Some(size), Unit::Megabytes, &contestant.name, memory);
    Ok(())
}
