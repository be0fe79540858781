//! The command line: the flags of the Go snapshotter, with one dash or two, and more. It turns arguments into one `Action`
//! and does nothing else.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::PathBufValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command, error::ErrorKind};
use log::LevelFilter;

use crate::migration::rebuild;
use crate::{config, logging};

pub const DEFAULT_ADDRESS: &str = "/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock";
pub const DEFAULT_ROOT: &str = "/var/lib/containerd-cvmfs-grpc";
/// The sockets on which containerd listens by default: its own, and that of k3s.
pub const CONTAINERD_SOCKETS: [&str; 2] = ["/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock"];
/// The default configuration files of the same two.
pub const CONTAINERD_CONFIGURATIONS: [&str; 2] =
    ["/etc/containerd/config.toml", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    pub address: PathBuf,
    /// None: the file at the default path, if it exists.
    pub config: Option<PathBuf>,
    /// None: the flag was not given.
    pub log_level: Option<LevelFilter>,
    pub root: PathBuf,
    pub action: Action,
}

impl Arguments {
    /// The configuration file, whether or not it is there.
    pub fn config_file(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new(config::DEFAULT_PATH))
    }
}

/// What the process does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Serve,
    CheckConfig,
    Rebuild(rebuild::RebuildOptions),
    Status(Status),
    Doctor(Doctor),
    Gc(Gc),
    /// The doctor runs this in a process of its own, because it may hang for ever: a request in JSON.
    Probe(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub json: bool,
    /// Skips measuring what containers wrote.
    pub quick: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doctor {
    pub json: bool,
    /// The socket of containerd. None: one of `CONTAINERD_SOCKETS`.
    pub socket: Option<PathBuf>,
    /// The configuration of containerd. None: one of `CONTAINERD_CONFIGURATIONS`.
    pub configuration: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gc {
    /// Only shows what would be removed.
    pub dry_run: bool,
    pub json: bool,
}

/// The options and commands for people. The manual pages are generated from this.
pub fn command() -> Command {
    Command::new("cvmfs-snapshotter")
        .version(env!("CARGO_PKG_VERSION"))
        .about("containerd snapshotter for image layers that are published, unpacked, in CernVM-FS")
        .args(options())
        .args(subcommands())
        .subcommands([status(), doctor(), gc()])
}

/// `command` with the internal command of the doctor. It is kept apart, because shells would complete even hidden ones.
fn with_internal_commands() -> Command {
    command().subcommand(Command::new("probe").hide(true).arg(Arg::new("request").required(true)))
}

fn path(name: &'static str, help: String) -> Arg {
    Arg::new(name).long(name).value_name("PATH").value_parser(PathBufValueParser::new()).help(help)
}

fn options() -> [Arg; 4] {
    [
        path("address", format!("Unix socket of the daemon [default: {DEFAULT_ADDRESS}]")).global(true).long_help(
            format!(
                "Unix socket of the daemon, an absolute path without %, # and ?. A missing directory is \
                made for root alone, one that others could write to is refused; the socket has mode \
                0600. A socket that a dead process left is replaced, one that is served is not. Of no \
                account if systemd holds the socket. [default: {DEFAULT_ADDRESS}]"
            ),
        ),
        path("config", format!("Configuration file [default: {}, if it exists]", config::DEFAULT_PATH)).global(true),
        Arg::new("log-level")
            .long("log-level")
            .value_name("LEVEL")
            .value_parser(|name: &str| {
                logging::parse_level(name).ok_or_else(|| format!("expected {}", logging::LEVELS))
            })
            .help("trace, debug, info, warn, error, fatal or panic [default: info]")
            .long_help(
                "trace, debug, info, warn, error, fatal or panic; the last two mean error. [default: \
                log-level of the configuration, or info]",
            ),
        path("root", format!("Directory for metadata and snapshots [default: {DEFAULT_ROOT}]")).global(true).long_help(
            format!(
                "Directory for metadata and snapshots; one daemon uses it at a time. [default: \
                {DEFAULT_ROOT}]"
            ),
        ),
    ]
}

/// The flags for other actions than serving, and the options of these flags.
fn subcommands() -> [Arg; 5] {
    [
        Arg::new("check-config")
            .long("check-config")
            .action(ArgAction::SetTrue)
            .help("Check the configuration file, unknown keys included, and exit")
            .long_help(
                "Check the configuration file and exit: 0 if it is good, 78 if a value is wrong or a key \
                is unknown.",
            ),
        Arg::new("rebuild-metadata")
            .long("rebuild-metadata")
            .action(ArgAction::SetTrue)
            .conflicts_with("check-config")
            .help("Rebuild damaged metadata from the directories and containerd's metadata, and exit")
            .long_help(
                "Rebuild metadata that is damaged or missing, print which snapshots were restored and \
                which were not, and exit. The daemon and containerd must be stopped; containers may go on \
                running. Local snapshots are restored from the records beside their files; containerd's \
                metadata tells which records are current, and which snapshots are published layers. \
                Contradictory snapshots are left out, and their directories are left alone. The old file \
                is kept as metadata.sqlite.damaged-<n>. Metadata that is intact is not touched.",
            ),
        path(
            "containerd-metadata",
            format!(
                "For --rebuild-metadata: containerd's metadata, or \"none\" [default: {}]",
                rebuild::DEFAULT_CONTAINERD
            ),
        )
        .requires("rebuild-metadata"),
        Arg::new("snapshotter").long("snapshotter").value_name("NAME").requires("rebuild-metadata").help(format!(
            "For --rebuild-metadata: the name of this snapshotter in containerd [default: {}]",
            rebuild::DEFAULT_NAME
        )),
        Arg::new("json")
            .long("json")
            .action(ArgAction::SetTrue)
            .requires("rebuild-metadata")
            .help("For --rebuild-metadata: report as JSON"),
    ]
}

fn status() -> Command {
    Command::new("status")
        .about("Show images, where their files come from, who uses them, and how repositories are")
        .long_about(
            "Show, of the running daemon: its repositories and whether they answer; images (the ends \
            of chains of layers, and what containers stand on) with their layers, how many of these \
            are published, where their files come from (lazy: all are published; mixed; local: all \
            were downloaded; broken: no container can start on it, with the reason), how many \
            containers use it, and what it takes on disk. Exit status: 0, or 1 if no daemon \
            can be asked.",
        )
        .arg(json())
        .arg(flag("quick", "Do not measure what containers wrote"))
}

fn doctor() -> Command {
    Command::new("doctor")
        .about("Look for what is wrong with this node, and say what to change")
        .long_about(
            "Look at the node, the configuration, the daemon, repositories, images and containerd, \
            and print for whatever is wrong what it means and what to change. Changes nothing. Each \
            check has a name that stays; they are explained in admin.md of the documentation. Exit \
            status: 0 all is good, 1 there are warnings, 2 there are problems, 3 it could not look, or not \
            print what it found.",
        )
        .arg(json())
        .arg(path("containerd", format!("Socket of containerd [default: {}]", CONTAINERD_SOCKETS.join(" or "))))
        .arg(path(
            "containerd-config",
            format!("Configuration of containerd [default: {}]", CONTAINERD_CONFIGURATIONS.join(" or ")),
        ))
}

fn gc() -> Command {
    Command::new("gc")
        .about("Remove at once what removed snapshots left")
        .long_about(
            "Remove what nothing needs any more: directories of removed snapshots, and places of \
            published layers that no container stands on. containerd has it done after each of its \
            own garbage collections; this does it at once. Exit status: 0, or 1 if no daemon can be \
            asked.",
        )
        .arg(json())
        .arg(flag("dry-run", "Only show it"))
}

fn json() -> Arg {
    flag("json", "Print JSON")
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

/// Parses the arguments, of which the first is the program's name. `--help` and `--version` are errors as well: clap's
/// error knows the text, the stream and the exit code.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Arguments, clap::Error> {
    let mut matches = with_internal_commands().try_get_matches_from(arguments.into_iter().map(accept_single_dash))?;
    check_exclusive(&matches)?;
    let default_path = |path: Option<PathBuf>, default: &str| path.unwrap_or_else(|| PathBuf::from(default));
    Ok(Arguments {
        address: default_path(matches.remove_one("address"), DEFAULT_ADDRESS),
        config: matches.remove_one("config"),
        log_level: matches.remove_one("log-level"),
        root: default_path(matches.remove_one("root"), DEFAULT_ROOT),
        action: action(&mut matches),
    })
}

/// Refuses a flag for another action together with a command. clap has a setting for this, but it would also refuse
/// `--address` before a command.
fn check_exclusive(matches: &ArgMatches) -> Result<(), clap::Error> {
    let Some(command_name) = matches.subcommand_name() else { return Ok(()) };
    match ["check-config", "rebuild-metadata"].into_iter().find(|flag| matches.get_flag(flag)) {
        None => Ok(()),
        Some(flag) => Err(command().error(
            ErrorKind::ArgumentConflict,
            format!("the argument '--{flag}' cannot be used with the command '{command_name}': give one of the two"),
        )),
    }
}

fn action(matches: &mut ArgMatches) -> Action {
    match matches.remove_subcommand() {
        Some((name, mut matches)) => match name.as_str() {
            "status" => Action::Status(Status { json: matches.get_flag("json"), quick: matches.get_flag("quick") }),
            "probe" => Action::Probe(matches.remove_one("request").unwrap_or_default()),
            "gc" => Action::Gc(Gc { dry_run: matches.get_flag("dry-run"), json: matches.get_flag("json") }),
            _ => Action::Doctor(Doctor {
                json: matches.get_flag("json"),
                socket: matches.remove_one("containerd"),
                configuration: matches.remove_one("containerd-config"),
            }),
        },
        None if matches.get_flag("check-config") => Action::CheckConfig,
        None if matches.get_flag("rebuild-metadata") => Action::Rebuild(rebuild::RebuildOptions {
            containerd: rebuild::ContainerdDb::from_argument(matches.remove_one("containerd-metadata")),
            snapshotter: matches.remove_one("snapshotter").unwrap_or_else(|| rebuild::DEFAULT_NAME.to_owned()),
            json: matches.get_flag("json"),
        }),
        None => Action::Serve,
    }
}

/// Turns `-address`, as Go programs have flags, into `--address`. There are no one-letter flags that this could break.
fn accept_single_dash(argument: OsString) -> OsString {
    match argument.as_encoded_bytes() {
        [b'-', first, _, ..] if first.is_ascii_alphabetic() => {
            let mut double_dash = OsString::from("-");
            double_dash.push(argument);
            double_dash
        }
        _ => argument,
    }
}

#[cfg(test)]
mod tests;
