//! Why the daemon does not start, and what to do about it.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::state_root::{self, SNAPSHOTS};
use crate::migration::{rebuild, takeover};
use crate::{config, server, snapshotter, store, system, unix_socket};

#[derive(Debug)]
pub enum Error {
    Config(config::Error),
    MetricsAtAddress {
        address: PathBuf,
    },
    /// containerd does not see bind mounts of a daemon that has its own mount namespace.
    BindInNamespace,
    /// No socket can be bound to `--address`.
    Address(unix_socket::Error),
    /// `--check-config` found keys that are ignored.
    UnknownKeys(Vec<config::UnknownKey>),
    StateRoot(state_root::Error),
    /// The state root was never used by a daemon.
    NothingToRebuild {
        root: PathBuf,
    },
    /// There are directories of snapshots, but no metadata that describes them.
    MetadataGone {
        path: PathBuf,
        snapshots: usize,
    },
    MetadataOfEarlierVersion {
        path: PathBuf,
    },
    /// The metadata of a Go snapshotter cannot be taken over.
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
                "invalid value {address:?} for metrics-address: it is the socket that containerd calls, choose another path"
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
            Self::StateRoot(cause) => cause.fmt(f),
            Self::NothingToRebuild { root } => write!(
                f,
                "there is nothing to rebuild: {} has no {SNAPSHOTS}; is it the state root of the daemon (--root)?",
                root.display()
            ),
            Self::MetadataGone { path, snapshots } => write!(
                f,
                "the metadata {} is gone, and the records of {snapshots} local snapshots are there; nothing was changed. \
                 Put a copy of the file back, and remove the file beside it that ends in -wal; or stop containerd and \
                 rebuild it with --rebuild-metadata; or, to start without any snapshot, remove the images and containers \
                 of this snapshotter and move the directory of the file away",
                path.display()
            ),
            Self::MetadataOfEarlierVersion { path } => write!(
                f,
                "the metadata {} is of a version before the first release, which cannot be read any more; nothing was \
                 changed. Stop containerd and rebuild it with \"cvmfs-snapshotter --rebuild-metadata\"",
                path.display()
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

/// Writes why the metadata cannot be used, and what to do.
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
    /// The exit code of the process: 78 (EX_CONFIG) if the next start fails as well unless somebody changes something,
    /// so that the unit does not try.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_)
            | Self::MetricsAtAddress { .. }
            | Self::BindInNamespace
            | Self::UnknownKeys(_)
            | Self::Address(_) => 78,
            Self::StateRoot(cause) => cause.exit_code(),
            Self::NothingToRebuild { .. }
            | Self::MetadataGone { .. }
            | Self::MetadataOfEarlierVersion { .. }
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
    fn full_disk_is_reported_with_remedy() {
        for errno in [Errno::ENOSPC, Errno::EDQUOT] {
            let cause = store::Error::Access { path: "/x".into(), cause: "full".to_owned(), errno: Some(errno) };
            let message = Error::Store(cause).to_string();
            assert!(message.ends_with("free some space, or raise the quota"), "{message}");
        }
    }
}
