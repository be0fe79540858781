//! Part `scan`: one scan of a large layer by our daemon.

use std::fs;
use std::path::Path;

use scene::client::Client;
use scene::publisher::Repository;
use scene::sandbox::Sandbox;
use scene::snapshotter_fixture::{create_wide_tree, digest};

use crate::Say;
use crate::contestant::{Contestant, OURS};
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, float, seconds};

const ENTRIES: [usize; 2] = [300_000, 1_000_000];
/// Entries of a directory; so one directory in a hundred entries.
const NAMES: usize = 99;
/// One in this many directories has a deletion in it.
const MARKED: usize = 50;

pub fn run(sandbox: &Sandbox, _: &Settings, say: &Say) -> Group {
    let columns = ["FUSE cold", "FUSE warm", "local"];
    let mut group = Group::new("Looking through a layer of so many entries, cvmfs-snapshotter", &columns);
    for entries in ENTRIES {
        say.that(&format!("making a layer of {entries} entries"));
        let repository = Repository::mounted(&sandbox.path(&format!("scan-cvmfs-{entries}")));
        make_layer(&repository, entries);
        say.that("publishing it");
        repository.commit();
        repository.mount_cold();
        for (n, column) in columns.into_iter().enumerate() {
            say.that(&format!("looking through {entries} entries, {column}"));
            let home = sandbox.path(&format!("scan-{entries}-{n}"));
            let top = if column == "local" { repository.tree() } else { repository.dir() };
            let (took, memory) = scan(&home, top);
            group.put(&format!("{entries} entries"), Unit::Seconds, column, Cell::one(took));
            group.put(&format!("{entries} entries: most memory"), Unit::Megabytes, column, Cell::one(memory));
        }
    }
    group
}

fn scan(home: &Path, repository: &Path) -> (f64, f64) {
    let contestant = Contestant::ours(OURS, home, repository, "repository-timeout = 600");
    let client = contestant.client();
    let chain = pull(&client);
    let (took, result) = seconds(|| client.prepare("container", &chain, &[]));
    result.expect("a container starts");
    let peak = contestant.usage().expect("it is ours").peak;
    (took, float(peak * 1024))
}

fn pull(client: &Client) -> String {
    (1..=2).fold(String::new(), |parent, n| {
        client.pull_remote(&format!("extract-{n}"), &parent, &format!("sha256:c{n}"), &digest(n))
    })
}

fn make_layer(repository: &Repository, entries: usize) {
    fs::create_dir_all(repository.layer_dir(&digest(1)).join("layerfs/etc")).expect("a layer can be made");
    let top = repository.layer_dir(&digest(2)).join("layerfs");
    fs::create_dir_all(&top).expect("a layer can be made");
    let directories = entries / (NAMES + 1);
    create_wide_tree(&top, directories, NAMES);
    for n in (0..directories).step_by(MARKED) {
        fs::write(top.join(format!("{n}/.wh.gone")), "").expect("a layer can be marked");
    }
}
