//! A repository, if no daemon can be asked: looked at by a process of its own, because one that
//! hangs in it may not even be killed.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::child;
use crate::config::RepositoryAt;
use crate::proto::admin::{IoErrors, Owner, Repository as Described};
use crate::repository::client::Cache;
use crate::repository::server::{self, Server};
use crate::repository::{Condition, Repository};
use crate::sys::Host;

/// More than a repository that answers ever takes.
const LIMIT: Duration = Duration::from_secs(10);

/// Begins the line about the client's cache, with its device and its path.
const CACHE: &str = "cache ";
/// Begins the line about input/output errors of the client.
const IO_ERRORS: &str = "errors\t";

/// What the other process says: nothing, or the one owner of all, or why it cannot be used. In further lines,
/// where its client keeps what it has fetched, and what it answered with errors.
pub fn probe(path: &Path) -> String {
    let repository = Arc::new(Repository::new(path.display().to_string(), path.to_owned(), LIMIT, Arc::new(Host)));
    match Repository::condition(&repository) {
        Ok(Condition { owner, cache, io_errors }) => {
            let owner = owner.map_or_else(String::new, |(uid, gid)| format!(" {uid} {gid}"));
            let cache = cache.map_or_else(String::new, |cache| line_of_cache(&cache));
            let errors = io_errors.map_or_else(String::new, |errors| line_of_errors(&errors));
            format!("good{owner}\n{errors}{cache}")
        }
        Err(why) => format!("bad {why}\n"),
    }
}

fn line_of_cache(cache: &Cache) -> String {
    format!("{CACHE}{} {}\n", cache.device, cache.path.display())
}

fn line_of_errors(errors: &server::IoErrors) -> String {
    let server::IoErrors { count, last, server: Server { host, proxy } } = errors;
    let [host, proxy] = [host, proxy].map(|text| text.replace(char::is_control, " "));
    format!("{IO_ERRORS}{count}\t{}\t{host}\t{proxy}\n", last.0)
}

fn errors_of(line: &str) -> Option<IoErrors> {
    let mut parts = line.strip_prefix(IO_ERRORS)?.split('\t');
    let (count, last) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let (host, proxy) = (parts.next()?.to_owned(), parts.next()?.to_owned());
    Some(IoErrors { count, last, host, proxy, ..IoErrors::default() })
}

/// Where the client keeps what it has fetched: looked at with all that root may see, which the daemon's unit takes from it.
pub fn cache(path: &Path) -> Option<Cache> {
    let said = ask(path).ok()?;
    let (device, path) = said.lines().find_map(|line| line.strip_prefix(CACHE))?.split_once(' ')?;
    Some(Cache { device: device.parse().ok()?, path: path.into() })
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
    let (said, more) = said.split_once('\n').unwrap_or((&said, ""));
    let with_errors = |one: Described| Described { io_errors: more.lines().find_map(errors_of).into(), ..one };
    match said.split_once(' ') {
        Some(("bad", why)) => described(why.to_owned(), None),
        Some(("good", owner)) => {
            let mut numbers = owner.split(' ').map_while(|number| number.parse().ok());
            let owner = numbers.next().zip(numbers.next());
            with_errors(described(String::new(), owner.map(|(uid, gid)| Owner { uid, gid, ..Owner::default() })))
        }
        _ if said == "good" => with_errors(described(String::new(), None)),
        _ => described(format!("the process that looked at it failed: {said:?}"), None),
    }
}

fn ask(path: &Path) -> Result<String, String> {
    match child::ourselves("probe-repository", path, LIMIT + Duration::from_secs(1)) {
        Ok(Some(said)) => Ok(said.stdout),
        Ok(None) => Err(format!("it did not answer within {} s", LIMIT.as_secs())),
        Err(e) => Err(format!("it cannot be looked at: {e}")),
    }
}
