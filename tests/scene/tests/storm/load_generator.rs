//! The load during which daemons are killed: a gate that stops all clients while everything is compared, the killing,
//! and the counters.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::Signal;
use scene::client::Client;
use scene::random::Random;
use scene::snapshotter::Snapshotter;

pub struct Storm {
    pub seed: u64,
    /// Clients hold it for a step; a comparison waits until no client holds it.
    pub gate: RwLock<()>,
    over: AtomicBool,
    pub kills: AtomicUsize,
    /// Calls that the snapshotter answered.
    pub acknowledged: AtomicUsize,
    /// Operations that containerd completed.
    pub done: AtomicUsize,
    /// Calls whose answer was lost by a kill.
    pub lost: AtomicUsize,
    /// Records and files that were compared with the remembered state.
    pub compared: AtomicUsize,
    /// Directories that Prepare returned.
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

    /// Calls `step` until the storm is over.
    pub fn run_client(&self, mut step: impl FnMut()) {
        let _end = EndOnPanic(self);
        while !self.is_over() {
            let Ok(permit) = self.gate.read() else { return };
            step();
            drop(permit);
            std::thread::yield_now();
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    /// Kills `daemon` at random moments until there were `limit` kills.
    pub fn run_killer(&self, daemon: &Daemon, mut random: Random, longest: usize, limit: usize) {
        let _end = EndOnPanic(self);
        while !self.is_over() {
            sleep(random.millis(20, longest));
            let Ok(_permit) = self.gate.read() else { return };
            if self.kills.load(Ordering::SeqCst) >= limit {
                return;
            }
            let kills = daemon.kill(&mut random);
            self.kills.fetch_add(kills, Ordering::SeqCst);
        }
    }

    /// Asserts that a directory was never returned before, because ids are not used again.
    pub fn assert_new_directory(&self, dir: &std::path::Path) {
        assert!(self.given.lock().unwrap().insert(dir.to_owned()), "{} was returned twice", dir.display());
    }

    pub fn count(counter: &AtomicUsize) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Ends the storm when a thread panics, because the other threads would run for ever.
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
    /// Counts kills and starts, so it is odd while the daemon is down.
    generation: AtomicUsize,
    socket: PathBuf,
    pub snapshots: PathBuf,
}

impl<'s> Daemon<'s> {
    pub fn new(snapshotter: &'s mut Snapshotter) -> Self {
        let (socket, snapshots) = (snapshotter.socket(), snapshotter.snapshots());
        Self { snapshotter: Mutex::new(snapshotter), generation: AtomicUsize::default(), socket, snapshots }
    }

    /// Kills and restarts the daemon, sometimes with further kills during the start. The result is the number of kills.
    fn kill(&self, random: &mut Random) -> usize {
        let mut snapshotter = self.snapshotter.lock().unwrap();
        self.generation.fetch_add(1, Ordering::SeqCst);
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
        self.generation.fetch_add(1, Ordering::SeqCst);
        kills
    }

    pub fn generation(&self) -> usize {
        self.generation.load(Ordering::SeqCst)
    }

    /// Waits until the daemon is up. The result is a client and the generation to which it belongs.
    pub fn connect(&self) -> (Client, usize) {
        loop {
            let generation = self.generation();
            if generation.is_multiple_of(2) {
                return (Client::connect(&self.socket), generation);
            }
            sleep(Duration::from_millis(5));
        }
    }

    pub fn log(&self) -> String {
        self.snapshotter.lock().unwrap().log()
    }
}
