//! A repository, if no daemon can be asked: looked at by a process of its own, because one that
//! hangs in it may not even be killed.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use protobuf::{EnumOrUnknown, MessageField};

use super::child;
use crate::config::RepositoryConfig;
use crate::proto::admin::{IoErrors, Owner, Repository as Described};
use crate::repository::client::CacheDirectory;
use crate::repository::server_health::{self, RepositoryServer};
use crate::repository::{Repository, RepositoryStatus};
use crate::server::convert;
use crate::system::Host;

/// More than a repository that answers ever takes.
const LIMIT: Duration = Duration::from_secs(10);

/// The first line of one that can be used, and the beginning of that of one that cannot.
const GOOD: &str = "good";
const BAD: &str = "bad ";

/// Begins the line about the client's cache, with its device and its path.
const CACHE: &str = "cache ";
/// Begins the line about input/output errors of the client.
const IO_ERRORS: &str = "errors\t";

/// Begins the line about the owners: the state's number in the protocol, and the one owner if there is one.
const OWNERS: &str = "owners ";

/// The whole line where the client lists attributes of its own on every file.
const LISTS: &str = "lists-own-attributes";

/// What the other process says: that it is good, or why it cannot be used; then what is known of the owners, the
/// attributes, what its client answered with errors, and where it keeps what it has fetched.
pub fn probe(path: &Path) -> String {
    let repository = Repository::new(path.display().to_string(), path.to_owned(), LIMIT, Arc::new(Host));
    match repository.status() {
        Ok(RepositoryStatus { sample, cache, io_errors }) => {
            let sampled = convert::sampled_owners(sample);
            let owner =
                sampled.owner.as_ref().map_or_else(String::new, |owner| format!(" {} {}", owner.uid, owner.gid));
            let owners = format!("{OWNERS}{}{owner}", sampled.owners.value());
            let lists = if sampled.lists_own_attributes { format!("{LISTS}\n") } else { String::new() };
            let cache = cache.map_or_else(String::new, |cache| line_of_cache(&cache));
            let errors = io_errors.map_or_else(String::new, |errors| line_of_errors(&errors));
            format!("{GOOD}\n{owners}\n{lists}{errors}{cache}")
        }
        Err(why) => format!("{BAD}{why}\n"),
    }
}

fn line_of_cache(cache: &CacheDirectory) -> String {
    format!("{CACHE}{} {}\n", cache.device, cache.path.display())
}

fn line_of_errors(errors: &server_health::IoErrors) -> String {
    let server_health::IoErrors { count, last, server: RepositoryServer { host, proxy } } = errors;
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
pub fn cache(path: &Path) -> Option<CacheDirectory> {
    let said = ask(path).ok()?;
    let (device, path) = said.lines().find_map(|line| line.strip_prefix(CACHE))?.split_once(' ')?;
    Some(CacheDirectory { device: device.parse().ok()?, path: path.into() })
}

pub fn look(at: &RepositoryConfig) -> Described {
    let mut described =
        Described { name: at.name.clone(), path: at.path.display().to_string(), ..Described::default() };
    let said = match ask(&at.path) {
        Ok(said) => said,
        Err(why) => return Described { trouble: why, ..described },
    };
    let mut lines = said.lines();
    match lines.next().unwrap_or_default() {
        GOOD => {}
        bad => {
            let failed = || format!("the process that looked at it failed: {bad:?}");
            return Described { trouble: bad.strip_prefix(BAD).map_or_else(failed, str::to_owned), ..described };
        }
    }
    for line in lines {
        if let Some(owners) = line.strip_prefix(OWNERS) {
            let numbers: Vec<u32> = owners.split(' ').map_while(|number| number.parse().ok()).collect();
            let state = numbers.first().and_then(|state| i32::try_from(*state).ok());
            described.owners = EnumOrUnknown::from_i32(state.unwrap_or_default());
            if let [_, uid, gid] = numbers[..] {
                described.owner = MessageField::some(Owner { uid, gid, ..Owner::default() });
            }
        }
        described.lists_own_attributes |= line == LISTS;
        if let Some(errors) = errors_of(line) {
            described.io_errors = MessageField::some(errors);
        }
    }
    described
}

fn ask(path: &Path) -> Result<String, String> {
    match child::ourselves("probe-repository", path, LIMIT + Duration::from_secs(1)) {
        Ok(Some(said)) => Ok(said.stdout),
        Ok(None) => Err(format!("it did not answer within {} s", LIMIT.as_secs())),
        Err(e) => Err(format!("it cannot be looked at: {e}")),
    }
}
