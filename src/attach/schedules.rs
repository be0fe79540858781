//! The slots of attached layers under explored schedules.
use super::*;
use crate::sync::explored::{Time, explore};
use crate::sync::{now, thread};
use crate::system::testing::FaultySys;

const ID: SnapshotId = SnapshotId(1);

/// Users pin and unpin the same layer while cleanups release it.
fn pins_and_releases(time: Time, schedules: usize) {
    explore(time, schedules, || {
        let dir = tempfile::tempdir().unwrap();
        let users = Arc::<AtomicUsize>::default();
        let seen = Arc::clone(&users);
        let sys = FaultySys::before_call(move |call, _| {
            assert!(call != "remove_tree" || seen.load(Ordering::SeqCst) == 0, "a layer in use is removed");
        });
        let paths = SnapshotPaths::new(dir.path().to_owned());
        let attacher = Arc::new(Attacher::new(paths, AttachMode::Symlink, Arc::new(sys)));
        let mut threads = Vec::new();
        for _ in 0..3 {
            let (attacher, users) = (Arc::clone(&attacher), Arc::clone(&users));
            threads.push(thread::spawn(move || {
                for _ in 0..2 {
                    let Some(pin) = attacher.pin(ID, now() + Duration::from_secs(1)) else { continue };
                    users.fetch_add(1, Ordering::SeqCst);
                    thread::yield_now();
                    users.fetch_sub(1, Ordering::SeqCst);
                    drop(pin);
                }
            }));
        }
        for _ in 0..2 {
            let (attacher, users) = (Arc::clone(&attacher), Arc::clone(&users));
            threads.push(thread::spawn(move || {
                let decide = || {
                    for _ in 0..3 {
                        assert_eq!(users.load(Ordering::SeqCst), 0, "a cleanup decides about a layer in use");
                        thread::yield_now();
                    }
                    Ok::<_, Error>(ReleaseDecision::Remove)
                };
                attacher.release(ID, &|| false, decide).unwrap();
            }));
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let pins: usize = attacher.slots.lock().values().map(|slot| slot.pins.load(Ordering::SeqCst)).sum();
        assert_eq!(pins, 0);
        let released = attacher.release(ID, &|| false, || Ok::<_, Error>(ReleaseDecision::Remove)).unwrap();
        assert_eq!((released, attacher.slots.lock().len()), (ReleaseOutcome::Done, 0));
    });
}

#[test]
fn pinned_layer_is_never_released() {
    pins_and_releases(Time::StandsStill, 1_000);
}

#[test]
fn pinned_layer_is_never_released_even_if_callers_give_up_waiting_for_the_slot() {
    pins_and_releases(Time::Passes, 1_000);
}
