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
        assert!(Instant::now() < until, "it did not happen in time that {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn path_that_failed_last_is_probed_until_it_is_answered_with_anything_but_eio() {
    let probed = Arc::new(Mutex::new(Vec::new()));
    let recorded = Arc::clone(&probed);
    let probe = move |path: &Path| {
        let mut probed = recorded.lock();
        probed.push(path.to_owned());
        // The client may die meanwhile, and be mounted anew.
        let errno = [Errno::EIO, Errno::ENOTCONN].get(probed.len() - 1).copied().unwrap_or(Errno::ENOENT);
        ProbeResult { result: Err(system::Error { call: "open", path: path.to_owned(), errno }), io_errors: 7 }
    };
    let health = ServerHealth::new("r", &ThreadBudget::new(4, 0), Box::new(probe));
    assert_eq!((health.outage(), health.refusal_of_pulls()), (None, None));
    let first = health.report_error("a".into(), failure("/r/a"), server());
    let second = health.report_error("b".into(), failure("/r/b"), server());
    assert_eq!((second.since, second.begun), (first.since, first.begun), "it is one outage");
    assert_eq!(health.refusal_of_pulls(), Some(second.clone()));
    let text = second.to_string();
    for part in ["the repository's server cannot be reached", "http://s1.example.org", "DIRECT", "/r/b"] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
    wait_until("the outage ends", || health.outage().is_none());
    assert_eq!(*probed.lock(), [Path::new("b"); 3]);
    let errors = |count| IoErrors { count, last: Timestamp(0), server: server() };
    assert_eq!((health.unexplained(errors(7)), health.unexplained(errors(8))), (None, Some(errors(8))));
}

#[test]
fn one_thread_probes_and_ends_when_the_mount_is_replaced() {
    let threads = ThreadBudget::new(1, 0);
    let probes = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&probes);
    let probe = move |path: &Path| {
        counter.fetch_add(1, Ordering::SeqCst);
        ProbeResult { result: Err(failure(&path.display().to_string())), io_errors: 0 }
    };
    let health = ServerHealth::new("r", &threads, Box::new(probe));
    for n in 0..10 {
        health.report_error(n.to_string().into(), failure("/r/n"), server());
    }
    assert!(threads.acquire().is_none(), "the thread is counted");
    wait_until("it probes", || probes.load(Ordering::SeqCst) > 0);
    health.close();
    wait_until("it ends", || threads.acquire().is_some());
    assert!(health.outage().is_some());
}
