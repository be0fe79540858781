//! What a repository publishes: from digests to the directories with their files.
//!
//! Only reads. A layer lies in `<repository>/.layers/<first 2 hex>/<64 hex>/layerfs`, keyed
//! by the digest of the compressed blob; the whole root file system of an image in
//! `.flat/<first 2 hex>/<64 hex>`, keyed by the digest of its configuration. Any directory in
//! that layout will do. Each question may hang, so it is asked on one of the repository's own
//! threads (`start`, `wait`), and nowhere else.
#![forbid(unsafe_code)]

pub mod health;
pub mod lane;
pub mod manifest;
pub mod scan;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use self::health::{Health, Sick};
use self::lane::{AllStuck, Lane, Lost, Ticket, Turn};
use self::manifest::{ImageRef, Manifest};
use crate::sys::{self, FileType, Sys};
use crate::types::Digest;

const LAYERS: &str = ".layers";
const LAYER_ROOT: &str = "layerfs";
const FLAT: &str = ".flat";
/// Every CernVM-FS mount answers this at its root with its name.
const MAGIC_NAME: &str = "user.fqrn";

/// Questions that are asked at once, and threads that may be stuck in one.
const CALLS: (usize, usize) = (4, 16);
/// Walks over layers at once, each of them with a few threads, and such that may be stuck.
const SCANS: (usize, usize) = (2, 6);
/// Entries that are looked at to see whose they are.
const OWNED_ENTRIES: usize = 32;

/// Why something cannot be had from a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The repository is there and does not have it.
    NotPublished,
    /// The repository's directory is there, but no repository is in it.
    NotMounted {
        repository: PathBuf,
    },
    Unreadable(sys::Error),
    NotADirectory {
        path: PathBuf,
    },
    /// Nothing came back in time.
    NoAnswer {
        limit: Duration,
    },
    /// It did not answer others, and is not asked until a probe succeeds.
    Sick(Sick),
    /// All its threads wait for it.
    Stuck {
        threads: usize,
    },
    /// The markers are still being looked for, so many directories are done.
    BeingScanned {
        directories: usize,
    },
    Unscannable(scan::Error),
    /// The configuration names no such repository any more.
    NotConfigured,
}

impl Missing {
    /// It is not there, as opposed to: it cannot be had right now.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::NotPublished | Self::NotConfigured)
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPublished => f.write_str("the repository does not have it"),
            Self::NotMounted { repository } => {
                write!(f, "no repository is mounted on {0}: {0}/{LAYERS} is missing", repository.display())
            }
            Self::Unreadable(cause) => cause.fmt(f),
            Self::NotADirectory { path } => write!(f, "{} is not a directory", path.display()),
            Self::NoAnswer { limit } => {
                write!(f, "the repository did not answer within {} s (repository-timeout)", limit.as_secs())
            }
            Self::Sick(sick) => sick.fmt(f),
            Self::Stuck { threads } => write!(f, "{threads} threads wait for the repository in vain"),
            Self::BeingScanned { directories } => {
                write!(f, "it is still being looked through, {directories} directories are done")
            }
            Self::Unscannable(cause) => cause.fmt(f),
            Self::NotConfigured => f.write_str("the configuration does not name the repository any more"),
        }
    }
}

/// The top directory of something that is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Top {
    pub path: PathBuf,
    pub owner: (u32, u32),
}

pub struct Repository {
    name: String,
    path: PathBuf,
    timeout: Duration,
    sys: Arc<dyn Sys>,
    health: Health,
    calls: Lane,
    scans: Lane,
    /// Somebody was told that the owners of files are lost.
    owners_told: AtomicBool,
}

impl Repository {
    /// A wait for its answers takes `timeout` at most.
    pub fn new(name: String, path: PathBuf, timeout: Duration, sys: Arc<dyn Sys>) -> Self {
        let probe = {
            let (path, sys) = (path.clone(), Arc::clone(&sys));
            Box::new(move || probe(sys.as_ref(), &path).map_err(|why| why.to_string()))
        };
        Self {
            health: Health::new(&name, timeout, probe),
            calls: Lane::new("repository", CALLS.0, CALLS.1, timeout),
            scans: Lane::new("scan", SCANS.0, SCANS.1, timeout),
            name,
            path,
            timeout,
            sys,
            owners_told: AtomicBool::new(false),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Has `job` done on a thread of the repository. Nobody waits for one that does not answer.
    /// What the job brings after its ticket was given up goes to `late`.
    pub fn start<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<Ticket<T>, Missing> {
        self.health.check().map_err(Missing::Sick)?;
        self.calls.start(Turn::Last, job, late).map_err(|stuck| self.stuck(stuck))
    }

    /// What the job brought, if it does within the limit.
    pub fn wait<T>(&self, ticket: Ticket<T>) -> Result<T, Missing> {
        // Where another wait has ended in vain, this one need not take as long.
        ticket.wait(self.timeout, || self.health.is_hopeless()).map_err(|lost| match lost {
            Lost::Late => self.no_answer(),
            // Its own message is in the log. The fence of our caller answers the call.
            Lost::Panicked => panic!("a job on a thread of repository {} panicked", self.name),
        })
    }

    pub fn ask<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T, Missing> {
        self.wait(self.start(job, drop)?)
    }

    /// Has a long walk done, on other threads; nobody is told of its end.
    pub fn walk(&self, turn: Turn, job: impl FnOnce() + Send + 'static) -> Result<(), Missing> {
        self.health.check().map_err(Missing::Sick)?;
        self.scans.run(turn, Box::new(job)).map_err(|stuck| self.stuck(stuck))
    }

    /// To be told to whoever waited in vain.
    pub fn no_answer(&self) -> Missing {
        if let Some(sick) = self.health.sick() {
            return Missing::Sick(sick);
        }
        let missing = Missing::NoAnswer { limit: self.timeout };
        self.health.suspect(missing.to_string());
        missing
    }

    fn stuck(&self, AllStuck { threads }: AllStuck) -> Missing {
        let missing = Missing::Stuck { threads };
        self.health.suspect(missing.to_string());
        missing
    }

    /// What a failed call means.
    pub fn unreadable(&self, error: sys::Error) -> Missing {
        if error.is_dead() {
            self.health.suspect(error.to_string());
        }
        Missing::Unreadable(error)
    }

    /// Asks whether it is there, without waiting, and says so if it is not.
    pub fn look(repository: &Arc<Self>) {
        let asked = Arc::clone(repository);
        let look = move || match probe(asked.sys.as_ref(), &asked.path) {
            Ok(()) => log::info!(repository = asked.name.as_str();
                "repository {} is there, at {}", asked.name, asked.path.display()),
            Err(why) => log::warn!(repository = asked.name.as_str();
                "repository {} is not there yet: {}; layers are downloaded until it is, and nothing has to be \
                 restarted then", asked.name, asked.known(why)),
        };
        if let Err(why) = repository.calls.run(Turn::Last, Box::new(look)).map_err(|stuck| repository.stuck(stuck)) {
            log::warn!(repository = repository.name.as_str(); "repository {}: {why}", repository.name);
        }
    }

    /// The top of an unpacked layer. Asks the repository, as all that follow do.
    pub fn layer(&self, digest: &Digest) -> Result<Top, Missing> {
        self.directory(self.in_store(LAYERS, digest).join(LAYER_ROOT))
    }

    /// The whole root file system of the image with this configuration.
    pub fn flat(&self, config: &Digest) -> Result<Top, Missing> {
        self.directory(self.in_store(FLAT, config))
    }

    /// The manifest of an image, and where it was found. None: it has none that can be used.
    pub fn manifest(&self, image: &ImageRef) -> Result<Option<Manifest>, Missing> {
        for path in image.manifests() {
            let path = self.path.join(path);
            match self.sys.read_file(&path, manifest::MOST_BYTES) {
                Ok(text) => match Manifest::parse(&text) {
                    Ok(manifest) => return Ok(Some(manifest)),
                    Err(why) => log::warn!(repository = self.name.as_str();
                        "{} is passed over: {why}", path.display()),
                },
                Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(e) => return Err(self.unreadable(e)),
            }
        }
        Ok(None)
    }

    fn in_store(&self, store: &str, digest: &Digest) -> PathBuf {
        self.path.join(store).join(&digest.hex()[..2]).join(digest.hex())
    }

    fn directory(&self, path: PathBuf) -> Result<Top, Missing> {
        // A link may lead out of the repository, to files of the host.
        let look = || match self.sys.lstat(&path) {
            Ok(status) if status.file_type == FileType::Directory => Ok(Some((status.uid, status.gid))),
            Ok(_) => Err(Missing::NotADirectory { path: path.clone() }),
            Err(e) if e.errno == Errno::ENOENT => Ok(None),
            Err(e) => Err(self.unreadable(e)),
        };
        let owner = if let Some(owner) = look()? {
            owner
        } else {
            mounted(self.sys.as_ref(), &self.path).map_err(|e| self.known(e))?;
            // It may have been mounted after the first look.
            look()?.ok_or(Missing::NotPublished)?
        };
        // The kernel answers `stat` from its caches long after a FUSE server has died.
        self.sys.statfs(&path).map_err(|e| self.unreadable(e))?;
        Ok(Top { path, owner })
    }

    fn known(&self, missing: Missing) -> Missing {
        match missing {
            Missing::Unreadable(e) => self.unreadable(e),
            other => other,
        }
    }

    /// Says once if nothing at the top of an image belongs to root: the publisher dropped the
    /// owners, or the client shows one of its own. Nobody but the site's admin can mend that.
    pub fn notice_owners(&self, what: &str, top: &Path) {
        if self.owners_told.load(Ordering::Relaxed) {
            return;
        }
        let Ok(entries) = self.sys.read_dir(top) else { return };
        let owners: Option<Vec<_>> = entries
            .iter()
            .take(OWNED_ENTRIES)
            .map(|(name, _)| self.sys.lstat(&top.join(name)).ok().map(|status| (status.uid, status.gid)))
            .collect();
        let Some([(uid, gid), others @ ..]) = owners.as_deref() else { return };
        let is_one = *uid != 0 && !others.is_empty() && others.iter().all(|(other, _)| other == uid);
        if is_one && !self.owners_told.swap(true, Ordering::Relaxed) {
            log::warn!(repository = self.name.as_str();
                "everything in {what} of repository {} belongs to uid {uid}, gid {gid}: containers will see that \
                 instead of the owners of the image. Either the CernVM-FS client claims the files (set \
                 CVMFS_CLAIM_OWNERSHIP=no), or the publisher dropped the owners (map {uid} to 0 with CVMFS_UID_MAP \
                 and {gid} to 0 with CVMFS_GID_MAP); see docs/repository.md", self.name);
        }
    }
}

/// Whether a repository is mounted at `path`, or a directory with its layout is there.
fn mounted(sys: &dyn Sys, path: &Path) -> Result<(), Missing> {
    let layers = path.join(LAYERS);
    match sys.stat(&layers) {
        Ok(_) => sys.statfs(&layers).map(drop).map_err(Missing::Unreadable),
        // A new repository has nothing in it, and is one all the same.
        Err(e) if e.errno == Errno::ENOENT => match sys.attribute(path, MAGIC_NAME) {
            Ok(Some(_)) => Ok(()),
            Err(e) if e.is_dead() => Err(Missing::Unreadable(e)),
            Ok(None) | Err(_) => Err(Missing::NotMounted { repository: path.to_owned() }),
        },
        Err(e) => Err(Missing::Unreadable(e)),
    }
}

/// Something that caches cannot answer.
fn probe(sys: &dyn Sys, path: &Path) -> Result<(), Missing> {
    sys.statfs(path).map_err(Missing::Unreadable)?;
    mounted(sys, path)?;
    match sys.for_each_entry(path, &mut |_, _| {}) {
        Err(e) => Err(Missing::Unreadable(e)),
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Host;
    use std::fs;

    fn digest(digit: char) -> Digest {
        Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap()
    }

    #[test]
    fn absent_means_not_published_only_where_a_repository_is() {
        let dir = tempfile::tempdir().unwrap();
        let timeout = Duration::from_secs(10);
        let repository = Repository::new("r".into(), dir.path().join("cvmfs"), timeout, Arc::new(Host));
        let layer = |digit| repository.layer(&digest(digit)).map(|top| top.path);
        let nowhere = Missing::NotMounted { repository: dir.path().join("cvmfs") };
        assert_eq!(layer('a'), Err(nowhere.clone()));
        fs::create_dir(dir.path().join("cvmfs")).unwrap();
        assert_eq!(layer('a'), Err(nowhere));
        fs::create_dir(dir.path().join("cvmfs/.layers")).unwrap();
        assert_eq!(layer('a'), Err(Missing::NotPublished));
        let top = dir.path().join(format!("cvmfs/.layers/aa/{}/layerfs", "a".repeat(64)));
        fs::create_dir_all(&top).unwrap();
        assert_eq!(layer('a'), Ok(top));
        let file = dir.path().join(format!("cvmfs/.layers/bb/{}/layerfs", "b".repeat(64)));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        assert_eq!(layer('b'), Err(Missing::NotADirectory { path: file }));
        let link = dir.path().join(format!("cvmfs/.layers/cc/{}/layerfs", "c".repeat(64)));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink("/etc", &link).unwrap();
        assert_eq!(layer('c'), Err(Missing::NotADirectory { path: link }));
    }

    /// It was mounted between the two questions, and the answer was "not published".
    #[test]
    fn a_repository_that_is_mounted_in_the_middle_of_a_question_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let (cvmfs, away) = (dir.path().join("cvmfs"), dir.path().join("away"));
        let path = format!(".layers/aa/{}/layerfs", "a".repeat(64));
        fs::create_dir_all(away.join(&path)).unwrap();
        let (from, to) = (away, cvmfs.clone());
        let sys = crate::sys::failing::Failing::meanwhile(move |_, asked| {
            if asked == to.join(LAYERS) {
                let _ = fs::rename(&from, &to);
            }
        });
        let repository = Repository::new("r".into(), cvmfs.clone(), Duration::from_secs(10), Arc::new(sys));
        assert_eq!(repository.layer(&digest('a')).map(|top| top.path), Ok(cvmfs.join(path)));
    }

    #[test]
    fn a_new_repository_without_layers_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        xattr::set(dir.path(), MAGIC_NAME, b"a.test").unwrap();
        let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(Host));
        assert_eq!(repository.layer(&digest('a')), Err(Missing::NotPublished));
    }
}
