//! What all take part in: the daemons that are killed, the moments of rest in which everything
//! is compared, random numbers, and counts.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::Signal;
use scene::client::Client;
use scene::snapshotter::Snapshotter;

pub struct Storm {
    pub seed: u64,
    /// Everybody holds it for a step; who compares waits until nobody does.
    pub gate: RwLock<()>,
    over: AtomicBool,
    pub kills: AtomicUsize,
    /// Calls that were answered as they must be: by the snapshotter, and by containerd.
    pub acknowledged: AtomicUsize,
    pub done: AtomicUsize,
    /// Calls whose answer a kill took.
    pub lost: AtomicUsize,
    /// Records and files that were compared with what the test remembers.
    pub compared: AtomicUsize,
    /// Directories that were given to somebody.
    given: Mutex<HashSet<PathBuf>>,
}

impl Storm {
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            gate: RwLock::default(),
            over: AtomicBool::default(),
            kills: AtomicUsize::default(),
            acknowledged: AtomicUsize::default(),
            done: AtomicUsize::default(),
            lost: AtomicUsize::default(),
            compared: AtomicUsize::default(),
            given: Mutex::default(),
        }
    }

    /// Calls `step` until the storm is over, for whatever reason.
    pub fn go_on(&self, mut step: impl FnMut()) {
        let _end = EndOnPanic(self);
        while !self.is_over() {
            let Ok(turn) = self.gate.read() else { return };
            step();
            drop(turn);
            std::thread::yield_now();
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    /// Kills `daemon` at random moments until `limit` kills have been.
    pub fn kill_now_and_then(&self, daemon: &Daemon, mut random: Random, longest: usize, limit: usize) {
        let _end = EndOnPanic(self);
        while !self.is_over() {
            sleep(random.millis(20, longest));
            let Ok(_turn) = self.gate.read() else { return };
            if self.kills.load(Ordering::SeqCst) >= limit {
                return;
            }
            let kills = daemon.kill(&mut random);
            self.kills.fetch_add(kills, Ordering::SeqCst);
        }
    }

    /// An id is never used again, so nor is a directory.
    pub fn was_given(&self, dir: &std::path::Path) {
        assert!(self.given.lock().unwrap().insert(dir.to_owned()), "{} was given twice", dir.display());
    }

    pub fn count(counter: &AtomicUsize) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// So that a failure is not waited upon for ever.
pub struct EndOnPanic<'s>(pub &'s Storm);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end();
        }
    }
}

/// A snapshotter that is killed and started again by one thread while others call it.
pub struct Daemon<'s> {
    snapshotter: Mutex<&'s mut Snapshotter>,
    /// Counted up before a kill and after the start: odd while it is down.
    turns: AtomicUsize,
    socket: PathBuf,
    pub snapshots: PathBuf,
}

impl<'s> Daemon<'s> {
    pub fn new(snapshotter: &'s mut Snapshotter) -> Self {
        let (socket, snapshots) = (snapshotter.socket(), snapshotter.snapshots());
        Self { snapshotter: Mutex::new(snapshotter), turns: AtomicUsize::default(), socket, snapshots }
    }

    /// Now and then it is killed again while it starts. The result is how often it was killed.
    fn kill(&self, random: &mut Random) -> usize {
        let mut snapshotter = self.snapshotter.lock().unwrap();
        self.turns.fetch_add(1, Ordering::SeqCst);
        snapshotter.end(Signal::SIGKILL);
        let mut kills = 1;
        sleep(random.millis(0, 200));
        while random.below(4) == 0 {
            let mut starting = snapshotter.command().stderr(Stdio::null()).spawn().unwrap();
            sleep(random.millis(0, 40));
            starting.kill().unwrap();
            starting.wait().unwrap();
            kills += 1;
        }
        snapshotter.start_again();
        self.turns.fetch_add(1, Ordering::SeqCst);
        kills
    }

    pub fn turn(&self) -> usize {
        self.turns.load(Ordering::SeqCst)
    }

    /// A client, once it is up, and of which turn.
    pub fn connect(&self) -> (Client, usize) {
        loop {
            let turn = self.turn();
            if turn.is_multiple_of(2) {
                return (Client::connect(&self.socket), turn);
            }
            sleep(Duration::from_millis(5));
        }
    }

    pub fn log(&self) -> String {
        self.snapshotter.lock().unwrap().log()
    }
}

/// A small generator of numbers: the same seed and stream give the same ones.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(seed.wrapping_add(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    pub fn millis(&mut self, least: usize, most: usize) -> Duration {
        Duration::from_millis(u64::try_from(least + self.below(most - least)).unwrap())
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| u8::try_from(self.below(256)).unwrap()).collect()
    }

    pub fn one_of<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        if all.is_empty() { None } else { Some(all[self.below(all.len())].clone()) }
    }
}
