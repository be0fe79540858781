//! HTTP/2 frames that are written by hand on the snapshotter's socket, for requests that no client library sends.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
/// The flag of SETTINGS and PING.
const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame is short").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A string literal of HPACK, without Huffman code.
fn text(bytes: &[u8]) -> Vec<u8> {
    let mut written = Vec::new();
    if bytes.len() < 127 {
        written.push(u8::try_from(bytes.len()).expect("it is short"));
    } else {
        written.push(127);
        let mut rest = bytes.len() - 127;
        while rest >= 128 {
            written.push(u8::try_from(rest % 128).expect("seven bits") | 128);
            rest /= 128;
        }
        written.push(u8::try_from(rest).expect("seven bits"));
    }
    written.extend(bytes);
    written
}

/// A header that is not added to the dynamic table.
pub fn header(name: &str, value: &[u8]) -> Vec<u8> {
    [vec![0], text(name.as_bytes()), text(value)].concat()
}

/// The headers of a call.
pub fn call(method: &str) -> Vec<u8> {
    let path = format!("/containerd.services.snapshots.v1.Snapshots/{method}");
    // 0x83 and 0x86 are :method POST and :scheme http of the static table.
    let pseudo = [vec![0x83, 0x86], header(":path", path.as_bytes()), header(":authority", b"localhost")];
    [pseudo.concat(), header("te", b"trailers"), header("content-type", b"application/grpc")].concat()
}

/// A message with the prefix of gRPC.
pub fn message(bytes: &[u8]) -> Vec<u8> {
    message_as(0, bytes)
}

/// A message whose prefix says that the bytes are compressed.
pub fn compressed_message(bytes: &[u8]) -> Vec<u8> {
    message_as(1, bytes)
}

fn message_as(flag: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a message is short").to_be_bytes();
    [&[flag], &length[..], bytes].concat()
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

/// A connection on which the test can break any rule of the protocol.
pub struct RawConnection(UnixStream);

/// How far the server accepted what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The server accepted everything.
    All,
    /// The server accepted this many bytes, and then no more within the time limit.
    Blocked(usize),
    /// The server accepted this many bytes, and then closed the connection.
    Closed(usize),
}

impl RawConnection {
    pub fn connect(socket: &Path) -> Self {
        Self(UnixStream::connect(socket).expect("the socket takes connections"))
    }

    /// Connects and sends what every client begins with: the preface and SETTINGS.
    pub fn connect_with_preface(socket: &Path) -> Self {
        let mut raw = Self::connect(socket);
        raw.send(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat(), Duration::from_secs(10));
        raw
    }

    /// Sends without reading, until the server accepts nothing for `timeout`.
    pub fn send(&mut self, bytes: &[u8], timeout: Duration) -> Sent {
        self.0.set_write_timeout(Some(timeout)).expect("a timeout can be set");
        let mut sent = 0;
        while sent < bytes.len() {
            match self.0.write(&bytes[sent..]) {
                Ok(0) => return Sent::Closed(sent),
                Ok(more) => sent += more,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Sent::Blocked(sent);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Sent::Closed(sent),
            }
        }
        Sent::All
    }

    /// Sends like `send`, while a thread reads and discards what the server sends.
    pub fn send_while_reading(&mut self, bytes: &[u8], timeout: Duration) -> Sent {
        let mut stream = self.0.try_clone().expect("a connection can be shared");
        let reader = std::thread::spawn(move || {
            let mut discarded = [0; 16_384];
            while matches!(stream.read(&mut discarded), Ok(1..)) {}
        });
        let sent = self.send(bytes, timeout);
        self.0.shutdown(std::net::Shutdown::Both).ok();
        reader.join().expect("reading does not panic");
        sent
    }

    /// Whether the server sends a frame of this kind within `limit`. Other frames are skipped.
    pub fn receives(&mut self, kind: u8, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while let Some(frame) = self.read_frame(until) {
            if frame.kind == kind {
                return true;
            }
        }
        false
    }

    /// The next frame. None means that no frame came in time, or that the connection is closed.
    fn read_frame(&mut self, until: Instant) -> Option<Frame> {
        let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        self.0.set_read_timeout(Some(left)).expect("a timeout can be set");
        let mut head = [0; 9];
        self.0.read_exact(&mut head).ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).expect("a frame is short")];
        self.0.read_exact(&mut payload).ok()?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Some(Frame { kind: head[3], flags: head[4], stream, payload })
    }

    /// Sends a call on stream 1 with a message of any length, within the server's flow-control windows, and reads until
    /// the stream or the connection is closed. The result is whether the server accepted the whole message.
    pub fn upload(&mut self, headers: &[u8], message: &[u8], limit: Duration) -> bool {
        const FRAME: usize = 16_000;
        /// The initial size of both flow-control windows in HTTP/2.
        const WINDOW: usize = 65_535;
        let until = Instant::now() + limit;
        self.send(&frame(HEADERS, END_HEADERS, 1, headers), limit);
        let (mut sent, mut windows, mut initial) = (0, [WINDOW; 2], WINDOW);
        loop {
            while sent < message.len() {
                let size = windows[0].min(windows[1]).min(FRAME).min(message.len() - sent);
                if size == 0 {
                    break;
                }
                let flags = if sent + size == message.len() { END_STREAM } else { 0 };
                if self.send(&frame(DATA, flags, 1, &message[sent..sent + size]), limit) != Sent::All {
                    return false;
                }
                sent += size;
                windows = windows.map(|window| window - size);
            }
            let Some(Frame { kind, flags, stream, payload }) = self.read_frame(until) else {
                return sent == message.len();
            };
            match kind {
                WINDOW_UPDATE => {
                    let more = payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
                    windows[usize::from(stream == 1)] += usize::try_from(more).expect("a window is small");
                }
                // Each setting has two bytes of name; name 4 is the initial window of a stream.
                SETTINGS if flags & ACK == 0 => {
                    self.send(&frame(SETTINGS, ACK, 0, &[]), limit);
                    for setting in payload.chunks_exact(6).filter(|setting| setting[..2] == [0, 4]) {
                        let size = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                        let size = usize::try_from(size).expect("a window is small");
                        windows[1] = (windows[1] + size).saturating_sub(initial);
                        initial = size;
                    }
                }
                PING if flags & ACK == 0 => {
                    self.send(&frame(PING, ACK, 0, &payload), limit);
                }
                // Trailers are the last frame of an answer.
                RST_STREAM | HEADERS if stream == 1 => return sent == message.len(),
                _ => {}
            }
        }
    }

    /// Whether the server closes the connection within `limit`.
    pub fn is_closed_within(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut discarded = [0; 16_384];
        loop {
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return false;
            };
            self.0.set_read_timeout(Some(left)).expect("a timeout can be set");
            match self.0.read(&mut discarded) {
                Ok(1..) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return false,
                Ok(0) | Err(_) => return true,
            }
        }
    }
}
