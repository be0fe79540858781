//! Other programs, asked with a limit: what hangs, and be it beyond killing, keeps no doctor.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// What a program said, and whether it succeeded.
pub struct Said {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

/// None: it cannot be started, or was not done after `limit`.
pub fn ask<S: AsRef<OsStr>>(program: &OsStr, arguments: &[S], limit: Duration) -> Option<Said> {
    ask_as(program, program, arguments, limit)
}

/// As `ask`, of a containerd: that of k3s is one of many programs in one file, which looks at how it is called.
pub fn ask_containerd<S: AsRef<OsStr>>(program: &OsStr, arguments: &[S], limit: Duration) -> Option<Said> {
    ask_as("containerd".as_ref(), program, arguments, limit)
}

fn ask_as<S: AsRef<OsStr>>(name: &OsStr, program: &OsStr, arguments: &[S], limit: Duration) -> Option<Said> {
    let mut command = Command::new(program);
    command.arg0(name).args(arguments);
    run(&mut command, limit).ok()?
}

/// What a process was started with.
pub fn command_line(pid: u32) -> Option<Vec<OsString>> {
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    // Each ends with a zero.
    let words = words.strip_suffix(&[0])?;
    Some(words.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

/// Has this very program do `task` with `path`. None: it was not done after `limit`.
pub fn ourselves(task: &str, path: &Path, limit: Duration) -> io::Result<Option<Said>> {
    // Also if the file was replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg(task).arg(path);
    run(&mut command, limit)
}

fn run(command: &mut Command, limit: Duration) -> io::Result<Option<Said>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let until = Instant::now() + limit;
    let (stdout, stderr) = (read(child.stdout.take()), read(child.stderr.take()));
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() >= until => {
                // Nobody waits for its end.
                let _ = child.kill();
                return Ok(None);
            }
            None => thread::sleep(Duration::from_millis(10)),
        }
    };
    let rest = |said: mpsc::Receiver<String>| said.recv_timeout(until.saturating_duration_since(Instant::now())).ok();
    Ok(rest(stdout).zip(rest(stderr)).map(|(stdout, stderr)| Said { success: status.success(), stdout, stderr }))
}

fn read(from: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (send, said) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.map(|mut from| from.read_to_end(&mut bytes));
        let _ = send.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_is_read_to_its_end_and_what_hangs_is_given_up() {
        let shell = |script: &str, limit| ask("sh".as_ref(), &["-c", script], limit);
        let said =
            shell("head -c 300000 /dev/zero | tr '\\0' x; echo why >&2; exit 3", Duration::from_secs(10)).unwrap();
        assert_eq!((said.success, said.stdout.len(), said.stderr.as_str()), (false, 300_000, "why\n"));
        let begun = Instant::now();
        assert!(shell("exec sleep 100", Duration::from_millis(200)).is_none());
        assert!(begun.elapsed() < Duration::from_secs(50));
        let named = ask_containerd("sh".as_ref(), &["-c", "echo $0"], Duration::from_secs(10)).unwrap();
        assert_eq!(named.stdout, "containerd\n");
        assert!(ask("/no/such/program".as_ref(), &["x"], Duration::from_secs(1)).is_none());
    }
}
