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
        xattr::set(&repository, PID_XATTR, client.id().to_string().as_bytes()).unwrap();
        Self { dir, client }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn cache(&self, sys: &dyn Sys) -> Option<PathBuf> {
        let cache = find_cache(sys, &self.path("repository"), &self.path("etc"))?;
        assert_eq!(cache.device, fs::metadata(&cache.path).unwrap().dev());
        Some(cache.path)
    }
}

impl Drop for ServingProcess {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

#[test]
fn cache_is_the_working_directory_of_the_process_that_serves_the_repository() {
    let served = ServingProcess::new("a.example.org");
    let real = served.path("cache").canonicalize().unwrap();
    assert_eq!(served.cache(&Host), Some(real));
    // Any directory may be a repository, and what is mounted may be served from a container.
    assert_eq!(ServingProcess::new("sh").cache(&Host), None);
    xattr::remove(served.path("repository"), PID_XATTR).unwrap();
    assert_eq!(served.cache(&Host), None);
}

#[test]
fn cache_is_read_from_the_configuration_if_the_working_directory_is_hidden() {
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
