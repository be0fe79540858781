//! The crash table of docs/design.md: every operation is stopped at each of its steps, by an error or by the death of the
//! process, and then a new process must find the promises kept.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use super::fixture::{Fixture, digest, key, list_all, pull, pull_request, request};
use crate::model::AttachMode;
use crate::model::{Kind, Labels, Snapshot, SnapshotId};
use crate::sidecar::Sidecar;
use crate::snapshotter::cleanup::needs_directory;
use crate::snapshotter::{Error, Result, Snapshotter};
use crate::store::Store;
use crate::store::testing::{FaultyDisk, PowerLoss};
use crate::system::testing::FaultySys;
use crate::system::{Host, Sys, Unmount};
use crate::testing::{Effect, Fault, Kind as StepKind, Step, Steps};

/// The snapshots of the image's two layers.
const BOTTOM: &str = "cvmfs/0/sha256:chain-1";
const TOP: &str = "cvmfs/1/sha256:chain-2";

const ERRNOS: [Errno; 8] = [
    Errno::ENOSPC,
    Errno::EDQUOT,
    Errno::EIO,
    Errno::EACCES,
    Errno::ENOENT,
    Errno::EBUSY,
    Errno::EMFILE,
    Errno::ENOTCONN,
];

/// An operation that is stopped at each of its steps.
struct Operation {
    name: &'static str,
    modes: &'static [AttachMode],
    /// Prepares the state in which the operation begins.
    set_up: fn(&World, &Snapshotter),
    run: fn(&Snapshotter) -> Result<()>,
    /// Whether the operation has happened, as far as can be seen afterwards.
    has_happened: fn(&Snapshotter) -> bool,
    /// The snapshots that the operation makes, changes or removes.
    touches: &'static [&'static str],
}

const BOTH_MODES: &[AttachMode] = &[AttachMode::Symlink, AttachMode::Bind];
const ONE_MODE: &[AttachMode] = &[AttachMode::Symlink];

fn exists(s: &Snapshotter, name: &str) -> bool {
    s.stat(&key(name)).is_ok()
}

/// Containers were removed, but neither their files nor the layers below them.
fn remove_containers(_: &World, s: &Snapshotter) {
    for name in ["a", "b"] {
        s.prepare(request(name, TOP, &[])).unwrap();
        s.remove(&key(name)).unwrap();
    }
}

const PREPARE: Operation = Operation {
    name: "prepare",
    modes: BOTH_MODES,
    set_up: |_, _| {},
    run: |s| s.prepare(request("new", TOP, &[])).map(drop),
    has_happened: |s| exists(s, "new"),
    touches: &["new"],
};

const VIEW: Operation = Operation {
    name: "view",
    modes: BOTH_MODES,
    set_up: |_, _| {},
    run: |s| s.view(request("new", TOP, &[])).map(drop),
    has_happened: |s| exists(s, "new"),
    touches: &["new"],
};

const REMOTE_PREPARE: Operation = Operation {
    name: "remote prepare",
    modes: ONE_MODE,
    set_up: |_, s| {
        s.remove(&key(TOP)).unwrap();
        s.cleanup(&|| false).unwrap();
    },
    run: |s| match s.prepare(pull_request(2, BOTTOM)) {
        Err(Error::RemoteCommitted { .. }) => Ok(()),
        // The layer would be downloaded, which does no harm.
        Ok(_) => s.remove(&key("extract")).and(Err(Error::DeadlineExceeded)),
        Err(e) => Err(e),
    },
    has_happened: |s| exists(s, TOP),
    touches: &[TOP, "extract"],
};

const COMMIT: Operation = Operation {
    name: "commit",
    modes: ONE_MODE,
    set_up: |world, s| {
        s.prepare(request("active", "base", &[])).unwrap();
        world.fill(s, "active");
    },
    run: |s| s.commit(&key("committed"), &key("active"), Labels::new(), None),
    has_happened: |s| exists(s, "committed"),
    touches: &["active", "committed"],
};

const REMOVE: Operation = Operation {
    name: "remove",
    modes: ONE_MODE,
    set_up: |_, s| drop(s.prepare(request("victim", TOP, &[])).unwrap()),
    run: |s| s.remove(&key("victim")),
    has_happened: |s| !exists(s, "victim"),
    touches: &["victim"],
};

const CLEANUP: Operation = Operation {
    name: "cleanup",
    modes: ONE_MODE,
    set_up: |world, s| {
        for name in ["a", "b"] {
            s.prepare(request(name, "base", &[])).unwrap();
            world.fill(s, name);
            s.remove(&key(name)).unwrap();
        }
    },
    run: |s| s.cleanup(&|| false).map(drop),
    has_happened: |_| true,
    touches: &[],
};

const DETACH: Operation = Operation {
    name: "detach",
    modes: BOTH_MODES,
    set_up: remove_containers,
    run: |s| s.cleanup(&|| false).map(drop),
    has_happened: |_| true,
    touches: &[],
};

const ATTACH: Operation = Operation {
    name: "attach",
    modes: BOTH_MODES,
    set_up: |world, s| {
        s.prepare(request("new", TOP, &[])).unwrap();
        world.lose_attachments();
    },
    run: |s| s.mounts(&key("new")).map(drop),
    has_happened: |_| true,
    touches: &[],
};

const SCAN: Operation = Operation {
    name: "scan",
    modes: BOTH_MODES,
    set_up: |_, s| {
        // The upper layer is not scanned yet.
        s.store.write(|tx| tx.forget_scans_but(&digest(1))).unwrap();
    },
    run: |s| s.view(request("new", TOP, &[])).map(drop),
    has_happened: |s| exists(s, "new"),
    touches: &["new"],
};

const START: Operation = Operation {
    name: "start",
    modes: BOTH_MODES,
    set_up: |world, s| {
        remove_containers(world, s);
        // A Prepare and a cleanup were interrupted.
        let id = s.store.reserve_id().unwrap();
        let unfinished = Snapshot { id, key: key("unfinished"), ..s.stat(&key("running")).unwrap() };
        s.make_directories(&unfinished, None).unwrap();
        s.store
            .write(|tx| tx.mark_cleanup_started(SnapshotId(0)..=SnapshotId(u64::MAX), 1).map_err(Error::from))
            .unwrap();
    },
    run: |s| s.recover().and_then(|_| s.cleanup(&|| false)).map(drop),
    has_happened: |_| true,
    touches: &[],
};

/// A state root with an image, a local layer, and a container on the local layer; and the disk of the metadata.
struct World {
    fixture: Fixture,
    disk: FaultyDisk,
}

impl World {
    fn new(operation: &Operation, mode: AttachMode) -> Self {
        let fixture = Fixture::new(mode);
        let world = Self { fixture, disk: FaultyDisk::default() };
        {
            let s = world.open(&world.disk, &Arc::new(Steps::with(Fault::None))).unwrap();
            let bottom = pull(&s, 1, "");
            assert_eq!(bottom, BOTTOM);
            assert_eq!(pull(&s, 2, &bottom), TOP);
            // All layers are scanned, so that only the operation's own steps are counted.
            drop(s.view(request("scan", TOP, &[])).unwrap());
            s.remove(&key("scan")).unwrap();
            s.cleanup(&|| false).unwrap();
            s.prepare(request("unpack", "", &[])).unwrap();
            world.fill(&s, "unpack");
            s.commit(&key("base"), &key("unpack"), Labels::new(), None).unwrap();
            s.prepare(request("running", "base", &[])).unwrap();
            world.fill(&s, "running");
        }
        // A new process is started, so that no prefetch of a pull runs beside the operation.
        let s = world.open(&world.disk, &Arc::new(Steps::with(Fault::None))).unwrap();
        (operation.set_up)(&world, &s);
        drop(s);
        world
    }

    fn open(&self, disk: &FaultyDisk, steps: &Arc<Steps>) -> crate::store::Result<Snapshotter> {
        disk.count(steps);
        let store = Store::open(&disk.metadata(), None)?;
        Ok(self.fixture.open_with_store(store, Arc::new(FaultySys::with(Arc::clone(steps)))))
    }

    fn fs(&self, s: &Snapshotter, name: &str) -> PathBuf {
        self.fixture.snapshot_dir(s.stat(&key(name)).unwrap().id).join("fs")
    }

    fn fill(&self, s: &Snapshotter, name: &str) {
        let fs = self.fs(s, name);
        fs::create_dir_all(fs.join("dir")).unwrap();
        fs::write(fs.join("dir/file"), "content").unwrap();
    }

    /// Unmounts everything, as a restart of the machine does. With links, leaves the directories at which a Go snapshotter
    /// had bound the layers.
    fn lose_attachments(&self) {
        for point in Host.mounts_below(self.fixture.dir.path()).unwrap() {
            Host.unmount(&point, Unmount::Plain).unwrap();
        }
        for entry in fs::read_dir(self.fixture.snapshots()).unwrap() {
            let link = entry.unwrap().path().join("fs");
            let target = fs::read_link(&link);
            if target.is_ok_and(|target| target.is_absolute()) {
                fs::remove_file(&link).unwrap();
                fs::create_dir(&link).unwrap();
            }
        }
    }
}

fn records(s: &Snapshotter) -> BTreeMap<String, Snapshot> {
    list_all(s).into_iter().map(|one| (one.key.as_str().to_owned(), one)).collect()
}

/// How the operation ended, as far as its caller knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Acknowledged,
    Refused,
    Unknown,
}

/// Tries one case: the operation meets the fault, and a new process finds what is left. Returns the steps that were taken.
fn try_case(operation: &Operation, mode: AttachMode, fault: Fault, power_loss: PowerLoss) -> Vec<Step> {
    let case = format!("{}, {mode:?}, {fault:?}, {power_loss:?}", operation.name);
    let world = World::new(operation, mode);
    let untouched = |s: &Snapshotter| {
        let mut all = records(s);
        all.retain(|name, _| !operation.touches.contains(&name.as_str()));
        all
    };
    let steps = Arc::new(Steps::with(fault));
    let (before, outcome, taken) = {
        let s = world.open(&world.disk, &steps).unwrap();
        let before = untouched(&s);
        steps.arm();
        let outcome = match ((operation.run)(&s), fault) {
            (_, Fault::Dies(..)) => Outcome::Unknown,
            (Ok(()), _) => Outcome::Acknowledged,
            (Err(_), _) => Outcome::Refused,
        };
        // The steps are read here, because closing the metadata may write once more.
        (before, outcome, steps.recorded())
    };
    check_changes(&world, &steps.changes(), &case);
    let disk = world.disk.after(power_loss);
    let s = world.open(&disk, &Arc::new(Steps::with(Fault::None)));
    let s = s.unwrap_or_else(|e| panic!("{case}: after {:?}: {e}", taken.last()));
    assert_eq!(s.recover().unwrap().broken, [], "{case}");
    s.cleanup(&|| false).unwrap();
    assert_eq!(untouched(&s), before, "{case}: other snapshots");
    for name in ["base", "running"] {
        assert_eq!(fs::read_to_string(world.fs(&s, name).join("dir/file")).unwrap(), "content", "{case}");
    }
    let happened = (operation.has_happened)(&s);
    // Nobody can say whether a failed write to the metadata reached the disk.
    let is_certain = !matches!(fault, Fault::Fails(at, _) if taken.get(at).is_some_and(is_metadata));
    match outcome {
        Outcome::Acknowledged => assert!(happened, "{case}: the acknowledged operation is lost"),
        Outcome::Refused if is_certain && operation.name != "cleanup" && !operation.touches.is_empty() => {
            assert!(!happened, "{case}: the refused operation has happened");
        }
        Outcome::Refused | Outcome::Unknown => {}
    }
    check_disk(&world, &s, &case);
    let again = (operation.run)(&s);
    let is_done = matches!(again, Err(Error::AlreadyExists(_) | Error::NotFound(_)));
    assert!(again.is_ok() || (happened && is_done), "{case}: again: {}", again.unwrap_err());
    if exists(&s, "new") {
        let mounts = s.mounts(&key("new")).unwrap();
        world.fixture.check_files(&mounts);
    }
    world.fixture.remove_all(&s);
    taken
}

fn is_metadata(step: &Step) -> bool {
    step.path == Path::new("metadata")
}

/// Only the contents of numbered directories may change, and above all nothing in a repository.
fn check_changes(world: &World, changes: &[Step], case: &str) {
    for step in changes.iter().filter(|step| !is_metadata(step)) {
        let below = step.path.strip_prefix(world.fixture.snapshots()).unwrap_or_else(|_| panic!("{case}: {step:?}"));
        let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
        assert!(SnapshotId::from_directory_name(first).is_some(), "{case}: {step:?}");
    }
}

/// Every directory must be needed by a snapshot, and every snapshot must have the directory that it needs.
fn check_disk(world: &World, s: &Snapshotter, case: &str) {
    let on_disk = world.fixture.on_disk();
    for snapshot in records(s).values() {
        let is_there = on_disk.contains(&snapshot.id.to_string());
        assert!(is_there || snapshot.layer.is_some(), "{case}: {} has no directory", snapshot.key);
        if snapshot.layer.is_none() {
            let sidecar = Sidecar::decode(&fs::read(s.paths.sidecar(snapshot.id)).unwrap()).unwrap();
            // The sidecar of an active snapshot may describe a commit that did not happen: containerd knows that.
            let recorded =
                if snapshot.kind == Kind::Committed { sidecar.committed.as_ref() } else { Some(&sidecar.prepared) };
            assert_eq!(recorded, Some(snapshot), "{case}: the sidecar would not make the row again");
        }
    }
    for name in on_disk {
        let id = SnapshotId::from_directory_name(&name).unwrap();
        let is_needed = s.store.read(|tx| needs_directory(tx, id)).unwrap();
        assert!(is_needed, "{case}: nobody needs directory {name}");
    }
}

/// Tries all faults at all steps, and prints how many there were.
fn try_all_cases(operation: &Operation) {
    let mut cases = 0;
    let mut lengths = Vec::new();
    for (n, &mode) in operation.modes.iter().enumerate() {
        let mut length = 0;
        for at in 0.. {
            let mut faults: Vec<(Fault, PowerLoss)> = Vec::new();
            let seed = u64::try_from(at).unwrap();
            for (number, errno) in ERRNOS.into_iter().enumerate() {
                // The first mode meets every error at every step, the others one after the other.
                if n == 0 || number == at % ERRNOS.len() {
                    faults.push((Fault::Fails(at, errno), PowerLoss::Written));
                }
            }
            faults.push((Fault::Dies(at, Effect::Half), PowerLoss::Written));
            if n == 0 {
                faults.push((Fault::Dies(at, Effect::Nothing), PowerLoss::Synced(seed)));
            }
            let mut is_beyond_end = true;
            for (fault, power_loss) in faults {
                is_beyond_end &= try_case(operation, mode, fault, power_loss).len() <= at;
                cases += 1;
            }
            if is_beyond_end {
                break;
            }
            length = at + 1;
        }
        lengths.push(length);
    }
    // This is not captured, because every run should show how much was tried.
    let line = format!("crash table: {:<15} {lengths:?} steps, {cases} cases", operation.name);
    let _ = writeln!(std::io::stderr(), "{line}");
    assert!(cases >= 30, "the operation has hardly any steps");
}

/// The changes of an operation in order, as docs/design.md names them: `layer` and `id` stand for numbers, consecutive steps
/// of the metadata are one transaction, and steps that differ only in the entry of a skeleton are named once.
fn named_steps(operation: &Operation, mode: AttachMode) -> Vec<String> {
    let mut steps: Vec<String> = Vec::new();
    for step in
        try_case(operation, mode, Fault::None, PowerLoss::Written).iter().filter(|step| step.kind == StepKind::Change)
    {
        let name = if is_metadata(step) {
            "transaction".to_owned()
        } else {
            let path: Vec<&str> = step.path.iter().filter_map(|part| part.to_str()).collect();
            let below = path.iter().position(|part| *part == "snapshots").unwrap() + 1;
            // The steps of the other layer are the same.
            if path[below] == "1" {
                continue;
            }
            let owner = if path[below] == "2" { "layer" } else { "id" };
            let entry = path.get(below + 1).map_or(String::new(), |part| format!("/{part}"));
            let within = if path.len() > below + 2 { "/…" } else { "" };
            format!("{} {owner}{entry}{within}", step.call)
        };
        let is_new = if name == "transaction" { steps.last() != Some(&name) } else { !steps.contains(&name) };
        if is_new {
            steps.push(name);
        }
    }
    steps
}

/// The steps of the tables in docs/design.md, by the heading above each table.
fn documented_steps() -> BTreeMap<String, Vec<String>> {
    let mut documented: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut heading = "";
    for line in include_str!("../../../docs/design.md").lines() {
        if let Some(title) = line.strip_prefix('#') {
            heading = title.trim_start_matches(['#', ' ']);
        } else if let Some((step, _)) = line.strip_prefix("| `").and_then(|row| row.split_once('`')) {
            documented.entry(heading.to_owned()).or_default().push(step.to_owned());
        }
    }
    documented
}

#[test]
fn root_the_crash_table_of_the_design_names_every_step_in_order() {
    let documented = documented_steps();
    for (heading, operation, mode) in [
        ("Prepare", &PREPARE, AttachMode::Symlink),
        ("Prepare of a published layer", &REMOTE_PREPARE, AttachMode::Symlink),
        ("View", &VIEW, AttachMode::Symlink),
        ("Commit", &COMMIT, AttachMode::Symlink),
        ("Remove", &REMOVE, AttachMode::Symlink),
        ("Cleanup", &CLEANUP, AttachMode::Symlink),
        ("Attach, as a bind mount", &ATTACH, AttachMode::Bind),
        ("Detach", &DETACH, AttachMode::Bind),
        ("Scan", &SCAN, AttachMode::Symlink),
        ("Start", &START, AttachMode::Symlink),
    ] {
        let steps = named_steps(operation, mode);
        let rows: Vec<String> = steps.iter().map(|step| format!("| `{step}` |")).collect();
        assert_eq!(documented.get(heading), Some(&steps), "docs/design.md, {heading}:\n{}", rows.join("\n"));
    }
}

macro_rules! crash_tests {
    ($($test:ident $operation:ident;)*) => { $(#[test] fn $test() { try_all_cases(&$operation); })* };
}

crash_tests! {
    root_prepare_stopped_at_any_step_keeps_the_promises PREPARE;
    root_view_stopped_at_any_step_keeps_the_promises VIEW;
    root_pull_stopped_at_any_step_keeps_the_promises REMOTE_PREPARE;
    root_commit_stopped_at_any_step_keeps_the_promises COMMIT;
    root_remove_stopped_at_any_step_keeps_the_promises REMOVE;
    root_cleanup_stopped_at_any_step_keeps_the_promises CLEANUP;
    root_detach_stopped_at_any_step_keeps_the_promises DETACH;
    root_attach_stopped_at_any_step_keeps_the_promises ATTACH;
    root_scan_stopped_at_any_step_keeps_the_promises SCAN;
    root_start_stopped_at_any_step_keeps_the_promises START;
}
