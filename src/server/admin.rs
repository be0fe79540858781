//! The administration service (`cvmfs_snapshotter.admin.Admin`): describes the daemon, its repositories, snapshots and
//! leftovers.
//!
//! It must not know who asks or how the answers are shown. It changes nothing. Its calls run on the pool for pulls,
//! because they ask all repositories: none of them holds a worker.
#![forbid(unsafe_code)]

use grpcio::ServiceBuilder;
use protobuf::{EnumOrUnknown, MessageField};

use super::dispatch::CallContext;
use super::handlers::{CallResult, Handlers};
use super::unary::UnaryMethod;
use super::{convert, service};
use crate::metrics::METRICS;
use crate::model::{Kind, LABEL_IMAGE_REF, SnapshotId};
use crate::proto::admin::{
    DescribeResponse, Found, IoErrors, Leftover, LeftoversRequest, LeftoversResponse, Pulls, Repository, ServerOutage,
    Snapshot, SnapshotsRequest, SnapshotsResponse, leftover, snapshot,
};
use crate::repository::server_health::{self, RepositoryServer, Unreachable};
use crate::repository::{self, RepositoryStatus, Unavailable};
use crate::snapshotter::inspect::{self, LeftoverKind, ProbeRepositories, SnapshotStatus};
use crate::snapshotter::{self, Cursor, RepositoryDependency, Snapshotter};

impl Handlers {
    pub(super) fn add_admin(&self, mut service: ServiceBuilder) -> ServiceBuilder {
        service = self.add_unary(
            service,
            UnaryMethod::new(&service::DESCRIBE, |call, _| Ok(describe(call)))
                .may_wait_for(depends_on_all_repositories),
        );
        service = self.add_unary(
            service,
            UnaryMethod::new(&service::SNAPSHOTS, snapshots).may_wait_for(depends_on_all_repositories),
        );
        self.add_unary(
            service,
            UnaryMethod::new(&service::LEFTOVERS, leftovers).may_wait_for(depends_on_all_repositories),
        )
    }
}

// The signature is that of `FindDependency`.
#[allow(clippy::unnecessary_wraps)]
fn depends_on_all_repositories<Q>(_: &Snapshotter, _: &Q) -> snapshotter::Result<Option<RepositoryDependency>> {
    Ok(Some(RepositoryDependency::Any))
}

fn snapshots(
    call: &CallContext<'_>,
    SnapshotsRequest { next, last, ask_repositories, .. }: SnapshotsRequest,
) -> CallResult<SnapshotsResponse> {
    let cursor = (next > 0).then_some(Cursor { next: SnapshotId(next), last: SnapshotId(last) });
    let probe = if ask_repositories { ProbeRepositories::Yes } else { ProbeRepositories::No };
    let (snapshots, next_cursor) = call.snapshotter.inspect(cursor, probe)?;
    Ok(SnapshotsResponse {
        snapshots: snapshots.into_iter().map(snapshot_status).collect(),
        next: next_cursor.map_or(0, |cursor| cursor.next.0),
        last: next_cursor.map_or(0, |cursor| cursor.last.0),
        ..SnapshotsResponse::default()
    })
}

fn leftovers(call: &CallContext<'_>, LeftoversRequest { next, .. }: LeftoversRequest) -> CallResult<LeftoversResponse> {
    let (leftovers, next) = call.snapshotter.leftovers(SnapshotId(next))?;
    Ok(LeftoversResponse {
        leftovers: leftovers.iter().map(leftover).collect(),
        next: next.map_or(0, |id| id.0),
        ..LeftoversResponse::default()
    })
}

fn leftover(leftover: &inspect::Leftover) -> Leftover {
    Leftover {
        path: leftover.path.display().to_string(),
        what: EnumOrUnknown::new(match leftover.kind {
            LeftoverKind::Removed => leftover::What::REMOVED,
            LeftoverKind::Detached => leftover::What::DETACHED,
        }),
        ..Leftover::default()
    }
}

fn describe(call: &CallContext<'_>) -> DescribeResponse {
    let daemon = call.snapshotter.daemon_info();
    let repositories: Vec<Repository> = call
        .snapshotter
        .repository_statuses()
        .iter()
        .map(|(repository, status)| describe_repository(repository, status.as_ref()))
        .collect();
    DescribeResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started: call.process_start.0,
        snapshots: daemon.snapshots.display().to_string(),
        attach: daemon.attach.as_str().to_owned(),
        found: MessageField::some(Found {
            unknown: daemon.recovery.unknown.len() as u64,
            foreign: daemon.recovery.foreign as u64,
            ..Found::default()
        }),
        pulls: MessageField::some(pulls(repositories.iter().map(|repository| repository.name.as_str()))),
        repositories,
        ..DescribeResponse::default()
    }
}

pub fn describe_repository(
    repository: &repository::Repository,
    status: Result<&RepositoryStatus, &Unavailable>,
) -> Repository {
    let known = status.ok();
    let error = status.err();
    Repository {
        name: repository.name().to_owned(),
        path: repository.path().display().to_string(),
        trouble: error.map(Unavailable::to_string).unwrap_or_default(),
        cache: known
            .and_then(|status| status.cache.as_ref())
            .map(|cache| cache.path.display().to_string())
            .unwrap_or_default(),
        server_outage: error.and_then(Unavailable::server_outage).map(server_outage).into(),
        io_errors: known.and_then(|status| status.io_errors.clone()).map(io_errors).into(),
        ..convert::sampled_owners(known.and_then(|status| status.sample))
    }
}

fn server_outage(unreachable: &Unreachable) -> ServerOutage {
    let RepositoryServer { host, proxy } = unreachable.server.clone();
    ServerOutage { host, proxy, since: unreachable.since.0, ..ServerOutage::default() }
}

fn io_errors(errors: server_health::IoErrors) -> IoErrors {
    let server_health::IoErrors { count, last, server: RepositoryServer { host, proxy } } = errors;
    IoErrors { count, last: last.0, host, proxy, ..IoErrors::default() }
}

fn pulls<'n>(repositories: impl Iterator<Item = &'n str>) -> Pulls {
    let counted = METRICS.pulls(repositories);
    Pulls {
        published: counted.published,
        not_published: counted.not_published,
        unnamed: counted.unnamed,
        failed: counted.failed,
        ..Pulls::default()
    }
}

fn snapshot_status(status: SnapshotStatus) -> Snapshot {
    let SnapshotStatus { snapshot, problem, repull_downloads } = status;
    let (digest, repository) =
        snapshot.layer.map(|layer| (layer.digest.as_str().to_owned(), layer.repository)).unwrap_or_default();
    Snapshot {
        id: snapshot.id.0,
        key: snapshot.key.as_str().to_owned(),
        parent: snapshot.parent.map_or_else(String::new, |parent| parent.as_str().to_owned()),
        kind: EnumOrUnknown::new(match snapshot.kind {
            Kind::View => snapshot::Kind::VIEW,
            Kind::Active => snapshot::Kind::ACTIVE,
            Kind::Committed => snapshot::Kind::COMMITTED,
        }),
        created: snapshot.created.0,
        image: snapshot.labels.get(LABEL_IMAGE_REF).cloned().unwrap_or_default(),
        digest,
        repository,
        trouble: problem.unwrap_or_default(),
        refused: repull_downloads,
        ..Snapshot::default()
    }
}
