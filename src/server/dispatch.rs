//! Chooses the thread pool on which a call runs.
//!
//! Every call begins on a worker. If it may have to wait for a repository, the worker passes it on to the pool of that
//! repository, so that a repository that hangs holds up only the calls that need it. It must not know any method: each
//! says by a `FindDependency` what its call may wait for.
#![forbid(unsafe_code)]

use grpcio::Deadline;
use protobuf::Message;

use super::SnapshotterCell;
use super::handlers::{CallResult, Handlers};
use super::status::CallError;
use crate::model::Timestamp;
use crate::snapshotter::{self, RepositoryDependency, Snapshotter};
use crate::worker_pool::PoolHandle;

/// The pools for calls that may have to wait: one for each thing that they may wait for.
pub struct BlockingPools {
    pub pulls: PoolHandle,
    /// In the order of the snapshotter's repositories.
    pub repositories: Vec<PoolHandle>,
}

impl BlockingPools {
    fn select(&self, dependency: RepositoryDependency) -> &PoolHandle {
        match dependency {
            RepositoryDependency::Any => &self.pulls,
            RepositoryDependency::Index(index) => self.repositories.get(index).unwrap_or(&self.pulls),
        }
    }
}

/// Finds out which repository a call may have to wait for, without waiting for it. `None`: it waits for none.
pub type FindDependency<Q> = fn(&Snapshotter, &Q) -> snapshotter::Result<Option<RepositoryDependency>>;

pub type Execute<Q, R> = fn(&CallContext<'_>, Q) -> CallResult<R>;

/// What a method may use while it is executed.
pub struct CallContext<'s> {
    pub snapshotter: &'s Snapshotter,
    pub process_start: Timestamp,
    deadline: Deadline,
}

impl CallContext<'_> {
    /// Whether the caller's deadline has passed. A call that was cancelled before its deadline is not noticed.
    pub fn is_expired(&self) -> bool {
        self.deadline.exceeded()
    }
}

/// The work of one call, without its request. A copy of it goes along when the call is passed on to another pool.
#[derive(Clone)]
pub struct CallJob<Q, R> {
    pub snapshotter: SnapshotterCell,
    pub process_start: Timestamp,
    pub deadline: Deadline,
    pub find_dependency: Option<FindDependency<Q>>,
    pub execute: Execute<Q, R>,
}

/// What a worker did with a call.
enum Dispatch<Q, R> {
    Done(CallResult<R>),
    Reroute(RepositoryDependency, Q),
}

impl<Q, R> CallJob<Q, R> {
    fn run_or_reroute(&self, request: Q) -> Dispatch<Q, R> {
        let Some(find_dependency) = self.find_dependency else { return Dispatch::Done(self.run(request)) };
        match find_dependency(self.snapshotter.wait(), &request) {
            Ok(Some(dependency)) => Dispatch::Reroute(dependency, request),
            Ok(None) => Dispatch::Done(self.run(request)),
            Err(error) => Dispatch::Done(Err(error.into())),
        }
    }

    fn run(&self, request: Q) -> CallResult<R> {
        let context = CallContext {
            snapshotter: self.snapshotter.wait(),
            process_start: self.process_start,
            deadline: self.deadline,
        };
        (self.execute)(&context, request)
    }
}

impl Handlers {
    /// Runs `job` on the right pool and passes its result to `on_result`. A refusal by the workers' pool is reported on
    /// the caller's thread, a refusal by the pool to which a worker passes the job on that worker.
    pub(super) fn dispatch<Q: Message, R: Message>(
        &self,
        job: CallJob<Q, R>,
        request: Q,
        on_result: impl FnOnce(CallResult<R>) + Send + 'static,
    ) {
        let blocking_pools = self.blocking_pools.clone();
        let deadline = job.deadline;
        let rerouted_job = job.clone();
        self.workers.submit(
            move || deadline.exceeded(),
            move || job.run_or_reroute(request),
            move |dispatch| match dispatch {
                Ok(Dispatch::Done(result)) => on_result(result),
                Ok(Dispatch::Reroute(dependency, request)) => blocking_pools.select(dependency).submit(
                    move || deadline.exceeded(),
                    move || rerouted_job.run(request),
                    move |result| on_result(result.map_err(CallError::from).flatten()),
                ),
                Err(error) => on_result(Err(error.into())),
            },
        );
    }
}
