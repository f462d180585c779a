// SPDX-License-Identifier: Apache-2.0

//! Metrics, under upstream's names where it has them (its `internal/metrics/metrics.go`), with
//! buckets that tell a warm start from a cold one.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kiln_crds::{Sandbox, SandboxClaim, SandboxStatus, SandboxWarmPool, ShutdownPolicy, keys};
use kube::ResourceExt;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

use crate::{
    condition::{self, FINISHED, READY},
    known::Kind,
    marks::template_of,
    memory, owner,
    queue::{Outcome, WorkKind},
    store::Store,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Launch {
    launch_type: String,
    sandbox_template: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LaunchIn {
    namespace: String,
    launch_type: String,
    sandbox_template: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Creation {
    namespace: String,
    sandbox_template: String,
    launch_type: String,
    warmpool_name: String,
    pod_condition: &'static str,
    created_by: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Write {
    verb: &'static str,
    kind: String,
    subresource: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Result {
    kind: String,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sandboxes {
    namespace: String,
    ready_condition: String,
    expired: String,
    operating_mode: &'static str,
    launch_type: String,
    sandbox_template: String,
    owned_by: &'static str,
    created_by: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolSize {
    namespace: String,
    warmpool_name: String,
    sandbox_template: String,
    sandbox_status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    namespace: String,
    sandbox_template: String,
    owned_by: &'static str,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Expired {
    namespace: String,
    sandbox_template: String,
    owned_by: &'static str,
    shutdown_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Template {
    sandbox_template: String,
}

/// Template of a Sandbox that names none.
const NO_TEMPLATE: &str = "__unknown__";
const POOL: &str = "SandboxWarmPool";
/// What [`state`] tells apart.
const STATES: [&str; 4] = ["ready", "pending", "succeeded", "failed"];

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// How long a claim took to become ready, from different beginnings.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Startup {
    /// From the moment that an admission webhook has noted, else from its making.
    pub(crate) since_made: Option<Duration>,
    /// From the moment that its client has noted.
    pub(crate) since_asked: Option<Duration>,
    /// From the controller's first sight of it.
    pub(crate) since_seen: Duration,
}

/// What the controller counts.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    claim_startup: Histograms<Launch>,
    client_claim_startup: Histograms<Launch>,
    claim_controller_startup: Histograms<Launch>,
    creation: Histograms<LaunchIn>,
    claims: Family<Creation, Counter>,
    finished: Family<Ended, Counter>,
    expired: Family<Expired, Counter>,
    adopted: Family<Template, Counter>,
    writes: Family<Write, Counter>,
    write_seconds: Histograms<Write>,
    reconciles: Family<Result, Counter>,
    reconcile_seconds: Histograms<Of>,
    queue: Gauge,
    memory: Gauge,
    memory_limit: Gauge,
    sandboxes: Family<Sandboxes, Gauge>,
    pool_sizes: Family<PoolSize, Gauge>,
}

/// Milliseconds: 1 ms to 10 min.
fn latency() -> Histogram {
    let bounds = [
        1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 50.0, 80.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0,
        5_000.0, 10_000.0, 30_000.0, 60_000.0, 120_000.0, 240_000.0, 600_000.0,
    ];
    Histogram::new(bounds)
}

/// Seconds: 100 µs to 10 s.
fn duration() -> Histogram {
    Histogram::new([
        0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0,
    ])
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let metrics = Self {
            registry: Mutex::default(),
            claim_startup: Family::new_with_constructor(latency),
            client_claim_startup: Family::new_with_constructor(latency),
            claim_controller_startup: Family::new_with_constructor(latency),
            creation: Family::new_with_constructor(latency),
            claims: Family::default(),
            finished: Family::default(),
            expired: Family::default(),
            adopted: Family::default(),
            writes: Family::default(),
            write_seconds: Family::new_with_constructor(duration),
            reconciles: Family::default(),
            reconcile_seconds: Family::new_with_constructor(duration),
            queue: Gauge::default(),
            memory: Gauge::default(),
            memory_limit: Gauge::default(),
            sandboxes: Family::default(),
            pool_sizes: Family::default(),
        };
        let mut registry = Registry::default();
        metrics.register_upstreams(&mut registry);
        metrics.register_ours(&mut registry);
        Self {
            registry: Mutex::new(registry),
            ..metrics
        }
    }

    fn register_upstreams(&self, registry: &mut Registry) {
        let version = env!("CARGO_PKG_VERSION");
        let build = Info::new(vec![("git_version", version), ("version", version)]);
        registry.register("agent_sandbox_build", "Version of the controller", build);
        registry.register(
            "agent_sandbox_claim_startup_latency_ms",
            "Milliseconds from the moment that an admission webhook has noted, else from the \
             making of a claim in whole seconds, to its readiness",
            self.claim_startup.clone(),
        );
        registry.register(
            "agent_sandbox_client_claim_startup_latency_ms",
            "Milliseconds from the moment that a claim's client has noted to its readiness",
            self.client_claim_startup.clone(),
        );
        registry.register(
            "agent_sandbox_claim_controller_startup_latency_ms",
            "Milliseconds from the controller's first sight of a claim to its readiness",
            self.claim_controller_startup.clone(),
        );
        registry.register(
            "agent_sandbox_creation_latency_ms",
            "Milliseconds from the making of a Sandbox to its readiness",
            self.creation.clone(),
        );
        registry.register(
            "agent_sandbox_claim_creation",
            "Sandboxes made or adopted for claims",
            self.claims.clone(),
        );
        registry.register(
            "agent_sandbox_finished",
            "Sandboxes whose Pod has come to its end",
            self.finished.clone(),
        );
        registry.register(
            "agent_sandbox_expired",
            "Sandboxes whose time was over",
            self.expired.clone(),
        );
        registry.register("agent_sandboxes", "Sandboxes", self.sandboxes.clone());
        registry.register(
            "agent_sandbox_warmpool_size",
            "Sandboxes of pools",
            self.pool_sizes.clone(),
        );
    }

    fn register_ours(&self, registry: &mut Registry) {
        registry.register(
            "kiln_controller_adoptions",
            "Sandboxes of pools given to claims",
            self.adopted.clone(),
        );
        registry.register(
            "kiln_controller_writes",
            "Requests to the apiserver that change something, events and leases left out",
            self.writes.clone(),
        );
        registry.register(
            "kiln_controller_write_seconds",
            "Seconds until the apiserver has answered such a request",
            self.write_seconds.clone(),
        );
        registry.register(
            "kiln_controller_reconciles",
            "Objects looked at",
            self.reconciles.clone(),
        );
        registry.register(
            "kiln_controller_reconcile_seconds",
            "Seconds that looking at an object took",
            self.reconcile_seconds.clone(),
        );
        registry.register(
            "kiln_controller_queue_depth",
            "Objects that wait or are worked on",
            self.queue.clone(),
        );
        registry.register(
            "kiln_controller_memory_bytes",
            "Memory that the controller has in RAM",
            self.memory.clone(),
        );
        registry.register(
            "kiln_controller_memory_limit_bytes",
            "Memory that its container may have; 0 where it has no limit",
            self.memory_limit.clone(),
        );
    }

    /// Counts a write of an object, or of its `subresource` where that has a name. It takes until
    /// the result is dropped.
    pub(crate) fn write<K: Kind>(
        &self,
        verb: &'static str,
        subresource: &'static str,
    ) -> Writing<'_> {
        let kind = K::kind(&()).into_owned();
        let labels = Write {
            verb,
            kind,
            subresource,
        };
        self.writes.get_or_create(&labels).inc();
        Writing {
            metrics: self,
            labels,
            start: Instant::now(),
        }
    }

    /// Counts a Sandbox that a claim has got, from the pool of that name or by way of it.
    pub(crate) fn obtained(&self, claim: &SandboxClaim, sandbox: &Sandbox, pool: &str) {
        let labels = Creation {
            namespace: claim.namespace().unwrap_or_default(),
            sandbox_template: template_of(sandbox).unwrap_or(NO_TEMPLATE).to_owned(),
            launch_type: launch_of(sandbox),
            warmpool_name: pool.to_owned(),
            pod_condition: match condition::is_ready(sandbox) {
                true => "ready",
                false => "not_ready",
            },
            created_by: created_by(claim),
        };
        self.claims.get_or_create(&labels).inc();
        if labels.launch_type == keys::WARM {
            let sandbox_template = labels.sandbox_template;
            let template = Template { sandbox_template };
            self.adopted.get_or_create(&template).inc();
        }
    }

    /// Counts a claim that has become ready.
    pub(crate) fn claim_ready(&self, sandbox: &Sandbox, startup: Startup) {
        let labels = Launch {
            launch_type: launch_of(sandbox),
            sandbox_template: template_of(sandbox).unwrap_or(NO_TEMPLATE).to_owned(),
        };
        for (histograms, took) in [
            (&self.claim_startup, startup.since_made),
            (&self.client_claim_startup, startup.since_asked),
            (&self.claim_controller_startup, Some(startup.since_seen)),
        ] {
            if let Some(took) = took {
                histograms.get_or_create(&labels).observe(millis(took));
            }
        }
    }

    /// Counts a Sandbox that is ready for the first time.
    pub(crate) fn sandbox_ready(&self, sandbox: &Sandbox, took: Duration) {
        let labels = LaunchIn {
            namespace: sandbox.namespace().unwrap_or_default(),
            launch_type: launch_of(sandbox),
            sandbox_template: template_of(sandbox).unwrap_or(NO_TEMPLATE).to_owned(),
        };
        self.creation.get_or_create(&labels).observe(millis(took));
    }

    /// Counts what has come to its end between the status that a Sandbox has and its `new` one.
    pub(crate) fn sandbox_changed(&self, sandbox: &Sandbox, new: &SandboxStatus) {
        let old: &[Condition] = sandbox.status.as_ref().map_or(&[], |s| &s.conditions);
        let namespace = || sandbox.namespace().unwrap_or_default();
        let sandbox_template = || template_of(sandbox).unwrap_or("unknown").to_owned();
        if let Some(finished) = condition::find(&new.conditions, FINISHED)
            && !condition::is_true(old, FINISHED)
        {
            let labels = Ended {
                namespace: namespace(),
                sandbox_template: sandbox_template(),
                owned_by: owned_by(sandbox),
                reason: finished.reason.clone(),
            };
            self.finished.get_or_create(&labels).inc();
        }
        if is_expired(&new.conditions) && !is_expired(old) {
            let labels = Expired {
                namespace: namespace(),
                sandbox_template: sandbox_template(),
                owned_by: owned_by(sandbox),
                shutdown_policy: match sandbox.spec.shutdown_policy.unwrap_or_default() {
                    ShutdownPolicy::Delete => "Delete",
                    ShutdownPolicy::Retain => "Retain",
                },
            };
            self.expired.get_or_create(&labels).inc();
        }
    }

    pub(crate) fn reconciled(&self, kind: WorkKind, outcome: Outcome, took: Duration) {
        let kind = format!("{kind:?}");
        let result = if outcome == Outcome::Failed {
            "error"
        } else {
            "success"
        };
        let labels = Result {
            kind: kind.clone(),
            result,
        };
        self.reconciles.get_or_create(&labels).inc();
        self.reconcile_seconds
            .get_or_create(&Of { kind })
            .observe(took.as_secs_f64());
    }

    /// All metrics as text. `queued` is how much waits or is under way.
    pub(crate) fn text(
        &self,
        store: &Store,
        queued: usize,
    ) -> std::result::Result<String, std::fmt::Error> {
        // Held from here, so that nobody counts into what another has counted.
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue.set(i64::try_from(queued).unwrap_or(i64::MAX));
        self.memory.set(memory::used());
        self.memory_limit.set(memory::limit());
        self.count_sandboxes(store);
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }

    fn count_sandboxes(&self, store: &Store) {
        self.sandboxes.clear();
        self.pool_sizes.clear();
        let pools = store.pools.all().into_iter();
        for pool in pools.filter(|pool| pool.spec.replicas != Some(0)) {
            self.count_none(&pool);
        }
        for sandbox in store.sandboxes.all() {
            let conditions: &[Condition] = sandbox.status.as_ref().map_or(&[], |s| &s.conditions);
            let owned_by = owned_by(&sandbox);
            let sandbox_template = template_of(&sandbox).unwrap_or("unknown").to_owned();
            if owned_by == POOL
                && let Some(pool) = owner::controller(&*sandbox)
            {
                let labels = PoolSize {
                    namespace: sandbox.namespace().unwrap_or_default(),
                    warmpool_name: pool.name.clone(),
                    sandbox_template: sandbox_template.clone(),
                    sandbox_status: state(conditions),
                };
                self.pool_sizes.get_or_create(&labels).inc();
            }
            let labels = Sandboxes {
                namespace: sandbox.namespace().unwrap_or_default(),
                ready_condition: condition::is_ready(&sandbox).to_string(),
                expired: is_expired(conditions).to_string(),
                operating_mode: match sandbox.spec.is_suspended() {
                    true => "Suspended",
                    false => "Running",
                },
                launch_type: launch_of(&sandbox),
                sandbox_template,
                owned_by,
                created_by: created_by(&*sandbox),
            };
            self.sandboxes.get_or_create(&labels).inc();
        }
    }

    /// Gives a pool its series, which it would not have without Sandboxes, when an alert needs them.
    fn count_none(&self, pool: &SandboxWarmPool) {
        for sandbox_status in STATES {
            let labels = PoolSize {
                namespace: pool.namespace().unwrap_or_default(),
                warmpool_name: pool.name_any(),
                sandbox_template: pool.spec.sandbox_template_ref.name.clone(),
                sandbox_status,
            };
            self.pool_sizes.get_or_create(&labels).set(0);
        }
    }
}

/// A write that is under way.
pub(crate) struct Writing<'a> {
    metrics: &'a Metrics,
    labels: Write,
    start: Instant,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let seconds = self.metrics.write_seconds.get_or_create(&self.labels);
        seconds.observe(self.start.elapsed().as_secs_f64());
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

fn launch_of(sandbox: &Sandbox) -> String {
    let launch = sandbox.labels().get(keys::LAUNCH_TYPE);
    launch.cloned().unwrap_or_else(|| "unknown".to_owned())
}

fn is_expired(conditions: &[Condition]) -> bool {
    condition::find(conditions, READY).is_some_and(|c| c.reason == "SandboxExpired")
}

/// What a pool's Sandbox is good for.
fn state(conditions: &[Condition]) -> &'static str {
    match condition::find(conditions, FINISHED) {
        Some(end) if end.reason == "PodFailed" => "failed",
        Some(_) => "succeeded",
        None if condition::is_true(conditions, READY) => "ready",
        None => "pending",
    }
}

fn owned_by(sandbox: &Sandbox) -> &'static str {
    match owner::controller(sandbox) {
        Some(owner) if owner::is_kind::<SandboxClaim>(owner) => "SandboxClaim",
        Some(owner) if owner::is_kind::<SandboxWarmPool>(owner) => POOL,
        _ => "None",
    }
}

/// Who says to have made an object: a label's value is anybody's, and metrics must not grow by it.
fn created_by<K: ResourceExt>(object: &K) -> &'static str {
    let creator = object.labels().get(keys::CREATED_BY);
    let known = keys::CREATORS
        .into_iter()
        .find(|c| Some(*c) == creator.map(String::as_str));
    known.unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sandbox(conditions: &Value) -> Sandbox {
        serde_json::from_value(json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {
                "name": "s", "namespace": "ns",
                "labels": {keys::LAUNCH_TYPE: "warm", keys::CREATED_BY: "somebody"},
                "annotations": {keys::TEMPLATE_REF: "t"},
            },
            "spec": {"podTemplate": {"spec": {"containers": []}}, "shutdownPolicy": "Delete"},
            "status": {"conditions": conditions},
        }))
        .unwrap()
    }

    fn cond(kind: &str, status: &str, reason: &str) -> Value {
        json!({"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"})
    }

    fn text(metrics: &Metrics) -> String {
        let mut text = String::new();
        encode(&mut text, &metrics.registry.lock().unwrap()).unwrap();
        text
    }

    #[test]
    fn a_warm_start_is_told_from_a_slower_one() {
        let metrics = Metrics::new();
        let startup = Startup {
            since_asked: Some(Duration::from_millis(15)),
            since_seen: Duration::from_millis(9),
            ..Startup::default()
        };
        metrics.claim_ready(&sandbox(&json!([])), startup);
        metrics.sandbox_ready(&sandbox(&json!([])), Duration::from_millis(60));
        let text = text(&metrics);
        let labels = "launch_type=\"warm\",sandbox_template=\"t\"";
        for line in [
            format!(
                "agent_sandbox_client_claim_startup_latency_ms_bucket{{le=\"10.0\",{labels}}} 0"
            ),
            format!(
                "agent_sandbox_client_claim_startup_latency_ms_bucket{{le=\"20.0\",{labels}}} 1"
            ),
            format!(
                "agent_sandbox_claim_controller_startup_latency_ms_bucket{{le=\"10.0\",{labels}}} 1"
            ),
            format!(
                "agent_sandbox_creation_latency_ms_bucket{{le=\"80.0\",namespace=\"ns\",{labels}}} 1"
            ),
        ] {
            assert!(text.contains(&line), "{line}\n{text}");
        }
        assert!(!text.contains("agent_sandbox_claim_startup_latency_ms_bucket"));
    }

    #[test]
    fn a_pool_without_sandboxes_is_seen() {
        let metrics = Metrics::new();
        let pool = json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": "p", "namespace": "ns"},
            "spec": {"sandboxTemplateRef": {"name": "t"}},
        });
        metrics.count_none(&serde_json::from_value(pool).unwrap());
        let line = "agent_sandbox_warmpool_size{namespace=\"ns\",warmpool_name=\"p\",sandbox_template=\"t\",sandbox_status=\"ready\"} 0";
        let text = text(&metrics);
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn ends_are_counted_when_they_come_about() {
        let metrics = Metrics::new();
        let running = sandbox(&json!([]));
        let finished = sandbox(&json!([cond("Finished", "True", "PodFailed")]));
        let expired = sandbox(&json!([
            cond("Finished", "True", "PodFailed"),
            cond("Ready", "False", "SandboxExpired")
        ]));
        for (old, new) in [
            (&running, &finished),
            (&finished, &finished),
            (&finished, &expired),
            (&expired, &expired),
        ] {
            metrics.sandbox_changed(old, new.status.as_ref().unwrap());
        }
        let text = text(&metrics);
        let labels = "namespace=\"ns\",sandbox_template=\"t\",owned_by=\"None\"";
        for line in [
            format!("agent_sandbox_finished_total{{{labels},reason=\"PodFailed\"}} 1"),
            format!("agent_sandbox_expired_total{{{labels},shutdown_policy=\"Delete\"}} 1"),
        ] {
            assert!(text.contains(&line), "{line}\n{text}");
        }
        assert_eq!(created_by(&running), "unknown");
    }
}
