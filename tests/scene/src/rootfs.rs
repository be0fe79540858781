//! Root file systems, mounted from the description of a snapshot as containerd does it.

use std::fs;
use std::path::{Path, PathBuf};

use cvmfs_snapshotter::proto::mount::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The kernel cuts mount data that is longer than a page.
const PAGE: usize = 4096;

/// A mounted root file system. It is unmounted on drop.
pub struct Mounted {
    mount_point: PathBuf,
}

impl Mounted {
    pub fn new(mounts: &[Mount], mount_point: &Path) -> Result<Self, nix::Error> {
        let [Mount { type_, source, options, .. }] = mounts else {
            panic!("one mount describes a snapshot: {mounts:?}")
        };
        fs::create_dir_all(mount_point).expect("a mount point can be made");
        if type_ == "bind" {
            mount(Some(source.as_str()), mount_point, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
            if options.iter().any(|o| o == "ro") {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(None::<&str>, mount_point, None::<&str>, flags, None::<&str>)?;
            }
        } else {
            let data = options.join(",");
            let data = if data.len() < PAGE { data } else { shorten(options) };
            mount(Some(source.as_str()), mount_point, Some(type_.as_str()), MsFlags::empty(), Some(data.as_str()))?;
        }
        Ok(Self { mount_point: mount_point.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.mount_point
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The mount may be busy for a moment, because a process that the thread of another test is just forking still has
        // the files of this thread open.
        crate::process::eventually("a root file system that nobody uses can be unmounted", || {
            umount2(&self.mount_point, MntFlags::UMOUNT_NOFOLLOW).is_ok() || std::thread::panicking()
        });
    }
}

/// Names lower directories relative to their common parent, and makes that the working directory. A sandbox has unshared
/// the working directory of its thread, so no other test is affected.
fn shorten(options: &[String]) -> String {
    let lower = options.iter().find_map(|o| o.strip_prefix("lowerdir=")).expect("an overlay has lower directories");
    let first = Path::new(lower.split(':').next().expect("there is a first"));
    let common = first.ancestors().nth(2).expect("lower directories lie in snapshots/<id>/");
    std::env::set_current_dir(common).expect("the snapshots directory can be entered");
    let prefix = format!("{}/", common.display());
    options
        .iter()
        .map(|o| if o.starts_with("lowerdir=") { o.replace(&prefix, "") } else { o.clone() })
        .collect::<Vec<_>>()
        .join(",")
}
