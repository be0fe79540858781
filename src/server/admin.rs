//! What `cvmfs-snapshotter status`, `doctor` and `gc` ask, and gRPC's question after our health.
#![forbid(unsafe_code)]

use grpcio::ServiceBuilder;
use protobuf::{EnumOrUnknown, MessageField};

use super::handlers::Handlers;
use super::status::CallError;
use super::{convert, service};
use crate::metrics::METRICS;
use crate::model::{Kind, LABEL_IMAGE_REF, SnapshotId, Timestamp};
use crate::proto::admin::{
    DescribeResponse, Found, IoErrors, Leftover, LeftoversResponse, Pulls, Repository, ServerOutage, Snapshot,
    SnapshotsResponse, leftover, snapshot,
};
use crate::proto::health::HealthCheckResponse;
use crate::proto::health::health_check_response::ServingStatus;
use crate::repository::Unavailable;
use crate::repository::server_health::{self, RepositoryServer, Unreachable};
use crate::snapshotter::inspect::{LeftoverKind, ProbeRepositories, SnapshotStatus};
use crate::snapshotter::{Cursor, RepositoryDependency, Snapshotter};

/// What gRPC's health protocol calls the service that containerd uses.
const SNAPSHOTS: &str = "containerd.services.snapshots.v1.Snapshots";

impl Handlers {
    /// None of them keeps a worker from containerd's calls for long: they are done where pulls wait.
    pub(super) fn admin(&self, mut service: ServiceBuilder, started: Timestamp) -> ServiceBuilder {
        service = self.unary(
            service,
            &service::DESCRIBE,
            Some(|_, _| Ok(Some(RepositoryDependency::Any))),
            move |s, _, _| Ok(describe(s, started)),
        );
        service = self.unary(
            service,
            &service::SNAPSHOTS,
            Some(|_, _| Ok(Some(RepositoryDependency::Any))),
            |s, request, _| {
                let rest = (request.next > 0)
                    .then_some(Cursor { next: SnapshotId(request.next), last: SnapshotId(request.last) });
                let ask = if request.ask_repositories { ProbeRepositories::Yes } else { ProbeRepositories::No };
                let (inspected, rest) = s.inspect(rest, ask)?;
                Ok(SnapshotsResponse {
                    snapshots: inspected.into_iter().map(inspected_snapshot).collect(),
                    next: rest.map_or(0, |rest| rest.next.0),
                    last: rest.map_or(0, |rest| rest.last.0),
                    ..SnapshotsResponse::default()
                })
            },
        );
        service = self.unary(
            service,
            &service::LEFTOVERS,
            Some(|_, _| Ok(Some(RepositoryDependency::Any))),
            |s, request, _| {
                let (leftovers, next) = s.leftovers(SnapshotId(request.next))?;
                let leftovers = leftovers.into_iter().map(|one| Leftover {
                    path: one.path.display().to_string(),
                    what: EnumOrUnknown::new(match one.kind {
                        LeftoverKind::Removed => leftover::What::REMOVED,
                        LeftoverKind::Detached => leftover::What::DETACHED,
                    }),
                    ..Leftover::default()
                });
                Ok(LeftoversResponse {
                    leftovers: leftovers.collect(),
                    next: next.map_or(0, |id| id.0),
                    ..LeftoversResponse::default()
                })
            },
        );
        // That the start is not over is an answer.
        let early = || health(ServingStatus::NOT_SERVING);
        self.unary_before_ready(service, &service::HEALTH_CHECK, Some(early), None, |s, request, _| {
            let is_well =
                is_well(s, &request.service).ok_or_else(|| CallError::UnknownService(request.service.clone()))?;
            Ok(health(if is_well { ServingStatus::SERVING } else { ServingStatus::NOT_SERVING }))
        })
    }
}

fn health(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: EnumOrUnknown::new(status), ..HealthCheckResponse::default() }
}

/// None: there is no such service. That this runs says that a worker was free.
fn is_well(snapshotter: &Snapshotter, service: &str) -> Option<bool> {
    match service {
        "" | SNAPSHOTS => Some(true),
        name => snapshotter.health().into_iter().find(|(repository, _)| repository == name).map(|(_, well)| well),
    }
}

fn describe(snapshotter: &Snapshotter, started: Timestamp) -> DescribeResponse {
    let setup = snapshotter.daemon_info();
    let conditions = snapshotter.repository_statuses();
    let repositories = conditions.iter().map(|(repository, condition)| {
        let cache = condition.as_ref().ok().and_then(|condition| condition.cache.as_ref());
        let errors = condition.as_ref().ok().and_then(|condition| condition.io_errors.clone());
        let outage = condition.as_ref().err().and_then(Unavailable::server_outage);
        Repository {
            name: repository.name().to_owned(),
            path: repository.path().display().to_string(),
            trouble: condition.as_ref().err().map(Unavailable::to_string).unwrap_or_default(),
            cache: cache.map(|cache| cache.path.display().to_string()).unwrap_or_default(),
            server_outage: outage.map(server_outage).into(),
            io_errors: errors.map(io_errors).into(),
            ..convert::sampled_owners(condition.as_ref().ok().and_then(|condition| condition.sample))
        }
    });
    DescribeResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started: started.0,
        snapshots: setup.snapshots.display().to_string(),
        attach: convert::attach(setup.attach).to_owned(),
        repositories: repositories.collect(),
        found: MessageField::some(Found {
            unknown: setup.recovery.unknown.len() as u64,
            foreign: setup.recovery.foreign as u64,
            ..Found::default()
        }),
        pulls: MessageField::some(pulls(conditions.iter().map(|(repository, _)| repository.name()))),
        ..DescribeResponse::default()
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

fn inspected_snapshot(one: SnapshotStatus) -> Snapshot {
    let SnapshotStatus { snapshot, problem, repull_downloads } = one;
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
