//! The log: lines on standard error, as JSON in the shape of the Go snapshotter's or as
//! text. The level can change while the program runs.
#![forbid(unsafe_code)]

use std::io::{self, Write};

use env_logger::fmt::Formatter;
use log::kv::{Error, Key, Value, VisitSource};
use log::{Level, LevelFilter, Record};
use serde_json::{Map, Value as Json};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Text,
}

pub const LEVELS: &str = "it is one of trace, debug, info, warn, error, fatal and panic";

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
        .format(match format {
            Format::Json => json,
            Format::Text => text,
        })
        .init();
    set_level(level);
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
    // One line stays one line, whatever a client put into its key.
    let message = record.args().to_string().replace('\n', "\\n");
    write!(out, "{} {:<7} {message}", out.timestamp_nanos(), level(record))?;
    for (name, value) in fields(record) {
        write!(out, " {name}={value}")?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
