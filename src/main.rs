#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use cvmfs_snapshotter::admin::{client, gc, status};
use cvmfs_snapshotter::cli::{self, Action};
use cvmfs_snapshotter::{daemon, doctor};

fn main() -> ExitCode {
    let arguments = match cli::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(answer) => {
            // Also the way of --help and --version. A closed terminal is no reason to fail.
            let _ = answer.print();
            return if answer.use_stderr() { ExitCode::from(78) } else { ExitCode::SUCCESS };
        }
    };
    let of_daemon =
        |result: Result<(), daemon::Error>| result.map_or_else(|e| fail(&e, e.exit_code()), |()| ExitCode::SUCCESS);
    let of_report = |result: client::Result<String>| result.map_or_else(|e| fail(&e, 1), |text| print(&text));
    match &arguments.action {
        Action::Serve => of_daemon(daemon::run(&arguments)),
        Action::CheckConfig => of_daemon(daemon::check_config(&arguments)),
        Action::Rebuild(wanted) => of_daemon(daemon::rebuild_metadata(&arguments, wanted)),
        Action::Status(wanted) => of_report(status::run(&arguments.address, *wanted)),
        Action::Gc(wanted) => of_report(gc::run(&arguments.address, *wanted)),
        Action::Doctor(wanted) => doctor::run(&arguments, wanted, &mut std::io::stdout())
            .map_or_else(|e| fail(&format!("cannot write the report: {e}"), doctor::UNKNOWN), ExitCode::from),
        Action::ProbePath(path) => print(&doctor::probe_path(path)),
        Action::ProbeRepository(path) => print(&doctor::probe_repository(path)),
        Action::RunProgram(wanted) => {
            let failed = doctor::Program::parse(&wanted.program).exec(&wanted.name, &wanted.arguments);
            fail(&failed, failed.exit_code())
        }
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => fail(&format!("cannot write the report: {e}"), 1),
        // Nobody may be listening any more.
        Ok(()) | Err(_) => ExitCode::SUCCESS,
    }
}

fn fail(error: &dyn Display, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "cvmfs-snapshotter: {error}");
    ExitCode::from(code)
}
