//! The log: lines on standard error, as JSON in the shape of the Go snapshotter's or as text.
//!
//! A line at info, warn or error has the key `event` with a stable name that `docs/events.md` lists:
//! `log::warn!(event = "reserve_used", path:% = path.display(); "…")`. Scripts and tests hold on to events and keys,
//! never to the message. Both formats print `event` before all other keys.
//!
//! The level can change while the program runs. A thread of its own writes the lines, because a reader that is slow or
//! stuck must delay neither a call nor the stop; lines that find the queue full are dropped and counted.
#![forbid(unsafe_code)]

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use env_logger::Target;
use env_logger::fmt::Formatter;
use log::kv::{Error, Key, Value, VisitSource};
use log::{Level, LevelFilter, Record};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::model::escaped;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Text,
}

/// The names that `parse_level` knows, for messages.
pub const LEVELS: &str = "trace, debug, info, warn, error, fatal or panic";

/// Parses the name of a level of the Go snapshotter. Its levels `fatal` and `panic` end the process that logs at them;
/// this program has no such lines, so they mean error.
pub fn parse_level(name: &str) -> Option<LevelFilter> {
    Some(match name.to_ascii_lowercase().as_str() {
        "trace" => LevelFilter::Trace,
        "debug" => LevelFilter::Debug,
        "info" => LevelFilter::Info,
        "warn" | "warning" => LevelFilter::Warn,
        "error" | "fatal" | "panic" => LevelFilter::Error,
        _ => return None,
    })
}

/// Starts the log. May be called once in a process.
pub fn start(format: Format, level: LevelFilter) {
    env_logger::Builder::new()
        // Lines of this crate pass at any level, so that `log::set_max_level` decides; of grpcio's lines only warnings pass.
        .filter_level(LevelFilter::Warn)
        .filter_module(env!("CARGO_CRATE_NAME"), LevelFilter::Trace)
        .target(Target::Pipe(Box::new(LineQueue::start())))
        .format(match format {
            Format::Json => json,
            Format::Text => text,
        })
        .init();
    log::set_max_level(level);
    std::panic::set_hook(Box::new(log_panic));
}

/// Logs a panic as one line. A panic may end the process, so this waits until the line is written.
fn log_panic(panic: &PanicHookInfo<'_>) {
    const FLUSH_LIMIT: Duration = Duration::from_secs(1);
    let thread = thread::current();
    let thread = thread.name().unwrap_or("without a name");
    let location = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    let message = panic_message(panic.payload());
    // The backtrace is captured if RUST_BACKTRACE is set, as by Rust's own hook.
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        log::error!(event = "panic", thread, location, backtrace:%; "thread {thread} panicked at {location}: {message}");
    } else {
        log::error!(event = "panic", thread, location; "thread {thread} panicked at {location}: {message}");
    }
    flush(FLUSH_LIMIT);
}

/// The message of a panic.
pub fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

/// Capacity of the queue of lines. When it is full, lines are dropped and counted.
const MAX_QUEUED_LINES: usize = 4096;

/// Number of lines that are queued or being written.
static QUEUED: AtomicUsize = AtomicUsize::new(0);
/// Number of lines that were dropped since the last line that reported it.
static DROPPED: AtomicUsize = AtomicUsize::new(0);

/// The sending end of the queue to the thread that writes.
struct LineQueue {
    lines: Sender<Vec<u8>>,
}

impl LineQueue {
    fn start() -> Self {
        let (lines, queue) = bounded::<Vec<u8>>(MAX_QUEUED_LINES);
        // If the thread cannot be started, the daemon runs without a log.
        let _ = thread::Builder::new().name("log".to_owned()).spawn(move || {
            while let Ok(line) = queue.recv() {
                let _ = io::stderr().write_all(&line);
                QUEUED.fetch_sub(1, Ordering::SeqCst);
                if queue.is_empty() && DROPPED.load(Ordering::SeqCst) > 0 {
                    // The queue is empty, so this line finds room in it.
                    let count = DROPPED.swap(0, Ordering::SeqCst);
                    log::warn!(event = "log_lines_dropped", count; "{count} lines of the log were dropped");
                }
            }
        });
        Self { lines }
    }
}

impl Write for LineQueue {
    /// Queues a line. The logger calls this once for each whole line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUED.fetch_add(1, Ordering::SeqCst);
        if self.lines.try_send(line.to_owned()).is_err() {
            QUEUED.fetch_sub(1, Ordering::SeqCst);
            DROPPED.fetch_add(1, Ordering::SeqCst);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until all lines are written, at most for `limit`.
pub fn flush(limit: Duration) {
    let until = Instant::now() + limit;
    while QUEUED.load(Ordering::SeqCst) > 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}

/// The keys of a line: `event` first, the others sorted by name as the Go logger sorts them.
#[derive(Default, Serialize)]
struct Fields {
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<String>,
    #[serde(flatten)]
    others: Map<String, Json>,
}

impl Fields {
    fn new(record: &Record<'_>) -> Self {
        let mut fields = Self::default();
        // The visit cannot fail, because `visit_pair` does not.
        let _ = record.key_values().visit(&mut fields);
        fields
    }
}

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        if key.as_str() == "event" {
            self.event = Some(value.to_string());
        } else {
            self.others.insert(key.to_string(), Json::String(value.to_string()));
        }
        Ok(())
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

fn json(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let line = json_line(record, out.timestamp_nanos().to_string());
    writeln!(out, "{line}")
}

fn json_line(record: &Record<'_>, time: String) -> String {
    let mut fields = Fields::new(record);
    fields.others.insert("level".to_owned(), Json::from(level_name(record.level())));
    fields.others.insert("msg".to_owned(), Json::from(record.args().to_string()));
    fields.others.insert("time".to_owned(), Json::from(time));
    // Texts can always be written as JSON.
    serde_json::to_string(&fields).unwrap_or_default()
}

fn text(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let time = out.timestamp_nanos();
    writeln!(out, "{time} {}", text_line(record))
}

/// The line without its time. Control characters are escaped: clients choose keys, and a line must stay one line and
/// must not control the terminal that shows it.
fn text_line(record: &Record<'_>) -> String {
    let mut line = format!("{:<7} {}", level_name(record.level()), escaped(&record.args().to_string()));
    let fields = Fields::new(record);
    if let Some(event) = fields.event {
        // Writing into memory cannot fail.
        let _ = write!(line, " event={}", escaped(&event));
    }
    for (name, value) in &fields.others {
        let _ = write!(line, " {name}={}", value.as_str().map_or_else(|| value.to_string(), escaped));
    }
    line
}

#[cfg(test)]
mod tests;
