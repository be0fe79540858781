//! What a repository publishes: from digests to the directories with their files.
//!
//! Only reads. A layer lies in `<repository>/.layers/<first 2 hex>/<64 hex>/layerfs`, keyed
//! by the digest of the compressed blob. Any directory in that layout will do. The roots of whole
//! images that a publisher unpacks below `.flat` are not read: they differ from the images.
//! Each question may hang, so it is asked on one of the repository's own
//! threads (`spawn`, `PendingCall::wait`), and nowhere else. Threads and health belong to one mount of
//! the repository: what hangs in an old mount is nothing to one that was mounted in its place.
#![forbid(unsafe_code)]

mod availability;
pub mod client;
pub mod executor;
pub mod health;
pub mod manifest;
pub mod owners;
pub mod scan;
pub mod server_health;
mod status;
mod unavailable;

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::Mutex;

use self::availability::AvailabilityCache;
use self::executor::{
    HangTolerantPool, Heartbeat, JobHandle, PoolExhausted, Priority, ThreadBudget, WaitError, WaitLimits,
    record_progress,
};
use self::health::Health;
use self::manifest::{ImageRef, Manifest};
use self::owners::OwnerSample;
use self::server_health::{RepositoryServer, ServerHealth};
pub use self::status::{HIDE_ATTRIBUTES, RepositoryStatus, own_attributes};
pub use self::unavailable::{Remedy, Unavailable};
use crate::metrics::METRICS;
use crate::model::Digest;
use crate::system::{self, DirHandle, FileType, NOT_REGULAR, Sys};

const LAYERS: &str = ".layers";
const LAYER_ROOT: &str = "layerfs";
/// Every CernVM-FS mount answers this at its root with its name.
const FQRN_XATTR: &str = "user.fqrn";

/// The client answers with the hash of the root catalog, which is another one whenever something was published.
const ROOT_HASH_XATTR: &str = "user.root_hash";

/// Questions that are asked at once, and threads that may be stuck in one.
const CALL_THREADS: (usize, usize) = (4, 16);
/// Walks over layers at once, each of them with a few threads, and such that may be stuck.
const SCAN_THREADS: (usize, usize) = (2, 6);
/// Threads that answer questions, begin scans and ask for a lost server, of one repository: those included that hang in
/// mounts which were replaced, and without the helpers of scans and the probes.
const MAX_THREADS: usize = 64;
/// A repository that gets on is waited for longer than one that does not answer: so many times.
const TOTAL_WAIT_FACTOR: u32 = 6;

pub struct Repository {
    name: String,
    path: PathBuf,
    timeout: Duration,
    sys: Arc<dyn Sys>,
    mount: Mutex<Arc<MountGeneration>>,
    /// Of all mounts that came one after the other.
    threads: ThreadBudget,
}

/// One mount of a repository: its threads, its health and what is known of it. A remount is another one.
pub struct MountGeneration {
    number: u64,
    health: Health,
    watch: AvailabilityCache,
    server: ServerHealth,
    calls: HangTolerantPool,
    scans: HangTolerantPool,
    /// What was mounted there when it ceased to answer; see `Sys::mounted_fuse`.
    device: Mutex<Option<u64>>,
    /// When the last question was asked that showed that its layers can be used.
    usable: Mutex<Option<Instant>>,
    client_attributes: OnceLock<Arc<Vec<OsString>>>,
    /// A sample of the layers is being read, or showed whose the files are.
    is_sampled: AtomicBool,
    /// What the last sample showed, as it was logged.
    sample: Mutex<Option<OwnerSample>>,
}

/// The next mount has threads of its own.
impl Drop for MountGeneration {
    fn drop(&mut self) {
        self.health.close();
        self.server.close();
        self.calls.close();
        self.scans.close();
    }
}

/// What a repository showed at some time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryState {
    /// That of the file system with the layers.
    pub device: u64,
    /// The hash of the root catalog, which a client of CernVM-FS tells. While it is the same, all that is shown is.
    root_hash: Option<Vec<u8>>,
}

impl RepositoryState {
    /// Whether another state that is equal shows the same layers. A plain directory changes, and nothing tells.
    pub fn tells_changes(&self) -> bool {
        self.root_hash.is_some()
    }
}

/// The result of a job on a thread of the repository, once it is there.
pub struct PendingCall<T> {
    ticket: JobHandle<T>,
    mount: Arc<MountGeneration>,
    repository: Arc<Repository>,
}

impl Repository {
    /// Questions that are asked at once.
    pub const PARALLELISM: usize = CALL_THREADS.0;

    /// A wait for its answers takes `timeout` at most.
    pub fn new(name: String, path: PathBuf, timeout: Duration, sys: Arc<dyn Sys>) -> Self {
        let threads = ThreadBudget::new(MAX_THREADS);
        let mount = Mutex::new(Arc::new(MountGeneration::new(0, &name, &path, timeout, &threads, &sys)));
        Self { name, path, timeout, sys, mount, threads }
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

    /// The mount that is there now.
    pub fn mount(&self) -> Arc<MountGeneration> {
        let mut current = self.mount.lock();
        if current.health.outage().is_some() {
            let device = self.sys.mounted_fuse(&self.path).ok().flatten();
            if device.is_some() && device != *current.device.lock() {
                log::info!(repository = self.name.as_str(); "repository {} was mounted anew", self.name);
                let number = current.number + 1;
                let next = MountGeneration::new(number, &self.name, &self.path, self.timeout, &self.threads, &self.sys);
                *current = Arc::new(next);
            }
        }
        Arc::clone(&current)
    }

    /// When a call that begins now waits no longer, even if the repository gets on.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.timeout * TOTAL_WAIT_FACTOR
    }

    /// Has `job` done on a thread of the repository. Nobody waits for one that does not answer.
    /// What the job brings after its ticket was given up goes to `late`.
    pub fn spawn<T: Send + 'static>(
        repository: &Arc<Self>,
        job: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<PendingCall<T>, Unavailable> {
        let mount = repository.mount();
        mount.health.check().map_err(Unavailable::Sick)?;
        let ticket = mount.calls.start(job, late).map_err(|stuck| repository.report_exhausted(&mount, stuck))?;
        Ok(PendingCall { ticket, mount, repository: Arc::clone(repository) })
    }

    pub fn call<T: Send + 'static>(
        repository: &Arc<Self>,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        let until = repository.deadline();
        Self::spawn(repository, job, drop)?.wait(until)
    }

    fn report_timeout(&self, mount: &MountGeneration) -> Unavailable {
        if let Some(outage) = mount.health.outage() {
            return Unavailable::Sick(outage);
        }
        let missing = Unavailable::NoAnswer { limit: self.timeout };
        self.mark_unhealthy(mount, missing.to_string());
        missing
    }

    fn report_exhausted(&self, mount: &MountGeneration, PoolExhausted { threads }: PoolExhausted) -> Unavailable {
        if threads == 0 {
            // It was not asked, so nothing is known about it.
            return Unavailable::NoThread;
        }
        let missing = Unavailable::Stuck { threads };
        self.mark_unhealthy(mount, missing.to_string());
        missing
    }

    fn mark_unhealthy(&self, mount: &MountGeneration, why: String) {
        if mount.health.outage().is_none() {
            *mount.device.lock() = self.sys.mounted_fuse(&self.path).ok().flatten();
        }
        mount.health.mark_unhealthy(why);
    }

    /// What a failed call means.
    pub fn unreadable(&self, error: system::Error) -> Unavailable {
        if error.is_dead() {
            self.mark_unhealthy(&self.mount(), error.to_string());
        }
        self.unreachable(&error).unwrap_or(Unavailable::Unreadable(error))
    }

    /// What a client of CernVM-FS means by an input/output error.
    fn unreachable(&self, error: &system::Error) -> Option<Unavailable> {
        let below = error.path.strip_prefix(&self.path).ok().filter(|_| error.errno == Errno::EIO)?;
        let server = RepositoryServer::of(self.sys.as_ref(), &self.path)?;
        let unreachable = self.mount().server.report_error(below.to_owned(), error.clone(), server);
        Some(Unavailable::ServerUnreachable(Box::new(unreachable)))
    }

    /// Why a pull need not ask: it would wait for each of its layers until the client gives up.
    pub fn refusal_of_pulls(&self) -> Option<Unavailable> {
        self.mount().server.refusal_of_pulls().map(|why| Unavailable::ServerUnreachable(Box::new(why)))
    }

    /// Whether it can be used, as far as that is known: not older than a quarter of a minute, if
    /// somebody asks that often. Waits for nothing; a look goes on in the background.
    pub fn is_healthy_cached(repository: &Arc<Self>) -> bool {
        let mount = repository.mount();
        let is_sick = mount.health.outage().is_some();
        if !is_sick && mount.watch.try_begin_probe() {
            let (asked, of) = (Arc::clone(repository), Arc::clone(&mount));
            let look = move || of.watch.record(asked.check_layers_directory().is_ok());
            if mount.calls.run(Priority::Last, Heartbeat::default(), Box::new(look)).is_err() {
                mount.watch.record(false);
            }
        }
        !is_sick && mount.watch.can_be_used(repository.timeout) && mount.server.outage().is_none()
    }

    /// Asks whether it is there and its layers can be used. Runs on a thread of the repository.
    fn check_layers_directory(&self) -> Result<(), Unavailable> {
        probe(self.sys.as_ref(), &self.path)?;
        match lists_own_attributes(self.sys.as_ref(), &self.path) {
            Ok(false) => Ok(()),
            Ok(true) => Err(Unavailable::OwnAttributes),
            Err(e) => Err(Unavailable::Unreadable(e)),
        }
    }

    /// Asks whether it is there, without waiting, and says so if it is not.
    /// `state` is the device of the state root.
    pub fn log_availability(repository: &Arc<Self>, state: Option<u64>) {
        let asked = Arc::clone(repository);
        let look = move || match probe(asked.sys.as_ref(), &asked.path) {
            Ok(()) => {
                asked.warn_of_cache(state);
                log::info!(repository = asked.name.as_str();
                    "repository {} is there, at {}", asked.name, asked.path.display());
                Self::sample_layers(&asked);
            }
            Err(why) => log::warn!(repository = asked.name.as_str();
                "repository {} is not there yet: {}; layers are downloaded until it is, and no service has to be \
                 restarted then", asked.name, asked.note_failure(why)),
        };
        let mount = repository.mount();
        if let Err(stuck) = mount.calls.run(Priority::Last, Heartbeat::default(), Box::new(look)) {
            log::warn!(repository = repository.name.as_str();
                "repository {}: {}", repository.name, repository.report_exhausted(&mount, stuck));
        }
    }

    /// An unpacked layer, held open. Asks the repository, as all that follow do.
    pub fn layer(&self, digest: &Digest) -> Result<DirHandle, Unavailable> {
        self.layer_since(digest, Instant::now())
    }

    /// As `layer`. Whether the mount can be used need not be asked if it could by a question that was asked after
    /// `since`: one is enough for all layers of a container.
    pub fn layer_since(&self, digest: &Digest, since: Instant) -> Result<DirHandle, Unavailable> {
        let below = layer_path(digest);
        let layer = if let Some(layer) = self.open(&below)? {
            layer
        } else {
            mounted(self.sys.as_ref(), &self.path).map_err(|e| self.note_failure(e))?;
            // It may have been mounted after the first look.
            self.open(&below)?.ok_or(Unavailable::NotPublished)?
        };
        self.require_usable(&layer, false, since)?;
        Ok(layer)
    }

    /// What it shows now, unless it cannot be used. As with `layer_since`, whether it can be used is asked after `since`.
    /// Asks the repository.
    pub fn state(&self, since: Instant) -> Result<RepositoryState, Unavailable> {
        let unreadable = |e| self.unreadable(e);
        let layers = self.open(Path::new(LAYERS))?.ok_or(Unavailable::NotPublished)?;
        // The names of a plain directory's attributes mean nothing.
        let is_client = !self.client_attributes()?.is_empty();
        let root_hash = is_client.then(|| self.sys.attribute(&self.path, ROOT_HASH_XATTR).map_err(unreadable));
        let root_hash = root_hash.transpose()?.flatten();
        record_progress();
        // A client that answered this is alive.
        self.require_usable(&layers, root_hash.is_some(), since)?;
        let device = self.sys.dir_status(&layers).map_err(unreadable)?.device;
        Ok(RepositoryState { device, root_hash })
    }

    /// The inode of each of these layers. Asks the repository.
    pub fn inodes(&self, layers: &[Digest]) -> Result<Vec<u64>, Unavailable> {
        let all = self.open(Path::new(LAYERS))?.ok_or(Unavailable::NotPublished)?;
        let inode = |digest| {
            let layer = self.sys.open_below(&all, &below_layers(digest))?;
            self.sys.dir_status(&layer).inspect(|_| record_progress()).map(|status| status.inode)
        };
        layers.iter().map(|digest| inode(digest).map_err(|e| self.unreadable(e))).collect()
    }

    /// Where an unpacked layer is, if there is one. Asks nobody.
    pub fn layer_path(&self, digest: &Digest) -> PathBuf {
        self.path.join(layer_path(digest))
    }

    /// The names of the extended attributes that are not the layers' but the client's, which shows them
    /// on every file in some of its settings, and on its root in all of them.
    /// Asked once for each mount.
    pub fn client_attributes(&self) -> Result<Arc<Vec<OsString>>, Unavailable> {
        let mount = self.mount();
        if let Some(known) = mount.client_attributes.get() {
            return Ok(Arc::clone(known));
        }
        let mut names = self.sys.attribute_names(&self.path).map_err(|e| self.unreadable(e))?;
        record_progress();
        // A directory on a disk has attributes of its own, and none of a client.
        if !names.iter().any(|name| name == FQRN_XATTR) {
            names.clear();
        }
        let names = Arc::new(names);
        Ok(Arc::clone(mount.client_attributes.get_or_init(|| names)))
    }

    /// The manifest of an image. None: it has none that can be used.
    pub fn manifest(&self, image: &ImageRef) -> Result<Option<Manifest>, Unavailable> {
        for path in image.manifests() {
            let at = self.path.join(&path);
            let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { continue };
            let text = match self.open(directory) {
                Ok(Some(directory)) => {
                    let read = self.sys.read_file(&directory.entry(name), manifest::MAX_BYTES);
                    read.map_err(|e| system::Error { path: at.clone(), ..e })
                }
                Ok(None) => continue,
                Err(Unavailable::LeadsOut { .. } | Unavailable::NotADirectory { .. }) => {
                    Err(system::Error { call: "read", path: at.clone(), errno: NOT_REGULAR })
                }
                Err(missing) => return Err(missing),
            };
            record_progress();
            let why = match text {
                Ok(text) => match Manifest::parse(&text) {
                    Ok(manifest) => return Ok(Some(manifest)),
                    Err(why) => why.to_string(),
                },
                Err(e) if is_no_file(e.errno) => e.to_string(),
                Err(e) => return Err(self.unreadable(e)),
            };
            log::warn!(repository = self.name.as_str(); "{} is passed over: {why}", at.display());
        }
        mounted(self.sys.as_ref(), &self.path).map_err(|e| self.note_failure(e))?;
        Ok(None)
    }

    /// Opens a directory of the repository. No link is followed: it may lead to files of the host.
    fn open(&self, below: &Path) -> Result<Option<DirHandle>, Unavailable> {
        let opened = self.sys.open_dir(&self.path).and_then(|root| {
            record_progress();
            self.sys.open_below(&root, below)
        });
        record_progress();
        match opened {
            Ok(directory) => Ok(Some(directory)),
            // A reference may be longer than names of files are.
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENAMETOOLONG) => Ok(None),
            Err(e) if matches!(e.errno, Errno::ELOOP | Errno::ENOTDIR) => Err(self.find_obstacle(below)),
            Err(e) => Err(self.unreadable(e)),
        }
    }

    /// What on the way to `below` is no directory.
    fn find_obstacle(&self, below: &Path) -> Unavailable {
        let mut path = self.path.clone();
        for name in below {
            path.push(name);
            match self.sys.lstat(&path).map(|status| status.file_type) {
                Ok(FileType::Directory) => record_progress(),
                Ok(FileType::Symlink) => return Unavailable::LeadsOut { path },
                Ok(FileType::Other) | Err(_) => break,
            }
        }
        Unavailable::NotADirectory { path }
    }

    /// Whether the client adds no attributes to the files of layers, and whether it is alive, which need not be asked if
    /// `is_alive`. `directory` is any of the repository.
    fn require_usable(&self, directory: &DirHandle, is_alive: bool, since: Instant) -> Result<(), Unavailable> {
        let mount = self.mount();
        if mount.usable.lock().is_some_and(|asked| asked >= since) {
            return Ok(());
        }
        let asked = Instant::now();
        if !is_alive {
            // The kernel answers `lstat` from its caches long after a FUSE server has died, and `statfs` never.
            self.sys.dir_statfs(directory).map_err(|e| self.unreadable(e))?;
            record_progress();
        }
        if lists_own_attributes(self.sys.as_ref(), &self.path).map_err(|e| self.unreadable(e))? {
            return Err(Unavailable::OwnAttributes);
        }
        *mount.usable.lock() = Some(asked);
        Ok(())
    }

    fn note_failure(&self, missing: Unavailable) -> Unavailable {
        match missing {
            Unavailable::Unreadable(e) => self.unreadable(e),
            other => other,
        }
    }
}

/// Where a repository has a layer.
fn layer_path(digest: &Digest) -> PathBuf {
    Path::new(LAYERS).join(below_layers(digest))
}

/// The same, below the directory of all layers.
fn below_layers(digest: &Digest) -> PathBuf {
    [&digest.hex()[..2], digest.hex(), LAYER_ROOT].iter().collect()
}

impl MountGeneration {
    fn new(
        number: u64,
        name: &str,
        path: &Path,
        timeout: Duration,
        threads: &ThreadBudget,
        sys: &Arc<dyn Sys>,
    ) -> Self {
        let probe = {
            let (path, sys) = (path.to_owned(), Arc::clone(sys));
            Box::new(move || probe(sys.as_ref(), &path).map_err(|why| why.to_string()))
        };
        let ask = {
            let (path, sys) = (path.to_owned(), Arc::clone(sys));
            Box::new(move |below: &Path| server_health::ProbeResult {
                result: list(sys.as_ref(), &path, below),
                io_errors: server_health::io_errors(sys.as_ref(), &path).unwrap_or(0),
            })
        };
        Self {
            number,
            health: Health::new(name, timeout, probe),
            watch: AvailabilityCache::default(),
            server: ServerHealth::new(name, threads, ask),
            calls: HangTolerantPool::new(name, "repository", CALL_THREADS, timeout, threads),
            scans: HangTolerantPool::new(name, "scan", SCAN_THREADS, timeout, threads),
            device: Mutex::default(),
            usable: Mutex::default(),
            client_attributes: OnceLock::new(),
            is_sampled: AtomicBool::new(false),
            sample: Mutex::default(),
        }
    }
}

impl MountGeneration {
    /// Counts the mounts of the repository that came one after the other.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Another wait has ended in vain, and a probe has not helped.
    pub fn is_confirmed_down(&self) -> bool {
        self.health.is_confirmed_down()
    }

    /// What is told to whoever waited in vain for this mount.
    pub fn report_no_answer(&self, repository: &Repository) -> Unavailable {
        repository.report_timeout(self)
    }

    /// Queues a scan, which has threads of its own; nobody is told of its end.
    pub fn spawn_scan(
        &self,
        repository: &Repository,
        turn: Priority,
        heartbeat: Heartbeat,
        job: impl FnOnce() + Send + 'static,
    ) -> Result<(), Unavailable> {
        self.health.check().map_err(Unavailable::Sick)?;
        self.scans.run(turn, heartbeat, Box::new(job)).map_err(|stuck| repository.report_exhausted(self, stuck))
    }
}

impl<T> PendingCall<T> {
    /// What the job brought, if the repository does not fall silent and it is done before `until`.
    pub fn wait(self, until: Instant) -> Result<T, Unavailable> {
        let Self { ticket, mount, repository } = self;
        let since = Instant::now();
        // Where another wait has ended in vain, this one need not take as long.
        let patience = WaitLimits { silence: repository.timeout, until };
        let result = ticket.wait(patience, || mount.health.is_confirmed_down());
        METRICS.record_wait(&repository.name, since);
        result.map_err(|lost| match lost {
            WaitError::Silent => repository.report_timeout(&mount),
            WaitError::Late => Unavailable::Slow { limit: repository.timeout * TOTAL_WAIT_FACTOR },
            WaitError::Dropped => Unavailable::NoThread,
            // Its own message is in the log. The fence of our caller answers the call.
            WaitError::Panicked => panic!("a job on a thread of repository {} panicked", repository.name),
        })
    }
}

/// What is there is no file, or none of a manifest's size. That does not change in a moment.
fn is_no_file(errno: Errno) -> bool {
    matches!(errno, Errno::ENOENT | Errno::ENOTDIR | NOT_REGULAR | Errno::EFBIG)
}

/// Whether a repository is mounted at `path`, or a directory with its layout is there.
fn mounted(sys: &dyn Sys, path: &Path) -> Result<(), Unavailable> {
    let layers = path.join(LAYERS);
    match sys.stat(&layers) {
        Ok(_) => sys.statfs(&layers).map(drop).map_err(Unavailable::Unreadable),
        // A new repository has nothing in it, and is one all the same.
        Err(e) if e.errno == Errno::ENOENT => match sys.attribute(path, FQRN_XATTR) {
            Ok(Some(_)) => Ok(()),
            Err(e) if e.is_dead() => Err(Unavailable::Unreadable(e)),
            Ok(None) | Err(_) => Err(Unavailable::NotMounted { repository: path.to_owned() }),
        },
        Err(e) => Err(Unavailable::Unreadable(e)),
    }
}

/// Whether the client lists the attributes that it makes up on every file, and not only at its root. No publisher can
/// give `.layers` any.
fn lists_own_attributes(sys: &dyn Sys, path: &Path) -> system::Result<bool> {
    let root = sys.open_dir(path)?;
    record_progress();
    let names = match sys.open_below(&root, Path::new(LAYERS)) {
        Ok(layers) => sys.dir_attribute_names(&layers)?,
        Err(e) if e.errno == Errno::ENOENT => Vec::new(),
        Err(e) => return Err(e),
    };
    record_progress();
    Ok(names.iter().any(|name| name == FQRN_XATTR))
}

/// Reads the directory `below` a repository's root, as far as its first entry.
fn list(sys: &dyn Sys, path: &Path, below: &Path) -> system::Result<()> {
    let root = sys.open_dir(path)?;
    sys.for_each_entry_below(&root, below, &mut |_, _| ControlFlow::Break(())).map(drop)
}

/// Something that caches cannot answer.
fn probe(sys: &dyn Sys, path: &Path) -> Result<(), Unavailable> {
    sys.statfs(path).map_err(Unavailable::Unreadable)?;
    mounted(sys, path)?;
    // To read the first names is enough of a question.
    sys.for_each_entry(path, &mut |_, _| ControlFlow::Break(())).map_err(Unavailable::Unreadable)
}

#[cfg(test)]
mod tests;
