//! containerd's configuration: the file, what it imports, and of all that the few keys that decide
//! whether this snapshotter is used and how. Versions 2, 3 and 4 of the format. Pure but for `read`.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::judge::Version;
use super::reach;

/// Where containerd's settings for images of Kubernetes stand, in version 2 of the format and later.
pub const CRI_TABLES: [&str; 2] = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"];
const RUNTIME_TABLE: &str = "io.containerd.cri.v1.runtime";
/// Without one of these there is no CRI; the last one is its name in version 1 of the format.
pub const CRI_PARTS: [&str; 4] = [CRI_TABLES[0], CRI_TABLES[1], RUNTIME_TABLE, "cri"];
pub const DISABLED: &str = "disabled_plugins";
const PLUGIN_LISTS: [&str; 2] = [DISABLED, "required_plugins"];
/// That of the transfer service.
pub const TRANSFER_TABLE: &str = "io.containerd.transfer.v1.local";
pub const UNPACK_TABLE: [&str; 3] = ["plugins", TRANSFER_TABLE, "unpack_config"];
/// containerd's default of `max_concurrent_downloads`.
const DOWNLOADS: i64 = 3;
/// Files that import each other in a circle end somewhere.
const MOST_FILES: usize = 64;

/// A `proxy_plugins` table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxy {
    pub name: String,
    /// Its `type`.
    pub kind: String,
    pub address: String,
    pub exports: BTreeMap<String, String>,
    pub capabilities: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    pub files: Vec<PathBuf>,
    /// The first of them has a list of imports.
    pub has_imports: bool,
    pub proxies: Vec<Proxy>,
    /// Of the CRI.
    pub snapshotter: Option<String>,
    pub disable_annotations: Option<bool>,
    pub pause_image: Option<String>,
    /// These stand in the table of containerd 1, which 2 passes over unless runtimes stand beside.
    pub is_of_version_1: bool,
    /// Runtimes that have a snapshotter of their own.
    pub of_runtimes: BTreeSet<(String, String)>,
    /// What the transfer service unpacks for, where the list is not the default one.
    pub unpack: Option<Vec<Unpack>>,
    /// Settings of the CRI that keep 2.1 and later from pulling by the transfer service, by key.
    pub by_client: BTreeMap<&'static str, String>,
    pub written: Written,
}

/// An `unpack_config` of the transfer service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unpack {
    pub snapshotter: String,
    pub platform: String,
    /// Passed over where it does not fit.
    pub is_optional: bool,
}

/// What stands in the files, whatever containerd makes of it: what an admin would edit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// `version` of the first file.
    pub version: Option<i64>,
    /// Of the CRI, whether containerd takes it from there or not.
    pub snapshotter: Option<String>,
    pub disable_annotations: Option<bool>,
    /// Runtimes stand in the CRI's table of containerd 1, without which 2 passes over that.
    pub has_runtimes: bool,
    /// What each file lists under these keys.
    pub plugins: Vec<PluginList>,
    /// `unpack_config` is a list in brackets, to which no table can be added.
    pub unpack_is_inline: bool,
    /// Each table that has a key of its own, and the last of the files in which it stands.
    pub tables: BTreeMap<Vec<String>, usize>,
    /// Those that stand under a heading, by file.
    headings: BTreeSet<(usize, Vec<String>)>,
    /// Those that do not, and take none.
    unheaded: BTreeMap<(usize, Vec<String>), Form>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `table.key = …`
    Dotted,
    /// `table = { key = … }`
    Braces,
}

/// Where a table's keys stand that has no heading and can have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// So many of its names are in the heading above it.
    pub heading: usize,
    /// So many lead to the braces around it; as many as in the heading, if there are none.
    pub braces: usize,
}

/// Plugins of containerd that it is not to start, or not to start without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginList {
    pub file: usize,
    /// One of `PLUGIN_LISTS`.
    pub key: &'static str,
    pub names: Vec<String>,
}

#[derive(Debug)]
pub enum Error {
    Unreadable { path: PathBuf, cause: io::Error },
    Syntax { path: PathBuf, line: usize, why: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, cause } => write!(f, "cannot read {}: {cause}", path.display()),
            Self::Syntax { path, line, why } => write!(f, "{}, line {line}: not TOML: {why}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

/// Reads `path` and what it imports.
pub fn read(path: &Path) -> Result<Configuration, Error> {
    let mut configuration = Configuration::default();
    // In containerd's order: all imports of a file before theirs. The last word counts.
    let mut waiting = VecDeque::from([path.to_owned()]);
    while let Some(path) = waiting.pop_front() {
        if configuration.files.contains(&path) || configuration.files.len() >= MOST_FILES {
            continue;
        }
        let text = reach::read_to_string(&path).map_err(|cause| Error::Unreadable { path: path.clone(), cause })?;
        let imports = configuration.add(&path, &text)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        waiting.extend(imports.iter().flat_map(|one| matching(&directory.join(one))));
    }
    Ok(configuration)
}

/// The files that an import means. containerd takes one with a star for a pattern (Go's `filepath.Glob`), and
/// any other one for a file's name.
fn matching(import: &Path) -> Vec<PathBuf> {
    if !import.to_string_lossy().contains('*') {
        return vec![import.to_owned()];
    }
    let mut found = vec![PathBuf::new()];
    for part in import.components() {
        let part = part.as_os_str().to_string_lossy();
        let is_pattern = part.contains(['*', '?', '[']);
        let below = |folder: PathBuf| if is_pattern { entries(&folder, &part) } else { vec![folder.join(&*part)] };
        found = found.into_iter().flat_map(below).collect();
    }
    let is_missing = |e: &io::Error| matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    found.retain(|path| !reach::touch(path).is_err_and(|e| is_missing(&e)));
    found.sort();
    found
}

fn entries(folder: &Path, pattern: &str) -> Vec<PathBuf> {
    let pattern: Vec<char> = pattern.chars().collect();
    let is_meant = |name: &str| fits(&pattern, &name.chars().collect::<Vec<_>>());
    let all = reach::touch(folder).and_then(|_| fs::read_dir(folder)).into_iter().flatten().flatten();
    all.filter(|entry| entry.file_name().to_str().is_some_and(is_meant)).map(|entry| entry.path()).collect()
}

/// As Go's `filepath.Match`, but for backslashes.
fn fits(pattern: &[char], name: &[char]) -> bool {
    match (pattern, name) {
        ([], name) => name.is_empty(),
        (['*', pattern @ ..], name) => (0..=name.len()).any(|n| fits(pattern, &name[n..])),
        (_, []) => false,
        (['?', pattern @ ..], [_, name @ ..]) => fits(pattern, name),
        (['[', class @ ..], [one, name @ ..]) => {
            let Some(end) = class.iter().position(|&c| c == ']') else { return false };
            let (class, pattern) = (&class[..end], &class[end + 1..]);
            let (is_in, class) = class.strip_prefix(&['^']).map_or((true, class), |class| (false, class));
            is_in_class(class, *one) == is_in && fits(pattern, name)
        }
        ([first, pattern @ ..], [one, name @ ..]) => first == one && fits(pattern, name),
    }
}

/// `a-z_`
fn is_in_class(class: &[char], one: char) -> bool {
    match class {
        [] => false,
        [low, '-', high, rest @ ..] => (*low..=*high).contains(&one) || is_in_class(rest, one),
        [first, rest @ ..] => *first == one || is_in_class(rest, one),
    }
}

/// What stands at the end of a way through tables.
fn at<'v>(table: &'v DeTable<'v>, way: &[&str]) -> Option<&'v DeValue<'v>> {
    let (last, tables) = way.split_last()?;
    let mut table = table;
    for name in tables {
        table = table.get(*name)?.get_ref().as_table()?;
    }
    table.get(*last).map(Spanned::get_ref)
}

fn string_at(table: &DeTable<'_>, way: &[&str]) -> Option<String> {
    at(table, way)?.as_str().map(str::to_owned)
}

fn integer(value: &DeValue<'_>) -> Option<i64> {
    value.as_integer().and_then(|number| i64::from_str_radix(number.as_str(), number.radix()).ok())
}

fn strings(value: &DeValue<'_>) -> Vec<String> {
    let all = value.as_array().into_iter().flat_map(|all| all.iter());
    all.filter_map(|one| one.get_ref().as_str().map(str::to_owned)).collect()
}

/// How the tables of one file are written.
struct Notes<'t> {
    text: &'t str,
    file: usize,
    way: Vec<String>,
    written: &'t mut Written,
}

impl Notes<'_> {
    /// Whether keys stand in `table`, or below it, with no heading in between.
    fn note(&mut self, table: &DeTable<'_>) -> bool {
        let mut is_dotted = false;
        for (name, one) in table {
            self.way.push(name.get_ref().to_string());
            let has_heading = self.written.headings.contains(&(self.file, self.way.clone()));
            if let Some(below) = one.get_ref().as_table() {
                let has_keys = self.note(below);
                // Of a table without a key of its own the heading may be missing.
                if below.values().any(|value| value.get_ref().as_table().is_none()) {
                    self.written.tables.insert(self.way.clone(), self.file);
                }
                let is_in_braces = self.text.get(one.span()).is_some_and(|text| text.starts_with('{'));
                let form = if is_in_braces { Some(Form::Braces) } else { has_keys.then_some(Form::Dotted) };
                if let Some(form) = form.filter(|_| !has_heading) {
                    self.written.unheaded.insert((self.file, self.way.clone()), form);
                    is_dotted = true;
                }
            } else {
                is_dotted |= !has_heading;
            }
            self.way.pop();
        }
        is_dotted
    }
}

/// The tables of a file that have a line `[a.b]` or `[[a.b]]`.
fn headings(text: &str) -> impl Iterator<Item = Vec<String>> {
    text.lines().map(str::trim).filter(|line| line.starts_with('[')).filter_map(|line| {
        let parsed = DeTable::parse(line).ok()?;
        let mut way = Vec::new();
        let mut table = parsed.get_ref();
        while let Some((name, below)) = table.iter().next() {
            way.push(name.get_ref().to_string());
            let Some(below) = below.get_ref().as_table() else { break };
            table = below;
        }
        Some(way)
    })
}

impl Configuration {
    /// What containerd says that it made of `said`.
    pub fn of_dump(dump: &str, said: &Self) -> Result<Self, Error> {
        let mut used = Self::default();
        used.add(said.files.first().map_or(Path::new(""), PathBuf::as_path), dump)?;
        used.files.clone_from(&said.files);
        used.has_imports = said.has_imports;
        used.written = said.written.clone();
        // It is what containerd uses, whatever it was read from.
        used.is_of_version_1 = false;
        Ok(used)
    }

    /// Which file's word on a plugin counts: the last one that has a table of it.
    pub fn home(&self, table: &[&str]) -> Option<usize> {
        let of_plugin = self.written.tables.iter().filter(|(one, _)| one.iter().take(2).eq(table.iter().take(2)));
        of_plugin.map(|(_, &file)| file).max()
    }

    /// The tables that stand in the files from this one on downwards.
    pub fn below(&self, table: &[&str]) -> Vec<Vec<&str>> {
        let all = self.written.tables.keys().filter(|one| one.iter().take(table.len()).eq(table));
        all.map(|one| one.iter().map(String::as_str).collect()).collect()
    }

    /// Whether a table stands there under a heading of its own.
    pub fn stands(&self, table: &[&str]) -> bool {
        let file = self.written.tables.iter().find(|(one, _)| one.iter().eq(table)).map(|(_, &file)| file);
        file.is_some() && file == self.home(table)
    }

    /// Where the keys of a table go, if not under a heading of its own.
    pub fn inner(&self, table: &[&str]) -> Option<Inner> {
        let file = self.home(table).unwrap_or(0);
        let way = |length: usize| (file, table[..length].iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        let form = |length: usize| self.written.unheaded.get(&way(length)).copied();
        let lengths = 1..=table.len();
        let braces = lengths.clone().rev().find(|&length| form(length) == Some(Form::Braces));
        let end = braces.or_else(|| lengths.clone().rev().find(|&length| form(length).is_some()))?;
        let heading = (1..end).rev().find(|&length| self.written.headings.contains(&way(length))).unwrap_or(0);
        // A heading below dotted keys starts anew.
        let is_below = lengths.rev().find(|&length| self.written.headings.contains(&way(length)));
        if braces.is_none() && is_below.is_some_and(|below| below > end) {
            return None;
        }
        Some(Inner { heading, braces: braces.unwrap_or(heading) })
    }

    /// A version of containerd that such a file is written for, where nobody tells which one runs: of
    /// each format the one that is most in use.
    pub fn suggests(&self) -> Version {
        match self.written.version {
            None | Some(..=2) => Version(1, 7, 24),
            Some(3..) => Version(2, 2, 0),
        }
    }

    /// One more file; what it says wins over those before. The result is what it imports.
    pub fn add(&mut self, path: &Path, text: &str) -> Result<Vec<String>, Error> {
        let table = DeTable::parse(text).map_err(|e| {
            let byte = e.span().map_or(0, |span| span.start).min(text.len());
            let line = text[..byte].matches('\n').count() + 1;
            Error::Syntax { path: path.to_owned(), line, why: e.message().to_owned() }
        })?;
        let table = table.get_ref();
        self.files.push(path.to_owned());
        self.has_imports |= self.files.len() == 1 && at(table, &["imports"]).is_some();
        for (name, one) in
            at(table, &["proxy_plugins"]).and_then(DeValue::as_table).into_iter().flat_map(|all| all.iter())
        {
            let Some(one) = one.get_ref().as_table() else { continue };
            self.proxies.retain(|proxy| proxy.name != *name.get_ref());
            let exports = at(one, &["exports"]).and_then(DeValue::as_table).into_iter().flat_map(|all| all.iter());
            self.proxies.push(Proxy {
                name: name.get_ref().to_string(),
                kind: string_at(one, &["type"]).unwrap_or_default(),
                address: string_at(one, &["address"]).unwrap_or_default(),
                exports: exports
                    .filter_map(|(key, value)| Some((key.get_ref().to_string(), value.get_ref().as_str()?.to_owned())))
                    .collect(),
                capabilities: at(one, &["capabilities"]).map(strings).unwrap_or_default(),
            });
        }
        let [of_version_1, images] = CRI_TABLES;
        let of_cri = |name: &str| {
            at(table, &["plugins", images, name]).or_else(|| at(table, &["plugins", of_version_1, "containerd", name]))
        };
        if let Some(name) = of_cri("snapshotter").and_then(DeValue::as_str) {
            self.snapshotter = Some(name.to_owned());
            self.is_of_version_1 = at(table, &["plugins", images, "snapshotter"]).is_none()
                && at(table, &["plugins", of_version_1, "containerd", "runtimes"]).is_none();
        }
        if let Some(disabled) = of_cri("disable_snapshot_annotations").and_then(DeValue::as_bool) {
            self.disable_annotations = Some(disabled);
        }
        let pause = string_at(table, &["plugins", images, "pinned_images", "sandbox"])
            .or_else(|| string_at(table, &["plugins", of_version_1, "sandbox_image"]));
        self.pause_image = pause.or(self.pause_image.take());
        let runtimes: [&[&str]; 3] = [
            &["plugins", of_version_1, "containerd", "runtimes"],
            &["plugins", RUNTIME_TABLE, "containerd", "runtimes"],
            // What the images of a runtime are unpacked with.
            &["plugins", images, "runtime_platforms"],
        ];
        let runtimes = runtimes.into_iter().filter_map(|way| at(table, way).and_then(DeValue::as_table));
        for (name, one) in runtimes.flat_map(|all| all.iter()) {
            if let Some(snapshotter) = one.get_ref().as_table().and_then(|one| string_at(one, &["snapshotter"]))
                && !snapshotter.is_empty()
            {
                self.of_runtimes.insert((name.get_ref().to_string(), snapshotter));
            }
        }
        self.add_unpacks(table);
        self.add_reasons_for_the_client(table);
        if self.files.len() == 1 {
            self.written.version = at(table, &["version"]).and_then(integer);
        }
        self.written.snapshotter.clone_from(&self.snapshotter);
        self.written.disable_annotations = self.disable_annotations;
        self.written.has_runtimes |=
            ["cri", of_version_1].iter().any(|cri| at(table, &["plugins", cri, "containerd", "runtimes"]).is_some());
        let file = self.files.len() - 1;
        self.written.plugins.extend(PLUGIN_LISTS.into_iter().filter_map(|key| {
            let names = strings(at(table, &[key])?);
            Some(PluginList { file, key, names })
        }));
        self.written.headings.extend(headings(text).map(|way| (file, way)));
        // The parser does not tell the two forms apart.
        let has_heading = |way: &[&str]| {
            let way = way.iter().map(|&name| name.to_owned()).collect();
            self.written.headings.contains(&(file, way))
        };
        self.written.unpack_is_inline |= at(table, &UNPACK_TABLE).is_some() && !has_heading(&UNPACK_TABLE);
        Notes { text, file, way: Vec::new(), written: &mut self.written }.note(table);
        Ok(at(table, &["imports"]).map(strings).unwrap_or_default())
    }

    fn add_unpacks(&mut self, table: &DeTable<'_>) {
        let Some(list) = at(table, &UNPACK_TABLE).and_then(DeValue::as_array) else {
            return;
        };
        let one = |one: &Spanned<DeValue<'_>>| {
            let one = one.get_ref().as_table()?;
            Some(Unpack {
                snapshotter: string_at(one, &["snapshotter"])?,
                platform: string_at(one, &["platform"]).unwrap_or_default(),
                is_optional: at(one, &["optional"]).and_then(DeValue::as_bool).unwrap_or(false),
            })
        };
        self.unpack = Some(list.iter().filter_map(one).collect());
    }

    /// As `CheckLocalImagePullConfigs` of containerd has them.
    fn add_reasons_for_the_client(&mut self, table: &DeTable<'_>) {
        const ALL: [(&str, &[&str]); 7] = [
            ("use_local_image_pull", &[]),
            ("discard_unpacked_layers", &["containerd"]),
            ("image_pull_with_sync_fs", &[]),
            ("max_concurrent_downloads", &[]),
            ("registry.mirrors", &[]),
            ("registry.configs", &[]),
            ("registry.auths", &[]),
        ];
        let [of_version_1, images] = CRI_TABLES;
        for (key, before) in ALL {
            let names = key.split('.');
            let new: Vec<&str> = ["plugins", images].into_iter().chain(names.clone()).collect();
            let old: Vec<&str> =
                ["plugins", of_version_1].into_iter().chain(before.iter().copied()).chain(names).collect();
            let Some(value) = at(table, &new).or_else(|| at(table, &old)) else { continue };
            let reason = match value {
                DeValue::Boolean(true) => Some(format!("{key} = true")),
                DeValue::Integer(_) => {
                    integer(value).filter(|&number| number != DOWNLOADS).map(|number| format!("{key} = {number}"))
                }
                DeValue::Table(all) if !all.is_empty() => Some(key.to_owned()),
                _ => None,
            };
            match reason {
                Some(reason) => self.by_client.insert(key, reason),
                None => self.by_client.remove(key),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Configuration {
        let mut configuration = Configuration::default();
        configuration.add(Path::new("/etc/containerd/config.toml"), text).unwrap();
        configuration
    }

    #[test]
    fn both_formats_are_read() {
        let found = parse(
            r#"
            version = 2
            [plugins."io.containerd.grpc.v1.cri"]
              sandbox_image = "pause:1"
            [plugins."io.containerd.grpc.v1.cri".containerd]
              snapshotter = "cvmfs-snapshotter"
              disable_snapshot_annotations = false
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
              snapshotter = "devmapper"
            [proxy_plugins.cvmfs]
              type = "snapshot"
              address = "/s"
            "#,
        );
        assert_eq!(found.snapshotter.as_deref(), Some("cvmfs-snapshotter"));
        assert_eq!((found.disable_annotations, found.pause_image.as_deref()), (Some(false), Some("pause:1")));
        let kata = |name: &str| BTreeSet::from([("kata".to_owned(), name.to_owned())]);
        assert_eq!(found.of_runtimes, kata("devmapper"));
        let (name, kind, address) = ("cvmfs".into(), "snapshot".into(), "/s".into());
        assert_eq!(found.proxies, [Proxy { name, kind, address, ..Proxy::default() }]);
        assert_eq!(found.unpack, None);

        let found = parse(
            r#"
            version = 3
            [plugins.'io.containerd.cri.v1.images']
              snapshotter = "cvmfs-snapshotter"
            [plugins.'io.containerd.cri.v1.images'.runtime_platforms.kata]
              snapshotter = "overlayfs"
            [plugins.'io.containerd.cri.v1.images'.pinned_images]
              sandbox = "pause:2"
            [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
              platform = "linux"
              snapshotter = "cvmfs-snapshotter"
            [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
              snapshotter = "overlayfs"
            [proxy_plugins.cvmfs-snapshotter]
              address = "/s"
              capabilities = ["rebase"]
              [proxy_plugins.cvmfs-snapshotter.exports]
                root = "/r"
            "#,
        );
        assert_eq!(
            (found.snapshotter.as_deref(), found.pause_image.as_deref()),
            (Some("cvmfs-snapshotter"), Some("pause:2"))
        );
        let unpack = |name: &str, platform: &str| Unpack {
            snapshotter: name.to_owned(),
            platform: platform.to_owned(),
            is_optional: false,
        };
        assert_eq!(found.of_runtimes, kata("overlayfs"));
        assert_eq!(found.unpack, Some(vec![unpack("cvmfs-snapshotter", "linux"), unpack("overlayfs", "")]));
        assert_eq!(found.proxies[0].exports["root"], "/r");
        assert_eq!(found.proxies[0].capabilities, ["rebase"]);
    }

    #[test]
    fn the_format_of_a_file_suggests_which_containerd_reads_it() {
        for (text, version) in
            [("", Version(1, 7, 24)), ("version = 2", Version(1, 7, 24)), ("version = 3", Version(2, 2, 0))]
        {
            assert_eq!(parse(text).suggests(), version, "{text}");
        }
    }

    #[test]
    fn imports_win_over_the_file_that_names_them_the_last_one_over_all() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let set = |name: &str| format!("[plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"{name}\"\n");
        write("conf.d/a.toml", &set("a"));
        write("conf.d/b.toml", &set("b"));
        write("conf.d/not.json", "{");
        let main = write("config.toml", &format!("imports = [\"conf.d/*.toml\", \"config.toml\"]\n{}", set("main")));
        let found = read(&main).unwrap();
        assert_eq!(found.files.len(), 3);
        assert_eq!(found.snapshotter.as_deref(), Some("b"));
        for (import, expected) in [
            ("*/b.toml", Some("b")),
            ("c*.?/*.toml", Some("b")),
            ("*/[^b-z].t*l", Some("a")),
            ("*/[bc].toml", Some("b")),
            ("*/none.toml", None),
            ("*/a.toml/*", None),
        ] {
            let main = write("pattern.toml", &format!("imports = [{import:?}]\n"));
            assert_eq!(read(&main).unwrap().snapshotter.as_deref(), expected, "{import}");
        }
        // Those of a file come before theirs.
        write("n.toml", &set("n"));
        write("a.toml", "imports = [\"n.toml\"]\n");
        write("b.toml", &set("b"));
        let main = write("nested.toml", "imports = [\"a.toml\", \"b.toml\"]\n");
        assert_eq!(read(&main).unwrap().snapshotter.as_deref(), Some("n"));
        let broken = write("broken.toml", "a = 1\nb = = 2\n");
        assert!(matches!(read(&broken), Err(Error::Syntax { line: 2, .. })));
        assert!(matches!(read(&dir.path().join("none")), Err(Error::Unreadable { .. })));
    }
}
