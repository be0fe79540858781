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

/// What a write of a test does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    Writes,
    /// It changes something, and is refused then.
    Refuses,
    Panics,
    /// It writes more than fits into what the file has.
    WritesMuch,
}

/// What a write said, by its id.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused,
    Failed,
    Panicked,
}

#[derive(Debug)]
enum Cause {
    Refused,
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

fn write(store: &Store, id: u64, manner: Behaviour) -> Outcome {
    let result = catch_unwind(AssertUnwindSafe(|| {
        store.write(|tx| {
            let ids: Vec<_> = match manner {
                Behaviour::WritesMuch => (0..2000).map(|n| SnapshotId(1000 + n)).chain([SnapshotId(id)]).collect(),
                _ => vec![SnapshotId(id)],
            };
            tx.schedule_cleanup(&ids)?;
            match manner {
                Behaviour::Writes | Behaviour::WritesMuch => Ok(()),
                Behaviour::Refuses => Err(Cause::Refused),
                Behaviour::Panics => panic!("on purpose"),
            }
        })
    }));
    match result {
        Ok(Ok(())) => Outcome::Done,
        Ok(Err(Cause::Refused)) => Outcome::Refused,
        Ok(Err(Cause::Store(cause))) => {
            // The error names what the disk answered, not that the savepoint is gone in consequence. That a page cannot
            // be read SQLite calls damage.
            assert!(cause.errno().is_some() || matches!(cause, Error::Damaged { .. }), "{cause}");
            Outcome::Failed
        }
        Err(_) => Outcome::Panicked,
    }
}

fn is_there(store: &Store, id: u64) -> bool {
    store.read(|tx| tx.is_scheduled(SnapshotId(id))).unwrap()
}

/// While one write has its turn, the others come to wait; then all go on. `armed` says from
/// where on steps count. The result is what each one was told, the first one's first.
fn together(store: &Store, steps: &Steps, manners: &[Behaviour]) -> Vec<Outcome> {
    let (go, waits) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    thread::scope(|scope| {
        let waits = Mutex::new(waits);
        let first = scope.spawn(move || {
            let said = store.write(|tx| {
                tx.schedule_cleanup(&[SnapshotId(0)])?;
                let _ = begun.send(());
                // Only the first time: the sender is gone then.
                let _ = waits.lock().recv();
                Ok::<_, Cause>(())
            });
            if said.is_ok() { Outcome::Done } else { Outcome::Failed }
        });
        has_begun.recv().unwrap();
        let others: Vec<_> =
            (1..).zip(manners).map(|(id, manner)| scope.spawn(move || write(store, id, *manner))).collect();
        while store.writer.waiting.load(Ordering::SeqCst) < others.len() {
            thread::sleep(Duration::from_millis(1));
        }
        steps.arm();
        drop(go);
        [first].into_iter().chain(others).map(|write| write.join().unwrap()).collect()
    })
}

fn neighbours(odd: Option<Behaviour>) -> Vec<Behaviour> {
    let mut manners = vec![Behaviour::Writes; usize::try_from(NEIGHBOURS).unwrap()];
    if let Some(odd) = odd {
        manners[3] = odd;
    }
    manners
}

#[test]
fn root_writes_that_wait_together_take_one_sync() {
    let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::None)));
    let store = open(&disk, &steps);
    // The first write of a process begins the log anew, which is synced once more.
    assert_eq!(write(&store, 99, Behaviour::Writes), Outcome::Done);
    let said = together(&store, &steps, &neighbours(None));
    assert!(said.iter().all(|said| *said == Outcome::Done), "{said:?}");
    assert_eq!(steps.recorded().iter().filter(|step| step.call == "sync").count(), 1);
    assert!((0..=NEIGHBOURS).all(|id| is_there(&store, id)));
}

#[test]
fn root_a_write_that_fails_leaves_the_others_in_its_transaction() {
    for (manner, outcome) in [(Behaviour::Refuses, Outcome::Refused), (Behaviour::Panics, Outcome::Panicked)] {
        let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::None)));
        let store = open(&disk, &steps);
        let said = together(&store, &steps, &neighbours(Some(manner)));
        for (id, said) in (0..).zip(&said) {
            assert_eq!(said, if id == 4 { &outcome } else { &Outcome::Done }, "{manner:?}: {id}");
            assert_eq!(is_there(&store, id), id != 4, "{manner:?}: {id}");
        }
    }
}

/// Each step of a commit fails once. All who took part are told, and what can be read afterwards stays true whatever
/// a crash leaves: nothing that was told to have failed comes back.
#[test]
fn root_a_commit_that_fails_is_told_to_all_and_taken_back() {
    let mut failed = 0;
    for manner in [Behaviour::Writes, Behaviour::WritesMuch] {
        for (at, errno) in (0..).flat_map(|at| [Errno::ENOSPC, Errno::EDQUOT, Errno::EIO].map(|errno| (at, errno))) {
            let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Fails(at, errno))));
            let store = open(&disk, &steps);
            // With a small cache SQLite writes pages before the commit, so the fault hits the body of a large write.
            let small = "PRAGMA cache_size = 8";
            store.writer.open.lock().as_ref().unwrap().connection.execute_batch(small).unwrap();
            let said = together(&store, &steps, &neighbours(Some(manner)));
            if steps.recorded().len() <= at {
                assert!(at > 3);
                break;
            }
            failed += said.iter().filter(|said| **said == Outcome::Failed).count();
            let afterwards: Vec<bool> = (0..)
                .zip(&said)
                .map(|(id, _)| store.read_durable(|tx| tx.is_scheduled(SnapshotId(id))).unwrap())
                .collect();
            for (id, said) in said.iter().enumerate() {
                assert_eq!(afterwards[id], *said == Outcome::Done, "step {at}, {errno}: {id} was {said:?}");
            }
            let crashed = [PowerLoss::Written, PowerLoss::Synced(at as u64)].map(|left| disk.after(left));
            for disk in crashed {
                let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
                for (id, before) in (0..).zip(&afterwards) {
                    assert_eq!(is_there(&after, id), *before, "step {at}, {errno}: {id} changed in a crash");
                }
            }
        }
    }
    assert!(failed > 10, "{failed} writes failed");
}

/// A page that a write needs cannot be read. The write and those in one transaction with it are told so, and the others
/// go on.
#[test]
fn root_a_read_that_fails_within_a_transaction_is_told_and_taken_back() {
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
        let said = together(&store, &steps, &neighbours(Some(Behaviour::WritesMuch)));
        let recorded = steps.recorded();
        if recorded.len() <= at {
            break;
        }
        if recorded[at].call != "read" {
            continue;
        }
        failed += said.iter().filter(|said| **said == Outcome::Failed).count();
        drop(store);
        for left in [PowerLoss::Written, PowerLoss::Synced(at as u64)] {
            let disk = disk.after(left);
            let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
            for (id, said) in (0..).zip(&said) {
                assert_eq!(is_there(&after, id), *said == Outcome::Done, "step {at}, {left:?}: {id} was {said:?}");
            }
        }
    }
    assert!(failed > 3, "{failed} writes failed");
}

/// The machine dies at each step of a commit for many, and of those for one that follow.
#[test]
fn root_nothing_is_acknowledged_before_it_is_durable() {
    let mut acknowledged = 0;
    for effect in [Effect::Nothing, Effect::Half] {
        for at in 0.. {
            let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Dies(at, effect))));
            let store = open(&disk, &steps);
            let mut said = together(&store, &steps, &neighbours(None));
            said.extend((said.len() as u64..).map(|id| write(&store, id, Behaviour::Writes)).take(3));
            if steps.recorded().len() <= at {
                assert!(at > 3);
                break;
            }
            drop(store);
            for seed in 0..8 {
                let disk = disk.after(PowerLoss::Synced(seed));
                let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
                for (id, said) in (0..).zip(&said) {
                    assert!(*said != Outcome::Done || is_there(&after, id), "step {at}: {id} is gone");
                }
            }
            acknowledged += said.iter().filter(|said| **said == Outcome::Done).count();
        }
    }
    assert!(acknowledged > 10, "{acknowledged} writes were acknowledged before the end");
}

/// The log is written into the file again and again, and the machine dies at each step of that.
#[test]
fn root_what_was_acknowledged_stays_while_the_log_is_written_into_the_file() {
    const WRITES: u64 = 40;
    let mut died = 0;
    for at in (0..).step_by(3) {
        let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::Dies(at, Effect::Half))));
        let store = open(&disk, &steps);
        let often = "PRAGMA wal_autocheckpoint = 8";
        store.writer.open.lock().as_ref().unwrap().connection.execute_batch(often).unwrap();
        steps.arm();
        let said: Vec<Outcome> = (0..WRITES).map(|id| write(&store, id, Behaviour::Writes)).collect();
        if steps.recorded().len() <= at {
            break;
        }
        died += 1;
        drop(store);
        for left in [PowerLoss::Written, PowerLoss::Synced(at as u64)] {
            let disk = disk.after(left);
            let after = open(&disk, &Arc::new(Steps::with(Fault::None)));
            for (id, said) in (0..).zip(&said) {
                assert!(*said != Outcome::Done || is_there(&after, id), "step {at}, {left:?}: {id} is gone");
            }
        }
    }
    assert!(died > 30, "{died} deaths");
}

/// What it is told is true of what is on disk, not of what a neighbour was about to do.
#[test]
fn root_a_refusal_for_what_a_neighbour_wrote_waits_for_that_to_be_durable() {
    let (disk, steps) = (FaultyDisk::default(), Arc::new(Steps::with(Fault::None)));
    let store = open(&disk, &steps);
    let (go, waits) = mpsc::channel::<()>();
    let (begun, has_begun) = mpsc::channel();
    thread::scope(|scope| {
        let waits = Mutex::new(waits);
        let first = scope.spawn({
            let store = &store;
            move || {
                let _ = catch_unwind(AssertUnwindSafe(|| {
                    store.write(|tx| {
                        tx.schedule_cleanup(&[SnapshotId(1)])?;
                        let _ = begun.send(());
                        let _ = waits.lock().recv();
                        Ok::<_, Cause>(())
                    })
                }));
            }
        });
        has_begun.recv().unwrap();
        let second = scope
            .spawn(|| store.write(|tx| if tx.is_scheduled(SnapshotId(1))? { Err(Cause::Refused) } else { Ok(()) }));
        while store.writer.waiting.load(Ordering::SeqCst) < 1 {
            thread::sleep(Duration::from_millis(1));
        }
        steps.arm();
        drop(go);
        let refused = second.join().unwrap();
        assert!(matches!(refused, Err(Cause::Refused)));
        assert!(steps.recorded().iter().any(|step| step.call == "sync" && step.kind == StepKind::Change));
        first.join().unwrap();
    });
}

/// The write had left its transaction to whoever came next, and was never answered.
#[test]
fn write_that_waits_when_the_store_is_closed_is_committed() {
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
    assert!(is_there(&Store::open(&path, None).unwrap(), 1));
}
