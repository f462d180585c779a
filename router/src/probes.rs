// SPDX-License-Identifier: Apache-2.0

//! `/healthz`, `/readyz` and `/metrics`, which are nobody's business who uses sandboxes.

use std::sync::Arc;

use hyper::{Response, StatusCode};
use tokio_util::sync::CancellationToken;

use crate::{body::Body, metrics::Metrics};

/// What is answered from.
#[derive(Clone)]
pub struct Probes {
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Cancelled when no further requests should come.
    pub stop: CancellationToken,
}

impl Probes {
    /// The answer to a request for `path`.
    #[must_use]
    pub fn answer(&self, path: &str) -> Response<Body> {
        let (status, text) = match path {
            "/healthz" => (StatusCode::OK, "ok".to_owned()),
            "/readyz" if self.stop.is_cancelled() => {
                (StatusCode::SERVICE_UNAVAILABLE, "ends".to_owned())
            }
            "/readyz" => (StatusCode::OK, "ok".to_owned()),
            "/metrics" => match self.metrics.text() {
                Ok(text) => (StatusCode::OK, text),
                Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
            },
            _ => (StatusCode::NOT_FOUND, "not found".to_owned()),
        };
        let mut response = Response::new(Body::text(text));
        *response.status_mut() = status;
        response
    }
}
