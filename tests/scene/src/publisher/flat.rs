//! Whole root file systems as DUCC's unpacker makes them (October 2024). Owners are those of the image. Modes lose their
//! setuid, setgid and sticky bits, and always grant the owner access. Symlinks and directories that are not empty get
//! the time of the publication.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use cvmfs_testbed::ingest::entry;
use flate2::read::GzDecoder;
use nix::sys::stat::{Mode, SFlag, mknod};
use tar::{Archive, Entry, EntryType};

use crate::image::Blob;

/// The symlinks that Singularity expects at the top of a root.
const LINKS: [(&str, &str); 6] = [
    (".exec", ".singularity.d/actions/exec"),
    (".run", ".singularity.d/actions/run"),
    (".shell", ".singularity.d/actions/shell"),
    (".test", ".singularity.d/actions/test"),
    ("environment", ".singularity.d/env/90-environment.sh"),
    ("singularity", ".singularity.d/runscript"),
];
/// The scripts that the symlinks lead to, and those that they call.
const SCRIPTS: [&str; 13] = [
    "actions/exec",
    "actions/run",
    "actions/shell",
    "actions/start",
    "actions/test",
    "env/01-base.sh",
    "env/10-docker2singularity.sh",
    "env/90-environment.sh",
    "env/95-apps.sh",
    "env/99-base.sh",
    "env/99-runtimevars.sh",
    "runscript",
    "startscript",
];

/// Makes the root of the image with these layers in the directory `top`. Each layer is unpacked in `scratch`, and then
/// merged into `top`.
pub fn build(layers: &[Blob], scratch: &Path, top: &Path) {
    for layer in layers {
        fs::create_dir(scratch).expect("the scratch directory is new");
        unpack(layer, scratch);
        merge(scratch, top);
        fs::remove_dir_all(scratch).expect("the scratch directory can be removed");
    }
    add_singularity(top).expect("Singularity's files can be added");
}

fn unpack(layer: &Blob, to: &Path) {
    let file = File::open(&layer.path).expect("a layer can be read");
    for entry in Archive::new(GzDecoder::new(file)).entries().expect("a layer is a tar") {
        let mut entry = entry.expect("a layer is a tar");
        let name = entry.path_bytes().into_owned();
        let path = to.join(relative(&name));
        fs::create_dir_all(path.parent().expect("an entry lies in a directory")).expect("a directory can be made");
        write(&mut entry, &path, to).unwrap_or_else(|error| panic!("unpack {:?}: {error}", name.escape_ascii()));
    }
}

fn relative(name: &[u8]) -> &Path {
    let name = name.strip_prefix(b"./").unwrap_or(name);
    Path::new(OsStr::from_bytes(name))
}

fn write(entry: &mut Entry<impl io::Read>, path: &Path, top: &Path) -> io::Result<()> {
    let kind = entry.header().entry_type();
    match kind {
        EntryType::Directory => fs::create_dir_all(path)?,
        EntryType::Link => {
            let target = entry.link_name_bytes().ok_or(io::ErrorKind::InvalidData)?;
            fs::hard_link(top.join(relative(&target)), path)?;
        }
        _ => entry::write(entry, path)?,
    }
    let id = |id: io::Result<u64>| -> io::Result<_> { u32::try_from(id?).map_err(io::Error::other) };
    lchown(path, Some(id(entry.header().uid())?), Some(id(entry.header().gid())?))?;
    if kind == EntryType::Symlink {
        return Ok(());
    }
    let own = if kind == EntryType::Directory { 0o700 } else { 0o600 };
    fs::set_permissions(path, Permissions::from_mode(entry.header().mode()? & 0o777 | own))?;
    entry::set_mtime(path, Duration::from_secs(entry.header().mtime()?))
}

/// Applies the deletions of the layer at `from` to `to`, and then copies its entries. The properties of its directories
/// replace those of directories that exist.
fn merge(from: &Path, to: &Path) {
    let mut entries: Vec<_> = fs::read_dir(from).expect("a directory can be listed").flatten().collect();
    entries.sort_by_key(|entry| !entry.file_name().as_bytes().starts_with(b".wh."));
    for entry in entries {
        let (name, kind) = (entry.file_name(), entry.file_type().expect("an entry has a type"));
        let (source, target) = (entry.path(), to.join(&name));
        match name.as_bytes().strip_prefix(b".wh.") {
            Some(b".wh..opq") => {
                for old in fs::read_dir(to).expect("a directory can be listed").flatten() {
                    remove(&old.path());
                }
            }
            Some(deleted) => remove(&to.join(OsStr::from_bytes(deleted))),
            None if kind.is_dir() => {
                if !target.symlink_metadata().is_ok_and(|old| old.is_dir()) {
                    remove(&target);
                    fs::create_dir(&target).expect("a directory can be made");
                }
                merge(&source, &target);
                copy_metadata(&source, &target);
            }
            None => {
                remove(&target);
                copy(&source, &target).unwrap_or_else(|error| panic!("copy {source:?}: {error}"));
                copy_metadata(&source, &target);
            }
        }
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let found = from.symlink_metadata()?;
    let kind = found.file_type();
    if kind.is_symlink() {
        return symlink(fs::read_link(from)?, to);
    }
    if kind.is_file() {
        return fs::copy(from, to).map(drop);
    }
    let kind = if kind.is_fifo() {
        SFlag::S_IFIFO
    } else if kind.is_char_device() {
        SFlag::S_IFCHR
    } else {
        SFlag::S_IFBLK
    };
    Ok(mknod(to, kind, Mode::empty(), found.rdev())?)
}

fn copy_metadata(from: &Path, to: &Path) {
    let copied = || -> io::Result<()> {
        let found = from.symlink_metadata()?;
        lchown(to, Some(found.uid()), Some(found.gid()))?;
        if !found.is_symlink() {
            fs::set_permissions(to, found.permissions())?;
        }
        entry::set_mtime(to, found.modified()?.duration_since(UNIX_EPOCH).map_err(io::Error::other)?)
    };
    copied().unwrap_or_else(|error| panic!("set what {to:?} has besides its content: {error}"));
}

fn remove(path: &Path) {
    match path.symlink_metadata() {
        Ok(status) if status.is_dir() => fs::remove_dir_all(path).expect("a directory can be removed"),
        Ok(_) => fs::remove_file(path).expect("a file can be removed"),
        Err(_) => {}
    }
}

/// Adds directories that serve as mount points, two files that a container gets from its host, and scripts.
fn add_singularity(top: &Path) -> io::Result<()> {
    for directory in ["dev", "proc", "root", "var/tmp", "tmp", "etc", "sys", "home", ".singularity.d/libs"] {
        fs::create_dir_all(top.join(directory))?;
    }
    for file in ["etc/hosts", "etc/resolv.conf"] {
        remove(&top.join(file));
        fs::write(top.join(file), "")?;
        fs::set_permissions(top.join(file), Permissions::from_mode(0o644))?;
        chown(top.join(file), Some(0), Some(0))?;
    }
    for script in SCRIPTS {
        let path = top.join(".singularity.d").join(script);
        fs::create_dir_all(path.parent().expect("a script lies in a directory"))?;
        fs::write(&path, "#!/bin/sh\n")?;
        fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    }
    for (name, target) in LINKS.iter().filter(|(name, _)| top.join(name).symlink_metadata().is_err()) {
        symlink(target, top.join(name))?;
    }
    Ok(())
}
