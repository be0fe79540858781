//! Decides when, and whether, a request of the kernel is answered. Requests that wait by command
//! keep no thread: they lie here with what is needed to answer them.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use fuser::Errno;

use crate::error_log::ErrorLog;

#[derive(Clone, Copy, Debug)]
pub enum Behaviour {
    Normal,
    HangAll,
    /// Only statfs is answered.
    HangTree,
    Slow(Duration),
    /// Everything but statfs, and but the root directory itself, is answered so.
    Fail(Errno),
}

/// The kind of a request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Lookup,
    Getattr,
    Readlink,
    Open,
    Read,
    Flush,
    Release,
    Opendir,
    Readdir,
    Releasedir,
    Statfs,
    Getxattr,
    Listxattr,
}

const NAMES: [&str; 13] = [
    "lookup",
    "getattr",
    "readlink",
    "open",
    "read",
    "flush",
    "release",
    "opendir",
    "readdir",
    "releasedir",
    "statfs",
    "getxattr",
    "listxattr",
];

/// The entry that a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    Root,
    Other,
}

/// An answer that can be an error.
pub trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ident),*) => {
        $(impl Refuse for fuser::$reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(
    ReplyAttr,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyOpen,
    ReplyStatfs,
    ReplyXattr
);

type Job = Box<dyn FnOnce() + Send>;

pub struct Gate {
    state: Mutex<(Behaviour, Vec<Job>)>,
    counts: [AtomicU64; NAMES.len()],
    log: Arc<ErrorLog>,
}

impl Gate {
    pub fn new(log: Arc<ErrorLog>) -> Self {
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        Self { state: Mutex::new((Behaviour::Normal, Vec::new())), counts, log }
    }

    /// Lets `answer` take its turn with `reply`, now or later.
    pub fn pass<R: Refuse>(
        &self,
        request: Request,
        subject: Subject,
        reply: R,
        answer: impl FnOnce(R) + Send + 'static,
    ) {
        self.counts[request as usize].fetch_add(1, Ordering::Relaxed);
        let behaviour = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match state.0 {
                Behaviour::HangTree if request == Request::Statfs => {}
                Behaviour::HangAll | Behaviour::HangTree => {
                    state.1.push(Box::new(move || work(move || answer(reply))));
                    return;
                }
                _ => {}
            }
            state.0
        };
        match behaviour {
            Behaviour::Slow(time) => {
                thread::spawn(move || {
                    thread::sleep(time);
                    work(move || answer(reply));
                });
            }
            Behaviour::Fail(errno)
                if subject == Subject::Other
                    && !matches!(request, Request::Statfs | Request::Release | Request::Releasedir) =>
            {
                self.log.count(errno);
                reply.refuse(errno);
            }
            _ => work(move || answer(reply)),
        }
    }

    /// Sets the behaviour. Requests that wait are answered as soon as the client does not hang any more, each on its own
    /// thread, because one of them may be slow.
    pub fn set(&self, behaviour: Behaviour) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = behaviour;
        if !state.0.hangs() {
            for job in state.1.drain(..) {
                thread::spawn(job);
            }
        }
    }

    pub fn hangs(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0.hangs()
    }

    /// `N lookup=N …`: all requests so far, then those of each kind that occurred.
    pub fn counted(&self) -> String {
        let counts = self.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        let mut text = counts.iter().sum::<u64>().to_string();
        for (name, count) in NAMES.iter().zip(counts).filter(|(_, count)| *count > 0) {
            let _ = write!(text, " {name}={count}");
        }
        text
    }
}

impl Behaviour {
    fn hangs(self) -> bool {
        matches!(self, Self::HangAll | Self::HangTree)
    }
}

/// A reader that panics costs one request (its dropped reply answers EIO), not an event loop.
fn work(job: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        eprintln!("cvmfs-test-client: a request was answered EIO because its reader panicked");
    }
}
