// SPDX-License-Identifier: Apache-2.0

//! The agent's socket.

use std::{io, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::stream;
use kiln_agent_api::{
    Shape,
    api::{
        AcquireRequest, AcquireResponse, AdoptedRequest, AdoptedResponse, Agent, ClassReport,
        GuardedRequest, GuardedResponse, Image, ReleaseRequest, ReleaseResponse, ReportRequest,
        ReportResponse, RestoreRequest, RestoreResponse, RestoredRequest, RestoredResponse,
        RuntimeReport, Warm, create_agent,
    },
};
use runsc_wrapper::ContainerId;
use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use super::{
    AT_ONCE,
    listener::{RebindingListener, accept},
};
use crate::{
    cluster::{Outcomes, Restored},
    installer::Installer,
    snapshots::Snapshots,
    warm::{Active, Handout, Miss, ShapeReport, WarmManager},
};
use kiln_node_install::{self as install};

/// Longest reason that is logged, in characters.
const MAX_REASON: usize = 1024;

/// What shims are served with.
pub struct Shims {
    /// Holds warm sandboxes.
    pub manager: Arc<WarmManager>,
    /// Holds snapshots of Pods, if this node takes any.
    pub snapshots: Option<Arc<Snapshots>>,
    /// Who is told what came of a restore.
    pub outcomes: Outcomes,
}

/// Serves shims at `socket` until the result is dropped, with what `installer` knows of the node.
///
/// # Errors
/// When it cannot be listened there.
pub async fn serve(shims: Shims, installer: &Installer, socket: &Path) -> io::Result<Server> {
    let listener = RebindingListener::open(Arc::clone(&shims.manager), socket)?;
    let service = Service {
        shims,
        handler: installer.health(),
        turns: Semaphore::new(AT_ONCE),
    };
    let mut server = Server::new()
        .add_listener(Listener::new(stream::unfold(listener, accept)))
        .register_service(create_agent(Arc::new(service)));
    server.start().await.map_err(io::Error::other)?;
    info!("listening at {}", socket.display());
    Ok(server)
}

struct Service {
    shims: Shims,
    /// Whether Pods of the class can start.
    handler: watch::Receiver<install::Health>,
    turns: Semaphore,
}

impl Service {
    async fn find(&self, request: &AcquireRequest) -> Result<Handout, Miss> {
        let missed = |miss| {
            self.shims.manager.metrics.missed(miss, 1);
            miss
        };
        let Ok(_turn) = self.turns.try_acquire() else {
            return Err(missed(Miss::Busy));
        };
        if request.sandbox_id.parse::<ContainerId>().is_err() {
            return Err(missed(Miss::Invalid));
        }
        let shape = Shape::from_json(&request.shape).map_err(|_| missed(Miss::Invalid))?;
        // A handler is dropped half-way when its client hangs up, and half a hand-out is a leak.
        let manager = Arc::clone(&self.shims.manager);
        let found = tokio::spawn(async move { manager.hand_out(&shape).await });
        found.await.map_err(|_| Miss::Broken)?
    }
}

impl Service {
    /// Finds the image that a Pod is to be restored from. A Pod that could have one and does not
    /// get it is reported.
    async fn find_image(&self, request: &RestoreRequest) -> Result<Image, String> {
        let Some(snapshots) = &self.shims.snapshots else {
            return Err("this node has no snapshots".to_owned());
        };
        let outcome = |failure| Restored {
            namespace: request.namespace.clone(),
            snapshot: request.snapshot.clone(),
            pod_uid: request.pod_uid.clone(),
            failure,
        };
        let outcomes = &self.shims.outcomes;
        // A handler is dropped half-way when its client hangs up.
        let (owned, asked) = (Arc::clone(snapshots), request.clone());
        let found = tokio::spawn(async move { owned.restore(&asked).await });
        match found.await.map_err(|e| e.to_string())? {
            Ok(image) => {
                outcomes.expect(Arc::clone(snapshots), outcome(None));
                Ok(image)
            }
            Err((snapshot, why)) => {
                if snapshot.is_some() {
                    outcomes.tell(outcome(Some(why.clone())));
                }
                Err(why)
            }
        }
    }
}

#[async_trait]
impl Agent for Service {
    async fn acquire(
        &self,
        _: &TtrpcContext,
        request: AcquireRequest,
    ) -> ttrpc::Result<AcquireResponse> {
        let mut answer = AcquireResponse::new();
        match self.find(&request).await {
            Ok(handout) => {
                info!("{} is for {}", handout.id, request.sandbox_id);
                answer.warm = Some(warm(handout)).into();
            }
            Err(miss) => answer.miss = miss.name().to_owned(),
        }
        Ok(answer)
    }

    async fn adopted(
        &self,
        _: &TtrpcContext,
        request: AdoptedRequest,
    ) -> ttrpc::Result<AdoptedResponse> {
        let took = Duration::from_micros(request.microseconds);
        let manager = Arc::clone(&self.shims.manager);
        tokio::spawn(async move { manager.adopted(request.id, took).await });
        Ok(AdoptedResponse::new())
    }

    async fn release(
        &self,
        _: &TtrpcContext,
        request: ReleaseRequest,
    ) -> ttrpc::Result<ReleaseResponse> {
        let reason: String = request.reason.chars().take(MAX_REASON).collect();
        let manager = Arc::clone(&self.shims.manager);
        tokio::spawn(async move { manager.release(request.id, &reason).await });
        Ok(ReleaseResponse::new())
    }

    async fn guarded(
        &self,
        _: &TtrpcContext,
        request: GuardedRequest,
    ) -> ttrpc::Result<GuardedResponse> {
        let Ok(id) = request.sandbox_id.parse::<ContainerId>() else {
            return Ok(GuardedResponse::new());
        };
        let metrics = &self.shims.manager.metrics;
        metrics.dropped.inc_by(request.dropped);
        if !request.failure.is_empty() {
            let failure: String = request.failure.chars().take(MAX_REASON).collect();
            warn!("Pod sandbox {id} may send to link-local addresses: {failure}");
            metrics.unguarded.inc();
        }
        Ok(GuardedResponse::new())
    }

    async fn restore(
        &self,
        _: &TtrpcContext,
        request: RestoreRequest,
    ) -> ttrpc::Result<RestoreResponse> {
        let mut answer = RestoreResponse::new();
        match self.find_image(&request).await {
            Ok(image) => answer.image = Some(image).into(),
            Err(why) => answer.refusal = why,
        }
        Ok(answer)
    }

    async fn restored(
        &self,
        _: &TtrpcContext,
        request: RestoredRequest,
    ) -> ttrpc::Result<RestoredResponse> {
        let failure: String = request.failure.chars().take(MAX_REASON).collect();
        self.shims.outcomes.tell(Restored {
            namespace: request.namespace,
            snapshot: request.snapshot,
            pod_uid: request.pod_uid,
            failure: Some(failure).filter(|why| !why.is_empty()),
        });
        Ok(RestoredResponse::new())
    }

    async fn report(&self, _: &TtrpcContext, _: ReportRequest) -> ttrpc::Result<ReportResponse> {
        let metrics = &self.shims.manager.metrics;
        let held = self.shims.manager.snapshot();
        let missed = |miss: Miss| (miss.name().to_owned(), metrics.missed_by(miss));
        Ok(ReportResponse {
            classes: held.shapes.iter().map(class).collect(),
            problem: held.health.problem().unwrap_or_default().to_owned(),
            held_bytes: held.held_bytes,
            failed: metrics.released.get(),
            link_local_dropped: metrics.dropped.get(),
            link_local_unguarded: metrics.unguarded.get(),
            missed: Miss::ALL.map(missed).into(),
            adoption_milliseconds: milliseconds(metrics.adoption_time()),
            runtime: held.health.active().map(|active| runtime(active)).into(),
            handler_problem: match &*self.handler.borrow() {
                install::Health::Bad(why) => why.clone(),
                _ => String::new(),
            },
            ..ReportResponse::default()
        })
    }
}

fn warm(handout: Handout) -> Warm {
    Warm {
        id: handout.id,
        file: handout.file.to_string_lossy().into_owned(),
        cgroup: handout.cgroup,
        pid: handout.pid,
        has_gofer: handout.has_gofer,
        network_call: handout.way.method().to_owned(),
        ..Warm::default()
    }
}

fn class(of: &ShapeReport) -> ClassReport {
    let wanted = of.wanted.as_ref();
    ClassReport {
        key: of.shape.key(),
        class: wanted.map_or_else(String::new, |wanted| wanted.class.clone()),
        shape: of.shape.to_json(),
        wanted: wanted.map_or(0, |wanted| wanted.count),
        ready: of.ready,
        warming: of.warming,
        adopted: of.adopted,
        missed: of.missed,
        boot_milliseconds: milliseconds(of.boot_time),
        ..ClassReport::default()
    }
}

fn runtime(active: &Active) -> RuntimeReport {
    let ways = active.ways();
    RuntimeReport {
        version: active.version.clone(),
        known: ways.is_known,
        start: ways.start_name().to_owned(),
        image: ways.image,
        gofers: ways.gofers,
        ..RuntimeReport::default()
    }
}

fn milliseconds(time: Option<Duration>) -> u64 {
    u64::try_from(time.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_node_install::config::Config;

    #[tokio::test]
    async fn one_request_too_many_is_no_lack_of_sandboxes() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state: dir.path().join("state"),
            ..Config::default()
        };
        let unknown = install::Health::Unknown(String::new());
        let service = Service {
            shims: Shims {
                manager: WarmManager::new(config).unwrap(),
                snapshots: None,
                outcomes: Outcomes::channel().0,
            },
            handler: watch::channel(unknown).1,
            turns: Semaphore::new(0),
        };
        let found = service.find(&AcquireRequest::new()).await;
        assert_eq!(found, Err(Miss::Busy));
        let missed =
            [Miss::Busy, Miss::Empty].map(|miss| service.shims.manager.metrics.missed_by(miss));
        assert_eq!(missed, [1, 0]);
    }
}
