//! Part `cycles`: Prepare, Mounts and Remove of a snapshot, by one client and by many.

use std::time::{Duration, Instant};

use nix::unistd::Pid;
use scene::client::Client;
use scene::sandbox::Sandbox;

use crate::contestant::{Contestant, Failure, clients, failure, prefix};
use crate::host::{cores, processor_seconds};
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, float, quantile};
use crate::{Say, contestants, turns};

const CLIENTS: [usize; 3] = [1, 8, 32];
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(3);

pub fn run(sandbox: &Sandbox, settings: &Settings, say: &Say) -> Group {
    let contestants = contestants(sandbox, settings, "cycles", None);
    let names: Vec<&str> = contestants.iter().map(|c| c.name.as_str()).collect();
    let mut group = Group::new("Prepare, Mounts, Remove: durable cycles of clients that do nothing else", &names);
    for on_parent in [false, true] {
        for number in CLIENTS {
            let where_ = if on_parent { "on a layer" } else { "on nothing" };
            let what = format!("{where_}, {number} client{}", if number == 1 { "" } else { "s" });
            say.that(&format!("cycles {what}"));
            let mut rounds: Vec<Vec<Round>> = contestants.iter().map(|_| Vec::new()).collect();
            for n in 0..ROUNDS {
                for turn in turns(contestants.len(), n) {
                    match round(&contestants[turn], on_parent, number, n) {
                        Ok(round) => rounds[turn].push(round),
                        Err(why) => group.add_note(format!("{}, {what}: {why}", contestants[turn].name)),
                    }
                }
            }
            for (contestant, rounds) in contestants.iter().zip(&rounds) {
                let mut put = |name: &str, unit, of: &dyn Fn(&Round) -> f64| {
                    let samples: Vec<f64> = rounds.iter().map(of).collect();
                    group.put(&format!("{what}: {name}"), unit, &contestant.name, Cell::of(&samples));
                };
                put("cycles", Unit::PerSecond, &|r| r.per_second);
                put("p50", Unit::Micros, &|r| quantile(&r.latencies, 0.5));
                put("p99", Unit::Micros, &|r| quantile(&r.latencies, 0.99));
                put("processor, bench", Unit::Share, &|r| r.bench);
                put("processor, snapshotter", Unit::Share, &|r| r.snapshotter);
            }
        }
    }
    group
}

struct Round {
    per_second: f64,
    /// The duration of each cycle, sorted.
    latencies: Vec<f64>,
    /// Share of all processor time.
    bench: f64,
    snapshotter: f64,
}

fn round(contestant: &Contestant, on_parent: bool, number: usize, n: usize) -> Result<Round, Failure> {
    let clients = clients(contestant, number);
    let prefix = format!("{}cycles-{n}/", prefix());
    let parent = if on_parent { layer(&clients[0])? } else { String::new() };
    nix::unistd::sync();
    let us = Pid::this();
    let used = || [us].into_iter().chain(contestant.pid()).map(processor_seconds).collect::<Vec<_>>();
    let (before, begun) = (used(), Instant::now());
    let results: Vec<Result<Vec<f64>, Failure>> = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter()
            .enumerate()
            .map(|(t, client)| {
                let (prefix, parent) = (&prefix, &parent);
                scope.spawn(move || cycles(client, &format!("{prefix}{number}-{t}"), parent, begun + ROUND))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a client does not panic")).collect()
    });
    let wall = begun.elapsed().as_secs_f64();
    let after = used();
    let share = |n: usize| match (before.get(n), after.get(n)) {
        (Some(before), Some(after)) => (after - before) / wall / float(cores()),
        _ => 0.0,
    };
    let mut latencies = results.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    latencies.sort_by(f64::total_cmp);
    clients[0].cleanup().map_err(failure)?;
    let per_second = float(latencies.len()) / wall;
    Ok(Round { per_second, latencies, bench: share(0), snapshotter: share(1) })
}

/// A committed snapshot of our own; it may be there already.
fn layer(client: &Client) -> Result<String, Failure> {
    let name = format!("{}layer", prefix());
    if client.stat(&name).is_err() {
        let key = format!("{name} extract");
        client.prepare(&key, "", &[]).map_err(failure)?;
        client.commit(&name, &key, &[]).map_err(failure)?;
    }
    Ok(name)
}

/// Seconds of each.
fn cycles(client: &Client, key: &str, parent: &str, until: Instant) -> Result<Vec<f64>, Failure> {
    let mut latencies = Vec::new();
    loop {
        let begun = Instant::now();
        if begun >= until {
            return Ok(latencies);
        }
        let key = format!("{key}-{}", latencies.len());
        client.prepare(&key, parent, &[]).map_err(failure)?;
        client.mounts(&key).map_err(failure)?;
        client.remove(&key).map_err(failure)?;
        latencies.push(begun.elapsed().as_secs_f64());
    }
}
