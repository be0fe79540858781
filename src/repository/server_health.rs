//! Whether the client of a repository can reach its server.
//!
//! A CernVM-FS client that cannot reach its server still shows what it has cached; anything else fails with an
//! input/output error after some seconds. Container starts are tried all the same, because what they need may be cached,
//! and because a single damaged file fails with the same error. Pulls are refused, so that they do not wait for one layer
//! after the other, and admins are told. This lasts until the path that failed can be read again, which one thread tries
//! periodically.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;

use super::client::attribute;
use super::executor::ThreadBudget;
use super::health::Seconds;
use crate::metrics::METRICS;
use crate::model::{Quoted, Timestamp};
use crate::sync::{Condvar, Mutex, now, thread};
use crate::system::{self, Sys};

/// The time between two attempts to read the path that failed. In each, the client tries for some seconds.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// How long pulls are refused after a failure. A single damaged file looks like a server that cannot be reached, and must
/// not keep pulls from all other layers for ever.
const PULL_REFUSAL: Duration = Duration::from_secs(60);

// Extended attributes of the root, which a CernVM-FS client answers without its server.
const HOST_XATTR: &str = "user.host";
const PROXY_XATTR: &str = "user.proxy";
const IO_ERRORS_XATTR: &str = "user.nioerr";
const LAST_IO_ERROR_XATTR: &str = "user.timestamp_last_ioerr";
/// Errors of the client that are older are not reported.
const RECENT_ERROR: Duration = Duration::from_secs(300);

/// Asks the server by reading a path, which is given from the repository's root.
pub type ServerProbe = Box<dyn Fn(&Path) -> ProbeResult + Send + Sync>;

pub struct ProbeResult {
    pub result: system::Result<()>,
    /// How many input/output errors the client has counted after that.
    pub io_errors: u64,
}

/// The server that the client fetches from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryServer {
    pub host: String,
    pub proxy: String,
}

/// The input/output errors that the client has returned to any program since it was mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoErrors {
    pub count: u64,
    pub last: Timestamp,
    pub server: RepositoryServer,
}

/// A server that its client could not reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable {
    pub server: RepositoryServer,
    pub since: Timestamp,
    begun: Instant,
    /// The last call that failed.
    pub cause: system::Error,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RepositoryServer { host, proxy } = &self.server;
        f.write_str("the repository's server cannot be reached")?;
        let seconds = (now() - self.begun).as_secs();
        if seconds > 0 {
            write!(f, " for {seconds} s")?;
        }
        write!(f, " (host {}, proxy {}): {}", Quoted(host), Quoted(proxy), self.cause)
    }
}

impl RepositoryServer {
    /// None: `path` is a plain directory, or its client is not CernVM-FS.
    pub fn read(sys: &dyn Sys, path: &Path) -> Option<Self> {
        let host = attribute(sys, path, HOST_XATTR)?;
        Some(Self { host, proxy: attribute(sys, path, PROXY_XATTR).unwrap_or_default() })
    }
}

impl IoErrors {
    /// None: there was no error within the last minutes.
    pub fn recent(sys: &dyn Sys, path: &Path) -> Option<Self> {
        let seconds: u64 = attribute(sys, path, LAST_IO_ERROR_XATTR)?.parse().ok()?;
        let last = Duration::from_secs(seconds);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if now.saturating_sub(last) > RECENT_ERROR {
            return None;
        }
        let last = Timestamp(i64::try_from(last.as_nanos()).ok()?);
        Some(Self { count: io_errors(sys, path)?, last, server: RepositoryServer::read(sys, path)? })
    }
}

/// The number of input/output errors that the client has returned.
pub fn io_errors(sys: &dyn Sys, path: &Path) -> Option<u64> {
    attribute(sys, path, IO_ERRORS_XATTR)?.parse().ok()
}

#[derive(Clone)]
pub struct ServerHealth {
    shared: Arc<Shared>,
}

struct Shared {
    repository: String,
    probe: ServerProbe,
    threads: ThreadBudget,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    outage: Option<ServerOutage>,
    /// Whether a thread probes.
    is_probing: bool,
    /// The number of the client's errors at the end of the last outage.
    explained: u64,
    /// The mount was replaced by another one: nothing is probed or reported any more.
    is_closed: bool,
}

struct ServerOutage {
    unreachable: Unreachable,
    /// The path that failed, from the repository's root.
    path: PathBuf,
    /// When a pull or a container start last failed. Probes do not count.
    failed: Instant,
}

impl ServerHealth {
    pub fn new(repository: &str, threads: &ThreadBudget, probe: ServerProbe) -> Self {
        let (repository, threads) = (repository.to_owned(), threads.clone());
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { repository, probe, threads, state, changed }) }
    }

    /// Records that the client has returned an input/output error for `path`, which is given from its root.
    pub fn report_error(&self, path: PathBuf, cause: system::Error, server: RepositoryServer) -> Unreachable {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        let is_new = state.outage.is_none();
        let now = now();
        let (since, begun) = match &state.outage {
            None => (Timestamp::now(), now),
            Some(outage) => (outage.unreachable.since, outage.unreachable.begun),
        };
        let unreachable = Unreachable { server, since, begun, cause };
        state.outage = Some(ServerOutage { unreachable: unreachable.clone(), path, failed: now });
        if is_new && !state.is_closed {
            log::warn!(event = "repository_server_unreachable", repository = shared.repository.as_str();
                "repository {}: {unreachable}; pulls download layers, and ask again a minute after the last failure; \
                 containers start only with what the client has cached", shared.repository);
            METRICS.record_server_outage(&shared.repository);
        }
        self.ensure_probing(&mut state);
        unreachable
    }

    pub fn outage(&self) -> Option<Unreachable> {
        let mut state = self.shared.state.lock();
        self.ensure_probing(&mut state);
        state.outage.as_ref().map(|outage| outage.unreachable.clone())
    }

    /// None: all of the client's errors belong to an outage that was reported and is over.
    pub fn unexplained(&self, errors: IoErrors) -> Option<IoErrors> {
        (errors.count > self.shared.state.lock().explained).then_some(errors)
    }

    /// Why a pull does not try the repository now.
    pub fn refusal_of_pulls(&self) -> Option<Unreachable> {
        let state = self.shared.state.lock();
        let outage = state.outage.as_ref().filter(|outage| now() - outage.failed < PULL_REFUSAL)?;
        Some(outage.unreachable.clone())
    }

    /// Ends probing.
    pub fn close(&self) {
        self.shared.state.lock().is_closed = true;
        self.shared.changed.notify_all();
    }

    /// Starts a thread that probes if an outage has none.
    fn ensure_probing(&self, state: &mut State) {
        if state.outage.is_some() && !state.is_probing && !state.is_closed {
            state.is_probing = self.start_probing();
        }
    }

    /// Returns whether a thread was started.
    fn start_probing(&self) -> bool {
        let shared = Arc::clone(&self.shared);
        let Some(permit) = shared.threads.acquire() else { return false };
        let run = move || {
            shared.probe_until_answered();
            drop(permit);
        };
        match thread::Builder::new().name("server-probe".to_owned()).spawn(run) {
            Ok(_) => true,
            Err(e) => {
                log::error!(event = "server_probe_thread_failed", repository = self.shared.repository.as_str();
                    "repository {}: cannot start a thread that finds out when its server is back: {e}; the next status \
                     or scrape tries again", self.shared.repository);
                false
            }
        }
    }
}

impl Shared {
    fn probe_until_answered(&self) {
        let mut state = self.state.lock();
        loop {
            let until = now() + PROBE_INTERVAL;
            while !state.is_closed && !self.changed.wait_until(&mut state, until).timed_out() {}
            let path = state.outage.as_ref().map(|outage| outage.path.clone());
            let Some(path) = path.filter(|_| !state.is_closed) else { break };
            drop(state);
            let answer = (self.probe)(&path);
            state = self.state.lock();
            // A client that died says nothing about its server. Another path may have failed since.
            let is_answered = !answer.result.is_err_and(|e| e.errno == Errno::EIO || e.is_dead());
            if let Some(outage) = state.outage.take_if(|outage| is_answered && outage.path == path) {
                state.explained = answer.io_errors;
                log::info!(event = "repository_server_reachable", repository = self.repository.as_str();
                    "repository {}: its server can be reached again, after {}", self.repository,
                    Seconds(now() - outage.unreachable.begun));
                break;
            }
        }
        state.is_probing = false;
    }
}

#[cfg(test)]
mod tests;
