//! Random operations over the socket of a real daemon, which is killed and stopped in between, compared with a small
//! model of the contract. A disagreement is shrunk to the few operations that cause it.
//!
//! `PROPTEST_CASES` is the number of cases, `PROPTEST_RNG_SEED` repeats a run.

#![allow(clippy::unwrap_used)]

mod model;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use cvmfs_snapshotter::proto::mount::Mount;
use cvmfs_snapshotter::proto::snapshots::{Info, Kind};
use grpcio::RpcStatusCode as Code;
use nix::sys::signal::Signal;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestError, TestRunner};
use protobuf::well_known_types::timestamp::Timestamp;
use scene::client::{CallResult, Client, LAYER_DIGEST, REF};
use scene::e2e_fixture::names;
use scene::sandbox::mounts_below;
use scene::snapshotter::Snapshotter;
use scene::snapshotter_fixture::{SnapshotterFixture, digest};

use self::model::{Files, Labels, Model, Test};

/// The snapshot to which an operation applies.
#[derive(Clone, Copy, Debug)]
enum Who {
    /// The snapshot with this name, whether or not it exists.
    Named(char),
    /// The snapshot with this number among those of a kind, sorted by name and counted round.
    Nth(Kind, usize),
}

#[derive(Clone, Copy, Debug)]
enum Layer {
    Published(u8),
    NotPublished,
    WrongDigest,
    NoDigest,
}

#[derive(Clone, Debug)]
enum Operation {
    Prepare {
        key: char,
        parent: Option<Who>,
        labels: Labels,
    },
    View {
        key: char,
        parent: Option<Who>,
        labels: Labels,
    },
    /// A pull of a layer with the digest of the published layer `name`.
    Pull {
        key: char,
        parent: Option<Who>,
        name: u8,
        layer: Layer,
    },
    Commit {
        name: char,
        key: Who,
        parent: Option<Who>,
        labels: Labels,
    },
    Remove(Who),
    Stat(Who),
    Mounts(Who),
    Usage(Who),
    Update {
        key: Who,
        labels: Labels,
        mask: Vec<&'static str>,
    },
    List(Vec<Vec<Test<Who>>>),
    ListBadly(&'static str),
    Cleanup,
    Kill,
    Stop,
}

const LABELS: [&str; 4] = ["l", "a.b/c", "containerd.io/gc.root", REF];
const VALUES: [&str; 5] = ["", "1", "two words", "sha256:c1", "sha256:c2"];

/// A snapshot that is mostly of `kind`.
fn who(kind: Kind) -> impl Strategy<Value = Who> {
    let any = select(vec![Kind::ACTIVE, Kind::VIEW, Kind::COMMITTED]);
    prop_oneof![
        8 => (0..8usize).prop_map(move |n| Who::Nth(kind, n)),
        2 => (any, 0..8usize).prop_map(|(kind, n)| Who::Nth(kind, n)),
        1 => key().prop_map(Who::Named),
    ]
}

fn any_kind() -> impl Strategy<Value = Who> {
    prop_oneof![who(Kind::ACTIVE), who(Kind::VIEW), who(Kind::COMMITTED)]
}

fn parent() -> impl Strategy<Value = Option<Who>> {
    prop::option::weighted(0.7, who(Kind::COMMITTED))
}

fn key() -> impl Strategy<Value = char> {
    select(('a'..='h').collect::<Vec<_>>())
}

/// Random labels; with `all` also the label that makes a Prepare a pull.
fn labels(all: bool) -> impl Strategy<Value = Labels> {
    let names = if all { &LABELS[..] } else { &LABELS[..3] };
    btree_map(select(names).prop_map(str::to_owned), select(&VALUES[..]).prop_map(str::to_owned), 0..3)
}

fn test() -> impl Strategy<Value = Test<Who>> {
    prop_oneof![
        select(vec![Kind::ACTIVE, Kind::VIEW, Kind::COMMITTED]).prop_map(Test::Kind),
        any_kind().prop_map(Test::Name),
        parent().prop_map(Test::Parent),
        select(&LABELS[..]).prop_map(Test::Has),
        (select(&LABELS[..]), select(&VALUES[..])).prop_map(|(label, value)| Test::Is(label, value)),
        (select(&LABELS[..]), select(&VALUES[..])).prop_map(|(label, value)| Test::IsNot(label, value)),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let layer = prop_oneof![
        5 => Just(None),
        1 => select(vec![Layer::NotPublished, Layer::WrongDigest, Layer::NoDigest]).prop_map(Some),
    ];
    let mask = select(vec!["labels", "labels.l", "labels.a.b/c", "labels.gone", "parent", "kind"]);
    let mask = prop_oneof![4 => mask.clone().prop_map(|path| vec![path]), 3 => vec(mask, 0..3)];
    let bad = select(vec!["name=", "labels.l==\"", "name~=|a", "==a", "name==a,"]);
    prop_oneof![
        6 => (key(), parent(), labels(false)).prop_map(|(key, parent, labels)| Operation::Prepare { key, parent, labels }),
        3 => (key(), parent(), labels(false)).prop_map(|(key, parent, labels)| Operation::View { key, parent, labels }),
        6 => (key(), parent(), 1..=3u8, layer).prop_map(|(key, parent, name, layer)| {
            Operation::Pull { key, parent, name, layer: layer.unwrap_or(Layer::Published(name)) }
        }),
        6 => (key(), who(Kind::ACTIVE), prop::option::weighted(0.3, who(Kind::COMMITTED)), labels(true))
            .prop_map(|(name, key, parent, labels)| Operation::Commit { name, key, parent, labels }),
        5 => any_kind().prop_map(Operation::Remove),
        1 => any_kind().prop_map(Operation::Stat),
        3 => prop_oneof![who(Kind::ACTIVE), who(Kind::VIEW)].prop_map(Operation::Mounts),
        2 => any_kind().prop_map(Operation::Usage),
        3 => (any_kind(), labels(true), mask).prop_map(|(key, labels, mask)| Operation::Update { key, labels, mask }),
        3 => vec(vec(test(), 0..3), 0..3).prop_map(Operation::List),
        1 => bad.prop_map(Operation::ListBadly),
        2 => Just(Operation::Cleanup),
        1 => Just(Operation::Kill),
        1 => Just(Operation::Stop),
    ]
}

/// Nanoseconds since the epoch.
fn now() -> i128 {
    i128::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

fn nanos(time: &Timestamp) -> i128 {
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)
}

fn pairs(labels: &Labels) -> Vec<(&str, &str)> {
    labels.iter().map(|(label, value)| (label.as_str(), value.as_str())).collect()
}

type Checked<T = ()> = Result<T, TestCaseError>;

/// The daemon of one case beside the model of it.
struct Run {
    snapshotter: Snapshotter,
    client: Client,
    symlink: bool,
    model: Model,
    /// When each operation began and ended.
    operations: Vec<(i128, i128)>,
    /// The times of each snapshot as they were first seen, by its name and when it was changed.
    times: BTreeMap<(String, usize), (i128, i128)>,
    /// The mounts that Prepare and View returned.
    given: BTreeMap<String, Vec<Mount>>,
    compared: usize,
}

/// Compares the result of a call with that of the model. The value is that of a success.
fn compare_results<T: std::fmt::Debug>(expected: model::CallResult, actual: CallResult<T>) -> Checked<Option<T>> {
    match (expected, actual) {
        (Ok(()), Ok(value)) => Ok(Some(value)),
        (Err(code), Err(status)) if status.code() == code => Ok(None),
        (expected, Err(status)) => {
            Err(TestCaseError::fail(format!("expected {expected:?}, got {:?}: {}", status.code(), status.message())))
        }
        (expected, Ok(value)) => Err(TestCaseError::fail(format!("expected {expected:?}, got {value:?}"))),
    }
}

fn succeed<T>(answer: CallResult<T>) -> Checked<T> {
    answer.map_err(|status| TestCaseError::fail(format!("{:?}: {}", status.code(), status.message())))
}

/// Removes everything in `dir`, mounts first.
fn remove_tree(dir: &Path) {
    for point in mounts_below(dir).iter().rev() {
        nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
    fs::remove_dir_all(dir).unwrap();
}

impl Run {
    fn start(dir: &Path, repository: &Path, symlink: bool) -> Self {
        let config = if symlink { "attach = \"symlink\"" } else { "attach = \"bind\"" };
        let snapshotter = Snapshotter::start(dir, repository, config);
        Self {
            client: snapshotter.client(),
            snapshotter,
            symlink,
            model: Model::default(),
            operations: Vec::new(),
            times: BTreeMap::new(),
            given: BTreeMap::new(),
            compared: 0,
        }
    }

    fn name(&self, who: Who) -> String {
        match who {
            Who::Named(name) => name.to_string(),
            Who::Nth(kind, n) => {
                let of_kind = self.model.list(&[vec![Test::Kind(kind)]]);
                of_kind.get(n % of_kind.len().max(1)).map_or("absent", |name| name).to_owned()
            }
        }
    }

    fn parent(&self, who: Option<Who>) -> String {
        match who {
            Some(Who::Nth(kind, _)) if self.model.list(&[vec![Test::Kind(kind)]]).is_empty() => String::new(),
            Some(who) => self.name(who),
            None => String::new(),
        }
    }

    fn apply(&mut self, operation: &Operation) -> Checked {
        self.model.now = self.operations.len();
        let begun = now();
        self.call(operation)?;
        self.operations.push((begun, now()));
        self.compare_all()
    }

    fn call(&mut self, operation: &Operation) -> Checked {
        let c = self.client.clone();
        match operation {
            Operation::Prepare { key, parent, labels } => {
                let (key, parent) = (key.to_string(), self.parent(*parent));
                let actual = c.prepare(&key, &parent, &pairs(labels));
                let expected = self.model.create(Kind::ACTIVE, &key, &parent, labels.clone());
                self.check_new_mounts(&key, compare_results(expected, actual)?)
            }
            Operation::View { key, parent, labels } => {
                let (key, parent) = (key.to_string(), self.parent(*parent));
                let actual = c.view(&key, &parent, &pairs(labels));
                let expected = self.model.create(Kind::VIEW, &key, &parent, labels.clone());
                self.check_new_mounts(&key, compare_results(expected, actual)?)
            }
            Operation::Pull { key, parent, name, layer } => self.pull(*key, *parent, *name, *layer),
            Operation::Commit { name, key, parent, labels } => {
                let (name, key, parent) = (name.to_string(), self.name(*key), self.parent(*parent));
                let actual = c.commit_on(&name, &key, &parent, &pairs(labels));
                compare_results(self.model.commit(&name, &key, &parent, labels.clone()), actual).map(drop)
            }
            Operation::Remove(who) => {
                let key = self.name(*who);
                compare_results(self.model.remove(&key), c.remove(&key)).map(drop)
            }
            Operation::Stat(who) => {
                let key = self.name(*who);
                let Some(info) = compare_results(self.model.stat(&key), c.stat(&key))? else { return Ok(()) };
                prop_assert_eq!(succeed(c.list(&[&format!("name=={key:?}")]))?, [info], "Stat and List say the same");
                Ok(())
            }
            Operation::Mounts(who) => {
                let key = self.name(*who);
                let Some(mounts) = compare_results(self.model.mounts(&key), c.mounts(&key))? else { return Ok(()) };
                prop_assert_eq!(&mounts, &self.given[&key], "Mounts says what Prepare or View said");
                self.check_mounts(&key, &mounts)
            }
            Operation::Usage(who) => {
                let key = self.name(*who);
                let Some((size, inodes)) = compare_results(self.model.stat(&key), c.usage(&key))? else {
                    return Ok(());
                };
                let snapshot = &self.model.snapshots[&key];
                let is_own = snapshot.kind != Kind::VIEW && matches!(snapshot.files, Files::Own(_));
                // The two inodes are the top directory and the file that `check_new_mounts` writes.
                prop_assert_eq!((inodes, size > 0), if is_own { (2, true) } else { (0, false) });
                Ok(())
            }
            Operation::Update { key, labels, mask } => {
                let key = self.name(*key);
                let info = Info {
                    name: key.clone(),
                    parent: "doesnotexist".to_owned(),
                    labels: labels.clone().into_iter().collect(),
                    ..Info::default()
                };
                let actual = c.update(info, mask);
                let mask: Vec<String> = mask.iter().map(|&path| path.to_owned()).collect();
                let Some(info) = compare_results(self.model.update(&key, labels, &mask), actual)? else {
                    return Ok(());
                };
                prop_assert_eq!(succeed(c.stat(&key))?, info, "Update answers what is there now");
                Ok(())
            }
            Operation::List(tests) => self.list(tests),
            Operation::ListBadly(filter) => compare_results(Err(Code::INVALID_ARGUMENT), c.list(&[filter])).map(drop),
            Operation::Cleanup => {
                succeed(c.cleanup())?;
                self.check_disk()
            }
            Operation::Kill => {
                self.snapshotter.end(Signal::SIGKILL);
                self.start_again();
                Ok(())
            }
            Operation::Stop => {
                let status = self.snapshotter.end(Signal::SIGTERM);
                prop_assert!(status.success(), "{}", status);
                self.start_again();
                Ok(())
            }
        }
    }

    fn start_again(&mut self) {
        self.snapshotter.start_again();
        self.client = self.snapshotter.client();
    }

    fn pull(&mut self, key: char, parent: Option<Who>, name: u8, layer: Layer) -> Checked {
        let (key, parent, reference) = (key.to_string(), self.parent(parent), format!("sha256:c{name}"));
        let mut labels = Labels::from([(REF.to_owned(), reference.clone())]);
        let (wanted, published) = match layer {
            Layer::Published(n) => (Some(digest(n)), Some(n)),
            Layer::NotPublished => (Some(digest(9)), None),
            Layer::WrongDigest => (Some("sha256:../../etc".to_owned()), None),
            Layer::NoDigest => (None, None),
        };
        labels.extend(wanted.map(|digest| (LAYER_DIGEST.to_owned(), digest)));
        let actual = self.client.prepare(&key, &parent, &pairs(&labels));
        // containerd finds the name of the snapshot with this filter.
        let filter = format!("labels.{REF:?}=={reference},parent=={parent:?}");
        let found = succeed(self.client.list(&[&filter]))?;
        let is_new = |info: &&Info| {
            info.kind.enum_value() == Ok(Kind::COMMITTED) && !self.model.snapshots.contains_key(&info.name)
        };
        let name = found.iter().find(is_new).map_or("none", |info| info.name.as_str());
        let expected = self.model.pull(&key, &parent, labels, published, name);
        self.check_new_mounts(&key, compare_results(expected, actual)?)
    }

    /// Checks the mounts of a new snapshot and leaves a file in it, if it can be written to.
    fn check_new_mounts(&mut self, key: &str, mounts: Option<Vec<Mount>>) -> Checked {
        let Some(mounts) = mounts else { return Ok(()) };
        if self.model.snapshots[key].kind == Kind::ACTIVE {
            fs::write(upper(&mounts).join("made-by"), self.model.now.to_string()).unwrap();
        }
        self.check_mounts(key, &mounts)?;
        self.given.insert(key.to_owned(), mounts);
        Ok(())
    }

    fn list(&self, tests: &[Vec<Test<Who>>]) -> Checked {
        let named = |test: &Test<Who>| match *test {
            Test::Kind(kind) => Test::Kind(kind),
            Test::Name(who) => Test::Name(self.name(who)),
            Test::Parent(who) => Test::Parent(Some(self.parent(who))),
            Test::Has(label) => Test::Has(label),
            Test::Is(label, value) => Test::Is(label, value),
            Test::IsNot(label, value) => Test::IsNot(label, value),
        };
        let tests: Vec<Vec<Test<String>>> = tests.iter().map(|all| all.iter().map(named).collect()).collect();
        let text = |test: &Test<String>| match test {
            Test::Kind(Kind::ACTIVE) => "kind==active".to_owned(),
            Test::Kind(Kind::VIEW) => "kind==view".to_owned(),
            Test::Kind(_) => "kind==committed".to_owned(),
            Test::Name(name) => format!("name=={name:?}"),
            Test::Parent(parent) => format!("parent=={:?}", parent.as_deref().unwrap_or("")),
            Test::Has(label) => format!("labels.{label:?}"),
            Test::Is(label, value) => format!("labels.{label:?}=={value:?}"),
            Test::IsNot(label, value) => format!("labels.{label:?}!={value:?}"),
        };
        let filters: Vec<String> = tests.iter().map(|all| all.iter().map(text).collect::<Vec<_>>().join(",")).collect();
        let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
        let mut found: Vec<String> = succeed(self.client.list(&filters))?.into_iter().map(|info| info.name).collect();
        found.sort();
        prop_assert_eq!(found, self.model.list(&tests), "{:?}", filters);
        Ok(())
    }

    /// Checks that every record equals the model, to the nanosecond.
    fn compare_all(&mut self) -> Checked {
        let mut found = succeed(self.client.list(&[]))?;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        let there: Vec<&String> = found.iter().map(|info| &info.name).collect();
        prop_assert_eq!(there, self.model.snapshots.keys().collect::<Vec<_>>());
        for info in &found {
            let expected = &self.model.snapshots[&info.name];
            let labels: Labels = info.labels.clone().into_iter().collect();
            prop_assert_eq!(
                (&info.parent, info.kind.enum_value(), &labels),
                (&expected.parent, Ok(expected.kind), &expected.labels),
                "{}",
                &info.name
            );
            let (created, updated) = (nanos(&info.created_at), nanos(&info.updated_at));
            for (time, operation) in [(created, expected.created), (updated, expected.updated)] {
                let (begun, ended) = self.operations[operation];
                prop_assert!(begun <= time && time <= ended, "{} has a wrong time", &info.name);
            }
            if expected.created == expected.updated {
                prop_assert_eq!(created, updated);
            }
            let first = *self.times.entry((info.name.clone(), expected.updated)).or_insert((created, updated));
            prop_assert_eq!((created, updated), first, "{} changed its times", &info.name);
            self.compared += 1;
        }
        Ok(())
    }

    /// Checks that the mounts have the form of the contract, and lead to the files of the chain.
    fn check_mounts(&self, key: &str, mounts: &[Mount]) -> Checked {
        let snapshot = &self.model.snapshots[key];
        let [mount] = mounts else { return Err(TestCaseError::fail(format!("one mount is enough: {mounts:?}"))) };
        let below = self.model.below(key);
        let mut expected: Vec<Files> = Vec::new();
        for (_, one) in &below {
            // Overlayfs refuses the same directory twice.
            if matches!(one.files, Files::Own(_)) || !expected.contains(&one.files) {
                expected.push(one.files);
            }
        }
        let options: Vec<&str> = mount.options.iter().map(String::as_str).collect();
        let lower = match (mount.type_.as_str(), snapshot.kind) {
            ("bind", Kind::ACTIVE) => {
                prop_assert_eq!(options, ["rw", "rbind"]);
                prop_assert_eq!(files_of(Path::new(&mount.source)), [snapshot.files]);
                vec![]
            }
            ("bind", _) => {
                prop_assert_eq!(options, ["ro", "rbind"]);
                vec![PathBuf::from(&mount.source)]
            }
            (_, kind) => {
                prop_assert_eq!((mount.type_.as_str(), mount.source.as_str()), ("overlay", "overlay"));
                let mut options = options.into_iter();
                if kind == Kind::ACTIVE {
                    let work = PathBuf::from(options.next().and_then(|o| o.strip_prefix("workdir=")).unwrap());
                    let upper = PathBuf::from(options.next().and_then(|o| o.strip_prefix("upperdir=")).unwrap());
                    prop_assert!(work.ends_with("work") && work.parent() == upper.parent() && work.is_dir());
                    prop_assert_eq!(fs::metadata(&upper).unwrap().mode() & 0o7777, 0o755);
                    prop_assert_eq!(files_of(&upper), [snapshot.files]);
                }
                let lower = options.next().and_then(|o| o.strip_prefix("lowerdir=")).unwrap();
                prop_assert!(options.all(|o| ["index=off", "userxattr"].contains(&o)), "{:?}", mount);
                lower.split(':').map(PathBuf::from).collect()
            }
        };
        let snapshots = self.snapshotter.snapshots();
        prop_assert!(lower.iter().all(|l| l.ancestors().nth(2) == Some(&snapshots)), "{:?}", lower);
        let files: Vec<Files> = lower.iter().flat_map(|l| files_of(l)).collect();
        prop_assert_eq!(files, expected, "{:?}", lower);
        // No marker of the publisher is visible, because the mask above the uppermost layer hides it.
        let shown = lower.iter().find_map(|l| fs::symlink_metadata(l.join(".cvmfscatalog")).ok());
        prop_assert!(shown.is_none_or(|m| m.file_type().is_char_device() && m.rdev() == 0), "{:?}", lower);
        Ok(())
    }

    /// Checks that `snapshots/` and the mount table hold exactly what the records need.
    fn check_disk(&self) -> Checked {
        let (local, live) = self.model.on_disk();
        let snapshots = self.snapshotter.snapshots();
        prop_assert_eq!(names(&snapshots).len(), local + live);
        prop_assert_eq!(mounts_below(&snapshots).len(), if self.symlink { 0 } else { live });
        Ok(())
    }

    /// Removes everything, and checks that nothing is left.
    fn remove_all(&mut self) -> Checked {
        while let Some(leaf) = self.model.list(&[]).into_iter().find(|key| self.is_leaf(key)).map(str::to_owned) {
            compare_results(self.model.remove(&leaf), self.client.remove(&leaf))?;
        }
        succeed(self.client.cleanup())?;
        prop_assert_eq!(succeed(self.client.list(&[]))?, []);
        self.check_disk()
    }

    fn is_leaf(&self, key: &str) -> bool {
        !self.model.snapshots.values().any(|s| s.parent == key)
    }
}

/// The directory to which writes to an active snapshot go.
fn upper(mounts: &[Mount]) -> PathBuf {
    let option = mounts[0].options.iter().find_map(|o| o.strip_prefix("upperdir="));
    PathBuf::from(option.unwrap_or(&mounts[0].source))
}

/// The snapshot whose files a directory has; None for a mask or an empty directory.
fn files_of(dir: &Path) -> Vec<Files> {
    if let Ok(operation) = fs::read_to_string(dir.join("made-by")) {
        return vec![Files::Own(operation.parse().unwrap())];
    }
    (1..=3).filter(|n| dir.join(format!("dir/file-{n}")).exists()).map(Files::Layer).collect()
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

#[test]
fn root_random_operations_agree_with_the_model() {
    let begun = Instant::now();
    let shared = SnapshotterFixture::start("random", "");
    let dir = shared.sandbox.path("case");
    let mut config = Config { failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 80;
    }
    let (mut cases, mut operations, mut compared) = (0, 0, 0);
    let mut case = |symlink: bool, list: &[Operation]| {
        if dir.exists() {
            // The previous case ended in a panic.
            remove_tree(&dir);
        }
        let mut run = Run::start(&dir, shared.repository.dir(), symlink);
        let checked = list.iter().try_for_each(|operation| run.apply(operation)).and_then(|()| run.remove_all());
        cases += 1;
        operations += run.operations.len();
        compared += run.compared;
        let checked = checked.map_err(|why| format!("{why}\n{}", last_lines(&run.snapshotter.log())));
        drop(run);
        remove_tree(&dir);
        checked
    };
    let shared_case = std::cell::RefCell::new(&mut case);
    let result = TestRunner::new(config).run(&(any::<bool>(), vec(operation(), 1..80)), |(symlink, list)| {
        (shared_case.borrow_mut())(symlink, &list).map_err(TestCaseError::fail)
    });
    let failed = match result {
        Ok(()) => None,
        Err(TestError::Fail(why, (symlink, list))) => {
            Some((symlink, minimize(list, why.to_string(), |list| case(symlink, list))))
        }
        Err(TestError::Abort(why)) => panic!("{why}"),
    };
    scene::report::print(format_args!(
        "{cases} cases, {operations} operations, {compared} records compared, {:.1} s",
        begun.elapsed().as_secs_f64()
    ));
    if let Some((symlink, (list, why))) = failed {
        let list: Vec<String> = list.iter().map(|operation| format!("\n  {operation:?}")).collect();
        let attach = if symlink { "symlink" } else { "bind" };
        panic!("{why}\nattach = {attach}, the fewest operations that show it:{}", list.concat());
    }
}

/// Removes operations from a shrunk case that it does not need: shrinking may leave some that only an earlier form of the
/// case needed.
fn minimize(
    mut list: Vec<Operation>,
    mut why: String,
    mut case: impl FnMut(&[Operation]) -> Result<(), String>,
) -> (Vec<Operation>, String) {
    let mut at = 0;
    while at < list.len() {
        let mut shorter = list.clone();
        shorter.remove(at);
        match case(&shorter) {
            Ok(()) => at += 1,
            Err(still) => (list, why, at) = (shorter, still, 0),
        }
    }
    (list, why)
}
