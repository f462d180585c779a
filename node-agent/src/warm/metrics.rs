// SPDX-License-Identifier: Apache-2.0

//! What the agent counts, for Prometheus.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

use super::{Miss, Recent, ShapeReport, Ways};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Class {
    class: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuntimeLabels {
    version: String,
    known: String,
    start: &'static str,
    image: String,
    gofers: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
}

/// What the agent counts.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    ready: Family<Class, Gauge>,
    warming: Family<Class, Gauge>,
    pub(crate) handed: Counter,
    adopted: Counter,
    pub(crate) released: Counter,
    pub(crate) lost: Counter,
    pub(crate) boot_failures: Counter,
    missed: Family<Reason, Counter>,
    pub(crate) boot: Histogram,
    adoption: Histogram,
    adoptions: Mutex<Recent>,
    pub(crate) held: Gauge,
    pub(crate) usable: Gauge,
    runtime: Family<RuntimeLabels, Gauge>,
    pub(crate) guards: Gauge,
    pub(crate) dropped: Counter,
    pub(crate) unguarded: Counter,
    pub(crate) served: Gauge,
    installs: Family<Outcome, Counter>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let metrics = Self {
            registry: Mutex::default(),
            ready: Family::default(),
            warming: Family::default(),
            handed: Counter::default(),
            adopted: Counter::default(),
            released: Counter::default(),
            lost: Counter::default(),
            boot_failures: Counter::default(),
            missed: Family::default(),
            boot: Histogram::new([0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 20.0]),
            adoption: Histogram::new([
                0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0,
            ]),
            adoptions: Mutex::default(),
            held: Gauge::default(),
            usable: Gauge::default(),
            runtime: Family::default(),
            guards: Gauge::default(),
            dropped: Counter::default(),
            unguarded: Counter::default(),
            served: Gauge::default(),
            installs: Family::default(),
        };
        for result in ["done", "failed"] {
            drop(metrics.installs.get_or_create(&Outcome { result }));
        }
        // A rate needs a zero to start from.
        for reason in Miss::ALL {
            metrics.missed(reason, 0);
        }
        metrics.register();
        metrics
    }

    fn register(&self) {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let r = registry.sub_registry_with_prefix("kiln_node");
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "Version of the agent", build);
        r.register(
            "warm_ready",
            "Warm sandboxes that can be adopted",
            self.ready.clone(),
        );
        r.register(
            "warm_warming",
            "Warm sandboxes that boot",
            self.warming.clone(),
        );
        r.register(
            "warm_handed",
            "Warm sandboxes given to a shim",
            self.handed.clone(),
        );
        r.register(
            "warm_adopted",
            "Pods that run in a warm sandbox",
            self.adopted.clone(),
        );
        r.register(
            "warm_released",
            "Adoptions that failed",
            self.released.clone(),
        );
        r.register(
            "warm_lost",
            "Warm sandboxes that ended by themselves",
            self.lost.clone(),
        );
        r.register(
            "warm_missed",
            "Pods that got no warm sandbox",
            self.missed.clone(),
        );
        let failures = self.boot_failures.clone();
        r.register("warm_boot_failures", "Boots that failed", failures);
        let seconds = Unit::Seconds;
        r.register_with_unit(
            "warm_boot",
            "Time of a boot",
            seconds.clone(),
            self.boot.clone(),
        );
        let adoption = self.adoption.clone();
        r.register_with_unit("warm_adoption", "Time of an adoption", seconds, adoption);
        let held = self.held.clone();
        r.register_with_unit("warm_held", "Memory of warm sandboxes", Unit::Bytes, held);
        let usable = self.usable.clone();
        r.register("warm_usable", "1 if the runtime passed its trial", usable);
        r.register(
            "runtime",
            "1 for the runtime in use, with how its sandboxes are made",
            self.runtime.clone(),
        );
        self.register_guard(r);
        self.register_install(r);
    }

    fn register_install(&self, r: &mut Registry) {
        r.register(
            "handler_served",
            "1 if containerd has the handler of the class, and all that is behind it is there",
            self.served.clone(),
        );
        r.register(
            "installs",
            "Times that the agent has put its files on the node, or back",
            self.installs.clone(),
        );
    }

    /// Counts a time that the files were put on the node, or back.
    pub(crate) fn installed(&self, is_done: bool) {
        let result = if is_done { "done" } else { "failed" };
        self.installs.get_or_create(&Outcome { result }).inc();
    }

    fn register_guard(&self, r: &mut Registry) {
        r.register(
            "link_local_guards",
            "1 if packets of Pods to link-local and metadata addresses can be dropped",
            self.guards.clone(),
        );
        r.register(
            "link_local_dropped",
            "Packets of Pods to link-local and metadata addresses that were dropped",
            self.dropped.clone(),
        );
        r.register(
            "link_local_unguarded",
            "Pods whose packets to link-local and metadata addresses are not dropped",
            self.unguarded.clone(),
        );
    }

    /// Has more metrics served.
    pub(crate) fn add(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Notes which runtime is in use.
    pub(crate) fn set_runtime(&self, version: &str, ways: Ways) {
        self.no_runtime();
        let labels = RuntimeLabels {
            version: version.to_owned(),
            known: ways.is_known.to_string(),
            start: ways.start_name(),
            image: ways.image.to_string(),
            gofers: ways.gofers.to_string(),
        };
        self.runtime.get_or_create(&labels).set(1);
    }

    /// Notes that no runtime is in use.
    pub(crate) fn no_runtime(&self) {
        self.runtime.clear();
    }

    /// Counts an adoption, and how long it took.
    pub(crate) fn adopted(&self, took: Duration) {
        self.adopted.inc();
        self.adoption.observe(took.as_secs_f64());
        self.adoptions().add(took);
    }

    /// Median of the last adoptions.
    pub(crate) fn adoption_time(&self) -> Option<Duration> {
        self.adoptions().median()
    }

    fn adoptions(&self) -> MutexGuard<'_, Recent> {
        // Times are in it or not, whoever panicked.
        self.adoptions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// How many Pods got none for a reason.
    pub(crate) fn missed_by(&self, miss: Miss) -> u64 {
        let reason = miss.name();
        self.missed.get_or_create(&Reason { reason }).get()
    }

    /// Counts `n` Pods that got none.
    pub(crate) fn missed(&self, miss: Miss, n: u64) {
        let reason = miss.name();
        self.missed.get_or_create(&Reason { reason }).inc_by(n);
    }

    /// The text that Prometheus reads.
    ///
    /// # Errors
    /// None in practice: the text is made in memory.
    pub(crate) fn text(&self, shapes: &[ShapeReport]) -> Result<String, std::fmt::Error> {
        self.ready.clear();
        self.warming.clear();
        for of in shapes {
            let class = of.wanted.as_ref().map_or("", |w| &w.class).to_owned();
            let class = Class { class };
            self.ready.get_or_create(&class).inc_by(of.ready.into());
            self.warming.get_or_create(&class).inc_by(of.warming.into());
        }
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}
