//! A repository, if no daemon can be asked: looked at by a process of its own, because one that
//! hangs in it may not even be killed.
#![forbid(unsafe_code)]

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::config::RepositoryAt;
use crate::proto::admin::{Owner, Repository as Described};
use crate::repository::{Condition, Repository};
use crate::sys::Host;

/// More than a repository that answers ever takes.
const LIMIT: Duration = Duration::from_secs(10);

/// What the other process says: nothing, or the one owner of all, or why it cannot be used.
pub fn probe(path: &Path) -> String {
    let repository = Arc::new(Repository::new(path.display().to_string(), path.to_owned(), LIMIT, Arc::new(Host)));
    match Repository::condition(&repository) {
        Ok(Condition { owner: None }) => "good\n".to_owned(),
        Ok(Condition { owner: Some((uid, gid)) }) => format!("good {uid} {gid}\n"),
        Err(why) => format!("bad {why}\n"),
    }
}

pub fn look(at: &RepositoryAt) -> Described {
    let described = |trouble: String, owner: Option<Owner>| Described {
        name: at.name.clone(),
        path: at.path.display().to_string(),
        trouble,
        owner: owner.into(),
        ..Described::default()
    };
    let said = match ask(&at.path) {
        Ok(said) => said,
        Err(why) => return described(why, None),
    };
    match said.trim_end().split_once(' ') {
        Some(("bad", why)) => described(why.to_owned(), None),
        Some(("good", owner)) => {
            let mut numbers = owner.split(' ').map_while(|number| number.parse().ok());
            let owner = numbers.next().zip(numbers.next());
            described(String::new(), owner.map(|(uid, gid)| Owner { uid, gid, ..Owner::default() }))
        }
        _ if said == "good\n" => described(String::new(), None),
        _ => described(format!("the process that looked at it failed: {said:?}"), None),
    }
}

fn ask(path: &Path) -> Result<String, String> {
    let failed = |e: std::io::Error| format!("it cannot be looked at: {e}");
    let own = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(own)
        .args(["probe-repository"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let until = Instant::now() + LIMIT + Duration::from_secs(1);
    while child.try_wait().map_err(failed)?.is_none() {
        if Instant::now() >= until {
            // It may be beyond killing. Nobody waits for it.
            let _ = child.kill();
            return Err(format!("it did not answer within {} s", LIMIT.as_secs()));
        }
        thread::sleep(Duration::from_millis(20));
    }
    let mut said = String::new();
    child.stdout.take().map_or(Ok(0), |mut stdout| stdout.read_to_string(&mut said)).map_err(failed)?;
    Ok(said)
}
