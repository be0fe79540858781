//! Faults on demand for tests: one of the numbered steps of an operation fails, or the process or the whole machine dies
//! at it. The double of the system calls (`system/testing.rs`) and that of the store's disk (`store/testing.rs`) count
//! their steps together, in the order in which they happen.
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
    /// The step with this number has no effect, or half of it, and all later ones fail.
    Dies(usize, Effect),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    Half,
}

/// How much of a step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Done,
    HalfDone,
    Failed(Errno),
}

/// Whether a step changes something or only reads.
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
    /// Whether steps are counted.
    is_armed: AtomicBool,
    count: AtomicUsize,
    /// Whether the process has died.
    is_dead: AtomicBool,
    recorded: Mutex<Vec<Step>>,
}

impl Steps {
    pub fn with(fault: Fault) -> Self {
        let (is_armed, is_dead) = (AtomicBool::default(), AtomicBool::default());
        Self { fault, is_armed, count: AtomicUsize::default(), is_dead, recorded: Mutex::default() }
    }

    /// Counts steps from now on.
    pub fn arm(&self) {
        self.is_armed.store(true, Ordering::SeqCst);
    }

    /// Records a step and decides about it.
    pub fn next(&self, call: &'static str, path: &Path, kind: Kind) -> Verdict {
        if self.is_dead.load(Ordering::SeqCst) {
            return Verdict::Failed(Errno::EIO);
        }
        if !self.is_armed.load(Ordering::SeqCst) {
            return Verdict::Done;
        }
        self.recorded.lock().push(Step { call, path: path.to_owned(), kind });
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::Fails(failing, errno) if failing == number => Verdict::Failed(errno),
            Fault::Dies(last, effect) if last == number => {
                self.is_dead.store(true, Ordering::SeqCst);
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

    /// The recorded steps that change something.
    pub fn changes(&self) -> Vec<Step> {
        self.recorded().into_iter().filter(|step| step.kind == Kind::Change).collect()
    }
}
