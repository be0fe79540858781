//! Whether the client of a repository can reach its server.
//!
//! A CernVM-FS client whose server is away goes on: what it has cached can be had, and what it has not is
//! answered with an input/output error after seconds. So one such error keeps no container start from
//! asking, for what that needs may be cached, or one file may be damaged. It keeps pulls from waiting for
//! one layer after the other, and admins are told, until the very path that failed is answered again. It is
//! asked again and again, on one thread of its own.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};

use super::executor::ThreadBudget;
use super::health::Seconds;
use crate::metrics::METRICS;
use crate::model::{Quoted, Timestamp};
use crate::system::{self, Sys};

/// Between two questions for the path that failed. The client tries for some seconds each time.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// For so long after a question that failed, pulls do not ask. Then they do, because a single file that is damaged
/// looks like a server that is lost, and must not keep pulls from all other layers for ever.
const PULLS_WAIT: Duration = Duration::from_secs(60);

/// What a CernVM-FS client says of itself at its root, without a question to its server.
const HOST: &str = "user.host";
const PROXY: &str = "user.proxy";
const IO_ERRORS: &str = "user.nioerr";
const LAST_IO_ERROR: &str = "user.timestamp_last_ioerr";
/// Errors of the client that are older are not reported.
const RECENT_ERROR: Duration = Duration::from_secs(300);

/// Asks for a path below the repository's root.
pub type PathProbe = Box<dyn Fn(&Path) -> ProbeResult + Send + Sync>;

pub struct ProbeResult {
    pub result: system::Result<()>,
    /// The client's count of errors after it.
    pub io_errors: u64,
}

/// Whom the client asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryServer {
    pub host: String,
    pub proxy: String,
}

/// What the client answered with input/output errors, to whomever, for as long as it has been mounted.
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
    /// What was asked for last in vain.
    pub cause: system::Error,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RepositoryServer { host, proxy } = &self.server;
        f.write_str("the repository's server cannot be reached")?;
        let seconds = self.begun.elapsed().as_secs();
        if seconds > 0 {
            write!(f, " for {seconds} s")?;
        }
        write!(f, " (host {}, proxy {}): {}", Quoted(host), Quoted(proxy), self.cause)
    }
}

impl RepositoryServer {
    /// None: `path` is a plain directory, or its client is not CernVM-FS.
    pub fn of(sys: &dyn Sys, path: &Path) -> Option<Self> {
        let host = attribute(sys, path, HOST)?;
        Some(Self { host, proxy: attribute(sys, path, PROXY).unwrap_or_default() })
    }
}

impl IoErrors {
    /// If there was one within the last minutes.
    pub fn recent(sys: &dyn Sys, path: &Path) -> Option<Self> {
        let seconds: u64 = attribute(sys, path, LAST_IO_ERROR)?.parse().ok()?;
        let last = Duration::from_secs(seconds);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if now.saturating_sub(last) > RECENT_ERROR {
            return None;
        }
        let last = Timestamp(i64::try_from(last.as_nanos()).ok()?);
        Some(Self { count: io_errors(sys, path)?, last, server: RepositoryServer::of(sys, path)? })
    }
}

/// How many requests the client has answered with input/output errors.
pub fn io_errors(sys: &dyn Sys, path: &Path) -> Option<u64> {
    attribute(sys, path, IO_ERRORS)?.parse().ok()
}

fn attribute(sys: &dyn Sys, path: &Path, name: &str) -> Option<String> {
    let value = String::from_utf8(sys.attribute(path, name).ok()??).ok()?;
    Some(value.trim().to_owned())
}

#[derive(Clone)]
pub struct ServerHealth {
    shared: Arc<Shared>,
}

struct Shared {
    repository: String,
    ask: PathProbe,
    threads: ThreadBudget,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    outage: Option<ServerOutage>,
    /// A thread asks again, or is about to.
    is_asking: bool,
    /// The client's errors up to the end of the last outage.
    explained: u64,
    /// This mount was replaced by another one: the thread that asks ends.
    is_closed: bool,
}

struct ServerOutage {
    unreachable: Unreachable,
    /// Below the repository's root.
    below: PathBuf,
    /// When a pull or a container start asked in vain; the thread's own questions do not count.
    failed: Instant,
}

impl ServerHealth {
    pub fn new(repository: &str, threads: &ThreadBudget, ask: PathProbe) -> Self {
        let (repository, threads) = (repository.to_owned(), threads.clone());
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { repository, ask, threads, state, changed }) }
    }

    /// The client answered with an input/output error when it was asked for what is `below` its root.
    pub fn report_error(&self, below: PathBuf, cause: system::Error, server: RepositoryServer) -> Unreachable {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        let is_new = state.outage.is_none();
        let now = Instant::now();
        let (since, begun) = match &state.outage {
            None => (Timestamp::now(), now),
            Some(outage) => (outage.unreachable.since, outage.unreachable.begun),
        };
        let unreachable = Unreachable { server, since, begun, cause };
        state.outage = Some(ServerOutage { unreachable: unreachable.clone(), below, failed: now });
        if is_new {
            log::warn!(repository = shared.repository.as_str();
                "repository {}: {unreachable}; pulls download layers, and ask again a minute after the last failure; \
                 containers start only with what the client has cached", shared.repository);
            METRICS.record_server_outage(&shared.repository);
        }
        self.ensure_asking(&mut state);
        unreachable
    }

    pub fn outage(&self) -> Option<Unreachable> {
        let mut state = self.shared.state.lock();
        self.ensure_asking(&mut state);
        state.outage.as_ref().map(|outage| outage.unreachable.clone())
    }

    /// Of the client's errors those that came after the last outage: what was told once is not told again.
    pub fn unexplained(&self, errors: IoErrors) -> Option<IoErrors> {
        (errors.count > self.shared.state.lock().explained).then_some(errors)
    }

    /// Why a pull does not ask now.
    pub fn refusal_of_pulls(&self) -> Option<Unreachable> {
        let state = self.shared.state.lock();
        let outage = state.outage.as_ref().filter(|outage| outage.failed.elapsed() < PULLS_WAIT)?;
        Some(outage.unreachable.clone())
    }

    /// Ends the thread that asks.
    pub fn close(&self) {
        self.shared.state.lock().is_closed = true;
        self.shared.changed.notify_all();
    }

    /// There is a thread that asks as long as there is an outage, unless none can be had at the moment.
    fn ensure_asking(&self, state: &mut State) {
        if state.outage.is_some() && !state.is_asking && !state.is_closed {
            state.is_asking = self.start_asking();
        }
    }

    /// Whether there is a thread that asks.
    fn start_asking(&self) -> bool {
        let shared = Arc::clone(&self.shared);
        let Some(counted) = shared.threads.take() else { return false };
        let ask = move || {
            shared.ask_until_answered();
            drop(counted);
        };
        match thread::Builder::new().name("server-probe".to_owned()).spawn(ask) {
            Ok(_) => true,
            Err(e) => {
                log::error!(repository = self.shared.repository.as_str();
                    "repository {}: no thread can be started to ask whether its server is back: {e}; the next status \
                     or scrape tries again", self.shared.repository);
                false
            }
        }
    }
}

impl Shared {
    fn ask_until_answered(&self) {
        let mut state = self.state.lock();
        loop {
            let until = Instant::now() + PROBE_INTERVAL;
            while !state.is_closed && !self.changed.wait_until(&mut state, until).timed_out() {}
            let below = state.outage.as_ref().map(|outage| outage.below.clone());
            let Some(below) = below.filter(|_| !state.is_closed) else { break };
            drop(state);
            let answer = (self.ask)(&below);
            state = self.state.lock();
            // A client that died tells nothing of its server. Another path may have failed since.
            let is_answered = !answer.result.is_err_and(|e| e.errno == Errno::EIO || e.is_dead());
            if let Some(outage) = state.outage.take_if(|outage| is_answered && outage.below == below) {
                state.explained = answer.io_errors;
                log::info!(repository = self.repository.as_str();
                    "repository {}: its server can be reached again, after {}", self.repository,
                    Seconds(outage.unreachable.begun.elapsed()));
                break;
            }
        }
        state.is_asking = false;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn failure(path: &str) -> system::Error {
        system::Error { call: "open", path: path.into(), errno: Errno::EIO }
    }

    fn server() -> RepositoryServer {
        RepositoryServer { host: "http://s1.example.org".to_owned(), proxy: "DIRECT".to_owned() }
    }

    fn wait_until(what: &str, condition: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !condition() {
            assert!(Instant::now() < until, "it did not happen that {what}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn the_path_that_failed_last_is_asked_for_until_it_is_answered_with_anything_but_eio() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&asked);
        let ask = move |below: &Path| {
            let mut asked = noted.lock();
            asked.push(below.to_owned());
            // The client may die meanwhile, and be mounted anew.
            let errno = [Errno::EIO, Errno::ENOTCONN].get(asked.len() - 1).copied().unwrap_or(Errno::ENOENT);
            ProbeResult { result: Err(system::Error { call: "open", path: below.to_owned(), errno }), io_errors: 7 }
        };
        let health = ServerHealth::new("r", &ThreadBudget::new(4), Box::new(ask));
        assert_eq!((health.outage(), health.refusal_of_pulls()), (None, None));
        let first = health.report_error("a".into(), failure("/r/a"), server());
        let second = health.report_error("b".into(), failure("/r/b"), server());
        assert_eq!((second.since, second.begun), (first.since, first.begun), "it is one outage");
        assert_eq!(health.refusal_of_pulls(), Some(second.clone()));
        let text = second.to_string();
        for part in ["the repository's server cannot be reached", "http://s1.example.org", "DIRECT", "/r/b"] {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
        wait_until("the answer is heard of", || health.outage().is_none());
        assert_eq!(*asked.lock(), [Path::new("b"); 3]);
        let errors = |count| IoErrors { count, last: Timestamp(0), server: server() };
        assert_eq!((health.unexplained(errors(7)), health.unexplained(errors(8))), (None, Some(errors(8))));
    }

    #[test]
    fn one_thread_asks_and_it_ends_when_the_repository_is_mounted_anew() {
        let threads = ThreadBudget::new(1);
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let ask = move |below: &Path| {
            counted.fetch_add(1, Ordering::SeqCst);
            ProbeResult { result: Err(failure(&below.display().to_string())), io_errors: 0 }
        };
        let health = ServerHealth::new("r", &threads, Box::new(ask));
        for n in 0..10 {
            health.report_error(n.to_string().into(), failure("/r/n"), server());
        }
        assert!(threads.take().is_none(), "it is counted");
        wait_until("it asks", || asked.load(Ordering::SeqCst) > 0);
        health.close();
        wait_until("it ends", || threads.take().is_some());
        assert!(health.outage().is_some());
    }
}
