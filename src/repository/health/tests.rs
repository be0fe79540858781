use super::*;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

const FINE: u8 = 0;
const DEAD: u8 = 1;
const HANGING: u8 = 2;

struct FakeRepository {
    health: Health,
    mount: Arc<FakeMount>,
    threads: ThreadBudget,
}

#[derive(Default)]
struct FakeMount {
    state: AtomicU8,
    probes: AtomicUsize,
    device: AtomicU64,
}

impl MountProbe for FakeMount {
    fn probe(&self) -> Result<(), String> {
        self.probes.fetch_add(1, Ordering::SeqCst);
        // A probe that hangs is not ended by another mount in the place of the old one.
        let hangs = self.state.load(Ordering::SeqCst) == HANGING;
        while hangs && self.state.load(Ordering::SeqCst) != DEAD {
            thread::sleep(Duration::from_millis(5));
        }
        if self.state.load(Ordering::SeqCst) == FINE { Ok(()) } else { Err("it is dead".to_owned()) }
    }

    fn device(&self) -> Option<u64> {
        Some(self.device.load(Ordering::SeqCst))
    }
}

fn fake_repository(timeout: Duration) -> FakeRepository {
    let (mount, threads) = (Arc::<FakeMount>::default(), ThreadBudget::new(0, 8));
    let health = Health::new("r", timeout, &threads, Arc::<FakeMount>::clone(&mount));
    FakeRepository { health, mount, threads }
}

/// The result of a call when a probe has had time to run: on a busy machine, one call may not wait long enough.
fn settled(p: &FakeRepository) -> Result<(), Outage> {
    (0..20).map(|_| p.health.check()).find(Result::is_ok).unwrap_or_else(|| p.health.check())
}

#[test]
fn calls_to_dead_repository_fail_fast_until_a_probe_succeeds() {
    let p = fake_repository(Duration::from_secs(10));
    assert_eq!(p.health.check(), Ok(()));
    p.mount.state.store(DEAD, Ordering::SeqCst);
    p.health.mark_down("first".to_owned());
    let until = Instant::now() + Duration::from_secs(10);
    while p.health.check().map_err(|outage| outage.why) != Err("it is dead".to_owned()) {
        assert!(Instant::now() < until, "callers are told the error of the last probe");
    }
    p.mount.state.store(FINE, Ordering::SeqCst);
    assert_eq!(settled(&p), Ok(()), "a call after it came back succeeds");
    assert_eq!(p.health.outage(), None);
}

#[test]
fn outage_of_less_than_a_second_is_not_reported_as_none() {
    // The outage begins in the future, so that a slow machine does not make it longer.
    let outage = Outage { since: Instant::now() + Duration::from_hours(1), why: "it is dead".to_owned() };
    assert_eq!(outage.to_string(), "it has not answered for less than 1 s: it is dead");
    for (milliseconds, text) in [(0, "less than 1 s"), (999, "less than 1 s"), (1_000, "1 s"), (61_500, "61 s")] {
        assert_eq!(Seconds(Duration::from_millis(milliseconds)).to_string(), text);
    }
}

#[test]
fn outage_that_was_a_mistake_fails_no_call() {
    let p = fake_repository(Duration::from_secs(10));
    p.health.mark_down("slow".to_owned());
    assert_eq!(settled(&p), Ok(()));
}

#[test]
fn probe_that_hangs_in_an_old_mount_is_not_the_last_one() {
    let p = fake_repository(Duration::from_millis(300));
    p.mount.state.store(HANGING, Ordering::SeqCst);
    p.health.mark_down("hangs".to_owned());
    assert!(p.health.check().is_err());
    let begun = Instant::now();
    for _ in 0..50 {
        assert!(p.health.check().is_err());
    }
    assert!(begun.elapsed() < 25 * RECOVERY_WAIT, "a probe that hangs is waited for once");
    thread::sleep(Duration::from_millis(400));
    assert_eq!(p.mount.probes.load(Ordering::SeqCst), 1);
    // The old mount goes on hanging, another one is in its place.
    p.mount.state.store(FINE, Ordering::SeqCst);
    let until = Instant::now() + Duration::from_secs(10);
    while p.health.check().is_err() {
        assert!(Instant::now() < until, "it was never probed again");
    }
    p.mount.state.store(DEAD, Ordering::SeqCst);
}

/// A probe that succeeded in the mount in its place declared the old one healthy, with all that hung in it.
#[test]
fn mount_whose_probe_is_answered_by_another_mount_is_replaced() {
    let p = fake_repository(Duration::from_secs(10));
    p.mount.device.store(1, Ordering::SeqCst);
    p.health.record_device();
    p.mount.state.store(DEAD, Ordering::SeqCst);
    // The next mount is there before anybody has noticed the outage.
    p.mount.device.store(2, Ordering::SeqCst);
    p.health.mark_down("no answer".to_owned());
    p.mount.state.store(FINE, Ordering::SeqCst);
    let until = Instant::now() + Duration::from_secs(10);
    while !p.health.is_waiting_pointless() || p.threads.used() > 0 {
        let _ = p.health.check();
        assert!(Instant::now() < until, "its end was not noticed");
    }
    assert!(p.health.is_replaced() && p.health.outage().is_some() && p.health.check().is_err());
    // A caller that still waits for it starts no probe and reports no outage.
    let probes = p.mount.probes.load(Ordering::SeqCst);
    p.health.mark_down("no answer".to_owned());
    assert_eq!((p.threads.used(), p.mount.probes.load(Ordering::SeqCst)), (0, probes));
}

#[test]
fn probes_that_hang_in_replaced_mounts_are_counted_together() {
    let p = fake_repository(Duration::from_millis(50));
    p.mount.state.store(HANGING, Ordering::SeqCst);
    let generations: Vec<_> = (0..3)
        .map(|_| Health::new("r", Duration::from_millis(50), &p.threads, Arc::<FakeMount>::clone(&p.mount)))
        .collect();
    let until = Instant::now() + Duration::from_secs(10);
    while p.threads.used() < 8 {
        for health in &generations {
            health.mark_down("hangs".to_owned());
        }
        assert!(Instant::now() < until, "too few probes were started");
    }
    thread::sleep(Duration::from_millis(100));
    for health in &generations {
        health.mark_down("hangs".to_owned());
    }
    assert_eq!(p.threads.used(), 8);
    p.mount.state.store(DEAD, Ordering::SeqCst);
    generations.iter().for_each(Health::close);
}
