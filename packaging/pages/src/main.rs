//! Writes what packages make of the command line into a folder: shell completions, under the names
//! that the shells look for.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap_complete::{Shell, generate_to};
use cvmfs_snapshotter::cli;

const PROGRAM: &str = "cvmfs-snapshotter";

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: pages FOLDER");
        return ExitCode::from(2);
    };
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        if let Err(e) = generate_to(shell, &mut cli::command(), PROGRAM, &folder) {
            eprintln!("pages: cannot write the completions of {shell} into {}: {e}", folder.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
