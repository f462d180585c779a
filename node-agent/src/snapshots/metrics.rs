// SPDX-License-Identifier: Apache-2.0

//! Counts of snapshots, for Prometheus.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::TakeError;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Counts of snapshots.
pub(crate) struct Metrics {
    taken: Counter,
    failed: Family<Reason, Counter>,
    restored: Counter,
    cold: Counter,
    paused: Histogram,
    stored: Gauge,
    used: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let metrics = Self {
            taken: Counter::default(),
            failed: Family::default(),
            restored: Counter::default(),
            cold: Counter::default(),
            paused: Histogram::new([0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 20.0]),
            stored: Gauge::default(),
            used: Gauge::default(),
        };
        // A rate needs a zero to start from.
        for reason in TakeError::REASONS {
            drop(metrics.failed.get_or_create(&Reason { reason }));
        }
        metrics
    }

    /// Adds them to those that are served.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("kiln_snapshot");
        r.register(
            "taken",
            "Snapshots of Pods that were taken",
            self.taken.clone(),
        );
        r.register(
            "failed",
            "Snapshots that were not taken",
            self.failed.clone(),
        );
        r.register(
            "restored",
            "Pods that run from a snapshot",
            self.restored.clone(),
        );
        r.register(
            "cold",
            "Pods that started cold though there was a snapshot for them",
            self.cold.clone(),
        );
        let paused = self.paused.clone();
        r.register_with_unit(
            "paused",
            "Time that a Pod was paused for its snapshot",
            Unit::Seconds,
            paused,
        );
        r.register("stored", "Snapshots on this node", self.stored.clone());
        let used = self.used.clone();
        r.register_with_unit(
            "stored",
            "Size of the snapshots on this node",
            Unit::Bytes,
            used,
        );
    }

    pub(super) fn taken(&self, paused: Duration) {
        self.taken.inc();
        self.paused.observe(paused.as_secs_f64());
    }

    pub(super) fn failed(&self, why: &TakeError) {
        let reason = why.reason();
        self.failed.get_or_create(&Reason { reason }).inc();
    }

    pub(super) fn store_holds(&self, count: usize, bytes: u64) {
        self.stored.set(i64::try_from(count).unwrap_or(i64::MAX));
        self.used.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Counts what came of a restore.
    pub(crate) fn ended(&self, is_restored: bool) {
        let counter = if is_restored {
            &self.restored
        } else {
            &self.cold
        };
        counter.inc();
    }
}
