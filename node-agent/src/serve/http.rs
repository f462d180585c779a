// SPDX-License-Identifier: Apache-2.0

//! `/healthz`, `/readyz` and `/metrics`.

use std::{io, net::SocketAddr, sync::Arc};

use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes};
use kiln_http::serve_probes;

use crate::{snapshots::Snapshots, warm::WarmManager};

/// Serves on `address` until the process ends, with the metrics of `snapshots` too.
///
/// # Errors
/// When it cannot be listened there.
pub fn serve(
    manager: Arc<WarmManager>,
    snapshots: Option<Arc<Snapshots>>,
    address: SocketAddr,
) -> io::Result<()> {
    if let Some(snapshots) = &snapshots {
        manager
            .metrics
            .add(|registry| snapshots.metrics.register(registry));
    }
    let answer = move |path: &str| {
        if let Some(snapshots) = snapshots.as_ref().filter(|_| path == "/metrics") {
            snapshots.measure();
        }
        answer(&manager, path)
    };
    serve_probes(address, answer).map(drop)
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
