//! Fuzz targets for all parsers of input that others wrote. A target takes bytes and panics if a promise does not hold.
//!
//! There are two drivers: `driver`, which `make test` runs for a bounded time, and the program of `tests/fuzz`, which is
//! guided by coverage (`make fuzz`). The targets know only parsers: they touch no disk and do not wait.
#![forbid(unsafe_code)]
// A target reports a broken promise by panicking.
#![allow(clippy::unwrap_used)]

#[cfg(test)]
mod driver;

use std::fmt::Write;
use std::path::{Component, Path};

use protobuf::Message;

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
use crate::server::filters::{self, Filters};
use crate::server::{convert, field_count};
use crate::sidecar::Sidecar;
use crate::snapshotter::{self, CreateRequest, Error, LabelChange};

pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Words, separated by spaces, that random bytes would hardly contain.
    pub dictionary: &'static str,
}

pub const TARGETS: [Target; 8] = [
    Target {
        name: "filters",
        run: check_filters,
        dictionary: "name parent kind labels. active == != ~= , \" \\x \\u \\U \\777 / | \x1e (?i) {1000} \\pL [ * \u{fffd} \
                     containerd.io/snapshot.ref",
    },
    Target {
        name: "requests",
        run: check_request,
        dictionary: "containerd.io/snapshot.ref containerd.io/snapshot/uidmapping containerd.io/snapshot/gidmapping \
                     0:100000:65536 4294967295 , labels labels. \x12\x03 \x22\x08\x0a\x02 \x1a \x0b",
    },
    Target { name: "digest", run: check_digest_text, dictionary: "sha256: 0123456789abcdef ../ \0 SHA256:" },
    Target {
        name: "reference",
        run: check_reference,
        dictionary: "docker.io/ library/ localhost :5000 :latest @sha256: .. / . __ -- \0 \n registry.hub.docker.com",
    },
    Target {
        name: "manifest",
        run: check_manifest,
        dictionary: "{ } [ ] : , \"Config\" \"config\" \"Layers\" \"layers\" \"Digest\" \"digest\" sha256: null 1e999 \
                     \\ud800 [[[[[[[[[[[[[[[[",
    },
    Target {
        name: "records",
        run: check_record,
        dictionary: "sha256: 0000000000000000 .. / \x12 \x18\x02 \"prepared\": \"committed\": null",
    },
    Target {
        name: "config",
        run: check_config,
        dictionary: "repository absolute-mountpoint repositories repository-timeout attach workers queue log-format \
                     log-level allowed-uids metrics-address = \n \" ''' [ ] { } .. /cvmfs/ 0x10 1_0 inf #",
    },
    Target { name: "quoted", run: check_quoted, dictionary: "\n \r \x1b[2J \" \\ \u{202e} \u{300} é" },
];

/// Separates several filters in one input. No filter needs this character.
const SEPARATOR: char = '\x1e';

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

fn check_filters(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let texts: Vec<String> = text.split(SEPARATOR).map(str::to_owned).collect();
    let labels = [("a", "1"), ("foo.bar", "baz"), (LABEL_SNAPSHOT_REF, "sha256:abc"), (texts[0].as_str(), "x")];
    let snapshots: Vec<Snapshot> = [
        snapshot("default/1/my key", None, Kind::Committed, &labels),
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
            for snapshot in &snapshots {
                let matches = together.matches(snapshot);
                assert_eq!(matches, each.iter().any(|alone| alone.matches(snapshot)), "alternatives are ORed");
                if let Some((reference, parent)) = together.reference_and_parent()
                    && matches
                {
                    // The store selects snapshots by these two alone.
                    assert_eq!(snapshot.labels.get(LABEL_SNAPSHOT_REF).map(String::as_str), Some(reference));
                    assert_eq!(snapshot.parent.as_ref().map_or("", Key::as_str), parent);
                }
            }
        }
    }
    // A filter with a quoted name matches this name and no other.
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

/// Quotes a text as Go's `%q` does.
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

/// The first byte selects the kind of request.
fn check_request(bytes: &[u8]) {
    let Some((selector, message)) = bytes.split_first() else { return };
    match selector % 10 {
        0 => {
            let Ok(request) = parse::<PrepareSnapshotRequest>(message) else { return };
            check_create_request(convert::create_request(&request.key, &request.parent, request.labels));
        }
        1 => {
            let Ok(request) = parse::<ViewSnapshotRequest>(message) else { return };
            check_create_request(convert::create_request(&request.key, &request.parent, request.labels));
        }
        2 => {
            let Ok(request) = parse::<UpdateSnapshotRequest>(message) else { return };
            let paths = request.update_mask.clone().unwrap_or_default().paths;
            let is_requested = |path: &str| paths.iter().any(|requested| requested == path);
            match convert::update(request) {
                Ok((key, change)) => {
                    check_key(&key);
                    assert!(paths.iter().all(|path| path == "labels" || path.starts_with("labels.")));
                    match change {
                        LabelChange::Replace(_) => assert!(paths.is_empty() || is_requested("labels")),
                        LabelChange::Each(each) => {
                            assert!(each.iter().all(|(label, _)| is_requested(&format!("labels.{label}"))));
                        }
                    }
                }
                Err(Error::ImmutableField(path)) => assert!(is_requested(&path)),
                Err(e) => assert!(matches!(e, Error::InvalidKey(_)), "{e}"),
            }
        }
        3 => {
            let Ok(request) = parse::<CommitSnapshotRequest>(message) else { return };
            let _ = (Key::parse(&request.name), Key::parse(&request.key), Key::parse_optional(&request.parent));
            check_labels(request.labels.into_iter().collect());
        }
        4 => {
            let Ok(request) = parse::<ListSnapshotsRequest>(message) else { return };
            if let Err(e) = Filters::parse(&request.filters) {
                assert!(e.to_string().len() < 200);
            }
        }
        5 => check_parsed_key(parse::<MountsRequest>(message).map(|request| request.key)),
        6 => check_parsed_key(parse::<RemoveSnapshotRequest>(message).map(|request| request.key)),
        7 => check_parsed_key(parse::<StatSnapshotRequest>(message).map(|request| request.key)),
        8 => check_parsed_key(parse::<UsageRequest>(message).map(|request| request.key)),
        _ => drop(parse::<CleanupRequest>(message)),
    }
}

/// Decodes a request as the server does, which counts the fields first. Each field of the result must have been counted.
fn parse<Q: Message>(message: &[u8]) -> protobuf::Result<Q> {
    let counted = field_count::count::<Q>(message)?;
    let request = Q::parse_from_bytes(message)?;
    let decoded = field_count::count::<Q>(&request.write_to_bytes().unwrap()).unwrap();
    assert!(decoded <= counted, "{decoded} of {counted} fields");
    Ok(request)
}

fn check_parsed_key(parsed: protobuf::Result<String>) {
    if let Ok(key) = Key::parse(&parsed.unwrap_or_default()) {
        check_key(&key);
    }
}

fn check_key(key: &Key) {
    assert!((1..=Key::MAX_BYTES).contains(&key.as_str().len()));
    check_quoted(key.as_str().as_bytes());
}

fn check_create_request(request: snapshotter::Result<CreateRequest>) {
    let Ok(request) = request else { return };
    check_key(&request.key);
    let Some(labels) = check_labels(request.labels) else { return };
    let (created, updated) = (Timestamp(i64::MIN), Timestamp(i64::MAX));
    let other = snapshot("k", None, Kind::Active, &[]).unwrap();
    let snapshot = Snapshot { key: request.key, parent: request.parent, created, updated, labels, ..other };
    // A client gets back what it sent, through the wire and through the record beside files.
    let info = Info::parse_from_bytes(&convert::info(snapshot.clone()).write_to_bytes().unwrap()).unwrap();
    assert_eq!((info.name.as_str(), info.labels.len()), (snapshot.key.as_str(), snapshot.labels.len()));
    assert_eq!(info.labels.into_iter().collect::<Labels>(), snapshot.labels);
    let sidecar = Sidecar { prepared: snapshot, committed: None };
    assert_eq!(Sidecar::decode(&sidecar.encode()), Some(sidecar));
}

/// Returns the labels that a snapshot keeps.
fn check_labels(mut labels: Labels) -> Option<Labels> {
    snapshotter::check_labels(&mut labels).ok()?;
    let bytes: usize = labels.iter().map(|(label, value)| label.len() + value.len()).sum();
    assert!(bytes <= MAX_LABELS_BYTES && labels.values().all(|value| !value.is_empty()));
    match snapshotter::mapped_root(&labels) {
        // The kernel uses this number for "no id", so it must not become an owner.
        Ok(root) => assert!(root.is_none_or(|root| root.uid != u32::MAX && root.gid != u32::MAX), "{root:?}"),
        Err(e) => assert!(matches!(e, Error::InvalidMapping { .. }) && e.to_string().len() < 5_000, "{e}"),
    }
    Some(labels)
}

fn check_digest_text(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match Digest::parse(&text) {
        Ok(digest) => check_digest(&digest),
        Err(e) => assert!(e.to_string().len() < 200),
    }
    if let Some(id) = SnapshotId::from_directory_name(&text) {
        assert_eq!(id.to_string(), text);
    }
}

fn check_digest(digest: &Digest) {
    assert_eq!(format!("sha256:{}", digest.hex()), digest.as_str());
    assert_eq!(digest.hex().len(), 64);
    assert!(digest.hex().bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
}

fn check_reference(bytes: &[u8]) {
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

/// Whether the path consists of names only, so that it leads down.
fn is_below(path: &Path) -> bool {
    let rebuilt: std::path::PathBuf = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
    rebuilt.as_os_str() == path.as_os_str()
}

fn check_manifest(bytes: &[u8]) {
    match Manifest::parse(bytes) {
        Err(e) => check_quoted(e.to_string().as_bytes()),
        Ok(manifest) => {
            assert!(manifest.layers.len() <= MAX_LAYERS);
            let descriptor = |digest: &Digest| {
                check_digest(digest);
                serde_json::json!({ "Digest": digest.as_str() })
            };
            let layers: Vec<_> = manifest.layers.iter().map(descriptor).collect();
            let encoded = serde_json::json!({ "Layers": layers, "Config": descriptor(&manifest.config) });
            assert_eq!(Manifest::parse(encoded.to_string().as_bytes()), Ok(manifest));
        }
    }
}

/// The first byte selects the record beside files or the record of a scan.
fn check_record(bytes: &[u8]) {
    let Some((selector, bytes)) = bytes.split_first() else { return };
    if selector.is_multiple_of(3) {
        let Some(sidecar) = Sidecar::decode(bytes) else { return };
        for snapshot in [Some(&sidecar.prepared), sidecar.committed.as_ref()].into_iter().flatten() {
            check_key(&snapshot.key);
            assert!(snapshot.layer.is_none(), "{snapshot:?}");
        }
        assert_eq!(Sidecar::decode(&sidecar.encode()), Some(sidecar));
    } else {
        let Ok(Some(stored)) = record::decode(bytes) else { return };
        // The names become whiteouts below `snapshots/<id>`.
        for (index, directory) in stored.iter().flat_map(|scan| scan.directories.iter().enumerate()) {
            let Directory { parent, name, deleted, hidden, .. } = directory;
            let own_name = (index > 0).then_some(name);
            let names = deleted.iter().chain(hidden).chain(own_name).map(Path::new);
            assert!(*parent < index.max(1), "{directory:?}");
            assert!(names.into_iter().all(|name| is_below(name) && name.components().count() == 1), "{directory:?}");
        }
        let encoded = record::encode(stored.as_ref().map_err(|limit| *limit));
        assert_eq!(record::decode(&encoded).unwrap(), Some(stored));
    }
}

fn check_config(bytes: &[u8]) {
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

/// A quoted text is short and has no control characters.
fn check_quoted(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let shown = Quoted(&text).to_string();
    assert!(!shown.contains(char::is_control), "{shown}");
    assert!(shown.len() <= 2_200, "{} bytes", shown.len());
    assert!(shown.starts_with('"') && (shown.ends_with('"') || shown.ends_with("bytes)")));
}
