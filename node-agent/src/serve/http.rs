// SPDX-License-Identifier: Apache-2.0

//! `/healthz`, `/readyz` and `/metrics`.

use std::{io, net::SocketAddr, sync::Arc};

use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes};
use kiln_http::serve_probes;

use crate::warm::WarmManager;

/// Serves on `address` until the process ends.
///
/// # Errors
/// When it cannot be listened there.
pub fn serve(manager: Arc<WarmManager>, address: SocketAddr) -> io::Result<()> {
    serve_probes(address, move |path| answer(&manager, path)).map(drop)
}

fn answer(manager: &WarmManager, path: &str) -> Response<Full<Bytes>> {
    let (status, text) = match path {
        "/healthz" => (StatusCode::OK, "ok".to_owned()),
        "/readyz" => match manager.snapshot().health.problem() {
            None => (StatusCode::OK, "ok".to_owned()),
            Some(problem) => (StatusCode::SERVICE_UNAVAILABLE, problem.to_owned()),
        },
        "/metrics" => match manager.metrics.text(&manager.snapshot().shapes) {
            Ok(text) => (StatusCode::OK, text),
            Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
        },
        _ => (StatusCode::NOT_FOUND, "not found".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}
