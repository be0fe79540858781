//! A small file system that a test can fill, freeze and break.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::process::run;
use crate::sandbox::mount_tmpfs;

/// A file system at a directory. It is unmounted with the sandbox.
pub struct Disk {
    mount_point: PathBuf,
    /// The file that holds an ext4; None for a tmpfs.
    image: Option<PathBuf>,
}

impl Disk {
    pub fn tmpfs(mount_point: &Path, mebibytes: usize) -> Self {
        fs::create_dir_all(mount_point).expect("a mount point can be made");
        mount_tmpfs(mount_point, &format!("size={mebibytes}m,mode=755"));
        Self { mount_point: mount_point.to_owned(), image: None }
    }

    /// Makes an ext4 in a file, with `options` of mkfs.
    #[track_caller]
    pub fn ext4(mount_point: &Path, mebibytes: u64, options: &[&str]) -> Self {
        fs::create_dir_all(mount_point).expect("a mount point can be made");
        let image = mount_point.with_extension("image");
        let file = File::create(&image).expect("an image can be made");
        file.set_len(mebibytes << 20).expect("an image has a size");
        let path = image.display().to_string();
        run("mkfs.ext4", [&["-q", "-m", "0"], options, &[&path]].concat()).ok();
        let disk = Self { mount_point: mount_point.to_owned(), image: Some(image) };
        disk.mount();
        disk
    }

    #[track_caller]
    fn mount(&self) {
        let (image, mount_point) = (self.image.as_ref().expect("it is ext4"), self.mount_point.display().to_string());
        run("mount", ["-o", "loop,errors=remount-ro", &image.display().to_string(), &mount_point]).ok();
    }

    /// Writes a file until no space is left.
    pub fn fill(&self) {
        let filler = File::options().append(true).create(true).open(self.mount_point.join("filler"));
        let mut file = filler.expect("there is room for a file");
        for size in [1 << 16, 512, 1] {
            let block = vec![1; size];
            while file.write_all(&block).is_ok() {}
        }
    }

    pub fn make_room(&self) {
        fs::remove_file(self.mount_point.join("filler")).expect("the filler is there");
    }

    /// Blocks every write until the result is dropped. A process that waits for a write cannot be killed, so the guard
    /// must be dropped before such a process is stopped.
    #[track_caller]
    pub fn freeze(&self) -> FreezeGuard {
        let mount_point = self.mount_point.display().to_string();
        run("fsfreeze", ["--freeze", &mount_point]).ok();
        FreezeGuard { mount_point }
    }

    /// Makes the kernel find an error in the file system, which turns it read-only.
    #[track_caller]
    pub fn find_error(&self) {
        let device = run("findmnt", ["-no", "SOURCE", &self.mount_point.display().to_string()]).ok();
        let device = device.trim().rsplit('/').next().expect("a device has a name").to_owned();
        fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "scene")
            .expect("ext4 can be told to find an error");
        let probe = File::create(self.mount_point.join("probe")).expect_err("it is read-only now");
        assert_eq!(probe.raw_os_error(), Some(nix::errno::Errno::EROFS as i32));
    }

    /// Checks and mounts the file system again, as an administrator does after an error. No file may be open on it.
    #[track_caller]
    pub fn repair(&self) {
        run("umount", [&self.mount_point.display().to_string()]).ok();
        let image = self.image.as_ref().expect("it is ext4").display().to_string();
        let check = run("e2fsck", ["-fy", &image]);
        assert!(check.status.code().is_some_and(|code| code < 4), "{}{}", check.stdout, check.stderr);
        self.mount();
    }
}

/// Keeps the writes of a disk blocked.
pub struct FreezeGuard {
    mount_point: String,
}

impl Drop for FreezeGuard {
    fn drop(&mut self) {
        run("fsfreeze", ["--unfreeze", &self.mount_point]);
    }
}
