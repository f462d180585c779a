// SPDX-License-Identifier: Apache-2.0

//! Metrics, under upstream's names where it has them (its `internal/metrics/metrics.go`), with
//! buckets that tell a warm start from a cold one.

use std::{sync::Mutex, sync::PoisonError, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

use crate::{
    condition::{self, READY},
    context::{Context, template_of},
    owner,
    queue::{Class, Outcome},
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Launch {
    launch_type: String,
    sandbox_template: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verb {
    verb: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Result {
    kind: String,
    result: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sandboxes {
    namespace: String,
    ready_condition: String,
    launch_type: String,
    sandbox_template: String,
    owned_by: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Template {
    sandbox_template: String,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// What the controller counts.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    claim_startup: Histograms<Launch>,
    claim_controller_startup: Histograms<Launch>,
    claims: Family<Launch, Counter>,
    adopted: Family<Template, Counter>,
    writes: Family<Verb, Counter>,
    reconciles: Family<Result, Counter>,
    reconcile_seconds: Histograms<Of>,
    queue: Gauge,
    sandboxes: Family<Sandboxes, Gauge>,
}

/// Milliseconds: 1 ms to 4 min.
fn latency() -> Histogram {
    let bounds = [
        1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 50.0, 80.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0,
        5_000.0, 10_000.0, 30_000.0, 60_000.0, 120_000.0, 240_000.0,
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
            claim_controller_startup: Family::new_with_constructor(latency),
            claims: Family::default(),
            adopted: Family::default(),
            writes: Family::default(),
            reconciles: Family::default(),
            reconcile_seconds: Family::new_with_constructor(duration),
            queue: Gauge::default(),
            sandboxes: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&self) {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("agent_sandbox_build", "Version of the controller", build);
        registry.register(
            "agent_sandbox_claim_startup_latency_ms",
            "Milliseconds from the making of a claim, in whole seconds, to its readiness",
            self.claim_startup.clone(),
        );
        registry.register(
            "agent_sandbox_claim_controller_startup_latency_ms",
            "Milliseconds from the controller's first sight of a claim to its readiness",
            self.claim_controller_startup.clone(),
        );
        registry.register(
            "agent_sandbox_claim_creation",
            "Claims that have become ready",
            self.claims.clone(),
        );
        registry.register("agent_sandboxes", "Sandboxes", self.sandboxes.clone());
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
    }

    pub(crate) fn wrote(&self, verb: &str) {
        let verb = verb.to_owned();
        self.writes.get_or_create(&Verb { verb }).inc();
    }

    pub(crate) fn adopted(&self, template: &str) {
        let sandbox_template = template.to_owned();
        self.adopted
            .get_or_create(&Template { sandbox_template })
            .inc();
    }

    pub(crate) fn claim_ready(
        &self,
        launch: &str,
        template: &str,
        since_made: Option<Duration>,
        since_seen: Duration,
    ) {
        let labels = Launch {
            launch_type: launch.to_owned(),
            sandbox_template: template.to_owned(),
        };
        self.claims.get_or_create(&labels).inc();
        if let Some(since) = since_made {
            self.claim_startup
                .get_or_create(&labels)
                .observe(millis(since));
        }
        self.claim_controller_startup
            .get_or_create(&labels)
            .observe(millis(since_seen));
    }

    pub(crate) fn reconciled(&self, class: Class, outcome: Outcome, took: Duration) {
        let kind = format!("{class:?}");
        let result = if outcome == Outcome::Failed {
            "error"
        } else {
            "success"
        };
        let labels = Result {
            kind: kind.clone(),
            result: result.to_owned(),
        };
        self.reconciles.get_or_create(&labels).inc();
        self.reconcile_seconds
            .get_or_create(&Of { kind })
            .observe(took.as_secs_f64());
    }

    /// All metrics as text.
    pub(crate) fn text(&self, context: &Context) -> std::result::Result<String, std::fmt::Error> {
        self.queue
            .set(i64::try_from(context.queue.len()).unwrap_or(i64::MAX));
        self.count_sandboxes(context);
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        encode(&mut text, &registry)?;
        Ok(text)
    }

    fn count_sandboxes(&self, context: &Context) {
        self.sandboxes.clear();
        for sandbox in context.sandboxes.all() {
            let ready = sandbox.status.as_ref();
            let ready = ready.is_some_and(|s| condition::is_true(&s.conditions, READY));
            let labels = sandbox.metadata.labels.as_ref();
            let launch = labels.and_then(|l| l.get(kiln_crds::keys::LAUNCH_TYPE));
            let owned_by = owner::controller(&*sandbox).map_or("None", |o| o.kind.as_str());
            let labels = Sandboxes {
                namespace: sandbox.metadata.namespace.clone().unwrap_or_default(),
                ready_condition: ready.to_string(),
                launch_type: launch.cloned().unwrap_or_else(|| "unknown".to_owned()),
                sandbox_template: template_of(&sandbox).unwrap_or("__unknown__").to_owned(),
                owned_by: owned_by.to_owned(),
            };
            self.sandboxes.get_or_create(&labels).inc();
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}
