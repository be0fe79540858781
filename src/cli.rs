//! The command line: the Go snapshotter's flags, with one dash or two, and ours.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command, builder::PathBufValueParser};
use log::LevelFilter;

use crate::{config, logging, rebuild};

pub const DEFAULT_ADDRESS: &str = "/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock";
pub const DEFAULT_ROOT: &str = "/var/lib/containerd-cvmfs-grpc";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    pub address: PathBuf,
    /// None: the default path, if there is a file.
    pub config: Option<PathBuf>,
    /// None: not said on the command line.
    pub log_level: Option<LevelFilter>,
    pub root: PathBuf,
    pub check_config: bool,
    /// Instead of serving.
    pub rebuild: Option<rebuild::Wanted>,
}

fn command() -> Command {
    let path = |name: &'static str, help: String| {
        Arg::new(name).long(name).value_name("PATH").value_parser(PathBufValueParser::new()).help(help)
    };
    Command::new("cvmfs-snapshotter")
        .version(env!("CARGO_PKG_VERSION"))
        .about("containerd snapshotter for image layers that are published, unpacked, in CernVM-FS")
        .arg(path("address", format!("Unix socket to serve on [default: {DEFAULT_ADDRESS}]")))
        .arg(path("config", format!("Configuration file [default: {}, if it exists]", config::DEFAULT_PATH)))
        .arg(
            Arg::new("log-level")
                .long("log-level")
                .value_name("LEVEL")
                .value_parser(|name: &str| logging::parse_level(name).ok_or(logging::LEVELS))
                .help("trace, debug, info, warn, error, fatal or panic [default: info]"),
        )
        .arg(path("root", format!("Directory for metadata and snapshots [default: {DEFAULT_ROOT}]")))
        .arg(
            Arg::new("check-config")
                .long("check-config")
                .action(ArgAction::SetTrue)
                .help("Check the configuration file, unknown keys included, and exit"),
        )
        .arg(
            Arg::new("rebuild-metadata")
                .long("rebuild-metadata")
                .action(ArgAction::SetTrue)
                .conflicts_with("check-config")
                .help("Make damaged metadata anew from the directories and containerd's metadata, and exit"),
        )
        .arg(
            path(
                "containerd-metadata",
                format!("For --rebuild-metadata; \"none\" is without [default: {}]", rebuild::DEFAULT_CONTAINERD),
            )
            .requires("rebuild-metadata"),
        )
        .arg(
            Arg::new("snapshotter")
                .long("snapshotter")
                .value_name("NAME")
                .requires("rebuild-metadata")
                .help(format!("For --rebuild-metadata: what containerd calls us [default: {}]", rebuild::DEFAULT_NAME)),
        )
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .requires("rebuild-metadata")
                .help("For --rebuild-metadata: report as JSON"),
        )
}

/// Parses the arguments, the program's name first. The error also stands for `--help` and
/// `--version`: it knows its text, its stream and its exit code.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Arguments, clap::Error> {
    let mut matches = command().try_get_matches_from(arguments.into_iter().map(two_dashes))?;
    let default_path = |path: Option<PathBuf>, default: &str| path.unwrap_or_else(|| PathBuf::from(default));
    Ok(Arguments {
        address: default_path(matches.remove_one("address"), DEFAULT_ADDRESS),
        config: matches.remove_one("config"),
        log_level: matches.remove_one("log-level"),
        root: default_path(matches.remove_one("root"), DEFAULT_ROOT),
        check_config: matches.get_flag("check-config"),
        rebuild: matches.get_flag("rebuild-metadata").then(|| rebuild::Wanted {
            containerd: rebuild::Containerd::from_argument(matches.remove_one("containerd-metadata")),
            snapshotter: matches.remove_one("snapshotter").unwrap_or_else(|| rebuild::DEFAULT_NAME.to_owned()),
            json: matches.get_flag("json"),
        }),
    })
}

/// `-address` as Go writes flags, to `--address`. We have no bundles of one-letter flags.
fn two_dashes(argument: OsString) -> OsString {
    match argument.as_encoded_bytes() {
        [b'-', first, _, ..] if first.is_ascii_alphabetic() => {
            let mut two = OsString::from("-");
            two.push(argument);
            two
        }
        _ => argument,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        super::parse(line.split(' ').map(OsString::from)).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_take_one_dash_or_two() {
        let expected = parse("x --address /a --config /c --log-level debug --root /r").unwrap();
        assert_eq!(expected.log_level, Some(LevelFilter::Debug));
        assert_eq!(expected.address, PathBuf::from("/a"));
        for line in [
            "x -address /a -config /c -log-level debug -root /r",
            "x -address=/a --config=/c -log-level=debug --root=/r",
        ] {
            assert_eq!(parse(line).as_ref(), Ok(&expected), "{line}");
        }
    }

    #[test]
    fn without_flags_the_paths_are_those_of_the_go_snapshotter() {
        let arguments = parse("x").unwrap();
        assert_eq!(arguments.address, PathBuf::from("/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock"));
        assert_eq!(arguments.root, PathBuf::from("/var/lib/containerd-cvmfs-grpc"));
        assert_eq!((arguments.config, arguments.log_level, arguments.check_config), (None, None, false));
    }

    #[test]
    fn a_wrong_flag_is_named() {
        assert!(parse("x --adress /a").unwrap_err().contains("--adress"));
        assert!(parse("x --log-level loud").unwrap_err().contains("trace, debug"));
        assert!(parse("x stray").unwrap_err().contains("stray"));
        assert!(parse("x --json").unwrap_err().contains("--rebuild-metadata"));
    }
}
