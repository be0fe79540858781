#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use cvmfs_snapshotter::{cli, daemon};

fn main() -> ExitCode {
    let arguments = match cli::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(answer) => {
            // Also the way of --help and --version. A closed terminal is no reason to fail.
            let _ = answer.print();
            return if answer.use_stderr() { ExitCode::from(78) } else { ExitCode::SUCCESS };
        }
    };
    match daemon::run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be listening; the exit code still says it.
            let _ = writeln!(std::io::stderr(), "cvmfs-snapshotter: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
