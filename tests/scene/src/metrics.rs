//! A client of the metrics that the daemon serves at a `metrics-address` on a unix socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

pub fn scrape(socket: &Path) -> String {
    scrape_as(socket, "application/openmetrics-text")
}

/// The metrics in the format that `accept`, an HTTP header, asks for.
pub fn scrape_as(socket: &Path, accept: &str) -> String {
    let mut stream = UnixStream::connect(socket).expect("metrics are served");
    stream
        .write_all(format!("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n").as_bytes())
        .expect("metrics can be requested");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("metrics are text");
    answer.split_once("\r\n\r\n").expect("an answer has a head").1.to_owned()
}

/// The value of a sample that is a whole number.
#[track_caller]
pub fn sample(text: &str, name: &str) -> u64 {
    find_sample(text, name).unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// The value of a sample that is a whole number. None means that it was never counted.
pub fn find_sample(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("cvmfs_snapshotter_")?.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok())
}
