// SPDX-License-Identifier: Apache-2.0

//! One request, from a client to a sandbox and back.

use std::{sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode, Version,
    body::Incoming,
    header::{self, HeaderValue},
    upgrade::{self, OnUpgrade},
};
use hyper_util::rt::TokioIo;
use kiln_http::{Client, Hold, Timed};
use serde_json::json;
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info};

use crate::{
    address::Networks,
    auth::Auth,
    body::Body,
    connection::{Connection, Open, Protocol},
    dial::{DialError, dial},
    headers::{self, Origin},
    metrics::{InFlight, Metrics},
    refusal::{Refusal, json_response},
    target::Target,
    websocket,
};

/// Longest life of a WebSocket, as with upstream's first router.
const WEBSOCKET: Duration = Duration::from_secs(24 * 60 * 60);

/// How much, and how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long a sandbox may take to begin its answer, and how long nothing may come of it
    /// afterwards. A client can shorten it.
    pub patience: Duration,
    /// Further attempts to connect.
    pub retries: u32,
    /// How long nothing may come from a sandbox nor go to it, also on a WebSocket.
    pub idle: Duration,
}

/// Passes requests on.
pub struct Router {
    /// Who may use it.
    pub auth: Auth,
    /// Where sandboxes are.
    pub networks: Networks,
    /// The cluster's DNS domain.
    pub domain: String,
    /// How much, and how long.
    pub limits: Limits,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Cancelled when the router ends.
    pub stop: CancellationToken,
    /// WebSockets, which outlive their requests.
    pub tunnels: TaskTracker,
}

impl Router {
    /// Answers the request of `client`.
    pub async fn answer(&self, request: Request<Incoming>, client: Client) -> Response<Body> {
        if request.uri().path() == "/healthz" {
            return json_response(StatusCode::OK, &json!({"status": "ok"}));
        }
        let mut in_flight = InFlight::new(Arc::clone(&self.metrics), request.method());
        let response = match self.check(&request) {
            Ok(target) => self.forward(request, &target, &client).await,
            Err(refusal) => Err(refusal),
        };
        let response = response.unwrap_or_else(|refusal| {
            debug!("{}: {refusal}", client.address);
            refusal.response()
        });
        in_flight.answered(response.status());
        response.map(|body| body.counted(in_flight))
    }

    fn check(&self, request: &Request<Incoming>) -> Result<Target, Refusal> {
        self.auth.check(request.headers())?;
        // A tunnel to wherever the client wants.
        let is_websocket = websocket::is_extended(request.method(), request.extensions());
        if request.method() == Method::CONNECT && !is_websocket {
            return Err(Refusal::Method);
        }
        Target::of(request.headers(), &self.networks)
    }

    async fn forward(
        &self,
        mut request: Request<Incoming>,
        target: &Target,
        client: &Client,
    ) -> Result<Response<Body>, Refusal> {
        let most = self.limits.patience;
        let patience = target.timeout.unwrap_or(most).min(most);
        let is_extended = websocket::is_extended(request.method(), request.extensions());
        let wants_websocket = is_extended || headers::wants_websocket(request.headers());
        let upgrade = wants_websocket.then(|| upgrade::on(&mut request));
        if is_extended {
            websocket::to_sandbox(&mut request);
        }
        let protocol = Protocol::of(request.version(), request.headers());
        let request = self.to_sandbox(request, target, client, protocol)?;
        let exchange = self.exchange(request, target, protocol);
        let Ok(done) = timeout(patience, exchange).await else {
            return Err(self.failed(target, "timeout", &"no answer in time"));
        };
        let (mut response, connection) = done?;
        *response.version_mut() = Version::HTTP_11;
        headers::to_client(response.headers_mut());
        match (response.status(), upgrade) {
            (StatusCode::SWITCHING_PROTOCOLS, Some(from)) => {
                let hold = Arc::clone(&client.hold);
                self.join(from, upgrade::on(&mut response), connection, hold);
                match is_extended {
                    true => {
                        *response.status_mut() = StatusCode::OK;
                        websocket::to_client(response.headers_mut());
                    }
                    false => headers::upgrade(response.headers_mut()),
                }
                Ok(response.map(|_| Body::text("")))
            }
            (StatusCode::SWITCHING_PROTOCOLS, None) => Err(Refusal::Upgrade),
            // It would say that there is a WebSocket.
            (status, _) if is_extended && status.is_success() => Err(Refusal::NoWebSocket),
            _ => Ok(response.map(|body| Body::stream(body, connection, patience))),
        }
    }

    /// The request as the sandbox gets it: to its path, whatever form the client wrote it in.
    fn to_sandbox(
        &self,
        mut request: Request<Incoming>,
        target: &Target,
        client: &Client,
        protocol: Protocol,
    ) -> Result<Request<Incoming>, Refusal> {
        let host = HeaderValue::from_str(&target.host(&self.domain)).map_err(|_| Refusal::Id)?;
        // HTTP/2 has no Host.
        if let Some(authority) = request.uri().authority()
            && let Ok(asked) = authority.as_str().parse()
        {
            request.headers_mut().insert(header::HOST, asked);
        }
        let from = Origin {
            address: client.address,
            has_tls: client.has_tls,
        };
        headers::to_sandbox(request.headers_mut(), host, from, protocol);
        protocol.form(&mut request);
        Ok(request)
    }

    async fn exchange(
        &self,
        request: Request<Incoming>,
        target: &Target,
        protocol: Protocol,
    ) -> Result<(Response<Incoming>, Open), Refusal> {
        let retried = || self.metrics.retried();
        let stream = dial(
            target,
            &self.networks,
            &self.domain,
            self.limits.retries,
            retried,
        )
        .await;
        let stream = stream.map_err(|e| self.unreachable(target, &e))?;
        let connection = Connection::new(Timed::new(stream, self.limits.idle), protocol).await;
        let connection = connection.map_err(|e| self.failed(target, "other", &e))?;
        let answered = connection.send(request).await;
        answered.map_err(|e| self.failed(target, "eof", &e))
    }

    fn unreachable(&self, target: &Target, error: &DialError) -> Refusal {
        self.failed(target, error.reason(), error)
    }

    fn failed(
        &self,
        target: &Target,
        reason: &'static str,
        error: &dyn std::fmt::Display,
    ) -> Refusal {
        self.metrics.failed(reason);
        info!("{}/{}: {error}", target.namespace, target.id);
        let id = target.id.clone();
        match reason {
            "timeout" => Refusal::TimedOut(id),
            _ => Refusal::Unreachable(id),
        }
    }

    /// Copies between both sides of a WebSocket until one of them or the router ends. It keeps the
    /// place of the request that it was.
    fn join(&self, client: OnUpgrade, sandbox: OnUpgrade, connection: Open, hold: Arc<Hold>) {
        let (stop, idle) = (self.stop.clone(), self.limits.idle);
        self.tunnels.spawn(async move {
            let copied = async {
                // Over HTTP/2 the client's connection has other requests, which keep it alive.
                let client = Timed::new(TokioIo::new(client.await?), idle);
                let sandbox = TokioIo::new(sandbox.await?);
                websocket::copy(client, sandbox, &stop).await?;
                anyhow::Ok(())
            };
            let ended = timeout(WEBSOCKET, copied).await;
            debug!("WebSocket: {ended:?}");
            drop((connection, hold));
        });
    }
}
