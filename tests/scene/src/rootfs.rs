//! Performs the mounts that describe a snapshot, as containerd does.

use std::fs;
use std::path::{Path, PathBuf};

use cvmfs_snapshotter::proto::mount::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mount data longer than a page is cut by the kernel.
const PAGE: usize = 4096;

/// A mounted root file system; dropped, it is unmounted.
pub struct Mounted {
    at: PathBuf,
}

impl Mounted {
    pub fn new(mounts: &[Mount], at: &Path) -> Result<Self, nix::Error> {
        let [Mount { type_, source, options, .. }] = mounts else {
            panic!("one mount describes a snapshot: {mounts:?}")
        };
        fs::create_dir_all(at).expect("a mount point can be made");
        if type_ == "bind" {
            mount(Some(source.as_str()), at, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
            if options.iter().any(|o| o == "ro") {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(None::<&str>, at, None::<&str>, flags, None::<&str>)?;
            }
        } else {
            let data = options.join(",");
            let data = if data.len() < PAGE { data } else { shorten(options) };
            mount(Some(source.as_str()), at, Some(type_.as_str()), MsFlags::empty(), Some(data.as_str()))?;
        }
        Ok(Self { at: at.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Busy for a moment: a process that another test's thread is just starting still has
        // the files of this thread open.
        crate::process::eventually("a root file system that nobody uses can be unmounted", || {
            umount2(&self.at, MntFlags::UMOUNT_NOFOLLOW).is_ok() || std::thread::panicking()
        });
    }
}

/// Lower directories relative to the one they are all in. A sandbox has unshared the
/// working directory of its thread, so going there disturbs nobody.
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
