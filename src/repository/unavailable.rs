//! Why something cannot be had from a repository, as callers and admins are told.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;

use super::health::Outage;
use super::server_health::Unreachable;
use super::{HIDE_ATTRIBUTES, LAYERS, scan};
use crate::metrics::DownloadCause;
use crate::system;

/// Why something cannot be had from a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// The repository does not publish it.
    NotPublished,
    /// The repository's directory is there, but no repository is in it.
    NotMounted {
        repository: PathBuf,
    },
    Unreadable(system::Error),
    /// Its client cannot reach its server, and so has only what is cached.
    ServerUnreachable(Box<Unreachable>),
    /// Its client lists attributes of its own on every file.
    OwnAttributes,
    NotADirectory {
        path: PathBuf,
    },
    /// The repository did not answer for this time.
    NoAnswer {
        limit: Duration,
    },
    /// The repository answers, but the whole call took longer than a caller waits.
    Slow {
        limit: Duration,
    },
    /// A part of the path is a link, perhaps to files of the host.
    LeadsOut {
        path: PathBuf,
    },
    /// The repository did not answer other calls, and gets no more until a probe succeeds.
    KnownDown(Outage),
    /// All threads of the repository are stuck in it.
    ThreadsExhausted {
        threads: usize,
    },
    /// No thread could be started for the call.
    NoThread,
    /// The call hit a bug of ours.
    JobPanicked,
    /// The scan of the layer is not finished; it goes on.
    BeingScanned {
        directories: usize,
    },
    /// The scans of other layers take all the memory that scans may have.
    ScansTakeMemory {
        limit: usize,
    },
    ScanFailed(scan::Error),
    /// The configuration does not name the repository any more, and no other repository has it; `instead` is why the
    /// first of them does not.
    NotConfigured {
        instead: Option<(String, Box<Unavailable>)>,
    },
}

impl Unavailable {
    pub fn download_cause(&self) -> DownloadCause {
        match self {
            Self::NotPublished => DownloadCause::NotPublished,
            Self::NotMounted { .. } => DownloadCause::NotMounted,
            Self::ServerUnreachable(_) => DownloadCause::ServerUnreachable,
            Self::OwnAttributes => DownloadCause::OwnAttributes,
            Self::NoAnswer { .. }
            | Self::Slow { .. }
            | Self::KnownDown(_)
            | Self::ThreadsExhausted { .. }
            | Self::NoThread
            | Self::BeingScanned { .. }
            | Self::ScansTakeMemory { .. } => DownloadCause::NoAnswer,
            Self::Unreadable(_)
            | Self::NotADirectory { .. }
            | Self::LeadsOut { .. }
            | Self::JobPanicked
            | Self::ScanFailed(_) => DownloadCause::Unreadable,
            Self::NotConfigured { instead } => {
                instead.as_ref().map_or(DownloadCause::NotPublished, |(_, missing)| missing.download_cause())
            }
        }
    }

    pub fn remedy(&self) -> Remedy {
        match self {
            Self::BeingScanned { .. } | Self::Slow { .. } | Self::ScansTakeMemory { .. } => Remedy::Wait,
            Self::ScanFailed(scan::Error::Exceeds(_)) => Remedy::Download,
            Self::ScanFailed(scan::Error::Panicked) | Self::JobPanicked => Remedy::Report,
            // Attributes of other layers that are being attached use memory.
            Self::Unreadable(cause) if cause.errno == Errno::ENOMEM => Remedy::Wait,
            // The attributes exceed our limit, or the kernel's.
            Self::Unreadable(cause) if cause.errno == Errno::E2BIG => Remedy::Republish,
            Self::OwnAttributes => Remedy::ConfigureClient,
            Self::NotConfigured { instead: Some((_, why)) } => why.remedy(),
            Self::NotPublished
            | Self::NotMounted { .. }
            | Self::Unreadable(_)
            | Self::ServerUnreachable(_)
            | Self::NotADirectory { .. }
            | Self::NoAnswer { .. }
            | Self::LeadsOut { .. }
            | Self::KnownDown(_)
            | Self::ThreadsExhausted { .. }
            | Self::NoThread
            | Self::ScanFailed(scan::Error::System(_))
            | Self::NotConfigured { instead: None } => Remedy::MakeAvailable,
        }
    }

    /// The outage of the server, if that is the reason.
    pub fn server_outage(&self) -> Option<&Unreachable> {
        match self {
            Self::ServerUnreachable(unreachable) => Some(unreachable),
            _ => None,
        }
    }
}

/// What an admin or a user can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    Wait,
    MakeAvailable,
    /// Hide the attributes that the client of CernVM-FS makes up.
    ConfigureClient,
    /// The refusal is remembered, so a new pull downloads the layer.
    Download,
    /// The files themselves have to be changed by the publisher.
    Republish,
    Report,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wait => "try again",
            Self::MakeAvailable => {
                "see that the repository is mounted and answers (\"cvmfs-snapshotter doctor\" says what is wrong) and \
                 retry, or remove every image with this layer and pull it anew"
            }
            Self::ConfigureClient => {
                return write!(f, "{HIDE_ATTRIBUTES}, or remove every image with this layer and pull it anew");
            }
            Self::Download => "remove every image with this layer and pull it anew: the layer is downloaded then",
            Self::Republish => "the publisher has to drop extended attributes of the layer's directories",
            Self::Report => "see the log of the daemon, and report it",
        })
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPublished => f.write_str("the repository does not have it"),
            Self::NotMounted { repository } => {
                write!(f, "no repository is mounted on {0}: {0}/{LAYERS} is missing", repository.display())
            }
            Self::Unreadable(cause) => cause.fmt(f),
            Self::ServerUnreachable(unreachable) => unreachable.fmt(f),
            Self::OwnAttributes => f.write_str(
                "the repository's CernVM-FS client lists attributes of its own on every file, which containers would see",
            ),
            Self::NotADirectory { path } => write!(f, "{} is not a directory", path.display()),
            Self::NoAnswer { limit } => {
                write!(f, "the repository did not answer within {} s (repository-timeout)", limit.as_secs())
            }
            Self::Slow { limit } => {
                write!(f, "the repository answers slowly: the call took longer than {} s", limit.as_secs())
            }
            Self::LeadsOut { path } => write!(f, "{} is a link, which is not followed", path.display()),
            Self::KnownDown(outage) => outage.fmt(f),
            Self::ThreadsExhausted { threads } => write!(f, "{threads} threads are blocked in the repository"),
            Self::NoThread => f.write_str("no thread can be started to ask the repository (see the log)"),
            Self::JobPanicked => f.write_str("a call to the repository hit a bug in the snapshotter (see the log)"),
            Self::BeingScanned { directories } => {
                write!(f, "its scan is not finished ({directories} directories so far)")
            }
            Self::ScansTakeMemory { limit } => write!(
                f,
                "the scans of layers that are being attached take {} MiB of memory, which is the limit",
                limit >> 20
            ),
            Self::ScanFailed(cause) => cause.fmt(f),
            Self::NotConfigured { instead } => {
                f.write_str("the configuration does not name the repository any more")?;
                instead.iter().try_for_each(|(name, why)| write!(f, "; {name}: {why}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Users of a layer that exceeds a limit were told to retry.
    #[test]
    fn remedy_for_a_permanent_failure_is_not_a_retry() {
        let unreadable = |errno| Unavailable::Unreadable(system::Error { call: "read", path: "/r".into(), errno });
        let exceeds = Unavailable::ScanFailed(scan::Error::Exceeds(scan::Limit::Marked));
        let elsewhere = |why| Unavailable::NotConfigured { instead: Some(("r".to_owned(), Box::new(why))) };
        for (missing, remedy) in [
            (Unavailable::BeingScanned { directories: 1 }, Remedy::Wait),
            (Unavailable::Slow { limit: Duration::from_secs(1) }, Remedy::Wait),
            (Unavailable::NotPublished, Remedy::MakeAvailable),
            (unreadable(Errno::EIO), Remedy::MakeAvailable),
            (unreadable(Errno::E2BIG), Remedy::Republish),
            (unreadable(Errno::ENOMEM), Remedy::Wait),
            (Unavailable::OwnAttributes, Remedy::ConfigureClient),
            (exceeds.clone(), Remedy::Download),
            (elsewhere(exceeds), Remedy::Download),
            (elsewhere(Unavailable::NotPublished), Remedy::MakeAvailable),
            (Unavailable::NotConfigured { instead: None }, Remedy::MakeAvailable),
            (Unavailable::ScanFailed(scan::Error::Panicked), Remedy::Report),
        ] {
            assert_eq!(missing.remedy(), remedy, "{missing:?}");
        }
    }
}
