//! Where Prometheus asks: `GET /metrics`, over TCP or on a unix socket.
//!
//! A few threads serve one client each, for a short time, and never wait for a repository: whoever
//! misuses it can keep others from being answered, and nothing else.
#![forbid(unsafe_code)]

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::{Gauges, METRICS};
use crate::model::MetricsAddress as Address;
use crate::unix_socket::{self, SocketAccess};

/// Clients at one time.
const CLIENTS: usize = 4;
/// For the whole request, and for each part of the answer.
const LIMIT: Duration = Duration::from_secs(2);
const REQUEST_BYTES: usize = 8 << 10;
/// More than all metrics.
const ANSWER_BYTES: u64 = 4 << 20;
/// After an `accept` that failed (no free descriptor, say) the next one waits so long.
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
                        "; the unit allows unix sockets only: \"systemctl edit cvmfs-snapshotter\" and add \
                                 [Service] RestrictAddressFamilies=AF_INET AF_INET6, or use a path",
                    )?;
                }
                Ok(())
            }
            Self::Unix(cause) => write!(f, "cannot serve metrics: {cause}"),
            Self::Thread(cause) => write!(f, "cannot start the thread that serves metrics: {cause}"),
        }
    }
}

/// Serves from now on, to the end of the process. `gauges` says what is now.
pub fn serve(address: &Address, gauges: impl Fn() -> Gauges + Send + Sync + 'static) -> Result<(), Error> {
    let (listener, gauges) = (Arc::new(Listener::bind(address)?), Arc::new(gauges));
    for _ in 0..CLIENTS {
        let (listener, gauges) = (Arc::clone(&listener), Arc::clone(&gauges));
        let serve = move || {
            loop {
                match listener.accept() {
                    // Whoever asked badly or went away is told so, or not: nobody else minds.
                    Ok(mut client) => drop(client.answer(gauges.as_ref())),
                    Err(_) => thread::sleep(ACCEPT_PAUSE),
                }
            }
        };
        thread::Builder::new().name("metrics".to_owned()).spawn(serve).map(drop).map_err(Error::Thread)?;
    }
    Ok(())
}

/// Whether metrics of ours are served there. Waits for a while, whoever is there.
pub fn ask(address: &Address) -> io::Result<()> {
    let (send, answer) = mpsc::channel();
    let address = address.clone();
    thread::spawn(move || send.send(request(&address)));
    answer.recv_timeout(LIMIT * 4).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn request(address: &Address) -> io::Result<()> {
    let mut client = match address {
        Address::Tcp(address) => Client::Tcp(TcpStream::connect_timeout(address, LIMIT)?),
        Address::Unix(path) => Client::Unix(UnixStream::connect(path)?),
    };
    client.patience(LIMIT * 3)?;
    client.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    client.take(ANSWER_BYTES).read_to_end(&mut answer)?;
    if String::from_utf8_lossy(&answer).contains("\ncvmfs_snapshotter_build_info") {
        return Ok(());
    }
    Err(io::Error::other("what answers there is something else"))
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn bind(address: &Address) -> Result<Self, Error> {
        match address {
            Address::Tcp(address) => {
                TcpListener::bind(address).map(Self::Tcp).map_err(|cause| Error::Tcp { address: *address, cause })
            }
            Address::Unix(path) => unix_socket::bind(path, SocketAccess::Everybody)
                .map(|socket| Self::Unix(socket.listener))
                .map_err(Error::Unix),
        }
    }

    fn accept(&self) -> io::Result<Client> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Client::Tcp(stream)),
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Client::Unix(stream)),
        }
    }
}

enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Client {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Client {
    fn patience(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(limit)).and_then(|()| stream.set_write_timeout(Some(LIMIT)))
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(limit)).and_then(|()| stream.set_write_timeout(Some(LIMIT)))
            }
        }
    }

    fn answer(&mut self, gauges: &impl Fn() -> Gauges) -> io::Result<()> {
        let request = self.request()?;
        let (status, kind, body) = answer_to(&request, gauges);
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        self.write_all(head.as_bytes())?;
        if request.starts_with("HEAD ") { Ok(()) } else { self.write_all(body.as_bytes()) }
    }

    /// Up to the empty line; a body would be of no interest.
    fn request(&mut self) -> io::Result<String> {
        let until = Instant::now() + LIMIT;
        let mut request = Vec::new();
        let mut buffer = [0; 1024];
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.patience(left)?;
            match self.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => request.extend_from_slice(&buffer[..n]),
            }
            if request.len() > REQUEST_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(String::from_utf8_lossy(&request).into_owned())
    }
}

/// Status, type and body.
fn answer_to(request: &str, gauges: &impl Fn() -> Gauges) -> (&'static str, &'static str, String) {
    const TEXT: &str = "text/plain; charset=utf-8";
    let mut words = request.lines().next().unwrap_or_default().split(' ');
    let (method, target) = (words.next(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        (Some("GET" | "HEAD"), "/metrics") => {
            let open = request.to_ascii_lowercase().contains("application/openmetrics-text");
            let kind = if open {
                "application/openmetrics-text; version=1.0.0; charset=utf-8"
            } else {
                "text/plain; version=0.0.4; charset=utf-8"
            };
            match METRICS.text(&gauges()) {
                Ok(text) if open => ("200 OK", kind, text),
                Ok(text) => ("200 OK", kind, older_form(&text)),
                Err(e) => ("500 Internal Server Error", TEXT, format!("{e}\n")),
            }
        }
        (Some("GET" | "HEAD"), _) => ("404 Not Found", TEXT, "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", TEXT, "GET is what is answered here\n".to_owned()),
    }
}

/// As Prometheus had it before `OpenMetrics`: counters are called as their samples are, and there are no units.
fn older_form(text: &str) -> String {
    let mut older = String::with_capacity(text.len());
    let is_counter = |name: &str| text.contains(&format!("\n# TYPE {name} counter\n"));
    for line in text.lines().filter(|line| !line.starts_with("# UNIT ") && *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(kind), Some(name), Some(rest)) if is_counter(name) => {
                older.extend(["# ", kind, " ", name, "_total ", rest, "\n"]);
            }
            _ => older.extend([line, "\n"]),
        }
    }
    older
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: &Address, request: &str) -> String {
        let mut answer = String::new();
        match address {
            Address::Tcp(address) => {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(request.as_bytes()).unwrap();
                let _ = stream.read_to_string(&mut answer);
            }
            Address::Unix(path) => {
                let mut stream = UnixStream::connect(path).unwrap();
                stream.write_all(request.as_bytes()).unwrap();
                let _ = stream.read_to_string(&mut answer);
            }
        }
        answer
    }

    #[test]
    fn metrics_are_served_over_tcp_and_on_a_unix_socket() {
        let dir = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for address in [Address::Tcp(free), Address::Unix(dir.path().join("m.sock"))] {
            serve(&address, || Gauges { snapshots: 5, ..Gauges::default() }).unwrap();
            let found =
                ask(&address, "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n\r\n");
            assert!(found.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text"), "{found}");
            assert!(found.contains("cvmfs_snapshotter_snapshots 5\n") && found.ends_with("# EOF\n"), "{found}");
            assert!(ask(&address, "GET /metrics?x=1 HTTP/1.0\r\n\r\n").contains("text/plain; version=0.0.4"));
            assert!(ask(&address, "HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("close\r\n\r\n"));
            assert!(ask(&address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
            assert!(ask(&address, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
            assert_eq!(ask(&address, &"x".repeat(3 * REQUEST_BYTES)), "", "what is no request is cut off");
            let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(REQUEST_BYTES));
            assert_eq!(ask(&address, &long), "", "one that is too long is cut off");
            assert!(
                matches!(serve(&address, Gauges::default), Err(Error::Tcp { .. } | Error::Unix(_))),
                "it is in use"
            );
        }
    }

    #[test]
    fn the_older_form_names_counters_as_their_samples() {
        let text = "# HELP a x.\n# TYPE a counter\na_total 1\n# HELP b_seconds y.\n# TYPE b_seconds histogram\n# UNIT b_seconds seconds\n# EOF\n";
        let older =
            "# HELP a_total x.\n# TYPE a_total counter\na_total 1\n# HELP b_seconds y.\n# TYPE b_seconds histogram\n";
        assert_eq!(older_form(text), older);
    }

    #[test]
    fn one_who_says_nothing_keeps_others_waiting_for_a_moment_only() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("m.sock"));
        serve(&address, Gauges::default).unwrap();
        let _silent = UnixStream::connect(dir.path().join("m.sock")).unwrap();
        assert!(ask(&address, "GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
    }
}
