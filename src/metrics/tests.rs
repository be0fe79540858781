use std::collections::BTreeSet;

use super::*;

/// The names behind `prefix`, in the text of a scrape or in the tables of the documentation.
fn names(text: &str, prefix: &str) -> BTreeSet<String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix(prefix));
    lines.filter_map(|rest| rest.split([' ', '`']).next()).map(str::to_owned).collect()
}

#[test]
fn documentation_lists_exactly_the_metrics() {
    let metrics = Metrics::new();
    metrics.record_call("/containerd.services.snapshots.v1.Snapshots/Stat", "OK", Duration::ZERO);
    metrics.init_method("Stat");
    metrics.init_repository("a.test");
    let pools = vec![("worker", PoolState::default())];
    let text = metrics.text(&Gauges { pools, repositories: vec![("a.test".to_owned(), true)], ..Gauges::default() });
    let text = text.unwrap();
    let documented = include_str!("../../docs/metrics.md");
    assert_eq!(names(documented, "| `cvmfs_snapshotter_"), names(&text, "# HELP cvmfs_snapshotter_"));
    assert!(text.contains("cvmfs_snapshotter_call_duration_seconds_count{method=\"Stat\",code=\"OK\"} 1\n"), "{text}");
}

/// Prometheus computes a rate only from the second sample of a counter on, so the first failure needs a sample of 0 before.
#[test]
fn failed_calls_are_counted_from_zero() {
    let metrics = Metrics::new();
    let count = |code: &str| {
        let text = metrics.text(&Gauges::default()).unwrap();
        let sample = format!("cvmfs_snapshotter_calls_failed_total{{method=\"Stat\",code=\"{code}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&sample)).map(str::to_owned)
    };
    metrics.init_method("/containerd.services.snapshots.v1.Snapshots/Stat");
    assert_eq!(count("INTERNAL").as_deref(), Some("0"));
    for code in ["INTERNAL", "NOT_FOUND"] {
        metrics.record_call("/containerd.services.snapshots.v1.Snapshots/Stat", code, Duration::ZERO);
    }
    assert_eq!(["INTERNAL", "UNAVAILABLE"].map(count).map(Option::unwrap), ["1", "0"]);
    assert_eq!(count("NOT_FOUND"), None);
}

#[test]
fn scrape_shows_current_states() {
    let metrics = Metrics::new();
    let pool = PoolState { threads: 4, busy: 2, waiting: 1, max_waiting: 9 };
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
