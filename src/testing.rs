//! Faults on demand, for tests: one numbered step of many fails, or the process or the whole
//! machine dies at it. Steps of the system-call double (`system/testing.rs`) and of the store's
//! double (`store/disk.rs`) are counted together, in the order in which they happen.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::errno::Errno;
use parking_lot::Mutex;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The step with this number, counted from 0, fails; the machine works again afterwards.
    Fails(usize, Errno),
    /// Nothing works any more from this step on, which has no effect at all, or half of it.
    Dies(usize, Effect),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    Half,
}

/// What shall become of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Done,
    HalfDone,
    Failed(Errno),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Change,
    Question,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub call: &'static str,
    pub path: PathBuf,
    pub kind: Kind,
}

pub struct Steps {
    fault: Fault,
    /// Steps before do not count.
    armed: AtomicBool,
    taken: AtomicUsize,
    dead: AtomicBool,
    recorded: Mutex<Vec<Step>>,
}

impl Steps {
    pub fn with(fault: Fault) -> Self {
        let (taken, recorded) = (AtomicUsize::default(), Mutex::default());
        Self { fault, armed: AtomicBool::default(), taken, dead: AtomicBool::default(), recorded }
    }

    /// Steps count from here on.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    pub fn take(&self, call: &'static str, path: &Path, kind: Kind) -> Verdict {
        if self.dead.load(Ordering::SeqCst) {
            return Verdict::Failed(Errno::EIO);
        }
        if !self.armed.load(Ordering::SeqCst) {
            return Verdict::Done;
        }
        self.recorded.lock().push(Step { call, path: path.to_owned(), kind });
        let number = self.taken.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::Fails(at, errno) if at == number => Verdict::Failed(errno),
            Fault::Dies(at, effect) if at == number => {
                self.dead.store(true, Ordering::SeqCst);
                match effect {
                    Effect::Nothing => Verdict::Failed(Errno::EIO),
                    Effect::Half => Verdict::HalfDone,
                }
            }
            _ => Verdict::Done,
        }
    }

    pub fn recorded(&self) -> Vec<Step> {
        self.recorded.lock().clone()
    }

    /// Of those recorded, the ones that change something.
    pub fn changes(&self) -> Vec<Step> {
        self.recorded().into_iter().filter(|step| step.kind == Kind::Change).collect()
    }
}
