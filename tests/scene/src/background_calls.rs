//! Calls such as containerd makes, sent while something else happens, for example a restart of the daemon.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::client::Client;
use crate::process::{SetOnDrop, eventually};

/// Counts and failures of the calls so far.
#[derive(Default)]
pub struct BackgroundCalls {
    made: AtomicUsize,
    failed: Mutex<Vec<String>>,
}

impl BackgroundCalls {
    /// Lets each client prepare, query and remove one snapshot after the other while `work` runs.
    pub fn run_during(clients: &[Client], work: impl FnOnce(&Self)) -> Self {
        let (calls, over) = (Self::default(), AtomicBool::new(false));
        thread::scope(|scope| {
            let set_over = SetOnDrop(&over);
            for (number, client) in clients.iter().enumerate() {
                let (calls, over) = (&calls, &over);
                scope.spawn(move || {
                    for n in 0.. {
                        if over.load(Ordering::SeqCst) {
                            break;
                        }
                        calls.call(client, &format!("call-{number}-{n}"));
                    }
                });
            }
            work(&calls);
            drop(set_over);
        });
        calls
    }

    fn call(&self, client: &Client, key: &str) {
        let answers = [
            client.prepare(key, "", &[("containerd.io/gc.root", "scene")]).map(drop),
            client.mounts(key).map(drop),
            client.usage(key).map(drop),
            client.stat(key).map(drop),
            client.remove(key),
        ];
        self.made.fetch_add(answers.len(), Ordering::SeqCst);
        let failed = answers.into_iter().filter_map(Result::err);
        let failed: Vec<String> =
            failed.map(|status| format!("{key}: {:?} {}", status.code(), status.message())).collect();
        if !failed.is_empty() {
            // A real client waits before it tries again.
            thread::sleep(Duration::from_millis(50));
        }
        self.failed.lock().expect("nobody panicked").extend(failed);
    }

    pub fn made(&self) -> usize {
        self.made.load(Ordering::SeqCst)
    }

    /// The calls that failed since the last call of this function, with code and message.
    pub fn drain_failures(&self) -> Vec<String> {
        std::mem::take(&mut self.failed.lock().expect("nobody panicked"))
    }

    /// Waits until `count` more calls were answered, so that the test does not depend on the speed of the machine.
    #[track_caller]
    pub fn wait_for_more(&self, count: usize) {
        let before = self.made();
        eventually("calls are answered", || self.made() > before + count);
    }
}
