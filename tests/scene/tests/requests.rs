//! Requests that are small on the wire and large in memory, and answers that clients do not read.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use cvmfs_snapshotter::proto::snapshots::UpdateSnapshotRequest;
use cvmfs_snapshotter::proto::snapshots::{Info, ListSnapshotsRequest, PrepareSnapshotRequest, StatSnapshotRequest};
use cvmfs_snapshotter::server::service;
use grpcio::RpcStatusCode as Code;
use grpcio::{CallOption, CompressionAlgorithms};
use protobuf::Message;
use protobuf::well_known_types::field_mask::FieldMask;
use scene::client::{call as call_with, connect_with, labels};
use scene::http2::{
    DATA, END_HEADERS, END_STREAM, HEADERS, PING, RawConnection, Sent, call, compressed_message, frame, header, message,
};
use scene::metrics::{find_sample, scrape};
use scene::process::{eventually, run};
use scene::resource_usage::{ResourceUsage, reset_peak};
use scene::snapshotter_fixture::{SnapshotterFixture, assert_refused};

/// Tolerated growth beside what is measured, in KiB.
const MARGIN: usize = 24 << 10;

/// A daemon, and its memory at rest.
struct Measured {
    d: SnapshotterFixture,
    at_rest: usize,
}

impl Measured {
    fn start(name: &str, config: &str) -> Self {
        let mut d = SnapshotterFixture::start(name, config);
        d.client.prepare("key", "", &[]).unwrap();
        let at_rest = ResourceUsage::read(d.snapshotter.server().pid()).memory;
        Self { d, at_rest }
    }

    /// The most memory in KiB by which the daemon exceeded its memory at rest during `attack`.
    fn growth(&mut self, what: &str, attack: impl FnOnce(&SnapshotterFixture)) -> usize {
        let pid = self.d.snapshotter.server().pid();
        reset_peak(pid);
        attack(&self.d);
        let grown = ResourceUsage::read(pid).peak.saturating_sub(self.at_rest);
        println!("{what}: {} MiB more than at rest", grown >> 10);
        grown
    }
}

/// gRPC's core decompressed a message before it checked the size: 611,530 bytes took 670 MiB.
#[test]
fn root_compressed_message_is_refused_and_not_inflated() {
    const INFLATED: usize = 670 << 20;
    let mut m = Measured::start("gzip", "");
    let file = m.d.sandbox.path("zeros.gz");
    run("sh", ["-c", &format!("head -c {INFLATED} /dev/zero | gzip > {}", file.display())]).ok();
    let compressed = fs::read(&file).unwrap();
    assert!(compressed.len() < 1 << 20, "{} bytes", compressed.len());
    let encoded = [call("Stat"), header("grpc-encoding", b"gzip")].concat();
    for (what, headers) in [("said to be compressed", encoded), ("not said to be", call("Stat"))] {
        let grown = m.growth(what, |d| {
            let mut raw = RawConnection::connect_with_preface(&d.snapshotter.socket());
            raw.upload(&headers, &compressed_message(&compressed), Duration::from_mins(1));
        });
        assert!(grown < MARGIN, "{} MiB for {} bytes", grown >> 10, compressed.len());
    }
    // A client that compresses its request gets an error that says so.
    let channel = connect_with(&m.d.snapshotter.socket(), |channel| {
        channel.default_compression_algorithm(CompressionAlgorithms::GRPC_COMPRESS_GZIP)
    });
    let request = StatSnapshotRequest { key: "k".repeat(10_000), ..StatSnapshotRequest::default() };
    let client = grpcio::Client::new(channel);
    let answer = call_with(&client, &service::STAT, &request, CallOption::default());
    let message = assert_refused(answer, Code::UNIMPLEMENTED);
    assert!(message.contains("Compression algorithm 'gzip' is disabled"), "{message}");
    // Other clients are served on their connections as before.
    m.d.client.stat("key").unwrap();
}

const SIZE: usize = 15 << 20;

/// Requests of 15 MiB that consist of fields of a few bytes.
fn requests_of_tiny_fields() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let tiny = (0..SIZE / 14).map(|n| (format!("{n:x}"), "v".to_owned())).collect();
    let prepare = PrepareSnapshotRequest { key: "new".to_owned(), labels: tiny, ..PrepareSnapshotRequest::default() };
    let filters = vec![String::new(); SIZE / 2];
    let list = ListSnapshotsRequest { filters, ..ListSnapshotsRequest::default() };
    let paths = vec![String::new(); SIZE / 2];
    let update = UpdateSnapshotRequest {
        info: Some(Info { name: "key".to_owned(), ..Info::default() }).into(),
        update_mask: Some(FieldMask { paths, ..FieldMask::default() }).into(),
        ..UpdateSnapshotRequest::default()
    };
    // Protobuf keeps unknown fields. These are the fields 2000, 2001, and so on, each with a number.
    let mut unknown = Vec::new();
    for field in 2_000..2_000 + u32::try_from(SIZE / 5).unwrap() {
        let mut tag = field << 3;
        while tag >= 128 {
            unknown.push(u8::try_from(tag & 127).unwrap() | 128);
            tag >>= 7;
        }
        unknown.extend([u8::try_from(tag).unwrap(), 0]);
    }
    let bytes = |request: &dyn protobuf::MessageDyn| request.write_to_bytes_dyn().unwrap();
    let all = vec![
        ("labels", "Prepare", bytes(&prepare)),
        ("filters", "List", bytes(&list)),
        ("paths", "Update", bytes(&update)),
        ("unknown fields", "Stat", unknown),
    ];
    assert!(all.iter().all(|(_, _, request)| (8 << 20..16 << 20).contains(&request.len())));
    all
}

/// The limit counted the size of a request on the wire. Decoded it took 13 to 16 times as much memory.
#[test]
fn root_requests_with_too_many_fields_are_refused_before_decoding() {
    let mut m = Measured::start("fields", "");
    for (what, method, request) in requests_of_tiny_fields() {
        let grown = m.growth(what, |d| {
            let mut raw = RawConnection::connect_with_preface(&d.snapshotter.socket());
            assert!(raw.upload(&call(method), &message(&request), Duration::from_mins(1)), "{what}");
        });
        // The limit covers the message and a copy of it.
        assert!(grown < MARGIN + 2 * (SIZE >> 10), "{what}: {} bytes take {} MiB", request.len(), grown >> 10);
    }
    // A client that sends such requests by mistake gets the reason.
    let d = &m.d;
    let names: Vec<String> = (0..1_100).map(|n| n.to_string()).collect();
    let with: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "v")).collect();
    let filters = vec!["name"; 1_100];
    for answer in [d.client.prepare("new", "", &with).map(drop), d.client.list(&filters).map(drop)] {
        let message = assert_refused(answer, Code::INVALID_ARGUMENT);
        assert!(message.contains("more than 1024 fields"), "{message}");
    }
    d.client.prepare("new", "", &with[..900]).unwrap();
    // Several updates cannot give a snapshot more labels.
    let add = |range: Range<usize>| {
        let paths: Vec<String> = names[range.clone()].iter().map(|name| format!("labels.{name}")).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        d.client.update(Info { name: "new".to_owned(), labels: labels(&with[range]), ..Info::default() }, &paths)
    };
    add(900..1_000).unwrap();
    let message = assert_refused(add(1_000..1_100), Code::INVALID_ARGUMENT);
    assert!(message.contains("1100 labels are too many for a snapshot, the limit is 1024"), "{message}");
}

/// A pattern of 240 KB took 513 MiB while it was compiled, and 32 of them at once 14 GiB.
#[test]
fn root_memory_of_lists_with_large_filters_is_bounded_in_total() {
    const AT_ONCE: usize = 32;
    /// Memory that all such lists together may take, in KiB.
    const LIMIT: usize = 192 << 10;
    let mut m = Measured::start("filters", "");
    let words = |count: usize| format!("name~=/{}/", r"\\w".repeat(count));
    for (what, at_once, filters, code) in [
        ("a pattern of 240 KB", 1, vec![words(80_000)], Code::INVALID_ARGUMENT),
        ("patterns of 240 KB", AT_ONCE, vec![words(80_000)], Code::INVALID_ARGUMENT),
        ("many selectors", AT_ONCE, vec!["a,".repeat(130_000) + "a"], Code::INVALID_ARGUMENT),
        ("long names of fields", AT_ONCE, vec!["a.".repeat(130_000) + "a"], Code::INVALID_ARGUMENT),
        ("many selectors in many filters", AT_ONCE, vec!["a,".repeat(140) + "a"; 900], Code::INVALID_ARGUMENT),
        ("as many selectors as may be", AT_ONCE, vec!["a,".repeat(500) + "a"; 2], Code::OK),
        ("32 patterns of 1 KiB each", AT_ONCE, vec![words(512); 32], Code::OK),
        ("patterns of 1 KiB", AT_ONCE, vec![words(512)], Code::OK),
    ] {
        let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
        let mut codes = Vec::new();
        let grown = m.growth(what, |d| {
            let list = || d.client.list(&filters).map_or_else(|status| status.code(), |_| Code::OK);
            std::thread::scope(|scope| {
                let lists: Vec<_> = (0..at_once).map(|_| scope.spawn(list)).collect();
                codes.extend(lists.into_iter().map(|list| list.join().unwrap()));
            });
        });
        assert!(grown < LIMIT + MARGIN, "{what}: {} MiB", grown >> 10);
        assert!(at_once > 1 || grown < MARGIN, "{what}: {} MiB", grown >> 10);
        codes.retain(|answer| *answer != Code::RESOURCE_EXHAUSTED);
        assert!(!codes.is_empty() && codes.iter().all(|answer| *answer == code), "{what}: {codes:?}");
    }
}

/// Answers of 1 MiB that were not read, a thousand on each connection, were not counted.
#[test]
fn root_memory_of_unread_responses_is_bounded_in_total() {
    const CALLS: usize = 1_000;
    /// The limit of 192 MiB, in KiB.
    const LIMIT: usize = 320 << 10;
    let dir = PathBuf::from(format!("/run/scene-answers-{}", std::process::id()));
    let metrics = dir.join("m.sock");
    let mut m = Measured::start("answers", &format!("metrics-address = {metrics:?}"));
    let (pid, at_rest) = (m.d.snapshotter.server().pid(), m.at_rest);
    let value = "x".repeat((1 << 20) - 100);
    m.d.client.prepare("large", "", &[("l", &value)]).unwrap();
    let request = StatSnapshotRequest { key: "large".to_owned(), ..StatSnapshotRequest::default() };
    let request = message(&request.write_to_bytes().unwrap());
    let calls: Vec<u8> = (0..u32::try_from(CALLS).unwrap())
        .flat_map(|n| {
            let stream = 2 * n + 1;
            [frame(HEADERS, END_HEADERS, stream, &call("Stat")), frame(DATA, END_STREAM, stream, &request)].concat()
        })
        .collect();
    let count_refused = || {
        let name = "call_duration_seconds_count{method=\"Stat\",code=\"RESOURCE_EXHAUSTED\"}";
        usize::try_from(find_sample(&scrape(&metrics), name).unwrap_or(0)).unwrap()
    };
    let grown = m.growth("answers", |d| {
        let mut raw = RawConnection::connect_with_preface(&d.snapshotter.socket());
        assert_eq!(raw.send(&calls, Duration::from_mins(1)), Sent::All);
        eventually("all are answered, most of them with a refusal", || {
            count_refused() > CALLS * 3 / 4 || ResourceUsage::read(pid).peak > at_rest + LIMIT
        });
        // Other clients are served.
        d.client.stat("key").unwrap();
        drop(raw);
    });
    assert!(grown < LIMIT, "{} MiB", grown >> 10);
    eventually("there is room again", || m.d.client.stat("large").is_ok());
    fs::remove_dir_all(&dir).unwrap();
}

/// gRPC held one of 1,024 slots for each call until its message had come, for all clients together: a client that began
/// as many calls without a message blocked the daemon.
#[test]
fn root_calls_without_a_message_do_not_block_other_clients() {
    const CONNECTIONS: usize = 4;
    const CALLS: u32 = 1_000;
    let d = SnapshotterFixture::start("begun", "");
    d.client.prepare("key", "", &[]).unwrap();
    let begin =
        |n: u32| frame(HEADERS, END_HEADERS, 2 * n + 1, &call(if n.is_multiple_of(2) { "Stat" } else { "List" }));
    let calls: Vec<u8> = (0..CALLS).flat_map(begin).collect();
    let mut connections: Vec<RawConnection> = (0..CONNECTIONS)
        .map(|_| {
            let mut raw = RawConnection::connect_with_preface(&d.snapshotter.socket());
            assert_eq!(raw.send(&calls, Duration::from_mins(1)), Sent::All);
            raw
        })
        .collect();
    // The answer to a ping shows that gRPC has read everything before it.
    for raw in &mut connections {
        raw.send(&frame(PING, 0, 0, &[0; 8]), Duration::from_mins(1));
        assert!(raw.receives(PING, Duration::from_mins(1)));
    }
    for client in [d.client.clone(), d.snapshotter.client()] {
        client.stat("key").unwrap();
        assert_eq!(client.list(&[]).unwrap().len(), 1);
    }
    // Calls whose messages come later are answered.
    let request = StatSnapshotRequest { key: "key".to_owned(), ..StatSnapshotRequest::default() };
    let request = message(&request.write_to_bytes().unwrap());
    connections[0].send(&frame(DATA, END_STREAM, 1, &request), Duration::from_mins(1));
    assert!(connections[0].receives(HEADERS, Duration::from_mins(1)));
    // A call without a message is refused, and its connection stays open.
    connections[0].send(&frame(DATA, END_STREAM, 5, &[]), Duration::from_mins(1));
    assert!(connections[0].receives(HEADERS, Duration::from_mins(1)));
    drop(connections);
    d.client.stat("key").unwrap();
}
