//! A small disk of its own, that can be filled and can fail.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::process::run;
use crate::sandbox::mount_tmpfs;

/// A file system at a directory. It is unmounted with the sandbox.
pub struct Disk {
    at: PathBuf,
    /// Of ext4: the file that it is in.
    image: Option<PathBuf>,
}

impl Disk {
    pub fn tmpfs(at: &Path, mebibytes: usize) -> Self {
        fs::create_dir_all(at).expect("a mount point can be made");
        mount_tmpfs(at, &format!("size={mebibytes}m,mode=755"));
        Self { at: at.to_owned(), image: None }
    }

    /// ext4 in a file, made with `options` of mkfs.
    #[track_caller]
    pub fn ext4(at: &Path, mebibytes: u64, options: &[&str]) -> Self {
        fs::create_dir_all(at).expect("a mount point can be made");
        let image = at.with_extension("image");
        let file = File::create(&image).expect("an image can be made");
        file.set_len(mebibytes << 20).expect("an image has a size");
        let path = image.display().to_string();
        run("mkfs.ext4", [&["-q", "-m", "0"], options, &[&path]].concat()).ok();
        let disk = Self { at: at.to_owned(), image: Some(image) };
        disk.mount();
        disk
    }

    #[track_caller]
    fn mount(&self) {
        let (image, at) = (self.image.as_ref().expect("it is ext4"), self.at.display().to_string());
        run("mount", ["-o", "loop,errors=remount-ro", &image.display().to_string(), &at]).ok();
    }

    /// Takes all space that is left.
    pub fn fill(&self) {
        let filler = File::options().append(true).create(true).open(self.at.join("filler"));
        let mut file = filler.expect("there is room for a file");
        for size in [1 << 16, 512, 1] {
            let block = vec![1; size];
            while file.write_all(&block).is_ok() {}
        }
    }

    pub fn make_room(&self) {
        fs::remove_file(self.at.join("filler")).expect("the filler is there");
    }

    /// Every write waits until the result is dropped. Whoever waits cannot be killed meanwhile, so it must be dropped
    /// before they are ended.
    #[track_caller]
    pub fn freeze(&self) -> Frozen {
        let at = self.at.display().to_string();
        run("fsfreeze", ["--freeze", &at]).ok();
        Frozen { at }
    }

    /// The kernel finds an error in the file system, and turns it read-only.
    #[track_caller]
    pub fn find_error(&self) {
        let device = run("findmnt", ["-no", "SOURCE", &self.at.display().to_string()]).ok();
        let device = device.trim().rsplit('/').next().expect("a device has a name").to_owned();
        fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "scene").expect("ext4 takes errors on demand");
        let probe = File::create(self.at.join("probe")).expect_err("it is read-only now");
        assert_eq!(probe.raw_os_error(), Some(nix::errno::Errno::EROFS as i32));
    }

    /// What an admin does then. Nothing may be open on it.
    #[track_caller]
    pub fn repair(&self) {
        run("umount", [&self.at.display().to_string()]).ok();
        let image = self.image.as_ref().expect("it is ext4").display().to_string();
        let checked = run("e2fsck", ["-fy", &image]);
        assert!(checked.status.code().is_some_and(|code| code < 4), "{}{}", checked.stdout, checked.stderr);
        self.mount();
    }
}

/// A disk whose writes wait.
pub struct Frozen {
    at: String,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", ["--unfreeze", &self.at]);
    }
}
