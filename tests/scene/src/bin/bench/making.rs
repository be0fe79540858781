//! Measures Prepare and Commit by several clients, and the memory that a snapshotter takes afterwards.

use std::thread;
use std::time::Duration;

use scene::sandbox::Sandbox;

use crate::contestant::{Contestant, Failure, clients, failure, prefix, run_concurrently};
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, float, seconds};
use crate::{Say, contestants, turns};

const CLIENTS: usize = 8;
const SNAPSHOTS: usize = 8000;
const ROUNDS: usize = 4;
/// Clients of the last round, after the others, and how long it is until their memory is measured once more.
const CONCURRENT_CLIENTS: usize = 32;
const REST: Duration = Duration::from_secs(25);

pub fn run(sandbox: &Sandbox, settings: &Settings, say: &Say) -> Group {
    let contestants = contestants(sandbox, settings, "making", None);
    let names: Vec<&str> = contestants.iter().map(|c| c.name.as_str()).collect();
    let mut group = Group::new(&format!("{SNAPSHOTS} snapshots made by {CLIENTS} clients"), &names);
    for contestant in &contestants {
        record_memory(&mut group, contestant, "fresh");
    }
    let mut rates: Vec<Vec<f64>> = contestants.iter().map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        for turn in turns(contestants.len(), round) {
            let name = &contestants[turn].name;
            say.that(&format!("making, round {}, {name}", round + 1));
            nix::unistd::sync();
            match make(&contestants[turn], round, CLIENTS) {
                Ok(rate) => rates[turn].push(rate),
                Err(why) => group.add_note(format!("{name}: {why}")),
            }
            if round == ROUNDS - 1 {
                record_memory(&mut group, &contestants[turn], "right afterwards");
            }
        }
    }
    for contestant in &contestants {
        say.that(&format!("making by {CONCURRENT_CLIENTS} clients, {}", contestant.name));
        if let Err(why) = make(contestant, ROUNDS, CONCURRENT_CLIENTS) {
            group.add_note(format!("{}: {why}", contestant.name));
        }
        record_memory(
            &mut group,
            contestant,
            &format!("right after {CONCURRENT_CLIENTS} clients made {} more", SNAPSHOTS / ROUNDS),
        );
    }
    say.that("waiting for memory to be given back");
    thread::sleep(REST);
    for contestant in &contestants {
        record_memory(&mut group, contestant, &format!("{} s later", REST.as_secs()));
    }
    for (contestant, rates) in contestants.iter().zip(&rates) {
        group.put("Prepare and Commit", Unit::PerSecond, &contestant.name, Cell::of(rates));
    }
    group
}

/// Makes the snapshots of a round. The result is their number per second.
fn make(contestant: &Contestant, round: usize, by: usize) -> Result<f64, Failure> {
    let (clients, prefix) = (clients(contestant, by), prefix());
    let (took, result) = seconds(|| {
        run_concurrently(&clients, SNAPSHOTS / ROUNDS, |client, n| {
            let name = format!("{prefix}made-{round}-{n}");
            let key = format!("{name} extract");
            client.prepare(&key, "", &[]).map_err(failure)?;
            client.commit(&name, &key, &[]).map_err(failure)
        })
    });
    result.map(|()| float(SNAPSHOTS / ROUNDS) / took)
}

fn record_memory(group: &mut Group, contestant: &Contestant, when: &str) {
    let Some(usage) = contestant.usage() else { return };
    let mut put = |what: &str, unit, number: usize| {
        group.put(&format!("{what}, {when}"), unit, &contestant.name, Cell::one(float(number)));
    };
    put("memory", Unit::Megabytes, usage.memory * 1024);
    put("threads", Unit::Pieces, usage.threads);
}
