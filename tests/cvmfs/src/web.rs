//! A static HTTP server on 127.0.0.1 for a repository's directory.
//!
//! Written out instead of taken from a crate because of its end: when dropped it must look like a
//! web server that died. The ones tried leave kept-alive connections open and silent, and their
//! clients wait for a timeout.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Answers GET and HEAD until dropped; one thread for each connection.
#[derive(Debug)]
pub struct Web {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    stopping: AtomicBool,
    down: AtomicBool,
    requests: AtomicU64,
    connections: Mutex<HashMap<u64, TcpStream>>,
}

impl Web {
    /// Serves the files below `root` on a port of the kernel's choice.
    pub fn start(root: &Path) -> Self {
        Self::start_at(root, 0)
    }

    /// Serves on `port`, for instance the one of a server that was dropped before.
    pub fn start_at(root: &Path, port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("the port on 127.0.0.1 is free");
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            stopping: AtomicBool::new(false),
            down: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            connections: Mutex::default(),
        });
        let address = listener.local_addr().expect("a bound socket has an address");
        let acceptor = Some(thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept(&listener)
        }));
        Self { address, shared, acceptor }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Closes every connection without an answer, those that are there and those to come, until
    /// [`answer`](Self::answer). The port stays its own, as it would not if the server were dropped.
    pub fn stop_answering(&self) {
        self.shared.down.store(true, Ordering::SeqCst);
        self.shared.disconnect();
    }

    /// Answers again after [`stop_answering`](Self::stop_answering).
    pub fn answer(&self) {
        self.shared.down.store(false, Ordering::SeqCst);
    }

    /// Requests so far, those for missing files included.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the acceptor, which then sees the flag.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.shared.disconnect();
    }
}

impl Shared {
    fn disconnect(&self) {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        for connection in connections.values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for (serial, stream) in (0..).zip(listener.incoming()) {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let Ok(second) = stream.try_clone() else { continue };
            self.connections.lock().unwrap_or_else(PoisonError::into_inner).insert(serial, second);
            // Asked after the connection was noted: what comes later is found by `disconnect`.
            if self.down.load(Ordering::SeqCst) {
                let _ = stream.shutdown(Shutdown::Both);
            }
            let shared = Arc::clone(self);
            thread::spawn(move || {
                // A client may go away at any time.
                let _ = shared.converse(&stream);
                shared.connections.lock().unwrap_or_else(PoisonError::into_inner).remove(&serial);
            });
        }
    }

    fn converse(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let (mut reader, mut writer) = (BufReader::new(stream), stream);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let mut close = false;
            loop {
                let mut header = String::new();
                if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                    break;
                }
                close |= header.trim().eq_ignore_ascii_case("connection: close");
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
            let mut words = line.split_ascii_whitespace();
            let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let file = self.file(target);
            let (status, length) = match (method, &file) {
                ("GET" | "HEAD", Some((_, length))) => ("200 OK", *length),
                ("GET" | "HEAD", None) => ("404 Not Found", 0),
                _ => ("405 Method Not Allowed", 0),
            };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nContent-Type: application/octet-stream\r\n\r\n"
            );
            writer.write_all(head.as_bytes())?;
            if let ("GET", Some((mut file, _))) = (method, file) {
                io::copy(&mut file, &mut writer)?;
            }
            if close {
                return Ok(());
            }
        }
    }

    /// The file that a request names. Repository paths need no percent-encoding.
    fn file(&self, target: &str) -> Option<(File, u64)> {
        let path = Path::new(target.split('?').next()?.trim_start_matches('/'));
        if !path.components().all(|component| matches!(component, Component::Normal(_))) {
            return None;
        }
        let file = File::open(self.root.join(path)).ok()?;
        let metadata = file.metadata().ok()?;
        metadata.is_file().then_some((file, metadata.len()))
    }
}
