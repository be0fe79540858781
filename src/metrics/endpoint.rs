//! The HTTP server for metrics: `GET /metrics` over TCP or on a unix socket.
//!
//! A few threads serve one client each, for a short time, and never wait for a repository. A client that misbehaves can
//! delay other scrapes, and nothing else: the number of clients, the size of a request and the time for it are bounded.
//!
//! The crate `tiny_http` (0.12) is not used, because it starts a thread for each client that connects, and waits without
//! a limit for a client that sends nothing.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::{Gauges, METRICS};
use crate::model::MetricsAddress;
use crate::unix_socket::{self, SocketAccess};

/// Number of threads, and so of clients that are served at the same time.
const THREADS: usize = 4;
/// Time limit for a whole request, and for each write of the response.
const CLIENT_LIMIT: Duration = Duration::from_secs(2);
/// Time limit for asking whether metrics are served.
const ASK_LIMIT: Duration = Duration::from_secs(8);
const MAX_REQUEST_BYTES: usize = 8 << 10;
/// All metrics together are smaller.
const MAX_RESPONSE_BYTES: u64 = 4 << 20;
/// Pause after an `accept` that failed, for example because no descriptor was free.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub enum Error {
    Tcp { address: SocketAddr, cause: io::Error },
    Unix(unix_socket::Error),
    Thread(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address, cause } => {
                write!(f, "cannot serve metrics on {address}: {cause}")?;
                if cause.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) {
                    f.write_str(
                        "; the unit allows unix sockets only: run \"systemctl edit cvmfs-snapshotter\" and add \
                         [Service] RestrictAddressFamilies=AF_INET AF_INET6, or use a path",
                    )?;
                }
                Ok(())
            }
            Self::Unix(cause) => write!(f, "cannot serve metrics: {cause}"),
            Self::Thread(cause) => write!(f, "cannot start a thread that serves metrics: {cause}"),
        }
    }
}

impl std::error::Error for Error {}

/// Serves metrics until the process ends. `gauges` collects the states for a scrape.
pub fn serve(address: &MetricsAddress, gauges: impl Fn() -> Gauges + Send + Sync + 'static) -> Result<(), Error> {
    let (listener, gauges) = (Arc::new(Listener::bind(address)?), Arc::new(gauges));
    for _ in 0..THREADS {
        let (listener, gauges) = (Arc::clone(&listener), Arc::clone(&gauges));
        let serve = move || {
            loop {
                match listener.accept() {
                    // An error means that the client went away or sent no request, which concerns nobody else.
                    Ok(mut client) => drop(serve_client(client.as_mut(), gauges.as_ref())),
                    Err(_) => thread::sleep(ACCEPT_PAUSE),
                }
            }
        };
        thread::Builder::new().name("metrics".to_owned()).spawn(serve).map(drop).map_err(Error::Thread)?;
    }
    Ok(())
}

/// Asks whether our metrics are served at `address`. Waits no longer than `ASK_LIMIT`, whatever listens there.
pub fn ask(address: &MetricsAddress) -> io::Result<()> {
    let (sender, result) = mpsc::channel();
    let address = address.clone();
    thread::spawn(move || sender.send(request_metrics(&address)));
    result.recv_timeout(ASK_LIMIT).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn request_metrics(address: &MetricsAddress) -> io::Result<()> {
    let mut server: Box<dyn Connection> = match address {
        MetricsAddress::Tcp(address) => Box::new(TcpStream::connect_timeout(address, CLIENT_LIMIT)?),
        MetricsAddress::Unix(path) => Box::new(UnixStream::connect(path)?),
    };
    server.set_timeouts(CLIENT_LIMIT * 3)?;
    server.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut response = Vec::new();
    server.take(MAX_RESPONSE_BYTES).read_to_end(&mut response)?;
    if String::from_utf8_lossy(&response).contains("\ncvmfs_snapshotter_build_info") {
        return Ok(());
    }
    Err(io::Error::other("another program answers"))
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn bind(address: &MetricsAddress) -> Result<Self, Error> {
        match address {
            MetricsAddress::Tcp(address) => {
                TcpListener::bind(address).map(Self::Tcp).map_err(|cause| Error::Tcp { address: *address, cause })
            }
            MetricsAddress::Unix(path) => unix_socket::bind(path, SocketAccess::Everybody)
                .map(|socket| Self::Unix(socket.listener))
                .map_err(Error::Unix),
        }
    }

    fn accept(&self) -> io::Result<Box<dyn Connection>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept()?.0),
            Self::Unix(listener) => Box::new(listener.accept()?.0),
        })
    }
}

/// A connection over TCP or a unix socket.
trait Connection: Read + Write {
    /// Sets the time limits of each read and each write.
    fn set_timeouts(&self, read: Duration) -> io::Result<()>;
}

impl Connection for TcpStream {
    fn set_timeouts(&self, read: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(read)).and_then(|()| self.set_write_timeout(Some(CLIENT_LIMIT)))
    }
}

impl Connection for UnixStream {
    fn set_timeouts(&self, read: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(read)).and_then(|()| self.set_write_timeout(Some(CLIENT_LIMIT)))
    }
}

fn serve_client(client: &mut dyn Connection, gauges: &impl Fn() -> Gauges) -> io::Result<()> {
    let request = read_request(client)?;
    let Response { status, content_type, body } = respond(&request, gauges);
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    client.write_all(head.as_bytes())?;
    if request.starts_with("HEAD ") { Ok(()) } else { client.write_all(body.as_bytes()) }
}

/// Reads up to the empty line at the end of the request's head. A body is not read.
fn read_request(client: &mut dyn Connection) -> io::Result<String> {
    let deadline = Instant::now() + CLIENT_LIMIT;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        client.set_timeouts(remaining)?;
        match client.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => request.extend_from_slice(&buffer[..n]),
        }
        if request.len() > MAX_REQUEST_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(String::from_utf8_lossy(&request).into_owned())
}

struct Response {
    status: &'static str,
    content_type: &'static str,
    body: String,
}

impl Response {
    fn error(status: &'static str, message: &str) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: format!("{message}\n") }
    }
}

fn respond(request: &str, gauges: &impl Fn() -> Gauges) -> Response {
    let mut words = request.lines().next().unwrap_or_default().split(' ');
    let (method, target) = (words.next(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        (Some("GET" | "HEAD"), "/metrics") => {
            let is_open_metrics = request.to_ascii_lowercase().contains("application/openmetrics-text");
            match METRICS.text(&gauges()) {
                Ok(body) if is_open_metrics => {
                    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    Response { status: "200 OK", content_type, body }
                }
                Ok(text) => {
                    let content_type = "text/plain; version=0.0.4; charset=utf-8";
                    Response { status: "200 OK", content_type, body: to_prometheus_text(&text) }
                }
                Err(e) => Response::error("500 Internal Server Error", &e.to_string()),
            }
        }
        (Some("GET" | "HEAD"), _) => Response::error("404 Not Found", "metrics are at /metrics"),
        _ => Response::error("405 Method Not Allowed", "only GET and HEAD are allowed"),
    }
}

/// Converts the text format of `OpenMetrics` to the one that Prometheus had before: a counter has the name of its samples,
/// and there are no units.
fn to_prometheus_text(text: &str) -> String {
    let counter_name = |line: &'_ str| Some(line.strip_prefix("# TYPE ")?.strip_suffix(" counter")?.to_owned());
    let counters: HashSet<String> = text.lines().filter_map(counter_name).collect();
    let mut converted = String::with_capacity(text.len());
    for line in text.lines().filter(|line| !line.starts_with("# UNIT ") && *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(keyword), Some(name), Some(rest)) if counters.contains(name) => {
                converted.extend(["# ", keyword, " ", name, "_total ", rest, "\n"]);
            }
            _ => converted.extend([line, "\n"]),
        }
    }
    converted
}

#[cfg(test)]
mod tests;
