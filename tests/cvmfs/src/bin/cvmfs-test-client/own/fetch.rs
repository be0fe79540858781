//! Objects over HTTP into a folder on disk, decompressed, each once.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use flate2::read::ZlibDecoder;
use ureq::Agent;

use cvmfs_testbed::format::{self, Digest, Kind, Malformed, Manifest};

/// The real client gives up on a dead server after a few seconds too.
const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub enum Error {
    Http {
        url: String,
        error: Box<ureq::Error>,
    },
    /// The bytes do not have the name under which they are published.
    WrongBytes {
        expected: Digest,
        found: Digest,
    },
    Cache {
        path: PathBuf,
        error: io::Error,
    },
    Catalog {
        path: PathBuf,
        error: rusqlite::Error,
    },
    Malformed(Malformed),
}

impl Display for Error {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http { url, error } => write!(f, "fetch {url}: {error}"),
            Self::WrongBytes { expected, found } => {
                write!(f, "fetch object {expected}: its bytes are those of {found}")
            }
            Self::Cache { path, error } => write!(f, "use the cache at {path:?}: {error}"),
            Self::Catalog { path, error } => write!(f, "read the catalog at {path:?}: {error}"),
            Self::Malformed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// Whether nobody answered, not even with a refusal.
    fn is_unreachable(&self) -> bool {
        matches!(self, Self::Http { error, .. } if !matches!(**error, ureq::Error::StatusCode(_)))
    }
}

impl From<Malformed> for Error {
    fn from(error: Malformed) -> Self {
        Self::Malformed(error)
    }
}

pub struct Fetch {
    url: String,
    cache: PathBuf,
    agent: Agent,
    /// Between the first try and the second, when the server cannot be reached.
    retry_delay: Duration,
    /// The lock of each object that is being fetched. Other readers of the object wait for it.
    running: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
}

impl Fetch {
    pub fn new(url: &str, cache: &Path, retry_delay: Duration) -> Result<Self, Error> {
        for byte in 0..=255_u8 {
            let path = cache.join(format!("data/{byte:02x}"));
            fs::create_dir_all(&path).map_err(|error| Error::Cache { path, error })?;
        }
        let config = Agent::config_builder().timeout_global(Some(DEADLINE)).proxy(None).build();
        let (url, cache) = (url.to_owned(), cache.to_owned());
        Ok(Self { url, cache, agent: config.into(), retry_delay, running: Mutex::default() })
    }

    /// Never from the cache.
    pub fn manifest(&self) -> Result<Manifest, Error> {
        Ok(Manifest::parse(&self.get(format::MANIFEST)?)?)
    }

    /// The decompressed object as a file in the cache.
    pub fn object(&self, digest: Digest, kind: Kind) -> Result<PathBuf, Error> {
        let name = digest.object_path(kind);
        let path = self.cache.join(&name);
        if path.exists() {
            return Ok(path);
        }
        let turn =
            Arc::clone(self.running.lock().unwrap_or_else(PoisonError::into_inner).entry(path.clone()).or_default());
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        if path.exists() {
            return Ok(path);
        }
        let compressed = self.get(&name)?;
        let found = Digest::of(&compressed);
        if found != digest {
            return Err(Error::WrongBytes { expected: digest, found });
        }
        let failed = |error| Error::Cache { path: path.clone(), error };
        let mut bytes = Vec::new();
        ZlibDecoder::new(compressed.as_slice()).read_to_end(&mut bytes).map_err(failed)?;
        let temporary = path.with_extension("new");
        fs::write(&temporary, &bytes).map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)?;
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
        Ok(path)
    }

    fn get(&self, name: &str) -> Result<Vec<u8>, Error> {
        match self.try_get(name) {
            Err(error) if error.is_unreachable() => {
                thread::sleep(self.retry_delay);
                self.try_get(name)
            }
            answer => answer,
        }
    }

    fn try_get(&self, name: &str) -> Result<Vec<u8>, Error> {
        let url = format!("{}/{name}", self.url);
        let failed = |error| Error::Http { url: url.clone(), error: Box::new(error) };
        let mut response = self.agent.get(&url).call().map_err(failed)?;
        // The default limit is 10 MB.
        response.body_mut().with_config().limit(u64::MAX).read_to_vec().map_err(failed)
    }
}
