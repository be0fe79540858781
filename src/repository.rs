//! What a repository publishes: from digests to the directories with their files.
//!
//! Only reads. A layer lies in `<repository>/.layers/<first 2 hex>/<64 hex>/layerfs`, keyed
//! by the digest of the compressed blob. Any directory in that layout will do. The roots of whole
//! images that a publisher unpacks below `.flat` are not read: they differ from the images.
//! Each question may hang, so it is asked on one of the repository's own
//! threads (`start`, `Asked::wait`), and nowhere else. Threads and health belong to one mount of
//! the repository: what hangs in an old mount is nothing to one that was mounted in its place.
#![forbid(unsafe_code)]

pub mod client;
mod condition;
pub mod health;
pub mod lane;
pub mod manifest;
mod missing;
pub mod owners;
pub mod scan;
pub mod server;
mod watch;

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::Mutex;

pub use self::condition::{Condition, HIDE_ATTRIBUTES, own_attributes};
use self::health::Health;
use self::lane::{AllStuck, Lane, Lost, Patience, Pulse, ThreadBudget, Ticket, Turn, alive};
use self::manifest::{ImageRef, Manifest};
pub use self::missing::{Missing, Remedy};
use self::owners::Sample;
use self::server::{Server, ServerHealth};
use self::watch::Watch;
use crate::metrics::METRICS;
use crate::sys::{self, DirHandle, FileType, NOT_REGULAR, Sys};
use crate::types::Digest;

const LAYERS: &str = ".layers";
const LAYER_ROOT: &str = "layerfs";
/// Every CernVM-FS mount answers this at its root with its name.
const MAGIC_NAME: &str = "user.fqrn";

/// The client answers with the hash of the root catalog, which is another one whenever something was published.
const MAGIC_ROOT_HASH: &str = "user.root_hash";

/// Questions that are asked at once, and threads that may be stuck in one.
const CALLS: (usize, usize) = (4, 16);
/// Walks over layers at once, each of them with a few threads, and such that may be stuck.
const SCANS: (usize, usize) = (2, 6);
/// Threads that answer questions, begin scans and ask for a lost server, of one repository: those included that hang in
/// mounts which were replaced, and without the helpers of scans and the probes.
const MAX_THREADS: usize = 64;
/// A repository that gets on is waited for longer than one that does not answer: so many times.
const SLOW: u32 = 6;

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
    watch: Watch,
    server: ServerHealth,
    calls: Lane,
    scans: Lane,
    /// What was mounted there when it ceased to answer; see `Sys::mounted_fuse`.
    device: Mutex<Option<u64>>,
    /// When the last question was asked that showed that its layers can be used.
    usable: Mutex<Option<Instant>>,
    client_attributes: OnceLock<Arc<Vec<OsString>>>,
    /// A sample of the layers is being read, or showed whose the files are.
    is_sampled: AtomicBool,
    /// What the last sample showed, as it was logged.
    sample: Mutex<Option<Sample>>,
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
pub struct Asked<T> {
    ticket: Ticket<T>,
    mount: Arc<MountGeneration>,
    repository: Arc<Repository>,
}

impl Repository {
    /// Questions that are asked at once.
    pub const AT_ONCE: usize = CALLS.0;

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
        if current.health.sick().is_some() {
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
    pub fn give_up_at(&self) -> Instant {
        Instant::now() + self.timeout * SLOW
    }

    /// Has `job` done on a thread of the repository. Nobody waits for one that does not answer.
    /// What the job brings after its ticket was given up goes to `late`.
    pub fn start<T: Send + 'static>(
        repository: &Arc<Self>,
        job: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<Asked<T>, Missing> {
        let mount = repository.mount();
        mount.health.check().map_err(Missing::Sick)?;
        let ticket = mount.calls.start(job, late).map_err(|stuck| repository.stuck(&mount, stuck))?;
        Ok(Asked { ticket, mount, repository: Arc::clone(repository) })
    }

    pub fn ask<T: Send + 'static>(
        repository: &Arc<Self>,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Missing> {
        let until = repository.give_up_at();
        Self::start(repository, job, drop)?.wait(until)
    }

    fn no_answer_of(&self, mount: &MountGeneration) -> Missing {
        if let Some(sick) = mount.health.sick() {
            return Missing::Sick(sick);
        }
        let missing = Missing::NoAnswer { limit: self.timeout };
        self.suspect(mount, missing.to_string());
        missing
    }

    fn stuck(&self, mount: &MountGeneration, AllStuck { threads }: AllStuck) -> Missing {
        if threads == 0 {
            // It was not asked, so nothing is known about it.
            return Missing::NoThread;
        }
        let missing = Missing::Stuck { threads };
        self.suspect(mount, missing.to_string());
        missing
    }

    fn suspect(&self, mount: &MountGeneration, why: String) {
        if mount.health.sick().is_none() {
            *mount.device.lock() = self.sys.mounted_fuse(&self.path).ok().flatten();
        }
        mount.health.suspect(why);
    }

    /// What a failed call means.
    pub fn unreadable(&self, error: sys::Error) -> Missing {
        if error.is_dead() {
            self.suspect(&self.mount(), error.to_string());
        }
        self.unreachable(&error).unwrap_or(Missing::Unreadable(error))
    }

    /// What a client of CernVM-FS means by an input/output error.
    fn unreachable(&self, error: &sys::Error) -> Option<Missing> {
        let below = error.path.strip_prefix(&self.path).ok().filter(|_| error.errno == Errno::EIO)?;
        let server = Server::of(self.sys.as_ref(), &self.path)?;
        let unreachable = self.mount().server.report_error(below.to_owned(), error.clone(), server);
        Some(Missing::ServerUnreachable(Box::new(unreachable)))
    }

    /// Why a pull need not ask: it would wait for each of its layers until the client gives up.
    pub fn refusal_of_pulls(&self) -> Option<Missing> {
        self.mount().server.refusal_of_pulls().map(|why| Missing::ServerUnreachable(Box::new(why)))
    }

    /// Whether it can be used, as far as that is known: not older than a quarter of a minute, if
    /// somebody asks that often. Waits for nothing; a look goes on in the background.
    pub fn seems_well(repository: &Arc<Self>) -> bool {
        let mount = repository.mount();
        let is_sick = mount.health.sick().is_some();
        if !is_sick && mount.watch.wants_a_look() {
            let (asked, of) = (Arc::clone(repository), Arc::clone(&mount));
            let look = move || of.watch.saw(asked.look_at_layers().is_ok());
            if mount.calls.run(Turn::Last, Pulse::default(), Box::new(look)).is_err() {
                mount.watch.saw(false);
            }
        }
        !is_sick && mount.watch.can_be_used(repository.timeout) && mount.server.outage().is_none()
    }

    /// Asks whether it is there and its layers can be used. Runs on a thread of the repository.
    fn look_at_layers(&self) -> Result<(), Missing> {
        probe(self.sys.as_ref(), &self.path)?;
        match lists_own_attributes(self.sys.as_ref(), &self.path) {
            Ok(false) => Ok(()),
            Ok(true) => Err(Missing::OwnAttributes),
            Err(e) => Err(Missing::Unreadable(e)),
        }
    }

    /// Asks whether it is there, without waiting, and says so if it is not.
    /// `state` is the device of the state root.
    pub fn look(repository: &Arc<Self>, state: Option<u64>) {
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
                 restarted then", asked.name, asked.known(why)),
        };
        let mount = repository.mount();
        if let Err(stuck) = mount.calls.run(Turn::Last, Pulse::default(), Box::new(look)) {
            log::warn!(repository = repository.name.as_str();
                "repository {}: {}", repository.name, repository.stuck(&mount, stuck));
        }
    }

    /// An unpacked layer, held open. Asks the repository, as all that follow do.
    pub fn layer(&self, digest: &Digest) -> Result<DirHandle, Missing> {
        self.layer_since(digest, Instant::now())
    }

    /// As `layer`. Whether the mount can be used need not be asked if it could by a question that was asked after
    /// `since`: one is enough for all layers of a container.
    pub fn layer_since(&self, digest: &Digest, since: Instant) -> Result<DirHandle, Missing> {
        let below = layer_path(digest);
        let layer = if let Some(layer) = self.open(&below)? {
            layer
        } else {
            mounted(self.sys.as_ref(), &self.path).map_err(|e| self.known(e))?;
            // It may have been mounted after the first look.
            self.open(&below)?.ok_or(Missing::NotPublished)?
        };
        self.require_usable(&layer, false, since)?;
        Ok(layer)
    }

    /// What it shows now, unless it cannot be used. As with `layer_since`, whether it can be used is asked after `since`.
    /// Asks the repository.
    pub fn state(&self, since: Instant) -> Result<RepositoryState, Missing> {
        let unreadable = |e| self.unreadable(e);
        let layers = self.open(Path::new(LAYERS))?.ok_or(Missing::NotPublished)?;
        // The names of a plain directory's attributes mean nothing.
        let is_client = !self.client_attributes()?.is_empty();
        let root_hash = is_client.then(|| self.sys.attribute(&self.path, MAGIC_ROOT_HASH).map_err(unreadable));
        let root_hash = root_hash.transpose()?.flatten();
        alive();
        // A client that answered this is alive.
        self.require_usable(&layers, root_hash.is_some(), since)?;
        let device = self.sys.dir_status(&layers).map_err(unreadable)?.device;
        Ok(RepositoryState { device, root_hash })
    }

    /// The inode of each of these layers. Asks the repository.
    pub fn inodes(&self, layers: &[Digest]) -> Result<Vec<u64>, Missing> {
        let all = self.open(Path::new(LAYERS))?.ok_or(Missing::NotPublished)?;
        let inode = |digest| {
            let layer = self.sys.open_below(&all, &below_layers(digest))?;
            self.sys.dir_status(&layer).inspect(|_| alive()).map(|status| status.inode)
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
    pub fn client_attributes(&self) -> Result<Arc<Vec<OsString>>, Missing> {
        let mount = self.mount();
        if let Some(known) = mount.client_attributes.get() {
            return Ok(Arc::clone(known));
        }
        let mut names = self.sys.attribute_names(&self.path).map_err(|e| self.unreadable(e))?;
        alive();
        // A directory on a disk has attributes of its own, and none of a client.
        if !names.iter().any(|name| name == MAGIC_NAME) {
            names.clear();
        }
        let names = Arc::new(names);
        Ok(Arc::clone(mount.client_attributes.get_or_init(|| names)))
    }

    /// The manifest of an image. None: it has none that can be used.
    pub fn manifest(&self, image: &ImageRef) -> Result<Option<Manifest>, Missing> {
        for path in image.manifests() {
            let at = self.path.join(&path);
            let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { continue };
            let text = match self.open(directory) {
                Ok(Some(directory)) => {
                    let read = self.sys.read_file(&directory.entry(name), manifest::MOST_BYTES);
                    read.map_err(|e| sys::Error { path: at.clone(), ..e })
                }
                Ok(None) => continue,
                Err(Missing::LeadsOut { .. } | Missing::NotADirectory { .. }) => {
                    Err(sys::Error { call: "read", path: at.clone(), errno: NOT_REGULAR })
                }
                Err(missing) => return Err(missing),
            };
            alive();
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
        mounted(self.sys.as_ref(), &self.path).map_err(|e| self.known(e))?;
        Ok(None)
    }

    /// Opens a directory of the repository. No link is followed: it may lead to files of the host.
    fn open(&self, below: &Path) -> Result<Option<DirHandle>, Missing> {
        let opened = self.sys.open_dir(&self.path).and_then(|root| {
            alive();
            self.sys.open_below(&root, below)
        });
        alive();
        match opened {
            Ok(directory) => Ok(Some(directory)),
            // A reference may be longer than names of files are.
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENAMETOOLONG) => Ok(None),
            Err(e) if matches!(e.errno, Errno::ELOOP | Errno::ENOTDIR) => Err(self.obstacle(below)),
            Err(e) => Err(self.unreadable(e)),
        }
    }

    /// What on the way to `below` is no directory.
    fn obstacle(&self, below: &Path) -> Missing {
        let mut path = self.path.clone();
        for name in below {
            path.push(name);
            match self.sys.lstat(&path).map(|status| status.file_type) {
                Ok(FileType::Directory) => alive(),
                Ok(FileType::Symlink) => return Missing::LeadsOut { path },
                Ok(FileType::Other) | Err(_) => break,
            }
        }
        Missing::NotADirectory { path }
    }

    /// Whether the client adds no attributes to the files of layers, and whether it is alive, which need not be asked if
    /// `is_alive`. `directory` is any of the repository.
    fn require_usable(&self, directory: &DirHandle, is_alive: bool, since: Instant) -> Result<(), Missing> {
        let mount = self.mount();
        if mount.usable.lock().is_some_and(|asked| asked >= since) {
            return Ok(());
        }
        let asked = Instant::now();
        if !is_alive {
            // The kernel answers `lstat` from its caches long after a FUSE server has died, and `statfs` never.
            self.sys.dir_statfs(directory).map_err(|e| self.unreadable(e))?;
            alive();
        }
        if lists_own_attributes(self.sys.as_ref(), &self.path).map_err(|e| self.unreadable(e))? {
            return Err(Missing::OwnAttributes);
        }
        *mount.usable.lock() = Some(asked);
        Ok(())
    }

    fn known(&self, missing: Missing) -> Missing {
        match missing {
            Missing::Unreadable(e) => self.unreadable(e),
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
            Box::new(move |below: &Path| server::Answer {
                result: list(sys.as_ref(), &path, below),
                io_errors: server::io_errors(sys.as_ref(), &path).unwrap_or(0),
            })
        };
        Self {
            number,
            health: Health::new(name, timeout, probe),
            watch: Watch::default(),
            server: ServerHealth::new(name, threads, ask),
            calls: Lane::new(name, "repository", CALLS, timeout, threads),
            scans: Lane::new(name, "scan", SCANS, timeout, threads),
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
    pub fn is_hopeless(&self) -> bool {
        self.health.is_hopeless()
    }

    /// What is told to whoever waited in vain for this mount.
    pub fn no_answer(&self, repository: &Repository) -> Missing {
        repository.no_answer_of(self)
    }

    /// Queues a scan, which has threads of its own; nobody is told of its end.
    pub fn spawn_scan(
        &self,
        repository: &Repository,
        turn: Turn,
        pulse: Pulse,
        job: impl FnOnce() + Send + 'static,
    ) -> Result<(), Missing> {
        self.health.check().map_err(Missing::Sick)?;
        self.scans.run(turn, pulse, Box::new(job)).map_err(|stuck| repository.stuck(self, stuck))
    }
}

impl<T> Asked<T> {
    /// What the job brought, if the repository does not fall silent and it is done before `until`.
    pub fn wait(self, until: Instant) -> Result<T, Missing> {
        let Self { ticket, mount, repository } = self;
        let since = Instant::now();
        // Where another wait has ended in vain, this one need not take as long.
        let patience = Patience { silence: repository.timeout, until };
        let result = ticket.wait(patience, || mount.health.is_hopeless());
        METRICS.waited(&repository.name, since);
        result.map_err(|lost| match lost {
            Lost::Silent => repository.no_answer_of(&mount),
            Lost::Late => Missing::Slow { limit: repository.timeout * SLOW },
            Lost::Dropped => Missing::NoThread,
            // Its own message is in the log. The fence of our caller answers the call.
            Lost::Panicked => panic!("a job on a thread of repository {} panicked", repository.name),
        })
    }
}

/// What is there is no file, or none of a manifest's size. That does not change in a moment.
fn is_no_file(errno: Errno) -> bool {
    matches!(errno, Errno::ENOENT | Errno::ENOTDIR | NOT_REGULAR | Errno::EFBIG)
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

/// Whether the client lists the attributes that it makes up on every file, and not only at its root. No publisher can
/// give `.layers` any.
fn lists_own_attributes(sys: &dyn Sys, path: &Path) -> sys::Result<bool> {
    let root = sys.open_dir(path)?;
    alive();
    let names = match sys.open_below(&root, Path::new(LAYERS)) {
        Ok(layers) => sys.dir_attribute_names(&layers)?,
        Err(e) if e.errno == Errno::ENOENT => Vec::new(),
        Err(e) => return Err(e),
    };
    alive();
    Ok(names.iter().any(|name| name == MAGIC_NAME))
}

/// Reads the directory `below` a repository's root, as far as its first entry.
fn list(sys: &dyn Sys, path: &Path, below: &Path) -> sys::Result<()> {
    let root = sys.open_dir(path)?;
    sys.for_each_entry_below(&root, below, &mut |_, _| ControlFlow::Break(())).map(drop)
}

/// Something that caches cannot answer.
fn probe(sys: &dyn Sys, path: &Path) -> Result<(), Missing> {
    sys.statfs(path).map_err(Missing::Unreadable)?;
    mounted(sys, path)?;
    // To read the first names is enough of a question.
    sys.for_each_entry(path, &mut |_, _| ControlFlow::Break(())).map_err(Missing::Unreadable)
}

#[cfg(test)]
mod tests;
