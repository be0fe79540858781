#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::faults::{Effect, Fault, Kind as StepKind, Steps};
use crate::store::Lookup;
use crate::store::disk::{Disk, Left};
use crate::types::SnapshotId;

const NEIGHBOURS: u64 = 8;

/// What a write of a test does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Writes,
    /// It changes something, and is refused then.
    Refuses,
    Panics,
    /// It writes more than fits into what the file has.
    WritesMuch,
}

/// What a write said, by its id.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Done,
    Refused,
    Failed,
    Panicked,
}

#[derive(Debug)]
enum Why {
    Refused,
    Store,
}

impl From<Error> for Why {
    fn from(_: Error) -> Self {
        Self::Store
    }
}

fn open(disk: &Disk, steps: &Arc<Steps>) -> Store {
    // Beside it only the reserve would be made, and there is no such directory.
    Store::open_with(Path::new("/nonexistent/metadata.redb"), disk.opener(steps), |_| Ok(()), None).unwrap()
}

fn write(store: &Store, id: u64, manner: Manner) -> Said {
    let result = catch_unwind(AssertUnwindSafe(|| {
        store.write(|tx| {
            let ids: Vec<_> = match manner {
                Manner::WritesMuch => (0..2000).map(|n| SnapshotId(1000 + n)).chain([SnapshotId(id)]).collect(),
                _ => vec![SnapshotId(id)],
            };
            tx.schedule_cleanup(&ids)?;
            match manner {
                Manner::Writes | Manner::WritesMuch => Ok(()),
                Manner::Refuses => Err(Why::Refused),
                Manner::Panics => panic!("on purpose"),
            }
        })
    }));
    match result {
        Ok(Ok(())) => Said::Done,
        Ok(Err(Why::Refused)) => Said::Refused,
        Ok(Err(Why::Store)) => Said::Failed,
        Err(_) => Said::Panicked,
    }
}

fn is_there(store: &Store, id: u64) -> bool {
    store.read(|tx| tx.is_scheduled(SnapshotId(id))).unwrap()
}

/// While one write has its turn, the others come to wait; then all go on. `armed` says from
/// where on steps count. The result is what each one was told, the first one's first.
fn together(store: &Store, steps: &Steps, manners: &[Manner]) -> Vec<Said> {
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
                Ok::<_, Why>(())
            });
            if said.is_ok() { Said::Done } else { Said::Failed }
        });
        has_begun.recv().unwrap();
        let others: Vec<_> =
            (1..).zip(manners).map(|(id, manner)| scope.spawn(move || write(store, id, *manner))).collect();
        while store.turns.waiting.load(Ordering::SeqCst) < others.len() {
            thread::sleep(Duration::from_millis(1));
        }
        steps.arm();
        drop(go);
        [first].into_iter().chain(others).map(|write| write.join().unwrap()).collect()
    })
}

fn neighbours(odd: Option<Manner>) -> Vec<Manner> {
    let mut manners = vec![Manner::Writes; usize::try_from(NEIGHBOURS).unwrap()];
    if let Some(odd) = odd {
        manners[3] = odd;
    }
    manners
}

#[test]
fn writes_that_wait_together_take_one_sync() {
    let (disk, steps) = (Disk::default(), Arc::new(Steps::with(Fault::None)));
    let store = open(&disk, &steps);
    let said = together(&store, &steps, &neighbours(None));
    assert!(said.iter().all(|said| *said == Said::Done), "{said:?}");
    assert_eq!(steps.recorded().iter().filter(|step| step.call == "sync").count(), 1);
    assert!((0..=NEIGHBOURS).all(|id| is_there(&store, id)));
}

#[test]
fn one_that_fails_takes_no_neighbour_along() {
    for (manner, outcome) in [(Manner::Refuses, Said::Refused), (Manner::Panics, Said::Panicked)] {
        let (disk, steps) = (Disk::default(), Arc::new(Steps::with(Fault::None)));
        let store = open(&disk, &steps);
        let said = together(&store, &steps, &neighbours(Some(manner)));
        for (id, said) in (0..).zip(&said) {
            assert_eq!(said, if id == 4 { &outcome } else { &Said::Done }, "{manner:?}: {id}");
            assert_eq!(is_there(&store, id), id != 4, "{manner:?}: {id}");
        }
    }
}

/// Each step of the transaction fails once, as on a full disk. Whoever is told that it is done
/// finds it after a loss of power, and at most the one at whose step it was is told otherwise.
#[test]
fn a_commit_that_fails_once_costs_at_most_one_of_its_writes() {
    let mut failed = 0;
    for manner in [Manner::Writes, Manner::WritesMuch] {
        for at in 0.. {
            let fault = Fault::Fails(at, nix::errno::Errno::ENOSPC);
            let (disk, steps) = (Disk::default(), Arc::new(Steps::with(fault)));
            let store = open(&disk, &steps);
            let said = together(&store, &steps, &neighbours(Some(manner)));
            if steps.recorded().len() <= at {
                assert!(at > 3);
                break;
            }
            let errors = said.iter().filter(|said| **said != Said::Done).count();
            assert!(errors <= 1, "step {at}: {said:?}");
            failed += errors;
            drop(store);
            let after = open(&disk.after(Left::Synced(at as u64)), &Arc::new(Steps::with(Fault::None)));
            for (id, said) in (0..).zip(&said) {
                assert!(is_there(&after, id) || *said == Said::Failed, "step {at}: {id} was {said:?} and is gone");
            }
        }
    }
    println!("{failed} writes failed");
}

/// The machine dies at each step.
#[test]
fn nothing_is_acknowledged_before_it_is_durable() {
    let mut acknowledged = 0;
    for effect in [Effect::Nothing, Effect::Half] {
        for at in 0.. {
            let (disk, steps) = (Disk::default(), Arc::new(Steps::with(Fault::Dies(at, effect))));
            let store = open(&disk, &steps);
            let said = together(&store, &steps, &neighbours(None));
            if steps.recorded().len() <= at {
                assert!(at > 3);
                break;
            }
            drop(store);
            for seed in 0..8 {
                let after = open(&disk.after(Left::Synced(seed)), &Arc::new(Steps::with(Fault::None)));
                for (id, said) in (0..).zip(&said) {
                    assert!(*said != Said::Done || is_there(&after, id), "step {at}: {id} is gone");
                }
            }
            acknowledged += said.iter().filter(|said| **said == Said::Done).count();
        }
    }
    println!("{acknowledged} writes were acknowledged before the end");
}

/// What it is told is true of what is on disk, not of what a neighbour was about to do.
#[test]
fn a_refusal_for_what_a_neighbour_wrote_waits_for_that_to_be_durable() {
    let (disk, steps) = (Disk::default(), Arc::new(Steps::with(Fault::None)));
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
                        Ok::<_, Why>(())
                    })
                }));
            }
        });
        has_begun.recv().unwrap();
        let second =
            scope.spawn(|| store.write(|tx| if tx.is_scheduled(SnapshotId(1))? { Err(Why::Refused) } else { Ok(()) }));
        while store.turns.waiting.load(Ordering::SeqCst) < 1 {
            thread::sleep(Duration::from_millis(1));
        }
        steps.arm();
        drop(go);
        let refused = second.join().unwrap();
        assert!(matches!(refused, Err(Why::Refused)));
        assert!(steps.recorded().iter().any(|step| step.call == "sync" && step.kind == StepKind::Change));
        first.join().unwrap();
    });
}
