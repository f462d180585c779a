// SPDX-License-Identifier: Apache-2.0

//! One request, from a client to a sandbox and back.

use std::{net::IpAddr, sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode, Uri, Version,
    body::Incoming,
    client::conn::http1,
    header::HeaderValue,
    upgrade::{self, OnUpgrade},
};
use hyper_util::rt::TokioIo;
use kiln_http::{BUFFER, Client, Place, Timed};
use serde_json::json;
use tokio::{io::copy_bidirectional, net::TcpStream, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle, task::TaskTracker};
use tracing::{debug, info};

use crate::{
    address::Networks,
    auth::Auth,
    body::Body,
    dial::{DialError, dial},
    headers,
    metrics::{InFlight, Metrics},
    refusal::{Refusal, json_response},
    target::Target,
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

/// A connection to a sandbox.
struct Connection {
    sender: http1::SendRequest<Incoming>,
    task: AbortOnDropHandle<()>,
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
        if request.method() == Method::CONNECT {
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
        let upgrade =
            headers::wants_websocket(request.headers()).then(|| upgrade::on(&mut request));
        let request = self.to_sandbox(request, target, client.address)?;
        let exchange = self.exchange(request, target);
        let Ok(done) = timeout(patience, exchange).await else {
            return Err(self.failed(target, "timeout", &"no answer in time"));
        };
        let (mut response, connection) = done?;
        *response.version_mut() = Version::HTTP_11;
        headers::to_client(response.headers_mut());
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let from = upgrade.ok_or(Refusal::Upgrade)?;
            let place = Arc::clone(&client.place);
            self.join(from, upgrade::on(&mut response), connection, place);
            headers::upgrade(response.headers_mut());
            return Ok(response.map(|_| Body::text("")));
        }
        Ok(response.map(|body| Body::stream(body, connection, patience)))
    }

    /// The request as the sandbox gets it: to its path, whatever form the client wrote it in.
    fn to_sandbox(
        &self,
        mut request: Request<Incoming>,
        target: &Target,
        from: IpAddr,
    ) -> Result<Request<Incoming>, Refusal> {
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path.map_or_else(Uri::default, Uri::from);
        *request.version_mut() = Version::HTTP_11;
        let host = HeaderValue::from_str(&target.host(&self.domain)).map_err(|_| Refusal::Id)?;
        headers::to_sandbox(request.headers_mut(), host, from);
        Ok(request)
    }

    async fn exchange(
        &self,
        request: Request<Incoming>,
        target: &Target,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), Refusal> {
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
        let connection = Connection::new(Timed::new(stream, self.limits.idle)).await;
        let mut connection = connection.map_err(|e| self.failed(target, "other", &e))?;
        let response = connection.sender.send_request(request).await;
        let response = response.map_err(|e| self.failed(target, "eof", &e))?;
        Ok((response, connection.task))
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
    /// place of the connection that it was.
    fn join(
        &self,
        client: OnUpgrade,
        sandbox: OnUpgrade,
        connection: AbortOnDropHandle<()>,
        place: Arc<Place>,
    ) {
        let stop = self.stop.clone();
        self.tunnels.spawn(async move {
            let copied = async {
                let mut client = TokioIo::new(client.await?);
                let mut sandbox = TokioIo::new(sandbox.await?);
                copy_bidirectional(&mut client, &mut sandbox).await?;
                anyhow::Ok(())
            };
            tokio::select! {
                ended = timeout(WEBSOCKET, copied) => debug!("WebSocket: {ended:?}"),
                () = stop.cancelled() => {}
            }
            drop((connection, place));
        });
    }
}

impl Connection {
    async fn new(stream: Timed<TcpStream>) -> hyper::Result<Self> {
        let handshake = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await?;
        let task = tokio::spawn(async move {
            if let Err(e) = connection.with_upgrades().await {
                debug!("connection to a sandbox: {e}");
            }
        });
        Ok(Self {
            sender,
            task: AbortOnDropHandle::new(task),
        })
    }
}
