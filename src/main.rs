//! The program: parses the arguments, runs what they ask for, and turns an error into an exit code.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use cvmfs_snapshotter::admin::{client, gc, status};
use cvmfs_snapshotter::cli::{self, Action};
use cvmfs_snapshotter::{daemon, doctor};

/// EX_CONFIG of sysexits.h: the same arguments will fail again. The unit does not restart on it.
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let arguments = match cli::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(e) => {
            // This is also how --help and --version end. A closed terminal is no reason to fail.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::from(EXIT_CONFIG) } else { ExitCode::SUCCESS };
        }
    };
    match &arguments.action {
        Action::Serve => exit_code(daemon::run(&arguments)),
        Action::CheckConfig => exit_code(daemon::check_config(&arguments)),
        Action::Rebuild(options) => exit_code(daemon::rebuild_metadata(&arguments, options)),
        Action::Status(options) => print_report(status::run(&arguments.address, *options)),
        Action::Gc(options) => print_report(gc::run(&arguments.address, *options)),
        Action::Doctor(options) => doctor::run(&arguments, options, &mut std::io::stdout())
            .map_or_else(|e| fail(&format!("cannot write the report: {e}"), doctor::UNKNOWN), ExitCode::from),
        Action::Probe(request) => {
            let (answer, code) = doctor::probe(request);
            if print(&answer) == ExitCode::SUCCESS { ExitCode::from(code) } else { ExitCode::FAILURE }
        }
    }
}

fn exit_code(result: Result<(), daemon::Error>) -> ExitCode {
    result.map_or_else(|e| fail(&e, e.exit_code()), |()| ExitCode::SUCCESS)
}

fn print_report(report: client::Result<String>) -> ExitCode {
    report.map_or_else(|e| fail(&e, 1), |text| print(&text))
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => fail(&format!("cannot write the report: {e}"), 1),
        // A reader such as `head` may have closed the pipe.
        Ok(()) | Err(_) => ExitCode::SUCCESS,
    }
}

fn fail(error: &dyn Display, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "cvmfs-snapshotter: {error}");
    ExitCode::from(code)
}
