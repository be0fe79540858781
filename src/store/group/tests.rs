#![allow(clippy::unwrap_used)]

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::*;
use crate::model::SnapshotId;
use crate::store::testing::{FaultyDisk, PowerLoss};
use crate::testing::{Effect, Fault, Kind as StepKind, Steps};

const NEIGHBOURS: u64 = 8;

/// What the body of a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    Writes,
    /// Changes something and returns an error.
    Fails,
    Panics,
    /// Writes more pages than the cache holds.
    WritesMuch,
}

/// The result of a write.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    BodyFailed,
    StoreFailed,
    Panicked,
}

#[derive(Debug)]
enum Cause {
    Body,
    Store(Error),
}

impl From<Error> for Cause {
    fn from(cause: Error) -> Self {
        Self::Store(cause)
    }
}

fn open(disk: &FaultyDisk, steps: &Arc<Steps>) -> Store {
    disk.count(steps);
    Store::open(&disk.metadata(), None).unwrap()
}

fn write(store: &Store, id: u64, behaviour: Behaviour) -> Outcome {
    let result = catch_unwind(AssertUnwindSafe(|| {
        store.write(|tx| {
            let ids: Vec<_> = match behaviour {
                Behaviour::WritesMuch => (0..2000).map(|n| SnapshotId(1000 + n)).chain([SnapshotId(id)]).collect(),
                _ => vec![SnapshotId(id)],
            };
            tx.schedule_cleanup(&ids)?;
            match behaviour {
                Behaviour::Writes | Behaviour::WritesMuch => Ok(()),
                Behaviour::Fails => Err(Cause::Body),
                Behaviour::Panics => panic!("on purpose"),
            }
        })
    }));
    match result {
        Ok(Ok(())) => Outcome::Done,
        Ok(Err(Cause::Body)) => Outcome::BodyFailed,
        Ok(Err(Cause::Store(cause))) => {
            // The error is that of the disk, not that of the savepoint which is gone as a consequence. SQLite reports a
            // page that cannot be read as damage.
            assert!(cause.errno().is_some() || matches!(cause, Error::Damaged { .. }), "{cause}");
            Outcome::StoreFailed
        }
        Err(_) => Outcome::Panicked,
    }
}

fn is_scheduled(store: &Store, id: u64) -> bool {
    store.read(|tx| tx.is_scheduled(SnapshotId(id))).unwrap()
}

/// Runs one write, lets the others wait for its lock, arms the steps, and lets all continue. Returns the outcomes in the
/// order of the ids.
fn write_together(store: &Store, steps: &Steps, behaviours: &[Behaviour]) -> Vec<Outcome> {
    let (resume, resumed) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    thread::scope(|scope| {
        let resumed = Mutex::new(resumed);
        let first = scope.spawn(move || {
            let result = store.write(|tx| {
                tx.schedule_cleanup(&[SnapshotId(0)])?;
                let _ = begun.send(());
                // This returns when the sender is dropped.
                let _ = resumed.lock().recv();
                Ok::<_, Cause>(())
            });
            if result.is_ok() { Outcome::Done } else { Outcome::StoreFailed }
        });
        has_begun.recv().unwrap();
        let others: Vec<_> =
            (1..).zip(behaviours).map(|(id, behaviour)| scope.spawn(move || write(store, id, *behaviour))).collect();
        while store.writer.waiting.load(Ordering::SeqCst) < others.len() {
            thread::sleep(Duration::from_millis(1));
        }
        steps.arm();
        drop(resume);
        [first].into_iter().chain(others).map(|write| write.join().unwrap()).collect()
    })
}

/// The writes that wait for the first. The write with id 4 may behave differently.
fn neighbours(fourth: Option<Behaviour>) -> Vec<Behaviour> {
    let mut behaviours = vec![Behaviour::Writes; usize::try_from(NEIGHBOURS).unwrap()];
    if let Some(fourth) = fourth {
        behaviours[3] = fourth;
    }
    behaviours
}

#[test]
fn root_writes_that_wait_together_need_one_sync() {
    let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::None)));
    let store = open(&disk, &steps);
    // The first write of a process starts the log from its beginning, which needs another sync.
    assert_eq!(write(&store, 99, Behaviour::Writes), Outcome::Done);
    let outcomes = write_together(&store, &steps, &neighbours(None));
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done), "{outcomes:?}");
    assert_eq!(steps.recorded().iter().filter(|step| step.call == "sync").count(), 1);
    assert!((0..=NEIGHBOURS).all(|id| is_scheduled(&store, id)));
}

#[test]
fn root_failing_write_does_not_fail_other_writes_of_its_group() {
    for (behaviour, special) in [(Behaviour::Fails, Outcome::BodyFailed), (Behaviour::Panics, Outcome::Panicked)] {
        let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::None)));
        let store = open(&disk, &steps);
        let outcomes = write_together(&store, &steps, &neighbours(Some(behaviour)));
        for (id, outcome) in (0..).zip(&outcomes) {
            assert_eq!(outcome, if id == 4 { &special } else { &Outcome::Done }, "{behaviour:?}: {id}");
            assert_eq!(is_scheduled(&store, id), id != 4, "{behaviour:?}: {id}");
        }
    }
}

/// Each step of a commit fails once. All its writes get an error, and what can be read afterwards stays true after a crash:
/// no failed write comes back.
#[test]
fn root_failed_commit_fails_all_its_writes_and_is_undone() {
    let mut failed = 0;
    for behaviour in [Behaviour::Writes, Behaviour::WritesMuch] {
        for (at, errno) in (0..).flat_map(|at| [Errno::ENOSPC, Errno::EDQUOT, Errno::EIO].map(|errno| (at, errno))) {
            let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Fails(at, errno))));
            let store = open(&disk, &steps);
            // With a small cache SQLite writes pages before the commit, so the fault hits the body of a large write.
            let small = "PRAGMA cache_size = 8";
            store.writer.open.lock().as_ref().unwrap().connection.execute_batch(small).unwrap();
            let outcomes = write_together(&store, &steps, &neighbours(Some(behaviour)));
            if steps.recorded().len() <= at {
                assert!(at > 3);
                break;
            }
            failed += outcomes.iter().filter(|outcome| **outcome == Outcome::StoreFailed).count();
            let afterwards: Vec<bool> = (0..)
                .zip(&outcomes)
                .map(|(id, _)| store.read_durable(|tx| tx.is_scheduled(SnapshotId(id))).unwrap())
                .collect();
            for (id, outcome) in outcomes.iter().enumerate() {
                assert_eq!(afterwards[id], *outcome == Outcome::Done, "step {at}, {errno}: {id} was {outcome:?}");
            }
            let crashed = [PowerLoss::Written, PowerLoss::Synced(at as u64)].map(|loss| disk.after(loss));
            for disk in crashed {
                let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
                for (id, before) in (0..).zip(&afterwards) {
                    assert_eq!(is_scheduled(&after, id), *before, "step {at}, {errno}: {id} changed in a crash");
                }
            }
        }
    }
    assert!(failed > 10, "{failed} writes failed");
}

/// A page that a write needs cannot be read. This write and those in its transaction fail, and the others succeed.
#[test]
fn root_failed_read_in_a_transaction_fails_its_writes_and_is_undone() {
    let mut failed = 0;
    for at in 0.. {
        let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Fails(at, Errno::EIO))));
        let old = open(&disk, &Arc::new(Steps::with(Fault::None)));
        assert_eq!(write(&old, 999, Behaviour::WritesMuch), Outcome::Done);
        drop(old);
        disk.without_cache();
        let store = open(&disk, &steps);
        let small = "PRAGMA cache_size = 8";
        store.writer.open.lock().as_ref().unwrap().connection.execute_batch(small).unwrap();
        let outcomes = write_together(&store, &steps, &neighbours(Some(Behaviour::WritesMuch)));
        let recorded = steps.recorded();
        if recorded.len() <= at {
            break;
        }
        if recorded[at].call != "read" {
            continue;
        }
        failed += outcomes.iter().filter(|outcome| **outcome == Outcome::StoreFailed).count();
        drop(store);
        for loss in [PowerLoss::Written, PowerLoss::Synced(at as u64)] {
            let disk = disk.after(loss);
            let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
            for (id, outcome) in (0..).zip(&outcomes) {
                assert_eq!(
                    is_scheduled(&after, id),
                    *outcome == Outcome::Done,
                    "step {at}, {loss:?}: {id} was {outcome:?}"
                );
            }
        }
    }
    assert!(failed > 3, "{failed} writes failed");
}

/// The machine dies at each step of a commit of many writes and of the commits that follow.
#[test]
fn root_write_is_acknowledged_only_when_it_is_durable() {
    let mut acknowledged = 0;
    for effect in [Effect::Nothing, Effect::Half] {
        for at in 0.. {
            let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Dies(at, effect))));
            let store = open(&disk, &steps);
            let mut outcomes = write_together(&store, &steps, &neighbours(None));
            outcomes.extend((outcomes.len() as u64..).map(|id| write(&store, id, Behaviour::Writes)).take(3));
            if steps.recorded().len() <= at {
                assert!(at > 3);
                break;
            }
            drop(store);
            for seed in 0..8 {
                let disk = disk.after(PowerLoss::Synced(seed));
                let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
                for (id, outcome) in (0..).zip(&outcomes) {
                    assert!(*outcome != Outcome::Done || is_scheduled(&after, id), "step {at}: {id} is gone");
                }
            }
            acknowledged += outcomes.iter().filter(|outcome| **outcome == Outcome::Done).count();
        }
    }
    assert!(acknowledged > 10, "{acknowledged} writes were acknowledged before the end");
}

/// The log is written into the file many times, and the machine dies at the steps of that.
#[test]
fn root_acknowledged_writes_survive_a_death_during_a_checkpoint() {
    const WRITES: u64 = 40;
    let mut died = 0;
    for at in (0..).step_by(3) {
        let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Dies(at, Effect::Half))));
        let store = open(&disk, &steps);
        let often = "PRAGMA wal_autocheckpoint = 8";
        store.writer.open.lock().as_ref().unwrap().connection.execute_batch(often).unwrap();
        steps.arm();
        let outcomes: Vec<Outcome> = (0..WRITES).map(|id| write(&store, id, Behaviour::Writes)).collect();
        if steps.recorded().len() <= at {
            break;
        }
        died += 1;
        drop(store);
        for loss in [PowerLoss::Written, PowerLoss::Synced(at as u64)] {
            let disk = disk.after(loss);
            let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
            for (id, outcome) in (0..).zip(&outcomes) {
                assert!(*outcome != Outcome::Done || is_scheduled(&after, id), "step {at}, {loss:?}: {id} is gone");
            }
        }
    }
    assert!(died > 30, "{died} deaths");
}

/// An error must not depend on changes of another write that are not on disk.
#[test]
fn root_error_caused_by_another_write_waits_until_that_is_durable() {
    let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::None)));
    let store = open(&disk, &steps);
    let (resume, resumed) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    thread::scope(|scope| {
        let resumed = Mutex::new(resumed);
        let first = scope.spawn({
            let store = &store;
            move || {
                let _ = catch_unwind(AssertUnwindSafe(|| {
                    store.write(|tx| {
                        tx.schedule_cleanup(&[SnapshotId(1)])?;
                        let _ = begun.send(());
                        let _ = resumed.lock().recv();
                        Ok::<_, Cause>(())
                    })
                }));
            }
        });
        has_begun.recv().unwrap();
        let second =
            scope.spawn(|| store.write(|tx| if tx.is_scheduled(SnapshotId(1))? { Err(Cause::Body) } else { Ok(()) }));
        while store.writer.waiting.load(Ordering::SeqCst) < 1 {
            thread::sleep(Duration::from_millis(1));
        }
        steps.arm();
        drop(resume);
        let refused = second.join().unwrap();
        assert!(matches!(refused, Err(Cause::Body)));
        assert!(steps.recorded().iter().any(|step| step.call == "sync" && step.kind == StepKind::Change));
        first.join().unwrap();
    });
}

/// The write left its transaction to the next one, which never came, and got no result.
#[test]
fn write_that_runs_when_the_store_is_closed_is_committed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("metadata.sqlite"), None).unwrap();
    let (begun, has_begun) = mpsc::channel();
    thread::scope(|scope| {
        let store = &store;
        let first = scope.spawn(move || {
            store.write(|tx| {
                begun.send(()).unwrap();
                while store.writer.waiting.load(Ordering::SeqCst) == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                tx.schedule_cleanup(&[SnapshotId(1)])
            })
        });
        has_begun.recv().unwrap();
        store.close_for_good();
        first.join().unwrap().unwrap();
    });
    let path = store.path.clone();
    drop(store);
    assert!(is_scheduled(&Store::open(&path, None).unwrap(), 1));
}
