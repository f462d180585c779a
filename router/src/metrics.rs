// SPDX-License-Identifier: Apache-2.0

//! Metrics, under upstream's names (its `sandbox-router/observability/metrics.go`). Namespaces are
//! no labels: clients make them up.

use std::{fmt, sync::Arc, time::Instant};

use hyper::{Method, StatusCode};
use kiln_http::{Counts, Reason};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Bounds of durations, in seconds, as upstream has them.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    method: &'static str,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failure {
    reason: &'static str,
}

/// What the router counts.
pub struct Metrics {
    registry: Registry,
    requests: Family<Answer, Counter>,
    durations: Family<Answer, Histogram, fn() -> Histogram>,
    in_flight: Gauge,
    failures: Family<Failure, Counter>,
    retries: Counter,
    clients: Gauge,
    refused: Family<Reason, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("sandbox_router");
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            in_flight: Gauge::default(),
            failures: Family::default(),
            retries: Counter::default(),
            clients: Gauge::default(),
            refused: Family::default(),
            registry: Registry::default(),
        };
        registry.register(
            "requests",
            "Requests that were answered",
            metrics.requests.clone(),
        );
        registry.register(
            "request_duration_seconds",
            "From the head of a request to the end of its answer",
            metrics.durations.clone(),
        );
        registry.register(
            "inflight_requests",
            "Requests whose answer has not ended",
            metrics.in_flight.clone(),
        );
        registry.register(
            "upstream_errors",
            "Requests that no sandbox has answered",
            metrics.failures.clone(),
        );
        registry.register(
            "upstream_retries",
            "Further attempts to connect to a sandbox",
            metrics.retries.clone(),
        );
        registry.register(
            "connections",
            "Connections of clients, WebSockets among them",
            metrics.clients.clone(),
        );
        registry.register(
            "refused_connections",
            "Connections of clients for which there was no place",
            metrics.refused.clone(),
        );
        Self {
            registry,
            ..metrics
        }
    }
}

impl Metrics {
    /// All of them, as Prometheus reads them.
    ///
    /// # Errors
    /// None that is known: text takes any of it.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// What the listener for clients counts.
    #[must_use]
    pub fn connections(&self) -> Counts {
        Counts {
            connections: self.clients.clone(),
            refused: self.refused.clone(),
        }
    }

    pub(crate) fn failed(&self, reason: &'static str) {
        self.failures.get_or_create(&Failure { reason }).inc();
    }

    pub(crate) fn retried(&self) {
        self.retries.inc();
    }
}

/// A request under way; counted when it is dropped.
pub(crate) struct InFlight {
    metrics: Arc<Metrics>,
    method: &'static str,
    code: StatusCode,
    start: Instant,
}

impl InFlight {
    pub(crate) fn new(metrics: Arc<Metrics>, method: &Method) -> Self {
        metrics.in_flight.inc();
        Self {
            metrics,
            method: name(method),
            // nginx's for a client that has gone before there was an answer.
            code: StatusCode::from_u16(499).unwrap_or_default(),
            start: Instant::now(),
        }
    }

    pub(crate) fn answered(&mut self, code: StatusCode) {
        self.code = code;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let answer = Answer {
            method: self.method,
            code: self.code.as_u16(),
        };
        self.metrics.in_flight.dec();
        self.metrics.requests.get_or_create(&answer).inc();
        let seconds = self.start.elapsed().as_secs_f64();
        self.metrics
            .durations
            .get_or_create(&answer)
            .observe(seconds);
    }
}

/// Clients make methods up, too.
fn name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_when_they_end() {
        let metrics = Arc::new(Metrics::default());
        let mut request = InFlight::new(Arc::clone(&metrics), &Method::GET);
        assert!(metrics.text().unwrap().contains("inflight_requests 1\n"));
        request.answered(StatusCode::OK);
        drop(request);
        drop(InFlight::new(
            Arc::clone(&metrics),
            &Method::from_bytes(b"MADE-UP").unwrap(),
        ));
        metrics.failed("dial");
        metrics.retried();
        let text = metrics.text().unwrap();
        for line in [
            r#"sandbox_router_requests_total{method="GET",code="200"} 1"#,
            r#"sandbox_router_requests_total{method="other",code="499"} 1"#,
            r#"sandbox_router_request_duration_seconds_count{method="GET",code="200"} 1"#,
            "sandbox_router_inflight_requests 0",
            r#"sandbox_router_upstream_errors_total{reason="dial"} 1"#,
            "sandbox_router_upstream_retries_total 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
