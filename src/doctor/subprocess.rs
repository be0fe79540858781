//! Runs other programs with a time limit. A program that hangs, even one that cannot be killed, does not keep the doctor.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::program::{self, Program};

/// Far above what any of the programs prints.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// The variables that programs inherit beside `PATH`. The others of an admin's shell do not concern them.
const INHERITED_VARIABLES: [&str; 2] = ["LANG", "TERM"];
/// Prefix of the last line that our own program prints when it fails.
pub const ERROR_PREFIX: &str = "cvmfs-snapshotter: ";

#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program of the system.
pub fn run(name: &str, arguments: &[&str], limit: Duration) -> io::Result<Output> {
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    run_as(&Program::Named(name.to_owned()), name, &arguments, limit)
}

/// Runs a program that sees `name` as its own: k3s is one file with many programs, and chooses by that name. A program that
/// somebody else than root may have put there is refused with `PermissionDenied`.
pub fn run_as(program: &Program, name: &str, arguments: &[&OsStr], limit: Duration) -> io::Result<Output> {
    let mut command = own_program();
    command.arg("run-program").arg(program.to_argument()).arg(name).arg("--").args(arguments);
    // The test binary has no such command.
    if cfg!(test) {
        command = Command::new(program.to_argument());
        command.arg0(name).args(arguments);
    }
    let output = finish(&mut command, limit)?;
    let reason = output.stderr.strip_prefix(ERROR_PREFIX).map(str::trim_end);
    let kind = match output.status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(program::REFUSED) => io::ErrorKind::PermissionDenied,
        Some(program::NOT_FOUND) => io::ErrorKind::NotFound,
        Some(_) | None => return Ok(output),
    };
    reason.map(|reason| io::Error::new(kind, reason.to_owned())).map_or(Ok(output), Err)
}

/// Runs a hidden command of our own program with `path`, and returns what it printed.
pub fn run_self(command: &str, path: &Path, limit: Duration) -> io::Result<String> {
    finish(own_program().arg(command).arg(path), limit).map(|output| output.stdout)
}

/// The command line that a process was started with.
pub fn command_line(pid: u32) -> Option<Vec<OsString>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = bytes.strip_suffix(&[0])?;
    Some(words.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

/// The link leads to the program that runs, even when an upgrade has replaced the file.
fn own_program() -> Command {
    Command::new("/proc/self/exe")
}

fn finish(command: &mut Command, limit: Duration) -> io::Result<Output> {
    let inherited = INHERITED_VARIABLES.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    command.env_clear().env("PATH", program::PATH).envs(inherited);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let deadline = Instant::now() + limit;
    let (stdout, stderr) = (read_in_thread(child.stdout.take()), read_in_thread(child.stderr.take()));
    let timed_out =
        || io::Error::new(io::ErrorKind::TimedOut, format!("it did not answer within {} s", limit.as_secs()));
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            None => {
                kill(child);
                return Err(timed_out());
            }
        }
    };
    let receive = |text: mpsc::Receiver<Option<String>>| {
        let text = text.recv_timeout(deadline.saturating_duration_since(Instant::now())).map_err(|_| timed_out())?;
        text.ok_or_else(|| io::Error::other("it printed more than 1 MiB"))
    };
    Ok(Output { status, stdout: receive(stdout)?, stderr: receive(stderr)? })
}

/// A child that hangs in a file system may outlive its kill, so only a thread of its own waits for its end.
fn kill(mut child: Child) {
    let _ = child.kill();
    thread::spawn(move || child.wait());
}

/// Sends what can be read, or None if that is too much. The writer then gets a broken pipe.
fn read_in_thread(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Option<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.map(|pipe| pipe.take(MAX_OUTPUT_BYTES as u64 + 1).read_to_end(&mut bytes));
        let text = (bytes.len() <= MAX_OUTPUT_BYTES).then(|| String::from_utf8_lossy(&bytes).into_owned());
        let _ = sender.send(text);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn shell(script: &str, limit: Duration) -> io::Result<Output> {
        run("sh", &["-c", script], limit)
    }

    #[test]
    fn output_is_complete_and_a_hang_or_endless_output_is_given_up() {
        let output = shell("head -c 300000 /dev/zero | tr '\\0' x; echo why >&2; exit 3", LONG).unwrap();
        assert_eq!((output.status.code(), output.stdout.len(), output.stderr.as_str()), (Some(3), 300_000, "why\n"));
        let start = Instant::now();
        assert_eq!(shell("exec sleep 100", Duration::from_millis(200)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(50));
        let sh = Program::Named("sh".to_owned());
        let named = run_as(&sh, "containerd", &["-c".as_ref(), "echo $0".as_ref()], LONG).unwrap();
        assert_eq!(named.stdout, "containerd\n");
        assert!(run("/no/such/program", &["x"], LONG).is_err());
        for endless in ["exec cat /dev/zero", "exec cat /dev/zero >&2"] {
            assert!(shell(endless, LONG).is_err(), "{endless}");
        }
    }

    #[test]
    fn killed_child_leaves_no_zombie() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = format!("/proc/{}", child.id());
        assert!(Path::new(&process).exists());
        kill(child);
        let deadline = Instant::now() + LONG;
        while Path::new(&process).exists() {
            assert!(Instant::now() < deadline, "{process} is still there");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn program_gets_our_search_path_and_few_other_variables() {
        let output = shell("env", LONG).unwrap();
        let names: Vec<&str> = output.stdout.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
        // The shell adds some of its own.
        let known = [&INHERITED_VARIABLES[..], &["PATH", "PWD", "SHLVL", "_", "OLDPWD"]].concat();
        assert!(names.iter().all(|name| known.contains(name)), "{names:?}");
        assert!(output.stdout.contains(&format!("PATH={}\n", program::PATH)), "{}", output.stdout);
    }
}
