//! Other programs, asked with a limit: one that hangs, and be it beyond killing, does not keep the doctor.
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

/// Far above what any of them says.
const MOST_BYTES: usize = 1 << 20;
/// What programs see of our environment, besides a search path of ours: the rest is an admin's own business.
const KEPT: [&str; 2] = ["LANG", "TERM"];
/// How our own program begins its last line, if it cannot go on.
pub const LAST_WORDS: &str = "cvmfs-snapshotter: ";

/// What a program said, and whether it succeeded.
#[derive(Debug)]
pub struct Said {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

/// Why it said nothing.
#[derive(Debug, PartialEq, Eq)]
pub enum Silence {
    /// It was not run, because somebody else than root may have put it there.
    Refused(String),
    /// It is not there, was not done in time, or said too much.
    NoAnswer,
}

/// Asks a program of the system.
pub fn ask(name: &str, arguments: &[&str], limit: Duration) -> Option<Said> {
    let arguments: Vec<&OsStr> = arguments.iter().map(|argument| -> &OsStr { argument.as_ref() }).collect();
    run(&Program::Named(name.to_owned()), name, &arguments, limit).ok()
}

/// Asks a containerd: that of k3s is one of many programs in one file, which looks at how it is called.
pub fn ask_containerd(program: &Program, arguments: &[&OsStr], limit: Duration) -> Result<Said, Silence> {
    run(program, "containerd", arguments, limit)
}

/// What a process was started with.
pub fn command_line(pid: u32) -> Option<Vec<OsString>> {
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    // Each ends with a zero.
    let words = words.strip_suffix(&[0])?;
    Some(words.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

/// Has this very program do `task` with `path`. None: it was not done after `limit`, or said too much.
pub fn ourselves(task: &str, path: &Path, limit: Duration) -> io::Result<Option<Said>> {
    let mut command = own_program();
    command.arg(task).arg(path);
    finish(&mut command, limit).map(|ended| ended.map(|(_, said)| said))
}

fn own_program() -> Command {
    // Also if the file was replaced meanwhile.
    Command::new("/proc/self/exe")
}

fn run(program: &Program, name: &str, arguments: &[&OsStr], limit: Duration) -> Result<Said, Silence> {
    let mut command = own_program();
    command.arg("run-program").arg(program.to_argument()).arg(name).arg("--").args(arguments);
    // The program of the tests has no such task.
    if cfg!(test) {
        command = Command::new(program.to_argument());
        command.arg0(name).args(arguments);
    }
    let ended = finish(&mut command, limit).map_err(|_| Silence::NoAnswer)?;
    let (status, said) = ended.ok_or(Silence::NoAnswer)?;
    let is_code = |code: u8| status.code() == Some(code.into());
    match said.stderr.strip_prefix(LAST_WORDS) {
        Some(why) if is_code(program::REFUSED) => Err(Silence::Refused(why.trim_end().to_owned())),
        Some(_) if is_code(program::NOT_FOUND) => Err(Silence::NoAnswer),
        Some(_) | None => Ok(said),
    }
}

/// None: it was not done after `limit`, or said too much.
fn finish(command: &mut Command, limit: Duration) -> io::Result<Option<(ExitStatus, Said)>> {
    let kept = KEPT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    command.env_clear().env("PATH", program::PATH).envs(kept);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let until = Instant::now() + limit;
    let (stdout, stderr) = (read(child.stdout.take()), read(child.stderr.take()));
    let Some(status) = wait(&mut child, until)? else {
        end(child);
        return Ok(None);
    };
    let rest = |said: mpsc::Receiver<Option<String>>| {
        said.recv_timeout(until.saturating_duration_since(Instant::now())).ok().flatten()
    };
    let said = rest(stdout).zip(rest(stderr));
    Ok(said.map(|(stdout, stderr)| (status, Said { success: status.success(), stdout, stderr })))
}

fn wait(child: &mut Child, until: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        match child.try_wait()? {
            None if Instant::now() < until => thread::sleep(Duration::from_millis(10)),
            ended => return Ok(ended),
        }
    }
}

/// One that hangs in a file system may outlive even this, so nobody but a thread of its own waits for its end.
fn end(mut child: Child) {
    let _ = child.kill();
    thread::spawn(move || child.wait());
}

/// None: it was too much. Whoever goes on writing is told by the end of the pipe.
fn read(from: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Option<String>> {
    let (send, said) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.map(|from| from.take(MOST_BYTES as u64 + 1).read_to_end(&mut bytes));
        let text = (bytes.len() <= MOST_BYTES).then(|| String::from_utf8_lossy(&bytes).into_owned());
        let _ = send.send(text);
    });
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn shell(script: &str, limit: Duration) -> Option<Said> {
        ask("sh", &["-c", script], limit)
    }

    #[test]
    fn much_is_read_to_its_end_and_what_hangs_is_given_up() {
        let said = shell("head -c 300000 /dev/zero | tr '\\0' x; echo why >&2; exit 3", LONG).unwrap();
        assert_eq!((said.success, said.stdout.len(), said.stderr.as_str()), (false, 300_000, "why\n"));
        let begun = Instant::now();
        assert!(shell("exec sleep 100", Duration::from_millis(200)).is_none());
        assert!(begun.elapsed() < Duration::from_secs(50));
        let sh = Program::Named("sh".to_owned());
        let named = ask_containerd(&sh, &["-c".as_ref(), "echo $0".as_ref()], LONG).unwrap();
        assert_eq!(named.stdout, "containerd\n");
        assert!(ask("/no/such/program", &["x"], LONG).is_none());
    }

    #[test]
    fn a_program_that_never_stops_writing_fills_no_memory() {
        assert!(shell("exec cat /dev/zero", LONG).is_none());
        assert!(shell("exec cat /dev/zero >&2", LONG).is_none());
    }

    #[test]
    fn a_program_that_was_given_up_leaves_no_zombie() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = format!("/proc/{}", child.id());
        assert!(Path::new(&process).exists());
        end(child);
        let until = Instant::now() + LONG;
        while Path::new(&process).exists() {
            assert!(Instant::now() < until, "{process} is still there");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_program_sees_a_search_path_of_ours_and_little_else_of_the_environment() {
        let said = shell("env", LONG).unwrap();
        let names: Vec<&str> = said.stdout.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
        // The shell's own besides.
        let known = [&KEPT[..], &["PATH", "PWD", "SHLVL", "_", "OLDPWD"]].concat();
        assert!(names.iter().all(|name| known.contains(name)), "{names:?}");
        assert!(said.stdout.contains(&format!("PATH={}\n", program::PATH)), "{}", said.stdout);
    }
}
