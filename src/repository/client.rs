//! The process that serves a CernVM-FS repository, and where it keeps what it has fetched.
//!
//! With that cache on the file system of the state root a node can hang: overlayfs holds the lock of renames of
//! that file system while it asks the repository, and the client may need that lock to answer.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::FQRN_XATTR;
use crate::system::Sys;

/// Where the client's configuration is.
pub const CONFIGURATION: &str = "/etc/cvmfs";
/// Where the client keeps its cache if its configuration does not say it.
const CACHE_BASE: &str = "/var/lib/cvmfs";
/// The attribute that a CernVM-FS mount has at its root, with the number of the client's process.
const PROCESS: &str = "user.pid";
/// Far more than a command line or a file of the configuration has.
const MAX_BYTES: u64 = 1 << 20;
/// So many entries of `default.d` are looked at.
const MAX_FILES: usize = 1024;

/// A directory of the cache, and its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheDirectory {
    pub path: PathBuf,
    pub device: u64,
}

/// Where the client of the repository at `path` keeps its cache. None: it is no CernVM-FS, or nobody can tell.
/// Asks the repository.
pub fn cache(sys: &dyn Sys, path: &Path, configuration: &Path) -> Option<CacheDirectory> {
    let name = attribute(sys, path, FQRN_XATTR)?;
    let process = process(sys, path, &name)?;
    // The client's working directory is its cache.
    let works_in = PathBuf::from(format!("/proc/{process}/cwd"));
    match sys.read_link(&works_in) {
        Ok(path) => Some(CacheDirectory { path, device: sys.stat(&works_in).ok()?.device }),
        // The kernel says it to nobody without CAP_SYS_PTRACE, which our unit does not give.
        Err(e) if matches!(e.errno, Errno::EACCES | Errno::EPERM) => configured(sys, configuration, &name),
        Err(_) => None,
    }
}

/// The user that a client runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientUser {
    Uid(u32),
    /// The client's process cannot be seen from here.
    Hidden,
    /// No CernVM-FS client serves the repository.
    NoClient,
}

/// The user that the client of the repository at `path` runs as. Asks the repository.
pub fn user(sys: &dyn Sys, path: &Path) -> ClientUser {
    let Some(name) = attribute(sys, path, FQRN_XATTR) else { return ClientUser::NoClient };
    let uid = process(sys, path, &name).and_then(|process| {
        let status = sys.read_file(Path::new(&format!("/proc/{process}/status")), MAX_BYTES).ok()?;
        let status = String::from_utf8_lossy(&status);
        // The real user, and then the effective one.
        status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
    });
    uid.map_or(ClientUser::Hidden, ClientUser::Uid)
}

fn attribute(sys: &dyn Sys, path: &Path, name: &str) -> Option<String> {
    String::from_utf8(sys.attribute(path, name).ok()??).ok()
}

/// The process that serves repository `name` at `path`.
fn process(sys: &dyn Sys, path: &Path, name: &str) -> Option<u32> {
    let process: u32 = attribute(sys, path, PROCESS)?.trim().parse().ok()?;
    // One in a container has another number here, and this number is another process's.
    let command_line = sys.read_file(Path::new(&format!("/proc/{process}/cmdline")), MAX_BYTES).ok()?;
    let mut words = command_line.split(|byte| *byte == 0);
    words.any(|word| word == name.as_bytes() || OsStr::from_bytes(word) == path).then_some(process)
}

/// Finds the cache by the client's configuration. An alien cache is not known here.
fn configured(sys: &dyn Sys, configuration: &Path, name: &str) -> Option<CacheDirectory> {
    let mut base = CACHE_BASE.to_owned();
    let mut directory = None;
    for file in files(sys, configuration, name) {
        let text = match sys.read_file(&file, MAX_BYTES) {
            Ok(text) => text,
            Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR) => continue,
            // A file that cannot be read may name another cache.
            Err(_) => return None,
        };
        for (key, value) in String::from_utf8_lossy(&text).lines().filter_map(assignment) {
            match key {
                "CVMFS_CACHE_BASE" => value.clone_into(&mut base),
                "CVMFS_CACHE_DIR" => directory = Some(value.to_owned()),
                _ => {}
            }
        }
    }
    let below_base = ["shared", name, ""].map(|below| Path::new(&base).join(below));
    let paths = directory.into_iter().map(PathBuf::from).chain(below_base);
    // A value such as $HOME/cache is not expanded: no such path exists, and it is passed over.
    paths
        .filter(|path| path.is_absolute())
        .find_map(|path| Some(CacheDirectory { device: sys.stat(&path).ok()?.device, path }))
}

/// In the order in which the client reads them, without those of a configuration repository: a later one wins.
fn files(sys: &dyn Sys, configuration: &Path, name: &str) -> Vec<PathBuf> {
    let defaults = configuration.join("default.d");
    let names = sys.first_entries(&defaults, MAX_FILES).unwrap_or_default();
    let mut defaults: Vec<PathBuf> = names.into_iter().map(|name| defaults.join(name)).collect();
    defaults.retain(|file| file.extension().is_some_and(|end| end == "conf"));
    defaults.sort();
    let mut files = vec![configuration.join("default.conf")];
    files.append(&mut defaults);
    let domain = name.split_once('.').map_or("", |(_, domain)| domain);
    files.push(configuration.join("default.local"));
    for (folder, name) in [("domain.d", domain), ("config.d", name)] {
        files.extend(["conf", "local"].map(|end| configuration.join(folder).join(format!("{name}.{end}"))));
    }
    files
}

/// Parses a line of a shell, `KEY=value`.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start();
    let (key, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
    let value = match value.chars().next()? {
        quote @ ('"' | '\'') => value[1..].split(quote).next()?,
        _ => value.split(|c: char| c.is_whitespace() || c == ';' || c == '#').next()?,
    };
    Some((key.trim(), value))
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::system::Host;
    use crate::system::testing::FaultySys;

    /// A repository whose client works in `cache`, and the client.
    pub struct ServingProcess {
        dir: tempfile::TempDir,
        client: Child,
    }

    impl ServingProcess {
        fn new(word: &str) -> Self {
            Self::of_user(word, 0)
        }

        /// Only root can have a client of another user.
        pub fn of_user(word: &str, uid: u32) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let [repository, cache] = ["repository", "cache"].map(|name| dir.path().join(name));
            for made in [&repository, &cache] {
                fs::create_dir(made).unwrap();
            }
            // It ends when nobody holds its standard input any more.
            let mut command = Command::new("sh");
            command.args(["-c", "echo; read line", word]).current_dir(&cache);
            if uid != 0 {
                fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
                command.uid(uid);
            }
            let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            // It has become the shell by then.
            std::io::Read::read_exact(client.stdout.as_mut().unwrap(), &mut [0]).unwrap();
            xattr::set(&repository, FQRN_XATTR, b"a.example.org").unwrap();
            xattr::set(&repository, PROCESS, client.id().to_string().as_bytes()).unwrap();
            Self { dir, client }
        }

        pub fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn cache(&self, sys: &dyn Sys) -> Option<PathBuf> {
            let found = cache(sys, &self.path("repository"), &self.path("etc"))?;
            assert_eq!(found.device, fs::metadata(&found.path).unwrap().dev());
            Some(found.path)
        }
    }

    impl Drop for ServingProcess {
        fn drop(&mut self) {
            let _ = self.client.kill();
            let _ = self.client.wait();
        }
    }

    #[test]
    fn the_cache_is_where_the_client_works_if_that_process_serves_the_repository() {
        let served = ServingProcess::new("a.example.org");
        let real = served.path("cache").canonicalize().unwrap();
        assert_eq!(served.cache(&Host), Some(real));
        // Any directory may be a repository, and what is mounted may be served from a container.
        assert_eq!(ServingProcess::new("sh").cache(&Host), None);
        xattr::remove(served.path("repository"), PROCESS).unwrap();
        assert_eq!(served.cache(&Host), None);
    }

    #[test]
    fn where_the_kernel_does_not_say_it_the_configuration_of_the_client_does() {
        let served = ServingProcess::new("a.example.org");
        let refusing = FaultySys::refusing(format!("/proc/{}/cwd", served.client.id()).into(), Errno::EACCES);
        let [etc, base] = ["etc", "base"].map(|name| served.path(name));
        for folder in ["default.d", "domain.d", "config.d"] {
            fs::create_dir_all(etc.join(folder)).unwrap();
        }
        fs::create_dir_all(base.join("shared")).unwrap();
        let write = |name: &str, text: String| fs::write(etc.join(name), text).unwrap();
        write("default.conf", format!("CVMFS_CACHE_BASE={}\n", base.display()));
        assert_eq!(served.cache(&refusing), Some(base.join("shared")));
        write("default.d/50-site.conf", "CVMFS_CACHE_BASE=/nowhere\n".to_owned());
        let line = format!(
            "# CVMFS_CACHE_BASE=/no\nCVMFS_QUOTA_LIMIT=4000\nexport CVMFS_CACHE_BASE='{}' # ours\n",
            base.display()
        );
        write("default.local", line);
        assert_eq!(served.cache(&refusing), Some(base.join("shared")));
        write("config.d/a.example.org.local", format!("CVMFS_CACHE_DIR={}\n", served.path("cache").display()));
        assert_eq!(served.cache(&refusing), Some(served.path("cache")));
        write("config.d/a.example.org.local", "CVMFS_CACHE_BASE=$HOME/cache\n".to_owned());
        assert_eq!(served.cache(&refusing), None);
        fs::remove_file(etc.join("config.d/a.example.org.local")).unwrap();
        assert_eq!(served.cache(&refusing), Some(base.join("shared")));
        // A file that cannot be read may name another cache, so nothing is said.
        fs::create_dir(etc.join("config.d/a.example.org.local")).unwrap();
        assert_eq!(served.cache(&refusing), None);
    }
}
