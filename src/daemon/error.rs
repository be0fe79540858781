//! Why the daemon does not start, and what to do about it.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::state_root::SNAPSHOTS;
use crate::migration::{rebuild, takeover};
use crate::{config, server, snapshotter, store, system, unix_socket};

#[derive(Debug)]
pub enum Error {
    Config(config::Error),
    MetricsAtAddress {
        address: PathBuf,
    },
    /// What is bound in a mount namespace of its own, containerd does not see.
    BindInNamespace,
    /// The address cannot be one.
    Address(unix_socket::Error),
    /// `--check-config` found keys that nobody reads.
    UnknownKeys(Vec<config::UnknownKey>),
    RootNotAbsolute(PathBuf),
    /// A path that cannot be named in the options of an overlay mount.
    RootNotMountable(PathBuf),
    /// A file, or a link that is not followed or leads nowhere.
    RootNotADirectory {
        path: PathBuf,
    },
    /// Others could put something into the state root.
    RootOfOthers {
        path: PathBuf,
        mode: u32,
        owner: u32,
    },
    RootInRepository {
        root: PathBuf,
        repository: PathBuf,
    },
    RepositoryInRoot {
        root: PathBuf,
        repository: PathBuf,
    },
    /// Its file system cannot hold the upper directories of overlays.
    RootWithoutTypes {
        root: PathBuf,
    },
    Root {
        path: PathBuf,
        cause: io::Error,
    },
    RootInUse {
        root: PathBuf,
    },
    /// No daemon has used that state root.
    NothingToRebuild {
        root: PathBuf,
    },
    /// Snapshots are there, and what says what they are is not.
    MetadataGone {
        path: PathBuf,
        snapshots: usize,
    },
    MetadataOfEarlierVersion {
        path: PathBuf,
    },
    /// The daemon before us was killed, and cannot end.
    RootHeld {
        root: PathBuf,
        pid: u32,
    },
    /// What a Go snapshotter left cannot be had.
    Takeover(takeover::Error),
    Rebuild(rebuild::Error),
    Store(store::Error),
    Recovery(snapshotter::Error),
    System(system::Error),
    Threads(io::Error),
    Socket(unix_socket::Error),
    Server(server::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(cause) => cause.fmt(f),
            Self::MetricsAtAddress { address } => write!(
                f,
                "metrics-address = {address:?} is the socket that containerd calls: name another path"
            ),
            Self::BindInNamespace => f.write_str(
                "attach = \"bind\" is not possible in the mount namespace that symlink-only.conf gives this service: set attach = \
                 \"symlink\", or remove that file from /etc/systemd/system/cvmfs-snapshotter.service.d and run \"systemctl \
                 daemon-reload\"",
            ),
            Self::UnknownKeys(keys) => {
                let keys: Vec<String> = keys.iter().map(|k| format!("{:?} (line {})", k.key, k.line)).collect();
                write!(
                    f,
                    "unknown keys in the configuration: {}; remove them or correct their spelling",
                    keys.join(", ")
                )
            }
            Self::RootNotAbsolute(root) => write!(f, "--root {} must be an absolute path", root.display()),
            Self::RootNotMountable(root) => write!(
                f,
                "--root {} cannot be used for overlay mounts: it must be UTF-8 without colons, commas, quotes and backslashes",
                root.display()
            ),
            Self::RootNotADirectory { path } => write!(
                f,
                "the state root needs a directory at {}, and something else is there or above it, such as a file or a \
                 link (only the path of the state root itself may lead over links, to a directory): move it away, or \
                 choose another --root; to have what is below on another disk, mount that there",
                path.display()
            ),
            Self::RootOfOthers { path, mode, owner } => write!(
                f,
                "the directory {} of the state root has mode {mode:04o} and owner {owner}, and others could put files there that \
                 root then uses: see that all in it is yours, then \"chown root\" and \"chmod go-w\" it",
                path.display()
            ),
            Self::RootInRepository { root, repository } => write!(
                f,
                "the state root {} is inside the repository {}, which is only read: choose another --root",
                root.display(),
                repository.display()
            ),
            Self::RepositoryInRoot { root, repository } => write!(
                f,
                "the repository {} is inside the state root {}: choose another --root, or correct the path of the \
                 repository in the configuration",
                repository.display(),
                root.display()
            ),
            Self::RootWithoutTypes { root } => write!(
                f,
                "the file system of the state root {} does not tell the types of directory entries (d_type), which \
                 overlayfs needs: put the state root on another one, or make it anew (XFS with -n ftype=1, ext4 with \
                 -O filetype)",
                root.display()
            ),
            Self::Root { path, cause } => write!(f, "cannot use the state directory {}: {cause}", path.display()),
            Self::RootInUse { root } => write!(
                f,
                "another cvmfs-snapshotter uses the state root {}: stop it first, or choose another --root",
                root.display()
            ),
            Self::NothingToRebuild { root } => write!(
                f,
                "there is nothing to rebuild: {} has no {SNAPSHOTS}; is it the state root of the daemon (--root)?",
                root.display()
            ),
            Self::MetadataGone { path, snapshots } => write!(
                f,
                "the metadata {} is gone, and the records of {snapshots} local snapshots are there; nothing was changed. \
                 Put a copy of the file back, and remove the file beside it that ends in -wal; or stop containerd and make \
                 it anew with --rebuild-metadata; or, to begin without any snapshot, remove the images and containers of this snapshotter and move the directory that \
                 the file was in away",
                path.display()
            ),
            Self::MetadataOfEarlierVersion { path } => write!(
                f,
                "the metadata {} is of a version before the first release, which is not read any more; nothing was changed. \
                 Stop containerd and make it anew with \"cvmfs-snapshotter --rebuild-metadata\"",
                path.display()
            ),
            Self::RootHeld { root, pid } => write!(
                f,
                "the cvmfs-snapshotter with process id {pid} was killed and still holds the state root {}: a thread of \
                 it hangs in a repository, which only the end of that repository's client can end; see what hangs \
                 (cvmfs_config probe), kill or unmount it, and start again",
                root.display()
            ),
            Self::Store(cause) => fmt_store_error(cause, f),
            Self::Takeover(cause) => cause.fmt(f),
            Self::Rebuild(cause) => cause.fmt(f),
            Self::Recovery(cause) => write!(f, "cannot compare the metadata with the disk: {cause}"),
            Self::System(cause) => cause.fmt(f),
            Self::Threads(cause) => write!(f, "cannot start threads: {cause}"),
            Self::Address(cause) | Self::Socket(cause) => cause.fmt(f),
            Self::Server(cause) => cause.fmt(f),
        }
    }
}

/// Why the metadata cannot be used, and what helps.
fn fmt_store_error(cause: &store::Error, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if cause.is_full_disk() {
        return write!(f, "{cause}; nothing was changed: free some space, or raise the quota");
    }
    write!(f, "{cause}; nothing was changed")?;
    if let store::Error::Damaged { .. } = cause {
        f.write_str(
            ". Put a copy of the file back if there is one, and remove the file beside it that ends in -wal; else stop \
             containerd and rebuild it with \"cvmfs-snapshotter --rebuild-metadata\"",
        )?;
    }
    Ok(())
}

impl std::error::Error for Error {}

impl Error {
    /// 78 is EX_CONFIG: starting again without a change is of no use.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_)
            | Self::MetricsAtAddress { .. }
            | Self::BindInNamespace
            | Self::UnknownKeys(_)
            | Self::Address(_)
            | Self::RootNotAbsolute(_)
            | Self::RootNotMountable(_)
            | Self::RootNotADirectory { .. }
            | Self::RootOfOthers { .. }
            | Self::RootInRepository { .. }
            | Self::RepositoryInRoot { .. }
            | Self::RootWithoutTypes { .. } => 78,
            Self::Root { .. }
            | Self::RootInUse { .. }
            | Self::NothingToRebuild { .. }
            | Self::MetadataGone { .. }
            | Self::MetadataOfEarlierVersion { .. }
            | Self::RootHeld { .. }
            | Self::Takeover(_)
            | Self::Rebuild(_)
            | Self::Store(_)
            | Self::Recovery(_)
            | Self::System(_)
            | Self::Threads(_)
            | Self::Socket(_)
            | Self::Server(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn a_disk_without_room_is_told_with_what_helps() {
        for errno in [Errno::ENOSPC, Errno::EDQUOT] {
            let cause = store::Error::Access { path: "/x".into(), cause: "full".to_owned(), errno: Some(errno) };
            let told = Error::Store(cause).to_string();
            assert!(told.ends_with("free some space, or raise the quota"), "{told}");
        }
    }
}
