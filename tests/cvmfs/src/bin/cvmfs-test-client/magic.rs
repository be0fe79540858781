//! The extended attributes that the client makes up, after those of the real client 2.12: it answers
//! for each of them on every inode that has one, and lists them on the root alone or on every inode.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use fuser::{Errno, FileType};

use crate::attributes;
use crate::backend::{Backend, Entry};
use crate::error_log::ErrorLog;

/// On which inodes the attributes are listed (`CVMFS_MAGIC_XATTRS_VISIBILITY`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    RootOnly,
    Always,
}

/// Which inodes have an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Every,
    /// An entry with content.
    Content,
    RegularFile,
    SymbolicLink,
}

/// In the order in which they are listed.
const NAMES: [(&str, Owner); 45] = [
    ("user.catalog_counters", Owner::Every),
    ("user.chunk_list", Owner::RegularFile),
    ("user.chunks", Owner::RegularFile),
    ("user.compression", Owner::RegularFile),
    ("user.direct_io", Owner::RegularFile),
    ("user.expires", Owner::Every),
    ("user.external_file", Owner::RegularFile),
    ("user.external_host", Owner::Every),
    ("user.external_timeout", Owner::Every),
    ("user.fqrn", Owner::Every),
    ("user.hash", Owner::Content),
    ("user.hitrate", Owner::Every),
    ("user.host", Owner::Every),
    ("user.host_list", Owner::Every),
    ("user.inode_max", Owner::Every),
    ("user.lhash", Owner::Content),
    ("user.logbuffer", Owner::Every),
    ("user.maxfd", Owner::Every),
    ("user.ncleanup24", Owner::Every),
    ("user.nclg", Owner::Every),
    ("user.ndiropen", Owner::Every),
    ("user.ndownload", Owner::Every),
    ("user.nioerr", Owner::Every),
    ("user.nopen", Owner::Every),
    ("user.pid", Owner::Every),
    ("user.proxy", Owner::Every),
    ("user.proxy_list", Owner::Every),
    ("user.proxy_list_external", Owner::Every),
    ("user.pubkeys", Owner::Every),
    ("user.rawlink", Owner::SymbolicLink),
    ("user.repo_counters", Owner::Every),
    ("user.repo_metainfo", Owner::Every),
    ("user.revision", Owner::Every),
    ("user.root_hash", Owner::Every),
    ("user.rx", Owner::Every),
    ("user.speed", Owner::Every),
    ("user.tag", Owner::Every),
    ("user.timeout", Owner::Every),
    ("user.timeout_direct", Owner::Every),
    ("user.timestamp_last_ioerr", Owner::Every),
    ("user.uptime", Owner::Every),
    ("user.usedfd", Owner::Every),
    ("user.useddirp", Owner::Every),
    ("user.version", Owner::Every),
    ("xfsroot.rawlink", Owner::SymbolicLink),
];

/// A site has the keys of several domains: five are 2 KiB.
const PUBLIC_KEY: &str = include_str!("../../../../data/real-repositories/root.fixture.example.pub");
const PUBLIC_KEYS: usize = 5;

pub struct MagicAttributes {
    visibility: Mutex<Visibility>,
    /// The URL of the repository.
    host: String,
    log: Arc<ErrorLog>,
    started: Instant,
}

impl MagicAttributes {
    pub fn new(visibility: Visibility, host: &str, log: Arc<ErrorLog>) -> Self {
        Self { visibility: Mutex::new(visibility), host: host.to_owned(), log, started: Instant::now() }
    }

    /// Lists them elsewhere from now on, as the real client does after `cvmfs_config reload`.
    pub fn show_on(&self, visibility: Visibility) {
        *self.visibility.lock().unwrap_or_else(PoisonError::into_inner) = visibility;
    }

    /// The names that are listed on the entry at `path`, each with a zero byte after it.
    pub fn list(&self, path: &[u8], entry: &Entry) -> Vec<u8> {
        let visibility = *self.visibility.lock().unwrap_or_else(PoisonError::into_inner);
        if visibility == Visibility::RootOnly && !path.is_empty() {
            return Vec::new();
        }
        let names = NAMES.iter().filter(|(_, owner)| has(entry, *owner));
        names.flat_map(|(name, _)| [name.as_bytes(), b"\0"].concat()).collect()
    }

    /// The value of the attribute `name` of the entry at `path`; `None` if it is no magic attribute.
    pub fn value(
        &self,
        name: &[u8],
        backend: &dyn Backend,
        path: &[u8],
        entry: &Entry,
    ) -> Option<Result<Vec<u8>, Errno>> {
        let (name, owner) = NAMES.iter().find(|(each, _)| each.as_bytes() == name)?;
        if !has(entry, *owner) {
            return Some(Err(Errno::ENODATA));
        }
        Some(self.text(name, backend, path, entry).map(String::into_bytes))
    }

    fn text(&self, name: &str, backend: &dyn Backend, path: &[u8], entry: &Entry) -> Result<String, Errno> {
        let content = || entry.content.map(|digest| digest.to_string()).unwrap_or_default();
        Ok(match name {
            "user.catalog_counters" => {
                let of_files = attributes::kind(entry) != FileType::Directory;
                let catalog = backend.catalog(if of_files { cvmfs_testbed::format::parent(path) } else { path })?;
                let mountpoint = String::from_utf8_lossy(&catalog.path);
                format!(
                    "catalog_hash: {}\ncatalog_mountpoint: {mountpoint}\n{}",
                    catalog.digest,
                    csv(&catalog.counters)
                )
            }
            "user.repo_counters" => csv(&backend.catalog(b"")?.counters),
            "user.fqrn" => backend.fqrn(),
            "user.revision" => backend.revision().to_string(),
            "user.root_hash" => backend.root_hash(),
            "user.host" | "user.host_list" | "user.external_host" => self.host.clone(),
            "user.pid" => std::process::id().to_string(),
            "user.nioerr" => self.log.io_errors().to_string(),
            "user.timestamp_last_ioerr" => self.log.last_io_error().to_string(),
            "user.logbuffer" => self.log.text(),
            "user.pubkeys" => PUBLIC_KEY.repeat(PUBLIC_KEYS),
            "user.uptime" => (self.started.elapsed().as_secs() / 60).to_string(),
            "user.hash" => content(),
            "user.chunk_list" => format!("hash,offset,size\n{},0,{}\n", content(), entry.size),
            "user.rawlink" | "xfsroot.rawlink" => String::from_utf8_lossy(&entry.target).into_owned(),
            // No test depends on these values. They are those of a client that was just mounted.
            "user.chunks" => "1".to_owned(),
            "user.compression" => "zlib".to_owned(),
            "user.expires" => "4".to_owned(),
            "user.hitrate" | "user.speed" => "n/a".to_owned(),
            "user.inode_max" => "255".to_owned(),
            "user.lhash" => "Not in cache".to_owned(),
            "user.maxfd" => "130560".to_owned(),
            "user.proxy" => "DIRECT".to_owned(),
            "user.proxy_list" => "DIRECT\n".to_owned(),
            "user.proxy_list_external" => String::new(),
            "user.repo_metainfo" => "metainfo not available".to_owned(),
            "user.tag" => "trunk".to_owned(),
            "user.timeout" => "5".to_owned(),
            "user.timeout_direct" | "user.external_timeout" => "10".to_owned(),
            "user.version" => "2.12.0.0".to_owned(),
            _ => "0".to_owned(),
        })
    }
}

fn has(entry: &Entry, owner: Owner) -> bool {
    match owner {
        Owner::Every => true,
        Owner::Content => entry.content.is_some(),
        Owner::RegularFile => attributes::kind(entry) == FileType::RegularFile,
        Owner::SymbolicLink => attributes::kind(entry) == FileType::Symlink,
    }
}

fn csv(counters: &[(String, i64)]) -> String {
    counters.iter().fold(String::new(), |mut text, (name, value)| {
        writeln!(text, "{name},{value}").expect("a String takes every line");
        text
    })
}
