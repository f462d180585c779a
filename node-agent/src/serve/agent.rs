// SPDX-License-Identifier: Apache-2.0

//! The agent's socket.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

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
use tokio::sync::Semaphore;
use tracing::{info, warn};
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use super::{
    AT_ONCE,
    listener::{Door, accept},
};
use crate::{
    install::Health,
    warm::{Keeper, Miss, Ways},
};

/// Sandboxes handed out whose adoption nobody has told of, of which the shape is remembered.
const REMEMBERED: usize = 1024;

/// Longest reason that is logged, in bytes.
const MAX_REASON: usize = 1024;

/// Serves shims at `socket` until the result is dropped.
///
/// # Errors
/// When it cannot be listened there.
pub async fn serve(keeper: Arc<Keeper>, socket: &Path) -> io::Result<Server> {
    let listener = Door::open(Arc::clone(&keeper), socket)?;
    let service = Service {
        keeper,
        handed: Mutex::default(),
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
    keeper: Arc<Keeper>,
    handed: Mutex<HashMap<String, Shape>>,
    turns: Semaphore,
}

impl Service {
    async fn find(&self, request: &AcquireRequest) -> Result<(String, u32), Miss> {
        let missed = |miss| {
            self.keeper.metrics.missed(miss, 1);
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
        let keeper = Arc::clone(&self.keeper);
        let wanted = shape.clone();
        let acquired = tokio::spawn(async move { keeper.acquire(&wanted).await }).await;
        let (id, pid) = acquired.map_err(|_| Miss::Broken)??;
        let mut handed = self.handed.lock().unwrap_or_else(PoisonError::into_inner);
        if handed.len() >= REMEMBERED {
            handed.clear(); // of these no count by shape will be kept
        }
        handed.insert(id.clone(), shape);
        Ok((id, pid))
    }

    fn forget(&self, id: &str) -> Option<Shape> {
        let mut handed = self.handed.lock().unwrap_or_else(PoisonError::into_inner);
        handed.remove(id)
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
            Ok((id, pid)) => {
                info!("{id} is for {}", request.sandbox_id);
                let file = self.keeper.file(&id);
                answer.warm = Some(Warm {
                    file: file.to_string_lossy().into_owned(),
                    cgroup: self.keeper.cgroup_of(&id),
                    has_slots: self.keeper.gofers.has(&id),
                    network_call: self.keeper.start_way().method().to_owned(),
                    id,
                    pid,
                    ..Warm::default()
                })
                .into();
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
        if let Some(shape) = self.forget(&request.id) {
            let keeper = Arc::clone(&self.keeper);
            tokio::spawn(async move { keeper.adopted(request.id, &shape, took).await });
        }
        Ok(AdoptedResponse::new())
    }

    async fn release(
        &self,
        _: &TtrpcContext,
        request: ReleaseRequest,
    ) -> ttrpc::Result<ReleaseResponse> {
        if self.forget(&request.id).is_some() {
            let reason: String = request.reason.chars().take(MAX_REASON).collect();
            let keeper = Arc::clone(&self.keeper);
            tokio::spawn(async move { keeper.release(request.id, &reason).await });
        }
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
        let metrics = &self.keeper.metrics;
        metrics.dropped.inc_by(request.dropped);
        if !request.failure.is_empty() {
            let words: String = request.failure.chars().take(MAX_REASON).collect();
            warn!("Pod sandbox {id} may send to link-local addresses: {words}");
            metrics.unguarded.inc();
        }
        Ok(GuardedResponse::new())
    }

    async fn report(&self, _: &TtrpcContext, _: ReportRequest) -> ttrpc::Result<ReportResponse> {
        Ok(report(&self.keeper))
    }
}

/// What the agent holds.
pub(crate) fn report(keeper: &Keeper) -> ReportResponse {
    let mut report = ReportResponse::new();
    keeper.look(|pool, problem| {
        report.problem = problem.to_owned();
        for (shape, wanted, counts) in pool.shapes() {
            report.classes.push(ClassReport {
                key: shape.key(),
                class: wanted.map_or_else(String::new, |w| w.class.clone()),
                shape: shape.to_json(),
                wanted: wanted.map_or(0, |w| w.count),
                ready: counts.ready,
                warming: counts.warming,
                adopted: counts.adopted,
                missed: counts.missed,
                boot_milliseconds: milliseconds(counts.boot_time()),
                ..ClassReport::default()
            });
        }
    });
    report.runtime = keeper.runtime().map(runtime).into();
    if let Health::Bad(why) = &*keeper.health().borrow() {
        report.handler_problem.clone_from(why);
    }
    report.held_bytes = keeper.held();
    report.failed = keeper.metrics.released.get();
    report.link_local_dropped = keeper.metrics.dropped.get();
    report.link_local_unguarded = keeper.metrics.unguarded.get();
    let missed = |miss: Miss| (miss.name().to_owned(), keeper.metrics.missed_by(miss));
    report.missed = Miss::ALL.map(missed).into();
    report.adoption_milliseconds = milliseconds(keeper.metrics.adoption_time());
    report
}

fn runtime((version, ways): (String, Ways)) -> RuntimeReport {
    RuntimeReport {
        version,
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
        let service = Service {
            keeper: Keeper::new(config).unwrap(),
            handed: Mutex::default(),
            turns: Semaphore::new(0),
        };
        let found = service.find(&AcquireRequest::new()).await;
        assert_eq!(found, Err(Miss::Busy));
        let missed = [Miss::Busy, Miss::Empty].map(|miss| service.keeper.metrics.missed_by(miss));
        assert_eq!(missed, [1, 0]);
    }
}
