//! `make bench`: how long it takes to look through large layers, and what a container start on
//! forty layers costs in both ways of attaching. Compared within one run on one machine.

use std::fs;
use std::path::Path;
use std::time::Instant;

use scene::alone::{digest, fill};
use scene::client::Client;
use scene::process::eventually;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use scene::snapshotter::Snapshotter;

/// Entries of a directory; so one directory in a hundred entries.
const NAMES: usize = 99;
/// One directory in so many has a deletion in it.
const MARKED: usize = 50;
const LAYERS: u8 = 40;
const STARTS: usize = 60;

fn main() {
    let begun = Instant::now();
    let say = |text: &str| eprintln!("[{:5.1} s] {text}", begun.elapsed().as_secs_f64());
    let sandbox = Sandbox::enter("bench");

    println!(
        "{:34} {:>10} {:>10} {:>10} {:>12}",
        "looking through a layer, seconds", "FUSE cold", "FUSE warm", "local", "memory, MB"
    );
    for entries in [300_000, 1_000_000] {
        say(&format!("making a layer of {entries} entries"));
        let repository = Repository::mounted(&sandbox.path(&format!("cvmfs-{entries}")));
        make_layer(&repository, entries);
        say("publishing it");
        repository.commit();
        repository.mount_cold();
        let mut memory = 0;
        let mut scan = |name: &str, top: &Path| {
            say(&format!("looking through {entries} entries, {name}"));
            let home = sandbox.path(&format!("s-{entries}-{name}"));
            let mut snapshotter = Snapshotter::start(&home, top, "repository-timeout = 600\nrootfs = \"layers\"");
            let chain = pull(&snapshotter.client(), 2);
            let begun = Instant::now();
            snapshotter.client().prepare("container", &chain, &[]).expect("a container starts");
            let seconds = begun.elapsed().as_secs_f64();
            memory = memory.max(peak_memory(&mut snapshotter));
            seconds
        };
        let (cold, warm) = (scan("cold", repository.dir()), scan("warm", repository.dir()));
        let local = scan("local", repository.tree());
        println!("{entries:>26} entries {cold:>10.2} {warm:>10.2} {local:>10.2} {memory:>12}");
    }

    println!("\n{:34} {:>10} {:>10}", "a start on 40 layers, milliseconds", "bind", "symlink");
    let repository = Repository::mounted(&sandbox.path("cvmfs-layers"));
    for n in 1..=LAYERS {
        let top = repository.layer_dir(&digest(n)).join("layerfs/dir");
        fs::create_dir_all(&top).expect("a layer can be made");
        fs::write(top.join(n.to_string()), "x").expect("a layer can be filled");
    }
    repository.commit();
    let [bind, symlink] = ["bind", "symlink"].map(|attach| {
        say(&format!("starting on {LAYERS} layers, {attach}"));
        let config = format!("attach = \"{attach}\"\nrootfs = \"layers\"");
        let snapshotter = Snapshotter::start(&sandbox.path(attach), repository.dir(), &config);
        let client = snapshotter.client();
        let chain = pull(&client, LAYERS);
        // What is done ahead is done.
        eventually("the layers were looked through", || {
            client.prepare("ahead", &chain, &[]).is_ok() && client.remove("ahead").is_ok() && client.cleanup().is_ok()
        });
        let first = median(
            |n| prepare(&client, &chain, n),
            |n| {
                client.remove(&n.to_string()).expect("it is there");
                client.cleanup().expect("a cleanup succeeds");
            },
        );
        client.prepare("holds", &chain, &[]).expect("a container starts");
        let later = median(|n| prepare(&client, &chain, n), |n| client.remove(&n.to_string()).expect("it is there"));
        (first, later)
    });
    println!("{:34} {:>10.1} {:>10.1}", "the first container, median", bind.0, symlink.0);
    println!("{:34} {:>10.1} {:>10.1}", "further containers, median", bind.1, symlink.1);
    say("done");
}

fn make_layer(repository: &Repository, entries: usize) {
    fs::create_dir_all(repository.layer_dir(&digest(1)).join("layerfs/etc")).expect("a layer can be made");
    let top = repository.layer_dir(&digest(2)).join("layerfs");
    fs::create_dir_all(&top).expect("a layer can be made");
    let directories = entries / (NAMES + 1);
    fill(&top, directories, NAMES);
    for n in (0..directories).step_by(MARKED) {
        fs::write(top.join(format!("{n}/.wh.gone")), "").expect("a layer can be marked");
    }
}

/// A chain of so many layers.
fn pull(client: &Client, layers: u8) -> String {
    (1..=layers).fold(String::new(), |parent, n| {
        client.pull_remote(&format!("extract-{n}"), &parent, &format!("sha256:c{n}"), &digest(n))
    })
}

fn prepare(client: &Client, chain: &str, n: usize) {
    client.prepare(&n.to_string(), chain, &[]).expect("a container starts");
}

/// Milliseconds.
fn median(timed: impl Fn(usize), untimed: impl Fn(usize)) -> f64 {
    let mut times: Vec<f64> = (0..STARTS)
        .map(|n| {
            let begun = Instant::now();
            timed(n);
            let milliseconds = begun.elapsed().as_secs_f64() * 1e3;
            untimed(n);
            milliseconds
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[STARTS / 2]
}

/// The most memory that the daemon had, in megabytes.
fn peak_memory(snapshotter: &mut Snapshotter) -> u64 {
    let status = format!("/proc/{}/status", snapshotter.server().pid());
    let status = fs::read_to_string(status).expect("a process has a status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the peak is known");
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).expect("a number") / 1000
}
