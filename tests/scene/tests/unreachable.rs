//! A repository whose client runs while its server cannot be reached: cached files are served, and all other reads fail
//! with an input/output error.

use std::fs;
use std::path::{Path, PathBuf};

use scene::doctor;
use scene::e2e_fixture::E2eFixture;
use scene::metrics::{sample, scrape};
use scene::process::eventually;
use scene::publisher::{NAME, Repository, Settings};
use scene::sandbox::Sandbox;
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::{SnapshotterFixture, assert_unavailable_with_advice, digest, pull_chain};
use serde_json::Value;

const SENTENCE: &str = "the repository's server cannot be reached";
const WAITS: &str = "repository_wait_seconds_count{repository=\"scene.test\"}";
const UP: &str = "repository_up{repository=\"scene.test\"}";
const OUTAGES: &str = "repository_server_outages_total{repository=\"scene.test\"}";

/// The repository in `status --json`.
fn status(snapshotter: &Snapshotter) -> Value {
    let output = snapshotter.admin(&["status", "--json"]);
    let report: Value = serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", output.stderr));
    report["repositories"][0].clone()
}

/// The doctor's finding about the server: its state and its text.
fn diagnosis(snapshotter: &Snapshotter) -> Option<(String, String)> {
    let found = doctor::read(&snapshotter.admin(&["doctor", "--json"]));
    let finding = found.into_iter().find(|one| one.check == "repository.server")?;
    Some((finding.state, finding.what))
}

/// `text` says what is wrong, and whom the client asks.
#[track_caller]
fn names_server(text: &str, url: &str) {
    for part in [SENTENCE, url, "DIRECT"] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
}

fn everybody_says_it(stage: &E2eFixture, socket: &Path, url: &str) {
    let metrics = scrape(socket);
    assert_eq!((sample(&metrics, UP), sample(&metrics, OUTAGES)), (0, 1));
    assert!(!stage.snapshotter.client().is_serving(NAME));
    assert!(stage.snapshotter.client().is_serving(""), "others are served");
    let said = status(&stage.snapshotter);
    assert_eq!(said["answers"], false);
    names_server(said["trouble"].as_str().unwrap_or_default(), url);
    assert_eq!(
        (&said["server_unreachable"]["host"], &said["server_unreachable"]["proxy"]),
        (&url.into(), &"DIRECT".into())
    );
    assert!(said["server_unreachable"]["since"].as_i64().is_some_and(|since| since > 0), "{said}");
    names_server(&stage.snapshotter.admin(&["status"]).stdout, url);
    let (state, what) = diagnosis(&stage.snapshotter).expect("the doctor has seen it");
    assert_eq!(state, "problem");
    names_server(&what, url);
    let text = stage.snapshotter.admin(&["doctor"]).stdout;
    names_server(&text, url);
    assert!(text.contains("cvmfs_talk -i scene.test"), "{text}");
}

/// A pull waited for one layer after the other, without a message.
#[test]
fn root_unreachable_server_is_reported_everywhere_and_delays_a_pull_once() {
    let socket = PathBuf::from(format!("/run/scene-unreachable-{}.sock", std::process::id()));
    let publisher = |dir: &Path| Repository::mounted_with(dir, Settings::with_client(&["--retry-delay", "300"]));
    let stage = E2eFixture::start_with_repository("unreachable", &format!("metrics-address = {socket:?}"), publisher);
    let cached = stage.shell_image("cached:1", "cached");
    let uncached = stage.shell_image("uncached:1", "uncached");
    let layer = |n| {
        stage.builder.layer(|l| {
            l.file(format!("file-{n}"), "five");
        })
    };
    let layers: Vec<_> = (0..5).map(layer).collect();
    let five = stage.builder.image("five:1", &layers, &[]);
    let [of_cached, of_uncached, of_five] = [&cached, &uncached, &five].map(|image| stage.publish_and_push(image));
    stage.ours.pull(&of_cached);
    stage.ours.pull(&of_uncached);
    let cat = ["/bin/cat", "/data/text"];
    for (reference, text) in [(&of_cached, "cached"), (&of_uncached, "uncached")] {
        assert_eq!(stage.ours.run(reference, text, &cat).ok(), text);
    }
    stage.repository.mount_cold();
    assert_eq!(stage.ours.run(&of_cached, "warm", &cat).ok(), "cached");
    let url = xattr::get(stage.repository.dir(), "user.host").expect("the client answers").expect("it has a server");
    let url = String::from_utf8(url).expect("it is text");
    assert!(stage.snapshotter.client().is_serving(NAME));

    stage.repository.stop_server();
    let before = (sample(&scrape(&socket), WAITS), stage.registry.fetched());
    stage.ours.pull(&of_five);
    let metrics = scrape(&socket);
    assert_eq!(sample(&metrics, WAITS) - before.0, 1, "the pull asked for one layer");
    assert_eq!(sample(&metrics, "layers_downloaded_total{reason=\"server_unreachable\"}"), 5);
    assert_eq!(stage.registry.fetched().since(&before.1).layers_of(&five), 5);
    everybody_says_it(&stage, &socket, &url);
    let failed = stage.ours.run(&of_uncached, "uncached", &cat);
    assert!(failed.stderr.contains("is not available"), "{}", failed.stderr);
    names_server(&failed.stderr, &url);
    assert_eq!(stage.ours.run(&of_cached, "goes-on", &cat).ok(), "cached");

    stage.repository.start_server();
    eventually("the server is found to be there again", || stage.snapshotter.client().is_serving(NAME));
    assert_eq!(stage.ours.run(&of_uncached, "again", &cat).ok(), "uncached");
    let said = status(&stage.snapshotter);
    assert_eq!(
        (&said["answers"], &said["server_unreachable"], &said["client_io_errors"]),
        (&true.into(), &Value::Null, &Value::Null)
    );
    assert_eq!(diagnosis(&stage.snapshotter), None);
    assert_eq!(sample(&scrape(&socket), UP), 1);
    let log = stage.snapshotter.log();
    for (line, times) in [("repository_server_unreachable", 1), ("repository_server_reachable", 1)] {
        assert_eq!(log.matches(line).count(), times, "{line}");
    }
}

/// The daemon reads nothing at that time, so it does not meet the error itself.
#[test]
fn root_read_errors_of_containers_are_reported_from_client_counters() {
    let d = SnapshotterFixture::start("counters", "");
    let chain = pull_chain(&d.client);
    d.client.prepare("running", &chain, &[]).expect("the repository answers");
    assert_eq!(status(&d.snapshotter)["client_io_errors"], Value::Null);
    d.repository.stop_server();
    let file =
        d.repository.dir().join(".layers/01").join(digest(1).trim_start_matches("sha256:")).join("layerfs/dir/file-1");
    fs::read(file).expect_err("its content is not cached");
    let said = status(&d.snapshotter);
    assert_eq!((&said["answers"], &said["server_unreachable"]), (&true.into(), &Value::Null));
    let errors = &said["client_io_errors"];
    assert!(errors["count"].as_u64().is_some_and(|count| count > 0), "{said}");
    assert!(errors["last"].as_i64().is_some_and(|last| last > 1_700_000_000), "{said}");
    assert!(errors["host"].as_str().is_some_and(|host| host.starts_with("http://127.0.0.1")), "{said}");
    let text = d.snapshotter.admin(&["status"]).stdout;
    assert!(text.contains("input/output error"), "{text}");
    let (state, what) = diagnosis(&d.snapshotter).expect("the doctor has seen it");
    assert_eq!(state, "warning");
    names_server(&what, "http://127.0.0.1");
}

/// A damaged file must not affect containers that do not use it.
#[test]
fn root_unreadable_layer_does_not_block_containers_on_other_layers() {
    let sandbox = Sandbox::enter("damaged");
    // The kernel caches nothing.
    let repository = Repository::mounted_with(&sandbox.path("cvmfs"), Settings::with_client(&["--ttl", "0"]));
    for n in [1, 2] {
        fs::create_dir_all(repository.layer_dir(&digest(n)).join("layerfs/dir")).expect("a layer can be made");
    }
    repository.commit();
    let snapshotter = Snapshotter::start(&sandbox.path("s"), repository.dir(), "");
    let c = snapshotter.client();
    let good = c.pull_remote("extract-1", "", "sha256:c1", &digest(1));
    let bad = c.pull_remote("extract-2", "", "sha256:c2", &digest(2));
    for (key, layer) in [("good", &good), ("bad", &bad)] {
        c.prepare(key, layer, &[]).expect("the repository answers");
    }
    repository.command("fail EIO");
    let message = assert_unavailable_with_advice(c.prepare("bad-again", &bad, &[]));
    assert!(message.contains(SENTENCE), "{message}");
    assert!(!c.is_serving(NAME));
    repository.command("normal");
    // The call does not wait for the next probe of the layer that failed.
    c.prepare("good-again", &good, &[]).expect("it is asked for");
    eventually("all is well again", || c.is_serving(NAME));
}
