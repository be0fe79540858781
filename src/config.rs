//! The configuration file: TOML, a superset of the Go snapshotter's.
//!
//! A wrong value is an error that names key, value, line and what is allowed. An unknown
//! key is only a warning, because files in the field have containerd's own keys mixed in.
#![forbid(unsafe_code)]

pub mod file;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::logging::{self, Format};
use crate::model::{AttachMode, MAX_SOCKET_PATH, MetricsAddress};

pub const DEFAULT_PATH: &str = "/etc/containerd-cvmfs-grpc/config.toml";
const CVMFS: &str = "/cvmfs";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// In the order in which they are asked; never empty.
    pub repositories: Vec<RepositoryConfig>,
    /// So long a call waits for an answer of a repository.
    pub repository_timeout: Duration,
    pub attach: AttachMode,
    /// Threads that do the work of calls. None: the larger of 32 and the number of cores.
    pub workers: Option<usize>,
    /// Calls that may wait for a worker.
    pub queue: usize,
    /// Users besides root that may connect, by number.
    pub allowed_uids: Vec<u32>,
    pub log_format: Format,
    /// None: what the command line says.
    pub log_level: Option<LevelFilter>,
    /// Where metrics are served. None: nowhere.
    pub metrics: Option<MetricsAddress>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            repositories: vec![RepositoryConfig::named(DEFAULT_REPOSITORY)],
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

/// A repository and the directory where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryConfig {
    /// Fully qualified name, or the path where only that is known.
    pub name: String,
    pub path: PathBuf,
}

impl RepositoryConfig {
    fn named(name: &str) -> Self {
        Self { name: name.to_owned(), path: Path::new(CVMFS).join(name) }
    }
}

const DEFAULT_REPOSITORY: &str = "unpacked.cern.ch";
const DEFAULT_TIMEOUT: RangeInclusive<i64> = 1..=3600;
const DEFAULT_WORKERS_PER_CPU: RangeInclusive<i64> = 1..=256;
const DEFAULT_QUEUE: RangeInclusive<i64> = 1..=65_536;
const MIN_DEFAULT_WORKERS: usize = 32;

/// Threads of all pools of workers together. The unit has `TasksMax=4096`, and the threads that ask
/// repositories, scan and serve come on top.
const MAX_POOL_THREADS: usize = 2_048;

impl Config {
    /// Threads for calls that wait for one repository, or for the answers to a pull. As many as workers,
    /// unless all pools together would have more than `MAX_POOL_THREADS`.
    pub fn blocking_threads(&self) -> usize {
        let pools = self.repositories.len() + 1;
        let share = MAX_POOL_THREADS.saturating_sub(self.worker_threads()) / pools;
        self.worker_threads().min(share.max(1))
    }

    /// They cost little: most of the time they wait for the disk, and those that wait together
    /// share one wait. So there are more than cores.
    pub fn worker_threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| cores().max(MIN_DEFAULT_WORKERS))
    }
}

/// A configuration and what was odd about its file.
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
        write!(f, "line {}: unknown key {:?} is passed over", self.line, self.key)
    }
}

#[derive(Debug)]
pub enum Error {
    Unreadable { path: PathBuf, cause: file::Error },
    Syntax { path: PathBuf, line: usize, why: String },
    Value { path: PathBuf, line: usize, key: String, value: String, allowed: &'static str },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, cause } => write!(f, "cannot read the configuration {}: {cause}", path.display()),
            Self::Syntax { path, line, why } => write!(f, "{}, line {line}: not TOML: {why}", path.display()),
            Self::Value { path, line, key, value, allowed } => {
                write!(f, "{}, line {line}: {key} = {value} is not possible: {allowed}", path.display())
            }
        }
    }
}

impl std::error::Error for Error {}

/// Reads the file at `path`, or the one at the default path if it is there.
pub fn load(path: Option<&Path>) -> Result<LoadedConfig, Error> {
    let named = path.unwrap_or(Path::new(DEFAULT_PATH));
    match file::read_to_string(named) {
        Ok(text) => parse(named, &text),
        Err(file::Error::Unreadable(cause)) if path.is_none() && cause.kind() == io::ErrorKind::NotFound => {
            Ok(LoadedConfig::default())
        }
        Err(cause) => Err(Error::Unreadable { path: named.to_owned(), cause }),
    }
}

/// One key of the file, for messages.
struct Setting<'t> {
    path: &'t Path,
    line: usize,
    key: &'t str,
    text: &'t str,
    value: &'t DeValue<'t>,
}

impl Setting<'_> {
    fn invalid<T>(&self, allowed: &'static str) -> Result<T, Error> {
        Err(Error::Value {
            path: self.path.to_owned(),
            line: self.line,
            key: self.key.to_owned(),
            value: self.text.to_owned(),
            allowed,
        })
    }

    fn string(&self, allowed: &'static str) -> Result<&str, Error> {
        self.value.as_str().map_or_else(|| self.invalid(allowed), Ok)
    }

    fn number(&self, range: RangeInclusive<i64>, allowed: &'static str) -> Result<usize, Error> {
        let number = self.value.as_integer().and_then(|n| i64::from_str_radix(n.as_str(), n.radix()).ok());
        match number.filter(|n| range.contains(n)).map(usize::try_from) {
            Some(Ok(number)) => Ok(number),
            _ => self.invalid(allowed),
        }
    }
}

pub(crate) fn parse(path: &Path, text: &str) -> Result<LoadedConfig, Error> {
    let line_of = |byte: usize| text[..byte.min(text.len())].matches('\n').count() + 1;
    let table = DeTable::parse(text).map_err(|e| Error::Syntax {
        path: path.to_owned(),
        line: line_of(e.span().map_or(0, |span| span.start)),
        why: e.message().to_owned(),
    })?;
    let mut loaded = LoadedConfig::default();
    let mut named = RepositoryKeys::default();
    for (key, value) in table.get_ref() {
        let entry = Setting {
            path,
            line: line_of(key.span().start),
            key: key.get_ref(),
            text: text.get(value.span()).unwrap_or_default(),
            value: Spanned::get_ref(value),
        };
        if !named.set(&entry)? && !set(&mut loaded.config, &entry)? {
            loaded.unknown.push(UnknownKey { key: entry.key.to_owned(), line: entry.line });
        }
    }
    loaded.config.repositories = named.validate_repositories(path)?;
    loaded.unknown.sort_by_key(|unknown| unknown.line);
    Ok(loaded)
}

/// Whether the key is one of ours.
fn set(config: &mut Config, entry: &Setting<'_>) -> Result<bool, Error> {
    match entry.key {
        "repository-timeout" => {
            let seconds = entry.number(DEFAULT_TIMEOUT, "it is a number of seconds from 1 to 3600")?;
            config.repository_timeout = Duration::from_secs(seconds.try_into().unwrap_or(u64::MAX));
        }
        "attach" => {
            const ALLOWED: &str = "it is \"bind\" or \"symlink\"";
            config.attach = match entry.string(ALLOWED)? {
                "bind" => AttachMode::Bind,
                "symlink" => AttachMode::Symlink,
                _ => return entry.invalid(ALLOWED),
            };
        }
        "workers" => config.workers = Some(entry.number(DEFAULT_WORKERS_PER_CPU, "it is a number from 1 to 256")?),
        "queue" => config.queue = entry.number(DEFAULT_QUEUE, "it is a number from 1 to 65536")?,
        "allowed-uids" => {
            const ALLOWED: &str = "it is a list of user ids, numbers from 0 to 4294967294";
            let Some(list) = entry.value.as_array() else { return entry.invalid(ALLOWED) };
            for one in list {
                let uid = Spanned::get_ref(one).as_integer();
                let uid = uid.and_then(|n| u32::from_str_radix(n.as_str(), n.radix()).ok());
                config
                    .allowed_uids
                    .push(uid.filter(|uid| *uid != u32::MAX).map_or_else(|| entry.invalid(ALLOWED), Ok)?);
            }
        }
        "log-format" => {
            const ALLOWED: &str = "it is \"json\" or \"text\"";
            config.log_format = match entry.string(ALLOWED)? {
                "json" => Format::Json,
                "text" => Format::Text,
                _ => return entry.invalid(ALLOWED),
            };
        }
        "log-level" => {
            let level = logging::parse_level(entry.string(logging::LEVELS)?);
            config.log_level = Some(level.map_or_else(|| entry.invalid(logging::LEVELS), Ok)?);
        }
        "metrics-address" => {
            config.metrics = match entry.string(METRICS_ALLOWED)? {
                "" => None,
                path if path.starts_with('/') => Some(MetricsAddress::Unix(socket_path(entry, path)?)),
                address => Some(MetricsAddress::Tcp(tcp_address(entry, address)?)),
            };
        }
        _ => return Ok(false),
    }
    Ok(true)
}

const METRICS_ALLOWED: &str = "it is an IP address with a port, such as \"127.0.0.1:9812\", or an absolute path";

fn tcp_address(entry: &Setting<'_>, text: &str) -> Result<SocketAddr, Error> {
    match text.parse::<SocketAddr>() {
        // The kernel would choose one, and Prometheus would not know which.
        Ok(address) if address.port() == 0 => entry.invalid("its port is a number from 1 to 65535"),
        Ok(address) => Ok(address),
        Err(_) => entry.invalid(METRICS_ALLOWED),
    }
}

/// A path that a socket can be bound to; its directory is looked at when it is.
fn socket_path(entry: &Setting<'_>, path: &str) -> Result<PathBuf, Error> {
    if path.len() > MAX_SOCKET_PATH {
        entry.invalid("the path of a socket has 107 bytes at most")
    } else if path.ends_with('/') || path.contains(['%', '#', '?', '\0']) {
        entry.invalid("the path of a socket does not end in a slash, and has no %, # and ?")
    } else {
        Ok(PathBuf::from(path))
    }
}

/// The keys that name repositories; together they are one list.
#[derive(Default)]
struct RepositoryKeys {
    repository: Option<String>,
    /// With the line and the text, for messages.
    mountpoint: Option<(PathBuf, usize, String)>,
    more: Vec<RepositoryConfig>,
    /// Of `repositories`.
    line: usize,
}

impl RepositoryKeys {
    /// Whether the key is one of these.
    fn set(&mut self, entry: &Setting<'_>) -> Result<bool, Error> {
        match entry.key {
            "repository" => {
                const ALLOWED: &str = "it is the name of a repository, letters, digits, dots, dashes and underscores";
                let name = entry.string(ALLOWED)?;
                if !is_repository_name(name) {
                    return entry.invalid(ALLOWED);
                }
                self.repository = Some(name.to_owned());
            }
            "absolute-mountpoint" => {
                const ALLOWED: &str =
                    "it is an absolute path below \"/\", without \"..\", colons, commas, quotes or backslashes";
                let path = entry.string(ALLOWED)?;
                // The Go snapshotter takes an empty text as "not given".
                if !path.is_empty() {
                    if !is_mountpoint(path) {
                        return entry.invalid(ALLOWED);
                    }
                    self.mountpoint = Some((PathBuf::from(path), entry.line, entry.text.to_owned()));
                }
            }
            "repositories" => {
                const ALLOWED: &str = "it is a list of names of repositories and of absolute paths";
                let Some(list) = entry.value.as_array() else { return entry.invalid(ALLOWED) };
                self.line = entry.line;
                for one in list {
                    self.more.push(match Spanned::get_ref(one).as_str() {
                        Some(name) if is_repository_name(name) => RepositoryConfig::named(name),
                        Some(path) if is_mountpoint(path) => {
                            RepositoryConfig { name: path.to_owned(), path: PathBuf::from(path) }
                        }
                        _ => return entry.invalid(ALLOWED),
                    });
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `repository` first, if the file names it or names no other.
    fn validate_repositories(self, file: &Path) -> Result<Vec<RepositoryConfig>, Error> {
        let refuse = |line, key: &str, value, allowed| {
            Err(Error::Value { path: file.to_owned(), line, key: key.to_owned(), value, allowed })
        };
        let mut all = Vec::new();
        if self.repository.is_some() || self.more.is_empty() {
            let mut first = RepositoryConfig::named(self.repository.as_deref().unwrap_or(DEFAULT_REPOSITORY));
            if let Some((path, ..)) = self.mountpoint {
                first.path = path;
            }
            all.push(first);
        } else if let Some((_, line, text)) = self.mountpoint {
            const ALLOWED: &str =
                "it says where \"repository\" is, which is not named; put the path into \"repositories\"";
            return refuse(line, "absolute-mountpoint", text, ALLOWED);
        }
        for one in self.more {
            if all.iter().any(|other| other.name == one.name || other.path == one.path) {
                return refuse(self.line, "repositories", format!("{:?}", one.name), "it is named before");
            }
            all.push(one);
        }
        Ok(all)
    }
}

fn is_repository_name(name: &str) -> bool {
    let well_formed = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    well_formed && name.split('.').all(|part| !part.is_empty())
}

fn is_mountpoint(path: &str) -> bool {
    let odd = path.chars().any(|c| matches!(c, ':' | ',' | '\\' | '"') || c.is_control());
    path.len() > 1 && path.starts_with('/') && !odd && !path.split('/').any(|part| part == "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<LoadedConfig, String> {
        parse(Path::new("config.toml"), text).map_err(|e| e.to_string())
    }

    /// The start waited for the writer of a FIFO for ever, and `/dev/zero` took all memory.
    #[test]
    fn what_is_no_file_or_a_huge_one_is_refused_at_once_with_path_and_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let load = |path: &Path| super::load(Some(path)).map_err(|e| e.to_string());
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let longest = usize::try_from(file::MAX_BYTES).unwrap();
        let huge = dir.path().join("huge");
        std::fs::write(&huge, "#".repeat(longest + 1)).unwrap();
        for (path, why) in [
            (fifo.as_path(), "it is a FIFO and no regular file"),
            (dir.path(), "it is a directory and no regular file"),
            (Path::new("/dev/zero"), "it is a device and no regular file"),
            (&huge, "it has more than 1048576 bytes"),
        ] {
            let error = load(path).unwrap_err();
            assert!(error.starts_with(&format!("cannot read the configuration {}: {why}", path.display())), "{error}");
            assert!(error.ends_with("with --config") && !error.contains('\n'), "{error}");
        }
        std::fs::write(&huge, "#".repeat(longest)).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&huge, &link).unwrap();
        for path in [&huge, &link, Path::new("/dev/null")] {
            assert_eq!(load(path), Ok(LoadedConfig::default()), "{}", path.display());
        }
        let without_size = load(Path::new("/proc/self/cmdline")).unwrap_err();
        assert!(without_size.contains("not TOML"), "{without_size}");
        std::fs::write(&huge, [b'#', 0xff]).unwrap();
        assert!(load(&huge).unwrap_err().ends_with("huge: it is not UTF-8"));
        assert!(load(&dir.path().join("none")).unwrap_err().contains("No such file"));
    }

    #[test]
    fn the_packaged_file_says_the_defaults() {
        let packaged = include_str!("../packaging/config.toml");
        assert_eq!(read(packaged), Ok(LoadedConfig::default()));
        // Every key stands in it, as a comment with its default: uncommented, the file still
        // says the defaults, and knows no other key.
        let uncommented: String = packaged
            .lines()
            .map(|line| {
                line.strip_prefix("#").filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase())).unwrap_or(line)
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let loaded = read(&uncommented).unwrap();
        assert_eq!(loaded.unknown, []);
        let defaults =
            Config { workers: loaded.config.workers, log_level: Some(LevelFilter::Info), ..Config::default() };
        assert_eq!(loaded.config, defaults);
        for key in [
            "repository",
            "absolute-mountpoint",
            "repositories",
            "repository-timeout",
            "attach",
            "workers",
            "queue",
            "log-format",
            "log-level",
        ] {
            assert!(uncommented.contains(&format!("\n{key} = ")), "{key} is not documented");
        }
    }

    #[test]
    fn keys_of_the_go_snapshotter_mean_the_same() {
        let (osg, packed) = ("singularity.opensciencegrid.org", "unpacked.cern.ch");
        for (text, expected) in [
            (
                "repository = \"singularity.opensciencegrid.org\"\nabsolute-mountpoint = \"\"\n",
                vec![(osg, "/cvmfs/singularity.opensciencegrid.org")],
            ),
            ("absolute-mountpoint = \"/mnt/a\"", vec![(packed, "/mnt/a")]),
            ("", vec![(packed, "/cvmfs/unpacked.cern.ch")]),
            ("repositories = []", vec![(packed, "/cvmfs/unpacked.cern.ch")]),
            ("repositories = [\"a.b\", \"/mnt/x\"]", vec![("a.b", "/cvmfs/a.b"), ("/mnt/x", "/mnt/x")]),
            (
                "repositories = [\"a.b\"]\nrepository = \"c.d\"\nabsolute-mountpoint = \"/mnt/c\"",
                vec![("c.d", "/mnt/c"), ("a.b", "/cvmfs/a.b")],
            ),
        ] {
            let found: Vec<_> = read(text).unwrap().config.repositories;
            let found: Vec<_> = found.iter().map(|r| (r.name.as_str(), r.path.to_str().unwrap())).collect();
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn repositories_that_contradict_each_other_are_refused() {
        for (text, message) in [
            ("repositories = [\"a.b\", \"a.b\"]", "line 1: repositories = \"a.b\" is not possible: it is named before"),
            ("repository = \"a.b\"\nrepositories = [\"/cvmfs/a.b\"]", "line 2: repositories"),
            ("absolute-mountpoint = \"/m\"\nrepositories = [\"a.b\"]", "line 1: absolute-mountpoint"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    /// They were taken, and the daemon served without metrics, or on a port that nobody knew.
    #[test]
    fn a_metrics_address_that_cannot_be_served_on_is_refused() {
        let long = |bytes: usize| format!("/{}", "s".repeat(bytes - 1));
        let read = |address: &str| read(&format!("metrics-address = {address:?}")).map(|loaded| loaded.config.metrics);
        for (address, why) in [
            ("127.0.0.1:0", "its port is a number from 1 to 65535"),
            ("[::]:0", "its port is a number from 1 to 65535"),
            ("127.0.0.1", "it is an IP address with a port"),
            ("localhost:9812", "it is an IP address with a port"),
            ("relative.sock", "it is an IP address with a port"),
            (&long(MAX_SOCKET_PATH + 1), "the path of a socket has 107 bytes at most"),
            ("/run/metrics/", "the path of a socket does not end in a slash"),
            ("/", "the path of a socket does not end in a slash"),
            ("/run/a%41", "and has no %, # and ?"),
        ] {
            let error = read(address).unwrap_err();
            let names_it = error.starts_with(&format!("config.toml, line 1: metrics-address = {address:?} is not"));
            assert!(names_it && error.contains(why), "{error}");
        }
        for address in ["127.0.0.1:1", "[::1]:65535"] {
            assert_eq!(read(address), Ok(Some(MetricsAddress::Tcp(address.parse().unwrap()))));
        }
        let longest = long(MAX_SOCKET_PATH);
        assert_eq!(read(&longest), Ok(Some(MetricsAddress::Unix(PathBuf::from(longest)))));
        assert_eq!(read(""), Ok(None));
    }

    #[test]
    fn unknown_keys_are_named_with_their_lines() {
        let loaded = read("version = 2\nrepository = \"r\"\n\n[plugins.x]\n  y = 1\n[proxy_plugins]\n").unwrap();
        let shown: Vec<String> = loaded.unknown.iter().map(ToString::to_string).collect();
        assert_eq!(loaded.config.repositories, [RepositoryConfig::named("r")]);
        assert_eq!(
            shown,
            [
                "line 1: unknown key \"version\" is passed over",
                "line 4: unknown key \"plugins\" is passed over",
                "line 6: unknown key \"proxy_plugins\" is passed over"
            ]
        );
    }

    #[test]
    fn a_wrong_value_is_refused_with_key_value_line_and_remedy() {
        assert_eq!(
            read("repository = \"r\"\nattach = \"copy\""),
            Err("config.toml, line 2: attach = \"copy\" is not possible: it is \"bind\" or \"symlink\"".to_owned())
        );
        for text in [
            "repository = 5",
            "repository = \"\"",
            "repository = \"../etc\"",
            "repository = \"a/b\"",
            "repository = \"..\"",
            "absolute-mountpoint = \"relative\"",
            "absolute-mountpoint = \"/a/../b\"",
            "absolute-mountpoint = \"/a:b\"",
            "absolute-mountpoint = true",
            "repositories = \"a\"",
            "repositories = [\"../a\"]",
            "repositories = [\"/a:b\"]",
            "repositories = [\"/\"]",
            "repositories = [\"a..b\"]",
            "repository = \"a.\"",
            "repositories = [1]",
            "repository-timeout = 0",
            "repository-timeout = \"10s\"",
            "attach = 1",
            "workers = 0",
            "workers = 257",
            "workers = -1",
            "workers = 99999999999999999999",
            "workers = \"4\"",
            "queue = 0",
            "queue = 1.5",
            "log-format = \"xml\"",
            "log-level = \"loud\"",
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with("config.toml, line 1: ") && error.contains(" is not possible: "), "{error}");
        }
        assert!(read("repository =").unwrap_err().contains("line 1: not TOML"));
        assert!(read("repository = \"a\"\nrepository = \"b\"").unwrap_err().contains("line 2: not TOML"));
    }

    #[test]
    fn threads_of_all_pools_together_are_bounded() {
        for (workers, repositories, blocking_pools) in [(32, 1, 32), (256, 1, 256), (256, 12, 137), (256, 500, 3)] {
            let mut config = Config { workers: Some(workers), ..Config::default() };
            config.repositories = vec![config.repositories[0].clone(); repositories];
            assert_eq!(config.blocking_threads(), blocking_pools);
            assert!(workers + (repositories + 1) * blocking_pools <= MAX_POOL_THREADS);
        }
    }
}
