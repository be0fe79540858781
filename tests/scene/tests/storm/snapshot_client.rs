//! A client of the snapshotter's own socket that remembers the acknowledged state of each of its snapshots. A call whose
//! answer was lost by a kill may have happened or not; nothing else may differ.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cvmfs_snapshotter::proto::mount::Mount;
use cvmfs_snapshotter::proto::snapshots::{Info, Kind};
use grpcio::{RpcStatus, RpcStatusCode as Code};
use scene::client::{CallResult, Client, LAYER_DIGEST, REF, labels};
use scene::e2e_fixture::names;
use scene::random::Random;
use scene::rootfs::Mounted;
use scene::snapshotter_fixture::digest;

use super::load_generator::{Daemon, Storm};

type Files = BTreeMap<String, Vec<u8>>;
type Labels = std::collections::HashMap<String, String>;

/// The expected state of a snapshot.
#[derive(Clone, Debug)]
struct Known {
    kind: Kind,
    parent: String,
    labels: Labels,
    /// The whole record, after the first Stat or List.
    info: Option<Info>,
    mounts: Vec<Mount>,
    /// The directory of its own files; None for a remote snapshot.
    dir: Option<PathBuf>,
    files: Files,
}

pub struct SnapshotClient<'s> {
    storm: &'s Storm,
    daemon: &'s Daemon<'s>,
    /// The prefix of the names of its snapshots.
    name: String,
    mnt: PathBuf,
    random: Random,
    client: Client,
    generation: usize,
    checked: usize,
    snapshots: BTreeMap<String, Known>,
    number: usize,
}

/// The most snapshots that a client keeps.
const MAX_SNAPSHOTS: usize = 16;

impl<'s> SnapshotClient<'s> {
    pub fn new(storm: &'s Storm, daemon: &'s Daemon<'s>, number: u64, mnt: &Path) -> Self {
        let (client, generation) = daemon.connect();
        let name = format!("d{number}");
        let (mnt, random) = (mnt.join(&name), Random::new(storm.seed, number));
        Self {
            storm,
            daemon,
            name,
            mnt,
            random,
            client,
            generation,
            checked: generation,
            snapshots: BTreeMap::new(),
            number: 0,
        }
    }

    pub fn step(&mut self) {
        if self.daemon.generation() != self.generation {
            (self.client, self.generation) = self.daemon.connect();
        }
        if self.checked != self.generation {
            self.check_all();
        }
        if self.snapshots.len() >= MAX_SNAPSHOTS {
            return self.remove_one();
        }
        match self.random.below(12) {
            0..=2 => self.make(Kind::ACTIVE),
            3 => self.make(Kind::VIEW),
            4 | 5 => self.commit(),
            6 | 7 => self.remove_one(),
            8 | 9 => self.pull(),
            10 => self.update(),
            _ => self.write(),
        }
    }

    /// Whether the answer was lost by a kill. Any other failure is an error.
    fn is_lost(&mut self, status: &RpcStatus) -> bool {
        let text = format!("{:?}: {}", status.code(), status.message());
        let no_answer = match status.code() {
            Code::UNAVAILABLE => !text.contains("is not available") && !text.contains("missing from disk"),
            Code::UNKNOWN | Code::CANCELLED => text.contains("no status") || text.contains("Stream removed"),
            _ => false,
        };
        if no_answer && self.daemon.generation() != self.generation {
            Storm::count(&self.storm.lost);
            (self.client, self.generation) = self.daemon.connect();
            return true;
        }
        false
    }

    /// Makes a call. None means that its answer was lost by a kill.
    fn call<T>(&mut self, what: &str, call: impl FnOnce(&Client) -> CallResult<T>) -> Option<T> {
        match call(&self.client) {
            Ok(value) => {
                Storm::count(&self.storm.acknowledged);
                Some(value)
            }
            Err(status) if self.is_lost(&status) => None,
            Err(status) => panic!("{what}: {:?}: {}", status.code(), status.message()),
        }
    }

    /// Makes a call that changes nothing, again after a kill. None means that there is no such snapshot.
    fn query<T>(&mut self, what: &str, question: impl Fn(&Client) -> CallResult<T>) -> Option<T> {
        loop {
            match question(&self.client) {
                Ok(value) => return Some(value),
                Err(status) if status.code() == Code::NOT_FOUND => return None,
                Err(status) if self.is_lost(&status) => {}
                Err(status) => panic!("{what}: {:?}: {}", status.code(), status.message()),
            }
        }
    }

    fn exists(&mut self, key: &str) -> bool {
        self.query("stat", |c| c.stat(key)).is_some()
    }

    fn new_name(&mut self) -> String {
        self.number += 1;
        // Names are used again once they are free.
        let name = format!("{}-{}", self.name, self.number % (4 * MAX_SNAPSHOTS));
        if self.snapshots.contains_key(&name) { self.new_name() } else { name }
    }

    fn random_labels(&mut self) -> Labels {
        let number = self.number.to_string();
        let (one, two) = ([("l", number.as_str())], [("l", number.as_str()), ("m.n/o", "x")]);
        [labels(&[]), labels(&one), labels(&two)][self.random.below(3)].clone()
    }

    fn of_kind(&self, kind: Kind) -> Vec<String> {
        self.snapshots.iter().filter(|(_, s)| s.kind == kind).map(|(name, _)| name.clone()).collect()
    }

    /// `parent` and the snapshots below it, uppermost first.
    fn chain(&self, parent: &str) -> Vec<&Known> {
        let mut chain = Vec::new();
        let mut next = parent;
        while let Some(known) = self.snapshots.get(next) {
            chain.push(known);
            next = &known.parent;
        }
        chain
    }

    fn parent(&mut self) -> String {
        let committed = self.of_kind(Kind::COMMITTED);
        if self.random.below(4) == 0 { String::new() } else { self.random.one_of(&committed).unwrap_or_default() }
    }

    fn make(&mut self, kind: Kind) {
        let (key, parent, with) = (self.new_name(), self.parent(), self.random_labels());
        let pairs = pairs(&with);
        let answer = self.call("prepare or view", |c| match kind {
            Kind::ACTIVE => c.prepare(&key, &parent, &pairs),
            _ => c.view(&key, &parent, &pairs),
        });
        let mounts = match answer {
            Some(mounts) => mounts,
            // The lost call may have happened or not.
            None => match self.query("mounts", |c| c.mounts(&key)) {
                Some(mounts) => mounts,
                None => return,
            },
        };
        let dir = (kind == Kind::ACTIVE).then(|| upper(&mounts));
        let known = Known { kind, parent, labels: with, info: None, mounts, dir: dir.clone(), files: Files::new() };
        if let Some(dir) = dir {
            self.storm.assert_new_directory(&dir);
            assert_eq!(names(&dir), Vec::<String>::new(), "{key} begins empty");
            self.snapshots.insert(key.clone(), known);
            self.write_into(&key);
        } else {
            self.check_view(&known);
            self.snapshots.insert(key, known);
        }
    }

    /// Mounts a view, as containerd would, and compares all of it.
    fn check_view(&self, view: &Known) {
        let mounted = Mounted::new(&view.mounts, &self.mnt).unwrap();
        let chain = self.chain(&view.parent);
        let mut expected = Files::new();
        for below in chain.iter().filter(|below| below.dir.is_some()) {
            expected.extend(below.files.clone());
        }
        let layers = chain.iter().filter(|below| below.dir.is_none()).count();
        for n in 1..=layers {
            expected.insert(format!("dir/file-{n}"), n.to_string().into_bytes());
        }
        let mut found = files_in(mounted.path());
        if layers > 0 {
            let dir = files_in(&mounted.path().join("dir"));
            found.extend(dir.into_iter().map(|(name, content)| (format!("dir/{name}"), content)));
        }
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{:?}", view.mounts);
        assert!(found == expected, "a file differs in {:?}", view.mounts);
        Storm::count(&self.storm.compared);
    }

    fn write(&mut self) {
        if let Some(key) = self.random.one_of(&self.of_kind(Kind::ACTIVE)) {
            self.write_into(&key);
        }
    }

    fn write_into(&mut self, key: &str) {
        self.number += 1;
        let name = format!("file-{}", self.number);
        let size = self.random.below(3000);
        let content = self.random.bytes(size);
        let known = self.snapshots.get_mut(key).unwrap();
        fs::write(known.dir.as_ref().unwrap().join(&name), &content).unwrap();
        known.files.insert(name, content);
    }

    fn commit(&mut self) {
        let Some(key) = self.random.one_of(&self.of_kind(Kind::ACTIVE)) else { return };
        let (name, with) = (self.new_name(), self.random_labels());
        let answer = self.call("commit", |c| c.commit(&name, &key, &pairs(&with)));
        if answer.is_none() && !self.exists(&name) {
            return;
        }
        let mut known = self.snapshots.remove(&key).unwrap();
        known = Known { kind: Kind::COMMITTED, labels: with, info: None, mounts: Vec::new(), ..known };
        self.snapshots.insert(name, known);
    }

    fn remove_one(&mut self) {
        let is_parent = |key: &String| self.snapshots.values().any(|s| s.parent == *key);
        let leaves: Vec<String> = self.snapshots.keys().filter(|key| !is_parent(key)).cloned().collect();
        let Some(key) = self.random.one_of(&leaves) else { return };
        let answer = self.call("remove", |c| c.remove(&key));
        if answer.is_none() && self.exists(&key) {
            return;
        }
        self.snapshots.remove(&key);
        if self.random.below(3) == 0 {
            // No later step depends on the answer.
            let _ = self.call("cleanup", Client::cleanup);
        }
    }

    fn update(&mut self) {
        let all: Vec<String> = self.snapshots.iter().filter(|(_, s)| s.dir.is_some()).map(|(n, _)| n.clone()).collect();
        let Some(key) = self.random.one_of(&all) else { return };
        let with = self.random_labels();
        let wanted = Info { name: key.clone(), labels: with.clone(), ..Info::default() };
        let info = match self.call("update", |c| c.update(wanted, &["labels"])) {
            Some(info) => info,
            None => match self.query("stat", |c| c.stat(&key)) {
                Some(info) if info.labels == with => info,
                _ => return,
            },
        };
        let known = self.snapshots.get_mut(&key).unwrap();
        (known.labels, known.info) = (with, Some(info));
    }

    /// Pulls a published layer, without a parent or on the layers that precede it.
    fn pull(&mut self) {
        let parent = self.parent();
        let layer = 1 + self.chain(&parent).iter().filter(|below| below.dir.is_none()).count();
        if layer > 3 {
            return;
        }
        let (key, number) = (self.new_name(), self.number);
        let reference = format!("sha256:{}-{number}", self.name);
        let digest = digest(u8::try_from(layer).unwrap());
        let with = [(REF, reference.as_str()), (LAYER_DIGEST, digest.as_str())];
        match self.client.prepare(&key, &parent, &with) {
            Ok(mounts) => panic!("a published layer is to be unpacked at {mounts:?}\n{}", self.daemon.log()),
            Err(status) if status.code() == Code::ALREADY_EXISTS => Storm::count(&self.storm.acknowledged),
            Err(status) if self.is_lost(&status) => {}
            Err(status) => panic!("pull: {:?}: {}", status.code(), status.message()),
        }
        let filter = format!("labels.{REF:?}=={reference:?},parent=={parent:?}");
        let found = self.query("list", |c| c.list(&[&filter])).unwrap();
        // A call that was lost may not have happened.
        let Some(info) = found.into_iter().next() else { return };
        let labels = labels(&[with[0], with[1], ("containerd.io/snapshot/remote", "remote snapshot")]);
        let known = Known {
            kind: Kind::COMMITTED,
            parent,
            labels,
            info: None,
            mounts: Vec::new(),
            dir: None,
            files: Files::new(),
        };
        self.snapshots.insert(info.name, known);
    }

    /// Checks that all acknowledged snapshots of this client exist, and no others.
    pub fn check_all(&mut self) {
        let ours = [format!("{}-", self.name), format!("/sha256:{}-", self.name)];
        let all = self.query("list", |c| c.list(&[])).unwrap();
        self.checked = self.generation;
        let mut found: BTreeMap<String, Info> = all
            .into_iter()
            .filter(|info| info.name.starts_with(&ours[0]) || info.name.contains(&ours[1]))
            .map(|info| (info.name.clone(), info))
            .collect();
        let (there, known): (Vec<_>, Vec<_>) = (found.keys().collect(), self.snapshots.keys().collect());
        assert_eq!(there, known, "left: snapshots that exist, right: acknowledged snapshots");
        for key in self.snapshots.keys().cloned().collect::<Vec<_>>() {
            let info = found.remove(&key).unwrap();
            let known = self.snapshots.get_mut(&key).unwrap();
            assert_eq!(
                (info.kind.enum_value(), &info.parent, &info.labels),
                (Ok(known.kind), &known.parent, &known.labels),
                "{key}"
            );
            assert_eq!(known.info.get_or_insert_with(|| info.clone()), &info, "a record does not change by itself");
            let known = known.clone();
            if let Some(dir) = &known.dir {
                assert!(files_in(dir) == known.files, "the files of {key} in {} differ", dir.display());
            }
            if known.kind == Kind::VIEW {
                self.check_view(&known);
            }
            if known.kind != Kind::COMMITTED {
                assert_eq!(self.query("mounts", |c| c.mounts(&key)).as_ref(), Some(&known.mounts), "{key}");
            }
            Storm::count(&self.storm.compared);
        }
    }

    /// Removes all snapshots. No kill may happen meanwhile.
    pub fn remove_all(&mut self) {
        while !self.snapshots.is_empty() {
            self.remove_one();
        }
    }
}

fn pairs(labels: &Labels) -> Vec<(&str, &str)> {
    labels.iter().map(|(label, value)| (label.as_str(), value.as_str())).collect()
}

/// The directory to which writes to an active snapshot go.
fn upper(mounts: &[Mount]) -> PathBuf {
    let option = mounts[0].options.iter().find_map(|o| o.strip_prefix("upperdir="));
    PathBuf::from(option.unwrap_or(&mounts[0].source))
}

/// The files right in `dir`, with their content.
fn files_in(dir: &Path) -> Files {
    let files = names(dir).into_iter().filter(|name| !dir.join(name).is_dir());
    files.map(|name| (name.clone(), fs::read(dir.join(&name)).unwrap())).collect()
}
