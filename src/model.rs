//! The words of the project as types: what may be mixed up has a type of its own.
//!
//! Nothing here knows the wire, the store or the file system. Whatever a client sent
//! becomes one of these types, checked, before anybody acts on it.
#![forbid(unsafe_code)]

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The label by which containerd asks for a remote layer; its value is the chainID.
pub const LABEL_SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// The digest of the layer's compressed blob, as the image manifest names it.
pub const LABEL_LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// The reference of the image that is being pulled.
pub const LABEL_IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// Set on remote snapshots, with this value, as the stargz family of snapshotters does.
pub const LABEL_REMOTE: (&str, &str) = ("containerd.io/snapshot/remote", "remote snapshot");
/// Where container uids start on the host: `container:host:length[,…]`.
pub const LABEL_UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Where container gids start on the host: `container:host:length[,…]`.
pub const LABEL_GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// The name of a snapshot, as its client chose it: any text, never part of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Key(String);

impl TryFrom<String> for Key {
    type Error = InvalidKey;

    fn try_from(text: String) -> Result<Self, InvalidKey> {
        Self::parse(&text)
    }
}

impl Key {
    /// Longest key in bytes; the bound of containerd's own store.
    pub const MAX_BYTES: usize = 32_768;

    pub fn parse(text: &str) -> Result<Self, InvalidKey> {
        match text.len() {
            0 => Err(InvalidKey::Empty),
            n if n > Self::MAX_BYTES => Err(InvalidKey::TooLong { bytes: n }),
            _ => Ok(Self(text.to_owned())),
        }
    }

    /// An empty text means "none", as on the wire.
    pub fn parse_optional(text: &str) -> Result<Option<Self>, InvalidKey> {
        if text.is_empty() { Ok(None) } else { Self::parse(text).map(Some) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Quoted(&self.0).fmt(f)
    }
}

/// A client's text for a message, quoted and cut: texts may be long and may hold line
/// breaks, and a gRPC status above some kilobytes is not delivered at all.
pub struct Quoted<'t>(pub &'t str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_SHOWN: usize = 200;
        match self.0.char_indices().nth(MAX_SHOWN) {
            None => write!(f, "{:?}", self.0),
            Some((cut, _)) => write!(f, "{:?}… ({} bytes)", &self.0[..cut], self.0.len()),
        }
    }
}

/// Whether a terminal obeys it, and does not just show it: also what has no width, or turns the direction of writing.
fn is_control(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// A text as a terminal may show it: clients choose keys and references.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_control(c) { '?' } else { c }).collect()
}

/// As `printable`, but it can still be told what was there.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_control(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// A word as the shell takes it; containerd's references need no quotes, others get them.
pub fn shell_quote(reference: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "./:@_-+".contains(c);
    if !reference.is_empty() && reference.chars().all(plain) {
        reference.to_owned()
    } else {
        format!("'{}'", reference.replace('\'', "'\\''"))
    }
}

/// The last words of a command, as the shell takes them; its program takes none of them for an option.
pub fn shell_quote_all<'w>(words: impl IntoIterator<Item = &'w str>) -> String {
    let words: Vec<&str> = words.into_iter().collect();
    let end_of_options = words.iter().any(|word| word.starts_with('-')).then(|| "--".to_owned());
    end_of_options.into_iter().chain(words.into_iter().map(shell_quote)).collect::<Vec<_>>().join(" ")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidKey {
    Empty,
    TooLong { bytes: usize },
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("a snapshot key must not be empty"),
            Self::TooLong { bytes } => {
                write!(f, "a snapshot key of {bytes} bytes is too long, the limit is {}", Key::MAX_BYTES)
            }
        }
    }
}

/// The number of a snapshot and the name of its directory. Never handed out twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub u64);

impl SnapshotId {
    /// No node counts this far, so a directory with a higher number is not ours.
    const MAX: u64 = 1 << 48;

    /// The id that a directory name stands for, if it is written exactly as we write it.
    pub fn from_directory_name(name: &str) -> Option<Self> {
        let id = name.parse().ok().map(Self).filter(Self::is_possible)?;
        (id.to_string() == name).then_some(id)
    }

    /// Whether it can have a directory.
    pub fn is_possible(&self) -> bool {
        self.0 <= Self::MAX
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A SHA-256 digest in its one canonical spelling, `sha256:` and 64 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest(String);

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        Self::parse(&text)
    }
}

impl Digest {
    const ALGORITHM: &'static str = "sha256:";
    const HEX_DIGITS: usize = 64;

    pub fn parse(text: &str) -> Result<Self, InvalidDigest> {
        let hex = text.strip_prefix(Self::ALGORITHM).ok_or(InvalidDigest::Algorithm)?;
        if hex.len() != Self::HEX_DIGITS {
            return Err(InvalidDigest::Length { digits: hex.len() });
        }
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(InvalidDigest::NotLowerHex);
        }
        Ok(Self(text.to_owned()))
    }

    pub fn hex(&self) -> &str {
        &self.0[Self::ALGORITHM.len()..]
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidDigest {
    Algorithm,
    Length { digits: usize },
    NotLowerHex,
}

impl fmt::Display for InvalidDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Algorithm => f.write_str("a layer digest must begin with \"sha256:\""),
            Self::Length { digits } => {
                write!(f, "a sha256 digest has {} hex digits, not {digits}", Digest::HEX_DIGITS)
            }
            Self::NotLowerHex => f.write_str("a sha256 digest is written in lower-case hex digits"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    View,
    Active,
    Committed,
}

impl Kind {
    /// The kind that `as_str` calls so.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::View, Self::Active, Self::Committed].into_iter().find(|kind| kind.as_str() == name)
    }

    /// The word that containerd's filters use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

pub type Labels = BTreeMap<String, String>;

/// All labels of a snapshot together, in bytes. containerd allows 4096 for one; a snapshot
/// must always fit into a message of a List.
pub const MAX_LABELS_BYTES: usize = 1 << 20;

/// Most labels of a snapshot. containerd has some dozens at most.
pub const MAX_LABELS: usize = 1024;

/// Most snapshots of a chain, the one on top included. overlayfs itself takes 500 lower directories.
pub const MAX_CHAIN: usize = 512;

/// Longest path of a unix socket, in bytes; the kernel's `sun_path` has room for one more.
pub const MAX_SOCKET_PATH: usize = 107;

/// Nanoseconds since the epoch, UTC: what containerd compares to the last digit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp(pub i64);

impl Timestamp {
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The year 2262 is the end of this type, as it is of Go's.
        Self(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }
}

/// Disk use of a snapshot by itself, without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub size: i64,
    /// Distinct inodes.
    pub inodes: i64,
}

/// A layer that a repository publishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub digest: Digest,
    /// The repository it was pulled from; for people, the digest alone finds the files.
    pub repository: String,
}

/// A snapshot as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub key: Key,
    pub parent: Option<Key>,
    pub kind: Kind,
    pub created: Timestamp,
    pub updated: Timestamp,
    pub labels: Labels,
    /// Present: a remote snapshot, its files are the published layer's. Absent: a local one.
    pub layer: Option<Layer>,
    /// Of a committed local snapshot, once somebody asked.
    pub usage: Option<Usage>,
}

impl Snapshot {
    /// Bytes that it takes in memory, about.
    pub fn approximate_size(&self) -> usize {
        /// What a text, and a node of a map, cost besides their bytes.
        const LABEL_OVERHEAD: usize = 64;
        let texts = [Some(&self.key), self.parent.as_ref()]
            .into_iter()
            .flatten()
            .map(|key| key.as_str().len() + LABEL_OVERHEAD);
        let labels = self.labels.iter().map(|(label, value)| label.len() + value.len() + 2 * LABEL_OVERHEAD);
        size_of::<Self>() + texts.chain(labels).sum::<usize>()
    }
}

/// A mount that containerd is to perform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub kind: MountKind,
    pub source: String,
    pub options: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountKind {
    Bind,
    Overlay,
}

impl MountKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Overlay => "overlay",
        }
    }
}

/// How a published layer is attached: where its link `snapshots/<id>/fs` leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// The link leads to a read-only bind mount of the layer.
    Bind,
    /// The link leads to the layer itself, so there is no mount.
    Symlink,
}

/// The address at which metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_has_one_spelling() {
        let good = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(Digest::parse(&good).map(|d| d.hex().to_owned()), Ok("0123456789abcdef".repeat(4)));
        for (bad, why) in [
            (String::new(), InvalidDigest::Algorithm),
            ("0".repeat(64), InvalidDigest::Algorithm),
            (format!("sha512:{}", "0".repeat(128)), InvalidDigest::Algorithm),
            (format!("SHA256:{}", "0".repeat(64)), InvalidDigest::Algorithm),
            ("sha256:".to_owned(), InvalidDigest::Length { digits: 0 }),
            (format!("sha256:{}", "0".repeat(65)), InvalidDigest::Length { digits: 65 }),
            (format!("sha256:{}", "A".repeat(64)), InvalidDigest::NotLowerHex),
            (format!("sha256:../{}", "0".repeat(61)), InvalidDigest::NotLowerHex),
            (format!("sha256:{}\0", "0".repeat(63)), InvalidDigest::NotLowerHex),
            (format!("sha256:{}", "é".repeat(32)), InvalidDigest::NotLowerHex),
        ] {
            assert_eq!(Digest::parse(&bad), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn a_key_is_any_text_within_its_bounds() {
        assert_eq!(Key::parse(""), Err(InvalidKey::Empty));
        assert!(Key::parse(&"k".repeat(Key::MAX_BYTES)).is_ok());
        assert_eq!(Key::parse(&"k".repeat(32_769)), Err(InvalidKey::TooLong { bytes: 32_769 }));
        assert!(Key::parse("k8s.io/12/../../etc \0 \n").is_ok());
        assert_eq!(Key::parse_optional(""), Ok(None));
    }

    #[test]
    fn a_long_key_is_cut_in_messages() {
        let text = Key::parse(&"é".repeat(3000)).unwrap().to_string();
        assert!(text.ends_with("… (6000 bytes)"), "{text}");
    }

    #[test]
    fn only_our_own_spelling_is_a_snapshot_directory() {
        assert_eq!(SnapshotId::from_directory_name("12"), Some(SnapshotId(12)));
        for other in ["", "012", "+12", "12x", "new-12", "-1", "99999999999999999999999", "18446744073709551615"] {
            assert_eq!(SnapshotId::from_directory_name(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_reference_cannot_break_out_of_the_command() {
        assert_eq!(shell_quote("registry.example:5000/a/b@sha256:00"), "registry.example:5000/a/b@sha256:00");
        assert_eq!(shell_quote("a'; rm -rf /"), "'a'\\''; rm -rf /'");
        assert_eq!(shell_quote_all(["a:1", "b c"]), "a:1 'b c'");
        assert_eq!(shell_quote_all(["a:1", "-rf"]), "-- a:1 -rf");
    }
}
