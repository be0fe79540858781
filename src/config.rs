//! The configuration file: TOML, with the keys of the Go snapshotter and more.
//!
//! A wrong value is an error that names the line, the key, the value and what is expected. An unknown key is only a
//! warning, because files in the field also hold keys of containerd. A new key needs a field, an entry in `KEYS`, and
//! its default in `packaging/config.toml`.
#![forbid(unsafe_code)]

pub mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _, IgnoredAny};
use toml::Spanned;

use crate::logging::{self, Format};
use crate::model::{AttachMode, MAX_SOCKET_PATH, MetricsAddress};

pub const DEFAULT_PATH: &str = "/etc/containerd-cvmfs-grpc/config.toml";

/// Every key of the file.
const KEYS: [&str; 11] = [
    "repository",
    "absolute-mountpoint",
    "repositories",
    "repository-timeout",
    "attach",
    "workers",
    "queue",
    "allowed-uids",
    "log-format",
    "log-level",
    "metrics-address",
];

#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Config {
    /// The repositories in the order in which they are searched for a layer. There is at least one.
    #[serde(skip)]
    pub repositories: Vec<RepositoryConfig>,
    /// How long a call waits for an answer of a repository.
    #[serde(deserialize_with = "seconds")]
    pub repository_timeout: Duration,
    #[serde(deserialize_with = "attach_mode")]
    pub attach: AttachMode,
    /// Number of worker threads. Without the key it is the larger of 32 and the number of cores.
    #[serde(deserialize_with = "worker_count")]
    pub workers: Option<usize>,
    /// Maximum number of calls that wait for a worker.
    #[serde(deserialize_with = "number::<_, 1, 65_536>")]
    pub queue: usize,
    /// Numeric ids of the users besides root that may connect.
    #[serde(deserialize_with = "user_ids")]
    pub allowed_uids: Vec<u32>,
    #[serde(deserialize_with = "log_format")]
    pub log_format: Format,
    /// Without the key, the command line or the default decides.
    #[serde(deserialize_with = "log_level")]
    pub log_level: Option<LevelFilter>,
    /// Without an address, no metrics are served.
    #[serde(rename = "metrics-address", deserialize_with = "metrics_address")]
    pub metrics: Option<MetricsAddress>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            repositories: vec![RepositoryConfig::from_name(DEFAULT_REPOSITORY)],
            repository_timeout: Duration::from_secs(10),
            attach: AttachMode::Symlink,
            workers: None,
            queue: 1024,
            allowed_uids: Vec::new(),
            log_format: Format::Json,
            log_level: None,
            metrics: None,
        }
    }
}

/// A repository and the directory where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryConfig {
    /// The fully qualified name, or the path if only that is configured.
    pub name: String,
    pub path: PathBuf,
}

impl RepositoryConfig {
    fn from_name(name: &str) -> Self {
        Self { name: name.to_owned(), path: Path::new(CVMFS_ROOT).join(name) }
    }
}

const CVMFS_ROOT: &str = "/cvmfs";
const DEFAULT_REPOSITORY: &str = "unpacked.cern.ch";
const MIN_DEFAULT_WORKERS: usize = 32;

/// Maximum number of threads of all worker pools together. The unit has `TasksMax=4096`, and the threads that ask
/// repositories, scan and serve come on top.
const MAX_POOL_THREADS: usize = 2_048;

impl Config {
    /// Number of threads of a pool whose calls wait for one repository, or for the answers to a pull. It equals the
    /// number of workers, unless all pools together would have more than `MAX_POOL_THREADS`.
    pub fn blocking_threads(&self) -> usize {
        let pools = self.repositories.len() + 1;
        let share = MAX_POOL_THREADS.saturating_sub(self.worker_threads()) / pools;
        self.worker_threads().min(share.max(1))
    }

    /// Number of worker threads. There are more than cores, because workers mostly wait for the disk, and writes that
    /// wait at the same time share one wait.
    pub fn worker_threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| cores().max(MIN_DEFAULT_WORKERS))
    }
}

/// A configuration and the unknown keys of its file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadedConfig {
    pub config: Config,
    pub unknown: Vec<UnknownKey>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKey {
    pub key: String,
    pub line: usize,
}

impl fmt::Display for UnknownKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: unknown key {:?} (ignored)", self.line, self.key)
    }
}

#[derive(Debug)]
pub enum Error {
    Unreadable { path: PathBuf, cause: file::Error },
    Syntax { path: PathBuf, line: usize, reason: String },
    Value { path: PathBuf, line: usize, key: String, value: String, reason: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, cause } => write!(f, "cannot read the configuration {}: {cause}", path.display()),
            Self::Syntax { path, line, reason } => write!(f, "{}, line {line}: not TOML: {reason}", path.display()),
            Self::Value { path, line, key, value, reason } => {
                write!(f, "{}, line {line}: invalid value {value} for {key}: {reason}", path.display())
            }
        }
    }
}

impl std::error::Error for Error {}

/// Reads the file at `path`, or the one at the default path if it exists.
pub fn load(path: Option<&Path>) -> Result<LoadedConfig, Error> {
    let file = path.unwrap_or(Path::new(DEFAULT_PATH));
    match file::read_to_string(file) {
        Ok(text) => parse(file, &text),
        Err(file::Error::Unreadable(cause)) if path.is_none() && cause.kind() == io::ErrorKind::NotFound => {
            Ok(LoadedConfig::default())
        }
        Err(cause) => Err(Error::Unreadable { path: file.to_owned(), cause }),
    }
}

pub(crate) fn parse(path: &Path, text: &str) -> Result<LoadedConfig, Error> {
    let document = Document::parse(path, text)?;
    let mut config: Config = document.deserialize()?;
    config.repositories = document.deserialize::<RepositoryKeys>()?.into_repositories(&document)?;
    Ok(LoadedConfig { config, unknown: document.unknown_keys() })
}

/// The text of a file with the positions of its keys and values, for messages.
struct Document<'t> {
    path: &'t Path,
    text: &'t str,
    entries: BTreeMap<Spanned<String>, Spanned<IgnoredAny>>,
}

impl<'t> Document<'t> {
    fn parse(path: &'t Path, text: &'t str) -> Result<Self, Error> {
        let mut document = Self { path, text, entries: BTreeMap::new() };
        document.entries = toml::from_str(text).map_err(|e| document.syntax_error(&e))?;
        Ok(document)
    }

    /// Deserializes all keys that `T` has a field for.
    fn deserialize<T: DeserializeOwned>(&self) -> Result<T, Error> {
        toml::from_str(self.text).map_err(|e| {
            let position = e.span().map_or(0, |span| span.start);
            match self.entries.iter().find(|(_, value)| value.span().contains(&position)) {
                Some((key, _)) => self.invalid(key.get_ref(), e.message()),
                None => self.syntax_error(&e),
            }
        })
    }

    fn syntax_error(&self, error: &toml::de::Error) -> Error {
        let position = error.span().map_or(0, |span| span.start);
        Error::Syntax { path: self.path.to_owned(), line: self.line(position), reason: error.message().to_owned() }
    }

    /// The error that says why the value of `key` cannot be used.
    fn invalid(&self, key: &str, reason: &str) -> Error {
        let entry = self.entries.get_key_value(key);
        let (key_start, value) = entry.map_or((0, 0..0), |(key, value)| (key.span().start, value.span()));
        Error::Value {
            path: self.path.to_owned(),
            line: self.line(key_start),
            key: key.to_owned(),
            value: self.text.get(value).unwrap_or_default().to_owned(),
            reason: reason.to_owned(),
        }
    }

    fn line(&self, position: usize) -> usize {
        self.text[..position.min(self.text.len())].matches('\n').count() + 1
    }

    /// Keys that are not ours, in the order of the file.
    fn unknown_keys(&self) -> Vec<UnknownKey> {
        let unknown = self.entries.keys().filter(|key| !KEYS.contains(&key.get_ref().as_str()));
        let mut unknown: Vec<UnknownKey> =
            unknown.map(|key| UnknownKey { key: key.get_ref().clone(), line: self.line(key.span().start) }).collect();
        unknown.sort_by_key(|unknown| unknown.line);
        unknown
    }
}

/// Deserializes a `V` and converts it. Whatever fails, the error says what is `expected`.
fn convert<'de, D: Deserializer<'de>, V: Deserialize<'de>, T>(
    deserializer: D,
    expected: &str,
    convert: impl FnOnce(V) -> Option<T>,
) -> Result<T, D::Error> {
    let value = V::deserialize(deserializer).ok().and_then(convert);
    value.ok_or_else(|| D::Error::custom(format_args!("expected {expected}")))
}

/// A number from `MIN` to `MAX`.
fn number<'de, D: Deserializer<'de>, const MIN: usize, const MAX: usize>(deserializer: D) -> Result<usize, D::Error> {
    convert(deserializer, &format!("a number from {MIN} to {MAX}"), |number: usize| {
        (MIN..=MAX).contains(&number).then_some(number)
    })
}

fn worker_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    number::<_, 1, 256>(deserializer).map(Some)
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    convert(deserializer, "a number of seconds from 1 to 3600", |seconds: u64| {
        (1..=3600).contains(&seconds).then_some(Duration::from_secs(seconds))
    })
}

fn attach_mode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AttachMode, D::Error> {
    convert(deserializer, "\"bind\" or \"symlink\"", |name: String| {
        [AttachMode::Bind, AttachMode::Symlink].into_iter().find(|mode| mode.as_str() == name)
    })
}

fn user_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    convert(deserializer, "a list of user ids, numbers from 0 to 4294967294", |uids: Vec<u32>| {
        // The kernel uses the highest number for "no user".
        (!uids.contains(&u32::MAX)).then_some(uids)
    })
}

fn log_format<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Format, D::Error> {
    convert(deserializer, "\"json\" or \"text\"", |format: String| match format.as_str() {
        "json" => Some(Format::Json),
        "text" => Some(Format::Text),
        _ => None,
    })
}

fn log_level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<LevelFilter>, D::Error> {
    convert(deserializer, logging::LEVELS, |level: String| logging::parse_level(&level)).map(Some)
}

fn metrics_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<MetricsAddress>, D::Error> {
    const EXPECTED: &str = "an IP address with a port, such as \"127.0.0.1:9812\", or an absolute path";
    let address: String = convert(deserializer, EXPECTED, Some)?;
    let expected = |what: &str| Err(D::Error::custom(format_args!("expected {what}")));
    if address.is_empty() {
        Ok(None)
    } else if address.len() > MAX_SOCKET_PATH && address.starts_with('/') {
        expected("the path of a socket of at most 107 bytes")
    } else if address.starts_with('/') && (address.ends_with('/') || address.contains(['%', '#', '?', '\0'])) {
        expected("the path of a socket, without %, # and ?, and without a slash at the end")
    } else if address.starts_with('/') {
        Ok(Some(MetricsAddress::Unix(PathBuf::from(address))))
    } else {
        match address.parse::<SocketAddr>() {
            // The kernel would choose a port, and Prometheus would not know which.
            Ok(address) if address.port() == 0 => expected("a port from 1 to 65535"),
            Ok(address) => Ok(Some(MetricsAddress::Tcp(address))),
            Err(_) => expected(EXPECTED),
        }
    }
}

/// The keys that name repositories. Together they make one list.
#[derive(Default, serde::Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct RepositoryKeys {
    #[serde(deserialize_with = "repository_name")]
    repository: Option<String>,
    #[serde(deserialize_with = "mountpoint")]
    absolute_mountpoint: Option<PathBuf>,
    #[serde(deserialize_with = "repository_list")]
    repositories: Vec<RepositoryConfig>,
}

impl RepositoryKeys {
    /// All repositories. `repository` comes first, if the file has that key or names no other repository.
    fn into_repositories(self, document: &Document<'_>) -> Result<Vec<RepositoryConfig>, Error> {
        let mut all: Vec<RepositoryConfig> = Vec::new();
        if self.repository.is_some() || self.repositories.is_empty() {
            let mut first = RepositoryConfig::from_name(self.repository.as_deref().unwrap_or(DEFAULT_REPOSITORY));
            if let Some(path) = self.absolute_mountpoint {
                first.path = path;
            }
            all.push(first);
        } else if self.absolute_mountpoint.is_some() {
            const REASON: &str =
                "it is the path of \"repository\", which is not set; put the path into \"repositories\"";
            return Err(document.invalid("absolute-mountpoint", REASON));
        }
        for repository in self.repositories {
            if all.iter().any(|other| other.name == repository.name || other.path == repository.path) {
                return Err(document.invalid("repositories", &format!("{:?} is named twice", repository.name)));
            }
            all.push(repository);
        }
        Ok(all)
    }
}

fn repository_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    const EXPECTED: &str = "the name of a repository: letters, digits, dots, dashes and underscores";
    convert(deserializer, EXPECTED, |name: String| is_repository_name(&name).then_some(name)).map(Some)
}

fn mountpoint<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    const EXPECTED: &str = "an absolute path below \"/\", without \"..\", colons, commas, quotes or backslashes";
    convert(deserializer, EXPECTED, |path: String| match path.as_str() {
        // The Go snapshotter treats an empty path as not set.
        "" => Some(None),
        path => is_mountpoint(path).then(|| Some(PathBuf::from(path))),
    })
}

fn repository_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<RepositoryConfig>, D::Error> {
    let repository = |entry: String| match entry.as_str() {
        name if is_repository_name(name) => Some(RepositoryConfig::from_name(name)),
        path if is_mountpoint(path) => Some(RepositoryConfig { path: PathBuf::from(path), name: entry }),
        _ => None,
    };
    convert(deserializer, "a list of repository names and absolute paths", |list: Vec<String>| {
        list.into_iter().map(repository).collect()
    })
}

fn is_repository_name(name: &str) -> bool {
    let has_valid_characters = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    has_valid_characters && name.split('.').all(|part| !part.is_empty())
}

/// Whether `path` can be a repository's directory: the options of an overlay mount must be able to name it.
fn is_mountpoint(path: &str) -> bool {
    let has_forbidden_character = path.chars().any(|c| matches!(c, ':' | ',' | '\\' | '"') || c.is_control());
    path.len() > 1 && path.starts_with('/') && !has_forbidden_character && !path.split('/').any(|part| part == "..")
}

#[cfg(test)]
mod tests;
