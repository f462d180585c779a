// SPDX-License-Identifier: Apache-2.0

//! The agent's socket.

use std::{io, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::stream;
use kiln_agent_api::{
    Shape,
    api::{
        AcquireRequest, AcquireResponse, AdoptedRequest, AdoptedResponse, Agent, ClassReport,
        GuardedRequest, GuardedResponse, ReleaseRequest, ReleaseResponse, ReportRequest,
        ReportResponse, RuntimeReport, Warm, create_agent,
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
    install,
    installer::Installer,
    warm::{Active, Handout, Miss, ShapeReport, WarmManager},
};

/// Longest reason that is logged, in characters.
const MAX_REASON: usize = 1024;

/// Serves shims at `socket` until the result is dropped, with what `manager` holds and what
/// `installer` knows of the node.
///
/// # Errors
/// When it cannot be listened there.
pub async fn serve(
    manager: Arc<WarmManager>,
    installer: &Installer,
    socket: &Path,
) -> io::Result<Server> {
    let listener = RebindingListener::open(Arc::clone(&manager), socket)?;
    let service = Service {
        manager,
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
    manager: Arc<WarmManager>,
    /// Whether Pods of the class can start.
    handler: watch::Receiver<install::Health>,
    turns: Semaphore,
}

impl Service {
    async fn find(&self, request: &AcquireRequest) -> Result<Handout, Miss> {
        let missed = |miss| {
            self.manager.metrics.missed(miss, 1);
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
        let manager = Arc::clone(&self.manager);
        let found = tokio::spawn(async move { manager.hand_out(&shape).await });
        found.await.map_err(|_| Miss::Broken)?
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
        let manager = Arc::clone(&self.manager);
        tokio::spawn(async move { manager.adopted(request.id, took).await });
        Ok(AdoptedResponse::new())
    }

    async fn release(
        &self,
        _: &TtrpcContext,
        request: ReleaseRequest,
    ) -> ttrpc::Result<ReleaseResponse> {
        let reason: String = request.reason.chars().take(MAX_REASON).collect();
        let manager = Arc::clone(&self.manager);
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
        let metrics = &self.manager.metrics;
        metrics.dropped.inc_by(request.dropped);
        if !request.failure.is_empty() {
            let failure: String = request.failure.chars().take(MAX_REASON).collect();
            warn!("Pod sandbox {id} may send to link-local addresses: {failure}");
            metrics.unguarded.inc();
        }
        Ok(GuardedResponse::new())
    }

    async fn report(&self, _: &TtrpcContext, _: ReportRequest) -> ttrpc::Result<ReportResponse> {
        let metrics = &self.manager.metrics;
        let held = self.manager.snapshot();
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
    use crate::config::Config;

    #[tokio::test]
    async fn one_request_too_many_is_no_lack_of_sandboxes() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state: dir.path().join("state"),
            ..Config::default()
        };
        let unknown = install::Health::Unknown(String::new());
        let service = Service {
            manager: WarmManager::new(config).unwrap(),
            handler: watch::channel(unknown).1,
            turns: Semaphore::new(0),
        };
        let found = service.find(&AcquireRequest::new()).await;
        assert_eq!(found, Err(Miss::Busy));
        let missed = [Miss::Busy, Miss::Empty].map(|miss| service.manager.metrics.missed_by(miss));
        assert_eq!(missed, [1, 0]);
    }
}
