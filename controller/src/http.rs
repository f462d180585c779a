// SPDX-License-Identifier: Apache-2.0

//! `/healthz`, `/readyz` and `/metrics`.

use std::{io, net::SocketAddr, sync::Arc};

use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes};
use kiln_http::serve_probes;

use crate::{context::Context, watch::Synced};

/// What is answered from.
#[derive(Clone)]
pub(crate) struct Probes {
    pub(crate) context: Arc<Context>,
    pub(crate) synced: Arc<Synced>,
}

impl Probes {
    /// Serves on `address` until the process ends.
    pub(crate) fn serve(self, address: SocketAddr) -> io::Result<()> {
        serve_probes(address, move |path| self.answer(path)).map(drop)
    }

    fn metrics_text(&self) -> Result<String, std::fmt::Error> {
        let context = &self.context;
        context.metrics.text(&context.store, context.queue.len())
    }

    fn answer(&self, path: &str) -> Response<Full<Bytes>> {
        let (status, text) = match path {
            "/healthz" => (StatusCode::OK, "ok".to_owned()),
            "/readyz" if self.synced.is_complete() => (StatusCode::OK, "ok".to_owned()),
            "/readyz" => (
                StatusCode::SERVICE_UNAVAILABLE,
                "caches are not filled yet".to_owned(),
            ),
            "/metrics" => match self.metrics_text() {
                Ok(text) => (StatusCode::OK, text),
                Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
            },
            _ => (StatusCode::NOT_FOUND, "not found".to_owned()),
        };
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    }
}
