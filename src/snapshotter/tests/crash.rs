//! The crash table of docs/design.md, walked: every operation is stopped at each of its steps,
//! by an error or by death, and then a new process must find the promises kept.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::super::*;
use super::{Fixture, check_files, key, list_all, pull, remove_all, wanted};
use crate::sidecar::Sidecar;
use crate::store::testing::{FaultyDisk, PowerLoss};
use crate::system::Host;
use crate::system::testing::FaultySys;
use crate::testing::{Effect, Fault, Kind as StepKind, Step, Steps};

/// The first layer of the image, and the whole of it.
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

/// A row of the table.
struct Operation {
    name: &'static str,
    modes: &'static [AttachMode],
    /// Brings the world into the state that the operation begins with.
    before: fn(&World, &Snapshotter),
    run: fn(&Snapshotter) -> Result<()>,
    /// Whether it has happened, as far as can be seen afterwards.
    has_happened: fn(&Snapshotter) -> bool,
    /// Snapshots that it makes, changes or removes.
    touches: &'static [&'static str],
}

const BOTH: &[AttachMode] = &[AttachMode::Symlink, AttachMode::Bind];
const ONE: &[AttachMode] = &[AttachMode::Symlink];

fn exists(s: &Snapshotter, name: &str) -> bool {
    s.stat(&key(name)).is_ok()
}

/// A container that ran, and what it stood on, are gone, but not their files.
fn removed_containers(_: &World, s: &Snapshotter) {
    for name in ["a", "b"] {
        s.prepare(wanted(name, TOP, &[])).unwrap();
        s.remove(&key(name)).unwrap();
    }
}

const PREPARE: Operation = Operation {
    name: "prepare",
    modes: BOTH,
    before: |_, _| {},
    run: |s| s.prepare(wanted("new", TOP, &[])).map(drop),
    has_happened: |s| exists(s, "new"),
    touches: &["new"],
};

const VIEW: Operation = Operation {
    name: "view",
    modes: BOTH,
    before: |_, _| {},
    run: |s| s.view(wanted("new", TOP, &[])).map(drop),
    has_happened: |s| exists(s, "new"),
    touches: &["new"],
};

const REMOTE_PREPARE: Operation = Operation {
    name: "remote prepare",
    modes: ONE,
    before: |_, s| {
        s.remove(&key(TOP)).unwrap();
        s.cleanup(&|| false).unwrap();
    },
    run: |s| match s.prepare(super::tests::asked(2, BOTTOM)) {
        Err(Error::RemoteCommitted { .. }) => Ok(()),
        // It would be downloaded instead, which is no harm.
        Ok(_) => s.remove(&key("extract")).and(Err(Error::Cancelled)),
        Err(e) => Err(e),
    },
    has_happened: |s| exists(s, TOP),
    touches: &[TOP, "extract"],
};

const COMMIT: Operation = Operation {
    name: "commit",
    modes: ONE,
    before: |world, s| {
        s.prepare(wanted("active", "base", &[])).unwrap();
        world.fill(s, "active");
    },
    run: |s| s.commit(&key("committed"), &key("active"), Labels::new(), None),
    has_happened: |s| exists(s, "committed"),
    touches: &["active", "committed"],
};

const REMOVE: Operation = Operation {
    name: "remove",
    modes: ONE,
    before: |_, s| drop(s.prepare(wanted("victim", TOP, &[])).unwrap()),
    run: |s| s.remove(&key("victim")),
    has_happened: |s| !exists(s, "victim"),
    touches: &["victim"],
};

const CLEANUP: Operation = Operation {
    name: "cleanup",
    modes: ONE,
    before: |world, s| {
        for name in ["a", "b"] {
            s.prepare(wanted(name, "base", &[])).unwrap();
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
    modes: BOTH,
    before: removed_containers,
    run: |s| s.cleanup(&|| false).map(drop),
    has_happened: |_| true,
    touches: &[],
};

const ATTACH: Operation = Operation {
    name: "attach",
    modes: BOTH,
    before: |world, s| {
        s.prepare(wanted("new", TOP, &[])).unwrap();
        world.lose_attachments();
    },
    run: |s| s.mounts(&key("new")).map(drop),
    has_happened: |_| true,
    touches: &[],
};

const SCAN: Operation = Operation {
    name: "scan",
    modes: BOTH,
    before: |_, s| {
        // Of the uppermost layer and of the whole root.
        let bottom = super::tests::digest(1);
        s.store.write(|tx| tx.forget_scans_but(&bottom).map_err(Error::from)).unwrap();
    },
    run: |s| s.view(wanted("new", TOP, &[])).map(drop),
    has_happened: |s| exists(s, "new"),
    touches: &["new"],
};

const START: Operation = Operation {
    name: "start",
    modes: BOTH,
    before: |world, s| {
        removed_containers(world, s);
        // A snapshot was being made, and a cleanup was under way.
        let id = s.store.reserve_id().unwrap();
        let begun = Snapshot { id, key: key("begun"), ..s.stat(&key("running")).unwrap() };
        s.make_directories(&begun, None).unwrap();
        s.store
            .write(|tx| tx.mark_cleanup_started(SnapshotId(0)..=SnapshotId(u64::MAX), 1).map_err(Error::from))
            .unwrap();
    },
    run: |s| s.recover().and_then(|_| s.cleanup(&|| false)).map(drop),
    has_happened: |_| true,
    touches: &[],
};

/// A state root with an image, a local layer, and a container on each, and the disk that the
/// metadata is on.
struct World {
    place: Fixture,
    disk: FaultyDisk,
}

impl World {
    fn new(operation: &Operation, mode: AttachMode) -> Self {
        let place = Fixture::new(mode);
        let world = Self { place, disk: FaultyDisk::default() };
        {
            let s = world.open(&world.disk, &Arc::new(Steps::with(Fault::None))).unwrap();
            let bottom = pull(&s, 1, "");
            assert_eq!(bottom, BOTTOM);
            assert_eq!(pull(&s, 2, &bottom), TOP);
            // The scans are made, so that only the operation's own steps are counted.
            drop(s.view(wanted("scan", TOP, &[])).unwrap());
            s.remove(&key("scan")).unwrap();
            s.cleanup(&|| false).unwrap();
            s.prepare(wanted("unpack", "", &[])).unwrap();
            world.fill(&s, "unpack");
            s.commit(&key("base"), &key("unpack"), Labels::new(), None).unwrap();
            s.prepare(wanted("running", "base", &[])).unwrap();
            world.fill(&s, "running");
        }
        // Another process, so that nothing of what a pull does ahead happens beside it.
        let s = world.open(&world.disk, &Arc::new(Steps::with(Fault::None))).unwrap();
        (operation.before)(&world, &s);
        drop(s);
        world
    }

    fn open(&self, disk: &FaultyDisk, steps: &Arc<Steps>) -> crate::store::Result<Snapshotter> {
        disk.count(steps);
        let store = Store::open(&disk.metadata(), None)?;
        Ok(self.place.with_store(store, Arc::new(FaultySys::with(Arc::clone(steps)))))
    }

    fn fs(&self, s: &Snapshotter, name: &str) -> std::path::PathBuf {
        self.place.snapshots().join(s.stat(&key(name)).unwrap().id.to_string()).join("fs")
    }

    fn fill(&self, s: &Snapshotter, name: &str) {
        let fs = self.fs(s, name);
        fs::create_dir_all(fs.join("dir")).unwrap();
        fs::write(fs.join("dir/file"), "content").unwrap();
    }

    /// As a restart of the machine leaves them; and a Go snapshotter's, which had bound them at `fs`.
    fn lose_attachments(&self) {
        for point in Host.mounts_below(self.place.dir.path()).unwrap() {
            Host.unmount(&point, system::Unmount::Plain).unwrap();
        }
        for entry in fs::read_dir(self.place.snapshots()).unwrap() {
            let link = entry.unwrap().path().join("fs");
            let leads_to = fs::read_link(&link);
            if leads_to.is_ok_and(|target| target.is_absolute()) {
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
enum End {
    Acknowledged,
    Refused,
    Unknown,
}

/// One case: the operation meets the fault, and a new process finds what is left. The result is
/// the steps that were taken.
fn try_case(operation: &Operation, mode: AttachMode, fault: Fault, left: PowerLoss) -> Vec<Step> {
    let case = format!("{}, {mode:?}, {fault:?}, {left:?}", operation.name);
    let world = World::new(operation, mode);
    let untouched = |s: &Snapshotter| {
        let mut all = records(s);
        all.retain(|name, _| !operation.touches.contains(&name.as_str()));
        all
    };
    let steps = Arc::new(Steps::with(fault));
    let (before, end, taken) = {
        let s = world.open(&world.disk, &steps).unwrap();
        let before = untouched(&s);
        steps.arm();
        let end = match ((operation.run)(&s), fault) {
            (_, Fault::Dies(..)) => End::Unknown,
            (Ok(()), _) => End::Acknowledged,
            (Err(_), _) => End::Refused,
        };
        // The steps are read here, because closing the metadata may write once more.
        (before, end, steps.recorded())
    };
    check_changes(&world, &steps.changes(), &case);
    let disk = world.disk.after(left);
    let s = world.open(&disk, &Arc::new(Steps::with(Fault::None)));
    let s = s.unwrap_or_else(|e| panic!("{case}: after {:?}: {e}", taken.last()));
    assert_eq!(s.recover().unwrap().broken, [], "{case}");
    s.cleanup(&|| false).unwrap();
    assert_eq!(untouched(&s), before, "{case}: other snapshots");
    for name in ["base", "running"] {
        assert_eq!(fs::read_to_string(world.fs(&s, name).join("dir/file")).unwrap(), "content", "{case}");
    }
    let happened = (operation.has_happened)(&s);
    // Of a failed write to the metadata nobody can say whether it reached the disk.
    let is_certain = !matches!(fault, Fault::Fails(at, _) if taken.get(at).is_some_and(is_metadata));
    match end {
        End::Acknowledged => assert!(happened, "{case}: it was acknowledged and is lost"),
        End::Refused if is_certain && operation.name != "cleanup" && !operation.touches.is_empty() => {
            assert!(!happened, "{case}: it was refused and has happened");
        }
        End::Refused | End::Unknown => {}
    }
    check_disk(&world, &s, &case);
    let again = (operation.run)(&s);
    let is_done = matches!(again, Err(Error::AlreadyExists(_) | Error::NotFound(_)));
    assert!(again.is_ok() || (happened && is_done), "{case}: again: {}", again.unwrap_err());
    if exists(&s, "new") {
        let mounts = s.mounts(&key("new")).unwrap();
        check_files(&world.place, &mounts);
    }
    remove_all(&world.place, &s);
    taken
}

fn is_metadata(step: &Step) -> bool {
    step.path == Path::new("metadata")
}

/// Nothing is changed but below numbered directories, and above all nothing of a repository.
fn check_changes(world: &World, changes: &[Step], case: &str) {
    for step in changes.iter().filter(|step| !is_metadata(step)) {
        let within = step.path.strip_prefix(world.place.snapshots()).unwrap_or_else(|_| panic!("{case}: {step:?}"));
        let first = within.components().next().unwrap().as_os_str().to_str().unwrap();
        assert!(SnapshotId::from_directory_name(first).is_some(), "{case}: {step:?}");
    }
}

/// Every directory belongs to somebody, and whoever needs one has it.
fn check_disk(world: &World, s: &Snapshotter, case: &str) {
    let on_disk = world.place.on_disk();
    for snapshot in records(s).values() {
        let is_there = on_disk.contains(&snapshot.id.to_string());
        assert!(is_there || snapshot.layer.is_some(), "{case}: {} has no directory", snapshot.key);
        if snapshot.layer.is_none() {
            let beside = Sidecar::decode(&fs::read(s.paths.record(snapshot.id)).unwrap()).unwrap();
            // A commit that did not happen may be noted as well: then containerd knows.
            let noted =
                if snapshot.kind == Kind::Committed { beside.committed.as_ref() } else { Some(&beside.prepared) };
            assert_eq!(noted, Some(snapshot), "{case}: what lies beside would not make it again");
        }
    }
    for name in on_disk {
        let id = SnapshotId::from_directory_name(&name).unwrap();
        let is_needed = s.store.read(|tx| cleanup::needs_its_directory(tx, id)).unwrap();
        assert!(is_needed, "{case}: directory {name} is nobody's");
    }
}

/// All faults at all steps; says how many there were.
fn walk(operation: &Operation) {
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
            let mut is_over = true;
            for (fault, left) in faults {
                is_over &= try_case(operation, mode, fault, left).len() <= at;
                cases += 1;
            }
            if is_over {
                break;
            }
            length = at + 1;
        }
        lengths.push(length);
    }
    // Not captured: how much was tried belongs into every run's output.
    let line = format!("crash table: {:<15} {lengths:?} steps, {cases} cases", operation.name);
    let _ = writeln!(std::io::stderr(), "{line}");
    assert!(cases >= 30, "the operation has hardly a step");
}

/// The changes of an operation as docs/design.md names them, in order: `layer` and `id` stand
/// for numbers, a run of steps of the metadata is one transaction, and of steps that differ
/// only in the entry of a skeleton the first is named.
fn story(operation: &Operation, mode: AttachMode) -> Vec<String> {
    let mut story: Vec<String> = Vec::new();
    for step in
        try_case(operation, mode, Fault::None, PowerLoss::Written).iter().filter(|step| step.kind == StepKind::Change)
    {
        let named = if is_metadata(step) {
            "transaction".to_owned()
        } else {
            let path: Vec<&str> = step.path.iter().filter_map(|part| part.to_str()).collect();
            let below = path.iter().position(|part| *part == "snapshots").unwrap() + 1;
            // The other layer goes the same way beside it.
            if path[below] == "1" {
                continue;
            }
            let owner = if path[below] == "2" { "layer" } else { "id" };
            let place = path.get(below + 1).map_or(String::new(), |part| format!("/{part}"));
            let within = if path.len() > below + 2 { "/…" } else { "" };
            format!("{} {owner}{place}{within}", step.call)
        };
        let is_new = if named == "transaction" { story.last() != Some(&named) } else { !story.contains(&named) };
        if is_new {
            story.push(named);
        }
    }
    story
}

/// What the design says about operations: the heading of each, and the steps of its table.
fn told() -> BTreeMap<String, Vec<String>> {
    let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut heading = "";
    for line in include_str!("../../../docs/design.md").lines() {
        if let Some(title) = line.strip_prefix('#') {
            heading = title.trim_start_matches(['#', ' ']);
        } else if let Some((step, _)) = line.strip_prefix("| `").and_then(|row| row.split_once('`')) {
            told.entry(heading.to_owned()).or_default().push(step.to_owned());
        }
    }
    told
}

#[test]
fn root_the_crash_table_of_the_design_names_every_step_in_order() {
    let told = told();
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
        let steps = story(operation, mode);
        let rows: Vec<String> = steps.iter().map(|step| format!("| `{step}` |")).collect();
        assert_eq!(told.get(heading), Some(&steps), "docs/design.md, {heading}:\n{}", rows.join("\n"));
    }
}

macro_rules! walks {
    ($($test:ident $operation:ident;)*) => { $(#[test] fn $test() { walk(&$operation); })* };
}

walks! {
    root_a_prepare_may_stop_at_any_step PREPARE;
    root_a_view_may_stop_at_any_step VIEW;
    root_a_remote_prepare_may_stop_at_any_step REMOTE_PREPARE;
    root_a_commit_may_stop_at_any_step COMMIT;
    root_a_remove_may_stop_at_any_step REMOVE;
    root_a_cleanup_may_stop_at_any_step CLEANUP;
    root_a_detach_may_stop_at_any_step DETACH;
    root_an_attach_may_stop_at_any_step ATTACH;
    root_a_scan_may_stop_at_any_step SCAN;
    root_a_start_may_stop_at_any_step START;
}
