// SPDX-License-Identifier: Apache-2.0

//! `/healthz`, `/readyz` and `/metrics`.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tracing::debug;

use crate::keeper::Keeper;

/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves on `address` until the process ends.
///
/// # Errors
/// When it cannot be listened there.
pub async fn serve(keeper: Arc<Keeper>, address: SocketAddr) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(connection(Arc::clone(&keeper), TokioIo::new(stream)));
                }
                // Out of descriptors, most likely: some will be free again.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    Ok(())
}

async fn connection(keeper: Arc<Keeper>, stream: TokioIo<tokio::net::TcpStream>) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let answer = answer(&keeper, request.uri().path());
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(stream, service);
    if let Err(e) = served.await {
        debug!("probe: {e}");
    }
}

fn answer(keeper: &Keeper, path: &str) -> Response<Full<Bytes>> {
    let (status, text) = match path {
        "/healthz" => (StatusCode::OK, "ok".to_owned()),
        "/readyz" => match keeper.look(|_, problem| problem.to_owned()) {
            problem if problem.is_empty() => (StatusCode::OK, "ok".to_owned()),
            problem => (StatusCode::SERVICE_UNAVAILABLE, problem),
        },
        "/metrics" => match keeper.look(|pool, _| keeper.metrics.text(pool)) {
            Ok(text) => (StatusCode::OK, text),
            Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
        },
        _ => (StatusCode::NOT_FOUND, "not found".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}
