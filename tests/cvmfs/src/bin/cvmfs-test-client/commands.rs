//! The commands on stdin, each acknowledged by one line on stdout.

#![forbid(unsafe_code)]

use std::io::{self, Write as _};
use std::time::Duration;

use fuser::{Errno, Notifier};

use crate::gate::Behaviour;
use crate::magic::Visibility;
use crate::served::Served;

/// Returns when stdin is closed.
pub fn run(served: &Served, notifier: &Notifier) {
    for line in io::stdin().lines().map_while(Result::ok) {
        let answer = match obey(served, notifier, &line) {
            Ok(said) if said.is_empty() => "ok".to_owned(),
            Ok(said) => format!("ok {said}"),
            Err(said) => format!("error {said}"),
        };
        let mut output = io::stdout().lock();
        if writeln!(output, "{answer}").and_then(|()| output.flush()).is_err() {
            return;
        }
    }
}

fn obey(served: &Served, notifier: &Notifier, line: &str) -> Result<String, String> {
    let words: Vec<_> = line.split_ascii_whitespace().collect();
    let behaviour = match words.as_slice() {
        ["normal"] => Behaviour::Normal,
        ["hang", "all"] => Behaviour::HangAll,
        ["hang", "tree"] => Behaviour::HangTree,
        ["slow", time] => {
            let time = time.parse().map_err(|_| format!("answer slowly: {time:?} is no number of milliseconds"))?;
            Behaviour::Slow(Duration::from_millis(time))
        }
        ["fail", name] => Behaviour::Fail(errno(name).ok_or_else(|| format!("fail: no error is named {name:?} here"))?),
        ["magic-xattrs", "rootonly"] => {
            served.magic.show_on(Visibility::RootOnly);
            return Ok(String::new());
        }
        ["magic-xattrs", "always"] => {
            served.magic.show_on(Visibility::Always);
            return Ok(String::new());
        }
        ["reload"] => return served.reload(notifier).map(|revision| revision.to_string()),
        ["requests"] => return Ok(served.gate.counted()),
        _ => return Err(format!("obey: there is no command {line:?}")),
    };
    served.gate.set(behaviour);
    Ok(String::new())
}

fn errno(name: &str) -> Option<Errno> {
    Some(match name {
        "EACCES" => Errno::EACCES,
        "EAGAIN" => Errno::EAGAIN,
        "EINTR" => Errno::EINTR,
        "EIO" => Errno::EIO,
        "ENODEV" => Errno::ENODEV,
        "ENOENT" => Errno::ENOENT,
        "ENOMEM" => Errno::ENOMEM,
        "ENOTCONN" => Errno::ENOTCONN,
        "ENOTDIR" => Errno::ENOTDIR,
        "EPERM" => Errno::EPERM,
        "ESTALE" => Errno::ESTALE,
        "ETIMEDOUT" => Errno::ETIMEDOUT,
        _ => return None,
    })
}
