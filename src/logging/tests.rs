use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::*;

#[test]
fn text_line_is_one_line_without_control_characters() {
    let key = "a\x1b[2J\r\nb\u{202e}ü";
    let pairs = [("key", key)];
    let mut record = Record::builder();
    record.level(Level::Info).key_values(&pairs);
    let shown = "a\\u{1b}[2J\\r\\nb\\u{202e}ü";
    assert_eq!(
        text_line(&record.args(format_args!("pulled {key}")).build()),
        format!("info    pulled {shown} key={shown}")
    );
}

#[test]
fn event_is_the_first_key_of_a_line() {
    let pairs = [("address", "/s"), ("event", "daemon_started"), ("z", "1")];
    let mut record = Record::builder();
    record.level(Level::Warn).key_values(&pairs);
    assert_eq!(
        text_line(&record.args(format_args!("serving")).build()),
        "warning serving event=daemon_started address=/s z=1"
    );
    assert_eq!(
        json_line(&record.args(format_args!("serving")).build(), "now".to_owned()),
        r#"{"event":"daemon_started","address":"/s","level":"warning","msg":"serving","time":"now","z":"1"}"#
    );
}

/// An event and the level of its lines. A line whose level is decided at run time (`log::log!`) has the level `any`.
type Event = (String, &'static str);

/// The events of the log lines in production code, and the positions of lines without one.
fn events_in(source: &str, file: &Path, events: &mut BTreeSet<Event>, without: &mut Vec<String>) {
    let end = source.find("#[cfg(test)]\nmod tests {").unwrap_or(source.len());
    let macros = [("log::info!(", "info"), ("log::warn!(", "warn"), ("log::error!(", "error"), ("log::log!(", "any")];
    for (macro_name, level) in macros {
        for (position, _) in source[..end].match_indices(macro_name) {
            let line_start = source[..position].rfind('\n').map_or(0, |newline| newline + 1);
            if source[line_start..position].trim_start().starts_with("//") {
                continue;
            }
            let arguments = &source[position + macro_name.len()..];
            let arguments =
                if level == "any" { arguments.split_once(',').map_or("", |(_, rest)| rest) } else { arguments };
            let name = arguments.trim_start().strip_prefix("event = \"").and_then(|rest| rest.split('"').next());
            if let Some(name) = name {
                events.insert((name.to_owned(), level));
            } else {
                let line = source[..position].matches('\n').count() + 1;
                without.push(format!("{}:{line}", file.display()));
            }
        }
    }
}

/// The files below `directory` with production code.
fn production_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if ["tests", "testing"].contains(&stem.as_str()) {
        } else if path.is_dir() {
            files.extend(production_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The events of the table with their levels. A row may have several events: | `a`, `b` | warn, error | … |
fn documented_events(page: &str) -> BTreeMap<String, String> {
    let mut events = BTreeMap::new();
    for row in page.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let (names, levels) = (cells.next().unwrap_or_default(), cells.next().unwrap_or_default());
        // Every second part between backticks is a name.
        for name in names.split('`').skip(1).step_by(2) {
            events.insert(name.to_owned(), levels.to_owned());
        }
    }
    events
}

#[test]
fn every_log_line_has_an_event_that_is_documented_with_its_level() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut events, mut without) = (BTreeSet::new(), Vec::new());
    for file in production_files(&source) {
        events_in(&fs::read_to_string(&file).unwrap(), &file, &mut events, &mut without);
    }
    assert_eq!(without, Vec::<String>::new(), "these log lines have no event");
    let is_snake_case = |name: &str| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    for (name, _) in &events {
        assert!(is_snake_case(name), "{name} is not snake_case");
    }
    let documented = documented_events(include_str!("../../docs/events.md"));
    let undocumented: Vec<_> = events.iter().filter(|(name, _)| !documented.contains_key(name)).collect();
    assert!(undocumented.is_empty(), "docs/events.md does not list these events: {undocumented:?}");
    for (name, level) in &events {
        let levels = &documented[name];
        // A line whose level is decided at run time has no fixed level in the table either.
        assert!(*level == "any" || levels == "by error" || levels.contains(level), "{name} is logged at {level}");
    }
    let unused: Vec<_> = documented.keys().filter(|name| !events.iter().any(|(event, _)| event == *name)).collect();
    assert!(unused.is_empty(), "no log line has these events of docs/events.md: {unused:?}");
}

#[test]
fn level_names_of_the_go_snapshotter_are_parsed() {
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

/// Tells the process of a test that it is the child of the test below, and which format its log has.
const CHILD: &str = "CVMFS_SNAPSHOTTER_TEST_LOG";

fn panic_in_the_child(format: &str) {
    start(if format == "json" { Format::Json } else { Format::Text }, LevelFilter::Info);
    log::info!(key = "\u{1b}[2J\nx"; "before");
    let worker = thread::Builder::new().name("worker-7".to_owned());
    let panicked = worker.spawn(|| panic!("on {}\npurpose", "line 1")).unwrap().join();
    assert!(panicked.is_err());
}

/// A panic was written as lines of plain text between lines of JSON.
#[test]
fn panic_is_one_line_with_thread_and_location() {
    if let Ok(format) = std::env::var(CHILD) {
        return panic_in_the_child(&format);
    }
    let run = |format: &str| {
        let name = "logging::tests::panic_is_one_line_with_thread_and_location";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", name, "--nocapture"]).env(CHILD, format).env("RUST_BACKTRACE", "0");
        String::from_utf8(child.output().unwrap().stderr).unwrap()
    };
    let json = run("json");
    let lines: Vec<Json> = json.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let [_, panic] = &lines[..] else { panic!("{json}") };
    assert_eq!(
        (&panic["event"], &panic["level"], &panic["thread"]),
        (&Json::from("panic"), &Json::from("error"), &Json::from("worker-7"))
    );
    let location = panic["location"].as_str().unwrap();
    assert!(location.starts_with("src/logging/tests.rs:"), "{location}");
    assert_eq!(panic["msg"], Json::from(format!("thread worker-7 panicked at {location}: on line 1\npurpose")));
    let text = run("text");
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    assert!(text.contains("key=\\u{1b}[2J\\nx") && text.contains("on line 1\\npurpose"), "{text}");
}
