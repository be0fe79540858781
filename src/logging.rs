//! The log: lines on standard error, as JSON in the shape of the Go snapshotter's or as
//! text. The level can change while the program runs. A thread of its own writes the lines:
//! whoever reads them may be slow, or stuck, and that must stop no call and no stop.
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
use serde_json::{Map, Value as Json};

use crate::model::escaped;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Text,
}

/// The names that `parse_level` knows, for messages.
pub const LEVELS: &str = "trace, debug, info, warn, error, fatal or panic";

/// The Go snapshotter's levels; the two above error are never logged at by a program that
/// does not die of what it logs, so they mean error.
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

/// Starts the log. To be called once.
pub fn start(format: Format, level: LevelFilter) {
    env_logger::Builder::new()
        // Ours at any level, so that `set_level` decides; grpcio's own chatter only if it matters.
        .filter_level(LevelFilter::Warn)
        .filter_module(env!("CARGO_CRATE_NAME"), LevelFilter::Trace)
        .target(Target::Pipe(Box::new(LineQueue::start())))
        .format(match format {
            Format::Json => json,
            Format::Text => text,
        })
        .init();
    set_level(level);
    std::panic::set_hook(Box::new(log_panic));
}

/// A panic is a line like any other. It may be the end of the process, so the line is waited for.
fn log_panic(panic: &PanicHookInfo<'_>) {
    const MAX_QUEUED_BYTES: Duration = Duration::from_secs(1);
    let thread = thread::current();
    let thread = thread.name().unwrap_or("without a name");
    let location = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    let message = panic_message(panic.payload());
    // With RUST_BACKTRACE=1, as Rust's own hook would.
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        log::error!(thread, location, backtrace:%; "thread {thread} panicked at {location}: {message}");
    } else {
        log::error!(thread, location; "thread {thread} panicked at {location}: {message}");
    }
    flush(MAX_QUEUED_BYTES);
}

/// What a panic said.
pub fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

/// Lines that may wait to be written; beyond that they are dropped, and counted.
const WAITING_LINES: usize = 4096;

/// Lines on their way to standard error.
static WAITING: AtomicUsize = AtomicUsize::new(0);
/// Lines that found the queue full, since that was last said.
static DROPPED: AtomicUsize = AtomicUsize::new(0);

/// The log's end of the thread that writes.
struct LineQueue {
    lines: Sender<Vec<u8>>,
}

impl LineQueue {
    fn start() -> Self {
        let (lines, waiting) = bounded::<Vec<u8>>(WAITING_LINES);
        // Without the thread there is no log, but a daemon all the same.
        let _ = thread::Builder::new().name("log".to_owned()).spawn(move || {
            while let Ok(line) = waiting.recv() {
                let _ = io::stderr().write_all(&line);
                WAITING.fetch_sub(1, Ordering::SeqCst);
                if waiting.is_empty() && DROPPED.load(Ordering::SeqCst) > 0 {
                    // A line like any other: there is room for it now.
                    log::warn!("{} lines of the log were dropped", DROPPED.swap(0, Ordering::SeqCst));
                }
            }
        });
        Self { lines }
    }
}

impl Write for LineQueue {
    /// Gets a whole line at a time.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        WAITING.fetch_add(1, Ordering::SeqCst);
        if self.lines.try_send(line.to_owned()).is_err() {
            WAITING.fetch_sub(1, Ordering::SeqCst);
            DROPPED.fetch_add(1, Ordering::SeqCst);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until all lines are written, `limit` at most.
pub fn flush(limit: Duration) {
    let until = Instant::now() + limit;
    while WAITING.load(Ordering::SeqCst) > 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}

pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

/// The fields of a record, sorted by name as the Go logger sorts them.
struct Fields(Map<String, Json>);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        self.0.insert(key.to_string(), Json::String(value.to_string()));
        Ok(())
    }
}

fn fields(record: &Record<'_>) -> Map<String, Json> {
    let mut fields = Fields(Map::new());
    // Reading them cannot fail: visit_pair does not.
    let _ = record.key_values().visit(&mut fields);
    fields.0
}

fn level(record: &Record<'_>) -> &'static str {
    match record.level() {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

fn json(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let mut line = fields(record);
    line.insert("level".to_owned(), Json::String(level(record).to_owned()));
    line.insert("msg".to_owned(), Json::String(record.args().to_string()));
    line.insert("time".to_owned(), Json::String(out.timestamp_nanos().to_string()));
    writeln!(out, "{}", Json::Object(line))
}

fn text(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    write!(out, "{} ", out.timestamp_nanos())?;
    write!(out, "{}", line(record))?;
    writeln!(out)
}

/// One line stays one line, and sends a terminal nothing, whatever a client put into its key.
fn line(record: &Record<'_>) -> String {
    let mut line = format!("{:<7} {}", level(record), escaped(&record.args().to_string()));
    for (name, value) in fields(record) {
        let value = value.as_str().map_or_else(|| value.to_string(), escaped);
        // Writing into memory cannot fail.
        let _ = write!(line, " {name}={value}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_text_is_one_line_and_sends_a_terminal_nothing() {
        let key = "a\x1b[2J\r\nb\u{202e}ü";
        let pairs = [("key", key)];
        let mut record = Record::builder();
        record.level(Level::Info).key_values(&pairs);
        let shown = "a\\u{1b}[2J\\r\\nb\\u{202e}ü";
        assert_eq!(
            line(&record.args(format_args!("pulled {key}")).build()),
            format!("info    pulled {shown} key={shown}")
        );
    }

    #[test]
    fn the_levels_of_the_go_snapshotter_are_known() {
        for (name, expected) in [
            ("info", Some(LevelFilter::Info)),
            ("WARNING", Some(LevelFilter::Warn)),
            ("panic", Some(LevelFilter::Error)),
            ("off", None),
            ("", None),
        ] {
            assert_eq!(parse_level(name), expected, "{name}");
        }
    }

    /// In the process of a test, this is the daemon's log and the child of the test below.
    const CHILD: &str = "CVMFS_SNAPSHOTTER_TEST_LOG";

    fn panic_in_the_child(format: &str) {
        start(if format == "json" { Format::Json } else { Format::Text }, LevelFilter::Info);
        log::info!(key = "\u{1b}[2J\nx"; "before");
        let worker = thread::Builder::new().name("worker-7".to_owned());
        let panicked = worker.spawn(|| panic!("on {}\npurpose", "line 1")).unwrap().join();
        assert!(panicked.is_err());
    }

    /// It was lines of plain text among those of JSON.
    #[test]
    fn panic_is_one_line_of_the_log_with_thread_and_place() {
        if let Ok(format) = std::env::var(CHILD) {
            return panic_in_the_child(&format);
        }
        let run = |format: &str| {
            let name = "logging::tests::panic_is_one_line_of_the_log_with_thread_and_place";
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", name, "--nocapture"]).env(CHILD, format).env("RUST_BACKTRACE", "0");
            String::from_utf8(child.output().unwrap().stderr).unwrap()
        };
        let json = run("json");
        let lines: Vec<Json> = json.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        let [_, panic] = &lines[..] else { panic!("{json}") };
        assert_eq!((&panic["level"], &panic["thread"]), (&Json::from("error"), &Json::from("worker-7")));
        let location = panic["location"].as_str().unwrap();
        assert!(location.starts_with("src/logging.rs:"), "{location}");
        assert_eq!(panic["msg"], Json::from(format!("thread worker-7 panicked at {location}: on line 1\npurpose")));
        let text = run("text");
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
        assert!(text.contains("key=\\u{1b}[2J\\nx") && text.contains("on line 1\\npurpose"), "{text}");
    }
}
