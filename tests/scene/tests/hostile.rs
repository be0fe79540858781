//! Hostile clients: arbitrary requests, and bytes that are not gRPC or not HTTP/2. Other clients do not wait, no resource
//! leaks, and the daemon works afterwards as before.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cvmfs_snapshotter::proto::snapshots::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, PrepareSnapshotRequest, StatSnapshotRequest,
    UpdateSnapshotRequest,
};
use futures_util::{StreamExt, TryStreamExt, future, stream};
use grpcio::RpcStatusCode as Code;
use grpcio::{CallOption, GrpcSlice, Marshaller, MessageReader, Method, MethodType};
use nix::sys::signal::Signal;
use protobuf::Message;
use protobuf::well_known_types::field_mask::FieldMask;
use scene::client::{IMAGE_REF, LAYER_DIGEST, REF, connect, labels};
use scene::http2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PREFACE, RST_STREAM, RawConnection, SETTINGS, Sent,
    call, frame, header, message,
};
use scene::process::{SetOnDrop, eventually};
use scene::random::Random;
use scene::resource_usage::{ResourceUsage, reset_peak};
use scene::snapshotter_fixture::{SnapshotterFixture, assert_refused, digest, pull_chain};

/// The number of requests. The long form sets it: `HOSTILE_REQUESTS=1000000 cargo test -p scene --test hostile`.
const REQUESTS: usize = 200_000;
const AT_ONCE: usize = 64;
const CLIENTS: usize = 4;
/// Tolerated growth in KiB, for the caches of the store and of the allocator, which has one for each thread.
const MARGIN: usize = 24 << 10;
/// Memory that an attack may make gRPC hold, in KiB.
const ATTACK_MEMORY: usize = 64 << 10;
/// Memory of a call that waits in gRPC, in KiB, including what the allocator does not return.
const CALL_MEMORY: usize = 32;
/// The number of rounds of cancelled calls. The memory of the first round must suffice for the others.
const ROUNDS: usize = 3;

// grpcio wants results of both.
#[allow(clippy::unnecessary_wraps)]
fn raw_write(bytes: &Vec<u8>, out: &mut GrpcSlice) -> grpcio::Result<()> {
    *out = GrpcSlice::from(bytes.as_slice());
    Ok(())
}

#[allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)]
fn raw_read(mut reader: MessageReader) -> grpcio::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
    Ok(bytes)
}

/// A method whose messages are bytes.
const fn raw(name: &'static str) -> Method<Vec<u8>, Vec<u8>> {
    let mar = Marshaller { ser: raw_write, de: raw_read };
    Method { ty: MethodType::Unary, name, req_mar: mar, resp_mar: Marshaller { ser: raw_write, de: raw_read } }
}

macro_rules! raw_methods {
    ($($name:literal)*) => { [$(raw(concat!("/containerd.services.snapshots.v1.Snapshots/", $name))),*] };
}

/// The ten methods of the service, and two that do not exist.
const METHODS: [Method<Vec<u8>, Vec<u8>>; 12] = raw_methods![
    "Prepare" "View" "Mounts" "Commit" "Remove" "Stat" "Update" "List" "Usage" "Cleanup" "Nothing" "../Prepare"
];
const LIST: usize = 7;

/// Random parts of requests.
struct RequestGenerator(Random);

impl RequestGenerator {
    fn new(seed: u64) -> Self {
        Self(Random::new(seed, 0))
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0.below(limit)
    }

    fn choose<'t>(&mut self, texts: &[&'t str]) -> &'t str {
        texts[self.below(texts.len())]
    }

    /// A random text, for a key, a label or another field.
    fn text(&mut self) -> String {
        const ODD: [&str; 16] = [
            "",
            "..",
            "../../../etc/passwd",
            "/",
            "a\0b",
            "line\nbreak",
            "\u{1b}[2J",
            ".wh..wh..opq",
            "fs",
            "\u{202e}é",
            "cvmfs/0/sha256:c1",
            "cvmfs/1/sha256:c2",
            "{\"level\":\"panic\"}",
            "labels",
            "sha256:../../x",
            "\"\\u",
        ];
        match self.below(40) {
            0 => "k".repeat([1_000, 32_768, 32_769][self.below(3)]),
            1 => "../".repeat(1_000),
            2..20 => self.choose(&ODD).to_owned(),
            n => format!("key-{}", n % 8),
        }
    }

    fn request(&mut self, method: usize) -> Vec<u8> {
        let (key, parent, name) = (self.text(), self.text(), self.text());
        let mut with = labels(&[(&self.text(), &self.text())]);
        if self.below(4) == 0 {
            let digests = [digest(1), digest(9), self.text()];
            with.extend(labels(&[(REF, &self.text()), (LAYER_DIGEST, &digests[self.below(3)]), (IMAGE_REF, &name)]));
        }
        let uid = self.choose(&["0:1:1", "0:4294967295:1", "-1:0:0", "::", "0:0:1,0:1:1"]);
        with.extend(labels(&[("containerd.io/snapshot/uidmapping", uid)]));
        let written = match method {
            // Other tests make snapshots; most Prepares here use existing parents.
            0 | 1 => {
                let parent = if self.below(3) == 0 { String::new() } else { parent };
                PrepareSnapshotRequest { key, parent, labels: with, ..Default::default() }.write_to_bytes()
            }
            3 => CommitSnapshotRequest { key, name, parent, labels: with, ..Default::default() }.write_to_bytes(),
            6 => {
                let info = Info { name: key, parent, labels: with, ..Info::default() };
                let paths = ["labels", "labels.a", "name", "labels.", "../labels"];
                let paths = (0..self.below(3)).map(|_| self.choose(&paths).to_owned()).collect();
                let update_mask = Some(FieldMask { paths, ..FieldMask::default() }).into();
                UpdateSnapshotRequest { info: Some(info).into(), update_mask, ..Default::default() }.write_to_bytes()
            }
            LIST => {
                let operator = self.choose(&["==", "!=", "~=", "", "=", "~"]);
                let field = self.choose(&["name", "parent", "labels.\"a\"", "kind", "labels.", "\0", "\"\\xff\""]);
                let filters = (0..=self.below(3)).map(|_| format!("{field}{operator}{:?}", self.text())).collect();
                ListSnapshotsRequest { filters, ..Default::default() }.write_to_bytes()
            }
            _ => StatSnapshotRequest { key, ..Default::default() }.write_to_bytes(),
        };
        let mut bytes = written.unwrap();
        match self.below(4) {
            // A valid message in which a few bytes are changed.
            0 if !bytes.is_empty() => {
                for _ in 0..=self.below(4) {
                    let at = self.below(bytes.len());
                    bytes[at] = self.0.byte();
                }
                bytes.truncate(1 + self.below(bytes.len()));
            }
            // Random bytes.
            1 => bytes = (0..self.below(300)).map(|_| self.0.byte()).collect(),
            _ => {}
        }
        bytes
    }
}

/// Sends `count` requests, some concurrently. The result is the number of answers with each code.
fn storm(socket: &Path, seed: u64, count: usize) -> BTreeMap<String, usize> {
    let channel = connect(socket);
    let client = grpcio::Client::new(channel);
    let mut random = RequestGenerator::new(seed);
    let mut codes = BTreeMap::new();
    let calls = stream::iter(0..count).map(|_| {
        let method = random.below(METHODS.len());
        let request = random.request(method);
        let option = CallOption::default().timeout(Duration::from_mins(2));
        // The answer of a unary call is a stream of one message.
        let answer = client.server_streaming(&METHODS[method], &request, option).unwrap();
        async move {
            match answer.try_for_each(|_| future::ready(Ok(()))).await {
                Ok(()) => Code::OK.to_string(),
                Err(grpcio::Error::RpcFailure(status)) => status.code().to_string(),
                Err(other) => format!("{other:?}"),
            }
        }
    });
    let mut answers = calls.buffer_unordered(AT_ONCE);
    futures_executor::block_on(async {
        while let Some(code) = answers.next().await {
            *codes.entry(code).or_insert(0) += 1;
        }
    });
    codes
}

fn requests() -> usize {
    std::env::var("HOSTILE_REQUESTS").map_or(REQUESTS, |text| text.parse().unwrap())
}

type Codes = BTreeMap<String, usize>;

/// Sends requests from all clients at once.
fn storms(socket: &Path, seed: u64, count: usize) -> Codes {
    let mut all = Codes::new();
    std::thread::scope(|scope| {
        let seeds = (0..CLIENTS as u64).map(|client| seed * 1_000 + client);
        let threads: Vec<_> = seeds.map(|seed| scope.spawn(move || storm(socket, seed, count / CLIENTS))).collect();
        for thread in threads {
            for (code, count) in thread.join().unwrap() {
                *all.entry(code).or_insert(0) += count;
            }
        }
    });
    all
}

#[test]
fn root_arbitrary_requests_leak_nothing_and_keep_the_daemon_working() {
    let mut d = SnapshotterFixture::start("storm", "");
    let requests = requests();
    pull_chain(&d.client);
    let socket = d.snapshotter.socket();
    let pid = d.snapshotter.server().pid();
    // The first requests make threads and fill caches.
    storms(&socket, 1, requests / 20);
    let before = ResourceUsage::read(pid);
    let begun = Instant::now();
    let mut codes = storms(&socket, 2, requests / 2);
    let between = ResourceUsage::read(pid);
    for (code, count) in storms(&socket, 3, requests / 2) {
        *codes.entry(code).or_insert(0) += count;
    }
    let after = ResourceUsage::read(pid);
    scene::report::print(format_args!(
        "{requests} requests in {:?}: {codes:?}\n{before:?}\n{between:?}\n{after:?}",
        begun.elapsed()
    ));
    assert!(after.memory <= between.memory + MARGIN, "memory grows: {between:?}, then {after:?}");
    eventually("connections and threads are gone", || {
        let now = ResourceUsage::read(pid);
        now.files <= before.files && now.threads <= before.threads
    });
    // Every expected kind of answer occurred, and none that reports an internal error.
    let answers = |code: Code| codes.get(&code.to_string()).copied().unwrap_or(0);
    for code in [Code::OK, Code::INVALID_ARGUMENT, Code::NOT_FOUND, Code::ALREADY_EXISTS, Code::UNIMPLEMENTED] {
        assert!(answers(code) > requests / 1_000, "{code}: {codes:?}");
    }
    as_before(&mut d);
}

/// Asserts that the daemon works as before, and that its log reports no bug.
fn as_before(d: &mut SnapshotterFixture) {
    d.client.prepare("still here", "", &[]).unwrap();
    d.client.commit("still there", "still here", &[("a", "1")]).unwrap();
    d.client.view("looked at", "still there", &[]).unwrap();
    assert_eq!(d.client.list(&["labels.a==1,name~=there"]).unwrap().len(), 1);
    assert_refused(d.client.remove("still there"), Code::FAILED_PRECONDITION);
    // Everything can be removed, whatever its name.
    loop {
        let all = d.client.list(&[]).unwrap();
        let removed = all.iter().filter(|one| d.client.remove(&one.name).is_ok()).count();
        if all.is_empty() {
            break;
        }
        assert!(removed > 0, "{} snapshots cannot be removed", all.len());
    }
    d.client.cleanup().unwrap();
    assert_eq!(scene::e2e_fixture::names(&d.snapshotter.snapshots()), Vec::<String>::new());
    let log = d.snapshotter.log();
    assert!(!log.contains("panicked at") && !log.contains("a bug in"), "{log}");
    assert!(d.snapshotter.end(Signal::SIGTERM).success());
}

/// Every line of the log is one JSON object, whatever keys, labels and filters contain.
#[test]
fn root_client_strings_cannot_break_log_lines() {
    let d = SnapshotterFixture::start("log", "");
    storms(&d.snapshotter.socket(), 4, 2_000);
    let log = d.snapshotter.log();
    for line in log.lines() {
        let parsed: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(parsed.is_object() && !line.contains(char::is_control), "{line}");
        assert!(line.len() < 4_000, "{} bytes: {line}", line.len());
    }
    assert!(log.lines().count() > 500, "hardly anything was logged");
}

const SOON: Duration = Duration::from_secs(5);

/// An attack on a socket.
type Attack = (&'static str, fn(&Path));

const ATTACKS: [Attack; 11] = [
    ("bytes that are no HTTP", |socket| {
        let mut random = Random::new(1, 0);
        for length in 0..300 {
            let bytes: Vec<u8> = (0..length * 7).map(|_| random.byte()).collect();
            RawConnection::connect(socket).send(&bytes, SOON);
        }
        RawConnection::connect(socket).send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", SOON);
    }),
    ("half a preface, and silence", |socket| {
        let mut open: Vec<RawConnection> = (0..100).map(|_| RawConnection::connect(socket)).collect();
        for (n, raw) in open.iter_mut().enumerate() {
            raw.send(&PREFACE[..n % PREFACE.len()], SOON);
        }
        std::thread::sleep(Duration::from_millis(500));
    }),
    ("a preface, and silence", |socket| {
        let open: Vec<RawConnection> = (0..100).map(|_| RawConnection::connect_with_preface(socket)).collect();
        std::thread::sleep(Duration::from_millis(500));
        drop(open);
    }),
    ("connections that close at once", |socket| {
        for _ in 0..5_000 {
            drop(RawConnection::connect(socket));
        }
    }),
    ("floods of SETTINGS whose answers are not read", |socket| {
        flood(socket, &frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 1]), 500_000);
    }),
    // gRPC kept 8 KiB for each frame until it closed the connection: 8.5 GiB with 126 connections.
    ("floods of PINGs whose answers are not read", |socket| flood(socket, &frame(PING, 0, 0, &[7; 8]), 500_000)),
    ("a flood of PINGs", |socket| {
        RawConnection::connect_with_preface(socket)
            .send_while_reading(&frame(PING, 0, 0, &[7; 8]).repeat(500_000), SOON);
    }),
    ("headers without an end", |socket| {
        let mut raw = RawConnection::connect_with_preface(socket);
        let more = header("x-more", &[b'v'; 16_000]);
        let begun = frame(HEADERS, 0, 1, &call("Stat"));
        let sent = raw.send_while_reading(&[begun, frame(CONTINUATION, 0, 1, &more).repeat(8_000)].concat(), SOON);
        assert!(matches!(sent, Sent::Closed(_) | Sent::All), "{sent:?}");
    }),
    ("empty headers without an end", |socket| {
        let begun = frame(HEADERS, 0, 1, &call("Stat"));
        RawConnection::connect_with_preface(socket)
            .send_while_reading(&[begun, frame(CONTINUATION, 0, 1, &[]).repeat(1_000_000)].concat(), SOON);
    }),
    ("a header of 32 MiB", |socket| {
        let headers = [call("Stat"), header("x-long", &vec![b'v'; 32 << 20])].concat();
        let mut frames = Vec::new();
        for (n, part) in headers.chunks(16_000).enumerate() {
            frames.extend(frame(if n == 0 { HEADERS } else { CONTINUATION }, 0, 1, part));
        }
        RawConnection::connect_with_preface(socket).send_while_reading(&frames, SOON);
    }),
    ("a message of 4 GiB, by its length", |socket| {
        let claimed = [&[0, 255, 255, 255, 255][..], &[1; 16_000]].concat();
        let begun = frame(HEADERS, END_HEADERS, 1, &call("Prepare"));
        RawConnection::connect_with_preface(socket)
            .send_while_reading(&[begun, frame(DATA, 0, 1, &claimed).repeat(2_000)].concat(), SOON);
    }),
];

/// Sends the same bytes again and again on some connections, without reading the answers.
fn flood(socket: &Path, frame: &[u8], count: usize) {
    let frames = frame.repeat(count);
    let mut raws: Vec<RawConnection> = (0..8).map(|_| RawConnection::connect_with_preface(socket)).collect();
    let sent: Vec<Sent> = raws.iter_mut().map(|raw| raw.send(&frames, Duration::from_millis(500))).collect();
    eprintln!("    {sent:?} of {}", frames.len());
}

/// Opens calls and cancels each at once.
fn reset(socket: &Path, count: usize, opened: &[u8]) {
    let taken_back = frame(RST_STREAM, 0, 0, &[0, 0, 0, 8]);
    let frames: Vec<u8> = (0..u32::try_from(count).unwrap())
        .flat_map(|n| for_stream(&[opened, &taken_back].concat(), 2 * n + 1))
        .collect();
    assert_eq!(
        RawConnection::connect_with_preface(socket).send_while_reading(&frames, Duration::from_mins(1)),
        Sent::All
    );
}

/// Frames of stream 0, for another one.
fn for_stream(frames: &[u8], stream: u32) -> Vec<u8> {
    let mut all = frames.to_vec();
    let mut at = 0;
    while at < all.len() {
        let length = usize::from(all[at]) << 16 | usize::from(all[at + 1]) << 8 | usize::from(all[at + 2]);
        all[at + 5..at + 9].copy_from_slice(&stream.to_be_bytes());
        at += 9 + length;
    }
    all
}

/// Makes an attack while another client is served.
fn beside_a_witness<T>(d: &SnapshotterFixture, attack: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let witness = scope.spawn(|| {
            let client = d.snapshotter.client();
            let mut worst = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                client.stat("witness").unwrap();
                worst = worst.max(begun.elapsed());
                std::thread::sleep(Duration::from_millis(5));
            }
            worst
        });
        let set_stop = SetOnDrop(&stop);
        let result = attack();
        drop(set_stop);
        eprintln!("    somebody else waited {:?} at most", witness.join().unwrap());
        result
    })
}

#[test]
fn root_garbage_frames_are_rejected_without_leaks() {
    let mut d = SnapshotterFixture::start("wire", "");
    let socket = d.snapshotter.socket();
    let pid = d.snapshotter.server().pid();
    d.client.prepare("witness", "", &[]).unwrap();
    storms(&socket, 5, 4_000);
    let before = ResourceUsage::read(pid);
    for (name, attack) in ATTACKS {
        reset_peak(pid);
        let began_with = ResourceUsage::read(pid);
        let begun = Instant::now();
        beside_a_witness(&d, || attack(&socket));
        let after = ResourceUsage::read(pid);
        eprintln!("{name}: {:?}, {after:?}", begun.elapsed());
        assert!(after.peak <= began_with.memory + ATTACK_MEMORY, "{name}: {began_with:?}, then {after:?}");
        eventually("its connections are gone", || ResourceUsage::read(pid).files <= before.files);
    }
    as_before(&mut d);
}

/// gRPC's core accepts calls faster than they are handled, and limits neither the rate of cancellations nor the number
/// of cancelled calls that wait, about 14 KiB each. They are worked off, other clients are served, and the memory is
/// used again.
#[test]
fn root_immediately_cancelled_calls_do_not_accumulate() {
    let mut d = SnapshotterFixture::start("reset", "");
    let socket = d.snapshotter.socket();
    let pid = d.snapshotter.server().pid();
    d.client.prepare("witness", "", &[]).unwrap();
    storms(&socket, 6, 4_000);
    let before = ResourceUsage::read(pid);
    let calls = requests() / 20;
    let request = StatSnapshotRequest { key: "witness".to_owned(), ..StatSnapshotRequest::default() };
    let request = message(&request.write_to_bytes().unwrap());
    let headers = frame(HEADERS, END_HEADERS, 0, &call("Stat"));
    let with_message = [headers.clone(), frame(DATA, END_STREAM, 0, &request)].concat();
    for (name, opened) in [("before", &headers), ("after", &with_message)] {
        let mut took = Vec::new();
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            beside_a_witness(&d, || reset(&socket, calls, opened));
            eventually("its connection is gone", || ResourceUsage::read(pid).files <= before.files);
            d.client.stat("witness").unwrap();
            let after = ResourceUsage::read(pid);
            eprintln!("taken back {name} their message: {:?}, {after:?}", begun.elapsed());
            took.push(after);
        }
        assert!(took.iter().all(|after| after.peak <= MARGIN + ATTACK_MEMORY + calls * CALL_MEMORY), "{took:?}");
    }
    as_before(&mut d);
}
