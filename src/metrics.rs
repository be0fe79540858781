//! The metrics, for Prometheus. Every metric has its name, unit and help in this file, and in `docs/metrics.md`.
//!
//! Events are counted where they end: at the gRPC boundary, in the snapshotter, in waits for a repository, in the store's
//! commits. No other room reads a metric to decide anything. Counters start at 0 with the process; states are collected
//! for each scrape (`Gauges`).
#![forbid(unsafe_code)]

#[cfg(feature = "server")]
pub mod endpoint;

use std::fmt;
use std::fs;
use std::sync::LazyLock;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry, Unit};

/// Names and values of labels. There are few values, and none is chosen by a client.
type Labels<const N: usize> = [(&'static str, String); N];
type Histograms<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

/// Upper bounds of the buckets of durations, from a fraction of a millisecond to a minute.
const SECONDS: [f64; 15] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0];

/// gRPC codes of failures that the caller did not cause.
const FAILURES: [&str; 4] = ["INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"];

/// A metric's name, without the prefix `cvmfs_snapshotter_` and without its unit, and its help.
type Definition = (&'static str, &'static str);

const CALLS: Definition = (
    "call_duration",
    "Calls by method and gRPC code, from their arrival to the beginning of their answer; CANCELLED where the client went away before it had it. Of a pull, ALREADY_EXISTS is the good answer: the layer need not be downloaded",
);
const FAILED_CALLS: Definition = (
    "calls_failed",
    "Calls that failed because of this program, its load or its node, by method and code (INTERNAL, RESOURCE_EXHAUSTED, UNAVAILABLE, DEADLINE_EXCEEDED); call_duration has these too, from the first one on",
);
const UNREADABLE_REQUESTS: Definition = (
    "requests_unreadable",
    "Requests that could not be decoded, which are in no other metric; gRPC answers them INTERNAL",
);
const PUBLISHED_LAYERS: Definition = ("layers_published", "Layers of pulls that a repository had, by repository");
const DOWNLOADED_LAYERS: Definition = (
    "layers_downloaded",
    "Layers of pulls that containerd had to download, by reason (not_published, no_digest, bad_digest, not_mounted, no_answer, server_unreachable, own_attributes, unreadable, name)",
);
const ATTACHMENTS: Definition =
    ("attachments", "Layers that were attached below the state root, by result (attached, failed)");
const SCANS: Definition = ("scan_duration", "First walks over layers in search of markers, by result (done, failed)");
const REPOSITORY_WAITS: Definition = ("repository_wait", "Waits of calls for an answer of a repository, by repository");
const REPOSITORY_OUTAGES: Definition =
    ("repository_outages", "Times that a repository ceased to answer, by repository");
const SERVER_OUTAGES: Definition = (
    "repository_server_outages",
    "Times that the client of a repository was there and could not reach its server, by repository",
);
const STORE_COMMITS: Definition =
    ("store_commit_duration", "Commits of the metadata, each of which makes one or more writes durable");
const STORE_WRITES: Definition = ("store_writes", "Writes to the metadata that were made durable");
const CLEANUPS: Definition = (
    "cleanups",
    "What cleanups did with what nothing needs any more, by result (removed, left: busy, or it failed and will be tried again)",
);
const POOL_THREADS: Definition = ("pool_threads", "Threads that do the work of calls, by pool (worker, pull, start)");
const POOL_BUSY: Definition = ("pool_busy", "Threads that are at work, by pool");
const POOL_WAITING: Definition = ("pool_waiting", "Calls that wait for a thread, by pool");
const POOL_WAITING_LIMIT: Definition =
    ("pool_waiting_limit", "Calls that may wait for a thread before more are refused, by pool");
const REPOSITORY_UP: Definition = (
    "repository_up",
    "Whether the repository is mounted and answers, and its client reaches its server, by repository",
);
const SNAPSHOTS: Definition = ("snapshots", "Snapshots in the metadata");
const LEFTOVERS: Definition = ("leftovers", "What waits for the next cleanup");
const RESIDENT_MEMORY: Definition = ("resident_memory", "Memory of the process");
const OPEN_DESCRIPTORS: Definition = ("open_descriptors", "Files and sockets that the process has open");
const START_TIME: Definition = ("start_time", "When the process began, since 1970");
const BUILD_INFO: Definition = ("build_info", "1, with the version of the program");

pub struct Metrics {
    calls: Histograms<2>,
    failed_calls: Family<Labels<2>, Counter>,
    unreadable_requests: Counter,
    published_layers: Family<Labels<1>, Counter>,
    downloaded_layers: Family<Labels<1>, Counter>,
    attachments: Family<Labels<1>, Counter>,
    scans: Histograms<1>,
    repository_waits: Histograms<1>,
    repository_outages: Family<Labels<1>, Counter>,
    server_outages: Family<Labels<1>, Counter>,
    store_commits: Histogram,
    store_writes: Counter,
    cleanups: Family<Labels<1>, Counter>,
    gauges: GaugeFamilies,
    registry: Registry,
}

/// States as the last scrape collected them.
struct GaugeFamilies {
    pool_threads: Family<Labels<1>, Gauge>,
    pool_busy: Family<Labels<1>, Gauge>,
    pool_waiting: Family<Labels<1>, Gauge>,
    pool_waiting_limit: Family<Labels<1>, Gauge>,
    repository_up: Family<Labels<1>, Gauge>,
    snapshots: Gauge,
    leftovers: Gauge,
    resident_memory: Gauge,
    open_descriptors: Gauge,
}

/// The metrics of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

fn new_histogram() -> Histogram {
    Histogram::new(SECONDS)
}

/// Registers `metric` and returns it.
fn register<M: Metric + Clone>(registry: &mut Registry, (name, help): Definition, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// Registers a metric whose name ends in its unit, and returns it.
fn register_with_unit<M: Metric + Clone>(
    registry: &mut Registry,
    (name, help): Definition,
    unit: Unit,
    metric: M,
) -> M {
    registry.register_with_unit(name, help, unit, metric.clone());
    metric
}

fn register_durations<const N: usize>(registry: &mut Registry, definition: Definition) -> Histograms<N> {
    let histograms = Histograms::new_with_constructor(new_histogram as fn() -> Histogram);
    register_with_unit(registry, definition, Unit::Seconds, histograms)
}

impl Metrics {
    fn new() -> Self {
        let registry = &mut Registry::with_prefix("cvmfs_snapshotter");
        let start_time = Gauge::<f64, AtomicU64>::default();
        start_time.set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        let build_info = Family::<Labels<1>, Gauge>::default();
        build_info.get_or_create(&[("version", env!("CARGO_PKG_VERSION").to_owned())]).set(1);
        let metrics = Self {
            calls: register_durations(registry, CALLS),
            failed_calls: register(registry, FAILED_CALLS, Family::default()),
            unreadable_requests: register(registry, UNREADABLE_REQUESTS, Counter::default()),
            published_layers: register(registry, PUBLISHED_LAYERS, Family::default()),
            downloaded_layers: register(registry, DOWNLOADED_LAYERS, Family::default()),
            attachments: register(registry, ATTACHMENTS, Family::default()),
            scans: register_durations(registry, SCANS),
            repository_waits: register_durations(registry, REPOSITORY_WAITS),
            repository_outages: register(registry, REPOSITORY_OUTAGES, Family::default()),
            server_outages: register(registry, SERVER_OUTAGES, Family::default()),
            store_commits: register_with_unit(registry, STORE_COMMITS, Unit::Seconds, new_histogram()),
            store_writes: register(registry, STORE_WRITES, Counter::default()),
            cleanups: register(registry, CLEANUPS, Family::default()),
            gauges: GaugeFamilies::register(registry),
            registry: {
                register_with_unit(registry, START_TIME, Unit::Seconds, start_time);
                register(registry, BUILD_INFO, build_info);
                std::mem::take(registry)
            },
        };
        metrics.create_series();
        metrics
    }

    /// Creates the series whose labels are known. A rate needs a sample before the first event, so the series start at 0.
    fn create_series(&self) {
        for reason in DownloadCause::ALL {
            drop(self.downloaded_layers.get_or_create(&reason.labels()));
        }
        for result in ["attached", "failed"] {
            drop(self.attachments.get_or_create(&[("result", result.to_owned())]));
        }
        for result in ["done", "failed"] {
            drop(self.scans.get_or_create(&[("result", result.to_owned())]));
        }
        self.record_cleanup(0, 0);
    }

    /// Creates the series of a repository, for the same reason.
    pub fn init_repository(&self, repository: &str) {
        let labels = repository_label(repository);
        drop(self.published_layers.get_or_create(&labels));
        drop(self.repository_waits.get_or_create(&labels));
        drop(self.repository_outages.get_or_create(&labels));
        drop(self.server_outages.get_or_create(&labels));
    }

    /// Creates the series of a method, for the same reason.
    pub fn init_method(&self, method: &str) {
        for code in FAILURES {
            drop(self.failed_calls.get_or_create(&call_labels(method, code)));
        }
    }

    /// Counts a call that was answered `duration` after its arrival.
    pub fn record_call(&self, method: &str, code: &str, duration: Duration) {
        let labels = call_labels(method, code);
        if FAILURES.contains(&code) {
            self.failed_calls.get_or_create(&labels).inc();
        }
        self.calls.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    /// Counts a request that could not be decoded.
    pub fn record_unreadable(&self) {
        self.unreadable_requests.inc();
    }

    pub fn record_published_layer(&self, repository: &str) {
        self.published_layers.get_or_create(&repository_label(repository)).inc();
    }

    pub fn record_downloaded_layer(&self, reason: DownloadCause) {
        self.downloaded_layers.get_or_create(&reason.labels()).inc();
    }

    pub fn record_attach(&self, result: &'static str) {
        self.attachments.get_or_create(&[("result", result.to_owned())]).inc();
    }

    pub fn record_scan(&self, result: &'static str, since: Instant) {
        self.scans.get_or_create(&[("result", result.to_owned())]).observe(since.elapsed().as_secs_f64());
    }

    pub fn record_wait(&self, repository: &str, since: Instant) {
        self.repository_waits.get_or_create(&repository_label(repository)).observe(since.elapsed().as_secs_f64());
    }

    pub fn record_outage(&self, repository: &str) {
        self.repository_outages.get_or_create(&repository_label(repository)).inc();
    }

    pub fn record_server_outage(&self, repository: &str) {
        self.server_outages.get_or_create(&repository_label(repository)).inc();
    }

    pub fn record_commit(&self, writes: u64, since: Instant) {
        self.store_commits.observe(since.elapsed().as_secs_f64());
        self.store_writes.inc_by(writes);
    }

    pub fn record_cleanup(&self, removed: usize, left: usize) {
        for (result, count) in [("removed", removed), ("left", left)] {
            self.cleanups.get_or_create(&[("result", result.to_owned())]).inc_by(count as u64);
        }
    }

    pub fn pulls<'n>(&self, repositories: impl Iterator<Item = &'n str>) -> PullCounts {
        let downloaded = |reason: DownloadCause| self.downloaded_layers.get_or_create(&reason.labels()).get();
        PullCounts {
            published: repositories
                .map(|name| self.published_layers.get_or_create(&repository_label(name)).get())
                .sum(),
            not_published: downloaded(DownloadCause::NotPublished),
            unnamed: downloaded(DownloadCause::NoDigest),
            failed: DownloadCause::ALL
                .into_iter()
                .filter(|reason| !matches!(reason, DownloadCause::NotPublished | DownloadCause::NoDigest))
                .map(downloaded)
                .sum(),
        }
    }

    /// All metrics in the text format of `OpenMetrics`.
    pub fn text(&self, gauges: &Gauges) -> Result<String, fmt::Error> {
        self.gauges.set(gauges);
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Number of layers of pulls since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PullCounts {
    pub published: u64,
    pub not_published: u64,
    /// containerd did not name the layer.
    pub unnamed: u64,
    pub failed: u64,
}

/// Why a layer of a pull is downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DownloadCause {
    NotPublished,
    /// containerd did not name the layer, because it is not configured to.
    NoDigest,
    BadDigest,
    NotMounted,
    /// The repository did not answer in time, or is known not to answer.
    NoAnswer,
    /// The repository's client cannot fetch it.
    ServerUnreachable,
    /// The repository's client adds attributes to files.
    OwnAttributes,
    Unreadable,
    /// The name of the snapshot would be too long, or is taken.
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

/// The method without its service, and the code.
fn call_labels(method: &str, code: &str) -> Labels<2> {
    let method = method.rsplit('/').next().unwrap_or(method);
    [("method", method.to_owned()), ("code", code.to_owned())]
}

fn repository_label(name: &str) -> Labels<1> {
    [("repository", name.to_owned())]
}

/// States that are collected for each scrape.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Pools by name. Pools with the same name are added up.
    pub pools: Vec<(&'static str, PoolState)>,
    /// Repositories by name, and whether each can be used.
    pub repositories: Vec<(String, bool)>,
    pub snapshots: u64,
    pub leftovers: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolState {
    pub threads: usize,
    pub busy: usize,
    pub waiting: usize,
    /// Maximum number of waiting calls.
    pub max_waiting: usize,
}

impl GaugeFamilies {
    fn register(registry: &mut Registry) -> Self {
        Self {
            pool_threads: register(registry, POOL_THREADS, Family::default()),
            pool_busy: register(registry, POOL_BUSY, Family::default()),
            pool_waiting: register(registry, POOL_WAITING, Family::default()),
            pool_waiting_limit: register(registry, POOL_WAITING_LIMIT, Family::default()),
            repository_up: register(registry, REPOSITORY_UP, Family::default()),
            snapshots: register(registry, SNAPSHOTS, Gauge::default()),
            leftovers: register(registry, LEFTOVERS, Gauge::default()),
            resident_memory: register_with_unit(registry, RESIDENT_MEMORY, Unit::Bytes, Gauge::default()),
            open_descriptors: register(registry, OPEN_DESCRIPTORS, Gauge::default()),
        }
    }

    fn set(&self, gauges: &Gauges) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        for family in [&self.pool_threads, &self.pool_busy, &self.pool_waiting, &self.pool_waiting_limit] {
            family.clear();
        }
        for (name, pool) in &gauges.pools {
            let label = [("pool", (*name).to_owned())];
            self.pool_threads.get_or_create(&label).inc_by(number(pool.threads));
            self.pool_busy.get_or_create(&label).inc_by(number(pool.busy));
            self.pool_waiting.get_or_create(&label).inc_by(number(pool.waiting));
            self.pool_waiting_limit.get_or_create(&label).inc_by(number(pool.max_waiting));
        }
        for (name, is_up) in &gauges.repositories {
            self.repository_up.get_or_create(&repository_label(name)).set(i64::from(*is_up));
        }
        self.snapshots.set(i64::try_from(gauges.snapshots).unwrap_or(i64::MAX));
        self.leftovers.set(i64::try_from(gauges.leftovers).unwrap_or(i64::MAX));
        self.resident_memory.set(resident_memory().unwrap_or(0));
        self.open_descriptors.set(fs::read_dir("/proc/self/fd").map_or(0, |fds| number(fds.count())));
    }
}

fn resident_memory() -> Option<i64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<i64>().ok().map(|kibibytes| kibibytes * 1024)
}

#[cfg(test)]
mod tests;
