//! containerd's configuration: the file, what it imports, and of all that the few keys that decide
//! whether this snapshotter is used and how. Versions 2, 3 and 4 of the format. Pure but for `read`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
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
/// That of the transfer service.
pub const TRANSFER_TABLE: &str = "io.containerd.transfer.v1.local";
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
    pub of_runtimes: Vec<(String, String)>,
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
    /// `unpack_config` is a list in brackets, to which no table can be added.
    pub unpack_is_inline: bool,
    /// Each table that has a key of its own, and the last of the files in which it stands.
    pub tables: BTreeMap<Vec<String>, usize>,
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
    let mut waiting = vec![path.to_owned()];
    while let Some(path) = waiting.pop() {
        if configuration.files.contains(&path) || configuration.files.len() >= MOST_FILES {
            continue;
        }
        let text = reach::read_to_string(&path).map_err(|cause| Error::Unreadable { path: path.clone(), cause })?;
        let imports = configuration.add(&path, &text)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        waiting.extend(imports.iter().rev().flat_map(|one| matching(&directory.join(one))));
    }
    Ok(configuration)
}

/// The files of a pattern whose last name may have one `*`, as those of containerd have.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some((before, after)) = name.split_once('*') else { return vec![pattern.to_owned()] };
    let folder = pattern.parent().unwrap_or(Path::new("/"));
    let entries = reach::touch(folder).and_then(|_| fs::read_dir(folder)).into_iter().flatten().flatten();
    let is_meant =
        |name: &str| name.len() >= before.len() + after.len() && name.starts_with(before) && name.ends_with(after);
    let mut files: Vec<PathBuf> =
        entries.filter(|entry| entry.file_name().to_str().is_some_and(is_meant)).map(|entry| entry.path()).collect();
    // The last one is read first, and stays behind the others on the list of those that wait.
    files.sort();
    files.reverse();
    files
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

fn note_tables(table: &DeTable<'_>, file: usize, way: &mut Vec<String>, tables: &mut BTreeMap<Vec<String>, usize>) {
    for (name, one) in table {
        way.push(name.get_ref().to_string());
        if let Some(below) = one.get_ref().as_table() {
            note_tables(below, file, way, tables);
            // Of a table without a key of its own the heading may be missing.
            if below.values().any(|value| value.get_ref().as_table().is_none()) {
                tables.insert(way.clone(), file);
            }
        }
        way.pop();
    }
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
        let runtimes = |plugin| at(table, &["plugins", plugin, "containerd", "runtimes"]).and_then(DeValue::as_table);
        for (name, one) in [of_version_1, RUNTIME_TABLE].into_iter().filter_map(runtimes).flat_map(|all| all.iter()) {
            if let Some(snapshotter) = one.get_ref().as_table().and_then(|one| string_at(one, &["snapshotter"]))
                && !snapshotter.is_empty()
            {
                self.of_runtimes.push((name.get_ref().to_string(), snapshotter));
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
        // The parser does not tell the two forms apart.
        let is_inline = |line: &str| {
            line.trim_start().strip_prefix("unpack_config").is_some_and(|rest| rest.trim_start().starts_with('='))
        };
        self.written.unpack_is_inline |= text.lines().any(is_inline);
        note_tables(table, self.files.len() - 1, &mut Vec::new(), &mut self.written.tables);
        Ok(at(table, &["imports"]).map(strings).unwrap_or_default())
    }

    fn add_unpacks(&mut self, table: &DeTable<'_>) {
        let Some(list) = at(table, &["plugins", TRANSFER_TABLE, "unpack_config"]).and_then(DeValue::as_array) else {
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
        assert_eq!(found.of_runtimes, [("kata".to_owned(), "devmapper".to_owned())]);
        let (name, kind, address) = ("cvmfs".into(), "snapshot".into(), "/s".into());
        assert_eq!(found.proxies, [Proxy { name, kind, address, ..Proxy::default() }]);
        assert_eq!(found.unpack, None);

        let found = parse(
            r#"
            version = 3
            [plugins.'io.containerd.cri.v1.images']
              snapshotter = "cvmfs-snapshotter"
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
        let broken = write("broken.toml", "a = 1\nb = = 2\n");
        assert!(matches!(read(&broken), Err(Error::Syntax { line: 2, .. })));
        assert!(matches!(read(&dir.path().join("none")), Err(Error::Unreadable { .. })));
    }
}
