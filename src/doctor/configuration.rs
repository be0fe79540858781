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
const TRANSFER_TABLE: &str = "io.containerd.transfer.v1.local";
/// Files that import each other in a circle end somewhere.
const MOST_FILES: usize = 64;

/// A `proxy_plugins` table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxy {
    pub name: String,
    pub address: String,
    pub exports: BTreeMap<String, String>,
    pub capabilities: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    pub files: Vec<PathBuf>,
    /// The first of them has a list of imports.
    pub has_imports: bool,
    /// The format that it names; without one it is 1.
    pub format: Option<i64>,
    pub proxies: Vec<Proxy>,
    /// Of the CRI.
    pub snapshotter: Option<String>,
    pub disable_annotations: Option<bool>,
    pub pause_image: Option<String>,
    /// These stand in the table of containerd 1, which 2 passes over unless runtimes stand beside.
    pub is_of_version_1: bool,
    /// Runtimes that have a snapshotter of their own.
    pub of_runtimes: Vec<(String, String)>,
    /// The snapshotters that the transfer service unpacks for, where the list is not the default one.
    pub unpack: Option<Vec<String>>,
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

fn strings(value: &DeValue<'_>) -> Vec<String> {
    let all = value.as_array().into_iter().flat_map(|all| all.iter());
    all.filter_map(|one| one.get_ref().as_str().map(str::to_owned)).collect()
}

impl Configuration {
    /// A version of containerd that such a file is written for, where nobody tells which one runs: of
    /// each format the one that is most in use.
    pub fn suggests(&self) -> Version {
        match self.format {
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
        if self.files.len() == 1 {
            let format = at(table, &["version"]).and_then(DeValue::as_integer);
            self.format = format.and_then(|number| i64::from_str_radix(number.as_str(), number.radix()).ok());
        }
        for (name, one) in
            at(table, &["proxy_plugins"]).and_then(DeValue::as_table).into_iter().flat_map(|all| all.iter())
        {
            let Some(one) = one.get_ref().as_table() else { continue };
            self.proxies.retain(|proxy| proxy.name != *name.get_ref());
            let exports = at(one, &["exports"]).and_then(DeValue::as_table).into_iter().flat_map(|all| all.iter());
            self.proxies.push(Proxy {
                name: name.get_ref().to_string(),
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
        if let Some(list) = at(table, &["plugins", TRANSFER_TABLE, "unpack_config"]).and_then(DeValue::as_array) {
            let one = |one: &Spanned<DeValue<'_>>| string_at(one.get_ref().as_table()?, &["snapshotter"]);
            self.unpack = Some(list.iter().filter_map(one).collect());
        }
        Ok(at(table, &["imports"]).map(strings).unwrap_or_default())
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
        assert_eq!(found.proxies, [Proxy { name: "cvmfs".into(), address: "/s".into(), ..Proxy::default() }]);
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
        assert_eq!(found.unpack, Some(vec!["cvmfs-snapshotter".to_owned(), "overlayfs".to_owned()]));
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
