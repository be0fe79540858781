//! Whatever reads bytes that others wrote, as targets for fuzzers: bytes in, and a panic where
//! something does not hold that must hold for all of them.
//!
//! Two drivers use them: `driver`, which `make test` runs for a bounded time, and the program of
//! `tests/fuzz`, which is guided by coverage (`make fuzz`). Knows parsers only: nothing here
//! touches a disk or waits.
#![forbid(unsafe_code)]
// A target complains by panicking.
#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::path::{Component, Path};

use protobuf::Message;

#[cfg(feature = "server")]
use crate::server::{convert, field_count, filters};
// Without the server, from the same files: they need nothing of gRPC.
#[cfg(not(feature = "server"))]
#[path = "server/convert.rs"]
#[allow(dead_code)]
mod convert;
#[cfg(not(feature = "server"))]
#[path = "server/field_count.rs"]
#[allow(dead_code)]
mod field_count;
#[cfg(not(feature = "server"))]
#[path = "server/filters.rs"]
#[allow(dead_code)]
mod filters;

#[cfg(test)]
mod driver;

use self::filters::Filters;
use crate::config::{self, Config};
use crate::model::{
    Digest, Key, Kind, LABEL_SNAPSHOT_REF, Labels, MAX_LABELS_BYTES, Quoted, Snapshot, SnapshotId, Timestamp,
};
use crate::proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest,
};
use crate::repository::manifest::{ImageRef, MAX_LAYERS, Manifest};
use crate::repository::scan::{Directory, record};
use crate::sidecar::Sidecar;
use crate::snapshotter::{self, CreateRequest, Error, LabelChange};

pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Words that random bytes would hardly come upon.
    pub words: &'static [&'static str],
}

pub const TARGETS: [Target; 8] = [
    Target { name: "filters", run: filters, words: FILTER_WORDS },
    Target { name: "requests", run: requests, words: REQUEST_WORDS },
    Target { name: "digest", run: digest, words: &["sha256:", "0123456789abcdef", "../", "\0", "SHA256:"] },
    Target { name: "reference", run: reference, words: REFERENCE_WORDS },
    Target { name: "manifest", run: manifest, words: MANIFEST_WORDS },
    Target {
        name: "records",
        run: records,
        words: &["sha256:", "0000000000000000", "..", "/", "\x12", "\x18\x02", "\"committed\":", "null"],
    },
    Target { name: "config", run: config, words: CONFIG_WORDS },
    Target { name: "quoted", run: quoted, words: &["\n", "\r", "\x1b[2J", "\"", "\\", "\u{202e}", "\u{300}", "é"] },
];

const FILTER_WORDS: &[&str] = &[
    "name",
    "parent",
    "kind",
    "labels.",
    "active",
    "==",
    "!=",
    "~=",
    ",",
    "\"",
    "\\x",
    "\\u",
    "\\U",
    "\\777",
    "/",
    "|",
    "\x1e",
    "(?i)",
    "{1000}",
    "\\pL",
    "[",
    "*",
    "\u{fffd}",
    "containerd.io/snapshot.ref",
];
const REQUEST_WORDS: &[&str] = &[
    "containerd.io/snapshot.ref",
    "containerd.io/snapshot/uidmapping",
    "containerd.io/snapshot/gidmapping",
    "0:100000:65536",
    "4294967295",
    ",",
    "labels",
    "labels.",
    "\x12\x03",
    "\x22\x08\x0a\x02",
    "\x1a",
    "\x0b",
];
const REFERENCE_WORDS: &[&str] = &[
    "docker.io/",
    "library/",
    "localhost",
    ":5000",
    ":latest",
    "@sha256:",
    "..",
    "/",
    ".",
    "__",
    "--",
    "\0",
    "\n",
    "registry.hub.docker.com",
];
const MANIFEST_WORDS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"Config\"",
    "\"config\"",
    "\"Layers\"",
    "\"layers\"",
    "\"Digest\"",
    "\"digest\"",
    "sha256:",
    "null",
    "1e999",
    "\\ud800",
    "[[[[[[[[[[[[[[[[",
];
const CONFIG_WORDS: &[&str] = &[
    "repository",
    "absolute-mountpoint",
    "repositories",
    "repository-timeout",
    "attach",
    "workers",
    "queue",
    "log-format",
    "log-level",
    " = ",
    "\n",
    "\"",
    "'''",
    "[",
    "]",
    "{",
    "}",
    "..",
    "/cvmfs/",
    "0x10",
    "1_0",
    "inf",
    "#",
];

/// Several filters, with a character between them that no filter needs.
const BETWEEN: char = '\x1e';

fn snapshot(key: &str, parent: Option<&str>, kind: Kind, labels: &[(&str, &str)]) -> Option<Snapshot> {
    Some(Snapshot {
        id: SnapshotId(1),
        key: Key::parse(key).ok()?,
        parent: parent.map(|parent| Key::parse(parent).unwrap()),
        kind,
        created: Timestamp(0),
        updated: Timestamp(0),
        labels: labels.iter().map(|&(label, value)| (label.to_owned(), value.to_owned())).collect(),
        layer: None,
        usage: None,
    })
}

fn filters(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let texts: Vec<String> = text.split(BETWEEN).map(str::to_owned).collect();
    let ours = [("a", "1"), ("foo.bar", "baz"), (LABEL_SNAPSHOT_REF, "sha256:abc"), (texts[0].as_str(), "x")];
    let all: Vec<Snapshot> = [
        snapshot("default/1/my key", None, Kind::Committed, &ours),
        snapshot("k", Some("default/1/my key"), Kind::Active, &[]),
        snapshot(&text, Some("k"), Kind::View, &[]),
    ]
    .into_iter()
    .flatten()
    .collect();
    match Filters::parse(&texts) {
        Err(invalid) => {
            assert!(texts.contains(&invalid.filter) && invalid.filter.is_char_boundary(invalid.position));
            let alone = texts.iter().any(|one| Filters::parse(std::slice::from_ref(one)).is_err());
            assert!(alone || invalid.reason.starts_with("more than"), "{invalid}");
        }
        Ok(together) => {
            let each: Vec<Filters> =
                texts.iter().map(|one| Filters::parse(std::slice::from_ref(one)).unwrap()).collect();
            for one in &all {
                let matches = together.matches(one);
                assert_eq!(matches, each.iter().any(|alone| alone.matches(one)), "alternatives are ORed");
                if let Some((reference, parent)) = together.reference_and_parent()
                    && matches
                {
                    // The store answers with these alone.
                    assert_eq!(one.labels.get(LABEL_SNAPSHOT_REF).map(String::as_str), Some(reference));
                    assert_eq!(one.parent.as_ref().map_or("", Key::as_str), parent);
                }
            }
        }
    }
    // Whatever a name is, quoting finds it, and nothing else.
    let Some(named) = snapshot(&text, None, Kind::Active, &[(&text, "1")]) else { return };
    for (filter, expected) in [
        (format!("name=={}", go_quoted(&text)), true),
        (format!("name!={}", go_quoted(&text)), false),
        (format!("labels.{}", go_quoted(&text)), true),
        (format!("name=={}", go_quoted(&format!("{text}x"))), false),
        (format!("name!={}", go_quoted(&format!("{text}x"))), true),
    ] {
        match Filters::parse(std::slice::from_ref(&filter)) {
            Ok(found) => assert_eq!(found.matches(&named), expected, "{filter}"),
            Err(e) => assert!(filter.len() > filters::MAX_BYTES, "{filter}: {e}"),
        }
    }
}

/// As Go's `%q` may write it.
fn go_quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            ' '..='~' => quoted.push(c),
            c => write!(quoted, "\\U{:08x}", u32::from(c)).unwrap(),
        }
    }
    quoted + "\""
}

/// The first byte says which of the ten.
fn requests(bytes: &[u8]) {
    let Some((which, message)) = bytes.split_first() else { return };
    match which % 10 {
        0 => {
            let Ok(request) = parse::<PrepareSnapshotRequest>(message) else { return };
            wanted(convert::create_request(&request.key, &request.parent, request.labels));
        }
        1 => {
            let Ok(request) = parse::<ViewSnapshotRequest>(message) else { return };
            wanted(convert::create_request(&request.key, &request.parent, request.labels));
        }
        2 => {
            let Ok(request) = parse::<UpdateSnapshotRequest>(message) else { return };
            let paths = request.update_mask.clone().unwrap_or_default().paths;
            let asked = |path: &str| paths.iter().any(|one| one == path);
            match convert::update(request) {
                Ok((key, change)) => {
                    good_key(&key);
                    assert!(paths.iter().all(|path| path == "labels" || path.starts_with("labels.")));
                    match change {
                        LabelChange::Replace(_) => assert!(paths.is_empty() || asked("labels")),
                        LabelChange::Each(each) => {
                            assert!(each.iter().all(|(label, _)| asked(&format!("labels.{label}"))));
                        }
                    }
                }
                Err(Error::ImmutableField(path)) => assert!(asked(&path)),
                Err(e) => assert!(matches!(e, Error::InvalidKey(_)), "{e}"),
            }
        }
        3 => {
            let Ok(request) = parse::<CommitSnapshotRequest>(message) else { return };
            let _ = (Key::parse(&request.name), Key::parse(&request.key), Key::parse_optional(&request.parent));
            labels(request.labels.into_iter().collect());
        }
        4 => {
            let Ok(request) = parse::<ListSnapshotsRequest>(message) else { return };
            if let Err(e) = Filters::parse(&request.filters) {
                assert!(e.to_string().len() < 200);
            }
        }
        5 => key(parse::<MountsRequest>(message).map(|request| request.key)),
        6 => key(parse::<RemoveSnapshotRequest>(message).map(|request| request.key)),
        7 => key(parse::<StatSnapshotRequest>(message).map(|request| request.key)),
        8 => key(parse::<UsageRequest>(message).map(|request| request.key)),
        _ => drop(parse::<CleanupRequest>(message)),
    }
}

/// Decodes a request as the server does, which counts it before. All that is kept of it was counted.
fn parse<Q: Message>(message: &[u8]) -> protobuf::Result<Q> {
    let counted = field_count::count::<Q>(message)?;
    let request = Q::parse_from_bytes(message)?;
    let kept = field_count::count::<Q>(&request.write_to_bytes().unwrap()).unwrap();
    assert!(kept <= counted, "{kept} of {counted} fields");
    Ok(request)
}

fn key(parsed: protobuf::Result<String>) {
    if let Ok(key) = Key::parse(&parsed.unwrap_or_default()) {
        good_key(&key);
    }
}

fn good_key(key: &Key) {
    assert!((1..=Key::MAX_BYTES).contains(&key.as_str().len()));
    quoted(key.as_str().as_bytes());
}

fn wanted(wanted: snapshotter::Result<CreateRequest>) {
    let Ok(wanted) = wanted else { return };
    good_key(&wanted.key);
    let Some(kept) = labels(wanted.labels) else { return };
    let before = Snapshot {
        id: SnapshotId(1),
        key: wanted.key,
        parent: wanted.parent,
        kind: Kind::Active,
        created: Timestamp(i64::MIN),
        updated: Timestamp(i64::MAX),
        labels: kept,
        layer: None,
        usage: None,
    };
    // What a client sent it gets back, from the wire and from the store.
    let info = Info::parse_from_bytes(&convert::info(before.clone()).write_to_bytes().unwrap()).unwrap();
    assert_eq!((info.name.as_str(), info.labels.len()), (before.key.as_str(), before.labels.len()));
    assert_eq!(info.labels.into_iter().collect::<Labels>(), before.labels);
    let sidecar = Sidecar { prepared: before, committed: None };
    assert_eq!(Sidecar::decode(&sidecar.encode()), Some(sidecar));
}

/// The labels that are kept.
fn labels(mut labels: Labels) -> Option<Labels> {
    snapshotter::check_labels(&mut labels).ok()?;
    let bytes: usize = labels.iter().map(|(label, value)| label.len() + value.len()).sum();
    assert!(bytes <= MAX_LABELS_BYTES && labels.values().all(|value| !value.is_empty()));
    match snapshotter::mapped_root(&labels) {
        // The kernel's "no id": it would be written into the file system as such.
        Ok(root) => assert!(root.is_none_or(|(uid, gid)| uid != u32::MAX && gid != u32::MAX), "{root:?}"),
        Err(e) => assert!(matches!(e, Error::InvalidMapping { .. }) && e.to_string().len() < 5_000, "{e}"),
    }
    Some(labels)
}

fn digest(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match Digest::parse(&text) {
        Ok(digest) => good_digest(&digest),
        Err(e) => assert!(e.to_string().len() < 200),
    }
    if let Some(id) = SnapshotId::from_directory_name(&text) {
        assert_eq!(id.to_string(), text);
    }
}

fn good_digest(digest: &Digest) {
    assert_eq!(format!("sha256:{}", digest.hex()), digest.as_str());
    assert_eq!(digest.hex().len(), 64);
    assert!(digest.hex().bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
}

fn reference(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Some(image) = ImageRef::parse(&text) else { return };
    let paths = image.manifests();
    assert!((1..=24).contains(&paths.len()));
    for path in paths {
        assert!(path.starts_with(".metadata") && path.ends_with("manifest.json"), "{path:?}");
        assert!(is_below(&path) && path.components().count() >= 4, "{path:?}");
        assert!(!path.to_str().unwrap().contains(|c: char| c.is_control() || c == '\\' || c == ' '), "{path:?}");
    }
}

/// It leads down, by real names only.
fn is_below(path: &Path) -> bool {
    let rebuilt: std::path::PathBuf = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
    rebuilt.as_os_str() == path.as_os_str()
}

fn manifest(bytes: &[u8]) {
    match Manifest::parse(bytes) {
        Err(e) => quoted(e.to_string().as_bytes()),
        Ok(manifest) => {
            assert!(manifest.layers.len() <= MAX_LAYERS);
            let descriptor = |digest: &Digest| {
                good_digest(digest);
                serde_json::json!({ "Digest": digest.as_str() })
            };
            let layers: Vec<_> = manifest.layers.iter().map(descriptor).collect();
            let again = serde_json::json!({ "Layers": layers, "Config": descriptor(&manifest.config) });
            assert_eq!(Manifest::parse(again.to_string().as_bytes()), Ok(manifest));
        }
    }
}

/// The first byte says whether it is what lies beside files, or the row of a scan.
fn records(bytes: &[u8]) {
    let Some((which, row)) = bytes.split_first() else { return };
    if which.is_multiple_of(3) {
        let Some(sidecar) = Sidecar::decode(row) else { return };
        for snapshot in [Some(&sidecar.prepared), sidecar.committed.as_ref()].into_iter().flatten() {
            good_key(&snapshot.key);
            assert!(snapshot.layer.is_none(), "{snapshot:?}");
        }
        assert_eq!(Sidecar::decode(&sidecar.encode()), Some(sidecar));
    } else {
        let Ok(Some(stored)) = record::decode(row) else { return };
        // They become names of whiteouts below `snapshots/<id>`.
        for (place, directory) in stored.iter().flat_map(|scan| scan.directories.iter().enumerate()) {
            let Directory { parent, name, deleted, hidden, .. } = directory;
            let own = (place > 0).then_some(name);
            let names = deleted.iter().chain(hidden).chain(own).map(Path::new);
            assert!(*parent < place.max(1), "{directory:?}");
            assert!(names.into_iter().all(|name| is_below(name) && name.components().count() == 1), "{directory:?}");
        }
        let again = record::encode(stored.as_ref().map_err(|limit| *limit));
        assert_eq!(record::decode(&again).unwrap(), Some(stored));
    }
}

fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.matches('\n').count() + 1;
    match config::parse(Path::new("config.toml"), &text) {
        Ok(loaded) => {
            let Config { repositories, repository_timeout, workers, queue, .. } = &loaded.config;
            assert!((1..=3600).contains(&repository_timeout.as_secs()));
            assert!(workers.is_none_or(|workers| (1..=256).contains(&workers)) && (1..=65_536).contains(queue));
            assert!(!repositories.is_empty());
            for (n, one) in repositories.iter().enumerate() {
                let path = one.path.to_str().unwrap();
                assert!(path.starts_with('/') && !path.split('/').any(|part| part == ".."), "{path}");
                assert!(!path.contains([':', ',', '\\', '"']) && !path.contains(char::is_control), "{path}");
                assert!(repositories[..n].iter().all(|other| other.name != one.name && other.path != one.path));
            }
            for unknown in loaded.unknown {
                assert!((1..=lines).contains(&unknown.line));
                assert!(!unknown.to_string().contains('\n'));
            }
        }
        Err(config::Error::Syntax { line, .. } | config::Error::Value { line, .. }) => {
            assert!((1..=lines).contains(&line), "{line}");
        }
        Err(config::Error::Unreadable { .. }) => unreachable!("nothing was read"),
    }
}

/// What stands in messages stays on its line and is short.
fn quoted(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let shown = Quoted(&text).to_string();
    assert!(!shown.contains(char::is_control), "{shown}");
    assert!(shown.len() <= 2_200, "{} bytes", shown.len());
    assert!(shown.starts_with('"') && (shown.ends_with('"') || shown.ends_with("bytes)")));
}
