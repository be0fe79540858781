//! Pings the watchdog of the service manager as long as workers become free.
#![forbid(unsafe_code)]

use std::io;
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;

use crate::notify;
use crate::worker_pool::PoolHandle;

/// Starts a thread that pings four times in each `interval`, each time after a worker was free. A repository that hangs
/// never keeps all workers busy, so a ping that is missed means a bug.
pub fn start(interval: Duration, workers: PoolHandle) -> io::Result<()> {
    let (free_worker, was_free) = bounded(1);
    let ping = move || {
        loop {
            let free_worker = free_worker.clone();
            // The queue of continuations is used, because a flood of calls may have filled the other one.
            workers.submit_continuation(
                || false,
                || (),
                move |_| {
                    let _ = free_worker.try_send(());
                },
            );
            if was_free.recv().is_err() {
                return;
            }
            notify::watchdog_ping();
            thread::sleep(interval / 4);
        }
    };
    thread::Builder::new().name("watchdog".to_owned()).spawn(ping).map(drop)
}
