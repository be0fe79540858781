//! What is counted, for Prometheus: every name, its help and its unit stand in this file, and
//! in `docs/metrics.md`.
//!
//! Counting is done where a thing ends: at the gRPC boundary, in the pools, in a repository's
//! waits, in the store's commits. Nobody asks here before doing something. Counters begin at 0
//! with the process; what is a state and no event is asked for by each scrape (`Gauges`).
#![forbid(unsafe_code)]

#[cfg(feature = "server")]
pub mod endpoint;

use std::fmt;
use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Names and values of labels. The values are few, and none is a client's text.
type Labels<const N: usize> = [(&'static str, String); N];
type Histograms<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

/// Upper bounds of the buckets for what takes from a fraction of a millisecond to a minute.
const SECONDS: [f64; 15] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0];

/// gRPC codes of what is not the caller's own affair.
const FAILURES: [&str; 4] = ["INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"];

pub struct Metrics {
    registry: Registry,
    calls: Histograms<2>,
    failed: Family<Labels<2>, Counter>,
    unreadable: Counter,
    layers: Family<Labels<1>, Counter>,
    fallbacks: Family<Labels<1>, Counter>,
    attached: Family<Labels<1>, Counter>,
    scans: Histograms<1>,
    waits: Histograms<1>,
    outages: Family<Labels<1>, Counter>,
    server_outages: Family<Labels<1>, Counter>,
    commits: Histogram,
    writes: Counter,
    cleaned: Family<Labels<1>, Counter>,
    gauges: GaugeFamilies,
}

/// States, as the last scrape found them.
#[derive(Default)]
struct GaugeFamilies {
    threads: Family<Labels<1>, Gauge>,
    busy: Family<Labels<1>, Gauge>,
    waiting: Family<Labels<1>, Gauge>,
    room: Family<Labels<1>, Gauge>,
    up: Family<Labels<1>, Gauge>,
    snapshots: Gauge,
    leftovers: Gauge,
    resident: Gauge,
    descriptors: Gauge,
}

/// The ones and only.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

impl Metrics {
    fn new() -> Self {
        let mut registry = Registry::with_prefix("cvmfs_snapshotter");
        let seconds = || Histogram::new(SECONDS);
        let calls = Histograms::new_with_constructor(seconds as fn() -> Histogram);
        registry.register_with_unit(
            "call_duration",
            "Calls by method and gRPC code, from their arrival to the beginning of their answer; CANCELLED where the client went away before it had it. Of a pull, ALREADY_EXISTS is the good answer: the layer need not be downloaded",
            Unit::Seconds,
            calls.clone(),
        );
        let failed = register_counters(
            &mut registry,
            "calls_failed",
            "Calls that failed because of this program, its load or its node, by method and code (INTERNAL, RESOURCE_EXHAUSTED, UNAVAILABLE, DEADLINE_EXCEEDED); call_duration has these too, from the first one on",
        );
        let unreadable = Counter::default();
        registry.register(
            "requests_unreadable",
            "Requests that could not be decoded, which are in no other metric; gRPC answers them INTERNAL",
            unreadable.clone(),
        );
        let layers = register_counters(
            &mut registry,
            "layers_published",
            "Layers of pulls that a repository had, by repository",
        );
        let fallbacks = register_counters(
            &mut registry,
            "layers_downloaded",
            "Layers of pulls that containerd had to download, by reason (not_published, no_digest, bad_digest, not_mounted, no_answer, server_unreachable, unreadable, name)",
        );
        let attached = register_counters(
            &mut registry,
            "attachments",
            "Layers that were brought under the state root, by result (attached, failed)",
        );
        let scans = Histograms::new_with_constructor(seconds as fn() -> Histogram);
        registry.register_with_unit(
            "scan_duration",
            "First walks over layers in search of markers, by result (done, failed)",
            Unit::Seconds,
            scans.clone(),
        );
        let waits = Histograms::new_with_constructor(seconds as fn() -> Histogram);
        registry.register_with_unit(
            "repository_wait",
            "Waits of calls for an answer of a repository, by repository",
            Unit::Seconds,
            waits.clone(),
        );
        let outages = register_counters(
            &mut registry,
            "repository_outages",
            "Times that a repository ceased to answer, by repository",
        );
        let server_outages = register_counters(
            &mut registry,
            "repository_server_outages",
            "Times that the client of a repository was there and could not reach its server, by repository",
        );
        let commits = seconds();
        registry.register_with_unit(
            "store_commit_duration",
            "Commits of the metadata, each of which makes one or more writes durable",
            Unit::Seconds,
            commits.clone(),
        );
        let writes = Counter::default();
        registry.register("store_writes", "Writes to the metadata that were made durable", writes.clone());
        let cleaned = register_counters(
            &mut registry,
            "cleanups",
            "What cleanups did with what nothing needs any more, by result (removed, left: busy, or it failed and will be tried again)",
        );
        let gauges = GaugeFamilies::registered(&mut registry);
        let started = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
        started.set(since_1970().as_secs_f64());
        registry.register_with_unit("start_time", "When the process began, since 1970", Unit::Seconds, started);
        let build = Family::<Labels<1>, Gauge>::default();
        build.get_or_create(&[("version", env!("CARGO_PKG_VERSION").to_owned())]).set(1);
        registry.register("build_info", "1, with the version of the program", build);
        let metrics = Self {
            registry,
            calls,
            failed,
            unreadable,
            layers,
            fallbacks,
            attached,
            scans,
            waits,
            outages,
            server_outages,
            commits,
            writes,
            cleaned,
            gauges,
        };
        metrics.create_series();
        metrics
    }

    /// What is counted for the first time must be seen to grow, so it is there before.
    fn create_series(&self) {
        for reason in DownloadCause::ALL {
            drop(self.fallbacks.get_or_create(&reason.labels()));
        }
        for result in ["attached", "failed"] {
            drop(self.attached.get_or_create(&[("result", result.to_owned())]));
        }
        for result in ["done", "failed"] {
            drop(self.scans.get_or_create(&[("result", result.to_owned())]));
        }
        self.record_cleanup(0, 0);
    }

    /// As `create_series`, of a repository.
    pub fn init_repository(&self, repository: &str) {
        let labels = of_repository(repository);
        drop(self.layers.get_or_create(&labels));
        drop(self.waits.get_or_create(&labels));
        drop(self.outages.get_or_create(&labels));
        drop(self.server_outages.get_or_create(&labels));
    }

    /// As `create_series`, of a method.
    pub fn init_methods(&self, method: &str) {
        for code in FAILURES {
            drop(self.failed.get_or_create(&of_call(method, code)));
        }
    }

    /// A call was answered, `took` after it had arrived.
    pub fn record_call(&self, method: &str, code: &str, took: Duration) {
        let labels = of_call(method, code);
        if FAILURES.contains(&code) {
            self.failed.get_or_create(&labels).inc();
        }
        self.calls.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A request could not be decoded.
    pub fn record_unreadable(&self) {
        self.unreadable.inc();
    }

    pub fn record_published_layer(&self, repository: &str) {
        self.layers.get_or_create(&of_repository(repository)).inc();
    }

    pub fn record_downloaded_layer(&self, reason: DownloadCause) {
        self.fallbacks.get_or_create(&reason.labels()).inc();
    }

    pub fn record_attach(&self, result: &'static str) {
        self.attached.get_or_create(&[("result", result.to_owned())]).inc();
    }

    pub fn record_scan(&self, result: &'static str, since: Instant) {
        self.scans.get_or_create(&[("result", result.to_owned())]).observe(since.elapsed().as_secs_f64());
    }

    pub fn record_wait(&self, repository: &str, since: Instant) {
        self.waits.get_or_create(&of_repository(repository)).observe(since.elapsed().as_secs_f64());
    }

    pub fn record_outage(&self, repository: &str) {
        self.outages.get_or_create(&of_repository(repository)).inc();
    }

    pub fn record_server_outage(&self, repository: &str) {
        self.server_outages.get_or_create(&of_repository(repository)).inc();
    }

    pub fn record_commit(&self, writes: u64, since: Instant) {
        self.commits.observe(since.elapsed().as_secs_f64());
        self.writes.inc_by(writes);
    }

    pub fn record_cleanup(&self, removed: usize, left: usize) {
        for (result, count) in [("removed", removed), ("left", left)] {
            self.cleaned.get_or_create(&[("result", result.to_owned())]).inc_by(count as u64);
        }
    }

    pub fn pulls<'n>(&self, repositories: impl Iterator<Item = &'n str>) -> PullCounts {
        let downloaded = |reason: DownloadCause| self.fallbacks.get_or_create(&reason.labels()).get();
        PullCounts {
            published: repositories.map(|name| self.layers.get_or_create(&of_repository(name)).get()).sum(),
            not_published: downloaded(DownloadCause::NotPublished),
            unnamed: downloaded(DownloadCause::NoDigest),
            failed: DownloadCause::ALL
                .into_iter()
                .filter(|reason| !matches!(reason, DownloadCause::NotPublished | DownloadCause::NoDigest))
                .map(downloaded)
                .sum(),
        }
    }

    /// All of it, in the text form of `OpenMetrics`, which Prometheus reads.
    pub fn text(&self, gauges: &Gauges) -> Result<String, fmt::Error> {
        self.gauges.set(gauges);
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Layers of pulls since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PullCounts {
    pub published: u64,
    pub not_published: u64,
    /// containerd did not say which layer it wants.
    pub unnamed: u64,
    pub failed: u64,
}

/// Why a layer of a pull is downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DownloadCause {
    NotPublished,
    /// containerd did not say which layer it wants: it is not configured for that.
    NoDigest,
    BadDigest,
    NotMounted,
    /// Not in time, or it is known not to answer.
    NoAnswer,
    /// The repository's client cannot fetch it.
    ServerUnreachable,
    /// The repository's client adds attributes to files.
    OwnAttributes,
    Unreadable,
    /// Its name is too long, or taken.
    Name,
}

impl DownloadCause {
    const ALL: [Self; 9] = [
        Self::NotPublished,
        Self::NoDigest,
        Self::BadDigest,
        Self::NotMounted,
        Self::NoAnswer,
        Self::ServerUnreachable,
        Self::OwnAttributes,
        Self::Unreadable,
        Self::Name,
    ];

    fn labels(self) -> Labels<1> {
        let word = match self {
            Self::NotPublished => "not_published",
            Self::NoDigest => "no_digest",
            Self::BadDigest => "bad_digest",
            Self::NotMounted => "not_mounted",
            Self::NoAnswer => "no_answer",
            Self::ServerUnreachable => "server_unreachable",
            Self::OwnAttributes => "own_attributes",
            Self::Unreadable => "unreadable",
            Self::Name => "name",
        };
        [("reason", word.to_owned())]
    }
}

/// Counters of one name, for each value of the labels.
fn register_counters<const N: usize>(registry: &mut Registry, name: &str, help: &str) -> Family<Labels<N>, Counter> {
    let counters = Family::default();
    registry.register(name, help, Family::clone(&counters));
    counters
}

/// A method without its service.
fn of_call(method: &str, code: &str) -> Labels<2> {
    let method = method.rsplit('/').next().unwrap_or(method);
    [("method", method.to_owned()), ("code", code.to_owned())]
}

fn of_repository(name: &str) -> Labels<1> {
    [("repository", name.to_owned())]
}

fn since_1970() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// States, as a scrape finds them.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// By name; pools of one name are one.
    pub pools: Vec<(&'static str, PoolState)>,
    /// By name, whether it answers.
    pub repositories: Vec<(String, bool)>,
    pub snapshots: u64,
    pub leftovers: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolState {
    pub threads: usize,
    pub busy: usize,
    pub waiting: usize,
    /// Calls that may wait.
    pub room: usize,
}

impl GaugeFamilies {
    fn registered(registry: &mut Registry) -> Self {
        let all = Self::default();
        for (name, help, family) in [
            ("pool_threads", "Threads that do the work of calls, by pool (worker, pull, start)", &all.threads),
            ("pool_busy", "Threads that are at work, by pool", &all.busy),
            ("pool_waiting", "Calls that wait for a thread, by pool", &all.waiting),
            ("pool_waiting_limit", "Calls that may wait for a thread before more are refused, by pool", &all.room),
            (
                "repository_up",
                "Whether the repository is mounted and answers, and its client reaches its server, by repository",
                &all.up,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
        registry.register("snapshots", "Snapshots in the metadata", all.snapshots.clone());
        registry.register("leftovers", "What waits for the next cleanup", all.leftovers.clone());
        registry.register_with_unit("resident_memory", "Memory of the process", Unit::Bytes, all.resident.clone());
        registry.register("open_descriptors", "Files and sockets that the process has open", all.descriptors.clone());
        all
    }

    fn set(&self, gauges: &Gauges) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        for (family, of) in [
            (&self.threads, (|pool| pool.threads) as fn(&PoolState) -> usize),
            (&self.busy, |pool| pool.busy),
            (&self.waiting, |pool| pool.waiting),
            (&self.room, |pool| pool.room),
        ] {
            family.clear();
            for (name, pool) in &gauges.pools {
                family.get_or_create(&[("pool", (*name).to_owned())]).inc_by(number(of(pool)));
            }
        }
        for (name, up) in &gauges.repositories {
            self.up.get_or_create(&of_repository(name)).set(i64::from(*up));
        }
        self.snapshots.set(i64::try_from(gauges.snapshots).unwrap_or(i64::MAX));
        self.leftovers.set(i64::try_from(gauges.leftovers).unwrap_or(i64::MAX));
        self.resident.set(resident_memory().unwrap_or(0));
        self.descriptors.set(fs::read_dir("/proc/self/fd").map_or(0, |fds| number(fds.count())));
    }
}

fn resident_memory() -> Option<i64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<i64>().ok().map(|kibibytes| kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The names in a text that a scrape gets, and in the tables of the documentation.
    fn names(text: &str, prefix: &str) -> BTreeSet<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(prefix));
        lines.filter_map(|rest| rest.split([' ', '`']).next()).map(str::to_owned).collect()
    }

    #[test]
    fn the_documentation_has_every_metric_and_no_other() {
        let metrics = Metrics::new();
        metrics.record_call("/containerd.services.snapshots.v1.Snapshots/Stat", "OK", Duration::ZERO);
        metrics.init_methods("Stat");
        metrics.init_repository("a.test");
        let pools = vec![("worker", PoolState::default())];
        let text =
            metrics.text(&Gauges { pools, repositories: vec![("a.test".to_owned(), true)], ..Gauges::default() });
        let text = text.unwrap();
        let documented = include_str!("../docs/metrics.md");
        assert_eq!(names(documented, "| `cvmfs_snapshotter_"), names(&text, "# HELP cvmfs_snapshotter_"));
        assert!(
            text.contains("cvmfs_snapshotter_call_duration_seconds_count{method=\"Stat\",code=\"OK\"} 1\n"),
            "{text}"
        );
    }

    /// Prometheus sees a counter grow that was there before, and no other.
    #[test]
    fn the_first_call_that_fails_is_seen_to_grow() {
        let metrics = Metrics::new();
        let count = |code: &str| {
            let text = metrics.text(&Gauges::default()).unwrap();
            let sample = format!("cvmfs_snapshotter_calls_failed_total{{method=\"Stat\",code=\"{code}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&sample)).map(str::to_owned)
        };
        metrics.init_methods("/containerd.services.snapshots.v1.Snapshots/Stat");
        assert_eq!(count("INTERNAL").as_deref(), Some("0"));
        for code in ["INTERNAL", "NOT_FOUND"] {
            metrics.record_call("/containerd.services.snapshots.v1.Snapshots/Stat", code, Duration::ZERO);
        }
        assert_eq!(["INTERNAL", "UNAVAILABLE"].map(count).map(Option::unwrap), ["1", "0"]);
        assert_eq!(count("NOT_FOUND"), None);
    }

    #[test]
    fn a_scrape_shows_states_as_they_are_then() {
        let metrics = Metrics::new();
        let pool = PoolState { threads: 4, busy: 2, waiting: 1, room: 9 };
        let gauges = Gauges {
            pools: vec![("start", pool), ("start", pool)],
            repositories: vec![("a.test".to_owned(), false)],
            snapshots: 7,
            leftovers: 3,
        };
        for _ in 0..2 {
            let text = metrics.text(&gauges).unwrap();
            for line in [
                "pool_busy{pool=\"start\"} 4",
                "pool_waiting_limit{pool=\"start\"} 18",
                "repository_up{repository=\"a.test\"} 0",
                "snapshots 7",
                "leftovers 3",
            ] {
                assert!(text.contains(&format!("cvmfs_snapshotter_{line}\n")), "{line} is missing in {text}");
            }
        }
    }
}
