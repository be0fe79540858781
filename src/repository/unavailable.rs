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
    /// The repository is there and does not have it.
    NotPublished,
    /// The repository's directory is there, but no repository is in it.
    NotMounted {
        repository: PathBuf,
    },
    Unreadable(system::Error),
    /// Its client is there and cannot fetch what is not cached.
    ServerUnreachable(Box<Unreachable>),
    /// Its client lists attributes of its own on every file.
    OwnAttributes,
    NotADirectory {
        path: PathBuf,
    },
    /// Nothing came back in time.
    NoAnswer {
        limit: Duration,
    },
    /// It answers, but one question after the other took longer than anybody waits.
    Slow {
        limit: Duration,
    },
    /// Something on the way is no directory but leads elsewhere, perhaps to files of the host.
    LeadsOut {
        path: PathBuf,
    },
    /// It did not answer others, and is not asked until a probe succeeds.
    Sick(Outage),
    /// All its threads wait for it.
    Stuck {
        threads: usize,
    },
    /// No thread could be started to ask it.
    NoThread,
    /// The scan of the layer is not finished; it goes on.
    BeingScanned {
        directories: usize,
    },
    /// Other scans are in memory, and with this one there would be too much.
    ScansTakeMemory {
        limit: usize,
    },
    Unscannable(scan::Error),
    /// The configuration names no such repository any more, and no other one has it: what the
    /// first of them said.
    NotConfigured {
        instead: Option<(String, Box<Unavailable>)>,
    },
}

impl Unavailable {
    pub fn reason(&self) -> DownloadCause {
        match self {
            Self::NotPublished => DownloadCause::NotPublished,
            Self::NotMounted { .. } => DownloadCause::NotMounted,
            Self::ServerUnreachable(_) => DownloadCause::ServerUnreachable,
            Self::OwnAttributes => DownloadCause::OwnAttributes,
            Self::NoAnswer { .. }
            | Self::Slow { .. }
            | Self::Sick(_)
            | Self::Stuck { .. }
            | Self::NoThread
            | Self::BeingScanned { .. }
            | Self::ScansTakeMemory { .. } => DownloadCause::NoAnswer,
            Self::Unreadable(_) | Self::NotADirectory { .. } | Self::LeadsOut { .. } | Self::Unscannable(_) => {
                DownloadCause::Unreadable
            }
            Self::NotConfigured { instead } => {
                instead.as_ref().map_or(DownloadCause::NotPublished, |(_, missing)| missing.reason())
            }
        }
    }

    /// What a caller can do about it.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::BeingScanned { .. } | Self::Slow { .. } | Self::ScansTakeMemory { .. } => Remedy::Wait,
            Self::Unscannable(scan::Error::Exceeds(_)) => Remedy::Download,
            Self::Unscannable(scan::Error::Panicked) => Remedy::Report,
            // Attributes of layers that others attach take their share of memory.
            Self::Unreadable(cause) if cause.errno == Errno::ENOMEM => Remedy::Wait,
            // The bound of attributes, and the kernel's own.
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
            | Self::Sick(_)
            | Self::Stuck { .. }
            | Self::NoThread
            | Self::Unscannable(scan::Error::System(_))
            | Self::NotConfigured { instead: None } => Remedy::MakeAvailable,
        }
    }

    /// That its server cannot be reached, if that is why.
    pub fn server_outage(&self) -> Option<&Unreachable> {
        match self {
            Self::ServerUnreachable(unreachable) => Some(unreachable),
            _ => None,
        }
    }

    /// It is not there, as opposed to: it cannot be had right now.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::NotPublished => true,
            Self::NotConfigured { instead } => instead.as_ref().is_none_or(|(_, why)| why.is_gone()),
            _ => false,
        }
    }
}

/// What helps where something cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    Wait,
    MakeAvailable,
    /// To hide the attributes that the client of CernVM-FS makes up.
    ConfigureClient,
    /// The refusal is remembered, so a new pull downloads the layer.
    Download,
    /// The files themselves are the reason.
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
                write!(f, "the repository answers slowly, and was not done after {} s", limit.as_secs())
            }
            Self::LeadsOut { path } => write!(f, "{} is a link, which is not followed", path.display()),
            Self::Sick(outage) => outage.fmt(f),
            Self::Stuck { threads } => write!(f, "{threads} threads wait for the repository in vain"),
            Self::NoThread => f.write_str("no thread can be started to ask the repository (see the log)"),
            Self::BeingScanned { directories } => {
                write!(f, "its scan is not finished ({directories} directories so far)")
            }
            Self::ScansTakeMemory { limit } => write!(
                f,
                "the scans of layers that are being attached take {} MiB of memory, that is the limit",
                limit >> 20
            ),
            Self::Unscannable(cause) => cause.fmt(f),
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

    /// A layer that exceeds a bound was said to need a retry, a look at the repository and a new pull.
    #[test]
    fn remedy_of_what_a_retry_cannot_help_is_no_retry() {
        let unreadable = |errno| Unavailable::Unreadable(system::Error { call: "read", path: "/r".into(), errno });
        let exceeds = Unavailable::Unscannable(scan::Error::Exceeds(scan::Limit::Marked));
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
            (Unavailable::Unscannable(scan::Error::Panicked), Remedy::Report),
        ] {
            assert_eq!(missing.remedy(), remedy, "{missing:?}");
        }
    }
}
