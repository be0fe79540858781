//! Requests that are small on the wire and large in memory.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use cvmfs_snapshotter::proto::snapshots::StatSnapshotRequest;
use cvmfs_snapshotter::server::service;
use grpcio::RpcStatusCode as Code;
use grpcio::{CallOption, CompressionAlgorithms};
use scene::alone::{Alone, refused};
use scene::client::{call as call_with, connect_as};
use scene::footprint::{Footprint, forget_peak};
use scene::process::run;
use scene::wire::{Raw, call, compressed_message, header};

/// What memory may come and go by besides, in KiB.
const MARGIN: usize = 24 << 10;

/// A daemon, and what it takes at rest.
struct Measured {
    d: Alone,
    at_rest: usize,
}

impl Measured {
    fn start(name: &str, config: &str) -> Self {
        let mut d = Alone::start(name, config);
        d.client.prepare("key", "", &[]).unwrap();
        let at_rest = Footprint::of(d.snapshotter.server().pid()).memory;
        Self { d, at_rest }
    }

    /// By how many KiB the daemon was larger than at rest while `attack` went on, at most.
    fn growth(&mut self, what: &str, attack: impl FnOnce(&Alone)) -> usize {
        let pid = self.d.snapshotter.server().pid();
        forget_peak(pid);
        attack(&self.d);
        let grown = Footprint::of(pid).peak.saturating_sub(self.at_rest);
        println!("{what}: {} MiB more than at rest", grown >> 10);
        grown
    }
}

/// gRPC's core inflated whatever came, and looked at its size then: 611,530 bytes took 670 MiB.
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
            let mut raw = Raw::greeted(&d.snapshotter.socket());
            raw.upload(&headers, &compressed_message(&compressed), Duration::from_mins(1));
        });
        assert!(grown < MARGIN, "{} MiB for {} bytes", grown >> 10, compressed.len());
    }
    // Whoever compresses is told so.
    let channel = connect_as(&m.d.snapshotter.socket(), |channel| {
        channel.default_compression_algorithm(CompressionAlgorithms::GRPC_COMPRESS_GZIP)
    });
    let request = StatSnapshotRequest { key: "k".repeat(10_000), ..StatSnapshotRequest::default() };
    let client = grpcio::Client::new(channel);
    let answer = call_with(&client, &service::STAT, &request, CallOption::default());
    let message = refused(answer, Code::UNIMPLEMENTED);
    assert!(message.contains("Compression algorithm 'gzip' is disabled"), "{message}");
    // Others are served as ever, on the connections that they have.
    m.d.client.stat("key").unwrap();
}
