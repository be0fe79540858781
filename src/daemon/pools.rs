//! The threads that do the work of calls. A call that waits for a repository, or for the answers to a pull, has a thread
//! of a pool of its own, so that it delays no other calls.
#![forbid(unsafe_code)]

use std::io;
use std::time::Duration;

use crate::config::Config;
use crate::server::BlockingPools;
use crate::worker_pool::{Pool, PoolHandle};

/// A thread of a pool that grows on demand ends after this time without a job.
const IDLE_LIMIT: Duration = Duration::from_secs(10);

pub struct Pools {
    pub workers: Pool,
    pulls: Pool,
    repositories: Vec<Pool>,
}

impl Pools {
    /// Starts all pools but the workers, which `workers.run` starts: until then, calls wait in their queue.
    pub fn start(config: &Config) -> io::Result<Self> {
        let growing_pool = |name: &str| Pool::growing(name, config.blocking_threads(), config.queue, IDLE_LIMIT);
        Ok(Self {
            workers: Pool::unstarted("worker", config.worker_threads(), config.queue),
            pulls: growing_pool("pull")?,
            repositories: config.repositories.iter().map(|_| growing_pool("start")).collect::<io::Result<_>>()?,
        })
    }

    pub fn blocking_pools(&self) -> BlockingPools {
        let repositories = self.repositories.iter().map(Pool::handle).collect();
        BlockingPools { pulls: self.pulls.handle(), repositories }
    }

    /// All pools with the names that they have in the metrics.
    pub fn with_names(&self) -> Vec<(&'static str, PoolHandle)> {
        let repositories = self.repositories.iter().map(|pool| ("start", pool.handle()));
        [("worker", self.workers.handle()), ("pull", self.pulls.handle())].into_iter().chain(repositories).collect()
    }

    /// All pools in the order in which a call goes through them, so that none gets a job after it was drained.
    pub fn into_drain_order(self) -> impl Iterator<Item = Pool> {
        [self.workers, self.pulls].into_iter().chain(self.repositories)
    }
}
