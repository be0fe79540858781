//! Kill storms: two snapshotters are killed again and again at random moments, one while clients call its own socket, the
//! other while a real containerd pulls, runs, commits and removes. The test remembers what was acknowledged, and compares.
//!
//! `STORM_SEED` repeats a run as far as threads allow, `STORM_KILLS` is its length.

#![allow(clippy::unwrap_used)]

mod containerd_client;
mod load_generator;
mod snapshot_client;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread::{scope, sleep};
use std::time::{Duration, Instant, SystemTime};

use cvmfs_snapshotter::proto::snapshots::{Info, Kind};
use scene::client::Client;
use scene::containerd::Containerd;
use scene::e2e_fixture::{E2eFixture, names};
use scene::process::eventually;
use scene::publisher::Repository;
use scene::random::Random;
use scene::sandbox::mounts_below;
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::digest;

use self::containerd_client::{ContainerdClient, Counter, complaints, push_images};
use self::load_generator::{Daemon, EndOnPanic, Storm};
use self::snapshot_client::SnapshotClient;

/// The number of kills of `make test`. `make storm` has hundreds.
const KILLS: usize = 16;
/// The number of kills after which everything is compared.
const KILLS_BETWEEN_CHECKS: usize = 8;

/// 56 kills of containerd's own overlayfs left 14 calls that failed with "file exists": an id
/// whose transaction never committed was handed out again. The Go snapshotter empties its state
/// when it is stopped, below running containers.
#[test]
fn root_acknowledged_changes_survive_repeated_kills() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let by_time = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let seed = number("STORM_SEED").unwrap_or_else(by_time);
    match number("STORM_KILLS") {
        Some(kills) => storm(seed, kills.try_into().unwrap(), ["bind", "symlink"][usize::from(seed % 2 == 1)]),
        None => ["bind", "symlink"].iter().for_each(|attach| storm(seed, KILLS / 2, attach)),
    }
}

fn storm(seed: u64, kills: usize, attach: &str) {
    println!("STORM_SEED={seed} STORM_KILLS={kills} attach = {attach:?}");
    let begun = Instant::now();
    let config = format!("attach = {attach:?}");
    let mut stage = E2eFixture::start("storm", &config);
    let long = push_images(&stage, &[("published-long:1", 3), ("local-long:1", 0)]);
    let one = push_images(&stage, &[("published-1:1", 3), ("local-1:1", 0), ("half-1:1", 2)]);
    let two = push_images(&stage, &[("published-2:1", 3), ("half-2:1", 1)]);
    publish_direct_layers(&stage.repository);
    let mut own = Snapshotter::start(&stage.sandbox.path("own"), stage.repository.dir(), &config);
    let mnt = stage.sandbox.path("mnt");
    let E2eFixture { ours, snapshotter, .. } = &mut stage;
    let ours: &Containerd = ours;
    let mut counters: Vec<Counter> = long.iter().map(|image| Counter::start(ours, image)).collect();

    let storm = &Storm::new(seed);
    let (behind, alone) = (&Daemon::new(snapshotter), &Daemon::new(&mut own));
    let direct: Vec<_> = (0..4).map(|n| Mutex::new(SnapshotClient::new(storm, alone, n, &mnt))).collect();
    let pullers: Vec<_> =
        [(10, one), (11, two)].map(|(n, images)| Mutex::new(ContainerdClient::new(storm, ours, n, images))).into();
    let compare = |counters: &mut [Counter]| {
        let _all = storm.gate.write().unwrap();
        for client in &direct {
            client.lock().unwrap().check_all();
        }
        counters.iter_mut().for_each(Counter::check);
        check_against_containerd(&behind.connect().0, ours);
        for daemon in [behind, alone] {
            check_disk(daemon, attach);
        }
    };
    scope(|scope| {
        let _end = EndOnPanic(storm);
        for client in &direct {
            scope.spawn(|| storm.run_client(|| client.lock().unwrap().step()));
        }
        for client in &pullers {
            scope.spawn(|| storm.run_client(|| client.lock().unwrap().step()));
        }
        scope.spawn(|| storm.run_killer(alone, Random::new(seed, 20), 1000, kills));
        scope.spawn(|| storm.run_killer(behind, Random::new(seed, 21), 2000, kills));
        let mut next = KILLS_BETWEEN_CHECKS;
        while !storm.is_over() && storm.kills.load(Ordering::SeqCst) < kills {
            sleep(Duration::from_millis(20));
            if storm.kills.load(Ordering::SeqCst) >= next {
                compare(&mut counters);
                next += KILLS_BETWEEN_CHECKS;
            }
        }
        storm.end();
    });
    compare(&mut counters);

    // Everything can be removed, and nothing is left afterwards.
    for (counter, image) in counters.into_iter().zip(&long) {
        counter.end(ours, image);
    }
    for client in &pullers {
        client.lock().unwrap().remove_all();
    }
    for client in &direct {
        client.lock().unwrap().remove_all();
    }
    check_against_containerd(&behind.connect().0, ours);
    for daemon in [behind, alone] {
        eventually("nothing is left", || {
            collect(ours);
            daemon.connect().0.cleanup().unwrap();
            daemon.connect().0.list(&[]).unwrap().is_empty() && names(&daemon.snapshots).is_empty()
        });
        assert_eq!(mounts_below(daemon.snapshots.parent().unwrap()), Vec::<PathBuf>::new());
        let log = daemon.log();
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("\"level\":\"error\"")).collect();
        assert_eq!(errors, Vec::<&str>::new());
    }
    assert_eq!(complaints(&ours.log()), Vec::<&str>::new());
    let count = |counter: &std::sync::atomic::AtomicUsize| counter.load(Ordering::SeqCst);
    scene::report::print(format_args!(
        "{} kills, {} calls acknowledged, {} by containerd, {} answers lost, {} comparisons, {:.0} s",
        count(&storm.kills),
        count(&storm.acknowledged),
        count(&storm.done),
        count(&storm.lost),
        count(&storm.compared),
        begun.elapsed().as_secs_f64()
    ));
    assert!(count(&storm.acknowledged) > 5 * kills, "too little happened");
}

/// The layers that `scene::snapshotter_fixture::digest` names.
fn publish_direct_layers(repository: &Repository) {
    for n in 1..=3 {
        let top = repository.layer_dir(&digest(n)).join("layerfs");
        fs::create_dir_all(top.join("dir")).unwrap();
        fs::write(top.join(format!("dir/file-{n}")), n.to_string()).unwrap();
        fs::write(top.join(".cvmfscatalog"), "").unwrap();
    }
    repository.commit();
}

/// Makes containerd collect garbage in the snapshotter. It does so once after it removed something there, and leaves what
/// it could not remove because the snapshotter was down to the next time.
fn collect(ours: &Containerd) {
    let snapshots = ours.snapshots();
    // containerd waits for a moment after a kill before it connects again.
    if snapshots.prepare("something", "", &[("containerd.io/gc.root", "storm")]).is_ok() {
        snapshots.remove("something").unwrap();
    }
    ours.collect_garbage();
}

/// Checks that containerd and the snapshotter know the same snapshots. containerd puts its namespace and a number before
/// its keys, and the names of remote snapshots are ours; all names end in the key.
fn check_against_containerd(client: &Client, ours: &Containerd) {
    let sorted = |infos: Vec<Info>, key: fn(&str) -> &str| {
        let mut all: Vec<_> = infos.iter().map(|i| (key(&i.name).to_owned(), i.kind.value())).collect();
        all.sort();
        all
    };
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        collect(ours);
        let theirs = ours.snapshots().list(&[]).map(|all| sorted(all, |name| name));
        let own = sorted(client.list(&[]).unwrap(), |name| name.splitn(3, '/').nth(2).unwrap_or(name));
        if theirs.as_ref().is_ok_and(|theirs| *theirs == own) {
            return;
        }
        assert!(Instant::now() < until, "containerd knows {theirs:?}\nthe snapshotter {own:?}");
        sleep(Duration::from_millis(200));
    }
}

/// Checks that the disk and the mount table hold exactly what the records need: local snapshots, and the layers below
/// active snapshots and views.
fn check_disk(daemon: &Daemon, attach: &str) {
    let client = daemon.connect().0;
    let all = client.list(&[]).unwrap();
    let is_local = |info: &&Info| !info.labels.contains_key("containerd.io/snapshot/remote");
    let in_use = all.iter().filter(|info| info.kind.enum_value() != Ok(Kind::COMMITTED));
    let mounts: Vec<_> = in_use.flat_map(|info| client.mounts(&info.name).unwrap()).collect();
    let lower: Vec<&str> =
        mounts.iter().flat_map(|m| &m.options).filter_map(|option| option.strip_prefix("lowerdir=")).collect();
    let named = lower.iter().flat_map(|lower| lower.split(':')).chain(mounts.iter().map(|m| m.source.as_str()));
    let attached: BTreeSet<PathBuf> = named.map(PathBuf::from).filter(|dir| dir.is_symlink()).collect();
    eventually("the directories are those that something needs", || {
        client.cleanup().unwrap();
        names(&daemon.snapshots).len() == all.iter().filter(is_local).count() + attached.len()
    });
    let mounted: BTreeSet<PathBuf> = mounts_below(daemon.snapshots.parent().unwrap()).into_iter().collect();
    let led_to = || attached.iter().map(|dir| dir.canonicalize().unwrap()).collect();
    assert_eq!(mounted, if attach == "bind" { led_to() } else { BTreeSet::new() });
    // A killed commit may leave its new record, which the next commit of that snapshot overwrites.
    let half_made = |dir: &Path| {
        names(dir).into_iter().any(|name| {
            Path::new(&name).extension().is_some_and(|extension| extension == "new") && name != "record.new"
        })
    };
    for name in names(&daemon.snapshots) {
        assert!(!half_made(&daemon.snapshots.join(&name)), "snapshot {name} holds something half made");
    }
}
