//! A repository, checked without the daemon: by a process of our own, because a thread that hangs in it cannot be ended.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use protobuf::{EnumOrUnknown, MessageField};
use serde::{Deserialize, Serialize};

use super::subprocess;
use crate::config::RepositoryConfig;
use crate::proto::admin::{IoErrors, Owner, Repository as Described};
use crate::repository::Repository;
use crate::repository::client::CacheDirectory;
use crate::server::convert;
use crate::system::Host;

/// More than a repository that answers ever takes.
const LIMIT: Duration = Duration::from_secs(10);

/// What the other process prints about a repository that can be used.
#[derive(Serialize, Deserialize)]
struct ProbeAnswer {
    /// The state of the owners, as a number of the protocol.
    owners: i32,
    /// The only owner that was seen: uid and gid.
    owner: Option<(u32, u32)>,
    lists_own_attributes: bool,
    io_errors: Option<ClientErrors>,
    cache: Option<(u64, PathBuf)>,
}

#[derive(Serialize, Deserialize)]
struct ClientErrors {
    count: u64,
    last: i64,
    host: String,
    proxy: String,
}

/// JSON of a `ProbeAnswer`, or of the reason why the repository cannot be used.
pub fn probe(path: &Path) -> String {
    let repository = Repository::new(path.display().to_string(), path.to_owned(), LIMIT, Arc::new(Host));
    let answer = repository.status().map_err(|e| e.to_string()).map(|status| {
        let sampled = convert::sampled_owners(status.sample);
        let io_errors = status.io_errors.map(|errors| {
            let [host, proxy] = [errors.server.host, errors.server.proxy];
            ClientErrors { count: errors.count, last: errors.last.0, host, proxy }
        });
        ProbeAnswer {
            owners: sampled.owners.value(),
            owner: sampled.owner.as_ref().map(|owner| (owner.uid, owner.gid)),
            lists_own_attributes: sampled.lists_own_attributes,
            io_errors,
            cache: status.cache.map(|cache| (cache.device, cache.path)),
        }
    });
    serde_json::to_string(&answer).unwrap_or_default()
}

/// Where the client keeps what it has fetched. The daemon cannot tell: its unit hides these paths from it.
pub fn cache(path: &Path) -> Option<CacheDirectory> {
    let (device, path) = ask(path).ok()?.cache?;
    Some(CacheDirectory { path, device })
}

/// The repository as the daemon would describe it.
pub fn describe(repository: &RepositoryConfig) -> Described {
    let mut described = Described {
        name: repository.name.clone(),
        path: repository.path.display().to_string(),
        ..Described::default()
    };
    match ask(&repository.path) {
        Err(reason) => described.trouble = reason,
        Ok(answer) => {
            described.owners = EnumOrUnknown::from_i32(answer.owners);
            let owner = answer.owner.map(|(uid, gid)| Owner { uid, gid, ..Owner::default() });
            described.owner = MessageField::from_option(owner);
            described.lists_own_attributes = answer.lists_own_attributes;
            let io_errors = answer.io_errors.map(|ClientErrors { count, last, host, proxy }| IoErrors {
                count,
                last,
                host,
                proxy,
                ..IoErrors::default()
            });
            described.io_errors = MessageField::from_option(io_errors);
        }
    }
    described
}

fn ask(path: &Path) -> Result<ProbeAnswer, String> {
    let answer = subprocess::run_self("probe-repository", path, LIMIT + Duration::from_secs(1));
    let answer = answer.map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut => format!("it did not answer within {} s", LIMIT.as_secs()),
        _ => format!("cannot inspect it: {e}"),
    })?;
    serde_json::from_str(&answer).unwrap_or_else(|_| Err(format!("the process that inspected it failed: {answer:?}")))
}
