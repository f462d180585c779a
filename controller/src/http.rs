// SPDX-License-Identifier: Apache-2.0

//! `/healthz`, `/readyz` and `/metrics`.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tracing::debug;

use crate::{context::Context, watch::Synced};

/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is answered from.
#[derive(Clone)]
pub(crate) struct Probes {
    pub(crate) context: Arc<Context>,
    pub(crate) synced: Arc<Synced>,
}

impl Probes {
    /// Serves on `address` until the process ends.
    pub(crate) async fn serve(self, address: SocketAddr) -> io::Result<()> {
        let listener = bind(address).await?;
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        tokio::spawn(self.clone().connection(TokioIo::new(stream)));
                    }
                    // Out of descriptors, most likely: some will be free again.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        Ok(())
    }

    async fn connection(self, stream: TokioIo<tokio::net::TcpStream>) {
        let service = service_fn(|request: Request<hyper::body::Incoming>| {
            let answer = self.answer(request.uri().path());
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

    fn answer(&self, path: &str) -> Response<Full<Bytes>> {
        let (status, text) = match path {
            "/healthz" => (StatusCode::OK, "ok".to_owned()),
            "/readyz" if self.synced.is_complete() => (StatusCode::OK, "ok".to_owned()),
            "/readyz" => (
                StatusCode::SERVICE_UNAVAILABLE,
                "caches are not filled yet".to_owned(),
            ),
            "/metrics" => match self.context.metrics.text(&self.context) {
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

/// Listens on an address. Any address of IPv6 takes in IPv4 as well, and is any of IPv4 where the
/// machine has no IPv6.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(e) if address.ip() == Ipv6Addr::UNSPECIFIED && e.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}
