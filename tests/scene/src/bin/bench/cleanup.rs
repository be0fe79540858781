//! Part `cleanup`: the removal of the files of many snapshots, and its effect on other calls.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use scene::client::Client;
use scene::sandbox::Sandbox;

use crate::contestant::{Contestant, Failure, clients, failure, prefix, run_concurrently};
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, quantile, seconds};
use crate::{Say, contestants, turns};

const ROUNDS: usize = 3;
const FILES: usize = 20;
const MAKING: usize = 16;
/// One in this many snapshots is removed while calls are measured.
const PART: usize = 3;
/// The calls that a cleanup is compared with are made for so long.
const QUIET: Duration = Duration::from_secs(1);

pub fn run(sandbox: &Sandbox, settings: &Settings, say: &Say) -> Group {
    let number = settings.cleanup;
    let contestants = contestants(sandbox, settings, "cleanup", None);
    let names: Vec<&str> = contestants.iter().map(|c| c.name.as_str()).collect();
    let mut group = Group::new(&format!("Cleanup of {number} removed snapshots"), &names);
    group.add_note(
        "calls: Stat, Prepare, Remove of one client; the slowest and p99 of one such cycle in a round".to_owned(),
    );
    let mut results: Vec<Vec<Round>> = contestants.iter().map(|_| Vec::new()).collect();
    for n in 0..ROUNDS {
        for turn in turns(contestants.len(), n) {
            let name = &contestants[turn].name;
            say.that(&format!("cleanup, round {}, {name}", n + 1));
            match round(&contestants[turn], number, n) {
                Ok(round) => results[turn].push(round),
                Err(why) => group.add_note(format!("{name}: {why}")),
            }
        }
    }
    for (contestant, rounds) in contestants.iter().zip(&results) {
        let mut put = |name: &str, unit, of: &dyn Fn(&Round) -> f64| {
            group.put(name, unit, &contestant.name, Cell::of(&rounds.iter().map(of).collect::<Vec<_>>()));
        };
        put("empty ones", Unit::Seconds, &|r| r.empty);
        put(&format!("with {FILES} files each"), Unit::Seconds, &|r| r.filled);
        put(&format!("{} of them, beside calls", number / PART), Unit::Seconds, &|r| r.busy);
        put("calls without a cleanup: p99", Unit::Millis, &|r| quantile(&r.quiet, 0.99));
        put("calls without a cleanup: slowest", Unit::Millis, &|r| quantile(&r.quiet, 1.0));
        put("calls during a cleanup: p99", Unit::Millis, &|r| quantile(&r.beside, 0.99));
        put("calls during a cleanup: slowest", Unit::Millis, &|r| quantile(&r.beside, 1.0));
    }
    group
}

struct Round {
    empty: f64,
    filled: f64,
    busy: f64,
    /// Cycles, sorted.
    quiet: Vec<f64>,
    beside: Vec<f64>,
}

fn round(contestant: &Contestant, number: usize, n: usize) -> Result<Round, Failure> {
    let clients = clients(contestant, MAKING);
    let (first, other) = (&clients[0], &clients[1]);
    let prefix = format!("{}cleanup-{n}/", prefix());

    let clean = || {
        let (took, result) = seconds(|| first.with_timeout(Duration::from_mins(10)).cleanup());
        result.map_err(failure).map(|()| took)
    };
    make(&clients, &format!("{prefix}empty-"), number, 0)?;
    nix::unistd::sync();
    let empty = clean()?;
    make(&clients, &format!("{prefix}filled-"), number, FILES)?;
    nix::unistd::sync();
    let filled = clean()?;

    let until = Instant::now() + QUIET;
    let quiet = calls(other, &format!("{prefix}quiet-"), || Instant::now() < until)?;
    make(&clients, &format!("{prefix}busy-"), number / PART, FILES)?;
    nix::unistd::sync();
    let cleaning = AtomicBool::new(true);
    let (busy, beside) = std::thread::scope(|scope| {
        let beside = scope.spawn(|| calls(other, &format!("{prefix}beside-"), || cleaning.load(Ordering::Relaxed)));
        let busy = clean();
        cleaning.store(false, Ordering::Relaxed);
        let beside = beside.join().expect("a client does not panic")?;
        busy.map(|busy| (busy, beside))
    })?;
    first.cleanup().map_err(failure)?;
    Ok(Round { empty, filled, busy, quiet, beside })
}

/// Snapshots that were there and are removed.
fn make(clients: &[Client], prefix: &str, number: usize, files: usize) -> Result<(), Failure> {
    run_concurrently(clients, number, |client, n| {
        let key = format!("{prefix}{n}");
        let mounts = client.prepare(&key, "", &[]).map_err(failure)?;
        let top = mounts.first().map(|mount| mount.source.clone()).unwrap_or_default();
        for file in 0..files {
            let path = Path::new(&top).join(file.to_string());
            fs::write(&path, "x").map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
        client.remove(&key).map_err(failure)
    })
}

/// Seconds of each cycle, sorted; one at least.
fn calls(client: &Client, prefix: &str, go_on: impl Fn() -> bool) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::new();
    loop {
        let key = format!("{prefix}{}", times.len());
        let (took, result) = seconds(|| {
            client.prepare(&key, "", &[])?;
            client.stat(&key)?;
            client.remove(&key)
        });
        result.map_err(failure)?;
        times.push(took);
        if !go_on() {
            break;
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
